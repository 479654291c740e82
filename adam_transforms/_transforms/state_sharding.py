"""Sharding the optimizer state of replicated parameters."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adam_transforms._core import arguments, trees
from adam_transforms._core.slots import owners
from adam_transforms._core.sparse_rows import is_rows
from adam_transforms._core.types import Params, State, Updates


def shard_slots(
    inner: optax.GradientTransformation, mesh: Mesh, axis: str | Sequence[str] = "data"
) -> optax.GradientTransformationExtraArgs:
    """Shards the slots of replicated parameters over the devices of a data axis (ZeRO stage 1).

    Each device keeps one part of every slot, computes that part of the update, and receives the
    other parts from the other devices. The memory of the slots is divided by the number of devices.
    The traffic is that of an all-reduce of the gradients, which is needed anyway: XLA can turn it
    and the gather of the updates into a reduce-scatter and an all-gather.

    Args:
      inner: any transformation.
      mesh: the mesh of the parameters, with Explicit or Auto axes.
      axis: the name of the axis, or names of the axes, over which the parameters are replicated.

    Returns:
      A transformation with the state of `inner`. A slot is sharded over the longest of the
      dimensions that are multiples of the number of devices. A slot without such a dimension, a
      scalar, or any other array that mirrors no parameter is replicated. Row gradients are passed
      on unchanged: shard their tables instead.

    Raises:
      ValueError: the mesh has no such axis.
      TypeError: `mesh` is not a `jax.sharding.Mesh`.

    References:
      Rajbhandari et al., `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020.

    >>> import jax, jax.numpy as jnp
    >>> from adam_transforms import adam
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> state = shard_slots(adam(1e-3), mesh).init({"w": jnp.ones((4, 8))})
    >>> tuple(state[0].mu["w"].sharding.spec)
    (None, 'data')
    """
    inner = arguments.transformation("inner", inner)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r:.200}")
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"axis must be of the mesh, {tuple(mesh.shape)}, got {name!r}")
    devices = math.prod(mesh.shape[name] for name in axes)
    is_explicit = AxisType.Explicit in mesh.axis_types

    def make_spec(entries: list[Any]) -> PartitionSpec:
        """The form in which `jax.jit` returns shardings; any other form causes a recompilation."""
        while entries and entries[-1] is None and not is_explicit:
            entries = entries[:-1]
        return PartitionSpec(*entries)

    def sharded_spec(shape: tuple[int, ...]) -> PartitionSpec:
        divisible = [i for i, size in enumerate(shape) if size and size % devices == 0]
        longest = max(divisible, key=lambda i: shape[i], default=None)
        name = axes[0] if len(axes) == 1 else axes
        return make_spec([name if i == longest else None for i in range(len(shape))])

    def reshard(x: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        x = jnp.asarray(x)
        if not isinstance(x, Tracer):
            return jax.device_put(x, sharding)
        if is_explicit:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def shard(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x if is_rows(x) else reshard(x, sharded_spec(jnp.shape(x))),
            tree,
            is_leaf=is_rows,
        )

    def replicate(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x if is_rows(x) else reshard(x, make_spec([None] * x.ndim)),
            tree,
            is_leaf=is_rows,
        )

    def shard_state(state: State, params: Params) -> State:
        parameter_of = owners(params, state)
        shapes = {path: trees.shape_of(x) for path, x in trees.non_none(params)}

        def shard_slot(keys: tuple[Any, ...], x: Any) -> Any:
            parameter = parameter_of.get(trees.path_str(keys))
            shape = () if parameter is None else shapes[parameter]
            return reshard(x, sharded_spec(shape)) if shape and jnp.shape(x) == shape else x

        return jax.tree_util.tree_map_with_path(shard_slot, state)

    def init(params: Params) -> State:
        return shard_state(inner.init(shard(params)), params)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        likes = updates if params is None else params
        params = None if params is None else shard(params)
        updates, state = inner.update(shard(updates), state, params, **extra_args)
        return replicate(updates), shard_state(state, likes)

    return optax.GradientTransformationExtraArgs(init, update)
