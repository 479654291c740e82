"""A step of one deferred table: what its rows missed, and then Adam's step."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._core import dtypes
from adam_transforms._core.sparse_rows import (
    DeferredRows,
    SparseRows,
    is_rows,
    kept_read,
    sum_with_run,
)
from adam_transforms._core.types import Path
from adam_transforms._embeddings.deferred.missed_updates import gather_history
from adam_transforms._embeddings.deferred.state import (
    DeferredTable,
    RowsRead,
    StaleRows,
    TableRows,
)
from adam_transforms._embeddings.row_blocks import DEFERRED_BYTES, block_length, over_blocks
from adam_transforms._transforms.adam import (
    Coefficients,
    Hyperparameters,
    coefficients_of,
    update_leaf,
)
from adam_transforms._xla.platform import by_platform
from adam_transforms._xla.scheduling import depend_on, materialize_outputs, token, token_of_all


class Step(NamedTuple):
    """The numbers of one step.

    Attributes:
      count, count_after: int32 (), the number of steps before it and after it.
      rate: the learning rate.
      weight_decay: None for parameters without weight decay.
    """

    count: jax.Array
    count_after: jax.Array
    rate: Any
    weight_decay: Any


class TableStep(NamedTuple):
    """A step of a table, or of some rows of it.

    Attributes:
      update: what is added to the values.
      slots, last_step: after the step.
      token: of all reads before it.
    """

    update: Any
    slots: tuple[jax.Array, ...]
    last_step: jax.Array
    token: jax.Array

    def written(self, table: TableRows, rows: SparseRows | None) -> "TableStep":
        """The step of the table, from that of these rows; of all rows for None."""
        after = table.scatter(rows, self)
        return self._replace(slots=after.slots, last_step=after.last_step)


def step_table(
    hp: Hyperparameters, step: Step, g: Any, values: jax.Array, table: DeferredTable
) -> TableStep:
    """The step for one table; `g` is a row gradient, a dense one or None."""
    step_rows = functools.partial(_step_rows, hp, step)
    stored = TableRows(values, table.slots, table.last_step)
    if not is_rows(g):
        entries = gather_history(table.history, table.last_step, table.count)
        now = step_rows(g, values, StaleRows.of(table.slots, entries), entries.arrays())
        return now.written(stored, None)

    def with_round_robin(packed_bytes: float) -> SparseRows:
        return sum_with_run(g, *table.round_robin(), table.room, packed_bytes)

    read = kept_read(g)
    if isinstance(read, RowsRead) and read.is_of(table):
        is_unchanged = g.values is read.values
        rows = read.summed if is_unchanged else with_round_robin(math.inf)
        pending = read.stale.pending
        now = step_rows(rows.values, rows.gather(values), read.stale, (pending.move, pending.decay))
        done = now.written(stored, rows)
    else:
        rows = with_round_robin(DEFERRED_BYTES)
        done = _read_and_step(step_rows, rows, stored, table)
    return done._replace(update=DeferredRows.of(rows.with_values(done.update)))


def _read_and_step(
    step_rows: Any, rows: SparseRows, stored: TableRows, table: DeferredTable
) -> TableStep:
    """The step of rows for which no read was kept; in blocks where that pays."""

    def at_once(some: SparseRows, so_far: TableRows) -> TableStep:
        before = so_far.gather(some)
        entries = gather_history(table.history, before.last_step, table.count)
        stale = StaleRows.of(before.slots, entries)
        now = step_rows(some.values, before.values, stale, entries.arrays())
        return now.written(so_far, some)

    def in_blocks(length: int, rows: SparseRows, stored: TableRows) -> TableStep:
        def block(some: SparseRows, so_far: Any) -> tuple[jax.Array, Any]:
            done = at_once(some, TableRows(stored.values, *so_far))
            return done.update, (done.slots, done.last_step)

        arrays = (stored.slots, stored.last_step)
        u, (slots, last_step) = over_blocks(block, rows, arrays, length)
        return TableStep(u, slots, last_step, token(u))

    nbytes = rows.values.nbytes
    is_large = isinstance(nbytes, int) and nbytes >= DEFERRED_BYTES
    length = block_length(rows) if is_large else None
    if length is None:
        return at_once(rows, stored)
    return by_platform(functools.partial(in_blocks, length), at_once, rows, stored)


# Jitted, so that a program has it once for all tables of one shape.
@functools.partial(jax.jit, static_argnums=0)
def _step_rows(
    hp: Hyperparameters,
    step: Step,
    g: jax.Array | None,
    p: jax.Array,
    stale: StaleRows,
    history_read: Any,
) -> TableStep:
    """The step of some rows, or of a whole table, from a dense gradient or None.

    Args:
      p: the values of the rows as they are stored.
      history_read: arrays that are computed from all that was read of the history.
    """
    pending = stale.pending
    u, slots = pending.delta(p), pending.apply_to_slots(stale.slots)
    if g is None:
        # The missed updates alone. They are applied to all rows now, so that this step's term in
        # the history, which other tables share, will not move them.
        u = u.astype(p.dtype)
    else:
        coefficients = coefficients_of(hp, step.count)
        arrays = [g, pending.apply_to_params(p), *slots]
        move, *slots = materialize_outputs(
            functools.partial(step_leaf, hp, coefficients, step, "a deferred table"),
            arrays,
            [False] + [True] * len(slots),
        )
        wide = dtypes.promote(u.dtype, move.dtype)
        u = u.astype(wide) + move.astype(wide)
        u = u.astype(dtypes.promote(g.dtype, p.dtype))
    # `g` depends on what the forward pass read of the slots: its token orders the writes after it.
    reads = token_of_all((history_read, g))
    last_step = jnp.full_like(pending.idle, step.count_after, dtype=step.count_after.dtype)
    return TableStep(u, tuple(slots), depend_on(last_step, [reads]), reads)


def step_leaf(
    hp: Hyperparameters,
    coefficients: Coefficients,
    step: Step,
    path: Path,
    g: jax.Array,
    p: jax.Array,
    *slots: jax.Array,
) -> list[jax.Array]:
    """What is added to a parameter, or to rows of it, and its new slots."""
    u, *new_slots = update_leaf(hp, coefficients, path, g, *slots, p)
    if step.weight_decay is not None:
        u = u + p.astype(u.dtype) * dtypes.as_scalar(step.weight_decay, u.dtype)
    return [-dtypes.as_scalar(step.rate, u.dtype) * u, *new_slots]
