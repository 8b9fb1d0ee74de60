"""Chapter 00 runs unchanged on tiny models of other families, each with the processor that transformers has for it. Their text is
nonsense; the run is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import real
from jupyter_client.manager import KernelManager

import mmn

TOUR = Path(__file__).parent.parent / "notebooks" / "00_tour.ipynb"
# Without a chat template, with one; a Q-Former, pooled pictures, tiles; plain and gated FFNs, biases, tied and capped logits.
QUICK, SLOW = "paligemma", ("llava", "instructblip", "gemma3", "blip-2")
pytestmark = pytest.mark.skipif(not TOUR.exists(), reason="there are no chapters beside the tests")


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all families: what takes long is to start it."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("family", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_tour(family: str, kernel: KernelManager, tmp_path: Path) -> None:
    folder = real.save(family, tmp_path / "model")
    given = {"model": str(folder), "top_k": 4, "out": str(tmp_path / "results")}
    done = papermill.execute_notebook(
        TOUR, None, given, execution_timeout=300, progress_bar=False, kernel_name="python3", km=kernel
    )
    record = json.loads((tmp_path / "results" / "settings.json").read_text(encoding="utf-8"))
    assert record["hash"] == mmn.load(folder).hash
    assert record["texts"]["caption"].startswith("An image of ") and record["texts"]["caption"] == record["texts"]["after the undo"]
    ranking = pd.read_csv(tmp_path / "results" / "ranking.csv")
    assert (ranking.groupby("noun").size() == 4).all() and ranking.select_dtypes("number").notna().all(axis=None)
    said = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    # The solutions of its exercises hold on this model, and the undo is exact.
    assert said.count("right, in every layer") == 1 and "bit-identical to those of the first run: True" in said
    shown = nbformat.writes(done)
    assert "Traceback" not in shown and "image/jpeg" in shown
