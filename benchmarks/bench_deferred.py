"""What does dense Adam's exact trajectory cost at a few rows a step, and what is it good for?

    python benchmarks/bench_deferred.py [--only SECTION ...] [--rows V ...] [--rounds N] [--seeds N]

Sections: `step` times the optimizer's step, from raw duplicated ids and the cotangents of the rows
read to new parameters, of `deferred_adam`, `lazy_adam` and dense `optax.adam`; `training` times
gradient and update together, of the first two; `quality` trains a two-tower recommender on
synthetic clicks with all three and compares held-out losses.
"""

from typing import Any, NamedTuple

import bench_sparse
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_transforms as at

TOUCHED = 8192
LEARNING_RATE = 1e-2  # of 1e-3, 3e-3, 1e-2 and 3e-2 the best for all three
ANCHORS = ("dense optax.adam",)  # the contenders that are not of this project


def timed(
    cases: list[harness.Case], size: bench_sparse.Size, distribution: str, rounds: int
) -> list[dict[str, Any]]:
    """The times of a step, and their ratios to that of the first case."""
    harness.interleave(cases, rounds=rounds, cycle=bench_sparse.BATCHES, warm_up=1, alike=True)
    base = cases[0].median_ms()
    return [
        {
            "rows": size.rows,
            "columns": size.columns,
            "ids": distribution,
            "name": case.name,
            "ms": case.median_ms(),
            "ratio": case.median_ms() / base,
        }
        for case in cases
    ]


def bench_step(rows: int, distribution: str, rounds: int) -> list[dict[str, Any]]:
    """The optimizer's step alone, on a table of so many rows."""
    size = bench_sparse.Size(rows, 64 if rows <= bench_sparse.LARGEST_FOR_ALL else 32, TOUCHED)
    batches = bench_sparse.step_batches(size, distribution)
    hat = at.deferred_adam(1e-3, tables="table", eps_hat=True)
    cases = [
        bench_sparse.jax_step("lazy_adam", at.lazy_adam(1e-3), size, batches),
        bench_sparse.jax_step(
            "deferred_adam", at.deferred_adam(1e-3, tables="table"), size, batches
        ),
        bench_sparse.jax_step("deferred_adam, eps_hat", hat, size, batches),
        bench_sparse.jax_step("dense optax.adam", optax.adam(1e-3), size, batches, dense=True),
    ]
    return timed(cases, size, distribution, rounds)


def training_case(name: str, tx: Any, size: bench_sparse.Size, batches: Any) -> harness.Case:
    """Reads some rows, and moves them towards others: gradient and update in one program."""

    def step(carry: Any, ids: jax.Array, targets: jax.Array) -> Any:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            return jnp.sum((params["table"][ids] - targets) ** 2)

        rows_from = None if name == "lazy_adam" else state
        grads = at.grad(loss, rows_from=rows_from)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"table": bench_sparse.jax_table(size)}
    jitted = jax.jit(step, donate_argnums=0)
    in_turn = bench_sparse.in_turn(jitted, bench_sparse.on_device(batches))
    return harness.Case(name, in_turn, (params, tx.init(params)))


def bench_training(rows: int, distribution: str, rounds: int) -> list[dict[str, Any]]:
    """A training step on a table of so many rows, of which the forward pass reads some."""
    size = bench_sparse.Size(rows, 64 if rows <= bench_sparse.LARGEST_FOR_ALL else 32, TOUCHED)
    batches = bench_sparse.step_batches(size, distribution)
    deferred = at.deferred_adam(1e-3, tables="table")
    hat = at.deferred_adam(1e-3, tables="table", eps_hat=True)
    cases = [
        training_case("lazy_adam", at.lazy_adam(1e-3), size, batches),
        training_case("deferred_adam", deferred, size, batches),
        training_case("deferred_adam, eps_hat", hat, size, batches),
    ]
    return timed(cases, size, distribution, rounds)


# ---- quality ------------------------------------------------------------------------------------

USERS, ITEMS, DIM, BATCH, STEPS, HELD_OUT = 3000, 20_000, 16, 512, 3000, 100_000


