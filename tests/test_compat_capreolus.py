"""`compat.capreolus`: AdamMultilr's groups, beside what legacy Keras did with one Adam a group."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
from helpers import assert_bits_equal, normal
from recordings import Recording, differences

import adam_transforms as at
from adam_transforms.compat import capreolus, keras


def params() -> Any:
    return {
        "bert": {"kernel": jnp.asarray(normal(0, 3, 2)), "bias": jnp.asarray(normal(1, 2))},
        "head": {"kernel": jnp.asarray(normal(2, 2, 1))},
        "table": jnp.asarray(normal(3, 6, 2)),
    }


def step_sizes(opt: Any, start: Any = None) -> dict[str, float]:
    """How far the first step, which has the gradient's sign, takes each parameter."""
    start = params() if start is None else start
    after, _ = opt.apply(jax.tree.map(jnp.ones_like, start), start, opt.init(start))
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), after, start)
    leaves, _ = jax.tree_util.tree_flatten_with_path(moved)
    return {at.path_str(path): round(float(x), 4) for path, x in leaves}


@pytest.mark.parametrize("case", recordings.of_class("AdamMultilr"))
def test_follows_the_recorded_run(case: str) -> None:
    recording = Recording(case)
    opt = capreolus.AdamMultilr(**recording.config)
    now = jax.tree.map(jnp.asarray, recording.start)
    state = opt.init(now)
    apply = jax.jit(opt.apply)
    for t in range(recording.steps):
        now, state = apply(recording.gradients(t), now, state)
        errors = differences(now, recording.params(t))
        assert max(errors.values()) <= recording.tolerance, f"after step {t}: {errors}"
    assert apply._cache_size() == 1
    slots = {"m": opt.beta_1, "v": opt.beta_2, "vhat": opt.beta_2}
    for name in opt.get_slot_names():
        for path, slot in recording.group(name).items():
            limit = recordings.slot_tolerance(slots[name]) * np.abs(slot).max()
            ours = opt.get_slot(state, path, name)
            np.testing.assert_allclose(ours, slot, rtol=0, atol=limit)


def test_the_first_group_that_matches_gives_the_rate() -> None:
    groups = [
        {"patterns": ["nothing", "^bert/b"], "lr": 0.02},
        {"patterns": ["unknown"], "lr": 7.0},  # no variable falls into it, and none has to
        {"patterns": ["kernel:0$"], "lr": 0.03},
        {"patterns": ["bert"], "lr": 7.0},
        {"patterns": ["table$"], "lr": 7.0},  # its name ends in ":0"
    ]
    assert step_sizes(capreolus.AdamMultilr(0.1, pattern_lrs=groups)) == {
        "bert/bias": 0.02,
        "bert/kernel": 0.03,
        "head/kernel": 0.03,
        "table": 0.1,
    }


def test_metrics_tell_the_rate_of_each_group() -> None:
    schedule = keras.schedules.ExponentialDecay(0.5, 1, 0.5)
    opt = capreolus.AdamMultilr(0.125, pattern_lrs=[{"patterns": ["bert"], "lr": schedule}])
    state = opt.init(params())
    for last in (0.5, 0.25):
        _, state = opt.apply(params(), params(), state)
        found = at.metrics({}, state)
        assert (found["learning_rate/0"], found["learning_rate/1"]) == (last, 0.125)


@pytest.mark.parametrize("pattern_lrs", [None, []])
def test_without_groups_it_is_legacy_keras(pattern_lrs: Any) -> None:
    options: Any = {"beta_1": 0.8, "epsilon": 0.0, "amsgrad": True, "clipnorm": 0.5}
    ours = capreolus.AdamMultilr(0.1, **options, pattern_lrs=pattern_lrs)
    theirs = keras.Adam(0.1, **options, legacy=True)
    start = params()
    states = [opt.init(start) for opt in (ours, theirs)]
    results = [start, start]
    for seed in range(3):
        grads = jax.tree.map(lambda p, seed=seed: jnp.asarray(normal(seed, *p.shape)), start)
        for i, opt in enumerate((ours, theirs)):
            results[i], states[i] = opt.apply(grads, results[i], states[i])
    assert_bits_equal(*results)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
def test_a_row_gradient_is_corrected_and_moves_all_rows() -> None:
    """The original's sparse path forgets the bias correction."""
    start = {"table": jnp.zeros((4, 2)), "w": jnp.zeros(2)}
    opt = capreolus.AdamMultilr(pattern_lrs=[{"patterns": ["table"], "lr": 0.1}])
    rows = at.SparseRows(jnp.array([1, 1]), jnp.ones((2, 2)), 4)
    still = at.SparseRows(jnp.array([0]), jnp.zeros((1, 2)), 4)
    now, state = opt.apply({"table": rows, "w": None}, start, opt.init(start))
    np.testing.assert_allclose(now["table"][1], [-0.1, -0.1], rtol=1e-5)
    after, _ = opt.apply({"table": still, "w": None}, now, state)
    assert np.all(after["table"][1] < now["table"][1])
    assert_bits_equal(after["w"], start["w"])


