"""Haiku models with row gradients, in a training loop as their users write it."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_transforms as at

hk: Any = pytest.importorskip("haiku")
V, D = 40, 8


def test_a_model_trains_by_the_rows_that_it_reads(relaxed_promotion: None) -> None:
    @hk.transform_with_state
    def model(ids: Any) -> Any:
        x = hk.Embed(V, D, name="embed")(ids)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
        return hk.Linear(1)(x)

    ids, targets = np.array([3, 1, 3, 7]), np.ones((4, 1), np.float32)
    start, running = model.init(jax.random.key(0), ids)
    tx = at.lazy_adam(0.1)

    def loss_of(params: Any, running: Any, key: Any) -> Any:
        outputs, running = model.apply(params, running, key, ids)
        return jnp.mean((outputs - targets) ** 2), running

    @jax.jit
    def step(params: Any, running: Any, state: Any, key: Any) -> Any:
        differentiated = at.value_and_grad(loss_of, has_aux=True)
        (loss, running), grads = differentiated(params, running, key)
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), running, state, loss, grads

    params, state, losses = start, tx.init(start), []
    for key in jax.random.split(jax.random.key(1), 5):
        expected, _ = jax.jit(jax.grad(loss_of, has_aux=True))(params, running, key)
        params, running, state, loss, grads = step(params, running, state, key)
        assert isinstance(grads["embed"]["embeddings"], at.SparseRows)
        helpers.assert_close(at.to_dense(grads), expected, rtol=1e-4, atol=1e-6)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    moved = np.any(params["embed"]["embeddings"] != start["embed"]["embeddings"], axis=1)
    assert np.flatnonzero(moved).tolist() == [1, 3, 7]
