"""How JAX represents programs, as far as the analyses of them need to know."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

# Equations that call a jaxpr, which is their parameter "jaxpr".
CALLS = {"jit", "pjit", "closed_call", "core_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}

Literal = jex.Literal


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The bare jaxpr and its constants, of a closed jaxpr or a bare one."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Any, Sequence[Any]]:
    """The bare jaxpr of ``fun(*args)`` and its constants."""
    return open_jaxpr(jax.make_jaxpr(fun)(*args))


def run_equations(jaxpr: Any, eqns: Sequence[Any], read: Callable[[Any], Any]) -> dict[Any, Any]:
    """{variable: value} of all that consecutive equations of `jaxpr` compute.

    Args:
      read: from a variable that they do not compute themselves to its value.

    They are run as a jaxpr of their own, which JAX knows how to run.
    """
    outvars = {x: None for eqn in eqns for x in eqn.outvars}
    invars = {
        x: None
        for eqn in eqns
        for x in eqn.invars
        if not isinstance(x, jex.Literal) and x not in outvars
    }
    part = jaxpr.replace(
        constvars=[],
        invars=[*invars],
        outvars=[*outvars],
        eqns=[*eqns],
        effects=frozenset().union(*(eqn.effects for eqn in eqns)),
    )
    values = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, []))(*map(read, invars))
    return dict(zip(outvars, values, strict=True))


def run_equation(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation of `jaxpr` for these inputs."""
    inputs = {
        x: value
        for x, value in zip(eqn.invars, values, strict=True)
        if not isinstance(x, jex.Literal)
    }
    return [*run_equations(jaxpr, [eqn], inputs.__getitem__).values()]
