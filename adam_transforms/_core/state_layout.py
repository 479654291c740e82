"""What each leaf of an optimizer state is: a slot of a parameter, a number, a buffer, ...

`TABLE` is the one place that says so. The classes of Optax are entered below, and each class of
this package where it is defined, by `register`: a new state class is one entry. A state class that
is not in the table is treated by its paths: a part of it whose leaves have the paths of parameters
holds slots.
"""

import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import optax

from adam_transforms._core import trees
from adam_transforms._core.serialization import serializable_tuple
from adam_transforms._core.types import State

C = TypeVar("C", bound=Any)


class Role(enum.Enum):
    """What a field of a state class holds."""

    SLOT = "like the parameters: a moment; zero for a new row of a table"
    AVERAGE = "like the parameters: a weighted sum of their values"
    COPY = "like the parameters: a copy in another dtype"
    ROW_MASK = "a bool (V,) for some tables, (F, V) for stacks; nothing for other parameters"
    LAST_STEP = "an int32 (V,) for some tables: the step after which each row is synchronized"
    AVERAGED_STEP = (
        "an int32 for each row of each parameter, () for a scalar: the last step in its average"
    )
    GROUP_RANGE = (
        "an int16 for each group of elements of a parameter, along its first axes: of codes"
    )
    BUFFER = "like the gradients: a sum or list of them over several steps"
    SCALAR = "a number, or several: counts, rates, scales"
    SHARED = "arrays that belong to no single parameter"
    INNER = "a state: of an inner transformation, or a part of this one"


PER_ROW = (Role.ROW_MASK, Role.LAST_STEP, Role.AVERAGED_STEP, Role.GROUP_RANGE)
MIRRORS = (Role.SLOT, Role.AVERAGE, Role.COPY, Role.BUFFER, *PER_ROW)


class Field(NamedTuple):
    """One field of a state class.

    Attributes:
      role: what it holds.
      metric: the name of a scalar in `metrics`; None if `metrics` leaves it out.
    """

    role: Role
    metric: str | None = None


TABLE: dict[type, dict[str, Field]] = {}
"""{state class: {field: what it holds}}."""


def register(**fields: Field | Role) -> Callable[[C], C]:
    """A class decorator that enters a state class into the table, with all its fields.

    Raises:
      TypeError: the fields are not those of the class.
    """

    def enter(cls: C) -> C:
        if fields.keys() != set(cls._fields):
            own, given = ", ".join(cls._fields), ", ".join(fields)
            raise TypeError(f"the fields of {cls.__name__} are {own}, got {given}")
        _enter(cls, **fields)
        return serializable_tuple(cls)

    return enter


def _enter(cls: type, **fields: Field | Role) -> None:
    TABLE[cls] = {
        name: field if isinstance(field, Field) else Field(field)
        for name, field in fields.items()
        if name in cls._fields  # which differ between versions of Optax
    }


COUNT = Field(Role.SCALAR, metric="count")
_MINI_STEP = Field(Role.SCALAR, metric="mini_step")
_INJECTED = {
    "count": Role.SCALAR,
    "hyperparams": Role.SCALAR,
    "hyperparams_states": Role.SCALAR,
    "inner_state": Role.INNER,
}
_enter(optax.ScaleByAdamState, count=COUNT, mu=Role.SLOT, nu=Role.SLOT)
_enter(optax.ScaleByAmsgradState, count=COUNT, mu=Role.SLOT, nu=Role.SLOT, nu_max=Role.SLOT)
_enter(optax.ApplyEvery, count=Role.SCALAR, grad_acc=Role.BUFFER)
_enter(
    optax.MultiStepsState,
    mini_step=_MINI_STEP,
    gradient_step=Role.SCALAR,
    inner_opt_state=Role.INNER,
    acc_grads=Role.BUFFER,
    skip_state=Role.SCALAR,
)
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
for _injected in INJECTED:
    _enter(_injected, **_INJECTED)

GROUPS = (optax.PartitionState, optax.MultiTransformState)


def fields_of(state_class: type) -> Mapping[str, Field]:
    """The entry of a state class; empty for one that is not in the table."""
    return TABLE.get(state_class, {})


def slot_names(state: Any) -> tuple[str, ...]:
    """The fields of one state that are slots and not None, in their order: mu, nu, ..."""
    return tuple(
        name
        for name, field in fields_of(type(state)).items()
        if field.role is Role.SLOT and getattr(state, name) is not None
    )


def is_adam(x: Any) -> bool:
    """Whether `x` is a state that keeps Adam's moments."""
    return {"count", "mu", "nu"} <= fields_of(type(x)).keys()


def is_accumulation(x: Any) -> bool:
    """Whether `x` is the state of a wrapper that collects gradients between inner steps."""
    roles = {field.role for field in fields_of(type(x)).values()}
    return {Role.BUFFER, Role.INNER} <= roles


class Place(NamedTuple):
    """Where a part of a state is.

    Attributes:
      keys: the key path to it.
      states: the classes of the states that contain it, the outermost first.
      groups: the labels of the parameter groups that contain it (`optax.multi_transform`).
      role: the role of the innermost field of the table that contains it; None if no field does,
        and inside the state of an inner transformation.
    """

    keys: tuple[Any, ...] = ()
    states: tuple[type, ...] = ()
    groups: tuple[str, ...] = ()
    role: Role | None = None

    def __str__(self) -> str:
        return trees.path_str(self.keys)

    @property
    def field(self) -> str:
        """The innermost attribute on the way to it; empty if there is none."""
        names = [k.name for k in self.keys if isinstance(k, jax.tree_util.GetAttrKey)]
        return names[-1] if names else ""


def walk(
    state: State, stop: Callable[[Place, Any], bool] = lambda place, node: False
) -> Iterator[tuple[Place, Any]]:
    """Each node of `state` and its place, parents first; nothing below a node at which `stop`
    holds. A `SparseRows` is a leaf."""
    return _walk(Place(), state, stop)


def _walk(place: Place, node: Any, stop: Any) -> Iterator[tuple[Place, Any]]:
    yield place, node
    if stop(place, node):
        return
    fields, states, groups = fields_of(type(node)), place.states, place.groups
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        states = (*states, type(node))
    is_by_label = isinstance(node, dict) and bool(states) and issubclass(states[-1], GROUPS)
    for key, child in trees.children(node):
        role = fields[key.name].role if fields and key.name in fields else place.role
        if is_by_label:
            groups = (*place.groups, trees.path_str((key,)))
        keys = (*place.keys, key)
        yield from _walk(
            Place(keys, states, groups, None if role is Role.INNER else role), child, stop
        )


class FoundField(NamedTuple):
    """A field somewhere in a state: the state that it is a field of, its name and its value."""

    owner: Any
    name: str
    value: Any

    def leaves(self) -> dict[str, Any]:
        """{path: leaf} of the leaves that are not None."""
        return dict(trees.non_none(self.value))


def find_fields(state: State, *roles: Role) -> list[FoundField]:
    """Every field with one of these roles in a state, however deep."""
    found = []
    for node in jax.tree.leaves(state, is_leaf=lambda x: type(x) in TABLE):
        for name, field in TABLE.get(type(node), {}).items():
            value = getattr(node, name)
            if field.role in roles:
                found.append(FoundField(node, name, value))
            elif field.role is Role.INNER:
                found += find_fields(value, *roles)
    return found
