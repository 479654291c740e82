"""Beside the real Keras, where it is installed: schedules, configs, options at random, and state
that moves there and back."""

import copy
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from helpers import normal

from adam_transforms.compat import keras as compat
from adam_transforms.compat.keras import (
    Adam,
    AdamW,
    LossScaleOptimizer,
    deserialize,
    get,
    schedules,
    serialize,
)
from adam_transforms.compat.keras._surface import REPLACEMENTS

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
os.environ.setdefault("KERAS_BACKEND", "tensorflow" if HAS_TENSORFLOW else "jax")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras", minversion="3.0")

# On JAX Keras keeps what a variable without gradient has accumulated when the others are updated,
# where on TensorFlow all accumulators are reset; and its LossScaleOptimizer leaks a tracer.
ON_JAX = keras.backend.backend() == "jax"

# Keras and its backends promote types implicitly, and warn of what is theirs.
pytestmark = [
    pytest.mark.usefixtures("relaxed_promotion"),
    pytest.mark.filterwarnings("ignore"),
]

# Schedules

SCHEDULES: list[Any] = [
    schedules.ExponentialDecay(0.1, 7, 0.5),
    schedules.ExponentialDecay(0.1, 7, 0.5, staircase=True),
    schedules.ExponentialDecay(0.1, 7, 0.0),
    schedules.ExponentialDecay(0.1, 7, 1.5),
    schedules.PiecewiseConstantDecay([3, 6, 20], [1.0, 0.5, 0.1, 0.0]),
    schedules.PiecewiseConstantDecay([2.5], [1.0, 0.5]),
    schedules.PolynomialDecay(0.1, 9),
    schedules.PolynomialDecay(0.1, 9, 0.02, power=0.5),
    schedules.PolynomialDecay(0.1, 9, 0.02, power=2.0, cycle=True),
    schedules.PolynomialDecay(0.01, 9, 0.2, power=3.0),
    schedules.InverseTimeDecay(0.1, 4, 0.5),
    schedules.InverseTimeDecay(0.1, 4, 0.5, staircase=True),
    schedules.CosineDecay(0.1, 12),
    schedules.CosineDecay(0.1, 12, alpha=0.2),
    schedules.CosineDecay(0.0, 12, alpha=0.1, warmup_target=0.3, warmup_steps=5),
    schedules.CosineDecay(0.1, 12, warmup_target=0.3, warmup_steps=0),
    schedules.CosineDecayRestarts(0.1, 5),
    schedules.CosineDecayRestarts(0.1, 5, t_mul=1.0, m_mul=0.5),
    schedules.CosineDecayRestarts(0.1, 4, t_mul=1.5, m_mul=0.9, alpha=0.1),
    schedules.CosineDecayRestarts(0.1, 4, t_mul=3.0, m_mul=0.9),
]

NAMES = [f"{i}-{type(schedule).__name__}" for i, schedule in enumerate(SCHEDULES)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)


def of_keras(value: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value))


@every_schedule
def test_a_schedule_is_that_of_keras_step_by_step(schedule: Any) -> None:
    theirs = keras.optimizers.schedules.deserialize(schedules.serialize(schedule))
    steps = np.arange(60, dtype=np.int32)
    expected = [of_keras(theirs(keras.ops.convert_to_tensor(step))) for step in steps]
    actual = jax.jit(jax.vmap(schedule))(steps)
    np.testing.assert_allclose(actual, np.array(expected), rtol=3e-6, atol=2e-7)


@every_schedule
def test_the_config_of_a_schedule_is_that_of_keras(schedule: Any) -> None:
    ours = json.loads(json.dumps(schedules.serialize(schedule)))
    theirs = keras.optimizers.schedules.deserialize(ours)
    assert type(theirs).__name__ == type(schedule).__name__
    written = json.loads(json.dumps(keras.optimizers.schedules.serialize(theirs)))
    assert written == ours
    assert schedules.deserialize(written) == schedule


