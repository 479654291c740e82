"""A program that reads tables: its variables where they are computed, and its steps."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from adam_transforms._embeddings.reads.direct import Read, RowsOfTable
from adam_transforms._embeddings.reads.rows import RULES, SELECT
from adam_transforms._embeddings.reads.selection import NotByRow
from adam_transforms._xla.dependence import needed_variables
from adam_transforms._xla.jaxprs import (
    CALLS,
    CHECKPOINTS,
    KEEP_OR_CAST,
    Literal,
    open_jaxpr,
    scan_counts,
)

# Whether every use of a variable reads a part of it; None if nothing uses it.
_Flag = bool | None


class Value(NamedTuple):
    """A variable of a jaxpr, where the jaxpr is called."""

    scope: "Scope"
    variable: Any

    @property
    def aval(self) -> Any:
        return self.variable.aval

    @property
    def producer(self) -> tuple["Scope", Any, int]:
        """The equation that computes it, in its scope, and which output of that it is."""
        return (self.scope, *self.scope.producers[self.variable])


class State(NamedTuple):
    """What a value has to do with tables: it is one, or is computed from some by rows.

    Attributes:
      value: where it is computed.
      tables: which tables.
      is_part: whether it may have fewer rows than the tables.
      is_needed: whether the differentiated output depends on it.
      depth: the number of equations between it and the tables.
    """

    value: Value
    tables: frozenset[int]
    is_part: bool
    is_needed: bool
    depth: int = 0


class Scope:
    """A jaxpr where it is called.

    Args:
      needed: the variables that the differentiated output depends on, with a gradient.
      selected: which outputs are used by reading parts of them only; None for one that is not used.
      calls: the equation that calls the jaxpr, and the calls around that.

    Attributes:
      selected: the variables of which every use that carries a gradient reads a part.
      names: {variable: the value of another scope that it is}.
      states: {variable: its state}, of those that are tables or are left pending.
    """

    def __init__(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        needed: set[Any],
        selected: Sequence[_Flag],
        calls: tuple[Any, ...] = (),
    ) -> None:
        self.jaxpr = jaxpr
        self.consts = dict(zip(jaxpr.constvars, consts, strict=True))
        self.needed = needed
        self.selected = {x for x, flag in _flags(jaxpr, needed, selected).items() if flag}
        self.states: dict[Any, State] = {}
        self.calls = calls
        self.names: dict[Any, Any] = {}
        self._bodies: dict[int, Scope] = {}

    def value(self, atom: Any) -> Any:
        """The `Value` of a variable, where it is computed; a literal is one itself."""
        if isinstance(atom, Literal):
            return atom
        bound = self.names.get(atom)
        return Value(self, atom) if bound is None else bound

    def bind(self, variables: Iterable[Any], values: Iterable[Any]) -> None:
        """Makes variables names of values."""
        for x, value in zip(variables, values, strict=True):
            self.names[x] = value
            state = None if isinstance(value, Literal) else value.scope.states.get(value.variable)
            if state is not None:
                self.states[x] = state

    def inside(self, eqn: Any) -> "Scope":
        """The scope of the body of a call."""
        if id(eqn) not in self._bodies:
            body, consts = open_jaxpr(eqn.params["jaxpr"])
            needed = needed_variables(body, [x in self.needed for x in eqn.outvars])
            selected = [x in self.selected for x in eqn.outvars]
            inner = Scope(body, consts, needed, selected, (eqn, *self.calls))
            inner.bind(body.invars, [self.value(x) for x in eqn.invars])
            self._bodies[id(eqn)] = inner
        return self._bodies[id(eqn)]

    @functools.cached_property
    def producers(self) -> dict[Any, tuple[Any, int]]:
        """{variable: its equation, and which output of it}."""
        return {x: (eqn, i) for eqn in self.jaxpr.eqns for i, x in enumerate(eqn.outvars)}


# ---- steps: each has `reads` --------------------------------------------------------------------


class Plain(NamedTuple):
    """An equation that is run as it is; `waits` if it uses a value that is left pending."""

    scope: Scope
    eqn: Any
    waits: bool
    reads: Sequence[Read] = ()


class DirectRead(NamedTuple):
    """An equation that reads whole rows of a table itself: run as it is, with a tap added.

    Attributes:
      table: the table.
      before: the equations from the table to the read, each in its scope and with the number of the
        operand and output that is the table; they only cast it or hand it on.
    """

    scope: Scope
    eqn: Any
    table: Value
    before: Sequence[tuple[Scope, Any, int]]
    how: RowsOfTable
    reads: list[Read]


class RowRead(NamedTuple):
    """A value that is computed from rows of tables, by the rules of `rows`."""

    value: Value
    reads: list[Read]


@dataclasses.dataclass(eq=False)
class Program:
    """The steps of a whole program, or of the body of a loop, with calls inlined.

    Attributes:
      scope: of the jaxpr.
      scopes: that one, and those of the calls in it.
      whole: the pending values that its steps use as a whole.
      reads: those of its steps.
    """

    scope: Scope
    scopes: set[Scope]
    steps: list[Any] = dataclasses.field(default_factory=list)
    whole: list[Value] = dataclasses.field(default_factory=list)
    reads: list[Read] = dataclasses.field(default_factory=list)

    @property
    def whole_outside(self) -> list[Value]:
        """The pending values of the program around it that it uses as a whole."""
        return [value for value in self.whole if value.scope not in self.scopes]


def body_of(
    plan: Any,
    body: Any,
    wanted: Sequence[bool],
    handed_on: Sequence[bool | None],
    site: tuple[Any, ...],
    bind: Callable[[Scope], None],
) -> Program:
    """The steps of a body.

    Args:
      wanted: which outputs the differentiated output depends on.
      handed_on: None for an output that is an input.
      site: the equation with the body, and the calls around it.
      bind: binds the inputs of the body.
    """
    jaxpr, consts = open_jaxpr(body)
    scope = Scope(jaxpr, consts, needed_variables(jaxpr, wanted), handed_on, site)
    bind(scope)
    program = plan.program(scope)
    for x, on in zip(jaxpr.outvars, handed_on, strict=True):
        state = None if isinstance(x, Literal) else scope.states.get(x)
        if on is not None and state is not None and state.is_needed:
            raise NotByRow("its body returns the array").of(state.tables)
    return program


# ---- which variables are only read in parts -----------------------------------------------------


def _flags(jaxpr: Any, needed: set[Any], outputs: Sequence[_Flag]) -> dict[Any, _Flag]:
    """{needed variable: whether every use of it reads a part}."""
    flags: dict[Any, _Flag] = {}
    producers = functools.cache(lambda: _producers(jaxpr))
    for eqn in (None, *reversed(jaxpr.eqns)):  # None: what takes the outputs
        atoms, uses = jaxpr.outvars, outputs
        if eqn is not None:
            if needed.isdisjoint(eqn.outvars):
                continue
            outs = [flags.get(x) if x in needed else None for x in eqn.outvars]
            if eqn.primitive.name == "dot_general" and any(
                _is_comparison(producers(), x) for x in eqn.invars
            ):
                outs = [True]  # it may be one-hot, and read rows
            atoms, uses = eqn.invars, _uses(eqn, outs, [x in needed for x in eqn.outvars])
        for x, flag in zip(atoms, uses, strict=True):
            if flag is not None and not isinstance(x, Literal) and x in needed:
                flags[x] = flag and flags.get(x, True)
    return flags


def _producers(jaxpr: Any) -> dict[Any, Any]:
    return {x: eqn for eqn in jaxpr.eqns for x in eqn.outvars}


def _is_comparison(producers: dict[Any, Any], atom: Any) -> bool:
    """Whether a value is a comparison, as numbers."""
    eqn = None if isinstance(atom, Literal) else producers.get(atom)
    if eqn is None:
        return False
    if eqn.primitive.name in CALLS:
        body = open_jaxpr(eqn.params["jaxpr"])[0]
        return _is_comparison(_producers(body), body.outvars[eqn.outvars.index(atom)])
    if eqn.primitive.name in KEEP_OR_CAST:
        return _is_comparison(producers, eqn.invars[0])
    return eqn.primitive.name == "eq"


def _uses(eqn: Any, outs: Sequence[_Flag], wanted: Sequence[bool]) -> list[_Flag]:
    """How an equation whose outputs are so used uses each of its operands."""
    name, params, num = eqn.primitive.name, eqn.params, len(eqn.invars)
    # A slice may be all of its operand.
    if name == "gather" or (name in SELECT and eqn.outvars[0].aval.size < eqn.invars[0].aval.size):
        return [True, *[False] * (num - 1)]
    if name in CALLS | CHECKPOINTS:
        return _of_body(params["jaxpr"], wanted, outs)
    if name == "cond":
        bodies = [_of_body(body, wanted, [False] * len(outs)) for body in params["branches"]]
        return [False, *(_all(flags) for flags in zip(*bodies, strict=True))]
    if name == "scan":
        body = open_jaxpr(params["jaxpr"])[0]
        consts, carries = scan_counts(eqn)
        carried = body.invars[consts : consts + carries]
        # A carry that the body hands on unchanged is not used by that.
        handed_on = [
            None if k < carries and x is carried[k] else False for k, x in enumerate(body.outvars)
        ]
        return _of_body(params["jaxpr"], [True] * len(body.outvars), handed_on)
    if name == "shard_map":
        return _of_body(params["jaxpr"], wanted, [False] * len(outs))
    if name in RULES and not eqn.effects:
        return [_all(outs)] * num
    return [False] * num


def _of_body(body: Any, wanted: Sequence[bool], outs: Sequence[_Flag]) -> list[_Flag]:
    jaxpr = open_jaxpr(body)[0]
    flags = _flags(jaxpr, needed_variables(jaxpr, wanted), outs)
    return [flags.get(x) for x in jaxpr.invars]


def _all(flags: Iterable[_Flag]) -> _Flag:
    """Whether several uses all read parts."""
    known = [flag for flag in flags if flag is not None]
    return all(known) if known else None
