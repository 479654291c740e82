from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_bits_equal

from adam_transforms._xla.row_independence import as_row_function

ROWS, BLOCK, COLUMNS = 12, 4, 3
X = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def blockwise(fn: Callable[..., Any], *, at_hand: bool) -> jax.Array | None:
    """`fn` of a scalar and `X`, block by block; None if it lets rows meet. If not `at_hand` only
    the shape of `X` is known beforehand."""
    x = X if at_hand else jax.ShapeDtypeStruct(X.shape, X.dtype)
    by_row = as_row_function(lambda s, x: [fn(s, x)], [jnp.float32(2.0), x], [None, 0], [0])
    if by_row is None:
        return None
    return jnp.concatenate([by_row.of_rows(0, [x])[0] for x in jnp.split(jnp.asarray(X), 3)])


@jax.jit
def inner(s: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, s)


APART = {
    "elementwise": lambda s, x: jnp.sqrt(jnp.abs(x)) * s + 1.0,
    "a call": inner,
    "constants of the rows' shape": lambda s, x: x + s * jnp.ones_like(x),
    "how many there are": lambda s, x: x / jnp.sum(jnp.ones_like(x)) / x.shape[0],
    "a reduction within rows": lambda s, x: x / jnp.linalg.norm(x, axis=1, keepdims=True),
    "the columns": lambda s, x: x * jnp.arange(COLUMNS, dtype=jnp.float32)[None],
    "a reshape": lambda s, x: (x.reshape(-1, 1, COLUMNS) * s).reshape(-1, COLUMNS),
    "a transposition of columns": lambda s, x: x[:, :, None].transpose(0, 2, 1).reshape(x.shape),
    "another dtype": lambda s, x: (x.astype(jnp.bfloat16) * 3).astype(jnp.float32),
    "nothing of the rows": lambda s, x: jnp.full_like(x, s),
}
# If they can be computed beforehand.
APART_BUT_FOR_NUMBERS = {
    "a norm of all": lambda s, x: x / jnp.linalg.norm(x),
    "a mean": lambda s, x: s * x - jnp.mean(x),
    "a mean over rows": lambda s, x: x - jnp.mean(x, axis=0, keepdims=True),
    "one after the other": lambda s, x: (
        jnp.tanh(x / jnp.max(x)) / jnp.sum(jnp.tanh(x / jnp.max(x)))
    ),
    "a loop": lambda s, x: x * jax.lax.fori_loop(0, 2, lambda i, y: y * s, jnp.sum(x)),
}
MEETING = {
    "a sum along rows": lambda s, x: jnp.cumsum(x, axis=0),
    "the reverse": lambda s, x: x[::-1],
    "a sort": lambda s, x: jnp.sort(x, axis=0),
    "noise": lambda s, x: x + jax.random.normal(jax.random.key(0), x.shape),
    "the rows' numbers": lambda s, x: x * jnp.arange(x.shape[0], dtype=jnp.float32)[:, None],
    "a product of matrices": lambda s, x: x @ (x.T @ x),
    "other rows": lambda s, x: x[jnp.arange(x.shape[0])[::-1]],
    "rows as columns": lambda s, x: x.T.reshape(x.shape),
    "a loop over all": lambda s, x: jax.lax.fori_loop(0, 2, lambda i, y: y * s, x),
}


def print_and_return(s: jax.Array, x: jax.Array) -> jax.Array:
    jax.debug.print("{}", s)
    return x


def assert_as_a_whole(found: jax.Array | None, fn: Callable[..., Any], atol: float = 0.0) -> None:
    assert found is not None
    np.testing.assert_allclose(found, fn(jnp.float32(2.0), jnp.asarray(X)), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("at_hand", [False, True])
def test_a_function_that_treats_rows_apart_may_be_run_on_some_at_a_time(
    name: str, at_hand: bool
) -> None:
    assert_as_a_whole(blockwise(APART[name], at_hand=at_hand), APART[name])


@pytest.mark.parametrize("name", APART_BUT_FOR_NUMBERS)
def test_rows_may_meet_in_numbers_that_are_computed_beforehand(name: str) -> None:
    fn = APART_BUT_FOR_NUMBERS[name]
    assert_as_a_whole(blockwise(fn, at_hand=True), fn, atol=1e-6)  # differences cancel
    assert blockwise(fn, at_hand=False) is None


@pytest.mark.parametrize("name", MEETING)
@pytest.mark.parametrize("at_hand", [False, True])
def test_a_function_that_lets_rows_meet_is_recognised(name: str, at_hand: bool) -> None:
    assert blockwise(MEETING[name], at_hand=at_hand) is None


def test_what_is_to_happen_once_does_not_happen_for_each_block() -> None:
    assert blockwise(print_and_return, at_hand=True) is None


def shapes_of(*rows: int | None) -> list[Any]:
    """Inputs of two tables' rows, or an array of that shape that belongs to none."""
    shape = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    return [jnp.ones(shape.shape) if table is None else shape for table in rows]


def test_what_belongs_to_no_table_is_computed_and_the_tables_stay_apart() -> None:
    def fn(dense: Any, a: Any, none: None, b: Any, count: Any) -> list[Any]:
        count = count + 1
        return [dense * count, a / count, none, b * count, count]

    inputs = [*shapes_of(None, 0), None, *shapes_of(1), jnp.float32(1.0)]
    by_row = as_row_function(fn, inputs, [None, 0, None, 1, None], [None, 0, None, 1, None])
    assert by_row is not None
    assert by_row.shared[1:4] == [None, None, None]
    assert_bits_equal(by_row.shared[0], 2.0 * jnp.ones((ROWS, COLUMNS)))
    assert_bits_equal(by_row.shared[4], jnp.float32(2.0))
    rows = jnp.asarray(X[:BLOCK])
    assert_bits_equal(by_row.of_rows(0, [rows])[0], rows / 2.0)
    assert_bits_equal(by_row.of_rows(1, [rows])[0], rows * 2.0)


@pytest.mark.parametrize(
    ("fn", "inputs", "outputs"),
    [
        (lambda a, b: [a + b], (0, 1), [0]),
        (lambda a, dense: [a + dense], (0, None), [0]),
        (lambda a, dense: [dense], (0, None), [0]),
        (lambda a, dense: [a], (0, None), [None]),
        (lambda a, b: [b], (0, 1), [0]),
    ],
    ids=["two tables", "a dense array", "dense as rows", "rows as dense", "another table's rows"],
)
def test_rows_go_to_their_own_table_alone(fn: Any, inputs: Any, outputs: Any) -> None:
    assert as_row_function(fn, shapes_of(*inputs), inputs, outputs) is None