# Trajectories

START = {"bias": normal(0, 3), "kernel": normal(1, 4, 3), "table": normal(2, 5, 2)}
STEPS = 24


def gradients(seed: int, scale: float = 1.0, *, absent: bool = True) -> list[dict[str, Any]]:
    """Some of them without the bias's if `absent`, and of a loss scale's some not finite."""
    rng = np.random.default_rng(seed)
    steps = []
    for t in range(STEPS):
        grads: dict[str, Any] = {
            name: scale * normal(100 * seed + 10 * t + i, *p.shape)
            for i, (name, p) in enumerate(START.items())
        }
        if scale != 1.0 and rng.random() < 0.2:
            grads["kernel"][1, 1] = rng.choice([np.inf, np.nan])
        if absent and rng.random() < 0.3:
            grads["bias"] = None
        steps.append(grads)
    return steps


def variables_of(start: Mapping[str, Any]) -> dict[str, Any]:
    return {name: keras.Variable(p, name=name) for name, p in start.items()}


def apply_there(optimizer: Any, grads: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    there = [None if g is None else keras.ops.convert_to_tensor(g) for g in grads.values()]
    optimizer.apply(there, list(variables.values()))


def assert_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    for name, variable in theirs.items():
        np.testing.assert_allclose(
            ours[name], of_keras(variable), rtol=2e-5, atol=2e-5, err_msg=f"{what}: {name}"
        )


def options_at_random(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def maybe(**options: Any) -> dict[str, Any]:
        return options if rng.random() < 0.5 else {}

    rates = [0.05, schedules.ExponentialDecay(0.1, 5, 0.5), schedules.CosineDecayRestarts(0.1, 4)]
    rates += [schedules.PiecewiseConstantDecay([5, 11], [0.1, 0.03, 0.01])]
    clip = ("clipnorm", "clipvalue", "global_clipnorm")[int(rng.integers(3))]
    config = {"learning_rate": rates[int(rng.integers(len(rates)))]}
    config |= maybe(amsgrad=True) | maybe(beta_1=0.7, beta_2=0.95, epsilon=1e-3)
    config |= maybe(weight_decay=0.1) | maybe(loss_scale_factor=8.0) | maybe(**{clip: 0.4})
    config |= maybe(gradient_accumulation_steps=int(rng.integers(2, 5)))
    if rng.random() < 0.6:
        config |= {"use_ema": True, "ema_momentum": float(rng.uniform(0.5, 1.0))}
        config |= maybe(ema_overwrite_frequency=int(rng.integers(1, 5)))
    return config


def compare(ours: Any, theirs: Any, grads: list[Any], seed: int) -> None:
    """Step by step: parameters, all that the state holds, counters and rates."""
    params, state = START, ours.init(START)
    variables = variables_of(START)
    step = jax.jit(ours.apply)
    theirs.build(list(variables.values()))
    assert [v.path.partition("/")[2] for v in ours.variables(state)] == [
        v.path.partition("/")[2] for v in theirs.variables
    ]
    for t, g in enumerate(grads):
        rate = float(ours.current_learning_rate(state))
        assert rate == pytest.approx(float(of_keras(theirs.learning_rate)), rel=1e-5, abs=1e-8)
        params, state = step(g, params, state)
        apply_there(theirs, g, variables)
        assert_same(params, variables, f"configuration {seed}, step {t}")
        assert int(ours.iterations(state)) == int(of_keras(theirs.iterations))
    for weight, variable in zip(ours.get_weights(state), theirs.variables, strict=True):
        np.testing.assert_allclose(weight, of_keras(variable), rtol=2e-5, atol=2e-5)
    theirs.finalize_variable_values(list(variables.values()))
    assert_same(ours.finalize_variable_values(params, state), variables, "finalized")


@pytest.mark.parametrize("seed", range(14))
def test_options_at_random_follow_keras(seed: int) -> None:
    ours = Adam(**options_at_random(seed))
    theirs = keras.optimizers.deserialize(serialize(ours))
    if seed % 2 and ours.weight_decay is not None:
        theirs.exclude_from_weight_decay(var_names=["bias", "^ker"])
        ours = ours.exclude_from_weight_decay(var_names=["bias", "^ker"])
    absent = not (ON_JAX and ours.gradient_accumulation_steps)
    compare(ours, theirs, gradients(seed, absent=absent), seed)


@pytest.mark.skipif(ON_JAX, reason="Keras fails")
@pytest.mark.parametrize("seed", range(6))
def test_loss_scales_at_random_follow_keras(seed: int) -> None:
    inner = Adam(**options_at_random(100 + seed))
    ours = LossScaleOptimizer(inner, initial_scale=64.0, dynamic_growth_steps=3)
    theirs = keras.optimizers.deserialize(serialize(ours))
    compare(ours, theirs, gradients(seed, scale=64.0), seed)


# State and configs


MOVED = {
    "plain": lambda: Adam(0.05, amsgrad=True, weight_decay=0.01),
    "all": lambda: Adam(
        schedules.InverseTimeDecay(0.1, 5, 0.5), use_ema=True, gradient_accumulation_steps=3
    ),
    "scaled": lambda: LossScaleOptimizer(Adam(0.05, use_ema=True), 8.0, 5),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_state_moves_here_and_back_in_the_middle_of_training(name: str) -> None:
    ours = MOVED[name]()
    if ON_JAX and isinstance(ours, LossScaleOptimizer):
        pytest.skip("Keras fails")
    theirs, again = (keras.optimizers.deserialize(serialize(ours)) for _ in range(2))
    variables = variables_of(START)
    for g in gradients(7, absent=not ON_JAX):
        apply_there(theirs, g, variables)
    store: dict[str, Any] = {}
    theirs.save_own_variables(store)
    params = {k: of_keras(v) for k, v in variables.items()}
    state = ours.load_own_variables(store, params)

    back = variables_of(params)
    again.build(list(back.values()))
    again.load_own_variables(ours.save_own_variables(state))
    step = jax.jit(ours.apply)
    for t, g in enumerate(gradients(8, absent=not ON_JAX)):
        params, state = step(g, params, state)
        apply_there(theirs, g, variables)
        apply_there(again, g, back)
        assert_same(params, variables, f"step {t} here")
        assert_same(params, back, f"step {t} back there")


@pytest.mark.parametrize("seed", range(6))
def test_configs_are_read_there_and_here(seed: int) -> None:
    inner = Adam(**options_at_random(seed))
    for ours in (inner, LossScaleOptimizer(inner, 8.0, 3, name="scaled")):
        theirs = keras.optimizers.deserialize(json.loads(json.dumps(serialize(ours))))
        assert type(theirs).__name__ == type(ours).__name__
        written = json.loads(json.dumps(keras.optimizers.serialize(theirs)))
        again = deserialize(written)
        # Keras keeps a learning rate in float32.
        assert serialize(again) == written
        assert type(ours).from_config(theirs.get_config()).get_config() == written["config"]


def test_adamw_is_keras_s() -> None:
    theirs = keras.optimizers.AdamW(0.05)
    written = keras.optimizers.serialize(theirs)
    ours: Any = deserialize(written)
    assert type(ours) is AdamW and ours.weight_decay == 0.004
    assert serialize(ours) == written
    assert theirs.name.startswith(AdamW().name)
    compare(AdamW(0.05), theirs, gradients(3), 3)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "LossScaleOptimizer"])
def test_arguments_and_public_names_are_keras_s(name: str) -> None:
    ours, theirs = (getattr(module, name) for module in (compat, keras.optimizers))

    def arguments_of(kind: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(kind).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert arguments_of(ours) == arguments_of(theirs)
    public = {attribute for attribute in dir(theirs) if not attribute.startswith("_")}
    assert public - set(dir(ours)) - {"learning_rate"} <= REPLACEMENTS.keys()


@pytest.mark.parametrize(
    "identifier",
    [
        *("adam", "AdamW", "ADAM", "adam_w", "nothing", None, 3, ["adam"]),
        {"class_name": "adamw", "config": {"learning_rate": 0.5}},
        {"class_name": "nothing", "config": {}},
    ],
    ids=repr,
)
def test_get_takes_what_keras_takes(identifier: Any) -> None:
    try:
        theirs = keras.optimizers.get(copy.deepcopy(identifier))
    except ValueError:
        with pytest.raises(ValueError, match="an optimizer must be one of"):
            get(identifier)
        return
    ours: Any = get(identifier)
    assert type(ours).__name__ == type(theirs).__name__
    if theirs is not None:
        here, there = ours.get_config(), theirs.get_config()
        # Keras numbers names, and keeps a learning rate in float32.
        assert there.pop("name").startswith(here.pop("name"))
        here["learning_rate"] = float(np.float32(here["learning_rate"]))
        assert here == there


@pytest.mark.parametrize(
    "options",
    [
        *({"dynamic": True}, {"dynamic": False}, {"clipnorm": 0.5}, {"clipnorm": None}),
        *({"use_ema": False}, {"ema_momentum": 0.5}, {"learning_rate": 0.1}, {"rho": 0.1}),
    ],
    ids=repr,
)
def test_a_loss_scale_refuses_what_keras_refuses(options: dict[str, Any]) -> None:
    try:
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), **options)
    except ValueError as error:
        with pytest.raises(ValueError, match=next(iter(options))) as ours:
            LossScaleOptimizer(Adam(), **options)
        if "inner_optimizer" in str(error):
            assert "on the inner_optimizer" in str(ours.value)
    else:
        assert LossScaleOptimizer(Adam(), **options).get_config()


