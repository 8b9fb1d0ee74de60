"""The course: editions of the notebooks for students and instructors, slides, and points for what is handed in."""

from __future__ import annotations

import copy
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from mmn import course
from mmn.cli import main
from mmn.errors import MmnError

NOTEBOOKS = course.sources()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
CHAPTERS = [path for path in NOTEBOOKS if path != course.ASSIGNMENT]


@each_notebook
def test_every_exercise_has_its_stub_check_and_solution(path: Path) -> None:
    notebook = course.read(path)
    found = course.exercises(notebook)
    assert len(found) >= 3
    assert [int(each.title.split(".")[0]) for each in found] == list(range(1, len(found) + 1))
    for cell in notebook.cells:
        untagged = cell.cell_type == "code" and not cell.metadata.get("tags")
        assert not (untagged and ("def check_" in cell.source or cell.source.startswith("# Solution"))), "see CONTRIBUTING.md"
        if course.tagged(cell, "solution") and cell.cell_type == "code" and path != course.ASSIGNMENT:
            figure = cell.source.endswith("plt.show()")  # which has no text to compare
            assert course.tagged(cell, "hide-cell") and (course.tagged(cell, "nbval-check-output") or figure)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_stored_outputs_the_solutions_pass_and_the_empty_stubs_do_not(path: Path) -> None:
    """nbval runs these cells and compares: what is stored is what comes out."""
    notebook = course.read(path)
    for each in course.exercises(notebook):
        empty, solved = (course.said(notebook.cells[index]) for index in (each.check, each.solution))
        assert course.RIGHT.match(solved), f"{each.title}: {solved}"
        assert not course.RIGHT.match(empty), f"{each.title} passes without an answer"
        assert not empty.startswith("stopped by"), f"{each.title}: the check of an empty answer fails in place of explaining"
        assert '"not yet"' not in notebook.cells[each.check].source, f"{each.title}: the check doesn't say what is wrong"


def test_the_student_s_edition_lacks_nothing_but_the_solutions(tmp_path: Path) -> None:
    """No name is used that only a solution defined: ruff's F821, run on notebooks without solutions."""
    for path in NOTEBOOKS:
        source = course.read(path)
        made = course.student(source)
        kept = [cell.source for cell in source.cells if not course.tagged(cell, "solution")]
        assert [cell.source for cell in made.cells] == kept
        assert not any(cell.get("outputs") for cell in made.cells)
        nbformat.write(made, tmp_path / path.name)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", str(tmp_path)]
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@each_notebook
def test_the_instructor_s_edition_has_each_solution_in_the_stub_s_place(path: Path) -> None:
    source = course.read(path)
    made = {cell.id: cell for cell in course.instructor(source).cells}
    for each in course.exercises(source):
        stub, solution = source.cells[each.stub], source.cells[each.solution]
        assert made[stub.id].source in solution.source and made[stub.id].source != stub.source
        assert solution.id not in made and source.cells[each.check].id in made


@pytest.fixture(scope="module")
def editions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("course") / "made"
    assert main(["course", "make", "--out", str(out), "--only", "assignment"]) == 0
    return out


