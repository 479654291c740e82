"""Running an inner update only on a condition.

Accumulation micro-steps and skipped non-finite steps cost almost nothing and leave the optimizer
state bit-identical. No buffer is allocated for them: the updates leave the conditional computation
in the buffers in which the gradients entered it.
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
    """``update(gradients, state)`` where `condition` holds, else ``(gradients, state)``.

    Args:
      condition: bool scalar.
      update: returns updates structured and shaped like `gradients`, and the new state.
      gradients: a tree of arrays and row gradients.
      state: a tree of arrays; its dtypes are kept.

    Returns:
      (carried, state). A leaf of ``carried`` has the promotion of the gradient's dtype and the
      update's, which holds either exactly; `select` makes updates of it. A row gradient carries its
      indices with its values; its uniqueness is that of the update.

    It has no reverse-mode derivative; forward mode works.
    """

    def update_parts(parts: Any, state: State) -> tuple[Any, State]:
        updates, state = update(from_parts(gradients, parts), state)
        return to_parts(updates), state

    outputs, _ = jax.eval_shape(update, gradients, state)
    parts, output_parts = to_parts(gradients), jax.eval_shape(to_parts, outputs)
    if jax.tree.structure(output_parts) != jax.tree.structure(parts):
        raise ValueError(
            "the inner transformation must return updates of the gradients' structure "
            f"{jax.tree.structure(gradients)}, got {jax.tree.structure(outputs)}"
        )

    def enter(g: jax.Array, u: Any) -> jax.Array:
        # Only accumulated rows come out in another number than a step's gradient brings.
        same = g.shape == u.shape
        return g.astype(dtypes.promote(g.dtype, u.dtype)) if same else jnp.zeros_like(u)

    def as_gradient(g: jax.Array, carried: jax.Array) -> jax.Array:
        if g.shape != carried.shape:
            return g
        # A real gradient is carried as complex if the update is complex.
        return (carried if jnp.iscomplexobj(g) else dtypes.real(carried)).astype(g.dtype)

    def step(carry: tuple[Any, State]) -> tuple[Any, State]:
        carried, state = carry
        updates, new_state = update_parts(jax.tree.map(as_gradient, parts, carried), state)
        return _cast_like(updates, carried), _cast_like(new_state, state)

    carried = jax.tree.map(enter, parts, output_parts)
    carried, state = run_if(condition, step, (carried, state))
    return from_parts(outputs, carried), state


def select(
    condition: jax.Array, carried: Updates, gradients: Updates, params: Params | None
) -> Updates:
    """The updates out of what `update_if` returned if `condition` holds; else zeros, with padding
    for the indices of rows."""

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
    """Each leaf in the dtype of the same leaf of `like`; PRNG keys stay as they are."""
    return jax.tree.map(
        lambda x, y: x if x.dtype == jnp.result_type(y) else x.astype(jnp.result_type(y)),
        tree,
        like,
    )
