"""How large the program of a step is, and what memory it takes on its way, within budgets.

All are deterministic for one version of JAX, so that a step that grows is seen without a clock.
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import in_tiers

import adam_transforms as at

# For each optimizer and number of tables: equations of the jaxpr with all that are nested in it,
# lines of StableHLO, and temporary bytes. Each is about 10 % above what the step takes, which
# differs by less between the oldest JAX and the newest.
BUDGETS: dict[tuple[str, int], tuple[int, int, int]] = {
    ("adam", 1): (36, 70, 96),
    ("adam", 26): (470, 890, 96),
    ("lazy_adam", 1): (345, 440, 14_600),
    ("lazy_adam", 26): (5_500, 2_300, 370_000),
    ("deferred_adam", 1): (880, 1_300, 43_000),
    ("deferred_adam", 26): (17_500, 4_300, 911_000),
}
ROWS, WIDTH, TOUCHED = 10_000, 16, 64

OPTIMIZERS: dict[str, Any] = {
    "adam": lambda rows: at.adam(0.1),
    "lazy_adam": lambda rows: at.lazy_adam(0.1),
    # In tables of any size 25 rows have their turn in a step.
    "deferred_adam": lambda rows: at.deferred_adam(0.1, tables="table", max_idle=rows // 25),
}

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
every_step = pytest.mark.parametrize(("name", "tables"), BUDGETS)


@functools.cache
def traced_step(name: str, tables: int, rows: int = ROWS) -> Any:
    """A step of tables of equal width, parameters and state donated, traced for their shapes."""
    tx = OPTIMIZERS[name](rows)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def shaped(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {f"table_{i:02}": shaped(rows, WIDTH) for i in range(tables)}
    state = jax.eval_shape(tx.init, params)
    ids = jax.ShapeDtypeStruct((TOUCHED,), jnp.int32)
    sparse = jax.eval_shape(
        lambda ids, values: at.SparseRows(ids, values, rows, synchronized=True),
        ids,
        shaped(TOUCHED, WIDTH),
    )
    grads = params if name == "adam" else dict.fromkeys(params, sparse)
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, grads)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a program and of all those that its equations hold."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@functools.cache
def temporary_bytes(name: str, tables: int, rows: int = ROWS) -> int:
    compiled = traced_step(name, tables, rows).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes


def assert_within(found: int, budget: int, what: str) -> None:
    assert found <= budget, f"{found} {what}, of at most {budget}"


@every_step
def test_equations(name: str, tables: int) -> None:
    found = sum(1 for _ in equations(traced_step(name, tables).jaxpr))
    assert_within(found, BUDGETS[name, tables][0], "equations")


@every_step
def test_lines_of_stablehlo(name: str, tables: int) -> None:
    found = len(traced_step(name, tables).lower().as_text().splitlines())
    assert_within(found, BUDGETS[name, tables][1], "lines of StableHLO")


@pytest.mark.parametrize(
    ("name", "tables"), in_tiers(BUDGETS, lambda *step: step != ("deferred_adam", 26))
)
def test_temporary_bytes(name: str, tables: int) -> None:
    found = temporary_bytes(name, tables)
    assert_within(found, BUDGETS[name, tables][2], "temporary bytes")


@pytest.mark.parametrize("name", ["lazy_adam", "deferred_adam"])
@pytest.mark.parametrize("tables", [1, pytest.param(26, marks=pytest.mark.slow)])
def test_a_table_of_ten_times_the_rows_takes_no_more_memory(name: str, tables: int) -> None:
    assert temporary_bytes(name, tables, 10 * ROWS) == temporary_bytes(name, tables)


# Lines of StableHLO of a training step of 26 tables over those of dense Optax, and the lines that
# another table adds. Where the tables have different sizes, each has gathers and scatters of its
# own; all else they share.
OVER_OPTAX = {"lazy_adam": (3.0, 1.5), "deferred_adam": (4.0, 1.5)}


@functools.cache
def lines_of_training(name: str, tables: int, more_rows: int) -> int:
    tx = {
        "optax": lambda: optax.adam(0.1),
        "lazy_adam": lambda: at.lazy_adam(0.1, tables="table"),
        "deferred_adam": lambda: at.deferred_adam(0.1, tables="table"),
    }[name]()

    def step(params: Any, state: Any, ids: Any) -> Any:
        value_and_grad: Any = {
            "optax": jax.value_and_grad,
            "lazy_adam": functools.partial(at.value_and_grad, tables="table"),
            "deferred_adam": functools.partial(at.value_and_grad, rows_from=state),
        }[name]
        _, grads = value_and_grad(
            lambda params: sum(
                jnp.sum(params[path][i] ** 2) for path, i in zip(params, ids, strict=True)
            )
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {
        f"table_{i:02}": jax.ShapeDtypeStruct((ROWS + more_rows * i, WIDTH), jnp.float32)
        for i in range(tables)
    }
    ids = jax.ShapeDtypeStruct((tables, TOUCHED), jnp.int32)
    lowered = jax.jit(step).lower(params, jax.eval_shape(tx.init, params), ids)
    return len(lowered.as_text().splitlines())


@pytest.mark.every_case
@pytest.mark.parametrize("more_rows", [0, 1000], ids=["equal", "of different sizes"])
@pytest.mark.parametrize("name", OVER_OPTAX)
def test_a_program_of_many_tables_over_that_of_dense_optax(name: str, more_rows: int) -> None:
    ours, theirs = (lines_of_training(x, 26, more_rows) for x in (name, "optax"))
    most, most_growth = OVER_OPTAX[name]
    assert_within(ours, int(most * theirs), "lines of StableHLO")
    if not more_rows:
        ours, theirs = (
            x - lines_of_training(n, 1, 0) for x, n in ((ours, name), (theirs, "optax"))
        )
        assert_within(ours, int(most_growth * theirs), "lines of StableHLO for 25 more tables")


# Calls inside the package while a lazy training step of one table is traced, and how often the next
# call is in another file: what a reader follows.
MOST_CALLS, MOST_CHANGES_OF_FILE = 200, 45


def test_a_lazy_step_is_followed_through_few_calls_and_files() -> None:
    root = str(Path(at.__file__).parent)
    calls: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and code.co_name[0] != "<":
            calls.append(code.co_filename)

    params = {"table": jnp.ones((1000, 4))}
    tx = at.lazy_adam(0.1)
    state = tx.init(params)

    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        _, grads = at.value_and_grad(lambda p: jnp.sum(p["table"][ids] ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        jax.make_jaxpr(step)(params, state, jnp.arange(8))
    finally:
        sys.setprofile(previous)
    changes = sum(a != b for a, b in itertools.pairwise(calls))
    assert 100 < len(calls) <= MOST_CALLS, f"{len(calls)} calls"
    assert 20 < changes <= MOST_CHANGES_OF_FILE, f"{changes} changes of file"
