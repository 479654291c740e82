"""Many rows, some at a time: what is computed for them then fits into a CPU's caches.

XLA keeps every (n, D) intermediate result in memory of its own, which beyond some 32 MB is mapped
anew, page by page, at each call. That can take most of a step's time.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core.sparse_rows import SparseRows

# Bytes of a block's (length, D...) array. As measured with lazy Adam on two cores, 256 KiB to 2 MiB
# are much alike.
_BLOCK_BYTES = 2**18
_LEAST_LENGTH = 8  # of a block, however wide its rows


def block_length(rows: SparseRows) -> int | None:
    """How many rows to treat at a time; None for all at once.

    On a CPU only: elsewhere loops cost more than they save. Not over meshes, where a row may be on
    another device.
    """
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(rows.values).sharding.mesh)
    if not rows.are_many or not all(mesh.empty for mesh in meshes):
        return None
    length = max(_LEAST_LENGTH, _BLOCK_BYTES // (math.prod(rows.shape[1:]) * rows.dtype.itemsize))
    return length if length < rows.values.shape[0] else None


def over_blocks(
    fn: Callable[[SparseRows, Any], tuple[jax.Array, Any]],
    rows: SparseRows,
    arrays: Any,
    length: int,
) -> tuple[SparseRows, Any]:
    """An update of `length` rows at a time, in place where the arrays may be overwritten.

    Args:
      fn: from some of the rows and the arrays as they are so far to what these rows' values become,
        (length, D...), and the arrays with these rows replaced.
      rows: unique.
      arrays: a tree of (V, ...).

    Returns:
      (the rows with their new values, the new arrays).
    """
    indices, n = rows.padded_indices, rows.values.shape[0]
    if n <= length:
        values, arrays = fn(rows, arrays)
        return rows.with_values(values), arrays

    def some(i: jax.Array, values: jax.Array) -> tuple[SparseRows, jax.Array]:
        positions = i * length + jnp.arange(length, dtype=jnp.int32)
        some_indices = indices.at[positions].get(mode="fill", fill_value=rows.num_rows)
        some_values = values.at[positions].get(mode="clip")
        return SparseRows(some_indices, some_values, rows.num_rows, unique=True), positions

    def body(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        values, arrays = carry
        block, positions = some(i, values if in_place else rows.values)
        new, arrays = fn(block, arrays)
        return values.at[positions].set(new, mode="drop", unique_indices=True), arrays

    first, _ = some(jnp.zeros((), jnp.int32), rows.values)
    new, _ = jax.eval_shape(fn, first, arrays)
    in_place = new.dtype == rows.dtype  # the new values take the place of the old ones
    values = rows.values if in_place else jnp.zeros(rows.values.shape, new.dtype)
    # Whole blocks of padding at the end, where `sum_duplicates` puts it, are left out.
    end = jnp.max(jnp.where(rows.is_row, jnp.arange(1, n + 1, dtype=jnp.int32), 0))
    trips = (end + length - 1) // length
    values, arrays = jax.lax.fori_loop(0, trips, body, (values, arrays))
    return rows.with_values(values), arrays
