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


# Weights, and steps on demand


def weighted_mean(cycle, average):
    """Of [(weight, gradients), ...] in float64; what has weight zero is left out."""
    counted = [(w, g) for w, g in cycle if w]
    weight = sum(w for w, _ in counted) if average else 1.0
    return {
        name: sum(w * g[name].astype(np.float64) for w, g in counted) / weight for name in PARAMS
    }


@pytest.mark.parametrize("average", [True, False])
def test_weighted_cycles_of_any_length_follow_the_formula(average):
    tx = at.accumulate(at.scale_by_adam(eps=0.1), 4, average=average, weighted=True)
    step = jax.jit(tx.update)
    adam, cycle, state = reference.Adam(eps=0.1), [], tx.init(PARAMS)
    weights = [3, 1, 2, 7, 5, 0, 0.5, 4, 0, 0, 1, 0]
    for t, (w, g) in enumerate(zip(weights, GRADIENTS, strict=True)):
        emit = t in (4, 6, 9)
        cycle.append((w, g))
        given = g if w else with_nan(g)  # the mean over no tokens
        updates, state = step(given, state, PARAMS, weight=jnp.float32(w), emit=jnp.array(emit))
        if len(cycle) < 4 and not emit:
            assert_zero(updates)
            continue
        assert_close(updates, adam.direction(weighted_mean(cycle, average)), rtol=1e-5)
        cycle = []
    assert int(state.inner_state.count) == adam.count == 4
    assert (int(state.mini_step), float(state.weight)) == (2, 1.0)


def test_means_over_tokens_weighted_by_tokens_are_the_mean_over_all_tokens():
    def loss(p, x, y):
        return jnp.mean((x @ p - y) ** 2)

    p, x, y = jnp.array([0.5, -1.0]), normal(0, 7, 2), normal(1, 7)
    tx = at.dynamic_loss_scale(at.accumulate(optax.sgd(0.1), 8, weighted=True), 4.0)
    state, updates = tx.init(p), None
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        g = 4.0 * jax.grad(loss)(p, x[start:stop], y[start:stop])
        updates, state = tx.update(g, state, p, weight=stop - start, emit=stop == 7)
    assert_close(updates, -0.1 * jax.grad(loss)(p, x, y))


def test_a_cycle_without_weight_makes_no_step():
    tx = at.accumulate(at.scale_by_adam(), 2, weighted=True)
    step = jax.jit(lambda g, s, w: tx.update(g, s, PARAMS, weight=w))
    state = tx.init(PARAMS)
    for t in range(2):
        _, state = step(GRADIENTS[t], state, 1.0)
    assert at.has_updated(state)
    before = state.inner_state
    for t in range(2):
        updates, state = step(with_nan(GRADIENTS[t]), state, 0.0)
        assert_zero(updates)
    assert_bits_equal(state.inner_state, before)
    assert int(state.mini_step) == 0
    assert not at.has_updated(state)


def test_six_gradients_at_four_a_step_make_two_steps():
    tx = at.adam(0.1, accumulate_every=4, loss_scale="dynamic", ema=0.5)
    cycles = GRADIENTS[:4], GRADIENTS[4:6]
    means = [jax.tree.map(lambda *g: np.mean(g, axis=0), *cycle) for cycle in cycles]
    expected, _ = run(at.adam(0.1, ema=0.5), means)
    scaled = [jax.tree.map(lambda g: g * np.float32(2**15), g) for g in GRADIENTS[:6]]
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    for g in scaled[:5]:
        _, state = step(g, state, PARAMS)
    updates, emitted = step(scaled[5], state, PARAMS, emit=True)
    assert_close(updates, expected[1], rtol=1e-5)
    # Without a gradient to end the cycle with.
    _, state = step(scaled[5], state, PARAMS)
    flush = jax.jit(lambda state: at.flush_accumulated(tx, state, PARAMS))
    updates, flushed = flush(state)
    assert_close(updates, expected[1], rtol=1e-5)
    assert types(flushed) == types(state)
    assert_close(flushed.inner_state.inner_state, emitted.inner_state.inner_state)
    assert at.has_updated(flushed)
    updates, again = flush(flushed)
    assert_zero(updates)
    assert_bits_equal(again, flushed)


