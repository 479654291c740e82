"""Each form of the identity is one, and buys in the compiled program what its docstring says."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_tiers, x64

from adam_transforms._core import dtypes
from adam_transforms._xla import scheduling


def kernels(fn: Any, *inputs: Any, **options: Any) -> list[str]:
    """The computations of the compiled program; a fusion is one kernel."""
    return str(jax.jit(fn, **options).lower(*inputs).compile().as_text()).split("\n\n")


@pytest.mark.parametrize(
    ("name", "columns", "dtype"),
    in_tiers(
        itertools.product(
            ("materialize", "gather_separately"),
            (1, 30, 60, 300),  # with no, two, one and no selects
            (jnp.float32, jnp.float64, jnp.bfloat16, jnp.complex64, int),
        ),
        lambda name, columns, dtype: dtype is jnp.float32 or (name, columns) == ("materialize", 60),
    ),
)
def test_every_value_is_returned_bit_for_bit(name, dtype, columns):
    values: list[Any] = [0, 1, -3]
    if jnp.issubdtype(dtype, jnp.inexact):
        finfo = jnp.finfo(dtype)
        values = [0.0, -0.0, 1.0, -3.7, finfo.tiny, finfo.max, -finfo.max, np.inf, -np.inf, np.nan]
    with x64():
        x = jnp.tile(jnp.asarray(values, dtype)[:, None], columns)
        same = jax.jit(getattr(scheduling, name))(x)
        assert same.dtype == x.dtype
        wide = dtypes.compute_dtype(dtype)
        np.testing.assert_array_equal(same.astype(wide), x.astype(wide))
        np.testing.assert_array_equal(jnp.signbit(same.real), jnp.signbit(x.real))


@pytest.mark.parametrize("dtype", ["uint16", "int8"])
def test_codes_of_few_bits_are_returned_bit_for_bit(dtype):
    limits = np.iinfo(dtype)
    codes = np.arange(limits.min, limits.max + 1, dtype=dtype).reshape(-1, 64)
    same = jax.jit(scheduling.materialize)(codes)
    assert same.dtype == codes.dtype
    np.testing.assert_array_equal(same, codes)


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_materialized_rows_are_computed_once(columns):
    def fn(table, rows):
        x = 0.5 * table.at[rows].get(mode="clip") + 1.0
        x = scheduling.materialize(x)
        return table.at[rows].set(x), jnp.sqrt(x) + 1.0

    inputs = jax.ShapeDtypeStruct((10**6, columns), jnp.float32), jnp.zeros(1000, jnp.int32)
    gathering = [k for k in kernels(fn, *inputs, donate_argnums=0) if " gather(" in k]
    assert len(gathering) == 1
    assert " divide(" in gathering[0]


def test_materialized_outputs_are_what_the_other_outputs_use():
    """One kernel gathers the rows and averages; the update reads what that kernel wrote."""

    def update(g, mu):
        mu = mu + 0.1 * (g - mu)
        return [jnp.sqrt(jnp.abs(mu)), mu]

    def step(form: Any) -> Any:
        def fn(table, rows, g):
            inputs = [g, table.at[rows].get(mode="clip")]
            u, mu = form(update, inputs)
            return table.at[rows].set(mu, mode="drop", unique_indices=True), u

        return fn

    def materialized(fn: Any, inputs: Any) -> Any:
        return scheduling.materialize_outputs(fn, inputs, [False, True])

    rows, g = jnp.arange(8), jnp.linspace(-1.0, 1.0, 8 * 64).reshape(8, 64)
    table = jnp.ones((10**5, 64))
    plain = step(lambda fn, inputs: fn(*inputs))
    for x, y in zip(step(materialized)(table, rows, g), plain(table, rows, g), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    inputs = table, rows, g
    gathering = [
        k for k in kernels(step(materialized), *inputs, donate_argnums=0) if " gather(" in k
    ]
    assert len(gathering) == 1
    assert " divide(" in gathering[0]
    assert not any(" sqrt(" in k for k in gathering)


def test_rows_gathered_separately_have_a_kernel_of_their_own():
    def kernels_that_gather(separate: Any) -> list[str]:
        def fn(table, rows):
            return jnp.exp(separate(table.at[rows].get(mode="clip"))) * 2.0

        inputs = jax.ShapeDtypeStruct((10**6, 64), jnp.float32), jnp.zeros(1000, jnp.int32)
        return [k for k in kernels(fn, *inputs) if " gather(" in k]

    assert any(" exponential(" in k for k in kernels_that_gather(lambda x: x))
    assert not any(" exponential(" in k for k in kernels_that_gather(scheduling.gather_separately))


@pytest.mark.parametrize("value", [0.0, 1.0, -5.0, np.inf, -np.inf, np.nan])
def test_a_dependency_changes_no_value_whatever_was_read(value):
    read = {"a": jnp.full((3, 2), value), "b": jnp.zeros((0, 2))}
    tokens = [scheduling.token(read["a"]), scheduling.token_of_all(read)]
    x = jnp.array([1.0, -0.0, jnp.inf])
    np.testing.assert_array_equal(scheduling.depend_on(x, tokens), x)


def test_a_write_that_depends_on_the_read_copies_nothing():
    rows = jax.ShapeDtypeStruct((8,), jnp.int32)
    table = jax.ShapeDtypeStruct((100_000, 3), jnp.float32)

    def copies(order: bool) -> int:
        def fn(table, rows, new):
            read = scheduling.materialize(table.at[rows].get(mode="clip"))
            if order:
                new = scheduling.depend_on(new, [scheduling.token(read)])
            total = jnp.sum(jnp.cos(read))
            return table.at[rows].set(new, mode="drop"), total

        new = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        compiled = jax.jit(fn, donate_argnums=0).lower(table, rows, new).compile()
        return str(compiled.as_text()).count("f32[100000,3]{1,0} copy(")

    assert copies(order=True) == 0
