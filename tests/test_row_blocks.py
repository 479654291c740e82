import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, in_tiers

import adam_transforms as at
from adam_transforms._embeddings import lazy, row_blocks
from adam_transforms._embeddings.deferred import table_step

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

V, WIDTH, TOUCHED = 200, 8, 75
SCHEDULE = optax.cosine_decay_schedule(0.1, 10)


def random_rows(seed: int, num_rows: int, n: int) -> at.SparseRows:
    """With duplicates and padding."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, num_rows + 2, n, np.int32)
    return at.SparseRows(
        ids, generator.standard_normal((n, WIDTH)).astype(np.float32), num_rows, synchronized=True
    )


def trained(tx: Any, dtype: Any = jnp.float32) -> tuple[Any, str]:
    """Parameters and state after three steps with two tables and a dense leaf, and the program."""
    params = {
        "items": jax.random.normal(jax.random.key(0), (V, WIDTH), dtype),
        "users": jax.random.normal(jax.random.key(1), (50, WIDTH), dtype),
        "w": jnp.ones((WIDTH,), dtype),
    }

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), state

    state = tx.init(params)
    program = ""
    for seed in range(3):
        grads = {
            "items": random_rows(seed, V, TOUCHED),
            "users": random_rows(seed, 50, 17),
            "w": jnp.full((WIDTH,), 0.5, dtype),
        }
        program = program or str(jax.make_jaxpr(step)(params, state, grads))
        params, state = step(params, state, grads)
    return (params, state), program


def test_weakly_typed_gradients_are_promoted_as_in_a_small_step(
    monkeypatch: pytest.MonkeyPatch, relaxed_promotion: None
) -> None:
    params = {"t": jnp.ones((8, 4), jnp.bfloat16), "no columns": jnp.ones((8, 0))}
    values = jnp.full((3, 4), 0.5)
    assert values.aval.weak_type  # pyright: ignore[reportAttributeAccessIssue]

    def update() -> Any:
        tx = at.lazy(optax.adam(0.1))
        indices = jnp.array([1, 1, 2])
        grads = {
            "t": at.SparseRows(indices, values, 8),
            "no columns": at.SparseRows(indices, jnp.ones((3, 0)), 8),
        }
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        return [x.values for x in updates.values()], state

    small = update()
    monkeypatch.setattr(lazy, "LAZY_BYTES", 1)
    assert_same_but_for_rounding(update(), small)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whether blocks are of 16 rows of these tables, or of more than there are."""
    monkeypatch.setattr(lazy, "LAZY_BYTES", 1)
    monkeypatch.setattr(lazy, "SMALL_BYTES", 0)
    monkeypatch.setattr(table_step, "DEFERRED_BYTES", 1)

    def use(small: bool) -> None:
        monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", 16 * WIDTH * 4 if small else 2**40)

    return use


