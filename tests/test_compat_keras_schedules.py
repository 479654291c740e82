"""Keras's learning rate schedules against their formulas in float64."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_transforms as at
from adam_transforms.compat.keras import Adam
from adam_transforms.compat.keras.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
    deserialize,
    serialize,
)

# The formulas, of a step that is a Python number


def piecewise(step: float, boundaries: Any, values: Any) -> float:
    return next((v for b, v in zip(boundaries, values, strict=False) if step <= b), values[-1])


def polynomial(step, initial, steps, end=0.0001, power=1.0, cycle=False):
    total = steps * max(1, math.ceil(step / steps)) if cycle else steps
    return (initial - end) * (1 - min(step, total) / total) ** power + end


def cosine(step, initial, steps, alpha=0.0, target=None, warmup=0):
    peak, warmup = (initial, 0) if target is None else (target, warmup)
    if step < warmup:
        return initial + (peak - initial) * step / warmup
    done = min(step - warmup, steps) / steps
    return peak * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * done)) + alpha)


def restarts(step, initial, first, t_mul=2.0, m_mul=1.0, alpha=0.0):
    i, start, length = 0, 0.0, float(first)
    while step >= start + length - 1e-9:
        i, start, length = i + 1, start + length, length * t_mul
    wave = m_mul**i * 0.5 * (1 + math.cos(math.pi * (step - start) / length))
    return initial * ((1 - alpha) * wave + alpha)


RULES: list[tuple[Any, Any]] = [
    (ExponentialDecay(0.1, 7, 0.5), lambda t: 0.1 * 0.5 ** (t / 7)),
    (ExponentialDecay(0.1, 7, 0.5, staircase=True), lambda t: 0.1 * 0.5 ** (t // 7)),
    (ExponentialDecay(0.1, 7, 0.0, staircase=True), lambda t: 0.1 if t < 7 else 0.0),
    (InverseTimeDecay(0.1, 4, 0.5), lambda t: 0.1 / (1 + 0.5 * t / 4)),
    (InverseTimeDecay(0.1, 4, 0.5, staircase=True), lambda t: 0.1 / (1 + 0.5 * (t // 4))),
    (
        PiecewiseConstantDecay([3, 6, 20], [1.0, 0.5, 0.1, 0.0]),
        lambda t: piecewise(t, [3, 6, 20], [1.0, 0.5, 0.1, 0.0]),
    ),
    (PiecewiseConstantDecay([2.5], [1, 0.5]), lambda t: piecewise(t, [2.5], [1, 0.5])),
    (PiecewiseConstantDecay([], [0.3]), lambda t: 0.3),
    (PolynomialDecay(0.1, 9), lambda t: polynomial(t, 0.1, 9)),
    (PolynomialDecay(0.1, 9, 0.02, power=0.5), lambda t: polynomial(t, 0.1, 9, 0.02, 0.5)),
    (PolynomialDecay(0, 9, 0.2, power=3), lambda t: polynomial(t, 0, 9, 0.2, 3)),
    (
        PolynomialDecay(0.1, 9, 0.02, power=2.0, cycle=True),
        lambda t: polynomial(t, 0.1, 9, 0.02, 2.0, True),
    ),
    (CosineDecay(0.1, 12), lambda t: cosine(t, 0.1, 12)),
    (CosineDecay(0.1, 12, 0.2, warmup_steps=5), lambda t: cosine(t, 0.1, 12, 0.2)),
    (
        CosineDecay(0, 12, alpha=0.1, warmup_target=0.3, warmup_steps=5),
        lambda t: cosine(t, 0, 12, 0.1, 0.3, 5),
    ),
    (CosineDecay(0.1, 12, warmup_target=0.3), lambda t: cosine(t, 0.1, 12, 0.0, 0.3, 0)),
    (CosineDecayRestarts(0.1, 5), lambda t: restarts(t, 0.1, 5)),
    (CosineDecayRestarts(0.1, 5, 1.0, 0.5), lambda t: restarts(t, 0.1, 5, 1.0, 0.5)),
    (CosineDecayRestarts(0.1, 4, 1.5, 0.9, 0.1), lambda t: restarts(t, 0.1, 4, 1.5, 0.9, 0.1)),
    (CosineDecayRestarts(0.1, 4, 3), lambda t: restarts(t, 0.1, 4, 3)),
    (CosineDecayRestarts(0.1, 10, 1.1), lambda t: restarts(t, 0.1, 10, 1.1)),
]
NAMES = [f"{i}-{type(schedule).__name__}" for i, (schedule, _) in enumerate(RULES)]
every_rule = pytest.mark.parametrize("schedule, rule", RULES, ids=NAMES)
every_schedule = pytest.mark.parametrize("schedule", [s for s, _ in RULES], ids=NAMES)


@every_rule
def test_follows_its_formula_at_every_step(schedule: Any, rule: Any) -> None:
    steps = np.arange(130, dtype=np.int32)
    rates = jax.jit(jax.vmap(schedule))(steps)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, [rule(int(t)) for t in steps], rtol=3e-6, atol=1e-8)


@every_schedule
def test_takes_a_step_of_any_kind_and_gives_a_float32_scalar(schedule: Any) -> None:
    for step in (7, np.int64(7), jnp.int32(7), jnp.uint32(7), 7.0, jnp.float32(7.0)):
        rate = schedule(step)
        assert (rate.shape, rate.dtype, rate.weak_type) == ((), jnp.float32, False)
        np.testing.assert_allclose(rate, jax.jit(schedule)(jnp.int32(7)), rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("length", [41, 47, 55, 83, 97, 1000, 12345])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_stair_is_where_it_should_be_whatever_its_length(length: int, compiled: bool) -> None:
    """Divided by 41 in float32 as XLA does it, step 41 is still on the stair before."""
    stairs = np.arange(1, 30)
    at_stairs = (stairs * length).astype(np.int32)
    rounds = (lambda f: jax.jit(jax.vmap(f))) if compiled else jax.vmap
    for steps, over in ((at_stairs, stairs), (at_stairs - 1, stairs - 1)):
        rates = rounds(ExponentialDecay(1.0, length, 0.5, staircase=True))(steps)
        np.testing.assert_allclose(rates, 0.5**over, rtol=1e-5)
        rates = rounds(InverseTimeDecay(1.0, length, 1.0, staircase=True))(steps)
        np.testing.assert_allclose(rates, 1 / (1 + over), rtol=1e-5)
    cycle = PolynomialDecay(1.0, length, 0.0, power=0.5, cycle=True)
    assert np.all(np.asarray(rounds(cycle)(at_stairs)) == 0)
    once = PolynomialDecay(1.0, length, 0.0, power=0.5)
    assert np.all(np.asarray(rounds(once)(at_stairs)) == 0)
    again = CosineDecayRestarts(1.0, length, t_mul=1.0)
    np.testing.assert_allclose(rounds(again)(at_stairs), 1.0)


@pytest.mark.parametrize("t_mul", [1.1, 1.25, 1.5, 2.0, 3.0])
def test_a_restart_is_where_it_should_be_whatever_its_period(t_mul: float) -> None:
    for first in (10, 20, 170, 190):
        periods = first * t_mul ** np.arange(8)
        whole = np.isclose(periods, np.round(periods), rtol=1e-12)
        starts = np.cumsum(periods)[: int(np.argmin(whole)) if not whole.all() else 8]
        starts = np.round(starts).astype(np.int32)
        assert starts.size
        rate = jax.jit(jax.vmap(CosineDecayRestarts(1.0, first, t_mul=t_mul)))
        np.testing.assert_allclose(rate(starts), 1.0)
        assert np.all(rate(starts - 1) < 0.1)


def test_boundaries_beyond_the_integers_of_float32_are_exact() -> None:
    boundary = 2**24 + 1
    rate = jax.jit(PiecewiseConstantDecay([boundary, 2.0**40], [1.0, 0.5, 0.1]))
    assert [float(rate(jnp.int32(boundary + i))) for i in (-1, 0, 1)] == [1.0, 1.0, 0.5]


def test_is_an_optax_schedule() -> None:
    params = {"w": jnp.ones(3)}
    schedule = ExponentialDecay(0.5, 2, 0.25)
    for tx in (
        at.adam(schedule, b1=0.0, b2=0.0, eps=0.0),
        optax.chain(at.scale_by_adam(0.0, 0.0, 0.0), optax.scale_by_learning_rate(schedule)),
        optax.chain(
            at.scale_by_adam(0.0, 0.0, 0.0), at.scale_by_path_learning_rate([("w", schedule)], 1.0)
        ),
    ):
        state = tx.init(params)
        for expected in (0.5, 0.25, 0.125):
            updates, state = jax.jit(tx.update)({"w": jnp.full(3, 2.0)}, state, params)
            np.testing.assert_allclose(updates["w"], -expected, rtol=1e-6)


@every_schedule
def test_a_config_comes_back_through_json(schedule: Any) -> None:
    config = json.loads(json.dumps(serialize(schedule)))
    assert config["module"] == "keras.optimizers.schedules"
    assert config["class_name"] == type(schedule).__name__
    assert config["registered_name"] is None
    assert deserialize(config) == schedule
    assert type(schedule).from_config(schedule.get_config()) == schedule
    assert hash(deserialize(config)) == hash(schedule)


def test_configs_have_keras_s_defaults() -> None:
    names = {
        ExponentialDecay(1.0, 2, 0.5): {"staircase": False, "name": "ExponentialDecay"},
        PiecewiseConstantDecay([1], [1.0, 0.5]): {"name": "PiecewiseConstant"},
        PolynomialDecay(1.0, 2): {
            "end_learning_rate": 0.0001,
            "power": 1.0,
            "cycle": False,
            "name": "PolynomialDecay",
        },
        InverseTimeDecay(1.0, 2, 0.5): {"staircase": False, "name": "InverseTimeDecay"},
        CosineDecay(1.0, 2): {
            "alpha": 0.0,
            "name": "CosineDecay",
            "warmup_target": None,
            "warmup_steps": 0,
        },
        CosineDecayRestarts(1.0, 2): {
            "t_mul": 2.0,
            "m_mul": 1.0,
            "alpha": 0.0,
            "name": "SGDRDecay",
        },
    }
    for schedule, defaults in names.items():
        assert schedule.get_config().items() >= defaults.items()


def test_numbers_of_numpy_are_taken_as_numbers() -> None:
    schedule = ExponentialDecay(np.float64(0.1), np.int64(7), np.float32(0.5))
    assert json.dumps(schedule.get_config())
    assert schedule == ExponentialDecay(0.1, 7, 0.5)
    assert schedule(7).dtype == jnp.float32


class Halving:
    """A schedule of one's own, with a config."""

    def __init__(self, start: float):
        self.start = start

    def __call__(self, step: Any) -> jax.Array:
        return self.start * 0.5 ** jnp.asarray(step).astype(jnp.float32)

    def get_config(self) -> dict[str, Any]:
        return {"start": self.start}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Halving":
        return cls(**config)


