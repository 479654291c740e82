"""Dense Adam's trajectory at the cost of the rows touched.

While its gradient is zero, a row of dense Adam still moves on its remaining momentum. Here such a
row is left alone, and the updates that it misses are pending. They are applied in closed form
(`missed_updates`) when the row is next read, when it is next touched, or when its turn comes in the
round robin that synchronizes every row at least once in `max_idle` steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_transforms._core import arguments, dtypes, patterns, trees
from adam_transforms._core.sparse_rows import DeferredRows, SparseRows, is_rows, sum_with_run
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._embeddings.deferred.chebyshev import Rule, make_rule
from adam_transforms._embeddings.deferred.missed_updates import (
    HistoryRows,
    UpdateHistory,
    advance,
    empty_history,
    gather_history,
    next_count,
)
from adam_transforms._embeddings.deferred.state import (
    DeferredAdamState,
    IdleRows,
    TableRows,
    history_dtype,
    idle_tables,
    is_like,
    map_idle,
    round_robin_schedule,
    slot_trees,
    with_last_steps,
    with_numbers,
    with_slots,
)
from adam_transforms._embeddings.row_blocks import DEFERRED_BYTES, block_length, over_blocks
from adam_transforms._transforms import numerics
from adam_transforms._transforms.adam import (
    Hyperparameters,
    coefficients_of,
    init_state,
    update_leaf,
)
from adam_transforms._xla.platform import by_platform
from adam_transforms._xla.scheduling import depend_on, materialize_outputs, token, token_of_all


@arguments.suggest_names
def deferred_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    tables: patterns.Selection,
    eps_hat: bool = False,
    amsgrad: bool = False,
    max_of: Literal["corrected", "raw"] = "raw",
    weight_decay: float | jax.Array | None = None,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    max_idle: int = 65536,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam(W) that updates the touched rows of a table now, and the others when they are needed.

    The parameters are dense Adam's, to rounding. A step costs time and memory for the touched rows.
    Let a row have the moments m and v after step s, and be idle (without a gradient) until step t.
    In these steps dense Adam subtracts from the row, without weight decay and AMSGrad,

    .. math::
      \sum_{j=1}^{t-s} \frac{A_{s+j}\, \rho^j\, m}{\sqrt v + x_j}, \qquad
      A_t = \eta_t \frac{\sqrt{1-b_2^t}}{1-b_1^t}, \quad \rho = \frac{b_1}{\sqrt{b_2}}, \quad
      x_j = \epsilon \sqrt{1-b_2^{s+j}}\, b_2^{-j/2}

    (with `eps_hat`, :math:`x_j = \epsilon\, b_2^{-j/2}`). This is the pending update of the row. It
    is computed from a few terms, however long the gap, when the row is synchronized. Until then the
    row in `params` is stale. Read tables through one of:

    - ``value_and_grad(loss, rows_from=state)`` in training;
    - `catch_up`, for any other code that reads some rows;
    - `flush`, before the whole table is read: evaluated, exported, or handed to another optimizer.

    `owed` returns the number of stale rows and the longest idle gap.

    Args:
      learning_rate: a number, a scalar array or a schedule ``count -> value``.
      b1, b2: decay rates, 0 <= b1 < sqrt(b2) < 1 (with `amsgrad`, any below 1): Python numbers, or
        arrays of one element that are not traced.
      eps: a number like b1 and b2; at the default rates at least 1.3e-17, with `eps_hat` 4e-19.
      tables: selects the parameters (V, D...) that are tables: one regular expression or several,
        searched for in the path, or a predicate ``(path, leaf) -> bool``. All other parameters get
        dense Adam.
      eps_hat, amsgrad, max_of, mu_dtype, nu_dtype: as for `adam`.
      weight_decay: decoupled: ``learning_rate * weight_decay * p`` is subtracted. A number or a
        scalar array.
      weight_decay_mask: as for `adam`.
      max_idle: the most steps that a row is idle. In each step a round robin synchronizes
        ceil(V / max_idle) rows. The state stores about 30 to 400 bytes for each of these steps.

    Returns:
      A transformation with `DeferredAdamState`; `update` needs `params`. The gradient of a table is
      a `SparseRows` marked as `synchronized`, as ``value_and_grad(loss, rows_from=state)`` returns
      it. The update of the table contains the touched rows and the rows of the round robin. In a
      step with a gradient of no rows, all rows are idle. A dense gradient, or None, first applies
      all pending updates of the table. With None, the step then adds nothing. A dense gradient too
      must be computed from rows without pending updates: by `rows_from`, or after `flush`. This is
      not checked, because an array has no mark.

    Raises:
      ValueError: b1 >= sqrt(b2); eps is too small; `max_idle` is too short for the momentum of an
        idle row to vanish; `tables` matches nothing, or a scalar. In update: rows are not marked as
        `synchronized`; the state was made with other `tables`, `max_idle`, `b1`, `b2`, `eps`,
        `eps_hat`, `amsgrad` or `max_of`, or only the state or only this transformation has
        weight decay.
      TypeError: a table is not of a real floating dtype; b1, b2, eps or max_idle is traced, as
        ``optax.inject_hyperparams`` does with arguments that are not in its ``static_args``.

    After `catch_up` or `flush`, a gradient may be computed without `rows_from`: mark it by
    ``rows.as_synchronized()``. Rows built by hand are marked by
    ``SparseRows(..., synchronized=True)``, as in the example below.

    L2 decay, which is added to the gradient, is not supported: use `weight_decay`. To clip
    gradients, use ``optax.chain(lazy(optax.clip_by_global_norm(1.0)), deferred_adam(...))``.

    >>> import jax.numpy as jnp, optax
    >>> from adam_transforms import SparseRows, flush
    >>> tx = deferred_adam(0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = tx.init(params)
    >>> for row in (2, 0):
    ...     rows = SparseRows(jnp.array([row]), jnp.ones((1, 1)), num_rows=4, synchronized=True)
    ...     grads = {"table": rows}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["table"].round(3).tolist()  # row 2 has moved once; one update is pending
    [[-0.074...], [0.0], [-0.1...], [0.0]]
    >>> params, state = flush(params, state)
    >>> params["table"].round(3).tolist()
    [[-0.074...], [0.0], [-0.16...], [0.0]]
    """
    amsgrad = arguments.flag("amsgrad", amsgrad)
    arguments.choice("max_of", max_of, ("corrected", "raw"))
    b1, b2, eps, max_idle = (
        arguments.static_number(name, value, _STATIC_ARGUMENTS)
        for name, value in (("b1", b1), ("b2", b2), ("eps", eps), ("max_idle", max_idle))
    )
    learning_rate = arguments.scalar_or_schedule("learning_rate", learning_rate)
    if weight_decay is not None:
        weight_decay = arguments.scalar("weight_decay", weight_decay, at_least=0.0)
    hp = Hyperparameters(
        *(b1, b2, eps, 0.0, mu_dtype, nu_dtype, eps_hat), max_of=max_of if amsgrad else None
    ).checked()

    @functools.cache
    def rule_in(dtype: Any) -> Rule:
        form = {"eps_hat": hp.eps_hat, "max_of": hp.max_of, "max_idle": max_idle}
        return make_rule(hp.b1, hp.b2, hp.eps, **form, dtype=dtype)

    rule_in(dtypes.scalar_dtype())  # refuses arguments out of range
    select = patterns.selector("tables", tables)

    def is_decayed(params: Params) -> list[bool]:
        """Whether weight decay acts on each leaf."""
        paths, treedef = trees.flatten_with_paths(params)
        if weight_decay is None or weight_decay_mask is None:
            return [weight_decay is not None for _ in paths]
        mask = weight_decay_mask(params) if callable(weight_decay_mask) else weight_decay_mask
        return [bool(flag) for flag in treedef.flatten_up_to(mask)]

    def init(params: Params) -> State:
        return init_by(rule_in(dtypes.scalar_dtype()), params)

    def init_by(rule: Rule, params: Params) -> DeferredAdamState:
        if trees.is_placeholder(params):
            idle, idle_decayed = placeholders(rule, params)
        else:
            idle, idle_decayed = idle_groups(rule, params)
        slots = init_state(hp, params)
        nu_max = slots.nu_max if amsgrad else None
        rate = jnp.array(numerics.at_count(learning_rate, slots.count), dtypes.scalar_dtype())
        return DeferredAdamState(slots.count, slots.mu, slots.nu, nu_max, idle, idle_decayed, rate)

    def idle_groups(rule: Rule, params: Params) -> list[IdleRows | None]:
        """The idle rows of the tables without weight decay, and of those with it."""
        leaves, treedef = trees.flatten_with_paths(params)
        chosen = select(leaves)
        for i in chosen:
            _check_table(*leaves[i])
        decayed = {i for i, decays in enumerate(is_decayed(params)) if decays}
        groups = []
        for members, decays in ((chosen - decayed, False), (chosen & decayed, True)):
            last_step = [
                trees.zeros_per_row(leaf, jnp.int32) if i in members else optax.MaskedNode()
                for i, (_, leaf) in enumerate(leaves)
            ]
            idle = IdleRows(treedef.unflatten(last_step), empty_history(rule, decays=decays))
            groups.append(idle if members else None)
        return groups

    def placeholders(rule: Rule, params: Params) -> list[Any]:
        """As `idle_groups`, for `optax.tree.map_params`."""
        if weight_decay is not None and weight_decay_mask is not None:
            # The paths decide which groups there are: each is left as it is.
            return ["idle", "idle_decayed"]
        decays = weight_decay is not None
        history = jax.eval_shape(functools.partial(empty_history, rule, decays=decays))
        idle = IdleRows(params, history)
        return [None, idle] if decays else [idle, None]

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError(
                "deferred_adam moves parameters: update needs params, got None: "
                "call update(grads, state, params)"
            )
        if type(state) is not DeferredAdamState:
            raise wrong_state(init, updates, state, params)
        old_slots = slot_trees(state)
        names = ("the updates", "the parameters", *("the state's moments" for _ in old_slots))
        aligned, treedef = trees.align(updates, params, *old_slots, names=names)
        dtype = history_dtype(state)
        rule = rule_in(dtype)
        expected = jax.eval_shape(functools.partial(init_by, rule), params)
        expected = with_numbers(rule, dtype, expected)
        if not is_like(expected, state):
            raise wrong_state(init, updates, state, params, expected)
        rate = numerics.scalar_at(learning_rate, state.count)
        count_after = next_count(state.count, rule.max_idle + 1)
        coefficients = coefficients_of(hp, state.count)

        def step(
            path: Path, decays: bool, g: jax.Array, p: jax.Array, *slots: jax.Array
        ) -> list[jax.Array]:
            """What is added to one parameter, or to rows of it, and its new slots."""
            u, *new_slots = update_leaf(hp, coefficients, path, g, *slots, p)
            if decays:
                u = u + p.astype(u.dtype) * dtypes.as_scalar(weight_decay, u.dtype)
            return [-dtypes.as_scalar(rate, u.dtype) * u, *new_slots]

        idle, last_steps, tokens = idle_tables(state), {}, []
        results = []
        for (path, g, p, *slots), decays in zip(aligned, is_decayed(params), strict=True):
            if not (g is None or is_rows(g)):
                g = trees.as_gradient(path, g)
            if path in idle:
                _refuse_stacked(path, g)
                _refuse_stale(path, g)
                table = TableRows(jnp.asarray(p), tuple(slots), idle[path].last_step)
                step_of_table = functools.partial(step, path, decays)
                counts = state.count, count_after
                done = _step_table(g, table, idle[path].history, *counts, step_of_table)
                results.append((done.update, *done.table.slots))
                last_steps[path] = done.table.last_step
                tokens.append(done.token)
            elif g is None:
                results.append((None, *slots))
            else:
                g = trees.as_gradient(path, g)
                results.append(tuple(step(path, decays, g, jnp.asarray(p), *slots)))
        updates, *new_slots = trees.unzip(results, treedef, 1 + len(old_slots))
        # All that is written into the histories depends on this count.
        count_after_reads = depend_on(count_after, tokens)

        def advanced(field: str, group: IdleRows) -> IdleRows:
            decay = weight_decay if field == "idle_decayed" else 0.0
            return group._replace(ring=advance(rule, group.ring, count_after_reads, rate, decay))

        state = with_last_steps(with_slots(state, new_slots), last_steps)
        state = state._replace(count=count_after)
        if state.rate is not None:
            state = state._replace(rate=jnp.array(rate, state.rate.dtype))
        return updates, map_idle(advanced, state)

    return optax.GradientTransformationExtraArgs(init, update)


