# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, normal, x64

import adam_transforms as at

KEY = jax.random.key(0)
LOW = ["bfloat16", "float16"]


@functools.cache
def jitted():
    return jax.jit(at.apply_updates)


def stochastic(params, updates, key=KEY):
    return jitted()(params, updates, key=key)


# The sum


def test_float32_parameters_are_updated_as_optax_does():
    params, updates = ({"a": jnp.asarray(normal(s, 4, 3)), "b": [normal(s + 1)]} for s in (0, 2))
    expected = jax.tree.map(jnp.asarray, optax.apply_updates(params, updates))
    assert_bits_equal(at.apply_updates(params, updates), expected)
    assert_bits_equal(stochastic(params, updates), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("update", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("key", [None, KEY])
def test_the_dtype_of_the_parameter_is_kept(dtype, update, key):
    with x64():
        params, updates = jnp.ones(2, dtype), jnp.full(2, 2.0, update)
        result = at.apply_updates(params, updates, key=key)
        assert result.dtype == dtype
        assert result.tolist() == [3.0, 3.0]


def test_a_weak_update_makes_no_weak_parameter():
    params = jnp.array(1.0, jnp.float32)
    assert not params.weak_type
    result = at.apply_updates(params, jnp.asarray(2.0))
    assert not result.weak_type
    assert float(result) == 3.0


@pytest.mark.parametrize("dtype", LOW)
def test_the_sum_is_rounded_once(dtype):
    gap = float(jnp.finfo(dtype).eps)
    # A little more than half a gap; rounded to the parameter's dtype first it would be half.
    update = jnp.array(gap / 2 * (1 + gap / 4), jnp.float32)
    assert float(update.astype(dtype)) == gap / 2
    assert float(at.apply_updates(jnp.ones((), dtype), update)) == 1.0 + gap


def test_a_float16_sum_is_taken_in_float32():
    params, update = jnp.array(60_000.0, jnp.float16), jnp.array(-70_000.0, jnp.float32)
    assert float(at.apply_updates(params, update)) == -10_000.0


def test_numpy_parameters_and_python_numbers_become_arrays():
    params = {"a": np.ones(2, np.float32), "b": 1.5, "c": np.float32(2.0)}
    updates = {"a": np.full(2, 0.5, np.float32), "b": 0.25, "c": 1.0}
    result = at.apply_updates(params, updates)
    assert all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in result.values())
    assert (result["a"].tolist(), float(result["b"]), float(result["c"])) == ([1.5] * 2, 1.75, 3.0)
    assert params["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("key", [None, KEY])
def test_integer_parameters_are_updated_exactly(key):
    large = 2**24 + 1  # no float32
    params, updates = jnp.array([large, 0]), jnp.array([2, -1])
    result = at.apply_updates(params, updates, key=key)
    assert result.dtype == params.dtype
    assert result.tolist() == [large + 2, -1]


# None


@pytest.mark.parametrize("key", [None, KEY])
def test_none_on_either_side_leaves_the_parameter(key):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": None, "c": None, "d": jnp.ones(1)}
    updates = {"a": None, "b": jnp.ones(1), "c": None, "d": jnp.ones(1)}
    result = at.apply_updates(params, updates, key=key)
    assert result["a"] is params["a"]
    assert result["b"] is None
    assert result["c"] is None
    assert result["d"].tolist() == [2.0]


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("tree", [{}, (), None, {"a": [], "b": ()}])
def test_empty_trees_stay_empty(tree, key):
    assert at.apply_updates(tree, tree, key=key) == tree


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("dtype", [*LOW, "float32"])
def test_empty_and_scalar_leaves_are_updated(dtype, key):
    params = [jnp.zeros((0, 3), dtype), jnp.ones((), dtype)]
    empty, scalar = at.apply_updates(params, params, key=key)
    assert (empty.shape, empty.dtype) == ((0, 3), dtype)
    assert (float(scalar), scalar.dtype) == (2.0, dtype)


# Stochastic rounding


def test_small_steps_move_bfloat16_parameters_only_with_a_key():
    params, updates = jnp.ones(20_000, jnp.bfloat16), jnp.full(20_000, 1e-3)
    nearest, rounded = params, params
    for step in range(10):
        nearest = jitted()(nearest, updates)
        rounded = stochastic(rounded, updates, jax.random.key(step))
    assert np.all(np.asarray(nearest, np.float32) == 1.0)
    # A step of 1e-3 in a gap of 2^-7 has a deviation of 2.6e-3: 6e-5 for the mean of ten steps.
    assert abs(np.mean(np.asarray(rounded, np.float64)) - 1.01) < 3e-4


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_is_right_on_average(dtype, sign):
    n, gap = 60_000, float(jnp.finfo(dtype).eps)
    params = jnp.full(n, sign, dtype)
    result = np.asarray(stochastic(params, jnp.full(n, sign * gap / 4)), np.float64)
    assert set(np.unique(result)) == {sign, sign * (1 + gap)}
    deviation = gap * (0.25 * 0.75 / n) ** 0.5
    assert abs(np.mean(result) - sign * (1 + gap / 4)) < 5 * deviation


@pytest.mark.parametrize("dtype", LOW)
def test_sums_that_the_dtype_represents_are_exact_with_any_key(dtype):
    params = jnp.asarray(normal(0, 50)).astype(dtype)
    for seed in range(3):
        key = jax.random.key(seed)
        assert_bits_equal(stochastic(params, jnp.zeros(50), key), params)
        assert_bits_equal(stochastic(params, params, key), params * 2)


def test_leaves_and_keys_draw_independently():
    params = {"a": jnp.ones(100, jnp.bfloat16), "b": jnp.ones(100, jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-8), params)
    first, again, other = (stochastic(params, updates, jax.random.key(s)) for s in (0, 0, 1))
    assert_bits_equal(first, again)
    assert np.any(first["a"] != first["b"])
    assert np.any(first["a"] != other["a"])


def test_only_low_precision_parameters_use_the_key():
    params = {"f": jnp.asarray(normal(0, 50)), "z": jnp.asarray(normal(1, 50, dtype=np.complex64))}
    updates = jax.tree.map(lambda p: p * 1e-3, params)
    assert_bits_equal(stochastic(params, updates), jitted()(params, updates))


def test_values_that_are_not_finite_or_overflow_round_as_without_a_key():
    params = jnp.array([65_504.0, 65_504.0, 1.0, jnp.inf, 1.0], jnp.float16)
    updates = jnp.array([1.0, 1e6, jnp.nan, 1.0, -jnp.inf], jnp.float32)
    for seed in range(5):
        result = stochastic(params, updates, jax.random.key(seed))
        np.testing.assert_array_equal(result, [65_504.0, np.inf, np.nan, np.inf, -np.inf])


def test_old_style_keys_work_too():
    params, updates = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 2.0**-8)
    result = stochastic(params, updates, jax.random.PRNGKey(0))
    assert set(np.asarray(result, np.float64)) == {1.0, 1.0 + 2.0**-7}


# Rows


def rows_of(indices, values):
    return at.SparseRows(jnp.asarray(indices), values, 4)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_are_rounded_right_on_average(dtype, sign):
    """Duplicates together: each alone has another chance to move its row."""
    n, gap = 60_000, float(jnp.finfo(dtype).eps)
    rows = rows_of([2, 4, 0, 2, -1], jnp.full((5, n), sign * gap / 8))
    rows = rows.with_values(rows.values.at[2].set(sign * gap / 4))
    before = jnp.full((4, n), sign, dtype)
    result = np.asarray(stochastic(before, rows), np.float64)
    assert (result[1] == sign).all() and (result[3] == sign).all()
    deviation = gap * (0.25 * 0.75 / n) ** 0.5
    for row in (result[0], result[2]):
        assert set(np.unique(row)) == {sign, sign * (1 + gap)}
        assert abs(np.mean(row) - sign * (1 + gap / 4)) < 5 * deviation
    assert np.any(result[0] != result[2])


def test_rows_of_a_key_are_its_own():
    rows = rows_of([2, 0], jnp.full((2, 200), 2.0**-8))
    params, updates = [jnp.ones((4, 200), jnp.bfloat16)] * 2, [rows, rows]
    first, again, other = (stochastic(params, updates, jax.random.key(s)) for s in (0, 0, 1))
    assert_bits_equal(first, again)
    assert np.any(first[0] != first[1])
    assert np.any(first[0] != other[0])


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_rows_of_wide_tables_do_not_use_the_key(dtype):
    rows = rows_of([2, 0, 2], normal(0, 3, 5))
    params = jnp.asarray(normal(1, 4, 5)).astype(dtype)
    assert_bits_equal(stochastic(params, rows), jitted()(params, rows))


def test_duplicates_of_low_precision_rows_are_summed_in_float32():
    """In bfloat16 1 + 3 * 2^-9 is 1 + 2^-7, and 2^-9 less would round to 1 + 2^-7 - 2^-8."""
    values = jnp.array([[1.0], [2**-9], [2**-9], [2**-9]], jnp.bfloat16)
    rows = rows_of([0, 0, 0, 0], values)
    result = at.apply_updates(jnp.full((4, 1), -1.0, jnp.bfloat16), rows)
    assert float(result[0, 0]) == 3 * 2**-9


def test_rounding_rows_takes_memory_for_the_rows_alone():
    # In bfloat16 XLA before jax 0.12 widens the whole table on a CPU, with a key or without.
    rows, table = at.SparseRows(jnp.arange(8), jnp.ones((8, 16)), 10_000), jnp.ones((10_000, 16))
    step = jax.jit(at.apply_updates, donate_argnums=0)
    lowered = step.lower(table.astype(jnp.float16), rows, key=KEY)
    memory = lowered.compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 10_000


# Errors


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a": np.ones(2, "f")}, "'b/0' is only in the parameters"),
        ({"a": np.ones(2, "f"), "b": [np.ones(1, "f")], "c": 1.0}, "'c' is only in the updates"),
        (
            {"a": np.ones(3, "f"), "b": [np.ones(1, "f")]},
            r"'a' has shape \[2\] in the parameters, but \[3\] in the updates",
        ),
        (
            {"a": np.ones(2, "f"), "b": [np.ones((), "f")]},
            r"'b/0' has shape \[1\] in the parameters, but \[\] in the updates",
        ),
    ],
)
def test_updates_that_differ_from_the_parameters_are_refused_by_path(updates, message, key):
    params = {"a": np.ones(2, np.float32), "b": [np.ones(1, np.float32)]}
    with pytest.raises(ValueError, match=message):
        at.apply_updates(params, updates, key=key)


