"""Elementary functions that XLA repeats in each kernel, and in few instructions."""

import jax
import jax.numpy as jnp


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x of a positive normal float32, to the last bit or two, by Newton's method.

    XLA repeats multiplications in each kernel that needs their result. Of a division with several
    uses it makes an array instead.

    Buys: no temporary array of the parameter's size where moments are decoded and coded.
    Noticed by: `test_compress_moments.test_a_step_makes_no_array_of_the_size_of_the_moments`.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    y = jax.lax.bitcast_convert_type(0x7EF311C7 - bits, jnp.float32)
    for _ in range(3):
        y = y * (2.0 - x * y)
    return y


def rounded(x: jax.Array) -> jax.Array:
    """The nearest integer, int32, of a float32 below 2^22 in size.

    It is the low bits of a sum. XLA's conversion also checks for numbers that are too large.

    Buys: six instructions of eight, in kernels that are limited by arithmetic.
    Noticed by: the clock alone.
    """
    return jax.lax.bitcast_convert_type(x + 1.5 * 2.0**23, jnp.int32) - 0x4B400000
