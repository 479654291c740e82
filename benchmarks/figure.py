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


def draw(results: dict[str, Any]) -> Figure:
    """Both axes are logarithmic; each line has its name at its right end."""
    times: dict[str, list[tuple[int, float]]] = {name: [] for name in LINES}
    for row in results["growth"]:
        if row["name"] in LINES:
            times[row["name"]].append((row["rows"], row["ms"]))
    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, (label, color) in LINES.items():
        if not times[name]:
            continue
        axes.plot(*zip(*times[name], strict=True), "o-", color=color, linewidth=2)
        axes.annotate(
            f"{label}\n{times[name][-1][1]:.3g} ms",
            times[name][-1],
            xytext=(10, 0),
            textcoords="offset points",
            color=color,
            verticalalignment="center",
        )
    axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="ms a step")
    axes.set_title("One Adam step on a table, 8,192 ids of 32 columns", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    device, cores = results["environment"]["device"], results["environment"]["cores"]
    figure.supxlabel(
        f"{cores} CPU cores" if device == "cpu" else device, x=0.99, ha="right", fontsize=8
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
