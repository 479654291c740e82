r"""Codes of Adam's moments in 8 and 16 bits an element, with stochastic rounding.

**16 bits.** The bits of a bfloat16, rounded stochastically.

**8 bits.** Codes are equidistant in pieces. The gap of the first piece is the unit of the code, and
that of each further piece is wider, by a power of two.

The second moment is coded by the distance of its logarithm of base 2, linear between powers of two,
from a center c: :math:`L(v) = c \pm w\, x_k`. A group of elements shares the integer c and the
width w, a power of two: the elements of the last axes, 16 or more of them, but never of the first
axis of several. With nine bits, the gaps of x are 1/128 up to 1.25, 1/64 up to 2.4, 1/2 up to 10
and 8 up to 58: near the center a factor :math:`2^{w/128}`, 0.5 % for w = 1. All codes are normal
float32 numbers: no v that is not zero becomes zero. Center and width are computed from the codes of
the step before. The center is halfway between the smallest and the largest, the width one of 1, 2,
..., 64. The center moves if the rounded distance to that middle is more than one binade and more
than w / 16. The width changes if the largest distance from the center is outside [1.07 w, 2.2 w].

The first moment is coded relative to a power of two s, between :math:`\sqrt{v/2}` and
:math:`\sqrt{2v}` of the stored v, element by element: :math:`m = \pm s\, y_k`. With seven bits, the
gaps of y are 3/128 up to 0.9, 3/32 up to 2, 3/8 up to 5 and 3/2 up to 11. By the inequality of
Cauchy and Schwarz :math:`|m| / \sqrt v` is at most
:math:`(1-b_1) / \sqrt{(1-b_2)(1-b_1^2/b_2)}` for :math:`b_1 < \sqrt{b_2}`, which is 7.3 at the
default rates. The codes reach 7.8 roots or more. A larger ratio, which other rates make possible,
is cut off there: the update is then smaller than Adam's.

**Both in 16 bits.** Noise of v stays for 1 / (1 - b2) steps, that of m for 1 / (1 - b1) only. The
second moment therefore has nine bits and the first seven, in one word of 16. Where each has an
array of its own, each has eight bits: the second moment has half as many codes in each piece, the
first twice as many.

**Errors.** Rounding adds a uniform random number to the position between two codes and takes the
integer below: a value becomes one of its neighbours, and a value that is a code stays. The expected
value is exact where v or m is linear in the position. So it is for m, and for v where the gap is at
most a binade, since powers of two are codes then. A step moves v by about :math:`(1-b_2) v`, and
rounding adds a variance of :math:`|\Delta v|` times the gap. Over the memory of v this is a
standard deviation of :math:`v \sqrt{0.7 \delta \kappa / 2}`, where :math:`\delta` is the gap in
binades and :math:`\kappa` the mean of :math:`|g^2 / v - 1|`; the update has half of that, relative.
The rounding of m adds 6 % in seven bits, 3 % in eight.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BOTH_8, MU_8, NU_8, BITS_16 = jnp.uint16, jnp.int8, jnp.uint8, jnp.uint16

_CENTER = -30  # of a group without codes: (1 - b2) g^2 of a gradient of 1e-3
_CENTERS = (-126, 97)  # less _CENTER, they fit into a byte
_LOG_WIDTH = 5  # of a group without codes: few gradients are far off the center
_LOG_WIDTHS = (0, 6)
_LEAST_GROUP = 16
# The largest distances, in widths, at which a width stays: within the first two pieces of codes,
# and more than a factor 2 apart, so that a width that has changed does not change back.
_WIDER, _NARROWER = 2.2, 1.07

_MANTISSA_BITS, _BIAS = 23, 127
_SMALLEST, _LARGEST = 0x00800000, 0x7F7FFFFF  # normal float32 numbers
_INFINITY = 0x7F800000
# Second moments are coded as multiples of 2^-7 binades.
_UNIT_BITS = _MANTISSA_BITS - 7


# ---- random numbers -----------------------------------------------------------------------------


class Noise(NamedTuple):
    """Random numbers for the roundings of one leaf: a hash of seed, leaf, step and element.

    Attributes:
      first, second: uint32 scalars of the seed, the leaf and the step.
    """

    first: jax.Array
    second: jax.Array

    @classmethod
    def of(cls, seed: int, leaf: int, count: jax.Array) -> "Noise":
        fixed = _hash(np.full((), (seed * 0x9E3779B9 + leaf * 0x85EBCA6B) % 2**32, np.uint32))
        first = _hash(count.astype(jnp.uint32) ^ fixed)
        return cls(first, _hash(first ^ np.uint32(0x68E31DA4)))

    def bits(self, shape: tuple[int, ...]) -> jax.Array:
        """uint32 of `shape`, each a function of the position of its element. The second moment is
        rounded by the high bits, the first by the 16 low ones."""
        index, stride = self.first, 1
        for axis in reversed(range(len(shape))):
            position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = index + position * np.uint32(stride % 2**32)
            stride *= shape[axis]
        return _hash(index ^ self.second)


def _high(bits: jax.Array, number: int) -> jax.Array:
    return bits >> np.uint32(32 - number)


def _low(bits: jax.Array, number: int) -> jax.Array:
    return bits & np.uint32((1 << number) - 1)


def _hash(x: Any) -> Any:
    """`lowbias32 <https://github.com/skeeto/hash-prospector>`_ of uint32."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))