# What `optax.inject_hyperparams` would otherwise trace, or take for schedules.
_STATIC_ARGUMENTS = tuple("b1 b2 eps tables weight_decay_mask mu_dtype nu_dtype max_idle".split())


class _TableStep(NamedTuple):
    """The result of a step for one table: its update, the table with new slots and last steps but
    its values as they are, and a token of the reads of its history."""

    update: Any
    table: TableRows
    token: jax.Array


# From a gradient, parameters and slots to what is added to the parameters, and the new slots.
_Step = Callable[..., list[jax.Array]]


def _step_table(
    g: Any,
    table: TableRows,
    history: UpdateHistory,
    count: jax.Array,
    count_after: jax.Array,
    step: _Step,
) -> _TableStep:
    """The step from `count` to `count_after` for one table; `g` is a row gradient, a dense one or
    None."""
    if not is_rows(g):
        entries = gather_history(history, table.last_step, count)
        u, now = _step_rows(g, table, entries, count_after, step)
        return _TableStep(u, table.scatter(None, now), _token(entries))
    rows = add_round_robin_rows(g, count, history.weights.shape[0])

    def at_once(some: SparseRows, table: TableRows) -> _Stepped:
        before = table.gather(some)
        entries = gather_history(history, before.last_step, count)
        u, now = _step_rows(some.values, before, entries, count_after, step)
        # With `rows_from` the forward pass reads the slots too; the gradient depends on that.
        reads = jnp.minimum(_token(entries), token(some.values))
        now = table.scatter(some, now._replace(last_step=depend_on(now.last_step, [reads])))
        return u, (now.slots, now.last_step), reads

    def in_blocks(length: int, rows: SparseRows, table: TableRows) -> _Stepped:
        def block(some: SparseRows, so_far: Any) -> tuple[jax.Array, Any]:
            u, now, _ = at_once(some, TableRows(table.values, *so_far))
            return u, now

        u, now = over_blocks(block, rows, (table.slots, table.last_step), length)
        return u, now, token(u)

    nbytes = rows.values.nbytes
    is_large = isinstance(nbytes, int) and nbytes >= DEFERRED_BYTES
    length = block_length(rows) if is_large else None
    if length is None:
        u, now, reads = at_once(rows, table)
    else:
        u, now, reads = by_platform(functools.partial(in_blocks, length), at_once, rows, table)
    return _TableStep(DeferredRows.of(rows.with_values(u)), TableRows(table.values, *now), reads)