def test_emit_reaches_the_accumulation_inside_another():
    tx = at.accumulate(at.accumulate(optax.sgd(1.0), 2), 2)
    _, state = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
    updates, _ = tx.update(jnp.array([5.0]), state, emit=True)
    assert updates.tolist() == [-4.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_the_cycle_before_are_not_in_a_short_one(weighted):
    params = {"t": jnp.zeros((6, 2))}

    def rows(*ids, value=1.0):
        return {"t": at.SparseRows(jnp.array(ids), jnp.full((2, 2), value), 6)}

    options = dict(average=False, weighted=weighted, like=rows(0, 0))
    tx = at.accumulate(at.lazy(optax.sgd(1.0)), 3, **options)
    state, step = tx.init(params), jax.jit(tx.update)
    full = [rows(1, 2, value=np.nan), rows(1, 3, value=np.nan), rows(1, 4)]
    for t, g in enumerate([*full, rows(5, 5), rows(0, 5)]):
        given = {"weight": float(t)} if weighted else {}
        update, state = step(g, state, params, emit=jnp.array(t == 4), **given)
    expected = np.zeros((6, 2))
    expected[5], expected[0] = (-10.0, -4.0) if weighted else (-3.0, -1.0)
    assert at.to_dense(update)["t"].tolist() == expected.tolist()


def test_rows_of_low_precision_tables_are_flushed():
    params = {"t": jnp.zeros((5, 2), jnp.bfloat16)}
    g = {"t": at.SparseRows(jnp.array([1, 3]), jnp.ones((2, 2), jnp.bfloat16), 5)}
    tx = at.master_weights(at.accumulate(at.lazy(optax.sgd(0.5)), 4, average=False, like=g))
    _, state = run(tx, [g, g], params)
    updates, _ = jax.jit(lambda state: at.flush_accumulated(tx, state, params))(state)
    after = at.apply_updates(params, updates)
    assert after["t"][:, 0].tolist() == [0.0, -1.0, 0.0, -1.0, 0.0]


def test_a_flush_that_cannot_be_is_refused():
    params, inner = jnp.zeros(1), at.accumulate(optax.sgd(1.0), 2)
    deaf = optax.GradientTransformation(inner.init, lambda g, s, p=None: inner.update(g, s, p))
    for tx, message in (
        (deaf, "does not pass the extra arguments of update on"),
        (optax.sgd(1.0), "needs a state of accumulate, got one without it"),
        (at.accumulate(inner, 2), "cannot flush accumulate inside accumulate"),
    ):
        with pytest.raises(ValueError, match=message):
            at.flush_accumulated(tx, tx.init(params), params)


def test_a_schedule_gives_the_length_of_a_cycle(relaxed_promotion):
    tx = at.accumulate(optax.sgd(1.0), lambda cycles: jnp.where(cycles < 2, 2 * cycles, 3))
    multi = optax.MultiSteps(optax.sgd(1.0), lambda step: jnp.array([1, 2, 3])[step])
    params = jnp.zeros(1)
    state, multi_state = tx.init(params), multi.init(params)
    step, multi_step = jax.jit(tx.update), jax.jit(multi.update)
    for t in range(9):
        updates, state = step(jnp.array([2.0**t]), state, params)
        expected, multi_state = multi_step(jnp.array([2.0**t]), multi_state, params)
        assert_close(updates, expected)
        assert bool(at.has_updated(state)) == bool(multi.has_updated(multi_state))
    assert int(state.cycles) == 4
    assert types(state) == types(tx.init(params))


@pytest.mark.parametrize("inner", [at.adam(0.1), optax.sgd(0.1)], ids=["adam", "sgd"])
def test_has_updated_is_that_of_multi_steps(inner, relaxed_promotion):
    tx, multi = at.skip_nonfinite(at.accumulate(inner, 3)), optax.MultiSteps(inner, 3)
    params = jnp.zeros(2)
    state, multi_state = tx.init(params), multi.init(params)
    step, multi_step = jax.jit(tx.update), jax.jit(multi.update)
    for _ in range(7):
        assert bool(at.has_updated(state)) == bool(multi.has_updated(multi_state))
        _, state = step(jnp.ones(2), state, params)
        _, multi_state = multi_step(jnp.ones(2), multi_state, params)


def test_has_updated_needs_one_accumulation():
    for tx, found in ((optax.sgd(0.1), 0), (optax.chain(*[identity(every=2)] * 2), 2)):
        with pytest.raises(ValueError, match=f"one state of accumulate, found {found}"):
            at.has_updated(tx.init(PARAMS))


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


def test_debugging_of_nans_sees_none_in_cycles_without_weight_or_gradients():
    tx = at.accumulate(optax.sgd(0.1), 2, weighted=True)
    with jax.debug_nans(True):
        state = tx.init(jnp.ones(2))
        for g in (jnp.array([jnp.inf, 1.0]), jnp.ones(2), jnp.ones(2)):
            updates, state = tx.update(g, state, weight=0.0)
            assert updates.tolist() == [0.0, 0.0]
        _, state = at.flush_accumulated(tx, state, jnp.ones(2))
    assert int(state.mini_step) == 0


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


def on_demand(tx):
    """`tx` with a weight and an `emit` that are traced."""

    def update(updates, state, params):
        given = {"weight": state.mini_step + 1, "emit": state.mini_step > 1}
        return tx.update(updates, state, params, **given)

    return optax.GradientTransformation(tx.init, update)


@pytest.mark.parametrize(
    ("wrap", "temporaries"),
    [
        (lambda tx: at.accumulate(tx, 4), 0),
        (lambda tx: on_demand(at.accumulate(tx, 4, weighted=True)), 0),
        # The gradient itself, and in jax 0.7.2 what carries it.
        (at.skip_nonfinite, 2),
        (lambda tx: at.dynamic_loss_scale(at.accumulate(tx, 4)), 2),
    ],
    ids=["accumulate", "accumulate on demand", "skip_nonfinite", "dynamic_loss_scale"],
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
        (dict(weighted=None), TypeError, "weighted must be True or False, got None"),
        (dict(accumulator_dtype="int8"), TypeError, "accumulator_dtype must be a floating"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.accumulate(**{"inner": optax.identity(), "every": 2, **options})


@pytest.mark.parametrize(
    ("weighted", "given", "error", "message"),
    [
        (False, dict(weight=2.0), TypeError, "got weight, but not weighted=True"),
        (
            True,
            {},
            TypeError,
            r"needs the weight of each gradient: update\(grads, state, params, w",
        ),
        (True, dict(weight=-1), ValueError, "weight must be >= 0, got -1"),
        (True, dict(weight=np.nan), ValueError, "weight must be >= 0, got nan"),
        (True, dict(weight=np.ones(2)), TypeError, r"weight must be a number .*got float64\[2\]"),
        (False, dict(emit=1), TypeError, "emit must be True, False or a boolean array .*, got 1"),
        (False, dict(emit=np.ones(1, bool)), TypeError, "emit must be True, False or a boolean"),
    ],
)
def test_a_wrong_argument_of_update_is_refused_by_name(weighted, given, error, message):
    tx = identity(every=2, weighted=weighted)
    with pytest.raises(error, match=message):
        tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS, **given)


def test_a_state_of_other_options_and_a_schedule_for_rows_are_refused():
    plain, weighted = identity(every=2), identity(every=2, weighted=True)
    with pytest.raises(ValueError, match="'weight' is float32.*, expected nothing"):
        plain.update(GRADIENTS[0], weighted.init(PARAMS), PARAMS)
    scheduled = identity(every=lambda cycles: 2)
    with pytest.raises(ValueError, match="'cycles' is missing, expected int32"):
        scheduled.update(GRADIENTS[0], plain.init(PARAMS), PARAMS)
    rows = at.SparseRows(jnp.zeros(1, int), jnp.zeros((1, 3)), 4)
    with pytest.raises(ValueError, match="'w' has row gradients .* every must be an integer"):
        identity(every=lambda cycles: 2, like={**PARAMS, "w": rows}).init(PARAMS)
    with pytest.raises(TypeError, match="every must be a number, got None"):
        identity(every=lambda cycles: None).update(GRADIENTS[0], scheduled.init(PARAMS))


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
