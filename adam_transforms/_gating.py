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

from adam_transforms import _numerics, _trees


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
      gradients: a tree of arrays.
      state: a tree of arrays; its dtypes are kept.

    Returns:
      (carried, state). A leaf of ``carried`` has a dtype that holds the gradient's and the
      update's, so that either is in it exactly; `select` makes updates of it.

    It has no reverse-mode derivative (a `while_loop` has none); forward mode works.
    """
    outputs, _ = jax.eval_shape(update, gradients, state)
    if jax.tree.structure(outputs) != jax.tree.structure(gradients):
        raise ValueError(
            "the inner transformation must return updates of the gradients' structure "
            f"{jax.tree.structure(gradients)}, got {jax.tree.structure(outputs)}"
        )
    dtypes = jax.tree.map(lambda g: g.dtype, gradients)

    def uncast(carried: jax.Array, dtype: Any) -> jax.Array:
        # What came in real is carried as complex if the update is; it is real still.
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        return (carried if is_complex else _numerics.real(carried)).astype(dtype)

    def body(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        _, carried, state = carry
        updates, new_state = update(jax.tree.map(uncast, carried, dtypes), state)
        return (
            jnp.zeros((), bool),
            _cast(updates, jax.tree.map(lambda c: c.dtype, carried)),
            _cast(new_state, jax.tree.map(jnp.result_type, state)),
        )

    carried = jax.tree.map(
        lambda g, u: g.astype(_numerics.promote(g.dtype, u.dtype)), gradients, outputs
    )
    _, carried, state = jax.lax.while_loop(
        lambda carry: carry[0], body, (condition, carried, state)
    )
    return carried, state


def select(condition: jax.Array, carried: Any, gradients: Any, params: Any) -> Any:
    """The updates out of what `update_if` carried: zeros where `condition` does not hold."""
    updates = jax.tree.map(lambda c: jnp.where(condition, c, jnp.zeros((), c.dtype)), carried)
    return _trees.in_update_dtype(updates, gradients, params)


def _cast(tree: Any, dtypes: Any) -> Any:
    """Each leaf in the dtype given for it; PRNG keys and the like stay as they are."""
    return jax.tree.map(lambda x, d: x if x.dtype == d else x.astype(d), tree, dtypes)
