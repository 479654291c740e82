# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import as_numpy, assert_bits_equal, assert_close, normal, x64

import adam_transforms as at

FACTORIES = {
    "clip_by_value": (at.clip_by_value, reference.clip_by_value, "limit"),
    "clip_by_norm": (at.clip_by_norm, reference.clip_by_norm, "max_norm"),
    "clip_by_global_norm": (at.clip_by_global_norm, reference.clip_by_global_norm, "max_norm"),
}
by_norm = pytest.mark.parametrize("factory", [at.clip_by_norm, at.clip_by_global_norm])
every_factory = pytest.mark.parametrize("name", FACTORIES)


def clip(tx, gradients):
    updates, state = tx.update(gradients, tx.init(gradients))
    assert state == optax.EmptyState()
    return updates


@every_factory
@pytest.mark.parametrize("limit", [1e-3, 0.5, 2.0, 3.7, 5.0, 1e3])
def test_clipping_follows_the_reference(name, limit):
    factory, exact, _ = FACTORIES[name]
    gradients = {
        "a": normal(0, 3, 4),
        "b": normal(1, 5),
        "c": normal(2),
        "d": np.zeros((2, 0), "f"),
    }
    assert_close(clip(factory(limit), gradients), exact(gradients, limit), atol=0)


def test_clip_by_norm_takes_each_leaf_by_itself():
    gradients = {"long": jnp.array([6.0, 8.0]), "short": jnp.array([0.3, 0.4])}
    clipped = clip(at.clip_by_norm(5.0), gradients)
    assert_close(clipped["long"], np.array([3.0, 4.0]))
    assert_bits_equal(clipped["short"], gradients["short"])


def test_clip_by_global_norm_scales_all_leaves_by_one_factor():
    gradients = {"a": jnp.array([3.0]), "b": [jnp.array(4.0), jnp.zeros((0, 2))], "c": None}
    clipped = clip(at.clip_by_global_norm(2.5), gradients)
    assert_close(clipped["a"], np.array([1.5]))
    assert float(clipped["b"][0]) == 2.0
    assert clipped["b"][1].shape == (0, 2)
    assert clipped["c"] is None


# At, below and above the limit

# 1 + 2^-23, -0.0, the smallest normal, minus that, a third. (XLA flushes float32 subnormals.)
AWKWARD = np.array([0x3F800001, 0x80000000, 0x00800000, 0x80800000, 0x3EAAAAAB], np.uint32)


@every_factory
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_below_the_limit_updates_are_bit_identical(name, dtype):
    factory, _, _ = FACTORIES[name]
    gradients = {"a": jnp.asarray(AWKWARD.view(np.float32)).astype(dtype), "b": jnp.zeros(2, dtype)}
    for limit in (1.5, 1e6, 3e38):
        assert_bits_equal(clip(factory(limit), gradients), gradients)


@by_norm
def test_exactly_at_the_limit_updates_are_bit_identical(factory):
    gradients = {"a": jnp.array([3.0, -4.0])}
    assert float(at.global_norm(gradients)) == 5.0
    assert_bits_equal(clip(factory(5.0), gradients), gradients)


@by_norm
def test_just_above_the_limit_the_norm_is_the_limit(factory):
    limit = float(np.nextafter(np.float32(5.0), np.float32(0.0)))
    clipped = as_numpy(clip(factory(limit), jnp.array([3.0, -4.0])))
    np.testing.assert_allclose(clipped, [3.0, -4.0], rtol=3e-7)
    np.testing.assert_allclose(np.linalg.norm(clipped), limit, rtol=2e-7)


def test_values_at_the_limit_stay_and_values_beyond_it_become_it():
    gradients = jnp.array([-jnp.inf, -2.0, -1.5, 1.5, jnp.nextafter(1.5, 2.0), jnp.inf])
    assert clip(at.clip_by_value(1.5), gradients).tolist() == [-1.5, -1.5, -1.5, 1.5, 1.5, 1.5]


@every_factory
def test_zero_gradients_stay_zero(name):
    zeros = {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.float16)}
    assert_bits_equal(clip(FACTORIES[name][0](1e-6), zeros), zeros)


# Extremes


@by_norm
@pytest.mark.parametrize("size", [1e18, 1e10, 1e-10, 1e-18])
def test_huge_and_tiny_gradients_are_clipped_right(factory, size):
    gradients, limit = jnp.array([3.0, 4.0]) * size, size / 1000
    expected = np.array([0.6 * limit, 0.8 * limit])
    assert_close(clip(factory(limit), gradients), expected, atol=0)
    assert_close(clip(factory(size), gradients), np.array([0.6 * size, 0.8 * size]), atol=0)


@by_norm
def test_gradients_whose_squares_underflow_are_left_alone(factory):
    gradients = jnp.array([1e-30, -2e-38])
    assert_bits_equal(clip(factory(1.0), gradients), gradients)


@by_norm
def test_a_norm_beyond_float32_makes_no_nan_and_exceeds_no_limit(factory):
    clipped = clip(factory(1.0), jnp.array([1e20, -3e38]))
    assert np.all(np.abs(clipped) <= 1.0)


@by_norm
def test_a_float16_norm_beyond_float16_is_right(factory):
    gradients = jnp.full(70_000, 10.0, jnp.float16)
    clipped = clip(factory(70_000**0.5), gradients)
    assert clipped.dtype == jnp.float16
    assert_bits_equal(clipped, jnp.ones_like(gradients))


