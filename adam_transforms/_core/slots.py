"""Which leaf of an optimizer state is a slot of which parameter.

A transformation that sees a table's rows finds its slots by shape (`find_slots`): it asks `init`
for the state of tables with more rows. Tools that get a finished state find them by path
(`match`), with the table of state classes (`state_layout`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import trees
from adam_transforms._core.state_layout import MIRRORS, PER_ROW, Place, Role, walk
from adam_transforms._core.types import Params, Path, State

# ---- by shape -----------------------------------------------------------------------------------


class StateLeaf(NamedTuple):
    """A leaf of a state as `init` makes it.

    Attributes:
      keys: the key path to it.
      shape: its shape.
      table: the position of the parameter whose rows it is kept by; None for any other leaf.
    """

    keys: tuple[Any, ...]
    shape: tuple[int, ...]
    table: int | None

    @property
    def path(self) -> Path:
        return trees.path_str(self.keys)


def find_slots(
    init: Callable[[Params], State],
    state: State,
    treedef: Any,
    params: Sequence[Any],
    tables: Mapping[int, int],
    *,
    caller: str,
    probe_columns: bool = True,
) -> tuple[list[StateLeaf], Any]:
    """(all leaves of ``init(params)``, each with the table whose rows it is kept by; structure).

    `init` is evaluated abstractly for larger tables. The k-th table has 2 k more rows, along each
    of its leading axes, and, with `probe_columns`, one more column. A leaf is kept by the rows of
    the k-th table if it begins with the table's leading axes, these grow by 2 k, and every other
    axis by at most one. `init` is evaluated for the given parameters only where `state` may be
    wrong.

    Args:
      init: of the inner transformation.
      state: a state that `init` should have made for these parameters; None if it is not known.
      treedef, params: the structure and the leaves of the parameters.
      tables: {position of a table among `params`: number of its leading axes}.
      caller: what the error calls the transformation that needs a state by row.
      probe_columns: whether a leaf that depends on the number of columns alone is refused too.

    Raises:
      ValueError: a leaf depends on the shape of a table in another way.
    """
    shapes = [jax.eval_shape(lambda p=p: p) for p in params]
    larger = [*shapes]
    for k, (table, axes) in enumerate(tables.items(), start=1):
        shape = shapes[table].shape
        more = [2 * k] * axes + [int(probe_columns)] * (len(shape) - axes)
        shape = tuple(a + b for a, b in zip(shape, more, strict=True))
        larger[table] = jax.ShapeDtypeStruct(shape, shapes[table].dtype)
    grown_leaves, grown_def = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(init, treedef.unflatten(larger))
    )
    table_of_growth = {2 * k: table for k, table in enumerate(tables, start=1)}
    leaves, state_def = jax.tree.flatten(state)
    sizes = {size for x in leaves for size in jnp.shape(x)}
    axes_of_tables = [zip(shapes[i].shape, larger[i].shape, strict=True) for i in tables]
    new_sizes = {b for axes in axes_of_tables for a, b in axes if a != b}
    may_be_wrong = state_def != grown_def or not sizes.isdisjoint(new_sizes)
    if may_be_wrong:
        leaves, state_def = jax.tree.flatten(jax.eval_shape(init, treedef.unflatten(shapes)))

    found = []
    for x, (keys, grown) in zip(leaves, grown_leaves, strict=True):
        shape, table = jnp.shape(x), None
        if shape != grown.shape:
            growth = [b - a for a, b in zip(shape, grown.shape, strict=False)]
            is_alike = len(shape) == len(grown.shape)
            table = table_of_growth.get(growth[0]) if is_alike else None
            axes = 0 if table is None else tables[table]
            is_by_row = table is not None and shape[:axes] == shapes[table].shape[:axes]
            if not is_by_row or {*growth[:axes]} - {growth[0]} or {*growth[axes:]} - {0, 1}:
                if not may_be_wrong:
                    # `state` is wrong, or what `init` makes is not by row: ask `init`.
                    return find_slots(
                        init,
                        None,
                        treedef,
                        params,
                        tables,
                        caller=caller,
                        probe_columns=probe_columns,
                    )
                raise ValueError(
                    f"{caller} needs a state that is kept by row, but {trees.path_str(keys)!r}, "
                    f"of shape {list(shape)}, depends on the shape of a table in another way"
                )
        found.append(StateLeaf(keys, shape, table))
    return found, state_def


# ---- by path ------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """An array of the state that mirrors a parameter; `place` is the place of its tree."""

    name: str
    place: Place
    leaf: Any


class Parameter(NamedTuple):
    """A parameter and its slots; `is_masked` says that a tree of slots holds an
    `optax.MaskedNode` in its place."""

    path: Path
    leaf: Any
    slots: list[Slot]
    is_masked: bool


def match(params: Params, state: State) -> tuple[list[Parameter], list[tuple[Place, Any]]]:
    """The parameters with their slots, and all other leaves of the state.

    A part of the state holds slots if every leaf in it has the path of a parameter, and the table
    of state classes does not say otherwise. Factored slots (`optax.adafactor`) have other shapes
    than the parameter. A field of shared arrays counts as one leaf.
    """
    leaves = {path: x for path, x in trees.non_none(params) if trees.is_array(x)}
    slots: dict[Path, list[Slot]] = {path: [] for path in leaves}
    masked: set[Path] = set()
    rest = []

    def stop(place: Place, node: Any) -> bool:
        return place.role is Role.SHARED or _mirrors(params, leaves, place, node)

    for place, node in walk(state, stop):
        if _mirrors(params, leaves, place, node):
            for path, leaf in trees.non_none(node):
                slots[path].append(Slot(place.field or str(place), place, leaf))
            masked |= _masked(node, leaves)
        elif place.role is Role.SHARED or (_is_leaf(node) and trees.is_array(node)):
            rest.append((place, node))
    parameters = [
        Parameter(path, leaf, _distinct(slots[path]), path in masked)
        for path, leaf in leaves.items()
    ]
    return parameters, rest


def owners(params: Params, state: State) -> dict[Path, Path]:
    """{path in the state: path of the parameter} of each slot."""
    parameters, _ = match(trees.unwrap_variables(params), trees.unwrap_variables(state))
    return {trees.join_paths(str(s.place), p.path): p.path for p in parameters for s in p.slots}


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node], is_leaf=trees.is_leaf)


def _mirrors(params: Params, leaves: dict[Path, Any], place: Place, node: Any) -> bool:
    """Whether a node of the state is a tree like the parameters, or like some of them."""
    if place.role in (Role.SCALAR, Role.SHARED):
        return False
    if _is_leaf(node):
        if "" not in leaves or not trees.is_array(node):  # "" is the path of a lone parameter
            return False
        # A lone parameter has no path to know its slots by: the role or the shape decides.
        shape, shape_of_parameter = trees.shape_of(node), trees.shape_of(leaves[""])
        if shape == ():
            return shape_of_parameter == () and place.role in MIRRORS
        return shape == shape_of_parameter or place.role in PER_ROW
    if isinstance(node, tuple) and type(node) is not type(params):
        return False
    found = trees.non_none(node)
    return bool(found) and all(path in leaves for path, _ in found)


def _masked(tree: Any, paths: Iterable[Path]) -> set[Path]:
    """The paths at or below which `tree` has a MaskedNode."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    masked = [trees.path_str(keys) for keys, x in nodes if isinstance(x, optax.MaskedNode)]
    return {p for p in paths if any(p == m or p.startswith(f"{m}/") for m in masked)}


def _distinct(slots: list[Slot]) -> list[Slot]:
    """Slots that share a name get the path of their tree for a name."""
    names = [slot.name for slot in slots]
    return [
        slot if names.count(slot.name) == 1 else slot._replace(name=str(slot.place))
        for slot in slots
    ]