def test_complex_updates_of_a_real_parameter_are_refused_by_path():
    with pytest.raises(TypeError, match="'a'.*float32 .*complex"):
        at.apply_updates({"a": jnp.ones(1)}, {"a": jnp.ones(1, jnp.complex64)})


# The whole step


def loss_value_scales_the_update():
    """A transformation that needs an extra argument."""

    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: -value * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
    ("tx", "has_rows", "extra_args"),
    [
        (optax.sgd(0.1, momentum=0.9), False, {}),
        (at.lazy_adam(0.1, weight_decay=0.1), True, {}),
        (at.deferred_adam(0.1, tables="table"), True, {}),
        (loss_value_scales_the_update(), False, {"value": 0.3}),
    ],
    ids=["optax", "lazy", "deferred", "extra"],
)
def test_a_whole_step_is_update_and_apply_updates(tx, has_rows, extra_args):
    params = {"table": jnp.asarray(normal(0, 4, 3)), "w": jnp.ones(50, jnp.bfloat16)}
    state = tx.init(params)
    rows = at.SparseRows(jnp.array([2, 0, 2]), normal(1, 3, 3), 4, synchronized=True)
    table = rows if has_rows else rows.to_dense()
    grads = {"table": table, "w": jnp.asarray(normal(2, 50)).astype(jnp.bfloat16)}

    def apart(params, state):
        updates, state = tx.update(grads, state, params, **extra_args)
        return at.apply_updates(params, updates, key=KEY), state

    def at_once(params, state):
        return at.update_and_apply(tx, grads, state, params, key=KEY, **extra_args)

    expected = actual = params, state
    for step, step_at_once in [(jax.jit(apart), jax.jit(at_once))] * 2:
        expected, actual = step(*expected), step_at_once(*actual)
    assert_bits_equal(actual, expected)
    assert np.any(actual[0]["w"] != params["w"])


def test_a_whole_step_takes_a_transformation():
    with pytest.raises(TypeError, match="tx must be .*GradientTransformation.*call the factory"):
        at.update_and_apply(optax.adam, jnp.ones(1), (), jnp.ones(1))
