# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, assert_close, normal

import adam_transforms as at

V, D, LIMIT = 6, 3, 1.5
PARAMS = {"table": normal(0, V, D), "kernel": 3 * normal(1, D, 2), "bias": 3 * normal(2, 4)}
INDICES = [2, 5, 2, V, 0]


def gradients():
    rows = at.SparseRows(np.array(INDICES), 2 * normal(3, 5, D), V, synchronized=True)
    return {"table": rows, "kernel": normal(4, D, 2), "bias": normal(5, 4)}


def limited(table, rows=slice(None)):
    """In float64, of these rows."""
    table = np.array(table, np.float64)
    norms = np.linalg.norm(table[rows], axis=1, keepdims=True)
    table[rows] *= np.minimum(1.0, LIMIT / norms)
    return table


def step(tx, g):
    updates, _ = jax.jit(tx.update)(g, tx.init(PARAMS), PARAMS)
    return at.apply_updates(PARAMS, updates)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(at.lazy(optax.scale(-1.0)), at.max_row_norm(LIMIT)),
        at.lazy(optax.chain(optax.scale(-1.0), at.max_row_norm(LIMIT, tables="table"))),
    ],
)
def test_updated_rows_are_scaled_down_to_the_limit_and_the_rest_is_as_it_was(tx):
    params, g = step(tx, gradients()), gradients()
    expected = limited(PARAMS["table"] - np.asarray(g["table"].to_dense()), [0, 2, 5])
    assert_close(params["table"], expected, rtol=1e-6, atol=1e-6)
    assert_bits_equal(params["table"][np.array([1, 3, 4])], PARAMS["table"][[1, 3, 4]])
    assert_bits_equal(params["bias"], PARAMS["bias"] - g["bias"])
    assert_bits_equal(params["kernel"], PARAMS["kernel"] - g["kernel"])


def test_a_dense_update_is_of_all_rows():
    g = at.to_dense(gradients())
    params = step(at.max_row_norm(LIMIT), g)
    assert_close(params["table"], limited(PARAMS["table"] + g["table"]), rtol=1e-6, atol=1e-6)
    assert_close(params["kernel"], limited(PARAMS["kernel"] + g["kernel"]), rtol=1e-6, atol=1e-6)
    assert_bits_equal(params["bias"], PARAMS["bias"] + g["bias"])
    chosen = step(at.max_row_norm(LIMIT, tables=lambda path, leaf: path == "kernel"), g)
    assert_bits_equal(chosen["table"], PARAMS["table"] + g["table"])
    assert_bits_equal(chosen["kernel"], params["kernel"])


def test_norms_whose_squares_leave_the_range_are_right():
    for size, limit in ((3e38, 2e38), (3e30, 1e30), (3e-30, 1e-30), (1e-37, 2e-38)):
        rows = jnp.array([[size, size], [0.0, 0.0], [limit / 2, limit / 2]], jnp.float32)
        tx = at.max_row_norm(limit)
        updates, _ = jax.jit(tx.update)(jnp.zeros((3, 2)), tx.init(rows), rows)
        new = np.asarray(rows, np.float64) + np.asarray(updates, np.float64)
        bound = limit / 2**0.5
        np.testing.assert_allclose(new[0], [bound, bound], rtol=1e-5)
        assert_bits_equal(updates[1:], jnp.zeros((2, 2)))


def test_what_cannot_be_limited_is_refused():
    tx = at.max_row_norm(LIMIT)
    with pytest.raises(ValueError, match="update needs params, got None"):
        tx.update(gradients(), tx.init(PARAMS))
    with pytest.raises(ValueError, match="no leaf matches 'embed' of tables"):
        at.max_row_norm(LIMIT, tables="embed").init(PARAMS)
    with pytest.raises(ValueError, match="limit must be > 0"):
        at.max_row_norm(0.0)
    tx = optax.chain(at.deferred_adam(0.1, tables="table", max_idle=300), tx)
    with pytest.raises(TypeError, match="'table' has a row gradient of deferred_adam"):
        jax.eval_shape(tx.update, gradients(), tx.init(PARAMS), PARAMS)
