"""Deferred Adam is dense Adam, late."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, in_tiers, types, x64

import adam_transforms as at

V, D, TOUCHED = 40, 3, 5


def draw(steps: int, seed: int = 0, dtype: Any = np.float64) -> tuple[Any, Any]:
    """Rows touched, by Zipf's law, and their gradients, of sizes from 1e-10 to 1e2: (steps, n) and
    (steps, n, D)."""
    generator = np.random.default_rng(seed)
    ids = np.exp(generator.random((steps, TOUCHED)) * np.log(V)).astype(np.int32) - 1
    size = 10.0 ** generator.uniform(-10, 2, (V, 1))
    values = generator.standard_normal((steps, TOUCHED, D)) * size[ids]
    return jnp.asarray(ids), jnp.asarray(values.astype(dtype))


def initial(dtype: Any = np.float64) -> dict[str, jax.Array]:
    generator = np.random.default_rng(9)
    return {
        "bias": jnp.asarray(generator.standard_normal(2).astype(dtype)),
        "table": jnp.asarray(generator.standard_normal((V, D)).astype(dtype)),
    }


@functools.cache
def deferred_adam(rate: Any = 1e-2, **options: Any) -> Any:
    """One for the same arguments, so that `one_step` compiles it once for all tests."""
    return at.deferred_adam(rate, tables="table", **options)


@functools.cache
def adam(rate: Any = 1e-2, **options: Any) -> Any:
    """As `deferred_adam`."""
    return at.adam(rate, **options)


@functools.cache
def one_step(tx: Any, dense: bool) -> Any:
    """A step, jitted: (parameters, state, each row's path length), ids, values -> the first."""

    @jax.jit
    def step(carry: Any, ids: Any, values: Any) -> Any:
        params, state, moved = carry
        rows: Any = at.SparseRows(ids, values, params["table"].shape[0], synchronized=True)
        table = rows.to_dense() if dense else rows
        grads = {"bias": values[0, :2], "table": table}
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        return new, state, moved + jnp.abs(new["table"] - params["table"]).max(axis=1)

    return step


@functools.cache
def all_steps(tx: Any, dense: bool) -> Any:
    """The steps in one loop, for where they are many."""
    step = one_step(tx, dense)
    return jax.jit(lambda carry, xs: jax.lax.scan(lambda c, x: (step(c, *x), None), carry, xs)[0])


def train(
    tx: Any, params: Any, batches: Any, state: Any = None, *, dense: bool = False
) -> tuple[Any, Any, Any]:
    """Parameters and state after all batches, and each table row's path length."""
    table = params["table"]
    state = tx.init(params) if state is None else state
    carry = params, state, jnp.zeros(len(table), table.dtype)
    if len(batches[0]) > 2000:
        return all_steps(tx, dense)(carry, batches)
    for batch in zip(*map(np.asarray, batches), strict=True):
        carry = one_step(tx, dense)(carry, *batch)
    return carry


# Outside of a jitted function each would compile its operations one by one.
flush = jax.jit(at.flush)
owed = jax.jit(at.owed)


def distance(a: Any, b: Any, moved: Any) -> float:
    """The largest difference of two tables, relative to how far the row has moved."""
    difference = jnp.abs(a["table"] - b["table"]).max(axis=1)
    return float(jnp.max(difference / jnp.maximum(moved, 1e-12)))


def as_float(count: Any) -> Any:
    return jnp.asarray(count).astype(jnp.result_type(float))


def warm_up(count: Any) -> Any:
    return 1e-2 * jnp.minimum(1.0, (as_float(count) + 1) / 20)


def cosine(steps: int) -> Any:
    return lambda count: 5e-3 * (1 + jnp.cos(jnp.pi * jnp.minimum(as_float(count) / steps, 1)))


BETAS = [(0.9, 0.999), (0.9, 0.99), (0.99, 0.999), (0.95, 0.98), (0.9, 0.95)]
RATES = {
    "constant": 1e-2,
    "cosine": cosine(300),
    "warm-up": warm_up,
}
SETTINGS: list[dict[str, Any]] = [
    {
        "b1": b1,
        "b2": b2,
        "eps_hat": eps_hat,
        "rate": list(RATES)[(i + eps_hat) % 3],
        "weight_decay": [None, 0.1][(i + eps_hat) % 2],
    }
    for i, (b1, b2) in enumerate(BETAS)
    for eps_hat in (False, True)
] + [
    {"b1": b1, "b2": b2, "amsgrad": True, "max_of": max_of, "rate": rate, "weight_decay": decay}
    for b1, b2, max_of, rate, decay in [
        (0.9, 0.999, "raw", "cosine", 0.1),
        (0.9, 0.8, "raw", "constant", None),
        (0.9, 0.999, "corrected", "warm-up", 0.1),
        (0.99, 0.98, "corrected", "cosine", None),
    ]
]


# The first tier tries the betas that are hardest to follow, with a schedule and decay, and AMSGrad.
QUICK = [SETTINGS[i] for i in (9, 11)]


@pytest.mark.parametrize(
    "setting",
    in_tiers(SETTINGS, lambda setting: setting in QUICK),
    ids=lambda setting: "-".join(map(str, setting.values())),
)
def test_flushed_parameters_are_dense_adams(setting: dict[str, Any]) -> None:
    setting = dict(setting)
    rate = RATES[setting.pop("rate")]
    with x64():
        params, batches = initial(), draw(300)
        lazily, state, _ = train(deferred_adam(rate, **setting, max_idle=3000), params, batches)
        dense, dense_state, moved = train(adam(rate, **setting), params, batches, dense=True)
        flushed, state = flush(lazily, state)
        assert distance(lazily, dense, moved) > 1e-4  # there was something to make up for
        assert distance(flushed, dense, moved) < 1e-7
        np.testing.assert_array_equal(flushed["bias"], dense["bias"])
        _, equivalent = jax.jit(at.dense_equivalent)(flushed, state)
        inner = dense_state[0]
        assert type(equivalent) is type(inner)
        for ours, theirs in zip(jax.tree.leaves(equivalent), jax.tree.leaves(inner), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-300)


def test_ten_thousand_steps_in_float64() -> None:
    with x64():
        params, batches = initial(), draw(10_000)
        rate = cosine(10_000)
        lazily, state, _ = train(deferred_adam(rate), params, batches)
        dense, _, moved = train(adam(rate), params, batches, dense=True)
        assert distance(flush(lazily, state)[0], dense, moved) < 1e-7


@pytest.mark.parametrize("max_idle", [220, 1000])
def test_rows_idle_longer_than_max_idle_are_exact(max_idle: int) -> None:
    """Of 1,500 steps a row sees the first three and the last."""
    with x64():
        params, (ids, values) = initial(), draw(1500)
        ids = jnp.where((jnp.arange(1500) % 1499 < 3)[:, None], ids, V)
        tx = deferred_adam(weight_decay=0.01, max_idle=max_idle)
        lazily, state, _ = train(tx, params, (ids, values))
        assert int(owed(lazily, state)["table"].longest_gap) < max_idle
        dense, _, moved = train(adam(weight_decay=0.01), params, (ids, values), dense=True)
        assert distance(flush(lazily, state)[0], dense, moved) < 1e-7


@pytest.mark.parametrize("gap", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_idle_gaps_of_many_thousand_steps(gap: int) -> None:
    with x64():
        steps = gap + 1
        params = {"bias": jnp.ones(2), "table": jnp.ones((2, D))}
        ids = jnp.where(jnp.arange(steps) % (steps - 1) == 0, 1, 2)[:, None].astype(jnp.int32)
        values = jnp.ones((steps, 1, D))
        lazily, state, _ = train(deferred_adam(max_idle=300), params, (ids, values))
        dense, _, moved = train(adam(), params, (ids, values), dense=True)
        assert distance(flush(lazily, state)[0], dense, moved) < 1e-7


@pytest.mark.parametrize("eps_hat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_float32_error_is_at_most_three_times_dense_adams(eps_hat: bool) -> None:
    rate = cosine(500)
    dense_adam = adam(rate, eps_hat=eps_hat)
    single = draw(500, dtype=np.float32)
    lazily, state, _ = train(deferred_adam(rate, eps_hat=eps_hat), initial(np.float32), single)
    flushed = flush(lazily, state)[0]
    dense, _, _ = train(dense_adam, initial(np.float32), single, dense=True)
    with x64():
        double = jax.tree.map(lambda x: x.astype(jnp.float64), initial(np.float32))
        batches = (single[0], single[1].astype(jnp.float64))
        exact, _, _ = train(dense_adam, double, batches, dense=True)
        ours, theirs = (
            float(jnp.max(jnp.abs(p["table"].astype(jnp.float64) - exact["table"])))
            for p in (flushed, dense)
        )
    assert 0 < theirs < 1e-5
    assert ours <= 3 * theirs


# Reading


def loss_of(params: Any, ids: jax.Array, target: jax.Array) -> jax.Array:
    """Reads one table twice, and squares what it reads."""
    read = params["table"][ids].sum(axis=0) + jnp.take(params["table"], ids[0], axis=0)
    return jnp.sum((read - target) ** 2) + jnp.sum(params["bias"] ** 2)


NESTED: dict[str, Any] = {
    "bare": lambda adam: adam(),
    "chain": lambda adam: optax.chain(optax.identity(), adam()),
    "masked": lambda adam: optax.chain(
        optax.masked(adam(), {"table": True, "bias": False}),
        optax.masked(optax.sgd(0.1), {"table": False, "bias": True}),
    ),
    "multi_transform": lambda adam: optax.multi_transform(
        {"a": adam(), "b": optax.sgd(0.1)}, {"table": "a", "bias": "b"}
    ),
    "inject_hyperparams": lambda adam: optax.inject_hyperparams(adam)(learning_rate=0.05),
    "dynamic_loss_scale": lambda adam: at.dynamic_loss_scale(adam(), 8.0),
}


@functools.cache
def fitted(name: str, deferred: bool) -> Any:
    """Losses, parameters and state of a training with lookups."""
    with x64():

        def adam(learning_rate: Any = 0.05) -> Any:
            if deferred:
                return at.deferred_adam(learning_rate, tables="table", max_idle=250)
            return at.adam(learning_rate)

        tx = NESTED[name](adam)
        scaled = name == "dynamic_loss_scale"

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry

            def loss(params: Any) -> Any:
                value = loss_of(params, *batch)
                return at.scale_loss(value, state) if scaled else value

            if deferred:
                value, grads = at.value_and_grad(loss, rows_from=state)(params)
            else:
                value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        ids = draw(200)[0]
        targets = jnp.asarray(np.random.default_rng(3).standard_normal((200, D)))
        params = initial()
        scan = jax.jit(lambda carry: jax.lax.scan(step, carry, (ids, targets)))
        (params, state), losses = scan((params, tx.init(params)))
        return losses, params, state


@pytest.mark.parametrize("name", in_tiers(NESTED, lambda name: name in ("bare", "multi_transform")))
def test_training_reads_what_dense_adam_would_have(name: str) -> None:
    losses, params, state = fitted(name, True)
    expected, dense, _ = fitted(name, False)
    with x64():
        np.testing.assert_allclose(losses, expected, rtol=1e-8)
        flushed, _ = flush(params, state)
        np.testing.assert_allclose(flushed["table"], dense["table"], rtol=0, atol=1e-8)
        np.testing.assert_allclose(flushed["bias"], dense["bias"], rtol=0, atol=1e-8)


def test_without_rows_from_the_losses_differ() -> None:
    """So that the test above is one of `rows_from`."""
    losses, params, state = fitted("bare", True)
    with x64():
        batch = draw(200)[0][0], jnp.zeros(D)
        stale = loss_of(params, *batch)
        now = jax.jit(at.value_and_grad(loss_of, rows_from=state))(params, *batch)[0]
        flushed = loss_of(flush(params, state)[0], *batch)
        assert abs(float(stale - flushed)) > 1e-6 * float(flushed)
        np.testing.assert_allclose(now, flushed, rtol=1e-12)


def test_catch_up_brings_rows_up_to_date_and_the_others_not() -> None:
    _, params, state = fitted("bare", True)
    with x64():
        catch_up = jax.jit(at.catch_up)
        flushed, _ = flush(params, state)
        ids = jnp.array([[3, 7], [3, V], [-1, 10**6]])
        caught, caught_state = catch_up(params, state, {"table": ids})
        table = np.array(params["table"])
        table[[3, 7]] = flushed["table"][np.array([3, 7])]
        np.testing.assert_array_equal(caught["table"], table)
        again = catch_up(caught, caught_state, {"table": ids})
        jax.tree.map(np.testing.assert_array_equal, again, (caught, caught_state))
        # Flushing later comes to the same.
        later, _ = flush(caught, caught_state)
        np.testing.assert_allclose(later["table"], flushed["table"], rtol=1e-13)


def test_flushing_twice_changes_nothing_and_training_goes_on() -> None:
    with x64():
        tx = deferred_adam(weight_decay=0.1)
        params, (ids, values) = initial(), draw(200)
        half = flush(*train(tx, params, (ids[:100], values[:100]))[:2])
        jax.tree.map(np.testing.assert_array_equal, flush(*half), half)
        assert not any(int(x) for x in owed(*half)["table"])
        with_break = train(tx, half[0], (ids[100:], values[100:]), half[1])[:2]
        without, state, moved = train(tx, params, (ids, values))
        assert distance(flush(*with_break)[0], flush(without, state)[0], moved) < 1e-12


def test_dense_adam_goes_on_from_the_dense_equivalent() -> None:
    with x64():
        params, (ids, values) = initial(), draw(200)
        tx, dense = deferred_adam(), adam()
        lazily, state, _ = train(tx, params, (ids[:100], values[:100]))
        now, inner = jax.jit(at.dense_equivalent)(lazily, state)
        start: Any = dense.init(params)
        rest = (inner, *start[1:])
        switched, _, _ = train(dense, now, (ids[100:], values[100:]), rest, dense=True)
        expected, _, moved = train(dense, params, (ids, values), dense=True)
        assert distance(switched, expected, moved) < 1e-8


def test_a_dense_gradient_brings_the_whole_table_up_to_date() -> None:
    with x64():
        tx, params, batches = deferred_adam(), initial(), draw(100)
        lazily, state, _ = train(tx, params, batches)
        lazily, state, _ = train(tx, lazily, draw(3, seed=1), state, dense=True)
        assert not any(int(x) for x in owed(lazily, state)["table"])
        dense, dense_state, moved = train(adam(), params, batches, dense=True)
        dense, _, more = train(adam(), dense, draw(3, seed=1), dense_state, dense=True)
        assert distance(lazily, dense, moved + more) < 1e-8


def test_a_table_without_a_gradient_stays_where_it_is() -> None:
    with x64():
        params, batches = initial(), draw(60)
        results = {}
        for tx in (deferred_adam(), adam()):
            dense = len(results) == 1
            p, state, moved = train(tx, params, batches, dense=dense)
            for step in range(2):  # once owing, once owing nothing
                before = p if dense else flush(p, state)[0]
                grads = {"bias": jnp.ones(2) * (step + 1.0), "table": None}
                updates, state = jax.jit(tx.update)(grads, state, p)
                p = at.apply_updates(p, updates)
                np.testing.assert_allclose(p["table"], before["table"], rtol=1e-14)
            p, state, more = train(tx, p, draw(30, seed=1), state, dense=dense)
            results[dense] = p if dense else flush(p, state)[0]
        assert distance(results[False], results[True], moved + more) < 1e-8


# Rows made without `rows_from`


def lookup(params: Any, ids: Any = (1, 3, 1)) -> jax.Array:
    ids = jnp.asarray(ids)
    return jnp.sum(params["table"][ids] ** 2) + jnp.sum(params["bias"])


AROUND: dict[str, Any] = {
    "bare": lambda tx, like: tx,
    "clipped": lambda tx, like: optax.chain(at.lazy(at.clip_by_global_norm(1.0)), tx),
    "masked": lambda tx, like: optax.masked(tx, {"table": True, "bias": False}),
    "by_path": lambda tx, like: at.by_path([("table", tx)], optax.sgd(0.1)),
    "accumulate": lambda tx, like: at.accumulate(tx, 2, like=like),
    "weighted": lambda tx, like: at.static_loss_scale(
        at.accumulate(optax.chain(at.lazy(at.clip_by_norm(1.0)), tx), 2, like=like), 8.0
    ),
    "loss scale": lambda tx, like: at.dynamic_loss_scale(tx, 8.0),
    "skip_nonfinite": lambda tx, like: at.skip_nonfinite(tx),
    "freeze_rows": lambda tx, like: at.freeze_rows(tx, {"table": 0}),
    "every wrapper": lambda tx, like: at.dynamic_loss_scale(
        at.accumulate(at.freeze_rows(tx, {"table": 0}), 2, like=like), 8.0
    ),
}


@pytest.mark.parametrize(
    "name", in_tiers(AROUND, lambda name: name in ("clipped", "every wrapper"))
)
def test_rows_made_without_rows_from_are_refused(name: str) -> None:
    params = initial(np.float32)
    forgotten = at.grad(lookup)
    tx = AROUND[name](
        at.deferred_adam(0.1, tables="table", max_idle=300), jax.eval_shape(forgotten, params)
    )
    state = tx.init(params)

    def step(gradients: Any) -> Any:
        return jax.eval_shape(lambda: tx.update(gradients(), state, params))

    _, new = step(lambda: at.grad(lookup, rows_from=state)(params))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    step(lambda: forgotten(params) | {"table": forgotten(params)["table"].as_synchronized()})
    step(lambda: {**params, "table": None})
    with pytest.raises(
        ValueError,
        match=r"^'table' is a table of deferred_adam.*rows_from=state\).*as_synchronized",
    ):
        step(lambda: forgotten(params))


def test_rows_read_after_catch_up_are_marked_by_hand() -> None:
    _, params, state = fitted("bare", True)
    with x64():
        ids = jnp.array([3, 7, 3])

        @jax.jit
        def by_hand(params: Any, state: Any) -> Any:
            params, state = at.catch_up(params, state, {"table": ids})
            rows = at.grad(lookup)(params, ids)["table"]
            assert not rows.synchronized
            return rows.as_synchronized()

        rows = by_hand(params, state)
        current = jax.jit(at.grad(lookup, rows_from=state))(params, ids)["table"]
        assert rows.synchronized and current.synchronized
        assert_close(rows.to_dense(), current.to_dense(), rtol=1e-12)


def test_the_rest_of_a_cycle_is_flushed_and_the_mark_of_like_says_nothing() -> None:
    params = initial(np.float32)
    deferred = at.deferred_adam(0.1, tables="table", max_idle=300)
    grads = jax.eval_shape(at.grad(lookup, rows_from=deferred.init(params)), params)
    like = jax.eval_shape(at.grad(lookup), params)
    assert grads["table"].synchronized and not like["table"].synchronized
    tx = at.accumulate(deferred, 2, like=like)
    state = jax.eval_shape(tx.init, params)
    assert types(state) == types(
        jax.eval_shape(at.accumulate(deferred, 2, like=grads).init, params)
    )
    _, after = jax.eval_shape(tx.update, grads, state, params)
    assert types(after) == types(state)
    flush_accumulated = functools.partial(at.flush_accumulated, tx)
    assert types(jax.eval_shape(flush_accumulated, after, params)[1]) == types(state)


# The chain around it


def with_and_without_rows(tx: Any, repeats: int = 1) -> Any:
    """The parameters after a step with rows, one without a gradient of the table, one with rows."""
    params = {"table": jnp.ones((6, 2)), "bias": jnp.ones(2)}
    rows = {
        "table": at.SparseRows(jnp.array([1, 3]), jnp.ones((2, 2)), 6, synchronized=True),
        "bias": jnp.ones(2),
    }
    state, step = tx.init(params), jax.jit(tx.update)
    for gradients in (rows, {**rows, "table": None}, rows):
        for _ in range(repeats):
            updates, state = step(gradients, state, params)
            params = optax.apply_updates(params, updates)
    return params


@functools.cache
def alone_with_and_without_rows() -> Any:
    return with_and_without_rows(at.deferred_adam(0.1, tables="table"))


@pytest.mark.parametrize("wrapper", ["skip_nonfinite", "loss scales", "accumulate, freeze_rows"])
def test_a_table_without_a_gradient_is_brought_up_to_date_inside_a_wrapper(wrapper: str) -> None:
    tx, repeats = at.deferred_adam(0.1, tables="table"), 1
    if wrapper == "skip_nonfinite":
        tx = at.skip_nonfinite(tx)
    elif wrapper == "loss scales":
        tx = at.static_loss_scale(at.dynamic_loss_scale(tx, 1.0), 1.0)
    else:
        like = {"table": at.SparseRows(jnp.zeros(2, int), jnp.ones((2, 2)), 6), "bias": jnp.ones(2)}
        tx, repeats = at.accumulate(at.freeze_rows(tx, {"table": 5}), 2, like=like), 2
    expected = alone_with_and_without_rows()
    assert expected["table"][1, 0] < 0.9
    assert_close(with_and_without_rows(tx, repeats), expected)


def test_clipping_before_it_and_accumulation_around_it() -> None:
    with x64():
        params, (ids, values) = initial(), draw(200)
        like = {"bias": params["bias"], "table": at.SparseRows(ids[0], values[0], V)}
        clipped = optax.chain(
            at.lazy(at.clip_by_global_norm(0.1)), at.deferred_adam(1e-2, tables="table")
        )
        tx = at.dynamic_loss_scale(at.accumulate(clipped, 2, like=like), 1.0)
        lazily, state, _ = train(tx, params, (ids, values))
        clipped_adam = adam(clip_global_norm=0.1, accumulate_every=2)
        dense, _, moved = train(clipped_adam, params, (ids, values), dense=True)
        assert distance(flush(lazily, state)[0], dense, moved) < 1e-7


def test_weight_decay_can_leave_out_tables() -> None:
    with x64():
        generator = np.random.default_rng(0)
        params = {k: jnp.asarray(generator.standard_normal((V, D))) for k in ("a", "b")}
        mask = at.path_mask("a")
        tx = at.deferred_adam(1e-2, tables=["a", "b"], weight_decay=0.1, weight_decay_mask=mask)
        dense_adam = at.adam(1e-2, weight_decay=0.1, weight_decay_mask=mask)
        state, dense_state, dense = tx.init(params), dense_adam.init(params), params
        update, dense_update = jax.jit(tx.update), jax.jit(dense_adam.update)
        for ids, values in zip(*draw(50), strict=True):
            grads = {
                "a": at.SparseRows(ids, values, V, synchronized=True),
                "b": at.SparseRows(ids[::-1], values, V, synchronized=True),
            }
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            updates, dense_state = dense_update(at.to_dense(grads), dense_state, dense)
            dense = optax.apply_updates(dense, updates)
        flushed, _ = flush(params, state)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), flushed, dense)


def test_stopping_and_going_on_changes_no_bit() -> None:
    tx, params = deferred_adam(), initial(np.float32)
    ids, values = draw(120, dtype=np.float32)
    whole = train(tx, params, (ids, values))[:2]
    for stop in (1, 50):
        params_then, state_then, _ = train(tx, params, (ids[:stop], values[:stop]))
        stored = jax.tree.map(np.array, (params_then, state_then))
        params_then, state_then = jax.tree.map(jnp.asarray, stored)
        rest = train(tx, params_then, (ids[stop:], values[stop:]), state_then)[:2]
        jax.tree.map(np.testing.assert_array_equal, rest, whole)


@pytest.mark.parametrize("how", [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_types_of_the_state_stay(how: Any, dtype: Any) -> None:
    params = jax.tree.map(lambda p: p.astype(dtype), initial(np.float32))
    tx = deferred_adam()
    state = tx.init(params)
    rows = at.SparseRows(jnp.array([1, 2]), jnp.ones((2, D), dtype), V, synchronized=True)
    updates, new = how(tx.update)({"table": rows, "bias": params["bias"]}, state, params)
    assert types(new) == types(state)
    assert updates["table"].dtype == dtype


def test_memory_is_of_the_rows_touched_and_nothing_of_the_tables_size_is_copied() -> None:
    temporaries = []
    for rows in (1_000_000, 4_000_000):
        params = {"t": jax.ShapeDtypeStruct((rows, 16), jnp.float32)}
        tx = at.deferred_adam(0.1, tables="t", weight_decay=0.1, max_idle=4096)
        state = jax.eval_shape(tx.init, params)

        def step(params: Any, state: Any, ids: Any, values: Any, rows: Any = rows, tx: Any = tx):
            updates, state = tx.update(
                {"t": at.SparseRows(ids, values, rows, synchronized=True)}, state, params
            )
            return at.apply_updates(params, updates), state

        ids = jax.ShapeDtypeStruct((512,), jnp.int32)
        values = jax.ShapeDtypeStruct((512, 16), jnp.float32)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, ids, values)
        compiled = lowered.compile()
        assert not re.search(rf"\[{rows}[,\]]\S* copy\(", compiled.as_text())
        memory: Any = compiled.memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[1] < 4 * temporaries[0] < 20e6


@pytest.mark.parametrize(
    ("n", "weight_decay"),
    in_tiers(
        itertools.product((512, 40_000), (None, 0.1)),  # at once, and in blocks
        lambda n, weight_decay: (n == 512) == (weight_decay is None),
    ),
)
def test_a_whole_step_copies_neither_table_nor_ring(n: int, weight_decay: float | None) -> None:
    rows, width, max_idle = 100_000, 64, 4096
    tx = at.deferred_adam(0.1, tables="t", weight_decay=weight_decay, max_idle=max_idle)

    def step(params: Any, state: Any, ids: Any, targets: Any) -> Any:
        grads = at.grad(lambda p: jnp.sum((p["t"][ids] - targets) ** 2), rows_from=state)(params)
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), state

    params = {"t": jax.ShapeDtypeStruct((rows, width), jnp.float32)}
    inputs = params, jax.eval_shape(tx.init, params)
    ids = jax.ShapeDtypeStruct((n,), jnp.int32)
    targets = jax.ShapeDtypeStruct((n, width), jnp.float32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*inputs, ids, targets).compile()
    assert not re.findall(rf"\w+\[(?:{rows}|{max_idle + 1})[,\]]\S* copy\(", compiled.as_text())


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 0.9995, "b2": 0.999}, "b1 must be below sqrt"),
        ({"eps": 0.0}, "eps"),
        ({"b1": 0.999, "b2": 0.9985}, "max_idle must be at least"),
        ({"max_idle": 10}, "max_idle must be at least"),
        ({"max_idle": 0}, "max_idle"),
        ({"b1": optax.constant_schedule(0.9)}, "b1"),
        ({"b2": jnp.ones(2)}, "b2 must be a number"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"tables": "["}, "tables"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        at.deferred_adam(1e-3, **{"tables": "t", **arguments})


