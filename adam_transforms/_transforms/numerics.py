"""Arithmetic that several transformations use: averages, bias corrections, norms."""

import functools
import math
import operator
from typing import Any, NamedTuple

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
from adam_transforms._xla.reductions import is_all_finite


def moving_average(average: jax.Array, x: jax.Array | float, decay: Any) -> jax.Array:
    """``decay * average + (1 - decay) * x``, to rounding, without overflow."""
    decay = _scalar_like(average, decay)
    if not (isinstance(x, float) and isinstance(decay, float)):
        x = jnp.asarray(x, average.dtype)
    return _decay_and_add(average, average, _times(x, 1.0 - decay), decay)


def average_of_squares(average: jax.Array, x: jax.Array, decay: Any) -> jax.Array:
    """The `moving_average` of ``|x|^2``, real.

    It is right wherever ``(1 - decay) |x|^2`` is finite, even if ``|x|^2`` is not. Beyond, it is
    infinity, and stays infinity unless the decay is zero.
    """
    decay = _scalar_like(average, decay)
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    square = functools.reduce(operator.add, [part * (1.0 - decay) * part for part in parts])
    if not isinstance(decay, float):
        average = jnp.where(decay == 0.0, jnp.zeros_like(average), average)
    elif decay == 0.0:
        return square
    finite = jnp.minimum(average, jnp.finfo(average.dtype).max)
    return _decay_and_add(average, finite, square, decay)


def _scalar_like(x: jax.Array, value: Any) -> Any:
    """`value` as a scalar for arithmetic with `x`."""
    return value if isinstance(value, float) else as_scalar(value, real_dtype(x.dtype))


def _times(x: Any, factor: Any) -> Any:
    return scale(x, factor) if jnp.iscomplexobj(x) else x * factor


def _decay_and_add(average: jax.Array, finite: jax.Array, x: Any, decay: Any) -> jax.Array:
    """``decay * average + x``, in the form that is accurate for this decay.

    Near decay 1, ``decay`` and ``1 - decay`` are rounded separately and do not sum to 1: at 0.999
    in float32 a moving average would have a bias of 1.3e-5. ``average + (x - (1 - decay) *
    average)`` has no such bias. Near decay 0 it suffers from cancellation, and the textbook form is
    exact.

    Args:
      finite: `average` without infinities: infinity minus infinity would be NaN.
    """

    def textbook() -> jax.Array:
        return _times(average, decay) + x

    if isinstance(decay, float) and decay < 0.5:
        return textbook()
    unbiased = average + (x - _times(finite, 1.0 - decay))
    return unbiased if isinstance(decay, float) else jnp.where(decay < 0.5, textbook(), unbiased)


def moving_average_of_constant(
    average: jax.Array, x: jax.Array, log_decay: Any, steps: jax.Array
) -> jax.Array:
    """`moving_average` with the same `x`, `steps` times: ``x + decay**steps * (average - x)``.

    Args:
      average, x: (V, D...), or scalars.
      log_decay: the logarithm of the decay.
      steps: int32 (V,), for each row, or a scalar.
    """
    dtype = real_dtype(average.dtype)
    steps = jnp.reshape(steps, (*steps.shape, *[1] * (average.ndim - steps.ndim)))
    log_remainder = steps.astype(dtype) * as_scalar(log_decay, dtype)
    weight, remainder = -jnp.expm1(log_remainder), jnp.exp(log_remainder)
    from_average = average + scale(x - average, weight)
    from_x = x + scale(average - x, remainder)
    moved = jnp.where(remainder > 0.5, from_average, from_x)
    return jnp.where(steps == 0, average, moved)


def at_count(value: Any, count: jax.Array) -> Any:
    """The value of a hyperparameter, possibly a schedule, after `count` steps."""
    return value(count) if callable(value) else value


