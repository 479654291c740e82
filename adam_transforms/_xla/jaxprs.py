"""How JAX represents programs, as far as `_reads`, `_autodiff` and `_rowwise` need to know."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

# Equations that call a jaxpr, which is their parameter "jaxpr".
CALLS = {"jit", "pjit", "closed_call", "core_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The bare jaxpr and its constants, of a closed jaxpr or a bare one."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def evaluate(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """One equation of `jaxpr`, as the jaxpr that consists of it: JAX knows how to run that."""
    inputs = [
        (x, v) for x, v in zip(eqn.invars, values, strict=True) if not isinstance(x, jex.Literal)
    ]
    one = jaxpr.replace(
        constvars=[],
        invars=[x for x, _ in inputs],
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(one, []))(*(v for _, v in inputs))
