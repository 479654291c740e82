"""The platform that a program is lowered for decides its form, not the host that traces it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import assert_close
from jax import export

import adam_transforms as at

V, D, N = 100_000, 64, 65_536  # 16 MiB of gradients, which a CPU updates in blocks
SORTED = 10**9  # rows; more than a hash table of N ids has slots


def exported(tx: Any, platform: str, *, rows: int = V, dense: bool = False) -> str:
    """The StableHLO of a step, exported on this host for another platform."""
    shape = jax.ShapeDtypeStruct
    params = {"table": shape((rows, D), jnp.float32)}

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        gradient = values if dense else at.SparseRows(ids, values, rows, synchronized=True)
        updates, state = tx.update({"table": gradient}, state, params)
        return optax.apply_updates(params, updates), state

    values = shape((rows if dense else N, D), jnp.float32)
    inputs = params, jax.eval_shape(tx.init, params), shape((N,), jnp.int32), values
    program = export.export(jax.jit(step), platforms=[platform])(*inputs)
    return str(program.mlir_module())


STEPS: dict[str, Any] = {
    "lazy": lambda: at.lazy_adam(0.1),
    "lazy, clipped": lambda: at.lazy_adam(0.1, clip_global_norm=1.0),
    "deferred": lambda: at.deferred_adam(0.1, tables="table"),
    "deferred, decayed": lambda: at.deferred_adam(0.1, tables="table", weight_decay=0.1),
}


def loops(program: str) -> int:
    return program.count("stablehlo.while")


def bit_tricks(program: str) -> int:
    return program.count("stablehlo.shift_right_logical")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_sorting_and_no_trick_for_cpus(name: str, platform: str) -> None:
    program = exported(STEPS[name](), platform, rows=SORTED)
    assert loops(program) == 0
    assert bit_tricks(program) == 0
    assert program.count("stablehlo.sort") == 1


@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_looks_up_the_ids_of_a_table_with_few_rows(name: str) -> None:
    program = exported(STEPS[name](), "cuda")
    assert loops(program) == 0
    assert "stablehlo.sort" not in program
    assert exported(STEPS[name](), "tpu").count("stablehlo.sort") == 1


@pytest.mark.parametrize("name", STEPS)
def test_a_cpu_gets_hashing_and_its_tricks(name: str) -> None:
    program = exported(STEPS[name](), "cpu", rows=SORTED)
    assert "stablehlo.sort" not in program
    assert bit_tricks(program) > 0
    # One loop hashes, one goes over the blocks.
    assert loops(program) == 2
    assert loops(exported(STEPS[name](), "cpu")) == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_dense_step_is_the_same_program_everywhere(platform: str) -> None:
    def form(platform: str) -> str:
        program = exported(at.adam(0.1, clip_global_norm=1.0), platform, rows=1000, dense=True)
        return re.sub(r"(loc\(.*\)|#loc.*|mhlo\.\w+ = [^,}]*)", "", program)

    program = form(platform)
    assert program == form("cpu")
    assert loops(program) == bit_tricks(program) == 0
    assert program.count("stablehlo.case") == 1  # the norm of gradients whose squares overflow


@pytest.mark.parametrize(
    ("tx", "dense", "on_gpu"),
    [
        (at.skip_nonfinite(at.adam(0.1)), True, 0),
        (at.dynamic_loss_scale(at.adam(0.1)), True, 0),
        (at.skip_nonfinite(at.lazy_adam(0.1)), False, 1),  # a select would copy the table
        (at.accumulate(at.adam(0.1), 4), True, 1),  # mostly held
    ],
)
@pytest.mark.every_case
def test_a_gpu_waits_for_no_condition_that_mostly_holds(tx: Any, dense: bool, on_gpu: int) -> None:
    assert loops(exported(tx, "cuda", dense=dense)) == on_gpu
    assert loops(exported(tx, "tpu", dense=dense)) == 1


EXPORTED: dict[str, Any] = {
    "lazy": lambda like: at.lazy_adam(0.1, clip_global_norm=1.0),
    "accumulate": lambda like: at.accumulate(at.lazy_adam(0.1), 2, like=like),
    "deferred": lambda like: at.deferred_adam(0.1, tables="table"),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_step_is_exported_for_a_batch_of_any_size(name: str) -> None:
    """Row gradients and the step after them, for all platforms in one program."""
    params = {"table": jnp.arange(200.0).reshape(50, 4) / 100}
    ids = jax.ShapeDtypeStruct(export.symbolic_shape("b, 3"), jnp.int32)

    def loss(params: Any, ids: Any) -> Any:
        return jnp.sum(jnp.tanh(params["table"][ids]) ** 2)

    def optimizer(ids: Any) -> Any:
        return EXPORTED[name](jax.eval_shape(at.grad(loss), params, ids))

    def step(params: Any, state: Any, ids: Any) -> Any:
        rows_from = state if name == "deferred" else None
        grads = at.grad(loss, rows_from=rows_from)(params, ids)
        updates, state = optimizer(ids).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    abstract = jax.eval_shape(optimizer(ids).init, params)
    program = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(params, abstract, ids)
    given = jnp.arange(12).reshape(4, 3) * 7 % 10
    inputs = params, optimizer(given).init(params), given
    assert_close(at.to_dense(program.call(*inputs)), at.to_dense(jax.jit(step)(*inputs)))


def test_a_step_placed_on_a_cpu_is_lowered_for_it() -> None:
    """Whatever the default backend of the process is."""
    tx = at.lazy_adam(0.1)
    params = {"table": jnp.zeros((V, D))}
    rows = at.SparseRows(jnp.zeros(N, jnp.int32), jnp.zeros((N, D)), V)
    placed = jax.device_put((params, tx.init(params), rows), jax.devices("cpu")[0])

    def step(params: Any, state: Any, rows: Any) -> Any:
        return tx.update({"table": rows}, state, params)

    program = jax.jit(step).lower(*placed).as_text()
    assert bit_tricks(program) > 0
    assert "stablehlo.sort" not in program