def test_bad_tables_are_refused_by_path() -> None:
    params = {"t": jnp.ones((4, 2)), "ids": jnp.arange(3), "scalar": jnp.ones(())}
    for tables, error, message in [
        ("nothing", ValueError, "'nothing' of tables; the paths are"),
        ("ids", TypeError, "'ids'.*floating dtype, got int32"),
        ("scalar", ValueError, "'scalar'.*scalar"),
    ]:
        with pytest.raises(error, match=message):
            at.deferred_adam(1e-3, tables=tables).init(params)


def test_update_needs_params_and_takes_a_gradient_of_no_rows() -> None:
    params = {"t": jnp.ones((4, 2)), "w": jnp.ones(2)}
    tx = at.deferred_adam(1e-3, tables="t")
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
    rows = at.SparseRows(jnp.zeros(0, jnp.int32), jnp.zeros((0, 2)), 4)
    updates: Any = jax.jit(tx.update)({"t": rows, "w": None}, tx.init(params), params)[0]
    assert updates["w"] is None
    np.testing.assert_array_equal(params["t"] + updates["t"], params["t"])


def test_rows_of_stacked_tables_are_refused_with_the_way_out() -> None:
    params = {"t": jnp.ones((3, 4, 2)), "w": jnp.ones(2)}
    rows = at.SparseRows(jnp.array([1]), jnp.ones((1, 2)), 12, leading_shape=(3, 4))
    tx = at.deferred_adam(1e-3, tables="t")
    with pytest.raises(ValueError, match=r"'t'.*stacked.*12 rows.*row f \* 4 \+ v.*lazy_adam"):
        tx.update({"t": rows, "w": params["w"]}, tx.init(params), params)


