"""The code of examples/notebook.ipynb runs from its first cell to its last, and leaves nothing behind."""

import json
from pathlib import Path

import matplotlib
import pytest
from live import LiveServer

from patchclamp import Client


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def stored(address: str) -> set[str]:
    with Client(address) as client:
        return {artifact.id for artifact in client.list_artifacts()}


def test_the_cells_of_the_notebook_run_in_order_and_leave_nothing(
    examples: Path, embedded_server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib.use("Agg")
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", embedded_server.address)
    before = stored(embedded_server.address)
    names: dict[str, object] = {}
    for cell in code_cells(examples / "notebook.ipynb"):
        exec(cell, names)
    said = capsys.readouterr().out
    assert "by first_tokens, fired at" in said
    assert "gate at" in said
    assert stored(embedded_server.address) == before


def test_the_notebook_holds_no_outputs(examples: Path) -> None:
    """They would be those of some machine at some time, and change with every run."""
    cells = json.loads((examples / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
