# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import assert_bits_equal, assert_close, normal, run_updates, types

import adam_transforms as at

PARAMS = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(2, np.float32)}
GRADIENTS = [{"w": normal(t, 4, 3), "b": normal(100 + t, 2)} for t in range(12)]


def run(tx, gradients, params=PARAMS, state=None):
    return run_updates(tx, gradients, params, state)


def assert_zero(updates):
    assert all(not np.any(np.asarray(u)) for u in jax.tree.leaves(updates))


def with_nan(gradients):
    return {**gradients, "w": np.where(np.eye(4, 3) > 0, np.float32(np.nan), gradients["w"])}


def identity(**options):
    """Hands out what has been accumulated."""
    return at.accumulate(optax.identity(), **options)


# The rule


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_inner_runs_once_a_cycle_on_the_mean_or_sum(every, average):
    tx = at.accumulate(at.scale_by_adam(eps=0.1), every, average=average)
    updates, state = run(tx, GRADIENTS)
    accumulation = reference.Accumulation(every, average=average)
    adam = reference.Adam(eps=0.1)
    for u, g in zip(updates, GRADIENTS, strict=True):
        total = accumulation.add(g)
        if total is None:
            assert_zero(u)
        else:
            assert_close(u, adam.direction(total))
    assert int(state.inner_state.count) == adam.count == 12 // every
    assert int(state.mini_step) == 0
    assert_close(state.inner_state.nu, adam.nu)


def test_a_held_step_changes_no_bit_of_the_inner_state():
    odd = np.array([0x7FC00ABC, 0x80000000], np.uint32).view(np.float32)  # NaN with payload, -0
    tx = at.accumulate(at.scale_by_adam(), every=4)
    _, state = run(tx, GRADIENTS[:4])
    mu = {**state.inner_state.mu, "b": jnp.asarray(odd)}
    state = state._replace(inner_state=state.inner_state._replace(mu=mu))
    for held in range(1, 4):
        updates, after = run(tx, GRADIENTS[:held], state=state)
        assert_zero(updates)
        assert int(after.mini_step) == held
        assert_bits_equal(after.inner_state, state.inner_state)


def test_every_cycle_starts_from_nothing():
    updates, _ = run(identity(every=2, average=False), GRADIENTS[:6])
    for t in (1, 3, 5):
        assert_close(updates[t], jax.tree.map(np.add, GRADIENTS[t - 1], GRADIENTS[t]))


def test_a_cycle_of_one_is_the_inner_itself():
    ours, state = run(at.accumulate(at.scale_by_adam(), every=1), GRADIENTS)
    plain, plain_state = run(at.scale_by_adam(), GRADIENTS)
    assert_close(ours, plain)
    assert_close(state.inner_state, plain_state)


def test_accumulation_nests():
    nested = at.accumulate(at.accumulate(at.scale_by_adam(), every=2), every=3)
    updates, state = run(nested, GRADIENTS)
    flat, flat_state = run(at.accumulate(at.scale_by_adam(), every=6), GRADIENTS)
    assert_close(updates, flat)
    assert_close(state.inner_state.inner_state, flat_state.inner_state)


def test_schedules_inside_advance_once_a_cycle():
    inner = at.scale_by_path_learning_rate([], lambda count: 1.0 + count.astype(jnp.float32))
    updates, _ = run(at.accumulate(inner, every=2), [jnp.ones(1)] * 6, jnp.ones(1))
    assert [float(u[0]) for u in updates] == [0.0, -1.0, 0.0, -2.0, 0.0, -3.0]


def test_extra_arguments_of_the_emitting_step_reach_the_inner():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda u, state, params=None, *, factor: (jax.tree.map(lambda g: g * factor, u), state),
    )
    tx = at.accumulate(inner, every=2)
    state = tx.init(jnp.ones(1))
    _, state = tx.update(jnp.ones(1), state, factor=jnp.array(jnp.nan))
    updates, _ = tx.update(jnp.ones(1), state, factor=jnp.array(5.0))
    assert updates.tolist() == [5.0]


def test_the_inner_gets_the_parameters_of_the_emitting_step():
    tx = at.accumulate(optax.add_decayed_weights(0.5), every=2)
    params = jnp.array([2.0])
    _, state = tx.update(jnp.zeros(1), tx.init(params), params)
    updates, _ = tx.update(jnp.zeros(1), state, jnp.array([8.0]))
    assert updates.tolist() == [4.0]


def test_an_inner_with_a_random_key_draws_once_a_cycle(relaxed_promotion):
    tx = at.accumulate(optax.add_noise(1.0, 0.5, jax.random.key(0)), every=2)
    updates, _ = run(tx, [jnp.zeros(3)] * 4, jnp.zeros(3))
    assert_zero((updates[0], updates[2]))
    assert np.all(updates[1] != 0)
    assert np.all(updates[1] != updates[3])