def test_deferred_inside_lazy_and_an_average_after_it_are_refused() -> None:
    params = {"t": jnp.ones((4, 2))}
    deferred = at.deferred_adam(1e-3, tables="t")
    with pytest.raises(ValueError, match="lazy cannot hold deferred_adam"):
        at.lazy(deferred).init(params)
    averaged = optax.chain(deferred, at.params_ema(0.9))
    rows = at.SparseRows(jnp.array([1]), jnp.ones((1, 2)), 4, synchronized=True)
    with pytest.raises(TypeError, match="'t' has a row gradient"):
        jax.eval_shape(averaged.update, {"t": rows}, averaged.init(params), params)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(
            lambda p: jnp.sum(p["table"] ** 3) + jnp.sum(p["bias"]), marks=pytest.mark.slow
        ),
        lambda p: jnp.sum(p["table"][jnp.array([0, 3])] ** 3) + jnp.sum(p["table"] ** 2),
        pytest.param(
            lambda p: jnp.sum(jnp.sum(jax.lax.stop_gradient(p["table"])) * p["table"][1] ** 2),
            marks=pytest.mark.slow,
        ),
        lambda p: jax.jit(lambda t: jnp.sum(t**2) + jnp.sum(t[2] ** 3))(p["table"]),
    ],
)
def test_a_table_used_as_a_whole_is_brought_up_to_date_for_it(loss: Any) -> None:
    with x64():
        params, state, _ = train(deferred_adam(), initial(), draw(100))
        value, grads = jax.jit(at.value_and_grad(loss, rows_from=state))(params)
        flushed, _ = flush(params, state)
        assert np.abs(flushed["table"] - params["table"]).max() > 1e-4
        expected, dense = jax.value_and_grad(loss)(flushed)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(at.to_dense(grads)["table"], dense["table"], rtol=1e-12)


