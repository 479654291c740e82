import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import x64

import adam_transforms as at
from adam_transforms._core import dtypes
from adam_transforms._transforms import numerics

DECAYS = [0.0, 0.1, 0.5, 0.9, 0.999, 0.999999]
LOW = [jnp.float16, jnp.bfloat16]


# Moving averages


@functools.cache
def jitted_average():
    return jax.jit(numerics.moving_average)


def average_with(kind, average, x, decay):
    """The moving average, with the decay a Python float, an array, or traced."""
    if kind == "python":
        return numerics.moving_average(average, x, decay)
    decay = jnp.asarray(decay, jnp.float32)
    return (jitted_average() if kind == "traced" else numerics.moving_average)(average, x, decay)


@pytest.mark.parametrize("kind", ["python", "array", "traced"])
@pytest.mark.parametrize("decay", DECAYS)
def test_moving_average_is_right_to_rounding(kind, decay):
    rng = np.random.default_rng(0)
    average, x = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    result = average_with(kind, jnp.asarray(average), jnp.asarray(x), decay)
    decay = np.float64(decay if kind == "python" else np.float32(decay))
    exact = decay * average.astype(np.float64) + (1 - decay) * x
    assert result.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(result, np.float64) - exact)) < 4e-7


@pytest.mark.parametrize("kind", ["python", "array", "traced"])
def test_moving_average_with_decay_zero_forgets_exactly(kind):
    average, x = jnp.array([1e8, -3.0]), jnp.array([1e-3, 7e-9])
    assert average_with(kind, average, x, 0.0).tolist() == x.tolist()


@pytest.mark.parametrize("kind", ["python", "array", "traced"])
@pytest.mark.parametrize("decay", DECAYS)
def test_moving_average_of_a_constant_is_that_constant(kind, decay):
    x = jnp.array([1.0, -0.1, 3e8, 0.0])
    result = average_with(kind, x, x, decay)
    np.testing.assert_allclose(result, x, rtol=1.2e-7 if 0 < decay < 0.5 else 0)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.999, 0.9999, 0.999999])
def test_moving_average_does_not_drift_from_float64(decay, offset):
    xs = (np.random.default_rng(1).standard_normal((10_000, 16)) + offset).astype(np.float32)

    def step(average, x):
        average = numerics.moving_average(average, x, decay)
        return average, average

    ours = np.asarray(jax.lax.scan(step, jnp.zeros(16), jnp.asarray(xs))[1], np.float64)
    exact, average = [], np.zeros(16)
    for x in xs.astype(np.float64):
        average = decay * average + (1 - decay) * x
        exact.append(average)
    # The textbook form in float32 is off by 1e-5 at 0.999 and 5e-5 at 0.9999.
    assert np.max(np.abs(ours - exact)) < 5e-6 * np.max(np.abs(exact))


@pytest.mark.parametrize("decay", [0.25, 0.75])
@pytest.mark.parametrize("kind", ["python", "array"])
def test_moving_average_of_complex_values(decay, kind):
    average, x = jnp.array([4 + 8j], jnp.complex64), jnp.array([-8 + 16j], jnp.complex64)
    result = average_with(kind, average, x, decay)
    assert result.dtype == jnp.complex64
    assert result.tolist() == [decay * (4 + 8j) + (1 - decay) * (-8 + 16j)]


# Bias correction


@pytest.mark.parametrize("decay", DECAYS)
def test_bias_correction_is_right_to_rounding(decay):
    counts = np.array([1, 2, 3, 10, 100, 1000, 10**4, 10**5, 10**6])
    result = numerics.bias_correction(decay, jnp.asarray(counts, jnp.int32))
    exact = 1 - np.float64(decay) ** counts
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=3e-7)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_bias_correction_of_an_array_is_right_for_the_value_it_holds(decay, traced):
    decay = jnp.asarray(decay, jnp.float32)
    counts = jnp.array([1, 2, 10, 1000, 10**6], jnp.int32)
    correct = jax.jit(numerics.bias_correction) if traced else numerics.bias_correction
    exact = 1 - np.float64(np.float32(decay)) ** np.asarray(counts)
    np.testing.assert_allclose(np.asarray(correct(decay, counts), np.float64), exact, rtol=3e-7)


