"""Where values come from, through calls, and some patterns of the equations that compute them.

A value is a `program.Value` or a literal, an equation a `rows.Equation`.
"""

from typing import Any

import jax.numpy as jnp

from adam_transforms._xla.jaxprs import CALLS, KEEP, KEEP_OR_CAST, Literal
from adam_transforms._xla.row_independence import ELEMENTWISE


def origin_of(value: Any) -> tuple[Any, Any, int] | None:
    """The equation that computes a value, in its scope, also inside of calls, and which output of
    it; None of an input or a literal."""
    while not isinstance(value, Literal) and value.variable in value.scope.producers:
        scope, eqn, out = value.producer
        if eqn.primitive.name not in CALLS:
            return scope, eqn, out
        inner = scope.inside(eqn)
        value = inner.value(inner.jaxpr.outvars[out])
    return None


def is_made_of_indices(value: Any) -> bool:
    """Whether a value is computed from constants and positions alone, element by element."""
    if isinstance(value, Literal) or not value.aval.shape:
        return True
    origin = origin_of(value)
    if origin is None:
        return False
    scope, eqn, _ = origin
    name = eqn.primitive.name
    if name in ("iota", "broadcast_in_dim"):
        return True
    operands = [scope.value(x) for x in eqn.invars]
    return name in ELEMENTWISE and all(map(is_made_of_indices, operands))


def find_one_hot(eqn: Any) -> tuple[int, Any, int] | None:
    """(which operand of a product is one-hot, its ids, its axis of classes)."""
    if eqn.name != "dot_general":
        return None
    contract, batch = eqn.params["dimension_numbers"]
    if batch[0] or len(contract[0]) != 1:
        return None
    for side in (0, 1):
        axis = contract[side][0]
        value, other = eqn.operands[side], eqn.operands[1 - side]
        has_table = [
            not isinstance(x, Literal) and x.variable in x.scope.states for x in (value, other)
        ]
        if has_table == [False, True]:
            ids = _ids_of_one_hot(value, axis)
            if ids is not None:
                return side, ids, axis
    return None


def _ids_of_one_hot(value: Any, axis: int) -> Any:
    """The ids of ``ids == positions along the axis``."""
    while (origin := origin_of(value)) is not None:
        scope, eqn, _ = origin
        if eqn.primitive.name == "eq":
            a, b = (scope.value(x) for x in eqn.invars)
            for ids, positions in ((a, b), (b, a)):
                if _is_constant(ids, axis) and _are_positions(positions, axis):
                    return ids
        if eqn.primitive.name not in KEEP_OR_CAST:
            return None
        value = scope.value(eqn.invars[0])
    return None


def _is_constant(value: Any, axis: int) -> bool:
    """Whether integers are constant along an axis."""
    if isinstance(value, Literal) or not jnp.issubdtype(value.aval.dtype, jnp.integer):
        return False
    if value.aval.shape[axis] == 1:
        return True
    origin = origin_of(value)
    if origin is not None and origin[1].primitive.name in KEEP:
        return _is_constant(origin[0].value(origin[1].invars[origin[2]]), axis)
    if origin is None or origin[1].primitive.name != "broadcast_in_dim":
        return False
    [operand], dims = origin[1].invars[:1], origin[1].params["broadcast_dimensions"]
    return axis not in dims or operand.aval.shape[dims.index(axis)] == 1


def _are_positions(value: Any, axis: int) -> bool:
    """Whether a value has at each place the position along an axis."""
    origin = origin_of(value)
    if origin is None:
        return False
    scope, eqn, _ = origin
    name = eqn.primitive.name
    if name == "iota":
        return eqn.params["dimension"] == axis
    if name == "broadcast_in_dim":
        dims = eqn.params["broadcast_dimensions"]
        if axis not in dims or eqn.invars[0].aval.shape[dims.index(axis)] == 1:
            return False
        return _are_positions(scope.value(eqn.invars[0]), dims.index(axis))
    if name in KEEP_OR_CAST and jnp.issubdtype(value.aval.dtype, jnp.integer):
        return _are_positions(scope.value(eqn.invars[0]), axis)
    return False
