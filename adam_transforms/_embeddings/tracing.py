"""A function to differentiate: its arguments, its trace, and which of its arguments are tables."""

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._core import trees
from adam_transforms._core.types import Path
from adam_transforms._embeddings.deferred.state import (
    DeferredTable,
    deferred_states,
    deferred_tables,
)
from adam_transforms._embeddings.reads.choosing import Choice, choose
from adam_transforms._embeddings.reads.running import Table
from adam_transforms._xla.jaxprs import location


class Leaf(NamedTuple):
    """A leaf of the argument at `position`."""

    position: int
    keys: tuple[Any, ...]
    value: Any

    @property
    def path(self) -> Path:
        return trees.path_str(self.keys)


class Traced(NamedTuple):
    """`fun` as a jaxpr of the differentiated leaves, with constants `consts`.

    Attributes:
      outputs: which outputs are those of the scalar to differentiate.
      out_tree: the structure of the result of `fun`.
      others: its leaves that are no arrays, such as a string in the auxiliary output; None for each
        that is an output of the jaxpr.
    """

    jaxpr: Any
    consts: Sequence[Any]
    outputs: list[bool]
    out_tree: Any
    others: list[Any]


def are_differentiable(args: Sequence[Any], positions: Sequence[int]) -> bool:
    """Whether the arguments exist and hold nothing but floating and complex arrays.

    Raises:
      TypeError: an argument holds a module that cannot be differentiated as a tree.
    """
    given = [args[i] for i in positions if -len(args) <= i < len(args)]
    _refuse_modules(given)
    leaves = jax.tree.leaves(given)
    return len(given) == len(positions) and all(map(_is_differentiable, leaves))


def _is_differentiable(x: Any) -> bool:
    is_number = isinstance(x, jax.Array | np.ndarray | np.generic | float | complex)
    return is_number and jnp.issubdtype(jnp.result_type(x), jnp.inexact)


# {package: what takes the place of an object of one of its classes in a differentiated argument}
_IN_PLACE_OF_MODULES = {
    "equinox": "use adam_transforms.equinox.filter_value_and_grad, or differentiate "
    "eqx.partition(module, eqx.is_inexact_array)[0]",
    "flax.linen": "differentiate the parameters that init returns, and call apply in the loss",
    "flax.nnx": "use adam_transforms.flax.value_and_grad, or differentiate "
    "nnx.split(module, nnx.Param, ...)[1]",
    "keras": "differentiate [v.value for v in model.trainable_variables], and call "
    "model.stateless_call in the loss",
}


def _refuse_modules(args: Sequence[Any]) -> None:
    """Refuses modules of other libraries that cannot be differentiated as trees.

    Raises:
      TypeError: names the class, the leaf that is not differentiable, and what to differentiate
        instead. A module of NNX is refused whatever its leaves: what calls change in it is lost.
    """
    packages = [package for package in _IN_PLACE_OF_MODULES if package in sys.modules]
    if not packages:
        return

    @functools.cache  # many nodes of a tree have the same class
    def package_of(kind: type) -> str | None:
        modules = [f"{cls.__module__}." for cls in kind.__mro__]
        found = (p for p in packages if any(m.startswith(f"{p}.") for m in modules))
        return next(found, None)

    for module in jax.tree.leaves(args, is_leaf=lambda x: package_of(type(x)) is not None):
        package = package_of(type(module))
        if package is None:
            continue
        why = None
        if any(cls.__module__ == "flax.nnx.module" for cls in type(module).__mro__):
            why = "has state that calls change"
        for keys, leaf in jax.tree_util.tree_leaves_with_path(module):
            if not _is_differentiable(leaf):
                kind = getattr(leaf, "dtype", type(leaf).__name__)
                why = f"has a leaf {trees.path_str(keys)!r} of {kind}" if keys else "is no tree"
                break
        if why is not None:
            raise TypeError(
                f"{type(module).__name__} of {package} {why}, and cannot be differentiated: "
                f"{_IN_PLACE_OF_MODULES[package]}"
            )


def leaves_of(args: Sequence[Any], positions: Sequence[int]) -> tuple[list[Leaf], Any]:
    """The leaves of the arguments at `positions`, and the structure of the tuple of these."""
    leaves = []
    for i in positions:
        found, _ = jax.tree_util.tree_flatten_with_path(args[i])
        leaves += [Leaf(i, keys, x) for keys, x in found]
    return leaves, jax.tree.structure(tuple(args[i] for i in positions))


