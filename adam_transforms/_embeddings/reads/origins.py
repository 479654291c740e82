"""Where values come from: the equations that compute them, and some patterns of these."""

from typing import Any

import jax.numpy as jnp

from adam_transforms._embeddings.reads.program import Scope, Value
from adam_transforms._embeddings.reads.rows import KEEP, KEEP_OR_CAST, Equation
from adam_transforms._xla.jaxprs import CALLS, Literal, open_jaxpr
from adam_transforms._xla.row_independence import ELEMENTWISE


class Origins:
    """The equations that compute values, also inside of calls."""

    def __init__(self) -> None:
        self._inside: dict[tuple[Scope, int], Scope] = {}

    def inside(self, scope: Scope, eqn: Any) -> Scope:
        """The scope of the body of a call."""
        key = (scope, id(eqn))
        if key not in self._inside:
            body, consts = open_jaxpr(eqn.params["jaxpr"])
            outputs = [x in scope.needed for x in eqn.outvars]
            selected = [x in scope.selected for x in eqn.outvars]
            inner = Scope(body, consts, outputs, selected, scope.site(eqn))
            inner.bind(body.invars, [scope.value(x) for x in eqn.invars])
            self._inside[key] = inner
        return self._inside[key]

    def producer(self, value: Value) -> tuple[Scope, Any, int]:
        """The equation that computes a value, in its scope, and which output of it."""
        scope, variable = value
        eqn, out = scope.producers[variable]
        return scope, eqn, out

    def origin(self, value: Any) -> tuple[Scope, Any, int] | None:
        """As `producer`, but inside calls; None of an input or a literal."""
        while not isinstance(value, Literal) and value.variable in value.scope.producers:
            scope, eqn, out = self.producer(value)
            if eqn.primitive.name not in CALLS:
                return scope, eqn, out
            inner = self.inside(scope, eqn)
            value = inner.value(inner.jaxpr.outvars[out])
        return None

    def is_made_of_indices(self, value: Any) -> bool:
        """Whether a value is computed from constants and positions alone, element by element."""
        if isinstance(value, Literal) or not value.aval.shape:
            return True
        origin = self.origin(value)
        if origin is None:
            return False
        scope, eqn, _ = origin
        name = eqn.primitive.name
        if name in ("iota", "broadcast_in_dim"):
            return True
        operands = [scope.value(x) for x in eqn.invars]
        return name in ELEMENTWISE and all(map(self.is_made_of_indices, operands))

    def one_hot(self, eqn: Equation) -> tuple[int, Value, int] | None:
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
                ids = self._ids_of_one_hot(value, axis)
                if ids is not None:
                    return side, ids, axis
        return None

    def _ids_of_one_hot(self, value: Any, axis: int) -> Value | None:
        """The ids of ``ids == positions along the axis``."""
        while (origin := self.origin(value)) is not None:
            scope, eqn, _ = origin
            if eqn.primitive.name == "eq":
                a, b = (scope.value(x) for x in eqn.invars)
                for ids, positions in ((a, b), (b, a)):
                    if self._is_constant(ids, axis) and self._are_positions(positions, axis):
                        return ids
            if eqn.primitive.name not in KEEP_OR_CAST:
                return None
            value = scope.value(eqn.invars[0])
        return None

    def _is_constant(self, value: Any, axis: int) -> bool:
        """Whether integers are constant along an axis."""
        if isinstance(value, Literal) or not jnp.issubdtype(value.aval.dtype, jnp.integer):
            return False
        if value.aval.shape[axis] == 1:
            return True
        origin = self.origin(value)
        if origin is not None and origin[1].primitive.name in KEEP:
            return self._is_constant(origin[0].value(origin[1].invars[origin[2]]), axis)
        if origin is None or origin[1].primitive.name != "broadcast_in_dim":
            return False
        [operand], dims = origin[1].invars[:1], origin[1].params["broadcast_dimensions"]
        return axis not in dims or operand.aval.shape[dims.index(axis)] == 1

    def _are_positions(self, value: Any, axis: int) -> bool:
        """Whether a value has at each place the position along an axis."""
        origin = self.origin(value)
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
            return self._are_positions(scope.value(eqn.invars[0]), dims.index(axis))
        if name in KEEP_OR_CAST and jnp.issubdtype(value.aval.dtype, jnp.integer):
            return self._are_positions(scope.value(eqn.invars[0]), axis)
        return False