# ---- both moments -------------------------------------------------------------------------------


class Codes(NamedTuple):
    """The coded moments of one parameter.

    Attributes:
      both: uint16, seven bits of mu and nine of nu; None if these have their own arrays.
      mu: int8, or uint16 at 16 bits.
      nu: uint8, or uint16 at 16 bits, of the shape of `mu` or one that broadcasts to it.
      nu_range: int16 for each group, where the codes of nu lie; None at 16 bits.
    """

    both: Any
    mu: Any
    nu: Any
    nu_range: Any


def decode(codes: Codes) -> tuple[jax.Array, jax.Array]:
    """(mu, nu) in float32."""
    if codes.both is not None:
        word = codes.both.astype(jnp.int32)
        v = _levels(word >> 7, codes.nu_range, 9)
        return _decode_mu(word & 127, v, 7), v
    v = decode_nu(codes.nu, codes.nu_range)
    if codes.mu.dtype != MU_8:
        return _from_bfloat16(codes.mu), v
    return _decode_mu(codes.mu.astype(jnp.int32) & 255, v, 8), v


def decode_nu(nu: jax.Array, nu_range: Any) -> jax.Array:
    """A second moment that is coded alone, in float32."""
    return _levels(nu.astype(jnp.int32), nu_range, 8) if nu.dtype == NU_8 else _from_bfloat16(nu)


def encode(old: Codes, m: jax.Array, v: jax.Array, noise: Noise) -> Codes:
    """The codes of the moments `m` and `v`, of the kinds of the `old` ones."""
    m, v, bits = _float32(m), _float32(v), noise.bits(m.shape)
    if old.both is not None:
        nu_range = _next_range(old.both >> np.uint16(7), old.nu_range, 9)
        nu, stored = _codes(v, nu_range, bits, 9)
        mu = _encode_mu(m, stored, nu == 0, bits, 7)
        return Codes(_joined(nu << 7, mu, BOTH_8), None, None, nu_range)
    nu, nu_range = encode_nu(old.nu, old.nu_range, v, noise)
    if old.mu.dtype != MU_8:
        return Codes(None, _to_bfloat16(m, _low(bits, 16)), nu, nu_range)
    stored = decode_nu(nu, nu_range)
    mu = _encode_mu(m, stored, stored == 0, bits, 8)
    return Codes(None, _joined(mu & 128, mu & 127, MU_8), nu, nu_range)


