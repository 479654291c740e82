r"""Codes of Adam's moments in 8 and 16 bits an element, with stochastic rounding.

**16 bits.** The bits of a bfloat16, rounded stochastically.

**8 bits, second moment.** The code is an integer k of at most K in size, with one code for zero and
one for what is not finite. With the logarithm :math:`L(v)` of base 2, linear between powers of two,
and a center c and a width w for each group of elements,

.. math::
  L(v) = c + x(k), \qquad x(k) = \frac{w k}{A - |k|}, \qquad A = K (1 + w / 160)

The gap between neighbours is a factor :math:`2^\delta` with
:math:`\delta = (w / A)(1 + |x| / w)^2`, for K = 255 and w = 2 about 0.5 % near the center. The
codes reach 160 binades below the center and 130 above it, and never leave the range of normal
float32 numbers: no v that is not zero becomes zero. A group is the elements of the last axes, 16 or
more of them, but never of the first axis of several. Its center and width are
computed from the codes of the step before: the center is the mean of 64 of them, and the width, one
of 2, 4, ..., 64, is about the largest distance from the center. Both stay until the mean has moved
by w / 4, or the distance has left [w / 2, 2 w]: in an unchanged group, a v that stands on a code is
stored exactly.

**8 bits, first moment.** Relative to s, the root of the stored second moment by a linear
interpolation of logarithms (which is within 6 % of it), element by element,

.. math::
  m = s\, \frac{h l}{B - |l|}, \qquad B = K_m (1 + h / 128), \qquad |l| \le K_m

By the inequality of Cauchy and Schwarz :math:`|m| / \sqrt v` is at most
:math:`(1-b_1) / \sqrt{(1-b_2)(1-b_1^2/b_2)}` for :math:`b_1 < \sqrt{b_2}`, which is 7.3 at the
default rates. The code reaches 128. A larger ratio, which is possible for b1 = 0 with b2 above
0.99994 and for b1 >= sqrt(b2), becomes 128: the update is then smaller than Adam's.

**Both in 16 bits.** Noise of v stays for 1 / (1 - b2) steps, that of m for 1 / (1 - b1) only. The
second moment therefore has nine bits, K = 255, and the first seven, K_m = 63 with h = 0.75, in one
word of 16. Alone each has eight: K = 127, and K_m = 127 with h = 0.7.

**Errors.** A value between two neighbours becomes one of them, with the probability that makes its
expected value exact. A step moves v by about :math:`(1-b_2) v`, and rounding adds a variance of
:math:`|\Delta v|` times the gap. Over the memory of v this is a standard deviation of
:math:`v \sqrt{0.7 \delta \kappa / 2}`, where :math:`\kappa` is the mean of :math:`|g^2 / v - 1|`;
the update has half of that, relative. The rounding of m adds 6 % in seven bits, 3 % in eight.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._xla.arithmetic import reciprocal, rounded

BOTH_8, MU_8, NU_8, BITS_16 = jnp.uint16, jnp.int8, jnp.uint8, jnp.uint16

_CENTER = -30  # of a group without codes: (1 - b2) g^2 of a gradient of 1e-3
_CENTERS = (-126, 97)  # less _CENTER, they fit into a byte
_LOG_WIDTH = 3  # of a group without codes
_LOG_WIDTHS = (1, 6)
_REACH = 160.0
_LEAST_GROUP = 16
_SAMPLE = 64
# Levels are multiples of 2^-13 binades: a product with another last bit gives the same level.
_FRACTION_BITS = 13

_LARGEST_RATIO = 128.0

_MANTISSA_BITS, _BIAS = 23, 127
_SMALLEST, _LARGEST = 0x00800000, 0x7F7FFFFF  # normal float32 numbers
_INFINITY = 0x7F800000


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

    def bits(self, shape: tuple[int, ...], stream: int = 0) -> jax.Array:
        """uint32 of `shape`, each a function of the position of its element and of `stream`."""
        index, stride = self.first, 1
        for axis in reversed(range(len(shape))):
            position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = index + position * np.uint32(stride % 2**32)
            stride *= shape[axis]
        second = self.second ^ np.uint32(stream * 0x2545F491 % 2**32)
        return _hash((index * np.uint32(0x9E3779B9)) ^ second)


def _hash(x: Any) -> Any:
    """`lowbias32 <https://github.com/skeeto/hash-prospector>`_ of uint32."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))


# A second moment moves by small parts of a gap, and gets the longer part of a hash.
def _uniform_for_nu(bits: jax.Array) -> jax.Array:
    return _float32((bits >> np.uint32(12)).astype(jnp.int32)) * 2.0**-20 + 2.0**-21


