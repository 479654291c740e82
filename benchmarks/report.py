"""Writes the tables of README.md in this folder anew from the results.

    python benchmarks/report.py

The first table after the text that is its key in `tables` is replaced; everything else stays.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"

Row = dict[str, Any]


def tables() -> dict[str, list[str]]:
    """{text of README.md: the lines of the table that follows it}."""
    sparse, deferred, dense, lowmem, gpu, kernels = map(
        _results,
        ("sparse", "deferred", "dense", "lowmem", "gpu/sparse", "gpu/kernels"),
    )
    return {
        "(`bench_sparse.py --only step`). ": _by_distribution(sparse["step"], _size_and_ids),
        "`bench_sparse.py --only growth`": _pivot(
            "V",
            sparse["growth"],
            lambda r: f"{r['rows']:,}",
            lambda r: r["name"],
            lambda rows: _milliseconds(rows[0]["ms"]),
        ),
        "`bench_sparse.py --only tables`": _listing(
            [{k: x for k, x in r.items() if k not in ("tables", "rows")} for r in sparse["tables"]]
        ),
        "`bench_sparse.py --only tower`": _by_distribution(
            sparse["tower"], lambda r: f"V = {r['rows']:,}"
        ),
        "`bench_deferred.py --only step`": _by_distribution(deferred["step"], _size),
        "`bench_deferred.py --only training`": _by_distribution(deferred["training"], _size),
        "`bench_deferred.py --only quality`": _table(
            ["", "loss", "spread of seeds", "largest distance from dense"],
            [
                [r["name"], f"{r['loss']:.4f}", f"{r['spread']:.4f}", f"{r['from dense']:.1e}"]
                for r in deferred["quality"]
            ],
        ),
        "`bench_lowmem.py --only error`": _pivot(
            "rms (largest)",
            lowmem["error"],
            lambda r: r["name"],
            lambda r: f"s = {float(r['s']):g}",
            lambda rows: f"{_error(rows[0]['rms'])} ({_error(rows[0]['largest'])})",
        ),
        "`bench_lowmem.py --only step`": _table(
            ["step", "moments", "bytes an element", "ratio"],
            [
                [r["step"], r["name"], f"{r['bytes an element']:.2f}", f"{r['ratio']:.2f}"]
                for r in lowmem["step"]
            ],
        ),
        "`bench_lowmem.py --only quality`": _table(
            ["", "loss", "change", "spread of seeds"],
            [
                [
                    r["name"],
                    f"{r['loss']:.4f}",
                    f"{r['change, %']:+z.2f} %",
                    f"{r['spread, %']:.1f} %",
                ]
                for r in lowmem["quality"]
            ],
        ),
        "`bench_dense.py --only step compile`": _pivot(
            "leaves",
            [*dense["step"], *({**r, "leaves": "compile, 1,024"} for r in dense["compile"])],
            lambda r: r["name"],
            lambda r: f"{r['leaves']:,}" if isinstance(r["leaves"], int) else r["leaves"],
            lambda rows: f"{rows[0]['ratio to optax.adam']:.2f}" if rows else "",
        ),
        "`bench_dense.py --only options`": _table(
            ["option", "ratio"] * 2,
            _in_pairs(
                [
                    "none" if r["option"] == "plain" else f"`{r['option']}`",
                    f"{r['ratio to plain']:.2f}",
                ]
                for r in dense["options"]
            ),
        ),
        "`bench_dense.py --only accumulate`": _table(
            [
                "",
                "a held step, in units of `acc + g`",
                "a cycle, how much faster than `optax.MultiSteps`",
            ],
            [
                [r["name"], f"{r['held / (acc + g)']:.2f}", f"{r['MultiSteps / this']:.1f}"]
                for r in dense["accumulate"]
            ],
        ),
        "Kernels of a step (`bench_gpu.py`)": _kernels(
            "table, ids",
            kernels["rows"],
            lambda r: f"({r['rows']:,}, {r['columns']}), {r['ids']:,}",
            digits=3,
        ),
        "Dense steps (`bench_gpu.py`)": _kernels(
            "parameters, leaves",
            [r for section in ("gated", "dense", "states") for r in kernels[section]],
            lambda r: f"{r['parameters']:,}, {r['leaves']:,}",
            digits=2,
        ),
        "PyTorch on the same GPU": _by_distribution(gpu["step"], _size_and_ids),
    }


def with_tables(text: str) -> str:
    """README.md with the tables of the results.

    Raises:
      ValueError: a text is not in it just once.
    """
    for key, table in tables().items():
        before, *after = text.split(key)
        if len(after) != 1:
            raise ValueError(f"{key!r} is {len(after)} times in {README.name}")
        start = after[0].index("\n|") + 1
        end = after[0].index("|\n\n", start) + 2 if "|\n\n" in after[0][start:] else None
        rest = "" if end is None else after[0][end:]
        text = before + key + after[0][:start] + "\n".join(table) + "\n" + rest
    return text


def _results(name: str) -> dict[str, list[Row]]:
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, *rows]
    text = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]
    return [text[0], "|" + "---|" * len(header), *text[1:]]


def _pivot(
    corner: str,
    rows: Sequence[Row],
    line_of: Callable[[Row], str],
    column_of: Callable[[Row], str],
    cell: Callable[[list[Row]], str],
) -> list[str]:
    """A table with a line and a column for each label, in their order."""
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        cells.setdefault(line_of(row), {}).setdefault(column_of(row), []).append(row)
    columns = list(dict.fromkeys(map(column_of, rows)))
    lines = [[line, *(cell(found.get(c, [])) for c in columns)] for line, found in cells.items()]
    return _table([corner, *columns], lines)


def _by_distribution(rows: Sequence[Row], column_of: Callable[[Row], str]) -> list[str]:
    """Ratios of contenders, uniform ids / ids by Zipf's law."""

    def cell(rows: list[Row]) -> str:
        ordered = [r for d in ("uniform", "zipf") for r in rows if r["ids"].endswith(d)]
        return " / ".join(_ratio(r["ratio"]) for r in ordered)

    return _pivot("", rows, lambda r: r["name"], column_of, cell)


def _kernels(
    corner: str, rows: Sequence[Row], label: Callable[[Row], str], *, digits: int
) -> list[str]:
    """What a GPU does in a step; the time of a loop has so many digits."""
    return _table(
        [corner, "step", "kernels", "they run for, ms", "in a loop, ms"],
        [
            [
                label(r),
                r["name"],
                f"{r['kernels']:,.0f}",
                f"{r['device ms']:.3f}",
                f"{r['ms']:.{digits}f}",
            ]
            for r in rows
        ],
    )


def _size(row: Row) -> str:
    return f"V = {row['rows']:,}, D = {row['columns']}"


def _size_and_ids(row: Row) -> str:
    return f"{_size(row)}, {int(row['ids'].split()[0]):,} ids"


def _listing(rows: Sequence[Row]) -> list[str]:
    return _table(list(rows[0]), [[_text(x) for x in r.values()] for r in rows])


def _text(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.3g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def _ratio(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:.0f}"


def _milliseconds(x: float) -> str:
    return f"{x:,.2f}" if x < 100 else f"{x:,.0f}"


def _error(x: float) -> str:
    return f"{x:.2g}" if x < 100 else f"{x:.0f}" if x < 1e4 else f"{x:.0e}"


def _in_pairs(cells: Any) -> list[list[str]]:
    cells = list(cells)
    return [[x for pair in cells[i : i + 2] for x in pair] for i in range(0, len(cells), 2)]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
