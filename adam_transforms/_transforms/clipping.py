"""Gradient clipping: by value, by the norm of a leaf, by the norm of all leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms import numerics


def clip_by_value(limit: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Clips each element to [-limit, limit].

    Args:
      limit: > 0.

    Returns:
      A stateless transformation; updates keep their dtype. The real and the imaginary part of a
      complex gradient are clipped separately.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_value(1.0)
    >>> tx.update(jnp.array([-3.0, 0.5]), tx.init(jnp.zeros(2)))[0].tolist()
    [-1.0, 0.5]
    """
    limit = arguments.scalar("limit", limit, above=0.0)

    def clip(g: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(g):
            return jax.lax.complex(clip(g.real), clip(g.imag))
        bound = jnp.asarray(limit).astype(g.dtype)
        return jnp.clip(g, -bound, bound)

    return _stateless(lambda updates: trees.map_leaves(lambda path, g: clip(g), updates))


def clip_by_norm(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf with a norm above `max_norm` down to `max_norm` (Keras's clipnorm).

    .. math:: g_i \, \max(1, \|g_i\|_2 / c)^{-1}

    Args:
      max_norm: c > 0.

    Returns:
      A stateless transformation; updates keep their dtype, norms are computed in at least float32.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_norm(1.0)
    >>> updates, _ = tx.update({"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}, tx.init({}))
    >>> updates["a"].round(3).tolist(), updates["b"].tolist()
    ([0.6..., 0.8...], [0.5])
    """
    max_norm = arguments.scalar("max_norm", max_norm, above=0.0)

    def clip(path: Path, g: jax.Array) -> jax.Array:
        return _scale_down(g, numerics.norm(g), max_norm)

    return _stateless(lambda updates: trees.map_leaves(clip, updates))


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Scales all leaves by one factor if their `global_norm` exceeds `max_norm`.

    .. math:: g_i \, \max\big(1, \sqrt{\textstyle\sum_j \|g_j\|_2^2} / c\big)^{-1}

    Args:
      max_norm: c > 0.

    Returns:
      A stateless transformation; updates keep their dtype. The norm is computed in at least
      float32: in float16 the sum of 70,000 squared ones overflows.

    References:
      Pascanu et al., `On the difficulty of training Recurrent Neural Networks
      <https://arxiv.org/abs/1211.5063>`_, 2012.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_global_norm(1.0)
    >>> updates, _ = tx.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, tx.init({}))
    >>> updates["a"].round(3).tolist(), updates["b"].round(3).tolist()
    ([0.6...], [0.8...])
    """
    max_norm = arguments.scalar("max_norm", max_norm, above=0.0)

    def clip(updates: Updates) -> Updates:
        updates = trees.map_leaves(lambda path, g: g, updates)  # refuses row gradients
        norm = numerics.norm(updates)
        return trees.map_leaves(lambda path, g: _scale_down(g, norm, max_norm), updates)

    return _stateless(clip)


def _scale_down(g: jax.Array, norm: numerics.Norm, max_norm: Any) -> jax.Array:
    """``g * min(1, max_norm / norm)``, exactly `g` if the norm is not above `max_norm`."""
    limit = dtypes.as_scalar(max_norm, norm.relative.dtype)
    # So that a NaN is in all elements.
    exceeds = ~(norm.value <= limit)
    dtype = dtypes.compute_dtype(g.dtype)
    g_wide = g.astype(dtype)
    # The product of the two factors may underflow.
    for factor in (1.0 / norm.scale, limit / norm.relative):
        factor = jnp.where(exceeds, factor, 1.0).astype(dtypes.real_dtype(dtype))
        g_wide = dtypes.scale(g_wide, factor)
    return g_wide.astype(g.dtype)


def _stateless(clip: Callable[[Updates], Updates]) -> optax.GradientTransformationExtraArgs:
    """A stateless transformation that applies a function to the updates."""

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        # None too: Optax's own code calls transformations without a state so.
        if state is not None and type(state) is not optax.EmptyState:
            raise wrong_state(init, updates, state, params)
        return clip(updates), state

    def init(params: Params) -> State:
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)
