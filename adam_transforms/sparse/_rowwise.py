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
        program.value(_SHARED, x) if table is None else program.value(table)
        for x, table in zip(inputs, tables, strict=True)
        if x is not None
    ]
    arguments = {table: [v.slot for v in values if v.kind == table] for table in {*tables} - {None}}
    try:
        present = iter(program.follow(jaxpr, consts, values))
    except _RowsMeet:
        return None
    outputs = [program.value(_SHARED, x) if x is None else next(present) for x in shapes]
    for value, table in zip(outputs, out_tables, strict=True):
        if value.kind not in (_UNIFORM, _SHARED if table is None else table):
            return None
    shared = program.run({_SHARED, _UNIFORM}, program.known)

    def of_rows(table: int, rows: Sequence[Any]) -> list[Any]:
        known = shared | dict(zip(arguments[table], rows, strict=True))
        arrays = program.run({_UNIFORM, table}, known)
        return [arrays[v.slot] for v, t in zip(outputs, out_tables, strict=True) if t == table]

    return RowFunction(
        [shared[v.slot] if t is None else None for v, t in zip(outputs, out_tables, strict=True)],
        of_rows,
    )


class _RowsMeet(Exception):
    pass


class _Value(NamedTuple):
    """A value on the way through a jaxpr: its kind, `_SHARED`, `_UNIFORM` or the table whose rows
    it is of, and the slot that a run keeps it in."""

    kind: Any
    slot: int


class _Step(NamedTuple):
    """An equation, the slots it reads and writes, and the kind of what it writes."""

    kind: Any
    jaxpr: Any
    eqn: Any
    inputs: list[int]
    outputs: list[int]


class _Program:
    """A jaxpr with its calls opened, and the kind of each step; nothing of it is computed yet.

    Attributes:
      steps: in order.
      known: {slot: array} of the shared inputs and the constants.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.steps: list[_Step] = []
        self.known: dict[int, Any] = {}
        self.slots = itertools.count()

    def value(self, kind: Any, *array: Any) -> _Value:
        """A new value, with the array that it is if that is known."""
        value = _Value(kind, next(self.slots))
        if array:
            (self.known[value.slot],) = array
        return value

    def run(self, kinds: set[Any], known: dict[int, Any]) -> dict[int, Any]:
        """{slot: array} after the steps of these kinds."""
        arrays = dict(known)
        for step in self.steps:
            if step.kind in kinds:
                inputs = [arrays[slot] for slot in step.inputs]
                outputs = evaluate(step.jaxpr, step.eqn, inputs)
                arrays.update(zip(step.outputs, outputs, strict=True))
        return arrays

    def follow(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
        """The outputs of a jaxpr, its steps collected."""
        constants = [self.value(_SHARED, x) for x in consts]
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> _Value:
            return self.value(_SHARED, atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [value(x) for x in eqn.invars]
            if eqn.primitive.name in CALLS:
                outputs = self.follow(*open_jaxpr(eqn.params["jaxpr"]), values)
            else:
                kind = self._kind(eqn, [v.kind for v in values])
                outputs = [self.value(kind) for _ in eqn.outvars]
                slots = [v.slot for v in values], [v.slot for v in outputs]
                self.steps.append(_Step(kind, jaxpr, eqn, *slots))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [value(x) for x in jaxpr.outvars]

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