def test_gradients_that_are_none_are_warned_of_as_by_keras() -> None:
    ours, theirs, variables = Adam(0.1), keras.optimizers.Adam(0.1), variables_of(START)
    grads: dict[str, Any] = {"bias": None, "kernel": START["kernel"], "table": None}
    with pytest.warns(UserWarning) as there:
        apply_there(theirs, grads, variables)
    with pytest.warns(UserWarning) as here:
        ours.apply(grads, START, ours.init(START))
    assert len(there) == len(here) == 1
    words = "when minimizing the loss"
    messages = [str(caught[0].message).partition(words) for caught in (there, here)]
    assert messages[0][:2] == messages[1][:2]
    assert "'bias', 'table'" in messages[1][0]
    nothing: Any = dict.fromkeys(START)
    with pytest.raises(ValueError, match="No gradients"):
        apply_there(theirs, nothing, variables)
    with pytest.raises(ValueError, match="no variable has a gradient"):
        ours.apply(nothing, START, ours.init(START))


def test_the_variables_of_keras_are_weights_here() -> None:
    ours, theirs, variables = Adam(0.1), keras.optimizers.Adam(0.1), variables_of(START)
    apply_there(theirs, START, variables)
    state = ours.set_weights(theirs.variables, START)
    for weight, variable in zip(ours.get_weights(state), theirs.variables, strict=True):
        np.testing.assert_array_equal(weight, of_keras(variable))


