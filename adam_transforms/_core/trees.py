"""Paths, and leafwise functions of trees of gradients, parameters and slots.

In a tree of gradients None ("no gradient") and row gradients are leaves. In any other tree None is
an empty subtree, as in JAX. Errors name the path of the leaf.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adam_transforms._core import dtypes
from adam_transforms._core.sparse_rows import SparseRows, on_values, refuse_batch
from adam_transforms._core.types import Params, Path, State, Updates

# The key from a variable of Flax NNX to its array.
_VALUE = jax.tree_util.GetAttrKey("value")


def is_leaf(x: Any) -> bool:
    """Whether `x` is None or a row gradient: the `is_leaf` of trees of gradients."""
    return x is None or isinstance(x, SparseRows)


def path_str(key_path: tuple[Any, ...]) -> Path:
    """A key path as text: the keys joined by ``/``.

    Flax NNX puts a ``value`` attribute between a variable and its array. At the end of a key path
    it is left out, so that a parameter has the same path in a model and in its state.

    Args:
      key_path: a key path, as `jax.tree_util.tree_flatten_with_path` returns it.

    >>> import jax
    >>> tree = {"encoder": [{"kernel": 1.0}]}
    >>> [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    ['encoder/0/kernel']
    """
    if key_path and key_path[-1] == _VALUE:
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def quoted(path: Path) -> str:
    """A path in an error."""
    return repr(path) if path else "'' (the only leaf)"


def join_paths(*paths: Path) -> Path:
    """Joins paths with ``/``, skipping empty ones: the path of a lone leaf is empty."""
    return "/".join(path for path in paths if path)


def flatten_with_paths(tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """([(path, leaf), ...], structure); None and row gradients are leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_str(path), leaf) for path, leaf in leaves], treedef


def non_none(tree: Any) -> list[tuple[Path, Any]]:
    """[(path, leaf), ...] of the leaves that are not None."""
    return [(path, leaf) for path, leaf in flatten_with_paths(tree)[0] if leaf is not None]


def is_array(x: Any) -> bool:
    """Whether `x` has a shape and a dtype, or is a number."""
    return (hasattr(x, "shape") and hasattr(x, "dtype")) or isinstance(x, int | float | complex)


def shape_of(x: Any) -> tuple[int, ...]:
    """`jnp.shape` that also accepts abstract arrays and row gradients."""
    return tuple(getattr(x, "shape", ()))


def dtype_of(x: Any) -> Any:
    """`jnp.result_type` that also accepts PRNG keys and row gradients."""
    return x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)


@functools.cache
def placeholder() -> Params:
    """Optax's stand-in for any parameters, a node without leaves: `optax.tree.map_params` asks
    `init` for a state of it, and maps over what is in its places."""
    found = []

    def init(params: Params) -> State:
        found.append(params)
        return ()

    optax.tree_utils.tree_map_params(init, id, ())
    return found[0]


def is_placeholder(params: Params) -> bool:
    return isinstance(params, type(placeholder()))


def refuse_equal_paths(paths: Sequence[Path], selected: Iterable[Path]) -> None:
    """Refuses a path by which something is selected, and that several leaves have.

    Args:
      paths: of all leaves.
      selected: the paths that select.

    Raises:
      ValueError: as for ``{"a/b": ..., "a": {"b": ...}}``, both of whose leaves are at "a/b".
    """
    if len(set(paths)) == len(paths):
        return
    for path in selected:
        if paths.count(path) > 1:
            raise ValueError(
                f"there are two leaves with the path {path!r}, which can therefore select neither: "
                'rename a key (a "/" in a key reads like a level of the tree)'
            )


def children(node: Any) -> list[tuple[Any, Any]]:
    """[(key, child), ...] of a node; empty for a leaf."""
    if is_leaf(node):
        return []
    # JAX returns a node that has no children with an empty key path.
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(keys[0], child) for keys, child in found if keys]


def unwrap_variables(tree: Any, where: Callable[[Any], bool] = lambda x: True) -> Any:
    """Replaces each Flax NNX variable by its value, if ``where(value)``."""

    def is_variable(x: Any) -> bool:
        below = children(x)
        return len(below) == 1 and below[0][0] == _VALUE and where(below[0][1])

    return jax.tree.map(
        lambda x: children(x)[0][1] if is_variable(x) else x,
        tree,
        is_leaf=lambda x: is_leaf(x) or is_variable(x),
    )


