"""What several test files need."""

import functools
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def in_tiers(values: Iterable[Any], first: Callable[..., bool]) -> list[Any]:
    """Values to parametrize by: those for which `first` holds in both tiers, the others in the
    second alone. A tuple is the values of several names, which `first` takes one by one."""
    sets = [value if type(value) is tuple else (value,) for value in values]
    return [pytest.param(*s, marks=() if first(*s) else pytest.mark.slow) for s in sets]


def x64() -> Any:
    """A context in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64(True)


def types(tree: Any) -> Any:
    """Structure, and shape, dtype and weak type of each leaf: what a `lax.scan` carry must keep."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [
        (jnp.shape(x), getattr(x, "dtype", type(x)), getattr(x, "weak_type", False)) for x in leaves
    ]


def assert_bits_equal(actual: Any, expected: Any) -> None:
    """The same structure, dtypes and bits, NaNs included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = _bits(a), _bits(e)
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert a.tobytes() == e.tobytes()


def _bits(x: Any) -> np.ndarray:
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


# `jax.jit` as it is outside of the tests: conftest.py turns LLVM's optimizations off, and in the
# first tier the fusion emitters.
OPTIMIZED: dict[str, Any] = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True
optimized_jit = functools.partial(jax.jit, compiler_options=OPTIMIZED)


def as_numpy(x: Any) -> np.ndarray:
    """In float64, or complex128 if it is complex."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def assert_close(actual: Any, expected: Any, rtol: float = 2e-6, atol: float = 1e-7) -> None:
    """The same structure and shapes, and close values, computed in float64."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(e)
        np.testing.assert_allclose(as_numpy(a), as_numpy(e), rtol=rtol, atol=atol)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Standard normal values that `dtype` represents, the imaginary part too if it is complex."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return np.asarray(x).astype(dtype)


def run_updates(tx: Any, gradients: Any, params: Any = None, state: Any = None) -> tuple[Any, Any]:
    """The updates of a jitted step for each of `gradients`, all at the same parameters, and the
    state after the last; it starts from `state`, or else from ``tx.init(params)``."""
    state = tx.init(params) if state is None else state
    step = jax.jit(tx.update)
    updates = []
    for g in gradients:
        u, state = step(g, state, params)
        updates.append(u)
    return updates, state