@pytest.mark.parametrize(("decay", "off_by"), [(0.999, 1.3e-5), (0.999999, 1.3e-2)])
def test_the_literal_form_and_float32_decays_have_the_documented_error(decay, off_by):
    first = jnp.ones((), jnp.int32)
    exact = 1 - decay

    def error(value):
        return abs(float(value) - exact) / exact

    literal = np.float32(1) - np.float32(decay) ** np.float32(1)
    assert 0.9 * off_by < error(literal) < 1.1 * off_by
    assert 0.9 * off_by < error(numerics.bias_correction(jnp.float32(decay), first)) < 1.1 * off_by
    assert error(numerics.bias_correction(decay, first)) < 3e-7


def test_bias_correction_is_float64_in_x64_mode():
    with x64():
        counts = jnp.array([1, 10, 10**6])
        for decay in (0.999999, jnp.array(0.999999)):
            result = numerics.bias_correction(decay, counts)
            assert result.dtype == jnp.float64
            exact = 1 - np.float64(0.999999) ** np.array([1, 10, 10**6])
            np.testing.assert_allclose(result, exact, rtol=1e-9)


def test_increment_stays_at_the_largest_integer():
    largest = np.iinfo(np.int32).max
    counts = jnp.array([0, 41, largest - 1, largest], jnp.int32)
    assert [int(numerics.increment(c)) for c in counts] == [1, 42, largest, largest]


# Hyperparameters


def test_a_hyperparameter_is_read_at_the_count():
    count = jnp.array(3, jnp.int32)
    assert numerics.at_count(0.5, count) == 0.5
    assert int(numerics.at_count(lambda t: 2 * t, count)) == 6


# Norms


def test_global_norm_of_70_000_float16_ones_is_finite_and_right():
    norm = at.global_norm({"w": jnp.ones(70_000, jnp.float16)})
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, 70_000**0.5, rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, (), None, {"a": None}, {"a": jnp.zeros((0, 3))}])
def test_global_norm_of_nothing_is_zero(tree):
    norm = at.global_norm(tree)
    assert (norm.shape, norm.dtype, float(norm)) == ((), jnp.float32, 0.0)


def test_global_norm_is_over_all_elements_of_all_leaves():
    rng = np.random.default_rng(2)
    tree = {
        "half": rng.standard_normal(5).astype(np.float16),
        "single": rng.standard_normal((3, 4)).astype(np.float32),
        "complex": (rng.standard_normal(6) + 1j * rng.standard_normal(6)).astype(np.complex64),
        "scalar": np.float32(-2.0),
        "empty": np.zeros((2, 0), np.float32),
    }
    norm = at.global_norm({**jax.tree.map(jnp.asarray, tree), "none": None, "nested": [(None,)]})
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, reference.global_norm(tree), rtol=1e-6)


def test_global_norm_counts_python_and_numpy_leaves():
    assert float(at.global_norm([3.0, np.array([4.0], np.float32), None])) == 5.0


def test_global_norm_of_float64_is_float64():
    with x64():
        norm = at.global_norm([jnp.full(3, 1e200, jnp.float64) / 1e100, jnp.ones(1, jnp.float32)])
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, 3**0.5 * 1e100, rtol=1e-14)


def test_global_norm_shows_a_nan():
    assert np.isnan(at.global_norm([jnp.ones(3), jnp.array([1.0, jnp.nan])]))


# Finiteness


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 7, 32])
def test_all_finite_finds_every_kind_of_bad_value_anywhere(dtype, bad, position):
    x = jnp.linspace(-60_000.0, 60_000.0, 33).astype(dtype)
    assert numerics.all_finite([x])
    assert not numerics.all_finite([jnp.ones(2), x.at[position].set(bad)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1,), (100, 10), (50_000,), (20_000, 64)], ids=str)
