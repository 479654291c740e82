"""What `rows_from` computes for the forward pass is used again by the update."""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, in_tiers, normal
from test_budgets import equations

import adam_transforms as at
from adam_transforms._core import sparse_rows
from adam_transforms._core.sparse_rows import kept_read
from adam_transforms._embeddings.reads import kept

V, D, STEPS = 50, 3, 6
FLOAT32 = jnp.float32


def parameters(dtype: Any = FLOAT32) -> dict[str, jax.Array]:
    return {
        "table": jnp.asarray(normal(0, V, D), dtype),
        "other": jnp.asarray(normal(1, V + 7, D), dtype),
    }


def one_read(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum((params["table"][ids] - 1.0) ** 2)


def two_reads(params: Any, ids: jax.Array) -> jax.Array:
    first, second = params["table"][ids[:3]], params["table"][ids[2:]]
    return one_read(params, ids) + jnp.sum(first @ second.T)


def two_tables(params: Any, ids: jax.Array) -> jax.Array:
    return one_read(params, ids) + jnp.sum(params["other"][ids[:4]] ** 2)


def function_of_rows(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(params["table"])[ids] ** 2)


def columns(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum(params["table"].T[:, ids] ** 2)


def in_a_loop(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.map(lambda i: params["table"][i] ** 2, ids))


def filled(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum(jnp.take(params["table"], ids + 20, axis=0, mode="fill", fill_value=2.0) ** 2)


class Case:
    """A training: its loss, how many reads of tables that has, and whether they are kept."""

    def __init__(
        self,
        loss: Callable[..., jax.Array],
        reads: int = 1,
        *,
        kept: bool = True,
        tables: Any = "table",
        wrap: Callable[[Any], Any] = lambda tx: tx,
        dtype: Any = FLOAT32,
        **options: Any,
    ) -> None:
        self.loss, self.reads, self.kept, self.dtype = loss, reads, kept, dtype
        self.tx = wrap(at.deferred_adam(0.1, tables=tables, max_idle=250, **options))

    def grads(self, params: Any, state: Any, ids: jax.Array) -> Any:
        return at.grad(self.loss, rows_from=state)(params, ids)

    def update(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(self, params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any]:
        return self.update(self.grads(params, state, ids), state, params)

    def train(self, step: Callable[..., Any]) -> tuple[Any, Any]:
        params = parameters(self.dtype)
        state = self.tx.init(params)
        for ids in BATCHES:
            params, state = step(params, state, ids)
        return params, state


BATCHES = jnp.asarray(np.random.default_rng(0).integers(-2, V, (STEPS, 6)), jnp.int32)
CASES = {
    "one read": Case(one_read),
    "two reads": Case(two_reads, 3),
    "two tables": Case(two_tables, 2, tables=["table", "other"]),
    "a function of rows": Case(function_of_rows),
    "columns": Case(columns),
    "filled": Case(filled),
    "weight decay": Case(one_read, weight_decay=0.1),
    "amsgrad": Case(one_read, amsgrad=True),
    "bfloat16": Case(one_read, dtype=jnp.bfloat16),
    "clipped": Case(
        one_read, wrap=lambda tx: optax.chain(at.lazy(optax.clip_by_global_norm(1.0)), tx)
    ),
    "in a loop": Case(in_a_loop, kept=False),
    "skip_nonfinite": Case(one_read, kept=False, wrap=at.skip_nonfinite),
}
some = pytest.mark.parametrize(
    "name", in_tiers(CASES, lambda name: name in ("two reads", "weight decay", "clipped"))
)


def times_computed(step: Any, *args: Any, name: str = "_pending_update") -> int:
    """How often a program computes what rows missed, or calls another jitted function."""
    program = jax.make_jaxpr(step)(*args).jaxpr
    names = [str(eqn.params.get("name")) for eqn in equations(program)]
    return names.count(name)


@some
def test_what_rows_missed_is_computed_once(name: str) -> None:
    case, params = CASES[name], parameters(CASES[name].dtype)
    state = case.tx.init(params)
    times = times_computed(case.step, params, state, BATCHES[0])
    assert (times == case.reads) is case.kept and times >= case.reads


def test_a_gradient_that_is_not_changed_is_summed_once() -> None:
    for name, sums in (("one read", 1), ("clipped", 2)):
        case, params = CASES[name], parameters()
        arguments = (params, case.tx.init(params), BATCHES[0])
        assert times_computed(case.step, *arguments, name="_sums") == sums
        assert case.grads(*arguments)["table"].indices.shape == BATCHES[0].shape


@some
def test_a_step_is_the_same_as_in_two_programs(name: str) -> None:
    case = CASES[name]
    grads, update = jax.jit(case.grads), jax.jit(case.update)

    def apart(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any]:
        return update(grads(params, state, ids), state, params)

    once, twice = case.train(jax.jit(case.step)), case.train(apart)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if case.dtype == jnp.bfloat16 else {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(once), jax.tree.leaves(twice), strict=True
    ):
        assert a.dtype == b.dtype, path
        assert_close(a, b, **tolerance)


@pytest.mark.every_case
@pytest.mark.parametrize("limit", ["KEPT_BYTES", "PACKED_BYTES"])
@pytest.mark.parametrize("is_kept", [False, True])
def test_few_reads_are_kept(limit: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both limits are for float32, and include the 16 rows that a round robin has room for."""
    module = {"KEPT_BYTES": kept, "PACKED_BYTES": sparse_rows}[limit]
    nbytes = (BATCHES.shape[1] + 16) * D * 4
    monkeypatch.setattr(module, limit, nbytes + is_kept)
    for name in ("one read", "bfloat16"):
        case, params = CASES[name], parameters(CASES[name].dtype)
        times = times_computed(case.step, params, case.tx.init(params), BATCHES[0])
        assert (times == 1) is is_kept


def flushed(case: Case, params: Any, state: Any) -> tuple[Any, Any]:
    return at.flush(params, state)


def caught_up(case: Case, params: Any, state: Any) -> tuple[Any, Any]:
    return at.catch_up(params, state, {"table": BATCHES[1]})


def one_more_step(case: Case, params: Any, state: Any) -> tuple[Any, Any]:
    return case.step(params, state, BATCHES[2])


@pytest.mark.every_case
@pytest.mark.parametrize("between", [flushed, caught_up, one_more_step])
def test_a_state_that_has_changed_since_is_not_that_of_the_reads(between: Any) -> None:
    """An update whose gradient is older than its state is that of two programs."""
    case = CASES["one read"]
    params, state = case.train(jax.jit(case.step))

    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any]:
        grads = case.grads(params, state, ids)
        params, state = between(case, params, state)
        return case.update(grads, state, params)

    grads = jax.jit(case.grads)(params, state, BATCHES[0])
    expected = jax.jit(case.update)(grads, *reversed(between(case, params, state)))
    found = jax.jit(step)(params, state, BATCHES[0])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)


def test_equal_arrays_of_another_state_are_not_those_of_the_reads() -> None:
    case, params = CASES["one read"], parameters()
    state = case.tx.init(params)
    grads = case.grads(params, state, BATCHES[0])
    table = kept_read(grads["table"]).table
    assert kept_read(grads["table"]).is_of(table)
    assert not kept_read(grads["table"]).is_of(jax.tree.map(jnp.copy, table))


def test_what_is_kept_is_no_part_of_the_gradient() -> None:
    case, params = CASES["one read"], parameters()
    grads = case.grads(params, case.tx.init(params), BATCHES[0])["table"]
    assert kept_read(grads) is not None and kept_read(2.0 * grads) is not None
    assert len(jax.tree.leaves(grads)) == 2
    for copied in (
        jax.tree.map(lambda x: x, grads),
        pickle.loads(pickle.dumps(grads)),
        grads.with_rows(grads.indices, grads.values),
        grads + grads,
    ):
        assert kept_read(copied) is None
        assert copied.synchronized