class Clicks(NamedTuple):
    """Users, items and whether the one clicked on the other."""

    users: jax.Array
    items: jax.Array
    clicked: jax.Array


def draw_clicks(seed: int, batches: int, batch: int) -> Clicks:
    """Clicks of users on items shown by Zipf's law, from true vectors that all seeds share."""
    truth = np.random.default_rng(123)
    user_vectors = truth.standard_normal((USERS, DIM))
    item_vectors = truth.standard_normal((ITEMS, DIM))
    generator = np.random.default_rng(seed)
    shape = (batches, batch)
    users = generator.integers(0, USERS, shape)
    items = bench_sparse.draw_ids("zipf", ITEMS, shape, seed)
    score = (user_vectors[users] * item_vectors[items]).sum(axis=-1) * (2.0 / DIM**0.5)
    clicked = generator.random(shape) < 1 / (1 + np.exp(-score))
    return Clicks(*map(jnp.asarray, (users.astype(np.int32), items, clicked.astype(np.float32))))


def loss_of(params: Any, clicks: Clicks) -> jax.Array:
    score = jnp.sum(params["users"][clicks.users] * params["items"][clicks.items], axis=-1)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(score, clicks.clicked))


def held_out_loss(name: str, seed: int) -> float:
    """After training from and on what this seed draws."""
    tx = {
        "dense": at.adam(LEARNING_RATE),
        "lazy": at.lazy_adam(LEARNING_RATE),
        "deferred": at.deferred_adam(LEARNING_RATE, tables=["users", "items"]),
    }[name]
    return train(tx, name, seed)


def train(tx: Any, name: str, seed: int) -> float:
    """The held-out loss; `name` says which gradients `tx` takes."""

    def step(carry: Any, clicks: Clicks) -> Any:
        params, state = carry
        if name == "dense":
            grads = jax.grad(loss_of)(params, clicks)
        else:
            rows_from = state if name == "deferred" else None
            grads = at.grad(loss_of, rows_from=rows_from)(params, clicks)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed))
    params = {
        "users": 0.1 * jax.random.normal(keys[0], (USERS, DIM)),
        "items": 0.1 * jax.random.normal(keys[1], (ITEMS, DIM)),
    }
    clicks = draw_clicks(seed, STEPS, BATCH)
    run = jax.jit(lambda carry, clicks: jax.lax.scan(step, carry, clicks)[0])
    params, state = run((params, tx.init(params)), clicks)
    if name == "deferred":
        params, _ = at.flush(params, state)
    held_out = jax.tree.map(lambda x: x[0], draw_clicks(10_000, 1, HELD_OUT))
    return float(loss_of(params, held_out))


def bench_quality(seeds: int) -> list[dict[str, Any]]:
    losses = {
        name: np.array([held_out_loss(name, seed) for seed in range(seeds)])
        for name in ("dense", "lazy", "deferred")
    }
    return [
        {
            "name": name,
            "loss": float(values.mean()),
            "spread": float(values.std()),
            "from dense": float(np.abs(values - losses["dense"]).max()),
        }
        for name, values in losses.items()
    ]


def main() -> None:
    sections = ("step", "training", "quality")
    parser = harness.parser(str(__doc__), "deferred", sections, rounds=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default 3)")
    arguments = parser.parse_args()
    results = {}
    timings = {
        "step": (bench_step, "the optimizer alone"),
        "training": (bench_training, "gradient and update"),
    }
    for section, (bench, title) in timings.items():
        if section in arguments.only:
            results[section] = [
                row
                for rows in arguments.rows
                for distribution in bench_sparse.DISTRIBUTIONS
                for row in bench(rows, distribution, arguments.rounds)
            ]
            harness.print_table(f"{section}: {title}, {TOUCHED:,} ids", results[section])
    if "quality" in arguments.only:
        results["quality"] = bench_quality(arguments.seeds)
        harness.print_table("quality: held-out loss in nats a click", results["quality"])
    harness.finish(arguments, results, ANCHORS)


if __name__ == "__main__":
    main()