def test_states_that_do_not_belong_to_the_tables_read_are_refused() -> None:
    params = {"t": jnp.ones((4, 2))}
    tx = at.deferred_adam(1e-3, tables="t")
    state = tx.init(params)

    def gradient(loss: Any, params: Any = params, state: Any = state) -> Any:
        return at.grad(loss, rows_from=state)(params)

    with pytest.raises(ValueError, match="no DeferredAdamState"):
        gradient(lambda p: jnp.sum(p["t"][1]), state=optax.EmptyState())
    with pytest.raises(ValueError, match="two deferred states"):
        gradient(lambda p: jnp.sum(p["t"][1]), state=(state, state))
    with pytest.raises(ValueError, match="table at 't'.*'other'"):
        gradient(lambda p: jnp.sum(p["other"][1]), {"other": params["t"]})
    with pytest.raises(ValueError, match="'x' is no table of deferred_adam"):
        at.catch_up(params, state, {"x": jnp.arange(2)})
    rows = gradient(lambda p: jnp.float32(1.0))["t"]
    assert isinstance(rows, at.SparseRows)
    assert rows.indices.shape == (0,)


TAKES_A_STATE: dict[str, Any] = {
    "flush": at.flush,
    "owed": at.owed,
    # Of as many rows as flush, whose operations are compiled.
    "catch_up": lambda p, s: at.catch_up(p, s, {"table": np.arange(V)}),
    "update": lambda p, s: deferred_adam().update({"bias": p["bias"], "table": p["table"]}, s, p),
    "grad": lambda p, s: at.to_dense(
        at.grad(lambda p: jnp.sum(p["table"][1] ** 2), rows_from=s)(p)
    ),
}


