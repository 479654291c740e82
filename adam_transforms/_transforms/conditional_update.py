"""Running an inner update only if a condition holds.

Accumulation micro-steps and skipped non-finite steps cost almost nothing and leave the optimizer
state bit-identical. They allocate no buffer: the conditional computation writes the updates into
the buffers of the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core import dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, from_parts, is_rows, to_parts
from adam_transforms._core.types import Params, State, Updates
from adam_transforms._xla.conditional import run_if


def update_if(
    condition: jax.Array,
    update: Callable[[Updates, State], tuple[Updates, State]],
    gradients: Updates,
    state: State,
) -> tuple[Updates, State]:
    """``update(gradients, state)`` if `condition` holds, else ``(gradients, state)``.

    Args:
      condition: a bool scalar.
      update: returns updates with the structure and shapes of `gradients`, and the new state.
      gradients: a tree of arrays and row gradients.
      state: a tree of arrays; their dtypes do not change.

    Returns:
      (carried, state). ``carried`` contains the updates or the gradients, in the promotion of their
      dtypes, which represents both exactly; `select` converts it to updates. Rows are carried with
      their indices, and are marked unique if those of the update are.

    It has no reverse-mode derivative; forward mode works.
    """

    def update_parts(parts: Any, state: State) -> tuple[Any, State]:
        updates, state = update(from_parts(gradients, parts), state)
        return to_parts(updates), state

    outputs, _ = jax.eval_shape(update, gradients, state)
    parts, output_parts = to_parts(gradients), jax.eval_shape(to_parts, outputs)
    if jax.tree.structure(output_parts) != jax.tree.structure(parts):
        raise ValueError(
            "the inner transformation must return updates of the gradients' structure: "
            + trees.structure_difference(gradients, outputs, "the gradients", "the updates")
        )

    def to_carried(g: jax.Array, u: Any) -> jax.Array:
        # The shapes differ only if the update has another number of rows than the gradient.
        if g.shape != u.shape:
            return jnp.zeros_like(u)
        return g.astype(dtypes.promote(g.dtype, u.dtype))

    def from_carried(g: jax.Array, carried: jax.Array) -> jax.Array:
        if g.shape != carried.shape:
            return g
        # A real gradient is carried as complex if the update is complex.
        return (carried if jnp.iscomplexobj(g) else dtypes.real(carried)).astype(g.dtype)

    def step(carry: tuple[Any, State]) -> tuple[Any, State]:
        carried, state = carry
        updates, new_state = update_parts(jax.tree.map(from_carried, parts, carried), state)
        return _cast_like(updates, carried), _cast_like(new_state, state)

    carried = jax.tree.map(to_carried, parts, output_parts)
    carried, state = run_if(condition, step, (carried, state))
    return from_parts(outputs, carried), state


def select(
    condition: jax.Array, carried: Updates, gradients: Updates, params: Params | None
) -> Updates:
    """Converts the ``carried`` of `update_if` to updates: zeros if `condition` does not hold, with
    padding for the indices of rows."""

    def zero_unless(x: jax.Array) -> jax.Array:
        return jnp.where(condition, x, jnp.zeros((), x.dtype))

    def leaf(x: Any) -> Any:
        if not isinstance(x, SparseRows):
            return zero_unless(x)
        indices = jnp.where(condition, x.indices, x.num_rows)
        return SparseRows(indices, zero_unless(x.values), x.num_rows, unique=x.unique)

    updates = jax.tree.map(leaf, carried, is_leaf=is_rows)
    return trees.in_update_dtype(updates, gradients, params)


def _cast_like(tree: Any, like: Any) -> Any:
    """Casts each leaf to the dtype of the same leaf of `like`; PRNG keys need no cast."""
    return jax.tree.map(
        lambda x, y: x if x.dtype == jnp.result_type(y) else x.astype(jnp.result_type(y)),
        tree,
        like,
    )
