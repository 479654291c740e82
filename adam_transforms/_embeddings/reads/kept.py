"""Keeps for the update what reads of deferred tables compute, and the sums of their gradients.

The forward pass and the update both need what the rows missed. The update finds it beside the row
gradient (`sparse_rows.keep_read`) if it is of the same table after the same step
(`RowsRead.is_of`), and computes it otherwise.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._core import dtypes, sparse_rows
from adam_transforms._core.sparse_rows import SparseRows, distinct_rows, keep_read
from adam_transforms._embeddings.deferred.state import DeferredTable, RowsRead, StaleRows
from adam_transforms._embeddings.reads.program import DirectRead, Program, RowRead
from adam_transforms._embeddings.reads.running import Table
from adam_transforms._embeddings.row_blocks import KEPT_BYTES, is_on_mesh


class KeptReads(NamedTuple):
    """All reads of a deferred table, by their positions in the program; `table` as it was read."""

    table: DeferredTable
    positions: list[int]

    def gradient(self, summed: SparseRows, stale: Mapping[int, StaleRows]) -> SparseRows:
        """The row gradient of the table, with what the update will need of the reads.

        Args:
          summed: the row gradient, followed by the rows of the round robin.
          stale: {position of a read: what it has computed}.
        """
        found = [stale[k] for k in self.positions]
        joined = found[0] if len(found) == 1 else jax.tree.map(_concatenated, *found)
        n = summed.indices.size - self.table.room
        g = distinct_rows(summed, summed.indices[:n], summed.values[:n])
        return keep_read(g, RowsRead(joined, self.table, g.values, summed))


def kept_reads(program: Program, tables: Mapping[int, Table]) -> dict[int, KeptReads]:
    """{table: its reads}, of the deferred tables whose reads are kept: all are outside of loops,
    branches and meshes, and the rows have less than `KEPT_BYTES`. Their gradients then stay in the
    order of the reads, for they are not packed."""
    most = min(KEPT_BYTES, sparse_rows.PACKED_BYTES)
    # steps[k] makes the k-th read.
    steps = [step for step in program.steps for _ in step.reads]
    kept = {}
    for i, table in tables.items():
        positions = [k for k, read in enumerate(program.reads) if read.table == i]
        are_outside = all(isinstance(steps[k], DirectRead | RowRead) for k in positions)
        if table.deferred is None or not positions or not are_outside:
            continue
        array = jnp.asarray(table.array)
        n = sum(program.reads[k].n for k in positions) + table.deferred.room
        dtype = dtypes.compute_dtype(array.dtype)
        nbytes = n * math.prod(array.shape[1:]) * jnp.dtype(dtype).itemsize
        if isinstance(nbytes, int) and nbytes < most and not is_on_mesh(array):
            kept[i] = KeptReads(table.deferred, positions)
    return kept


def _concatenated(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays)
