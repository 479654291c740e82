"""Which part of an array is read: positions along some of its axes, windows of the others."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class NotByRow(Exception):
    """A use of a table that reads no rows of it; the message says why.

    Attributes:
      tables: which tables; None if all of those in use.
      where: the equation that reads so, in its scope; None if it is the one at hand.
    """

    tables: Iterable[int] | None = None
    where: Any = None

    def of(self, tables: Iterable[int]) -> "NotByRow":
        """The same, of these tables."""
        self.tables = tables
        return self


class AllRows(NotByRow):
    """A use of all rows of a table."""

    def __init__(self, message: str = "it uses all rows") -> None:
        super().__init__(message)


class Window(NamedTuple):
    """The positions start, start + step, ... of an axis: `size` of them."""

    start: Any
    size: Any
    step: int = 1

    def of(self, size: Any) -> bool:
        """Whether this is all of an axis of this size, in order."""
        return self == (0, size, 1)

    def within(self, start: Any, step: int = 1) -> "Window":
        """This window of an axis that is itself a window of another axis."""
        return Window(start + self.start * step, self.size, self.step * step)

    def positions(self) -> jax.Array:
        return self.start + self.step * jnp.arange(self.size, dtype=jnp.int32)

    def apply(self, x: jax.Array, axis: int) -> jax.Array:
        """This window of an array along one of its axes."""
        if self.of(x.shape[axis]):
            return x
        if self.step < 0:
            last = self.start + self.step * (self.size - 1)
            return jnp.flip(Window(last, self.size, -self.step).apply(x, axis), axis)
        stop = self.start + self.step * (self.size - 1) + 1
        return jax.lax.slice_in_dim(x, self.start, stop, self.step, axis)


# Along one axis: a window, int32 positions (n,), one for each of the n rows of a selection, or
# (n, m), m for each row. A position outside of the axis selects nothing: any value is read there.
Along = Window | jax.Array


class Selection(NamedTuple):
    """A part of an array: n rows, each of them along every axis the same window, one position, or
    m positions.

    What is read has shape (n, ...), with one more axis for each axis along which a row is more than
    one position (`kept`).
    """

    n: Any
    axes: tuple[Along, ...]

    @classmethod
    def whole(cls, shape: Sequence[Any]) -> "Selection":
        """All of an array, as one row."""
        return cls(1, tuple(Window(0, size) for size in shape))

    @property
    def kept(self) -> list[int]:
        return [i for i, along in enumerate(self.axes) if not is_picked(along)]

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of what is read."""
        return (self.n, *(length(self.axes[i]) for i in self.kept))

    @property
    def has_positions(self) -> bool:
        return any(not isinstance(along, Window) for along in self.axes)

    def replace(self, changes: dict[int, Along]) -> "Selection":
        return Selection(self.n, tuple(changes.get(i, x) for i, x in enumerate(self.axes)))

    def position_of(self, axis: int) -> int:
        """The axis of what is read that a kept axis becomes."""
        return 1 + self.kept.index(axis)

    def without_rows(self) -> "Selection":
        """If no axis has positions, the one row that all rows are; else itself."""
        return self if self.has_positions else Selection(1, self.axes)


def is_picked(along: Along) -> bool:
    """Whether each row is one position of the axis."""
    return not isinstance(along, Window) and along.ndim == 1


def length(along: Along) -> Any:
    """How many positions a row has along an axis that is not picked."""
    return along.size if isinstance(along, Window) else along.shape[1]


def as_positions(along: Along, n: Any) -> jax.Array:
    """The positions, (n,) or (n, m)."""
    if isinstance(along, Window):
        return jnp.broadcast_to(along.positions(), (n, along.size))
    return along


def map_positions(
    along: Along, size: Any, to: Callable[[jax.Array], jax.Array], out_size: Any
) -> jax.Array:
    """The positions in an axis of `out_size` that `to` gives for those in an axis of `size`; those
    outside of either stay outside."""
    assert not isinstance(along, Window)
    mapped = to(along)
    inside = is_inside(along, size) & is_inside(mapped, out_size)
    return jnp.where(inside, mapped, -1)


