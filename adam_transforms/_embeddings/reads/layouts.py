"""Rules for the operations that move rows, parts of rows, or axes: see `row_functions`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._embeddings.reads.selection import (
    Along,
    NotByRow,
    Selection,
    Window,
    as_positions,
    expand,
    is_inside,
    is_picked,
    like_rows,
    map_positions,
    repeat,
    take_along,
)


def broadcast_in_dim(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    return stretched(rows, eqn, 0, eqn.params["broadcast_dimensions"], selection)


def stretched(rows: Any, eqn: Any, k: int, axes: Sequence[int], selection: Selection) -> jax.Array:
    """What a selection of an equation's output reads of its k-th operand, whose i-th axis is the
    output's ``axes[i]``, or is stretched to it from size one; broadcast over the others."""
    value, sizes, out_sizes = eqn.operands[k], eqn.shape(k), eqn.out_shape(0)
    if not sizes:
        return jnp.broadcast_to(rows.scalar(value), selection.shape)
    along = [
        Window(0, 1) if size == 1 and out_sizes[axis] != 1 else selection.axes[axis]
        for size, axis in zip(sizes, axes, strict=True)
    ]
    inner = Selection(selection.n, tuple(along)).without_rows()
    x = rows.pull(value, inner)
    gone = [i for i in inner.kept if is_picked(selection.axes[axes[i]])]
    x = jnp.squeeze(x, [inner.position_of(i) for i in gone])
    places = [selection.position_of(axes[i]) for i in inner.kept if i not in gone]
    return jax.lax.broadcast_in_dim(x, selection.shape, (0, *places))