def encode_nu(old: jax.Array, nu_range: Any, v: jax.Array, noise: Noise) -> tuple[jax.Array, Any]:
    """The codes of a second moment alone, and where they lie; of the kind of the `old` ones."""
    v, bits = _float32(v), noise.bits(v.shape)
    if old.dtype != NU_8:
        return _to_bfloat16(v, _high(bits, 16)), None
    nu_range = _next_range(old, nu_range, 8)
    nu, _ = _codes(v, nu_range, bits, 8)
    return _joined(nu & 128, nu & 127, NU_8), nu_range


def _joined(high: jax.Array, low: jax.Array, dtype: Any) -> jax.Array:
    """``high | low`` in a smaller dtype.

    An array that is made by a cast alone is computed anew for each use, and this one is not:
    `test_compress_moments.test_a_step_keeps_no_copy_of_the_moments`.
    """
    return high.astype(dtype) | low.astype(dtype)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


# ---- 16 bits ------------------------------------------------------------------------------------


def _to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The bits of `x` in bfloat16, rounded stochastically by `noise`, 16 bits in uint32. No finite
    number becomes infinite, and no normal number zero."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    rounded = jnp.minimum(size + noise, np.uint32(_LARGEST))
    rounded = jnp.where(size < np.uint32(_INFINITY), rounded, size)
    return _joined((bits ^ size) >> np.uint32(16), rounded >> np.uint32(16), BITS_16)


def _from_bfloat16(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint32) << np.uint32(16), jnp.float32)


# ---- 7 to 9 bits --------------------------------------------------------------------------------


class _Scale:
    """Sizes for the codes 0, 1, ...: multiples of a unit, equidistant in pieces."""

    def __init__(self, *pieces: tuple[int, int]) -> None:
        """
        Args:
          pieces: how many codes, and their gap in units: wider ones after narrower ones, powers of
            two, the first 1.
        """
        number, size = 0, 0
        lines = []  # The size of code k is the largest of gap * k - shift.
        for codes, gap in pieces:
            lines.append((float(gap), float(gap * number - size)))
            number, size = number + codes, size + codes * gap
        self._lines = lines[1:]
        # Bits behind the point of a float32 from 2^n to 2^(n+1), where 2^n exceeds every code.
        self.fraction_bits = _MANTISSA_BITS - number.bit_length()

    def size(self, k: jax.Array) -> jax.Array:
        """In units, of codes in float32; exact."""
        size = k
        for gap, shift in self._lines:
            size = _larger(size, gap * k - shift)
        return size

    def code(self, size: jax.Array, largest: int, noise: jax.Array) -> jax.Array:
        """The int32 codes of sizes in units, at most `largest`, rounded stochastically by `noise`,
        `fraction_bits` in uint32."""
        k = size
        for gap, shift in self._lines:
            k = _smaller(k, size * (1.0 / gap) + shift / gap)
        k = _smaller(k, float(largest))
        start = (_BIAS + _MANTISSA_BITS - self.fraction_bits) << _MANTISSA_BITS
        uniform = _from_bits(start | noise.astype(jnp.int32))
        return (_bits(uniform + k) - start) >> self.fraction_bits


# Of several pieces tried, those of the smallest errors (`benchmarks/bench_lowmem.py --only error`).
_NU_SCALES = {
    8: _Scale((80, 1), (36, 2), (8, 64), (4, 1024)),
    9: _Scale((160, 1), (72, 2), (16, 64), (8, 1024)),
}
_MU_SCALES = {
    7: _Scale((40, 1), (12, 4), (8, 16), (4, 64)),
    8: _Scale((80, 1), (24, 4), (16, 16), (8, 64)),
}
_MU_UNITS = {7: 3 / 128, 8: 3 / 256}


# A comparison and a choice: a maximum would also look for NaNs.
def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(x > y, x, y)


def _smaller(x: jax.Array, y: jax.Array | float) -> jax.Array:
    return jnp.where(x < y, x, y)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _from_bits(bits: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.int32), jnp.float32)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return _from_bits((exponent + _BIAS) << _MANTISSA_BITS)


