"""An exponential moving average of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Role, register
from adam_transforms._core.types import P, Params, Path, State, Updates
from adam_transforms._transforms import numerics
from adam_transforms._transforms.apply_updates import apply_update


@register(count=Role.SCALAR, weight=Role.SCALAR, ema=Role.AVERAGE)
class ParamsEmaState(NamedTuple):
    """State of `params_ema`.

    Attributes:
      count: int32 (), the number of steps.
      weight: float32 (), the sum of the weights in `ema`: 1, or with ``debias`` 1 - decay^count.
      ema: like the parameters, in `ema_dtype`; `ema_params` divides it by `weight`.
    """

    count: jax.Array
    weight: jax.Array
    ema: Params


def params_ema(
    decay: optax.ScalarOrSchedule = 0.99,
    *,
    overwrite_every: int | None = None,
    debias: bool = False,
    ema_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters after each update. It must be the last in a chain.

    .. math:: a_t = d\, a_{t-1} + (1-d)\, p_t, \qquad p_t = p_{t-1} + u_t, \qquad a_1 = p_1

    The updates are returned unchanged, except on every `overwrite_every`-th step: then they set the
    parameters to the average (Keras's use_ema and ema_overwrite_frequency). The average itself and
    the states of earlier transformations in the chain are not reset.

    Args:
      decay: d in [0, 1), or a schedule ``count -> value``.
      overwrite_every: None for never, or a static int >= 1.
      debias: start from zero instead; `ema_params` then divides by ``1 - d^t`` (for a schedule, by
        one minus the running product).
      ema_dtype: dtype of the average; None for the parameter's, but at least float32.

    Returns:
      A transformation with `ParamsEmaState`; update needs `params`. It assumes that the updates are
      applied as by `apply_updates` without a key. Where an update is None the parameter does not
      change; its current value is averaged, and it is not overwritten.

    Raises:
      ValueError: an argument is out of range, or update was called without `params`.

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
    """`params_ema` that overwrites the parameters if ``overwrite_when(count)`` is true, where
    `count` is the number of steps before this one."""
    debias = arguments.flag("debias", debias)
    ema_dtype = arguments.float_dtype("ema_dtype", ema_dtype)

    def init(params: Params) -> ParamsEmaState:
        def start(keys: Any, p: Any) -> jax.Array:
            dtype = ema_dtype or dtypes.compute_dtype(jnp.result_type(p))
            if debias or isinstance(p, jax.ShapeDtypeStruct):
                return jnp.zeros_like(p, dtype=dtype)
            return dtypes.store(trees.path_str(keys), jnp.array(p, copy=True), dtype)

        return ParamsEmaState(
            count=jnp.zeros((), jnp.int32),
            weight=jnp.zeros((), jnp.float32) if debias else jnp.ones((), jnp.float32),
            ema=jax.tree_util.tree_map_with_path(start, params),
        )

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError("params_ema averages the parameters: update needs params, got None")
        if type(state) is not ParamsEmaState:
            raise wrong_state(init, updates, state, params)
        decay_now = numerics.at_count(decay, state.count)
        is_first = state.count == 0

        def average(ema: jax.Array, p: jax.Array) -> jax.Array:
            new = numerics.moving_average(ema, p, decay_now)
            return new if debias else jnp.where(is_first, p, new)

        weight = average(state.weight, jnp.ones_like(state.weight))
        overwrite = None if overwrite_when is None else overwrite_when(state.count)

        def update_leaf(path: Path, p: Any, u: Any, ema: Any) -> tuple[Any, Any]:
            if p is None:
                return u, ema
            p = jnp.asarray(p)
            u = None if u is None else trees.as_gradient(path, u)
            dtype = dtypes.compute_dtype(p.dtype, ema.dtype)
            new_p = apply_update(path, p, u).astype(dtype)
            if jnp.issubdtype(p.dtype, jnp.floating):
                new_p = dtypes.round_to(new_p, p.dtype)  # as it will be stored
            new_ema = average(ema.astype(dtype), new_p)
            if u is not None and overwrite is not None:
                to_average = _debias(new_ema, weight) - p.astype(dtype)
                u = jnp.where(overwrite, to_average.astype(u.dtype), u)
            return u, dtypes.store(path, new_ema, ema.dtype)

        aligned, treedef = trees.align(
            params, updates, state.ema, names=("the parameters", "the updates", "the average")
        )
        updates, ema = trees.unzip([update_leaf(*leaf) for leaf in aligned], treedef, outputs=2)
        count = numerics.increment(state.count)
        return updates, ParamsEmaState(count, weight, ema)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(state: State) -> Params:
    """The averaged parameters in an optimizer state, in the dtype of the average.

    Args:
      state: an optimizer state with one `params_ema` at any depth.

    Returns:
      A tree like the parameters. With ``debias`` it is zero before the first step.

    Raises:
      ValueError: the state has no average or several (`finalize` accepts several).

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.scale(-1.0), params_ema(0.9))
    >>> ema_params(tx.init(jnp.ones(2))).tolist()
    [1.0, 1.0]
    """
    states = trees.find_states(state, ParamsEmaState)
    if len(states) != 1:
        raise ValueError(f"state must hold one state of params_ema, found {len(states)}")
    return jax.tree.map(lambda ema: _debias(ema, states[0].weight), states[0].ema)


def finalize(params: P, state: State) -> P:
    """The averaged parameters, for evaluation or export (Keras's finalize_variable_values).

    Args:
      params: the trained parameters.
      state: an optimizer state with `params_ema` at any depth, or several for disjoint groups of
        parameters (`by_path`, `optax.masked`).

    Returns:
      A tree like `params`, in its dtypes. Parameters without an average are unchanged; before the
      first step all are.

    Raises:
      ValueError: the state has no average, or its structure differs from that of `params`.

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

    averages: dict[Path, tuple[Any, ParamsEmaState]] = {}
    for found in states:
        for path, ema in trees.flatten_with_paths(found.ema)[0]:
            if averages.setdefault(path, (ema, found))[1] is not found:
                raise ValueError(f"state holds two averages of {path!r}")
    leaves, treedef = trees.flatten_with_paths(params)
    unknown = averages.keys() - {path for path, _ in leaves}
    if unknown:
        raise ValueError(f"params lack {min(unknown)!r}, but the state has an average of it")

    def average(path: Path, p: Any) -> Any:
        ema, found = averages.get(path, (None, None))
        if p is None or ema is None or found is None:
            return p
        p = jnp.asarray(p)
        if p.shape != ema.shape:
            raise ValueError(
                f"{path!r} has shape {list(p.shape)} in params, but its average {list(ema.shape)}"
            )
        averaged = dtypes.store(path, _debias(ema, found.weight), p.dtype)
        return jnp.where(found.count == 0, p, averaged)

    # Matched by path: a module may wrap its parameters in other containers than the state does.
    return treedef.unflatten([average(*leaf) for leaf in leaves])


def _debias(ema: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum divided by the sum of the weights; zero before the first step."""
    weight = jnp.where(weight == 0, jnp.ones_like(weight), weight)
    return dtypes.scale(ema, (1.0 / weight).astype(dtypes.real_dtype(ema.dtype)))
