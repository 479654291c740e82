"""What type checkers see of the public names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adam_transforms as at

ROOT = Path(__file__).parent.parent

# `assert_type` says what is inferred; an ignored error that does not occur is itself an error. What
# strict pyright may not report is of Optax, which has no types, and of jax.numpy.
PROGRAM = """
# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import adam_transforms as at

params = {"table": jnp.zeros((10, 2)), "w": jnp.ones(2)}
ids = jnp.array([1, 3])
plain = at.adam(1e-3, mu_dtype=jnp.bfloat16, nu_dtype="float32", loss_scale="dynamic")
small = at.adamw(optax.constant_schedule(1e-3), state_bits={"mu": 8, "nu": 16})
lazy = at.lazy(optax.adam(1e-3), tables=["table", "embed"])
lazy_adam = at.lazy_adam(1e-3, tables=lambda path, leaf: path.endswith("table"))
deferred = at.deferred_adam(1e-3, tables="table")


def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    return jnp.sum(params["table"][ids] * params["w"])


state = deferred.init(params)
step = at.value_and_grad(loss, rows_from=state)
value, grads = step(params, ids)
updates, state = deferred.update(grads, state, params)
assert_type(at.apply_updates(params, updates), dict[str, jax.Array])
params, state = at.flush(params, state)
assert_type(params, dict[str, jax.Array])
assert_type(at.explain(loss, params, ids)["table"].is_rows, bool)
rows = at.SparseRows(ids, jnp.ones((2, 2)), num_rows=10)
assert_type(rows.to_dense(), jax.Array)
assert_type(rows.sum_duplicates(), at.SparseRows)

step(params)  # type: ignore[call-arg]
at.adam(1e-3, max_of="largest")  # type: ignore[arg-type]
at.adam(1e-3, loss_scale="static")  # type: ignore[arg-type]
at.scale_by_adam(nu_per="column")  # type: ignore[arg-type]
at.params_ema(0.9, initial="zero")  # type: ignore[arg-type]
at.lazy_adam(1e-3, tables=3)  # type: ignore[arg-type]
"""


def mypy(folder: Path, *options: str) -> str:
    """What mypy reports about the files in `folder`, and not about the package itself."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache")]
    command += ["--follow-imports=silent", *options]
    done = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_types_of_all_public_names_are_known() -> None:
    command = [sys.executable, "-m", "pyright", "--verifytypes", at.__name__, "--ignoreexternal"]
    done = subprocess.run([*command, "--outputjson"], cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout)["typeCompleteness"]
    assert report["exportedSymbolCounts"]["withKnownType"] > 100
    unknown = [x["name"] for x in report["symbols"] if x["isExported"] and not x["isTypeKnown"]]
    assert unknown == []


@pytest.mark.slow
def test_a_type_checker_infers_results_and_refuses_wrong_choices(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    found = mypy(tmp_path, "--strict", "--disable-error-code=import-untyped")
    assert found.startswith("Success"), found
    command = [sys.executable, "-m", "pyright", str(tmp_path / "program.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_examples_pass_a_type_checker(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)):
        (tmp_path / f"readme_{i}.py").write_text(example)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "code")
        plain = re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.MULTILINE)
        (tmp_path / f"notebook_{path.stem}.py").write_text(plain)
    found = re.findall(r"(\w+)\.py:\d+: error: (.*)", mypy(tmp_path, "--ignore-missing-imports"))
    # Haiku's own types refuse what its documentation shows.
    assert [x for x in found if x[0].startswith("readme") and "hk." not in x[1]] == []
    # A notebook uses a name for values of several types, and unpacks dictionaries of options.
    calls = [x for x in found if re.search(r'(?:to|for) "(\w+)"', x[1]) and '"**' not in x[1]]
    assert [x for x in calls if any(f'"{name}"' in x[1] for name in at.__all__)] == []
