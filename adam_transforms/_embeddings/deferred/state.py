"""The state of `deferred_adam`, and the part of it that belongs to each table."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adam_transforms._core import dtypes, state_layout, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.state_check import has_shapes_of
from adam_transforms._core.state_layout import COUNT, Field, Role
from adam_transforms._core.types import Params, Path, State
from adam_transforms._embeddings.deferred.chebyshev import Rule, Scalars
from adam_transforms._embeddings.deferred.missed_updates import (
    HistoryRows,
    PendingUpdate,
    UpdateHistory,
    gather_history,
    pending_update,
    restarted,
)
from adam_transforms._xla.scheduling import gather_separately, materialize


@state_layout.register(last_step=Role.LAST_STEP, ring=Role.SHARED)
class IdleRows(NamedTuple):
    """What the state keeps of the idle rows of some tables.

    Attributes:
      last_step: for each of these tables, int32 (V,), the step after which each row is
        synchronized; optax.MaskedNode in place of every other parameter.
      ring: the effect of the last steps on a row that is idle.
    """

    last_step: Any
    ring: UpdateHistory


@state_layout.register(
    count=COUNT,
    mu=Role.SLOT,
    nu=Role.SLOT,
    nu_max=Role.SLOT,
    idle=Role.INNER,
    idle_decayed=Role.INNER,
    rate=Field(Role.SCALAR, metric="learning_rate"),
)
class DeferredAdamState(NamedTuple):
    """State of `deferred_adam`.

    Attributes:
      count: int32 (), the number of steps. After 2^31 - 1 steps it cycles through the largest
        max_idle + 1 int32 values.
      mu, nu: Adam's moments, like the parameters; each row of a table as of its last step.
      nu_max: AMSGrad's maximum of nu, likewise; None without AMSGrad.
      idle: for the tables without weight decay: the last step of each row, and the effect of the
        last max_idle steps on an idle row. Pending updates are computed from these. None if there
        are no such tables.
      idle_decayed: the same for the tables with weight decay.
      rate: the learning rate of the last step, as in `ScaleByLearningRateState`; None in states
        saved by versions without this field.
    """

    count: jax.Array
    mu: Any
    nu: Any
    nu_max: Any
    idle: IdleRows | None
    idle_decayed: IdleRows | None
    rate: jax.Array | None = None


def _groups(state: DeferredAdamState) -> Iterator[tuple[str, IdleRows]]:
    """The fields of the state that keep idle rows, with their values."""
    for field in ("idle", "idle_decayed"):
        group = getattr(state, field)
        if isinstance(group, IdleRows):
            yield field, group


def map_idle(
    fn: Callable[[str, IdleRows], IdleRows], state: DeferredAdamState
) -> DeferredAdamState:
    """`state` with ``fn(field, idle rows)`` for each of its fields of idle rows."""
    return state._replace(**{field: fn(field, group) for field, group in _groups(state)})


def with_last_steps(
    state: DeferredAdamState, last_steps: Mapping[Path, jax.Array]
) -> DeferredAdamState:
    """`state` with new last steps for the tables at these paths."""
    return map_idle(
        lambda _, group: group._replace(last_step=with_leaves(group.last_step, last_steps)), state
    )


def history_dtype(state: DeferredAdamState) -> Any:
    """The precision in which a state was made: it may have been in x64 mode, or not."""
    dtypes_of = [jnp.result_type(group.ring.weights) for _, group in _groups(state)]
    return next(iter(dtypes_of), dtypes.scalar_dtype())


def with_numbers(rule: Rule, dtype: Any, state: DeferredAdamState) -> DeferredAdamState:
    """An abstract state with the numbers of its rule, in the precision `dtype`."""
    scalars = Scalars(*(np.asarray(x, dtype) for x in rule.scalars))
    return map_idle(
        lambda _, group: group._replace(ring=group.ring._replace(scalars=scalars)), state
    )


def is_like(expected: DeferredAdamState, state: DeferredAdamState) -> bool:
    """Whether a state has the structure, the shapes and, where they are known, the numbers of
    another one. A state without settings or learning rate is compared without them."""
    if state.rate is None:
        state = state._replace(rate=expected.rate)
    settings = {field: group.ring.settings for field, group in _groups(expected)}

    def with_settings(field: str, group: IdleRows) -> IdleRows:
        ring = group.ring
        return group._replace(ring=ring._replace(settings=ring.settings or settings.get(field)))

    if not has_shapes_of(map_idle(with_settings, state), expected):
        return False
    numbers, expected_numbers = (
        jax.tree.leaves([group.ring.scalars for _, group in _groups(x)]) for x in (state, expected)
    )
    return all(
        isinstance(x, Tracer) or np.asarray(x) == y
        for x, y in zip(numbers, expected_numbers, strict=True)
    )


def synchronized_at(state: DeferredAdamState, count: jax.Array) -> DeferredAdamState:
    """`state` after `count` steps, with all rows synchronized."""

    def after_all(_: str, group: IdleRows) -> IdleRows:
        last_step = jax.tree.map(lambda x: jnp.full_like(x, count), group.last_step)
        return IdleRows(last_step, restarted(group.ring, count))

    return map_idle(after_all, state._replace(count=count))


def deferred_states(state: State) -> list[DeferredAdamState]:
    found = trees.find_states(state, DeferredAdamState)
    if not found:
        raise ValueError(
            f"{type(state).__name__} has no DeferredAdamState in it: rows_from=, catch_up, owed "
            "and flush(params, state) take the state of deferred_adam"
        )
    return found


def slot_trees(state: DeferredAdamState) -> list[Any]:
    """mu, nu, and with AMSGrad nu_max."""
    return [getattr(state, name) for name in state_layout.slot_names(state)]


def with_slots(state: DeferredAdamState, slots: Sequence[Any]) -> DeferredAdamState:
    return state._replace(**dict(zip(state_layout.slot_names(state), slots, strict=True)))


def with_leaves(tree: Any, by_path: Mapping[Path, Any]) -> Any:
    """`tree` with new leaves at these paths."""
    leaves, treedef = trees.flatten_with_paths(tree)
    return treedef.unflatten([by_path.get(path, leaf) for path, leaf in leaves])


class TableRows(NamedTuple):
    """Some rows of a table, or all of them, with their slots."""

    values: jax.Array  # (n, D...)
    slots: tuple[jax.Array, ...]  # mu, nu and perhaps nu_max, each (n, D...)
    last_step: jax.Array  # int32 (n,)

    def gather(self, rows: SparseRows | None) -> "TableRows":
        """These rows; all of them for None."""
        if rows is None:
            return self
        arrays, treedef = jax.tree.flatten(self)
        return treedef.unflatten(rows.gather_each(arrays))

    def scatter(self, rows: SparseRows | None, new: Any) -> "TableRows":
        """With the slots and last steps of these rows, or of all rows for None, from `new`. The
        values stay: the caller applies the update."""
        before, after = [*self.slots, self.last_step], [*new.slots, new.last_step]
        if rows is None:
            after = [y.astype(x.dtype) for x, y in zip(before, after, strict=True)]
        else:
            after = rows.scatter_each(before, after)
        *slots, last_step = after
        return TableRows(self.values, tuple(slots), last_step)

    def synchronized(self, history: UpdateHistory, count: jax.Array) -> "TableRows":
        """As of step `count`, computed in at least float32."""
        entries = gather_history(history, self.last_step, count)
        pending = StaleRows.of(self.slots, entries).pending
        values, slots = pending.apply_to_params(self.values), pending.apply_to_slots(self.slots)
        return TableRows(values, slots, jnp.full_like(self.last_step, count))


# `DeferredTable.room` is a multiple of this, so that tables of different sizes share a program.
_TURN = 16


class StaleRows(NamedTuple):
    """The slots of some rows as they are stored, and the updates that these rows missed."""

    slots: tuple[jax.Array, ...]
    pending: PendingUpdate

    @classmethod
    def of(cls, slots: Sequence[jax.Array], entries: HistoryRows) -> "StaleRows":
        """The updates are computed from the entries of the rows in the history. AMSGrad divides by
        the root of the maximum."""
        mu, nu, *nu_max = slots
        return cls(tuple(slots), pending_update(entries, mu, nu_max[0] if nu_max else nu))


class DeferredTable(NamedTuple):
    """What a state knows of a table.

    Attributes:
      slots, last_step: of all its rows, as in `TableRows`.
      history: of the tables with, or without, weight decay.
      count: int32 (), the number of steps.
    """

    slots: tuple[jax.Array, ...]
    last_step: jax.Array
    history: UpdateHistory
    count: jax.Array

    @property
    def decays(self) -> bool:
        """Whether it has weight decay."""
        return self.history.log_decay is not None

    def whole(self, values: jax.Array) -> jax.Array:
        """The table as dense Adam has it now."""
        rows = TableRows(values, self.slots, self.last_step)
        return rows.synchronized(self.history, self.count).values.astype(values.dtype)

    def read(self, indices: jax.Array, *, keep: bool, round_robin: bool) -> StaleRows:
        """The slots of some rows, and what these rows missed.

        Args:
          keep: whether the update uses it again: it is computed once for all its uses.
          round_robin: whether to append `room` rows, starting with the first that this step's round
            robin synchronizes.
        """
        return _read(self, indices, keep=keep, round_robin=round_robin)

    @property
    def room(self) -> int:
        """The number of rows that a step of the round robin has room for."""
        return -(-self._schedule()[1] // _TURN) * _TURN

    def round_robin(self) -> tuple[jax.Array, jax.Array]:
        """(start, stop): this step synchronizes the rows start, ..., stop - 1, at most `room`, of
        which some may be beyond the end of the table."""
        period, length = self._schedule()
        start = (self.count % period) * length
        return start, start + length

    def _schedule(self) -> tuple[int, int]:
        return round_robin_schedule(self.last_step.shape[0], self.history.weights.shape[0])


# Jitted, so that a program has it once for all tables of one shape.
@functools.partial(jax.jit, static_argnames=("keep", "round_robin"))
def _read(table: DeferredTable, indices: jax.Array, *, keep: bool, round_robin: bool) -> StaleRows:
    if round_robin:
        run = table.round_robin()[0] + jnp.arange(table.room, dtype=jnp.int32)
        indices = jnp.concatenate([indices, run])
    rows = SparseRows(indices, jnp.zeros((indices.size, 0)), table.last_step.shape[0])
    *slots, last_step = rows.gather_each([*table.slots, table.last_step])
    entries = gather_history(table.history, last_step, table.count)
    slots, pending = StaleRows.of([*map(gather_separately, slots)], entries)
    if keep:
        pending = pending._replace(move=materialize(pending.move))
    return StaleRows(slots, pending)


class RowsRead(NamedTuple):
    """What a read of a table by `rows_from` leaves for the update that follows.

    A gradient keeps it, and with it the slots that were read and the sums, until the gradient is
    dropped or becomes a pytree.

    Attributes:
      stale: the rows read, and after them those of the round robin.
      table: what was read.
      values: those of the row gradient. A gradient that still has this array is not summed again.
      summed: the row gradient, followed by the rows of the round robin.
    """

    stale: StaleRows
    table: DeferredTable
    values: jax.Array
    summed: SparseRows

    def is_of(self, table: DeferredTable) -> bool:
        """Whether it is the same table after the same step: the same arrays, not equal ones."""
        read, other = jax.tree.leaves(self.table), jax.tree.leaves(table)
        return len(read) == len(other) and all(map(operator.is_, read, other))


def deferred_tables(state: DeferredAdamState) -> dict[Path, DeferredTable]:
    """What a state knows of each of its tables."""
    columns = [trees.flatten_with_paths(tree)[0] for tree in slot_trees(state)]
    slots = {of[0][0]: tuple(x for _, x in of) for of in zip(*columns, strict=True)}
    return {
        path: DeferredTable(slots[path], last_step, group.ring, state.count)
        for _, group in _groups(state)
        for path, last_step in trees.non_none(group.last_step)
    }


def tables_of(
    params: Params, state: DeferredAdamState
) -> dict[Path, tuple[TableRows, UpdateHistory]]:
    """All rows of each deferred table, and the history that belongs to it."""
    with_paths, _ = trees.flatten_with_paths(params)
    leaves, tables_by_path = dict(with_paths), deferred_tables(state)
    trees.refuse_equal_paths([path for path, _ in with_paths], tables_by_path)
    tables = {}
    for path, table in tables_by_path.items():
        if leaves.get(path) is None:
            raise ValueError(f"params have no {path!r}, which is a table of the deferred state")
        shape, slot_shape = jnp.shape(leaves[path]), jnp.shape(table.slots[0])
        if shape != slot_shape:
            raise ValueError(
                f"{path!r} has shape {list(shape)} in params, but {list(slot_shape)} in the "
                "deferred state"
            )
        rows = TableRows(jnp.asarray(leaves[path]), table.slots, table.last_step)
        tables[path] = (rows, table.history)
    return tables


def round_robin_schedule(num_rows: int, history_size: int) -> tuple[int, int]:
    """(period, length): every step synchronizes `length` consecutive rows, and every row has its
    turn once in `period` steps. Between two turns a row is idle for one step less, which is at most
    `max_idle`: a history has one entry more."""
    period = max(1, min(history_size, num_rows))
    return period, -(-num_rows // period)
