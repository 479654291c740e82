"""Bodies in which tables are read: of loops, branches, checkpoints.

Each function of `BODIES` turns a loop, branch or checkpoint into a step, which runs it with taps.
A body closes over the tables, and over all other arrays that it takes unchanged.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._embeddings.collectives import (
    as_varying,
    varying_alike,
    varying_axes,
    varying_like,
)
from adam_transforms._embeddings.reads.direct import Read
from adam_transforms._embeddings.reads.program import Program, Scope, Value, body_of
from adam_transforms._embeddings.reads.selection import AllRows, NotByRow
from adam_transforms._embeddings.reads.shards import shard_map
from adam_transforms._xla.dependence import needed_of_body
from adam_transforms._xla.jaxprs import CHECKPOINTS, Literal, open_jaxpr, scan_counts
from adam_transforms._xla.platform import by_platform_names

# What a step returns: its outputs, and the indices of each of its reads.
Outputs = tuple[list[tuple[Value, Any]], list[jax.Array]]


class Scan(NamedTuple):
    """A scan. The taps are scanned over, and the indices are stacked.

    Attributes:
      carries, sequences: the positions of the body's inputs that are no names of outer values.
      counter: the input of the body that is the number of the step; None if it is not used.
    """

    scope: Scope
    eqn: Any
    program: Program
    carries: list[int]
    sequences: list[int]
    counter: Value | None
    reads: list[Read]

    @property
    def whole_outside(self) -> list[Value]:
        return self.program.whole_outside

    def run(self, runner: Any, taps: Sequence[jax.Array]) -> Outputs:
        for value in self.whole_outside:
            runner.plain(value)  # once, not at every step
        params, body = self.eqn.params, self.program.scope
        variables, (first, num_carry) = body.jaxpr.invars, scan_counts(self.eqn)

        def step(carry: Any, xs: Any) -> Any:
            elements, counter, taps = xs
            inner = runner.inside()
            for i, x in zip((*self.carries, *self.sequences), (*carry, *elements), strict=True):
                inner.set(Value(body, variables[i]), x)
            if self.counter is not None:
                inner.set(self.counter, counter)
            outputs, indices = inner.run(self.program, taps)
            outputs = _typed(body.jaxpr.outvars, outputs)
            carry = [outputs[i - first] for i in self.carries]
            return carry, (outputs[num_carry:], indices)

        inputs = [runner.plain(self.scope.value(x)) for x in self.eqn.invars]
        length = params["length"]
        counter = None if self.counter is None else jnp.arange(length, dtype=jnp.int32)
        carry, (ys, indices) = jax.lax.scan(
            step,
            _typed([variables[i] for i in self.carries], [inputs[i] for i in self.carries]),
            ([inputs[i] for i in self.sequences], counter, [*taps]),
            length=length,
            reverse=params["reverse"],
            unroll=params["unroll"],
            _split_transpose=params.get("_split_transpose", False),
        )
        names = [self.eqn.outvars[i - first] for i in self.carries]
        names += self.eqn.outvars[num_carry:]
        values = [self.scope.value(x) for x in names]
        return [*zip(values, [*carry, *ys], strict=True)], [i.reshape(-1) for i in indices]


class _Counter(NamedTuple):
    """The variable that is the number of the step."""

    aval: Any


def _scan(plan: Any, scope: Scope, eqn: Any) -> Scan:
    params = eqn.params
    jaxpr, _ = open_jaxpr(params["jaxpr"])
    consts, num_carry = scan_counts(eqn)
    wanted = [x in scope.needed for x in eqn.outvars]
    wanted = needed_of_body(jaxpr, consts, num_carry, wanted)
    values = [scope.value(x) for x in eqn.invars]
    states = [None if isinstance(x, Literal) else scope.states.get(x) for x in eqn.invars]
    carries, sequences, stacks = [], [], []
    handed_on: list[bool | None] = [False] * len(jaxpr.outvars)
    for i in range(consts, len(values)):
        out = i - consts
        state = states[i]
        is_tables = state is not None and state.is_needed
        if out >= num_carry:
            (stacks if is_tables else sequences).append(i)
        elif state is not None and jaxpr.outvars[out] is jaxpr.invars[i]:
            handed_on[out] = None
            scope.bind([eqn.outvars[out]], [values[i]])
        elif state is not None and state.is_needed:
            raise NotByRow("the loop changes it").of(state.tables)
        else:
            carries.append(i)
    counters: list[Value] = []

    def bind(body: Scope) -> None:
        same = [*range(consts), *(consts + k for k, on in enumerate(handed_on) if on is None)]
        body.bind([jaxpr.invars[i] for i in same], [values[i] for i in same])
        for i in stacks:
            if jaxpr.invars[i] not in body.selected:
                tables = scope.states[eqn.invars[i]].tables
                raise AllRows("it goes through all rows").of(tables)
            counters[:] = [Value(body, _Counter(jax.typeof(np.int32(0))))]
            plan.add_element(Value(body, jaxpr.invars[i]), values[i], counters[0])

    program = body_of(plan, params["jaxpr"], wanted, handed_on, (eqn, *scope.calls), bind)
    reads = [read.in_loop(params["length"]) for read in program.reads]
    counter = counters[0] if counters else None
    return Scan(scope, eqn, program, carries, sequences, counter, reads)


def _typed(variables: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Values with types that vary over devices as those of the variables do."""
    if jax.sharding.get_abstract_mesh().empty:
        return [*values]
    return [varying_like(x.aval, jnp.asarray(v)) for x, v in zip(variables, values, strict=True)]


