"""Which of some indices are equal, in O(n) memory whatever the size of the table."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._xla.platform import on_cpu
from adam_transforms._xla.unchecked import unchecked

# Buckets to an index in the hash table: few collisions, and little memory.
_BUCKETS_PER_INDEX = 8
# 2^32 over the golden ratio: multiplying by it spreads consecutive indices (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = 2654435769


def by_sorting(indices: jax.Array) -> jax.Array:
    """`first_positions` in O(n log n)."""
    order = jnp.argsort(indices).astype(jnp.int32)  # stable: equal indices by position
    in_order = indices[order]
    is_first = jnp.concatenate([jnp.ones((1,), bool), in_order[1:] != in_order[:-1]])[: order.size]
    start = jax.lax.cummax(jnp.where(is_first, jnp.arange(order.size, dtype=jnp.int32), 0))
    return jnp.zeros_like(order).at[order].set(order[start], unique_indices=True)


def by_hashing(indices: jax.Array) -> jax.Array:
    """`first_positions` in O(n).

    Each index writes its position into its bucket of a hash table, and the smallest position wins.
    An index that finds an equal index at the winner's position is settled. The others, which lost
    their bucket to a different index, try again with another hash.
    """
    n = indices.size
    if n == 0:
        return jnp.zeros_like(indices)
    buckets = _num_buckets(n)

    def settle(state: tuple[Any, ...]) -> tuple[Any, ...]:
        attempt, is_open, first = state
        salted = indices.astype(jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        hashed = salted * (jnp.uint32(_MULTIPLIER) + attempt * jnp.uint32(0x9E3779B2))
        hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0x85EBCA6B)
        bucket = hashed >> jnp.uint32(33 - buckets.bit_length())
        empty = jnp.full((buckets,), n, jnp.int32)
        winner = _winners(jnp.where(is_open, bucket.astype(jnp.int32), buckets), empty)
        settled = is_open & (indices[jnp.minimum(winner, n - 1)] == indices) & (winner < n)
        first = jnp.where(settled, winner, first)
        return attempt + jnp.uint32(1), is_open & ~settled, first

    # Computed from `indices`, to vary over the mesh axes that they vary over inside `shard_map`.
    zeros = jnp.zeros_like(indices)
    start = (jnp.uint32(0), zeros == 0, jnp.arange(n, dtype=jnp.int32) + zeros)
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), settle, start)[2]


def _num_buckets(n: int) -> int:
    """The size of the hash table for n indices, a power of two."""
    return 1 << max(1, math.ceil(math.log2(max(1, n * _BUCKETS_PER_INDEX))))


def _winners(bucket: jax.Array, empty: jax.Array) -> jax.Array:
    """For each of (n,) buckets the smallest position that has it; n for a bucket out of range.

    Args:
      empty: (buckets,), all n.
    """
    owner = empty.at[bucket].min(jnp.arange(bucket.size, dtype=jnp.int32), mode="drop")
    return owner.at[bucket].get(mode="fill", fill_value=bucket.size)


_hash_or_sort = unchecked(on_cpu(by_sorting)(by_hashing))
_look_up_or_sort = unchecked(on_cpu(lambda indices, empty: by_sorting(indices))(_winners))


def first_positions(indices: jax.Array, num_rows: int) -> jax.Array:
    """For each of (n,) indices in [0, num_rows] the position of the first that equals it.

    Buys: on a CPU hashing takes a tenth of the time of sorting; a lazy step that sorts takes 1.3 to
    2 times as long (`benchmarks/bench_sparse.py`). On a GPU a data-dependent while_loop
    synchronizes with the host at every iteration, so other platforms sort.
    Noticed by: `test_platforms`.
    """
    n = indices.size
    if not isinstance(n, int):  # symbolic, under `jax.export`: no hash table has a power of 2 slots
        return by_sorting(indices)
    if num_rows < _num_buckets(n):  # a bucket for each row: nothing collides
        return _look_up_or_sort(indices, jnp.full((num_rows + 1,), n, jnp.int32))
    return _hash_or_sort(indices)
