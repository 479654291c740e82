"""Rounding that a compiler does not remove."""

from typing import Any

import jax
import jax.numpy as jnp


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds a real `x` to values that `dtype` represents; returns them in the dtype of `x`.

    Buys: correctness. XLA may remove a cast that the next cast undoes, and the rounding with it; on
    GPUs it does.
    Noticed by: `test_numerics.test_rounding_is_said_in_a_way_that_no_compiler_leaves_out`.
    """
    to, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if to.bits >= own.bits:
        return x
    if to.nexp == own.nexp:
        return jax.lax.reduce_precision(x, int(to.nexp), int(to.nmant))
    # reduce_precision flushes the subnormal numbers of `dtype` to zero.
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)
