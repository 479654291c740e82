"""Running a jaxpr with a zero array, a *tap*, added to every read of a table's rows.

The gradient of a tap is the gradient of the rows read there.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._embeddings.lookups import CAST, KEPT, Read, all_reads
from adam_transforms._xla.jaxprs import (
    CHECKPOINTS,
    Literal,
    open_jaxpr,
    run_equation,
    run_equations,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "read_now"],
    meta_fields=["casts"],
)
@dataclasses.dataclass(frozen=True)
class TracedTable:
    """A table traced through the jaxpr, with the casts and deferred updates to apply to the
    gathered rows.

    Attributes:
      table: the array.
      read_now: of a deferred table, the function of `current_rows`; None of any other.
      casts: the dtypes to cast the rows to, one after the other. XLA would store the whole table
        once more, were it cast and then read twice.
    """

    table: Any
    read_now: Any = None
    casts: tuple[Any, ...] = ()

    def cast(self, x: jax.Array) -> jax.Array:
        for dtype in self.casts:
            x = jax.lax.convert_element_type(x, dtype)
        return x

    def whole(self) -> jax.Array:
        """All of the table, synchronized and cast."""
        return self.cast(self.table if self.read_now is None else self.read_now(self.table, None))

    def synchronize(self, read: Read, x: jax.Array, indices: jax.Array) -> jax.Array:
        """`x`, which was read from the table, with the pending updates of its rows applied."""
        rows = SparseRows(indices, jnp.zeros((indices.size, 0)), self.table.shape[0])
        now = jax.tree.map(_in_this_mesh, self.read_now)(self.table, rows)
        exists = jnp.reshape(rows.is_valid, (-1, *[1] * (now.ndim - 1)))
        return jnp.where(read.placed(jnp.broadcast_to(exists, now.shape)), read.placed(now), x)


def run_with_taps(
    jaxpr: Any,
    consts: Sequence[Any],
    actions: Sequence[Any],
    inputs: Sequence[Any],
    taps: list[Any],
) -> tuple[list[Any], list[jax.Array]]:
    """Runs a jaxpr, adding the first of `taps` to its first read and so on.

    Args:
      actions: of `follow`.
      inputs: arrays, and a `TracedTable` for each deferred table.

    Returns:
      Its outputs, and the indices of each of its reads.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    read = lambda x: env[x].whole() if isinstance(env[x], TracedTable) else env[x]  # noqa: E731
    indices: list[jax.Array] = []
    pairs = zip(jaxpr.eqns, actions, strict=True)
    for is_plain, group in itertools.groupby(pairs, lambda pair: pair[1] is None):
        if is_plain:
            env |= run_equations(jaxpr, [eqn for eqn, _ in group], read)
            continue
        for eqn, action in group:
            values = [x.val if isinstance(x, Literal) else env[x] for x in eqn.invars]
            outputs, found = _run_action(jaxpr, eqn, action, values, taps[len(indices) :])
            env |= zip(eqn.outvars, outputs, strict=True)
            indices += found
    outputs = [x.val if isinstance(x, Literal) else read(x) for x in jaxpr.outvars]
    return outputs, indices


def _run_action(
    jaxpr: Any, eqn: Any, action: Any, values: Sequence[Any], taps: list[Any]
) -> tuple[Sequence[Any], list[jax.Array]]:
    """One equation that reads a table, or passes one on: its outputs, and the indices of its
    reads."""
    if isinstance(action, list):
        return _call(eqn, action, values, taps)
    tables = [x if isinstance(x, TracedTable) else TracedTable(x) for x in values]
    table, *ids = tables[0], *values[1:]
    if action is CAST:
        casts = (*table.casts, eqn.outvars[0].aval.dtype)
        return [dataclasses.replace(table, casts=casts)], []
    if action is KEPT:
        kept = run_equation(jaxpr, eqn, [x.table for x in tables])
        return [dataclasses.replace(of, table=x) for x, of in zip(kept, tables, strict=False)], []
    with action.mesh():
        rows = action.indices(table.table, *ids)
        (read,) = run_equation(jaxpr, eqn, [table.table, *ids])
        if table.read_now is not None:
            read = table.synchronize(action, read, rows)
        if table.casts:
            read = table.cast(read)
        read = read + taps[0]
    return [read], [rows]


def _call(eqn: Any, actions: Sequence[Any], values: Sequence[Any], taps: list[Any]) -> Any:
    """The body of a call with reads in it; a checkpointed body stays checkpointed."""
    body, consts = open_jaxpr(eqn.params["jaxpr"])

    def run(values: Sequence[Any], taps: list[Any]) -> Any:
        return run_with_taps(body, consts, actions, values, taps)

    if eqn.primitive.name in CHECKPOINTS:
        params = eqn.params
        run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return run(values, taps[: len(all_reads(actions))])


def _in_this_mesh(x: jax.Array) -> jax.Array:
    """`x` as an array of the context's mesh, which differs where part of a program leaves sharding
    to XLA."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or getattr(jax.typeof(x).sharding, "mesh", mesh) == mesh:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
