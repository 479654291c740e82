"""Is dense Adam as fast as it can be, and what does each option cost?

    python benchmarks/bench_dense.py [--parameters N] [--leaves N] [--rounds N]
                                     [--only SECTION ...] [--output F] [--compare F]

Sections: `step` (against jitted optax.adam and, where PyTorch is installed, its fused Adam; one
step, applied, in 1, 64 and 1,024 leaves), `compile` (seconds at 1,024 leaves), `options` (each as a
ratio to plain Adam), `accumulate` (against optax.MultiSteps, held and emitting steps apart).
"""

import math
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_transforms as at

EVERY = 4  # gradients to a cycle of accumulation
BATCH = 8


def random_leaves(parameters: int, leaves: int, seed: int) -> list[jax.Array]:
    """`parameters` random float32 values in so many equal leaves."""
    generator = np.random.default_rng(seed)
    size = parameters // leaves
    return [jnp.asarray(generator.standard_normal(size, np.float32)) for _ in range(leaves)]


def linear_layers(parameters: int, layers: int, seed: int) -> Any:
    """Inputs and output cotangents, (BATCH, width) each, of so many square layers: their weights'
    gradients are to be computed within the step, as backpropagation does."""
    generator = np.random.default_rng(seed)
    width = math.isqrt(parameters // layers)
    return [
        tuple(jnp.asarray(generator.standard_normal((BATCH, width), np.float32)) for _ in range(2))
        for _ in range(layers)
    ]


def training_step(
    tx: Any,
    apply: Callable[..., Any] = optax.apply_updates,
    compiler_options: dict[str, Any] | None = None,
) -> Any:
    """A jitted ``((params, state), source) -> (params, state)`` that donates what it replaces.

    `source` is the gradients, or what `linear_layers` gives to compute them from.
    """

    def gradient(of: Any) -> jax.Array:
        return of[0].T @ of[1] if isinstance(of, tuple) else of

    def step(carry: Any, source: list[Any]) -> Any:
        params, state = carry
        updates, state = tx.update([gradient(of) for of in source], state, params)
        return apply(params, updates), state

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)


def case(name: str, tx: Any, source: list[Any], **options: Any) -> harness.Case:
    """A training step of `tx` on fresh parameters and ever the same gradients."""
    shapes = [(of[0].shape[1],) * 2 if isinstance(of, tuple) else of.shape for of in source]
    params = [0.1 * jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]
    step = training_step(tx, **options)
    return harness.Case(name, lambda carry: step(carry, source), (params, tx.init(params)))


