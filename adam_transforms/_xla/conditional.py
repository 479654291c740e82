"""A computation that runs on a condition, in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def run_if(condition: jax.Array, fn: Callable[[Any], Any], carry: Any) -> Any:
    """``fn(carry)`` where `condition` holds, else `carry`: `lax.cond` without its copies.

    `lax.cond` copies every array that a branch passes through. A select between the old and the new
    arrays computes the new ones in any case, and keeps the old ones from being overwritten. XLA
    updates the arrays that a `while_loop` carries in place, so this is one of at most one trip.

    Buys: a step held back between accumulated gradients, or skipped, costs next to nothing;
    `lax.cond` would copy the optimizer's state.
    Noticed by: `test_conditional_update`'s tests of held and skipped steps.

    Args:
      condition: a bool scalar.
      fn: returns a carry of the same structure, shapes and dtypes.

    It has no reverse-mode derivative (a `while_loop` has none); forward mode works.
    """

    def body(state: tuple[Any, Any]) -> tuple[Any, Any]:
        return jnp.zeros((), bool), fn(state[1])

    return jax.lax.while_loop(lambda state: state[0], body, (condition, carry))[1]
