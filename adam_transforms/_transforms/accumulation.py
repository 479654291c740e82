"""Gradient accumulation: one inner step for several gradients."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, is_rows, on_values
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Field, Role, register
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms import conditional_update, numerics

_FIELDS = {
    "mini_step": Field(Role.SCALAR, metric="mini_step"),
    "acc": Role.BUFFER,
    "inner_state": Role.INNER,
}


@register(**_FIELDS)
class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: int32 (), the number of gradients in this cycle, 0 to every - 1.
      acc: like the parameters, the sum of this cycle's gradients; for row gradients of n rows, all
        rows of the cycle (`SparseRows` of every x n rows, not inside a Flax NNX variable). At
        ``mini_step == 0`` the content is meaningless: the emitting step stores its updates there,
        and the next step overwrites them.
      inner_state: the state of the inner transformation.
    """

    mini_step: jax.Array
    acc: Updates
    inner_state: State


@register(**_FIELDS, weight=Role.SCALAR, cycles=Role.SCALAR)
class VariableAccumulateState(NamedTuple):
    """State of `accumulate` with weights, or with a schedule for `every`.

    Attributes:
      mini_step, acc, inner_state: as in `AccumulateState`; each gradient in `acc` is multiplied by
        its weight.
      weight: float32 (), the sum of the weights of this cycle, or of the last cycle at
        ``mini_step == 0``; None without weights.
      cycles: int32 (), the number of inner steps; None without a schedule.
    """

    mini_step: jax.Array
    acc: Updates
    inner_state: State
    weight: jax.Array | None
    cycles: jax.Array | None


