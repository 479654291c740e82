"""The benchmarks run, on sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("script", "sections"), [("bench_dense.py", ["step", "options", "accumulate"])]
)
def test_benchmark_runs(script: str, sections: list[str], tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / script, "--parameters", "65536", "--rounds", "1"]
    command += ["--output", output, "--only", *sections]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert list(results) == ["environment", *sections]
    assert all(row["ratio to optax.adam"] > 0 for row in results["step"])
    for section in sections:
        assert section in done.stdout
