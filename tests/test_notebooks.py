"""Every notebook runs from top to bottom, and is committed as it ran."""

import ast
import base64
import importlib.util
import itertools
import pkgutil
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Folders that are somebody's or some machine's own, on Linux, macOS, Colab or Windows.
LOCAL_PATH = re.compile(
    r"(?<![\w.:/])/(home|Users|root|tmp|usr|opt|var|mnt|srv|private|content|work)/|\b[A-Z]:\\\w"
    r"|site-packages"
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def plots_in(outputs: list[Any]) -> list[str]:
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def kinds(cell: Any) -> set[tuple[str, ...]]:
    """What a cell put out, by kind: in how many pieces it printed is a matter of timing, and what
    goes to stderr may be a device's or a font cache's own affair."""
    outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    return {(x.output_type, *sorted(x.get("data", {}))) for x in outputs}


def test_the_notebooks_are_those_that_are_promised() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_embedding_tables",
        "03_coming_from_tensorflow_keras_pytorch",
        "04_low_precision",
        "05_recommender",
    ]


@each_notebook
def test_a_notebook_names_what_the_library_has(path: Path) -> None:
    """Without running it: its code parses, and what it takes from the library is there."""
    names = {}
    for cell in code_cells(read(path)):
        lines = [re.sub(r"^(\s*)%.*", r"\1pass", line) for line in cell.source.splitlines()]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
                names |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Attribute):
                head, _, rest = ast.unparse(node).partition(".")
                modules = [f"{names[head]}.{rest}"] if head in names else []
            else:
                continue
            for name in modules:
                if name.split(".")[0] == "adam_transforms":
                    assert pkgutil.resolve_name(name) is not None, name


@each_notebook
@pytest.mark.long
@pytest.mark.slow
# The client talks to its kernel over plain TCP on the loopback address.
@pytest.mark.filterwarnings("default")
def test_a_notebook_runs_and_puts_out_what_is_committed(path: Path) -> None:
    committed = read(path)
    executed = read(path)
    for cell in code_cells(executed):
        cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(executed, timeout=300, kernel_name="python3").execute()
    outputs = outputs_of(executed)
    assert [x for x in outputs if x.output_type == "error" or "Warning:" in x.get("text", "")] == []
    for now, before in zip(code_cells(executed), code_cells(committed), strict=True):
        assert kinds(now) == kinds(before), now.source
    assert len(plots_in(outputs)) == len(plots_in(outputs_of(committed)))


@each_notebook
def test_a_notebook_is_committed_as_one_execution_left_it(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = outputs_of(notebook)
    assert [x for x in outputs if x.output_type == "error" or x.get("name") == "stderr"] == []
    plots = plots_in(outputs)
    assert len(plots) >= 1
    assert all(base64.b64decode(plot).startswith(b"\x89PNG") for plot in plots)


@each_notebook
def test_a_notebook_installs_only_what_is_missing(path: Path) -> None:
    first, *others = read(path).cells
    assert first.source == read(NOTEBOOKS[0]).cells[0].source
    extras = PROJECT["optional-dependencies"]
    for cell in others:
        if "pip" in cell.source and cell.cell_type == "code":
            assert "find_spec" in cell.source
            packages = re.findall(r'"([\w-]+)"', cell.source)
            assert packages
            for extra in ("notebooks", "test"):
                names = {re.split("[<>=]", line)[0] for line in extras[extra]}
                assert names.issuperset(packages), extra


def run_first_cell(
    monkeypatch: pytest.MonkeyPatch, folder: Path, source: str
) -> tuple[list[str], list[str]]:
    """Runs a first cell in a folder, where the library is not installed.

    Returns:
      What it prepends to sys.path, and the requirements that it installs.
    """
    before, requirements = [*sys.path], []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*before])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = re.sub(r'%pip install -q (".*")', r"install(f\1)", source)  # as IPython does
    exec(source, {"install": requirements.append})
    return sys.path[: len(sys.path) - len(before)], requirements


def test_a_first_cell_uses_the_clone_that_it_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    source = read(NOTEBOOKS[0]).cells[0].source
    assert run_first_cell(monkeypatch, ROOT / "notebooks", source) == ([str(ROOT)], [])


def test_a_first_cell_without_a_clone_installs_from_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = read(NOTEBOOKS[0]).cells[0].source
    requirement = f"adam-transforms[notebooks] @ git+{PROJECT['urls']['Source']}"
    assert run_first_cell(monkeypatch, tmp_path, source) == ([], [requirement])


@each_notebook
def test_a_notebook_says_what_each_cell_does_and_on_which_device(path: Path) -> None:
    notebook = read(path)
    for before, cell in itertools.pairwise(notebook.cells):
        assert "markdown" in (before.cell_type, cell.cell_type), cell.source
    printed = [output.get("text", "") for output in outputs_of(notebook)]
    assert re.match(r"jax [\d.]+ on \w+", "".join(printed))


@each_notebook
def test_a_notebook_holds_nothing_of_the_machine_that_ran_it(path: Path) -> None:
    notebook = read(path)
    text = [cell.source for cell in notebook.cells]
    for output in outputs_of(notebook):
        text.append(output.get("text", ""))
        text += [x for kind, x in output.get("data", {}).items() if kind.startswith("text/")]
    assert LOCAL_PATH.findall("\n".join(text)) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.language_info) == {"name"}
    assert all(not cell.metadata for cell in notebook.cells)


@each_notebook
def test_a_notebook_is_small_enough_to_look_at_on_the_web(path: Path) -> None:
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize(
    "text", ["/home/ann/x", "in /tmp/a", r"C:\Users\ann", "'/root/.cache'", "lib/site-packages/jax"]
)
def test_what_counts_as_a_path_of_a_machine(text: str) -> None:
    assert LOCAL_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["https://arxiv.org/abs/1412.6980", "params/hidden/kernel", "w/Adam_1", "a/home/b"]
)
def test_what_does_not(text: str) -> None:
    assert not LOCAL_PATH.search(text)