def is_inside(positions: jax.Array, size: Any) -> jax.Array:
    return (positions >= 0) & (positions < size)


def repeat(along: Along, times: Any) -> Along:
    """The same, for `times` consecutive rows in place of each."""
    if isinstance(along, Window):
        return along
    return jnp.repeat(along, times, axis=0)


def expand(
    read: Callable[[Selection], jax.Array], selection: Selection, axes: Sequence[int]
) -> jax.Array:
    """Reads `selection` with one row in place of each position along some kept axes."""
    axes = [axis for axis in axes if not is_picked(selection.axes[axis])]
    if not axes:
        return read(selection)
    sizes = [length(selection.axes[axis]) for axis in axes]
    times = math.prod(sizes)
    more = [repeat(along, times) for along in selection.axes]
    for i, axis in enumerate(axes):
        positions = as_positions(selection.axes[axis], selection.n)
        shape = [selection.n, *[1] * len(axes)]
        shape[1 + i] = sizes[i]
        grid = jnp.broadcast_to(jnp.reshape(positions, shape), (selection.n, *sizes))
        more[axis] = jnp.reshape(grid, (-1,))
    rows = read(Selection(selection.n * times, tuple(more)))
    rows = jnp.reshape(rows, (selection.n, *sizes, *rows.shape[1:]))
    return jnp.moveaxis(
        rows, range(1, 1 + len(axes)), [selection.position_of(axis) for axis in axes]
    )


def take(x: jax.Array, selection: Selection) -> jax.Array:
    """What a selection reads of an array."""
    x = jnp.asarray(x)
    for axis, along in enumerate(selection.axes):
        if isinstance(along, Window):
            x = along.apply(x, axis)
    selection = selection.replace(
        {i: Window(0, a.size) for i, a in enumerate(selection.axes) if isinstance(a, Window)}
    )
    picked = [i for i, along in enumerate(selection.axes) if is_picked(along)]
    several = [
        i
        for i, along in enumerate(selection.axes)
        if not isinstance(along, Window) and not is_picked(along)
    ]
    if not picked and several:
        return expand(lambda s: take(x, s), selection, several)
    if not picked:
        return jnp.broadcast_to(x[None], selection.shape)
    index: list[Any] = [slice(None)] * x.ndim
    for i in picked:
        index[i] = jnp.clip(as_positions(selection.axes[i], selection.n), 0, x.shape[i] - 1)
    adjacent = picked[-1] - picked[0] + 1 == len(picked)
    rows = x.at[tuple(index)].get(mode="promise_in_bounds")
    rows = jnp.moveaxis(rows, picked[0] if adjacent else 0, 0)
    for i in several:
        rows = take_along(rows, selection.axes[i], selection.position_of(i))
    return rows


def take_along(rows: jax.Array, positions: Any, axis: int) -> jax.Array:
    """(n, ..., m, ...), the positions (n, m) of each row along an axis."""
    positions = jnp.clip(positions, 0, rows.shape[axis] - 1)
    rows = jnp.moveaxis(rows, axis, 1)
    which = jnp.arange(rows.shape[0], dtype=positions.dtype)[:, None]
    # Not `take_along_axis`: `checkify.index_checks` fails on its gradient.
    return jnp.moveaxis(rows.at[which, positions].get(mode="promise_in_bounds"), 1, axis)


def like_rows(x: jax.Array, selection: Selection, axis: int) -> jax.Array:
    """What is (n,) or (n, m) along an axis, to broadcast with what the selection reads."""
    shape = [1] * len(selection.shape)
    shape[0] = x.shape[0]
    if x.ndim == 2:
        shape[selection.position_of(axis)] = x.shape[1]
    return jnp.reshape(x, shape)
