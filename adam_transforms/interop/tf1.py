"""The state of TensorFlow 1's AdamOptimizer and LazyAdamOptimizer, as a checkpoint has it."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adam_transforms._core import arguments
from adam_transforms.interop import _filling, _matching, _slots

# Powers are multiplied this many at a time.
_CHUNK = 1 << 18


def state_from(
    arrays: Mapping[str, Any],
    params: Any,
    tx: Any,
    *,
    b1: float | None = None,
    b2: float | None = None,
    name: str = "Adam",
    rename: _matching.Rename | None = None,
    count: int | None = None,
) -> Any:
    """The state with which `tx` goes on where a TensorFlow 1 optimizer stands.

    The moments and the number of steps are brought, to schedules too; the hyperparameters are those
    of `tx`, whose epsilon is TensorFlow's with ``eps_hat=True``. TensorFlow does not record the
    steps but the powers of its betas, multiplied in float32 step by step; they are counted by
    repeating that. At 0.999 the power is zero after some 87,000 steps, when the bias corrections
    have long been 1: any such count will do, but for the schedules of `tx`, for which `count` says.

    Args:
      arrays: names to arrays, e.g. ``{name: reader.get_tensor(name) for name in
        reader.get_variable_to_shape_map()}`` with ``reader = tf.train.load_checkpoint(path)``.
        Entries that are no slots of `name` (variables, global_step) do not matter.
      params: the parameters, as they are there now.
      tx: any transformation or optimizer with Adam's moments in its state. Slots take the dtype
        that it keeps them in.
      b1, b2: the betas; None for those of `tx` if it is one of `compat`, else 0.9 and 0.999.
      name: what the optimizer was called: the slots of "w" are "w/Adam" and "w/Adam_1".
      rename: from a path of ours to the variable's name there, or to (name, axes) such that
        ``their_array.transpose(axes)`` is ours. None if the paths are the names.
      count: the number of steps, for powers that are zero or that other code has changed.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: the powers are missing or not those of the betas; or a list of all that is
        missing, left over, of another shape, or not held by the slot's dtype.

    >>> import numpy as np, optax
    >>> arrays = {"w": np.ones(2), "w/Adam": np.ones(2), "w/Adam_1": np.ones(2)}
    >>> arrays |= {"beta1_power": np.float32(0.9) ** 3, "beta2_power": np.float32(0.999) ** 3}
    >>> state = state_from(arrays, {"w": np.zeros(2, np.float32)}, optax.adam(0.1))
    >>> int(state[0].count), state[0].mu["w"].tolist()
    (2, [1.0, 1.0])
    """
    if not isinstance(arrays, Mapping) or not all(isinstance(key, str) for key in arrays):
        raise TypeError(f"arrays must map names to arrays, got {arrays!r:.80}")
    state = _slots.fresh(tx, params)
    theirs = _slots_in(arrays, name)
    if not theirs:
        raise ValueError(f"there are no slots .../{name} and .../{name}_1 in {sorted(arrays)[:20]}")
    betas = [_beta(tx, "1", b1, 0.9), _beta(tx, "2", b2, 0.999)]
    if count is None:
        count = _count(arrays, betas, schedules=_filling.has_other_counts(state))
    else:
        count = _matching.as_count("count", count)

    def label(variable: str, slot: str) -> str:
        return repr(f"{variable}/{name}{'' if slot == 'mu' else '_1'}")

    brought = _matching.bring(theirs, _slots.slots_of(state), rename, label)
    return _filling.fill(state, _slots.Contents(count, brought))


def state_to(
    state: Any,
    params: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    name: str = "Adam",
    rename: _matching.Rename | None = None,
) -> dict[str, np.ndarray]:
    """The reverse of `state_from`: the slots and powers as TensorFlow 1 would have them.

    Args:
      state: an optimizer state with Adam's moments; one that owes steps is first to be flushed.
      params: the parameters that it belongs to.
      b1, b2: the betas.
      name: what the optimizer is called.
      rename: as for `state_from`; the transposes are undone.

    Returns:
      Names to fresh NumPy arrays, in the dtypes of the slots; the powers are float32.

    Raises:
      ValueError: the state is not one of TensorFlow's, as AMSGrad's is not.

    >>> import numpy as np, optax
    >>> params = {"w": np.zeros(2, np.float32)}
    >>> sorted(state_to(optax.adam(0.1).init(params), params))
    ['beta1_power', 'beta2_power', 'w/Adam', 'w/Adam_1']
    """
    contents = _slots.read(state, params)
    moments = {
        path: {slot: slots[slot] for slot in ("mu", "nu")}
        for path, slots in contents.slots.items()
        if "mu" in slots
    }
    amsgrad = [path for path, slots in contents.slots.items() if "nu_max" in slots]
    if amsgrad:
        raise ValueError(f"TensorFlow 1 has no AMSGrad, whose maximum the state has of {amsgrad}")
    arrays = {}
    for variable, slots in _matching.send(moments, rename).items():
        arrays[f"{variable}/{name}"] = slots["mu"]
        arrays[f"{variable}/{name}_1"] = slots["nu"]
    for key, b in (("beta1_power", b1), ("beta2_power", b2)):
        b = arguments.scalar(key.replace("_power", ""), b, at_least=0.0, below=1.0)
        arrays[key] = _power(np.float32(b), contents.count)
    return arrays


def _slots_in(arrays: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """{variable: {slot: array}}."""
    theirs: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        for slot, suffix in (("mu", f"/{name}"), ("nu", f"/{name}_1")):
            if key.endswith(suffix):
                theirs.setdefault(key.removesuffix(suffix), {})[slot] = array
    return theirs


# ---- the number of steps ------------------------------------------------------------------------


def _beta(tx: Any, number: str, given: float | None, default: float) -> float:
    own = getattr(tx, f"beta{number}", default)
    value = given if given is not None else own() if callable(own) else own
    return float(arguments.scalar(f"b{number}", value, at_least=0.0, below=1.0))


def _count(arrays: Mapping[str, Any], betas: list[float], *, schedules: bool) -> int:
    """The steps after which both powers are what they are; the slower one tells to the end."""
    powers = [_power_in(arrays, f"beta{i}_power") for i in (1, 2)]
    (fast_b, fast), (slow_b, slow) = sorted(zip(betas, powers, strict=True), key=lambda x: x[0])
    if schedules and _is_zero(slow):
        raise ValueError(
            "the powers of the betas are zero, and do not tell the number of steps, which the "
            "schedules of tx go by: pass count, e.g. count=int(arrays['global_step'])"
        )
    count = _steps(slow_b, slow)
    if count is not None:
        expected = _power(fast.dtype.type(fast_b), count)
        if _is_near(fast, expected) or (_is_zero(fast) and _is_zero(expected)):
            return count
    raise ValueError(
        f"no number of steps at betas {betas} makes their powers {[float(x) for x in powers]}: "
        "pass the optimizer's b1 and b2, or count"
    )


def _power_in(arrays: Mapping[str, Any], key: str) -> np.ndarray:
    """The power, in whatever name scope it is."""
    found = [name for name in arrays if re.search(rf"(^|/){key}(_\d+)?$", name)]
    chosen = key if key in found else found[0] if len(found) == 1 else None
    if chosen is None:
        raise ValueError(
            f"there are several {key}, of several optimizers: leave one, of {sorted(found)}"
            if found
            else f"{key} is missing: pass it, or count"
        )
    power = _matching.as_array(chosen, arrays[chosen])
    if power.shape != () or power.dtype.kind != "f":
        raise ValueError(f"{chosen} must be a floating scalar, got {power.dtype}{[*power.shape]}")
    return power


def _products(b: np.floating) -> Iterator[np.ndarray]:
    """b, b * b, ..., each rounded before the next, in pieces; until they are subnormal."""
    last = b.dtype.type(1.0)
    size = 64 if b == 0 else min(_CHUNK, int(100 / -math.log(b)) + 64)
    while last >= _least(b.dtype):
        factors = np.full(size, b)
        factors[0] = last * b
        with np.errstate(under="ignore"):
            powers = np.multiply.accumulate(factors)
        last = powers[-1]
        yield powers


def _steps(b: float, power: np.ndarray) -> int | None:
    """The steps after which a power that starts at b is `power`, or zero; None if it never is."""
    made = 0
    for powers in _products(power.dtype.type(b)):
        if float(powers[-1]) <= float(power) or _is_zero(powers[-1]):
            if _is_zero(power):
                return made + int(np.argmax(powers < _least(power.dtype)))
            at = int(np.argmin(np.abs(powers - power)))
            if _is_near(powers[at], power, closer_than=(1.0 - b) / 4):
                return made + at
        made += powers.size
    return None


def _power(b: np.floating, count: int) -> np.ndarray:
    """b after `count` multiplications by b."""
    for powers in _products(b):
        if count < powers.size:
            return np.array(0.0 if _is_zero(powers[count]) else powers[count], b.dtype)
        count -= powers.size
    return np.zeros((), b.dtype)


def _is_near(power: Any, other: Any, closer_than: float = 1.0) -> bool:
    """Whether two powers are the same, but for a few roundings in another order."""
    difference = abs(float(power) - float(other))
    return difference <= min(1e-6, closer_than) * float(other)


def _is_zero(power: Any) -> bool:
    """Whether TensorFlow has zero for it, which is what it makes of subnormal numbers."""
    return float(power) < _least(power.dtype)


def _least(dtype: Any) -> float:
    return float(np.finfo(dtype).tiny)
