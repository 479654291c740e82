"""An exponential moving average of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.state_layout import Role, register
from adam_transforms._transforms import numerics
from adam_transforms._transforms.apply_updates import apply_update


@register(count=Role.SCALAR, weight=Role.SCALAR, ema=Role.AVERAGE)
class ParamsEmaState(NamedTuple):
    """State of `params_ema`.

    Attributes:
      count: int32 (), steps taken.
      weight: float32 (), the sum of the weights in `ema`: 1, or with ``debias`` 1 - decay^count.
      ema: like the parameters, in `ema_dtype`; `ema_params` divides it by `weight`.
    """

    count: jax.Array
    weight: jax.Array
    ema: Any


def params_ema(
    decay: optax.ScalarOrSchedule = 0.99,
    *,
    overwrite_every: int | None = None,
    debias: bool = False,
    ema_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters as they will be after this update. Comes last in a chain.

    .. math:: a_t = d\, a_{t-1} + (1-d)\, p_t, \qquad p_t = p_{t-1} + u_t, \qquad a_1 = p_1

    The updates pass through, but on every `overwrite_every`-th step they are replaced by those that
    move the parameters onto the average (Keras's use_ema and ema_overwrite_frequency); the average
    and the states before it in the chain stay as they are.

    Args:
      decay: d in [0, 1), or a schedule ``count -> value``.
      overwrite_every: None for never, or a static int >= 1.
      debias: start from zero instead, and let `ema_params` divide by ``1 - d^t`` (by the running
        product if the decay is a schedule).
      ema_dtype: None for the parameter's dtype, but at least float32.

    Returns:
      A transformation with `ParamsEmaState`, whose update needs `params`. It assumes that the
      updates are applied as `apply_updates` does without a key. Where an update is None the
      parameter stays, and is averaged as it is; it is not overwritten.

    Raises:
      ValueError: an argument out of range, or update was called without `params`.

    >>> import jax.numpy as jnp
    >>> tx = params_ema(decay=0.5)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([2.0]), state, params)
    ...     params = params + updates
    >>> params.tolist(), ema_params(state).tolist()  # the average of 3 and 5
    ([5.0], [4.0])
    """
    decay = arguments.decay_rate("decay", decay)
    if overwrite_every is None:
        return track_params_ema(decay, None, debias=debias, ema_dtype=ema_dtype)
    every = arguments.positive_int("overwrite_every", overwrite_every)
    return track_params_ema(
        decay, lambda count: (count + 1) % every == 0, debias=debias, ema_dtype=ema_dtype
    )


