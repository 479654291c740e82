"""Functions that treat the rows of tables apart, told from those that let rows meet.

Such a function can be run on some rows at a time. Which ones are is read off the jaxpr: all that
rows go through must act on each element, or within each row, by itself. Rows may meet only in what
can be computed beforehand, from whole arrays that are at hand: the norm of all gradients, say.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from adam_transforms._xla.jaxprs import CALLS, open_jaxpr, run_equation

# An element of the result depends on those in the same place of the operands, which are repeated
# along axes where they have but one.
_ELEMENTWISE = {
    *("abs", "add", "and", "atan2", "bitcast_convert_type", "cbrt", "ceil", "clamp", "complex"),
    *("conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "exp"),
    *("exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "log"),
    *("log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or"),
    *("pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left"),
    *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square"),
    *("stop_gradient", "sub", "tan", "tanh", "xor"),
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
) -> RowFunction | None:
    """`fn` as a `RowFunction`; None where it lets rows meet, or may do so for all that is seen.

    Args:
      fn: from arrays to a list of arrays; None may be among either.
      inputs: arrays, those that belong to a table with all the rows there are, or the shapes of
        these: only of arrays may rows meet.
      tables, out_tables: which table each input and output of `fn` belongs to, None if none.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    program = _Program()
    values = [
        program.value(_SHARED if table is None else table, x)
        for x, table in zip(inputs, tables, strict=True)
        if x is not None
    ]
    try:
        present = iter(program.follow(*open_jaxpr(closed), values))
    except _RowsMeet:
        return None
    outputs = [program.value(_SHARED, x) if x is None else next(present) for x in shapes]
    for value, table in zip(outputs, out_tables, strict=True):
        if value.kind not in (_UNIFORM, _SHARED if table is None else table):
            return None

    def outputs_of(table: int | None) -> list[_Value]:
        return [value for value, t in zip(outputs, out_tables, strict=True) if t == table]

    known = program.run(program.known, [*outputs_of(None), *program.shared_by_rows()])
    shared = {value: x for value, x in known.items() if value.kind == _SHARED}

    def of_rows(table: int, rows: Sequence[Any]) -> list[Any]:
        arguments = [value for value in values if value.kind == table]
        arrays = shared | dict(zip(arguments, rows, strict=True))
        arrays = program.run(arrays, outputs_of(table), num_rows=rows[0].shape[0])
        return [arrays[value] for value in outputs_of(table)]

    return RowFunction(
        [known[v] if t is None else None for v, t in zip(outputs, out_tables, strict=True)],
        of_rows,
    )


class _RowsMeet(Exception):
    pass


class _Value(NamedTuple):
    """A value on the way through a jaxpr.

    Attributes:
      kind: `_SHARED`, `_UNIFORM` or the table whose rows it is of.
      is_early: whether it can be computed from what is at hand, for all rows.
      number: tells it from all others.
    """

    kind: Any
    is_early: bool
    number: int


class _Step(NamedTuple):
    """An equation of a jaxpr, and the values that it reads and writes."""

    jaxpr: Any
    eqn: Any
    inputs: list[_Value]
    outputs: list[_Value]


class _Program:
    """A jaxpr with its calls opened, and the kind of each value; nothing of it is computed yet.

    Attributes:
      steps: in order.
      known: {value: array} of what is at hand.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.known: dict[_Value, Any] = {}
        self.numbers = itertools.count()

    def value(self, kind: Any, x: Any) -> _Value:
        """A new value: an array, or one of which the shape is known."""
        is_early = not isinstance(x, jax.ShapeDtypeStruct)
        value = _Value(kind, is_early, next(self.numbers))
        if is_early:
            self.known[value] = x
        return value

    def shared_by_rows(self) -> list[_Value]:
        """What must be known before any rows are."""
        return [
            value
            for step in self.steps
            if step.outputs[0].kind != _SHARED
            for value in step.inputs
            if value.kind == _SHARED
        ]

    def run(
        self, known: dict[_Value, Any], targets: Iterable[_Value], num_rows: int | None = None
    ) -> dict[_Value, Any]:
        """What is known after the steps that the targets need, of all rows or of so many."""
        needed, steps = set(targets), []
        for step in reversed(self.steps):
            if needed.intersection(step.outputs).difference(known):
                needed.update(step.inputs)
                steps.append(step)
        arrays = dict(known)
        for step in reversed(steps):
            eqn = step.eqn if num_rows is None else _with_rows(step.eqn, num_rows)
            outputs = run_equation(step.jaxpr, eqn, [arrays[value] for value in step.inputs])
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
                kind, is_early = _kind(eqn, values), all(v.is_early for v in values)
                outputs = [_Value(kind, is_early, next(self.numbers)) for _ in eqn.outvars]
                self.steps.append(_Step(jaxpr, eqn, values, outputs))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [value(x) for x in jaxpr.outvars]


def _kind(eqn: Any, inputs: Sequence[_Value]) -> Any:
    """The kind of what an equation puts out."""
    if eqn.effects or not eqn.outvars:  # to happen once
        raise _RowsMeet
    kinds = {value.kind for value in inputs} - {_SHARED}
    if not kinds:
        return _UNIFORM if _repeats(eqn) else _SHARED
    tables = kinds - {_UNIFORM}
    if len(tables) <= 1 and _keeps_rows_apart(eqn, inputs):
        return tables.pop() if tables else _UNIFORM
    if all(value.is_early for value in inputs):
        return _SHARED
    raise _RowsMeet


def _repeats(eqn: Any) -> bool:
    """Whether along axis 0 it puts out the same again and again."""
    if eqn.primitive.name != "broadcast_in_dim" or not eqn.params["shape"]:
        return False
    axes = eqn.params["broadcast_dimensions"]
    return 0 not in axes or eqn.invars[0].aval.shape[axes.index(0)] == 1


def _keeps_rows_apart(eqn: Any, inputs: Sequence[_Value]) -> bool:
    """Whether each row of what it puts out is made of the same row of what it is given."""
    name, params = eqn.primitive.name, eqn.params
    rows = eqn.outvars[0].aval.shape[:1]
    repeats = ((), (1,))  # a scalar, or one row for all

    def fits(x: Any, kind: Any) -> bool:
        if kind == _SHARED:
            return name not in _ELEMENTWISE or x.aval.shape[:1] in repeats
        return x.aval.shape[:1] == rows or (kind == _UNIFORM and x.aval.shape[:1] in repeats)

    if any(x.aval.shape[:1] != rows for x in eqn.outvars):
        return False
    if not all(fits(x, value.kind) for x, value in zip(eqn.invars, inputs, strict=True)):
        return False
    if name in _ELEMENTWISE:
        return True
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][0] == 0
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "squeeze":
        return 0 not in params["dimensions"]
    if name == "transpose":
        return params["permutation"][0] == 0
    return name == "reshape"


def _with_rows(eqn: Any, num_rows: int) -> Any:
    """The equation for another number of rows."""
    sizes = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}.get(eqn.primitive.name)
    if sizes is None:
        return eqn
    return eqn.replace(params=eqn.params | {sizes: (num_rows, *eqn.params[sizes][1:])})
