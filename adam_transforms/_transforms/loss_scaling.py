"""Loss scaling and steps skipped when a gradient is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import on_values
from adam_transforms._core.state_layout import Field, Role, register
from adam_transforms._transforms import conditional_update, numerics

_SCALE = Field(Role.SCALAR, metric="loss_scale")
_SKIPPED = Field(Role.SCALAR, metric="skipped_steps")


@register(scale=_SCALE, inner_state=Role.INNER)
class StaticLossScaleState(NamedTuple):
    """State of `static_loss_scale`: the scale, float32 (), and the inner state."""

    scale: jax.Array
    inner_state: Any


@register(scale=_SCALE, finite_steps=Role.SCALAR, skipped=_SKIPPED, inner_state=Role.INNER)
class DynamicLossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: float32 (), what the loss is multiplied by.
      finite_steps: int32 (), finite steps since the scale last changed.
      skipped: int32 (), steps skipped so far.
      inner_state: the state of the inner transformation.
    """

    scale: jax.Array
    finite_steps: jax.Array
    skipped: jax.Array
    inner_state: Any


@register(skipped=_SKIPPED, inner_state=Role.INNER)
class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: int32 (), the steps skipped so far, and the inner state."""

    skipped: jax.Array
    inner_state: Any


def static_loss_scale(
    inner: optax.GradientTransformation, scale: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradients by a fixed loss scale before `inner` sees them.

    Args:
      inner: any transformation; it gets the gradients in at least float32, where a float16
        gradient divided by the scale would underflow.
      scale: what the loss was multiplied by (see `scale_loss`), > 0.

    Returns:
      A transformation with `StaticLossScaleState`.

    >>> import jax.numpy as jnp, optax
    >>> tx = static_loss_scale(optax.scale(-1.0), scale=8.0)
    >>> updates, _ = tx.update(jnp.array([16.0]), tx.init(jnp.zeros(1)))
    >>> updates.tolist()
    [-2.0]
    """
    inner = arguments.transformation("inner", inner)
    scale = arguments.scalar("scale", scale, above=0.0)

    def init(params: Any) -> StaticLossScaleState:
        return StaticLossScaleState(jnp.array(scale, jnp.float32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        unscaled = _unscale(updates, state.scale)
        new_updates, inner_state = inner.update(unscaled, state.inner_state, params, **extra_args)
        new_updates = trees.in_update_dtype(new_updates, updates, params)
        return new_updates, StaticLossScaleState(state.scale, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    initial_scale: float | jax.Array = 2.0**15,
    growth_interval: int = 2000,
    factor: float | jax.Array = 2.0,
    *,
    min_scale: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradients by a loss scale that adapts, and skips steps that are not finite.

    A step whose gradients are all finite is taken with the present scale; `growth_interval` of
    them in a row multiply the scale by `factor`. A step with an infinity or a NaN is skipped
    whole - updates zero, the inner state bit-identical - and divides the scale by `factor`.

    Args:
      inner: any transformation; it gets the gradients in at least float32.
      initial_scale: > 0.
      growth_interval: static int >= 1.
      factor: > 1.
      min_scale: the scale is never halved below it, > 0.

    Returns:
      A transformation with `DynamicLossScaleState`. The loss is scaled with `scale_loss`.

    References:
      Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018;
      the rule is that of Keras's LossScaleOptimizer.

    >>> import jax.numpy as jnp, optax
    >>> tx = dynamic_loss_scale(optax.scale(-1.0), initial_scale=8.0, growth_interval=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (8.0, float("inf"), 8.0, 8.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print(updates.tolist(), float(state.scale))
    [-1.0] 8.0
    [0.0] 4.0
    [-2.0] 4.0
    [-2.0] 8.0
    """
    inner = arguments.transformation("inner", inner)
    initial_scale = arguments.scalar("initial_scale", initial_scale, above=0.0)
    growth_interval = arguments.positive_int("growth_interval", growth_interval)
    factor = arguments.scalar("factor", factor, above=1.0)
    min_scale = arguments.scalar("min_scale", min_scale, above=0.0)

    def init(params: Any) -> DynamicLossScaleState:
        return DynamicLossScaleState(
            scale=jnp.array(initial_scale, jnp.float32),
            finite_steps=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        def step(gradients: Any, inner_state: Any) -> tuple[Any, Any]:
            unscaled = _unscale(gradients, state.scale)
            return inner.update(unscaled, inner_state, params, **extra_args)

        finite, updates, inner_state = _step_if_finite(step, updates, state.inner_state, params)
        finite_steps = jnp.where(finite, state.finite_steps + 1, 0)
        grows = finite_steps >= growth_interval
        by = dtypes.as_scalar(factor, jnp.float32)
        least = jnp.minimum(state.scale, dtypes.as_scalar(min_scale, jnp.float32))
        grown = jnp.where(grows, state.scale * by, state.scale)
        # A scale grown past the largest float32 would make every step non-finite.
        grown = jnp.where(jnp.isfinite(grown), grown, state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / by, least))
        finite_steps = jnp.where(grows, 0, finite_steps)
        skipped = _count_skip(state.skipped, finite)
        return updates, DynamicLossScaleState(scale, finite_steps, skipped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips a step whose gradients hold an infinity or a NaN.

    Such a step is skipped whole: the updates are zero and the inner state stays bit-identical.

    Args:
      inner: any transformation.

    Returns:
      A transformation with `SkipNonfiniteState`.

    >>> import jax.numpy as jnp, optax
    >>> tx = skip_nonfinite(optax.scale(-1.0))
    >>> updates, state = tx.update(jnp.array([1.0, float("nan")]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), int(state.skipped)
    ([0.0, 0.0], 1)
    """
    inner = arguments.transformation("inner", inner)

    def init(params: Any) -> SkipNonfiniteState:
        return SkipNonfiniteState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        def step(gradients: Any, inner_state: Any) -> tuple[Any, Any]:
            return inner.update(gradients, inner_state, params, **extra_args)

        finite, updates, inner_state = _step_if_finite(step, updates, state.inner_state, params)
        return updates, SkipNonfiniteState(_count_skip(state.skipped, finite), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_loss(loss: jax.Array | float, state: Any) -> jax.Array:
    """The loss times the loss scale that an optimizer state holds; differentiate this one.

    Args:
      loss: a scalar (any shape works).
      state: an optimizer state with a `dynamic_loss_scale` or `static_loss_scale` anywhere in it.

    Returns:
      The product, in at least float32.

    Raises:
      ValueError: the state holds no loss scale, or several.

    >>> import jax.numpy as jnp, optax
    >>> state = static_loss_scale(optax.identity(), 8.0).init(jnp.zeros(1))
    >>> float(scale_loss(jnp.float16(2.0), state))
    16.0
    """
    scales = [
        found.scale
        for kind in (StaticLossScaleState, DynamicLossScaleState)
        for found in trees.find_states(state, kind)
    ]
    if len(scales) != 1:
        raise ValueError(
            "state must hold one state of dynamic_loss_scale or static_loss_scale, "
            f"found {len(scales)}"
        )
    dtype = dtypes.compute_dtype(jnp.result_type(loss))
    return jnp.asarray(loss, dtype) * scales[0].astype(dtype)


def _unscale(updates: Any, scale: jax.Array) -> Any:
    """The gradients divided by `scale`, in at least float32."""

    def unscale(g: jax.Array) -> jax.Array:
        g = g.astype(dtypes.compute_dtype(g.dtype))
        return dtypes.scale(g, (1.0 / scale).astype(dtypes.real_dtype(g.dtype)))

    return trees.map_leaves(lambda path, g: on_values(unscale, g), updates, rows=True)


def _step_if_finite(
    step: Callable[[Any, Any], tuple[Any, Any]], gradients: Any, state: Any, params: Any
) -> tuple[jax.Array, Any, Any]:
    """(whether all gradients are finite, updates, state); the step is skipped if they are not."""
    gradients = trees.as_gradients(gradients)
    finite = numerics.all_finite(gradients)
    carried, state = conditional_update.update_if(finite, step, gradients, state)
    return finite, conditional_update.select(finite, carried, gradients, params), state


def _count_skip(skipped: jax.Array, finite: jax.Array) -> jax.Array:
    return jnp.where(finite, skipped, numerics.increment(skipped))
