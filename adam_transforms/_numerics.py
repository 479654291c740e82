"""The arithmetic that every transformation shares, each piece in one place.

Dtypes: anything computed from a gradient is computed in at least float32 (`compute_dtype`), and
`store` brings it back to the dtype it is kept in. Scalars that depend on the step alone are
computed in `scalar_dtype`: float32, or float64 when JAX's x64 mode is on.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def promote(*dtypes: Any) -> np.dtype:
    """The dtype that holds all of `dtypes`, whatever promotion mode the user has set."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def compute_dtype(*dtypes: Any) -> np.dtype:
    """The dtype to compute in: the promotion of `dtypes`, and at least float32."""
    return promote(jnp.float32, *dtypes)


def real_dtype(dtype: Any) -> np.dtype:
    """The dtype of the absolute value: float32 for complex64, `dtype` itself if it is real."""
    return (
        jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.dtype(dtype)
    )


def scalar_dtype() -> np.dtype:
    """The widest float that JAX is configured for."""
    return jnp.result_type(float)


def as_scalar(value: Any, dtype: Any = None) -> Any:
    """`value` ready to meet an array of a real `dtype`: a Python number stays one (it adapts to
    any array without promoting it), an array is cast."""
    if isinstance(value, int | float):
        return float(value)
    return jnp.asarray(value).astype(scalar_dtype() if dtype is None else dtype)