def test_a_schedule_of_one_s_own_comes_back_through_custom_objects() -> None:
    config = json.loads(json.dumps(Adam(Halving(0.5)).get_config()))
    with pytest.raises(ValueError, match="one of ExponentialDecay.*got 'Halving'"):
        Adam.from_config(config)
    again = Adam.from_config(config, custom_objects={"Halving": Halving})
    assert float(again.learning_rate(1)) == 0.25


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ExponentialDecay(0.1, 0, 0.5), ValueError, "decay_steps must be > 0, got 0"),
        (lambda: ExponentialDecay(0.1, 5, -0.5), ValueError, "decay_rate must be >= 0, got -0.5"),
        (lambda: ExponentialDecay("0.1", 5, 0.5), TypeError, "initial_learning_rate must be"),
        (lambda: ExponentialDecay(0.1, 5, 0.5, 1), TypeError, "staircase must be True or False"),
        (lambda: ExponentialDecay(jnp.ones(()), 5, 0.5), TypeError, "must be a Python number"),
        (lambda: InverseTimeDecay(0.1, -3, 0.5), ValueError, "decay_steps must be > 0"),
        (lambda: PolynomialDecay(0.1, 0), ValueError, "decay_steps must be > 0"),
        (lambda: PolynomialDecay(0.1, 3, cycle=None), TypeError, "cycle must be True or False"),
        (lambda: CosineDecay(0.1, 0), ValueError, "decay_steps must be > 0"),
        (lambda: CosineDecay(0.1, 3, warmup_steps=-1), ValueError, "warmup_steps must be >= 0"),
        (lambda: CosineDecay(0.1, 3, warmup_target="a"), TypeError, "warmup_target must be a num"),
        (lambda: CosineDecayRestarts(0.1, 0), ValueError, "first_decay_steps must be > 0"),
        (lambda: CosineDecayRestarts(0.1, 3, t_mul=0.5), ValueError, "t_mul must be >= 1, got 0.5"),
        (lambda: PiecewiseConstantDecay([1], [1.0]), ValueError, "one more than boundaries"),
        (lambda: PiecewiseConstantDecay([2, 1], [1, 2, 3]), ValueError, "strictly increasing"),
        (lambda: PiecewiseConstantDecay(3, [1.0]), TypeError, "boundaries must be a list"),
        (lambda: PiecewiseConstantDecay([1], [1.0, "b"]), TypeError, r"values\[1\] must be"),
        (lambda: ExponentialDecay.from_config({"decay_steps": 1}), ValueError, "lacks initial"),
        (lambda: CosineDecay.from_config({"rate": 1}), ValueError, "CosineDecay has no rate"),
        (lambda: CosineDecay.from_config(None), TypeError, "must be a dictionary"),
        (lambda: deserialize({"class_name": "Warmup", "config": {}}), ValueError, "got 'Warmup'"),
        (lambda: deserialize({"config": {}}), ValueError, "class_name and a config"),
        (lambda: deserialize("ExponentialDecay"), ValueError, "class_name and a config"),
        (lambda: serialize(lambda step: 0.1), TypeError, "has a get_config"),
    ],
)
def test_nonsense_is_refused_by_name(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
