"""The chapters: run once from top to bottom, clean, tagged, and stored with the outputs of the model that is shipped.

That a chapter still gives the outputs it stores is nbval's work (`make test` runs it on notebooks/); here they run with other
parameters, as papermill does it.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

import mmn
from mmn import scenes

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TIMEOUT = 300  # seconds a cell; papermill without one hangs now and then

pytestmark = pytest.mark.skipif(not CHAPTERS, reason="there are no notebooks beside the tests")
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


def code_cells(chapter: Path) -> list[Any]:
    return [cell for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def text_of(output: Any) -> str:
    """The text of a stored output, whatever its kind."""
    return output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text/"))


@each_chapter
def test_it_was_run_once_from_top_to_bottom_without_an_error_or_a_warning(chapter: Path) -> None:
    cells = code_cells(chapter)
    assert "widgets" not in nbformat.read(chapter, as_version=4).metadata, (
        "a widget's code is fetched from elsewhere: no progress bars"
    )
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"cell {cell.execution_count} wrote to standard error: {output.text}"
            assert "Warning" not in text_of(output)


@each_chapter
def test_cells_are_short_and_say_no_place_on_a_machine(chapter: Path) -> None:
    for cell in code_cells(chapter):
        assert len(cell.source.splitlines()) <= 25, cell.source
    assert not re.search(r"/(tmp|home|root|work|Users)/", chapter.read_text(encoding="utf-8"))


@each_chapter
def test_parameters_are_typed_and_explained(chapter: Path) -> None:
    tagged = [cell for cell in code_cells(chapter) if "parameters" in tags(cell)]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = .+  # .+", line), f"not `name: type = value  # meaning`: {line}"
    names = {node.target.id for node in ast.parse(tagged[0].source).body}  # type: ignore[attr-defined]
    assert names >= {"model", "prompt", "top_k", "seed", "device", "dtype", "out"} and names & {"image", "images"}
    assert set(papermill.inspect_notebook(chapter)) == names


@each_chapter
def test_every_checked_cell_has_something_to_compare(chapter: Path) -> None:
    checked = [cell for cell in code_cells(chapter) if "nbval-check-output" in tags(cell)]
    assert len(checked) >= 5
    for cell in checked:
        assert any(text_of(output).strip() for output in cell.outputs), cell.source


@each_chapter
def test_every_figure_has_an_alternative_text(chapter: Path) -> None:
    for cell in code_cells(chapter):
        if any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 20, cell.source
    for alt in re.findall(r"!\[([^\]]*)\]\(", "".join(c.source for c in nbformat.read(chapter, 4).cells)):
        assert len(alt) > 20


@each_chapter
def test_outputs_are_those_of_the_shipped_model(chapter: Path) -> None:
    outputs = "".join(text_of(output) for cell in code_cells(chapter) for output in cell.outputs)
    found = re.findall(r"^model tiny-llava ([0-9a-f]{16})$", outputs, re.MULTILINE)
    assert found, "the chapter must print `model NAME HASH` after loading it"
    assert set(found) == {mmn.load("tiny-llava").hash}, "run `make refresh`: the outputs are another model's"


@pytest.mark.slow
def test_the_tour_on_a_picture_that_the_reader_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenes.draw(4).image.resize((200, 160)).save("mine.jpg")
    image = str(tmp_path / "mine.jpg")
    given = {"image": image, "top_k": 5, "seed": 3, "out": str(tmp_path / "results")}
    papermill.execute_notebook(
        CHAPTERS[0], "out.ipynb", given, execution_timeout=TIMEOUT, progress_bar=False, kernel_name="python3"
    )
    record = json.loads((tmp_path / "results" / "settings.json").read_text(encoding="utf-8"))
    assert record["settings"]["image"] == image and record["settings"]["top_k"] == 5 and record["settings"]["prompt"] == mmn.PROMPT
    assert record["texts"]["caption"] == record["texts"]["after the undo"] != record["texts"]["edited"]
    written = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert written == ["ranking.csv", "settings.json", "silenced.csv", "swap.csv"]


def test_a_picture_that_is_none_stops_the_tour_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match="There is no picture nowhere.png: ") as stopped:
        papermill.execute_notebook(
            CHAPTERS[0],
            tmp_path / "out.ipynb",
            {"image": "nowhere.png"},
            execution_timeout=TIMEOUT,
            progress_bar=False,
            kernel_name="python3",
        )
    assert stopped.value.ename == "MmnError"


@pytest.mark.parametrize("chapter", [*CHAPTERS, ROOT / "notebooks" / "report.ipynb"], ids=lambda path: path.stem)
def test_a_chapter_has_all_its_parameters_checked(chapter: Path) -> None:
    """`chapters.check` refuses what it is not given, so it is given all."""
    calls = [node for cell in code_cells(chapter) if "chapters.check(" in cell.source for node in ast.walk(ast.parse(cell.source))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "chapters.check"]  # fmt: skip
    given = [{each.arg: ast.unparse(each.value) for each in call.keywords} for call in calls]
    assert given == [{name: name for name in papermill.inspect_notebook(chapter)}]


@pytest.mark.parametrize(
    ("name", "given"), [("00_tour", {"topk": 5}), ("00_tour", {"top_k": 5, "trace": "x"}), ("report", {"runs": "x"})]
)
def test_papermill_cannot_set_what_is_no_parameter(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    wrong = list(given)[-1]
    with pytest.raises(
        papermill.PapermillExecutionError, match=f"There is no parameter '{wrong}': this notebook has .*out\\."
    ) as stopped:
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb",
            tmp_path / "out.ipynb",
            given,
            execution_timeout=TIMEOUT,
            progress_bar=False,
            kernel_name="python3",
        )
    assert stopped.value.ename == "MmnError"


@each_chapter
def test_a_sentence_stands_before_every_figure(chapter: Path) -> None:
    said = ""
    for cell in nbformat.read(chapter, as_version=4).cells:
        if cell.cell_type == "markdown":
            said += " ".join(line for line in cell.source.splitlines() if not line.startswith("#"))
        elif any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            assert len(said.split()) >= 8, f"nothing says what to see in the figure of\n{cell.source}"
            said = ""
