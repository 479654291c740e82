"""Where a program reads the rows of a table.

`follow` goes through a jaxpr, equation by equation, from the tables among its inputs to the
equations that read their rows (`_READS`). `taps` runs the jaxpr again by the actions found here.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._embeddings.collectives import varying_like
from adam_transforms._xla.jaxprs import CALLS, CHECKPOINTS, Literal, open_jaxpr

# Operations that return each operand with its rows unchanged; `stop_gradient` is not among them.
_KEEP_ROWS = {
    "copy",
    "copy_p",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reshard",
    "sharding_constraint",
}


class Read(NamedTuple):
    """An equation that reads n rows of a table."""

    table: int  # the position of the table among the leaves
    aval: Any  # of the equation's output
    indices: Callable[..., jax.Array]  # from the equation's inputs to int32 (n,)
    # From an array like `aval`, the sharding of D and a dtype to (n, D...).
    values: Callable[..., jax.Array]
    placed: Callable[[jax.Array], jax.Array]  # from (n, D...) to an array like `aval`

    def tap(self) -> jax.Array:
        """Zeros to add to it. Negative ones: x + -0.0 is x, even if that is -0.0."""
        with self.mesh():
            zeros = jax.lax.full(
                self.aval.shape, -0.0, self.aval.dtype, sharding=self.aval.sharding
            )
        inside = jax.sharding.get_abstract_mesh()
        return zeros if inside.empty else varying_like(self.aval, zeros)

    def mesh(self) -> Any:
        """The context of its mesh: ``.at[ids].get(out_sharding=...)`` reads under another one than
        it is called in."""
        mesh = self.aval.sharding.mesh
        if mesh == jax.sharding.get_abstract_mesh():
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(mesh)


# `follow` returns one action for each equation: None (run it unchanged), a `Read`, CAST or KEPT
# (the output is the table, cast or unchanged), or a list (the actions of the jaxpr that it calls).
CAST, KEPT = "cast", "kept"


def follow(
    jaxpr: Any, inputs: Sequence[int | None], other_uses: dict[int, str]
) -> tuple[list[Any], list[int | None]]:
    """The actions of a jaxpr with tables among its inputs, and which of its outputs are tables.

    Args:
      inputs: for each input the table that it is, or None.
      other_uses: gets, for each table, the first operation that uses it other than by rows.
    """
    table_of: dict[Any, int | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    actions: list[Any] = []
    for eqn in jaxpr.eqns:
        tables = [None if isinstance(x, Literal) else table_of.get(x) for x in eqn.invars]
        name = eqn.primitive.name
        action, outputs = None, []
        if all(table is None for table in tables) or name == "stop_gradient":
            pass
        elif name in _KEEP_ROWS:
            action, outputs = KEPT, tables[: len(eqn.outvars)]
        elif name == "convert_element_type" and _is_inexact(eqn.outvars[0].aval):
            action, outputs = CAST, tables
        elif name in CALLS | CHECKPOINTS:
            action, outputs = follow(open_jaxpr(eqn.params["jaxpr"])[0], tables, other_uses)
        elif tables[0] is not None and not any(t is not None for t in tables[1:]):
            action = _as_read(eqn, tables[0])
            if action is None:
                other_uses.setdefault(tables[0], name)
        else:
            for table in tables:
                if table is not None:
                    other_uses.setdefault(table, name)
        actions.append(action)
        table_of.update(zip(eqn.outvars, outputs, strict=False))
    return actions, [None if isinstance(x, Literal) else table_of.get(x) for x in jaxpr.outvars]


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def all_reads(actions: Sequence[Any]) -> list[Read]:
    """The reads, in the order of the program."""
    reads = []
    for action in actions:
        if isinstance(action, Read):
            reads.append(action)
        elif isinstance(action, list):
            reads += all_reads(action)
    return reads


def _as_read(eqn: Any, table: int) -> Read | None:
    """The equation as a read of whole rows of its first operand; None if it is no such read."""
    operand, out = eqn.invars[0].aval, eqn.outvars[0].aval
    parsed = _READS.get(eqn.primitive.name, lambda eqn, shape: None)(eqn, operand.shape)
    if parsed is None:
        return None
    indices, order = parsed
    width = operand.shape[1:]
    n = math.prod(out.shape[i] for i in order[: len(order) - len(width)])

    def values(x: jax.Array, columns: Sequence[Any], dtype: Any) -> jax.Array:
        if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
            x = x.real  # the cotangent of a cast from real to complex
        axes = dict(zip(order[len(order) - len(columns) :], columns, strict=True))
        x = replicated(x, [axes.get(i) for i in range(len(order))])
        return jnp.reshape(jnp.transpose(x, order), (n, *width)).astype(dtype)

    def placed(x: jax.Array) -> jax.Array:
        x = jnp.reshape(x, [out.shape[i] for i in order])
        x = jnp.transpose(x, [order.index(i) for i in range(len(order))])
        return replicated(x, out.sharding.spec)

    return Read(table, out, indices, values, placed)


def _gather(eqn: Any, shape: Sequence[int]) -> Any:
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

    return indices, (*batch, *numbers.offset_dims)


def _dynamic_slice(eqn: Any, shape: Sequence[int]) -> Any:
    """``table[id]`` of a scalar."""
    if tuple(eqn.params["slice_sizes"]) != (1, *shape[1:]):
        return None

    def indices(operand: Any, row: jax.Array, *columns: Any) -> jax.Array:
        return _as_indices(jnp.reshape(replicated(row), (1,)), shape[0], clip=True)

    return indices, tuple(range(len(shape)))


def _slice(eqn: Any, shape: Sequence[int]) -> Any:
    """``table[3]``."""
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    sizes = tuple(b - a for a, b in zip(start, limit, strict=True))
    if sizes != (1, *shape[1:]) or any(stride != 1 for stride in strides[1:]):
        return None
    return lambda operand: jnp.full((1,), start[0], jnp.int32), tuple(range(len(shape)))


# The accepted reads: from an equation and the table's shape to (the function from its inputs to
# indices, the axes of its output with the row axes first), or None if it reads no whole rows.
_READS = {"gather": _gather, "dynamic_slice": _dynamic_slice, "slice": _slice}


def _as_indices(ids: jax.Array, num_rows: int, clip: bool) -> jax.Array:
    """int32 indices, those outside the table clipped or made padding."""
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)
    # Before the cast: a 64-bit id must not wrap into the table.
    lowest = -1 if jnp.issubdtype(ids.dtype, jnp.signedinteger) else 0
    ids = jnp.clip(ids, jnp.asarray(lowest, ids.dtype), jnp.asarray(num_rows, ids.dtype))
    ids = ids.astype(jnp.int32)
    if clip:
        return jnp.clip(ids, jnp.int32(0), jnp.int32(num_rows - 1))
    return jnp.where(ids < 0, jnp.int32(num_rows), ids)


def replicated(x: jax.Array, spec: Sequence[Any] = ()) -> jax.Array:
    """`x` on every device, except for the axes in `spec`, if the mesh is explicit: the rows of
    several reads can be concatenated only if their shardings agree."""
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*spec))
    return x