def torch_case(grads: list[jax.Array]) -> harness.Case | None:
    """PyTorch's fused Adam on the same sizes; None where PyTorch is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    params = [torch.zeros(g.size) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(np.array(g))
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
    return harness.Case("torch.optim.Adam(fused=True)", lambda _: optimizer.step(), None)


def copy_bandwidth(parameters: int) -> float:
    """Bytes per second, read and written, of a plain in-place pass over an array of this size."""
    negate = jax.jit(jnp.negative, donate_argnums=0)
    probe = harness.Case("copy", negate, jnp.ones(parameters, jnp.float32))
    harness.interleave([probe], rounds=10)
    return 2 * 4 * parameters / (probe.median_ms() / 1e3)


def bench_step(parameters: int, most_leaves: int, rounds: int) -> list[dict[str, Any]]:
    """One training step, in 1, 64 and 1,024 leaves."""
    bandwidth = copy_bandwidth(parameters)
    # Adam reads p, m, v and g, and writes p, m and v. A loop over all of them may beat the copy's
    # bandwidth, for it keeps more memory accesses in flight.
    copies_ms = 1e3 * 7 * 4 * parameters / bandwidth
    results = []
    for leaves in sorted({min(leaves, most_leaves) for leaves in (1, 64, 1024)}):
        grads = random_leaves(parameters, leaves, seed=leaves)
        cases = [
            case("optax.adam", optax.adam(1e-3), grads),
            case("adam", at.adam(1e-3), grads),
            torch_case(grads),
        ]
        cases = [c for c in cases if c is not None]
        harness.interleave(cases, rounds=rounds)
        base = cases[0].median_ms()
        for c in cases:
            results.append(
                {
                    "leaves": leaves,
                    "name": c.name,
                    "ms": c.median_ms(),
                    "ratio to optax.adam": c.median_ms() / base,
                    "ratio to 7 passes of a copy": c.median_ms() / copies_ms,
                }
            )
    harness.print_table(
        f"step: {parameters:,} float32 parameters; a copy moves {bandwidth / 1e9:.1f} GB/s, at "
        f"which the 7 passes that Adam needs take {copies_ms:.0f} ms",
        results,
    )
    return results


def bench_compile(parameters: int, most_leaves: int, rounds: int) -> list[dict[str, Any]]:
    """Tracing and compiling at 1,024 leaves, and the passes over memory of what comes out."""
    leaves = min(1024, most_leaves)
    grads = [jax.ShapeDtypeStruct((parameters // leaves,), jnp.float32)] * leaves
    results = []
    transforms = {"optax.adam": lambda: optax.adam(1e-3), "adam": lambda: at.adam(1e-3)}
    times: dict[str, list[float]] = {name: [] for name in transforms}
    compiled = {}
    for _ in range(max(3, rounds // 8)):
        for name, make in transforms.items():
            jax.clear_caches()
            tx = make()
            start = time.perf_counter()
            state = jax.eval_shape(tx.init, grads)
            compiled[name] = training_step(tx).lower((grads, state), grads).compile()
            times[name].append(time.perf_counter() - start)
    for name in transforms:
        seconds = float(np.median(times[name]))
        passes = compiled[name].cost_analysis()["bytes accessed"] / (4 * parameters)
        results.append(
            {
                "name": name,
                "seconds": seconds,
                "ratio to optax.adam": seconds / float(np.median(times["optax.adam"])),
                "passes over memory": passes,
                "temporaries, MB": compiled[name].memory_analysis().temp_size_in_bytes / 1e6,
            }
        )
    harness.print_table(
        f"compile: tracing and compiling a step of {leaves:,} leaves",
        results,
    )
    return results


def bench_options(parameters: int, most_leaves: int, rounds: int) -> list[dict[str, Any]]:
    """The cost of each option of the preset, in a step that computes its gradients itself."""
    layers = min(64, most_leaves)
    source = linear_layers(parameters, layers, seed=0)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "amsgrad=True": {"amsgrad": True},
        "nesterov=True": {"nesterov": True},
        "weight_decay=1e-2": {"weight_decay": 1e-2},
        "clip_value=1.0": {"clip_value": 1.0},
        "clip_norm=1.0": {"clip_norm": 1.0},
        "clip_global_norm=1.0": {"clip_global_norm": 1.0},
        "ema=0.99": {"ema": 0.99},
        "ema=0.99, overwritten": {"ema": 0.99, "ema_overwrite_every": 100},
        "loss_scale=128.0": {"loss_scale": 128.0},
        'loss_scale="dynamic"': {"loss_scale": "dynamic"},
    }
    optax_clips = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    cases = [case(name, at.adam(1e-3, **kwargs), source) for name, kwargs in options.items()]
    cases += [
        case("Optax: adam", optax.adam(1e-3), source),
        case("Optax: clip_by_global_norm", optax_clips, source),
        case("Optax: apply_if_finite", optax.apply_if_finite(optax.adam(1e-3), 5), source),
    ]
    harness.interleave(cases, rounds=rounds)
    base = cases[0].median_ms()
    results = [
        {"option": c.name, "ms": c.median_ms(), "ratio to plain": c.median_ms() / base}
        for c in cases
    ]
    harness.print_table(
        f"options: adam(...) at {parameters:,} parameters in {layers} linear layers, "
        f"gradients of a batch of {BATCH} included",
        results,
    )
    return results


def bench_accumulate(parameters: int, most_leaves: int, rounds: int) -> list[dict[str, Any]]:
    """A cycle of four gradients: held steps, the emitting step, and their mean."""
    leaves = min(8, most_leaves)
    grads = random_leaves(parameters, leaves, seed=0)
    add = jax.jit(lambda acc, g: jax.tree.map(jnp.add, acc, g), donate_argnums=0)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    cases = [
        harness.Case("acc + g alone", lambda acc: add(acc, grads), zeros),
        case("adam, no accumulation", at.adam(1e-3), grads),
        case("accumulate(adam)", at.accumulate(at.adam(1e-3), EVERY), grads),
        case(
            "accumulate(adam), at.apply_updates",
            at.accumulate(at.adam(1e-3), EVERY),
            grads,
            apply=at.apply_updates,
        ),
        case("adam(every option)", at.adam(1e-3, accumulate_every=EVERY, **EVERYTHING), grads),
        case("optax.MultiSteps(optax.adam)", optax.MultiSteps(optax.adam(1e-3), EVERY), grads),
    ]
    harness.interleave(cases, rounds=rounds, cycle=EVERY)
    bare, steps = cases[0].median_ms(), cases[-1]
    results = []
    for c in cases:
        # A cycle starts with a held step and ends with the emitting one.
        held = [t for i, t in enumerate(c.times) if i % EVERY != EVERY - 1]
        held_ms = 1e3 * float(np.median(held))
        results.append(
            {
                "name": c.name,
                "held ms": held_ms,
                "emitting ms": c.median_ms(EVERY - 1, EVERY),
                "mean ms": c.cycle_ms(EVERY),
                "held / (acc + g)": held_ms / bare,
                "MultiSteps / this": steps.cycle_ms(EVERY) / c.cycle_ms(EVERY),
            }
        )
    harness.print_table(
        f"accumulate: cycles of {EVERY} at {parameters:,} parameters in {leaves} leaves",
        results,
    )
    return results


EVERYTHING = {
    "weight_decay": 1e-2,
    "clip_global_norm": 1.0,
    "ema": 0.99,
    "loss_scale": "dynamic",
}

# The contenders that are not of this project.
ANCHORS = (
    *("optax.adam", "torch.optim.Adam(fused=True)", "Optax: adam", "Optax: clip_by_global_norm"),
    *("Optax: apply_if_finite", "acc + g alone", "optax.MultiSteps(optax.adam)"),
)

SECTIONS = {
    "step": (bench_step, 64_000_000),
    "compile": (bench_compile, 64_000_000),
    "options": (bench_options, 32_000_000),
    "accumulate": (bench_accumulate, 32_000_000),
}


def main() -> None:
    parser = harness.parser(str(__doc__), "dense", SECTIONS, rounds=24)
    parser.add_argument("--parameters", type=int, help="parameters in all (default: 32 or 64 M)")
    parser.add_argument("--leaves", type=int, default=1024, help="at most (default %(default)s)")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.only:
        bench, parameters = SECTIONS[name]
        size = arguments.parameters or parameters
        results[name] = bench(size, arguments.leaves, arguments.rounds)
    harness.finish(arguments, results, ANCHORS)


if __name__ == "__main__":
    main()
