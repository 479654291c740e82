"""`lazy`: the touched rows as the inner chain would have it, all others bit-identical."""

import json
import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, normal, types

import adam_transforms as at

V, D = 9, 3
DATA = Path(__file__).parent / "data" / "sparse"


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
    "average of the rest": lambda: optax.chain(
        at.adam(0.1), optax.masked(at.params_ema(0.9), {"t": False, "w": True})
    ),
}
every_chain = pytest.mark.parametrize("name", CHAINS)
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


def test_global_norm_inside_spans_rows_and_dense_leaves() -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(optax.chain(optax.clip_by_global_norm(0.5), optax.scale(-1.0)))
    updates, _ = tx.update(gradients, tx.init(params), params)
    dense = at.to_dense(gradients)
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.scale(-1.0))
    expected, _ = clip.update(dense, clip.init(params), params)
    chex.assert_trees_all_close(at.to_dense(updates), expected, rtol=1e-6)


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
    actual, state = run(at.lazy(at.adam(0.1)), params, [dense])
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


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda: at.accumulate(at.adam(0.1), 2), "accumulat.*around lazy"),
        (lambda: optax.chain(at.accumulate(at.adam(0.1), 2)), "accumulat.*around lazy"),
        (
            lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
            "accumulat.*around lazy",
        ),
    ],
)
def test_accumulation_inside_is_refused(inner: Any, message: str) -> None:
    params, _ = params_and_rows()
    with pytest.raises(ValueError, match=message):
        at.lazy(inner()).init(params)


def test_what_keeps_no_rows_is_refused_by_name() -> None:
    def init(params: Any) -> Any:
        return {"columns": jax.tree.map(lambda p: jnp.zeros(p.shape[::-1]), params)}

    inner = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    params, gradients = params_and_rows()
    tx = at.lazy(inner)
    with pytest.raises(ValueError, match="'columns/t'.*'t'"):
        tx.update(gradients, tx.init(params), params)


def test_average_of_a_table_is_refused() -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(at.adam(0.1, ema=0.9))
    with pytest.raises(ValueError, match="params_ema.*'t'"):
        tx.update(gradients, tx.init(params), params)


def test_update_without_parameters_and_foreign_states_are_refused() -> None:
    params, gradients = params_and_rows()
    tx = at.lazy(at.adam(0.1))
    with pytest.raises(ValueError, match="needs them"):
        tx.update(gradients, tx.init(params))
    with pytest.raises(ValueError, match="init"):
        tx.update(gradients, at.LazyState(()), params)
    with pytest.raises(TypeError, match="inner"):
        at.lazy(at.adam)  # pyright: ignore[reportArgumentType]


IN_PLACE = {
    "at.adam": lambda like: at.lazy(at.adam(0.1)),
    "clipped and decayed": lambda like: at.lazy(
        at.adam(0.1, clip_global_norm=1.0, weight_decay=0.1)
    ),
    "AMSGrad": lambda like: at.lazy(at.adam(0.1, amsgrad=True)),
    "optax.adamw": lambda like: at.lazy(optax.adamw(0.1)),
    "skip_nonfinite": lambda like: at.skip_nonfinite(at.lazy(at.adam(0.1))),
    "accumulate": lambda like: at.accumulate(at.lazy(at.adam(0.1)), 4, like=like),
    "every wrapper": lambda like: at.dynamic_loss_scale(
        at.accumulate(at.lazy(at.adam(0.1, weight_decay=0.1)), 4, like=like)
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_memory_does_not_depend_on_the_table_and_nothing_of_its_size_is_copied(name: str) -> None:
    temporaries = []
    for rows in (1_000_000, 10_000_000):
        params = {"t": jax.ShapeDtypeStruct((rows, 16), jnp.float32)}
        like = {"t": at.SparseRows(np.zeros(512, np.int32), np.zeros((512, 16), np.float32), rows)}
        tx = IN_PLACE[name](like)
        state = jax.eval_shape(tx.init, params)

        def step(
            params: Any, state: Any, ids: Any, values: Any, rows: int = rows, tx: Any = tx
        ) -> Any:
            gradients = {"t": at.SparseRows(ids, values, rows)}
            updates, state = tx.update(gradients, state, params)
            return at.apply_updates(params, updates), state

        ids = jax.ShapeDtypeStruct((512,), jnp.int32)
        values = jax.ShapeDtypeStruct((512, 16), jnp.float32)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, ids, values)
        compiled = lowered.compile()
        assert not re.search(rf"f32\[{rows},16\]\S* copy\(", compiled.as_text())
        memory: Any = compiled.memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1]


CASES = {case["case"]: case for case in json.loads((DATA / "index.json").read_text())}


@pytest.mark.parametrize("name", CASES)
def test_follows_tensorflow_addons_lazy_adam_and_torch_sparse_adam(name: str) -> None:
    """Recorded trajectories, duplicates in the gradients included."""
    case, recorded = CASES[name], np.load(DATA / f"{name}.npz")
    config = case["config"]
    names = list(case["variables"])
    if "torch" in name:
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
    params = {name: jnp.asarray(recorded[f"p0/{name}"]) for name in names}
    state = tx.init(params)
    update = jax.jit(tx.update)
    error = 0.0
    for t in range(case["steps"]):
        gradients = {
            name: at.SparseRows(
                recorded[f"ids/{name}"][t], recorded[f"rows/{name}"][t], params[name].shape[0]
            )
            if case["variables"][name]["kind"] == "sparse"
            else jnp.asarray(recorded[f"g/{name}"][t])
            for name in names
        }
        updates, state = update(gradients, state, params)
        params = at.apply_updates(params, updates)
        for name in names:
            error = max(error, float(np.abs(params[name] - recorded[f"p/{name}"][t]).max()))
    assert error <= 2 * case["float64_replay"]["exact_coefficients"]["max_abs_err_p"] + 1e-6


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
