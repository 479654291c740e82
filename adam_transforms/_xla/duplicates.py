"""Which indices of a table are equal, in O(n) memory whatever the size of the table."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._xla.platform import on_cpu
from adam_transforms._xla.unchecked import unchecked

# Buckets to an index in the hash table: few collisions, and little memory.
_BUCKETS_PER_INDEX = 8
# Indices of several tables in one loop of `by_hashing`. Their buckets have 512 KiB to 1 MiB, and
# the rows of one group of tables can be updated while a second thread is at the next. With a single
# loop, a lazy step of 26 tables with 4,096 indices each takes 1.25 times as long.
_INDICES_AT_ONCE = 2**14
# Rows to an index up to which a GPU has a bucket for each row: filling these takes less time than
# sorting, and they are no larger than the rows of a table of 128 columns.
_GPU_ROWS_PER_INDEX = 128
# 2^32 over the golden ratio: multiplying by it spreads consecutive indices (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = 2654435769


def by_sorting(indices: jax.Array, num_rows: jax.Array, *_: jax.Array) -> list[jax.Array]:
    """`first_positions` in O(n log n) a table."""
    order = jnp.argsort(indices, axis=1).astype(jnp.int32)  # stable: equal indices by position
    tables = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None]
    in_order = indices[tables, order]
    new = in_order[:, 1:] != in_order[:, :-1]
    is_first = jnp.pad(new, [(0, 0), (1, 0)], constant_values=True)[:, : order.shape[1]]
    positions = jax.lax.broadcasted_iota(jnp.int32, order.shape, 1)
    start = jax.lax.cummax(jnp.where(is_first, positions, 0), axis=1)
    first = jnp.zeros_like(order).at[tables, order].set(order[tables, start], unique_indices=True)
    return [*jnp.where(indices < num_rows, first, indices.shape[1])]


def by_hashing(indices: jax.Array, num_rows: jax.Array, *_: jax.Array) -> list[jax.Array]:
    """`first_positions` in O(n) a table.

    Each index writes its position into its bucket of a hash table, and the smallest position wins.
    An index that finds an equal index at the winner's position is settled. The others, which lost
    their bucket to a different index, try again with another hash.
    """
    n = indices.shape[1]
    if n == 0:
        return [*jnp.zeros_like(indices)]
    length = max(1, _INDICES_AT_ONCE // n)
    groups = [slice(i, i + length) for i in range(0, indices.shape[0], length)]
    return [first for at in groups for first in _hash_group(indices[at], num_rows[at])]


@jax.jit  # a program contains it once for all groups of one shape
def _hash_group(indices: jax.Array, num_rows: jax.Array) -> list[jax.Array]:
    """`by_hashing` in one loop."""
    tables, n = indices.shape
    buckets = _num_buckets(n)

    def settle(state: tuple[Any, ...]) -> tuple[Any, ...]:
        attempt, is_open, first = state
        salted = indices.astype(jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        hashed = salted * (jnp.uint32(_MULTIPLIER) + attempt * jnp.uint32(0x9E3779B2))
        hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0x85EBCA6B)
        bucket = hashed >> jnp.uint32(33 - buckets.bit_length())
        empty = jnp.full((tables, buckets), n, jnp.int32)
        winner = _winners(jnp.where(is_open, bucket.astype(jnp.int32), buckets), empty)
        of_winner = jnp.take_along_axis(
            indices, jnp.minimum(winner, n - 1), axis=1, mode="promise_in_bounds"
        )
        settled = is_open & (of_winner == indices) & (winner < n)
        # One array for each table. XLA would fuse a slice of a common array into each kernel that
        # uses it: the kernels of equal tables would differ, and each would be compiled.
        first = [*jnp.where(settled, winner, jnp.stack(first))]
        return attempt + jnp.uint32(1), is_open & ~settled, first

    # Computed from `indices`, to vary over the mesh axes that they vary over inside `shard_map`.
    start = (jnp.uint32(0), indices < num_rows, [*jnp.full_like(indices, n)])
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), settle, start)[2]


def _num_buckets(n: int) -> int:
    """The size of the hash table for n indices, a power of two."""
    return 1 << max(1, math.ceil(math.log2(max(1, n * _BUCKETS_PER_INDEX))))


def by_looking_up(indices: jax.Array, num_rows: jax.Array, empty: jax.Array) -> list[jax.Array]:
    """`first_positions` in O(n + V) a table, with `empty` of `_winners` for V buckets or more."""
    return [*_winners(jnp.where(indices < num_rows, indices, empty.shape[1]), empty)]


def _winners(bucket: jax.Array, empty: jax.Array) -> jax.Array:
    """For each of (T, n) buckets the smallest position in its table with that bucket; n for a
    bucket out of range.

    Args:
      empty: int32 (T, buckets), n everywhere.
    """
    tables, n = bucket.shape
    buckets = empty.shape[1]
    start = jnp.arange(tables, dtype=jnp.int32)[:, None] * buckets
    place = jnp.where(bucket < buckets, start + bucket, tables * buckets).reshape(-1)
    positions = jax.lax.broadcasted_iota(jnp.int32, bucket.shape, 1).reshape(-1)
    owner = empty.reshape(-1).at[place].min(positions, mode="drop")
    return owner.at[place].get(mode="fill", fill_value=n).reshape(bucket.shape)


_hash_or_sort = unchecked(on_cpu(by_sorting)(by_hashing))
_hash_or_look_up_or_sort = unchecked(on_cpu(by_sorting, gpu=by_looking_up)(by_hashing))
_look_up_or_sort = unchecked(on_cpu(by_sorting, gpu=by_looking_up)(by_looking_up))


def first_positions(indices: jax.Array, num_rows: Sequence[int]) -> list[jax.Array]:
    """For each index, the position of the first equal index of the same table.

    An index of V is padding and gets n.

    Args:
      indices: int32 (T, n), those of a table with V rows in [0, V].
      num_rows: V of each table.

    Returns:
      int32 (n,) for each table.

    Buys: on a CPU hashing takes a tenth of the time of sorting; a lazy step that sorts takes 1.3 to
    2 times as long (`benchmarks/bench_sparse.py`). On a GPU a data-dependent while_loop
    synchronizes with the host at every iteration, so other platforms sort. Of 8,192 ids a GPU sorts
    for 40 of the 70 microseconds of a step (`benchmarks/bench_gpu.py`): where the table has few
    rows to an id, it looks the rows up instead. Several tables have a loop or sort in common, which
    is compiled once.
    Noticed by: `test_platforms`, and `test_budgets`' lines of StableHLO.
    """
    tables, n = indices.shape
    ends = np.array(num_rows, np.int32)[:, None]
    if not isinstance(n, int):  # symbolic, under `jax.export`: no hash table has a power of 2 slots
        return by_sorting(indices, jnp.asarray(ends))
    fits = tables * max(num_rows) < 2**31  # else the number of a bucket is no int32
    if fits and max(num_rows) < _GPU_ROWS_PER_INDEX * n:  # a bucket for each row: nothing collides
        empty = jnp.full((tables, max(1, *num_rows)), n, jnp.int32)
        fits_cpu = tables == 1 and num_rows[0] < _num_buckets(n)
        return (_look_up_or_sort if fits_cpu else _hash_or_look_up_or_sort)(indices, ends, empty)
    return _hash_or_sort(indices, ends)
