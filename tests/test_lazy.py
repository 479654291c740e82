"""`lazy`: the touched rows as the inner chain would have it, all others bit-identical."""

import itertools
import re
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recordings
from helpers import (
    as_numpy,
    assert_bits_equal,
    assert_close,
    in_tiers,
    normal,
    optimized_jit,
    types,
)
from recordings import Recording

import adam_transforms as at
from adam_transforms._core import sparse_rows
from adam_transforms._embeddings import lazy, row_blocks

V, D = 9, 3


def params_and_rows(seed: int = 0, indices: Any = (4, 1, 4, 7)) -> Any:
    params = {"t": jnp.asarray(normal(seed, V, D)), "w": jnp.asarray(normal(seed + 1, 2))}
    rows = at.SparseRows(np.asarray(indices, np.int32), normal(seed + 2, len(indices), D), V)
    return params, {"t": rows, "w": jnp.asarray(normal(seed + 3, 2))}


def run(tx: Any, params: Any, gradients: list[Any], state: Any = None) -> Any:
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = at.apply_updates(params, updates)
    return params, state


CHAINS = {
    "at.adam": lambda: at.adam(0.1),
    "at.adam amsgrad": lambda: at.adam(0.1, amsgrad=True, eps_hat=True),
    "at.adam clipped and decayed": lambda: at.adam(0.1, clip_value=0.5, weight_decay=0.1),
    "scheduled": lambda: at.adam(
        optax.exponential_decay(0.1, 2, 0.5), b1=lambda count: 0.9 - 0.1 / (1.0 + count)
    ),
    "optax.adamw": lambda: optax.adamw(0.1),
    "optax.adagrad": lambda: optax.adagrad(0.1),
    "optax.rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "optax.sgd": lambda: optax.sgd(0.1),
    "optax.lion": lambda: optax.lion(0.1),
    "by path": lambda: at.by_path([("t", at.adam(0.1))], optax.sgd(0.5)),
    "learning rate by path": lambda: optax.chain(
        at.scale_by_adam(), at.scale_by_path_learning_rate([("t", 0.5)], 0.1)
    ),
    "masked": lambda: optax.chain(
        optax.masked(at.scale_by_adam(), {"t": True, "w": False}), optax.scale(-0.1)
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"t": "a", "w": "b"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(at.adam)(learning_rate=0.1),
    "average": lambda: at.adam(0.1, ema=0.9),
    "average of the rest": lambda: optax.chain(
        at.adam(0.1), optax.masked(at.params_ema(0.9), {"t": False, "w": True})
    ),
}
# The first tier tries those that differ most.
QUICK = (
    "at.adam clipped and decayed",
    "scheduled",
    "by path",
    "inject_hyperparams",
    "average of the rest",
)
every_chain = pytest.mark.parametrize("name", in_tiers(CHAINS, lambda name: name in QUICK))
pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@every_chain
def test_touched_rows_move_as_a_table_of_them_alone_would(name: str) -> None:
    """With the same rows touched at every step, lazy is the inner chain on these rows."""
    touched = np.array([1, 4, 7])
    params, _ = params_and_rows()
    gradients = [params_and_rows(seed)[1] for seed in (10, 20, 30)]
    actual, state = run(at.lazy(CHAINS[name]()), params, gradients)

    small = {**params, "t": params["t"][touched]}
    dense = [{**g, "t": g["t"].to_dense()[touched]} for g in gradients]
    expected, small_state = run(CHAINS[name](), small, dense)
    chex.assert_trees_all_close(actual["w"], expected["w"], rtol=1e-5)
    chex.assert_trees_all_close(actual["t"][touched], expected["t"], rtol=1e-5, atol=1e-6)
    idle = np.setdiff1d(np.arange(V), touched)
    assert_bits_equal(actual["t"][idle], params["t"][idle])
    for slot, small_slot in zip(jax.tree.leaves(state), jax.tree.leaves(small_state), strict=True):
        if slot.shape == (V, D):
            chex.assert_trees_all_close(slot[touched], small_slot, rtol=1e-5, atol=1e-6)


@every_chain
def test_other_rows_and_the_types_of_the_state_stay(name: str) -> None:
    tx = at.lazy(CHAINS[name]())
    params, _ = params_and_rows()
    params, state = run(tx, params, [params_and_rows(5, indices=range(V))[1]])
    after, new_state = run(tx, params, [params_and_rows(6, indices=(2, V, 2))[1]], state)
    idle = np.setdiff1d(np.arange(V), [2])
    assert_bits_equal(after["t"][idle], params["t"][idle])
    assert not np.array_equal(after["t"][2], params["t"][2])
    assert types(new_state) == types(state)
    for new, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
        if old.shape == (V, D):
            assert_bits_equal(new[idle], old[idle])


@pytest.mark.parametrize("make", [at.clip_by_global_norm, optax.clip_by_global_norm])
def test_global_norm_inside_spans_rows_and_dense_leaves(make: Any) -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(make(0.5))
    updates, _ = tx.update(gradients, tx.init(params), params)
    dense = at.to_dense(gradients)
    expected, _ = make(0.5).update(dense, make(0.5).init(params), params)
    chex.assert_trees_all_close(at.to_dense(updates), expected, rtol=1e-6)


SHAPES = {str(shape): shape for shape in [(1, D), (V,), (V, 2, 2), (V, 0)]}
TABLE_DTYPES = ["float32", "bfloat16", "float16", "complex64"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_tiers(
        itertools.product(SHAPES, TABLE_DTYPES),
        lambda shape, dtype: dtype == "float32" or shape == "(9, 2, 2)",
    ),
)
def test_tables_of_any_shape_and_dtype(shape: Any, dtype: str) -> None:
    """The touched row moves as in the dense step; ids outside move none."""
    shape = SHAPES[shape]
    p = jnp.asarray(normal(0, *shape)).astype(dtype)
    table = {"t": np.asarray(p) if dtype == "float32" else p}
    values = normal(1, 4, *shape[1:])
    indices = np.array([0, shape[0], 0, -1], np.int32)
    rows = at.SparseRows(indices, jnp.asarray(values).astype(dtype), shape[0])
    actual, state = run(at.lazy(at.adam(0.1)), table, [{"t": rows}])
    expected, _ = run(at.adam(0.1), table, [{"t": rows.to_dense()}])
    assert_bits_equal(actual["t"][1:], p[1:])
    rtol = 1e-5 if jnp.finfo(dtype).bits >= 32 else 1e-2
    np.testing.assert_allclose(as_numpy(actual["t"]), as_numpy(expected["t"]), rtol=rtol)
    assert types(state) == types(at.lazy(at.adam(0.1)).init(table))


def test_padding_and_rows_outside_change_nothing() -> None:
    tx = at.lazy(at.adam(0.1, clip_global_norm=1.0, weight_decay=0.1))
    params, _ = params_and_rows()
    _, gradients = params_and_rows(1, indices=(3, 5))
    _, padded = params_and_rows(1, indices=(3, 5, V, V + 4, -1))
    # Values at padding are anything.
    padded["t"] = at.SparseRows(
        padded["t"].indices,
        padded["t"].values.at[:2].set(gradients["t"].values).at[2:].set(jnp.nan),
        V,
    )
    padded["w"] = gradients["w"]
    actual, expected = run(tx, params, [padded] * 2), run(tx, params, [gradients] * 2)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("indices", [(), (V, V)], ids=["empty", "all padding"])
def test_no_row_at_all_is_a_step_of_the_rest(indices: tuple[int, ...]) -> None:
    tx = at.lazy(at.adam(0.1))
    params, gradients = params_and_rows(indices=indices)
    after, _ = run(tx, params, [gradients])
    assert_bits_equal(after["t"], params["t"])
    assert not np.array_equal(after["w"], params["w"])


def test_dense_gradients_pass_through() -> None:
    params, gradients = params_and_rows()
    dense = at.to_dense(gradients)
    actual, state = run(at.lazy(at.adam(0.1), tables=()), params, [dense])
    expected, inner = run(at.adam(0.1), params, [dense])
    assert_bits_equal((actual, state.inner_state), (expected, inner))


def test_two_tables_of_one_shape_keep_their_own_slots() -> None:
    params = {"a": jnp.zeros((V, D)), "b": jnp.zeros((V, D))}
    rows = {
        "a": at.SparseRows(np.array([1]), np.ones((1, D), np.float32), V),
        "b": at.SparseRows(np.array([2, 3]), np.ones((2, D), np.float32), V),
    }
    _, state = run(at.lazy(at.scale_by_adam()), params, [rows])
    mu = state.inner_state.mu
    assert np.flatnonzero(np.any(mu["a"], axis=1)).tolist() == [1]
    assert np.flatnonzero(np.any(mu["b"], axis=1)).tolist() == [2, 3]


def test_bfloat16_tables_keep_their_dtypes() -> None:
    params, gradients = params_and_rows()
    params["t"] = params["t"].astype(jnp.bfloat16)
    tx = at.lazy(at.adam(0.1))
    state = tx.init(params)
    after, new_state = run(tx, params, [gradients, gradients])
    assert after["t"].dtype == jnp.bfloat16
    assert types(new_state) == types(state)


def test_steps_do_not_retrace_as_the_ids_change() -> None:
    tx = at.lazy(at.adam(0.1))
    params, _ = params_and_rows()
    traces = 0

    @jax.jit
    def update(g: Any, state: Any, params: Any) -> Any:
        nonlocal traces
        traces += 1
        return tx.update(g, state, params)

    state = tx.init(params)
    for indices in ((1, 2, 3), (8, 8, 8), (V, 0, 0)):
        _, state = update(params_and_rows(indices=indices)[1], state, params)
    assert traces == 1


def test_works_as_a_scan_carry_and_with_extra_arguments() -> None:
    tx = at.lazy(at.adam(0.1))
    params, gradients = params_and_rows()

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradients, state, params, value=jnp.float32(0))
        return (at.apply_updates(params, updates), state), None

    (actual, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
    expected, _ = run(tx, params, [gradients] * 3)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def bits(tree: Any) -> Any:
    """A copy to compare with later."""
    return jax.tree.map(np.array, tree)


WRAPPERS = {
    "skip_nonfinite": at.skip_nonfinite,
    "dynamic_loss_scale": lambda inner: at.dynamic_loss_scale(inner, 8.0),
    "static_loss_scale": lambda inner: at.static_loss_scale(inner, 8.0),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_loss_scales_around_lazy_act_as_around_dense_adam_on_these_rows(name: str) -> None:
    params, _ = params_and_rows()
    gradients = [params_and_rows(seed, indices=(0, 3, 3, V))[1] for seed in (10, 20, 30)]
    scale = 8.0 if "scale" in name else 1.0
    scaled = [{"t": scale * g["t"], "w": scale * g["w"]} for g in gradients]
    actual, state = run(WRAPPERS[name](at.lazy(at.adam(0.1))), params, scaled)
    expected, inner = run(at.lazy(at.adam(0.1)), params, gradients)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["skip_nonfinite", "dynamic_loss_scale"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_row_gradient_changes_no_bit(name: str, bad: float) -> None:
    tx = WRAPPERS[name](at.lazy(at.adam(0.1, weight_decay=0.1)))
    params, gradients = params_and_rows()
    params["t"] = params["t"].at[4, 0].set(-0.0)
    params, state = run(tx, params, [gradients])
    poisoned = {**gradients, "t": gradients["t"].with_values(gradients["t"].values.at[1].set(bad))}
    after, new_state = run(tx, params, [poisoned], state)
    assert_bits_equal(after, params)
    assert_bits_equal(new_state.inner_state, state.inner_state)
    # A value at padding is no gradient.
    rows = at.SparseRows(np.array([1, V]), np.array([[1.0] * D, [bad] * D], np.float32), V)
    after, new_state = run(tx, params, [{**gradients, "t": rows}], state)
    assert not np.array_equal(after["t"][1], params["t"][1])


@pytest.mark.parametrize("average", [True, False])
def test_accumulated_rows_are_the_inner_on_their_sum(average: bool) -> None:
    every = 3
    params, like = params_and_rows()
    shapes = jax.eval_shape(lambda: like)
    tx = at.accumulate(at.lazy(at.adam(0.1)), every, average=average, like=shapes)
    cycles = [
        [params_and_rows(10 * c + i, indices=np.arange(4) * (i + 1) % V)[1] for i in range(every)]
        for c in range(2)
    ]
    state = tx.init(params)
    assert state.acc["t"].values.shape == (every * 4, D)
    update = jax.jit(tx.update)
    actual = params
    for cycle in cycles:
        for i, g in enumerate(cycle):
            before, inner = bits(actual), bits(state.inner_state)
            updates, new_state = update(g, state, actual)
            assert types(new_state) == types(state)
            state = new_state
            actual = at.apply_updates(actual, updates)
            if i < every - 1:
                assert_bits_equal(bits(actual), before)
                assert_bits_equal(bits(state.inner_state), inner)
    factor = 1 / every if average else 1.0
    totals = [
        {
            "t": at.SparseRows(
                np.concatenate([g["t"].indices for g in cycle]),
                factor * np.concatenate([g["t"].values for g in cycle]),
                V,
            ),
            "w": factor * sum(g["w"] for g in cycle),
        }
        for cycle in cycles
    ]
    expected, inner = run(at.lazy(at.adam(0.1)), params, totals)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-5, atol=1e-7)


def test_the_whole_order_of_wrappers_works_and_skips_a_bad_gradient() -> None:
    params, like = params_and_rows()
    chain = at.lazy(at.adam(0.1, clip_global_norm=1.0, weight_decay=0.1))
    tx = at.dynamic_loss_scale(at.accumulate(chain, 2, like=like), 4.0)
    good = [params_and_rows(seed)[1] for seed in (10, 20)]
    bad = {**good[0], "t": good[0]["t"].with_values(good[0]["t"].values * jnp.nan)}
    actual, state = run(tx, params, [good[0], bad, good[1]])
    unscaled = [jax.tree.map(lambda x: x, g) for g in good]
    # The bad one halved the scale for what came after it.
    unscaled = [
        {"t": (1 / s) * g["t"], "w": g["w"] / s} for g, s in zip(unscaled, (4.0, 2.0), strict=True)
    ]
    expected, _ = run(at.accumulate(chain, 2, like=like), params, unscaled)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert int(state.skipped) == 1


def test_a_missing_row_gradient_leaves_a_gap_in_the_cycle() -> None:
    params, gradients = params_and_rows()
    tx = at.accumulate(at.lazy(optax.sgd(1.0)), 2, average=False, like=gradients)
    none = {**gradients, "t": None}
    stale = [gradients, gradients]  # fills every place of the accumulator
    before, state = run(tx, params, stale)
    after, _ = run(tx, before, [none], state)
    after, _ = run(tx, after, [gradients], run(tx, before, [none], state)[1])
    expected = before["t"] - gradients["t"].to_dense()
    np.testing.assert_allclose(after["t"], expected, rtol=1e-6)


def test_accumulating_rows_needs_to_know_how_many() -> None:
    params, gradients = params_and_rows()
    with pytest.raises(TypeError, match="'t'.*like="):
        tx = at.accumulate(at.lazy(at.adam(0.1)), 2)
        tx.update(gradients, tx.init(params), params)
    tx = at.accumulate(at.lazy(at.adam(0.1)), 2, like=gradients)
    with pytest.raises(ValueError, match="'t'.*5 rows.*4"):
        tx.update(params_and_rows(indices=range(5))[1], tx.init(params), params)
    with pytest.raises(TypeError, match="'t'.*dense gradient"):
        tx.update(at.to_dense(gradients), tx.init(params), params)
    stack = at.SparseRows(np.zeros(4, int), np.ones((4, 2), np.float32), 9, leading_shape=(3, 3))
    like, params = {"t": stack}, {"t": jnp.ones((3, 3, 2))}
    tx = at.accumulate(at.lazy(at.adam(0.1)), 2, like=like)
    tables = at.SparseRows(np.zeros(4, int), np.ones((4, 3, 2), np.float32), 3)
    with pytest.raises(ValueError, match=r"'t'.*along \[3\], but along \[3, 3\] in `like`"):
        tx.update({"t": tables}, tx.init(params), params)


COLLECTING = {
    "accumulate": lambda: at.accumulate(at.adam(0.1), 2),
    "accumulate in a chain": lambda: optax.chain(at.accumulate(at.adam(0.1), 2)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_every": lambda: optax.chain(optax.adam(0.1), optax.apply_every(2)),
}


@pytest.mark.parametrize("name", COLLECTING)
def test_what_collects_gradients_inside_is_refused_with_the_right_order(name: str) -> None:
    order = "dynamic_loss_scale(accumulate(lazy(optax.chain(clip, adam, decay, learning rate)), "
    with pytest.raises(ValueError, match=re.escape(order)):
        at.lazy(COLLECTING[name]()).init(params_and_rows()[0])


def adam_with_everything() -> Any:
    return at.adam(0.1, clip_global_norm=1.0, weight_decay=0.1)


# Unusual orders, and the usual ones that they equal.
ORDERS = {
    "dynamic_loss_scale inside": (
        lambda like: at.lazy(at.dynamic_loss_scale(adam_with_everything(), 4.0)),
        lambda like: at.dynamic_loss_scale(at.lazy(adam_with_everything()), 4.0),
    ),
    "skip_nonfinite inside": (
        lambda like: at.lazy(at.skip_nonfinite(adam_with_everything())),
        lambda like: at.skip_nonfinite(at.lazy(adam_with_everything())),
    ),
    "apply_if_finite inside": (
        lambda like: at.lazy(optax.apply_if_finite(adam_with_everything(), 9)),
        lambda like: at.skip_nonfinite(at.lazy(adam_with_everything())),
    ),
    "static_loss_scale inside": (
        lambda like: at.lazy(at.static_loss_scale(adam_with_everything(), 4.0)),
        lambda like: at.static_loss_scale(at.lazy(adam_with_everything()), 4.0),
    ),
    "lazy inside": (
        lambda like: at.lazy(at.lazy(adam_with_everything(), tables=())),
        lambda like: at.lazy(adam_with_everything()),
    ),
    "injected around lazy_adam": (
        lambda like: optax.inject_hyperparams(at.lazy_adam)(lambda count: 0.1 / (1 + count)),
        lambda like: at.lazy_adam(lambda count: 0.1 / (1 + count)),
    ),
    "injected around a function": (
        lambda like: optax.inject_hyperparams(lambda rate: at.lazy(at.adam(rate)))(rate=0.1),
        lambda like: at.lazy_adam(0.1),
    ),
    "by path around": (
        lambda like: at.by_path([("t", at.lazy_adam(0.1))], at.adam(0.1)),
        lambda like: at.lazy_adam(0.1),
    ),
    "average of the rest outside": (
        lambda like: optax.chain(
            at.lazy_adam(0.1),
            optax.masked(at.params_ema(0.9), at.path_mask("t", exclude=True)),
        ),
        lambda like: at.lazy_adam(0.1),
    ),
}


QUICK_ORDERS = ("dynamic_loss_scale inside", "injected around lazy_adam", "by path around")


@pytest.mark.parametrize("name", in_tiers(ORDERS, lambda name: name in QUICK_ORDERS))
def test_other_orders_of_wrappers_give_the_same_numbers(name: str) -> None:
    params, like = params_and_rows()
    gradients = [params_and_rows(seed, indices=(seed % V, 2, 2, V))[1] for seed in (10, 21, 32, 43)]
    if name.startswith(("dynamic", "skip", "apply_if")):
        bad = gradients[1]["t"]
        gradients[1]["t"] = bad.with_values(bad.values.at[0, 0].set(jnp.nan))
    actual, expected = (run(make(like), params, gradients)[0] for make in ORDERS[name])
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_scale_inside_accumulation_skips_a_whole_cycle() -> None:
    params, like = params_and_rows()
    gradients = [params_and_rows(seed)[1] for seed in (10, 20, 30, 40)]
    scaled = [{"t": 4.0 * g["t"], "w": 4.0 * g["w"]} for g in gradients]
    scaled[0] = {**scaled[0], "t": scaled[0]["t"] * jnp.nan}
    inside = at.dynamic_loss_scale(at.lazy(at.adam(0.1)), 4.0)
    actual, state = run(at.accumulate(inside, 2, like=like), params, scaled[:2])
    assert_bits_equal(actual, params)
    halved = [{"t": 0.5 * g["t"], "w": 0.5 * g["w"]} for g in scaled[2:]]
    actual, _ = run(at.accumulate(inside, 2, like=like), params, halved, state)
    expected, _ = run(at.accumulate(at.lazy(at.adam(0.1)), 2, like=like), params, gradients[2:])
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


MIXING = {
    "of columns": optax.GradientTransformation(
        lambda params: {"columns": jax.tree.map(lambda p: jnp.zeros(p.shape[1:]), params)},
        lambda updates, state, params=None: (updates, state),
    ),
    "transposed": optax.GradientTransformation(
        lambda params: {"columns": jax.tree.map(lambda p: jnp.zeros(p.shape[::-1]), params)},
        lambda updates, state, params=None: (updates, state),
    ),
    "Adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "SM3": optax.scale_by_sm3(),
    "flatten": optax.flatten(optax.adam(0.1)),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("width", [3, V])
def test_a_state_that_is_not_kept_by_row_is_refused_by_name(name: str, width: int) -> None:
    params = {"t": jnp.ones((V, width))}
    rows = at.SparseRows(np.array([1, 3], np.int32), np.ones((2, width), np.float32), V)
    tx = at.lazy(MIXING[name])
    slot = "mu" if name == "flatten" else "/t"
    with pytest.raises(ValueError, match=f"kept by row, but '.*{slot}"):
        tx.update({"t": rows}, tx.init(params), params)


def test_a_state_that_changes_its_shape_is_refused() -> None:
    """Adafactor factors the many rows of a batch, and not the few of the table."""
    params = {"t": jnp.ones((3, 6))}
    rows = at.SparseRows(np.zeros(6, np.int32), np.ones((6, 6), np.float32), 3)
    tx = at.lazy(optax.scale_by_factored_rms(min_dim_size_to_factor=6))
    with pytest.raises(ValueError, match="'v.*/t' has shape"):
        tx.update({"t": rows}, tx.init(params), params)


def test_average_of_a_table_is_refused_and_of_the_rest_is_exact() -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(at.adam(0.1, ema=0.9, ema_overwrite_every=2))
    with pytest.raises(ValueError, match="params_ema.*'t'"):
        tx.update(gradients, tx.init(params), params)
    # A parameter of the shape that the table would have with a row more.
    params, gradients = ({**tree, "w": jnp.ones((V + 1, D))} for tree in (params, gradients))
    rest = optax.masked(at.params_ema(0.9), {"t": False, "w": True})
    after, state = run(at.lazy(optax.chain(at.adam(0.1), rest)), params, [gradients] * 2)
    _, expected = run(at.adam(0.1, ema=0.9), {"w": params["w"]}, [{"w": gradients["w"]}] * 2)
    chex.assert_trees_all_close(at.ema_params(state)["w"], at.ema_params(expected)["w"], rtol=1e-6)


def test_the_slots_of_many_tables_are_told_apart() -> None:
    """All of one shape, and one as tall as another that is asked for with a few rows more."""
    params = {f"t{i}": jnp.zeros((V + i % 3, D)) for i in range(9)}
    gradients = {
        name: at.SparseRows(np.array([i]), np.ones((1, D), np.float32), params[name].shape[0])
        for i, name in enumerate(params)
    }
    _, state = run(at.lazy(at.scale_by_adam()), params, [gradients])
    for i, mu in enumerate(state.inner_state.mu.values()):
        assert np.flatnonzero(np.any(mu, axis=1)).tolist() == [i]


def test_update_without_parameters_and_foreign_states_are_refused() -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(at.adam(0.1))
    with pytest.raises(ValueError, match="needs params, got None"):
        tx.update(gradients, tx.init(params))
    with pytest.raises(ValueError, match="init"):
        tx.update(gradients, at.LazyState(()), params)
    for other in ((V - 1, D), (V, D + 1), (1, D), (V + 2, D + 1), (V + 2, D)):
        with pytest.raises(ValueError, match=rf"'0/mu/t' has shape \[{other[0]}, {other[1]}\]"):
            tx.update(gradients, tx.init({**params, "t": jnp.ones(other)}), params)
    with pytest.raises(TypeError, match="inner"):
        at.lazy(at.adam)  # pyright: ignore[reportArgumentType]


def test_leaves_that_are_no_row_gradient_are_refused_by_what_they_are() -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(at.adam(0.1))
    for rows in (gradients["t"], gradients["t"].sum_duplicates()):
        batch = jax.vmap(lambda x, rows=rows: rows * x)(jnp.ones(2))
        with pytest.raises(ValueError, match="a batch of row gradients"):
            tx.update({**gradients, "t": batch}, tx.init(params), params)
    other = jax.tree.map(lambda x: None, gradients["t"])
    with pytest.raises(TypeError, match="replaced by NoneType"):
        tx.update({**gradients, "t": other}, tx.init(params), params)


WRONG = {
    "only in the updates": ({"x": jnp.ones(2)}, {}, "'x' is only in the updates"),
    "only in the parameters": ({}, {"x": jnp.ones(2)}, "'x' is only in the parameters"),
    "another table": ({}, {"t": jnp.ones((V - 1, D))}, "'t'.*9, 3.*8, 3"),
    "a tree": ({}, {"t": {"a": jnp.ones((V, D))}}, "'t' is an array in the updates, but a tree"),
    "none": ({}, {"t": None}, "'t' has a row gradient, but no parameter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_gradients_that_differ_from_the_parameters_are_refused_by_path(name: str) -> None:
    in_gradients, in_params, message = WRONG[name]
    params, gradients = params_and_rows()
    params, gradients = {**params, **in_params}, {**gradients, **in_gradients}
    tx = at.lazy(at.adam(0.1))
    with pytest.raises(ValueError, match=message):
        tx.update(gradients, tx.init(params), params)


def test_flax_linen_train_state_applies_row_gradients() -> None:
    nn = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    model, ids = nn.Sequential([nn.Embed(V, D), nn.Dense(1)]), jnp.array([1, 1, 4])
    start = model.init(jax.random.key(0), ids)

    def trained(tx: Any, grad: Any) -> Any:
        train = train_state.TrainState.create(apply_fn=model.apply, params=start, tx=tx)

        @jax.jit
        def step(train: Any) -> Any:
            gradients = grad(lambda p: jnp.mean(model.apply(p, ids) ** 2))(train.params)
            return train.apply_gradients(grads=gradients)

        return step(step(train)).params

    # The same rows at every step: lazy is dense.
    assert_close(
        trained(at.lazy_adam(0.1, tables="embedding"), at.grad),
        trained(at.adam(0.1), jax.grad),
        1e-5,
    )


def test_flax_nnx_optimizer_applies_row_gradients() -> None:
    nnx = pytest.importorskip("flax.nnx")
    ids = jnp.array([1, 1, 4])

    def trained(tx: Any, grad: Any) -> Any:
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, 1, rngs=rngs))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> None:
            graph, params = nnx.split(model)
            gradients = grad(lambda p: jnp.mean(nnx.merge(graph, p)(ids) ** 2))(params)
            optimizer.update(model, gradients)

        for _ in range(2):
            step(model, optimizer)
        return jax.tree.leaves(nnx.state(model))

    assert_close(
        trained(at.lazy_adam(0.1, tables="embedding"), at.grad),
        trained(at.adam(0.1), jax.grad),
        1e-5,
    )


IN_PLACE = {
    "at.adam": lambda like: at.lazy(at.adam(0.1)),
    "clipped and decayed": lambda like: at.lazy(
        at.adam(0.1, clip_global_norm=1.0, weight_decay=0.1)
    ),
    "average": lambda like: at.lazy_adam(0.1, ema=0.9),
    "AMSGrad": lambda like: at.lazy(at.adam(0.1, amsgrad=True)),
    "optax.adamw": lambda like: at.lazy(optax.adamw(0.1)),
    "skip_nonfinite": lambda like: at.skip_nonfinite(at.lazy(at.adam(0.1))),
    "accumulate": lambda like: at.accumulate(at.lazy(at.adam(0.1)), 4, like=like),
    "every wrapper": lambda like: at.dynamic_loss_scale(
        at.accumulate(at.lazy(at.adam(0.1, weight_decay=0.1)), 4, like=like)
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    in_tiers(
        [*((name, "float32") for name in IN_PLACE), ("at.adam", "float16")],
        lambda name, dtype: name == "every wrapper" or dtype == "float16",
    ),
)
def test_memory_does_not_depend_on_the_table_and_nothing_of_its_size_is_copied(
    name: str, dtype: str
) -> None:
    temporaries = []
    for rows in (1_000_000, 10_000_000):
        params = {"t": jax.ShapeDtypeStruct((rows, 16), dtype)}
        like = {"t": at.SparseRows(np.zeros(512, np.int32), np.zeros((512, 16), np.float32), rows)}
        tx = IN_PLACE[name](like)
        state = jax.eval_shape(tx.init, params)

        def step(
            params: Any, state: Any, ids: Any, values: Any, rows: int = rows, tx: Any = tx
        ) -> Any:
            gradients = {"t": at.SparseRows(ids, values, rows)}
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        ids = jax.ShapeDtypeStruct((512,), jnp.int32)
        values = jax.ShapeDtypeStruct((512, 16), jnp.float32)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, ids, values)
        compiled = lowered.compile()
        assert not re.search(rf"f\d+\[{rows},16\]\S* (copy|convert)\(", compiled.as_text())
        memory: Any = compiled.memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1]


STACK = (3, 3)  # V rows
FROZEN = np.eye(3, dtype=bool)
# Programs whose steps with stacked tables are those with one table of all their rows.
STACKED: dict[str, Any] = {
    "every wrapper": lambda like, frozen: at.dynamic_loss_scale(
        at.accumulate(
            at.freeze_rows(
                at.lazy_adam(
                    *(0.1,), amsgrad=True, weight_decay=0.1, clip_global_norm=1.0, ema=0.9
                ),
                {"t": frozen},
            ),
            *(2,),
            like=like,
        )
    ),
    "groups and masks": lambda like, frozen: optax.multi_transform(
        {
            "a": optax.inject_hyperparams(at.lazy_adam)(0.1),
            "b": optax.masked(optax.sgd(0.1), {"t": False, "w": True}),
        },
        {"t": "a", "w": "b"},
    ),
    "masters of limited rows": lambda like, frozen: optax.chain(
        at.skip_nonfinite(at.master_weights(at.lazy(CHAINS["by path"]()))), at.max_row_norm(0.5)
    ),
    "all inside": lambda like, frozen: at.lazy(
        at.freeze_rows(
            optax.chain(at.adam(0.1, clip_norm=1.0), at.max_row_norm(1.0), at.params_ema(0.9)),
            {"t": frozen},
        )
    ),
}
every_stack = pytest.mark.parametrize(
    "name", in_tiers(STACKED, lambda name: name in ("every wrapper", "all inside"))
)


def steps_of_a_stack(name: str, leading_shape: Any) -> Any:
    """(parameters, state, fraction of the rows that the last update touches)."""

    def gradients(seed: int) -> Any:
        _, g = params_and_rows(seed, indices=(seed % V, 1, 1, V, 8, -1))
        rows = g["t"]
        stacked = at.SparseRows(rows.indices, rows.values, V, leading_shape=leading_shape)
        return {**g, "t": stacked.astype(dtype)}

    dtype = "bfloat16" if "masters" in name else "float32"
    tx = STACKED[name](jax.eval_shape(lambda: gradients(0)), FROZEN.reshape(leading_shape))
    params, _ = params_and_rows()
    params["t"] = params["t"].reshape(*leading_shape, D).astype(dtype)
    state, updates = tx.init(params), None
    # Without optimizations the programs of blocks and of all rows at once round differently.
    update = optimized_jit(tx.update)
    for seed in range(4):
        updates, state = update(gradients(seed), state, params)
        key = jax.random.key(seed)
        params = at.apply_updates(params, updates, key=key if seed % 2 else None)
    at.check_state(state, like=jax.eval_shape(tx.init, params))
    assert "ema" in at.summary(params, state) or "ema" not in str(jax.tree.structure(state))
    return params, state, at.metrics(updates, state)["rows_touched/t"]


def assert_same_rows(stacked: Any, flat: Any) -> None:
    for x, y in zip(jax.tree.leaves(stacked), jax.tree.leaves(flat), strict=True):
        assert_bits_equal(x.reshape(y.shape), y)


@every_stack
def test_stacked_tables_take_the_steps_of_one_table_with_all_their_rows(name: str) -> None:
    stacked, flat = (steps_of_a_stack(name, shape) for shape in (STACK, (V,)))
    assert_same_rows(stacked, flat)
    params, state, touched = stacked
    assert 0 < float(touched) <= 4 / V
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert (*STACK, D) in shapes and (V, D) not in shapes
    assert params["t"].shape == (*STACK, D)


def test_stacked_tables_are_updated_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = steps_of_a_stack("all inside", (V,))
    monkeypatch.setattr(lazy, "LAZY_BYTES", 0)
    monkeypatch.setattr(row_blocks, "_LEAST_LENGTH", 2)
    monkeypatch.setattr(sparse_rows, "PACKED_BYTES", 0)
    rows = at.SparseRows(np.arange(9), np.ones((9, 1000), np.float32), V, leading_shape=STACK)
    monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", rows.values[:4].nbytes)
    assert row_blocks.block_length(rows) == 4
    monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", 1)
    assert_same_rows(steps_of_a_stack("all inside", STACK), flat)


def test_nothing_of_the_size_of_a_stack_is_copied() -> None:
    size = (10, 100_000, 16)
    params = {"t": jax.ShapeDtypeStruct(size, np.float32)}
    tx = at.lazy_adam(0.1, ema=0.9)

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        rows = at.SparseRows(ids, values, 1_000_000, leading_shape=size[:2])
        updates, state = tx.update({"t": rows}, state, params)
        return optax.apply_updates(params, updates), state

    shapes = [
        jax.ShapeDtypeStruct((512, *x.shape), x.dtype) for x in (np.int32(0), np.zeros(16, "f"))
    ]
    arguments = (params, jax.eval_shape(tx.init, params), *shapes)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    assert not re.search(r"\[(10,100000|1000000),16\]\S* (copy|convert)\(", compiled.as_text())
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**20


NOT_BY_ROW = {
    "of whole tables": lambda p: jnp.zeros(p.shape[:1]),
    "of one table": lambda p: jnp.zeros(p.shape[1:]),
    "of flat rows": lambda p: jnp.zeros((p.shape[0] * p.shape[1], *p.shape[2:])),
}


@pytest.mark.parametrize("name", NOT_BY_ROW)
def test_a_state_that_is_not_kept_by_the_rows_of_a_stack_is_refused(name: str) -> None:
    inner = optax.GradientTransformation(
        lambda params: {"slot": jax.tree.map(NOT_BY_ROW[name], params)},
        lambda updates, state, params=None: (updates, state),
    )
    params = {"t": jnp.ones((*STACK, D))}
    rows = at.SparseRows(np.array([1]), np.ones((1, D), np.float32), V, leading_shape=STACK)
    with pytest.raises(ValueError, match="kept by row, but 'slot/t'"):
        at.lazy(inner).update({"t": rows}, at.lazy(inner).init(params), params)


def test_numbers_that_are_rows_have_no_average() -> None:
    """As those of a table of values of states and actions."""
    params = {"t": jnp.ones(STACK)}
    rows = at.SparseRows(np.array([1]), np.ones(1, np.float32), V, leading_shape=STACK)
    tx = at.lazy_adam(0.1)
    updates, _ = tx.update({"t": rows}, tx.init(params), params)
    assert np.argwhere(at.to_dense(updates)["t"]).tolist() == [[0, 1]]
    tx = at.lazy_adam(0.1, ema=0.9)
    with pytest.raises(ValueError, match="kept by row, but '.*last_step/t'"):
        tx.update({"t": rows}, tx.init(params), params)
    tx = optax.chain(at.lazy_adam(0.1), at.params_ema(0.9))
    with pytest.raises(ValueError, match=r"'t'.*row axes \[3, 3\].*of shape \[3\]: mask it"):
        tx.update({"t": rows}, tx.init(params), params)


@pytest.mark.parametrize("case", recordings.of_class("LazyAdam", "SparseAdam"))
def test_follows_tensorflow_addons_lazy_adam_and_torch_sparse_adam(case: str) -> None:
    """Recorded trajectories, duplicates in the gradients included."""
    recording = Recording(case)
    config = recording.config
    if "torch" in case:
        b1, b2 = config.get("betas", (0.9, 0.999))
        rate, eps = config.get("lr", 1e-3), config.get("eps", 1e-8)
    else:
        b1, b2 = config.get("beta_1", 0.9), config.get("beta_2", 0.999)
        rate, eps = config.get("learning_rate", 1e-3), config.get("epsilon", 1e-7)
        if isinstance(rate, dict):
            c = rate["config"]
            rate = optax.exponential_decay(
                c["initial_learning_rate"], c["decay_steps"], c["decay_rate"]
            )
    tx = at.lazy(at.adam(rate, b1, b2, eps, eps_hat=True))
    params = jax.tree.map(jnp.asarray, recording.start)
    state = tx.init(params)
    for t in range(recording.steps):
        params, state = run(tx, params, [recording.gradients(t)], state)
        errors = recordings.differences(params, recording.params(t))
        assert max(errors.values()) <= recording.tolerance, f"after step {t}: {errors}"


def test_lazy_adam_is_adam_inside_lazy_with_the_wrappers_around() -> None:
    options: Any = {"b1": 0.8, "eps_hat": True, "weight_decay": 0.1, "clip_norm": 0.5}
    params, like = params_and_rows()
    gradients = [params_and_rows(seed)[1] for seed in (10, 20, 30, 40)]
    preset = at.lazy_adam(
        0.1, **options, accumulate_every=2, accumulate_like=like, loss_scale="dynamic"
    )
    by_hand = at.dynamic_loss_scale(at.accumulate(at.lazy(at.adam(0.1, **options)), 2, like=like))
    actual, state = run(preset, params, gradients)
    expected, expected_state = run(by_hand, params, gradients)
    assert_bits_equal(actual, expected)
    assert_bits_equal(state, expected_state)
    with pytest.raises(ValueError, match="accumulate_like needs accumulate_every"):
        at.lazy_adam(accumulate_like=like)
    with pytest.raises(ValueError, match="clip_norm"):
        at.lazy_adam(clip_norm=-1.0)


# Named tables


def dense_of_a_table() -> Any:
    params, rows = params_and_rows()
    return params, rows, at.to_dense(rows)


AROUND: dict[str, Any] = {
    "bare": lambda tx, like: tx,
    "chain": lambda tx, like: optax.chain(optax.identity(), tx),
    "masked": lambda tx, like: optax.masked(tx, {"t": True, "w": False}),
    "multi_transform": lambda tx, like: optax.multi_transform(
        {"tables": tx, "rest": optax.sgd(0.1)}, {"t": "tables", "w": "rest"}
    ),
    "by_path": lambda tx, like: at.by_path([("t", tx)], optax.sgd(0.1)),
    "accumulate": lambda tx, like: at.accumulate(tx, 2, like=like),
    "loss scale": lambda tx, like: at.dynamic_loss_scale(tx),
    "skip_nonfinite": lambda tx, like: at.skip_nonfinite(tx),
    "freeze_rows": lambda tx, like: at.freeze_rows(tx, {"t": 0}),
    "master_weights": lambda tx, like: at.master_weights(tx),
}
NAMED: dict[str, Any] = AROUND | {
    "inject_hyperparams": lambda tx, like: optax.inject_hyperparams(at.lazy_adam)(
        learning_rate=0.1, tables="t"
    ),
    "preset": lambda tx, like: at.lazy_adam(
        0.1, tables="t", accumulate_every=2, accumulate_like=like, loss_scale="dynamic"
    ),
    "TensorFlow's": lambda tx, like: at.compat.tf1.LazyAdamOptimizer(tables="t").transform(),
}
QUICK_NAMED = ("multi_transform", "inject_hyperparams", "accumulate", "preset")


@pytest.mark.parametrize("name", in_tiers(NAMED, lambda name: name in QUICK_NAMED))
def test_a_named_table_has_rows_or_no_gradient(name: str) -> None:
    params, rows, dense = dense_of_a_table()

    def step(like: Any, gradients: Any) -> Any:
        tx = NAMED[name](at.lazy(at.adam(0.1), tables="t"), like)
        return jax.eval_shape(lambda: tx.update(gradients, tx.init(params), params))

    step(rows, rows)
    step(rows, rows | {"t": None})
    with pytest.raises(
        ValueError,
        match=r"'t' is named by tables.*all 9 rows.*MultiSteps.*explain\(.*tables='t'\).*sampled",
    ):
        step(dense, dense)


def test_tables_are_named_as_for_row_gradients() -> None:
    params, rows, dense = dense_of_a_table()
    for tables in ("t", re.compile("^t$"), ["t"], lambda path, leaf: jnp.ndim(leaf) > 1):
        tx = at.lazy(optax.sgd(0.1), tables=tables)
        tx.update(rows, tx.init(params), params)
        with pytest.raises(ValueError, match="'t' is named by tables"):
            tx.update(dense, tx.init(params), params)
    for tables, error, message in [
        ("nothing", ValueError, "no leaf matches 'nothing' of tables; the paths are 'b', 't', 'w'"),
        (["t", "nothing"], ValueError, "no leaf matches 'nothing'"),
        ("b", ValueError, "'b' is selected by tables, but is a scalar"),
        (3, TypeError, "tables must be a pattern"),
        ("(", ValueError, "no regular expression"),
    ]:
        with pytest.raises(error, match=message):
            at.lazy(optax.sgd(0.1), tables=tables).init({**params, "b": jnp.ones(())})
    hidden = optax.masked(at.lazy(optax.sgd(0.1), tables="t"), {"t": False, "w": True})
    with pytest.raises(ValueError, match="no leaf matches 't' of tables; the paths are 'w'"):
        hidden.init(params)
    tx = at.lazy(optax.sgd(0.1), tables="t")
    with pytest.raises(ValueError, match="needs params"):
        tx.update(dense, tx.init(params))
    assert optax.tree_utils.tree_map_params(tx, id, tx.init(params)) == tx.init(params)


def warnings_of(tx: Any, *gradients: Any, params: Any = None, jit: bool = False) -> list[Any]:
    """Those of one step with each gradient."""
    params = params_and_rows()[0] if params is None else params
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tx.init(params)
        for g in gradients:
            (jax.jit(tx.update) if jit else tx.update)(g, state, params)
    return caught


@pytest.mark.parametrize("jit", [False, True])
def test_no_row_gradient_at_all_is_told_once(jit: bool) -> None:
    _, rows, dense = dense_of_a_table()
    tx = at.lazy(optax.sgd(0.1))
    (caught,) = warnings_of(tx, rows, dense, dense, jit=jit)
    assert caught.category is UserWarning and caught.filename == __file__
    assert re.search(r"no row gradient.*explain\(.*tables=", str(caught.message))
    assert not warnings_of(tx, dense, jit=jit)
    assert len(warnings_of(at.lazy(optax.sgd(0.1)), dense, jit=jit)) == 1
    other = {**dense, "b": jnp.ones(1)}
    assert len(warnings_of(tx, other, params=other, jit=jit)) == 1


@pytest.mark.parametrize("name", in_tiers(AROUND, lambda name: name in ("loss scale", "by_path")))
def test_it_is_told_where_the_training_loop_is_and_no_warning_is_false(name: str) -> None:
    _, rows, dense = dense_of_a_table()

    def wrapped(like: Any, **options: Any) -> Any:
        return AROUND[name](at.lazy(optax.sgd(0.1), **options), like)

    (caught,) = warnings_of(wrapped(dense), dense, dense)
    assert caught.filename == __file__
    assert not warnings_of(wrapped(dense, tables=()), dense)
    assert not warnings_of(wrapped(rows), rows)


def test_steps_without_a_gradient_and_scalars_are_no_reason_to_warn() -> None:
    params, rows, dense = dense_of_a_table()
    nothing = dict.fromkeys(params)
    assert not warnings_of(at.lazy(optax.sgd(0.1)), nothing, {**dense, "t": None})
    scalars = {"s": jnp.ones(()), "f": 1.0}
    assert not warnings_of(at.lazy(optax.sgd(0.1)), scalars, params=scalars)
    tx = at.accumulate(at.lazy(at.adam(0.1)), 2, like=rows)
    _, state = tx.update(rows, tx.init(params), params)
    at.flush_accumulated(tx, state, params)
    # A parameter that is None has no gradient to miss.
    with_none = [{**x, "n": None} for x in (dense, params)]
    assert len(warnings_of(at.lazy(optax.sgd(0.1)), with_none[0], params=with_none[1])) == 1
