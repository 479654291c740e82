"""What Keras's Adam keeps, by Keras's names and in its order, out of our state."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import trees
from adam_transforms._transforms.accumulation import AccumulateState
from adam_transforms.compat._optimizer import Variable
from adam_transforms.interop import _slots, keras as interop

_LEGACY_NAMES = {"mu": "m", "nu": "v", "nu_max": "vhat"}


def adam_state(state: Any) -> Any:
    """Adam's own state, of which there is one."""
    found = trees.find_states(state, (optax.ScaleByAdamState, optax.ScaleByAmsgradState))
    if len(found) != 1:
        raise ValueError(f"state must be one that init gave, found {len(found)} Adam states in it")
    return found[0]


def calls(adam: Any, state: Any) -> jax.Array:
    """Calls of apply so far, Keras's raw iterations."""
    made = adam_state(state).count * (adam.gradient_accumulation_steps or 1)
    for found in trees.find_states(state, AccumulateState):
        made = made + found.mini_step
    return made


def scalars(adam: Any, state: Any) -> list[Variable]:
    """What comes before the slots: the count, and in Keras 3 the learning rate if it is a
    number."""
    if adam.legacy:
        return [Variable(f"{adam.name}/iter:0", calls(adam, state))]
    variables = [Variable(f"{adam.name}/iteration", calls(adam, state))]
    if not callable(adam.learning_rate):
        rate = jnp.asarray(adam.learning_rate, jnp.float32)
        variables.append(Variable(f"{adam.name}/learning_rate", rate))
    return variables


def slot_names(adam: Any) -> list[str]:
    """Keras's names for the slots, in its order."""
    return [name for name, _ in _order(adam, 1)]


def slots(adam: Any, state: Any) -> dict[str, dict[str, Any]]:
    """{path: {slot: array}}, the slots by Keras's names."""
    adam_state(state)
    found = _slots.slots_of(state, ema=True, acc=True)
    for accumulation in trees.find_states(state, AccumulateState):
        # Once a cycle has ended, what is left there means nothing.
        over = accumulation.mini_step == 0
        for of_path in found.values():
            of_path["acc"] = jnp.where(over, jnp.zeros_like(of_path["acc"]), of_path["acc"])
    names = _names(adam)
    return {
        path: {names[slot]: array for slot, array in of_path.items()}
        for path, of_path in found.items()
    }


def slot_variables(adam: Any, state: Any, names: Sequence[str] | None) -> list[Variable]:
    """The slots of all parameters, which come in the order of `names`."""
    arrays = slots(adam, state)
    paths = list(arrays)
    if names is not None:
        if isinstance(names, str) or sorted(names) != sorted(paths):
            raise ValueError(f"names must be {paths} in some order, got {names!r}")
        paths = list(names)
    return [
        Variable(_slot_path(adam, paths[i], slot), arrays[paths[i]][slot])
        for slot, i in _order(adam, len(paths))
    ]


def _names(adam: Any) -> dict[str, str]:
    """From our names for slots to Keras's."""
    return _LEGACY_NAMES if adam.legacy else interop.SLOT_NAMES


def _order(adam: Any, variables: int) -> list[tuple[str, int]]:
    """[(slot, position of its variable), ...] as Keras has them."""
    layout = interop.Layout(
        ema=adam.use_ema,
        acc=adam.gradient_accumulation_steps is not None,
        amsgrad=adam.amsgrad,
        legacy=adam.legacy,
    )
    names, entries = _names(adam), interop.entries(layout, variables)
    return [(names[what], i) for what, i in entries if i is not None]


def _slot_path(adam: Any, path: str, slot: str) -> str:
    if adam.legacy:
        return f"{adam.name}/{path}/{slot}:0"
    return f"{adam.name}/{path.replace('/', '_')}_{slot}"


def loaded(
    optimizer: Any, store: Any, params: Any, names: Sequence[str] | None, rename: Any
) -> Any:
    """The state that a store, a mapping or a list of arrays, is of."""
    if not isinstance(store, Mapping | Sequence) or isinstance(store, str):
        raise TypeError(
            f"expected what save_own_variables or get_weights gave, got {store!r:.80}; a file is "
            "read by interop.keras.state_from(path, params, optimizer)"
        )
    adam = optimizer.adam
    if names is None:
        names = [path for path, leaf in trees.flatten_with_paths(params)[0] if leaf is not None]
    moments = 3 * len(names) + 1
    if adam.legacy and not adam.amsgrad and len(store) == moments:
        # What Keras 1 saved has a vhat whether it is used or not, at the end.
        store = [_entry(store, i) for i in range(2 * len(names) + 1)]
    state = interop.state_from(store, params, optimizer, names, rename=rename, legacy=adam.legacy)
    if not adam.legacy:
        _check_learning_rate(optimizer, store, state)
    return state


def _check_learning_rate(optimizer: Any, store: Any, state: Any) -> None:
    """Refuses a learning rate in the store that is not the optimizer's, which keeps none."""
    slots = len(slot_variables(optimizer.adam, state, None))
    at = len(optimizer.own_variables(state)) + 1
    theirs = float(np.float32(_entry(store, at))) if len(store) - slots > at else None
    rate = optimizer.adam.learning_rate
    ours = None if callable(rate) else float(np.float32(rate))
    if theirs == ours:
        return
    what = "a schedule" if theirs is None else f"{theirs:g}"
    rate = "a schedule or a function" if ours is None else f"{ours:g}"
    raise ValueError(
        f"the learning rate in the store is {what}, that of the optimizer {rate}: load into one "
        "that has it, dataclasses.replace(optimizer, learning_rate=...) (of the inner_optimizer)"
    )


def _entry(store: Any, i: int) -> np.ndarray:
    return np.asarray(store[str(i)] if isinstance(store, Mapping) else store[i])
