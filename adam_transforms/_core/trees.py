"""Paths, and leafwise work on gradient, parameter and slot trees with errors that name the leaf.

In a tree of gradients None is a leaf, "no gradient here", and so is a row gradient. Everywhere else
None is an empty subtree, as JAX has it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adam_transforms._core import dtypes
from adam_transforms._core.sparse_rows import SparseRows, on_values

# Between a variable of Flax NNX and its array.
_VALUE = jax.tree_util.GetAttrKey("value")


def is_leaf(x: Any) -> bool:
    """Makes `jax.tree` functions treat None and row gradients as leaves."""
    return x is None or isinstance(x, SparseRows)


def path_str(key_path: tuple[Any, ...]) -> str:
    """A key path as text: the keys joined by ``/``.

    A trailing ``value`` attribute, which Flax NNX puts between a variable and its array, is not
    part of the path: a model and its state write the same parameter alike.

    Args:
      key_path: what `jax.tree_util.tree_flatten_with_path` gives for a leaf.

    >>> import jax
    >>> tree = {"encoder": [{"kernel": 1.0}]}
    >>> [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    ['encoder/0/kernel']
    """
    if key_path and key_path[-1] == _VALUE:
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def joined(*paths: str) -> str:
    """The path to what is at the last of `paths`, each of them leading on from the one before; a
    lone leaf, or the tree itself, has an empty one."""
    return "/".join(path for path in paths if path)


def flatten_with_paths(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """[(path, leaf), ...] and the structure, None being a leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_str(path), leaf) for path, leaf in leaves], treedef


def non_none(tree: Any) -> list[tuple[str, Any]]:
    """[(path, leaf), ...] of the leaves that are not None."""
    return [(path, leaf) for path, leaf in flatten_with_paths(tree)[0] if leaf is not None]


def is_array(x: Any) -> bool:
    """Whether `x` has a shape and a dtype, or is a number."""
    return (hasattr(x, "shape") and hasattr(x, "dtype")) or isinstance(x, int | float | complex)


def shape_of(x: Any) -> tuple[int, ...]:
    """As `jnp.shape`; takes abstract arrays and row gradients too."""
    return tuple(getattr(x, "shape", ()))


def dtype_of(x: Any) -> Any:
    """As `jnp.result_type`; takes PRNG keys and row gradients too."""
    return x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)


def children(node: Any) -> list[tuple[Any, Any]]:
    """[(key, child), ...]; of a leaf none."""
    if is_leaf(node):
        return []
    # What is a leaf to this is found under an empty key path.
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(keys[0], child) for keys, child in found if keys]


def unwrapped(tree: Any, of: Callable[[Any], bool] = lambda x: True) -> Any:
    """`tree` with what they hold in place of the variables of Flax NNX, where it has any that hold
    something of which `of` is true."""

    def is_variable(x: Any) -> bool:
        below = children(x)
        return len(below) == 1 and below[0][0] == _VALUE and of(below[0][1])

    return jax.tree.map(
        lambda x: children(x)[0][1] if is_variable(x) else x,
        tree,
        is_leaf=lambda x: is_leaf(x) or is_variable(x),
    )


def wrapped_as(like: Any, tree: Any) -> Any:
    """`tree` with variables where `like` has them, if the two differ in nothing else; else `tree`
    itself."""
    plain, wanted = (jax.tree.structure(unwrapped(x), is_leaf=is_leaf) for x in (tree, like))
    if plain != wanted:
        return tree
    treedef = jax.tree.structure(like, is_leaf=is_leaf)
    return treedef.unflatten(jax.tree.leaves(tree, is_leaf=is_leaf))


def align(tree: Any, *others: Any, names: Sequence[str]) -> tuple[list[tuple[Any, ...]], Any]:
    """Lays trees of one structure side by side.

    Args:
      tree: the tree whose structure counts; None is a leaf in it.
      others: trees of that structure; anywhere None may stand for a leaf.
      names: what `tree` and each of `others` is called in an error.

    Returns:
      ([(path, leaf, *leaves of the others), ...], structure).

    Raises:
      ValueError: structure or shape differs; names the path.
    """
    leaves, treedef = flatten_with_paths(tree)
    columns = []
    for other, name in zip(others, names[1:], strict=True):
        try:
            column = treedef.flatten_up_to(other)
        except (ValueError, TypeError) as error:
            difference = _structure_difference(leaves, other, names[0], name) or str(error)
            raise ValueError(
                f"the structure of {name} differs from that of {names[0]}: {difference}"
            ) from None
        for (path, leaf), x in zip(leaves, column, strict=True):
            if x is None:
                continue
            is_tree = not hasattr(x, "shape") and not jax.tree_util.all_leaves([x])
            if is_tree and (leaf is not None or jax.tree.leaves(x)):
                raise ValueError(
                    f"{path!r} is {'None' if leaf is None else 'an array'} in {names[0]}, "
                    f"but a tree in {name}"
                )
            if leaf is not None and getattr(x, "shape", ()) != getattr(leaf, "shape", ()):
                raise ValueError(
                    f"{path!r} has shape {list(shape_of(leaf))} in {names[0]}, "
                    f"but {list(shape_of(x))} in {name}"
                )
        columns.append(column)
    return [(*leaf, *rest) for leaf, *rest in zip(leaves, *columns, strict=True)], treedef


