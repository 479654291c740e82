"""Dtypes: promotion, the dtypes to compute and to store in, rounding, complex arithmetic.

Anything computed from a gradient is computed in at least float32 (`compute_dtype`), and `store`
casts it to the dtype of its slot. Scalars that depend on the step alone are computed in
`scalar_dtype`: float32, or float64 when JAX's x64 mode is on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def promote(*dtypes: Any) -> np.dtype:
    """The dtype that holds all of `dtypes`, whatever promotion mode the user has set."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def compute_dtype(*dtypes: Any) -> np.dtype:
    """The dtype to compute in: the promotion of `dtypes`, and at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def real_dtype(dtype: Any) -> np.dtype:
    """The dtype of the absolute value: float32 for complex64, `dtype` itself if it is real."""
    return (
        jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.dtype(dtype)
    )


def nu_dtype(param_dtype: Any) -> np.dtype:
    """The default dtype of second moments: real, and at least float32, because a bfloat16 nu stops
    moving at b2 = 0.999."""
    return real_dtype(compute_dtype(param_dtype))


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