def _by_argument(leaves: Sequence[Leaf]) -> list[list[tuple[Path, Any]]]:
    """The paths and values of the leaves of each argument: a path is that within its argument."""
    groups = itertools.groupby(leaves, lambda leaf: leaf.position)
    return [[(leaf.path, leaf.value) for leaf in group] for _, group in groups]


def trace(fun: Any, has_aux: bool, args: Any, kwargs: Any, positions: Sequence[int]) -> Traced:
    """Traces `fun` as a function of the arguments at `positions`; it closes over the others."""
    inputs, treedef = jax.tree.flatten([args[i] for i in positions])
    static: list[Any] = []

    def flat(*inputs: Any) -> list[Any]:
        all_args = list(args)
        for i, x in zip(positions, treedef.unflatten(inputs), strict=True):
            all_args[i] = x
        result = fun(*all_args, **kwargs)
        if has_aux and not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                "expected function with aux output to return a two-element tuple, "
                f"but got type {type(result)} with value {result!r}"
            )
        outputs, out_tree = jax.tree.flatten(result)
        num_scalars = len(jax.tree.leaves(result[0])) if has_aux else len(outputs)
        others = [None if isinstance(x, jax.Array) else x for x in outputs]
        arrays = {i: x for i, x in enumerate(outputs) if others[i] is None}
        static[:] = [[i < num_scalars for i in arrays], out_tree, others]
        return [*arrays.values()]

    closed = jax.make_jaxpr(flat)(*inputs)
    return Traced(closed.jaxpr, closed.consts, *static)


def deferred_leaves(state: Any, leaves: Sequence[Leaf]) -> dict[int, Table]:
    """The leaves that are deferred tables, by position."""
    if state is None:
        return {}
    deferred = {}
    by_path: dict[Path, DeferredTable] = {}
    for one in deferred_states(state):
        of_state = deferred_tables(one)
        for path in of_state.keys() & by_path:
            raise ValueError(
                f"two deferred states in rows_from have a table at {trees.quoted(path)}"
            )
        by_path |= of_state
    for path, table in by_path.items():
        found = [i for i, leaf in enumerate(leaves) if leaf.path == path]
        if len(found) != 1:
            paths = ", ".join(trees.quoted(leaf.path) for leaf in leaves)
            raise ValueError(
                f"rows_from has a table at {trees.quoted(path)}, which must be the path of one "
                f"differentiated leaf; these are {paths}"
            )
        deferred[found[0]] = Table(leaves[found[0]].value, table)
    return deferred


def find_tables(
    traced: Traced, leaves: Sequence[Leaf], select: Any, deferred: set[int]
) -> tuple[Choice, set[int]]:
    """The leaves that are tables, and those that could be.

    Args:
      select: of `patterns.selector`; None for "auto".
      deferred: positions of deferred tables; "auto" then means these alone.
    """
    selected = set() if select is None else select(*_by_argument(leaves))
    any_table = select is None and not deferred
    candidates = set(range(len(leaves))) if any_table else selected | deferred
    choice = choose(
        traced.jaxpr,
        traced.consts,
        traced.outputs,
        candidates,
        by_reads=any_table,
        one_row_axis=deferred,
    )
    return choice, candidates


def choose_tables(
    traced: Traced, leaves: Sequence[Leaf], select: Any, deferred: set[int]
) -> Choice:
    """As `find_tables`, where the selected leaves must be tables.

    Raises:
      ValueError: a selected leaf is no table.
    """
    choice, candidates = find_tables(traced, leaves, select, deferred)
    if select is None:
        return choice
    for i in sorted(candidates - deferred - choice.tables):
        path = trees.quoted(leaves[i].path)
        use = choice.uses.get(i)
        if use is None:
            raise ValueError(f"{path} is selected by tables, but is a scalar, which has no rows")
        raise ValueError(
            f"{path} is selected by tables, but is not only read by row: {use.name!r} at "
            f"{location(use.site)} reads no rows of it, {use.why}. Leave it out of tables for a "
            "dense gradient; adam_transforms.explain tells how each leaf is used"
        )
    return choice
