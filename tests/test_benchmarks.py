"""The benchmarks run, on sizes that say nothing about speed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, normal

import adam_transforms as at

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


SECTIONS = ["step", "compile", "options", "accumulate"]
RUNS = {
    "bench_dense.py": (
        ["--parameters", "4096", "--leaves", "2", "--only", *SECTIONS],
        SECTIONS,
    ),
    "bench_sparse.py": (
        [
            *("--sizes", "1000,4,64", "--rows", "1000", "2000", "--table-rows", "1000", "2000"),
            *("--tower-rows", "1000"),
        ],
        ["step", "growth", "tables", "tower", "tracing"],
    ),
    "bench_deferred.py": (
        ["--rows", "10000", "--only", "step", "training"],
        ["step", "training"],
    ),
    "bench_lowmem.py": (["--parameters", "65536", "--only", "step"], ["step"]),
    "bench_gpu.py": (
        ["--sizes", "1000,4,64", "--parameters", "65536"],
        ["rows", "gated", "dense", "states"],
    ),
}
COMMON = ["--rounds", "--output", "--compare", "--tolerance"]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_the_tables_of_the_readme_are_those_of_the_results(module: Any) -> None:
    """If this fails: `python benchmarks/report.py`."""
    report = module("report")
    assert len(report.tables()) > 10
    assert report.with_tables(report.README.read_text()) == report.README.read_text()


@pytest.mark.parametrize("script", RUNS)
def test_benchmark_takes_these_options(script: str) -> None:
    command = [sys.executable, BENCHMARKS / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    options = [word for word in RUNS[script][0] if word.startswith("--")]
    assert all(option in done.stdout for option in [*options, *COMMON])


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
    assert all(row["ms"] > 0 for row in results[sections[0]])
    assert all(section in done.stdout for section in sections)


def test_benchmark_compares_with_its_own_results(module: Any) -> None:
    """What is recorded has a contender of another project in each group."""
    harness = module("harness")
    for name in ("sparse", "dense", "deferred"):
        recorded = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
        results = {key: rows for key, rows in recorded.items() if key != "environment"}
        anchors = module(f"bench_{name}").ANCHORS
        found, compared = harness.slower(results, recorded, anchors, 1.0)
        assert found == []
        assert compared >= sum(row["name"] not in anchors for row in results["step"])


def rows(**ms: float) -> list[dict[str, Any]]:
    return [{"rows": 10, "name": name, "ms": x, "ratio": x, "lines": 7} for name, x in ms.items()]


@pytest.mark.parametrize(
    ("now", "change"),
    [
        ({"ours": 2.0, "torch": 4.0, "dense": 6.0}, None),
        ({"ours": 4.0, "torch": 8.0, "dense": 12.0}, None),  # a slower machine
        ({"ours": 3.0, "torch": 4.0, "dense": 6.0}, 1.5),
        ({"ours": 2.0, "torch": 2.0, "dense": 3.0}, 2.0),  # a faster machine
        ({"ours": 2.0, "torch": 1.0, "dense": 6.0}, None),  # one anchor alone changed
        ({"ours": 3.0, "torch": 4.0}, 1.5),
        ({"ours": 3.0}, None),
        ({"another": 9.0, "torch": 4.0}, None),
    ],
)
def test_slower_is_what_lost_to_the_anchors(module: Any, now: Any, change: Any) -> None:
    slower = module("harness").slower
    recorded = {"environment": {}, "step": rows(ours=2.0, torch=4.0, dense=6.0)}
    found, compared = slower({"step": rows(**now)}, recorded, ("torch", "dense"), 1.4)
    assert compared == ("ours" in now and len(now) > 1)
    assert [row["change"] for row in found] == ([] if change is None else [change])
    assert all((row["name"], row["of"]) == ("ours", "step 10 rows") for row in found)


def test_rows_of_another_group_or_section_are_not_compared(module: Any) -> None:
    slower = module("harness").slower
    old, new = rows(ours=2.0, torch=4.0), rows(ours=9.0, torch=4.0)
    recorded = {"step": [row | {"rows": 20} for row in old], "flat": old}
    assert slower({"step": new, "other": new}, recorded, ["torch"], 1.1) == ([], 0)


def test_comparing_prints_what_got_slower_and_writes_only_on_demand(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness, file = module("harness"), tmp_path / "recorded.json"
    harness.write_json(file, {"step": rows(ours=2.0, torch=4.0), "other": []})
    recorded = file.read_text()
    parser = harness.parser("Of a test.", "recorded", ["step", "other"], rounds=1)
    results = {"step": rows(ours=3.0, torch=4.0)}
    harness.finish(parser.parse_args(["--compare", str(file)]), results, ["torch"])
    assert file.read_text() == recorded
    printed = capsys.readouterr().out
    assert f"compared with {file}: 1 times" in printed
    assert "0.500  0.750    1.50" in printed
    harness.finish(parser.parse_args(["--output", str(file)]), results, ["torch"])
    assert json.loads(file.read_text()) == json.loads(recorded) | results


@pytest.mark.parametrize("text", [None, "no JSON", "[]", "{}"])
def test_comparing_with_no_results_fails_before_anything_is_timed(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    file = tmp_path / "recorded.json"
    parser = module("harness").parser("Of a test.", "recorded", ["step"], rounds=1)
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit):
        parser.parse_args(["--compare", str(file)])
    assert f"{file} must be a file of results" in capsys.readouterr().err


def test_blockwise_codes_are_the_nearest_values(module: Any) -> None:
    blockwise = module("blockwise_adam")
    for values in (blockwise._OF_MU, blockwise._OF_NU):
        assert values.size == 256
        assert values.max() == 1.0
        x = normal(0, 3, 100) if values.min() < 0 else jnp.abs(normal(0, 3, 100))
        decoded = blockwise.decode(blockwise.encode(x, values), values, x)
        padded = np.pad(np.ravel(x), (0, 212)).reshape(2, 256)
        scaled = padded / np.abs(padded).max(axis=1, keepdims=True)
        nearest = np.abs(scaled[..., None] - values).min(axis=-1).reshape(-1)[:300]
        scales = np.repeat(np.abs(padded).max(axis=1), 256)[:300]
        error = np.abs(np.ravel(decoded) - np.ravel(x))
        np.testing.assert_allclose(error, nearest * scales, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "columns", "ids"), [("native", 17, 5000), ("pallas", 16, 800)])
def test_one_kernel_takes_the_steps_of_lazy_adam(
    module: Any, name: str, columns: int, ids: int
) -> None:
    kernel = module(f"{name}_lazy")
    if name == "native":
        try:
            kernel.compile_and_register()
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
    rows = 300
    step = jax.jit(kernel.update, static_argnames="learning_rate")
    generator = np.random.default_rng(0)
    tx, params = at.lazy_adam(1e-2), {"table": jnp.ones((rows, columns))}
    state = tx.init(params)
    tables = params["table"], *[jnp.zeros((rows, columns))] * 2
    for count in range(3):
        indices = jnp.asarray(generator.integers(-1, rows + 1, ids, np.int32))
        gradient = at.SparseRows(indices, normal(count, ids, columns), rows)
        updates, state = tx.update({"table": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        tables = step(tables, jnp.int32(count), indices, gradient.values, learning_rate=1e-2)
    adam = state.inner_state[0]
    assert_close([*tables], [params["table"], adam.mu["table"], adam.nu["table"]])
