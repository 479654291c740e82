"""Bodies of `jax.shard_map` in which tables are read.

A table goes in as before, and each device reads its rows. The taps have one more axis, of the
devices; the indices of all devices are concatenated.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adam_transforms._embeddings.collectives import varying_axes
from adam_transforms._embeddings.reads.direct import Read
from adam_transforms._embeddings.reads.program import Program, Scope, Value, body_of
from adam_transforms._embeddings.reads.selection import NotByRow
from adam_transforms._xla.jaxprs import Literal, open_jaxpr


class ShardMap(NamedTuple):
    """A body that each device runs.

    Attributes:
      axes: for each read of the body the mesh axes over which the rows read differ.
    """

    scope: Scope
    eqn: Any
    program: Program
    axes: list[tuple[str, ...]]
    reads: list[Read]
    whole_outside: tuple[Value, ...] = ()  # all that it uses goes into it

    def run(self, runner: Any, taps: Sequence[jax.Array]) -> Any:
        params, body = self.eqn.params, self.program.scope
        inputs = [runner.array(self.scope.value(x)) for x in self.eqn.invars]
        variables, in_specs = body.jaxpr.invars, params["in_specs"]
        spec_of = {runner.table(Value(body, x)): i for i, x in enumerate(variables)}

        def run(inputs: Sequence[Any], taps: Sequence[jax.Array]) -> Any:
            inner = runner.inside()
            for x, value in zip(variables, inputs, strict=True):
                inner.set(Value(body, x), value)
            taps = [tap[0] if axes else tap for tap, axes in zip(taps, self.axes, strict=True)]
            outputs, found = inner.run(self.program, taps)
            indices = []
            for index, read in zip(found, self.program.reads, strict=True):
                i = spec_of[read.table]
                local_rows = variables[i].aval.shape[0]
                num_rows = runner.num_rows(read.table)
                indices.append(_of_whole_table(index, in_specs[i], local_rows, num_rows))
            return outputs, indices

        rows = [PartitionSpec(axes) if axes else PartitionSpec() for axes in self.axes]
        mapped = _mapped(run, params, ([*in_specs], rows), ([*params["out_specs"]], rows))
        outputs, indices = mapped(inputs, [*taps])
        values = [self.scope.value(x) for x in self.eqn.outvars]
        return [*zip(values, outputs, strict=True)], indices


def shard_map(plan: Any, scope: Scope, eqn: Any) -> ShardMap:
    params = eqn.params
    jaxpr, _ = open_jaxpr(params["jaxpr"])
    tables: dict[Any, int] = {}
    for x, atom, spec in zip(jaxpr.invars, eqn.invars, params["in_specs"], strict=True):
        value = scope.value(atom)
        state = None if isinstance(atom, Literal) else scope.states.get(atom)
        if state is None or not state.is_needed:
            continue
        table = plan.table_of.get(value)
        if table is None:
            raise NotByRow("what goes into it is computed from the array")
        if table in plan.one_row_axis:
            raise NotByRow("rows of a deferred table are not read in it")
        if any(part is not None for part in spec[1:]) or table in tables.values():
            raise NotByRow("rows of the array are split over devices, or it goes in twice")
        if spec and spec[0] is not None and len(x.aval.shape) > 2:
            raise NotByRow("the array is split over devices, and may be a stack of tables")
        tables[x] = table

    def bind(body: Scope) -> None:
        for x, table in tables.items():
            plan.add_table(Value(body, x), table)

    wanted = [x in scope.needed for x in eqn.outvars]

    def in_mesh(compute: Callable[[], Any]) -> Any:
        # What it returns is of no interest.
        return _mapped(lambda: (compute(), ())[1], params, (), ())()

    with plan.inside_of(in_mesh):
        program = body_of(
            plan, params["jaxpr"], wanted, [False] * len(wanted), (eqn, *scope.calls), bind
        )
    axes = [_axes_of(read, params) for read in program.reads]
    devices = params["mesh"].shape
    reads = [
        read.in_mesh([math.prod(devices[axis] for axis in over)] if over else [])
        for read, over in zip(program.reads, axes, strict=True)
    ]
    return ShardMap(scope, eqn, program, axes, reads)


def _mapped(fun: Callable[..., Any], params: Any, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` with the parameters of an equation."""
    return jax.shard_map(
        fun,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=params["check_vma"],
        axis_names=_manual_axes(params),
    )


def _manual_axes(params: Any) -> frozenset[str]:
    return params.get("newly_manual_axes") or params["manual_axes"]  # its first name


def _axes_of(read: Read, params: Any) -> tuple[str, ...]:
    """The mesh axes over which the rows of a read differ, or may differ."""
    axes = _manual_axes(params)
    if params["check_vma"]:
        axes = axes.intersection(varying_axes(read.tap_type))
    return tuple(axis for axis in params["mesh"].axis_names if axis in axes)


def _of_whole_table(
    index: jax.Array, spec: PartitionSpec, local_rows: int, num_rows: int
) -> jax.Array:
    """Indices in a device's rows of a table as indices in the whole table."""
    if not spec or spec[0] is None:
        return index
    first = jax.lax.axis_index(spec[0]) * local_rows
    return jnp.where(index < local_rows, first + index, num_rows)