def transpose(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    permutation = eqn.params["permutation"]
    axes = [selection.axes[permutation.index(i)] for i in range(len(permutation))]
    inner = Selection(selection.n, tuple(axes))
    x = rows.pull(eqn.operands[0], inner)
    return jnp.transpose(x, [0, *(inner.position_of(permutation[i]) for i in selection.kept)])


def squeeze(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    gone = eqn.params["dimensions"]
    kept = iter(selection.axes)
    axes = [Window(0, 1) if i in gone else next(kept) for i in range(len(eqn.shape(0)))]
    inner = Selection(selection.n, tuple(axes))
    x = rows.pull(eqn.operands[0], inner)
    return jnp.squeeze(x, [inner.position_of(i) for i in gone])


def reverse(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    axes = [*selection.axes]
    for i in eqn.params["dimensions"]:
        size, along = eqn.shape(0)[i], axes[i]
        if isinstance(along, Window):
            axes[i] = Window(size - 1 - along.start, along.size, -along.step)
        else:
            axes[i] = size - 1 - along
    return rows.pull(eqn.operands[0], Selection(selection.n, tuple(axes)))


def slice_(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    starts = eqn.params["start_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return _strided(rows, eqn, selection, starts, strides)


def split(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    starts = [sum(sizes[:out]) if i == axis else 0 for i in range(len(eqn.shape(0)))]
    return _strided(rows, eqn, selection, starts, (1,) * len(starts), out)


def _strided(
    rows: Any,
    eqn: Any,
    selection: Selection,
    starts: Sequence[int],
    strides: Sequence[int],
    out: int = 0,
) -> jax.Array:
    axes: list[Along] = []
    sizes = zip(eqn.out_shape(out), eqn.shape(0), strict=True)
    for along, start, stride, (size, in_size) in zip(
        selection.axes, starts, strides, sizes, strict=True
    ):
        if isinstance(along, Window):
            axes.append(along.within(start, stride))
        elif size == in_size:
            axes.append(along)
        else:
            axes.append(map_positions(along, size, lambda p, a=start, b=stride: a + b * p, in_size))
    return rows.pull(eqn.operands[0], Selection(selection.n, tuple(axes)))


def pad(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    x, value = eqn.operands
    config = eqn.params["padding_config"]
    axes, masks, whole = [*selection.axes], [], []
    for i, ((low, high, interior), size) in enumerate(zip(config, eqn.shape(0), strict=True)):
        along = axes[i]
        if (low, high, interior) == (0, 0, 0):
            continue
        if isinstance(along, Window) and along.of(eqn.out_shape(0)[i]):
            axes[i] = Window(0, size)
            whole.append((selection.position_of(i), (low, high, interior)))
            continue
        positions = as_positions(along, selection.n) - low
        mapped, rest = positions // (interior + 1), positions % (interior + 1)
        inside = (rest == 0) & is_inside(mapped, size)
        axes[i] = jnp.where(inside, mapped, -1)
        masks.append((i, inside))
    inner = Selection(selection.n, tuple(axes))
    read = rows.pull(x, inner)
    fill = rows.scalar(value)
    for i, inside in masks:
        read = jnp.where(like_rows(inside, inner, i), read, fill)
    of_axis = dict(whole)
    return jax.lax.pad(read, fill, [of_axis.get(i, (0, 0, 0)) for i in range(read.ndim)])


def concatenate(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    axis = eqn.params["dimension"]
    along = selection.axes[axis]
    sizes = [eqn.shape(k)[axis] for k in range(len(eqn.operands))]
    if isinstance(along, Window) and along.of(sum(sizes)):
        parts = [
            rows.pull(x, selection.replace({axis: Window(0, size)}))
            for x, size in zip(eqn.operands, sizes, strict=True)
        ]
        return jnp.concatenate(parts, selection.position_of(axis))
    result, offset = None, 0
    for x, size in zip(eqn.operands, sizes, strict=True):
        if isinstance(along, Window) and along.step == 1:
            if offset <= along.start and along.start + along.size <= offset + size:
                part = Window(along.start - offset, along.size)
                return rows.pull(x, selection.replace({axis: part}))
        positions = as_positions(along, selection.n) - offset
        inside = is_inside(positions, size)
        inner = selection.replace({axis: jnp.where(inside, positions, -1)})
        part = rows.pull(x, inner)
        result = part if result is None else jnp.where(like_rows(inside, inner, axis), part, result)
        offset += size
    assert result is not None
    return result


def stack(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    axis = eqn.params["axis"]
    along = selection.axes[axis]
    inner = Selection(selection.n, tuple(x for i, x in enumerate(selection.axes) if i != axis))
    parts = [rows.pull(x, inner) for x in eqn.operands]
    if isinstance(along, Window) and along.of(len(parts)):
        return jnp.stack(parts, selection.position_of(axis))
    positions = as_positions(along, selection.n)
    if not is_picked(along):
        parts = [jnp.expand_dims(x, selection.position_of(axis)) for x in parts]
    result = parts[0]
    for k, part in enumerate(parts[1:], start=1):
        result = jnp.where(like_rows(positions == k, selection, axis), part, result)
    return jnp.broadcast_to(result, selection.shape)


def unstack(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    axis = eqn.params["axis"]
    inner = Selection(selection.n, (*selection.axes[:axis], Window(out, 1), *selection.axes[axis:]))
    return jnp.squeeze(rows.pull(eqn.operands[0], inner), inner.position_of(axis))


def tile(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    axes: list[Along] = []
    for along, size, times in zip(selection.axes, eqn.shape(0), eqn.params["reps"], strict=True):
        if times == 1:
            axes.append(along)
        else:
            positions = as_positions(along, selection.n)
            axes.append(map_positions(positions, size * times, lambda p, m=size: p % m, size))
    return rows.pull(eqn.operands[0], Selection(selection.n, tuple(axes)))


def reshape(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    x, new_sizes = rows.before_reshapes(eqn.operands[0]), eqn.out_shape(0)
    sizes = x.aval.shape
    if 0 in sizes:
        raise NotByRow("an empty array is reshaped")
    groups = _groups(sizes, new_sizes)
    partial = [
        (old, new)
        for old, new in groups
        if (len(old), len(new)) != (1, 1)
        and not all(_is_whole(selection.axes[i], new_sizes[i]) for i in new)
    ]
    alike = {old[0]: new[0] for old, new in groups if (len(old), len(new)) == (1, 1)}
    if not partial:
        axes = [
            selection.axes[alike[i]] if i in alike else Window(0, size)
            for i, size in enumerate(sizes)
        ]
        inner = Selection(selection.n, tuple(axes))
        return jnp.reshape(rows.pull(x, inner), selection.shape)
    if len(partial) > 1:
        raise NotByRow("reshape regroups several of its axes")
    [(old, new)] = partial
    last = max(k for k, i in enumerate(new) if not _is_whole(selection.axes[i], new_sizes[i]))
    leading, chunk = new[: last + 1], math.prod(new_sizes[i] for i in new[last + 1 :])

    def read(picked: Selection) -> jax.Array:
        """With one position along each of the leading axes."""
        unit = jnp.zeros((picked.n,), jnp.int32)
        axes = {
            i: picked.axes[alike[i]] if i in alike else unit if size == 1 else Window(0, size)
            for i, size in enumerate(sizes)
        }
        flat = _ravel([picked.axes[i] for i in leading], [new_sizes[i] for i in leading])
        return _read_chunks(rows, x, picked, axes, old, sizes, flat, chunk)

    return expand(read, selection, leading)


def _read_chunks(
    rows: Any,
    x: Any,
    picked: Selection,
    others: dict[int, Along],
    old: Sequence[int],
    sizes: Sequence[int],
    flat: jax.Array,
    chunk: int,
) -> jax.Array:
    """The `flat`-th chunk, of `chunk` elements, of the axes `old` taken together."""
    rest = [math.prod(sizes[i] for i in old[m:]) for m in range(len(old) + 1)]
    wholes = [m for m, size in enumerate(rest) if chunk % size == 0 and (size > 1 or chunk == 1)]
    parts = [m for m, size in enumerate(rest) if size % chunk == 0]
    if not wholes and not parts:
        raise NotByRow("reshape that divides rows unevenly")
    m = wholes[0] if wholes else parts[-1]
    times = chunk // rest[m] if wholes else 1  # consecutive rows in a chunk
    per_row = 1 if wholes else rest[m] // chunk  # chunks in a row
    if times > 1:
        index = flat[:, None] * times + jnp.arange(times, dtype=jnp.int32)
        index = jnp.where(flat[:, None] < 0, -1, index).reshape(-1)
    else:
        index = jnp.where(flat < 0, -1, flat // per_row)
    leading = [sizes[i] for i in old[:m]]
    axes = {i: repeat(along, times) if times > 1 else along for i, along in others.items()}
    axes |= dict(zip(old, _unravel(index, leading), strict=False))
    inner = Selection(picked.n * times, tuple(axes[i] for i in range(len(sizes))))
    read = rows.pull(x, inner)
    before = len([i for i in inner.kept if i < old[0]])
    inside = len([i for i in inner.kept if i in old])
    shape = read.shape[1:]
    if times > 1:
        read = jnp.reshape(read, (picked.n, times, *shape))
        read = jnp.moveaxis(read, 1, 1 + before)
    elif per_row > 1:
        split = (*shape[:before], per_row, chunk, *shape[before + inside :])
        read = jnp.reshape(read, (picked.n, *split))
        which = jnp.where(flat < 0, 0, flat % per_row)
        read = jnp.squeeze(take_along(read, which[:, None], 1 + before), 1 + before)
    return jnp.reshape(read, picked.shape)


def _groups(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes of one size in the smallest groups of equal products; axes of size one
    are in none."""
    left = [i for i, size in enumerate(a) if size != 1]
    right = [i for i, size in enumerate(b) if size != 1]
    groups = []
    while left:
        old, new = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(a[i] for i in old)) != (n := math.prod(b[i] for i in new)):
            if m < n:
                old.append(left.pop(0))
            else:
                new.append(right.pop(0))
        groups.append((old, new))
    return groups


def _is_whole(along: Along, size: Any) -> bool:
    return isinstance(along, Window) and along.of(size)


def _ravel(positions: Sequence[Any], sizes: Sequence[Any]) -> jax.Array:
    """The flat positions of positions along several axes; -1 where one is outside."""
    flat, inside = 0, True
    for along, size in zip(positions, sizes, strict=True):
        flat = flat * size + jnp.clip(along, 0, size - 1)
        inside = inside & is_inside(along, size)
    return jnp.where(inside, flat, -1)


def _unravel(flat: jax.Array, sizes: Sequence[Any]) -> list[jax.Array]:
    """The positions along several axes of flat positions; -1 stays."""
    positions = []
    for size in reversed(sizes):
        positions.insert(0, jnp.where(flat < 0, -1, flat % size))
        flat = jnp.where(flat < 0, -1, flat // size)
    return positions
