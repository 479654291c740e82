"""Functions that treat the rows of tables apart, told from those that let rows meet.

Such a function can be run on some rows at a time. Which ones are is read off the jaxpr: all that
rows go through must act on each element, or within each row, by itself.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from adam_transforms.sparse._jaxprs import CALLS, evaluate, open_jaxpr

# An element of the result depends on those in the same place of the operands, which are repeated
# along axes where they have but one.
_ELEMENTWISE = {
    *("abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "complex", "conj", "copy", "copy_p"),
    *("convert_element_type", "cos", "cosh", "div", "eq", "erf", "exp", "exp2", "expm1", "floor"),
    *("ge", "gt", "imag", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt"),
    *("max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "rem", "round"),
    *("rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub"),
    *("tan", "tanh", "xor"),
}
_REDUCTIONS = {"argmax", "argmin", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}

# What a value has to do with rows, if it is not of those of a table: nothing, or it has as many as
# there are, all alike.
_SHARED, _UNIFORM = "shared", "uniform"


class RowFunction(NamedTuple):
    """A function that treats rows apart.

    Attributes:
      shared: the outputs that belong to no table, None for the others.
      of_rows: from a table and, for some rows of it, the inputs that belong to it, in their order,
        to the outputs that belong to it, in theirs.
    """

    shared: list[Any]
    of_rows: Callable[[int, Sequence[Any]], list[Any]]


def as_row_function(
    fn: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    tables: Sequence[int | None],
    out_tables: Sequence[int | None],
    num_rows: int,
) -> RowFunction | None:
    """`fn` as a `RowFunction`; None where it lets rows meet, or may do so for all that is seen.

    Args:
      fn: from arrays to a list of arrays; None may be among either.
      inputs: arrays, or for those that belong to a table the shapes of `num_rows` rows of it.
      tables, out_tables: which table each input and output of `fn` belongs to, None if none.
      num_rows: of how many rows at a time the result will be called.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    jaxpr, consts = open_jaxpr(closed)
    program = _Program(num_rows)
    values = [
        _Value(_SHARED, x) if table is None else program.new_value(table)
        for x, table in zip(inputs, tables, strict=True)
        if x is not None
    ]
    arguments = {table: [v.slot for v in values if v.kind == table] for table in {*tables} - {None}}
    try:
        present = iter(program.follow(jaxpr, consts, values))
    except _RowsMeet:
        return None
    outputs = [_Value(_SHARED) if shape is None else next(present) for shape in shapes]
    for value, table in zip(outputs, out_tables, strict=True):
        if value.kind not in (_UNIFORM, _SHARED if table is None else table):
            return None

    def of_rows(table: int, rows: Sequence[Any]) -> list[Any]:
        env = program.run(table, dict(zip(arguments[table], rows, strict=True)))
        return [env[v.slot] for v, t in zip(outputs, out_tables, strict=True) if t == table]

    shared = [v.array if t is None else None for v, t in zip(outputs, out_tables, strict=True)]
    return RowFunction(shared, of_rows)


class _RowsMeet(Exception):
    pass


class _Value(NamedTuple):
    """A value on the way through a jaxpr.

    Attributes:
      kind: `_SHARED`, `_UNIFORM` or the table whose rows it is of.
      array: the value itself, unless it is of rows.
      slot: where a run on some rows keeps it, unless it is shared.
    """

    kind: Any
    array: Any = None
    slot: int = -1


class _Step(NamedTuple):
    """An equation to be run for some rows."""

    kind: Any
    jaxpr: Any
    eqn: Any
    inputs: list[_Value]
    outputs: list[_Value]


class _Program:
    """What is to be done for some rows, collected while the rest is computed."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.steps: list[_Step] = []
        self.slots = itertools.count()

    def new_value(self, kind: Any, array: Any = None) -> _Value:
        return _Value(kind, array, next(self.slots))

    def run(self, table: int, env: dict[int, Any]) -> dict[int, Any]:
        """The values of all slots of a table, given those of its inputs."""
        for step in self.steps:
            if step.kind in (table, _UNIFORM):
                inputs = [v.array if v.kind == _SHARED else env[v.slot] for v in step.inputs]
                outputs = evaluate(step.jaxpr, step.eqn, inputs)
                env.update((v.slot, x) for v, x in zip(step.outputs, outputs, strict=True))
        return env

    def follow(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
        """The outputs of a jaxpr: shared ones are computed, the others' steps collected."""
        env = dict(zip(jaxpr.constvars, [_Value(_SHARED, x) for x in consts], strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> _Value:
            return _Value(_SHARED, atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [value(x) for x in eqn.invars]
            if eqn.primitive.name in CALLS:
                outputs = self.follow(*open_jaxpr(eqn.params["jaxpr"]), values)
            else:
                outputs = self._outputs(jaxpr, eqn, values)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [value(x) for x in jaxpr.outvars]

    def _outputs(self, jaxpr: Any, eqn: Any, inputs: list[_Value]) -> list[_Value]:
        kind = self._kind(eqn, [v.kind for v in inputs])
        arrays = [None] * len(eqn.outvars)
        if kind in (_SHARED, _UNIFORM):
            arrays = evaluate(jaxpr, eqn, [v.array for v in inputs])
        if kind == _SHARED:
            return [_Value(_SHARED, x) for x in arrays]
        outputs = [self.new_value(kind, x) for x in arrays]
        self.steps.append(_Step(kind, jaxpr, eqn, inputs, outputs))
        return outputs

    def _kind(self, eqn: Any, kinds: Sequence[Any]) -> Any:
        """What the outputs of an equation have to do with rows, given this of its inputs."""
        name, params = eqn.primitive.name, eqn.params
        of_rows = {kind for kind in kinds if kind != _SHARED}
        keeps_rows = all(x.aval.shape[:1] == (self.num_rows,) for x in eqn.outvars)
        if not of_rows:
            return _UNIFORM if keeps_rows and _repeats(eqn) else _SHARED
        if name in _ELEMENTWISE:
            whole = [  # neither a scalar nor one row for all
                kind == _SHARED and x.aval.shape[:1] not in ((), (1,))
                for x, kind in zip(eqn.invars, kinds, strict=True)
            ]
            if any(whole) and of_rows == {_UNIFORM}:
                return _SHARED
            keeps_rows &= not any(whole)
        elif name == "broadcast_in_dim":
            keeps_rows &= params["broadcast_dimensions"][0] == 0
        elif name in _REDUCTIONS:
            keeps_rows &= 0 not in params["axes"]
        elif name == "squeeze":
            keeps_rows &= 0 not in params["dimensions"]
        elif name == "transpose":
            keeps_rows &= params["permutation"][0] == 0
        elif name != "reshape":
            raise _RowsMeet
        tables = of_rows - {_UNIFORM}
        if not keeps_rows or len(tables) > 1:
            raise _RowsMeet
        return tables.pop() if tables else _UNIFORM


def _repeats(eqn: Any) -> bool:
    """Whether along axis 0 it puts out the same again and again."""
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    axes = eqn.params["broadcast_dimensions"]
    return 0 not in axes or eqn.invars[0].aval.shape[axes.index(0)] == 1
