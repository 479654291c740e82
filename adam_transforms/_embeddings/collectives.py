"""Row gradients summed over devices."""

from collections.abc import Sequence
from typing import Any

import jax

from adam_transforms._core.sparse_rows import is_rows, on_values


def all_reduce_rows(grads: Any, axis_name: Any, *, average: bool = False) -> Any:
    r"""The sum of all devices' gradients, with row gradients kept as rows.

    .. math:: G = \sum_{d} G_d \quad\text{or, with average,}\quad \frac{1}{N} \sum_{d=1}^{N} G_d

    Takes the place of `jax.lax.psum` or `jax.lax.pmean` inside `jax.pmap` and `jax.shard_map`,
    between the gradients and the optimizer.

    Args:
      grads: the device's gradients: a tree of `SparseRows`, arrays and None.
      axis_name: the mapped axis, or several.
      average: divide by the number N of devices along the axes.

    Returns:
      The tree, equal on every device. A `SparseRows` of n rows becomes one of N n rows, not unique:
      the rows of all devices, concatenated, in O(N n) time and memory, whatever V. None stays None,
      and dtypes stay.

    Raises:
      NameError: no axis of that name is mapped.

    With ``check_vma=True``, the default, `jax.shard_map` tracks which values vary over devices, and
    `jax.grad` itself sums the gradient of a value that does not vary. Such a gradient is not summed
    again, only divided by N with `average`. By its type, the result does not vary over the axes.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import SparseRows
    >>> def reduced(indices):
    ...     rows = all_reduce_rows(SparseRows(indices, jnp.ones((1, 1)), num_rows=4), "devices")
    ...     return rows.to_dense()[:, 0]
    >>> jax.vmap(reduced, axis_name="devices")(jnp.array([[3], [1], [3]]))[0].tolist()
    [0.0, 1.0, 0.0, 2.0]
    """
    axes = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    devices = jax.lax.axis_size(axes)
    tracked = bool(varying_axes(jax.typeof(jax.lax.axis_index(axes))))

    def reduce(x: Any) -> Any:
        over = axes
        if tracked:
            varying = {a for leaf in jax.tree.leaves(x) for a in varying_axes(jax.typeof(leaf))}
            over = tuple(axis for axis in axes if axis in varying)
        if over and is_rows(x):
            x = x.with_rows(
                _all_gather(x.indices, over, tracked), _all_gather(x.values, over, tracked)
            )
        elif over:
            x = jax.lax.psum(x, over)
        return on_values(lambda values: values / devices, x) if average else x

    return jax.tree.map(reduce, grads, is_leaf=is_rows)


def _all_gather(x: jax.Array, axes: tuple[str, ...], tracked: bool) -> jax.Array:
    """`x` of all devices, concatenated along axis 0; its type does not vary over the axes."""
    if not tracked:
        return jax.lax.all_gather(x, axes, tiled=True)
    x = as_varying(x, axes)
    if hasattr(jax.lax, "all_gather_invariant"):  # its first name
        return getattr(jax.lax, "all_gather_invariant")(x, axes, tiled=True)  # noqa: B009
    return jax.lax.all_gather(x, axes, tiled=True, to="invarying")


def varying_axes(aval: Any) -> tuple[str, ...]:
    """The mesh axes that an array of this type varies over, as far as JAX tracks it."""
    if hasattr(aval, "vma"):  # its first name
        return tuple(aval.vma)
    return tuple(aval.manual_axis_type.varying)


def varying_like(aval: Any, x: jax.Array) -> jax.Array:
    """`x` with a type that varies over the axes that `aval` varies over too."""
    axes = varying_axes(aval)
    return as_varying(x, axes) if axes else x


def varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays with types that all vary over the same axes."""
    axes = [axis for x in arrays for axis in varying_axes(jax.typeof(x))]
    return [as_varying(x, [*dict.fromkeys(axes)]) for x in arrays]


def as_varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`x` with a type that varies over `axes` too."""
    axes = tuple(axis for axis in axes if axis not in varying_axes(jax.typeof(x)))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return getattr(jax.lax, "pvary")(x, axes)  # noqa: B009