@pytest.fixture
def legacy() -> Any:
    """tf_keras's legacy optimizers, the r2.0 line."""
    return pytest.importorskip("tf_keras").optimizers.legacy


def test_lr_is_tf_keras_s(legacy: Any) -> None:
    for options in ({"lr": 0.5}, {"learning_rate": 0.25, "lr": 0.5}, {"learning_rate": 0.25}):
        ours, theirs = Adam(legacy=True, **options), legacy.Adam(**options)
        assert float(theirs.lr) == float(theirs.learning_rate) == ours.lr == ours.learning_rate
    assert legacy.Adam.from_config({"lr": 0.5}).get_config() == (
        Adam.from_config({"lr": 0.5}).get_config()
    )


LEGACY = [
    {},
    {"learning_rate": 0.05, "decay": 0.1, "amsgrad": True},
    {"clipvalue": 0.5, "clipnorm": 0.6, "epsilon": 0.0},
    {"clipvalue": 0.5, "global_clipnorm": 0.6, "beta_1": 0.5},
]


@pytest.mark.parametrize("options", LEGACY, ids=range(len(LEGACY)))
def test_legacy_follows_tf_keras_and_takes_its_configs_and_weights(
    legacy: Any, options: dict[str, Any]
) -> None:
    tf = pytest.importorskip("tensorflow")
    theirs = legacy.Adam(**options)
    ours = Adam.from_config(theirs.get_config())
    assert json.dumps(ours.get_config()) == json.dumps(theirs.get_config())
    variables = {name: tf.Variable(p, name=name) for name, p in START.items()}
    params, state, step = START, ours.init(START), jax.jit(ours.apply)
    for t, g in enumerate(gradients(5)):
        if t == STEPS // 2:
            state = ours.set_weights(theirs.get_weights(), params)
        params, state = step(g, params, state)
        theirs.apply_gradients([(g[name], v) for name, v in variables.items()])
        for name, variable in variables.items():
            np.testing.assert_allclose(params[name], variable.numpy(), rtol=2e-5, atol=2e-5)
    assert [v.path for v in ours.weights(state)] == [v.name for v in theirs.weights]
    theirs.set_weights(ours.get_weights(state))
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public - set(dir(ours)) <= REPLACEMENTS.keys()
    slots = {slot: ours.get_slot(state, "table", slot) for slot in ours.get_slot_names()}
    for slot, value in slots.items():
        np.testing.assert_array_equal(theirs.get_slot(variables["table"], slot), value)


