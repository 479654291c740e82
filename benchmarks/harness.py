"""Timing side by side: warm up, interleave, take medians, print ratios, write JSON.

The machines are shared and noisy. What is compared is therefore timed in turns, call by call, in
one process, and reported as a ratio of medians to the first of the group. On an accelerator calls
of a turn are made without waiting for one another, as in a training loop.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


@dataclass
class Case:
    """One thing to time: `step` takes the carry to the next one, as a training loop would."""

    name: str
    step: Callable[[Any], Any]
    carry: Any
    wait: Callable[[Any], Any] = jax.block_until_ready  # until the results of all steps are there
    times: list[float] = field(default_factory=list)  # seconds, in the order of the calls

    def call(self, times: int = 1) -> float:
        """Seconds that a call takes, the mean of so many made at once, until all results are
        there."""
        start = time.perf_counter()
        for _ in range(times):
            self.carry = self.step(self.carry)
        self.wait(self.carry)
        return (time.perf_counter() - start) / times

    def median_ms(self, phase: int | None = None, cycle: int = 1) -> float:
        """Median milliseconds of a call: of all, or of every `cycle`-th from `phase` on."""
        times = self.times if phase is None else self.times[phase::cycle]
        return 1e3 * statistics.median(times)

    def cycle_ms(self, cycle: int) -> float:
        """Mean milliseconds of a call over a cycle; the median cycle."""
        whole = np.reshape(self.times, (-1, cycle)).mean(axis=1)
        return 1e3 * float(np.median(whole))


def interleave(
    cases: Sequence[Case], *, rounds: int, cycle: int = 1, warm_up: int = 2, alike: bool = False
) -> None:
    """Times the cases in turns, `cycle` consecutive calls of each a round, into their `times`.

    `alike` says that the calls of a cycle all do the same work: their mean may stand for each.
    """
    ahead = alike and jax.default_backend() != "cpu"
    for case in cases:
        for _ in range(warm_up * cycle):
            case.call()
    order = random.Random(0)
    for _ in range(rounds):
        # In a new order every round, so that nobody always follows the same neighbour, whose
        # threads may still be spinning and whose data are in the caches.
        for case in order.sample(cases, len(cases)):
            case.times.extend([case.call(cycle)] if ahead else [case.call() for _ in range(cycle)])


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of equal keys under these, numbers to three significant digits."""
    text = [[_text(cell) for cell in row] for row in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    print(f"\n{title}")
    for row in text:
        first, *rest = (
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *rest]))


def _text(cell: Any) -> str:
    return f"{cell:#.3g}".rstrip(".") if isinstance(cell, float) else str(cell)


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {name: __import__(name).__version__ for name in ("jax", "jaxlib", "optax", "numpy")}
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0].device_kind),
        **versions,
    }


RESULTS = Path(__file__).parent / "results"

# {section: rows}. The fields of a row before its first float say what was measured: the last text
# among them is the contender, and all contenders with equal other fields are a group. Fields with
# these units are times.
Results = dict[str, list[dict[str, Any]]]
_UNITS = {"ms", "seconds"}


def parser(
    description: str, name: str, sections: Collection[str], rounds: int
) -> argparse.ArgumentParser:
    """With the options that all benchmarks have; results go to `name`.json by default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*sections], default=[*sections])
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed turns of each (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, help=f"(default {RESULTS / name}.json)")
    parser.add_argument(
        "--compare",
        type=_recorded,
        metavar="FILE",
        help="print what got slower than in these results; without --output nothing is written",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1.1, help="of --compare (default %(default)s)"
    )
    parser.set_defaults(name=name)
    return parser


def _recorded(file: str) -> tuple[str, dict[str, Any]]:
    """The file and the results in it, read before anything is timed."""
    try:
        recorded = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file} must be a file of results: {error}") from None
    if not isinstance(recorded, dict) or "environment" not in recorded:
        raise argparse.ArgumentTypeError(f"{file} must be a file of results, by --output")
    return file, recorded


def finish(options: argparse.Namespace, results: Results, anchors: Collection[str]) -> None:
    """Writes the results, or compares them; `anchors` as for `slower`."""
    if options.compare is not None:
        file, recorded = options.compare
        here = environment()
        for field, value in recorded["environment"].items():
            if here.get(field) != value:
                print(f"\n{field} was {value} in {file}, and is {here.get(field)}")
        found, compared = slower(results, recorded, anchors, options.tolerance)
        print(f"\ncompared with {file}: {compared} times")
        if found:
            print_table(f"slower by more than {options.tolerance}", found)
    if options.compare is None or options.output is not None:
        write_json(options.output or RESULTS / f"{options.name}.json", results)


def slower(
    results: Results, recorded: dict[str, Any], anchors: Collection[str], tolerance: float
) -> tuple[list[dict[str, Any]], int]:
    """What takes longer than it did, as a ratio to contenders of the same run.

    Milliseconds of two runs do not compare. A time is therefore divided by that of an anchor in the
    same group and the same run. Of all anchors the one that shows the median change counts.

    Args:
      results, recorded: of this run and of an earlier one.
      anchors: the names of the contenders that are not of this project.
      tolerance: the factor above which a change is reported.

    Returns:
      (rows to print, how many times were compared).
    """
    found, compared = [], 0
    for section in [name for name in results if name in recorded]:
        new, old = _times(results[section]), _times(recorded[section])
        both = new.keys() & old.keys()
        for timed in [x for x in new if x in both and x.name not in anchors]:
            changes = []
            for anchor in [x for name in anchors if (x := timed._replace(name=name)) in both]:
                before, now = old[timed] / old[anchor], new[timed] / new[anchor]
                changes.append((now / before, anchor.name, before, now))
            if not changes:
                continue
            compared += 1
            change, anchor, before, now = statistics.median_low(changes)
            if change > tolerance:
                what = {"name": timed.name, "of": f"{section} {timed.group}", "time": timed.measure}
                found.append(
                    what | {"in units of": anchor, "before": before, "now": now, "change": change}
                )
    return found, compared


class _Timed(NamedTuple):
    """What a time is of: a group of contenders, the contender, and the field of the row."""

    group: str
    name: str
    measure: str


def _times(rows: Sequence[dict[str, Any]]) -> dict[_Timed, float]:
    times = {}
    for row in rows:
        described = dict(itertools.takewhile(lambda x: not isinstance(x[1], float), row.items()))
        name = described.pop([key for key, x in described.items() if isinstance(x, str)][-1])
        group = ", ".join(f"{x} {key}" for key, x in described.items())
        for measure in [key for key in row if key.split()[-1] in _UNITS]:
            times[_Timed(group, name, measure)] = row[measure]
    return times


def write_json(path: Path, results: Results) -> None:
    """Writes the results, with their environment; sections that were not run stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded = json.loads(path.read_text()) if path.exists() else {}
    contents = recorded | {"environment": environment()} | results
    path.write_text(json.dumps(contents, indent=1) + "\n")
    print(f"\nwritten to {path}: {', '.join(results)}")
