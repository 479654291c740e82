"""Continuing a training with another optimizer."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import trees
from adam_transforms._core.slots import match
from adam_transforms._core.state_check import differences
from adam_transforms._core.state_layout import (
    MIRRORS,
    Place,
    Role,
    fields_of,
    find_fields,
    walk,
)
from adam_transforms._core.types import Params, Path, State
from adam_transforms._embeddings.deferred.state import DeferredAdamState, synchronized_at
from adam_transforms._tools.checkpoint import check_state
from adam_transforms._transforms.adam import ScheduledDecayState
from adam_transforms._transforms.compress_moments import decoded, encoded

_MOST_LINES = 30


class TransferReport(NamedTuple):
    """What `transfer_state` did.

    Attributes:
      carried: {path in the new state: path in the old one that its value is from}.
      fresh: paths in the new state that keep the value of ``new_tx.init``.
      dropped: paths in the old state that have no counterpart.
    """

    carried: dict[Path, Path]
    fresh: list[Path]
    dropped: list[Path]

    def __str__(self) -> str:
        def listed(name: str, paths: list[Path]) -> list[str]:
            rest = len(paths) - _MOST_LINES
            shown = [f"  {path}" for path in paths[:_MOST_LINES]]
            return [f"{name}: {len(paths)}", *shown, *([f"  and {rest} more"] if rest > 0 else [])]

        return "\n".join(
            [
                *listed("carried", [*self.carried]),
                *listed("fresh", self.fresh),
                *listed("dropped", self.dropped),
            ]
        )


def transfer_state(
    state: State,
    old_tx: optax.GradientTransformation,
    new_tx: optax.GradientTransformation,
    params: Params,
) -> tuple[State, TransferReport]:
    """The state with which `new_tx` continues a training of `old_tx`.

    What both optimizers have carries over, in the dtypes of `new_tx`: moments, averages and copies
    of each parameter, the counts of these, loss scales, and the counts of schedules. A schedule
    without a counterpart starts at Adam's count. All else is that of ``new_tx.init(params)``. Use
    this function to freeze or unfreeze parameters by path, to change between `adam`, `lazy_adam`
    and `deferred_adam`, to add AMSGrad, an average or accumulation, and to replace a constant
    learning rate by a schedule.

    A parameter may be new in a group whose count carries over. Its moments are then zero, but the
    bias correction is that of the count: its first steps are up to (1 - b1) / sqrt(1 - b2) times as
    long, 3.2 at the defaults. In a new group (`by_path`) the count starts at zero.

    Args:
      state: the state of `old_tx`, not traced.
      old_tx, new_tx: the optimizers. Both must accept `params`.
      params: the parameters that `state` belongs to.

    Returns:
      (state of `new_tx`, `TransferReport`).

    Raises:
      ValueError: `old_tx` does not make such a state for `params`; rows of `deferred_adam` have
        pending updates (call `flush` first); `accumulate` has gradients of an incomplete cycle
        (call `flush_accumulated` first).
      TypeError: `old_tx` or `new_tx` is no transformation.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import adam
    >>> params = {"w": jnp.ones(2)}
    >>> old_tx, new_tx = adam(0.1), adam(lambda count: 0.1 / (count + 1), amsgrad=True)
    >>> _, state = old_tx.update(params, old_tx.init(params), params)
    >>> state, report = transfer_state(state, old_tx, new_tx, params)
    >>> int(state[0].count), state[0].mu["w"].round(3).tolist(), int(state[1].inner_state.count)
    (1, [0.1..., 0.1...], 1)
    >>> report.fresh
    ['0/nu_max/w']
    """
    _refuse_others(state, old_tx, new_tx, params)
    _refuse_pending(state)
    made = new_tx.init(params)
    state, new_state = decoded(state), decoded(made)
    old, new = _Leaves.of(params, state), _Leaves.of(params, new_state)
    carried = _carried_slots(old, new)
    carried |= _carried_scalars(old, new, carried)
    steps = max((int(old.values[path]) for path in old.counts()), default=0)

    def fill(keys: Any, x: Any) -> Any:
        path = trees.path_str(keys)
        if path in carried:
            return jnp.asarray(old.values[carried[path]]).astype(x.dtype)
        return jnp.asarray(steps, x.dtype) if path in counts_of_schedules else x

    counts_of_schedules = new.counts_without_slots() - carried.keys()
    new_state = jax.tree_util.tree_map_with_path(fill, new_state)
    new_state = jax.tree.map(
        lambda x: synchronized_at(x, x.count) if isinstance(x, DeferredAdamState) else x,
        new_state,
        is_leaf=lambda x: isinstance(x, DeferredAdamState),
    )
    given = {*carried, *counts_of_schedules}
    report = TransferReport(
        carried,
        [path for path in new.places if path not in given],
        [path for path in old.places if path not in {*carried.values()}],
    )
    return encoded(new_state, made), report


_ORDER = "the arguments are (state, old_tx, new_tx, params), in this order"


def _refuse_others(state: State, old_tx: Any, new_tx: Any, params: Params) -> None:
    """Refuses a state that is not of `old_tx`, and arguments in another order."""
    for name, tx in (("old_tx", old_tx), ("new_tx", new_tx)):
        if not isinstance(tx, optax.GradientTransformation):
            kind = type(tx).__name__
            raise TypeError(f"{name} must be an optax.GradientTransformation, got {kind}: {_ORDER}")
    try:
        check_state(state, like=jax.eval_shape(old_tx.init, params))
    except ValueError as error:
        if differences(state, jax.eval_shape(new_tx.init, params)):
            raise
        raise ValueError(f"{error}\nIt is a state of new_tx: {_ORDER}") from None


def _refuse_pending(state: State) -> None:
    for found in trees.find_states(state, DeferredAdamState):
        for field in find_fields(found, Role.LAST_STEP):
            for path, last_step in field.leaves().items():
                if np.any(np.asarray(last_step) != np.asarray(found.count)):
                    raise ValueError(
                        f"rows of {path!r} may have pending updates: call "
                        "params, state = flush(params, state) first"
                    )
    for _, node in walk(state):
        mini_step = getattr(node, "mini_step", None)
        if mini_step is not None and int(mini_step) != 0:
            raise ValueError(
                f"the state holds {int(mini_step)} gradients of an incomplete cycle: call "
                "updates, state = flush_accumulated(old_tx, state, params) first"
            )


# Started afresh, or made by the new optimizer: gradients that are collected, rows that are frozen,
# what is kept of idle rows, the present learning rates.
_OWN_ROLES = (Role.BUFFER, Role.ROW_MASK, Role.LAST_STEP, Role.SHARED)
_OWN_FIELDS = ("mini_step", "hyperparams", "rate", "rates", "log_decay")

# A state and where it is: the keys to it.
_Owner = tuple[Any, ...]


class _Leaves(NamedTuple):
    """The leaves of a state that may carry over.

    Attributes:
      values: {path: leaf} of all leaves.
      places: {path: the place of the field that holds it}.
      slots: {path: path of the parameter} of those that mirror a parameter.
    """

    values: Mapping[Path, Any]
    places: Mapping[Path, Place]
    slots: Mapping[Path, Path]

    @classmethod
    def of(cls, params: Params, state: State) -> "_Leaves":
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        values = {trees.path_str(keys): x for keys, x in leaves}
        parameters, rest = match(trees.unwrap_variables(params), trees.unwrap_variables(state))
        places, slots = {}, {}
        for parameter in parameters:
            for slot in parameter.slots:
                path = trees.join_paths(str(slot.place), parameter.path)
                places[path], slots[path] = slot.place, parameter.path
        places |= {str(place): place for place, _ in rest}
        own = {
            path
            for path, place in places.items()
            if place.role in _OWN_ROLES or place.field in _OWN_FIELDS or path not in values
        }
        return cls(values, {p: x for p, x in places.items() if p not in own}, slots)

    def owners(self) -> dict[type, list[_Owner]]:
        """The states of each class, in order."""
        found: dict[type, list[_Owner]] = defaultdict(list)
        for place in self.places.values():
            if _owner(place) not in found[_kind(place)]:
                found[_kind(place)].append(_owner(place))
        return found

    def by_field(self) -> dict[tuple[_Owner, str, Path | None], list[Path]]:
        """The paths of the leaves of each field, for a slot those of one parameter."""
        found: dict[Any, list[Path]] = defaultdict(list)
        for path, place in self.places.items():
            found[_owner(place), place.field, self.slots.get(path)].append(path)
        return found

    def counts(self) -> Iterator[Path]:
        """Of Adam's moments."""
        for path, place in self.places.items():
            if place.field == "count" and "mu" in fields_of(_kind(place)):
                yield path

    def counts_without_slots(self) -> set[Path]:
        """Of schedules, which count the steps of the optimizer."""
        return {
            path
            for path, place in self.places.items()
            if place.field in ("count", "cycles")
            and path not in self.slots
            and not _has_slots(_kind(place))
        }