# The update of some rows, the table's slots and last steps after it, and a token of what was read.
_Stepped = tuple[jax.Array, Any, jax.Array]


def _token(entries: HistoryRows) -> jax.Array:
    return token_of_all((entries.weights, entries.nodes, entries.log_decay))


def _step_rows(
    g: jax.Array | None,
    before: TableRows,
    entries: HistoryRows,
    count_after: jax.Array,
    step: _Step,
) -> tuple[jax.Array, TableRows]:
    """The step of some rows, or of a whole table, from a dense gradient or None.

    Returns:
      (update, the rows after the step, their values as they are).
    """
    pending = before.pending(entries)
    slots = before.slots_after(pending)
    delta = pending.delta(before.values)
    if g is None:  # the step does not move the table
        u = delta.astype(before.values.dtype)
    else:
        arrays = [g, pending.apply_to_params(before.values), *slots]
        move, *slots = materialize_outputs(step, arrays, [False] + [True] * len(slots))
        wide = dtypes.promote(delta.dtype, move.dtype)
        u = delta.astype(wide) + move.astype(wide)
        u = u.astype(dtypes.promote(g.dtype, before.values.dtype))
    last_step = jnp.full_like(before.last_step, count_after)
    return u, TableRows(before.values, tuple(slots), last_step)