def test_many_cycles_run_under_a_scan():
    steps, every = 300, 5
    gradients = {"w": normal(0, steps, 3), "b": normal(1, steps)}
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    tx = at.accumulate(at.scale_by_adam(), every)

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(params), gradients)
    adam, accumulation = reference.Adam(), reference.Accumulation(every)
    for t in range(steps):
        total = accumulation.add({k: g[t] for k, g in gradients.items()})
        u = jax.tree.map(lambda x, t=t: x[t], updates)
        if total is None:
            assert_zero(u)
        else:
            assert_close(u, adam.direction(total), rtol=2e-5, atol=2e-6)
    assert int(state.inner_state.count) == steps // every


# What is not finite


def test_a_nan_ends_with_its_cycle_when_the_inner_skips_it():
    tx = at.accumulate(at.skip_nonfinite(at.scale_by_adam()), every=2)
    with_bad_cycle = [*GRADIENTS[:2], with_nan(GRADIENTS[2]), *GRADIENTS[3:6]]
    updates, state = run(tx, with_bad_cycle)
    expected, expected_state = run(tx, [*GRADIENTS[:2], *GRADIENTS[4:6]])
    assert_zero(updates[2:4])
    assert_bits_equal(updates[5], expected[3])
    assert_bits_equal(state.inner_state.inner_state, expected_state.inner_state.inner_state)
    assert (int(state.inner_state.skipped), int(expected_state.inner_state.skipped)) == (1, 0)


def test_a_loss_scale_outside_drops_a_bad_gradient_and_keeps_the_cycle():
    tx = at.dynamic_loss_scale(at.accumulate(at.scale_by_adam(), every=2), initial_scale=4.0)

    def scaled(gradients, scale):
        return jax.tree.map(lambda g: g * np.float32(scale), gradients)

    bad = with_nan(GRADIENTS[1])
    updates, state = run(tx, [scaled(GRADIENTS[0], 4), bad, scaled(GRADIENTS[1], 2)])
    # Powers of two change no rounding.
    plain, plain_state = run(at.accumulate(at.scale_by_adam(), every=2), GRADIENTS[:2])
    assert_zero(updates[:2])
    assert_bits_equal(updates[2], plain[1])
    assert_bits_equal(state.inner_state.inner_state, plain_state.inner_state)
    assert (float(state.scale), int(state.skipped)) == (2.0, 1)


def test_a_nan_in_a_held_step_does_not_reach_the_update():
    updates, state = run(identity(every=2), [with_nan(GRADIENTS[0])])
    assert_zero(updates)
    assert np.isnan(state.acc["w"]).sum() == 3


# None, shapes, dtypes


def test_none_gradients_stay_none_and_their_slots_as_they_are():
    tx = at.accumulate(at.scale_by_adam(), every=2)
    _, before = run(tx, GRADIENTS[:2])
    updates, after = run(tx, [{"w": g["w"], "b": None} for g in GRADIENTS[2:4]], state=before)
    assert all(u["b"] is None for u in updates)
    assert_bits_equal(after.inner_state.mu["b"], before.inner_state.mu["b"])
    assert np.all(after.inner_state.mu["w"] != before.inner_state.mu["w"])


def test_a_none_gradient_adds_nothing_to_the_sum():
    g = [jnp.array([float(2**t)]) for t in range(6)]
    tx = identity(every=3, average=False)
    state = tx.init(g[0])
    given = []
    # Two cycles: the second starts with a None, which must not keep the first one's sum.
    for x in (g[0], None, g[2], None, g[4], g[5]):
        u, state = tx.update(x, state)
        given.append(None if u is None else float(u[0]))
    assert given == [0.0, None, 5.0, None, 0.0, 48.0]


def test_a_leaf_whose_last_gradient_is_none_is_skipped():
    tx = identity(every=2, average=False)
    state = tx.init(jnp.ones(1))
    given = []
    for x in (jnp.array([1.0]), None, jnp.array([4.0]), jnp.array([8.0])):
        u, state = tx.update(x, state)
        given.append(None if u is None else float(u[0]))
    assert given == [0.0, None, 0.0, 12.0]


def test_like_says_what_is_kept():
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((4, 3)), "b": None})
    tx = identity(every=2, like=shapes)
    state = tx.init(PARAMS)
    assert types(state.acc) == types({"w": jnp.zeros((4, 3)), "b": None})
    updates, after = run(tx, [{**g, "b": None} for g in GRADIENTS[:2]], state=state)
    assert updates[1]["b"] is None
    assert_close(updates[1]["w"], (GRADIENTS[0]["w"] + GRADIENTS[1]["w"]) / 2)
    assert types(after) == types(state)


def test_a_gradient_that_like_left_out_is_refused_by_path():
    tx = identity(every=2, like={"w": PARAMS["w"], "b": None})
    with pytest.raises(ValueError, match="'b'"):
        tx.update(GRADIENTS[0], tx.init(PARAMS))


