"""Every notebook runs from top to bottom, and is committed with its outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The client talks to its kernel over plain TCP on the loopback address.
@pytest.mark.filterwarnings("default")
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    committed = [len(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    executed = [len(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    assert committed == executed