def test_all_finite_finds_one_bad_value_in_arrays_of_any_size(shape, dtype, bad):
    """XLA reduces large arrays by other code than small ones, and its maximum may lose a NaN."""
    x = jnp.ones(shape, dtype)
    bad = x.at[tuple(size // 2 for size in shape)].set(bad)
    finite = jax.jit(numerics.all_finite)
    assert finite({"w": x})
    assert not finite({"w": bad})
    assert not finite({"t": at.SparseRows(jnp.zeros(shape[0], jnp.int32), bad, 3)})


@pytest.mark.parametrize("bad", [complex(np.nan, 0), complex(0, np.nan), complex(0, -np.inf)])
def test_all_finite_sees_both_parts_of_a_complex_value(bad):
    assert numerics.all_finite([jnp.array([1 + 2j], jnp.complex64)])
    assert not numerics.all_finite([jnp.array([1 + 2j, bad], jnp.complex64)])


@pytest.mark.parametrize("shape", [(), (1, 1), (2,), (5, 3)], ids=str)
def test_all_finite_takes_the_largest_float_for_finite(shape):
    largest = jnp.full(shape, jnp.finfo(jnp.float32).max)
    assert jax.jit(numerics.all_finite)([largest])
    assert jax.jit(numerics.all_finite)([jax.lax.complex(largest, -largest)])


@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": jnp.zeros(0), "b": jnp.zeros((3, 0))}])
def test_all_finite_of_nothing_is_true(tree):
    result = numerics.all_finite(tree)
    assert (result.shape, result.dtype, bool(result)) == ((), jnp.bool_, True)


def test_all_finite_is_not_misled_by_an_empty_leaf():
    assert not numerics.all_finite([jnp.zeros(0), jnp.array(jnp.inf), jnp.zeros((2, 0))])


# Stochastic rounding


@functools.cache
def rounded(dtype):
    return jax.jit(lambda x, key: dtypes.round_stochastically(x, dtype, key))


def as_float(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("dtype", LOW)
def test_every_representable_value_is_kept_bit_for_bit(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(np.dtype(dtype))
    wide = jnp.asarray(values.astype(np.float32))
    is_nan = np.isnan(values.astype(np.float32))
    result = np.asarray(rounded(dtype)(wide, jax.random.key(0)))
    assert result.dtype == dtype
    assert np.array_equal(result.view(np.uint16)[~is_nan], bits[~is_nan])
    assert np.all(np.isnan(result[is_nan].astype(np.float32)))


@pytest.mark.parametrize("dtype", LOW)
def test_a_value_comes_out_as_one_of_its_two_neighbours(dtype):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(4000) * 10.0 ** rng.uniform(-9, 4, 4000)).astype(np.float32)
    nearest = x.astype(dtype)
    infinity = np.array(np.inf, dtype)
    below = np.where(nearest.astype(np.float32) <= x, nearest, np.nextafter(nearest, -infinity))
    above = np.where(nearest.astype(np.float32) >= x, nearest, np.nextafter(nearest, infinity))
    seen_below, seen_above = np.zeros(4000, bool), np.zeros(4000, bool)
    for seed in range(8):
        result = np.asarray(rounded(dtype)(jnp.asarray(x), jax.random.key(seed)))
        assert np.all((result == below) | (result == above))
        seen_below |= result == below
        seen_above |= result == above
    assert np.mean(seen_below) > 0.8
    assert np.mean(seen_above) > 0.8


@pytest.mark.parametrize(
    ("dtype", "by"), [("bfloat16", "reduce_precision"), ("float16", "optimization_barrier")]
)
def test_rounding_is_said_in_a_way_that_no_compiler_leaves_out(dtype, by):
    """XLA for GPUs drops a cast to 16 bits and back."""
    x = jnp.float32(1.0 + 2.0**-9 + 2.0**-12)
    assert float(dtypes.round_to(x, dtype)) == float(x.astype(dtype))
    assert by in str(jax.make_jaxpr(lambda x: dtypes.round_to(x, dtype))(x))
    assert dtypes.round_to(x, jnp.float32) is x


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("dtype", "base", "gap"),
    [
        (jnp.bfloat16, 1.0, 2.0**-7),
        (jnp.float16, 1.0, 2.0**-10),
        (jnp.bfloat16, 2.0 - 2.0**-7, 2.0**-7),  # across a power of two
        (jnp.float16, 0.0, 2.0**-24),  # below the smallest subnormal
        (jnp.float16, 5 * 2.0**-24, 2.0**-24),
    ],
)
def test_the_expected_result_is_the_value_itself(dtype, base, gap, fraction, sign):
    n = 65_536
    x = np.float32(sign * (base + fraction * gap))
    result = as_float(rounded(dtype)(jnp.full(n, x), jax.random.key(4)))
    deviation = gap * (fraction * (1 - fraction) / n) ** 0.5
    assert abs(np.mean(result) - np.float64(x)) < 5 * deviation
    assert set(np.abs(result)) == {base, base + gap}


def test_rounding_in_bfloat16_subnormals_gives_a_neighbour():
    smallest = 2.0**-133
    result = as_float(
        rounded(jnp.bfloat16)(jnp.full(100, np.float32(2.25 * smallest)), jax.random.key(5))
    )
    assert set(result) <= {2 * smallest, 3 * smallest}


@pytest.mark.parametrize("dtype", LOW)
def test_values_beyond_the_range_round_as_nearest_rounding_does(dtype):
    largest = float(jnp.finfo(dtype).max)
    half_a_gap = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(largest)) / 2
    x = np.array([largest + 0.9 * half_a_gap, largest + half_a_gap, np.inf, np.nan], np.float32)
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        nearest = x.astype(dtype)
    for seed in range(20):
        result = np.asarray(rounded(dtype)(jnp.asarray(x), jax.random.key(seed)))
        np.testing.assert_array_equal(as_float(result), as_float(nearest))


# Dtypes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), jnp.float32),
        ((jnp.bfloat16,), jnp.float32),
        ((jnp.float16, jnp.bfloat16), jnp.float32),
        ((jnp.float64, jnp.bfloat16), jnp.float64),
        ((jnp.complex64, jnp.float16), jnp.complex64),
        ((jnp.complex64, jnp.float64), jnp.complex128),
    ],
)
def test_compute_dtype_is_the_promotion_and_at_least_float32(given, expected):
    with x64():
        assert dtypes.compute_dtype(*given) == expected


