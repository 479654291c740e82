"""Imports and exports the state of Keras's Adam: `save_own_variables`, or a file.

Keras identifies optimizer variables by position; `entries` gives their order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adam_transforms._core import arguments, trees
from adam_transforms._core.types import Params, State
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState
from adam_transforms.interop import _filling, _matching, _slots, _stores

__all__ = ["Layout", "entries", "state_from", "state_from_variables", "state_to"]

# {slot: Keras's name for it}.
SLOT_NAMES = {
    "ema": "average",
    "acc": "gradient_accumulator",
    "mu": "momentum",
    "nu": "velocity",
    "nu_max": "velocity_hat",
}


class Layout(NamedTuple):
    """The variables of a Keras optimizer besides Adam's two moments.

    Attributes:
      learning_rate: the learning rate, a variable if it is a number, none if it is a schedule.
      ema: parameter averages (use_ema).
      acc: gradient accumulators (gradient_accumulation_steps).
      amsgrad: maxima of the second moments.
      loss_scale: the dynamic loss scale of an enclosing LossScaleOptimizer.
      legacy: the order of TensorFlow 2.0 (OptimizerV2); of the above it supports amsgrad only.
    """

    learning_rate: bool = True
    ema: bool = False
    acc: bool = False
    amsgrad: bool = False
    loss_scale: bool = False
    legacy: bool = False


def entries(layout: Layout, variables: int) -> list[tuple[str, int | None]]:
    """The variables of a Keras optimizer in their order.

    Returns:
      [(name, position), ...]. For a slot, the name is mu, nu, nu_max, ema or acc, and the position
      is that of the model variable. For a scalar, the position is None, and the name is iteration
      or learning_rate; the scalars of a LossScaleOptimizer precede all others: outer_iteration,
      outer_learning_rate, finite_steps and scale.

    >>> entries(Layout(amsgrad=True), 2)[2:]
    [('mu', 0), ('nu', 0), ('mu', 1), ('nu', 1), ('nu_max', 0), ('nu_max', 1)]
    """

    def each(*slots: str) -> list[tuple[str, int | None]]:
        return [(slot, i) for i in range(variables) for slot in slots]

    order: list[tuple[str, int | None]] = []
    if layout.loss_scale:
        outer = ("outer_iteration", "outer_learning_rate", "finite_steps", "scale")
        order += [(name, None) for name in outer]
    order.append(("iteration", None))
    if layout.legacy:
        order += each("mu") + each("nu")
    else:
        order += [("learning_rate", None)] if layout.learning_rate else []
        order += each("ema") if layout.ema else []
        order += each("acc") if layout.acc else []
        order += each("mu", "nu")
    return order + (each("nu_max") if layout.amsgrad else [])


def state_from(
    store: _stores.Store,
    params: Params,
    tx: Any,
    names: Sequence[str] | None = None,
    *,
    rename: _matching.Rename | None = None,
    every: int | None = None,
    legacy: bool = False,
) -> State:
    """Imports the state of a Keras optimizer into a state of `tx`.

    Imported are the moments, the number of steps (into schedules too), averages of the parameters,
    accumulated gradients and the dynamic loss scale. The hyperparameters, including the learning
    rate, are those of `tx`. The state of `tx` determines the expected variables: `params_ema` for
    use_ema, `accumulate` for gradient_accumulation_steps, `dynamic_loss_scale` for
    LossScaleOptimizer, and AMSGrad with ``max_of="raw"``.

    Args:
      store: a mapping of "0", "1", ... to arrays from ``optimizer.save_own_variables(store)``; a
        list from legacy ``get_weights()``; or the path of a ``.weights.h5`` or ``.keras`` file, or
        of the ``.h5`` file of ``model.save`` in Keras 2, tf.keras or Keras 3, which needs h5py. A
        file is untrusted: links, virtual datasets and external storage are refused.
      params: the current parameters.
      tx: any transformation or optimizer whose state has Adam's moments. Slots are cast to the
        dtypes of that state.
      names: the names of the variables in the order of the optimizer,
        ``[v.path for v in model.trainable_variables]``. None for "0", "1", ...
      rename: maps a path in `params` to the Keras name, or to (name, axes), where
        ``keras_array.transpose(axes)`` has the layout of the parameter. None if each path is the
        name. Kernels of Keras and Flax have the same layout.
      every: gradient_accumulation_steps; None for the value of `tx`, an optimizer of `compat`.
      legacy: whether the store has TensorFlow 2.0's order: iterations, all m, all v, all vhat. For
        the ``.h5`` file of ``model.save``, the names in the file decide, and `legacy` is ignored.

    Returns:
      A state like ``tx.init(params)``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: the number of arrays differs; or slots do not match: lists all that are missing,
        left over, of another shape, or not representable in the slot's dtype, and second moments
        that are negative or not finite. A file is damaged, has no optimizer, or leads to another
        file.
      ImportError: `store` is a file and h5py is not installed.

    >>> import numpy as np, optax
    >>> store = {"0": np.int64(5), "1": np.float32(0.1), "2": np.ones(2), "3": np.ones(2)}
    >>> state = state_from(store, [np.zeros(2, np.float32)], optax.adam(0.1))
    >>> int(state[0].count), state[0].mu[0].tolist()
    (5, [1.0, 1.0])
    """
    with _stores.opened(store) as (arrays, order):
        legacy = legacy if order is None else order
        return state_from_variables(
            arrays, params, tx, names, rename=rename, every=every, legacy=legacy
        )


def state_from_variables(
    arrays: Sequence[Any],
    params: Params,
    tx: Any,
    names: Sequence[str] | None,
    *,
    rename: _matching.Rename | None,
    every: int | None,
    legacy: bool,
) -> State:
    """`state_from` of the variables of an optimizer in their order."""
    state = _slots.init_state(tx, params)
    target = _slots.slots_of(state, ema=True, acc=True)
    names = _matching.positions(len(target)) if names is None else list(names)
    names = _matching.checked_names(names, len(names), "the optimizer's variables")
    layout = _layout(target, state, legacy=legacy)
    if layout.legacy and not layout.amsgrad:
        arrays = _without_placeholders(arrays, len(names))
    expected = {
        len(entries(layout._replace(learning_rate=rate), len(names))): rate
        for rate in (True, False)
    }
    if len(arrays) not in expected:
        raise ValueError(
            f"for {len(names)} variables tx needs {_describe(layout)}, "
            f"{' or '.join(map(str, sorted(expected)))} arrays, got {len(arrays)}"
        )
    layout = layout._replace(learning_rate=expected[len(arrays)])
    scalars, source = _parts(arrays, entries(layout, len(names)), names)
    calls = _matching.as_count("iteration", scalars["iteration"])
    every = _every(tx, every) if layout.acc else 1
    contents = _slots.Contents(
        count=calls // every,
        slots=_matching.import_slots(source, target, rename, _label),
        calls=calls if layout.acc else None,
        mini_step=calls % every,
    )
    if layout.loss_scale:
        contents = contents._replace(
            scale=_matching.as_scale("dynamic_scale", scalars["scale"]),
            finite_steps=_matching.as_count("step_counter", scalars["finite_steps"]),
        )
    return _filling.fill_state(state, contents)


def state_to(
    state: State,
    params: Params,
    names: Sequence[str] | None = None,
    *,
    rename: _matching.Rename | None = None,
    every: int | None = None,
    learning_rate: float | None = None,
    legacy: bool = False,
) -> dict[str, np.ndarray]:
    """Exports a state for ``optimizer.load_own_variables``; the inverse of `state_from`.

    Args:
      state: an optimizer state with Adam's moments and without pending updates (see `flush`).
      params: the parameters of that state.
      names, rename: as for `state_from`; the transposes are inverted.
      every: gradient_accumulation_steps; required if the state accumulates gradients.
      learning_rate: the value of Keras's variable; None if the Keras optimizer has a schedule.
      legacy: use TensorFlow 2.0's order; its ``set_weights`` takes the list of the values.

    Returns:
      {"0": ..., "1": ...}: new NumPy arrays in the dtypes of the slots; counts are int64.

    Raises:
      TypeError, ValueError: the names or the state do not match the parameters.

    >>> import numpy as np, optax
    >>> params = [np.zeros(2, np.float32)]
    >>> state_to(optax.adam(0.1).init(params), params, learning_rate=0.1)["1"].tolist()
    0.10000000149011612
    """
    contents = _slots.read(state, params)
    layout = _layout(contents.slots, state, legacy=legacy)
    layout = layout._replace(learning_rate=learning_rate is not None and not legacy)
    exported = _matching.export_slots(contents.slots, rename)
    names = _matching.in_order(exported, names, "the optimizer's variables")
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
    for key, (name, position) in enumerate(entries(layout, len(names))):
        arrays = scalars if position is None else exported.get(names[position], {})
        if name not in arrays:
            raise ValueError(f"the state has no {_label(names[position or 0], name)}")
        store[str(key)] = arrays[name]
    return store


def _layout(slots: _matching.Slots, state: State, *, legacy: bool) -> Layout:
    """The layout of a Keras optimizer with the same slots as `state`."""
    kept = {slot for arrays in slots.values() for slot in arrays}
    layout = Layout(
        ema="ema" in kept,
        acc="acc" in kept,
        amsgrad="nu_max" in kept,
        loss_scale=bool(trees.find_states(state, DynamicLossScaleState)),
        legacy=arguments.flag("legacy", legacy),
    )
    if legacy and (layout.ema or layout.acc or layout.loss_scale):
        raise ValueError(
            "the legacy optimizer has no average, accumulation or dynamic loss scale, but the "
            "state of tx has one"
        )
    return layout


def _describe(layout: Layout) -> str:
    parts = ["iteration"]
    parts += [] if layout.legacy else ["learning_rate if it is a number"]
    parts += ["averages"] if layout.ema else []
    parts += ["gradient accumulators"] if layout.acc else []
    parts += ["momentums", "velocities"]
    parts += ["velocity_hats"] if layout.amsgrad else []
    words = ", ".join(parts)
    return f"the four of a LossScaleOptimizer, then {words}" if layout.loss_scale else words


def _label(name: str, slot: str) -> str:
    return f"{SLOT_NAMES[slot]} of {name!r}"


def _parts(
    arrays: Sequence[Any], order: Sequence[tuple[str, int | None]], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """({scalar: array}, {variable: {slot: array}})."""
    scalars: dict[str, Any] = {}
    slots: dict[str, dict[str, Any]] = {name: {} for name in names}
    for array, (name, position) in zip(arrays, order, strict=True):
        if position is None:
            if np.shape(array) != ():
                raise ValueError(f"{name} must be a scalar, got an array {list(np.shape(array))}")
            scalars[name] = array
        else:
            slots[names[position]][name] = array
    return scalars, slots


def _without_placeholders(arrays: Sequence[Any], variables: int) -> Sequence[Any]:
    """`arrays` without the single zeros that Keras 2 has in place of AMSGrad's maxima."""
    moments, maxima = arrays[: 1 + 2 * variables], arrays[1 + 2 * variables :]
    if len(maxima) != variables or any(np.shape(x) != (1,) for x in maxima):
        return arrays
    return arrays if any(_matching.as_array("maximum", x)[0] for x in maxima) else moments


def _every(tx: Any, every: int | None) -> int:
    """`every`, or the gradient_accumulation_steps of `tx`."""
    if every is None:
        optimizer = getattr(tx, "inner_optimizer", tx)
        every = getattr(optimizer, "gradient_accumulation_steps", None)
    if every is None:
        raise ValueError("the state accumulates gradients: pass every, gradient_accumulation_steps")
    return arguments.positive_int("every", every)


def __dir__() -> list[str]:
    return __all__
