"""Which of some indices are equal, without an array of the table's size."""

import math
from typing import Any

import jax
import jax.numpy as jnp

# Slots to an index in the hash table: few collisions, and little memory.
_SLOTS_PER_INDEX = 8
# 2^32 over the golden ratio: multiplying by it spreads consecutive indices (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = 2654435769


def first_positions(indices: jax.Array, num_rows: int) -> jax.Array:
    """For each of (n,) indices in [0, num_rows] the position of the first that equals it.

    On a CPU by hashing, where sorting takes ten times as long. Elsewhere by sorting: whether to
    hash once more is for the host to say, and the device would wait for it.
    """
    if jax.default_backend() == "cpu":
        return by_hashing(indices, num_rows)
    return by_sorting(indices)


def by_sorting(indices: jax.Array) -> jax.Array:
    """O(n log n)."""
    order = jnp.argsort(indices).astype(jnp.int32)  # stable
    return order[jnp.searchsorted(indices[order], indices, method="scan_unrolled")]


def by_hashing(indices: jax.Array, num_rows: int) -> jax.Array:
    """O(n).

    Each index writes its position into its slot of a small table, the first one wins, and all that
    find their own index there are done. The others, whose slot went to another index, try again
    with another hash. An index is its own slot, and nobody's else, where that does not take a
    larger table.
    """
    n = indices.size
    positions = jnp.arange(n, dtype=jnp.int32)
    if n == 0:
        return positions
    bits = max(1, math.ceil(math.log2(n * _SLOTS_PER_INDEX)))
    slots = 1 << bits

    def winners(slot: jax.Array, slots: int, contend: Any = True) -> jax.Array:
        owner = jnp.full((slots,), n, jnp.int32)
        owner = owner.at[jnp.where(contend, slot, slots)].min(positions, mode="drop")
        return owner[slot]

    if num_rows < slots:
        return winners(indices, num_rows + 1)

    def settle(state: tuple[Any, ...]) -> tuple[Any, ...]:
        attempt, open_, first = state
        salted = indices.astype(jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        hashed = salted * (jnp.uint32(_MULTIPLIER) + attempt * jnp.uint32(0x9E3779B2))
        slot = (hashed ^ (hashed >> 15)) * jnp.uint32(0x85EBCA6B) >> jnp.uint32(32 - bits)
        winner = winners(slot.astype(jnp.int32), slots, open_)
        settled = open_ & (indices[jnp.minimum(winner, n - 1)] == indices) & (winner < n)
        first = jnp.where(settled, winner, first)
        return attempt + jnp.uint32(1), open_ & ~settled, first

    # Made from `indices`, to vary over the mesh axes that they vary over inside `shard_map`.
    zeros = jnp.zeros_like(indices)
    start = (jnp.uint32(0), zeros == 0, positions + zeros)
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), settle, start)[2]
