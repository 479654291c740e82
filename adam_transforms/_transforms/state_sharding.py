"""Optimizer states that take less memory on each device than the parameters do."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adam_transforms._core import arguments, trees
from adam_transforms._core.sparse_rows import is_rows


def shard_slots(
    inner: optax.GradientTransformation, mesh: Mesh, axis: str | Sequence[str] = "data"
) -> optax.GradientTransformationExtraArgs:
    """Shards the slots of replicated parameters over the devices of a data axis (ZeRO stage 1).

    Each device keeps one part of every slot, moves the parameters' part that belongs to it, and
    gets the other parts of the update from the others. That is the memory of the slots divided by
    the number of devices, for as much traffic as an all-reduce of the gradients has anyway: XLA
    can make of this and the gather of the updates a reduce-scatter and an all-gather.

    Args:
      inner: any transformation.
      mesh: the mesh that the parameters are on, with Explicit or Auto axes.
      axis: the name of the axis, or of several, over which the parameters are replicated.

    Returns:
      A transformation whose state is `inner`'s. A slot is sharded over its longest dimension of
      those that the number of devices divides; one without any stays replicated, as do scalars
      and whatever else does not mirror a parameter. Row gradients pass as they are: their tables
      are best sharded themselves.

    Raises:
      ValueError: the mesh has no such axis. TypeError: it is no `jax.sharding.Mesh`.

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
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"axis must be of the mesh, {tuple(mesh.shape)}, got {name!r}")
    devices = math.prod(mesh.shape[name] for name in axes)
    explicit = AxisType.Explicit in mesh.axis_types

    def written(spec: list[Any]) -> PartitionSpec:
        """As `jax.jit` writes the shardings of its results: any other way compiles it again."""
        while spec and spec[-1] is None and not explicit:
            spec = spec[:-1]
        return PartitionSpec(*spec)

    def parts(shape: tuple[int, ...]) -> PartitionSpec:
        divided = [i for i, size in enumerate(shape) if size and size % devices == 0]
        longest = max(divided, key=lambda i: shape[i], default=None)
        name = axes[0] if len(axes) == 1 else axes
        return written([name if i == longest else None for i in range(len(shape))])

    def place(x: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        x = jnp.asarray(x)
        if not isinstance(x, Tracer):
            return jax.device_put(x, sharding)
        if explicit:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def in_parts(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x if is_rows(x) else place(x, parts(jnp.shape(x))), tree, is_leaf=is_rows
        )

    def slots_in_parts(state: Any, like: Any) -> Any:
        shapes = {x.shape if is_rows(x) else jnp.shape(x) for _, x in _leaves(like)}
        shapes.discard(())
        return jax.tree.map(
            lambda x: place(x, parts(x.shape)) if jnp.shape(x) in shapes else x, state
        )

    def init(params: Any) -> Any:
        return slots_in_parts(inner.init(in_parts(params)), params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        own = None if params is None else in_parts(params)
        new, state = inner.update(in_parts(updates), state, own, **extra_args)
        whole = jax.tree.map(
            lambda u: u if is_rows(u) else place(u, written([None] * u.ndim)),
            new,
            is_leaf=is_rows,
        )
        return whole, slots_in_parts(state, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path, x) for path, x in trees.flatten_with_paths(tree)[0] if x is not None]