def test_a_limit_beyond_the_range_of_float16_clips_nothing():
    gradients = jnp.array([60_000.0, -3.0], jnp.float16)
    assert_bits_equal(clip(at.clip_by_value(1e6), gradients), gradients)


# Dtypes and arguments


@by_norm
def test_complex_gradients_are_scaled_by_their_absolute_value(factory):
    clipped = clip(factory(1.0), jnp.array([3 + 4j, -12j], jnp.complex64))
    assert clipped.dtype == jnp.complex64
    assert_close(clipped, np.array([3 + 4j, -12j]) / 13)


def test_the_parts_of_a_complex_gradient_are_clipped_by_value_each():
    clipped = clip(at.clip_by_value(2.0), jnp.array([3 + 1j, -1 - 7j], jnp.complex64))
    assert clipped.dtype == jnp.complex64
    assert clipped.tolist() == [2 + 1j, -1 - 2j]


@every_factory
def test_each_leaf_keeps_its_dtype(name):
    with x64():
        dtypes = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
        gradients = {dtype: jnp.full(3, 10.0, dtype) for dtype in dtypes}
        clipped = clip(FACTORIES[name][0](1.0), gradients)
        assert {k: str(g.dtype) for k, g in clipped.items()} == {k: k for k in dtypes}
        assert all(np.all(np.abs(as_numpy(g)) < 1.01) for g in clipped.values())


@every_factory
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_limit_can_be_an_array(name, dtype):
    factory, exact, _ = FACTORIES[name]
    gradients = {"a": normal(3, 6) * 4}
    clipped = clip(factory(jnp.array(2, dtype)), gradients)
    assert clipped["a"].dtype == jnp.float32
    assert_close(clipped, exact(gradients, 2.0))


@every_factory
def test_a_limit_can_be_a_tracer(name):
    factory, exact, _ = FACTORIES[name]
    gradients = {"a": normal(3, 6) * 4}
    jitted = jax.jit(lambda limit: clip(factory(limit), gradients))
    for limit in (0.5, 3.0):
        assert_close(jitted(jnp.asarray(limit)), exact(gradients, limit))


@every_factory
@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0, ValueError, "must be > 0, got 0"),
        (-1.0, ValueError, "must be > 0, got -1"),
        (np.nan, ValueError, "must be > 0, got nan"),
        (jnp.array(-2.0), ValueError, "must be > 0, got -2"),
        ("1", TypeError, "must be a number, got '1'"),
        (None, TypeError, "must be a number, got None"),
        (True, TypeError, "must be a number, got True"),
        (np.ones(2), TypeError, r"must be a number .* got float64\[2\]"),
    ],
)
def test_a_wrong_limit_is_refused_by_name(name, limit, error, message):
    factory, _, argument = FACTORIES[name]
    with pytest.raises(error, match=f"^{argument} {message}"):
        factory(limit)


@every_factory
def test_integer_gradients_are_refused_by_path(name):
    with pytest.raises(TypeError, match="update of 'a/0' must be a floating .*, got int32"):
        clip(FACTORIES[name][0](1.0), {"a": [jnp.ones(2, jnp.int32)]})


@every_factory
def test_an_empty_tree_is_no_error(name):
    assert clip(FACTORIES[name][0](1.0), {"a": ()}) == {"a": ()}


# Norms whose squares are not representable

EXTREME = [[3e30, 4e30], [3e-30, -4e-30], [1e-30] * 9, [2e19, 1.0], [3e38, 1e38], [1e-37, 0.0]]
MAX_NORMS = [1.0, 1e-8, 1e33]


@pytest.mark.parametrize("elements", EXTREME)
def test_the_global_norm_does_not_overflow_or_underflow(elements):
    halves = {"a": jnp.array(elements[:1]), "b": jnp.array(elements[1:])}
    exact = np.linalg.norm(np.array(elements, np.float32).astype(np.float64))
    np.testing.assert_allclose(jax.jit(at.global_norm)(halves), exact, rtol=1e-6)


@by_norm
@pytest.mark.parametrize("elements", [*EXTREME, [3.3e38, -3.3e38, 3.3e38]])
def test_clipping_keeps_the_direction_of_extreme_gradients(factory, elements):
    g = np.array(elements, np.float32)
    exact = np.linalg.norm(g.astype(np.float64))
    for max_norm in MAX_NORMS:
        (clipped,) = clip(factory(max_norm), [jnp.asarray(g)])
        expected = g.astype(np.float64) * min(1.0, max_norm / exact)
        np.testing.assert_allclose(clipped, expected, rtol=2e-6)


@by_norm
def test_clipping_keeps_the_direction_of_extreme_rows(factory):
    tx = at.lazy(factory(1.0))
    params = {"t": jnp.zeros((9, 1))}
    values = jnp.array([[1e30], [4e30], [2e30]])  # rows 2 and 5: 3e30 and 4e30
    rows = at.SparseRows(jnp.array([2, 5, 2]), values, 9)
    updates, _ = tx.update({"t": rows}, tx.init(params), params)
    np.testing.assert_allclose(updates["t"].to_dense()[jnp.array([2, 5]), 0], [0.6, 0.8], rtol=1e-6)


def test_an_ordinary_norm_takes_one_pass():
    """The second one is in a branch of a conditional."""
    program = jax.make_jaxpr(at.global_norm)(jnp.ones(5))
    assert [eqn.primitive.name for eqn in program.eqns].count("reduce_sum") == 1


@by_norm
def test_a_nan_among_extreme_gradients_is_in_every_element(factory):
    for large in (1e30, 1e-30):
        assert np.isnan(clip(factory(1.0), [jnp.array([np.nan, large])])[0]).all()
