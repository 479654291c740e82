"""Timing side by side: warm up, interleave, take medians, print ratios, write JSON.

The machines are shared and noisy. What is compared is therefore timed in turns, call by call, in
one process, and reported as a ratio of medians to the first of the group. On an accelerator calls
of a turn are made without waiting for one another, as in a training loop.
"""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes the results, with their environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    print(f"\nwritten to {path}")