def assert_same_but_for_rounding(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Other kernels contract other multiplications and additions to one rounding."""
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol / 10)


def has_blocks(program: str) -> bool:
    """Whether 16 rows are gathered from a table at a time."""
    return re.search(r"f32\[16,8\] = gather", program) is not None


ROWS_APART: dict[str, Any] = {
    "lazy_adam": lambda: at.lazy_adam(0.1),
    "AMSGrad, decayed, scheduled": lambda: at.lazy_adam(SCHEDULE, amsgrad=True, weight_decay=0.1),
    "scheduled decay rate": lambda: at.lazy_adam(0.1, b1=optax.linear_schedule(0.5, 0.9, 5)),
    "values clipped": lambda: at.lazy_adam(0.1, clip_value=0.5),
    "optax.adamw": lambda: at.lazy(optax.adamw(0.1)),
    "momentum": lambda: at.lazy(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "optax.rmsprop": lambda: at.lazy(optax.rmsprop(0.1)),
    "injected": lambda: at.lazy(optax.inject_hyperparams(optax.adam)(SCHEDULE)),
    "groups": lambda: at.lazy(at.by_path([("items", optax.adam(0.1))], optax.sgd(0.1))),
    "rates by path": lambda: at.lazy(
        optax.chain(at.scale_by_adam(), at.scale_by_path_learning_rate([("users", 0.1)], 0.2))
    ),
    "nothing moves": lambda: at.lazy(optax.chain(optax.adam(0.1), optax.set_to_zero())),
    "norm clipped": lambda: at.lazy_adam(0.1, clip_norm=0.1),
    "global norm clipped": lambda: at.lazy_adam(0.1, clip_global_norm=0.1),
    "clipped by Optax": lambda: at.lazy(
        optax.chain(optax.clip_by_block_rms(0.1), optax.clip_by_global_norm(0.1), optax.adam(0.1))
    ),
    "deferred_adam, clipped": lambda: optax.chain(
        at.lazy(at.clip_by_global_norm(0.1)),
        at.deferred_adam(0.1, tables=["items", "users"], max_idle=400),
    ),
    "deferred_adam": lambda: at.deferred_adam(0.1, tables=["items", "users"], max_idle=400),
    "deferred_adam, decayed": lambda: at.deferred_adam(
        0.1, tables=["items", "users"], max_idle=400, weight_decay=0.1, amsgrad=True
    ),
}
ROWS_MEET: dict[str, Any] = {
    "moments clipped": lambda: at.lazy(optax.chain(optax.adam(0.1), optax.clip_by_block_rms(0.1))),
    "noise": lambda: at.lazy(optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1))),
}


def test_blocks_of_nothing_but_padding_are_left_out() -> None:
    def count(rows: at.SparseRows, trips: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rows.values + 1.0, trips + 1

    indices = jnp.array([3, 1, 7, 7, 0, 7, 7, 7, 7, 7])
    rows = at.SparseRows(indices, jnp.zeros((10, 2)), 7, unique=True)
    for some, expected in ((rows, 3), (at.SparseRows(indices[5:], rows.values[5:], 7), 0)):
        after, trips = row_blocks.over_blocks(count, some, jnp.zeros((1,), jnp.int32), 2)
        assert trips.tolist() == [expected]
        np.testing.assert_array_equal(np.asarray(after)[np.asarray(some.is_valid)], 1.0)


# The first tier tries the plain step, one that needs all rows' norm, and the deferred one.
QUICK = ("lazy_adam", "global norm clipped", "deferred_adam, decayed")


@pytest.mark.parametrize("name", in_tiers(ROWS_APART, lambda name: name in QUICK))
def test_some_rows_at_a_time_take_the_steps_of_all_at_once(name: str, small_blocks: Any) -> None:
    small_blocks(False)
    at_once, program = trained(ROWS_APART[name]())
    assert not has_blocks(program)
    small_blocks(True)
    in_blocks, program = trained(ROWS_APART[name]())
    assert has_blocks(program)
    assert_same_but_for_rounding(at_once, in_blocks)


INDEPENDENT = [name for name in ROWS_APART if "deferred" not in name and "norm" not in name]
INDEPENDENT.remove("clipped by Optax")


@pytest.mark.parametrize("name", in_tiers(INDEPENDENT, lambda name: name in QUICK))
def test_small_tables_one_by_one_take_the_steps_of_all_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, program = trained(ROWS_APART[name]())
    monkeypatch.setattr(lazy, "LAZY_BYTES", 1)
    monkeypatch.setattr(lazy, "TABLES_AT_ONCE", 1)
    one_by_one, other = trained(ROWS_APART[name]())
    assert program != other and not has_blocks(other)
    assert_same_but_for_rounding(at_once, one_by_one)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rate_alone", [False, True])
def test_small_and_large_tables_of_every_kind_in_one_step(
    rate_alone: bool, dtype: Any, small_blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tx = at.lazy(optax.sgd(0.1)) if rate_alone else at.lazy_adam(0.1)
    names = [f"table{i}" for i in range(6)]
    params = {name: jnp.ones((V, WIDTH), dtype) for name in names}
    params["stacked"] = jnp.ones((2, V // 2, WIDTH), dtype)
    grads = {name: random_rows(i, V, 40).astype(dtype) for i, name in enumerate(names)}
    grads["table0"] = random_rows(0, V, 100).astype(dtype)  # the large one
    grads["table1"] = grads["table1"].sum_duplicates()
    grads["table2"] = random_rows(2, V, 0).astype(dtype)
    grads["table3"] = at.SparseRows(jnp.full((40,), V), grads["table3"].values, V)  # only padding
    stacked = grads["table4"]
    grads["stacked"] = at.SparseRows(stacked.indices, stacked.values, V, leading_shape=(2, V // 2))

    def trained() -> tuple[Any, str]:
        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return at.apply_updates(params, updates), state

        carry = params, tx.init(params)
        program = str(jax.make_jaxpr(step)(*carry))
        for _ in range(3):
            carry = step(*carry)
        return carry, program

    monkeypatch.setattr(lazy, "LAZY_BYTES", 2**40)
    at_once, program = trained()
    monkeypatch.setattr(lazy, "LAZY_BYTES", 1)
    monkeypatch.setattr(lazy, "SMALL_BYTES", 100 * WIDTH * jnp.dtype(dtype).itemsize)
    small_blocks(True)
    in_parts, other = trained()
    assert program != other
    assert_same_but_for_rounding(at_once, in_parts, rtol=1e-5 if dtype == jnp.float32 else 0.1)


def test_temporaries_do_not_grow_with_the_number_of_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def temporaries(tables: int) -> int:
        tx, rows = at.lazy_adam(0.1), 4096
        names = [f"table{i:02}" for i in range(tables)]

        def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
            grads = {name: at.SparseRows(ids[name], values[name], 10_000) for name in names}
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def for_each(shape: tuple[int, ...], dtype: Any) -> Any:
            return {name: jax.ShapeDtypeStruct(shape, dtype) for name in names}

        params = for_each((10_000, 64), jnp.float32)
        inputs = for_each((rows,), jnp.int32), for_each((rows, 64), jnp.float32)
        carry = params, jax.eval_shape(tx.init, params)
        compiled: Any = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(lazy, "LAZY_BYTES", 2**20)
    values_bytes = 4096 * 64 * 4
    few, many = temporaries(4), temporaries(12)
    assert many - few < 8 * values_bytes / 4
    monkeypatch.setattr(lazy, "LAZY_BYTES", 2**40)
    assert temporaries(12) - temporaries(4) > 8 * values_bytes


@pytest.mark.parametrize("name", ROWS_MEET)
def test_where_rows_meet_they_stay_together(name: str, small_blocks: Any) -> None:
    small_blocks(False)
    at_once, _ = trained(ROWS_MEET[name]())
    small_blocks(True)
    together, program = trained(ROWS_MEET[name]())
    assert not has_blocks(program)
    assert_bits_equal(at_once, together)


def test_low_precision_tables_go_in_blocks_too(small_blocks: Any) -> None:
    small_blocks(False)
    at_once, _ = trained(at.lazy_adam(0.1), jnp.bfloat16)
    small_blocks(True)
    in_blocks, program = trained(at.lazy_adam(0.1), jnp.bfloat16)
    assert has_blocks(program)
    assert_same_but_for_rounding(at_once, in_blocks, rtol=0.01)


ROWS, COLUMNS, MANY = 200_000, 64, 70_000  # of float32: 18 MB for one array of the rows touched
LARGE: dict[str, Any] = {
    "lazy": lambda: at.lazy_adam(0.1),
    "lazy, skipped if not finite": lambda: at.skip_nonfinite(at.lazy_adam(0.1)),
    "deferred": lambda: at.deferred_adam(0.1, tables="table"),
}


def test_the_rows_of_all_tables_count_together(
    small_blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(True)
    both = 4 * WIDTH * (TOUCHED + 17)
    for limit in (both, both + 1):
        monkeypatch.setattr(lazy, "LAZY_BYTES", limit)
        _, program = trained(at.lazy_adam(0.1))
        assert has_blocks(program) == (limit == both)


@pytest.mark.parametrize("name", LARGE)
def test_many_rows_need_no_memory_for_what_is_computed_on_the_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled_step() -> Any:
        tx = LARGE[name]()

        def step(params: Any, state: Any, ids: jax.Array, values: jax.Array) -> Any:
            updates, state = tx.update(
                {"table": at.SparseRows(ids, values, ROWS, synchronized=True)}, state, params
            )
            return optax.apply_updates(params, updates), state

        params = {"table": jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)}
        ids = jax.ShapeDtypeStruct((MANY,), jnp.int32)
        values = jax.ShapeDtypeStruct((MANY, COLUMNS), jnp.float32)
        inputs = params, jax.eval_shape(tx.init, params), ids, values
        return jax.jit(step, donate_argnums=(0, 1)).lower(*inputs).compile()

    in_blocks = compiled_step()
    assert not re.search(rf"f32\[{ROWS},{COLUMNS}\]\S* copy\(", in_blocks.as_text())
    monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", 2**40)
    at_once = compiled_step()
    saved = (
        at_once.memory_analysis().temp_size_in_bytes
        - in_blocks.memory_analysis().temp_size_in_bytes
    )
    # A moment at least, and mostly more, less what the blocks take.
    assert saved > 4 * MANY * COLUMNS