def test_low_precision_gradients_are_accumulated_in_float32():
    gradients = [jnp.array([x], jnp.bfloat16) for x in (256.0, 1.0, 1.0, 1.0)]
    params = jnp.zeros(1, jnp.bfloat16)
    tx = identity(every=4, average=False)
    assert tx.init(params).acc.dtype == jnp.float32
    updates, state = run(tx, gradients, params)
    assert updates[3].dtype == jnp.bfloat16
    assert updates[3].tolist() == [260.0]  # 259, rounded once; 256 if each sum were rounded
    assert state.acc.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_accumulator_dtype_is_what_the_sum_is_kept_in(dtype):
    tx = identity(every=2, average=False, accumulator_dtype=dtype)
    state = tx.init(PARAMS)
    assert all(x.dtype == dtype for x in state.acc.values())
    updates, after = run(tx, [{"w": np.ones((4, 3), "f"), "b": np.full(2, 2.0, "f")}] * 2)
    assert types(after) == types(state)
    assert updates[1]["b"].dtype == jnp.float32
    assert updates[1]["b"].tolist() == [4.0, 4.0]


def test_complex_gradients_are_accumulated():
    gradients = [{"z": normal(t, 3, dtype=np.complex64)} for t in range(4)]
    updates, _ = run(identity(every=2), gradients, {"z": np.zeros(3, np.complex64)})
    assert_close(updates[3], {"z": (gradients[2]["z"] + gradients[3]["z"]) / 2})


def test_an_empty_tree_and_empty_leaves_are_no_error():
    for params in ({}, {"a": jnp.zeros((0, 3))}):
        updates, state = run(at.accumulate(at.scale_by_adam(), 2), [params] * 2, params)
        assert_bits_equal(updates[1], params)
        assert int(state.inner_state.count) == 1


# In place


@pytest.mark.parametrize(
    ("wrap", "temporaries"),
    [
        (lambda tx: at.accumulate(tx, 4), 0),
        # The gradient itself, and in jax 0.7.2 what carries it.
        (at.skip_nonfinite, 2),
        (lambda tx: at.dynamic_loss_scale(at.accumulate(tx, 4)), 2),
    ],
    ids=["accumulate", "skip_nonfinite", "dynamic_loss_scale"],
)
def test_a_donated_step_copies_no_array(wrap, temporaries):
    tx = wrap(optax.chain(at.scale_by_adam(), optax.scale(-0.1)))

    def step(carry, target):
        params, state = carry
        updates, state = tx.update(params - target, state, params)
        return at.apply_updates(params, updates), state

    params = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    carry = (params, jax.eval_shape(tx.init, params))
    compiled = jax.jit(step, donate_argnums=0).lower(carry, params).compile()
    assert re.findall(r"f32\[256,512\]\S* copy\(", compiled.as_text()) == []
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < (temporaries + 0.1) * 4 * 256 * 512


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(inner=None), TypeError, "inner must be an optax.GradientTransformation"),
        (dict(inner=optax.adam), TypeError, "inner must be .*; call the factory first"),
        (dict(every=0), ValueError, "every must be at least 1, got 0"),
        (dict(every=2.0), TypeError, "every must be an integer, got 2.0"),
        (dict(every=True), TypeError, "every must be an integer, got True"),
        (dict(average=1), TypeError, "average must be True or False, got 1"),
        (dict(accumulator_dtype="int8"), TypeError, "accumulator_dtype must be a floating"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.accumulate(**{"inner": optax.identity(), "every": 2, **options})


def test_gradients_that_differ_from_the_accumulator_are_refused_by_path():
    tx = identity(every=2)
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"'b' has shape \[3\] in the updates, but \[2\] in the acc"
    ):
        tx.update({**GRADIENTS[0], "b": np.ones(3, np.float32)}, state)
    with pytest.raises(ValueError, match="'b' is only in the accumulator"):
        tx.update({"w": GRADIENTS[0]["w"]}, state)
    with pytest.raises(TypeError, match="update of 'b' must be a floating"):
        tx.update({**GRADIENTS[0], "b": np.ones(2, np.int32)}, state)
    with pytest.raises(TypeError, match="'b'.*float32 .*complex"):
        tx.update({**GRADIENTS[0], "b": np.ones(2, np.complex64)}, state)


def test_a_cycle_saved_under_a_larger_every_comes_to_its_end() -> None:
    params = jnp.zeros(2)
    _, state = run_updates(at.accumulate(optax.scale(-1.0), 3), [jnp.ones(2)] * 2, params)
    tx = at.accumulate(optax.scale(-1.0), 2)
    updates, state = run_updates(tx, [jnp.ones(2)] * 3, params, state)
    assert [bool(jnp.any(u)) for u in updates] == [True, False, True]
    assert int(state.mini_step) == 0
