"""Adam with the moments of Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_: a table of 256 values times the largest value of a block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BLOCK = 256


def dynamic_map(bits: int) -> np.ndarray:
    """The values of dynamic tree quantization that are not negative, in ascending order.

    The number of zeros before the first one of `bits` bits is a power of ten, and the bits behind
    it are a fraction of [0.1, 1], in the middle of its part.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (bits - 1 - zeros) + 1)
        values += [*10.0**-zeros * (edges[1:] + edges[:-1]) / 2]
    return np.sort(values).astype(np.float32)


_OF_NU = dynamic_map(8)
_SIZES = dynamic_map(7)
_OF_MU = np.concatenate([-_SIZES[-2:0:-1], _SIZES])  # without -1


class Blocks(NamedTuple):
    """A moment: codes, uint8 (blocks, 256), and the largest size in each block, float32."""

    codes: jax.Array
    largest: jax.Array


def encode(x: jax.Array, values: np.ndarray) -> Blocks:
    """The nearest values."""
    padded = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(padded), axis=1)
    scaled = padded / jnp.where(largest > 0, largest, 1.0)[:, None]
    edges = jnp.asarray((values[1:] + values[:-1]) / 2)
    return Blocks(jnp.searchsorted(edges, scaled).astype(jnp.uint8), largest)


def decode(blocks: Blocks, values: np.ndarray, like: jax.Array) -> jax.Array:
    x = jnp.asarray(values)[blocks.codes] * blocks.largest[:, None]
    return x.reshape(-1)[: like.size].reshape(like.shape)


class BlockwiseState(NamedTuple):
    """State of `scale_by_blockwise_adam`."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_blockwise_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Any:
    """Adam whose moments are coded after each step."""
    inner: Any = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> BlockwiseState:
        def zeros(values: np.ndarray) -> Any:
            return jax.tree.map(lambda p: encode(jnp.zeros(p.shape), values), params)

        return BlockwiseState(jnp.zeros((), jnp.int32), zeros(_OF_MU), zeros(_OF_NU))

    def update(updates: Any, state: BlockwiseState, params: Any = None) -> Any:
        def decoded(moments: Any, values: np.ndarray) -> Any:
            return jax.tree.map(lambda g, x: decode(x, values, g), updates, moments)

        adam = optax.ScaleByAdamState(
            state.count, decoded(state.mu, _OF_MU), decoded(state.nu, _OF_NU)
        )
        new, adam = inner.update(updates, adam, params)
        mu = jax.tree.map(lambda x: encode(x, _OF_MU), adam.mu)
        nu = jax.tree.map(lambda x: encode(x, _OF_NU), adam.nu)
        return new, BlockwiseState(adam.count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