def _uniform_for_mu(bits: jax.Array) -> jax.Array:
    return _float32((bits & np.uint32(0xFFF)).astype(jnp.int32)) * 2.0**-12 + 2.0**-13


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
        return _decode_mu((word << 25) >> 25, v, 7), v
    v = decode_nu(codes.nu, codes.nu_range)
    if codes.mu.dtype != MU_8:
        return _from_bfloat16(codes.mu), v
    return _decode_mu(codes.mu.astype(jnp.int32), v, 8), v


def decode_nu(nu: jax.Array, nu_range: Any) -> jax.Array:
    """A second moment that is coded alone, in float32."""
    return _levels(nu.astype(jnp.int32), nu_range, 8) if nu.dtype == NU_8 else _from_bfloat16(nu)


def encode(old: Codes, m: jax.Array, v: jax.Array, noise: Noise) -> Codes:
    """The codes of the moments `m` and `v`, of the kinds of the `old` ones."""
    m, v = _float32(m), _float32(v)
    if old.both is not None:
        bits = noise.bits(m.shape)
        nu_range = _next_range(old.both >> np.uint16(7), old.nu_range, 9)
        nu, v = _codes(v, nu_range, _uniform_for_nu(bits), 9)
        mu = _encode_mu(m, v, _uniform_for_mu(bits), 7)
        return Codes(((nu << 7) | (mu & 127)).astype(BOTH_8), None, None, nu_range)
    nu, nu_range = encode_nu(old.nu, old.nu_range, v, noise)
    bits = noise.bits(m.shape, 1)
    if old.mu.dtype != MU_8:
        return Codes(None, _to_bfloat16(m, bits), nu, nu_range)
    mu = _encode_mu(m, decode_nu(nu, nu_range), _uniform_for_mu(bits), 8)
    return Codes(None, mu.astype(MU_8), nu, nu_range)


def encode_nu(old: jax.Array, nu_range: Any, v: jax.Array, noise: Noise) -> tuple[jax.Array, Any]:
    """The codes of a second moment alone, and where they lie; of the kind of the `old` ones."""
    v, bits = _float32(v), noise.bits(v.shape)
    if old.dtype != NU_8:
        return _to_bfloat16(v, bits), None
    nu_range = _next_range(old, nu_range, 8)
    return _codes(v, nu_range, _uniform_for_nu(bits), 8)[0].astype(NU_8), nu_range


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


# ---- 16 bits ------------------------------------------------------------------------------------


def _to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The bits of `x` in bfloat16, rounded stochastically by the high 16 bits of `noise`. No finite
    number becomes infinite, and no normal number zero."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    rounded = jnp.minimum(size + (noise >> np.uint32(16)), np.uint32(_LARGEST))
    bits = jnp.where(size < np.uint32(_INFINITY), (bits ^ size) | rounded, bits)
    return (bits >> np.uint32(16)).astype(BITS_16)


