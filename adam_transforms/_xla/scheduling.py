"""Scheduling."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# LLVM unrolls a loop over a row's elements of fewer instructions than this, and then it leaves it
# scalar: several times as many instructions, of which so many fewer rows are under way at a time.
_UNROLLED = 300
_INSTRUCTIONS_OF_A_CHOICE = 3


def computed_once(x: jax.Array, instructions: int) -> jax.Array:
    """`x`, which XLA on CPU then computes once for all its uses. Elsewhere one kernel has them all.

    XLA repeats cheap arithmetic in every kernel that needs the result. Where rows gathered from a
    table go into it, the gather becomes a kernel of its own instead, and a gather without
    arithmetic is a scalar copy that takes four times as long. XLA does not repeat divisions, so
    this divides `x` by a 1 that depends on `x`: by two shifts, which XLA takes as they are. LLVM,
    which gets the kernel then, sees through them, and nothing is left of the division.

    Args:
      x: (n, D...).
      instructions: about how many the kernel has for an element of `x`. If a row's are few enough
        to be unrolled, choices between `x` and `x` are added, unless it would take many.
    """
    # A complex division by 1 is not exact, and integers need more.
    if jax.default_backend() != "cpu" or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    columns = x.shape[-1] if x.ndim else 1
    missing = _UNROLLED / max(columns, 1) - instructions
    choices = math.ceil(missing / _INSTRUCTIONS_OF_A_CHOICE)
    for limit in range(1, 1 + choices) if choices <= 2 else ():
        x = jnp.where(x > limit, jnp.maximum(x, float(limit)), x)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    for distance in (1, 8 * x.dtype.itemsize - 1):  # all bits out
        bits = jax.lax.shift_right_logical(bits, jnp.array(distance, unsigned))
    ones = np.ones((), x.dtype).view(unsigned)
    return x / jax.lax.bitcast_convert_type(bits | ones, x.dtype)


def witness(x: jax.Array) -> jax.Array:
    """A scalar for `after`: XLA has it only when it has `x`, or some other use of what is in it."""
    return jnp.min(jnp.abs(x), initial=1.0)


def computed_before(x: jax.Array) -> jax.Array:
    """`x`, (n, D...), which XLA on CPU then computes in a kernel of its own, before its only use.

    For rows gathered from a table: of a short kernel more rows are under way at a time.
    """
    return after([witness(x[:1])], x) if jax.default_backend() == "cpu" else x


def after(witnesses: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """`x`, which XLA then has only after all that the `witnesses` are of.

    XLA writes into an array in place where it knows all reads of it to come before; else it copies
    the array. That a write depends on what was read is how it knows.
    """
    for witness in witnesses:
        x = jnp.where(witness == 2.0, jnp.zeros((), x.dtype), x)  # it is 1 at most
    return x
