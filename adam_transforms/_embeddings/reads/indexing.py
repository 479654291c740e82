"""Rules for the operations that read and write at positions: see `row_functions`."""

import math
from collections.abc import Callable
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
    is_inside,
    is_picked,
    like_rows,
    map_positions,
    repeat,
)

# A scatter of more updates than this is not followed.
_FEW_UPDATES = 8


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
        hit = hit & like_rows(inside, inner, i)
    return jnp.where(hit, rows.pull(update, inner), read)


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

    is_promised = mode == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    inside: Any = True
    is_window = False
    axes: list[Along] = []
    for i, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        first = None
        if i in numbers.start_index_map:
            first = as_int32(ids[:, numbers.start_index_map.index(i)], size)
            inside = inside & (first >= 0) & (first <= size - part)
            is_window = is_window or 1 < part < size
            if mode == jax.lax.GatherScatterMode.CLIP or (is_promised and part > 1):
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
    inner = Selection(n, tuple(axes))
    read = rows.pull(x, inner)
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        value = eqn.params["fill_value"]
        read = jnp.where(_for_each_row(inside, read), read, np.nan if value is None else value)
    elif is_promised and is_window:
        # One beyond the end is moved back, and drops its gradient.
        read = jnp.where(_for_each_row(inside, read), read, jax.lax.stop_gradient(read))
    read = jnp.reshape(read, (*batch_shape, *read.shape[1:]))
    order = [d for d in batch if not is_picked(selection.axes[d])]
    order += [offset[i] for i in inner.kept]
    return jnp.transpose(read, [0, *(1 + order.index(d) for d in selection.kept)])


def _for_each_row(mask: jax.Array, read: jax.Array) -> jax.Array:
    """(n,) as (n, 1, ...), for what n rows read."""
    return jnp.reshape(mask, (-1, *[1] * (read.ndim - 1)))


def _along_batch(of_ids: Selection, axis: int) -> jax.Array:
    """The position along an axis of the ids of each id."""
    batch = Selection(of_ids.n, of_ids.axes[:-1])
    positions = like_rows(as_positions(batch.axes[axis], batch.n), batch, axis)
    return jnp.reshape(jnp.broadcast_to(positions, batch.shape), (-1,))


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
            hit = hit & like_rows(inside, selection, i)
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
