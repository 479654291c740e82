"""Follows the tables of a program to the reads of their rows.

The result of an equation that works row by row on a table is *pending*, not computed, as long as
every use of the result reads a part of it. If some use needs the whole result, there are two cases.
A result that is itself a part of the table is computed from the rows of that part. For any other
result the table is used as a whole, and its gradient is dense.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from adam_transforms._embeddings.reads import control_flow, custom_rules  # noqa: F401
from adam_transforms._embeddings.reads.direct import (
    DIRECT_READS,
    Read,
    as_values,
    reads_all,
    zeros_like,
)
from adam_transforms._embeddings.reads.origins import find_one_hot
from adam_transforms._embeddings.reads.program import (
    DirectRead,
    Plain,
    Program,
    RowRead,
    Scope,
    State,
    Value,
)
from adam_transforms._embeddings.reads.rows import SELECT, Equation, Rows, has_rule
from adam_transforms._embeddings.reads.selection import AllRows, NotByRow, Selection
from adam_transforms._embeddings.reads.tables import (
    choose_row_axes,
    gather_rows,
    is_single,
    read_table,
)
from adam_transforms._xla.jaxprs import CALLS, CHECKPOINTS, KEEP_OR_CAST, Literal, open_jaxpr

# The most equations between a table and a read of it. A whole network may compute each example
# apart; what is meant here is what a model makes of a table before it is read.
_MAX_DEPTH = 64
# Operations through which no gradient passes.
_FLAT = {"ceil", "floor", "round", "sign", "stop_gradient"}


class Use(NamedTuple):
    """A use of a table that reads no rows of it.

    Attributes:
      scope, eqn: the first equation that makes it one.
      why: it reads no rows.
      is_inherent: whether it uses all rows; if not, reads by row in it are not followed.
    """

    scope: Scope
    eqn: Any
    why: str
    is_inherent: bool

    @property
    def site(self) -> tuple[Any, ...]:
        """The equation that computes with the table, and the calls around it."""
        return _mixing_site(self.scope, self.eqn)

    @property
    def name(self) -> str:
        return self.site[0].primitive.name


@dataclass
class Plan:
    """What is known of the values of a program.

    Args:
      row_axes: {table: how many leading axes number its rows}; each read decides for itself
        where this says nothing.
      one_row_axis: the tables whose rows the first axis numbers: those with deferred updates.

    Attributes:
      table_of: {value: table}, of the inputs that are tables.
      elements: {input of a loop's body: (the stack that it is an element of, which element)}.
      uses: {table: its first use that reads no rows}.
      singles: {table: for each read, whether it reads single positions along each axis}.
    """

    row_axes: dict[int, int]
    one_row_axis: set[int]
    table_of: dict[Value, int] = field(default_factory=dict)
    elements: dict[Value, tuple[Value, Any]] = field(default_factory=dict)
    uses: dict[int, Use] = field(default_factory=dict)
    singles: dict[int, list[tuple[bool, ...]]] = field(default_factory=dict)
    _around: list[Callable[[Any], Any]] = field(default_factory=list)

    # ---- steps ----------------------------------------------------------------------------------

    def program(self, scope: Scope) -> Program:
        """The steps of a jaxpr."""
        program = Program(scope, {scope})
        self._extend(program, scope)
        program.reads = [read for step in program.steps for read in step.reads]
        return program

    def _extend(self, program: Program, scope: Scope) -> None:
        for eqn in scope.jaxpr.eqns:
            inputs = [x for x in eqn.invars if not isinstance(x, Literal)]
            pending = [scope.states[x] for x in inputs if x in scope.states]
            if not pending:
                program.steps.append(Plain(scope, eqn, waits=False))
            elif (
                any(x.is_needed for x in pending)
                and eqn.primitive.name not in _FLAT
                and not scope.needed.isdisjoint(eqn.outvars)
            ):
                self._follow(program, scope, eqn, pending)
            elif (
                has_rule(eqn)
                and not is_part(eqn)
                and not any(x.is_part for x in pending)
                and not any(x in scope.needed and x not in scope.states for x in inputs)
            ):
                self._leave(scope, eqn, pending, is_needed=False)
            else:
                self._run_whole(program, scope, eqn)

    def _run_whole(self, program: Program, scope: Scope, eqn: Any) -> None:
        """Runs an equation as it is; its pending operands are computed whole."""
        program.steps.append(Plain(scope, eqn, waits=True))
        program.whole += [
            scope.value(x) for x in eqn.invars if not isinstance(x, Literal) and x in scope.states
        ]

    def add_table(self, value: Value, table: int) -> None:
        """Makes an input of a jaxpr a table."""
        self.table_of[value] = table
        value.scope.states[value.variable] = State(value, frozenset([table]), False, True)

    def is_pending(self, value: Value) -> bool:
        """Whether a value is computed from tables by rows, and is not computed itself."""
        return value.variable in value.scope.states and value not in self.table_of

    def _leave(self, scope: Scope, eqn: Any, pending: Sequence[State], *, is_needed: bool) -> None:
        """Leaves the outputs of an equation pending."""
        tables = _tables_of(pending)
        part = is_part(eqn) or any(x.is_part for x in pending)
        depth = 1 + max(x.depth for x in pending)
        for x in eqn.outvars:
            needed = is_needed and x in scope.needed
            scope.states[x] = State(Value(scope, x), tables, part, needed, depth)

    def _follow(self, program: Program, scope: Scope, eqn: Any, pending: Sequence[State]) -> None:
        """An equation through which a gradient reaches a table."""
        name = eqn.primitive.name
        if name in CALLS or (name in CHECKPOINTS and not scope.selected.isdisjoint(eqn.outvars)):
            inner = scope.inside(eqn)
            program.scopes.add(inner)
            self._extend(program, inner)
            scope.bind(eqn.outvars, [inner.value(x) for x in inner.jaxpr.outvars])
        elif name in control_flow.BODIES:
            try:
                step = control_flow.BODIES[name](self, scope, eqn)
                program.steps.append(step)
                program.whole += step.whole_outside
            except NotByRow as reason:
                self._use_whole(program, scope, eqn, pending, reason)
        elif (step := self._direct_read(scope, eqn)) is not None:
            program.steps.append(step)
        elif max(x.depth for x in pending) >= _MAX_DEPTH:
            self._read_operands(program, scope, eqn, pending)
        elif not has_rule(eqn):
            reason = NotByRow("it takes the whole array, and reads in it are not followed")
            self._use_whole(program, scope, eqn, pending, reason)
        else:
            self._leave(scope, eqn, pending, is_needed=True)
            part = is_part(eqn) or any(x.is_part for x in pending)
            part = part or find_one_hot(Equation(scope, eqn)) is not None
            for x in eqn.outvars:
                if x in scope.needed and x not in scope.selected:
                    del scope.states[x]
                    self._read_now(program, scope, eqn, scope.value(x), pending, part)

    def _read_now(
        self,
        program: Program,
        scope: Scope,
        eqn: Any,
        value: Value,
        pending: Sequence[State],
        part: bool,
    ) -> None:
        try:
            if not part:
                raise AllRows()
            program.steps.append(RowRead(value, self._reads_of(value, (eqn, *scope.calls))))
        except NotByRow as reason:
            self._use_whole(program, scope, eqn, pending, reason)

    def _read_operands(
        self, program: Program, scope: Scope, eqn: Any, pending: Sequence[State]
    ) -> None:
        """Computes the pending operands from rows, so that the equation runs as it is."""
        for x in eqn.invars:
            state = None if isinstance(x, Literal) else scope.states.get(x)
            if state is None or not state.is_needed:
                continue
            value = scope.value(x)
            try:
                if not state.is_part or value.scope is not scope:
                    raise NotByRow(f"more than {_MAX_DEPTH} operations before it are by row")
                step = RowRead(value, self._reads_of(value, (eqn, *scope.calls)))
            except NotByRow as reason:
                self._use_whole(program, scope, eqn, pending, reason)
                return
            program.steps.append(step)
            del scope.states[x]
        program.steps.append(Plain(scope, eqn, waits=True))

    def _use_whole(
        self,
        program: Program,
        scope: Scope,
        eqn: Any,
        pending: Sequence[State],
        reason: NotByRow,
    ) -> None:
        where = reason.where or Equation(scope, eqn)
        use = Use(where.scope, where.eqn, str(reason), isinstance(reason, AllRows))
        tables = reason.tables
        if tables is None:
            tables = _tables_of(pending)
        for table in sorted(tables):
            self.uses.setdefault(table, use)
        self._run_whole(program, scope, eqn)

    # ---- reads ----------------------------------------------------------------------------------

    def _direct_read(self, scope: Scope, eqn: Any) -> DirectRead | None:
        """The equation as a read of whole rows of a table, which is at most cast before."""
        name, shape = eqn.primitive.name, eqn.invars[0].aval.shape
        if name not in DIRECT_READS or (found := self._before_casts(scope, eqn.invars[0])) is None:
            return None
        value, before = found
        table = self.table_of[value]
        if self.row_axes.get(table, 1) != 1 or (how := DIRECT_READS[name](eqn, shape)) is None:
            return None
        read = how.read((eqn, *scope.calls), table)
        num_rows, *row_shape = shape
        if not scope.selected.isdisjoint(eqn.outvars):
            # Rows are read of what is read here: a table of a stack, or all rows in another order.
            if len(row_shape) > 1 or reads_all([read], [num_rows]):
                return None
        self.singles.setdefault(table, []).append((True, *[False] * len(row_shape)))
        return DirectRead(scope, eqn, value, before, how, [read])

    def _before_casts(
        self, scope: Scope, atom: Any
    ) -> tuple[Value, list[tuple[Scope, Any, int]]] | None:
        """The table that a variable is, apart from casts, and the equations from that to the
        variable; None if it is no table."""
        equations = []
        while (state := scope.states.get(atom)) is not None and state.is_needed:
            if state.value in self.table_of:
                return state.value, equations[::-1]
            if state.value in self.elements:
                return None
            scope, eqn, out = state.value.producer
            if eqn.primitive.name not in KEEP_OR_CAST:
                return None
            equations.append((scope, eqn, out))
            atom = eqn.invars[out]
        return None

    def _reads_of(self, value: Value, site: tuple[Any, ...]) -> list[Read]:
        """The reads of tables that a value is computed from."""
        reads: list[Read] = []

        def read(value: Value, table: int, selection: Selection) -> jax.Array:
            aval, singles = value.aval, tuple(map(is_single, selection.axes))
            self.singles.setdefault(table, []).append(singles)
            row_axes = self.row_axes.get(table) or choose_row_axes([singles], aval.shape)

            def read_rows(index: jax.Array) -> jax.Array:
                rows = gather_rows(zeros_like(aval), index, row_axes)
                reads.append(
                    Read(
                        table,
                        site,
                        jax.typeof(rows),
                        index.size,
                        lambda x, columns, dtype: as_values(x, dtype),
                        is_static=not selection.has_positions,
                    )
                )
                return rows

            try:
                return read_table(selection, aval.shape, row_axes, read_rows)
            except NotByRow as reason:
                raise reason.of([table]) from None

        def compute() -> jax.Array:
            rows = Rows(self, lambda value: zeros_like(value.aval), read)
            return rows.compute(value, Selection.whole(value.aval.shape))

        run = compute
        for around in reversed(self._around):
            run = functools.partial(around, run)
        jax.eval_shape(run)
        if not reads:
            raise NotByRow("it reads no table")
        return reads

    def add_element(self, value: Value, stack: Value, counter: Any) -> None:
        """Makes an input of a loop's body an element of a stack of tables."""
        self.elements[value] = (stack, counter)
        state = stack.scope.states[stack.variable]
        value.scope.states[value.variable] = state._replace(value=value, is_part=True)

    @contextlib.contextmanager
    def inside_of(self, around: Callable[[Any], Any]) -> Iterator[None]:
        """Reads of values are tried inside of a function that calls what it is given."""
        self._around.append(around)
        try:
            yield
        finally:
            self._around.pop()


def _tables_of(states: Sequence[State]) -> frozenset[int]:
    return frozenset[int]().union(*(x.tables for x in states))


# Operations that only move elements or cast them.
_MOVES = {*KEEP_OR_CAST, "broadcast_in_dim", "reshape", "squeeze", "transpose"}


def _mixing_site(scope: Scope, eqn: Any) -> tuple[Any, ...]:
    """The equation that computes with what an equation moves, or itself if it does not only move
    it; and the calls around it."""
    jaxpr, site = scope.jaxpr, (eqn, *scope.calls)
    variable = eqn.outvars[0]
    while eqn.primitive.name in _MOVES or eqn.primitive.name in CALLS:
        if eqn.primitive.name in CALLS:
            jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
            variable = jaxpr.invars[[*eqn.invars].index(variable)]
            calls = site
        else:
            variable, calls = eqn.outvars[0], site[1:]
        users = [user for user in jaxpr.eqns if any(x is variable for x in user.invars)]
        if not users:
            break
        eqn = users[0]
        site = (eqn, *calls)
    return site


def is_part(eqn: Any) -> bool:
    """Whether the output has part of the elements of the first operand."""
    return eqn.primitive.name in SELECT
