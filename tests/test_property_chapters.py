"""The chapters on sensitivity, specificity and causal effect on pictures that the reader brings: what needs the truth steps aside."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import papermill
import pytest

from mmn import claims, scenes

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
GIVEN = {
    "04_sensitivity": {"pictures": 4, "top_k": 5},
    "05_specificity": {"pictures": 1, "concepts": 4, "top_k": 5},
    "06_causal_effect": {"pictures": 3, "top_k": 5},
}

pytestmark = pytest.mark.skipif(not NOTEBOOKS.exists(), reason="there are no notebooks beside the tests")


@pytest.mark.slow
@pytest.mark.parametrize("name", GIVEN)
def test_a_folder_of_pictures(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, noun in enumerate(("cat", "car", "banana", "cat", "car", "banana")):
        scenes.draw(number, concepts=[noun], style="noto").image.resize((240, 240)).save(folder / f"{number}.png")
    given = {"images": str(folder), "out": str(tmp_path / "out"), **GIVEN[name]}
    done = papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb",
        tmp_path / "done.ipynb",
        given,
        execution_timeout=300,
        progress_bar=False,
        kernel_name="python3",
    )
    said = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert "Traceback" not in said and said.count("\nright") + said.startswith("right") >= 4  # the solutions, on these pictures too
    assert {"04_sensitivity": "this section needs scenes", "05_specificity": "needs drawn scenes", "06_causal_effect": "nouns"}[
        name
    ] in said
    rows = pd.read_csv(tmp_path / "out" / "claims.csv")
    stored = [o.metadata[claims.KEY] for c in done.cells for o in c.get("outputs", []) if claims.KEY in o.get("metadata", {})]
    assert len(stored) == 1 and [row["claim"] for row in stored[0]["rows"]] == rows["claim"].tolist()
    assert set(rows["verdict"]) <= set(claims.VERDICTS)
