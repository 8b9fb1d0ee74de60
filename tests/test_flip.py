"""nbval guards what the chapters store: with any one number of a compared result changed, it fails.

Every number of every tagged output is changed in turn and given to nbval's own comparison, in place of running a chapter once for each;
and a whole run of nbval, on a notebook of a few cells, shows that the tag is what makes it compare, and
that a last digit may be rounded otherwise."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbval.plugin import IPyNbFile, nocolors

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TAG = "nbval-check-output"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def texts(output: NotebookNode) -> Iterator[tuple[NotebookNode, str]]:
    """Where an output keeps its text: a mapping and the key in it."""
    if "text" in output:
        yield output, "text"
    for kind in output.get("data", {}):
        if kind.startswith("text/"):
            yield output["data"], kind


def flipped(outputs: list[NotebookNode]) -> Iterator[tuple[str, list[NotebookNode]]]:
    """The outputs with the first digit of one number changed, for every number in them."""
    for place, output in enumerate(outputs):
        for which, (holder, key) in enumerate(texts(output)):
            for found in NUMBER.finditer(holder[key]):
                changed = copy.deepcopy(outputs)
                mapping, name = list(texts(changed[place]))[which]
                start, text = found.start(), holder[key]
                mapping[name] = f"{text[:start]}{(int(text[start]) + 1) % 10}{text[start + 1 :]}"
                yield f"{found.group()} in {text[max(0, start - 20) : start + 20]!r}", changed


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_number_of_a_compared_result_can_change_unseen(chapter: Path, request: pytest.FixtureRequest) -> None:
    file = IPyNbFile.from_parent(request.session, path=chapter)
    file.sanitize_patterns = {}  # as without --nbval-sanitize-with
    count = 0
    for item in file.collect():
        outputs = item.cell.get("outputs", [])
        if TAG not in item.cell.metadata.get("tags", []):
            continue
        item.colors = nocolors
        assert item.compare_outputs(outputs, outputs), "outputs are equal to themselves"
        for what, changed in flipped(outputs):
            assert not item.compare_outputs(outputs, changed), f"nbval does not see that {what} has changed"
            count += 1
    assert count > 20, "the compared results hold hardly a number"


def test_nbval_compares_what_is_tagged(tmp_path: Path) -> None:
    cells = []
    given = (([TAG], "0.25", {}), ([TAG], "0.26", {}), ([TAG], "0.27", {}), ([], "0.27", {}), ([TAG], "0.29", {"tolerance": 0.05}))
    for tags, stored, more in given:
        output = nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")
        cells.append(
            nbformat.v4.new_code_cell("print(1 / 4)", outputs=[output], execution_count=1, metadata={"tags": tags, **more})
        )
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "few.ipynb")
    nbval = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "mmn.nbval_numbers",
        "--nbval-lax",
        "--nbval-current-env",
        "few.ipynb",
    ]
    done = subprocess.run(nbval, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.findall(r"Cell \d (PASSED|FAILED)", done.stdout) == ["PASSED", "PASSED", "FAILED", "PASSED", "PASSED"], done.stdout