def wrap_like(like: Any, tree: Any) -> Any:
    """`tree` with its leaves in the Flax NNX variables of `like`; `tree` itself if the structures
    differ in more than variables."""
    plain, wanted = (jax.tree.structure(unwrap_variables(x), is_leaf=is_leaf) for x in (tree, like))
    if plain != wanted:
        return tree
    treedef = jax.tree.structure(like, is_leaf=is_leaf)
    return treedef.unflatten(jax.tree.leaves(tree, is_leaf=is_leaf))


def align(tree: Any, *others: Any, names: Sequence[str]) -> tuple[list[tuple[Any, ...]], Any]:
    """Zips the leaves of trees of one structure.

    Args:
      tree: the tree that defines the structure; None is a leaf.
      others: trees of that structure, with None allowed in place of any leaf.
      names: the names of `tree` and of each of `others` in errors.

    Returns:
      ([(path, leaf, *leaves of the others), ...], structure).

    Raises:
      ValueError: a structure or shape differs; names the path.
    """
    leaves, treedef = flatten_with_paths(tree)
    columns = []
    for other, name in zip(others, names[1:], strict=True):
        try:
            column = treedef.flatten_up_to(other)
        except (ValueError, TypeError):
            raise ValueError(
                f"the structure of {name} differs from that of {names[0]}: "
                f"{structure_difference(tree, other, names[0], name)}"
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
                if isinstance(leaf, SparseRows):
                    refuse_batch(leaf)
                raise ValueError(
                    f"{path!r} has shape {list(shape_of(leaf))} in {names[0]}, "
                    f"but {list(shape_of(x))} in {name}"
                )
        columns.append(column)
    return [(*leaf, *rest) for leaf, *rest in zip(leaves, *columns, strict=True)], treedef


def structure_difference(tree: Any, other: Any, name: str, other_name: str) -> str:
    """The first path that only one of two trees has, or at which their containers differ, as a
    clause of an error."""
    paths, other_paths = ([path for path, _ in flatten_with_paths(x)[0]] for x in (tree, other))
    for present, owner, absent in ((paths, name, other_paths), (other_paths, other_name, paths)):
        only = next((path for path in present if path not in absent), None)
        if only is not None:
            return f"{only!r} is only in {owner}"
    found = other_container(tree, other)
    if found is None:
        return "their containers differ"
    where, kind, other_kind = found
    return f"{where} is a {kind} in {name}, but a {other_kind} in {other_name}"


def other_container(node: Any, other: Any, path: Path = "") -> tuple[str, str, str] | None:
    """The first node that is of another class in the other tree, or has another number of children,
    as text: (its path, its class, the class of the other). None if there is none. Where `node` has
    a leaf, `other` may have anything."""
    if is_leaf(node) or jax.tree_util.all_leaves([node]):
        return None
    below, other_below = children(node), children(other)
    where, kind = repr(path) if path else "the tree", type(node).__name__
    if type(node) is not type(other):
        return where, kind, type(other).__name__
    if len(below) != len(other_below):
        return where, f"{kind} of {len(below)}", f"{kind} of {len(other_below)}"
    for (key, child), (_, other_child) in zip(below, other_below, strict=True):
        found = other_container(child, other_child, join_paths(path, path_str((key,))))
        if found is not None:
            return found
    return None


def map_leaves(
    fn: Callable[..., Any],
    updates: Updates,
    *others: Any,
    names: Sequence[str] = (),
    outputs: int = 1,
    rows: bool = False,
) -> Any:
    """``fn(path, gradient, *other_leaves)`` at every leaf of `updates` that is not None.

    Args:
      fn: returns one array, or a tuple of `outputs` arrays.
      updates: gradients. Where a gradient is None the first output is None, and the other outputs
        are the unchanged leaves of the first of `others`.
      others: trees of the same structure and shapes as `updates`, e.g. slots.
      names: the name of each of `others` in errors.
      outputs: the number of trees to return.
      rows: whether `fn` accepts row gradients.

    Returns:
      A tree, or a tuple of `outputs` trees.

    Raises:
      ValueError: a structure or shape differs; names the path.
      TypeError: a gradient is not a floating or complex array; names the path.
    """
    aligned, treedef = align(updates, *others, names=("the updates", *names))
    columns: list[list[Any]] = [[] for _ in range(outputs)]
    for path, leaf, *rest in aligned:
        results: Any = (None, *rest[: outputs - 1])
        if leaf is not None:
            for other, name in zip(rest, names, strict=True):
                if other is None:
                    raise ValueError(f"{path!r} has an update, but is None in {name}")
            if not (rows and isinstance(leaf, SparseRows)):
                leaf = as_gradient(path, leaf)
            result = fn(path, leaf, *rest)
            results = (result,) if outputs == 1 else result
        for column, x in zip(columns, results, strict=True):
            column.append(x)
    trees = tuple(map(treedef.unflatten, columns))
    return trees[0] if outputs == 1 else trees


def unzip(results: list[tuple[Any, ...]], treedef: Any, outputs: int) -> tuple[Any, ...]:
    """Turns one tuple of `outputs` results for each leaf into a tuple of `outputs` trees."""
    return tuple(treedef.unflatten([result[i] for result in results]) for i in range(outputs))


def as_gradient(path: Path, leaf: Any) -> jax.Array:
    """A gradient leaf as an array; raises a TypeError unless it is dense, floating or complex."""
    if isinstance(leaf, SparseRows):
        raise TypeError(
            f"{path!r} has a row gradient (SparseRows), but this transformation needs dense "
            "arrays: wrap it in lazy(...) (for adam: lazy_adam, or deferred_adam), or convert the "
            "gradients with to_dense"
        )
    dtype = jnp.result_type(leaf) if hasattr(leaf, "dtype") or isinstance(leaf, float) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"the update of {path!r} must be a floating or complex array (or None, to leave the "
            f"parameter unchanged), got {dtype or type(leaf).__name__}"
        )
    return jnp.asarray(leaf)


