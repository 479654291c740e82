"""`compat.tf1` beside TensorFlow itself, where it is installed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import adam_transforms as at
from adam_transforms.compat import tf1

tf: Any = pytest.importorskip("tensorflow").compat.v1


def test_names_slots_and_powers_are_tensorflows() -> None:
    variables = {name: tf.Variable(normal(i, 3, 2), name=name) for i, name in enumerate("ab")}
    theirs = tf.train.AdamOptimizer(0.1)
    ours = tf1.AdamOptimizer(0.1)
    params = {name: jnp.asarray(v.numpy()) for name, v in variables.items()}
    state = ours.init(params)
    for t in range(3):
        grads = {name: normal(10 * t + i, 3, 2) for i, name in enumerate(variables)}
        theirs.apply_gradients([(tf.constant(g), variables[name]) for name, g in grads.items()])
        pairs = [(g, name) for name, g in grads.items()]
        params, state = ours.apply_gradients(pairs, params, state)
    expected = {v.name.removesuffix(":0"): v.numpy() for v in theirs.variables()}
    found = dict(ours.variables(state))
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=3e-5, atol=1e-8)
    assert ours.get_slot_names() == theirs.get_slot_names()
    assert ours.get_name() == theirs.get_name()
    for name in variables:
        for slot in ours.get_slot_names():
            theirs_slot = theirs.get_slot(variables[name], slot).numpy()
            np.testing.assert_allclose(
                ours.get_slot(state, name, slot), theirs_slot, rtol=3e-5, atol=1e-8
            )


def test_changing_hyperparameters_and_missing_gradients_are_tensorflows() -> None:
    rng = np.random.default_rng(0)
    names = ("learning_rate", "beta1", "beta2", "epsilon")
    now: dict[str, float] = dict.fromkeys(names, 0.0)

    def draw() -> None:
        drawn = (10 ** rng.uniform(-3, -1), *rng.uniform(0.5, 0.99, 2), 10 ** rng.uniform(-8, -2))
        now.update(zip(names, map(float, drawn), strict=True))

    draw()
    callables = {name: (lambda name=name: now[name]) for name in names}
    theirs, ours = tf.train.AdamOptimizer(**callables), tf1.AdamOptimizer(**callables)
    start = {"table": normal(0, 6, 2), "w": normal(1, 3)}
    variables = {name: tf.Variable(x) for name, x in start.items()}
    params = {name: jnp.asarray(x) for name, x in start.items()}
    state = ours.init(params)
    for t in range(25):
        if t:
            draw()
        ids, rows, g = rng.integers(0, 6, 4), normal(t, 4, 2), normal(100 + t, 3)
        sparse = tf.IndexedSlices(tf.constant(rows), tf.constant(ids), tf.constant([6, 2]))
        with_rows, with_dense = t % 3 != 1, t % 3 != 2
        pairs = [
            (sparse if with_rows else None, variables["table"]),
            (tf.constant(g) if with_dense else None, variables["w"]),
        ]
        theirs.apply_gradients(pairs)
        grads = {
            "table": at.SparseRows(ids, rows, 6) if with_rows else None,
            "w": g if with_dense else None,
        }
        params, state = ours.apply(grads, params, state)
        for name, variable in variables.items():
            np.testing.assert_allclose(params[name], variable.numpy(), rtol=2e-4, atol=2e-5)
    powers = {v.name.split(":")[0]: v.numpy() for v in theirs.variables() if "power" in v.name}
    found = dict(ours.variables(state))
    for name, value in powers.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-7)


def test_gradients_are_the_ones_tensorflow_takes() -> None:
    start = {"table": normal(0, 6, 2), "unused": normal(1, 3), "w": normal(2, 2)}
    variables = {name: tf.Variable(x) for name, x in start.items()}
    ids = np.array([3, 3, 1])

    def their_loss() -> Any:
        return tf.reduce_sum(tf.gather(variables["table"], ids) * variables["w"], axis=1)

    weights = normal(3, 3)
    theirs = tf.train.AdamOptimizer().compute_gradients(
        their_loss, list(variables.values()), grad_loss=tf.constant(weights)
    )
    ours = tf1.AdamOptimizer().compute_gradients(
        lambda p: jnp.sum(p["table"][ids] * p["w"][None, :], axis=1),
        {name: jnp.asarray(x) for name, x in start.items()},
        grad_loss=weights,
    )
    for (g, _), (expected, _) in zip(ours, theirs, strict=True):
        if expected is None:
            assert g is None
        elif isinstance(expected, tf.IndexedSlices):
            dense = tf.convert_to_tensor(expected).numpy()
            assert isinstance(g, at.SparseRows)
            np.testing.assert_allclose(g.to_dense(), dense, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(g, expected.numpy(), rtol=1e-5)
    assert [type(g) for g, _ in ours].count(type(None)) == 1