@pytest.mark.slow
def test_grading(editions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The instructor's edition earns every point, the student's none; a half-solved one half, whatever else is in it. An answer that
    warns is as good as another, and one that ends the kernel costs its own points alone."""
    solved, empty = (course.read(editions / name / "assignment.ipynb") for name in ("instructor", "student"))
    source = course.read(course.ASSIGNMENT)
    found = course.exercises(source)
    half = copy.deepcopy(empty)
    stubs = [source.cells[each.stub].id for each in found]
    answers = {cell.id: cell.source for cell in solved.cells}
    for cell in half.cells:
        if cell.id == stubs[0]:
            cell.source = answers[cell.id]
        if cell.id == stubs[1]:
            cell.source = "def my_control(found, sizes, generator):\n    raise TypeError('not mine')"
        if course.tagged(cell, "check"):  # a check made to say what one likes to hear is put back
            cell.source = "print('right')"
    odd = copy.deepcopy(empty)
    for cell in odd.cells:
        if cell.id == stubs[0]:
            body = answers[cell.id].replace("    return", "    import sys\n    print('a warning', file=sys.stderr)\n    return", 1)
            cell.source = body
        if cell.id == stubs[1]:
            cell.source = "import os\nos._exit(1)"
    sly = copy.deepcopy(empty)
    for cell in sly.cells:
        if cell.id == stubs[0]:
            cell.source = "import builtins\ndef print(*_):\n    builtins.print('right')"
        if cell.id == stubs[1]:
            cell.source = "def my_control(:"
    handed_in = {"odd": odd, "solved": solved, "empty": empty, "half": half, "sly": sly}
    for name, notebook in handed_in.items():
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    (tmp_path / "broken.ipynb").write_text("{", encoding="utf-8")
    files = [str(tmp_path / f"{name}.ipynb") for name in ("broken", *handed_in)]
    assert main(["course", "grade", *files, "--json", str(tmp_path / "points.json")]) == 1  # and all others are graded
    record: dict[str, list[dict[str, Any]]] = json.loads((tmp_path / "points.json").read_text(encoding="utf-8"))
    assert "is no notebook" in record.pop("broken.ipynb")["not graded"]  # type: ignore[call-overload]
    points = {name: [row["points"] for row in rows] for name, rows in record.items()}
    assert points["sly.ipynb"] == [0] * len(found) and "SyntaxError" in record["sly.ipynb"][1]["says"]
    assert record["sly.ipynb"][1]["answer"] == "def my_control(:" and record["empty.ipynb"][0]["says"].startswith("not attempted")
    assert points["solved.ipynb"] == [each.points for each in found]
    assert points["empty.ipynb"] == [0] * len(found)
    assert points["half.ipynb"] == [found[0].points] + [0] * (len(found) - 1)
    assert points["odd.ipynb"] == points["half.ipynb"] and "ended the process" in record["odd.ipynb"][1]["says"]
    assert record["odd.ipynb"][2]["says"].startswith("not attempted")
    assert "not mine" in record["half.ipynb"][1]["says"]
    assert "of 10 points" in capsys.readouterr().out


def test_what_cannot_be_graded_is_named(tmp_path: Path) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), tmp_path / "other.ipynb")
    with pytest.raises(MmnError, match="none of the exercise cells"):
        course.answered(course.read(course.ASSIGNMENT), course.read(tmp_path / "other.ipynb"))
    (tmp_path / "text.ipynb").write_text("no notebook", encoding="utf-8")
    with pytest.raises(MmnError, match="is no notebook"):
        course.read(tmp_path / "text.ipynb")
    with pytest.raises(MmnError, match="give --source 00_tour"):
        course.answered(course.read(course.ASSIGNMENT), course.read(CHAPTERS[0]))


@pytest.mark.parametrize(
    "text",
    [
        "null", "[]", "5", '"text"', "{}", "{", "", "\xff", "[" * 10**5, '{"nbformat": 9, "cells": []}', '{"nbformat": 4, "cells": 5}',
        *(json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [cell]})
          for cell in (None, 3, {}, {"cell_type": "code", "metadata": {}, "source": 3, "outputs": []},
                       {"cell_type": "code", "metadata": {"tags": None}, "source": "", "outputs": []},
                       {"cell_type": "code", "metadata": {}, "id": [], "source": "", "outputs": []},
                       {"cell_type": "code", "metadata": {}, "source": "x = '\ud800'", "outputs": []})),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_no_notebook(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.ipynb").write_bytes(text.encode("latin-1"))
    with pytest.raises(MmnError, match="x.ipynb is no notebook that can be read .*: hand in"):
        course.read(tmp_path / "x.ipynb")


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(codec: str, tmp_path: Path) -> None:
    (tmp_path / "x.ipynb").write_text(course.ASSIGNMENT.read_text(encoding="utf-8"), encoding=codec)
    assert course.read(tmp_path / "x.ipynb") == course.read(course.ASSIGNMENT)


def test_without_ids_the_cells_are_those_tagged_in_their_order(tmp_path: Path) -> None:
    source = course.read(course.ASSIGNMENT)
    old = json.loads(nbformat.writes(course.student(source)))
    old["nbformat_minor"] = 4
    for number, cell in enumerate(old["cells"]):
        del cell["id"]
        if "exercise" in cell["metadata"].get("tags", []):
            cell["source"] = f"x = {number}"
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps(old))
    taken = [cell.source for cell in course.answered(source, course.read(path)).cells if course.tagged(cell, "exercise")]
    marked = [number for number, cell in enumerate(course.student(source).cells) if course.tagged(cell, "exercise")]
    assert taken == [f"x = {number}" for number in marked]
    del old["cells"][marked[1]]  # which is which cannot be known
    path.write_text(json.dumps(old))
    with pytest.raises(MmnError, match="no ids, and 3 are tagged `exercise`"):
        course.answered(source, course.read(path))


def test_files_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["h/alice/a.ipynb", "h/bob/a.ipynb", "h/bob/b.ipynb", "h/none/a.ipynb"]
    for file in files[:3]:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(file)]), file)

    def graded(_: object, submission: nbformat.NotebookNode, __: object) -> pd.DataFrame:
        return pd.DataFrame(
            [("1. A", 1, 1, "right", submission.cells[0].source)], columns=["exercise", "points", "of", "says", "answer"]
        )

    monkeypatch.setattr(course, "graded", graded)
    assert main(["course", "grade", *files, files[0], "--json", "points.json"]) == 1
    record = json.loads(Path("points.json").read_text(encoding="utf-8"))
    names = ["h/alice/a.ipynb", "h/bob/a.ipynb", "b.ipynb", "h/none/a.ipynb"]
    assert list(record) == names and "not graded" in record["h/none/a.ipynb"]
    assert [record[name][0]["answer"] for name in names[:3]] == files[:3]
    assert all(f"{name}: " in capsys.readouterr().out for name in names[:1])


def small(*answers: str, before: str = "import time, os") -> nbformat.NotebookNode:
    """A source whose exercises each want a function of their number that returns it, or one made of it with other answers."""
    cells = [nbformat.v4.new_code_cell(before, id="first")]
    for number in range(3):
        name, check = f"mine{number}", f"print(check_it(mine{number}, {number}))"
        cells.append(nbformat.v4.new_markdown_cell(f"**{number + 1}. A** (★, 5 minutes).", id=f"title{number}"))
        sources = {
            "exercise": answers[number] if answers else f"def {name}(): pass",
            "check": f"def check_it(mine, n):\n    return 'right' if mine() == n else 'not yet: another'\n{check}",
            "solution": f"def {name}(): return {number}\n{check}",
        }
        cells += [nbformat.v4.new_code_cell(text, id=f"{tag}{number}", metadata={"tags": [tag]}) for tag, text in sources.items()]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.parametrize(
    ("fatal", "says"),
    [
        ("os._exit(1)", "the answer ended the process"),
        ("def mine1(): os.kill(os.getpid(), 9)", "the answer ended the process"),
        ("while True:\n    try: time.sleep(9)\n    except BaseException: pass", "the answer took longer than 4 seconds"),
        ("def mine1(): exit(); return 1", "stopped by NameError: name 'exit' is not defined"),
    ],
)
def test_an_answer_that_ends_the_kernel_costs_its_own_points_alone(fatal: str, says: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(course, "GRADED", 4)
    table = course.graded(small(), small("def mine0(): return 0", fatal, "def mine2(): return 2"), tmp_path)
    assert table["points"].tolist() == [1, 0, 1] and table["says"].tolist()[::2] == ["right", "right"]
    assert table["says"][1].startswith(says) and table["answer"][1] == fatal


def test_a_kernel_that_no_answer_ends_is_told(monkeypatch: Any, tmp_path: Path) -> None:
    right = [f"def mine{n}(): return {n}" for n in range(3)]
    with pytest.raises(MmnError, match="A cell before the first answer ended the process"):
        course.graded(small(before="import os\nos._exit(1)"), small(*right), tmp_path)
    source = small()
    source.cells.insert(5, nbformat.v4.new_code_cell("os._exit(1)", id="own"))  # between the first exercise and the second
    table = course.graded(source, small(*right), tmp_path)
    assert table["points"].tolist() == [1, 0, 0] and table["says"].str.startswith("not run: ").tolist() == [False, True, True]


def test_bad_input_is_a_sentence(editions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["course", "make", "--out", str(editions)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["course", "slides", "--out", str(editions / "x"), "--only", "99_nothing"]) == 2
    assert "There is no notebook '99_nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["make", "slides"])
def test_editions_are_there_whole_or_not_at_all(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(course.shutil, "copytree", stop)
    assert main(["course", what, "--out", str(tmp_path / "new"), "--only", "assignment"]) == 130
    assert not list(tmp_path.iterdir())


def test_an_exercise_has_a_title_of_its_own() -> None:
    title, text = nbformat.v4.new_markdown_cell("**1. A** (★★, 5 minutes)."), "x = 0\nprint(check_x(x))"
    tags = ("exercise", "check", "solution")
    three, more = ([nbformat.v4.new_code_cell(text, metadata={"tags": [tag]}) for tag in tags] for _ in range(2))
    assert [each.points for each in course.exercises(nbformat.v4.new_notebook(cells=[title, *three]))] == [2]
    with pytest.raises(MmnError, match="no title"):
        course.exercises(nbformat.v4.new_notebook(cells=[title, *three, *more]))


@pytest.mark.parametrize(
    ("source", "lack"), [("exercise", "no check"), ("exercise check", "no solution"), ("exercise check solution!", "must both end")]
)
def test_an_unfinished_exercise_is_named(source: str, lack: str) -> None:
    cells = [nbformat.v4.new_markdown_cell("**1. A** (★, 5 minutes).")]
    for tag in source.split():
        text = "print(1)" if tag.endswith("!") else "x = 0\nprint(check_x(x))"
        cells.append(nbformat.v4.new_code_cell(text, metadata={"tags": [tag.rstrip("!")]}))
    with pytest.raises(MmnError, match=lack):
        course.student(nbformat.v4.new_notebook(cells=cells))


def test_slides_are_made_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    out = tmp_path / "slides"
    assert main(["course", "slides", "--out", str(out), "--only", "00_tour", "--reveal", "reveal.js"]) == 0
    page = (out / "00_tour.slides.html").read_text(encoding="utf-8")
    assert page.count("<section") > 20 and page.count("<img") >= 5 and (out / "tex-svg.js").exists()
    scripts = re.findall(r'<script[^>]* src="([^"]+)"', page)
    assert scripts == ["tex-svg.js", "reveal.js/dist/reveal.js"], "shown without network, too"
    source = course.read(course.ROOT / "notebooks" / "00_tour.ipynb")
    headings = [line.lstrip("# ") for cell in source.cells for line in cell.source.splitlines()
                if cell.cell_type == "markdown" and line.startswith("## ")]  # fmt: skip
    for heading in headings:
        assert (heading in page) == (heading != "Exercises"), heading
    assert "{cite}" not in page and "your code here" not in page
    assert (out / "figures" / "idea.svg").exists()


def test_roles_of_the_book_become_plain_words() -> None:
    text = "The {term}`write <write>` of {doc}`/notebooks/00_tour` {cite}`pan2024finding`.\n\n## Exercises\n\n**1. A** (★)."
    assert course.plain(text) == "The write of /notebooks/00_tour."


def test_outside_of_a_checkout_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(course, "ROOT", tmp_path)
    with pytest.raises(MmnError, match="clone the project"):
        course.sources()
