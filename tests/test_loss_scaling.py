# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import assert_bits_equal, assert_close, normal, types

import adam_transforms as at

PARAMS = {"w": normal(50, 3, 2), "b": normal(51, 4)}
GRADIENTS = [{"w": normal(t, 3, 2), "b": normal(100 + t, 4)} for t in range(8)]


def run(tx, gradients, params=PARAMS, state=None):
    """Updates and states of every step."""
    state = tx.init(params) if state is None else state
    step = jax.jit(tx.update)
    updates, states = [], []
    for g in gradients:
        u, state = step(g, state, params)
        updates.append(u)
        states.append(state)
    return updates, states


def spoiled(gradients, bad=np.inf):
    b = gradients["b"].copy()
    b[-1] = bad
    return {**gradients, "b": b}


def assert_zero(updates):
    assert all(not np.any(np.asarray(u)) for u in jax.tree.leaves(updates))


# The dynamic rule

PATTERN = "ggbgggggbbbbbggggbg"  # g: finite, b: not


@pytest.mark.parametrize(
    "rule",
    [
        dict(scale=8.0, growth_interval=2),
        dict(scale=8.0, growth_interval=1),
        dict(scale=64.0, growth_interval=3, factor=4.0),
        dict(scale=8.0, growth_interval=4, min_scale=4.0),
        dict(scale=0.5, growth_interval=2, min_scale=0.125),
    ],
)
def test_the_scale_follows_keras_step_by_step(rule):
    exact = reference.LossScale(**rule)
    tx = at.dynamic_loss_scale(
        optax.scale(-1.0), **{"initial_scale" if k == "scale" else k: v for k, v in rule.items()}
    )
    step = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for t, kind in enumerate(PATTERN):
        g = GRADIENTS[t % 8] if kind == "g" else spoiled(GRADIENTS[t % 8])
        updates, state = step(g, state)
        unscaled = exact.unscale(g)
        if unscaled is None:
            assert_zero(updates)
        else:
            assert_close(updates, jax.tree.map(np.negative, unscaled), rtol=1e-6)
        assert float(state.scale) == exact.scale
        assert int(state.finite_steps) == exact.finite_steps
        assert int(state.skipped) == exact.skipped


def test_the_defaults_are_keras():
    state = at.dynamic_loss_scale(optax.identity()).init(PARAMS)
    assert float(state.scale) == 2.0**15
    tx = at.dynamic_loss_scale(optax.identity())
    state = state._replace(finite_steps=jnp.array(1998, jnp.int32))
    _, states = run(tx, GRADIENTS[:2], state=state)
    assert [float(s.scale) for s in states] == [2.0**15, 2.0**16]
    assert [int(s.finite_steps) for s in states] == [1999, 0]


def test_the_scale_is_never_halved_below_its_least_nor_raised_to_it():
    for initial, expected in ((4.0, [2.0, 1.0, 1.0, 1.0]), (0.25, [0.25] * 4), (1.5, [1.0] * 4)):
        tx = at.dynamic_loss_scale(optax.identity(), initial)
        _, states = run(tx, [spoiled(g) for g in GRADIENTS[:4]])
        assert [float(s.scale) for s in states] == expected


def test_the_scale_does_not_grow_past_its_largest():
    tx = at.dynamic_loss_scale(optax.identity(), 2.0**125, growth_interval=1, max_scale=2.0**126)
    # At 2^127 the reciprocal would be zero.
    scaled = [{"b": np.full(4, 2.0**e, np.float32)} for e in (125, 126, 126)]
    updates, states = run(tx, scaled, {"b": jnp.ones(4)})
    assert [float(s.scale) for s in states] == [2.0**126] * 3
    assert all(u["b"].tolist() == [1.0] * 4 for u in updates)
    _, states = run(tx, [spoiled(GRADIENTS[4])], state=states[-1])
    assert float(states[0].scale) == 2.0**125
    tx = at.dynamic_loss_scale(optax.identity(), growth_interval=1)
    _, states = run(
        tx, [GRADIENTS[0]] * 2, state=tx.init(PARAMS)._replace(scale=jnp.float32(2**23))
    )
    assert [float(s.scale) for s in states] == [2.0**24] * 2


@pytest.mark.parametrize("scale", [2.0**30, np.inf])
def test_a_restored_scale_above_the_largest_comes_down(scale):
    tx = at.dynamic_loss_scale(optax.identity())
    for gradient in (GRADIENTS[0], spoiled(GRADIENTS[0])):
        _, (after,) = run(tx, [gradient], state=tx.init(PARAMS)._replace(scale=jnp.float32(scale)))
        assert float(after.scale) == 2.0**24