# Checkpoints of plain cycles depend on the fields of the plain class.
ACCUMULATE_STATES = (AccumulateState, VariableAccumulateState)


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], Any],
    *,
    average: bool = True,
    weighted: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    like: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates `every` gradients, then runs `inner` once on their mean or sum.

    .. math:: u_t = \begin{cases}
       \mathrm{inner}\Big(\sum_{i=s+1}^{t} w_i g_i \Big/ \sum_{i=s+1}^{t} w_i\Big)
         & t - s = k \text{ or emit} \\
       0 & \text{otherwise} \end{cases}

    Here s is the last step of the cycle before, k is `every`, and all w are 1 unless `weighted`. On
    all other steps the updates are zero, `inner` does not run, and its state stays bit-identical,
    in place. Counts and schedules inside `inner` advance once a cycle. `inner` receives the extra
    arguments of the emitting step.

    ``update(grads, state, params, emit=True)`` ends the cycle with this gradient, whatever its
    number: the last batches of an epoch may be fewer. `emit` may be traced. If no gradient is left
    to end the cycle with, use `flush_accumulated`.

    Args:
      inner: any transformation.
      every: the number of gradients in a cycle, a static int >= 1, or a schedule of the number of
        inner steps so far, which may be traced. A scheduled value below 1 counts as 1.
      average: pass the mean of the gradients really accumulated to `inner`; False for the sum.
      weighted: ``update(grads, state, params, weight=w)`` weighs each gradient by w >= 0, a number
        or a scalar array: the tokens of a batch, if its gradient is a mean over tokens. A gradient
        of weight 0 is ignored, even if it is NaN. A cycle of total weight 0 makes no step. `inner`
        receives the total as its ``weight``. The accumulator holds the products: in float16 they
        overflow sooner.
      accumulator_dtype: None for the dtype of the parameter, or of `like`, but at least float32.
      like: a tree like the gradients, e.g. from `jax.eval_shape` or `nnx.eval_shape`, if they are
        not like the parameters. Row gradients require it, because it gives their number of rows;
        all rows are stored, in O(every x rows) memory, and summed at the end of the cycle. A leaf
        that is None has no accumulator.

    Returns:
      A transformation with `AccumulateState`, or `VariableAccumulateState` if it is `weighted` or
      `every` is a schedule. A gradient that is None adds nothing to its sum; if
      it is None in the emitting step, the sum is discarded, and `inner` gets None. Reverse-mode
      differentiation through update is not supported.

    Raises:
      ValueError: an argument is out of range; `every` is a schedule and `like` has row gradients.
        In update: the structure or a shape of the gradients differs from that of the parameters or
        of `like`; a weight is negative (a traced weight is not checked).
      TypeError: an argument has the wrong type. In update: `weight` is missing, or was given
        without `weighted`; a gradient has rows, but not in `like`, or the reverse.

    >>> import jax.numpy as jnp, optax
    >>> tx = accumulate(optax.scale(-1.0), every=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print((updates + 0.0).tolist())
    [0.0]
    [-2.0]
    >>> tx = accumulate(optax.scale(-1.0), every=8, weighted=True)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g, tokens, is_last in ((1.0, 3, False), (5.0, 1, True)):
    ...     updates, state = tx.update(jnp.array([g]), state, weight=tokens, emit=is_last)
    >>> updates.tolist()
    [-2.0]
    """
    inner = arguments.transformation("inner", inner)
    if not callable(every):
        every = arguments.positive_int("every", every)
    average = arguments.flag("average", average)
    weighted = arguments.flag("weighted", weighted)
    dtype = arguments.float_dtype("accumulator_dtype", accumulator_dtype)

    def accumulator_of(path: Path, x: Any, param: Any) -> Any:
        if x is None:
            return None
        if not isinstance(x, SparseRows):
            wide = dtype or dtypes.compute_dtype(jnp.result_type(x))
            is_like_param = trees.shape_of(param) == trees.shape_of(x)
            return jnp.zeros_like(param if is_like_param else x, dtype=wide)
        if callable(every):
            raise ValueError(
                f"{path!r} has row gradients in `like`, of which every x rows are stored: every "
                "must be an integer, got a schedule"
            )
        size = every * x.values.shape[0]
        table, axes = (x.values, 1) if param is None else (param, len(x.leading_shape))
        values = trees.zero_rows(table, size, dtype or dtypes.compute_dtype(x.dtype), axes)
        # Without the mark of `like`: each step asks its own gradient.
        indices = jnp.full((size,), x.num_rows)
        return SparseRows(indices, values, x.num_rows, leading_shape=x.leading_shape)

    def init(params: Params) -> State:
        # nnx.Optimizer does not update a variable that contains a tree.
        is_like_params = like is None or trees.is_placeholder(params)
        gradients = params if is_like_params else trees.unwrap_variables(like, is_rows)
        leaves, treedef = trees.flatten_with_paths(gradients)
        param_at = dict(trees.non_none(params))
        acc = treedef.unflatten([accumulator_of(path, x, param_at.get(path)) for path, x in leaves])
        state = AccumulateState(jnp.zeros((), jnp.int32), acc, inner.init(params))
        if not weighted and not callable(every):
            return state
        return VariableAccumulateState(
            *state,
            weight=jnp.zeros((), dtypes.scalar_dtype()) if weighted else None,
            cycles=jnp.zeros((), jnp.int32) if callable(every) else None,
        )

    def is_own(state: State) -> bool:
        """Whether `init` makes states of this kind."""
        if not weighted and not callable(every):
            return type(state) is AccumulateState
        if type(state) is not VariableAccumulateState:
            return False
        kept = state.weight is not None, state.cycles is not None
        return kept == (weighted, callable(every))

    def collect(updates: Updates, state: State, weight: Any) -> _Cycle:
        """The cycle with one more gradient."""
        weight = _checked_weight(weight, weighted)
        is_first = state.mini_step == 0

        def weighed(g: Any, dtype: Any) -> Any:
            if weight is None:
                return g
            return on_values(functools.partial(_weigh, weight, dtype), g)

        def add(path: Path, g: Any, acc: Any) -> Any:
            if isinstance(g, SparseRows) or isinstance(acc, SparseRows):
                _check_rows(path, g, acc, every)
                return _store_rows(acc, weighed(g, acc.dtype), state.mini_step)
            g = dtypes.store(path, weighed(g, acc.dtype), acc.dtype)
            return jnp.where(is_first, g, acc + g)

        acc = trees.wrap_like(updates, state.acc)
        total = trees.map_leaves(add, updates, acc, names=("the accumulator",), rows=True)
        if weight is not None:
            weight = weight.astype(state.weight.dtype)
            weight = jnp.where(is_first, weight, state.weight + weight)
        return _Cycle(state.mini_step + 1, total, weight)

    def update(
        updates: Updates,
        state: State,
        params: Params | None = None,
        *,
        emit: Any = False,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[Updates, State]:
        if not is_own(state):
            raise wrong_state(init, updates, state, params)
        old_acc = trees.wrap_like(updates, state.acc)
        if isinstance(emit, _Flush):
            emit.has_arrived = True
            # The steps that collected these gradients have refused those that are not synchronized.
            total = jax.tree.map(
                lambda x: x.as_synchronized() if is_rows(x) else x, old_acc, is_leaf=is_rows
            )
            cycle = _Cycle(state.mini_step, total, state.weight if weighted else None)
            ends = cycle.count > 0
        else:
            cycle = collect(updates, state, weight)
            ends = _is_full(cycle.count, every(state.cycles) if callable(every) else every)
            ends = ends | arguments.condition("emit", emit)
            if emit is not False:
                extra_args["emit"] = emit
        runs = ends
        if cycle.weight is not None:
            extra_args["weight"] = cycle.weight
            runs = runs & (cycle.weight != 0)

        def step(total: Updates, inner_state: State) -> tuple[Updates, State]:
            divisor = cycle.count if cycle.weight is None else cycle.weight

            def finish(x: Any) -> Any:
                if isinstance(x, SparseRows):
                    x = _first_rows(x, cycle.count, every)
                return on_values(functools.partial(_divide, divisor), x) if average else x

            gradients = jax.tree.map(finish, total, is_leaf=is_rows)
            return inner.update(gradients, inner_state, params, **extra_args)

        def new_accumulator(total: Any, carried: Any, acc: Any) -> Any:
            if acc is None:
                return None
            if total is None:
                return _skip_gradient(acc, state.mini_step, every)
            if isinstance(acc, SparseRows):
                # The updates may have another number of rows.
                rows = carried if carried.values.shape == acc.values.shape else total
                return acc.with_rows(rows.indices, rows.values.astype(acc.dtype))
            return carried.astype(acc.dtype)

        total = cycle.total
        carried, inner_state = conditional_update.update_if(runs, step, total, state.inner_state)
        acc = jax.tree.map(new_accumulator, total, carried, old_acc, is_leaf=trees.is_leaf)
        state = state._replace(
            mini_step=jnp.where(ends, 0, cycle.count),
            acc=trees.wrap_like(state.acc, acc),
            inner_state=inner_state,
        )
        if cycle.weight is not None:
            state = state._replace(weight=cycle.weight)
        if callable(every):
            cycles = jnp.where(runs, numerics.increment(state.cycles), state.cycles)
            state = state._replace(cycles=cycles)
        return conditional_update.select(runs, carried, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def flush_accumulated(
    tx: optax.GradientTransformation, state: State, params: Params, **extra_args: Any
) -> tuple[Updates, State]:
    """Ends an incomplete cycle of `accumulate` with a step on the gradients collected so far.

    Call it at the end of an epoch or of the training, in place of
    ``tx.update(grads, state, params)``, and apply the updates. The result is the same as if the
    last gradient had been passed with ``emit=True``.

    Args:
      tx: a transformation with `accumulate` at any depth: loss scales around it, chains, groups.
      state: its state.
      params: the parameters.
      extra_args: for the inner transformation.

    Returns:
      (updates, state). Wrappers around `accumulate` see a step in which every gradient is None. If
      the cycle is empty, the updates are zero, and the state is bit-identical.

    Raises:
      ValueError: the state has no `accumulate`, or one inside another; a wrapper around it does not
        pass extra arguments on.

    >>> import jax.numpy as jnp, optax
    >>> tx = accumulate(optax.sgd(1.0), every=4)
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for g in (1.0, 1.0, 1.0, 1.0, 2.0, 4.0):  # an epoch of six batches
    ...     updates, state = tx.update(jnp.array([g]), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> updates, state = flush_accumulated(tx, state, params)
    >>> optax.apply_updates(params, updates).tolist()  # -1, and the mean of the last two
    [-4.0]
    """
    tx = arguments.transformation("tx", tx)
    found = trees.find_states(state, ACCUMULATE_STATES)
    if not found:
        raise ValueError("flush_accumulated needs a state of accumulate, got one without it")
    if any(trees.find_states(x.inner_state, ACCUMULATE_STATES) for x in found):
        raise ValueError(
            "flush_accumulated cannot flush accumulate inside accumulate: end the last cycle with "
            "update(..., emit=True)"
        )
    flush = _Flush()

    def step(gradients: Updates, state: State) -> tuple[Updates, State]:
        return tx.update(gradients, state, params, emit=flush, **extra_args)

    no_gradients = jax.tree.map(lambda p: None, params)
    is_pending = functools.reduce(operator.or_, [x.mini_step > 0 for x in found])
    carried, state = conditional_update.update_if(is_pending, step, no_gradients, state)
    if not flush.has_arrived:
        raise ValueError(
            "flush_accumulated cannot reach accumulate: a transformation around it does not pass "
            "the extra arguments of update on; make it an optax.GradientTransformationExtraArgs"
        )
    # Not in the parameters' dtypes: master_weights returns wider updates.
    return conditional_update.select(is_pending, carried, carried, None), state


def has_updated(state: State) -> jax.Array:
    """Whether the last gradient that `accumulate` took made a step, as in `optax.MultiSteps`.

    Args:
      state: an optimizer state with one `accumulate` at any depth, returned by `update`.

    Returns:
      A bool scalar, also inside `jax.jit`; False before the first step. A gradient that
      `skip_nonfinite` or `dynamic_loss_scale` around `accumulate` skips does not change the result;
      `metrics` counts skipped steps.

    Raises:
      ValueError: the state has no `accumulate`, or several.

    >>> import jax.numpy as jnp, optax
    >>> tx = accumulate(optax.adam(0.1), every=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(4):
    ...     _, state = tx.update(jnp.ones(1), state)
    ...     print(bool(has_updated(state)))
    False
    True
    False
    True
    """
    found = trees.find_states(state, ACCUMULATE_STATES)
    if len(found) != 1:
        raise ValueError(f"state must hold one state of accumulate, found {len(found)}")
    (state,) = found
    return (state.mini_step == 0) & _has_run(state)


def _has_run(state: State) -> Any:
    """Whether the inner transformation has run, and in a weighted cycle on a weight."""
    if getattr(state, "weight", None) is not None:
        return state.weight != 0
    if getattr(state, "cycles", None) is not None:
        return state.cycles > 0
    counts = optax.tree_utils.tree_get_all_with_path(
        state.inner_state, "count", filtering=lambda _, x: jnp.ndim(x) == 0
    )
    if counts:
        return functools.reduce(operator.or_, [count > 0 for _, count in counts])
    # The accumulator starts at zero, and holds the last updates after a step.
    leaves = [x.is_valid if is_rows(x) else x for x in jax.tree.leaves(state.acc, is_leaf=is_rows)]
    return functools.reduce(operator.or_, [jnp.any(x != 0) for x in leaves], jnp.zeros((), bool))


class _Flush:
    """The `emit` of `flush_accumulated`: the step has no gradient.

    Attributes:
      has_arrived: whether an `accumulate` has got it.
    """

    has_arrived = False


class _Cycle(NamedTuple):
    """The gradients of one cycle.

    Attributes:
      count: int32 (), their number.
      total: their sum, or all their rows.
      weight: the sum of their weights; None without weights.
    """

    count: jax.Array
    total: Updates
    weight: jax.Array | None


def _is_full(count: jax.Array, every: Any) -> jax.Array:
    """Whether `count` gradients complete a cycle; `every` is an integer or a schedule's value."""
    if isinstance(every, int):
        # The count is larger if the state was saved with a larger `every`.
        return count >= every
    every = dtypes.as_scalar(arguments.scalar("every", every))
    return ~(count.astype(dtypes.scalar_dtype()) < every)


def _checked_weight(weight: Any, weighted: bool) -> jax.Array | None:
    """The weight of one gradient; None without weights."""
    if not weighted:
        if weight is not None:
            raise TypeError(
                "accumulate got weight, but not weighted=True: all gradients would count the same. "
                "Pass weighted=True; for a preset, accumulate(adam(...), every, weighted=True)"
            )
        return None
    if weight is None:
        raise TypeError(
            "accumulate(..., weighted=True) needs the weight of each gradient: "
            "update(grads, state, params, weight=number of tokens)"
        )
    return jnp.asarray(arguments.scalar("weight", weight, at_least=0.0))


def _weigh(weight: jax.Array, dtype: Any, g: jax.Array) -> jax.Array:
    """``weight * g``, zero at weight zero, computed in at least `dtype` and float32."""
    g = g.astype(dtypes.compute_dtype(g.dtype, dtype))
    # The mean over no tokens is 0/0.
    g = jnp.where(weight == 0, jnp.zeros((), g.dtype), g)
    return dtypes.scale(g, weight.astype(dtypes.real_dtype(g.dtype)))


def _divide(divisor: jax.Array, x: jax.Array) -> jax.Array:
    """``x / divisor`` in the dtype of `x`, computed in at least float32."""
    wide = x.astype(dtypes.compute_dtype(x.dtype))
    factor = 1.0 / divisor.astype(dtypes.real_dtype(wide.dtype))
    return dtypes.scale(wide, factor).astype(x.dtype)


def _check_rows(path: Path, g: Any, acc: Any, every: Any) -> None:
    """Refuses a gradient that differs from `like` in its kind or number of rows."""
    if not isinstance(acc, SparseRows):
        raise TypeError(
            f"{path!r} has a row gradient (SparseRows): accumulate needs to know its number of "
            "rows; pass like=jax.eval_shape(gradient function, ...)"
        )
    if not isinstance(g, SparseRows):
        raise TypeError(f"{path!r} has a dense gradient, but a row gradient in `like`")
    if g.leading_shape != acc.leading_shape:
        raise ValueError(
            f"{path!r} has a gradient of rows numbered along {list(g.leading_shape)}, but along "
            f"{list(acc.leading_shape)} in `like`"
        )
    size = acc.values.shape[0] // every
    if g.values.shape[0] != size:
        raise ValueError(
            f"{path!r} has a gradient of {g.values.shape[0]} rows, but of {size} in `like`"
        )


def _skip_gradient(acc: Any, mini_step: jax.Array, every: Any) -> Any:
    """`acc` after a gradient that is None; the content of the last cycle is overwritten."""
    if not isinstance(acc, SparseRows):
        return jnp.where(mini_step == 0, jnp.zeros_like(acc), acc)
    size = acc.values.shape[0] // every
    padding = acc.with_rows(jnp.full((size,), acc.num_rows), acc.values[:size])
    return _store_rows(acc, padding, mini_step)


def _store_rows(acc: SparseRows, rows: SparseRows, mini_step: jax.Array) -> SparseRows:
    """`acc` with the rows of one step at their position, and marked as these are."""
    size = rows.values.shape[0]
    at = mini_step * size + jnp.arange(size, dtype=jnp.int32)
    # XLA scatters in place; it would copy `acc` for a dynamic_update_slice.
    return rows.with_rows(
        acc.indices.at[at].set(rows.indices), acc.values.at[at].set(rows.values.astype(acc.dtype))
    )


def _first_rows(acc: SparseRows, count: jax.Array, every: Any) -> SparseRows:
    """`acc` with the rows of `count` gradients; those of the last cycle become padding."""
    positions = jnp.arange(acc.values.shape[0], dtype=jnp.int32)
    is_of_cycle = positions < count * (acc.values.shape[0] // every)
    return acc.with_rows(jnp.where(is_of_cycle, acc.indices, acc.num_rows), acc.values)