def scalar_at(value: Any, count: jax.Array) -> Any:
    """`at_count` as a Python float or a scalar of the widest float."""
    value = value(count) if callable(value) else value
    return value if isinstance(value, float) else as_scalar(value)


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count``: the moving average of `count` ones, started at zero.

    It is computed as ``-expm1(count * log1p(decay - 1))``, which is accurate to rounding. The
    literal form in float32 has an error of 1.3e-5 at decay 0.999 and of 1.3e-2 at 0.999999 in the
    first steps. A decay in a float32 array has an error of the same size: pass Python floats.
    """
    count = jnp.asarray(count, float)  # the widest float that is enabled in JAX
    if isinstance(decay, float):
        if decay == 0.0:  # log 0
            return jnp.ones_like(count)
        return -jnp.expm1(count * math.log1p(decay - 1.0))
    return -jnp.expm1(count * jnp.log1p(as_scalar(decay) - 1.0))


def increment(count: jax.Array) -> jax.Array:
    """``count + 1``, saturating at the largest integer of the dtype."""
    return jnp.asarray(optax.safe_increment(count))


def global_norm(tree: Any) -> jax.Array:
    r"""The Euclidean norm of all elements of all leaves.

    .. math:: \sqrt{\sum_i |x_i|^2}

    The norm does not overflow or underflow while it is representable, even if its square is not.

    Args:
      tree: arrays of any shapes and dtypes, row gradients, and None, which is ignored.

    Returns:
      A scalar, in at least float32 (a float16 sum of squares would overflow at 65,504); 0 for an
      empty tree.

    >>> import jax.numpy as jnp
    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0), "c": None}))
    5.0
    """
    return norm(tree).value


class Norm(NamedTuple):
    """A norm, ``scale * relative``. The scale is 1 unless the square of the norm overflows."""

    scale: jax.Array
    relative: jax.Array

    @property
    def value(self) -> jax.Array:
        return self.scale * self.relative


def norm(tree: Any) -> Norm:
    """`global_norm`, as a product.

    One pass over the arrays sums their squares. Only if the sum overflows, or is so small that
    squares may be lost in it, a second pass scales the arrays by a power of two first.
    """
    arrays = [
        # Duplicate rows are summed first, as in the dense gradient.
        x.sum_duplicates().values if is_rows(x) else jnp.asarray(x)
        for x in jax.tree.leaves(tree, is_leaf=is_rows)
    ]
    dtype = real_dtype(compute_dtype(*(x.dtype for x in arrays)))

    def sum_of_squares(factor: Any) -> jax.Array:
        wide = [x.astype(promote(x.dtype, dtype)) for x in arrays]
        squares = [abs_sq(x if factor is None else scale(x, factor)) for x in wide]
        return sum((jnp.sum(x).astype(dtype) for x in squares), jnp.zeros((), dtype))

    info, total = jnp.finfo(dtype), sum_of_squares(None)
    one, size = jnp.ones_like(total), sum(x.size for x in arrays)
    if size == 0:
        return Norm(one, total)

    def rescaled() -> Norm:
        # For float32 2^-96 or 2^80: no square of a scaled element overflows or matters and is lost.
        down, up = 2.0 ** (-info.maxexp * 3 // 4), 2.0 ** (info.maxexp * 5 // 8)
        is_small = total < 1.0
        relative = jnp.sqrt(sum_of_squares(jnp.where(is_small, up, down).astype(dtype)))
        return Norm(
            jnp.where(is_small, one, 1.0 / down), jnp.where(is_small, relative / up, relative)
        )

    smallest_accurate = size * float(info.tiny) / float(info.eps)
    is_accurate = (total > smallest_accurate) & (total < jnp.inf)
    return jax.lax.cond(is_accurate, lambda: Norm(one, jnp.sqrt(total)), rescaled)


def all_finite(tree: Any) -> jax.Array:
    """A bool scalar: whether no leaf contains an infinity or a NaN."""
    leaves = jax.tree.leaves(tree, is_leaf=is_rows)
    leaves = [x.masked_values() if is_rows(x) else jnp.asarray(x) for x in leaves]
    return jnp.all(jnp.array([is_all_finite(x) for x in leaves], bool))
