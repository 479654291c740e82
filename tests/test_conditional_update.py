# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_bits_equal, types

from adam_transforms._transforms import conditional_update

TRUE, FALSE = jnp.array(True), jnp.array(False)


def doubling(gradients, state):
    """Doubles the gradients and counts."""
    return jax.tree.map(lambda g: g * 2, gradients), {**state, "count": state["count"] + 1}


def poisonous(gradients, state):
    """Makes everything NaN."""
    return jax.tree.map(lambda x: x * jnp.nan, (gradients, state))


def gated(update):
    return jax.jit(
        lambda condition, g, state: conditional_update.update_if(condition, update, g, state)
    )


def state_of_every_kind():
    nan_with_payload = np.array([0x7FC00ABC, 0xFFC00001, 0x80000000], np.uint32).view(np.float32)
    return {
        "count": jnp.array(3, jnp.int32),
        "odd": jnp.asarray(nan_with_payload),
        "half": jnp.array([jnp.inf, -0.0], jnp.float16),
        "flag": jnp.array(True),
        "nothing": None,
    }


def test_the_update_runs_where_the_condition_holds():
    gradients = {"a": jnp.array([1.0, -3.0]), "b": None}
    state = state_of_every_kind()
    carried, new_state = gated(doubling)(TRUE, gradients, state)
    assert carried["a"].tolist() == [2.0, -6.0]
    assert carried["b"] is None
    assert_bits_equal(new_state, {**state, "count": jnp.array(4, jnp.int32)})


def test_without_the_condition_gradients_and_state_are_bit_identical():
    gradients = {"a": state_of_every_kind()["odd"], "b": None}
    state = state_of_every_kind()
    assert_bits_equal(gated(doubling)(FALSE, gradients, state), (gradients, state))


def test_what_the_update_would_have_given_leaves_no_trace():
    gradients, state = {"a": jnp.array([1.0])}, {"m": jnp.array([2.0]), "n": jnp.array(0.5)}
    assert_bits_equal(gated(poisonous)(FALSE, gradients, state), (gradients, state))
    carried, new_state = gated(poisonous)(TRUE, gradients, state)
    assert all(np.isnan(x).all() for x in jax.tree.leaves((carried, new_state)))


def test_a_nan_in_the_gradients_leaves_no_trace_in_updates_or_state():
    gradients, state = {"a": jnp.array([jnp.nan])}, {"m": jnp.array([2.0])}

    def update(g, s):
        return g, {"m": s["m"] + g["a"]}

    carried, new_state = gated(update)(FALSE, gradients, state)
    assert_bits_equal(new_state, state)
    updates = conditional_update.select(FALSE, carried, gradients, None)
    assert updates["a"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("gradient", "update", "carried"),
    [
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float16", "float32"),
        ("float16", "float16", "float16"),
        ("float32", "complex64", "complex64"),
    ],
)
def test_either_side_is_carried_exactly_in_a_dtype_that_holds_both(gradient, update, carried):
    gradients = {"a": jnp.array([1.0 + 2.0**-7, 3.0], gradient)}
    seen = []

    def cast(g, state):
        seen.append(g["a"].dtype)
        return {"a": g["a"].astype(update) / 4}, state

    run = gated(cast)
    for condition, factor in ((TRUE, 0.25), (FALSE, 1.0)):
        result, state = run(condition, gradients, jnp.zeros((), jnp.int32))
        assert result["a"].dtype == carried
        exact = np.asarray(gradients["a"]).astype(np.complex64) * factor
        assert np.asarray(result["a"]).astype(np.complex64).tolist() == exact.tolist()
        assert state.dtype == jnp.int32
    assert set(seen) == {jnp.dtype(gradient)}  # the update sees the gradient's own dtype