# ---- 8 and 9 bits, second moment ----------------------------------------------------------------


def group_axes(shape: tuple[int, ...]) -> int:
    """The number of the first axes along which groups lie."""
    axes = max(len(shape) - 1, 0)
    while axes > 1 and math.prod(shape[axes:]) < _LEAST_GROUP:
        axes -= 1
    return axes


class _Grid(NamedTuple):
    """Where the codes of groups lie.

    Attributes:
      center: int32, the power of two in their middle.
      log_width: int32.
      bits: of a code.
    """

    center: jax.Array
    log_width: jax.Array
    bits: int

    @classmethod
    def of(cls, packed: jax.Array, ndim: int, bits: int) -> "_Grid":
        """From int16 of the first axes, the center in the low byte and the width above it."""
        packed = jnp.expand_dims(packed, tuple(range(packed.ndim, ndim))).astype(jnp.int32)
        log_width = (packed + 128) >> 8
        center = packed - (log_width << 8)
        return cls(center + _CENTER, log_width + _LOG_WIDTH, bits)

    def packed(self) -> jax.Array:
        center = jnp.clip(self.center, *_CENTERS) - _CENTER
        log_width = jnp.clip(self.log_width, *_LOG_WIDTHS) - _LOG_WIDTH
        return (log_width << 8).astype(jnp.int16) + center.astype(jnp.int16)

    @property
    def scale(self) -> _Scale:
        return _NU_SCALES[self.bits]

    @property
    def width(self) -> jax.Array:
        """In binades."""
        return _power_of_two(self.log_width)

    @property
    def log_unit(self) -> jax.Array:
        """Of the scale, in binades: a width has 2^(bits - 2) units."""
        return self.log_width - (self.bits - 2)

    def size(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The distance of v > 0 from the center, in units, and whether v is below."""
        distance = _bits(v) - self._bits_of_center()
        unit = _power_of_two(-_MANTISSA_BITS - self.log_unit)
        return jnp.abs(_float32(distance)) * unit, distance < 0

    def v(self, size: jax.Array) -> jax.Array:
        """The float32 at a distance of `size` units above the center, that of a code."""
        center = self._bits_of_center()
        multiple = size * _power_of_two(_MANTISSA_BITS - _UNIT_BITS + self.log_unit)
        multiple = _smaller(multiple, _float32((_LARGEST - center) >> _UNIT_BITS))
        # The integer is in the low bits of this sum.
        distance = _bits(multiple + 1.5 * 2.0**_MANTISSA_BITS) << _UNIT_BITS
        return _from_bits(jnp.maximum(center + distance, _SMALLEST))

    def _bits_of_center(self) -> jax.Array:
        return (self.center + _BIAS) << _MANTISSA_BITS


# The k-th level above the center has the code 2^(bits - 1) + k, the k-th below 2^(bits - 1) - k.
# The smallest code, 0, is kept for v = 0, and the largest for what is not finite.
def _levels(codes: jax.Array, packed: jax.Array, bits: int) -> jax.Array:
    """Second moments of int32 codes."""
    grid, k = _Grid.of(packed, codes.ndim, bits), codes - (1 << (bits - 1))
    size = grid.scale.size(_float32(jnp.abs(k)))
    v = grid.v(jnp.where(k < 0, -size, size))
    return jnp.where(codes == 0, 0.0, jnp.where(codes == (1 << bits) - 1, jnp.nan, v))


def _codes(
    v: jax.Array, packed: jax.Array, noise: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """int32 codes of second moments in float32, and, where these are positive and finite, what the
    codes stand for."""
    grid, middle = _Grid.of(packed, v.ndim, bits), 1 << (bits - 1)
    size, is_below = grid.size(v)
    k = grid.scale.code(size, middle - 2, _high(noise, grid.scale.fraction_bits))
    level = grid.scale.size(_float32(k))
    stored = grid.v(jnp.where(is_below, -level, level))
    codes = middle + jnp.where(is_below, -k, k)
    codes = jnp.where(v > 0, codes, 0)
    return jnp.where(v < jnp.inf, codes, (1 << bits) - 1), stored


def _next_range(nu: jax.Array, packed: jax.Array, bits: int) -> jax.Array:
    """Where the next codes lie, from the present ones, uint8 or uint16, of `bits`."""
    grid, middle = _Grid.of(packed, packed.ndim, bits), 1 << (bits - 1)
    axes = tuple(range(packed.ndim, nu.ndim))
    # The largest code, of what is not finite, plus one is 0 in so many bits, and the code 0 less
    # one is the largest number: neither counts. One reduction reads the codes once.
    one, zero = nu.dtype.type(1), nu.dtype.type(0)
    highest, lowest = jax.lax.reduce(
        ((nu + one) & nu.dtype.type((1 << bits) - 1), nu - one),
        (zero, ~zero),
        lambda x, y: (jnp.maximum(x[0], y[0]), jnp.minimum(x[1], y[1])),
        axes,
    )
    highest, lowest = highest.astype(jnp.int32) - 1, lowest.astype(jnp.int32) + 1

    def distance(code: jax.Array) -> jax.Array:
        """From the center, in binades."""
        k = _float32(jnp.clip(code - middle, 2 - middle, middle - 2))
        binades = jnp.sign(k) * grid.scale.size(jnp.abs(k)) * _power_of_two(grid.log_unit)
        return jnp.clip(binades, *(_float32(x - grid.center) for x in (1 - _BIAS, _BIAS + 1)))

    top, bottom = distance(highest), distance(lowest)
    shift = jnp.round((top + bottom) / 2)
    shift = jnp.where(jnp.abs(shift) > jnp.maximum(1.0, grid.width / 16), shift, 0.0)
    spread = jnp.maximum(top - shift, shift - bottom)
    wider = (spread > _WIDER * grid.width).astype(jnp.int32)
    narrower = (spread < _NARROWER * grid.width).astype(jnp.int32)
    moved = grid._replace(
        center=grid.center + shift.astype(jnp.int32), log_width=grid.log_width + wider - narrower
    )
    return jnp.where(highest > 0, moved.packed(), packed)


# ---- 7 and 8 bits, first moment -----------------------------------------------------------------


# The low bits of a code are those of k, and the high bit is set for m < 0.
def _decode_mu(codes: jax.Array, v: jax.Array, bits: int) -> jax.Array:
    """The first moment of int32 codes; `v` is the stored second moment."""
    high = 1 << (bits - 1)
    # The integer is in the low bits of a float32 from 2^23 on: faster than a cast.
    start = (_BIAS + _MANTISSA_BITS) << _MANTISSA_BITS
    k = _from_bits(start | (codes & (high - 1))) - 2.0**_MANTISSA_BITS
    size = _MU_SCALES[bits].size(k)
    size = size * (_MU_UNITS[bits] * _power_of_two(_log_root(v)))
    m = jnp.where(codes < high, size, -size)
    return jnp.where(v < jnp.inf, m, jnp.nan)


def _encode_mu(
    m: jax.Array, v: jax.Array, is_zero: jax.Array, noise: jax.Array, bits: int
) -> jax.Array:
    """int32 codes of a first moment in float32; `v` is the stored second moment where this is not
    zero."""
    high, scale = 1 << (bits - 1), _MU_SCALES[bits]
    size = jnp.abs(m) * (1.0 / _MU_UNITS[bits] * _power_of_two(-_log_root(v)))
    codes = scale.code(size, high - 1, _low(noise, scale.fraction_bits))
    codes = jnp.where(m < 0, codes + high, codes)
    return jnp.where(is_zero, 0, codes)


def _log_root(v: jax.Array) -> jax.Array:
    """The logarithm of the power of two from sqrt(v / 2) to sqrt(2 v), int32."""
    return ((_bits(v) >> _MANTISSA_BITS) + (1 - _BIAS)) >> 1
