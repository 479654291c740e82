"""Equinox modules with row gradients, in training loops as their users write them."""

from collections.abc import Callable
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_transforms as at

eqx = pytest.importorskip("equinox")
at_eqx = at.equinox

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
V, D, N = 40, 8, 6


class Tower(eqx.Module):
    embed: Any
    hidden: Any  # holds functions
    offsets: Any  # an integer array
    name: str = eqx.field(static=True)

    def __init__(self, seed: int = 0) -> None:
        keys = jax.random.split(jax.random.key(seed), 2)
        self.embed = eqx.nn.Embedding(V, D, key=keys[0])
        self.hidden = eqx.nn.MLP(D, 1, D, 1, key=keys[1])
        self.offsets = jnp.arange(2)
        self.name = "tower"

    def __call__(self, token: Any) -> Any:
        return self.hidden(self.embed(token) + self.offsets[1])


def batch_of(step: int) -> Any:
    rng = np.random.default_rng(step)
    return rng.integers(0, V, N).astype(np.int32), rng.standard_normal((N, 1), np.float32)


def loss_of(model: Any, batch: Any, *, scale: float = 1.0) -> Any:
    ids, targets = batch
    return scale * jnp.mean((jax.vmap(model)(ids) - targets) ** 2)


def arrays_of(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def test_gradients_are_equinox_s_and_the_table_s_are_rows() -> None:
    model, batch = Tower(), batch_of(0)

    @eqx.filter_jit
    def both(model: Any, batch: Any) -> Any:
        expected = eqx.filter_value_and_grad(loss_of)(model, batch, scale=2.0)
        return expected, at_eqx.filter_value_and_grad(loss_of)(model, batch, scale=2.0)

    (expected_value, expected), (value, grads) = both(model, batch)
    assert isinstance(grads.embed.weight, at.SparseRows)
    assert grads.offsets is None and grads.hidden.activation is None
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    helpers.assert_close(at.to_dense(grads), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["lazy", "deferred"])
def test_a_training_loop_moves_the_rows_as_its_optimizer_says(kind: str) -> None:
    """Of lazy the rows read; of deferred all, as with dense Adam."""
    deferred = at.deferred_adam(0.1, tables="^embed/weight$", eps_hat=True)
    tx = at.lazy_adam(0.1) if kind == "lazy" else deferred
    dense = at.adam(0.1, eps_hat=True)

    @eqx.filter_jit
    def step(model: Any, state: Any, batch: Any) -> Any:
        rows_from = state if kind == "deferred" else None
        grads = at_eqx.filter_grad(loss_of, rows_from=rows_from)(model, batch)
        updates, state = tx.update(grads, state, arrays_of(model))
        return at_eqx.apply_updates(model, updates), state

    @eqx.filter_jit
    def dense_step(model: Any, state: Any, batch: Any) -> Any:
        grads = eqx.filter_grad(loss_of)(model, batch)
        updates, state = dense.update(grads, state, arrays_of(model))
        return eqx.apply_updates(model, updates), state

    model = expected = Tower()
    state, dense_state = tx.init(arrays_of(model)), dense.init(arrays_of(model))
    for number in range(4):
        model, state = step(model, state, batch_of(number))
        expected, dense_state = dense_step(expected, dense_state, batch_of(number))
    assert isinstance(model, Tower) and model.hidden.activation is Tower().hidden.activation
    if kind == "deferred":
        flushed, _ = at.flush(arrays_of(model), state)
        helpers.assert_close(flushed, arrays_of(expected), rtol=1e-3, atol=1e-4)
    else:
        read = np.isin(np.arange(V), np.concatenate([batch_of(number)[0] for number in range(4)]))
        moved = np.any(model.embed.weight != Tower().embed.weight, axis=1)
        np.testing.assert_array_equal(moved, read)


@pytest.mark.parametrize("kind", ["lazy", "deferred"])
def test_partitioned_modules_train(kind: str) -> None:
    """`eqx.apply_updates` takes no row updates; ours takes None as it does."""
    tx = (
        at.lazy_adam(0.1) if kind == "lazy" else at.deferred_adam(0.1, tables="embed", eps_hat=True)
    )
    params, static = eqx.partition(Tower(), eqx.is_inexact_array)
    state = tx.init(params)

    def loss(params: Any, batch: Any) -> Any:
        return loss_of(eqx.combine(params, static), batch)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        rows_from = state if kind == "deferred" else None
        value, grads = at.value_and_grad(loss, rows_from=rows_from)(params, batch)
        assert isinstance(grads.embed.weight, at.SparseRows)
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), state, value

    losses = []
    for _ in range(5):
        params, state, value = step(params, state, batch_of(0))
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_auxiliary_output_decorators_and_methods_are_as_in_equinox() -> None:
    class Trained(Tower):
        @at_eqx.filter_value_and_grad(has_aux=True, tables="embed")
        def step(self, batch: Any) -> Any:
            return loss_of(self, batch), {"name": self.name}

        @at_eqx.filter_grad(has_aux=True)
        def grads(self, batch: Any) -> Any:
            "The gradient."
            return loss_of(self, batch), self.name

    model, batch = Trained(), batch_of(0)
    (value, aux), grads = model.step(batch)
    assert aux == {"name": "tower"} and np.shape(value) == ()
    again, name = model.grads(batch)
    assert name == "tower" and Trained.grads.__doc__ == "The gradient."
    helpers.assert_bits_equal(again, grads)


