"""How many kernels does a step launch on a GPU, and how long do they run?

    python benchmarks/bench_gpu.py [--only SECTION ...] [--rounds N] [--output F] [--compare F]

Sections: `rows` is the step of a table, beside one kernel in Pallas that does all but to sum
duplicates; `gated` is steps that run on a condition; `dense` is 64 million parameters in 64 and in
1,024 leaves; `states` is the same in 64 leaves with moments of 32, 16 and 8 bits. "device ms" is
the time in which kernels run, "ms" what a step takes in a loop: the difference is launching them.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_dense
import bench_sparse
import harness
import jax
import optax
import pallas_lazy
from bench_dense import EVERY

import adam_transforms as at

PROFILED = 8  # calls
SIZES = [
    bench_sparse.Size(10**4, 32, 8192),
    bench_sparse.Size(10**6, 64, 8192),
    bench_sparse.Size(10**7, 32, 8192),
    bench_sparse.Size(10**6, 128, 65536),
]


def kernels_of(case: harness.Case) -> dict[str, float]:
    """Kernels that a call launches, and milliseconds in which they run; nothing without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            case.call(PROFILED)
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        nanoseconds = [
            event.duration_ns
            for plane in planes
            if "GPU" in plane.name
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not nanoseconds:
        return {}
    return {
        "kernels": len(nanoseconds) / PROFILED,
        "device ms": sum(nanoseconds) / PROFILED / 1e6,
    }


def measure(cases: Sequence[harness.Case], described: dict[str, Any], rounds: int) -> list[Any]:
    """The rows of a group of cases, with ratios to the first."""
    harness.interleave(cases, rounds=rounds, cycle=8, warm_up=1, alike=True)
    results = []
    for case in cases:
        ms = case.median_ms()
        row = {"name": case.name, "ms": ms, "ratio": ms / cases[0].median_ms()}
        results.append(described | row | kernels_of(case))
    return results


def bench_rows(sizes: Sequence[bench_sparse.Size], _: int, rounds: int) -> list[dict[str, Any]]:
    """The step of one table."""
    results = []
    for size in sizes:
        batches = bench_sparse.step_batches(size, "uniform")
        deferred = at.deferred_adam(1e-3, tables="table")
        cases = [
            bench_sparse.jax_step("lazy_adam", at.lazy_adam(1e-3), size, batches),
            bench_sparse.one_kernel("one kernel, Pallas", pallas_lazy.update, size, batches),
            bench_sparse.bare_rows(size, batches),
            bench_sparse.jax_step("deferred_adam", deferred, size, batches),
        ]
        described = {"rows": size.rows, "columns": size.columns, "ids": size.touched}
        results += measure(cases, described, rounds)
    return results


def bench_gated(_: Any, parameters: int, rounds: int) -> list[dict[str, Any]]:
    """Steps that run on a condition."""
    transforms = {
        "adam": at.adam(1e-3),
        "skip_nonfinite(adam)": at.skip_nonfinite(at.adam(1e-3)),
        "dynamic_loss_scale(adam)": at.dynamic_loss_scale(at.adam(1e-3)),
        f"accumulate(adam, {EVERY})": at.accumulate(at.adam(1e-3), EVERY),
        "Optax: apply_if_finite(adam)": optax.apply_if_finite(optax.adam(1e-3), 5),
        f"Optax: MultiSteps(adam, {EVERY})": optax.MultiSteps(optax.adam(1e-3), EVERY),
    }
    return of_transforms(transforms, parameters // 2, 8, rounds)


def bench_dense_leaves(_: Any, parameters: int, rounds: int) -> list[dict[str, Any]]:
    """Many leaves beside Optax."""
    transforms = {"optax.adam": optax.adam(1e-3), "adam": at.adam(1e-3)}
    return [row for n in (64, 1024) for row in of_transforms(transforms, parameters, n, rounds)]


def bench_states(_: Any, parameters: int, rounds: int) -> list[dict[str, Any]]:
    """Moments in fewer bits."""
    transforms = {f"adam, {b} bits": at.adam(1e-3, state_bits=b) for b in (32, 16, 8)}
    return of_transforms({"optax.adam": optax.adam(1e-3)} | transforms, parameters, 64, rounds)


def of_transforms(
    transforms: dict[str, Any], parameters: int, leaves: int, rounds: int
) -> list[dict[str, Any]]:
    """Transformations on so many parameters in equal leaves."""
    gradients = bench_dense.random_leaves(parameters, leaves, seed=leaves)
    cases = [bench_dense.case(name, tx, gradients) for name, tx in transforms.items()]
    return measure(cases, {"parameters": parameters, "leaves": leaves}, rounds)


SECTIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "rows": bench_rows,
    "gated": bench_gated,
    "dense": bench_dense_leaves,
    "states": bench_states,
}

# The contenders that are not of this project.
ANCHORS = (
    *("one kernel, Pallas", "bare gather, scatter", "optax.adam"),
    *("Optax: apply_if_finite(adam)", f"Optax: MultiSteps(adam, {EVERY})"),
)


def main() -> None:
    parser = harness.parser(str(__doc__), "gpu/kernels", SECTIONS, rounds=10)
    parser.add_argument(
        "--sizes", type=bench_sparse.size_of, nargs="+", default=SIZES, metavar="V,D,N"
    )
    parser.add_argument("--parameters", type=int, default=64_000_000, help="(default %(default)s)")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.only:
        bench = SECTIONS[name]
        results[name] = bench(arguments.sizes, arguments.parameters, arguments.rounds)
        harness.print_table(f"{name}: {bench.__doc__}", results[name])
    harness.finish(arguments, results, ANCHORS)


if __name__ == "__main__":
    main()
