"""Imports and exports the `state_dict()` of PyTorch's Adam, AdamW and SparseAdam."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from adam_transforms._core.types import Params, State
from adam_transforms.interop import _filling, _matching, _slots

__all__ = ["state_from", "state_to"]

_LABELS = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
_SLOTS = {label: slot for slot, label in _LABELS.items()}


Pairs: TypeAlias = Sequence[tuple[Mapping[str, Any], Sequence[str] | None]]
"""Several optimizers of one model: the `state_dict` of each, and the names of its parameters."""


def state_from(
    state_dict: Mapping[str, Any] | Pairs,
    params: Params,
    tx: Any,
    names: Sequence[str] | None = None,
    *,
    rename: _matching.Rename | None = None,
) -> State:
    """Imports the state of a PyTorch optimizer into a state of `tx`.

    Imported are the moments and the number of steps, the latter into schedules too. The
    hyperparameters are those of `tx`. With ``amsgrad``, `tx` must take the maximum as PyTorch does
    (``max_of="raw"``). An average of the parameters restarts from the current ones.

    Args:
      state_dict: the state of Adam, AdamW (with or without ``amsgrad``) or SparseAdam, in tensors
        or arrays; or, for several optimizers of one model, such as AdamW and a SparseAdam of the
        tables, a list of (state_dict, names). All must have taken the same number of steps. Read
        files with ``torch.load(path, weights_only=True)``, which unpickles no objects.
      params: the current parameters.
      tx: any transformation or optimizer whose state has Adam's moments. Slots are cast to the
        dtypes of that state.
      names: the names of the parameters in the order of the optimizer,
        ``[name for name, _ in model.named_parameters()]``. None for the ``param_names`` of the
        groups if present, else for "0", "1", ... If `state_dict` is a list, the names are in it.
      rename: maps a path in `params` to the PyTorch name, or to (name, axes), where
        ``torch_array.transpose(axes)`` has the layout of the parameter. None if each path is the
        name. For a Flax kernel: ``("fc.weight", (1, 0))`` of a Linear, ``("conv.weight",
        (2, 3, 1, 0))`` of a Conv2d.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: the state is not Adam's; step counts differ between parameters; two optimizers
        have a parameter of one name; or slots do not match: lists all that are missing, left over,
        of another shape, or not representable in the slot's dtype, and second moments that are
        negative or not finite.

    >>> import numpy as np, optax
    >>> one = {"step": 7.0, "exp_avg": np.ones((2, 3)), "exp_avg_sq": np.ones((2, 3))}
    >>> state_dict = {"state": {0: one}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    >>> params = {"kernel": np.zeros((3, 2), np.float32)}
    >>> state = state_from(
    ...     state_dict, params, optax.adam(0.1), ["weight"], rename=lambda path: ("weight", (1, 0))
    ... )
    >>> int(state[0].count), state[0].mu["kernel"].shape
    (7, (3, 2))
    """
    several = _nested(state_dict)
    if several and names is not None:
        raise ValueError("names must be None: a list of (state_dict, names) has them")
    pairs = _checked_pairs(state_dict) if several else [(state_dict, names)]
    entries = [pair for one in pairs for pair in _entries(*one)]
    listed = [name for name, _ in entries]
    _matching.checked_names(listed, len(listed), "all optimizers' parameters")
    source = {name: _slots_of(name, entry) for name, entry in entries}
    stepped = {name: entry for name, entry in entries if entry}
    state = _slots.init_state(tx, params)
    if not stepped:  # before the first step
        return state
    slots = _matching.import_slots(source, _slots.slots_of(state), rename, _label)
    return _filling.fill_state(state, _slots.Contents(_count(stepped), slots))


def state_to(
    state: State,
    params: Params,
    names: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    rename: _matching.Rename | None = None,
    param_groups: Sequence[Any] | None = None,
) -> Any:
    """Exports a state as a PyTorch `state_dict`; the inverse of `state_from`.

    Args:
      state: an optimizer state with Adam's moments and without pending updates (see `flush`).
      params: the parameters of that state.
      names: as for `state_from`; None for the ``param_names`` of `param_groups` if present, else
        for "0", "1", ... For several optimizers of one model, a list with the names of each.
      rename: as for `state_from`; the transposes are inverted.
      param_groups: ``optimizer.state_dict()["param_groups"]`` of the optimizer that will load the
        result; PyTorch reads the hyperparameters from it. None for one group without any. For
        several optimizers, a list with the groups of each.

    Returns:
      A dictionary of new NumPy arrays in the dtypes of the slots; for several optimizers, a list of
      (dictionary, names). The step is a float32 array, for SparseAdam an int. To load a dictionary
      into PyTorch::

          as_tensor = lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
          optimizer.load_state_dict(jax.tree.map(as_tensor, state_dict))

      PyTorch casts slots to the parameter's dtype. `from_numpy` does not accept bfloat16: cast such
      arrays to float32, which is exact.

    Raises:
      TypeError, ValueError: the names, groups or state do not match.

    >>> import numpy as np, optax
    >>> params = [np.zeros(2, np.float32)]
    >>> state_to(optax.adam(0.1).init(params), params)["state"][0]["exp_avg"].tolist()
    [0.0, 0.0]
    """
    contents = _slots.read(state, params)
    moments = {path: _moments(slots) for path, slots in contents.slots.items()}
    exported = _matching.export_slots(
        {path: slots for path, slots in moments.items() if slots}, rename
    )
    if not _nested(names):
        return _state_dict(exported, contents.count, names, param_groups)
    _matching.in_order(exported, [name for of_one in names for name in of_one], "all optimizers")
    groups = [None] * len(names) if param_groups is None else list(param_groups)
    if len(groups) != len(names):
        raise ValueError(f"param_groups must be {len(names)} lists, as names, got {len(groups)}")
    pairs = []
    for names_there, groups_there in zip(names, groups, strict=True):
        of_one = {name: exported[name] for name in names_there if name in exported}
        one = _state_dict(of_one, contents.count, names_there, groups_there)
        pairs.append((one, list(names_there)))
    return pairs


def _state_dict(
    exported: _matching.Slots, count: int, names: Any, param_groups: Any
) -> dict[str, Any]:
    """The `state_dict` of one optimizer."""
    if param_groups is None:
        names = _matching.in_order(exported, names, "the optimizer's parameters")
        groups: list[dict[str, Any]] = [{"params": list(range(len(names))), "param_names": names}]
    else:
        groups = [dict(group) for group in _checked_groups(param_groups)]
        ids = _ids(groups)
        names = _matching.in_order(
            exported, _names(names, groups, len(ids)), "the parameter groups"
        )
    states = {}
    for name, i, group in zip(names, _ids(groups), _groups_by_id(groups), strict=True):
        if name in exported:
            _check_amsgrad(name, exported[name], group)
            slots = {_LABELS[slot]: array for slot, array in exported[name].items()}
            states[i] = {"step": _step(count, group), **slots}
    return {"state": states, "param_groups": groups}


def _nested(x: Any) -> TypeGuard[Sequence[Sequence[Any]]]:
    """Whether `x` is a list of sequences, one for each of several optimizers."""
    return _is_sequence(x) and len(x) > 0 and all(_is_sequence(y) for y in x)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str | bytes)


def _checked_pairs(pairs: Any) -> list[tuple[Any, Any]]:
    if not all(len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"state_dict must be a list of pairs (state_dict, names), got {pairs!r:.80}"
        )
    return [(one, names) for one, names in pairs]


def _entries(state_dict: Any, names: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """[(name, state of the parameter, empty before its first step), ...] of one optimizer."""
    groups, states = _parts(state_dict)
    ids = _ids(groups)
    unknown = [key for key in states if key not in ids]
    if unknown:
        raise ValueError(f"state_dict has states for {unknown}, which are in no parameter group")
    names = _names(names, groups, len(ids))
    return [(name, states.get(i, {})) for name, i in zip(names, ids, strict=True)]


def _parts(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """(parameter groups, {parameter id: its state})."""
    if hasattr(state_dict, "state_dict"):
        kind = type(state_dict).__name__
        raise TypeError(f"state_dict must be a mapping, got a {kind}: call its state_dict() first")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a mapping, got {state_dict!r:.80}; for several optimizers, a list "
            "of (state_dict, names)"
        )
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"state_dict lacks {missing}, got the keys {list(state_dict)[:8]}: it must be the "
            "optimizer's, not the model's"
        )
    states = state_dict["state"]
    if not isinstance(states, Mapping) or not all(isinstance(x, Mapping) for x in states.values()):
        raise TypeError(f"state_dict['state'] must map to mappings, got {states!r:.80}")
    return _checked_groups(state_dict["param_groups"]), states


def _checked_groups(groups: Any) -> list[Mapping[str, Any]]:
    if isinstance(groups, Mapping | str) or not isinstance(groups, Sequence):
        raise TypeError(f"param_groups must be a list of mappings, got {groups!r:.80}")
    if not all(isinstance(x, Mapping) and _is_sequence(x.get("params")) for x in groups):
        raise TypeError(
            f"each of param_groups must be a mapping with 'params', a list, got {groups!r:.80}"
        )
    return list(groups)


def _ids(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [i for group in groups for i in group["params"]]


def _groups_by_id(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [group for group in groups for _ in group["params"]]


def _names(names: Any, groups: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """`names`, or else the names in the groups, or else positions; checked."""
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None:
        names = _matching.positions(count)
    return _matching.checked_names(names, count, "the optimizer's parameters")


def _slots_of(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The slots of one parameter: {mu, nu, nu_max: array}."""
    unknown = [key for key in entry if key != "step" and key not in _SLOTS]
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if entry and key not in entry]
    if unknown or missing:
        raise ValueError(
            f"the state of {name!r} is not Adam's: expected step, exp_avg, exp_avg_sq and perhaps "
            f"max_exp_avg_sq, got {list(entry)}"
        )
    return {_SLOTS[key]: value for key, value in entry.items() if key != "step"}


def _count(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """The number of steps, the same for all parameters."""
    steps = {
        name: _matching.as_count(f"step of {name!r}", x["step"]) for name, x in entries.items()
    }
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"the step counts of the parameters differ, but tx has a single count: {steps}; set "
            "the step of all to one number in the state_dict"
        )
    return next(iter(steps.values()))


def _label(name: str, slot: str) -> str:
    return f"{_LABELS[slot]} of {name!r}"


def _moments(slots: Mapping[str, Any]) -> dict[str, Any]:
    return {slot: array for slot, array in slots.items() if slot in _LABELS}


def _step(count: int, group: Mapping[str, Any]) -> Any:
    """The step as PyTorch stores it: an int for SparseAdam, whose groups have no amsgrad."""
    sparse = len(group) > 2 and "amsgrad" not in group
    return count if sparse else np.array(count, np.float32)


def _check_amsgrad(name: str, slots: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    if "amsgrad" in group and bool(group["amsgrad"]) != ("nu_max" in slots):
        raise ValueError(
            f"the parameter group of {name!r} has amsgrad={group['amsgrad']}, but the state "
            f"{'has' if 'nu_max' in slots else 'lacks'} a maximum of nu"
        )


def __dir__() -> list[str]:
    return __all__
