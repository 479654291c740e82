"""Detects row-independent functions: row i of an output depends only on row i of the inputs.

Such a function can be run on blocks of rows. The analysis reads the jaxpr: every operation on rows
must act on each element, or within each row. An operation may combine rows only if all its operands
can be computed before any block: the norm of all gradients, for example.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from adam_transforms._xla.jaxprs import CALLS, open_jaxpr, run_equation

# Element i of the result depends on element i of the operands; axes of size one broadcast.
ELEMENTWISE = {
    *("abs", "add", "and", "atan2", "bitcast_convert_type", "cbrt", "ceil", "clamp", "complex"),
    *("conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "exp"),
    *("exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "log"),
    *("log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or"),
    *("pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left"),
    *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square"),
    *("stop_gradient", "sub", "tan", "tanh", "xor"),
}
REDUCTIONS = {"argmax", "argmin", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}

# Kinds of values that belong to no table: SHARED is not indexed by row; UNIFORM has a row axis
# along which it is constant.
_SHARED, _UNIFORM = "shared", "uniform"


class RowFunction(NamedTuple):
    """A row-independent function.

    Attributes:
      shared: the outputs that belong to no table; None in place of the others.
      of_rows: takes a table and, for some of its rows, the inputs that belong to it; returns the
        outputs that belong to it, for these rows.
    """

    shared: list[Any]
    of_rows: Callable[[int, Sequence[Any]], list[Any]]


def as_row_function(
    fn: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    tables: Sequence[int | None],
    out_tables: Sequence[int | None],
) -> RowFunction | None:
    """`fn` as a `RowFunction`. Returns None if rows may interact (conservative).

    Args:
      fn: takes arrays and returns a list of arrays; None may be among either.
      inputs: for each input an array, or a `jax.ShapeDtypeStruct` for rows that come later. An
        operation may combine rows only if it depends on arrays alone.
      tables, out_tables: the table that each input and output of `fn` belongs to, None if none.
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
    except _RowsInteract:
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


class _RowsInteract(Exception):
    pass


class _Value(NamedTuple):
    """A value in a jaxpr.

    Attributes:
      kind: `_SHARED`, `_UNIFORM` or the table that its rows belong to.
      is_concrete: whether it can be computed from the inputs given as arrays, for all rows.
      number: distinguishes it from all others.
    """

    kind: Any
    is_concrete: bool
    number: int


class _Step(NamedTuple):
    """An equation of a jaxpr with the values that it reads and writes."""

    jaxpr: Any
    eqn: Any
    inputs: list[_Value]
    outputs: list[_Value]


class _Program:
    """A jaxpr with its calls inlined and the kind of each value; nothing is computed yet.

    Attributes:
      steps: the equations, in order.
      known: {value: array} of the inputs and constants given as arrays.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.known: dict[_Value, Any] = {}
        self.numbers = itertools.count()

    def value(self, kind: Any, x: Any) -> _Value:
        """A new value: an array, or the shape of one that comes later."""
        is_concrete = not isinstance(x, jax.ShapeDtypeStruct)
        value = _Value(kind, is_concrete, next(self.numbers))
        if is_concrete:
            self.known[value] = x
        return value

    def shared_by_rows(self) -> list[_Value]:
        """The shared values that operations on rows need."""
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
        """`known` with the values that the targets need, for all rows or for `num_rows`."""
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
        """The outputs of a jaxpr; its equations are appended to `steps`."""
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
                kind, is_concrete = _kind(eqn, values), all(v.is_concrete for v in values)
                outputs = [_Value(kind, is_concrete, next(self.numbers)) for _ in eqn.outvars]
                self.steps.append(_Step(jaxpr, eqn, values, outputs))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [value(x) for x in jaxpr.outvars]


def _kind(eqn: Any, inputs: Sequence[_Value]) -> Any:
    """The kind of an equation's outputs."""
    if eqn.effects or not eqn.outvars:  # an effect happens once, not once a block
        raise _RowsInteract
    kinds = {value.kind for value in inputs} - {_SHARED}
    if not kinds:
        return _UNIFORM if _repeats(eqn) else _SHARED
    tables = kinds - {_UNIFORM}
    if len(tables) <= 1 and _keeps_rows_apart(eqn, inputs):
        return tables.pop() if tables else _UNIFORM
    if all(value.is_concrete for value in inputs):
        return _SHARED
    raise _RowsInteract


def _repeats(eqn: Any) -> bool:
    """Whether the output is constant along axis 0."""
    if eqn.primitive.name != "broadcast_in_dim" or not eqn.params["shape"]:
        return False
    axes = eqn.params["broadcast_dimensions"]
    return 0 not in axes or eqn.invars[0].aval.shape[axes.index(0)] == 1


def _keeps_rows_apart(eqn: Any, inputs: Sequence[_Value]) -> bool:
    """Whether row i of the output depends only on row i of the inputs."""
    name, params = eqn.primitive.name, eqn.params
    rows = eqn.outvars[0].aval.shape[:1]
    repeats = ((), (1,))  # a scalar, or one row for all

    def fits(x: Any, kind: Any) -> bool:
        if kind == _SHARED:
            return name not in ELEMENTWISE or x.aval.shape[:1] in repeats
        return x.aval.shape[:1] == rows or (kind == _UNIFORM and x.aval.shape[:1] in repeats)

    if any(x.aval.shape[:1] != rows for x in eqn.outvars):
        return False
    if not all(fits(x, value.kind) for x, value in zip(eqn.invars, inputs, strict=True)):
        return False
    if name in ELEMENTWISE:
        return True
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][0] == 0
    if name in REDUCTIONS:
        return 0 not in params["axes"]
    if name == "squeeze":
        return 0 not in params["dimensions"]
    if name == "transpose":
        return params["permutation"][0] == 0
    return name == "reshape"


def _with_rows(eqn: Any, num_rows: int) -> Any:
    """The equation, with shapes for another number of rows."""
    sizes = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}.get(eqn.primitive.name)
    if sizes is None:
        return eqn
    return eqn.replace(params=eqn.params | {sizes: (num_rows, *eqn.params[sizes][1:])})