def test_the_state_keeps_its_dtypes():
    state = {"m": jnp.zeros(2, jnp.bfloat16), "n": jnp.zeros((), jnp.float32)}

    def widening(g, s):
        return g, {"m": s["m"].astype(jnp.float32) + g, "n": s["n"].astype(jnp.bfloat16) + 1}

    for condition, expected in ((TRUE, [1.0, 1.0]), (FALSE, [0.0, 0.0])):
        _, new_state = gated(widening)(condition, jnp.ones(2), state)
        assert types(new_state) == types(state)
        assert new_state["m"].tolist() == expected


def test_a_random_key_can_be_in_the_state():
    def draw(g, key):
        key, sub = jax.random.split(key)
        return g + jax.random.uniform(sub, g.shape), key

    key, gradient = jax.random.key(7), jnp.zeros(2)
    _, kept = gated(draw)(FALSE, gradient, key)
    carried, moved = gated(draw)(TRUE, gradient, key)
    assert jnp.all(jax.random.key_data(kept) == jax.random.key_data(key))
    assert jnp.any(jax.random.key_data(moved) != jax.random.key_data(key))
    assert carried.tolist() == draw(gradient, key)[0].tolist()


def test_each_lane_of_a_vmap_has_its_own_condition():
    conditions = jnp.array([True, False, True, False])
    gradients = jnp.arange(4.0)
    state = {"count": jnp.arange(10, 14)}
    carried, state = jax.vmap(gated(doubling))(conditions, gradients, state)
    assert carried.tolist() == [0.0, 1.0, 4.0, 3.0]
    assert state["count"].tolist() == [11, 11, 13, 13]


def test_no_lane_of_a_vmap_sees_what_another_made():
    conditions = jnp.array([True, False])
    carried, state = jax.vmap(gated(poisonous))(conditions, jnp.ones(2), jnp.ones(2))
    assert np.isnan(carried).tolist() == [True, False]
    assert np.isnan(state).tolist() == [True, False]
    assert (carried[1].item(), state[1].item()) == (1.0, 1.0)


def test_it_runs_inside_a_scan():
    def step(state, condition):
        carried, state = conditional_update.update_if(condition, doubling, jnp.ones(2), state)
        return state, carried

    conditions = jnp.array([True, False, False, True, True])
    state, carried = jax.lax.scan(step, {"count": jnp.zeros((), jnp.int32)}, conditions)
    assert int(state["count"]) == 3
    assert carried[:, 0].tolist() == [2.0, 1.0, 1.0, 2.0, 2.0]


def test_it_has_a_forward_mode_derivative():
    def squared(g, state):
        return g * g, state + g

    for condition, expected in ((TRUE, (9.0, 6.0, 4.0, 1.0)), (FALSE, (3.0, 1.0, 1.0, 0.0))):
        primals, tangents = jax.jvp(
            lambda g, condition=condition: conditional_update.update_if(
                condition, squared, g, jnp.array(1.0)
            ),
            (jnp.array(3.0),),
            (jnp.array(1.0),),
        )
        assert (primals[0], tangents[0], primals[1], tangents[1]) == expected


def test_select_gives_zeros_without_the_condition():
    carried = {"a": jnp.array([jnp.nan, 5.0]), "b": None}
    gradients = {"a": jnp.ones(2, jnp.bfloat16), "b": None}
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    zeros = conditional_update.select(FALSE, carried, gradients, params)
    assert zeros["a"].dtype == jnp.bfloat16
    assert zeros["a"].tolist() == [0.0, 0.0]
    assert zeros["b"] is None
    kept = conditional_update.select(TRUE, carried, gradients, {"a": jnp.ones(2), "b": jnp.ones(2)})
    assert kept["a"].dtype == jnp.float32
    assert kept["a"][1] == 5.0


def test_an_update_that_changes_the_structure_is_refused():
    with pytest.raises(ValueError, match="must return updates of the gradients' structure"):
        conditional_update.update_if(TRUE, lambda g, s: ([g["a"]], s), {"a": jnp.ones(1)}, None)