def _owner(place: Place) -> _Owner:
    """The keys to the state that the field is of."""
    attributes = [
        i for i, key in enumerate(place.keys) if isinstance(key, jax.tree_util.GetAttrKey)
    ]
    return place.keys[: attributes[-1]] if attributes else ()


def _kind(place: Place) -> type:
    """The class of the state that the field is of; all states with Adam's moments are one kind."""
    kind = place.states[-1] if place.states else type(None)
    return optax.ScaleByAdamState if "mu" in fields_of(kind) else kind


def _has_slots(kind: type) -> bool:
    """Whether states of a class mirror parameters; of accumulated gradients, of which only the
    count of cycles may carry over, it does not matter."""
    fields = fields_of(kind)
    return "mini_step" not in fields and any(f.role in MIRRORS for f in fields.values())


def _carried_slots(old: _Leaves, new: _Leaves) -> dict[Path, Path]:
    """{path of a slot in the new state: in the old one}."""

    def of_parameters(leaves: _Leaves) -> dict[Any, list[Path]]:
        found: dict[Any, list[Path]] = defaultdict(list)
        for path, parameter in leaves.slots.items():
            place = leaves.places.get(path)
            if place is not None:
                found[parameter, _kind(place), place.field].append(path)
        return found

    old_slots = of_parameters(old)
    pairs = [
        pair
        for key, paths in of_parameters(new).items()
        for pair in zip(paths, old_slots.get(key, []), strict=False)
    ]
    lost = _without_corrections(old, new)
    return {
        path: source
        for path, source in pairs
        if np.shape(old.values[source]) == np.shape(new.values[path])
        and not any(new.places[path].keys[: len(keys)] == keys for keys in lost)
    }