def track_params_ema(
    decay: optax.ScalarOrSchedule,
    overwrite_when: Callable[[jax.Array], jax.Array] | None,
    *,
    debias: bool = False,
    ema_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`params_ema` that overwrites the parameters whenever ``overwrite_when(count)`` says so,
    `count` being the steps taken before this one."""
    debias = arguments.flag("debias", debias)
    ema_dtype = arguments.float_dtype("ema_dtype", ema_dtype)

    def init(params: Any) -> ParamsEmaState:
        def start(path: Any, p: Any) -> jax.Array:
            dtype = ema_dtype or dtypes.compute_dtype(jnp.result_type(p))
            if debias or isinstance(p, jax.ShapeDtypeStruct):
                return jnp.zeros_like(p, dtype=dtype)
            return dtypes.store(trees.path_str(path), jnp.array(p, copy=True), dtype)

        return ParamsEmaState(
            count=jnp.zeros((), jnp.int32),
            weight=jnp.zeros((), jnp.float32) if debias else jnp.ones((), jnp.float32),
            ema=jax.tree_util.tree_map_with_path(start, params),
        )

    def update(updates: Any, state: Any, params: Any = None, **_: Any):
        if params is None:
            raise ValueError("params_ema averages the parameters: update needs params, got None")
        now = arguments.at_count(decay, state.count)
        first = state.count == 0

        def average(ema: jax.Array, p: jax.Array) -> jax.Array:
            moved = numerics.moving_average(ema, p, now)
            return moved if debias else jnp.where(first, p, moved)

        weight = average(state.weight, jnp.ones_like(state.weight))
        overwrites = None if overwrite_when is None else overwrite_when(state.count)

        def leaf(path: str, p: Any, u: Any, ema: Any) -> tuple[Any, Any]:
            if p is None:
                return u, ema
            p = jnp.asarray(p)
            u = None if u is None else trees.as_gradient(path, u)
            dtype = dtypes.compute_dtype(p.dtype, ema.dtype)
            after = apply_update(path, p, u).astype(dtype)
            if jnp.issubdtype(p.dtype, jnp.floating):
                after = dtypes.rounded(after, p.dtype)  # as it will be stored
            new_ema = average(ema.astype(dtype), after)
            if u is not None and overwrites is not None:
                onto = _divided(new_ema, weight) - p.astype(dtype)
                u = jnp.where(overwrites, onto.astype(u.dtype), u)
            return u, dtypes.store(path, new_ema, ema.dtype)

        rows, treedef = trees.align(
            params, updates, state.ema, names=("the parameters", "the updates", "the average")
        )
        updates, ema = trees.unzip([leaf(*row) for row in rows], treedef, outputs=2)
        count = numerics.increment(state.count)
        return updates, ParamsEmaState(count, weight, ema)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(state: Any) -> Any:
    """The averaged parameters that an optimizer state holds, in the dtype of the average.

    Args:
      state: an optimizer state with one `params_ema` anywhere in it.

    Returns:
      A tree like the parameters. With ``debias`` it is zero before the first step.

    Raises:
      ValueError: the state holds no average or several (`finalize` takes those).

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.scale(-1.0), params_ema(0.9))
    >>> ema_params(tx.init(jnp.ones(2))).tolist()
    [1.0, 1.0]
    """
    states = trees.find_states(state, ParamsEmaState)
    if len(states) != 1:
        raise ValueError(f"state must hold one state of params_ema, found {len(states)}")
    return jax.tree.map(lambda ema: _divided(ema, states[0].weight), states[0].ema)


def finalize(params: Any, state: Any) -> Any:
    """The averaged parameters, for evaluation or to keep (Keras's finalize_variable_values).

    Args:
      params: the parameters as trained.
      state: an optimizer state with `params_ema` anywhere in it; several of them, each for its own
        parameters (`by_path`, `optax.masked`), are fine.

    Returns:
      A tree like `params`, in its dtypes. Parameters without an average stay as they are, as do all
      before the first step.

    Raises:
      ValueError: the state holds no average, or its structure differs from that of `params`.

    >>> import jax.numpy as jnp
    >>> tx = params_ema(decay=0.5)
    >>> params = jnp.array([1.0])
    >>> _, state = tx.update(jnp.array([1.0]), tx.init(params), params)
    >>> finalize(params, state).tolist()
    [2.0]
    """
    states = trees.find_states(state, ParamsEmaState)
    if not states:
        raise ValueError("state must hold a state of params_ema, found none")

    averages: dict[str, tuple[Any, ParamsEmaState]] = {}
    for found in states:
        for path, ema in trees.flatten_with_paths(found.ema)[0]:
            if averages.setdefault(path, (ema, found))[1] is not found:
                raise ValueError(f"state holds two averages of {path!r}")
    rows, treedef = trees.flatten_with_paths(params)
    unknown = averages.keys() - {path for path, _ in rows}
    if unknown:
        raise ValueError(f"params lack {min(unknown)!r}, of which the state holds an average")

    def average(path: str, p: Any) -> Any:
        ema, found = averages.get(path, (None, None))
        if p is None or ema is None or found is None:
            return p
        p = jnp.asarray(p)
        if p.shape != ema.shape:
            raise ValueError(
                f"{path!r} has shape {list(p.shape)} in params, but its average {list(ema.shape)}"
            )
        averaged = dtypes.store(path, _divided(ema, found.weight), p.dtype)
        return jnp.where(found.count == 0, p, averaged)

    # By path, because a module may wrap its parameters and its optimizer's state differently.
    return treedef.unflatten([average(*row) for row in rows])


def _divided(ema: jax.Array, weight: jax.Array) -> jax.Array:
    """The average out of the weighted sum; zero where nothing has been averaged yet."""
    weight = jnp.where(weight == 0, jnp.ones_like(weight), weight)
    return dtypes.scale(ema, (1.0 / weight).astype(dtypes.real_dtype(ema.dtype)))
