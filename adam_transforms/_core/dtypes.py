"""Dtypes: promotion, compute and storage dtypes, rounding, complex arithmetic.

Functions of gradients are computed in at least float32 (`compute_dtype`); `store` casts the result
to the dtype of its slot. Scalars that depend on the step alone are computed in `scalar_dtype`:
float32, or float64 in JAX's x64 mode.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._core.types import Path
from adam_transforms._xla.rounding import round_to as round_to


def promote(*dtypes: Any) -> np.dtype:
    """The standard promotion of `dtypes`, also under ``jax_numpy_dtype_promotion="strict"``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def compute_dtype(*dtypes: Any) -> np.dtype:
    """The dtype to compute in: the promotion of float32 and `dtypes`."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def real_dtype(dtype: Any) -> np.dtype:
    """The dtype of an absolute value: float32 for complex64, `dtype` itself if it is real."""
    return (
        jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.dtype(dtype)
    )


def nu_dtype(param_dtype: Any) -> np.dtype:
    """The default dtype of second moments: real, and at least float32, because a bfloat16 nu stops
    changing at b2 = 0.999."""
    return real_dtype(compute_dtype(param_dtype))


def scalar_dtype() -> np.dtype:
    """The widest float that is enabled in JAX."""
    return jnp.result_type(float)


def as_scalar(value: Any, dtype: Any = None) -> Any:
    """A scalar for arithmetic with arrays of a real `dtype` (default: `scalar_dtype`). A number
    becomes a Python float, which promotes no array; an array is cast to `dtype`."""
    if isinstance(value, int | float):
        return float(value)
    return jnp.asarray(value).astype(scalar_dtype() if dtype is None else dtype)


def store(path: Path, x: jax.Array, dtype: Any, key: jax.Array | None = None) -> jax.Array:
    """`x` in `dtype`, the storage dtype of an array that belongs to the parameter at `path`.

    It is rounded to nearest; with a PRNG `key`, and if `dtype` is a float below float32, by
    `round_stochastically`. A real array in a complex slot gets a zero imaginary part (in Optax the
    nu of a complex parameter is complex). A complex array in a real slot is a TypeError.
    """
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{path!r} is kept in {dtype} and cannot take values in {x.dtype}")
    if key is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits >= 32:
        return x.astype(dtype)
    return round_stochastically(x, dtype, key)


def saturate(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` within the range of `dtype`, if that is the smaller one: float16's ends at 65,504."""
    if jnp.finfo(dtype).maxexp >= jnp.finfo(x.dtype).maxexp:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest)


def real(x: jax.Array) -> jax.Array:
    """The real part; `x` itself if it is real."""
    return x.real if jnp.iscomplexobj(x) else x


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, real."""
    return x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x * x


def scale(x: jax.Array, factor: Any) -> jax.Array:
    """``x * factor`` for a real `factor` of the same precision: a number, a scalar or an array
    like `x`. A complex `x` is accepted under strict promotion too."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(x.real * factor, x.imag * factor)
    return x * factor


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds each element of `x` to one of its two neighbours in `dtype`, at random.

    With a gap g between the neighbours, the one at distance d is chosen with probability 1 - d/g.
    The expected result is `x` (float32 subnormals may be flushed to zero). Values that `dtype`
    represents, and values beyond its range, are rounded to nearest.

    Args:
      x: a real array.
      dtype: a floating dtype narrower than `x`'s.
      key: a PRNG key.
    """
    nearest = x.astype(dtype)
    nearest_wide = round_to(x, dtype)
    rest = x - nearest_wide
    direction = jnp.where(rest > 0, jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(nearest, direction)
    gap = jnp.abs(other.astype(x.dtype) - nearest_wide)
    take_other = jax.random.uniform(key, x.shape, x.dtype) * gap < jnp.abs(rest)
    return jnp.where(take_other & jnp.isfinite(other), other, nearest)