def test_a_function_of_arrays_is_traced_with_them() -> None:
    """`eqx.filter_jit` makes no constants of what a gradient function holds."""
    traces = []

    class Loss(eqx.Module):
        scale: Any

        def __call__(self, model: Any, batch: Any) -> Any:
            traces.append(1)
            return loss_of(model, batch) * self.scale

    def grads_of(scale: float) -> Any:
        fun = eqx.filter_jit(at_eqx.filter_grad(Loss(jnp.float32(scale))))
        return fun(Tower(), batch_of(0)).hidden.layers[0].bias

    np.testing.assert_allclose(grads_of(2.0), 2 * grads_of(1.0), rtol=1e-6)
    assert len(traces) == 1


def test_updates_in_low_precision_round_with_a_key() -> None:
    model = eqx.nn.Embedding(weight=jnp.ones((1000, 4), jnp.bfloat16))
    rows = at.SparseRows(jnp.arange(500), jnp.full((500, 4), 1e-3, jnp.bfloat16), 1000)
    updates = eqx.tree_at(lambda model: model.weight, model, rows)
    assert bool(jnp.all(at_eqx.apply_updates(model, updates).weight == 1))
    rounded = at_eqx.apply_updates(model, updates, jax.random.key(0))
    assert rounded.weight.dtype == jnp.bfloat16
    weight = rounded.weight.astype(jnp.float32)
    np.testing.assert_allclose(weight[:500].mean(), 1.001, rtol=5e-4)
    np.testing.assert_array_equal(weight[500:], 1)


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no function": (
        lambda m: at_eqx.filter_grad(arrays_of(m).hidden.layers),
        TypeError,
        r"function.*got tuple: write .*\(loss\)",
    ),
    "no argument": (lambda _: at_eqx.filter_grad(loss_of)(), TypeError, "by position"),
    "by keyword": (lambda m: at_eqx.filter_grad(loss_of)(model=m), TypeError, "by position"),
    "another path": (
        lambda m: at_eqx.filter_grad(loss_of, tables="table")(m, batch_of(0)),
        ValueError,
        "'table'.*'embed/weight'",
    ),
    "a dense leaf": (
        lambda m: at_eqx.filter_grad(loss_of, tables="hidden/layers/0/weight")(m, batch_of(0)),
        ValueError,
        "'hidden/layers/0/weight'.*not only read by row",
    ),
    "a list of updates": (lambda m: at_eqx.apply_updates(m, [1.0]), ValueError, "'embed/weight'"),
    "the core's value_and_grad": (
        lambda m: at.value_and_grad(loss_of)([m], batch_of(0)),
        TypeError,
        "Tower of equinox .*'hidden/activation'.*equinox.filter_value_and_grad.*eqx.partition",
    ),
}


@pytest.mark.every_case
@pytest.mark.parametrize("name", WRONG)
def test_the_error_names_what_is_wrong(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(Tower())
