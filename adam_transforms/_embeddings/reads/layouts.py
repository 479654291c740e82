"""Rules for the operations that move rows, parts of rows, or axes: see `row_functions`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._embeddings.reads.direct import as_int32
from adam_transforms._embeddings.reads.selection import (
    Along,
    NotByRow,
    Selection,
    Window,
    as_positions,
    expand,
    is_inside,
    is_picked,
    map_positions,
    repeat,
    take_along,
)

# A scatter of more updates than this is not followed.
_FEW_UPDATES = 8


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


def dynamic_slice(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    x, *starts = eqn.operands
    axes = []
    for along, start, size, part in zip(
        selection.axes, starts, eqn.shape(0), eqn.params["slice_sizes"], strict=True
    ):
        if part == size:
            axes.append(along)
            continue
        known = rows.known(start)
        if known is not None and isinstance(along, Window):
            axes.append(along.within(min(max(int(known), 0), size - part)))
            continue
        first = jnp.clip(as_int32(rows.scalar(start), size), 0, size - part)
        positions = as_positions(along, selection.n)
        axes.append(map_positions(positions, part, lambda p, first=first: first + p, size))
    return rows.pull(x, Selection(selection.n, tuple(axes)))


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
        read = jnp.where(_like_rows(inside, inner, i), read, fill)
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
        result = (
            part if result is None else jnp.where(_like_rows(inside, inner, axis), part, result)
        )
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
        result = jnp.where(_like_rows(positions == k, selection, axis), part, result)
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


def dynamic_update_slice(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    x, update, *starts = eqn.operands
    read = rows.pull(x, selection)
    axes, masks = [*selection.axes], []
    for i, (start, size, part) in enumerate(zip(starts, eqn.shape(0), eqn.shape(1), strict=True)):
        if part == size:
            continue
        first = jnp.clip(as_int32(rows.scalar(start), size), 0, size - part)
        positions = as_positions(axes[i], selection.n) - first
        inside = is_inside(positions, part)
        axes[i] = jnp.where(inside, positions, -1)
        masks.append((i, inside))
    inner = Selection(selection.n, tuple(axes))
    hit = jnp.asarray(True)
    for i, inside in masks:
        hit = hit & _like_rows(inside, inner, i)
    return jnp.where(hit, rows.pull(update, inner), read)


def _like_rows(mask: jax.Array, selection: Selection, axis: int) -> jax.Array:
    """A mask (n,) or (n, m) along an axis, to broadcast with what the selection reads."""
    shape = [1] * len(selection.shape)
    shape[0] = mask.shape[0]
    if mask.ndim == 2:
        shape[selection.position_of(axis)] = mask.shape[1]
    return jnp.reshape(mask, shape)


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


def gather(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    del out
    x, starts = eqn.operands
    sizes, parts = eqn.shape(0), eqn.params["slice_sizes"]
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    batch = [d for d in range(len(selection.axes)) if d not in numbers.offset_dims]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offset = dict(
        zip([i for i in range(len(sizes)) if i not in gone], numbers.offset_dims, strict=True)
    )
    # The ids: (n, kept axes of the batch..., k), and one row for each of them.
    of_ids = Selection(
        selection.n, (*(selection.axes[d] for d in batch), Window(0, eqn.shape(1)[-1]))
    )
    ids = rows.pull(starts, of_ids)
    batch_shape = ids.shape[:-1]
    n, times = math.prod(batch_shape), math.prod(batch_shape[1:])
    ids = jnp.reshape(ids, (n, ids.shape[-1]))

    inside: Any = True
    axes: list[Along] = []
    for i, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        first = None
        if i in numbers.start_index_map:
            first = as_int32(ids[:, numbers.start_index_map.index(i)], size)
            inside = inside & (first >= 0) & (first <= size - part)
            if mode == jax.lax.GatherScatterMode.CLIP:
                first = jnp.clip(first, 0, size - part)
        if i in numbers.operand_batching_dims:
            pair = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(i)]
            axes.append(_along_batch(of_ids, pair))
        elif i in numbers.collapsed_slice_dims:
            axes.append(jnp.zeros((n,), jnp.int32) if first is None else first)
        else:
            along = repeat(selection.axes[offset[i]], times)
            if first is not None and part < size:
                positions = as_positions(along, n)
                first = first if positions.ndim == 1 else first[:, None]
                along = jnp.where(is_inside(positions, part), first + positions, -1)
            axes.append(along)
    fill = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    inner = Selection(n, tuple(axes))
    read = rows.pull(x, inner)
    if fill:
        value = eqn.params["fill_value"]
        value = np.nan if value is None else value
        read = jnp.where(jnp.reshape(inside, (n, *[1] * (read.ndim - 1))), read, value)
    read = jnp.reshape(read, (*batch_shape, *read.shape[1:]))
    order = [d for d in batch if not is_picked(selection.axes[d])]
    order += [offset[i] for i in inner.kept]
    return jnp.transpose(read, [0, *(1 + order.index(d) for d in selection.kept)])


def _along_batch(of_ids: Selection, axis: int) -> jax.Array:
    """The position along an axis of the ids of each id."""
    shape = of_ids.shape[:-1]
    positions = as_positions(of_ids.axes[axis], of_ids.n)
    if is_picked(of_ids.axes[axis]):
        positions = jnp.reshape(positions, (of_ids.n, *[1] * (len(shape) - 1)))
    else:
        ones = [1] * len(shape)
        ones[0], ones[of_ids.position_of(axis)] = positions.shape
        positions = jnp.reshape(positions, ones)
    return jnp.reshape(jnp.broadcast_to(positions, shape), (-1,))


def scatter(rows: Any, eqn: Any, out: int, selection: Selection) -> jax.Array:
    """A scatter of a few updates, one after the other."""
    del out
    x, starts, updates = eqn.operands
    numbers, ids_shape = eqn.params["dimension_numbers"], eqn.shape(1)[:-1]
    num_updates = math.prod(ids_shape)
    if num_updates > _FEW_UPDATES or numbers.operand_batching_dims:
        raise NotByRow(f"it has more than {_FEW_UPDATES} updates")
    starts = jnp.reshape(rows.plain(starts), (num_updates, -1))
    windows = [*numbers.update_window_dims]
    batch = [i for i in range(len(eqn.shape(2))) if i not in windows]
    read = rows.pull(x, selection)
    for k, position in enumerate(np.ndindex(*ids_shape)):
        entries: dict[int, Along] = {i: Window(p, 1) for i, p in zip(batch, position, strict=True)}
        rest, masks, inserted = iter(windows), [], []
        for i, size in enumerate(eqn.shape(0)):
            window = None if i in numbers.inserted_window_dims else next(rest)
            part = 1 if window is None else eqn.shape(2)[window]
            along = selection.axes[i]
            if i in numbers.scatter_dims_to_operand_dims:
                first = starts[k, numbers.scatter_dims_to_operand_dims.index(i)]
                first = as_int32(first, size)
                if eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
                    first = jnp.clip(first, 0, size - part)
                local = as_positions(along, selection.n) - first
                # An update that does not fit is dropped.
                inside = is_inside(local, part) & (first >= 0) & (first <= size - part)
                masks.append((i, inside))
                along = jnp.where(inside, local, -1)
            if window is None:
                inserted.append(i)
            else:
                entries[window] = along
        of_update = Selection(selection.n, tuple(entries[i] for i in range(len(entries))))
        update = rows.pull(updates, of_update)
        update = jnp.squeeze(update, [of_update.position_of(i) for i in batch])
        for i in inserted:
            if not is_picked(selection.axes[i]):
                update = jnp.expand_dims(update, selection.position_of(i))
        hit = jnp.asarray(True)
        for i, inside in masks:
            hit = hit & _like_rows(inside, selection, i)
        read = jnp.where(hit, SCATTERS[eqn.name.replace("_", "-")](read, update), read)
    return read


# What a scatter makes of the old row and the update.
SCATTERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "scatter": lambda old, new: jnp.broadcast_to(new, old.shape),
    "scatter-add": jnp.add,
    "scatter-mul": jnp.multiply,
    "scatter-min": jnp.minimum,
    "scatter-max": jnp.maximum,
}
