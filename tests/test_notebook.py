"""The notebook runs: it leaves a run folder, draws its plots, and its network learns."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "own_data.ipynb"
MISSING = [name for name in ("nbclient", "ipykernel", "skimage") if importlib.util.find_spec(name) is None]
needs_jupyter = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


def test_the_notebook_is_stored_without_outputs() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def executed(folder: Path, parameters: str) -> dict[str, Any]:
    """Run the notebook in a folder with lines added to its parameters, and return its cells by id."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in book.cells}
    cells["parameters"].source += f"\nEXAMPLES = {str(NOTEBOOK.parent)!r}{parameters}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    client = NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return cells


def value(cell: Any) -> Any:
    """The value of the last line of a cell."""
    (result,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return ast.literal_eval(result.data["text/plain"])


def pictures(cell: Any) -> list[str]:
    """The PNG images that a cell displays."""
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.mark.slow
@needs_jupyter
def test_the_notebook_runs_with_small_settings(tmp_path: Path) -> None:
    cells = executed(tmp_path, "\nEPOCHS, PATCHES, WORKERS = 1, 16, 0")
    run = tmp_path / "runs" / "own_data"
    assert json.loads((run / "summary.json").read_text())["step"] == 2
    assert (run / "teacher.safetensors").is_file()
    assert len(pictures(cells["run"])) == 1
    said = "".join(output.text for output in cells["run"].outputs if output.output_type == "stream")
    assert "step      2  epoch   1.00" in said
    assert "\x1b" not in said
    assert 0.3 < value(cells["pretrained"]) <= 1  # chance is 0.06
    assert len(pictures(cells["neighbours"])) == 1
    assert "[4, 192]" in cells["export"].outputs[-1].data["text/plain"]


@pytest.mark.slow
@needs_jupyter
def test_the_whole_notebook_learns(tmp_path: Path) -> None:
    cells = executed(tmp_path, "")
    accuracy = value(cells["knn"])
    assert accuracy["trained"] > accuracy["untrained"] + 0.1
    assert accuracy["trained"] > accuracy["pixels"] + 0.1
    lines = (tmp_path / "runs" / "own_data" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
