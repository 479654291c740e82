"""Runs a program with a zero array, a *tap*, added to every read of a table's rows.

The gradient of a tap is the gradient of the rows read there.
"""

import collections
import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._core import dtypes
from adam_transforms._core.sparse_rows import SparseRows, first_positions_of_each, sum_duplicates_at
from adam_transforms._embeddings.deferred.state import DeferredTable, StaleRows
from adam_transforms._embeddings.reads.choosing import Choice
from adam_transforms._embeddings.reads.direct import in_mesh_of, replicated, values_of
from adam_transforms._embeddings.reads.following import Plan
from adam_transforms._embeddings.reads.program import (
    DirectRead,
    Plain,
    Program,
    RowRead,
    Scope,
    Value,
)
from adam_transforms._embeddings.reads.rows import Rows
from adam_transforms._embeddings.reads.selection import Selection
from adam_transforms._embeddings.reads.tables import gather_rows, read_table
from adam_transforms._xla.jaxprs import KEEP, Literal, as_array, run_equation, run_equations


class Table(NamedTuple):
    """A table of the program.

    Attributes:
      array: the table.
      deferred: what the state of `rows_from` knows of it; None of any other table.
    """

    array: Any
    deferred: DeferredTable | None = None

    def whole(self) -> jax.Array:
        """All of the table, synchronized."""
        return self.array if self.deferred is None else self.deferred.whole(self.array)


class Runner:
    """Runs the steps of a program.

    Args:
      plan: of `following`.
      tables: {table: its array}.
      values: {value: array}, of the inputs that are no tables.
      kept: {position of a read of the program: whether it is the last one of its table}, of the
        reads of deferred tables that are kept for the update. The last one also reads the rows of
        the round robin.

    Attributes:
      stale: {position of a read: what it kept}.
    """

    def __init__(
        self, plan: Plan, tables: dict[int, Table], values: Any, kept: Mapping[int, bool] = {}
    ) -> None:
        self._plan, self._tables, self._values, self._kept = plan, tables, values, kept
        self.stale: dict[int, StaleRows] = {}

    def inside(self) -> "Runner":
        """A runner of a body: it sees the values around it, and keeps no reads."""
        return Runner(self._plan, self._tables, collections.ChainMap({}, self._values))

    def set(self, value: Value, x: Any) -> None:
        self._values[value] = x

    def table(self, value: Value) -> int | None:
        """Which table a value is."""
        return self._plan.table_of.get(value)

    def array(self, value: Any) -> Any:
        """All of a value; a table as it is stored."""
        if isinstance(value, Literal) or value in self._values or value not in self._plan.table_of:
            return self.plain(value)
        return self._tables[self._plan.table_of[value]].array

    def num_rows(self, table: int) -> int:
        return math.prod(self._tables[table].array.shape[: self._plan.row_axes.get(table, 1)])

    def plain(self, value: Any) -> Any:
        """All of a value. A pending value is computed from whole tables."""
        return value.val if isinstance(value, Literal) else self.read(*value)

    def read(self, scope: Scope, atom: Any) -> Any:
        """`plain` of a variable or a literal of a jaxpr."""
        value = atom if isinstance(atom, Literal) else scope.names.get(atom) or Value(scope, atom)
        if isinstance(value, Literal):
            return value.val
        if value in self._values:
            return self._values[value]
        scope, variable = value
        if variable in scope.consts:
            return scope.consts[variable]
        if (table := self._plan.table_of.get(value)) is not None:
            # Under a key of its own: `array` finds the stored table by the value.
            key = ("whole", value)
            if key not in self._values:
                self._values[key] = self._tables[table].whole()
            return self._values[key]
        if (element := self._plan.elements.get(value)) is not None:
            x = jnp.asarray(self.plain(element[0]))[self.plain(element[1])]
        else:
            scope, eqn, out = value.producer
            inputs = [self.read(scope, x) for x in eqn.invars]
            x = run_equation(scope.jaxpr, eqn, inputs)[out]
        self.set(value, x)
        return x

    def run(self, program: Program, taps: Sequence[jax.Array]) -> tuple[list[Any], list[jax.Array]]:
        """Its outputs, and the indices of each of its reads."""
        indices: list[jax.Array] = []
        for key, group in itertools.groupby(
            program.steps,
            # Steps of one scope that can run together.
            lambda step: id(step.scope) if isinstance(step, Plain) and not step.waits else None,
        ):
            steps = [*group]
            if key is not None:
                scope = steps[0].scope
                values = run_equations(
                    scope.jaxpr,
                    [step.eqn for step in steps],
                    functools.partial(self.read, scope),
                )
                self._values.update({Value(scope, x): value for x, value in values.items()})
                continue
            for step in steps:
                its_taps = taps[len(indices) : len(indices) + len(step.reads)]
                outputs, found = self._step(step, its_taps, len(indices))
                self._values.update(outputs)
                indices += found
        scope = program.scope
        outputs = [
            as_array(x) if isinstance(x, Literal) else self.read(scope, x)
            for x in scope.jaxpr.outvars
        ]
        return outputs, indices

    def _step(self, step: Any, taps: Sequence[jax.Array], position: int) -> Any:
        """Its outputs, and the indices of its reads, the first of which is at `position`."""
        if isinstance(step, Plain):
            inputs = [self.read(step.scope, x) for x in step.eqn.invars]
            outputs = run_equation(step.scope.jaxpr, step.eqn, inputs)
            return [*zip(map(step.scope.value, step.eqn.outvars), outputs, strict=True)], []
        if isinstance(step, DirectRead):
            return self._direct_read(step, taps[0], position)
        if isinstance(step, RowRead):
            return self._row_read(step, taps, position)
        return step.run(self, taps)

    def _direct_read(self, step: DirectRead, tap: jax.Array, position: int) -> Any:
        [read], out = step.reads, step.eqn.outvars[0].aval
        table, array, casts = self._tables[read.table], self.array(step.table), []
        for scope, eqn, k in step.before:
            if eqn.primitive.name in KEEP:
                values = [
                    array if i == k else self.read(scope, x) for i, x in enumerate(eqn.invars)
                ]
                array = run_equation(scope.jaxpr, eqn, values)[k]
            else:
                casts.append(eqn.outvars[0].aval.dtype)
        inputs = [array, *(self.read(step.scope, x) for x in step.eqn.invars[1:])]
        with in_mesh_of(out):
            indices = step.how.indices(*inputs)
            (x,) = run_equation(step.scope.jaxpr, step.eqn, inputs)
            if table.deferred is not None:
                rows = step.how.rows(x, jax.typeof(array).sharding.spec[1:])
                rows = self._synchronized(table.deferred, rows, indices, position)
                x = step.how.placed(rows, out)
            # The rows are cast, not the table: XLA would store a table that is read twice.
            for dtype in casts:
                x = jax.lax.convert_element_type(x, dtype)
            x = x + tap
        return [(Value(step.scope, step.eqn.outvars[0]), x)], [indices]

    def _row_read(self, step: RowRead, taps: Sequence[jax.Array], position: int) -> Any:
        rest, found = iter(taps), []

        def read(value: Value, which: int, selection: Selection) -> jax.Array:
            table, row_axes = self._tables[which], self._plan.row_axes.get(which, 1)

            def read_rows(index: jax.Array) -> jax.Array:
                array, at = self.array(value), position + len(found)
                found.append(index)
                rows = gather_rows(array, index, row_axes)
                if table.deferred is not None:
                    rows = self._synchronized(table.deferred, rows, index, at)
                return rows + next(rest)

            return read_table(selection, value.aval.shape, row_axes, read_rows)

        rows = Rows(self._plan, self.plain, read)
        x = rows.compute(step.value, Selection.whole(step.value.aval.shape))
        return [(step.value, x[0])], found

    def _synchronized(
        self, table: DeferredTable, values: jax.Array, indices: jax.Array, position: int
    ) -> jax.Array:
        """(n, D...), the values of rows with all pending updates applied, but as they are for
        padding; `position` is that of the read."""
        table = jax.tree.map(_in_this_mesh, table)
        is_last = self._kept.get(position)
        stale = table.read(indices, keep=is_last is not None, round_robin=bool(is_last))
        if is_last is not None:
            self.stale[position] = stale
        pending = jax.tree.map(lambda x: x[: indices.size], stale.pending)
        now = pending.apply_to_params(values).astype(values.dtype)
        exists = jnp.reshape(indices < table.last_step.shape[0], (-1, *[1] * (now.ndim - 1)))
        return jnp.where(exists, now, values)


