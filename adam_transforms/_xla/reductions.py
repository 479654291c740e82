"""Reductions whose plain form is wrong or slow."""

import jax
import jax.numpy as jnp


def is_all_finite(x: jax.Array) -> jax.Array:
    """``jnp.all(jnp.isfinite(x))``, a bool scalar.

    x * 0 is NaN where x is not finite, and a NaN propagates through a sum.

    Buys: the plain form writes an array of bools. A maximum would not do: XLA on CPU may lose a NaN
    in it.
    Noticed by: `test_numerics`' tests of `all_finite`.
    """
    if jnp.iscomplexobj(x):
        return is_all_finite(x.real) & is_all_finite(x.imag)
    return jnp.sum(x * 0.0) == 0.0