def store(path: str, x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in the `dtype` that it is kept in for the parameter at `path`.

    A real result meant for a complex slot (Optax keeps nu complex beside complex parameters) gets
    a zero imaginary part; the reverse, which would lose one, is a TypeError.
    """
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{path!r} is kept in {dtype} and cannot take values in {x.dtype}")
    return x.astype(dtype)


def real(x: jax.Array) -> jax.Array:
    """The real part; `x` itself if it is real."""
    return x.real if jnp.iscomplexobj(x) else x


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, real."""
    return x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x * x


def scale(x: jax.Array, factor: Any) -> jax.Array:
    """``x * factor`` for a real `factor` of the same precision: a number, a scalar or an array
    like `x`. Also right where `x` is complex, which strict promotion would refuse."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(x.real * factor, x.imag * factor)
    return x * factor


def moving_average(average: jax.Array, x: jax.Array | float, decay: Any) -> jax.Array:
    """``decay * average + (1 - decay) * x``, in the form that is accurate for this decay.

    Near decay 1, ``decay`` and ``1 - decay`` rounded apart no longer add up to 1, which biases the
    average by 1.3e-5 at 0.999 in float32; ``average + (1 - decay) * (x - average)`` has no such
    bias. Near decay 0 that form would cancel, and the textbook one is exact.
    """
    if isinstance(decay, float):
        weight = 1.0 - decay
        if decay < 0.5:
            return scale(average, decay) + weight * x
        return average + scale(x - average, weight)
    decay = as_scalar(decay, real_dtype(average.dtype))
    weight = 1.0 - decay
    x = jnp.asarray(x, average.dtype)
    textbook = scale(average, decay) + scale(x, weight)
    return jnp.where(decay < 0.5, textbook, average + scale(x - average, weight))


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``: what a moving average of `count` ones, started at zero, has reached.

    As ``-expm1(count * log1p(decay - 1))``, which is right to rounding; the literal form in
    float32 is off by 1.3e-5 at decay 0.999 and by 1.3e-2 at 0.999999 in the first steps. A decay
    given as a float32 array carries an error of that size itself: pass Python floats.
    """
    count = jnp.asarray(count).astype(scalar_dtype())
    if isinstance(decay, float):
        if decay == 0.0:  # log 0
            return jnp.ones_like(count)
        return -jnp.expm1(count * math.log1p(decay - 1.0))
    return -jnp.expm1(count * jnp.log1p(as_scalar(decay) - 1.0))


# LLVM unrolls a loop over a row's elements of fewer instructions than this, and then it leaves it
# scalar: several times as many instructions, of which so many fewer rows are under way at a time.
_UNROLLED = 300
_INSTRUCTIONS_OF_A_CHOICE = 3


def computed_once(x: jax.Array, instructions: int) -> jax.Array:
    """`x`, which XLA on CPU then computes once for all its uses. Elsewhere one kernel has them all.

    XLA repeats cheap arithmetic in every kernel that needs the result. Where rows gathered from a
    table go into it, the gather becomes a kernel of its own instead, and a gather without
    arithmetic is a scalar copy that takes four times as long. XLA does not repeat divisions, so
    this divides `x` by a 1 that depends on `x`: by two shifts, which XLA takes as they are. LLVM,
    which gets the kernel then, sees through them, and nothing is left of the division.

    Args:
      x: (n, D...).
      instructions: about how many the kernel has for an element of `x`. If a row's are few enough
        to be unrolled, choices between `x` and `x` are added, unless it would take many.
    """
    # A complex division by 1 is not exact, and integers need more.
    if jax.default_backend() != "cpu" or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    columns = x.shape[-1] if x.ndim else 1
    missing = _UNROLLED / max(columns, 1) - instructions
    choices = math.ceil(missing / _INSTRUCTIONS_OF_A_CHOICE)
    for limit in range(1, 1 + choices) if choices <= 2 else ():
        x = jnp.where(x > limit, jnp.maximum(x, float(limit)), x)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    for distance in (1, 8 * x.dtype.itemsize - 1):  # all bits out
        bits = jax.lax.shift_right_logical(bits, jnp.array(distance, unsigned))
    ones = np.ones((), x.dtype).view(unsigned)
    return x / jax.lax.bitcast_convert_type(bits | ones, x.dtype)


def witness(x: jax.Array) -> jax.Array:
    """A scalar for `after`: XLA has it only when it has `x`, or some other use of what is in it."""
    return jnp.min(jnp.abs(x), initial=1.0)


def computed_before(x: jax.Array) -> jax.Array:
    """`x`, (n, D...), which XLA on CPU then computes in a kernel of its own, before its only use.

    For rows gathered from a table: of a short kernel more rows are under way at a time.
    """
    return after([witness(x[:1])], x) if jax.default_backend() == "cpu" else x


def after(witnesses: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """`x`, which XLA then has only after all that the `witnesses` are of.

    XLA writes into an array in place where it knows all reads of it to come before; else it copies
    the array. That a write depends on what was read is how it knows.
    """
    for witness in witnesses:
        x = jnp.where(witness == 2.0, jnp.zeros((), x.dtype), x)  # it is 1 at most
    return x


def increment(count: jax.Array) -> jax.Array:
    """``count + 1``, which stays at the largest integer once it is there."""
    return jnp.asarray(optax.safe_increment(count))


def global_norm(tree: Any) -> jax.Array:
    r"""The Euclidean norm of all elements of all leaves together.

    .. math:: \sqrt{\sum_i |x_i|^2}

    Args:
      tree: arrays of any shapes and dtypes, and row gradients; None leaves count for nothing.

    Returns:
      A scalar, in at least float32 (a float16 sum of squares would overflow at 65,504); 0 for an
      empty tree.

    >>> import jax.numpy as jnp
    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0), "c": None}))
    5.0
    """
    leaves = [
        # Of a row gradient, the norm of the array that it stands for.
        x.sum_duplicates().values if _is_rows(x) else jnp.asarray(x)
        for x in jax.tree.leaves(tree, is_leaf=_is_rows)
    ]
    dtype = real_dtype(compute_dtype(*(x.dtype for x in leaves)))
    return jnp.sqrt(sum((sum_of_squares(x, dtype) for x in leaves), jnp.zeros((), dtype)))


def _is_rows(x: Any) -> bool:
    return hasattr(type(x), "sum_duplicates")


def sum_of_squares(x: jax.Array, dtype: Any) -> jax.Array:
    """Sum of |x|^2 over one leaf, accumulated in the real `dtype`."""
    wide = promote(x.dtype, dtype)
    return jnp.sum(abs_sq(x.astype(wide))).astype(dtype)


def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds an infinity or a NaN; a bool scalar."""

    def finite(x: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            return finite(x.real) & finite(x.imag)
        # Times 0, all that is not finite is NaN, and a NaN wins any sum. A maximum it may lose, as
        # XLA reduces on CPU; all(isfinite(x)) is right too, but writes an array of bools.
        return jnp.sum(x * 0.0) == 0.0

    leaves = jax.tree.leaves(tree, is_leaf=_is_rows)
    leaves = [x.masked_values() if _is_rows(x) else jnp.asarray(x) for x in leaves]
    return jnp.all(jnp.array([finite(x) for x in leaves], bool))


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x`, real, rounded to what `dtype` represents, in its own dtype.

    Casts do not say so: XLA may leave out one that the next one undoes, and with it the rounding.
    On GPUs it does.
    """
    to, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if to.bits >= own.bits:
        return x
    if to.nexp == own.nexp:
        return jax.lax.reduce_precision(x, int(to.nexp), int(to.nmant))
    # Of subnormal numbers of `dtype`, reduce_precision makes zeros.
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds each element of `x` to one of its two neighbours in `dtype`, at random.

    The neighbour at distance d of a gap g is taken with probability 1 - d/g, so that the expected
    result is `x` itself (but XLA may flush what is subnormal in float32). Values that `dtype`
    represents, and those beyond its range, come out as nearest rounding gives them.

    Args:
      x: a real array.
      dtype: a floating dtype narrower than `x`'s.
      key: a PRNG key.
    """
    nearest = x.astype(dtype)
    nearest_wide = rounded(x, dtype)
    rest = x - nearest_wide
    direction = jnp.where(rest > 0, jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(nearest, direction)
    gap = jnp.abs(other.astype(x.dtype) - nearest_wide)
    take_other = jax.random.uniform(key, x.shape, x.dtype) * gap < jnp.abs(rest)
    return jnp.where(take_other & jnp.isfinite(other), other, nearest)
