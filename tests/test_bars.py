"""Progress bars leave nothing behind in notebooks that are run to be stored."""

from __future__ import annotations

import papermill
import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook


@pytest.mark.parametrize("setting", ["1", ""])
def test_a_bar_in_a_notebook_can_be_switched_off(tmp_path, monkeypatch, setting: str) -> None:
    monkeypatch.setenv("TQDM_DISABLE", setting)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = new_code_cell("from mmn.bars import tqdm\nlen(list(tqdm(range(3))))")
    write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "bar.ipynb")
    done = papermill.execute_notebook(tmp_path / "bar.ipynb", None, progress_bar=False, execution_timeout=120)
    (cell,) = (each for each in done.cells if each.cell_type == "code")
    shown = [each for each in cell.outputs if each.output_type != "execute_result"]
    assert bool(shown) is not bool(setting)