def _check_table(path: Path, leaf: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
            f"{path!r} is selected by tables and must be of a real floating dtype, "
            f"got {jnp.result_type(leaf)}"
        )


def _refuse_stacked(path: Path, g: Any) -> None:
    if isinstance(g, SparseRows) and len(g.leading_shape) > 1:
        raise ValueError(
            f"{path!r} has a row gradient of stacked tables, {g}, but deferred_adam keeps rows "
            f"along the first axis: make it one table of {g.num_rows} rows, in which row (f, v) is "
            f"row f * {math.prod(g.leading_shape[1:])} + v, or use lazy_adam"
        )


def _refuse_stale(path: Path, g: Any) -> None:
    if isinstance(g, SparseRows) and g.values.shape[0] and not g.synchronized:
        raise ValueError(
            f"{path!r} is a table of deferred_adam, whose rows in params may have pending updates, "
            "but its row gradient is not marked as computed from synchronized rows. Compute it by "
            "value_and_grad(loss, rows_from=state)(params, ...). If catch_up or flush has "
            "synchronized the rows that the loss reads, mark it: rows.as_synchronized(). Rows "
            "built by hand: SparseRows(indices, values, num_rows, synchronized=True)"
        )


# The rows that a step of the round robin has room for are a multiple of this: tables of different
# sizes then share a program.
_TURN = 16


def add_round_robin_rows(rows: SparseRows, count: jax.Array, max_idle: int) -> SparseRows:
    """The rows, unique, and with zeros the rows that this step of the round robin synchronizes."""
    period, length = round_robin_schedule(rows.num_rows, max_idle)
    start = (count % period) * length
    room = -(-length // _TURN) * _TURN
    return sum_with_run(rows, start, start + length, room, DEFERRED_BYTES)
