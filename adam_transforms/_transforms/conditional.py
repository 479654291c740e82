"""Running an update only when a condition says so, in place.

A step that is held back (between accumulated gradients) or skipped (not finite) must leave the
inner state bit-identical, without the cost of a copy. `lax.cond` copies every array that a branch
passes through. `where` over the new state computes all of it, and makes XLA keep the old one for
whatever else in the update reads it. A `while_loop` of at most one trip does neither: XLA updates
what it carries in place. So that nothing fresh is allocated either, the updates leave the loop in
the buffers in which the gradients entered it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core import dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, from_parts, is_rows, to_parts


def update_if(
    condition: jax.Array,
    update: Callable[[Any, Any], tuple[Any, Any]],
    gradients: Any,
    state: Any,
) -> tuple[Any, Any]:
    """``update(gradients, state)`` where `condition` holds, else ``(gradients, state)`` untouched.

    Args:
      condition: bool scalar.
      update: returns updates structured and shaped like `gradients`, and the new state.
      gradients: a tree of arrays and row gradients.
      state: a tree of arrays; its dtypes are kept.

    Returns:
      (carried, state). A leaf of ``carried`` has a dtype that holds the gradient's and the
      update's, so that either is in it exactly; `select` makes updates of it. A row gradient's
      indices are carried with its values; whether it names no row twice is said of the update.

    It has no reverse-mode derivative (a `while_loop` has none); forward mode works.
    """

    def update_parts(parts: Any, state: Any) -> tuple[Any, Any]:
        updates, state = update(from_parts(gradients, parts), state)
        return to_parts(updates), state

    outputs, _ = jax.eval_shape(update, gradients, state)
    parts, output_parts = to_parts(gradients), jax.eval_shape(to_parts, outputs)
    if jax.tree.structure(output_parts) != jax.tree.structure(parts):
        raise ValueError(
            "the inner transformation must return updates of the gradients' structure "
            f"{jax.tree.structure(gradients)}, got {jax.tree.structure(outputs)}"
        )

    def seed(g: jax.Array, u: Any) -> jax.Array:
        # Only accumulated rows come out in another number than a step's gradient brings.
        same = g.shape == u.shape
        return g.astype(dtypes.promote(g.dtype, u.dtype)) if same else jnp.zeros_like(u)

    def unseed(g: jax.Array, carried: jax.Array) -> jax.Array:
        if g.shape != carried.shape:
            return g
        # What came in real is carried as complex if the update is; it is real still.
        return (carried if jnp.iscomplexobj(g) else dtypes.real(carried)).astype(g.dtype)

    def body(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        _, carried, state = carry
        updates, new_state = update_parts(jax.tree.map(unseed, parts, carried), state)
        return (
            jnp.zeros((), bool),
            _cast(updates, jax.tree.map(lambda c: c.dtype, carried)),
            _cast(new_state, jax.tree.map(jnp.result_type, state)),
        )

    carried = jax.tree.map(seed, parts, output_parts)
    _, carried, state = jax.lax.while_loop(
        lambda carry: carry[0], body, (condition, carried, state)
    )
    return from_parts(outputs, carried), state


def select(condition: jax.Array, carried: Any, gradients: Any, params: Any) -> Any:
    """The updates out of what `update_if` carried, if `condition` holds; else zeros, and padding
    for rows."""

    def zero_unless(x: jax.Array) -> jax.Array:
        return jnp.where(condition, x, jnp.zeros((), x.dtype))

    def leaf(x: Any) -> Any:
        if not isinstance(x, SparseRows):
            return zero_unless(x)
        indices = jnp.where(condition, x.indices, x.num_rows)
        return SparseRows(indices, zero_unless(x.values), x.num_rows, unique=x.unique)

    updates = jax.tree.map(leaf, carried, is_leaf=is_rows)
    return trees.in_update_dtype(updates, gradients, params)


def _cast(tree: Any, to: Any) -> Any:
    """Each leaf in the dtype given for it; PRNG keys and the like stay as they are."""
    return jax.tree.map(lambda x, d: x if x.dtype == d else x.astype(d), tree, to)
