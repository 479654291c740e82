"""Reads a selection of a table: its rows first, then parts of these rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core.sparse_rows import explicit_sharding, places
from adam_transforms._embeddings.reads.row_functions import narrow, widen
from adam_transforms._embeddings.reads.selection import (
    AllRows,
    Selection,
    Window,
    expand,
    is_inside,
    is_picked,
    length,
)


def read_table(
    selection: Selection,
    shape: tuple[Any, ...],
    row_axes: int,
    read_rows: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """What a selection reads of a table.

    Args:
      row_axes: how many leading axes number its rows.
      read_rows: from int32 indices (n,) of rows to (n, D...). An index of the number of rows is
        padding: anything is read there.
    """
    inner = range(row_axes, len(shape))
    if all(reads_whole(along, shape[i]) for i, along in enumerate(selection.axes[:row_axes])):
        raise AllRows()
    wide = widen(selection, shape, inner)

    def read(picked: Selection) -> jax.Array:
        index, inside = jnp.zeros((), jnp.int32), jnp.asarray(True)
        for along, size in zip(picked.axes[:row_axes], shape, strict=False):
            assert not isinstance(along, Window)
            index = index * size + jnp.clip(along, 0, size - 1)
            inside = inside & is_inside(along, size)
        return read_rows(jnp.where(inside, index, math.prod(shape[:row_axes])))

    return narrow(expand(read, wide, range(row_axes)), wide, selection)


def gather_rows(table: jax.Array, index: jax.Array, row_axes: int) -> jax.Array:
    """(n, D...), rows of a table whose leading axes number its rows together."""
    sharding = explicit_sharding(table, row_axes=row_axes)
    # Padding has the last row: `checkify.index_checks` reports an index beyond the end.
    last = math.prod(table.shape[:row_axes]) - 1
    where = places(jnp.minimum(index, last), table.shape[:row_axes])
    return table.at[where].get(mode="clip", out_sharding=sharding)


def reads_whole(along: Any, size: Any) -> bool:
    """Whether all of an axis is read, in either order."""
    return isinstance(along, Window) and along.size == size


def is_single(along: Any) -> bool:
    """Whether each row of a selection is one position of the axis."""
    return is_picked(along) or length(along) == 1


def choose_row_axes(selections: list[tuple[bool, ...]], shape: Sequence[Any]) -> int:
    """How many leading axes number the rows of an array, so that each read is of whole rows.

    Args:
      selections: for each read, whether it reads single positions along each axis.
    """
    if not selections:
        return 1
    last = max(len(shape) - 1, 1)
    first = min(next((i for i, size in enumerate(shape) if size != 1), 0) + 1, last)
    for row_axes in range(last, first, -1):
        if all(single[row_axes - 1] for single in selections):
            return row_axes
    return first
