"""Imports object checkpoints of TensorFlow 2, which hold an Adam of tf.keras or Keras 3."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adam_transforms._core import trees
from adam_transforms._core.types import Params, State
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState
from adam_transforms.interop import _filling, _matching, _slots
from adam_transforms.interop.keras import state_from_variables

__all__ = ["state_from"]

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
# {our slot: the slot of tf.keras}.
_SLOT_NAMES = {"mu": "m", "nu": "v", "nu_max": "vhat"}
# The counter and the value of a dynamic loss scale, in Keras 3 and in tf.keras.
_LOSS_SCALES = (
    ("step_counter", "dynamic_scale"),
    ("loss_scale/good_steps", "loss_scale/current_loss_scale"),
)


def state_from(
    arrays: Mapping[str, Any],
    params: Params,
    tx: Any,
    names: Sequence[str] | None = None,
    *,
    optimizer: str = "optimizer",
    rename: _matching.Rename | None = None,
    every: int | None = None,
) -> State:
    """Imports the optimizer of an object checkpoint of TensorFlow 2 into a state of `tx`.

    These are written by ``tf.train.Checkpoint(model=model, optimizer=optimizer)``, by tf.keras's
    ``model.save_weights(path)`` and in the folder ``variables`` of a SavedModel. Imported are the
    moments and the number of steps, the latter into schedules too. The hyperparameters are those of
    `tx`; its epsilon equals TensorFlow's with ``eps_hat=True``, and its AMSGrad with
    ``max_of="raw"``. `state_to` of `interop.keras` gives what ``optimizer.set_weights`` takes.

    Optimizers of tf.keras before 2.11, later called legacy, keep slots with the variables, under
    ``<variable>/.OPTIMIZER_SLOT/<optimizer>/m``. The name of a variable is its path of attributes,
    such as ``model/layer_with_weights-0/kernel``. Later optimizers, and Keras 3, number their
    variables, under ``<optimizer>/_variables/2``. Parameters then have `names` as in
    `interop.keras.state_from`; averages and accumulated gradients are imported too.

    Args:
      arrays: {key: array}, as ``{key: reader.get_tensor(key) for key in
        reader.get_variable_to_shape_map()}`` with ``reader = tf.train.load_checkpoint(path)``.
        Keys of anything but the optimizer are ignored.
      params: the current parameters.
      tx: any transformation or optimizer whose state has Adam's moments. Slots are cast to the
        dtypes of that state.
      names: for numbered variables only: the names in the order of the optimizer,
        ``[v.name for v in model.trainable_variables]``. None for "0", "1", ...
      optimizer: the path of the optimizer's attributes: its keyword in ``tf.train.Checkpoint``.
      rename: maps a path in `params` to the variable's name, or to (name, axes), where
        ``tensorflow_array.transpose(axes)`` has the layout of the parameter. None if each path is
        the name.
      every: gradient_accumulation_steps; None for the value of `tx`, an optimizer of `compat`.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: there is no such optimizer, or it is not Adam; it has a dynamic loss scale and
        `tx` has none, or the reverse; the number of its arrays differs; or slots do not match:
        lists all that are missing, left over, of another shape, or not representable in the slot's
        dtype, and second moments that are negative or not finite.

    >>> import numpy as np, optax
    >>> arrays = {"optimizer/iter": np.int64(7)}
    >>> arrays |= {f"model/w/.OPTIMIZER_SLOT/optimizer/{slot}": np.ones(2) for slot in "mv"}
    >>> arrays = {f"{key}/.ATTRIBUTES/VARIABLE_VALUE": x for key, x in arrays.items()}
    >>> params = {"w": np.zeros(2, np.float32)}
    >>> state = state_from(arrays, params, optax.adam(0.1), rename=lambda path: f"model/{path}")
    >>> int(state[0].count), state[0].mu["w"].tolist()
    (7, [1.0, 1.0])
    """
    if not isinstance(arrays, Mapping) or not all(isinstance(key, str) for key in arrays):
        raise TypeError(f"arrays must map keys to arrays, got {arrays!r:.80}")
    values = {key.removesuffix(_VALUE): x for key, x in arrays.items() if key.endswith(_VALUE)}
    slots = _slots_in(values, optimizer)
    numbered = _numbered_in(values, optimizer)
    if not slots and not numbered:
        raise ValueError(_missing_message(values, optimizer))
    state = _slots.init_state(tx, params)
    scale = _loss_scale(values, optimizer)
    if bool(scale) != bool(trees.find_states(state, DynamicLossScaleState)):
        raise ValueError(
            f"{optimizer!r} has {'a' if scale else 'no'} dynamic loss scale, but the state of tx "
            f"has {'none' if scale else 'one'}"
        )
    if numbered:
        outer = [np.int64(0), np.float32(0.0), *scale] if scale else []
        return state_from_variables(
            outer + numbered, params, tx, names, rename=rename, every=every, legacy=False
        )
    if f"{optimizer}/iter" not in values:
        raise ValueError(f"the checkpoint has slots of {optimizer!r}, but no {optimizer}/iter")

    def label(variable: str, slot: str) -> str:
        return repr(f"{variable}{_SLOT}{optimizer}/{_SLOT_NAMES.get(slot, slot)}")

    contents = _slots.Contents(
        count=_matching.as_count(f"{optimizer}/iter", values[f"{optimizer}/iter"]),
        slots=_matching.import_slots(slots, _slots.slots_of(state), rename, label),
    )
    if scale:
        contents = contents._replace(
            finite_steps=_matching.as_count("good_steps", scale[0]),
            scale=_matching.as_scale("current_loss_scale", scale[1]),
        )
    return _filling.fill_state(state, contents)


def _slots_in(values: Mapping[str, Any], optimizer: str) -> dict[str, dict[str, Any]]:
    """{variable: {slot: array}} of the slots that are kept with the variables."""
    ours = {name: slot for slot, name in _SLOT_NAMES.items()}
    slots: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        variable, is_slot, owner_and_slot = key.partition(_SLOT)
        owner, _, slot = owner_and_slot.rpartition("/")
        if not is_slot or owner != optimizer:
            continue
        if slot not in ours:
            raise ValueError(f"{optimizer!r} is not Adam: it has a slot {slot!r} of {variable!r}")
        slots.setdefault(variable, {})[ours[slot]] = value
    return slots


def _numbered_in(values: Mapping[str, Any], optimizer: str) -> list[Any]:
    """The numbered variables in order, or none; the first two may have names instead of numbers."""
    inner = f"{optimizer}/inner_optimizer"  # in Keras 3's LossScaleOptimizer
    path = inner if f"{inner}/_iterations" in values else optimizer
    prefix = f"{path}/_variables/"
    numbers = {
        int(key.removeprefix(prefix)): value
        for key, value in values.items()
        if re.fullmatch(re.escape(prefix) + "[0-9]{1,9}", key)
    }
    if not numbers:
        return []
    for number, name in enumerate(("_iterations", "_learning_rate")):
        if f"{path}/{name}" in values:
            numbers.setdefault(number, values[f"{path}/{name}"])
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"{prefix}N must have every N below {max(numbers)}, got {sorted(numbers)}")
    return [numbers[number] for number in range(len(numbers))]


def _loss_scale(values: Mapping[str, Any], optimizer: str) -> list[Any]:
    """[the finite steps since the scale has changed, the scale], or none."""
    for keys in _LOSS_SCALES:
        if f"{optimizer}/{keys[1]}" in values:
            return [values.get(f"{optimizer}/{key}", 0) for key in keys]
    return []


def _missing_message(values: Mapping[str, Any], optimizer: str) -> str:
    """Why there is no slot of `optimizer`, as far as the keys tell."""
    if not values:
        return (
            f"no key ends in {_VALUE}, as those of an object checkpoint do; checkpoints of "
            "TensorFlow 1 are read by interop.tf1"
        )
    owners = {key.partition(_SLOT)[2].rpartition("/")[0] for key in values}
    owners |= {key.partition("/_variables/")[0] for key in values if "/_variables/" in key}
    owners = sorted(owners - {""})
    if owners:
        return f"there is no optimizer {optimizer!r}, pass optimizer=, one of {owners[:8]}"
    if f"{optimizer}/iter" in values or f"{optimizer}/_iterations" in values:
        return f"{optimizer!r} has no slots: it is not Adam, or was saved before its first step"
    return "the checkpoint was saved without an optimizer"


def __dir__() -> list[str]:
    return __all__
