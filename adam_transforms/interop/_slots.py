"""Finds and reads the parts of an optimizer state that other systems have too."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import state_layout, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.state_layout import Role
from adam_transforms._core.types import Params, Path, State
from adam_transforms._transforms.accumulation import ACCUMULATE_STATES
from adam_transforms._transforms.adam import ScheduledDecayState
from adam_transforms._transforms.compress_moments import decoded
from adam_transforms._transforms.ema import ParamsEmaState
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState


class Contents(NamedTuple):
    """The imported or exported contents of a state.

    Attributes:
      count: the number of updates, Adam's count.
      slots: {path: {slot: array}}; the slots are mu, nu, nu_max, ema (of `params_ema`) and acc
        (of `accumulate`, the sum of gradients in the current cycle).
      calls: the number of calls of an accumulation, several per update; None if unknown.
      mini_step: the number of gradients in the current cycle of an accumulation.
      scale, finite_steps: the dynamic loss scale and its counter; None and 0 without one.
    """

    count: int
    slots: Mapping[Path, Mapping[str, Any]]
    calls: int | None = None
    mini_step: int = 0
    scale: Any = None
    finite_steps: int = 0


def init_state(tx: Any, params: Params) -> State:
    """``tx.init(params)``, checked to contain Adam's moments."""
    if isinstance(tx, type) or not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be a gradient transformation or an optimizer, got {tx!r}")
    state = tx.init(params)
    _checked_adam_states(state)
    return state


def slots_of(state: State, *, ema: bool = False, acc: bool = False) -> dict[Path, dict[str, Any]]:
    """{path: {slot: leaf}} of Adam's moments and optionally of averages and accumulators.

    Raises:
      ValueError: two states have the same slot of a parameter, or there is no Adam state.
    """
    slots: dict[Path, dict[str, Any]] = {}
    for slot, tree in _slot_trees(state, ema, acc):
        for path, leaf in trees.flatten_with_paths(tree)[0]:
            if leaf is None:
                continue
            if slots.setdefault(path, {}).setdefault(slot, leaf) is not leaf:
                raise ValueError(f"the state has two slots {slot} of {path!r}")
    return slots


def find(state: State, predicate: Callable[[Any], bool]) -> list[Any]:
    """The states inside `state` for which the predicate holds, the outermost of nested ones."""
    return [x for x in jax.tree.leaves(state, is_leaf=predicate) if predicate(x)]


def adam_states(state: State) -> list[Any]:
    """The states with Adam's moments inside `state`."""
    return find(state, state_layout.is_adam)


def read(state: State, params: Params) -> Contents:
    """The contents of a state as NumPy arrays.

    Raises:
      ValueError: there is no Adam state, or there are several with different counts; slots and
        `params` do not match; there are pending updates; or a part cannot be exported.
    """
    adams = _checked_adam_states(state)
    counts = sorted({int(adam.count) for adam in adams})
    if len(counts) > 1:
        raise ValueError(f"the Adam states have different numbers of steps: {counts}")
    for adam in adams:
        _check_synchronized(adam)
    for average in trees.find_states(state, ParamsEmaState):
        if float(average.weight) != 1.0:
            raise ValueError(
                "the state has an average with debias=True, which other systems do not have"
            )
    mini_step = 0
    for found in find(state, state_layout.is_accumulation):
        mini_step = int(found.mini_step)
        if mini_step and isinstance(found, optax.MultiStepsState):
            raise ValueError(
                "a cycle of optax.MultiSteps is under way, and its accumulator cannot be exported: "
                "export after the cycle, or use accumulate"
            )
        if mini_step and getattr(found, "weight", None) is not None:
            raise ValueError(
                "a cycle of accumulate with weights is under way, and its accumulator cannot be "
                "exported: export after the cycle"
            )
    slots = slots_of(state, ema=True, acc=True)
    _check_params(slots, params)
    for path, leaves in slots.items():
        if "acc" in leaves and mini_step == 0:  # left over from the last cycle
            leaves["acc"] = np.zeros(leaves["acc"].shape, leaves["acc"].dtype)
        if isinstance(leaves.get("acc"), SparseRows):
            raise ValueError(row_accumulator_message(path))
    arrays = {path: {slot: np.array(x) for slot, x in of.items()} for path, of in slots.items()}
    contents = Contents(counts[0], arrays, mini_step=mini_step)
    for found in trees.find_states(state, DynamicLossScaleState):
        contents = contents._replace(
            scale=np.array(found.scale), finite_steps=int(found.finite_steps)
        )
    return contents


def _checked_adam_states(state: State) -> list[Any]:
    if trees.find_states(state, ScheduledDecayState):
        raise ValueError(
            "tx has a schedule for b1 or b2, and its state has a running product of their values, "
            "which cannot be imported or exported: use numbers"
        )
    found = adam_states(state)
    if not found:
        raise ValueError(
            "the state of tx has no Adam state (count, mu and nu), such as that of optax.adam, "
            "scale_by_adam or deferred_adam"
        )
    return found


def _slot_trees(state: State, ema: bool, acc: bool) -> Iterator[tuple[str, Any]]:
    for found in _checked_adam_states(decoded(state)):
        for slot in state_layout.slot_names(found):
            yield slot, getattr(found, slot)
    for found in trees.find_states(state, ParamsEmaState) if ema else ():
        yield "ema", found.ema
    for found in trees.find_states(state, ACCUMULATE_STATES) if acc else ():
        yield "acc", found.acc


# ---- checks -------------------------------------------------------------------------------------


def _check_synchronized(adam: Any) -> None:
    """Raises ValueError if a row of a deferred table has pending updates."""
    for field in state_layout.find_fields(adam, Role.LAST_STEP):
        for last_step in field.leaves().values():
            if np.any(np.asarray(last_step) != np.asarray(adam.count)):
                raise ValueError(
                    "the state has pending updates of table rows: call flush(params, state) first, "
                    "and use the parameters that it returns"
                )


def row_accumulator_message(path: Path) -> str:
    return (
        f"a cycle of accumulation is under way, and the accumulator of {path!r} has row gradients, "
        "which cannot be imported or exported: do it between cycles"
    )


def _check_params(slots: Mapping[Path, Mapping[str, Any]], params: Params) -> None:
    leaves = trees.flatten_with_paths(params)[0]
    shapes = {path: jnp.shape(p) for path, p in leaves if p is not None}
    for path, arrays in slots.items():
        for slot, array in arrays.items():
            if shapes.get(path) != array.shape:
                problem = f"has shape {list(shapes[path])}" if path in shapes else "is missing"
                raise ValueError(
                    f"the state does not match params: {path!r} {problem}, "
                    f"but its {slot} has shape {list(array.shape)}"
                )