def _without_corrections(old: _Leaves, new: _Leaves) -> list[_Owner]:
    """New states of scheduled decay rates, if the old rates were constant: they need the product of
    the old rates, which no state has."""
    scheduled = new.owners().get(ScheduledDecayState, [])
    return [] if ScheduledDecayState in old.owners() else scheduled


def _carried_scalars(
    old: _Leaves, new: _Leaves, carried_slots: Mapping[Path, Path]
) -> dict[Path, Path]:
    """{path of any other leaf in the new state: in the old one}: of the state that the slots came
    from, or of the state of the same class and position."""
    origins: dict[_Owner, Counter[_Owner]] = defaultdict(Counter)
    for path, source in carried_slots.items():
        origins[_owner(new.places[path])][_owner(old.places[source])] += 1
    old_owners, old_fields = old.owners(), old.by_field()
    carried = {}
    for kind, owners in new.owners().items():
        for i, owner in enumerate(owners):
            if owner in origins:
                source = origins[owner].most_common(1)[0][0]
            elif _has_slots(kind) or i >= len(old_owners.get(kind, [])):
                continue
            else:
                source = old_owners[kind][i]
            for (of, field, parameter), paths in new.by_field().items():
                if of == owner and parameter is None:
                    sources = old_fields.get((source, field, None), [])
                    if len(sources) == len(paths):
                        carried |= dict(zip(paths, sources, strict=True))
    return carried
