"""Reads rows of a value that is computed from tables, without computing all of it.

The read goes back through the equations that the value comes from, by one rule each, to the tables
and to the arrays that are computed anyway.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._embeddings.collectives import varying_alike
from adam_transforms._embeddings.reads import indexing, layouts, row_functions
from adam_transforms._embeddings.reads.origins import is_made_of_indices, origin_of
from adam_transforms._embeddings.reads.selection import NotByRow, Selection, take
from adam_transforms._xla.jaxprs import KEEP, Literal, as_array, run_on_other_inputs
from adam_transforms._xla.row_independence import ELEMENTWISE, REDUCTIONS

# Operations whose output has part of the elements of the first operand.
SELECT = {"gather", "dynamic_slice", "slice", "split", "unstack"}

RULES: dict[str, Callable[..., jax.Array]] = {
    **dict.fromkeys(ELEMENTWISE, row_functions.elementwise),
    **dict.fromkeys(KEEP, row_functions.identity),
    **dict.fromkeys(REDUCTIONS, row_functions.reduction),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), row_functions.along_axis
    ),
    "broadcast_in_dim": layouts.broadcast_in_dim,
    "concatenate": layouts.concatenate,
    "dot_general": row_functions.dot_general,
    "dynamic_slice": indexing.dynamic_slice,
    "dynamic_update_slice": indexing.dynamic_update_slice,
    "fft": row_functions.fft,
    "gather": indexing.gather,
    "iota": row_functions.iota,
    "pad": layouts.pad,
    "reshape": layouts.reshape,
    "rev": layouts.reverse,
    **dict.fromkeys(indexing.SCATTERS, indexing.scatter),
    **dict.fromkeys((name.replace("-", "_") for name in indexing.SCATTERS), indexing.scatter),
    "slice": layouts.slice_,
    "split": layouts.split,
    "squeeze": layouts.squeeze,
    "stack": layouts.stack,
    "tile": layouts.tile,
    "unstack": layouts.unstack,
    "transpose": layouts.transpose,
}


# Operations that compute each element from elements, or move them.
APART = {
    *ELEMENTWISE,
    *KEEP,
    *SELECT,
    *("broadcast_in_dim", "concatenate", "pad", "reshape", "rev", "squeeze", "stack", "tile"),
    "transpose",
}


class Equation(NamedTuple):
    """An equation in its scope, as the rules see it."""

    scope: Any
    eqn: Any

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def operands(self) -> list[Any]:
        return [self.scope.value(x) for x in self.eqn.invars]

    def shape(self, i: int) -> tuple[Any, ...]:
        return self.eqn.invars[i].aval.shape

    def out_shape(self, i: int) -> tuple[Any, ...]:
        return self.eqn.outvars[i].aval.shape

    @property
    def dtype(self) -> Any:
        return self.eqn.outvars[0].aval.dtype


class Rows:
    """Reads parts of values.

    Args:
      plan: which values are tables, and which are computed from tables by rows (`following.Plan`).
      plain: from a value to all of it.
      read: from a value that is a table, which table, and a selection to what that reads.
    """

    def __init__(
        self,
        plan: Any,
        plain: Callable[[Any], jax.Array],
        read: Callable[[Any, int, Selection], jax.Array],
    ) -> None:
        self.plan, self.plain, self._read = plan, plain, read
        self._known: dict[Any, tuple[Selection, jax.Array]] = {}
        self._path: list[Equation] = []

    def pull(self, value: Any, selection: Selection) -> jax.Array:
        """What the selection reads of a value."""
        along = tuple(x if isinstance(x, tuple) else id(x) for x in selection.axes)
        key = (id(value) if isinstance(value, Literal) else value, selection.n, along)
        if key not in self._known:
            # The selection is kept, for the key has the identities of its arrays.
            self._known[key] = (selection, self._pull(value, selection))
        return self._known[key][1]

    def _pull(self, value: Any, selection: Selection) -> jax.Array:
        if isinstance(value, Literal):
            return jnp.broadcast_to(as_array(value), selection.shape)
        if (table := self.plan.table_of.get(value)) is not None:
            return self._read(value, table, selection)
        if (element := self.plan.elements.get(value)) is not None:
            stack, counter = element
            index = jnp.broadcast_to(self.plain(counter), (selection.n,))
            return self.pull(stack, Selection(selection.n, (index, *selection.axes)))
        is_small = not selection.has_positions
        if not self.plan.is_pending(value) and (is_small or not is_made_of_indices(value)):
            return take(self.plain(value), selection)
        return self.compute(value, selection)

    def compute(self, value: Any, selection: Selection) -> jax.Array:
        """As `pull`, by the rule of the equation that computes the value."""
        origin = origin_of(value)
        assert origin is not None  # of what is pending
        scope, eqn, out = origin
        self._path.append(Equation(scope, eqn))
        try:
            return RULES[eqn.primitive.name](self, self._path[-1], out, selection)
        except NotByRow as reason:
            if reason.where is None and (eqn.primitive.name not in APART or len(self._path) == 1):
                reason.where = self._path[-1]
            raise
        finally:
            self._path.pop()

    def scalar(self, value: Any) -> jax.Array:
        """A value of shape ()."""
        if isinstance(value, Literal):
            return as_array(value)
        if self.plan.is_pending(value):
            return self.pull(value, Selection(1, ()))[0]
        return self.plain(value)

    def before_reshapes(self, value: Any) -> Any:
        """The value that a value is a reshape of."""
        while self.plan.is_pending(value) and (origin := origin_of(value)) is not None:
            scope, eqn, _ = origin
            if eqn.primitive.name != "reshape":
                break
            value = scope.value(eqn.invars[0])
        return value

    def known(self, value: Any) -> Any:
        """The number that a scalar is, if the program says so."""
        return value.val if isinstance(value, Literal) else None

    def run(self, eqn: Equation, inputs: list[jax.Array], **params: Any) -> list[jax.Array]:
        """The outputs of an equation for other inputs, and with some other parameters."""
        changed = eqn.eqn.replace(params=eqn.eqn.params | params)
        return run_on_other_inputs(eqn.scope.jaxpr, changed, varying_alike(inputs))


def rule(name: str) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Adds a function to the rules."""

    def add(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        RULES[name] = function
        return function

    return add


def has_rule(eqn: Any) -> bool:
    return eqn.primitive.name in RULES and not eqn.effects
