"""An exponential moving average of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import DTypeLike

from adam_transforms._core import arguments, dtypes, state_layout, trees
from adam_transforms._core.sparse_rows import DeferredRows, SparseRows
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Role, register
from adam_transforms._core.types import P, Params, Path, State, Updates
from adam_transforms._transforms import numerics
from adam_transforms._transforms.apply_updates import apply_update


@register(
    count=Role.SCALAR,
    weight=Role.SCALAR,
    ema=Role.AVERAGE,
    last_step=Role.AVERAGED_STEP,
    log_decay=Role.SCALAR,
)
class ParamsEmaState(NamedTuple):
    """State of `params_ema`.

    Attributes:
      count: int32 (), the number of steps.
      weight: float32 (), the sum of the weights in `ema`: 1, or with ``debias`` 1 - decay^count.
      ema: like the parameters, in `ema_dtype`; `ema_params` divides it by `weight`.
      last_step: for each parameter int32, the last step that the average of each row includes. The
        shape is that of the parameter without its last axis, for a vector (V,). None if the average
        does not support row updates.
      log_decay: float32 (), the logarithm of the decay; None if `last_step` is None.
    """

    count: jax.Array
    weight: jax.Array
    ema: Params
    last_step: Any = None
    log_decay: jax.Array | None = None


def params_ema(
    decay: optax.ScalarOrSchedule = 0.99,
    *,
    overwrite_every: int | None = None,
    initial: Literal["first", "params"] = "first",
    debias: bool = False,
    ema_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters after each update. It must be the last in a chain.

    .. math:: a_t = d\, a_{t-1} + (1-d)\, p_t, \qquad p_t = p_{t-1} + u_t, \qquad a_1 = p_1

    The updates are returned unchanged, except on every `overwrite_every`-th step: then they set the
    parameters to the average (Keras's use_ema and ema_overwrite_frequency). The average itself and
    the states of earlier transformations in the chain are not reset.

    Inside `lazy` or after it, a step with a row update takes time and memory for the touched rows.
    An idle row has a constant value p. Its n idle steps are averaged when it is next touched or
    read: ``a`` becomes ``p + d^n (a - p)``.

    Args:
      decay: d in [0, 1), or a schedule ``count -> value``. Row updates need a Python number. If a
        run is resumed with another `decay`, the new one applies to the whole idle gap of a row.
      overwrite_every: None for never, or a static int >= 1. Row updates need None.
      initial: "first" for a_1 = p_1, as in Keras and PyTorch; "params" for a_0 = p_0, as in
        flax.nnx.EMA and tf.train.ExponentialMovingAverage.
      debias: start from zero instead; `ema_params` then divides by ``1 - d^t`` (for a schedule, by
        one minus the running product).
      ema_dtype: dtype of the average; None for the parameter's, but at least float32.

    Returns:
      A transformation with `ParamsEmaState`; update needs `params`. The average is exact if updates
      are applied as by `apply_updates` without a key. A parameter whose update is None does not
      change: its current value is averaged, and `overwrite_every` does not apply to it.

    Raises:
      ValueError: an argument is out of range; update was called without `params`, or with a row
        update of stacked tables with other row axes than the average's.
      TypeError: there is a row update, and it comes from `deferred_adam`, which moves idle rows, or
        `decay` is not a Python number, or `overwrite_every` is not None.

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
    every = overwrite_every
    if every is not None:
        every = arguments.positive_int("overwrite_every", every)
    return track_params_ema(
        decay,
        None if every is None else lambda count: (count + 1) % every == 0,
        initial=initial,
        debias=debias,
        ema_dtype=ema_dtype,
    )


def track_params_ema(
    decay: optax.ScalarOrSchedule,
    overwrite_when: Callable[[jax.Array], jax.Array] | None,
    *,
    initial: Literal["first", "params"] = "first",
    debias: bool = False,
    ema_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`params_ema` that overwrites the parameters if ``overwrite_when(count)`` is true, where
    `count` is the number of steps before this one."""
    arguments.choice("initial", initial, ("first", "params"))
    debias = arguments.flag("debias", debias)
    if debias and initial == "params":
        raise ValueError('debias starts from zero: it excludes initial="params"')
    ema_dtype = arguments.float_dtype("ema_dtype", ema_dtype)
    copies_first = initial == "first" and not debias
    log_decay = None  # unless the average takes row updates
    if isinstance(decay, float) and overwrite_when is None:
        log_decay = math.log(decay) if decay else -math.inf

    def init(params: Params) -> State:
        def start(keys: Any, p: Any) -> jax.Array:
            dtype = ema_dtype or dtypes.compute_dtype(jnp.result_type(p))
            if debias or isinstance(p, jax.ShapeDtypeStruct):
                return jnp.zeros_like(p, dtype=dtype)
            return dtypes.store(trees.path_str(keys), jnp.array(p, copy=True), dtype)

        def no_step(p: Any) -> jax.Array:
            # Rows of stacked tables have several axes, and only a row update tells how many.
            axes = max(1, len(trees.shape_of(p)) - 1)
            return trees.zeros_per_row(p, jnp.int32, axes)

        state = ParamsEmaState(
            count=jnp.zeros((), jnp.int32),
            weight=jnp.zeros((), jnp.float32) if debias else jnp.ones((), jnp.float32),
            ema=jax.tree_util.tree_map_with_path(start, params),
        )
        if log_decay is None:
            return state
        last_step: Any = jnp.zeros((), jnp.int32)  # for `optax.tree.map_params`, no parameters
        if not trees.is_placeholder(params):
            last_step = jax.tree.map(no_step, params)
        return state._replace(
            last_step=last_step,
            log_decay=jnp.float32(log_decay),
        )

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError(
                "params_ema averages the parameters: update needs params, got None: "
                "call update(grads, state, params)"
            )
        keeps_steps = type(state) is ParamsEmaState and state.last_step is not None
        if type(state) is not ParamsEmaState or (keeps_steps and log_decay is None):
            raise wrong_state(init, updates, state, params)
        decay_now = numerics.at_count(decay, state.count)
        is_first = state.count == 0
        count = numerics.increment(state.count)

        def average(ema: jax.Array, p: jax.Array) -> jax.Array:
            new = numerics.moving_average(ema, p, decay_now)
            return jnp.where(is_first, p, new) if copies_first else new

        weight = average(state.weight, jnp.ones_like(state.weight))
        overwrite = None if overwrite_when is None else overwrite_when(state.count)

        def average_leaf(path: Path, p: jax.Array, u: Any, ema: jax.Array, last: Any) -> Any:
            """The new average and last step of a parameter, or of some of its rows."""
            dtype = dtypes.compute_dtype(p.dtype, ema.dtype)
            new_p = apply_update(path, p, u).astype(dtype)
            if jnp.issubdtype(p.dtype, jnp.floating):
                new_p = dtypes.round_to(new_p, p.dtype)  # as it will be stored
            ema = ema.astype(dtype)
            if last is not None:
                ema = _caught_up(ema, p, log_decay, state.count - last)
                last = jnp.maximum(last, count)
            return average(ema, new_p), last

        def update_leaf(path: Path, p: Any, u: Any, ema: Any, last: Any) -> tuple[Any, Any, Any]:
            if p is None:
                return u, ema, last
            p = jnp.asarray(p)
            if isinstance(u, SparseRows):
                _check_rows(path, u, last)
                rows = u.sum_duplicates()
                some_p, some_ema, some_last = rows.gather_each([p, ema, last])
                new = average_leaf(path, some_p, rows.values, some_ema, some_last)
                ema, last = rows.scatter_each([ema, last], new)
                return u.after_read(some_p), ema, last
            u = None if u is None else trees.as_gradient(path, u)
            new_ema, last = average_leaf(path, p, u, ema, last)
            if u is not None and overwrite is not None:
                to_average = _debias(new_ema, weight) - p.astype(new_ema.dtype)
                u = jnp.where(overwrite, to_average.astype(u.dtype), u)
            return u, dtypes.store(path, new_ema, ema.dtype), last

        aligned, treedef = trees.align(
            params, updates, state.ema, names=("the parameters", "the updates", "the average")
        )
        new_state = ParamsEmaState(count, weight, state.ema)
        last_steps = [None] * len(aligned)
        if keeps_steps:
            last_steps = treedef.flatten_up_to(state.last_step)
            new_state = new_state._replace(log_decay=jnp.float32(log_decay))
        results = [
            update_leaf(path, p, u, ema, last)
            for (path, p, u, ema), last in zip(aligned, last_steps, strict=True)
        ]
        updates, ema, last_step = trees.unzip(results, treedef, outputs=3)
        if keeps_steps:
            new_state = new_state._replace(last_step=last_step)
        return updates, new_state._replace(ema=ema)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(state: State, params: Params | None = None) -> Params:
    """The averaged parameters in an optimizer state, in the dtype of the average.

    Args:
      state: an optimizer state with one `params_ema` at any depth.
      params: the trained parameters, required after row updates: the average of an idle row moves
        towards the row's value.

    Returns:
      A tree like the parameters. With ``debias`` it is zero before the first step. Under
      `jax.jit` without `params`, the average of an idle row is NaN.

    Raises:
      ValueError: the state has no average or several (`finalize` accepts several); the average of
        some rows needs `params`, got None.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.scale(-1.0), params_ema(0.9))
    >>> ema_params(tx.init(jnp.ones(2))).tolist()
    [1.0, 1.0]
    """
    averages = _averages(state)
    if len(averages) != 1:
        raise ValueError(
            f"state must hold one state of params_ema, found {len(averages)}: "
            "finalize(params, state, which=...) chooses one"
        )
    (found,) = averages.values()
    leaves, treedef = trees.flatten_with_paths(found.ema)
    last_steps, values = _by_path(found.last_step), _by_path(params)

    def average(path: Path, ema: Any) -> Any:
        if ema is None:
            return None
        last, p = last_steps.get(path), values.get(path)
        if last is not None and p is None:
            ema = _idle_as_nan(path, ema, found.count - last)
        return _read(path, found, ema, last, p)

    return treedef.unflatten([average(*leaf) for leaf in leaves])


