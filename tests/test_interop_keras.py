"""Keras's optimizer state in and out, with recorded runs continued from it."""

import sys
import types as simple
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, in_tiers, normal, types
from recordings import Recording, differences
from test_parity import BUILDERS, adam_state, flat, nested, variable

import adam_transforms as at
from adam_transforms.interop import keras
from adam_transforms.interop.keras import Layout, entries

GROUPS = {"ema": "ema", "acc": "acc", "mu": "m", "nu": "v", "nu_max": "vhat"}
SHAPES = ((2, 3), (3,))
PARAMS = [jnp.zeros(shape) for shape in SHAPES]


def make_store(layout: Layout, calls: int = 12, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A store as Keras fills it."""
    scalars = {
        "outer_iteration": np.array(0, np.int64),
        "outer_learning_rate": np.array(0.0, np.float32),
        "finite_steps": np.array(5, np.int64),
        "scale": np.array(1024.0, np.float32),
        "iteration": np.array(calls, np.int64),
        "learning_rate": np.array(0.1, np.float32),
    }
    order = entries(layout, len(SHAPES))
    return {
        str(i): scalars[what] if at is None else np.abs(normal(i, *SHAPES[at])).astype(dtype)
        for i, (what, at) in enumerate(order)
    }


def test_the_order_is_keras_own():
    everything = Layout(ema=True, acc=True, amsgrad=True, loss_scale=True)
    outer = ["outer_iteration", "outer_learning_rate", "finite_steps", "scale"]
    assert entries(everything, 2) == [
        *((what, None) for what in outer),
        ("iteration", None),
        ("learning_rate", None),
        *(("ema", 0), ("ema", 1), ("acc", 0), ("acc", 1)),
        *(("mu", 0), ("nu", 0), ("mu", 1), ("nu", 1)),
        *(("nu_max", 0), ("nu_max", 1)),
    ]
    assert entries(Layout(legacy=True, amsgrad=True), 2) == [
        ("iteration", None),
        *(("mu", 0), ("mu", 1), ("nu", 0), ("nu", 1), ("nu_max", 0), ("nu_max", 1)),
    ]
    assert entries(Layout(learning_rate=False), 1) == [("iteration", None), ("mu", 0), ("nu", 0)]


def recorded_store(recording: Recording, legacy: bool) -> dict[str, np.ndarray]:
    names = list(recording.start)
    config = recording.setup.get("inner", recording.config)
    slots = {slot: recording.group(group) for slot, group in GROUPS.items()}
    outer = "scale" in recording.arrays
    layout = Layout(
        learning_rate=not recording.scheduled and not legacy,
        ema=bool(slots["ema"]),
        acc=config.get("gradient_accumulation_steps") is not None,
        amsgrad=bool(slots["nu_max"]),
        loss_scale=outer,
        legacy=legacy,
    )
    scalars = {
        "outer_iteration": 0,
        "outer_learning_rate": np.float32(0.0),
        "iteration": recording.arrays["raw_iterations"][-1] if outer else recording.steps,
        "learning_rate": np.float32(0.1),
    }
    if outer:
        scalars["scale"] = recording.arrays["scale"][-1]
        scalars["finite_steps"] = recording.arrays["step_counter"][-1]
    return {
        str(i): np.asarray(scalars[what] if v is None else slots[what][names[v]])
        for i, (what, v) in enumerate(entries(layout, len(names)))
    }


# The first tier tries each kind of entry in a store, and each system.
QUICK = (
    "k3_accum_ema",
    "k3_combined_custom",  # AMSGrad too
    "k3_lso_accum",
    "k3_lso_schedule_ema",
    "legacy_amsgrad_custom",
    "multilr_amsgrad_custom",
)


@pytest.mark.parametrize(
    "case",
    in_tiers(
        [
            "k3_custom",
            "k3_amsgrad_custom",
            "k3_ema_overwrite_custom",
            "k3_accum_custom",
            "k3_accum_ema",
            "k3_schedule_accum",
            "k3_combined_custom",
            "k3_lso_custom",
            "k3_lso_accum",
            "k3_lso_schedule_ema",
            "legacy_dense_schedule",
            "legacy_amsgrad_custom",
            "multilr_amsgrad_custom",
        ],
        QUICK.__contains__,
    ),
)
def test_a_recorded_run_goes_on_from_its_state(case, request):
    recording = Recording(case)
    if recording.scheduled:  # Optax's schedules are not ours
        request.getfixturevalue("relaxed_promotion")
    tx, training = BUILDERS[recording.entry["class"]](recording)
    names = list(recording.start)
    for t in range(recording.steps):
        training.step(recording.gradients(t))
    legacy = not case.startswith("k3")
    store = recorded_store(recording, legacy)
    config = recording.setup.get("inner", recording.config)
    every = config.get("gradient_accumulation_steps")
    params = jax.tree.map(jnp.asarray, nested(recording.params(-1)))
    paths = [variable(name) for name in names]
    state = keras.state_from(store, params, tx, paths, every=every, legacy=legacy)
    assert types(state) == types(tx.init(params))
    if "iterations" in recording.arrays:
        assert int(adam_state(state).count) == recording.arrays["iterations"][-1]

    learning_rate = 0.1 if not recording.scheduled and not legacy else None
    back = keras.state_to(
        state, params, paths, every=every, learning_rate=learning_rate, legacy=legacy
    )
    assert back.keys() == store.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, store[key])

    step = jax.jit(tx.update)
    for t in range(recording.steps):
        expected = training.step(recording.gradients(t))
        updates, state = step(nested(recording.gradients(t)), state, params)
        params = at.apply_updates(params, updates)
        errors = differences(flat(params, names), expected)
        assert max(errors.values()) <= 3 * recording.tolerance


def transformation(layout: Layout, dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """What keeps this much."""
    return at.adam(
        eps_hat=True,
        amsgrad=layout.amsgrad,
        ema=0.9 if layout.ema else None,
        accumulate_every=5 if layout.acc else None,
        loss_scale="dynamic" if layout.loss_scale else None,
        mu_dtype=dtype,
        nu_dtype=dtype,
    )


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("acc", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("loss_scale", [False, True])
@pytest.mark.parametrize("learning_rate", [False, True])
def test_a_round_trip_changes_no_bit(learning_rate, ema, acc, amsgrad, loss_scale):
    layout = Layout(learning_rate, ema, acc, amsgrad, loss_scale)
    store = make_store(layout)
    tx = transformation(layout)
    state = keras.state_from(store, PARAMS, tx, every=5 if acc else None)
    assert types(state) == types(tx.init(PARAMS))
    rate = 0.1 if learning_rate else None
    back = keras.state_to(state, PARAMS, every=5 if acc else None, learning_rate=rate)
    assert_bits_equal(back, store)
    assert_bits_equal(keras.state_from(back, PARAMS, tx, every=5 if acc else None), state)


def test_a_round_trip_changes_no_bit_in_bfloat16():
    layout = Layout(amsgrad=True)
    store = make_store(layout, dtype=jnp.bfloat16)
    params = [p.astype(jnp.bfloat16) for p in PARAMS]
    state = keras.state_from(store, params, transformation(layout, jnp.bfloat16))
    assert_bits_equal(keras.state_to(state, params, learning_rate=0.1), store)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_legacy_round_trip_takes_and_gives_a_list(amsgrad):
    layout = Layout(legacy=True, amsgrad=amsgrad)
    weights = list(make_store(layout).values())
    state = keras.state_from(weights, PARAMS, transformation(layout), legacy=True)
    back = keras.state_to(state, PARAMS, legacy=True)
    assert_bits_equal(list(back.values()), weights)


def test_calls_become_updates_and_the_rest_of_a_cycle():
    layout = Layout(acc=True)
    tx = at.adam(optax.constant_schedule(0.1), accumulate_every=5)
    state: Any = keras.state_from(make_store(layout, calls=12), PARAMS, tx, every=5)
    assert (int(state.mini_step), int(state.inner_state[0].count)) == (2, 2)
    assert int(state.inner_state[1].inner_state.count) == 2


def test_outside_of_an_accumulation_calls_are_counted():
    layout = Layout(ema=True, acc=True)
    tx = optax.chain(at.adam(accumulate_every=5), at.params_ema(0.9))
    state: Any = keras.state_from(make_store(layout, calls=12), PARAMS, tx, every=5)
    assert (int(state[0].inner_state[0].count), int(state[1].count)) == (2, 12)


def test_every_is_that_of_the_optimizer_if_it_has_one():
    tx = transformation(Layout(acc=True))
    adam = simple.SimpleNamespace(init=tx.init, gradient_accumulation_steps=5)
    outer = simple.SimpleNamespace(init=tx.init, inner_optimizer=adam)
    store = make_store(Layout(acc=True))
    for optimizer in (adam, outer):
        state: Any = keras.state_from(store, PARAMS, optimizer)
        assert int(state.mini_step) == 2
    with pytest.raises(ValueError, match="pass every, gradient_accumulation_steps"):
        keras.state_from(store, PARAMS, tx)
    with pytest.raises(ValueError, match="pass every, gradient_accumulation_steps"):
        keras.state_to(state, PARAMS)


def test_optax_multi_steps_is_taken_up_between_its_cycles():
    tx = optax.MultiSteps(optax.adam(optax.constant_schedule(0.1)), 5)
    store = make_store(Layout(), calls=10)
    state: Any = keras.state_from(store, PARAMS, tx)
    assert int(state.gradient_step) == 10
    assert int(optax.tree.get_all_with_path(state.inner_opt_state, "count")[0][1]) == 10


def test_names_give_the_order():
    params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
    store = make_store(Layout())
    names = ["sequential/dense/kernel", "sequential/dense/bias"]

    def rename(path):
        return f"sequential/dense/{path}"

    state: Any = keras.state_from(store, params, at.adam(), names, rename=rename)
    np.testing.assert_array_equal(state[0].mu["kernel"], store["2"])
    np.testing.assert_array_equal(state[0].nu["bias"], store["5"])
    back = keras.state_to(state, params, names, rename=rename, learning_rate=0.1)
    assert_bits_equal(back, store)
    with pytest.raises(ValueError, match="pass names, in the order of the optimizer's variables"):
        keras.state_to(state, params)
    with pytest.raises(ValueError, match=r"names lack \['sequential/dense/kernel'\]"):
        keras.state_to(state, params, names[1:], rename=rename)


def test_a_state_from_here_may_start_there():
    """Before the first step too, whatever the average is then."""
    tx = transformation(Layout(ema=True))
    params = [p + 1.0 for p in PARAMS]
    store = keras.state_to(tx.init(params), params, learning_rate=1e-3)
    assert int(store["0"]) == 0
    assert_bits_equal(keras.state_from(store, params, tx), tx.init(params))


# Files


def write_weights(path, store, group="optimizer/vars"):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_group("layers")
        variables = file.create_group(group)
        for key, array in store.items():
            data = variables.create_dataset(key, data=array)
            if array.dtype == jnp.bfloat16:
                data.attrs["dtype"] = "bfloat16"
    return path


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_weights_file_is_read(tmp_path, dtype):
    layout = Layout(ema=True, acc=True, amsgrad=True)  # more than ten, which sort as text
    store = make_store(layout, dtype=dtype)
    path = write_weights(tmp_path / "model.weights.h5", store)
    tx = transformation(layout)
    state = keras.state_from(path, PARAMS, tx, every=5)
    assert_bits_equal(state, keras.state_from(store, PARAMS, tx, every=5))
    assert_bits_equal(keras.state_from(str(path), PARAMS, tx, every=5), state)


def test_a_model_file_is_read(tmp_path):
    store = make_store(Layout())
    weights = write_weights(tmp_path / "model.weights.h5", store)
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.write(weights, "model.weights.h5")
    state = keras.state_from(tmp_path / "model.keras", PARAMS, at.adam())
    assert_bits_equal(state, keras.state_from(store, PARAMS, at.adam()))


def test_a_file_without_an_optimizer_is_refused(tmp_path):
    path = write_weights(tmp_path / "model.weights.h5", {"0": np.ones(3)}, group="vars")
    with pytest.raises(ValueError, match=r"has no optimizer/vars.*'layers', 'vars'"):
        keras.state_from(path, PARAMS, at.adam())


def test_without_h5py_a_file_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"adam-transforms\[keras\]"):
        keras.state_from("model.weights.h5", PARAMS, at.adam())


# Refused


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (Layout(amsgrad=True), Layout()),
        (Layout(), Layout(amsgrad=True)),
        (Layout(ema=True), Layout()),
        (Layout(loss_scale=True), Layout()),
        (Layout(), Layout(acc=True)),
    ],
)
def test_a_store_of_another_optimizer_is_refused(there, here):
    with pytest.raises(ValueError, match=r"for 2 variables tx needs .*iteration, .* arrays, got"):
        keras.state_from(make_store(there), PARAMS, transformation(here), every=5)


def test_a_store_of_another_order_is_refused():
    with pytest.raises(ValueError, match="for 2 variables tx needs iteration, momentums"):
        keras.state_from(make_store(Layout()), PARAMS, at.adam(), legacy=True)
    # Without a learning rate both orders are of one length, and only the shapes tell.
    with pytest.raises(ValueError, match="velocity of '0', for '0', has shape"):
        keras.state_from(make_store(Layout(legacy=True)), PARAMS, at.adam())


@pytest.mark.parametrize(
    ("store", "error", "message"),
    [
        (3, TypeError, "store must be a mapping, a list or a path"),
        ({"iteration": 3}, ValueError, 'must have the keys "0", "1"'),
        ({"0": 1, "2": 1}, ValueError, 'must have the keys "0", "1"'),
        ([1, 2, 3], ValueError, "got 3"),
        ([np.ones(3), 1, 1, 1, 1, 1], ValueError, "iteration must be a scalar"),
        ([0.5, 0.1, *[np.ones(s) for s in SHAPES for _ in range(2)]], ValueError, "an integer in"),
        (["a", 0.1, *[np.ones(s) for s in SHAPES for _ in range(2)]], TypeError, "of numbers"),
    ],
)
def test_what_is_no_store_is_refused(store, error, message):
    with pytest.raises(error, match=message):
        keras.state_from(store, PARAMS, at.adam())


def test_the_legacy_optimizer_has_no_average():
    store = make_store(Layout(legacy=True))
    with pytest.raises(ValueError, match="the legacy optimizer has no average"):
        keras.state_from(store, PARAMS, transformation(Layout(ema=True)), legacy=True)


def test_a_masked_parameter_cannot_be_written():
    params = dict(zip(("a", "b"), PARAMS, strict=True))
    tx = at.by_path([("b", optax.set_to_zero())], default=at.adam())
    with pytest.raises(ValueError, match="the state has no momentum of 'b'"):
        keras.state_to(tx.init(params), params, ["a", "b"])


def test_an_average_that_starts_from_zero_is_refused():
    tx = optax.chain(at.adam(), at.params_ema(0.9, debias=True))
    with pytest.raises(ValueError, match="debias=True"):
        keras.state_to(tx.init(PARAMS), PARAMS)
