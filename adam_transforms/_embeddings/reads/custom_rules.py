"""The rule for operations with a derivative of their own, such as `jax.nn.relu`."""

from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._embeddings.reads.origins import origin_of
from adam_transforms._embeddings.reads.program import Scope, Value
from adam_transforms._embeddings.reads.rows import RULES, Rows, rule
from adam_transforms._embeddings.reads.selection import NotByRow, Selection
from adam_transforms._xla.dependence import needed_variables
from adam_transforms._xla.jaxprs import Literal, open_jaxpr, run_equation


@rule("custom_jvp_call")
def custom_jvp(rows: Rows, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """An elementwise operation with a custom JVP, which is applied to the rows read."""
    operands = eqn.operands
    if any(eqn.shape(i) not in ((), eqn.out_shape(out)) for i in range(len(operands))):
        raise NotByRow("its custom derivative is not elementwise")
    whole = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in operands]

    def with_tangents(xs: Any, tangents: Any) -> Any:
        def original(*xs: Any) -> Any:
            return run_equation(eqn.scope.jaxpr, eqn.eqn, xs)[out]

        return jax.jvp(original, xs, tangents)

    def compute(body: Any, inputs: Any) -> list[jax.Array]:
        jaxpr, consts = open_jaxpr(body)
        needed = needed_variables(jaxpr, [True] * len(jaxpr.outvars))
        scope = Scope(jaxpr, consts, needed, [False] * len(jaxpr.outvars))
        known = {Value(scope, x): value for x, value in zip(jaxpr.invars, inputs, strict=True)}
        of_body = _RowsOfBody(rows.plan, known, selection)
        return [of_body.pull(scope.value(x), selection) for x in jaxpr.outvars]

    @jax.custom_jvp
    def of_rows(*xs: Any) -> jax.Array:
        return compute(eqn.params["call_jaxpr"], xs)[out]

    @of_rows.defjvp
    def _(xs: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        body = jax.make_jaxpr(with_tangents)(tuple(whole), tuple(whole))
        value, tangent = compute(body, (*xs, *tangents))
        return value, tangent

    inputs = [
        rows.pull(x, selection) if eqn.shape(i) else rows.scalar(x) for i, x in enumerate(operands)
    ]
    return of_rows(*inputs)


class _RowsOfBody(Rows):
    """Rows of the values of a jaxpr whose inputs are read already, by one selection."""

    def __init__(self, plan: Any, inputs: dict[Value, jax.Array], selection: Selection) -> None:
        super().__init__(plan, self._constant, self._no_table)
        self._inputs, self._selection = inputs, selection

    def _pull(self, value: Any, selection: Selection) -> jax.Array:
        if isinstance(value, Literal):
            return super()._pull(value, selection)
        if value in self._inputs:
            if not value.aval.shape:
                return jnp.broadcast_to(self._inputs[value], selection.shape)
            alike = zip(selection.axes, self._selection.axes, strict=True)
            if not all(a is b or (isinstance(a, tuple) and a == b) for a, b in alike):
                raise NotByRow("its custom derivative is not elementwise")
            return self._inputs[value]
        origin = origin_of(value)
        if origin is None or origin[1].primitive.name not in RULES:
            raise NotByRow("its custom derivative is not elementwise")
        return self.compute(value, selection)

    def scalar(self, value: Any) -> jax.Array:
        if isinstance(value, Literal) or value.variable in value.scope.consts:
            return super().scalar(value)
        return self.pull(value, Selection(1, ()))[0]

    def _constant(self, value: Value) -> jax.Array:
        return value.scope.consts[value.variable]

    def _no_table(self, value: Any, table: int, selection: Selection) -> jax.Array:
        raise NotByRow("its custom derivative is not elementwise")