def test_factor_and_scales_can_be_arrays():
    tx = at.dynamic_loss_scale(
        optax.identity(), jnp.array(8), 1, factor=jnp.float32(4.0), min_scale=jnp.array(2.0)
    )
    _, states = run(tx, [GRADIENTS[0], *(spoiled(g) for g in GRADIENTS[:3])])
    assert [float(s.scale) for s in states] == [32.0, 8.0, 2.0, 2.0]
    assert types(states[-1]) == types(tx.init(PARAMS))


# Skipping

WRAPPERS = {
    "dynamic_loss_scale": at.dynamic_loss_scale,
    "skip_nonfinite": at.skip_nonfinite,
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@every_wrapper
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_skipped_step_leaves_parameters_moments_and_count_bit_identical(wrap, bad):
    odd = np.array([0x7FC00ABC, 0x80000000, 0x3F800001, 1], np.uint32).view(np.float32)
    tx = wrap(optax.chain(at.scale_by_adam(), optax.scale(-0.1)))
    _, states = run(tx, GRADIENTS[:2])
    before = states[-1]
    adam, *rest = before.inner_state
    adam = adam._replace(mu={**adam.mu, "b": jnp.asarray(odd)})  # a NaN with payload, -0.0
    before = before._replace(inner_state=(adam, *rest))
    updates, (after,) = run(tx, [spoiled(GRADIENTS[2], bad)], PARAMS, before)
    assert_zero(updates)
    assert_bits_equal(after.inner_state, before.inner_state)
    assert int(after.skipped) == 1
    assert_bits_equal(at.apply_updates(PARAMS, updates[0]), jax.tree.map(jnp.asarray, PARAMS))


@every_wrapper
def test_skipped_steps_do_not_change_those_that_follow(wrap):
    tx = wrap(at.scale_by_adam())
    with_bad = [GRADIENTS[0], spoiled(GRADIENTS[1]), spoiled(GRADIENTS[2]), GRADIENTS[3]]
    updates, states = run(tx, with_bad)
    exact = reference.Adam()
    for t in (0, 3):
        scale = 1.0 if wrap is at.skip_nonfinite else 2.0**15 if t == 0 else 2.0**13
        expected = exact.direction({k: g / scale for k, g in GRADIENTS[t].items()})
        assert_close(updates[t], expected, rtol=1e-5)
    assert [int(s.skipped) for s in states] == [0, 1, 2, 2]
    assert int(states[-1].inner_state.count) == 2


def test_so_many_steps_in_a_row_are_skipped_and_no_more():
    bad = spoiled(GRADIENTS[1])
    gradients = [GRADIENTS[0], bad, bad, GRADIENTS[2], bad, bad, bad, bad, GRADIENTS[3], bad]
    tx = at.skip_nonfinite(optax.scale(-1.0), max_consecutive=2)
    updates, states = run(tx, gradients)
    expected, optax_states = run(optax.apply_if_finite(optax.scale(-1.0), 2), gradients)
    assert_close(updates, expected)
    assert [int(s.consecutive) for s in states] == [int(s.notfinite_count) for s in optax_states]
    assert [int(s.skipped) for s in states] == [0, 1, 2, 2, 3, 4, 4, 4, 4, 5]
    assert types(states[-1]) == types(tx.init(PARAMS))
    found = at.metrics(updates[-1], states[-1])
    assert (int(found["consecutive_nonfinite"]), int(found["skipped_steps"])) == (1, 5)


def test_a_state_without_the_number_of_steps_in_a_row_is_refused():
    limited = at.skip_nonfinite(optax.identity(), max_consecutive=1)
    plain = at.skip_nonfinite(optax.identity())
    with pytest.raises(ValueError, match="'consecutive' is missing"):
        limited.update(GRADIENTS[0], plain.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="'consecutive' is int32.*, expected nothing"):
        plain.update(GRADIENTS[0], limited.init(PARAMS), PARAMS)


@pytest.mark.parametrize("compiled", [False, True])
@every_wrapper
def test_debugging_of_nans_sees_none_in_a_skipped_infinity(wrap, compiled):
    tx = wrap(optax.sgd(0.1))
    step = jax.jit(tx.update) if compiled else tx.update
    with jax.debug_nans(True):
        updates, _ = step(jnp.array([jnp.inf, -jnp.inf]), tx.init(jnp.ones(2)), jnp.ones(2))
    assert updates.tolist() == [0.0, 0.0]


def test_skip_nonfinite_alone_passes_finite_steps_through():
    updates, states = run(at.skip_nonfinite(at.scale_by_adam()), GRADIENTS)
    plain, plain_states = run(at.scale_by_adam(), GRADIENTS)
    assert_close(updates, plain)
    assert_close(states[-1].inner_state, plain_states[-1])
    assert int(states[-1].skipped) == 0


@every_wrapper
def test_one_bad_leaf_skips_all_leaves(wrap):
    tx = wrap(optax.identity())
    updates, _ = run(tx, [spoiled(GRADIENTS[0])])
    assert_zero(updates)


@every_wrapper
def test_none_gradients_are_finite(wrap):
    tx = wrap(at.scale_by_adam())
    gradients = [{"w": g["w"], "b": None} for g in GRADIENTS[:2]]
    updates, states = run(tx, gradients)
    assert updates[1]["b"] is None
    assert not np.any(states[-1].inner_state.mu["b"])
    assert (int(states[-1].skipped), int(states[-1].inner_state.count)) == (0, 2)


@every_wrapper
def test_real_gradients_of_complex_parameters_get_complex_updates(wrap):
    params = {"z": jnp.zeros(2, jnp.complex64)}
    updates, states = run(wrap(at.scale_by_adam()), [{"z": np.array([2.0, -2.0], "f")}], params)
    assert updates[0]["z"].dtype == jnp.complex64
    assert_close(updates[0]["z"], np.array([1.0 + 0j, -1.0]), rtol=1e-3)


@every_wrapper
def test_the_updates_have_the_promotion_of_gradient_and_parameter(wrap):
    tx = wrap(at.scale_by_adam())
    for param, gradient, expected in (
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float16", "float32"),
        ("float16", "float32", "float32"),
    ):
        params, g = jnp.ones(2, param), jnp.ones(2, gradient)
        updates, states = run(tx, [g, g * jnp.array(jnp.inf, gradient)], params)
        assert [u.dtype for u in updates] == [expected] * 2
        assert types(states[-1]) == types(tx.init(params))


def test_extra_arguments_reach_the_inner():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda u, state, params=None, *, factor: (jax.tree.map(lambda g: g * factor, u), state),
    )
    for tx, expected in (
        (at.skip_nonfinite(inner), 8.0),
        (at.dynamic_loss_scale(inner, 4.0), 2.0),
        (at.static_loss_scale(inner, 4.0), 2.0),
    ):
        updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), factor=jnp.array(8.0))
        assert updates.tolist() == [expected]


