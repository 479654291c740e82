"""TensorFlow 1's checkpoints in and out, and the steps told from the powers of the betas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, normal, types
from recordings import Recording, differences
from test_parity import BUILDERS, flat, nested, variable

import adam_transforms as at
from adam_transforms.compat import tf1 as compat
from adam_transforms.interop import tf1

PARAMS = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}


def power(b: float, steps: int) -> np.ndarray:
    """As TensorFlow keeps it: b, multiplied by b with every step, flushed to zero."""
    factor = np.float32(b)
    p = factor
    for _ in range(steps):
        p = p * factor
        if p < np.finfo(np.float32).tiny:
            p = np.float32(0)
            break
    return np.array(p)


def checkpoint(steps: int = 12, b1: float = 0.9, b2: float = 0.999) -> dict[str, np.ndarray]:
    arrays = {"beta1_power": power(b1, steps), "beta2_power": power(b2, steps)}
    for i, (name, shape) in enumerate((("dense/kernel", (3, 2)), ("dense/bias", (2,)))):
        arrays |= {f"{name}/Adam": normal(i, *shape), f"{name}/Adam_1": normal(i + 2, *shape) ** 2}
    return arrays


def variables() -> dict[str, np.ndarray]:
    """What else a checkpoint holds."""
    return {
        "dense/kernel": np.ones((3, 2), np.float32),
        "dense/bias": np.ones(2, np.float32),
        "global_step": np.array(12, np.int64),
    }


@pytest.mark.parametrize("case", ["tf1_dense_default", "tf1_dense_custom"])
def test_a_recorded_run_goes_on_from_its_state(case):
    recording = Recording(case)
    tx, training = BUILDERS[recording.entry["class"]](recording)
    names = list(recording.start)
    for t in range(recording.steps):
        training.step(recording.gradients(t))
    b1, b2 = recording.config.get("beta1", 0.9), recording.config.get("beta2", 0.999)
    arrays = {
        "beta1_power": recording.arrays["beta1_power"][-1],
        "beta2_power": power(b2, recording.steps),
    }
    for name in names:
        arrays[f"{variable(name)}/Adam"] = recording.group("m")[name]
        arrays[f"{variable(name)}/Adam_1"] = recording.group("v")[name]
    params = jax.tree.map(jnp.asarray, nested(recording.params(-1)))
    state = tf1.state_from(arrays, params, tx, b1=b1, b2=b2)
    assert types(state) == types(tx.init(params))
    assert optax.tree.get(state, "count") == recording.steps

    step = jax.jit(tx.update)
    for t in reversed(range(recording.steps)):
        expected = training.step(recording.gradients(t))
        updates, state = step(nested(recording.gradients(t)), state, params)
        params = at.apply_updates(params, updates)
    errors = differences(flat(params, names), expected)
    assert max(errors.values()) <= 2 * recording.tolerance


def test_a_round_trip_changes_no_bit():
    arrays = checkpoint()
    tx = at.adam(eps_hat=True)
    state = tf1.state_from(arrays | variables(), PARAMS, tx)
    back = tf1.state_to(state, PARAMS)
    assert_bits_equal(back, arrays)
    assert_bits_equal(tf1.state_from(back, PARAMS, tx), state)


@pytest.mark.parametrize("steps", [0, 1, 2, 100, 825, 5000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99), (0.0, 0.9999), (0.999, 0.9)])
def test_the_powers_tell_the_steps(steps, betas):
    b1, b2 = betas
    arrays = checkpoint(steps, b1, b2)
    state = tf1.state_from(arrays, PARAMS, at.adam(), b1=b1, b2=b2)
    assert int(state[0].count) == steps
    assert_bits_equal(tf1.state_to(state, PARAMS, b1=b1, b2=b2), arrays)


def test_powers_multiplied_in_another_order_tell_the_steps_too():
    arrays = checkpoint() | {
        "beta1_power": np.float32(0.9**13),
        "beta2_power": np.float32(0.999**13),
    }
    state = tf1.state_from(arrays, PARAMS, at.adam())
    assert int(state[0].count) == 12


def test_of_powers_that_are_zero_any_count_does_without_a_schedule():
    arrays = checkpoint(1200, 0.9, 0.9)
    assert float(arrays["beta2_power"]) == 0.0
    state = tf1.state_from(arrays, PARAMS, at.adam(), b1=0.9, b2=0.9)
    assert 0.9 ** int(state[0].count) < 2**-60
    back = tf1.state_to(state, PARAMS, b1=0.9, b2=0.9)
    assert_bits_equal(back, arrays)


def test_of_powers_that_are_zero_a_schedule_needs_the_count():
    arrays = checkpoint(1200, 0.9, 0.9)
    tx = at.adam(optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="pass count"):
        tf1.state_from(arrays, PARAMS, tx, b1=0.9, b2=0.9)
    state = tf1.state_from(arrays, PARAMS, tx, b1=0.9, b2=0.9, count=1200)
    assert [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32] == [1200, 1200]


def test_powers_of_other_betas_are_refused():
    with pytest.raises(ValueError, match="no number of steps at betas"):
        tf1.state_from(checkpoint(b1=0.8), PARAMS, at.adam())
    with pytest.raises(ValueError, match="no number of steps at betas"):
        tf1.state_from(checkpoint(b2=0.99), PARAMS, at.adam())


def test_betas_are_those_of_the_optimizer_if_it_has_them():
    class Optimizer:
        beta1 = 0.7
        beta2 = staticmethod(lambda: 0.99)
        init = staticmethod(at.adam().init)

    arrays = checkpoint(b1=0.7, b2=0.99)
    assert int(tf1.state_from(arrays, PARAMS, Optimizer())[0].count) == 12
    with pytest.raises(ValueError, match="no number of steps"):
        tf1.state_from(arrays, PARAMS, Optimizer(), b1=0.8)


@pytest.mark.parametrize("kind", [compat.AdamOptimizer, compat.LazyAdamOptimizer])
def test_an_optimizer_of_compat_goes_on_with_its_own_betas(kind):
    optimizer = kind(0.1, beta1=0.7, beta2=0.99)
    arrays = checkpoint(b1=0.7, b2=0.99)
    state = tf1.state_from(arrays, PARAMS, optimizer)
    assert types(state) == types(optimizer.init(PARAMS))
    assert optax.tree.get(state, "count") == 12
    assert_bits_equal(tf1.state_to(state, PARAMS, b1=0.7, b2=0.99), arrays)


def test_scopes_are_a_matter_of_renaming():
    arrays = {f"train/{name}": array for name, array in checkpoint().items()}
    state = tf1.state_from(arrays, PARAMS, at.adam(), rename=lambda path: f"train/{path}")
    np.testing.assert_array_equal(state[0].mu["dense"]["bias"], arrays["train/dense/bias/Adam"])


def test_slots_go_by_the_optimizers_name():
    arrays = {name.replace("/Adam", "/Mine"): array for name, array in checkpoint().items()}
    state = tf1.state_from(arrays, PARAMS, at.adam(), name="Mine")
    assert_bits_equal(tf1.state_to(state, PARAMS, name="Mine"), arrays)
    with pytest.raises(ValueError, match="no slots .../Adam"):
        tf1.state_from(arrays, PARAMS, at.adam())


def test_powers_of_several_optimizers_are_refused():
    arrays = checkpoint()
    arrays |= {"a/beta1_power": arrays["beta1_power"], "b/beta1_power": arrays["beta1_power"]}
    assert int(tf1.state_from(arrays, PARAMS, at.adam())[0].count) == 12  # one is plainly named
    del arrays["beta1_power"]
    with pytest.raises(ValueError, match="several beta1_power"):
        tf1.state_from(arrays, PARAMS, at.adam())
    del arrays["a/beta1_power"], arrays["b/beta1_power"]
    with pytest.raises(ValueError, match="beta1_power is missing"):
        tf1.state_from(arrays, PARAMS, at.adam())


def test_what_is_missing_or_left_over_is_listed():
    arrays = checkpoint()
    del arrays["dense/bias/Adam_1"]
    arrays["other/Adam"] = np.ones(2)
    with pytest.raises(ValueError) as error:
        tf1.state_from(arrays, PARAMS, at.adam())
    assert "'dense/bias' needs 'dense/bias/Adam_1', which is missing" in str(error.value)
    assert "'other' is left over" in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        (3, TypeError, "arrays must map names"),
        ({1: 2}, TypeError, "arrays must map names"),
        ({}, ValueError, "no slots"),
    ],
)
def test_what_is_no_checkpoint_is_refused(arrays, error, message):
    with pytest.raises(error, match=message):
        tf1.state_from(arrays, PARAMS, at.adam())


def test_a_power_of_another_type_is_refused():
    arrays = checkpoint() | {"beta1_power": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="beta1_power must be a floating scalar"):
        tf1.state_from(arrays, PARAMS, at.adam())
    arrays = checkpoint() | {"beta1_power": "high"}
    with pytest.raises(TypeError, match="must be an array of numbers"):
        tf1.state_from(arrays, PARAMS, at.adam())


def test_amsgrad_does_not_go_there():
    with pytest.raises(ValueError, match="TensorFlow 1 has no AMSGrad"):
        tf1.state_to(at.adam(amsgrad=True).init(PARAMS), PARAMS)
