"""What do moments of 16 and 8 bits save, cost and change?

    python benchmarks/bench_lowmem.py [--only SECTION ...] [--parameters N] [--rounds N] [--seeds N]

Sections: `error` is the error of Adam's update against exact moments, root mean square, relative to
the update's, for gradients whose scales spread by exp(N(0, s)); `step` is the bytes of the moments
and the time of a step, dense in 64 matrices and lazy at (10^6, 64); `quality` is the held-out loss
of a two-tower recommender on synthetic clicks. "block-wise, 8 bits" is the code of Dettmers et al.
"wide registers" means that XLA uses a CPU's registers of 512 bits.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import bench_deferred
import bench_dense
import bench_sparse
import blockwise_adam
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_transforms as at

BITS: dict[str, Any] = {
    "32 bits": 32,
    "16 bits": 16,
    "8 bits of mu, 16 of nu": {"mu": 8, "nu": 16},
    "8 bits": 8,
}
BLOCKWISE = "block-wise, 8 bits"
WIDE = {"xla_cpu_prefer_vector_width": 512}  # no effect on a CPU without registers of 512 bits
ROWS, COLUMNS, STEPS = 64, 256, 2000  # of `error`
SIZE = bench_sparse.Size(10**6, 64, 8192)
ANCHORS = ("optax.adam", "32 bits", BLOCKWISE)


def scale_by(bits: Any) -> Any:
    """Adam with moments of so many bits."""
    return at.scale_by_adam() if bits == 32 else at.compress_moments(at.scale_by_adam(), bits)


# ---- error --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def update_error(make: Callable[[], Any], spread: float) -> Any:
    """The error of the update over the second half of the steps: (root mean square, relative to
    that of exact updates; largest)."""
    keys = jax.random.split(jax.random.key(0), 3)
    scale = 1e-3 * jnp.exp(spread * jax.random.normal(keys[0], (ROWS, COLUMNS)))
    mean = 0.2 * jax.random.normal(keys[1], (ROWS, COLUMNS))
    tx, exact = make(), cast(Any, at.scale_by_adam())

    def step(states: Any, key: jax.Array) -> Any:
        noise, rare = jax.random.split(key)
        wide = jnp.where(jax.random.uniform(rare, scale.shape) < 0.1, 3.0, 1.0)
        g = scale * (mean + wide * jax.random.normal(noise, scale.shape))
        u, state = tx.update(g, states[0])
        true, exact_state = exact.update(g, states[1])
        rms = jnp.sqrt(jnp.mean((u - true) ** 2) / jnp.mean(true**2))
        return (state, exact_state), jnp.stack([rms, jnp.max(jnp.abs(u - true))])

    states = tx.init(scale), exact.init(scale)
    _, errors = jax.lax.scan(step, states, jax.random.split(keys[2], STEPS))
    late = errors[STEPS // 2 :]
    return jnp.mean(late[:, 0]), jnp.max(late[:, 1])


def bench_error() -> list[dict[str, Any]]:
    codes = {
        name: functools.partial(scale_by, bits) for name, bits in BITS.items() if bits != 32
    } | {BLOCKWISE: blockwise_adam.scale_by_blockwise_adam}
    results = []
    for spread in (0.0, 1.0, 2.5, 5.0):
        for name, make in codes.items():
            rms, largest = map(float, update_error(make, spread))
            results.append({"s": str(spread), "name": name, "rms": rms, "largest": largest})
    return results


# ---- step ---------------------------------------------------------------------------------------


def moment_bytes(state: Any, parameters: int) -> float:
    """Bytes of the state to an element, without the counts."""
    return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) / parameters


def bench_step(parameters: int, rounds: int) -> list[dict[str, Any]]:
    width = math.isqrt(parameters // 64)
    leaves = bench_dense.random_leaves(64 * width**2, 64, seed=0)
    gradients = [x.reshape(width, width) for x in leaves]
    batches = bench_sparse.step_batches(SIZE, "uniform")
    blockwise = optax.chain(
        blockwise_adam.scale_by_blockwise_adam(), optax.scale_by_learning_rate(1e-3)
    )
    dense = {"optax.adam": optax.adam(1e-3)}
    dense |= {name: at.adam(1e-3, state_bits=bits) for name, bits in BITS.items()}
    lazy = {name: at.lazy_adam(1e-3, state_bits=bits) for name, bits in BITS.items()}
    case = functools.partial(bench_dense.case, source=gradients)
    wide = {name: tx for name, tx in dense.items() if name in ("32 bits", "16 bits", "8 bits")}
    if jax.default_backend() != "cpu":
        wide = {}
    groups = {
        f"dense, 64 matrices ({width}, {width})": [
            *(case(name, tx) for name, tx in (dense | {BLOCKWISE: blockwise}).items()),
            *(case(f"{x}, wide registers", tx, compiler_options=WIDE) for x, tx in wide.items()),
        ],
        "lazy, (10^6, 64), 8,192 ids": [
            bench_sparse.jax_step(name, tx, SIZE, batches) for name, tx in lazy.items()
        ],
    }
    results = []
    for group, cases in groups.items():
        sizes = [sum(x.size for x in jax.tree.leaves(case.carry[0])) for case in cases]
        of_state = [moment_bytes(case.carry[1], n) for case, n in zip(cases, sizes, strict=True)]
        harness.interleave(cases, rounds=rounds, cycle=bench_sparse.BATCHES, warm_up=1, alike=True)
        base = next(case for case in cases if case.name == "32 bits").median_ms()
        results += [
            {"step": group, "name": case.name, "bytes an element": size, "ms": case.median_ms()}
            | {"ratio": case.median_ms() / base}
            for case, size in zip(cases, of_state, strict=True)
        ]
    return results


# ---- quality ------------------------------------------------------------------------------------


def held_out_loss(scale_by_adam: Any, lazy: bool, seed: int) -> float:
    rate = optax.scale_by_learning_rate(bench_deferred.LEARNING_RATE)
    tx = optax.chain(scale_by_adam, rate)
    return bench_deferred.train(at.lazy(tx) if lazy else tx, "lazy" if lazy else "dense", seed)


def bench_quality(seeds: int) -> list[dict[str, Any]]:
    contenders: dict[str, Any] = {
        f"{kind}, {name}": functools.partial(held_out_loss, scale_by(bits), kind == "lazy")
        for kind in ("dense", "lazy")
        for name, bits in BITS.items()
    }
    blockwise = blockwise_adam.scale_by_blockwise_adam()
    contenders[f"dense, {BLOCKWISE}"] = functools.partial(held_out_loss, blockwise, False)
    losses = {
        name: np.array([train(seed) for seed in range(seeds)]) for name, train in contenders.items()
    }
    results = []
    for name, values in losses.items():
        base = losses[f"{name.split(',')[0]}, 32 bits"]
        change = {"change, %": 100 * float(values.mean() / base.mean() - 1)}
        spread = {"spread, %": 100 * float(base.std() / base.mean())}
        results.append({"name": name, "loss": float(values.mean())} | change | spread)
    return results


def main() -> None:
    sections = ("error", "step", "quality")
    parser = harness.parser(str(__doc__), "lowmem", sections, rounds=5)
    parser.add_argument("--parameters", type=int, default=64_000_000, help="of the dense step")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default 3)")
    arguments = parser.parse_args()
    results = {}
    if "error" in arguments.only:
        results["error"] = bench_error()
        harness.print_table("error of the update", results["error"])
    if "step" in arguments.only:
        results["step"] = bench_step(arguments.parameters, arguments.rounds)
        harness.print_table("step: bytes of the moments, and time", results["step"])
    if "quality" in arguments.only:
        results["quality"] = bench_quality(arguments.seeds)
        harness.print_table("quality: held-out loss in nats a click", results["quality"])
    harness.finish(arguments, results, ANCHORS)


if __name__ == "__main__":
    main()