# Unscaling

SCALES = {
    "dynamic": lambda inner, scale: at.dynamic_loss_scale(inner, scale),
    "static": lambda inner, scale: at.static_loss_scale(inner, scale),
}


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
def test_float16_gradients_that_would_underflow_are_unscaled_in_float32(make):
    gradients = jnp.array([6e-8, 1e-3, 1.0], jnp.float16)
    scale = 2.0**15
    assert not (gradients[:1] / jnp.float16(scale)).any()
    params = jnp.ones(3)
    (update,), _ = run(make(optax.identity(), scale), [gradients], params)
    assert update.dtype == jnp.float32
    assert_close(update, np.asarray(gradients, np.float64) / scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("scale", [8.0, 3.0, 0.1])
def test_adam_is_the_same_under_any_scale(make, scale):
    scaled = [jax.tree.map(lambda x: x * np.float32(scale), g) for g in GRADIENTS]
    updates, _ = run(make(at.scale_by_adam(eps=1e-2), scale), scaled)
    exact = reference.Adam(eps=1e-2)
    for u, g in zip(updates, GRADIENTS, strict=True):
        assert_close(u, exact.direction(g), rtol=5e-6, atol=1e-6)


def test_a_static_scale_stays_and_skips_nothing():
    tx = at.static_loss_scale(optax.scale(-1.0), 4.0)
    updates, states = run(tx, [GRADIENTS[0], spoiled(GRADIENTS[1])])
    assert float(states[-1].scale) == 4.0
    assert_close(updates[0], jax.tree.map(lambda g: -g / 4, GRADIENTS[0]))
    assert np.isinf(updates[1]["b"][-1])


def test_complex_gradients_are_unscaled():
    params = {"z": np.zeros(2, np.complex64)}
    gradient = {"z": np.array([8 - 4j, 2j], np.complex64)}
    for make in SCALES.values():
        updates, _ = run(make(optax.identity(), 4.0), [gradient], params)
        assert updates[0]["z"].tolist() == [2 - 1j, 0.5j]


# scale_loss


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
def test_scale_loss_finds_the_scale_however_deep(make):
    inner = make(at.accumulate(at.scale_by_adam(), 2), 8.0)
    for tx in (
        inner,
        optax.chain(optax.identity(), inner),
        at.by_path([("w", optax.identity())], default=inner),
        at.skip_nonfinite(optax.chain(optax.chain(inner))),
    ):
        scaled = at.scale_loss(jnp.array(1.5), tx.init(PARAMS))
        assert (float(scaled), scaled.dtype, scaled.shape) == (12.0, jnp.float32, ())


def test_scale_loss_computes_in_at_least_float32():
    state = at.dynamic_loss_scale(optax.identity()).init(PARAMS)
    for loss in (jnp.float16(100.0), jnp.bfloat16(100.0), jnp.float32(100.0), 100.0):
        scaled = at.scale_loss(loss, state)
        assert scaled.dtype == jnp.float32
        assert float(scaled) == 100 * 2.0**15  # beyond float16


def test_the_gradient_of_a_scaled_loss_is_scaled():
    tx = at.dynamic_loss_scale(optax.scale(-0.5), 16.0)
    state = tx.init(jnp.array([3.0]))

    def loss(p):
        return at.scale_loss(jnp.sum(p**2), state)

    gradient = jax.grad(loss)(jnp.array([3.0]))
    assert gradient.tolist() == [96.0]
    updates, _ = tx.update(gradient, state)
    assert updates.tolist() == [-3.0]


def test_scale_loss_follows_the_present_scale():
    tx = at.dynamic_loss_scale(optax.identity(), 8.0)
    _, states = run(tx, [spoiled(GRADIENTS[0])])
    assert float(at.scale_loss(1.0, states[-1])) == 4.0


@pytest.mark.parametrize(
    ("tx", "found"),
    [
        (at.scale_by_adam(), 0),
        (at.skip_nonfinite(at.scale_by_adam()), 0),
        (optax.chain(*[at.static_loss_scale(optax.identity(), 2.0)] * 2), 2),
        (
            optax.chain(
                at.static_loss_scale(optax.identity(), 2.0),
                at.dynamic_loss_scale(optax.identity()),
            ),
            2,
        ),
        (at.static_loss_scale(at.dynamic_loss_scale(optax.identity()), 2.0), 2),
    ],
)
def test_no_scale_or_several_are_refused(tx, found):
    with pytest.raises(
        ValueError, match=f"^state must hold one state of .*_loss_scale.*, found {found}$"
    ):
        at.scale_loss(1.0, tx.init(PARAMS))


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(inner=3), TypeError, "inner must be an optax.GradientTransformation, got 3"),
        (dict(initial_scale=0.0), ValueError, "initial_scale must be > 0, got 0"),
        (dict(initial_scale="8"), TypeError, "initial_scale must be a number, got '8'"),
        (dict(initial_scale=np.inf), ValueError, "initial_scale must be .*, got inf"),
        (dict(growth_interval=0), ValueError, "growth_interval must be at least 1, got 0"),
        (dict(growth_interval=2.5), TypeError, "growth_interval must be an integer, got 2.5"),
        (dict(factor=1.0), ValueError, "factor must be > 1, got 1"),
        (dict(factor=None), TypeError, "factor must be a number, got None"),
        (dict(min_scale=-1.0), ValueError, "min_scale must be > 0, got -1"),
        (
            dict(min_scale=1e-39),
            ValueError,
            r"min_scale must be from 2\^-126 to 2\^126, .*, got 1e-39",
        ),
        (dict(max_scale=2.0**127), ValueError, r"max_scale must be from 2\^-126 to 2\^126, .*1.7"),
        (dict(max_scale=8.0), ValueError, "initial_scale must be at most max_scale, 8, got 32768"),
        (
            dict(initial_scale=1.0, max_scale=np.float32(4.0), min_scale=jnp.array(5)),
            ValueError,
            "min_scale must be at most max_scale, 4, got 5: pass a larger max_scale",
        ),
    ],
)
def test_a_wrong_argument_of_dynamic_loss_scale_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.dynamic_loss_scale(**{"inner": optax.identity(), **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(inner=optax.sgd), TypeError, "inner must be .*; call the factory first"),
        (dict(scale=0), ValueError, "scale must be > 0, got 0"),
        (dict(scale=np.nan), ValueError, "scale must be > 0, got nan"),
        (dict(scale="dynamic"), TypeError, "scale must be a number, got 'dynamic'"),
        (
            dict(scale=2.0**127),
            ValueError,
            r"scale must be from 2\^-126 to 2\^126, for float32 has",
        ),
    ],
)
def test_a_wrong_argument_of_static_loss_scale_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.static_loss_scale(**{"inner": optax.identity(), "scale": 2.0, **options})


def test_skip_nonfinite_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="^max_consecutive must be at least 1, got 0"):
        at.skip_nonfinite(optax.identity(), max_consecutive=0)
    with pytest.raises(TypeError, match="^inner must be an optax.GradientTransformation, got None"):
        at.skip_nonfinite(None)


@pytest.mark.parametrize("make", [*WRAPPERS.values(), lambda tx: at.static_loss_scale(tx, 2.0)])
def test_integer_gradients_are_refused_by_path(make):
    tx = make(optax.identity())
    with pytest.raises(TypeError, match="update of 'b' must be a floating .*, got int32"):
        tx.update({**GRADIENTS[0], "b": np.ones(4, np.int32)}, tx.init(PARAMS))
