"""The benchmarks run, on sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


SECTIONS = ["step", "compile", "options", "accumulate"]
RUNS = {
    "bench_dense.py": (
        ["--parameters", "4096", "--leaves", "2", "--only", *SECTIONS],
        SECTIONS,
    ),
    "bench_sparse.py": (
        ["--sizes", "1000,4,64", "--rows", "1000", "2000", "--tower-rows", "1000"],
        ["step", "flat", "tower"],
    ),
    "bench_deferred.py": (["--rows", "10000", "--only", "step"], ["step"]),
}


@pytest.mark.parametrize("script", RUNS)
def test_benchmark_takes_these_options(script: str) -> None:
    command = [sys.executable, BENCHMARKS / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    options = [word for word in RUNS[script][0] if word.startswith("--")]
    assert all(option in done.stdout for option in [*options, "--rounds", "--output"])


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.long
@pytest.mark.slow
def test_benchmark_runs(script: str, tmp_path: Path) -> None:
    arguments, sections = RUNS[script]
    output = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / script, *arguments]
    command += ["--rounds", "1", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert list(results) == ["environment", *sections]
    assert all(row["ms"] > 0 for row in results["step"])
    assert all(section in done.stdout for section in sections)