def _in_this_mesh(x: jax.Array) -> jax.Array:
    """`x` as an array of the context's mesh, which differs where part of a program leaves sharding
    to XLA."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or getattr(jax.typeof(x).sharding, "mesh", mesh) == mesh:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def row_gradients(
    tables: dict[int, Table],
    choice: Choice,
    indices: Sequence[Any],
    taps: Sequence[Any],
    kept: Collection[int],
) -> dict[int, SparseRows]:
    """The row gradient of each table, from the indices of all reads and the gradients of the
    taps. Those of the `kept` tables contain the rows of the round robin too, as the last of their
    reads does."""
    reads, rows = choice.program.reads, []
    for i, table in tables.items():
        wide = dtypes.compute_dtype(jnp.result_type(table.array))
        row_shape = choice.row_shapes[i]
        width = jnp.shape(table.array)[len(row_shape) :]
        columns = jax.typeof(table.array).sharding.spec[len(row_shape) :]
        of_table = [k for k, read in enumerate(reads) if read.table == i]
        found = [replicated(indices[k]) for k in of_table]
        values = values_of([reads[k] for k in of_table], [taps[k] for k in of_table], columns, wide)
        rows.append(
            SparseRows(
                jnp.concatenate(found or [jnp.zeros((0,), jnp.int32)]),
                jnp.concatenate(values or [jnp.zeros((0, *width), wide)]),
                num_rows=math.prod(row_shape),
                leading_shape=row_shape,
                synchronized=table.deferred is not None,
            )
        )
    gradients = {}
    for i, x, first in zip(tables, rows, first_positions_of_each(rows), strict=True):
        deferred = tables[i].deferred if i in kept else None
        run, room = (deferred.round_robin(), deferred.room) if deferred is not None else (None, 0)
        summed = sum_duplicates_at(x, first, run=run, room=room)
        gradients[i] = summed.astype(jnp.result_type(tables[i].array))
    return gradients
