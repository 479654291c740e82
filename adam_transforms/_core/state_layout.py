"""What is where in an optimizer state: whose state each part is of, and which parameter's slot."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from adam_transforms._core import trees
from adam_transforms._embeddings.deferred.missed_updates import Ring
from adam_transforms._transforms.learning_rates import ScaleByPathLearningRateState

INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
# What is in them, but for an inner state, are scalars, whatever their names or numbers.
_SCALARS = (*INJECTED, ScaleByPathLearningRateState)
_GROUPS = (optax.PartitionState, optax.MultiTransformState)
# Slots of a parameter that is a lone scalar, which has neither path nor shape to know them by.
_SLOTS = ("mu", "nu", "nu_max", "ema", "acc")
# Slots of one number for each row, whose shape a lone table would not be known by either.
_PER_ROW = ("last_step", "frozen")


class Place(NamedTuple):
    """Where a part of a state is.

    Attributes:
      keys: the key path to it.
      states: the classes of the states that it is in, the outermost first.
      groups: the labels of the parameter groups that it is in (`optax.multi_transform`).
    """

    keys: tuple[Any, ...] = ()
    states: tuple[type, ...] = ()
    groups: tuple[str, ...] = ()

    def __str__(self) -> str:
        return trees.path_str(self.keys)

    @property
    def field(self) -> str:
        """The attribute that it is, or is in; empty if there is none."""
        fields = [k.name for k in self.keys if isinstance(k, jax.tree_util.GetAttrKey)]
        return fields[-1] if fields else ""


class Slot(NamedTuple):
    """An array of the state that mirrors a parameter; `place` is that of the tree it is a leaf
    of."""

    name: str
    place: Place
    leaf: Any


class Parameter(NamedTuple):
    """A parameter and its slots; whether a tree of slots has an `optax.MaskedNode` instead."""

    path: str
    leaf: Any
    slots: list[Slot]
    is_masked: bool


def walk(
    state: Any, stop: Callable[[Place, Any], bool] = lambda place, node: False
) -> Iterator[tuple[Place, Any]]:
    """Each node of `state` and where it is, before what is in it; nothing from inside a node at
    which `stop` holds. A `SparseRows` is a leaf."""
    return _walk(Place(), state, stop)


def match(params: Any, state: Any) -> tuple[list[Parameter], list[tuple[Place, Any]]]:
    """The parameters with their slots, and whatever else there is in the state.

    A part of the state holds slots if every leaf in it has the path of a parameter. Factored slots
    (`optax.adafactor`) have other shapes than it. A `Ring` is one part.
    """
    leaves = {path: x for path, x in present(params) if is_array(x)}
    slots: dict[str, list[Slot]] = {path: [] for path in leaves}
    masked: set[str] = set()
    rest = []

    def mirrors(place: Place, node: Any) -> bool:
        return _mirrors(params, leaves, place, node)

    def stop(place: Place, node: Any) -> bool:
        return isinstance(node, Ring) or mirrors(place, node)

    for place, node in walk(state, stop):
        if mirrors(place, node):
            for path, leaf in present(node):
                slots[path].append(Slot(place.field or str(place), place, leaf))
            masked |= _masked(node, leaves)
        elif isinstance(node, Ring) or (_is_leaf(node) and is_array(node)):
            rest.append((place, node))
    parameters = [
        Parameter(path, leaf, _distinct(slots[path]), path in masked)
        for path, leaf in leaves.items()
    ]
    return parameters, rest


def owners(params: Any, state: Any) -> dict[str, str]:
    """{path in the state: path of the parameter} of each slot."""
    parameters, _ = match(trees.unwrapped(params), trees.unwrapped(state))
    return {trees.joined(str(s.place), p.path): p.path for p in parameters for s in p.slots}


def present(tree: Any) -> list[tuple[str, Any]]:
    """[(path, leaf), ...] of the leaves that are not None."""
    return [(path, leaf) for path, leaf in trees.flatten_with_paths(tree)[0] if leaf is not None]


def is_array(x: Any) -> bool:
    """Whether it has a shape and a dtype, or is a number."""
    return (hasattr(x, "shape") and hasattr(x, "dtype")) or isinstance(x, int | float | complex)


def shape_of(x: Any) -> tuple[int, ...]:
    """As `jnp.shape`, of abstract arrays and row gradients too."""
    return tuple(getattr(x, "shape", ()))


def dtype_of(x: Any) -> Any:
    """As `jnp.result_type`, of PRNG keys and row gradients too."""
    return x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)


def _walk(place: Place, node: Any, stop: Any) -> Iterator[tuple[Place, Any]]:
    yield place, node
    children = [] if stop(place, node) else trees.children(node)
    states, groups = place.states, place.groups
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        states = (*states, type(node))
    is_by_label = isinstance(node, dict) and bool(states) and issubclass(states[-1], _GROUPS)
    for key, child in children:
        if is_by_label:
            groups = (*place.groups, trees.path_str((key,)))
        yield from _walk(Place((*place.keys, key), states, groups), child, stop)


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node], is_leaf=trees.is_leaf)


def _mirrors(params: Any, leaves: dict[str, Any], place: Place, node: Any) -> bool:
    """Whether a node of the state is a tree like the parameters, or like some of them."""
    if _is_leaf(node):
        if "" not in leaves or not is_array(node):  # "" is the path of a lone parameter
            return False
        if shape_of(node) == ():
            return shape_of(leaves[""]) == () and place.field in _SLOTS
        return shape_of(node) == shape_of(leaves[""]) or place.field in _PER_ROW
    if isinstance(node, tuple) and type(node) is not type(params):
        return False
    if place.states and issubclass(place.states[-1], _SCALARS) and place.field != "inner_state":
        return False
    found = present(node)
    return bool(found) and all(path in leaves for path, _ in found)


def _masked(tree: Any, paths: Iterable[str]) -> set[str]:
    """The paths at or below which `tree` has a MaskedNode."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    masked = [trees.path_str(keys) for keys, x in nodes if isinstance(x, optax.MaskedNode)]
    return {p for p in paths if any(p == m or p.startswith(f"{m}/") for m in masked)}


def _distinct(slots: list[Slot]) -> list[Slot]:
    """Slots of one name with the path of their tree for a name."""
    names = [slot.name for slot in slots]
    return [
        slot if names.count(slot.name) == 1 else slot._replace(name=str(slot.place))
        for slot in slots
    ]