# Training goes on from such states in the first tier of test_checkpoints too.
@pytest.mark.parametrize("name", in_tiers(TAKES_A_STATE, lambda name: name != "update"))
def test_a_state_of_numpy_arrays_is_taken_as_it_is(name: str) -> None:
    """As a checkpoint gives it back."""
    call = TAKES_A_STATE[name]
    params, state, _ = train(deferred_adam(), initial(np.float32), draw(20, dtype=np.float32))
    expected = jax.device_get(call(params, state))
    assert_close(jax.device_get(call(*jax.device_get((params, state)))), expected, rtol=1e-6)


# Gradients whose squares overflow


@pytest.mark.parametrize("large", [2e19, 1e30])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_idle_row_with_a_large_moment_stays_dense_adams(large: float, amsgrad: bool) -> None:
    ids, values = draw(20, dtype=np.float32)
    ids = ids.at[1:].set(jnp.where(ids[1:] == ids[0, 0], V, ids[1:]))  # the row then idles
    batches = ids, values.at[0, 0, 0].set(large)
    tx, dense = (make(amsgrad=amsgrad, max_of="raw") for make in (deferred_adam, adam))
    params, state, _ = train(tx, initial(np.float32), batches)
    expected, dense_state, _ = train(dense, initial(np.float32), batches, dense=True)
    params, state = at.flush(params, state)
    assert np.isfinite(params["table"]).all()
    assert_close(params["table"], expected["table"], rtol=1e-5, atol=1e-6)
    assert_close(state.nu["table"], dense_state[0].nu["table"], rtol=1e-4)


