"""Imports and exports checkpoints of TensorFlow 1's AdamOptimizer and LazyAdamOptimizer."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from adam_transforms._core import arguments
from adam_transforms._core.types import Params, State
from adam_transforms.interop import _filling, _matching, _slots

__all__ = ["state_from", "state_to"]

# The slots of "w" are "w/<optimizer><suffix>".
SLOT_SUFFIXES = {"mu": "", "nu": "_1"}

# The number of powers computed at once.
_CHUNK = 1 << 18


def state_from(
    arrays: Mapping[str, Any],
    params: Params,
    tx: Any,
    *,
    b1: float | None = None,
    b2: float | None = None,
    name: str = "Adam",
    rename: _matching.Rename | None = None,
    count: int | None = None,
) -> State:
    """Imports the state of a TensorFlow 1 optimizer into a state of `tx`.

    Imported are the moments and the number of steps, the latter into schedules too. The
    hyperparameters are those of `tx`; its epsilon equals TensorFlow's with ``eps_hat=True``.
    TensorFlow stores no step count, only the powers of the betas, multiplied in float32 at each
    step; the count is found by repeating these products. At beta 0.999 the power underflows to zero
    after about 87,000 steps. The bias correction is 1 long before, so that any larger count is
    equivalent, except for schedules of `tx`: these need `count`.

    Args:
      arrays: {name: array}, e.g. ``{name: reader.get_tensor(name) for name in
        reader.get_variable_to_shape_map()}`` with ``reader = tf.train.load_checkpoint(path)``.
        Entries that are no slots of `name` (variables, global_step) are ignored.
      params: the current parameters.
      tx: any transformation or optimizer whose state has Adam's moments. Slots are cast to the
        dtypes of that state.
      b1, b2: the betas; None for those of `tx` if it is an optimizer of `compat`, else 0.9, 0.999.
      name: the name of the optimizer; the slots of "w" are "w/Adam" and "w/Adam_1".
      rename: maps a path in `params` to the variable's name, or to (name, axes), where
        ``tensorflow_array.transpose(axes)`` has the layout of the parameter. None if each path is
        the name.
      count: the number of steps, for powers that are zero or were changed by other code.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a power is missing, or is not a power of its beta. Slots do not match: the error
        lists those that are missing, left over, of another shape, or not representable in the
        slot's dtype, and second moments that are negative or not finite.

    >>> import numpy as np, optax
    >>> arrays = {"w": np.ones(2), "w/Adam": np.ones(2), "w/Adam_1": np.ones(2)}
    >>> arrays |= {"beta1_power": np.float32(0.9) ** 3, "beta2_power": np.float32(0.999) ** 3}
    >>> state = state_from(arrays, {"w": np.zeros(2, np.float32)}, optax.adam(0.1))
    >>> int(state[0].count), state[0].mu["w"].tolist()
    (2, [1.0, 1.0])
    """
    if not isinstance(arrays, Mapping) or not all(isinstance(key, str) for key in arrays):
        raise TypeError(f"arrays must map names to arrays, got {arrays!r:.80}")
    state = _slots.init_state(tx, params)
    source = _slots_in(arrays, name)
    if not source:
        hint = ""
        if any(key.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for key in arrays):
            hint = "; it is an object checkpoint of TensorFlow 2: use interop.tf2"
        raise ValueError(
            f"there are no slots .../{name} and .../{name}_1 in {sorted(arrays)[:20]}{hint}"
        )
    betas = [_beta(tx, 1, b1, 0.9), _beta(tx, 2, b2, 0.999)]
    if count is None:
        count = _count(arrays, betas, schedules=_filling.has_step_counters(state))
    else:
        count = _matching.as_count("count", count)

    def label(variable: str, slot: str) -> str:
        return repr(f"{variable}/{name}{SLOT_SUFFIXES.get(slot, f' ({slot})')}")

    slots = _matching.import_slots(source, _slots.slots_of(state), rename, label)
    return _filling.fill_state(state, _slots.Contents(count, slots))


def state_to(
    state: State,
    params: Params,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    name: str = "Adam",
    rename: _matching.Rename | None = None,
) -> dict[str, np.ndarray]:
    """Exports a state as TensorFlow 1's slots and powers; the inverse of `state_from`.

    Args:
      state: an optimizer state with Adam's moments and without pending updates (see `flush`).
      params: the parameters of that state.
      b1, b2: the betas.
      name: the name of the optimizer.
      rename: as for `state_from`; the transposes are inverted.

    Returns:
      {name: array}: new NumPy arrays in the dtypes of the slots; the powers are float32.

    Raises:
      ValueError: TensorFlow 1 has no such state (AMSGrad).

    >>> import numpy as np, optax
    >>> params = {"w": np.zeros(2, np.float32)}
    >>> sorted(state_to(optax.adam(0.1).init(params), params))
    ['beta1_power', 'beta2_power', 'w/Adam', 'w/Adam_1']
    """
    contents = _slots.read(state, params)
    moments = {
        path: {slot: slots[slot] for slot in SLOT_SUFFIXES}
        for path, slots in contents.slots.items()
        if "mu" in slots
    }
    amsgrad = [path for path, slots in contents.slots.items() if "nu_max" in slots]
    if amsgrad:
        raise ValueError(
            f"TensorFlow 1 has no AMSGrad, but the state has a slot nu_max of {amsgrad}"
        )
    arrays = {}
    for variable, slots in _matching.export_slots(moments, rename).items():
        for slot, array in slots.items():
            arrays[f"{variable}/{name}{SLOT_SUFFIXES[slot]}"] = array
    for key, b in (("beta1_power", b1), ("beta2_power", b2)):
        b = arguments.scalar(key.replace("_power", ""), b, at_least=0.0, below=1.0)
        arrays[key] = _power(np.float32(b), contents.count)
    return arrays


def _slots_in(arrays: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """{variable: {slot: array}}."""
    slots: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        for slot, suffix in SLOT_SUFFIXES.items():
            if key.endswith(f"/{name}{suffix}"):
                slots.setdefault(key.removesuffix(f"/{name}{suffix}"), {})[slot] = array
    return slots


# ---- the number of steps ------------------------------------------------------------------------


def _beta(tx: Any, number: Literal[1, 2], b: float | None, default: float) -> float:
    """`b`, or the beta of `tx`, or `default`."""
    if b is None:
        b = getattr(tx, f"beta{number}", default)
        b = b() if callable(b) else b
    return float(arguments.scalar(f"b{number}", b, at_least=0.0, below=1.0))


def _count(arrays: Mapping[str, Any], betas: list[float], *, schedules: bool) -> int:
    """The number of steps at which both powers are reached.

    The search uses the larger beta, because its power reaches zero last.
    """
    powers = [_power_in(arrays, f"beta{i}_power") for i in (1, 2)]
    (fast_b, fast), (slow_b, slow) = sorted(zip(betas, powers, strict=True), key=lambda x: x[0])
    if schedules and _is_zero(slow):
        raise ValueError(
            "tx has schedules, which need the number of steps, but the powers of the betas are "
            "zero and do not determine it: pass count, e.g. count=int(arrays['global_step'])"
        )
    count = _steps(slow_b, slow)
    if count is not None:
        expected = _power(fast.dtype.type(fast_b), count)
        if _is_near(fast, expected) or (_is_zero(fast) and _is_zero(expected)):
            return count
    raise ValueError(
        f"no number of steps at betas {betas} gives the powers {[float(x) for x in powers]}: "
        "pass the optimizer's b1 and b2, or count"
    )


def _power_in(arrays: Mapping[str, Any], key: str) -> np.ndarray:
    """The power called `key`, in any name scope."""
    found = [name for name in arrays if re.search(rf"(^|/){key}(_\d+)?$", name)]
    chosen = key if key in found else found[0] if len(found) == 1 else None
    if chosen is None:
        raise ValueError(
            f"there are several {key}, of several optimizers: remove all but one of {sorted(found)}"
            if found
            else f"{key} is missing: pass it, or count"
        )
    power = _matching.as_scalar(chosen, arrays[chosen], "a floating scalar")
    if power.dtype.kind != "f":
        raise ValueError(f"{chosen} must be a floating scalar, got {power.dtype}")
    return power


def _products(b: np.floating) -> Iterator[np.ndarray]:
    """Chunks of b, b * b, ..., each product rounded to the dtype, down to the first subnormal."""
    last = b.dtype.type(1.0)
    size = 64 if b == 0 else min(_CHUNK, int(100 / -math.log(b)) + 64)
    while last >= _smallest_normal(b.dtype):
        factors = np.full(size, b)
        factors[0] = last * b
        with np.errstate(under="ignore"):
            powers = np.multiply.accumulate(factors)
        last = powers[-1]
        yield powers


def _steps(b: float, power: np.ndarray) -> int | None:
    """The number of steps at which the power of `b` equals `power`; None if there is none.

    The power is `b` at step 0. For a `power` of zero: the first step at which it is zero.
    """
    done = 0
    for powers in _products(power.dtype.type(b)):
        if float(powers[-1]) <= float(power) or _is_zero(powers[-1]):
            if _is_zero(power):
                return done + int(np.argmax(powers < _smallest_normal(power.dtype)))
            at = int(np.argmin(np.abs(powers - power)))
            if _is_near(powers[at], power, closer_than=(1.0 - b) / 4):
                return done + at
        done += powers.size
    return None


def _power(b: np.floating, count: int) -> np.ndarray:
    """b ** (count + 1) by repeated multiplication: the power at step `count`."""
    for powers in _products(b):
        if count < powers.size:
            return np.array(0.0 if _is_zero(powers[count]) else powers[count], b.dtype)
        count -= powers.size
    return np.zeros((), b.dtype)


def _is_near(power: Any, other: Any, closer_than: float = 1.0) -> bool:
    """Whether two powers are equal up to a few roundings in another order."""
    difference = abs(float(power) - float(other))
    return difference <= min(1e-6, closer_than) * float(other)


def _is_zero(power: Any) -> bool:
    """Whether TensorFlow's value is zero: it flushes subnormal numbers to zero."""
    return float(power) < _smallest_normal(power.dtype)


def _smallest_normal(dtype: Any) -> float:
    return float(np.finfo(dtype).tiny)


def __dir__() -> list[str]:
    return __all__