def finalize(params: P, state: State, *, which: int | str | None = None) -> P:
    """The averaged parameters, for evaluation or export (Keras's finalize_variable_values).

    Args:
      params: the trained parameters.
      state: an optimizer state with `params_ema` at any depth, or several.
      which: selects one of several averages of a parameter: its position among them, in the order
        of the chain, or a key on the path to its state, such as a name in `optax.named_chain`.

    Returns:
      A tree like `params`, in its dtypes. Parameters without an average are unchanged; before the
      first step all are.

    Raises:
      ValueError: the state has no average, or its structure differs from that of `params`; `which`
        does not select exactly one of a parameter's averages.
      TypeError: `which` has another type.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(params_ema(decay=0.5), params_ema(decay=0.75))
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([4.0]), state, params)
    ...     params = params + updates
    >>> finalize(params, state, which=0).tolist(), finalize(params, state, which=-1).tolist()
    ([7.0], [6.0])
    """
    averages = _averages(state)
    if isinstance(which, np.integer):
        which = int(which)
    if which is not None and (isinstance(which, bool) or not isinstance(which, int | str)):
        raise TypeError(f"which must be an integer, a string or None, got {which!r}")
    if isinstance(which, str):
        named = {place: x for place, x in averages.items() if which in place.split("/")}
        if not named:
            raise ValueError(f"which={which!r} is on the path of no average: {list(averages)}")
        averages = named
    found: dict[Path, list[tuple[ParamsEmaState, Any, Any]]] = {}
    for average in averages.values():
        last_steps = _by_path(average.last_step)
        for path, ema in trees.non_none(average.ema):
            found.setdefault(path, []).append((average, ema, last_steps.get(path)))
    leaves, treedef = trees.flatten_with_paths(params)
    unknown = found.keys() - {path for path, _ in leaves}
    if unknown:
        raise ValueError(f"params lack {min(unknown)!r}, but the state has an average of it")

    def choose(path: Path) -> tuple[ParamsEmaState, Any, Any]:
        several = found[path]
        if isinstance(which, int):
            if not -len(several) <= which < len(several):
                raise ValueError(
                    f"which={which} is no position among the averages of {path!r}: it has "
                    f"{len(several)}"
                )
            return several[which]
        if len(several) > 1:
            raise ValueError(
                f"state holds two averages of {path!r}: choose one by its position, which=0 or "
                f"which=-1, or by a key on its path: {list(averages)}"
            )
        return several[0]

    def average_of(path: Path, p: Any) -> Any:
        if p is None or path not in found:
            return p
        average, ema, last = choose(path)
        p = jnp.asarray(p)
        averaged = dtypes.store(path, _read(path, average, ema, last, p), p.dtype)
        return jnp.where(average.count == 0, p, averaged)

    # Matched by path: a module may wrap its parameters in other containers than the state does.
    return treedef.unflatten([average_of(*leaf) for leaf in leaves])


