"""Many rows, updated in blocks that fit into a CPU's caches.

XLA keeps every (n, D) intermediate result in memory of its own. Beyond some 32 MB the system maps
that memory anew, page by page, at each call, which can take most of a step's time. Whether a chain
may be run in blocks is decided by `_xla.row_independence`. Many small tables are updated in turn
instead.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core.sparse_rows import SparseRows, set_rows

# Bytes of the (n, D...) values, in `lazy` of all tables together, from which on a step is done in
# blocks. Time in blocks over time at once, on two cores, for uniform and Zipf ids. Lazy Adam,
# clipped or not: 0.9-1.1 at 2 MiB, 0.8-1.0 at 4 MiB, 0.8-1.1 at 8 MiB, 0.4-0.6 at 16 MiB, where its
# three temporaries of the rows exceed 32 MB, and 0.5-0.7 at 32 MiB; of two tables 0.8-1.0. Deferred
# Adam, which has five: 0.9-1.0 at 2 MiB, 0.7-0.8 at 4 MiB, 0.3-0.4 from 8 MiB on.
LAZY_BYTES, DEFERRED_BYTES = 16 * 2**20, 2 * 2**20
# Bytes of the rows read of a deferred table below which what they missed is kept for the update. A
# training step with it over one without, on two cores, for uniform / Zipf ids: 0.72 / 0.82 at
# 2 MiB, 0.78 / 0.91 at 4 MiB, 0.94 / 1.06 at 8 MiB, 0.87 / 1.04 at 14 MiB.
KEPT_BYTES = 8 * 2**20
# Bytes of a block's (length, D...) array. As measured with lazy Adam on two cores, 256 KiB to 2 MiB
# are much alike.
_BLOCK_BYTES = 2**18
_LEAST_LENGTH = 8  # of a block, however wide its rows
# In a large step, `lazy` updates tables with fewer than SMALL_BYTES of row values without blocks,
# TABLES_AT_ONCE of them at a time. Later tables reuse the temporaries of earlier ones. A norm of
# all gradients prevents this, since it needs them all first. With 26 tables of 1 MiB each, on two
# cores, a step takes 0.72 of the time of a step in blocks, a training step 0.92, and compiling 0.7.
# One table at a time takes 1.09 times as long as two, and three at a time 1.05 times.
SMALL_BYTES, TABLES_AT_ONCE = 4 * 2**20, 2


def block_length(rows: SparseRows) -> int | None:
    """The number of rows in a block on a CPU; None to update all rows at once.

    Never over meshes, where a row may be on another device. On other platforms loops cost more
    than they save: the caller asks `by_platform`, and compares the size with `LAZY_BYTES` or
    `DEFERRED_BYTES`.
    """
    row_bytes = math.prod(rows.values.shape[1:]) * rows.dtype.itemsize
    if is_on_mesh(rows.values):
        return None
    length = max(_LEAST_LENGTH, _BLOCK_BYTES // max(row_bytes, 1))
    return length if length < rows.values.shape[0] else None


def is_on_mesh(x: jax.Array) -> bool:
    """Whether `x` is on a mesh, or the context has one."""
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    return not all(mesh.empty for mesh in meshes)


def over_blocks(
    fn: Callable[[SparseRows, Any], tuple[jax.Array, Any]],
    rows: SparseRows,
    arrays: Any,
    length: int,
) -> tuple[jax.Array, Any]:
    """An update of `length` rows at a time, in place where the arrays may be overwritten.

    Args:
      fn: from a block of the rows and the arrays as they are so far to the new values of the block,
        (length, D...), and the arrays with these rows replaced.
      rows: unique.
      arrays: a tree of (V, ...).

    Returns:
      (the new values, (n, D...), the new arrays).
    """
    n = rows.values.shape[0]
    if n <= length:
        return fn(rows, arrays)
    indices = rows.indices

    def block(i: jax.Array, values: jax.Array) -> tuple[SparseRows, jax.Array]:
        positions = i * length + jnp.arange(length, dtype=jnp.int32)
        inside = jnp.minimum(positions, n - 1)
        block_indices = indices.at[inside].get(mode="promise_in_bounds")
        block_indices = jnp.where(positions < n, block_indices, rows.num_rows)
        block_values = values.at[inside].get(mode="promise_in_bounds")
        return rows.with_rows(block_indices, block_values, unique=True), positions

    def body(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        values, arrays = carry
        some, positions = block(i, values if in_place else rows.values)
        new, arrays = fn(some, arrays)
        (values,) = set_rows([values], (positions,), [new])
        return values, arrays

    first, _ = block(jnp.zeros((), jnp.int32), rows.values)
    new, _ = jax.eval_shape(fn, first, arrays)
    in_place = new.dtype == rows.dtype  # the new values take the place of the old ones
    values = rows.values if in_place else jnp.zeros(rows.values.shape, new.dtype)
    # Blocks of nothing but padding at the end, where packed rows have it, are left out.
    end = jnp.max(jnp.where(rows.is_valid, jnp.arange(1, n + 1, dtype=jnp.int32), 0))
    return jax.lax.fori_loop(0, (end + length - 1) // length, body, (values, arrays))
