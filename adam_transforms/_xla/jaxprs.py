"""How JAX represents programs, as far as the analyses of them need to know."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

# Equations that call a jaxpr, which is their parameter "jaxpr".
CALLS = {"jit", "pjit", "closed_call", "core_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}
# Operations that return each operand unchanged.
KEEP = {
    *("copy", "copy_p", "mesh_cast", "name", "optimization_barrier", "pcast", "pvary", "reshard"),
    "sharding_constraint",
}
# Those, and casts.
KEEP_OR_CAST = {*KEEP, "convert_element_type"}

Literal = jex.Literal

_PACKAGE = str(Path(__file__).parents[1])
_JAX = (str(Path(jax.__file__).parent), _PACKAGE, "<")
_LIBRARIES = {"site-packages", "dist-packages"}


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The bare jaxpr and its constants, of a closed jaxpr or a bare one."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants, and how many carries, are the first operands of a `lax.scan`."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carries, _ = eqn.params["ft_in"].unpack()  # from JAX 0.12 on
    return len(consts), len(carries)


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Any, Sequence[Any]]:
    """The bare jaxpr of ``fun(*args)`` and its constants."""
    return open_jaxpr(jax.make_jaxpr(fun)(*args))


def as_array(literal: Any) -> jax.Array:
    """The value of a literal, in its dtype."""
    return jnp.asarray(literal.val, literal.aval.dtype)


def location(eqns: Sequence[Any]) -> str | None:
    """file:line of the first of the equations that has one in code that is no library's.

    Args:
      eqns: an equation, and the calls around it from the inside: the body of a library's function
        is traced once, and knows no caller.
    """
    frames = [
        frame
        for eqn in eqns
        if eqn.source_info.traceback is not None
        for frame in eqn.source_info.traceback.frames
        if not frame.file_name.startswith(_JAX)
    ]
    own = [frame for frame in frames if not _LIBRARIES.intersection(Path(frame.file_name).parts)]
    for frame in own or frames:
        return f"{frame.file_name}:{frame.line_num}"
    return None


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


def run_on_other_inputs(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """As `run_equation`, with inputs of other types, also in place of literals."""
    variables = [jex.Var(jax.typeof(x)) for x in values]
    return run_equation(jaxpr, eqn.replace(invars=variables), values)


def change_outputs(
    change: Callable[[int, list[Any]], Sequence[Any]],
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    groups: Sequence[Sequence[int]],
) -> Any:
    """``fn(*inputs)``, with some outputs changed where they are computed: what `fn` computes from
    such an output is computed from the changed one.

    Args:
      groups: outputs that are changed together, as positions among the leaves of the result; those
        that others are computed from first.
      change: ``change(i, values)`` returns new values, of the same types, for the i-th group. It is
        not called for a group that consists of inputs.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, jax.tree.leaves(list(inputs)), strict=True))
    unchanged = set(jaxpr.invars)
    computed_by = {x: i for i, eqn in enumerate(jaxpr.eqns) for x in eqn.outvars}
    waiting, changed = dict(enumerate(jaxpr.eqns)), {}
    for i, group in enumerate(groups):
        members = [jaxpr.outvars[k] for k in group]
        needed, stack = {}, [*members]
        while stack:
            x = stack.pop()
            k = None if isinstance(x, Literal) else computed_by.get(x)
            if k in waiting:
                needed[k] = waiting.pop(k)
                stack += needed[k].invars
        if needed:
            part = [needed[k] for k in sorted(needed)]
            env.update(run_equations(jaxpr, part, env.__getitem__))
        if any(isinstance(x, Literal) or x not in unchanged for x in members):
            values = change(i, [x.val if isinstance(x, Literal) else env[x] for x in members])
            changed.update(zip(group, values, strict=True))
            for x, new in zip(members, values, strict=True):
                if not isinstance(x, Literal) and x in computed_by:
                    env[x] = new
    if waiting:
        env.update(run_equations(jaxpr, [*waiting.values()], env.__getitem__))
    outputs = [x.val if isinstance(x, Literal) else env[x] for x in jaxpr.outvars]
    for k, new in changed.items():
        outputs[k] = new
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)
