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
    *,
    mostly: bool = False,
) -> tuple[Updates, State]:
    """``update(gradients, state)`` if `condition` holds, else ``(gradients, state)``.

    Args:
      condition: a bool scalar.
      update: returns updates with the structure and shapes of `gradients`, and the new state. Where
        a gradient is None the update may be an array, as that of a deferred table.
      gradients: a tree of arrays, row gradients and None.
      state: a tree of arrays; their dtypes do not change.
      mostly: whether the condition mostly holds.

    Returns:
      (carried, state). ``carried`` contains the updates or the gradients, in the promotion of their
      dtypes, which represents both exactly; `select` converts it to updates. Rows are carried with
      their indices, and are marked unique if those of the update are.

    It has no reverse-mode derivative; forward mode works.
    """
    leaves, treedef = jax.tree.flatten(gradients, is_leaf=trees.is_leaf)

    def update_parts(given: list[Any], state: State) -> tuple[Any, State]:
        updates, state = update(treedef.unflatten(given), state)
        return to_parts(jax.tree.leaves(updates, is_leaf=trees.is_leaf)), state

    outputs, _ = jax.eval_shape(update, gradients, state)
    output_leaves, output_def = jax.tree.flatten(outputs, is_leaf=trees.is_leaf)
    pairs = zip(leaves, output_leaves, strict=False)
    if output_def != treedef or any(not _can_carry(g, u) for g, u in pairs):
        raise ValueError(
            "the inner transformation must return updates of the gradients' structure: "
            + trees.structure_difference(gradients, outputs, "the gradients", "the updates")
        )

    def to_carried(g: Any, u: Any) -> jax.Array:
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
        given = [
            None if g is None else from_parts(g, jax.tree.map(from_carried, to_parts(g), x))
            for g, x in zip(leaves, carried, strict=True)
        ]
        updates, new_state = update_parts(given, state)
        return _cast_like(updates, carried), _cast_like(new_state, state)

    carried = [
        jax.tree.map(jnp.zeros_like, u) if g is None else jax.tree.map(to_carried, to_parts(g), u)
        for g, u in zip(leaves, jax.eval_shape(to_parts, output_leaves), strict=True)
    ]
    has_rows = any(map(is_rows, output_leaves))
    carried, state = run_if(condition, step, (carried, state), mostly=mostly and not has_rows)
    return treedef.unflatten(from_parts(output_leaves, carried)), state


def _can_carry(g: Any, u: Any) -> bool:
    """Whether one array, or one pair of arrays, can hold a gradient and then its update."""
    return g is None or (u is not None and is_rows(g) == is_rows(u))


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
        return x.with_rows(indices, zero_unless(x.values), unique=x.unique)

    updates = jax.tree.map(leaf, carried, is_leaf=is_rows)
    return trees.in_update_dtype(updates, gradients, params)


def _cast_like(tree: Any, like: Any) -> Any:
    """Casts each leaf to the dtype of the same leaf of `like`; PRNG keys need no cast."""
    return jax.tree.map(
        lambda x, y: x if x.dtype == jnp.result_type(y) else x.astype(jnp.result_type(y)),
        tree,
        like,
    )
