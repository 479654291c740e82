"""What does a step cost that touches a few rows of a large table?

    python benchmarks/bench_sparse.py [--rows V ...] [--touched N] [--rounds N] [--output F]

From raw duplicated ids (by Zipf's law) and the cotangents of the rows read to new parameters:
`lazy` (duplicates summed on the way) against dense `optax.adam` with the scatter-add gradient that
JAX makes of a lookup, and, where PyTorch is installed, its SparseAdam (coalescing included).
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_transforms as at

DIM = 64
LARGEST_FOR_ALL = 2_000_000  # rows; of larger tables not all contenders' fit into 24 GB


def touched_rows(rows: int, touched: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 (touched,), by Zipf's law over all rows in random order, and (touched, DIM)
    cotangents."""
    generator = np.random.default_rng(0)
    ranks = np.exp(generator.random(touched) * np.log(rows)).astype(np.int64) - 1
    # A multiplication by a number coprime to `rows` spreads the frequent ones over the table.
    ids = (ranks * 2_654_435_761) % rows
    return ids.astype(np.int32), generator.standard_normal((touched, DIM), np.float32)


def jax_case(name: str, tx: Any, rows: int, ids: Any, values: Any, *, dense: bool) -> Any:
    """One step on a fresh table; parameters and state are donated."""

    def step(carry: Any, ids: jax.Array, values: jax.Array) -> Any:
        params, state = carry
        if dense:
            gradient: Any = jnp.zeros((rows, DIM)).at[ids].add(values)
        else:
            gradient = at.SparseRows(ids, values, rows)
        updates, state = tx.update({"table": gradient}, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=0)
    ids, values = jnp.asarray(ids), jnp.asarray(values)
    params = {"table": 0.1 * jax.random.normal(jax.random.key(0), (rows, DIM))}
    return harness.Case(name, lambda carry: jitted(carry, ids, values), (params, tx.init(params)))


def torch_case(rows: int, ids: np.ndarray, values: np.ndarray) -> harness.Case | None:
    """PyTorch's SparseAdam; None where PyTorch is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    table = torch.nn.Parameter(0.1 * torch.randn(rows, DIM))
    optimizer = torch.optim.SparseAdam([table], lr=1e-3)
    index, value = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(values)

    def step(_: Any) -> None:
        table.grad = torch.sparse_coo_tensor(index, value, table.shape, check_invariants=False)
        optimizer.step()

    return harness.Case("torch.optim.SparseAdam", step, None)


def bench_step(rows: int, touched: int, rounds: int) -> list[dict[str, Any]]:
    """The optimizer's step alone, on a table of so many rows."""
    ids, values = touched_rows(rows, touched)
    cases = [
        jax_case("lazy_adam", at.lazy_adam(1e-3), rows, ids, values, dense=False),
        torch_case(rows, ids, values),
    ]
    if rows <= LARGEST_FOR_ALL:
        clipped = at.lazy_adam(1e-3, clip_global_norm=1.0, weight_decay=1e-2)
        cases += [
            jax_case("lazy(optax.adam)", at.lazy(optax.adam(1e-3)), rows, ids, values, dense=False),
            jax_case("lazy_adam, clipped, decayed", clipped, rows, ids, values, dense=False),
            jax_case("optax.adam, dense", optax.adam(1e-3), rows, ids, values, dense=True),
        ]
    cases = [c for c in cases if c is not None]
    harness.interleave(cases, rounds=rounds)
    base = cases[0].median_ms()
    return [
        {"rows": rows, "name": c.name, "ms": c.median_ms(), "ratio": c.median_ms() / base}
        for c in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--touched", type=int, default=8192, help="ids a step (default 8192)")
    parser.add_argument("--rounds", type=int, default=24, help="timed turns of each (default 24)")
    parser.add_argument(
        "--output", type=Path, default=harness.RESULTS / "sparse.json", help="(default %(default)s)"
    )
    arguments = parser.parse_args()
    results = [
        row
        for rows in arguments.rows
        for row in bench_step(rows, arguments.touched, arguments.rounds)
    ]
    harness.print_table(
        f"step: {arguments.touched:,} ids a step, Zipf-distributed, into tables {DIM} wide", results
    )
    harness.write_json(arguments.output, {"step": results})


if __name__ == "__main__":
    main()
