"""Keras's Adam in functional form: the recorded trajectories, and every method."""

import copy
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recordings
import reference
from helpers import assert_bits_equal, assert_close, in_tiers, normal, types
from recordings import Recording, differences, nested

import adam_transforms as at
from adam_transforms.compat import keras
from adam_transforms.compat.keras import Adam, AdamW, LossScaleOptimizer, schedules
from adam_transforms.interop import keras as interop

# Keras's warning of gradients that are None, where it is not what is tried.
IGNORE_ABSENT = pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")

# Trees: a recording's variables are called "dense/kernel", which is their path here


def flat(tree: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    leaves = {
        at.path_str(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    return {name: leaves[name] for name in names}


# The recordings

CASES = recordings.of_class(
    "keras.optimizers.Adam",
    "keras.optimizers.AdamW",
    "keras.optimizers.LossScaleOptimizer",
    "tf_keras.optimizers.legacy.Adam",
)
# Keras 3 squares the values of a row that is named twice apart; here they are summed first.
SQUARED_APART = [case for case in CASES if case.startswith("k3_sparse_dup")]


def optimizer_of(recording: Recording) -> Any:
    """The optimizer of a recording, out of its configuration in Keras's form."""
    module, _, name = recording.entry["class"].rpartition(".")
    config = dict(recording.config)
    if name == "LossScaleOptimizer":
        config["inner_optimizer"] = {"class_name": "Adam", "config": recording.setup["inner"]}
    optimizer: Any = keras.deserialize({"module": module, "class_name": name, "config": config})
    excluded = recording.setup.get("exclude_from_weight_decay")
    return optimizer.exclude_from_weight_decay(**excluded) if excluded else optimizer


def run(optimizer: Any, recording: Recording) -> list[tuple[Any, Any]]:
    """(params, state) before the first step and after each."""
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(optimizer.apply, n=1))
    params = jax.tree.map(jnp.asarray, nested(recording.start))
    history = [(params, optimizer.init(params))]
    for t in range(recording.steps):
        history.append(step(nested(recording.gradients(t)), *history[-1]))
    return history


def worst_difference(recording: Recording, history: list[tuple[Any, Any]]) -> float:
    return max(
        max(differences(flat(params, recording.start), recording.params(t)).values())
        for t, (params, _) in enumerate(history[1:])
    )


@pytest.mark.parametrize(
    "case",
    in_tiers([case for case in CASES if case not in SQUARED_APART], recordings.differs_most),
)
def test_follows_keras(case: str) -> None:
    recording = Recording(case)
    optimizer = optimizer_of(recording)
    history = run(optimizer, recording)
    assert worst_difference(recording, history) <= recording.tolerance
    assert_same_slots(recording, optimizer, history[-1][1])
    assert_same_averages(recording, optimizer, history)
    assert_same_scalars(recording, optimizer, [state for _, state in history])
    assert types(history[0]) == types(history[-1])


def assert_same_slots(recording: Recording, optimizer: Any, state: Any) -> None:
    """Each slot within a few roundings of its largest entry, by Keras's name and by r2.0's."""
    legacy = ("m", "v", "vhat")
    current = ("momentum", "velocity", "velocity_hat")
    adam = optimizer.adam
    names = dict(zip(legacy, legacy if adam.legacy else current, strict=True))
    names["acc"] = "gradient_accumulator"
    for group, slot in names.items():
        recorded = recording.group(group)
        assert bool(recorded) == (slot in optimizer.get_slot_names())
        for name, expected in recorded.items():
            ours = np.asarray(optimizer.get_slot(state, name, slot))
            # Keras keeps betas in float32: 2^-25 off, and that over 1 - beta in the moment.
            tolerance = 2e-6 + 2**-25 / (1 - (adam.beta_1 if group == "m" else adam.beta_2))
            error, largest = np.max(np.abs(ours - expected)), np.max(np.abs(expected))
            assert error <= tolerance * largest + (4e-6 if group == "acc" else 0), (slot, name)


def assert_same_averages(recording: Recording, optimizer: Any, history: list[Any]) -> None:
    averages = recording.group("ema_steps")
    assert bool(averages) == optimizer.adam.use_ema
    for t, (_, state) in enumerate(history[1:]):
        for name, average in averages.items():
            ours = np.asarray(optimizer.get_slot(state, name, "average"))
            assert np.max(np.abs(ours - average[t])) <= recording.tolerance
    if recording.setup.get("finalize"):
        final = flat(optimizer.finalize_variable_values(*history[-1]), recording.start)
        assert max(differences(final, recording.group("final")).values()) <= recording.tolerance


def assert_same_scalars(recording: Recording, optimizer: Any, states: list[Any]) -> None:
    """What Keras counts and reads, before and after every call."""
    recorded = recording.arrays
    rates = [optimizer.current_learning_rate(state) for state in states[:-1]]
    np.testing.assert_allclose(np.array(rates), recorded["lr"], rtol=2e-6, atol=1e-9)
    if "iterations" in recorded:
        iterations = [optimizer.iterations(state) for state in states[1:]]
        np.testing.assert_array_equal(np.array(iterations), recorded["iterations"])
    if "raw_iterations" in recorded:
        at_name = f"{optimizer.adam.name}/iteration"
        raw = [dict(optimizer.variables(state))[at_name] for state in states[1:]]
        np.testing.assert_array_equal(np.array(raw), recorded["raw_iterations"])
    if "scale" in recorded:
        scales = [optimizer.dynamic_scale(state) for state in states[1:]]
        np.testing.assert_array_equal(np.array(scales), recorded["scale"])
        counters = [optimizer.step_counter(state) for state in states[1:]]
        np.testing.assert_array_equal(np.array(counters), recorded["step_counter"])


@pytest.mark.parametrize("case", SQUARED_APART)
def test_sums_duplicate_rows_before_it_squares_them_where_keras_3_does_not(case: str) -> None:
    recording = Recording(case)
    optimizer = optimizer_of(recording)
    history = run(optimizer, recording)
    assert worst_difference(recording, history) > 10 * recording.tolerance

    adam = optimizer.adam
    rule = reference.Adam(adam.beta_1, adam.beta_2, adam.epsilon, eps_hat=True)
    training = reference.Training(recording.start, rule, adam.learning_rate)
    for t, (params, _) in enumerate(history[1:]):
        summed = {name: np.asarray(at.to_dense(g)) for name, g in recording.gradients(t).items()}
        expected = training.step(summed)
        assert max(differences(flat(params, expected), expected).values()) <= recording.tolerance


# Options together, beyond the recordings


def options_at_random(seed: int) -> dict[str, Any]:
    """A configuration out of all options, in Keras's form."""
    rng = np.random.default_rng(seed)

    def maybe(**options: Any) -> dict[str, Any]:
        return options if rng.random() < 0.6 else {}

    rate: Any = 0.05
    if rng.random() < 0.5:
        decay = schedules.InverseTimeDecay(0.1, int(rng.integers(2, 6)), 0.5)
        rate = schedules.serialize(decay)
    clip = ("clipnorm", "clipvalue", "global_clipnorm")[int(rng.integers(3))]
    config = {"learning_rate": rate, "amsgrad": bool(rng.random() < 0.5)}
    config |= {"beta_1": float(rng.uniform(0.5, 0.9)), "beta_2": float(rng.uniform(0.9, 0.99))}
    config |= {"epsilon": float(rng.choice([1e-7, 1e-3]))}
    config |= maybe(weight_decay=0.1) | maybe(loss_scale_factor=8.0) | maybe(**{clip: 0.3})
    config |= maybe(gradient_accumulation_steps=int(rng.integers(2, 5)))
    if rng.random() < 0.7:
        config |= {"use_ema": True, "ema_momentum": float(rng.uniform(0.5, 1.0))}
        config |= maybe(ema_overwrite_frequency=int(rng.integers(1, 5)))
    return config


def reference_training(config: Mapping[str, Any], start: Any) -> reference.Training:
    """Keras 3's rule for a configuration, in float64."""
    rate = config["learning_rate"]
    if isinstance(rate, Mapping):
        c = rate["config"]
        rate = reference.inverse_time_decay(
            c["initial_learning_rate"], c["decay_rate"] / c["decay_steps"]
        )
    every = config.get("gradient_accumulation_steps") or 1
    frequency, momentum = config.get("ema_overwrite_frequency"), config.get("ema_momentum")
    ema = None
    if config.get("use_ema"):
        ema = reference.Ema(
            lambda count: 0.0 if count < every else momentum,
            lambda count: bool(frequency) and (count // every + 1) % frequency == 0,
        )
    clips = []
    for name, clip in (
        ("clipvalue", reference.clip_by_value),
        ("clipnorm", reference.clip_by_norm),
        ("global_clipnorm", reference.clip_by_global_norm),
    ):
        if name in config:
            clips.append(lambda grads, clip=clip, limit=config[name]: clip(grads, limit))
    return reference.Training(
        start,
        reference.Adam(
            config["beta_1"],
            config["beta_2"],
            config["epsilon"],
            eps_hat=True,
            max_of="raw" if config["amsgrad"] else None,
        ),
        (lambda count: rate(count * every + every - 1)) if callable(rate) else rate,
        loss_scale=config.get("loss_scale_factor") or 1.0,
        accumulation=reference.Accumulation(every),
        clips=clips,
        weight_decay=config.get("weight_decay") or 0.0,
        ema=ema,
        average_every_call=True,
    )


@pytest.mark.parametrize("seed", range(12))
def test_options_together_follow_keras_3_s_order(seed: int) -> None:
    config, steps = options_at_random(seed), 20
    start = {"a": normal(seed, 4, 3), "b": normal(seed + 1, 3)}
    gradients = {"a": normal(seed + 2, steps, 4, 3), "b": normal(seed + 3, steps, 3)}
    training, optimizer = reference_training(config, start), Adam.from_config(config)
    params, state = jax.tree.map(jnp.asarray, start), None
    state, step = optimizer.init(params), jax.jit(optimizer.apply)
    for t in range(steps):
        grads = {name: g[t] for name, g in gradients.items()}
        params, state = step(grads, params, state)
        expected = training.step(grads)
        assert max(differences(params, expected).values()) <= 1e-5, f"step {t} of {config}"
    if training.ema is not None:
        final = optimizer.finalize_variable_values(params, state)
        assert max(differences(final, training.ema.values()).values()) <= 1e-5


def test_legacy_clips_by_value_and_then_by_norm() -> None:
    start = {"a": normal(0, 3), "b": normal(1, 2)}
    grads = {"a": 3 * normal(2, 3), "b": 3 * normal(3, 2)}
    for clip, piece in (
        ("clipnorm", reference.clip_by_norm),
        ("global_clipnorm", reference.clip_by_global_norm),
    ):
        optimizer = Adam(0.1, 0.5, 0.9, 0.5, legacy=True, clipvalue=1.0, **{clip: 0.8})
        training = reference.Training(
            start,
            reference.Adam(0.5, 0.9, 0.5, eps_hat=True),
            0.1,
            clips=[
                lambda g: reference.clip_by_value(g, 1.0),
                lambda g, piece=piece: piece(g, 0.8),
            ],
        )
        params, _ = stepper(optimizer)(grads, start, optimizer.init(start))
        assert max(differences(params, training.step(grads)).values()) <= 1e-6


def test_a_clip_of_0_is_none_in_keras_3() -> None:
    plain = one_step(Adam(0.1))
    for clip in ("clipnorm", "clipvalue", "global_clipnorm"):
        assert_bits_equal(one_step(Adam(0.1, **{clip: 0.0})), plain)


# Its ways in

PARAMS = {"dense": {"bias": normal(0, 3), "kernel": normal(1, 4, 3)}, "table": normal(2, 6, 3)}
GRADS = {"dense": {"bias": normal(3, 3), "kernel": normal(4, 4, 3)}, "table": normal(5, 6, 3)}
PATHS = ["dense/bias", "dense/kernel", "table"]
IDS = np.array([1, 4, 1])


@functools.cache
def stepper(optimizer: Any) -> Any:
    """Its step, compiled once."""
    return jax.jit(optimizer.apply)


def one_step(optimizer: Any) -> Any:
    return stepper(optimizer)(GRADS, PARAMS, optimizer.init(PARAMS))


def loss(params: Any) -> jax.Array:
    """Of all parameters; the table is read by row, row 1 twice."""
    dense, rows = params["dense"], jnp.asarray(params["table"])[IDS]
    return jnp.sum(dense["kernel"] ** 2) + jnp.sum(dense["bias"] ** 3) + jnp.sum(rows**2)


def partial_loss(params: Any) -> jax.Array:
    return jnp.sum(jnp.asarray(params["dense"]["kernel"]) ** 2)


def test_build_and_init_make_the_same_state() -> None:
    optimizer = Adam(use_ema=True)
    assert_bits_equal(optimizer.build(PARAMS), optimizer.init(PARAMS))


def test_every_way_in_takes_the_same_step() -> None:
    optimizer = Adam(0.1, amsgrad=True)
    state = optimizer.init(PARAMS)
    expected = optimizer.apply(GRADS, PARAMS, state)
    assert_bits_equal(optimizer.stateless_apply(state, GRADS, PARAMS), expected)
    pairs = [(flat(GRADS, PATHS)[path], path) for path in reversed(PATHS)]
    assert_bits_equal(optimizer.apply_gradients(pairs, PARAMS, state), expected)
    assert_bits_equal(optimizer.apply_gradients(iter(pairs), PARAMS, state, "step"), expected)
    updates, after = optimizer.transform().update(GRADS, state, PARAMS)
    assert_bits_equal((at.apply_updates(PARAMS, updates), after), expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_minimize_takes_the_step_of_the_gradients(legacy: bool) -> None:
    optimizer = Adam(0.1, legacy=legacy)
    state = optimizer.init(PARAMS)
    expected = stepper(optimizer)(jax.grad(loss)(PARAMS), PARAMS, state)
    minimize = jax.jit(functools.partial(optimizer.minimize, loss))
    assert_close(minimize(PARAMS, state), expected)


@pytest.mark.parametrize("wrap", [lambda adam: adam, LossScaleOptimizer], ids=["adam", "scaled"])
def test_each_functional_step_is_traced_once(wrap: Any) -> None:
    optimizer = wrap(
        Adam(
            schedules.CosineDecay(0.1, 5),
            gradient_accumulation_steps=2,
            use_ema=True,
            ema_overwrite_frequency=2,
        )
    )
    pairs = list(zip(flat(GRADS, PATHS).values(), PATHS, strict=True))
    steps = (
        lambda params, state: optimizer.apply(GRADS, params, state),
        lambda params, state: optimizer.stateless_apply(state, GRADS, params),
        lambda params, state: optimizer.apply_gradients(pairs, params, state),
        lambda params, state: optimizer.minimize(loss, params, state),
    )
    for step in steps:
        chex.clear_trace_counter()
        compiled = jax.jit(chex.assert_max_traces(step, n=1))
        params, state = jax.tree.map(jnp.asarray, PARAMS), optimizer.init(PARAMS)
        for _ in range(4):
            params, state = compiled(params, state)
        assert int(optimizer.iterations(state)) == 2


def test_minimize_and_scale_loss_agree_on_the_scale() -> None:
    plain = Adam(0.1, epsilon=0.1)
    scaled = Adam(0.1, epsilon=0.1, loss_scale_factor=64.0)
    wrapped = LossScaleOptimizer(scaled, initial_scale=256.0)
    state = wrapped.init(PARAMS)
    assert float(plain.scale_loss(2.0)) == 2.0
    assert float(scaled.scale_loss(2.0)) == 128.0
    assert float(Adam(loss_scale_factor=2.0**15).scale_loss(jnp.float16(4.0))) == 2.0**17
    assert float(wrapped.scale_loss(2.0, state)) == 512.0
    assert wrapped.inner_optimizer.loss_scale_factor is None
    expected, _ = plain.minimize(loss, PARAMS, plain.init(PARAMS))
    assert_close(scaled.minimize(loss, PARAMS, scaled.init(PARAMS))[0], expected)
    assert_close(wrapped.minimize(loss, PARAMS, state)[0], expected)


def test_minimize_updates_the_variables_asked_for() -> None:
    optimizer = Adam(0.1)
    state = optimizer.init(PARAMS)
    for var_list in (["table"], [("table", PARAMS["table"])], lambda: ["table"]):
        params, after = optimizer.minimize(loss, PARAMS, state, var_list=var_list)
        assert_bits_equal(params["dense"], PARAMS["dense"])
        assert np.any(params["table"] != PARAMS["table"])
        assert not np.any(optimizer.get_slot(after, "dense/bias", "momentum"))


@IGNORE_ABSENT
def test_minimize_weighs_the_loss_by_grad_loss() -> None:
    optimizer = Adam(0.1, epsilon=1.0)
    state, weights = optimizer.init(PARAMS), np.array([1.0, 0.0, -2.0], np.float32)
    ours, _ = optimizer.minimize(lambda p: p["dense"]["bias"] ** 2, PARAMS, state, None, weights)
    grads = {"dense": {"bias": 2 * weights * PARAMS["dense"]["bias"], "kernel": None}}
    expected, _ = optimizer.apply({**grads, "table": None}, PARAMS, state)
    assert_close(ours, expected)


def test_get_gradients_gives_a_list_and_names_what_has_none() -> None:
    bias, kernel, table = Adam(loss_scale_factor=8.0).get_gradients(loss, PARAMS)
    expected = jax.grad(loss)(PARAMS)
    assert_close((bias, kernel), (expected["dense"]["bias"], expected["dense"]["kernel"]))
    assert isinstance(table, at.SparseRows)
    assert_close(table.to_dense(), expected["table"])
    with pytest.raises(ValueError, match="not depend on 'dense/bias', 'table'"):
        Adam().get_gradients(partial_loss, PARAMS)


def test_row_gradients_act_as_the_arrays_that_they_stand_for() -> None:
    rows = at.SparseRows(IDS, normal(6, 3, 3), 6)
    sparse = {"dense": GRADS["dense"], "table": rows}
    dense = {"dense": GRADS["dense"], "table": rows.to_dense()}
    for optimizer in (
        Adam(0.1),
        Adam(0.1, legacy=True, clipvalue=0.5, global_clipnorm=0.5),
        Adam(0.1, global_clipnorm=0.5, gradient_accumulation_steps=2, use_ema=True),
        LossScaleOptimizer(Adam(0.1, weight_decay=0.1, loss_scale_factor=2.0)),
    ):
        states = [(PARAMS, optimizer.init(PARAMS))] * 2
        for _ in range(3):
            states = [
                stepper(optimizer)(g, *s) for g, s in zip((sparse, dense), states, strict=True)
            ]
        assert_bits_equal(states[0], states[1])
        moved = np.any(np.asarray(states[0][0]["table"]) != PARAMS["table"], axis=1)
        assert np.all(moved[IDS]) and (moved.all() == (optimizer.adam.weight_decay is not None))


def test_idle_rows_move_on_as_keras_moves_them() -> None:
    optimizer = Adam(0.1)
    first, second = (at.SparseRows(np.array(ids), np.ones((1, 3)), 6) for ids in ([1], [4]))
    state = optimizer.init({"table": PARAMS["table"]})
    params, state = optimizer.apply({"table": first}, {"table": PARAMS["table"]}, state)
    after, _ = optimizer.apply({"table": second}, params, state)
    moved = np.any(after["table"] != params["table"], axis=1)
    assert moved.tolist() == [False, True, False, False, True, False]


def test_a_row_that_is_not_finite_skips_the_step_of_a_loss_scale() -> None:
    optimizer = LossScaleOptimizer(Adam(0.1), initial_scale=8.0)
    state = optimizer.init(PARAMS)
    rows = at.SparseRows(IDS, np.full((3, 3), np.nan, np.float32), 6)
    params, after = optimizer.apply({"dense": GRADS["dense"], "table": rows}, PARAMS, state)
    assert_bits_equal(params, PARAMS)
    assert float(optimizer.dynamic_scale(after)) == 4.0
    assert int(optimizer.step_counter(after)) == int(optimizer.iterations(after)) == 0


# Gradients that are None


def with_none(t: int) -> Any:
    return {"dense": {**GRADS["dense"], "bias": None if t % 2 else GRADS["dense"]["bias"]}} | {
        "table": GRADS["table"]
    }


@IGNORE_ABSENT
def test_a_variable_without_gradient_stays_with_its_slots() -> None:
    for optimizer in (Adam(0.1, weight_decay=0.1), LossScaleOptimizer(Adam(0.1, use_ema=True))):
        before = one_step(optimizer)
        after = stepper(optimizer)(with_none(1), *before)
        assert_bits_equal(after[0]["dense"]["bias"], before[0]["dense"]["bias"])
        for slot in ("momentum", "velocity"):
            was, now = (optimizer.get_slot(s, "dense/bias", slot) for _, s in (before, after))
            assert_bits_equal(now, was)
        assert np.all(after[0]["table"] != before[0]["table"])
        assert int(optimizer.iterations(after[1])) == 2


@IGNORE_ABSENT
@pytest.mark.parametrize("wrap", [lambda adam: adam, LossScaleOptimizer], ids=["adam", "scaled"])
def test_a_variable_without_gradient_is_overwritten_by_its_average_all_the_same(wrap: Any) -> None:
    optimizer = wrap(Adam(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2))
    scale = optimizer.initial_scale if isinstance(optimizer, LossScaleOptimizer) else 1.0
    grads = [jax.tree.map(lambda g: g * np.float32(scale), with_none(t)) for t in range(2)]
    first = stepper(optimizer)(grads[0], PARAMS, optimizer.init(PARAMS))
    second = stepper(optimizer)(grads[1], *first)
    # The first average is the bias itself, and stays it as long as the bias stays.
    assert_close(second[0]["dense"]["bias"], first[0]["dense"]["bias"])
    third = stepper(optimizer)(grads[0], *second)
    fourth = stepper(optimizer)(grads[1], *third)
    expected = (second[0]["dense"]["bias"] + third[0]["dense"]["bias"]) / 2
    average = 0.5 * expected + 0.5 * third[0]["dense"]["bias"]
    assert_close(fourth[0]["dense"]["bias"], average)
    assert_close(fourth[0]["dense"]["bias"], optimizer.get_slot(fourth[1], "dense/bias", "average"))


@pytest.mark.parametrize("legacy", [False, True])
def test_one_warning_names_the_variables_without_gradient(legacy: bool) -> None:
    optimizer = Adam(0.1, legacy=legacy)
    params = PARAMS | {"count": np.int32(0)}
    state = optimizer.init(params)
    absent = {"dense": {"bias": None, "kernel": GRADS["dense"]["kernel"]}}
    absent |= {"table": None, "count": None}
    pairs = [(None, "table"), (GRADS["dense"]["kernel"], "dense/kernel")]
    for step, names in (
        (lambda: optimizer.apply(absent, params, state), "'dense/bias', 'table'"),
        (lambda: optimizer.stateless_apply(state, absent, params), "'dense/bias', 'table'"),
        (lambda: optimizer.apply_gradients(iter(pairs), params, state), "'table'"),
        (lambda: optimizer.minimize(partial_loss, params, state), "'dense/bias', 'table'"),
    ):
        with pytest.warns(UserWarning) as caught:
            after, _ = step()
        assert_bits_equal(after["table"], params["table"])
        expected = f"Gradients do not exist for variables [{names}] when minimizing the loss"
        assert [str(w.message).partition(":")[0] for w in caught] == [expected]
    # A variable that is not in the list is not asked for.
    optimizer.apply_gradients(pairs[1:], params, state)
    optimizer.minimize(partial_loss, params, state, ["dense/kernel"])


def test_a_warning_of_gradients_comes_when_a_step_is_traced() -> None:
    optimizer = LossScaleOptimizer(Adam(0.1))
    step, state = jax.jit(optimizer.apply), optimizer.init(PARAMS)
    with pytest.warns(UserWarning, match=r"\['dense/bias'\]"):
        params, state = step(with_none(1), PARAMS, state)
    step(with_none(1), params, state)


def test_what_is_no_floating_array_passes_through() -> None:
    params = {"w": jnp.ones(3), "steps": jnp.int32(4), "nothing": None}
    grads = {"w": jnp.ones(3), "steps": None, "nothing": None}
    inner = Adam(0.1, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=1)
    for optimizer in (inner, LossScaleOptimizer(inner)):
        after, state = stepper(optimizer)(grads, params, optimizer.init(params))
        assert int(after["steps"]) == 4 and after["nothing"] is None
        assert np.all(np.asarray(after["w"]) < 1.0)
        again = optimizer.set_weights(optimizer.get_weights(state), after)
        assert_bits_equal(again, state)
        assert optimizer.finalize_variable_values(after, state)["steps"] is after["steps"]


@IGNORE_ABSENT
def test_a_step_that_is_not_finite_leaves_averages_and_parameters_bit_identical() -> None:
    inner = Adam(0.1, use_ema=True, ema_overwrite_frequency=1)
    optimizer = LossScaleOptimizer(inner)
    before = one_step(optimizer)
    grads = with_none(1) | {"table": np.full((6, 3), np.inf, np.float32)}
    params, state = stepper(optimizer)(grads, *before)
    assert_bits_equal(params, before[0])
    assert_bits_equal(state.inner_state, before[1].inner_state)


# Arguments that change


@pytest.mark.parametrize("legacy", [False, True])
def test_functions_without_arguments_are_called_at_each_step(legacy: bool) -> None:
    values = {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-3}
    functions: Any = {name: lambda name=name: values[name] for name in values}
    optimizer = Adam(**functions, legacy=legacy)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        expected = Adam(**values, legacy=legacy).apply(GRADS, params, state)
        params, state = optimizer.apply(GRADS, params, state)
        assert_bits_equal((params, state), expected)
        values.update({name: value / 2 for name, value in values.items()})
    assert float(optimizer.current_learning_rate(state)) == pytest.approx(0.1 / 8)


def test_under_jit_functions_are_called_when_it_is_traced() -> None:
    calls = []
    optimizer = Adam(lambda: calls.append(1) or 0.1)
    state, step = optimizer.init(PARAMS), jax.jit(optimizer.apply)
    calls.clear()
    params, state = step(GRADS, PARAMS, state)
    traced = len(calls)
    step(GRADS, params, state)
    assert len(calls) == traced >= 1


def test_a_learning_rate_can_be_replaced_in_training_by_anything() -> None:
    halved = Adam(0.1)
    params, state = halved.apply(GRADS, PARAMS, halved.init(PARAMS))
    for rate in (
        0.05,
        jnp.float32(0.05),
        lambda: 0.05,
        lambda step: 0.05 * step.astype(jnp.float32),
    ):
        replaced = dataclasses.replace(halved, learning_rate=rate)
        assert jax.tree.structure(replaced.init(PARAMS)) == jax.tree.structure(state)
        # The schedule is read at the one step that was made.
        assert_close(
            replaced.apply(GRADS, params, state),
            dataclasses.replace(halved, learning_rate=0.05).apply(GRADS, params, state),
        )
    assert halved.learning_rate == 0.1


def test_an_optax_schedule_is_a_learning_rate(relaxed_promotion: None) -> None:
    rate = optax.exponential_decay(0.1, 2, 0.5)
    keras_rate = schedules.ExponentialDecay(0.1, 2, 0.5)
    ours, theirs = Adam(rate), Adam(keras_rate)
    params, state = PARAMS, ours.init(PARAMS)
    for _ in range(3):
        expected = stepper(theirs)(GRADS, params, state)
        params, state = stepper(ours)(GRADS, params, state)
        assert_close((params, state), expected)


def test_parameters_of_low_precision_keep_their_dtype(relaxed_promotion: None) -> None:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    optimizer = Adam(0.1, weight_decay=0.1, use_ema=True, gradient_accumulation_steps=2)
    state = optimizer.init(params)
    after = jax.jit(optimizer.apply)(params, params, state)
    assert types(after) == types((params, state))


def test_can_be_copied_and_is_never_equal_to_another() -> None:
    optimizer = Adam(0.1)
    assert copy.deepcopy(optimizer).learning_rate == 0.1
    assert optimizer != Adam(0.1) and optimizer == optimizer and hash(optimizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.learning_rate = 0.2  # pyright: ignore[reportAttributeAccessIssue]


def test_an_assignment_names_the_way_to_replace_the_field() -> None:
    inner = "inner_optimizer=dataclasses.replace(optimizer.inner_optimizer, learning_rate=...)"
    for optimizer, name, change in (
        (Adam(), "learning_rate", "learning_rate=..."),
        (AdamW(), "weight_decay", "weight_decay=..."),
        (Adam(legacy=True), "lr", "learning_rate=..."),
        (LossScaleOptimizer(Adam()), "learning_rate", inner),
    ):
        remedy = re.escape(f"dataclasses.replace(optimizer, {change})")
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"'{name}'.*{remedy}"):
            setattr(optimizer, name, 0.2)


# r2.0's name of the learning rate


def test_lr_is_the_learning_rate_of_r2_and_wins() -> None:
    for optimizer in (
        Adam(legacy=True, lr=0.5),
        Adam(0.1, legacy=True, lr=0.5),
        Adam(learning_rate=0.1, lr=0.5, legacy=True),
        Adam.from_config({"lr": 0.5}),
        Adam.from_config({"lr": 0.5, "learning_rate": 0.1, "decay": 0.0}),
        LossScaleOptimizer(Adam(legacy=True, lr=0.5)),
    ):
        assert optimizer.adam.legacy
        assert (optimizer.lr, optimizer.learning_rate) == (0.5, 0.5)
        assert optimizer.adam.get_config()["learning_rate"] == 0.5
    replaced = dataclasses.replace(Adam(legacy=True, lr=0.5), learning_rate=0.25)
    assert (replaced.lr, replaced.name) == (0.25, "Adam")
    rate = schedules.InverseTimeDecay(0.1, 5, 0.5)
    assert Adam(legacy=True, lr=rate).lr is rate


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_keras_3_has_no_lr(make: Any) -> None:
    with pytest.raises(ValueError, match="lr needs legacy=True.*learning_rate, got lr=0.5"):
        make(lr=0.5)
    with pytest.raises(AttributeError, match="has no 'lr': Keras 3 has learning_rate"):
        make().lr  # noqa: B018
    with pytest.raises(ValueError, match="no lr"):
        make.from_config({"lr": 0.5, "use_ema": False})


# AdamW


def test_adamw_is_adam_with_decay_in_keras_3_s_order() -> None:
    fields = ["learning_rate", "weight_decay", "beta_1", "beta_2", "epsilon", "amsgrad", "clipnorm"]
    assert [f.name for f in dataclasses.fields(AdamW)][: len(fields)] == fields
    theirs = Adam(0.1, 0.8, 0.9, 1e-3, True, 0.2, 1.0)
    ours = AdamW(0.1, 0.2, 0.8, 0.9, 1e-3, True, 1.0)
    assert fields_of(ours) == fields_of(theirs) | {"name": "adam_w"}
    assert AdamW().weight_decay == 0.004
    assert_bits_equal(one_step(AdamW(0.1)), one_step(Adam(0.1, weight_decay=0.004)))
    excluded = ours.exclude_from_weight_decay(var_names=["bias"])
    assert type(excluded) is AdamW and decayed(excluded) == {"dense/kernel", "table"}


def test_adamw_keeps_its_class_in_configs() -> None:
    for optimizer in (AdamW(0.5, 0.1), AdamW(0.5, clipnorm=1.0, name="a")):
        written = json.loads(json.dumps(keras.serialize(optimizer)))
        assert (written["module"], written["class_name"]) == ("keras.optimizers", "AdamW")
        again = keras.deserialize(written)
        assert type(again) is AdamW and fields_of(again) == fields_of(optimizer)
        scaled: Any = keras.deserialize(keras.serialize(LossScaleOptimizer(optimizer)))
        assert type(scaled.inner_optimizer) is AdamW
        assert fields_of(scaled.inner_optimizer) == fields_of(optimizer)
    assert AdamW.from_config({}).weight_decay == 0.004
    assert type(Adam.from_config(AdamW().get_config())) is Adam


# By name


def test_get_makes_an_optimizer_of_what_keras_takes() -> None:
    for identifier, kind in (
        ("adam", Adam),
        ("ADAM", Adam),
        ("AdamW", AdamW),
        ("adamw", AdamW),
        ({"class_name": "adam", "config": {"learning_rate": 0.5}}, Adam),
        (keras.serialize(AdamW(0.5)), AdamW),
        (keras.serialize(LossScaleOptimizer(Adam())), LossScaleOptimizer),
    ):
        found: Any = keras.get(identifier)
        assert type(found) is kind
        assert isinstance(identifier, str) or fields_of(found) == fields_of(
            keras.deserialize(identifier)
        )
    for optimizer in (Adam(), LossScaleOptimizer(Adam()), at.compat.capreolus.AdamMultilr()):
        assert keras.get(optimizer) is optimizer
    assert keras.get(None) is None


# What a loss scale takes for its inner optimizer


def test_a_loss_scale_takes_keras_s_defaults_of_what_is_the_inner_optimizer_s() -> None:
    plain = LossScaleOptimizer(Adam(0.1), 8.0)
    unused = {"clipnorm": None, "use_ema": False, "ema_momentum": 0.99, "loss_scale_factor": None}
    for optimizer in (
        LossScaleOptimizer(Adam(0.1), 8.0, dynamic=True),
        LossScaleOptimizer(Adam(0.1), 8.0, **unused),
        LossScaleOptimizer.from_config({**plain.get_config(), **unused, "dynamic": True}),
    ):
        assert fields_of(optimizer) == fields_of(plain)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dynamic": False}, "no dynamic=False.*loss_scale_factor.*static_loss_scale"),
        ({"clipnorm": 0.5}, "has no clipnorm: set clipnorm on the inner_optimizer"),
        ({"ema_momentum": 0.5}, "has no ema_momentum: set ema_momentum on the inner_optimizer"),
        ({"loss_scale_factor": 2.0}, "on the inner_optimizer, and use it without"),
        ({"learning_rate": 0.1}, "has no learning_rate: set learning_rate on the inner_optimizer"),
        ({"rho": 0.9}, "has no rho: its arguments are inner_optimizer, initial_scale"),
    ],
)
def test_a_loss_scale_says_what_belongs_to_the_inner_optimizer(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossScaleOptimizer(Adam(), **options)
    config = LossScaleOptimizer(Adam()).get_config()
    with pytest.raises(ValueError, match=message):
        LossScaleOptimizer.from_config(config | options)


# Weight decay


def decayed(optimizer: Any) -> set[str]:
    """The parameters that a step without gradient moves."""
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    after, _ = stepper(optimizer)(zeros, PARAMS, optimizer.init(PARAMS))
    return {path for path in PATHS if np.any(flat(after, PATHS)[path] != flat(PARAMS, PATHS)[path])}


def test_exclusion_from_weight_decay_makes_a_new_optimizer() -> None:
    optimizer = Adam(0.1, weight_decay=0.1)
    assert decayed(optimizer.exclude_from_weight_decay(var_names=["bias"])) == {
        "dense/kernel",
        "table",
    }
    assert decayed(optimizer) == set(PATHS)


@pytest.mark.parametrize(
    "var_list, var_names, left",
    [
        (None, ["^dense/", "nothing"], {"table"}),
        (None, [":0$"], set()),
        (None, "dense", {"table"}),
        (None, [re.compile("DENSE/", re.IGNORECASE)], {"table"}),
        (None, ["nothing"], set(PATHS)),
        (None, [], set(PATHS)),
        (["dense"], None, set(PATHS)),
        (["table"], None, {"dense/bias", "dense/kernel"}),
        ([("dense/bias", PARAMS["dense"]["bias"])], ["kernel"], {"table"}),
    ],
)
def test_exclusion_is_by_path_and_by_pattern(var_list: Any, var_names: Any, left: Any) -> None:
    first = Adam(0.1, weight_decay=0.1).exclude_from_weight_decay(var_names=["."])
    assert decayed(first) == set()
    for optimizer in (first, LossScaleOptimizer(first)):
        assert decayed(optimizer.exclude_from_weight_decay(var_list, var_names)) == left


# What the state holds


def test_variables_have_keras_s_names_and_order() -> None:
    order = ["table", "dense/kernel", "dense/bias"]
    full = Adam(use_ema=True, gradient_accumulation_steps=2, amsgrad=True, name="a")
    flat_names = ["table", "dense_kernel", "dense_bias"]
    expected = ["a/iteration", "a/learning_rate"]
    expected += [f"a/{name}_average" for name in flat_names]
    expected += [f"a/{name}_gradient_accumulator" for name in flat_names]
    expected += [f"a/{name}_{s}" for name in flat_names for s in ("momentum", "velocity")]
    expected += [f"a/{name}_velocity_hat" for name in flat_names]
    variables = full.variables(full.init(PARAMS), order)
    assert [variable.path for variable in variables] == expected
    shapes = [np.shape(flat(PARAMS, order)[path]) for path in order]
    assert [np.shape(variable.value) for variable in variables[2:5]] == shapes

    scheduled = Adam(schedules.CosineDecay(0.1, 5))
    assert [v.path for v in scheduled.variables(scheduled.init(PARAMS))][:2] == [
        "adam/iteration",
        "adam/dense_bias_momentum",
    ]
    wrapped = LossScaleOptimizer(Adam())
    assert [v.path for v in wrapped.variables(wrapped.init(PARAMS))][:6] == [
        "loss_scale_optimizer/iteration",
        "loss_scale_optimizer/learning_rate",
        "loss_scale_optimizer/step_counter",
        "loss_scale_optimizer/dynamic_scale",
        "adam/iteration",
        "adam/learning_rate",
    ]
    legacy = Adam(legacy=True, amsgrad=True)
    assert [v.path for v in legacy.weights(legacy.init(PARAMS), order)] == [
        "Adam/iter:0",
        *[f"Adam/{path}/{slot}:0" for slot in ("m", "v", "vhat") for path in order],
    ]
    with pytest.raises(ValueError, match="in some order"):
        legacy.variables(legacy.init(PARAMS), ["table"])


STATEFUL = {
    "plain": Adam(0.1),
    "scheduled": Adam(schedules.InverseTimeDecay(0.1, 5, 0.5)),
    "all": Adam(0.1, amsgrad=True, weight_decay=0.1, use_ema=True, gradient_accumulation_steps=3),
    "wrapped": LossScaleOptimizer(Adam(0.1, use_ema=True), dynamic_growth_steps=3),
    "wrapped accumulation": LossScaleOptimizer(
        Adam(schedules.CosineDecay(0.1, 9), gradient_accumulation_steps=3)
    ),
    "legacy": Adam(0.1, legacy=True, decay=0.5),
    "legacy amsgrad": Adam(0.1, legacy=True, amsgrad=True),
}


def trained(optimizer: Any, steps: int, start: Any = None) -> Any:
    params, state = start or (PARAMS, optimizer.init(PARAMS))
    step = stepper(optimizer)
    for t in range(steps):
        grads = jax.tree.map(lambda g, factor=t + 1.0: g * factor, GRADS)
        params, state = step(grads, params, state)
    return params, state


@pytest.mark.parametrize("name", STATEFUL)
def test_weights_go_out_and_come_back_bit_for_bit(name: str) -> None:
    optimizer = STATEFUL[name]
    params, state = trained(optimizer, 5)
    weights = optimizer.get_weights(state)
    assert all(isinstance(weight, np.ndarray) for weight in weights)
    for again in (
        optimizer.set_weights(weights, params),
        optimizer.load_own_variables(optimizer.save_own_variables(state), params),
        optimizer.set_weights(optimizer.get_weights(state, PATHS[::-1]), params, PATHS[::-1]),
    ):
        assert types(again) == types(state)
        assert_bits_equal(optimizer.get_weights(again), weights)
        assert_bits_equal(
            trained(optimizer, 4, (params, again))[0], trained(optimizer, 4, (params, state))[0]
        )


@pytest.mark.parametrize("name", STATEFUL)
def test_the_store_is_the_one_of_interop(name: str) -> None:
    optimizer = STATEFUL[name]
    params, state = trained(optimizer, 4)
    adam = optimizer.adam
    store = interop.state_to(
        state,
        params,
        PATHS,
        every=adam.gradient_accumulation_steps,
        learning_rate=None if callable(adam.learning_rate) else adam.learning_rate,
        legacy=adam.legacy,
    )
    ours = optimizer.save_own_variables(state)
    assert list(ours) == list(store)
    for key, array in store.items():
        np.testing.assert_array_equal(ours[key], array)


def test_the_variables_of_a_state_are_weights() -> None:
    for name, other in (
        ("plain", Adam(0.1, name="other")),
        ("legacy amsgrad", STATEFUL["legacy amsgrad"]),
        ("wrapped", STATEFUL["wrapped"]),
    ):
        optimizer = STATEFUL[name]
        params, state = trained(optimizer, 2)
        assert_bits_equal(other.set_weights(optimizer.variables(state), params), state)
        reordered = optimizer.variables(state, PATHS[::-1])
        assert_bits_equal(other.set_weights(reordered, params, PATHS[::-1]), state)


def test_variables_in_another_order_than_the_weights_are_refused() -> None:
    optimizer = Adam(0.1)
    params = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    variables = optimizer.variables(optimizer.init(params), ["b", "a"])
    with pytest.raises(ValueError, match=r"weights\[2\] is 'adam/b_momentum', where 'adam/a_mom"):
        optimizer.set_weights(variables, params)


def test_names_are_not_numbered() -> None:
    assert [optimizer.name for optimizer in (Adam(), Adam(), AdamW(), Adam(legacy=True))] == [
        "adam",
        "adam",
        "adam_w",
        "Adam",
    ]


def test_weights_are_renamed_and_transposed_on_the_way_in() -> None:
    optimizer = Adam(0.1)
    params, state = trained(optimizer, 2)
    turned = [w.T for w in optimizer.get_weights(state)]
    names = ["bias", "kernel", "table"]

    def rename(path: str) -> Any:
        name = path.rpartition("/")[2]
        return name if name == "bias" else (name, (1, 0))

    assert_bits_equal(optimizer.set_weights(turned, params, names, rename=rename), state)


def test_the_weights_of_keras_1_have_a_vhat_that_is_left_out() -> None:
    amsgrad, plain = STATEFUL["legacy amsgrad"], Adam(0.1, legacy=True)
    params, state = trained(amsgrad, 3)
    weights = amsgrad.get_weights(state)
    for again in (
        plain.set_weights(weights, params),
        plain.load_own_variables(amsgrad.save_own_variables(state), params),
    ):
        assert_bits_equal(plain.get_weights(again), weights[:7])


def test_a_learning_rate_that_the_state_cannot_hold_is_refused() -> None:
    optimizer, scheduled = STATEFUL["plain"], STATEFUL["scheduled"]
    params, state = trained(optimizer, 2)
    store = optimizer.save_own_variables(state)
    with pytest.raises(ValueError, match=r"is 0\.1, that of the optimizer 0\.5.*replace"):
        Adam(0.5).load_own_variables(store, params)
    with pytest.raises(ValueError, match=r"is 0\.1, that of the optimizer a schedule"):
        scheduled.load_own_variables(store, params)
    store = scheduled.save_own_variables(scheduled.init(PARAMS))
    with pytest.raises(ValueError, match=r"is a schedule, that of the optimizer 0\.1"):
        optimizer.load_own_variables(store, params)
    wrapped = LossScaleOptimizer(optimizer)
    store = wrapped.save_own_variables(wrapped.init(PARAMS))
    with pytest.raises(ValueError, match=r"is 0\.1, that of the optimizer 0\.5"):
        LossScaleOptimizer(Adam(0.5)).load_own_variables(store, params)
    # What is the same once rounded to float32 is the same.
    assert Adam(float(np.float32(0.1))).load_own_variables(
        optimizer.save_own_variables(state), params
    )


def test_slots_are_read_by_keras_s_names() -> None:
    full = STATEFUL["all"]
    params, state = trained(full, 4)
    assert full.get_slot_names() == [
        "average",
        "gradient_accumulator",
        "momentum",
        "velocity",
        "velocity_hat",
    ]
    for name in full.get_slot_names():
        for path in PATHS:
            slot = full.get_slot(state, (path, None), name)
            assert slot.shape == np.shape(flat(PARAMS, PATHS)[path])
            assert np.any(slot)
    assert Adam(legacy=True).get_slot_names() == ["m", "v"]
    assert full.get_slot(state, "table", "m") is None
    assert full.get_slot(state, "nothing", "momentum") is None


def test_finalize_gives_the_averages_if_there_are_any() -> None:
    plain, averaged = STATEFUL["plain"], STATEFUL["wrapped"]
    params, state = trained(plain, 2)
    assert plain.finalize_variable_values(params, state) is params
    assert_bits_equal(averaged.finalize_variable_values(PARAMS, averaged.init(PARAMS)), PARAMS)
    params, state = trained(averaged, 4)
    final = flat(averaged.finalize_variable_values(params, state), PATHS)
    for path in PATHS:
        assert_bits_equal(final[path], averaged.get_slot(state, path, "average"))
        assert np.any(final[path] != flat(params, PATHS)[path])


# Configs

KERAS_3 = """{"name": "adam", "learning_rate": {"module": "keras.optimizers.schedules",
"class_name": "ExponentialDecay", "config": {"initial_learning_rate": 0.1, "decay_steps": 10,
"decay_rate": 0.5, "staircase": false, "name": "ExponentialDecay"}, "registered_name": null},
"weight_decay": null, "clipnorm": null, "global_clipnorm": null, "clipvalue": null, "use_ema": true,
"ema_momentum": 0.99, "ema_overwrite_frequency": null, "loss_scale_factor": null,
"gradient_accumulation_steps": 2, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-07,
"amsgrad": true}"""
KERAS_3_SCALED = """{"name": "loss_scale_optimizer", "inner_optimizer": {"module":
"keras.optimizers", "class_name": "Adam", "config": {"name": "adam_1", "learning_rate":
0.10000000149011612, "weight_decay": null, "clipnorm": null, "global_clipnorm": null, "clipvalue":
null, "use_ema": false, "ema_momentum": 0.99, "ema_overwrite_frequency": null, "loss_scale_factor":
null, "gradient_accumulation_steps": null, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-07,
"amsgrad": false}, "registered_name": null}, "initial_scale": 32768.0, "dynamic_growth_steps":
2000}"""
LEGACY = """{"name": "Adam", "clipnorm": 1.0, "clipvalue": 0.5, "learning_rate": 0.001, "decay":
0.25, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-07, "amsgrad": true}"""


@pytest.mark.parametrize(
    "cls, written",
    [(Adam, KERAS_3), (LossScaleOptimizer, KERAS_3_SCALED), (Adam, LEGACY)],
    ids=["keras 3", "scaled", "legacy"],
)
def test_a_config_as_keras_wrote_it_is_read_and_written_the_same(cls: Any, written: str) -> None:
    config = json.loads(written)
    optimizer = cls.from_config(config)
    assert config == json.loads(written)
    assert optimizer.get_config() == config
    assert list(optimizer.get_config()) == list(config)
    assert optimizer.adam.legacy == (written is LEGACY)


@pytest.mark.parametrize("name", STATEFUL)
def test_configs_come_back_through_json_as_the_same_optimizer(name: str) -> None:
    optimizer = STATEFUL[name]
    config = json.loads(json.dumps(keras.serialize(optimizer)))
    again = keras.deserialize(config)
    assert type(again) is type(optimizer)
    assert fields_of(again) == fields_of(optimizer)
    assert fields_of(type(optimizer).from_config(optimizer.get_config())) == fields_of(optimizer)
    legacy = optimizer.adam.legacy
    assert config["module"] == ("keras.optimizers.legacy" if legacy else "keras.optimizers")


def fields_of(optimizer: Any) -> Any:
    fields = {f.name: getattr(optimizer, f.name) for f in dataclasses.fields(optimizer)}
    return {k: fields_of(v) if isinstance(v, Adam) else v for k, v in fields.items()}


def test_what_json_has_no_word_for_is_written_as_its_value() -> None:
    config = Adam(lambda: 0.5, beta_1=lambda: 0.8, beta_2=np.float32(0.5)).get_config()
    assert (config["learning_rate"], config["beta_1"], config["beta_2"]) == (0.5, 0.8, 0.5)
    assert Adam(jnp.float32(0.5)).get_config()["learning_rate"] == 0.5
    with pytest.raises(TypeError, match="has a get_config"):
        Adam(optax.cosine_decay_schedule(0.1, 5)).get_config()
    with pytest.raises(TypeError, match="learning_rate is traced"):
        jax.jit(lambda rate: Adam(rate).get_config()["learning_rate"])(0.5)


def test_configs_of_other_versions_are_read() -> None:
    between = {"learning_rate": 0.5, "use_ema": False, "jit_compile": True}
    between |= {"is_legacy_optimizer": False}
    assert Adam.from_config(between).learning_rate == 0.5
    assert Adam.from_config({"lr": 0.5, "decay": 0.0}).legacy
    assert keras.deserialize({"class_name": "adam", "config": {}}).learning_rate == 0.001
    assert keras.deserialize(
        {"class_name": "Adam", "config": {}, "module": "keras.optimizers.legacy"}
    ).adam.legacy
    assert keras.deserialize({"class_name": "Keras>AdamW", "config": {}}).adam.weight_decay == 0.004
    old = json.loads(KERAS_3_SCALED) | {"clipnorm": None, "use_ema": False, "ema_momentum": 0.99}
    assert LossScaleOptimizer.from_config(old).name == "loss_scale_optimizer"


# The table


def table() -> dict[str, str]:
    """From the names in the module's table to what they are here."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", keras.__doc__ or "", re.MULTILINE)
    return {
        name: here
        for names, here in rows
        for name in re.findall(r"`(?:schedules\.)?(\w+)[^`]*`", names)
    }


# Every method and property that the documentation of Keras 3's Adam and of r2.0's lists.
DOCUMENTED = """learning_rate variables add_variable add_variable_from_reference apply
apply_gradients assign assign_add assign_sub build exclude_from_weight_decay
finalize_variable_values from_config get_config load_own_variables save_own_variables scale_loss
set_weights stateless_apply update_step iterations weights add_slot add_weight get_gradients
get_slot get_slot_names get_updates get_weights minimize add_optimizer_variables
check_finite gradient_aggregator gradient_transformers""".split()


def test_the_table_names_everything_that_keras_documents() -> None:
    assert table().keys() >= {
        *(*DOCUMENTED, "Adam", "AdamW", "LossScaleOptimizer", "dynamic_scale", "get"),
        *("constraint", "overwrite_with_gradient"),
    }


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_the_table_says_is_so(name: str) -> None:
    here = table()[name]
    absent = here.startswith("none")
    for optimizer in (Adam(), Adam(legacy=True), LossScaleOptimizer(Adam())):
        assert hasattr(optimizer, name) != absent
    if absent:
        with pytest.raises(AttributeError, match=f"no '{name}': .*\\w\\w"):
            getattr(Adam(), name)
    else:
        # ... and this file tests it.
        assert re.search(rf"\.{name}\b", Path(__file__).read_text())


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="^'Adam' has no 'get_wieghts'$"):
        Adam().get_wieghts  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


# Nonsense


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
        ({"learning_rate": None}, TypeError, "learning_rate must be"),
        ({"learning_rate": np.ones(2)}, TypeError, "learning_rate must be"),
        ({"beta_1": 1.0}, ValueError, "beta_1 must be >= 0 and < 1, got 1"),
        ({"beta_2": -0.1}, ValueError, "beta_2 must be"),
        ({"epsilon": -1e-8}, ValueError, "epsilon must be >= 0"),
        ({"epsilon": None}, TypeError, "epsilon must be"),
        ({"amsgrad": 1}, TypeError, "amsgrad must be True or False"),
        ({"weight_decay": "no"}, TypeError, "weight_decay must be a number"),
        ({"clipnorm": -1.0}, ValueError, "clipnorm must be >= 0"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "got clipnorm and clipvalue"),
        ({"clipvalue": 1.0, "global_clipnorm": 0.0}, ValueError, "at most one of"),
        ({"use_ema": "yes"}, TypeError, "use_ema must be True or False"),
        ({"ema_momentum": 1.1}, ValueError, r"ema_momentum must be in \[0, 1\], got 1.1"),
        ({"ema_momentum": -0.1}, ValueError, "ema_momentum must be >= 0"),
        ({"ema_momentum": None}, ValueError, "ema_momentum must be"),
        ({"ema_overwrite_frequency": 0}, ValueError, "ema_overwrite_frequency must be at least 1"),
        ({"ema_overwrite_frequency": 2.5}, TypeError, "ema_overwrite_frequency must be an int"),
        ({"loss_scale_factor": 0.0}, ValueError, "loss_scale_factor must be > 0"),
        ({"gradient_accumulation_steps": 1}, ValueError, "must be at least 2, got 1"),
        ({"gradient_accumulation_steps": "2"}, TypeError, "gradient_accumulation_steps must be"),
        ({"name": 3}, TypeError, "name must be a string"),
        ({"legacy": "yes"}, TypeError, "legacy must be True or False"),
        ({"decay": 0.1}, ValueError, "decay needs legacy=True"),
        ({"excluded_from_weight_decay": ["("]}, ValueError, "no regular expression"),
        ({"legacy": True, "decay": -0.1}, ValueError, "decay must be >= 0"),
        ({"legacy": True, "weight_decay": 0.1}, ValueError, "legacy=True has no weight_decay"),
        ({"legacy": True, "use_ema": True}, ValueError, "legacy=True has no use_ema"),
        ({"legacy": True, "ema_momentum": 0.5}, ValueError, "legacy=True has no ema_momentum"),
        ({"legacy": True, "loss_scale_factor": 2.0}, ValueError, "has no loss_scale_factor"),
        ({"legacy": True, "gradient_accumulation_steps": 2}, ValueError, "has no gradient_acc"),
        ({"legacy": True, "clipnorm": 0.0}, ValueError, "clipnorm must be > 0 with legacy"),
        (
            {"legacy": True, "clipnorm": 1.0, "global_clipnorm": 1.0},
            ValueError,
            "got clipnorm and global_clipnorm",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(
    arguments: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        Adam(**arguments)


def test_legacy_takes_an_epsilon_of_0_or_none_for_its_default() -> None:
    assert [Adam(legacy=True, epsilon=e).epsilon for e in (0, 0.0, None, 0.5)] == [
        1e-7,
        1e-7,
        1e-7,
        0.5,
    ]
    assert Adam(epsilon=0.0).epsilon == 0.0


ADAM = Adam(0.1)
STATE = ADAM.init(PARAMS)
ONES = np.ones((6, 3), int)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ADAM.apply(jax.tree.map(lambda _: None, PARAMS), PARAMS, STATE), ValueError, "no"),
        (lambda: ADAM.apply({"table": None}, PARAMS, STATE), ValueError, "no variable has a grad"),
        (lambda: ADAM.apply({"table": GRADS["table"]}, PARAMS, STATE), ValueError, "'dense/bias'"),
        (lambda: ADAM.apply(GRADS | {"table": np.ones(2)}, PARAMS, STATE), ValueError, "'table'"),
        (lambda: ADAM.apply(GRADS | {"table": ONES}, PARAMS, STATE), TypeError, "'table' must be"),
        (lambda: Adam(beta_1=lambda step: 0.9).init(PARAMS), TypeError, "beta_1 must be a num"),
        (lambda: Adam(beta_2=lambda: 1.5).init(PARAMS), ValueError, "beta_2 must be"),
        (lambda: ADAM.apply_gradients([GRADS], PARAMS, STATE), TypeError, "pair"),
        (lambda: ADAM.apply_gradients([(None, "table")], PARAMS, STATE), ValueError, "no variable"),
        (lambda: ADAM.apply_gradients([(IDS, "chair")], PARAMS, STATE), ValueError, "'chair'"),
        (lambda: ADAM.minimize(3.0, PARAMS, STATE), RuntimeError, "loss must be a function"),
        (lambda: ADAM.minimize(loss, PARAMS, STATE, ["chair"]), ValueError, "'chair' is no param"),
        (lambda: ADAM.minimize(loss, PARAMS, STATE, [3]), TypeError, "a variable must be"),
        (lambda: ADAM.minimize(partial_loss, PARAMS, STATE, ["table"]), ValueError, "no variable"),
        (lambda: ADAM.exclude_from_weight_decay([3]), TypeError, "a variable must be"),
        (lambda: ADAM.exclude_from_weight_decay(var_names=["("]), ValueError, "no regular expr"),
        (lambda: ADAM.iterations(()), ValueError, "state must be a result of init"),
        (lambda: LossScaleOptimizer(ADAM).dynamic_scale(STATE), ValueError, "has 0 loss scales"),
        (lambda: ADAM.set_weights([np.int32(0)], PARAMS), ValueError, "8|arrays, got 1"),
        (lambda: ADAM.set_weights({"0": 1}, PARAMS), TypeError, "weights must be a list"),
        (lambda: ADAM.load_own_variables("a.weights.h5", PARAMS), TypeError, "must be a mapping"),
        (lambda: ADAM.load_own_variables({"a": 1}, PARAMS), ValueError, "keys"),
        (lambda: Adam.from_config({"rho": 0.9, "centered": 1}), ValueError, "no centered, rho"),
        (lambda: Adam.from_config("adam"), TypeError, "must be a dictionary"),
        (lambda: Adam.from_config(json.loads(KERAS_3_SCALED)), ValueError, "has no dynamic_growth"),
        (lambda: Adam.from_config({"learning_rate": {"class_name": "f"}}), ValueError, "a config"),
        (lambda: LossScaleOptimizer.from_config({"initial_scale": 2.0}), ValueError, "lacks inner"),
        (lambda: LossScaleOptimizer.from_config([]), TypeError, "must be a dictionary"),
        (
            lambda: LossScaleOptimizer.from_config(json.loads(KERAS_3_SCALED) | {"clipnorm": 1.0}),
            ValueError,
            "has no clipnorm",
        ),
        (lambda: keras.deserialize({"class_name": "SGD", "config": {}}), ValueError, "got 'SGD'"),
        (lambda: keras.deserialize({}), ValueError, "class_name and a config"),
        (lambda: keras.serialize(at.adam()), TypeError, "must be an optimizer"),
        (lambda: LossScaleOptimizer(at.adam()), TypeError, "inner_optimizer must be an Adam"),
        (lambda: LossScaleOptimizer(LossScaleOptimizer(ADAM)), TypeError, "inner_optimizer must"),
        (lambda: AdamW(weight_decay=None), ValueError, "weight_decay must be a number, got None"),
        (lambda: AdamW(legacy=True), ValueError, "r2.0 has no AdamW"),
        (lambda: AdamW.from_config(ADAM.get_config()), ValueError, "weight_decay must be a num"),
        (lambda: keras.get("sgd"), ValueError, "one of Adam, AdamW, LossScaleOptimizer, got 'sgd'"),
        (lambda: keras.get(Adam), ValueError, "one of 'Adam', 'AdamW', .*or an optimizer of this"),
        (lambda: keras.get({}), ValueError, "class_name and a config"),
        (lambda: LossScaleOptimizer(ADAM, dynamic=1), TypeError, "dynamic must be True or False"),
        (lambda: LossScaleOptimizer(ADAM, 0.0), ValueError, "initial_scale must be > 0"),
        (lambda: LossScaleOptimizer(ADAM, 1.0, 0), ValueError, "dynamic_growth_steps must be at"),
        (lambda: LossScaleOptimizer(ADAM, name=1), TypeError, "name must be a string"),
    ],
    ids=map(str, itertools.count()),
)  # fmt: skip
def test_misuse_is_refused_with_a_reason(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