# Models on JAX

MODEL_ON_JAX = """if True:
    import jax, jax.numpy as jnp, keras, numpy as np
    import adam_transforms as at

    layers = keras.layers
    model = keras.Sequential([layers.Embedding(40, 8), layers.Dropout(0.1)])
    model.add(layers.BatchNormalization())
    model.add(layers.Dense(1))
    model.build((None,))
    ids, targets = np.array([3, 1, 3, 7]), np.ones((4, 1), np.float32)
    tx = at.lazy_adam(0.1)

    def loss_of(params, others):
        outputs, others = model.stateless_call(params, others, ids, training=True)
        return jnp.mean((outputs - targets) ** 2), others

    @jax.jit
    def step(params, others, state):
        (loss, others), grads = at.value_and_grad(loss_of, has_aux=True)(params, others)
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), others, state, loss, grads

    params, others = ([v.value for v in group] for group in
                      (model.trainable_variables, model.non_trainable_variables))
    start, state, losses = params[0], tx.init(params), []
    for _ in range(5):
        expected, _ = jax.grad(loss_of, has_aux=True)(params, others)
        params, others, state, loss, grads = step(params, others, state)
        assert isinstance(grads[0], at.SparseRows)
        for g, e in zip(at.to_dense(grads), expected, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert np.flatnonzero(np.any(params[0] != start, axis=1)).tolist() == [1, 3, 7]
    for variable, value in zip(model.trainable_variables, params, strict=True):
        variable.assign(value)
    for differentiated in (model, model.trainable_variables):
        try:
            at.grad(loss_of, has_aux=True)(differentiated, others)
        except TypeError as error:
            assert "of keras" in str(error) and "v.value" in str(error), error
        else:
            raise AssertionError(differentiated)
"""


def test_a_model_on_jax_trains_by_the_rows_that_it_reads() -> None:
    """In a process of its own, for a process has one backend."""
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    code = [sys.executable, "-c", MODEL_ON_JAX]
    run = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