def _structure_difference(leaves: Any, other: Any, name: str, other_name: str) -> str | None:
    """The first path that only one of the two trees has."""
    ours = [path for path, _ in leaves]
    theirs = [path for path, _ in flatten_with_paths(other)[0]]
    for paths, name_of_these, those in ((ours, name, theirs), (theirs, other_name, ours)):
        only = next((path for path in paths if path not in those), None)
        if only is not None:
            return f"{only!r} is only in {name_of_these}"
    return None


def map_leaves(
    fn: Callable[..., Any],
    updates: Any,
    *others: Any,
    names: Sequence[str] = (),
    outputs: int = 1,
    rows: bool = False,
) -> Any:
    """``fn(path, gradient, *other_leaves)`` at every leaf of `updates` that has a gradient.

    Args:
      fn: returns one array, or a tuple of `outputs` of them.
      updates: gradients. Where a leaf is None, so is the first output; the other outputs are the
        leaves of the first of `others`, untouched.
      others: trees of the same structure and shapes as `updates`, e.g. slots.
      names: what each of `others` is called in an error.
      outputs: how many trees to return.
      rows: whether `fn` takes row gradients too.

    Returns:
      A tree, or a tuple of `outputs` trees.

    Raises:
      ValueError: structure or shape differs; names the path.
      TypeError: a gradient is not a floating or complex array; names the path.
    """
    aligned, treedef = align(updates, *others, names=("the updates", *names))
    results = []
    for path, leaf, *rest in aligned:
        if leaf is None:
            results.append((None, *rest[: outputs - 1]))
            continue
        for other, name in zip(rest, names, strict=True):
            if other is None:
                raise ValueError(f"{path!r} has an update, but is None in {name}")
        if not (rows and isinstance(leaf, SparseRows)):
            leaf = as_gradient(path, leaf)
        result = fn(path, leaf, *rest)
        results.append((result,) if outputs == 1 else result)
    trees = unzip(results, treedef, outputs)
    return trees[0] if outputs == 1 else trees


def unzip(results: list[tuple[Any, ...]], treedef: Any, outputs: int) -> tuple[Any, ...]:
    """From the `outputs` results at each leaf to a tree of each."""
    return tuple(treedef.unflatten([result[i] for result in results]) for i in range(outputs))


def as_gradient(path: str, leaf: Any) -> jax.Array:
    """A gradient leaf as an array of a floating or complex dtype."""
    if isinstance(leaf, SparseRows):
        raise TypeError(
            f"{path!r} has a row gradient (SparseRows), but this transformation needs dense "
            "arrays: put it inside lazy(...) (for adam: lazy_adam, or deferred_adam), or make the "
            "gradients dense with to_dense"
        )
    dtype = jnp.result_type(leaf) if hasattr(leaf, "dtype") or isinstance(leaf, float) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"the update of {path!r} must be a floating or complex array (or None, to leave the "
            f"parameter as it is), got {dtype or type(leaf).__name__}"
        )
    return jnp.asarray(leaf)


def as_gradients(updates: Any) -> Any:
    """`updates`, every leaf that is no row gradient checked to be a gradient and made an array."""
    return map_leaves(lambda path, g: g, updates, rows=True)


def in_update_dtype(updates: Any, gradients: Any, params: Any = None) -> Any:
    """Each update in the dtype that updates have everywhere: the promotion of the gradient's and
    the parameter's (of the gradient's alone without `params`)."""

    def leaf(path: str, u: Any, g: Any, p: Any) -> Any:
        dtype = dtypes.promote(*(getattr(x, "dtype", x) for x in (g, p)))
        return on_values(lambda u: u.astype(dtype), u)

    likes = gradients if params is None else params
    names = ("the gradient", "the parameter")
    return map_leaves(leaf, updates, gradients, likes, names=names, rows=True)


def zeros_like(tree: Any, dtype_of: Callable[[Any], Any]) -> Any:
    """Zeros shaped and sharded like each leaf, in the dtype that `dtype_of(leaf's dtype)` says.

    Leaves may be abstract (`jax.ShapeDtypeStruct`).
    """
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype_of(jnp.result_type(p))), tree)


def zeros_per_row(table: Any, dtype: Any) -> jax.Array:
    """Zeros (V,) for a table (V, D...), sharded as its rows are."""
    is_traced = isinstance(table, Tracer)
    sharding = jax.typeof(table).sharding if is_traced else getattr(table, "sharding", None)
    rows = table.shape[:1]
    if not isinstance(sharding, NamedSharding):
        return jnp.zeros_like(table, dtype, shape=rows)
    if is_traced and AxisType.Explicit not in sharding.mesh.axis_types:
        return jnp.zeros(rows, dtype)  # XLA shards it
    spec = PartitionSpec(*sharding.spec[:1])
    return jax.lax.full(rows, 0, dtype, sharding=NamedSharding(sharding.mesh, spec))


def find_states(state: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Every state of type `kind` (or of one of these types) in an optimizer state, however deep it
    is nested."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in found if isinstance(x, kind)]
