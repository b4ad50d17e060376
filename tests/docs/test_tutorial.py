"""The tutorial runs from its first cell to its last, in a kernel of its own, as a reader would run it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("openvino")
pytest.importorskip("diffusers")

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"


def _printed(notebook: object) -> list[tuple[str, list[str]]]:
    """Of each code cell: what it printed, and the kinds of its pictures."""
    found = []
    for cell in notebook.cells:  # type: ignore[attr-defined]
        if cell.cell_type == "code":
            text = "".join(
                output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
            )
            kinds = [kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/")]
            found.append((text, kinds))
    return found


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=os.pathsep)  # this checkout, wherever it runs
    written = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.from_dict(written)
    nbclient.NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found, kept = _printed(run), _printed(written)
    assert [kinds for _, kinds in found] == [kinds for _, kinds in kept]  # its outputs are those of these cells
    assert "will help" in found[1][0]
    assert found[3][0].startswith("ScaleTable of 50 quantizers at 8 times")
    assert found[5][0] == "passed\n"
    assert found[6][1] == ["image/png"]