class Cond(NamedTuple):
    """Branches. Each takes the taps of all, and returns padding for the reads of the others."""

    scope: Scope
    eqn: Any
    programs: list[Program]
    reads: list[Read]

    @property
    def whole_outside(self) -> list[Value]:
        return [value for program in self.programs for value in program.whole_outside]

    def run(self, runner: Any, taps: Sequence[jax.Array]) -> Outputs:
        padding = [
            as_varying(
                jnp.full((read.num_rows_read,), runner.num_rows(read.table), jnp.int32),
                varying_axes(read.tap_type),
            )
            for read in self.reads
        ]

        def branch(program: Program, start: int) -> Callable[..., Any]:
            stop = start + len(program.reads)

            def run(taps: Sequence[jax.Array]) -> Any:
                outputs, indices = runner.inside().run(program, taps[start:stop])
                outputs = _typed(program.scope.jaxpr.outvars, outputs)
                indices = [
                    varying_alike([i, p])[0]
                    for i, p in zip(indices, padding[start:stop], strict=True)
                ]
                return outputs, [*padding[:start], *indices, *padding[stop:]]

            return run

        branches, start = [], 0
        for program in self.programs:
            branches.append(branch(program, start))
            start += len(program.reads)
        platforms = self.eqn.params.get("branches_platforms")
        if platforms is None:
            which = runner.plain(self.scope.value(self.eqn.invars[0]))
            outputs, indices = jax.lax.switch(which, branches, [*taps])
        else:
            outputs, indices = by_platform_names(platforms, branches, [*taps])
        values = [self.scope.value(x) for x in self.eqn.outvars]
        return [*zip(values, outputs, strict=True)], indices


def _cond(plan: Any, scope: Scope, eqn: Any) -> Cond:
    wanted = [x in scope.needed for x in eqn.outvars]
    values = [scope.value(x) for x in eqn.invars[1:]]
    programs = [
        body_of(
            plan,
            body,
            wanted,
            [False] * len(wanted),
            (eqn, *scope.calls),
            lambda inner: inner.bind(inner.jaxpr.invars, values),
        )
        for body in eqn.params["branches"]
    ]
    return Cond(scope, eqn, programs, [read for program in programs for read in program.reads])


class Checkpoint(NamedTuple):
    """A body that stays checkpointed."""

    scope: Scope
    eqn: Any
    program: Program
    reads: list[Read]

    @property
    def whole_outside(self) -> list[Value]:
        return self.program.whole_outside

    def run(self, runner: Any, taps: Sequence[jax.Array]) -> Outputs:
        params = self.eqn.params

        def body(taps: Sequence[jax.Array]) -> Any:
            return runner.inside().run(self.program, taps)

        run = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
        outputs, indices = run([*taps])
        values = [self.scope.value(x) for x in self.eqn.outvars]
        return [*zip(values, outputs, strict=True)], indices


def _checkpoint(plan: Any, scope: Scope, eqn: Any) -> Checkpoint:
    wanted = [x in scope.needed for x in eqn.outvars]
    values = [scope.value(x) for x in eqn.invars]
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    # An input that is returned unchanged is its own output.
    inputs = set(jaxpr.invars)
    handed_on = [
        None if not isinstance(x, Literal) and x in inputs else False for x in jaxpr.outvars
    ]
    program = body_of(
        plan,
        eqn.params["jaxpr"],
        wanted,
        handed_on,
        (eqn, *scope.calls),
        lambda inner: inner.bind(inner.jaxpr.invars, values),
    )
    for x, inside, on in zip(eqn.outvars, jaxpr.outvars, handed_on, strict=True):
        if on is None:
            scope.bind([x], [program.scope.value(inside)])
    return Checkpoint(scope, eqn, program, program.reads)


BODIES: dict[str, Callable[[Any, Scope, Any], Any]] = {
    "scan": _scan,
    "cond": _cond,
    "shard_map": shard_map,
    **dict.fromkeys(CHECKPOINTS, _checkpoint),
}