def _averages(state: State) -> dict[str, ParamsEmaState]:
    """{path: state} of each average, in order."""
    nodes = state_layout.walk(state, stop=lambda place, node: isinstance(node, ParamsEmaState))
    averages = {str(place): node for place, node in nodes if isinstance(node, ParamsEmaState)}
    if not averages:
        raise ValueError(
            "state must hold a state of params_ema, found none: pass ema=... to adam, adamw or "
            "lazy_adam, or put params_ema last in the chain"
        )
    return averages


def _by_path(tree: Any) -> dict[Path, Any]:
    return dict(trees.non_none(tree))


def _read(path: Path, state: ParamsEmaState, ema: Any, last: Any, p: Any) -> jax.Array:
    """The average of a parameter after all steps; without `p`, of rows that have not been idle."""
    if p is not None:
        p = jnp.asarray(p)
        if p.shape != ema.shape:
            raise ValueError(
                f"{path!r} has shape {list(p.shape)} in params, but its average {list(ema.shape)}"
            )
        if last is not None:
            ema = _caught_up(ema, p, state.log_decay, state.count - last)
    return _debias(ema, state.weight)


def _caught_up(ema: Any, p: jax.Array, log_decay: Any, steps: jax.Array) -> jax.Array:
    """The average of each row after it has had the value p for so many steps."""
    dtype = dtypes.compute_dtype(p.dtype, ema.dtype)
    caught_up = numerics.moving_average_of_constant(
        ema.astype(dtype), p.astype(dtype), log_decay, steps
    )
    return caught_up.astype(ema.dtype)


