"""Equations that read whole rows of a table themselves: ``table[ids]``, ``table[3]``.

They are run as they are. What stands between the table and the read may only cast the table or
hand it on.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._embeddings.collectives import varying_axes, varying_like


class Read(NamedTuple):
    """A read of rows of a table.

    Attributes:
      table: the position of the table among the leaves.
      site: the equation that reads, and the calls around it.
      tap_type: the type (shape, dtype, sharding) of what is read in one run of its jaxpr, and thus
        of the zeros that are added to it.
      n: the number of rows read in one run.
      values: from an array of that type, the sharding of D and a dtype to (n, D...).
      is_static: whether the program itself says which rows.
      lengths: of the loops around it.
    """

    table: int
    site: tuple[Any, ...]
    tap_type: Any
    n: Any
    values: Callable[..., jax.Array]
    is_static: bool
    lengths: tuple[Any, ...] = ()

    @property
    def num_rows_read(self) -> Any:
        return self.n * math.prod(self.lengths)

    def in_loop(self, length: Any) -> "Read":
        return self._replace(lengths=(length, *self.lengths))

    def in_mesh(self, devices: list[int]) -> "Read":
        """The read of all devices together, outside of their mesh."""
        tap_type = jax.ShapeDtypeStruct(self.tap_type.shape, self.tap_type.dtype)
        return self._replace(tap_type=tap_type, lengths=(*devices, *self.lengths))

    def tap(self) -> jax.Array:
        """Zeros to add to it. Negative ones: x + -0.0 is x, even if that is -0.0."""
        with in_mesh_of(self.tap_type):
            zeros = zeros_like(self.tap_type)
        if self.lengths:
            zeros = jnp.broadcast_to(zeros, (*self.lengths, *zeros.shape))
        return zeros

    def all_values(self, x: jax.Array, columns: Sequence[Any], dtype: Any) -> jax.Array:
        """`values` of all runs, one after the other."""
        if not self.lengths:
            return self.values(x, columns, dtype)
        runs = jnp.reshape(x, (-1, *x.shape[len(self.lengths) :]))
        values = jax.vmap(lambda x: self.values(x, columns, dtype))(runs)
        return jnp.reshape(values, (-1, *values.shape[2:]))


def reads_all(reads: Sequence[Read], row_shape: Sequence[Any]) -> bool:
    """Whether as many rows are read as there are, as far as the sizes are known."""
    n, num_rows = sum(read.num_rows_read for read in reads), math.prod(row_shape)
    return isinstance(n, int) and isinstance(num_rows, int) and n >= num_rows


def is_static(reads: Sequence[Read]) -> bool:
    """Whether the program itself says which rows are read."""
    return all(read.is_static for read in reads)


def values_of(
    reads: Sequence[Read], taps: Sequence[jax.Array], columns: Sequence[Any], dtype: Any
) -> list[jax.Array]:
    """The (n, D...) values of reads of one table, from the gradients of their taps.

    Where some differ between devices, those that do not are summed over devices already: they stay
    on one device only.
    """
    values = [read.all_values(tap, columns, dtype) for read, tap in zip(reads, taps, strict=True)]
    if len(values) == 1:
        return values
    varying = [varying_axes(jax.typeof(x)) for x in values]
    axes = {axis for over in varying for axis in over}
    return [
        _on_one_device(x, same) if (same := axes.difference(over)) else x
        for x, over in zip(values, varying, strict=True)
    ]


def _on_one_device(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x` on the first device along the axes, and zeros on all others."""
    is_first = jnp.asarray(True)
    for axis in axes:
        is_first = is_first & (jax.lax.axis_index(axis) == 0)
    return jnp.where(is_first, x, jnp.zeros_like(x))


def zeros_like(aval: Any) -> jax.Array:
    """Zeros of a type; negative ones if they have a sign."""
    zero = -0.0 if jnp.issubdtype(aval.dtype, jnp.inexact) else 0
    zeros = jax.lax.full(aval.shape, zero, aval.dtype, sharding=aval.sharding)
    if aval.sharding is None:
        return zeros
    inside = jax.sharding.get_abstract_mesh()
    return zeros if inside.empty else varying_like(aval, zeros)


def in_mesh_of(aval: Any) -> Any:
    """The context of a type's mesh: ``.at[ids].get(out_sharding=...)`` reads under another one than
    it is called in."""
    mesh = None if aval.sharding is None else aval.sharding.mesh
    if mesh is None or mesh == jax.sharding.get_abstract_mesh():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


