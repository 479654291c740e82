"""The variables of Keras's Adam in an optimizer state, with Keras's names and order."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._core import trees
from adam_transforms._core.types import Params, Path, State
from adam_transforms._transforms.accumulation import AccumulateState
from adam_transforms.compat._optimizer import Variable, trained
from adam_transforms.interop import _slots, keras as interop

_LEGACY_NAMES = {"mu": "m", "nu": "v", "nu_max": "vhat"}


def adam_state(state: State) -> Any:
    """The Adam state inside `state`, checked to be the only one."""
    found = _slots.adam_states(state)
    if len(found) != 1:
        raise ValueError(f"state must be a result of init, but has {len(found)} Adam states")
    return found[0]


def calls(adam: Any, state: State) -> jax.Array:
    """The number of calls of `apply`: Keras's variable `iteration`."""
    count = adam_state(state).count * (adam.gradient_accumulation_steps or 1)
    for found in trees.find_states(state, AccumulateState):
        count = count + found.mini_step
    return count


def scalar_variables(adam: Any, state: State) -> list[Variable]:
    """The variables before the slots: iteration, and in Keras 3 a constant learning rate."""
    if adam.legacy:
        return [Variable(f"{adam.name}/iter:0", calls(adam, state))]
    variables = [Variable(f"{adam.name}/iteration", calls(adam, state))]
    if not callable(adam.learning_rate):
        rate = jnp.asarray(adam.learning_rate, jnp.float32)
        variables.append(Variable(f"{adam.name}/learning_rate", rate))
    return variables


def slot_names(adam: Any) -> list[str]:
    """Keras's names of the slots, in its order."""
    return [name for name, _ in _order(adam, 1)]


def slots(adam: Any, state: State) -> dict[Path, dict[str, Any]]:
    """{path: {Keras's name of the slot: array}}."""
    adam_state(state)
    found = _slots.slots_of(state, ema=True, acc=True)
    for accumulation in trees.find_states(state, AccumulateState):
        # After a cycle, Keras's accumulator is zero; ours still has the last sum.
        is_empty = accumulation.mini_step == 0
        for arrays in found.values():
            arrays["acc"] = jnp.where(is_empty, jnp.zeros_like(arrays["acc"]), arrays["acc"])
    names = _names(adam)
    return {
        path: {names[slot]: array for slot, array in arrays.items()}
        for path, arrays in found.items()
    }


def slot_variables(adam: Any, state: State, names: Sequence[Path] | None) -> list[Variable]:
    """The slots of all parameters; `names` gives the order of the parameters."""
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
    """{slot: Keras's name of it}."""
    return _LEGACY_NAMES if adam.legacy else interop.SLOT_NAMES


def _order(adam: Any, variables: int) -> list[tuple[str, int]]:
    """[(Keras's name of the slot, position of its variable), ...] in Keras's order."""
    names, entries = _names(adam), interop.entries(_layout(adam), variables)
    return [(names[slot], i) for slot, i in entries if i is not None]


def _layout(adam: Any) -> interop.Layout:
    return interop.Layout(
        ema=adam.use_ema,
        acc=adam.gradient_accumulation_steps is not None,
        amsgrad=adam.amsgrad,
        legacy=adam.legacy,
    )


def _slot_path(adam: Any, path: Path, slot: str) -> str:
    """Keras's name of a slot variable."""
    if adam.legacy:
        return f"{adam.name}/{path}/{slot}:0"
    return f"{adam.name}/{path.replace('/', '_')}_{slot}"


def load_state(
    optimizer: Any, store: Any, params: Params, names: Sequence[str] | None, rename: Any
) -> State:
    """The state of `optimizer` with the arrays of a store, a mapping or a list."""
    if not isinstance(store, Mapping | Sequence) or isinstance(store, str):
        raise TypeError(
            "expected a result of save_own_variables or get_weights, got "
            f"{store!r:.80}; to read a file, use interop.keras.state_from(path, params, optimizer)"
        )
    adam, params = optimizer.adam, trained(params)
    if names is None:
        names = [path for path, leaf in trees.flatten_with_paths(params)[0] if leaf is not None]
    count_with_vhat = 3 * len(names) + 1
    if adam.legacy and not adam.amsgrad and len(store) == count_with_vhat:
        # Keras 1 always saves vhat, after all other variables, even without amsgrad.
        store = [_entry(store, i) for i in range(2 * len(names) + 1)]
    state = interop.state_from(store, params, optimizer, names, rename=rename, legacy=adam.legacy)
    if not adam.legacy:
        layout = _layout(adam)._replace(loss_scale=bool(optimizer.own_variables(state)))
        _check_learning_rate(adam, store, interop.entries(layout, len(names)))
    return state


def check_names(weights: Sequence[Any], own: Sequence[Variable]) -> None:
    """Raises ValueError if a `Variable` in `weights` has another name than that in its place.

    The name of the optimizer, which is the first part, may differ.
    """
    for i, (given, expected) in enumerate(zip(weights, own, strict=False)):
        if not isinstance(given, Variable):
            continue
        if given.path.partition("/")[2] != expected.path.partition("/")[2]:
            raise ValueError(
                f"weights[{i}] is {given.path!r}, where {expected.path!r} is expected: pass the "
                "same names to variables and to set_weights"
            )


def _check_learning_rate(adam: Any, store: Any, order: Sequence[tuple[str, int | None]]) -> None:
    """Raises ValueError if the stored learning rate differs from the optimizer's.

    Args:
      adam: the optimizer.
      store: the arrays.
      order: the entries of a store that has a learning rate.
    """
    stored = None
    if len(store) == len(order):
        stored = float(np.float32(_entry(store, order.index(("learning_rate", None)))))
    rate = adam.learning_rate
    own = None if callable(rate) else float(np.float32(rate))
    if stored == own:
        return
    stored_text = "a schedule" if stored is None else f"{stored:g}"
    own_text = "a schedule or a function" if own is None else f"{own:g}"
    raise ValueError(
        f"the learning rate in the store is {stored_text}, that of the optimizer {own_text}, and a "
        "state does not contain it: load into dataclasses.replace(optimizer, learning_rate=...) "
        "(for a LossScaleOptimizer, replace it in the inner_optimizer)"
    )


def _entry(store: Any, i: int) -> np.ndarray:
    return np.asarray(store[str(i)] if isinstance(store, Mapping) else store[i])
