"""The arithmetic that the transformations share: averages, bias corrections, norms."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core.dtypes import (
    abs_sq,
    as_scalar,
    compute_dtype,
    promote,
    real_dtype,
    scale,
)
from adam_transforms._core.sparse_rows import is_rows


def moving_average(average: jax.Array, x: jax.Array | float, decay: Any) -> jax.Array:
    """``decay * average + (1 - decay) * x``, in the form that is accurate for this decay.

    Near decay 1, ``decay`` and ``1 - decay`` rounded apart no longer add up to 1, which biases the
    average by 1.3e-5 at 0.999 in float32; ``average + (1 - decay) * (x - average)`` has no such
    bias. Near decay 0 that form would cancel, and the textbook one is exact.
    """
    if isinstance(decay, float):
        weight = 1.0 - decay
        times = scale if jnp.iscomplexobj(average) else operator.mul
        if decay < 0.5:
            return times(average, decay) + weight * x
        return average + times(x - average, weight)
    decay = as_scalar(decay, real_dtype(average.dtype))
    weight = 1.0 - decay
    x = jnp.asarray(x, average.dtype)
    textbook = scale(average, decay) + scale(x, weight)
    return jnp.where(decay < 0.5, textbook, average + scale(x - average, weight))


def scalar_at(value: Any, count: jax.Array) -> Any:
    """The value of a hyperparameter, perhaps a schedule, when `count` steps have been taken: a
    Python float, or a scalar of the widest float."""
    value = value(count) if callable(value) else value
    return value if isinstance(value, float) else as_scalar(value)


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``: what a moving average of `count` ones, started at zero, has reached.

    As ``-expm1(count * log1p(decay - 1))``, which is right to rounding; the literal form in
    float32 is off by 1.3e-5 at decay 0.999 and by 1.3e-2 at 0.999999 in the first steps. A decay
    given as a float32 array carries an error of that size itself: pass Python floats.
    """
    count = jnp.asarray(count, float)  # in the widest float that JAX is configured for
    if isinstance(decay, float):
        if decay == 0.0:  # log 0
            return jnp.ones_like(count)
        return -jnp.expm1(count * math.log1p(decay - 1.0))
    return -jnp.expm1(count * jnp.log1p(as_scalar(decay) - 1.0))


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
        x.sum_duplicates().values if is_rows(x) else jnp.asarray(x)
        for x in jax.tree.leaves(tree, is_leaf=is_rows)
    ]
    dtype = real_dtype(compute_dtype(*(x.dtype for x in leaves)))
    return jnp.sqrt(sum((sum_of_squares(x, dtype) for x in leaves), jnp.zeros((), dtype)))


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

    leaves = jax.tree.leaves(tree, is_leaf=is_rows)
    leaves = [x.masked_values() if is_rows(x) else jnp.asarray(x) for x in leaves]
    return jnp.all(jnp.array([finite(x) for x in leaves], bool))