class RowsOfTable(NamedTuple):
    """How an equation reads whole rows of a table.

    Attributes:
      indices: from the equation's inputs to int32 (n,).
      order: the axes of its output with the row axes first.
      is_static: whether the equation itself says which rows.
    """

    indices: Callable[..., jax.Array]
    order: tuple[int, ...]
    is_static: bool

    def read(self, site: tuple[Any, ...], table: int) -> Read:
        eqn = site[0]
        out, row_axes = eqn.outvars[0].aval, len(self.order) - len(eqn.invars[0].aval.shape) + 1
        n = math.prod(out.shape[i] for i in self.order[:row_axes])

        def values(x: jax.Array, columns: Sequence[Any], dtype: Any) -> jax.Array:
            return as_values(self.rows(x, columns), dtype)

        return Read(table, site, out, n, values, self.is_static)

    def rows(self, x: jax.Array, columns: Sequence[Any]) -> jax.Array:
        """The equation's output as (n, D...), with `columns` as the sharding of D."""
        row_axes = len(self.order) - len(columns)
        spec = dict(zip(self.order[row_axes:], columns, strict=True))
        x = replicated(x, [spec.get(i) for i in range(len(self.order))])
        x = jnp.transpose(x, self.order)
        return jnp.reshape(x, (math.prod(x.shape[:row_axes]), *x.shape[row_axes:]))

    def placed(self, rows: jax.Array, out: Any) -> jax.Array:
        """Rows (n, D...) as the equation's output, of type `out`."""
        x = jnp.reshape(rows, [out.shape[i] for i in self.order])
        x = jnp.transpose(x, [self.order.index(i) for i in range(len(self.order))])
        return replicated(x, out.sharding.spec)


def as_values(rows: jax.Array, dtype: Any) -> jax.Array:
    if jnp.iscomplexobj(rows) and not jnp.issubdtype(dtype, jnp.complexfloating):
        rows = rows.real  # the cotangent of a cast from real to complex
    return rows.astype(dtype)


def _gather(eqn: Any, shape: Sequence[int]) -> RowsOfTable | None:
    """``table[ids]`` and what `jax.vmap` makes of a `dynamic_slice`."""
    numbers, sizes, mode = (
        eqn.params[name] for name in ("dimension_numbers", "slice_sizes", "mode")
    )
    fill = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    if (
        tuple(sizes) != (1, *shape[1:])
        or tuple(numbers.collapsed_slice_dims) not in ((), (0,))
        or numbers.operand_batching_dims
        or 0 not in numbers.start_index_map
        # A whole row starts at column 0. "fill" alone would take another start for a miss.
        or (len(numbers.start_index_map) > 1 and fill)
    ):
        return None
    row = numbers.start_index_map.index(0)
    clip = mode == jax.lax.GatherScatterMode.CLIP
    rank = len(eqn.outvars[0].aval.shape)
    batch = [i for i in range(rank) if i not in numbers.offset_dims]

    def indices(operand: Any, starts: jax.Array) -> jax.Array:
        rows = replicated(starts)[..., row]
        return _as_indices(jnp.reshape(rows, (rows.size,)), shape[0], clip)

    return RowsOfTable(indices, (*batch, *numbers.offset_dims), is_static=False)


def _dynamic_slice(eqn: Any, shape: Sequence[int]) -> RowsOfTable | None:
    """``table[id]`` of a scalar."""
    if tuple(eqn.params["slice_sizes"]) != (1, *shape[1:]):
        return None

    def indices(operand: Any, row: jax.Array, *columns: Any) -> jax.Array:
        return _as_indices(jnp.reshape(replicated(row), (1,)), shape[0], clip=True)

    return RowsOfTable(indices, tuple(range(len(shape))), is_static=False)


def _slice(eqn: Any, shape: Sequence[int]) -> RowsOfTable | None:
    """``table[3]``."""
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    sizes = tuple(b - a for a, b in zip(start, limit, strict=True))
    if sizes != (1, *shape[1:]) or any(stride != 1 for stride in strides[1:]):
        return None

    def indices(operand: Any) -> jax.Array:
        return jnp.full((1,), start[0], jnp.int32)

    return RowsOfTable(indices, tuple(range(len(shape))), is_static=True)


# How an equation reads whole rows of its first operand, of this shape; None if it does not.
DIRECT_READS = {"gather": _gather, "dynamic_slice": _dynamic_slice, "slice": _slice}


def _as_indices(ids: jax.Array, num_rows: int, clip: bool) -> jax.Array:
    """int32 indices, those outside the table clipped or made padding."""
    ids = as_int32(ids, num_rows)
    if clip:
        return jnp.clip(ids, jnp.int32(0), jnp.int32(num_rows - 1))
    return jnp.where(ids < 0, jnp.int32(num_rows), ids)


def as_int32(ids: jax.Array, size: Any) -> jax.Array:
    """int32 positions along an axis. One that int32 does not hold is outside of the axis: it does
    not wrap into it."""
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)
    lowest = -1 if jnp.issubdtype(ids.dtype, jnp.signedinteger) else 0
    ids = jnp.clip(ids, jnp.asarray(lowest, ids.dtype), jnp.asarray(size, ids.dtype))
    return ids.astype(jnp.int32)


def replicated(x: jax.Array, spec: Sequence[Any] = ()) -> jax.Array:
    """`x` on every device, except for the axes in `spec`, if the mesh is explicit: the rows of
    several reads can be concatenated only if their shardings agree."""
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*spec))
    return x