def test_a_large_gradient_does_not_skip_every_later_step() -> None:
    tx = at.skip_nonfinite(at.dynamic_loss_scale(at.adam(0.1)))
    params: Any = jnp.zeros(3)
    state: Any = tx.init(params)
    for t in range(5):
        grads = 2.0 * (params - 1.0) * state.inner_state.scale
        grads = grads.at[0].set(1e38) if t == 0 else grads
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.skipped) == int(state.inner_state.skipped) == 0
    assert np.isfinite(params).all() and params[1] > 0.4


# A count at its largest


@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("rows", [40, pytest.param(290, marks=pytest.mark.slow)])
def test_rows_stay_dense_adams_after_the_largest_count(
    rows: int, weight_decay: float | None
) -> None:
    """Which an int32 reaches after 2^31 - 1 steps; dense Adam goes on with it."""
    start, steps = 2**31 - 1 - 20, 700
    generator = np.random.default_rng(0)
    ids = generator.integers(0, rows // 3, (steps, 3))
    values = generator.standard_normal((steps, 3, D))
    with x64():
        table = jnp.asarray(generator.standard_normal((rows, D)))
        tx = at.deferred_adam(0.01, tables="t", max_idle=300, weight_decay=weight_decay)
        dense = at.adam(0.01, weight_decay=weight_decay)

        def late(path: Any, x: Any) -> Any:
            return jnp.full_like(x, start) if jnp.issubdtype(x.dtype, jnp.integer) else x

        states = [jax.tree_util.tree_map_with_path(late, x.init({"t": table})) for x in (tx, dense)]

        def step(carry: Any, batch: Any) -> Any:
            params, state, dense_params, dense_state = carry
            grads = at.SparseRows(*batch, rows, synchronized=True)
            updates, state = tx.update({"t": grads}, state, params)
            params = at.apply_updates(params, updates)
            dense_grads = {"t": grads.to_dense()}
            updates, dense_state = dense.update(dense_grads, dense_state, dense_params)
            dense_params = at.apply_updates(dense_params, updates)
            longest_gap = at.owed(params, state)["t"].longest_gap
            return (params, state, dense_params, dense_state), longest_gap

        carry = {"t": table}, states[0], {"t": table}, states[1]
        batches = jnp.asarray(ids), jnp.asarray(values)
        (params, state, expected, _), gaps = jax.jit(lambda *x: jax.lax.scan(step, *x))(
            carry, batches
        )
        assert 2**31 - 302 < int(state.count) < 2**31
        assert rows - 1 <= int(gaps.max()) <= 300 and int(gaps.min()) >= 0
        assert_close(at.flush(params, state)[0], expected, rtol=1e-9)
        assert np.abs(expected["t"] - table).max() > 0.1


# Tables of no rows


@pytest.mark.parametrize("jit", [False, True])
def test_a_table_of_no_rows_is_one(jit: bool) -> None:
    params = {"t": jnp.ones((0, 2)), "w": jnp.ones(2)}
    grads = {
        "t": at.SparseRows(np.array([0, 0]), np.ones((2, 2), np.float32), 0, synchronized=True),
        "w": params["w"],
    }
    for tx in (
        at.lazy_adam(0.1, amsgrad=True, clip_global_norm=1.0, tables=()),
        at.deferred_adam(0.1, tables="t", weight_decay=0.1),
        at.freeze_rows(at.deferred_adam(0.1, tables="t"), {"t": []}),
        at.accumulate(at.master_weights(at.lazy_adam(0.1)), 1, like=grads),
    ):
        state = tx.init(params)
        for g in (grads, {**grads, "t": params["t"]}):
            if isinstance(g["t"], at.SparseRows) or not isinstance(state, at.AccumulateState):
                updates, new = (jax.jit(tx.update) if jit else tx.update)(g, state, params)
                assert at.apply_updates(params, updates)["t"].shape == (0, 2)
                assert types(new) == types(state)
        larger, _ = at.resize(params, state, {"t": 3})
        assert larger["t"].shape == (3, 2)


def test_a_deferred_table_of_no_rows_is_read() -> None:
    params = {"t": jnp.ones((0, 2)), "w": jnp.ones(2)}
    state = at.deferred_adam(0.1, tables="t").init(params)
    assert at.flush(params, state)[0]["t"].shape == (0, 2)
    assert at.catch_up(params, state, {"t": jnp.arange(2)})[0]["t"].shape == (0, 2)
    assert jax.tree.leaves(at.owed(params, state)) == [0, 0]
    ids = jnp.zeros(0, jnp.int32)
    grads = at.grad(lambda p: jnp.sum(p["t"][ids]) + p["w"].sum(), rows_from=state)(params)
    assert isinstance(grads["t"], at.SparseRows)
    assert "gap up to 0" in at.summary(params, state)


# Optax's tools


def test_hyperparameters_injected_outside_of_jit_are_numbers() -> None:
    params, (ids, values) = initial(np.float32), draw(1, dtype=np.float32)
    grads = {
        "bias": values[0, 0, :2],
        "table": at.SparseRows(ids[0], values[0], V, synchronized=True),
    }
    injected = optax.inject_hyperparams(at.deferred_adam)(0.1, b1=0.5, tables="table", max_idle=300)
    updates, state = injected.update(grads, injected.init(params), params)
    tx = deferred_adam(0.1, b1=0.5, b2=float(jnp.float32(0.999)), max_idle=300)
    expected, _ = tx.update(grads, tx.init(params), params)
    assert_close(*map(at.to_dense, (updates, expected)))
    with pytest.raises(TypeError, match="^b1 must .*inject_hyperparams.*static_args=") as error:
        jax.eval_shape(injected.update, grads, state, params)
    line = re.search(r"static_args=(\(.*?\))", str(error.value))
    assert line is not None
    static = tuple(re.findall(r"'(\w+)'", line[1]))
    traced = optax.inject_hyperparams(at.deferred_adam, static_args=static)(
        0.1,
        tables=lambda path, leaf: path == "table",
        weight_decay=0.1,
        weight_decay_mask=at.path_mask("table"),
        mu_dtype=jnp.float32,
        max_idle=300,
    )
    state = jax.eval_shape(traced.init, params)
    jax.eval_shape(traced.update, grads, state, params)
    for option in (
        {"b1": np.float32(0.5)},
        {"eps": jnp.full(1, 0.5)},
        {"max_idle": jnp.array([300])},
    ):
        at.deferred_adam(0.1, tables="table", **{"max_idle": 300, **option})


LIKE = jax.eval_shape(
    at.grad(lambda p: jnp.sum(p["table"][np.arange(2)]) + jnp.sum(p["bias"])), initial()
)


@pytest.mark.parametrize(
    ("tx", "slots"),
    [
        (deferred_adam(), 5),
        (deferred_adam(weight_decay=0.1, amsgrad=True), 7),
        (at.freeze_rows(deferred_adam(), {"table": 0}), 6),
        (at.accumulate(deferred_adam(), 2, like=LIKE), 8),
    ],
    ids=["deferred", "AMSGrad, decayed", "frozen", "accumulated"],
)
def test_map_params_finds_the_slots(tx: Any, slots: int) -> None:
    state = tx.init(initial())
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda x: "slot", state, transform_non_params=lambda x: "other"
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    paths = [
        at.path_str(keys) for keys, x in jax.tree_util.tree_leaves_with_path(mapped) if x == "slot"
    ]
    assert len(paths) == slots
    assert all(path.split("/")[-1] in ("table", "bias", "values", "indices") for path in paths)
    where = initial() | {"table": "of tables", "bias": "of biases"}
    mapped = optax.tree_utils.tree_map_params(
        *(tx, lambda x, y: y, state, where),
        is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode | at.SparseRows),
    )
    assert {"of tables", "of biases"} < {*map(str, jax.tree.leaves(mapped))}


def test_map_params_leaves_alone_the_groups_that_a_mask_decides() -> None:
    tx = deferred_adam(weight_decay=0.1, weight_decay_mask=at.path_mask("table"))
    state = tx.init(initial())
    mapped = optax.tree_utils.tree_map_params(tx, jnp.zeros_like, state)
    assert types(mapped) == types(state)