def _from_bfloat16(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint32) << np.uint32(16), jnp.float32)


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
      largest: the size of the largest code, K.
    """

    center: jax.Array
    log_width: jax.Array
    largest: int

    @classmethod
    def of(cls, packed: jax.Array, ndim: int, bits: int) -> "_Grid":
        """From int16 of the first axes, the center in the low byte and the width above it."""
        packed = jnp.expand_dims(packed, tuple(range(packed.ndim, ndim))).astype(jnp.int32)
        log_width = (packed + 128) >> 8
        center = packed - (log_width << 8)
        return cls(center + _CENTER, log_width + _LOG_WIDTH, 2 ** (bits - 1) - 1)

    def packed(self) -> jax.Array:
        center = jnp.clip(self.center, *_CENTERS) - _CENTER
        log_width = jnp.clip(self.log_width, *_LOG_WIDTHS) - _LOG_WIDTH
        return ((log_width << 8) + center).astype(jnp.int16)

    @property
    def bits_of_center(self) -> jax.Array:
        return (self.center + _BIAS) << _MANTISSA_BITS

    @property
    def width(self) -> jax.Array:
        bits = (self.log_width + _BIAS) << _MANTISSA_BITS
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    @property
    def scale(self) -> jax.Array:
        return self.largest + self.width * (self.largest / _REACH)

    def distance(self, k: jax.Array) -> jax.Array:
        """x(k), in binades."""
        return self.width * k * reciprocal(self.scale - jnp.abs(k))

    def level(self, k: jax.Array) -> jax.Array:
        """v of the code k, float32."""
        shift = _MANTISSA_BITS - _FRACTION_BITS
        distance = rounded(self.distance(k) * 2.0**_FRACTION_BITS)
        distance = jnp.minimum(distance, (_LARGEST - self.bits_of_center) >> shift)
        bits = jnp.maximum(self.bits_of_center + (distance << shift), _SMALLEST)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _levels(codes: jax.Array, packed: jax.Array, bits: int) -> jax.Array:
    """Second moments of int32 codes."""
    offset = 2 ** (bits - 1)
    v = _Grid.of(packed, codes.ndim, bits).level(_float32(codes - offset))
    v = jnp.where(codes == 0, 0.0, v)
    return jnp.where(codes == 2 * offset - 1, jnp.nan, v)


def _codes(
    v: jax.Array, packed: jax.Array, uniform: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """int32 codes of second moments in float32, and the second moments that they stand for."""
    grid, offset = _Grid.of(packed, v.ndim, bits), 2 ** (bits - 1)
    distance = jax.lax.bitcast_convert_type(v, jnp.int32) - grid.bits_of_center
    x = _float32(distance) * 2.0**-_MANTISSA_BITS
    k = jnp.floor(grid.scale * x * reciprocal(grid.width + jnp.abs(x)))
    k = jnp.clip(k, float(-grid.largest), float(grid.largest - 2))
    low, high = grid.level(k), grid.level(k + 1.0)
    is_up = uniform * (high - low) < v - low
    codes = rounded(jnp.where(is_up, k + 1.0, k)) + offset & 2 * offset - 1
    codes = jnp.where(v > 0, codes, 0)
    codes = jnp.where(v < jnp.inf, codes, 2 * offset - 1)
    stored = jnp.where(v > 0, jnp.where(is_up, high, low), 0.0)
    return codes, jnp.where(v < jnp.inf, stored, jnp.nan)


def _next_range(nu: jax.Array, packed: jax.Array, bits: int) -> jax.Array:
    """Where the next codes lie, from the present ones, uint8 or uint16, of `bits`."""
    nu = nu.reshape(*packed.shape, math.prod(nu.shape[packed.ndim :]))
    nu = nu[..., :: max(1, nu.shape[-1] // _SAMPLE)].astype(jnp.int32)
    k = jnp.where(nu == 0, 0, nu - 2 ** (bits - 1))
    # One sum contains the total of the codes and their number. The codes are fewer than
    # 2 * _SAMPLE, and each is below 2^8 in size.
    sums = jnp.sum(jnp.where(nu == 0, 0, k + (1 << 16)), -1, dtype=jnp.int32)
    number = _float32((sums + (1 << 15)) >> 16)
    total = _float32(sums) - number * 2.0**16
    grid = _Grid.of(packed, packed.ndim, bits)
    largest = jnp.minimum(jnp.max(jnp.abs(k), -1, initial=0), grid.largest)

    shift = grid.distance(total / jnp.maximum(number, 1.0))
    shift = jnp.where(jnp.abs(shift) > jnp.maximum(1.0, grid.width / 4), jnp.round(shift), 0.0)
    spread = grid.distance(_float32(largest)) - jnp.abs(shift)
    wider = (spread > 2.0 * grid.width).astype(jnp.int32)
    narrower = ((spread < 0.5 * grid.width) & (number > 0)).astype(jnp.int32)
    return grid._replace(
        center=grid.center + shift.astype(jnp.int32),
        log_width=grid.log_width + wider - narrower,
    ).packed()


# ---- 7 and 8 bits, first moment -----------------------------------------------------------------


def _decode_mu(codes: jax.Array, v: jax.Array, bits: int) -> jax.Array:
    """The first moment of int32 codes; `v` is the stored second moment."""
    k, width = _float32(codes), _mu_width(bits)
    m = width * k * reciprocal(_mu_scale(bits) - jnp.abs(k)) * _root(v)
    return jnp.where(v < jnp.inf, m, jnp.nan)


def _encode_mu(m: jax.Array, v: jax.Array, uniform: jax.Array, bits: int) -> jax.Array:
    """int32 codes of a first moment in float32; `v` is the second moment as it is stored."""
    size, scale = jnp.abs(m), _mu_scale(bits)
    y = scale * size * reciprocal(_mu_width(bits) * _root(v) + size)
    k = jnp.minimum(jnp.floor(y), 2.0 ** (bits - 1) - 2.0)
    rest = y - k
    # A value between the levels of k and k + 1 lies at rest * (scale - k - 1) / (scale - y) of the
    # way from the first to the second.
    k = jnp.where(uniform * (scale - y) < rest * (scale - k - 1.0), k + 1.0, k)
    return rounded(jnp.where((v > 0) & (size > 0), jnp.where(m < 0, -k, k), 0.0))


def _root(v: jax.Array) -> jax.Array:
    """Roughly the root of a normal float32, by halving its logarithm; about 2^-63.5 for zero."""
    bits = jax.lax.bitcast_convert_type(v, jnp.int32)
    bits = (bits >> 1) + (_BIAS << (_MANTISSA_BITS - 1))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mu_width(bits: int) -> float:
    return {7: 0.75, 8: 0.7}[bits]


def _mu_scale(bits: int) -> float:
    return (2 ** (bits - 1) - 1) * (1 + _mu_width(bits) / _LARGEST_RATIO)