def test_promotion_works_whatever_mode_is_set():
    for mode in ("strict", "standard"):
        with jax.numpy_dtype_promotion(mode):
            assert dtypes.promote(jnp.bfloat16, jnp.float16) == jnp.float32
            assert dtypes.promote(jnp.bfloat16, jnp.bfloat16) == jnp.bfloat16


def test_real_dtype_is_that_of_the_absolute_value():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        assert dtypes.real_dtype(dtype) == dtype
    assert dtypes.real_dtype(jnp.complex64) == jnp.float32
    assert dtypes.real_dtype(jnp.complex128) == jnp.float64


def test_scalars_are_as_wide_as_jax_is_configured():
    assert dtypes.scalar_dtype() == jnp.float32
    with x64():
        assert dtypes.scalar_dtype() == jnp.float64


def test_as_scalar_leaves_python_numbers_and_casts_arrays():
    assert type(dtypes.as_scalar(2)) is float
    assert dtypes.as_scalar(jnp.array(2, jnp.int32)).dtype == jnp.float32
    assert dtypes.as_scalar(np.float32(0.5), jnp.bfloat16).dtype == jnp.bfloat16


def test_store_refuses_to_drop_an_imaginary_part():
    with pytest.raises(TypeError, match="'a/b'.*float32 .*complex64"):
        dtypes.store("a/b", jnp.array([1j], jnp.complex64), np.dtype(np.float32))


def test_store_gives_a_real_value_in_a_complex_slot_a_zero_imaginary_part():
    stored = dtypes.store("a/b", jnp.array([2.5]), jnp.complex64)
    assert stored.dtype == jnp.complex64
    assert stored.tolist() == [2.5 + 0j]


def test_scale_and_squares_of_complex_values():
    x = jnp.array([3 - 4j], jnp.complex64)
    assert dtypes.scale(x, jnp.float32(0.5)).tolist() == [1.5 - 2j]
    assert dtypes.scale(x, 0.5).dtype == jnp.complex64
    assert dtypes.abs_sq(x).tolist() == [25.0]
    assert dtypes.abs_sq(x).dtype == jnp.float32
    assert dtypes.real(x).tolist() == [3.0]
