"""Rules by which rows of an operation's output are computed from rows of its operands.

Each rule takes the reader of rows (`rows.Rows`), an equation, which of its outputs is meant, and a
`Selection` of it, and returns what the selection reads. This module has the operations that compute
within rows; `layouts` has those that move rows, and `rows.RULES` is the table of all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._embeddings.reads.direct import as_int32
from adam_transforms._embeddings.reads.layouts import stretched
from adam_transforms._embeddings.reads.origins import find_one_hot
from adam_transforms._embeddings.reads.selection import (
    Selection,
    Window,
    as_positions,
    is_inside,
    is_picked,
    like_rows,
    repeat,
    take,
    take_along,
)


def elementwise(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """Operands are scalars, or have the output's shape but for axes of size one."""
    del out
    inputs = []
    for k, x in enumerate(eqn.operands):
        if not eqn.shape(k):
            inputs.append(rows.scalar(x))
        elif eqn.shape(k) == eqn.out_shape(0):
            inputs.append(rows.pull(x, selection))
        else:
            inputs.append(stretched(rows, eqn, k, range(len(eqn.shape(k))), selection))
    return jnp.broadcast_to(rows.run(eqn, inputs)[0], selection.shape)


def identity(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    return rows.pull(eqn.operands[out], selection)


def iota(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del rows, out
    axis, dtype = eqn.params["dimension"], eqn.params["dtype"]
    positions = as_positions(selection.axes[axis], selection.n).astype(dtype)
    return jnp.broadcast_to(like_rows(positions, selection, axis), selection.shape)


def reduction(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """A reduction within rows."""
    del out
    shape, reduced = eqn.shape(0), eqn.params["axes"]
    kept = iter(selection.axes)
    axes = [Window(0, size) if i in reduced else next(kept) for i, size in enumerate(shape)]
    inner = Selection(selection.n, tuple(axes))
    x = rows.pull(eqn.operands[0], inner)
    return rows.run(eqn, [x], axes=tuple(inner.position_of(i) for i in reduced))[0]


def along_axis(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """A cumulative operation or a sort, each along one axis, within rows."""
    name = "dimension" if "dimension" in eqn.params else "axis"
    axis = eqn.params[name]
    wide = widen(selection, eqn.shape(0), [axis])
    inputs = [rows.pull(x, wide) for x in eqn.operands]
    x = rows.run(eqn, inputs, **{name: wide.position_of(axis)})[out]
    return narrow(x, wide, selection)


def fft(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """A Fourier transform of the last axes, within rows."""
    del out
    rank = len(selection.axes)
    last = range(rank - len(eqn.params["fft_lengths"]), rank)
    inner = widen(selection, eqn.shape(0), last)
    wide = widen(selection, eqn.out_shape(0), last)
    return narrow(rows.run(eqn, [rows.pull(eqn.operands[0], inner)])[0], wide, selection)


def dot_general(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """A product that contracts axes within rows."""
    del out
    (contract, batch) = eqn.params["dimension_numbers"]
    one_hot = find_one_hot(eqn)
    if one_hot is not None:
        return _one_hot_product(rows, eqn, one_hot, selection)
    free = [
        [i for i in range(len(eqn.shape(k))) if i not in (*contract[k], *batch[k])] for k in (0, 1)
    ]
    # The axes of the output: those of the batch, then the free ones of either operand.
    starts = (len(batch[0]), len(batch[0]) + len(free[0]))
    sides = []
    for k in (0, 1):
        out_axis = {axis: i for i, axis in enumerate(batch[k])}
        out_axis |= {axis: starts[k] + i for i, axis in enumerate(free[k])}
        axes = [
            selection.axes[out_axis[i]] if i in out_axis else Window(0, size)
            for i, size in enumerate(eqn.shape(k))
        ]
        side = Selection(selection.n, tuple(axes)).without_rows()
        sides.append((side, rows.pull(eqn.operands[k], side), out_axis))
    by_row = [side.has_positions for side, _, _ in sides]
    if not any(by_row):
        by_row[0] = True
    places, arrays = [], []
    for (side, x, _), has_rows in zip(sides, by_row, strict=True):
        arrays.append(x if has_rows else x[0])
        places.append({axis: side.position_of(axis) - (not has_rows) for axis in side.kept})
    contracted = tuple(places[0][i] for i in contract[0]), tuple(places[1][i] for i in contract[1])
    kept_batch = [(a, b) for a, b in zip(*batch, strict=True) if a in places[0] and b in places[1]]
    shared = all(by_row)
    batched = (
        [0] * shared + [places[0][a] for a, _ in kept_batch],
        [0] * shared + [places[1][b] for _, b in kept_batch],
    )
    x = jax.lax.dot_general(
        *arrays,
        dimension_numbers=(contracted, batched),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    # Which axis of the output each axis of the product is; -1 is that of the rows.
    order = [-1] * shared + [sides[0][2][a] for a, _ in kept_batch]
    for k in (0, 1):
        order += [-1] * (by_row[k] and not shared)
        order += [sides[k][2][axis] for axis in free[k] if axis in places[k]]
    return jnp.transpose(x, [order.index(i) for i in (-1, *selection.kept)])


def _one_hot_product(rows: Any, eqn: Any, one_hot: Any, selection: Selection) -> jax.Array:
    """A product with one-hot rows reads rows of the other operand; zeros for an id outside."""
    side, ids, class_axis = one_hot
    other = 1 - side
    table_axis = eqn.params["dimension_numbers"][0][other][0]
    rank = len(eqn.shape(0)) - 1  # the axes of the first operand come first
    own, rest = selection.axes[:rank], selection.axes[rank:]
    if side == 1:
        own, rest = rest, own
    sizes = [size for i, size in enumerate(eqn.shape(side)) if i != class_axis]
    every_id = jnp.broadcast_to(jnp.take(rows.plain(ids), 0, class_axis), sizes)
    of_ids = Selection(selection.n, tuple(own))
    positions = jnp.reshape(take(as_int32(every_id, eqn.shape(other)[table_axis]), of_ids), (-1,))
    times = positions.size // selection.n
    axes = [repeat(along, times) for along in rest]
    axes.insert(table_axis, positions)
    x = rows.pull(eqn.operands[other], Selection(positions.size, tuple(axes)))
    inside = is_inside(positions, eqn.shape(other)[table_axis])
    x = jnp.where(jnp.reshape(inside, (-1, *[1] * (x.ndim - 1))), x, 0).astype(eqn.dtype)
    x = jnp.reshape(x, (*of_ids.shape, *x.shape[1:]))
    if side == 1:
        k = len(of_ids.shape) - 1
        x = jnp.moveaxis(x, range(1, 1 + k), range(x.ndim - k, x.ndim))
    return x


def widen(selection: Selection, shape: Sequence[Any], axes: Sequence[int]) -> Selection:
    """The selection with all of some axes."""
    return selection.replace({i: Window(0, shape[i]) for i in axes})


def narrow(x: jax.Array, wide: Selection, selection: Selection) -> jax.Array:
    """What `selection` reads, from what `wide` has read, which is wider along some axes."""
    squeezed = []
    for i, (before, along) in enumerate(zip(wide.axes, selection.axes, strict=True)):
        if before is along:
            continue
        axis = wide.position_of(i)
        if isinstance(along, Window):
            x = along.apply(x, axis)
        elif is_picked(along):
            x = take_along(x, along[:, None], axis)
            squeezed.append(axis)
        else:
            x = take_along(x, along, axis)
    return jnp.squeeze(x, squeezed)
