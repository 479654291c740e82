"""The state of Keras's Adam, as `save_own_variables` or a weights file has it.

Keras knows its variables by position: see `entries` for the order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adam_transforms._core import arguments
from adam_transforms._transforms.accumulation import AccumulateState
from adam_transforms._transforms.ema import ParamsEmaState
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState
from adam_transforms.interop import _filling, _matching, _slots, _stores

# From our names for slots to Keras's.
SLOT_NAMES = {
    "ema": "average",
    "acc": "gradient_accumulator",
    "mu": "momentum",
    "nu": "velocity",
    "nu_max": "velocity_hat",
}


class Layout(NamedTuple):
    """What a Keras optimizer keeps besides Adam's two moments.

    Attributes:
      learning_rate: a learning rate, which is a variable where it is a number.
      ema: averages (use_ema).
      acc: accumulators (gradient_accumulation_steps).
      amsgrad: largest second moments.
      loss_scale: a dynamic loss scale around it (LossScaleOptimizer).
      legacy: the order of TensorFlow 2.0 (OptimizerV2), which has none of the above but amsgrad.
    """

    learning_rate: bool = True
    ema: bool = False
    acc: bool = False
    amsgrad: bool = False
    loss_scale: bool = False
    legacy: bool = False


def entries(layout: Layout, variables: int) -> list[tuple[str, int | None]]:
    """What the variables of a Keras optimizer are, in their order.

    Returns:
      [(what, variable), ...]: a slot (mu, nu, nu_max, ema or acc) and the position of the variable
      that it belongs to; or None and a scalar: iteration, learning_rate, and for LossScaleOptimizer
      its own outer_iteration, outer_learning_rate, finite_steps and scale before all others.

    >>> entries(Layout(amsgrad=True), 2)[2:]
    [('mu', 0), ('nu', 0), ('mu', 1), ('nu', 1), ('nu_max', 0), ('nu_max', 1)]
    """

    def of_all(*slots: str) -> list[tuple[str, int | None]]:
        return [(slot, i) for i in range(variables) for slot in slots]

    order: list[tuple[str, int | None]] = []
    if layout.loss_scale:
        outer = ("outer_iteration", "outer_learning_rate", "finite_steps", "scale")
        order += [(what, None) for what in outer]
    order.append(("iteration", None))
    if layout.legacy:
        order += of_all("mu") + of_all("nu")
    else:
        order += [("learning_rate", None)] if layout.learning_rate else []
        order += of_all("ema") if layout.ema else []
        order += of_all("acc") if layout.acc else []
        order += of_all("mu", "nu")
    return order + (of_all("nu_max") if layout.amsgrad else [])


def state_from(
    store: Any,
    params: Any,
    tx: Any,
    names: Sequence[str] | None = None,
    *,
    rename: _matching.Rename | None = None,
    every: int | None = None,
    legacy: bool = False,
) -> Any:
    """The state with which `tx` goes on where a Keras optimizer stands.

    Brought are the moments, the number of steps (to schedules too), averages of the parameters,
    accumulated gradients and the dynamic loss scale; the hyperparameters are those of `tx`, the
    learning rate too. What is to be in the store follows from the state of `tx`: `params_ema` for
    use_ema, `accumulate`, `dynamic_loss_scale` for LossScaleOptimizer, AMSGrad (``max_of="raw"``).

    Args:
      store: a mapping of "0", "1", ... to arrays, as ``optimizer.save_own_variables(store)`` fills
        it; a list, as legacy ``get_weights()`` gives; or the path of a ``.weights.h5`` or
        ``.keras`` file, which takes h5py.
      params: the parameters, as they are there now.
      tx: any transformation or optimizer with Adam's moments in its state. Slots take the dtype
        that it keeps them in.
      names: what the variables are called, in the order in which the optimizer was built:
        ``[v.path for v in model.trainable_variables]``. None for "0", "1", ...
      rename: from a path of ours to the name there, or to (name, axes) such that
        ``their_array.transpose(axes)`` is ours. None if the paths are the names. Keras's kernels
        are shaped like Flax's.
      every: gradient_accumulation_steps; None for that of `tx` if it is one of `compat`.
      legacy: the store is of TensorFlow 2.0's order: iterations, all m, all v, all vhat.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: the store has another number of arrays; or a list of all that is missing, left
        over, of another shape, or not held by the slot's dtype.
      ImportError: a file is to be read, and there is no h5py.

    >>> import numpy as np, optax
    >>> store = {"0": np.int64(5), "1": np.float32(0.1), "2": np.ones(2), "3": np.ones(2)}
    >>> state = state_from(store, [np.zeros(2, np.float32)], optax.adam(0.1))
    >>> int(state[0].count), state[0].mu[0].tolist()
    (5, [1.0, 1.0])
    """
    arrays = _stores.arrays_of(store)
    state = _slots.fresh(tx, params)
    ours = _slots.slots_of(state, ema=True, acc=True)
    names = _matching.positions(len(ours)) if names is None else list(names)
    names = _matching.checked_names(names, len(names), "the optimizer's variables")
    layout = _layout(ours, state, legacy=legacy)
    expected = {
        len(entries(layout._replace(learning_rate=has), len(names))): has for has in (True, False)
    }
    if len(arrays) not in expected:
        raise ValueError(
            f"for {len(names)} variables tx needs {_in_words(layout)}, "
            f"{' or '.join(map(str, sorted(expected)))} arrays, got {len(arrays)}"
        )
    layout = layout._replace(learning_rate=expected[len(arrays)])
    scalars, theirs = _parts(arrays, entries(layout, len(names)), names)
    calls = _matching.as_count("iteration", scalars["iteration"])
    every = _every(tx, every) if layout.acc else 1
    contents = _slots.Contents(
        count=calls // every,
        slots=_matching.bring(theirs, ours, rename, _label),
        calls=calls if layout.acc else None,
        mini_step=calls % every,
    )
    if layout.loss_scale:
        contents = contents._replace(
            scale=np.array(_matching.as_array("dynamic_scale", scalars["scale"])),
            finite_steps=_matching.as_count("step_counter", scalars["finite_steps"]),
        )
    return _filling.fill(state, contents)


def state_to(
    state: Any,
    params: Any,
    names: Sequence[str] | None = None,
    *,
    rename: _matching.Rename | None = None,
    every: int | None = None,
    learning_rate: float | None = None,
    legacy: bool = False,
) -> dict[str, np.ndarray]:
    """The reverse of `state_from`: what ``optimizer.load_own_variables`` takes.

    Args:
      state: an optimizer state with Adam's moments; one that owes steps is first to be flushed.
      params: the parameters that it belongs to.
      names, rename: as for `state_from`; the transposes are undone.
      every: gradient_accumulation_steps, if the state accumulates.
      learning_rate: Keras's variable of that name; None if the optimizer there has a schedule.
      legacy: for TensorFlow 2.0's order; its ``set_weights`` takes a list of the values.

    Returns:
      "0", "1", ... to fresh NumPy arrays, in the dtypes of the slots; counts are int64.

    Raises:
      TypeError, ValueError: the names or the state do not match.

    >>> import numpy as np, optax
    >>> params = [np.zeros(2, np.float32)]
    >>> state_to(optax.adam(0.1).init(params), params, learning_rate=0.1)["1"].tolist()
    0.10000000149011612
    """
    contents = _slots.read(state, params)
    layout = _layout(contents.slots, state, legacy=legacy)
    layout = layout._replace(learning_rate=learning_rate is not None and not legacy)
    sent = _matching.send(contents.slots, rename)
    names = _matching.in_order(sent, names, "the optimizer's variables")
    calls = contents.count
    if layout.acc:
        calls = contents.count * _every(None, every) + contents.mini_step
    scalars = {
        "outer_iteration": np.array(0, np.int64),
        "outer_learning_rate": np.array(0.0, np.float32),
        "finite_steps": np.array(contents.finite_steps, np.int64),
        "scale": contents.scale,
        "iteration": np.array(calls, np.int64),
        "learning_rate": learning_rate,
    }
    if layout.learning_rate:
        scalars["learning_rate"] = np.array(learning_rate, np.float32)
    store = {}
    for position, (what, variable) in enumerate(entries(layout, len(names))):
        slots = scalars if variable is None else sent.get(names[variable], {})
        if what not in slots:
            raise ValueError(f"the state keeps no {_label(names[variable or 0], what)}")
        store[str(position)] = slots[what]
    return store


def _layout(slots: _matching.Slots, state: Any, *, legacy: bool) -> Layout:
    """What Keras would keep for a state like this."""
    kept = {slot for of_path in slots.values() for slot in of_path}
    layout = Layout(
        ema=_slots.has(state, ParamsEmaState),
        acc=_slots.has(state, AccumulateState),
        amsgrad="nu_max" in kept,
        loss_scale=_slots.has(state, DynamicLossScaleState),
        legacy=arguments.flag("legacy", legacy),
    )
    if legacy and (layout.ema or layout.acc or layout.loss_scale):
        raise ValueError(
            "the legacy optimizer has no average, accumulation or dynamic loss scale, but the "
            "state of tx has"
        )
    return layout


def _in_words(layout: Layout) -> str:
    parts = ["iteration"]
    parts += [] if layout.legacy else ["learning_rate if it is a number"]
    parts += ["averages"] if layout.ema else []
    parts += ["gradient accumulators"] if layout.acc else []
    parts += ["momentums", "velocities"]
    parts += ["velocity_hats"] if layout.amsgrad else []
    words = ", ".join(parts)
    return f"a LossScaleOptimizer's four and the {words} within" if layout.loss_scale else words


def _label(name: str, slot: str) -> str:
    return f"{SLOT_NAMES[slot]} of {name!r}"


def _parts(
    arrays: Sequence[Any], order: Sequence[tuple[str, int | None]], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The scalars, and {name: {slot: array}}."""
    scalars: dict[str, Any] = {}
    theirs: dict[str, dict[str, Any]] = {name: {} for name in names}
    for array, (what, variable) in zip(arrays, order, strict=True):
        if variable is None:
            if np.shape(array) != ():
                raise ValueError(f"{what} must be a scalar, got an array {list(np.shape(array))}")
            scalars[what] = array
        else:
            theirs[names[variable]][what] = array
    return scalars, theirs


def _every(tx: Any, every: int | None) -> int:
    """How many gradients an update takes."""
    if every is None:
        own = getattr(tx, "inner_optimizer", tx)
        every = getattr(own, "gradient_accumulation_steps", None)
    if every is None:
        raise ValueError("the state accumulates gradients: pass every, gradient_accumulation_steps")
    return arguments.positive_int("every", every)
