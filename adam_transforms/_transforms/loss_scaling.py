"""Loss scaling, and skipping steps with non-finite gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import on_values
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Field, Role, register
from adam_transforms._core.types import Params, State, Updates
from adam_transforms._transforms import conditional_update, numerics

_SCALE = Field(Role.SCALAR, metric="loss_scale")
_SKIPPED = Field(Role.SCALAR, metric="skipped_steps")
# Gradients are multiplied by the reciprocal of the scale; compiled code divides in this way too.
# That of 2^127 is subnormal: it is flushed to zero, and all gradients with it.
MAX_SCALE = 2.0**126


@register(scale=_SCALE, inner_state=Role.INNER)
class StaticLossScaleState(NamedTuple):
    """State of `static_loss_scale`: the scale, float32 (), and the inner state."""

    scale: jax.Array
    inner_state: State


@register(scale=_SCALE, finite_steps=Role.SCALAR, skipped=_SKIPPED, inner_state=Role.INNER)
class DynamicLossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: float32 (), the factor of the loss.
      finite_steps: int32 (), finite steps since the last change of the scale.
      skipped: int32 (), the number of skipped steps.
      inner_state: the state of the inner transformation.
    """

    scale: jax.Array
    finite_steps: jax.Array
    skipped: jax.Array
    inner_state: State


@register(skipped=_SKIPPED, inner_state=Role.INNER)
class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: the number of skipped steps, int32 (), and the inner state."""

    skipped: jax.Array
    inner_state: State


@register(
    skipped=_SKIPPED,
    inner_state=Role.INNER,
    consecutive=Field(Role.SCALAR, metric="consecutive_nonfinite"),
)
class LimitedSkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite` with `max_consecutive`.

    Attributes:
      skipped, inner_state: as in `SkipNonfiniteState`.
      consecutive: int32 (), the number of steps since the last finite one.
    """

    skipped: jax.Array
    inner_state: State
    consecutive: jax.Array