def as_gradients(updates: Updates) -> Updates:
    """Applies `as_gradient` to every leaf that is neither None nor a row gradient."""
    return map_leaves(lambda path, g: g, updates, rows=True)


def in_update_dtype(updates: Updates, gradients: Updates, params: Params | None = None) -> Updates:
    """Casts each update to the promotion of the gradient's dtype and the parameter's; without
    `params`, to the gradient's dtype. A gradient that is None has no say."""

    def cast(path: Path, u: Any, *like: Any) -> Any:
        dtype = dtypes.promote(*(getattr(x, "dtype", x) for x in like))
        return on_values(lambda u: u.astype(dtype), u)

    like = {"the gradient": gradients}
    if params is not None:
        like["the parameter"] = params
    aligned, treedef = align(updates, *like.values(), names=("the updates", *like))
    # The update of a deferred table needs no gradient.
    like["the gradient"] = treedef.unflatten(
        [next((x for x in (*others, u) if x is not None), None) for _, u, *others in aligned]
    )
    return map_leaves(cast, updates, *like.values(), names=(*like,), rows=True)


def zeros_per_row(table: Any, dtype: Any, axes: int = 1) -> jax.Array:
    """Zeros (V,) for a table (V, D...), or of the shape of its first `axes`, sharded like them."""
    return _zeros_beside(table, shape_of(table)[:axes], dtype, lambda spec: spec[:axes])


def zero_rows(table: Any, number: int, dtype: Any, axes: int = 1) -> jax.Array:
    """Zeros (number, D...) for a table (V, D...) whose first `axes` are rows, sharded like the
    columns of the table."""
    shape = (number, *table.shape[axes:])
    return _zeros_beside(table, shape, dtype, lambda spec: (None, *spec[axes:]))


def zero_column(table: Any, dtype: Any) -> jax.Array:
    """Zeros (..., 1) for an array (..., D), sharded like the other axes."""
    axes = len(shape_of(table)) - 1
    return _zeros_beside(
        table, (*shape_of(table)[:axes], 1), dtype, lambda spec: (*spec[:axes], None)[: axes + 1]
    )


def _zeros_beside(
    table: Any, shape: tuple[int, ...], dtype: Any, spec_of: Callable[[Any], tuple[Any, ...]]
) -> jax.Array:
    is_traced = isinstance(table, Tracer)
    sharding = jax.typeof(table).sharding if is_traced else getattr(table, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.zeros_like(table, dtype, shape=shape)
    if is_traced and AxisType.Explicit not in sharding.mesh.axis_types:
        return jnp.zeros(shape, dtype)  # XLA chooses the sharding
    spec = PartitionSpec(*spec_of(sharding.spec))
    return jax.lax.full(shape, 0, dtype, sharding=NamedSharding(sharding.mesh, spec))


def find_states(state: State, kind: type | tuple[type, ...]) -> list[Any]:
    """Every instance of `kind` (a type or a tuple of types) at any depth of an optimizer state."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in found if isinstance(x, kind)]
