# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

"""Promises that hold for every tree: any structure, shapes (empty and 0-d too), None leaves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from helpers import as_numpy, assert_bits_equal, assert_close
from hypothesis import HealthCheck, given, settings, strategies as st

import adam_transforms as at

few = functools.partial(
    settings,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Few shapes and dtypes: JAX compiles its operations anew for each.
SHAPES = [(), (0,), (3,), (2, 0), (2, 3), (1, 1, 2)]
seeds = st.integers(0, 2**31)


class Leaf:
    """What a leaf is to be: made an array, in each tree another one, by `fill`."""

    def __init__(self, shape: tuple[int, ...], dtype: str, size: float):
        self.shape, self.dtype, self.size = shape, dtype, size

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)} of size {self.size}"


def trees_of(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=2).map(tuple)
            | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        ),
        max_leaves=5,
    )


def trees(dtypes=("float32", "bfloat16", "complex64"), sizes=(1e-3, 1.0, 1e3)):
    leaf = st.builds(Leaf, st.sampled_from(SHAPES), st.sampled_from(dtypes), st.sampled_from(sizes))
    return trees_of(st.none() | leaf).map(lambda tree: {"root": tree})


def fill(tree: Any, seed: int) -> Any:
    """Arrays of normal values for the leaves of `tree`."""
    rng = np.random.default_rng(seed)

    def array(leaf: Leaf) -> jax.Array:
        x = rng.standard_normal(leaf.shape) * leaf.size
        if leaf.dtype == "complex64":
            x = x + 1j * rng.standard_normal(leaf.shape) * leaf.size
        return jnp.asarray(np.asarray(x).astype(jnp.dtype(leaf.dtype)))

    return jax.tree.map(array, tree)


def named(tree: Any) -> dict[str, np.ndarray]:
    """A tree as the references take it."""
    return {str(i): as_numpy(x) for i, x in enumerate(jax.tree.leaves(tree))}


def tolerance(x: jax.Array) -> float:
    """How far rounding may take a value of the size of one."""
    return max(4 * float(jnp.finfo(x.dtype).eps), 4e-6)


def assert_near(actual: Any, expected: dict[str, np.ndarray], scale: float = 1.0) -> None:
    for x, e in zip(jax.tree.leaves(actual), expected.values(), strict=True):
        tol = tolerance(x)
        np.testing.assert_allclose(as_numpy(x), e, rtol=tol, atol=tol * scale)


@few(max_examples=40)
@given(trees(), seeds, st.sampled_from([1e-3, 0.5, 1.0, 30.0]))
def test_a_clipped_norm_never_exceeds_the_limit_and_keeps_its_direction(tree, seed, limit):
    gradients = fill(tree, seed)
    exact = named(gradients)
    for factory, rule in (
        (at.clip_by_norm, reference.clip_by_norm),
        (at.clip_by_global_norm, reference.clip_by_global_norm),
    ):
        tx = factory(limit)
        clipped, _ = tx.update(gradients, tx.init(gradients))
        assert_near(clipped, rule(exact, limit), scale=limit * 1e-3)
        # Half an eps each: the norm (at most twice that), the factor, the product.
        roundings = 1 + 2 * max(
            [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(clipped)], default=0
        )
        after = named(clipped)
        if factory is at.clip_by_global_norm:
            assert reference.global_norm(after) <= limit * roundings + 1e-12
        for name, x in after.items():
            assert np.linalg.norm(x) <= limit * roundings + 1e-12
            assert np.all((x * exact[name].conj()).real >= 0)


@few(max_examples=40)
@given(trees(), seeds, st.sampled_from([0.25, 1.0, 100.0]))
def test_no_clipped_value_exceeds_the_limit(tree, seed, limit):
    gradients = fill(tree, seed)
    tx = at.clip_by_value(limit)
    clipped, _ = tx.update(gradients, tx.init(gradients))
    for x, g in zip(jax.tree.leaves(clipped), jax.tree.leaves(gradients), strict=True):
        for part in (np.real, np.imag):
            expected = np.clip(part(as_numpy(g)), -limit, limit)
            np.testing.assert_array_equal(part(as_numpy(x)), expected)


@few(max_examples=40)
@given(trees(), seeds)
def test_the_global_norm_is_the_references(tree, seed):
    values = fill(tree, seed)
    np.testing.assert_allclose(
        at.global_norm(values), reference.global_norm(named(values)), rtol=2e-6
    )


@few(max_examples=40)
@given(trees(dtypes=("float32", "bfloat16", "float16", "complex64")), seeds, st.booleans())
def test_applying_zeros_is_the_identity(tree, seed, with_key):
    params = fill(tree, seed)
    key = jax.random.key(seed) if with_key else None
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert_bits_equal(at.apply_updates(params, zeros, key=key), params)
    nothing = jax.tree.map(lambda p: None, params)
    assert_bits_equal(at.apply_updates(params, nothing, key=key), params)


@few(max_examples=25)
@given(trees(), seeds, st.sampled_from([0.0, 0.3, 0.999]), st.booleans())
def test_the_average_of_constant_parameters_is_those_parameters(tree, seed, decay, debias):
    params = fill(tree, seed)
    tx = at.params_ema(decay, debias=debias)
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = tx.update(zeros, state, params)
    assert_bits_equal(updates, zeros)
    average, final = at.ema_params(state), at.finalize(params, state)
    if not debias and not 0 < decay < 0.5:
        assert_bits_equal(final, params)
    assert_close(average, jax.tree.map(as_numpy, params), atol=0)
    assert jax.tree.map(jnp.shape, final) == jax.tree.map(jnp.shape, params)
    assert_near(final, named(params), scale=0)


@few(max_examples=25)
@given(
    st.lists(
        st.none() | st.builds(Leaf, st.sampled_from(SHAPES), st.just("float32"), st.just(1.0)),
        min_size=1,
        max_size=4,
    ),
    seeds,
    st.randoms(use_true_random=False),
)
def test_permuting_the_leaves_permutes_the_result(leaves, seed, random):
    order = list(range(len(leaves)))
    random.shuffle(order)
    params, gradients = fill(leaves, seed), fill(leaves, seed + 1)

    def results(params, gradients):
        tx = at.by_path([], default=at.scale_by_adam())
        clip = at.clip_by_norm(0.5)
        clipped, _ = clip.update(gradients, clip.init(params))
        updates, _ = tx.update(clipped, tx.init(params), params)
        return at.apply_updates(params, updates)

    straight = results(params, gradients)
    permuted = results([params[i] for i in order], [gradients[i] for i in order])
    assert_bits_equal(permuted, [straight[i] for i in order])


@few(max_examples=40)
@given(trees())
def test_every_leaf_has_its_own_path_and_selects_itself(tree):
    values = fill(tree, 0)
    leaves = jax.tree_util.tree_flatten_with_path(values)[0]
    paths = [at.path_str(path) for path, _ in leaves]
    assert len(set(paths)) == len(paths)
    for path in paths:
        mask = at.path_mask(f"^{path}$")(values)
        assert sum(jax.tree.leaves(mask)) == 1
        excluded = at.path_mask(f"^{path}$", exclude=True)(values)
        assert jax.tree.map(lambda m: not m, excluded) == mask
