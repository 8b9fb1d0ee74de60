"""The kernels that run notebooks: no warning of theirs is shown, and a setting for scripts costs no figure."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from mmn import kernels

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.mark.parametrize("depth", [0, 3])
def test_a_kernel_starts_without_a_warning_wherever_temporary_files_go(
    depth: int, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    deep = tmp_path.joinpath(*["a" * 50] * depth)  # too long for a socket's address
    deep.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep) if depth else "/tmp")
    asks = "import ipykernel.kernelapp as k\nk.IPKernelApp.instance().transport"
    notebook = new_notebook(cells=[new_code_cell(asks)], metadata=KERNEL)
    with kernels.private() as options:
        NotebookClient(notebook, timeout=60, **options).execute()
    assert notebook.cells[0].outputs[0].data["text/plain"] == ("'tcp'" if depth else "'ipc'")
    assert "Kernel is running" not in capfd.readouterr().err
    assert not list(deep.glob("mmn-*"))


FIGURE = "plt.plot([1])\nplt.show()"


@pytest.mark.parametrize(
    ("setting", "first", "shown"),
    [("agg", "", True), ("TkAgg", "", True), ("", "", True), ("", "import matplotlib\nmatplotlib.use('agg')", False)],
)
def test_figures_are_in_a_notebook_whatever_is_set_for_scripts(
    setting: str, first: str, shown: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MPLBACKEND", setting)
    monkeypatch.delenv("DISPLAY", raising=False)
    chapter = "import matplotlib.pyplot as plt\nfrom mmn import plots"
    nbformat.write(
        new_notebook(cells=[new_code_cell(each) for each in (first, chapter, FIGURE)], metadata=KERNEL), tmp_path / "f.ipynb"
    )
    done = papermill.execute_notebook(tmp_path / "f.ipynb", None, progress_bar=False, execution_timeout=120)
    assert any("image/png" in output.get("data", {}) for output in done.cells[-1].outputs) is shown
