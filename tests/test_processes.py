"""Two processes that speak over the loopback address train as one does."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import adam_transforms as at

V, D, N, STEPS = 32, 8, 16, 4
IDS = np.random.default_rng(0).integers(0, V, (STEPS, N)).astype(np.int32)
TARGETS = helpers.normal(1, STEPS, N, D)
ROWS, COLUMNS = P(("host", "device"), None), P(None, ("host", "device"))
# Of all its forms the one that compiles the fastest.
DEFERRED = at.deferred_adam(0.1, tables="table", eps_hat=True)
# A transformation, how its table is sharded, and over which axes the ids are.
RUNS: dict[str, Any] = {
    "lazy, rows": (at.lazy_adam(0.1), ROWS, ("host", "device")),
    "lazy, columns": (at.lazy_adam(0.1), COLUMNS, None),
    "lazy, both": (at.lazy_adam(0.1), P("device", "host"), ("device",)),
    "deferred, rows": (DEFERRED, ROWS, ("host", "device")),
    "deferred, columns": (DEFERRED, COLUMNS, None),
}


def start() -> dict[str, np.ndarray]:
    return {"table": helpers.normal(2, V, D), "w": helpers.normal(3, D)}


def loss(params: Any, ids: Any, targets: Any, read: Any) -> Any:
    rows = params["table"].at[ids].get(out_sharding=read)
    return jnp.sum((rows * params["w"][None, :] - targets) ** 2)


def make_step(tx: Any, read: Any = None) -> Any:
    def step(params: Any, state: Any, ids: Any, targets: Any) -> Any:
        deferred = [x for x in jax.tree.leaves(state, is_leaf=is_deferred) if is_deferred(x)]
        rows_from = state if deferred else None
        grads = at.grad(loss, rows_from=rows_from)(params, ids, targets, read)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def is_deferred(x: Any) -> bool:
    return isinstance(x, at.DeferredAdamState)


FEW = {"lazy, rows": ["Explicit"], "deferred, columns": ["Auto"]}
ALL = dict.fromkeys(RUNS, ["Explicit", "Auto"])


@pytest.mark.long
@pytest.mark.parametrize(
    "runs", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_tables_sharded_over_two_processes_take_the_same_steps(
    runs: dict[str, list[str]], tmp_path: Path, relaxed_promotion: None
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, result = Path(__file__).with_name("process_of_two.py"), tmp_path / "result.npz"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(port), result, json.dumps(runs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    with np.load(result) as arrays:
        found = dict(arrays)
    for name, kinds in runs.items():
        tx = RUNS[name][0]
        params: Any = jax.tree.map(jnp.asarray, start())
        state, step = tx.init(params), jax.jit(make_step(tx))
        for ids, targets in zip(IDS, TARGETS, strict=True):
            params, state = step(params, state, ids, targets)
        for kind in kinds:
            for key, expected in params.items():
                ours = found.pop(f"{kind}/{name}/{key}")
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert not found
