"""Which inputs a function depends on differentiably.

A gradient tape returns None for an input that the loss does not depend on, where `jax.grad` returns
zeros. The jaxpr tells the two cases apart.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from adam_transforms._xla.jaxprs import Literal, open_jaxpr, scan_counts, trace


def depends_on(fun: Callable[[Any], Any], argument: Any) -> list[bool]:
    """For each leaf of `argument` whether ``fun(argument)`` depends on it differentiably.

    As for a gradient tape, no dependence passes through `stop_gradient` or through an array of
    integers or booleans.
    """
    jaxpr, _ = trace(fun, argument)
    return _inputs_of(jaxpr, [True] * len(jaxpr.outvars))


def needed_variables(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr that its `wanted` outputs depend on differentiably."""
    needed: set[Any] = set()
    for eqn in (None, *reversed(jaxpr.eqns)):  # None: what takes the outputs
        atoms, flags = jaxpr.outvars, wanted
        if eqn is not None:
            outputs = [out in needed for out in eqn.outvars]
            if not any(outputs):
                continue
            atoms, flags = eqn.invars, _operands_of(eqn, outputs)
        for atom, flag in zip(atoms, flags, strict=True):
            if flag and not isinstance(atom, Literal):
                if jnp.issubdtype(atom.aval.dtype, jnp.inexact):
                    needed.add(atom)
    return needed


def _inputs_of(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """The inputs that the `wanted` outputs depend on."""
    needed = needed_variables(jaxpr, wanted)
    return [x in needed for x in jaxpr.invars]


def _operands_of(eqn: Any, wanted: Sequence[bool]) -> list[bool]:
    """The operands of an equation that its `wanted` outputs depend on."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient":
        return [False] * len(eqn.invars)
    if name == "cond":
        branches = [_inputs_of(open_jaxpr(branch)[0], wanted) for branch in params["branches"]]
        return [False, *map(any, zip(*branches, strict=True))]
    if name == "scan":
        return _of_loop(open_jaxpr(params["jaxpr"])[0], *scan_counts(eqn), wanted)
    if name == "while":
        # What the condition reads decides how often, and has no gradient.
        skipped, consts = params["cond_nconsts"], params["body_nconsts"]
        body = open_jaxpr(params["body_jaxpr"])[0]
        return [False] * skipped + _of_loop(body, consts, len(wanted), wanted)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = open_jaxpr(params[key])[0] if key in params else None
        if body is not None and len(body.invars) == len(eqn.invars):
            if len(body.outvars) == len(wanted):
                return _inputs_of(body, wanted)
    return [True] * len(eqn.invars)


def _of_loop(body: Any, consts: int, carries: int, wanted: Sequence[bool]) -> list[bool]:
    """The operands (constants, carries, sequences) of a loop with this body."""
    wanted = needed_of_body(body, consts, carries, wanted)
    inputs = _inputs_of(body, wanted)
    carried = inputs[consts : consts + carries]
    # A carry goes in and, if the loop makes no trip, out again.
    through = [a or b for a, b in zip(carried, wanted[:carries], strict=True)]
    return [*inputs[:consts], *through, *inputs[consts + carries :]]


def needed_of_body(body: Any, consts: int, carries: int, wanted: Sequence[bool]) -> list[bool]:
    """The outputs of a loop's body that the `wanted` outputs of the loop depend on: those, and what
    later steps make of a carry."""
    wanted = list(wanted)
    while True:
        carried = _inputs_of(body, wanted)[consts : consts + carries]
        grown = [was or now for was, now in zip(wanted, carried, strict=False)]
        grown += wanted[carries:]
        if grown == wanted:
            return wanted
        wanted = grown
