"""The README's figure: milliseconds of an optimizer's step over the rows of the table.

    python benchmarks/bench_sparse.py --only growth --output growth.json
    python benchmarks/figure.py growth.json [figure.svg]

It needs matplotlib. Without arguments it takes the results that are committed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import harness
from matplotlib.figure import Figure

# What each contender is called in the figure, and its color; the others are left out.
LINES = {
    "dense optax.adam": ("optax.adam, dense gradient", "#888888"),
    "torch SparseAdam": ("PyTorch SparseAdam", "#d95f02"),
    "deferred_adam": ("deferred_adam: dense Adam's trajectory", "#7570b3"),
    "lazy_adam": ("lazy_adam", "#1b7837"),
}

LABEL_POINTS = 28  # between two labels


def draw(results: dict[str, Any]) -> Figure:
    """Both axes are logarithmic; each line has its name at its right end."""
    times: dict[str, list[tuple[int, float]]] = {name: [] for name in LINES}
    for row in results["growth"]:
        if row["name"] in LINES:
            times[row["name"]].append((row["rows"], row["ms"]))
    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, points in times.items():
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=LINES[name][1], linewidth=2)
    axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="ms a step")
    axes.set_title("One Adam step on a table, 8,192 ids of 32 columns", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    device, cores = results["environment"]["device"], results["environment"]["cores"]
    figure.supxlabel(
        f"{cores} CPU cores" if device == "cpu" else device, x=0.99, ha="right", fontsize=8
    )
    figure.draw_without_rendering()  # gives the axes their place
    lowest = 0.0
    for name in sorted([x for x in times if times[x]], key=lambda x: times[x][-1][1]):
        rows, ms = times[name][-1]
        label, color = LINES[name]
        height = axes.transData.transform((rows, ms))[1] * 72 / figure.dpi  # points
        lowest = max(lowest + LABEL_POINTS, height)
        axes.annotate(
            f"{label}\n{ms:,.0f} ms" if ms >= 100 else f"{label}\n{ms:.2g} ms",
            (rows, ms),
            xytext=(10, lowest - height),
            textcoords="offset points",
            color=color,
            verticalalignment="center",
        )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=harness.RESULTS / "sparse.json")
    parser.add_argument("figure", type=Path, nargs="?", default=harness.RESULTS / "step_time.svg")
    arguments = parser.parse_args()
    figure = draw(json.loads(arguments.results.read_text()))
    figure.savefig(arguments.figure, metadata={"Date": None})
    print(f"written to {arguments.figure}")


if __name__ == "__main__":
    main()