def test_rates_may_be_schedules_and_functions() -> None:
    start = {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}
    groups = [
        {"patterns": ["a"], "lr": keras.schedules.PiecewiseConstantDecay([0], [0.5, 0.25])},
        {"patterns": ["b"], "lr": lambda: 0.125},
    ]
    opt = capreolus.AdamMultilr(lambda: 1.0, beta_1=0.0, pattern_lrs=groups)
    ones = jax.tree.map(jnp.ones_like, start)
    now, state = opt.apply(ones, start, opt.init(start))
    after, _ = opt.apply(ones, now, state)
    for name, first, second in (("a", 0.5, 0.25), ("b", 0.125, 0.125), ("c", 1.0, 1.0)):
        np.testing.assert_allclose(-now[name], [first], rtol=1e-5)
        np.testing.assert_allclose(now[name] - after[name], [second], rtol=1e-5)


def test_the_methods_of_keras_are_there() -> None:
    opt, start = capreolus.AdamMultilr(0.1), params()

    def loss(p: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    stepped = opt.minimize(loss, start, opt.init(start))
    grads = jax.grad(loss)(start)
    assert_bits_equal(stepped[0], opt.apply(grads, start, opt.init(start))[0])
    assert int(opt.iterations(stepped[1])) == 1
    weights = opt.get_weights(stepped[1])
    assert_bits_equal(opt.set_weights(weights, stepped[0]), stepped[1])
    with pytest.raises(AttributeError, match="'AdamMultilr' has no 'assign': nothing is mutated"):
        opt.assign  # noqa: B018


def test_lr_and_decay_are_those_of_the_original() -> None:
    start = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    groups = [{"patterns": ["a"], "lr": 0.5}]
    opt = capreolus.AdamMultilr(9.0, beta_1=0.0, pattern_lrs=groups, lr=0.25, decay=1.0)
    assert (opt.lr, opt.learning_rate) == (0.25, 0.25)
    now, state = start, opt.init(start)
    for divisor in (1, 2, 3):
        assert float(opt.current_learning_rate(state)) == pytest.approx(0.25 / divisor)
        after, state = opt.apply(jax.tree.map(jnp.ones_like, start), now, state)
        for name, rate in (("a", 0.5), ("b", 0.25)):
            np.testing.assert_allclose(now[name] - after[name], [rate / divisor], rtol=1e-5)
        now = after


def test_a_config_of_the_original_is_read_and_written_the_same() -> None:
    config = {"name": "AdamMultilr", "clipnorm": 1.0, "learning_rate": 0.5, "decay": 0.25}
    config |= {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "amsgrad": False}
    config |= {"pattern_lrs": [{"patterns": ["bert"], "lr": 0.01}]}
    opt = capreolus.AdamMultilr.from_config(config)
    assert list(opt.get_config().items()) == list(config.items())
    assert capreolus.AdamMultilr.from_config({"lr": 0.5}).learning_rate == 0.5


def test_a_gradient_that_is_none_is_named() -> None:
    start = params()
    opt = capreolus.AdamMultilr(0.1)
    with pytest.warns(UserWarning, match=r"variables \['bert/bias', 'head/kernel'\] when"):
        opt.apply_gradients(
            [(None, "bert/bias"), (start["table"], "table"), (None, "head/kernel")],
            start,
            opt.init(start),
        )


def test_a_config_goes_through_json() -> None:
    schedule = keras.schedules.ExponentialDecay(0.1, 10, 0.5)
    groups = [{"patterns": ["a", "b$"], "lr": schedule}, {"patterns": "c", "lr": 0.01}]
    opt = capreolus.AdamMultilr(0.2, epsilon=1e-3, amsgrad=True, pattern_lrs=groups, clipvalue=0.5)
    config = json.loads(json.dumps(opt.get_config()))
    again = capreolus.AdamMultilr.from_config(config)
    assert again.get_config() == opt.get_config()
    assert config["name"] == "AdamMultilr"
    start = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "d": jnp.ones(2)}
    assert step_sizes(again, start) == step_sizes(opt, start)
    plain = capreolus.AdamMultilr()
    assert capreolus.AdamMultilr.from_config(plain.get_config()).get_config() == plain.get_config()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern_lrs": "bert"}, TypeError, "pattern_lrs must be a list of groups"),
        ({"pattern_lrs": [("bert", 0.1)]}, TypeError, r"pattern_lrs\[0\] must be a dictionary"),
        ({"pattern_lrs": [{"patterns": ["a"]}]}, TypeError, r"pattern_lrs\[0\] must be"),
        ({"pattern_lrs": [{"patterns": [], "lr": 1}]}, ValueError, "at least one pattern"),
        ({"pattern_lrs": [{"patterns": ["("], "lr": 1}]}, ValueError, "no regular expression"),
        ({"pattern_lrs": [{"patterns": "a", "lr": "x"}]}, TypeError, r"\['lr'\] must be a number"),
        ({"beta_1": 1.0}, ValueError, "beta_1"),
        ({"clipnorm": -1.0}, ValueError, "clipnorm"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        capreolus.AdamMultilr(**arguments)