def _idle_as_nan(path: Path, ema: Any, steps: jax.Array) -> Any:
    """`ema` with NaN for idle rows; a ValueError if the steps are known and there are some."""
    if isinstance(steps, Tracer):
        nan = jnp.full_like(ema, jnp.nan)
        return numerics.moving_average_of_constant(ema, nan, 0.0, steps)
    if jnp.any(steps != 0):
        raise ValueError(
            f"the average of {path!r} has idle rows, which move towards their values: "
            "ema_params needs params, ema_params(state, params), got None"
        )
    return ema


def _check_rows(path: Path, u: SparseRows, last: Any) -> None:
    """Refuses a row update that would leave the average of idle rows inexact."""
    if isinstance(u, DeferredRows):
        raise TypeError(
            f"{path!r} has a row gradient of deferred_adam, which moves idle rows too: params_ema "
            "cannot average them; mask it to the other parameters (optax.masked), or use lazy_adam"
        )
    if last is None:
        raise TypeError(
            f"{path!r} has a row gradient, and params_ema averages idle rows only if decay is a "
            "Python number (under optax.inject_hyperparams, in static_args) and overwrite_every "
            "is None; or mask it to the other parameters (optax.masked)"
        )
    if last.shape[: len(u.leading_shape)] != u.leading_shape:
        raise ValueError(
            f"{path!r} has a row gradient with the row axes {list(u.leading_shape)}, but "
            f"params_ema keeps last steps of shape {list(last.shape)}: mask it to the other "
            "parameters (optax.masked)"
        )


def _debias(ema: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum divided by the sum of the weights; zero before the first step."""
    weight = jnp.where(weight == 0, jnp.ones_like(weight), weight)
    return dtypes.scale(ema, (1.0 / weight).astype(dtypes.real_dtype(ema.dtype)))
