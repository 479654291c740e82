"""Training loops of Flax and plain trees, each as its users write it."""

import functools
import re
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx, serialization
from flax.training.train_state import TrainState

import adam_transforms as at
import adam_transforms.flax as at_flax

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
V, D, N = 40, 8, 6
MOST_IDLE = 250


def batch_of(step: int) -> Any:
    rng = np.random.default_rng(step)
    return rng.integers(0, V, N).astype(np.int32), rng.standard_normal((N, 1), np.float32)


def squared_error(outputs: Any, targets: Any) -> Any:
    return jnp.mean((outputs - targets) ** 2)


def deferred() -> Any:
    return at.deferred_adam(0.1, tables="embedding", eps_hat=True, max_idle=MOST_IDLE)


def tower(embed: Any, hidden: Any, out: Any, ids: Any) -> Any:
    return out(jax.nn.relu(hidden(embed(ids))))


# ---- linen, with TrainState ----


class LinenTower(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        return tower(nn.Embed(V, D), nn.Dense(D), nn.Dense(1), ids)


@functools.cache
def linen_run(kind: str) -> Any:
    """The `TrainState` after 6 steps, and a function that makes a step."""
    model = LinenTower()
    params = model.init(jax.random.key(0), batch_of(0)[0])
    tx = {"dense": at.adam(0.1, eps_hat=True), "lazy": at.lazy_adam(0.1), "deferred": deferred()}[
        kind
    ]
    train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params: Any, ids: Any, targets: Any) -> Any:
        return squared_error(train.apply_fn(params, ids), targets)

    @jax.jit
    def step(train: Any, batch: Any) -> Any:
        if kind == "dense":
            grads = jax.grad(loss)(train.params, *batch)
        else:
            rows_from = train.opt_state if kind == "deferred" else None
            grads = at.grad(loss, rows_from=rows_from)(train.params, *batch)
        return train.apply_gradients(grads=grads)

    for number in range(6):
        train = step(train, batch_of(number))
    return train, step


def test_train_state_with_deferred_rows_follows_dense_adam() -> None:
    params, state = at.dense_equivalent(
        linen_run("deferred")[0].params, linen_run("deferred")[0].opt_state
    )
    dense = linen_run("dense")[0]
    helpers.assert_close(params, dense.params, rtol=1e-4, atol=1e-5)
    helpers.assert_close(state.nu, dense.opt_state[0].nu, rtol=1e-4, atol=1e-7)


def test_train_state_with_lazy_rows_moves_only_what_was_read() -> None:
    train, _ = linen_run("lazy")
    before = LinenTower().init(jax.random.key(0), batch_of(0)[0])
    table, was = (p["params"]["Embed_0"]["embedding"] for p in (train.params, before))
    read = np.isin(np.arange(V), np.concatenate([batch_of(number)[0] for number in range(6)]))
    assert 0 < read.sum() < V
    np.testing.assert_array_equal(np.any(table != was, axis=1), read)


@pytest.mark.parametrize("kind", ["dense", "lazy", "deferred"])
def test_train_state_resumes_from_its_bytes(kind: str) -> None:
    train, step = linen_run(kind)
    zeros = jax.tree.map(jnp.zeros_like, train)
    restored = serialization.from_bytes(zeros, serialization.to_bytes(train))
    helpers.assert_bits_equal(
        jax.device_get(step(restored, batch_of(6))), jax.device_get(step(train, batch_of(6)))
    )