def static_loss_scale(
    inner: optax.GradientTransformation, scale: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradients by a fixed loss scale, then runs `inner`.

    Args:
      inner: any transformation; it receives the gradients in at least float32, because a float16
        gradient divided by the scale would underflow.
      scale: the factor of the loss (see `scale_loss`), from 2^-126 to 2^126.

    Returns:
      A transformation with `StaticLossScaleState`.

    >>> import jax.numpy as jnp, optax
    >>> tx = static_loss_scale(optax.scale(-1.0), scale=8.0)
    >>> updates, _ = tx.update(jnp.array([16.0]), tx.init(jnp.zeros(1)))
    >>> updates.tolist()
    [-2.0]
    """
    inner = arguments.transformation("inner", inner)
    scale = _scale("scale", scale)

    def init(params: Params) -> StaticLossScaleState:
        return StaticLossScaleState(jnp.array(scale, jnp.float32), inner.init(params))

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if type(state) is not StaticLossScaleState:
            raise wrong_state(init, updates, state, params)
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
    max_scale: float | jax.Array = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradients by an adaptive loss scale, and skips non-finite steps.

    If all gradients are finite, `inner` runs; after `growth_interval` such steps in a row the scale
    is multiplied by `factor`. If a gradient contains an infinity or a NaN, the step is skipped: the
    updates are zero, the inner state stays bit-identical, and the scale is divided by `factor`.

    Args:
      inner: any transformation; it receives the gradients in at least float32.
      initial_scale: from 2^-126 to `max_scale`.
      growth_interval: static int >= 1.
      factor: > 1.
      min_scale: the lower bound of the scale, >= 2^-126; a scale already below it is not raised.
      max_scale: the upper bound of the scale, <= 2^126: float32 has no normal reciprocal of 2^127.
        A restored scale above it is reduced in the first step. The default, 2^24, is that of
        NVIDIA's Apex: the smallest float16 number, 2^-24, then represents a gradient of 2^-48. In
        Keras, PyTorch and TensorFlow the scale has no bound but the range of float32.

    Returns:
      A transformation with `DynamicLossScaleState`. Scale the loss with `scale_loss`.

    Raises:
      ValueError: an argument is out of range; `initial_scale` or `min_scale` is above `max_scale`.
      TypeError: an argument has the wrong type.

    References:
      Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018;
      the rule is that of Keras's LossScaleOptimizer, and the upper bound that of `Apex
      <https://nvidia.github.io/apex/amp.html>`_.

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
    initial_scale = _scale("initial_scale", initial_scale)
    growth_interval = arguments.positive_int("growth_interval", growth_interval)
    factor = arguments.scalar("factor", factor, above=1.0)
    min_scale = _scale("min_scale", min_scale)
    max_scale = _scale("max_scale", max_scale)
    for name, scale in (("initial_scale", initial_scale), ("min_scale", min_scale)):
        if not any(isinstance(x, Tracer) for x in (scale, max_scale)) and scale > max_scale:
            raise ValueError(
                f"{name} must be at most max_scale, {float(max_scale):g}, got {float(scale):g}: "
                "pass a larger max_scale"
            )

    def init(params: Params) -> DynamicLossScaleState:
        return DynamicLossScaleState(
            scale=jnp.array(initial_scale, jnp.float32),
            finite_steps=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if type(state) is not DynamicLossScaleState:
            raise wrong_state(init, updates, state, params)

        def step(gradients: Updates, inner_state: State) -> tuple[Updates, State]:
            unscaled = _unscale(gradients, state.scale)
            return inner.update(unscaled, inner_state, params, **extra_args)

        gradients = trees.as_gradients(updates)
        finite = numerics.all_finite(gradients)
        updates, inner_state = _step_if(finite, step, gradients, state.inner_state, params)
        finite_steps = jnp.where(finite, state.finite_steps + 1, 0)
        grow = finite_steps >= growth_interval
        ratio = dtypes.as_scalar(factor, jnp.float32)
        lower_bound = jnp.minimum(state.scale, dtypes.as_scalar(min_scale, jnp.float32))
        grown = jnp.where(grow, state.scale * ratio, state.scale)
        shrunk = jnp.maximum(state.scale / ratio, lower_bound)
        scale = jnp.where(finite, grown, shrunk)
        scale = jnp.minimum(scale, dtypes.as_scalar(max_scale, jnp.float32))
        finite_steps = jnp.where(grow, 0, finite_steps)
        skipped = _count_skip(state.skipped, finite)
        return updates, DynamicLossScaleState(scale, finite_steps, skipped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def skip_nonfinite(
    inner: optax.GradientTransformation, *, max_consecutive: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients contain an infinity or a NaN.

    The updates of a skipped step are zero, and the inner state stays bit-identical.

    Args:
      inner: any transformation.
      max_consecutive: the most steps to skip in a row, a static int >= 1. Further non-finite
        gradients are passed to `inner` unchanged, as in `optax.apply_if_finite`, so that a diverged
        run fails visibly. None skips every non-finite step. `metrics` reports the number of
        non-finite steps in a row as ``consecutive_nonfinite``.

    Returns:
      A transformation with `SkipNonfiniteState`; with `max_consecutive`, with
      `LimitedSkipNonfiniteState`.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> import jax.numpy as jnp, optax
    >>> tx = skip_nonfinite(optax.scale(-1.0), max_consecutive=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, float("nan"), float("nan"), float("nan")):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print(updates.tolist(), int(state.skipped), int(state.consecutive))
    [-1.0] 0 0
    [0.0] 1 1
    [0.0] 2 2
    [nan] 2 3
    """
    inner = arguments.transformation("inner", inner)
    if max_consecutive is not None:
        max_consecutive = arguments.positive_int("max_consecutive", max_consecutive)
    own: type = SkipNonfiniteState if max_consecutive is None else LimitedSkipNonfiniteState

    def init(params: Params) -> State:
        state = SkipNonfiniteState(jnp.zeros((), jnp.int32), inner.init(params))
        if max_consecutive is None:
            return state
        return LimitedSkipNonfiniteState(*state, consecutive=jnp.zeros((), jnp.int32))

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if type(state) is not own:
            raise wrong_state(init, updates, state, params)

        def step(gradients: Updates, inner_state: State) -> tuple[Updates, State]:
            return inner.update(gradients, inner_state, params, **extra_args)

        gradients = trees.as_gradients(updates)
        accept = finite = numerics.all_finite(gradients)
        if max_consecutive is not None:
            consecutive = jnp.where(finite, 0, numerics.increment(state.consecutive))
            state = state._replace(consecutive=consecutive)
            accept = finite | (consecutive > max_consecutive)
        updates, inner_state = _step_if(accept, step, gradients, state.inner_state, params)
        skipped = _count_skip(state.skipped, accept)
        return updates, state._replace(skipped=skipped, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_loss(loss: jax.Array | float, state: State) -> jax.Array:
    """The loss times the loss scale in an optimizer state; differentiate this product.

    Args:
      loss: a scalar (any shape works).
      state: an optimizer state with a `dynamic_loss_scale` or `static_loss_scale` at any depth.

    Returns:
      The product, in at least float32.

    Raises:
      ValueError: the state has no loss scale, or several.

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


def _unscale(updates: Updates, scale: jax.Array) -> Updates:
    """The gradients divided by `scale`, in at least float32."""

    def unscale(g: jax.Array) -> jax.Array:
        g = g.astype(dtypes.compute_dtype(g.dtype))
        return dtypes.scale(g, (1.0 / scale).astype(dtypes.real_dtype(g.dtype)))

    return trees.map_leaves(lambda path, g: on_values(unscale, g), updates, rows=True)


def _step_if(
    accept: jax.Array,
    step: Callable[[Updates, State], tuple[Updates, State]],
    gradients: Updates,
    state: State,
    params: Params | None,
) -> tuple[Updates, State]:
    """``step(gradients, state)``, or zero updates and the state as it is."""
    carried, state = conditional_update.update_if(accept, step, gradients, state, mostly=True)
    return conditional_update.select(accept, carried, gradients, params), state


def _count_skip(skipped: jax.Array, accept: jax.Array) -> jax.Array:
    return jnp.where(accept, skipped, numerics.increment(skipped))


def _scale(name: str, value: Any) -> Any:
    """A loss scale: float32 holds it and its reciprocal as normal numbers."""
    value = arguments.scalar(name, value, above=0.0)
    if not isinstance(value, Tracer) and not 1 / MAX_SCALE <= float(value) <= MAX_SCALE:
        raise ValueError(
            f"{name} must be from 2^-126 to 2^126, for float32 has no normal reciprocal of other "
            f"scales, got {float(value):g}"
        )
    return value
