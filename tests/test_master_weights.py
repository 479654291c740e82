"""`master_weights`: what a float32 run would do, and parameters that are its weights rounded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, assert_close, in_tiers, normal, types, x64

import adam_transforms as at
from adam_transforms._core import trees
from adam_transforms._transforms.master_weights import MasterWeightsState, master_weights

NARROW = ("bfloat16", "float16")
APPLY = {
    "ours": at.apply_updates,
    "optax": optax.apply_updates,
    "stochastic": functools.partial(at.apply_updates, key=jax.random.key(0)),
}


def tree(seed: int, dtype: Any, scale: float = 1.0) -> dict[str, jax.Array]:
    return {
        "kernel": jnp.asarray(scale * normal(seed, 16, 8), dtype),
        "bias": jnp.asarray(scale * normal(seed + 100, 8), dtype),
    }


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def train(
    tx: Any, params: Any, gradients: list[Any], apply: Any = at.apply_updates, jit: bool = True
) -> Any:
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return apply(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def assert_rounded(params: Any, master: Any) -> None:
    """Equal, but for the sign of zero."""
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(master), strict=True):
        np.testing.assert_array_equal(np.asarray(p, np.float32), np.asarray(m.astype(p.dtype)))


@pytest.mark.parametrize(("dtype", "apply"), [("bfloat16", "optax"), ("float16", "ours")])
def test_masters_are_a_float32_run_bit_for_bit(
    dtype: str, apply: str, relaxed_promotion: None
) -> None:
    """Not jitted: from program to program XLA may round a product before it adds it, or not."""
    inner = at.adamw(1e-3, clip_global_norm=1.0, weight_decay=0.1)
    params = jax.tree.map(jnp.ones_like, tree(0, dtype))
    gradients = [tree(seed, dtype) for seed in range(1, 11)]
    tx = master_weights(inner)
    trained, state = train(tx, params, gradients, APPLY[apply], jit=False)
    expected, inner_state = train(inner, in_float32(params), in_float32(gradients), jit=False)
    assert_bits_equal(state.master, expected)
    assert_bits_equal(state.inner_state, inner_state)
    assert_rounded(trained, state.master)
    assert types(trained) == types(params)


@pytest.mark.parametrize(
    ("dtype", "apply"),
    in_tiers(
        [("bfloat16", "optax"), ("bfloat16", "stochastic"), ("float16", "ours")],
        lambda dtype, apply: apply == "optax",
    ),
)
def test_jitted_parameters_are_the_masters_rounded_at_every_step(
    dtype: str, apply: str, relaxed_promotion: None
) -> None:
    """Nor does XLA leave out a rounding where many steps are one program."""
    inner = at.adamw(1e-3, clip_global_norm=1.0, weight_decay=0.1)
    params = jax.tree.map(jnp.ones_like, tree(0, dtype))
    gradients = [tree(seed, dtype) for seed in range(1, 60)]
    tx = master_weights(inner)

    def step(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = APPLY[apply](params, updates)
        return (params, state), (params, state.master)

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    (trained, state), history = jax.lax.scan(step, (params, tx.init(params)), stacked)
    assert_rounded(*history)
    expected, _ = train(inner, in_float32(params), in_float32(gradients))
    assert_close(state.master, expected, rtol=1e-6)
    assert not np.array_equal(trained["bias"], params["bias"])

    @jax.jit
    def two_steps(params: Any, state: Any, first: Any, second: Any) -> Any:
        updates, state = tx.update(first, state, params)
        updates, state = tx.update(second, state, APPLY[apply](params, updates))
        return state

    unrolled = two_steps(params, tx.init(params), *gradients[:2])
    assert_close(unrolled.master, jax.tree.map(lambda m: m[1], history[1]), rtol=1e-6)


def test_bfloat16_at_one_moves_by_a_thousandth() -> None:
    params = jnp.ones(4, jnp.bfloat16)
    gradients = [jnp.ones(4, jnp.bfloat16)] * 20
    inner = optax.sgd(1e-3)
    assert train(inner, params, gradients)[0].tolist() == [1.0] * 4
    trained, state = train(master_weights(inner), params, gradients)
    np.testing.assert_allclose(state.master, 0.98, rtol=1e-6)
    np.testing.assert_allclose(trained.astype(jnp.float32), 0.98, rtol=2**-8)


@pytest.mark.parametrize("apply", APPLY)
@pytest.mark.parametrize("dtype", NARROW)
def test_any_target_is_reached_or_the_master_goes_where_the_parameter_can(
    dtype: str, apply: str, relaxed_promotion: None
) -> None:
    """Jumps between magnitudes so far apart that no float32 difference leads from one to the other
    exactly; those of float16 that are subnormal too."""
    info = jnp.finfo(dtype)
    rng = np.random.default_rng(0)
    smallest = -24 if dtype == "float16" else -100

    def anywhere() -> jax.Array:
        exponents = rng.uniform(smallest, np.log2(float(info.max)) - 1, 4096)
        values = rng.choice([-1.0, 1.0], 4096) * 2.0**exponents
        values[:6] = [0.0, -0.0, 1.0, -1.0, info.max, 2.0**smallest]
        return jnp.asarray(values, jnp.float32)

    # The gradient is where to go; the inner update is what leads there.
    def lead(target: Any, state: Any, params: Any = None) -> Any:
        return jnp.where(params == target, 0.0, target - params), state

    tx = master_weights(optax.GradientTransformation(lambda params: optax.EmptyState(), lead))
    params = anywhere().astype(dtype)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, target: Any) -> Any:
        updates, state = tx.update(target, state, params)
        return APPLY[apply](params, updates), state

    for _ in range(20):
        target, before = anywhere(), np.asarray(params, np.float64)
        params, state = step(params, state, target)
        assert_rounded(params, state.master)
        # Off by float32's rounding of the sum at most, however far the jump.
        off = np.abs(np.asarray(state.master, np.float64) - np.asarray(target, np.float64))
        wide = np.abs(before) + np.abs(np.asarray(target, np.float64))
        assert np.all(off <= 2.0**-23 * wide)


def test_no_step_moves_nothing() -> None:
    params = tree(0, "bfloat16", 3.0)
    tx = master_weights(optax.set_to_zero())
    updates, state = jax.jit(tx.update)(tree(1, "bfloat16"), tx.init(params), params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_bits_equal(state.master, in_float32(params))


def test_wider_parameters_have_no_copy_and_see_inner_alone() -> None:
    with x64():
        params = {
            "narrow": jnp.ones(3, jnp.bfloat16),
            "single": jnp.ones(3, jnp.float32),
            "double": jnp.ones(3, jnp.float64),
            "complex": jnp.ones(3, jnp.complex64),
        }
        tx, inner = master_weights(at.scale_by_adam()), at.scale_by_adam()
        g = jax.tree.map(lambda p: p * jnp.asarray(0.5, p.dtype), params)
        updates, state = jax.jit(tx.update)(g, tx.init(params), params)
        assert [path for path, m in state.master.items() if m is not None] == ["narrow"]
        expected, _ = jax.jit(inner.update)(g, inner.init(params), params)
        for name in ("single", "double", "complex"):
            assert_bits_equal(updates[name], expected[name])
        assert state.inner_state.mu["narrow"].dtype == jnp.float32


@pytest.mark.parametrize("gradient_dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", NARROW)
def test_state_is_a_carry_and_updates_are_float32_at_least(dtype: str, gradient_dtype: str) -> None:
    with x64():
        params, g = tree(0, dtype), tree(1, gradient_dtype)
        tx = master_weights(at.scale_by_adam())
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(g, state, params)
        assert types(new_state) == types(state)
        wanted = jnp.dtype("float64" if gradient_dtype == "float64" else "float32")
        assert {u.dtype for u in jax.tree.leaves(updates)} == {wanted}
        assert_rounded(at.apply_updates(params, updates), new_state.master)


def test_element_changed_by_other_code_starts_anew_and_no_other() -> None:
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = master_weights(optax.sgd(1e-3))
    g = {"w": jnp.ones(4, jnp.bfloat16)}
    params, state = train(tx, params, [g])  # the masters are at 0.999, the parameters at 1
    params = {"w": params["w"].at[2].set(5.0)}
    updates, state = jax.jit(tx.update)(g, state, params)
    np.testing.assert_allclose(state.master["w"], [0.998, 0.998, 4.999, 0.998], rtol=1e-6)
    assert_rounded(at.apply_updates(params, updates), state.master)


def test_none_gradient_leaves_parameter_master_and_slots_alone() -> None:
    params = tree(0, "bfloat16")
    tx = master_weights(at.scale_by_adam())
    _, state = train(tx, params, [tree(1, "bfloat16")])
    params["bias"] = params["bias"] + jnp.ones((), jnp.bfloat16)  # even if it has changed
    g = {"kernel": tree(2, "bfloat16")["kernel"], "bias": None}
    updates, new_state = jax.jit(tx.update)(g, state, params)
    assert updates["bias"] is None
    assert_bits_equal(new_state.master["bias"], state.master["bias"])
    assert_bits_equal(new_state.inner_state.mu["bias"], state.inner_state.mu["bias"])
    assert_bits_equal(at.apply_updates(params, updates)["bias"], params["bias"])


# ---- rows ---------------------------------------------------------------------------------------


def rows_of(seed: int, num_rows: int, n: int = 6, dtype: Any = "bfloat16") -> at.SparseRows:
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, num_rows + 1, n)  # with padding and repetitions
    values = jnp.asarray(normal(seed, n, 3), dtype).at[indices == num_rows].set(jnp.nan)
    return at.SparseRows(indices, values, num_rows)


NESTED = {
    "lazy outside": lambda inner: at.lazy(master_weights(inner)),
    "lazy inside": lambda inner: master_weights(at.lazy(inner)),
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("apply", ["ours", "optax"])
def test_lazy_masters_are_a_lazy_float32_run(
    nested: str, apply: str, relaxed_promotion: None
) -> None:
    inner = optax.chain(optax.add_decayed_weights(0.1), at.scale_by_adam(), optax.scale(-1e-3))
    params = {"table": jnp.ones((20, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    gradients = [
        {"table": rows_of(i, 20), "bias": jnp.asarray(normal(i, 3), jnp.bfloat16)}
        for i in range(30)
    ]
    if nested == "lazy outside":  # it sums repeated rows in the gradient's precision
        gradients = [{**g, "table": g["table"].sum_duplicates()} for g in gradients]
    wide = [
        {"table": g["table"].with_values(g["table"].values.astype(jnp.float32)),
         "bias": g["bias"].astype(jnp.float32)}
        for g in gradients
    ]  # fmt: skip
    trained, state = train(NESTED[nested](inner), params, gradients, APPLY[apply])
    (found,) = trees.find_states(state, MasterWeightsState)
    expected, _ = train(at.lazy(inner), in_float32(params), wide)
    assert_close(found.master, expected, rtol=1e-6)
    assert_rounded(trained, found.master)


@pytest.mark.parametrize("nested", NESTED)
def test_untouched_rows_stay_bit_identical(nested: str) -> None:
    params = {"table": jnp.asarray(normal(0, 20, 3), jnp.bfloat16)}
    tx = NESTED[nested](at.scale_by_adam())
    state = tx.init(params)
    rows = at.SparseRows(jnp.array([3, 20, 7]), jnp.ones((3, 3), jnp.bfloat16), 20)
    updates, new_state = jax.jit(tx.update)({"table": rows}, state, params)
    others = np.setdiff1d(np.arange(20), [3, 7])
    new_params = at.apply_updates(params, updates)
    for old, new in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((new_params, new_state)), strict=True
    ):
        if old.shape[:1] == (20,):
            assert_bits_equal(new[others], old[others])
            assert np.all(new[np.array([3, 7])] != old[np.array([3, 7])])


@pytest.mark.parametrize("nested", NESTED)
def test_rows_changed_by_other_code_start_anew_when_updated(nested: str) -> None:
    params = {"table": jnp.ones((4, 1), jnp.bfloat16)}
    tx = NESTED[nested](optax.sgd(1e-3))
    g = {"table": at.SparseRows(jnp.array([0, 1]), jnp.ones((2, 1), jnp.bfloat16), 4)}
    params, state = train(tx, params, [g])
    params = {"table": params["table"].at[1].set(5.0)}
    _, state = jax.jit(tx.update)(g, state, params)
    (found,) = trees.find_states(state, MasterWeightsState)
    np.testing.assert_allclose(found.master["table"][:, 0], [0.998, 4.999, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("nested", NESTED)
def test_row_step_makes_no_array_of_the_tables_size(nested: str) -> None:
    num_rows = 200_000
    tx = NESTED[nested](at.scale_by_adam())

    def step(params: Any, state: Any, rows: Any) -> Any:
        updates, state = tx.update({"table": rows}, state, params)
        return updates, state

    params = {"table": jax.ShapeDtypeStruct((num_rows, 8), jnp.bfloat16)}
    rows = at.SparseRows(jnp.zeros(64, jnp.int32), jnp.zeros((64, 8), jnp.bfloat16), num_rows)
    step = jax.jit(step, donate_argnums=1)
    compiled = step.lower(params, jax.eval_shape(tx.init, params), rows).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < num_rows * 8


# ---- among others -------------------------------------------------------------------------------


def test_outermost_takes_a_whole_optimizer(relaxed_promotion: None) -> None:
    """Held steps, skipped steps and scaled gradients of half precision leave it the float32 run."""
    inner = at.adamw(1e-2, clip_global_norm=1.0, accumulate_every=2, loss_scale="dynamic")
    params = tree(0, "float16")
    gradients = [tree(seed, "float16", 100.0) for seed in range(1, 9)]
    poisoned = jax.tree.map(lambda x: x.at[0].set(jnp.inf), gradients[3])
    gradients.insert(3, poisoned)
    tx = master_weights(inner)
    trained, state = train(tx, params, gradients)
    expected, inner_state = train(inner, in_float32(params), in_float32(gradients))
    assert_close(state.master, expected, rtol=1e-5)
    assert int(state.inner_state.skipped) == 1
    assert_rounded(trained, state.master)
    assert float(at.scale_loss(1.0, state)) == float(at.scale_loss(1.0, inner_state))


WRAPPERS: dict[str, Any] = {
    "skipping": at.skip_nonfinite,
    "accumulated": lambda inner: at.accumulate(inner, 2),
    "static loss scale": lambda inner: at.static_loss_scale(inner, 8.0),
    "loss scale": lambda inner: at.dynamic_loss_scale(at.accumulate(inner, 2), 8.0),
    "masked": lambda inner: optax.masked(inner, {"kernel": True, "bias": True}),
    "by path": lambda inner: at.by_path([("kernel", inner)], inner),
}


@pytest.mark.parametrize(
    "name", in_tiers(WRAPPERS, lambda name: name in ("loss scale", "masked", "by path"))
)
def test_inside_other_wrappers_parameters_stay_the_masters_rounded(
    name: str, relaxed_promotion: None
) -> None:
    """Also with gradients in the parameters' precision, while steps change them by less than half;
    the masters are then those of the float32 run in the same wrappers."""
    params = tree(0, "bfloat16")
    params = jax.tree.map(lambda x: jnp.sign(x) * (1 + jnp.abs(x)), params)
    gradients = [tree(seed, "bfloat16") for seed in range(1, 41)]
    inner, wrap = at.adam(1e-3), WRAPPERS[name]
    trained, state = train(wrap(master_weights(inner)), params, gradients)
    expected, _ = train(wrap(inner), in_float32(params), in_float32(gradients))
    for found in trees.find_states(state, MasterWeightsState):
        for path, master in trees.flatten_with_paths(found.master)[0]:
            if isinstance(master, jax.Array):
                assert_rounded(trained[path], master)
                assert_close(master, expected[path], rtol=1e-6)


def test_average_inside_is_of_the_masters_and_after_of_the_parameters(
    relaxed_promotion: None,
) -> None:
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    gradients = [{"w": jnp.ones(4, jnp.bfloat16)}] * 3
    inside = master_weights(optax.chain(optax.sgd(1e-3), at.params_ema(0.5)))
    after = optax.chain(master_weights(optax.sgd(1e-3)), at.params_ema(0.5))
    _, state = train(inside, params, gradients)
    average = 0.25 * 0.999 + 0.25 * 0.998 + 0.5 * 0.997
    np.testing.assert_allclose(at.ema_params(state)["w"], average, rtol=1e-6)
    _, state = train(after, params, gradients)
    rounded = [float(jnp.bfloat16(x)) for x in (0.999, 0.998, 0.997)]
    average = 0.25 * rounded[0] + 0.25 * rounded[1] + 0.5 * rounded[2]
    np.testing.assert_allclose(at.ema_params(state)["w"], average, rtol=1e-6)


def test_a_flushed_cycle_reaches_the_rounded_master() -> None:
    """By a step that moves the parameter by more than half: its update is not in bfloat16."""
    params = jnp.asarray(normal(0, 50), jnp.bfloat16)
    tx = master_weights(at.accumulate(optax.scale(-0.7), every=2))
    gradients = jnp.asarray(normal(1, 50), jnp.bfloat16)
    _, state = tx.update(gradients, tx.init(params), params)
    updates, state = at.flush_accumulated(tx, state, params)
    assert_bits_equal(at.apply_updates(params, updates), state.master.astype(jnp.bfloat16))


def test_average_that_overwrites_moves_the_masters_onto_it(relaxed_promotion: None) -> None:
    inner = optax.chain(optax.sgd(0.1), at.params_ema(0.5, overwrite_every=2))
    params = tree(0, "bfloat16")
    gradients = [tree(seed, "bfloat16") for seed in (1, 2)]
    trained, state = train(master_weights(inner), params, gradients)
    np.testing.assert_allclose(state.master["bias"], at.ema_params(state)["bias"], rtol=1e-5)
    assert_rounded(trained, state.master)


def test_masters_are_sharded_like_the_parameters() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    params = {"kernel": jax.device_put(tree(0, "bfloat16")["kernel"], sharding)}
    tx = master_weights(at.scale_by_adam())
    with jax.set_mesh(mesh):
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(params, state, params)
        at.apply_updates(params, updates)
        for x in jax.tree.leaves((state.master, new_state.master, updates)):
            assert x.sharding.spec[0] == "x"


# ---- errors -------------------------------------------------------------------------------------


def test_update_needs_params() -> None:
    tx = master_weights(optax.sgd(0.1))
    with pytest.raises(ValueError, match="master_weights.*needs params"):
        tx.update(jnp.ones(1, jnp.bfloat16), tx.init(jnp.ones(1, jnp.bfloat16)))


def test_parameter_cast_down_after_init_is_refused_by_path() -> None:
    tx = master_weights(optax.sgd(0.1))
    state = tx.init(tree(0, "float32"))
    with pytest.raises(ValueError, match="'bias' is bfloat16 and has no master"):
        tx.update(tree(1, "bfloat16"), state, tree(0, "bfloat16"))


def test_eight_bit_parameter_is_refused_by_path() -> None:
    params = {"w": jnp.ones(2, jnp.float8_e4m3fn)}
    with pytest.raises(TypeError, match="'w' is float8_e4m3fn"):
        master_weights(optax.sgd(0.1)).init(params)


def test_deferred_table_is_refused_only_in_low_precision() -> None:
    tx = master_weights(at.deferred_adam(1e-3, tables="table", max_idle=300))
    params = {"table": jnp.ones((4, 2)), "bias": jnp.ones(2, jnp.bfloat16)}
    tx.init(params)
    params["table"] = params["table"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="'table' is a table of deferred_adam.*float32"):
        tx.init(params)


def test_inner_must_be_a_transformation() -> None:
    with pytest.raises(TypeError, match="inner.*call the factory first"):
        master_weights(at.adam)  # type: ignore[arg-type]
