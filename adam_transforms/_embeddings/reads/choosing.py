"""Chooses which of the inputs of a program are tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from adam_transforms._embeddings.reads.direct import Read, is_static, reads_all
from adam_transforms._embeddings.reads.following import Plan, Use
from adam_transforms._embeddings.reads.program import Program, Scope, Value
from adam_transforms._embeddings.reads.tables import choose_row_axes
from adam_transforms._xla.dependence import needed_variables


class Choice(NamedTuple):
    """The tables among the inputs of a program.

    Attributes:
      plan, program: with these tables.
      tables: their positions.
      row_shapes: {table: the sizes of the leading axes that number its rows}.
      reads: {input: its reads by row}, also of inputs that are no tables.
      uses: {input: its first use that reads no rows}.
    """

    plan: Plan
    program: Program
    tables: set[int]
    row_shapes: dict[int, tuple[Any, ...]]
    reads: dict[int, list[Read]]
    uses: dict[int, Use]


def choose(
    jaxpr: Any,
    consts: Sequence[Any],
    outputs: Sequence[bool],
    candidates: set[int],
    *,
    by_reads: bool,
    one_row_axis: set[int],
) -> Choice:
    """The tables among `candidates`, positions of inputs of `jaxpr`.

    Args:
      outputs: which outputs are differentiated.
      by_reads: whether a table is only an input of which fewer rows are read than it has, and not
        only rows that the program itself names.
      one_row_axis: candidates whose rows the first axis numbers.
    """
    tables = {i for i in candidates if jaxpr.invars[i].aval.shape}
    row_axes = dict.fromkeys(one_row_axis & tables, 1)
    reads: dict[int, list[Read]] = {}
    uses: dict[int, Use] = {}
    needed = needed_variables(jaxpr, outputs)
    while True:
        plan = Plan(row_axes, one_row_axis)
        scope = Scope(jaxpr, consts, needed, [False] * len(outputs))
        for i in sorted(tables):
            plan.add_table(Value(scope, jaxpr.invars[i]), i)
        program = plan.program(scope)
        shapes = {i: jaxpr.invars[i].aval.shape for i in tables}
        found = {i: [read for read in program.reads if read.table == i] for i in tables}
        uses = plan.uses | uses
        reads |= found
        kept = tables - set(plan.uses)
        stacks = {i for i in kept - one_row_axis if len(shapes[i]) > 2}
        axes = dict.fromkeys(kept, 1)
        axes |= {i: choose_row_axes(plan.singles.get(i, []), shapes[i]) for i in stacks}
        row_shapes = {i: shapes[i][: axes[i]] for i in kept}
        is_final = kept == tables and axes == {i: row_axes.get(i, 1) for i in kept}
        if by_reads and is_final:
            kept = {i for i in kept if not is_static(found[i])}
            kept = {i for i in kept if not reads_all(found[i], row_shapes[i])}
        if is_final and kept == tables:
            return Choice(plan, program, tables, row_shapes, reads, uses)
        tables, row_axes = kept, {i: axes[i] for i in kept}