def test_row_gradients_pass_through_bytes() -> None:
    values = jnp.asarray(helpers.normal(0, 3, D))
    rows = at.SparseRows(jnp.array([3, 1, V]), values, V, unique=True, synchronized=True)
    batch = jax.vmap(lambda x: rows.with_values(rows.values * x))(jnp.arange(2.0))
    stack = at.SparseRows(rows.indices, rows.values, V, leading_shape=(V // 4, 4))
    for tree in ({"table": rows}, {"table": batch}, {"table": stack}):
        zeros = jax.tree.map(lambda x: x, tree)
        restored = serialization.from_bytes(zeros, serialization.to_bytes(tree))
        helpers.assert_bits_equal(restored, tree)


# ---- nnx, with Optimizer ----


class Tower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.hidden = nnx.Linear(D, D, rngs=rngs)
        self.out = nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        return tower(self.embed, self.hidden, self.out, ids)


class RestlessTower(Tower):
    """One that draws random numbers, and changes while it reads."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        read = self.dropout(self.norm(self.embed(ids)))
        return self.out(jax.nn.relu(self.hidden(read)))


def nnx_loss(model: Any, batch: Any) -> Any:
    ids, targets = batch
    return squared_error(model(ids), targets)


def leaves_of(tree: Any) -> list[Any]:
    """The numbers in a module or a state, keys as their data."""
    arrays = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [np.asarray(x) for x in arrays]


def assert_same_arrays(actual: Any, expected: Any, rtol: float, atol: float) -> None:
    for a, e in zip(leaves_of(actual), leaves_of(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


def nnx_step(kind: str) -> Any:
    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        if kind == "dense":
            value, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        elif kind == "deferred":
            rows_from = optimizer.opt_state
            value, grads = at_flax.value_and_grad(nnx_loss, rows_from=rows_from)(model, batch)
        else:
            value, grads = at_flax.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return value

    return step


def nnx_run(kind: str, tx: Any, make: Any = Tower, steps: int = 6) -> Any:
    """The model, the optimizer, the step function and the losses."""
    model = make(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx_step(kind)
    losses = [float(step(model, optimizer, batch_of(number))) for number in range(steps)]
    return model, optimizer, step, losses


@pytest.mark.parametrize("make", [Tower, RestlessTower])
def test_gradients_of_a_module_are_nnx_s_and_it_changes_as_much(make: Any) -> None:
    theirs, ours = make(nnx.Rngs(0)), make(nnx.Rngs(0))
    expected, expected_grads = nnx.jit(nnx.value_and_grad(nnx_loss))(theirs, batch_of(0))
    value, grads = nnx.jit(at_flax.value_and_grad(nnx_loss))(ours, batch_of(0))
    pure = nnx.to_pure_dict(grads)
    assert isinstance(pure["embed"]["embedding"], at.SparseRows)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    dense = at.to_dense(pure)
    helpers.assert_close(dense, nnx.to_pure_dict(expected_grads), rtol=1e-5, atol=1e-7)
    assert_same_arrays(nnx.state(ours), nnx.state(theirs), rtol=1e-6, atol=1e-7)


def test_module_with_deferred_rows_follows_dense_adam() -> None:
    dense_model, *_, dense_losses = nnx_run("dense", at.adam(0.1, eps_hat=True), RestlessTower)
    model, optimizer, _, losses = nnx_run("deferred", deferred(), RestlessTower)
    np.testing.assert_allclose(losses, dense_losses, rtol=1e-4)
    params, optimizer.opt_state = at.flush(nnx.state(model, nnx.Param), optimizer.opt_state)
    nnx.update(model, params)
    assert_same_arrays(nnx.state(model), nnx.state(dense_model), rtol=1e-3, atol=1e-4)


def test_module_with_lazy_rows_moves_only_what_was_read() -> None:
    model, *_ = nnx_run("lazy", at.lazy_adam(0.1))
    was = Tower(nnx.Rngs(0)).embed.embedding
    read = np.isin(np.arange(V), np.concatenate([batch_of(number)[0] for number in range(6)]))
    moved = np.any(model.embed.embedding[...] != was[...], axis=1)
    np.testing.assert_array_equal(moved, read)


def test_deferred_tables_of_a_module_are_looked_after_by_path() -> None:
    model, optimizer, step, _ = nnx_run("deferred", deferred())
    params, path = nnx.state(model, nnx.Param), "embed/embedding"
    owed = at.owed(params, optimizer.opt_state)[path]
    assert int(owed.rows) > 1 and int(owed.longest_gap) == 6
    row = {path: batch_of(0)[0]}
    caught_up, state = at.catch_up(params, optimizer.opt_state, row)
    assert int(at.owed(caught_up, state)[path].rows) < int(owed.rows)
    flushed, _ = at.flush(params, optimizer.opt_state)
    dense, adam = at.dense_equivalent(params, optimizer.opt_state)
    helpers.assert_bits_equal(jax.tree.leaves(dense), jax.tree.leaves(flushed))
    assert int(jax.tree.leaves(adam.count)[0]) == 6
    nnx.update(model, caught_up)
    optimizer.opt_state = state
    assert np.isfinite(float(step(model, optimizer, batch_of(6))))


@pytest.mark.parametrize("kind", [pytest.param("deferred", marks=pytest.mark.slow), "accumulated"])
def test_module_and_optimizer_stop_and_resume(kind: str, tmp_path: Path) -> None:
    """Through Orbax, as Flax's guide has it."""
    ocp = pytest.importorskip("orbax.checkpoint")
    like = nnx.eval_shape(at_flax.grad(nnx_loss), RestlessTower(nnx.Rngs(0)), batch_of(0))
    accumulated = at.accumulate(at.lazy_adam(0.1), 2, like=like)
    tx = deferred() if kind == "deferred" else at.dynamic_loss_scale(accumulated)
    model, optimizer, step, _ = nnx_run(kind, tx, RestlessTower, steps=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        resumed = RestlessTower(nnx.Rngs(1))
        resumed_optimizer = nnx.Optimizer(resumed, tx, wrt=nnx.Param)
        both = (resumed, resumed_optimizer)
        nnx.update(both, checkpointer.restore(tmp_path / "checkpoint", nnx.state(both)))
    for number in range(3, 6):
        step(model, optimizer, batch_of(number))
        step(resumed, resumed_optimizer, batch_of(number))
    expected = leaves_of(nnx.state((model, optimizer)))
    helpers.assert_bits_equal(leaves_of(nnx.state(both)), expected)


@pytest.mark.parametrize("shapes", ["as they are", "pure"])
def test_accumulated_rows_of_a_module_are_those_of_plain_trees(shapes: str) -> None:
    """By `nnx.Optimizer`, which takes the variables off, and by hand, where they stay."""
    model = Tower(nnx.Rngs(0))
    like = nnx.eval_shape(at_flax.grad(nnx_loss), model, batch_of(0))
    like = nnx.State(nnx.to_pure_dict(like)) if shapes == "pure" else like
    tx = at.accumulate(at.lazy_adam(0.1), 2, like=like)
    graphdef, params = nnx.split(model)

    def loss(params: Any, batch: Any) -> Any:
        return nnx_loss(nnx.merge(graphdef, params), batch)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(at.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    first = helpers.types(state)
    trained, *_ = nnx_run("lazy", tx, steps=5)
    for number in range(5):
        params, state = step(params, state, batch_of(number))
        assert helpers.types(state) == first
    assert_same_arrays(nnx.state(trained), params, rtol=1e-6, atol=1e-7)
    assert state.acc["embed"]["embedding"].values.shape == (2 * N, D)


def test_module_s_tables_are_updated_in_place() -> None:
    """No temporary of a table's size, whatever it is wrapped in."""
    rows = 100_000

    class Large(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(rows, D, rngs=rngs)

        def __call__(self, ids: Any) -> Any:
            return jnp.sum(self.embed(ids), axis=-1, keepdims=True)

    model = Large(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, at.lazy_adam(0.1), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        value, grads = at_flax.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return value, nnx.state((model, optimizer))

    compiled = jax.jit(step, donate_argnums=0).lower(state, batch_of(0)).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < rows * D
    assert not re.search(rf"= f32\[{rows},{D}\]\S* copy\(", compiled.as_text())


def test_auxiliary_output_and_other_modules_come_back() -> None:
    model, metric, rngs = RestlessTower(nnx.Rngs(0)), nnx.metrics.Average(), nnx.Rngs(3)

    def loss(model: Any, batch: Any, metric: Any, *, rngs: Any) -> Any:
        outputs = model(batch[0]) + rngs.normal((N, 1))
        value = squared_error(outputs, batch[1])
        metric.update(values=value)
        return value, {"outputs": outputs, "name": "tower"}

    (value, aux), grads = at_flax.value_and_grad(loss, has_aux=True)(
        model, batch_of(0), metric, rngs=rngs
    )
    assert aux["outputs"].shape == (N, 1) and aux["name"] == "tower"
    assert float(metric.compute()) == float(value)
    assert [int(x) for x in jax.tree.leaves(nnx.state((model, rngs), nnx.RngCount))] == [1, 1]
    only_grads, aux = at_flax.grad(loss, has_aux=True)(
        RestlessTower(nnx.Rngs(0)), batch_of(0), nnx.metrics.Average(), rngs=nnx.Rngs(3)
    )
    helpers.assert_bits_equal(jax.tree.leaves(only_grads), jax.tree.leaves(grads))
    assert aux["name"] == "tower"


class Opaque(nnx.Module, pytree=False):
    def __init__(self) -> None:
        self.table = nnx.Param(jnp.ones((V, D)))


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        (lambda: RestlessTower(nnx.Rngs(0)), "'dropout/rngs/count' of uint32"),
        (lambda: {"model": [Opaque()]}, "no tree"),
        (lambda: nnx.Embed(V, D, rngs=nnx.Rngs(0)), "Embed of flax.nnx has state"),
        (lambda: nnx.state(nnx.Rngs(0)), "State of flax.nnx"),
    ],
)
def test_modules_elsewhere_are_refused_with_the_remedy(argument: Any, what: str) -> None:
    def loss(argument: Any) -> Any:
        raise AssertionError("must not be reached")

    with pytest.raises(TypeError, match=f"{what}.*adam_transforms.flax.value_and_grad.*nnx.split"):
        at.value_and_grad(loss)(argument())


def test_a_linen_module_is_no_tree_of_parameters() -> None:
    with pytest.raises(TypeError, match="Dense of flax.linen is no tree.*init"):
        at.grad(lambda model: 0.0)(nn.Dense(3))


def test_variables_made_on_the_way_are_kept() -> None:
    class Remembering(Tower):
        def __call__(self, ids: Any) -> Any:
            self.read = nnx.Intermediate(self.embed(ids))
            return super().__call__(ids)

    model = Remembering(nnx.Rngs(0))
    at_flax.grad(nnx_loss)(model, batch_of(0))
    assert jax.tree.leaves(nnx.state(model, nnx.Intermediate))[0].shape == (N, D)


def test_what_is_differentiated_is_chosen_as_in_nnx() -> None:
    a, b = Tower(nnx.Rngs(0)), Tower(nnx.Rngs(1))

    def loss(a: Any, b: Any, scale: Any) -> Any:
        return scale * (nnx_loss(a, batch_of(0)) + nnx_loss(b, batch_of(0)))

    only_tables = nnx.DiffState(1, nnx.PathContains("embedding"))
    value_and_grad = at_flax.value_and_grad(loss, argnums=(0, only_tables, -1))
    value, (of_a, of_b, of_scale) = value_and_grad(a, b, jnp.float32(2.0))
    assert set(nnx.to_pure_dict(of_a)) == {"embed", "hidden", "out"}
    assert set(nnx.to_pure_dict(of_b)) == {"embed"}
    np.testing.assert_allclose(of_scale, value / 2, rtol=1e-6)
    frozen = at_flax.grad(loss, argnums=nnx.DiffState(0, nnx.BatchStat))(a, b, 1.0)
    assert not jax.tree.leaves(frozen)
    shared = at_flax.grad(lambda a, b: loss(a, b, 1.0))(a, a)
    rows = nnx.to_pure_dict(shared)["embed"]["embedding"]
    expected = jax.grad(lambda t: 2 * _loss_of_table(a, t))(a.embed.embedding[...])
    np.testing.assert_allclose(rows.to_dense(), expected, rtol=1e-5, atol=1e-7)


def _loss_of_table(model: Any, table: Any) -> Any:
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: table if x.shape == (V, D) else x, state)
    return nnx_loss(nnx.merge(graphdef, state), batch_of(0))


def test_plain_trees_are_differentiated_as_they_are() -> None:
    params = {"table": jnp.ones((V, D))}
    grads = at_flax.grad(lambda params, ids: jnp.sum(params["table"][ids]))(params, jnp.arange(3))
    assert grads["table"].shape == (V, D) and isinstance(grads["table"], at.SparseRows)


def test_patterns_are_searched_in_the_module_s_own_paths() -> None:
    model = Tower(nnx.Rngs(0))
    at_flax.grad(lambda m: nnx_loss(m, batch_of(0)), tables="^embed/embedding$")(model)
    with pytest.raises(ValueError, match="'hidden/kernel' is selected by tables"):
        at_flax.grad(lambda m: nnx_loss(m, batch_of(0)), tables="kernel")(model)


def test_what_cannot_be_differentiated_is_refused() -> None:
    model = Tower(nnx.Rngs(0))
    with pytest.raises(TypeError, match="argument 0 is to be differentiated and must be given by"):
        at_flax.grad(nnx_loss)(model=model, batch=batch_of(0))

    def changes(model: Any) -> Any:
        model.embed.embedding[...] = model.embed.embedding[...] * 2
        return nnx_loss(model, batch_of(0))

    with pytest.raises(ValueError, match="'embed/embedding' is differentiated, but the function"):
        at_flax.grad(changes)(model)
    with pytest.raises(ValueError, match="rows_from has a table at 'table'"):
        state = at.deferred_adam(0.1, tables="table").init({"table": jnp.ones((V, D))})
        at_flax.grad(nnx_loss, rows_from=state)(model, batch_of(0))


def test_step_traces_once_and_the_same_with_and_without_jit() -> None:
    traces = 0

    def loss(model: Any, batch: Any) -> Any:
        nonlocal traces
        traces += 1
        return nnx_loss(model, batch)

    def step(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.update(model, at_flax.grad(loss)(model, batch))

    results = []
    for run in (nnx.jit(step), step):
        model = Tower(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, at.lazy_adam(0.1), wrt=nnx.Param)
        for number in range(2):
            run(model, optimizer, batch_of(number))
        results.append(nnx.state((model, optimizer)))
        assert traces in (1, 3)  # without jit once a step
    assert_same_arrays(*results, rtol=1e-4, atol=1e-5)


# ---- plain trees ----


@pytest.mark.parametrize("kind", ["lazy", "deferred"])
def test_plain_trees_of_lists_and_none_train(kind: str) -> None:
    params = [{"table": jnp.asarray(helpers.normal(0, V, D))}, (jnp.ones((D, 1)), None)]
    tx = (
        at.lazy_adam(0.1)
        if kind == "lazy"
        else at.deferred_adam(0.1, tables="^0/table$", eps_hat=True)
    )

    def loss(params: Any, ids: Any, targets: Any) -> Any:
        return squared_error(params[0]["table"][ids] @ params[1][0], targets)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        rows_from = state if kind == "deferred" else None
        value, grads = at.value_and_grad(loss, rows_from=rows_from)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(5):
        params, state, value = step(params, state, batch_of(0))
        losses.append(float(value))
    assert losses[-1] < losses[0]
