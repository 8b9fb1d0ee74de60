"""A course from the book's own notebooks: an edition for students, one for instructors, slides, and points for what students hand in.

Cells carry tags. `exercise` is what a student fills in; `check`, behind it, prints one line, which begins with `right` if the answer is
right and says what is wrong if it is not; `solution` is a right answer that prints the same check. From that source

- the **student's** edition leaves out the solutions (nbconvert's TagRemovePreprocessor);
- the **instructor's** has each solution where the student's has an empty function;
- **grading** takes nothing of a handed-in notebook but its exercise cells, puts them into the source, runs it and reads the checks; an
  exercise is worth as many points as it has stars.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmn import kernels
from mmn.arguments import a_path
from mmn.errors import MmnError
from mmn.paths import put, whole

if TYPE_CHECKING:
    import pandas as pd
    from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
ASSIGNMENT = ROOT / "notebooks" / "assignment.ipynb"
EDITIONS = ("student", "instructor")
SECONDS = 600  # that one cell may take
GRADED = 120  # the same where the code is somebody else's
# Set before all cells that are graded: `exit` would end the kernel quietly, after the cell that calls it.
NO_EXIT = "del exit, quit"
# Set before each check that grades: a name like `print` that an answer took is the language's again.
OWN_NAMES = 'for _name in [name for name in dir(__import__("builtins")) if name[0] != "_"]:\n    globals().pop(_name, None)\n'
RIGHT = re.compile(r"(right|noted)($|[:,])")  # how a check's line begins if the answer is right, or one that no cell can judge
TITLE = re.compile(r"\*\*(\d+\. [^*]+)\*\* \((★+)")
REVEAL = "https://unpkg.com/reveal.js@4.6.1"
MATHJAX = ROOT / "book" / "_static" / "mathjax" / "tex-svg.js"
# nbconvert's page of slides, but for the scripts that it fetches from elsewhere
SLIDES = """{%- extends "index.html.j2" -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<script>window.MathJax = {tex: {inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]]}}</script><script src="tex-svg.js" defer></script>
{%- endblock -%}
{%- block footer_js -%}
<style>.reveal section { max-height: 95vh; overflow-y: auto; text-align: left; font-size: 20px }</style>
<script src="{{ resources.reveal.url_prefix }}/dist/reveal.js"></script>
<script>Reveal.initialize({hash: true, center: false, transition: "none", width: 1000, height: 720})</script>
{%- endblock -%}"""
SHORT, BRIEF = 8, 90  # lines of code, and words, that still fit on a slide with a figure


class Exercise(NamedTuple):
    """Where the parts of an exercise are, as indices of the notebook's cells. title: as `3. Does the sum hold?`; points: its stars."""

    title: str
    points: int
    stub: int
    check: int
    solution: int


def sources() -> list[Path]:
    """The chapters and the assignment. Raises MmnError outside of a checkout."""
    chapters = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if not (chapters and ASSIGNMENT.exists()):
        raise MmnError("The course is made from the notebooks of a checkout, and this installation has none: clone the project.")
    return [*chapters, ASSIGNMENT]


def read(path: Path) -> NotebookNode:
    """A notebook. Raises MmnError if the file is none."""
    import nbformat

    try:
        notebook = nbformat.reads(path.read_bytes(), as_version=4)  # bytes: json reads them with a byte order mark, too
        for cell in notebook.cells:
            cell.source.encode()  # or it cannot be sent to a kernel
            if not all(isinstance(tag, str) for tag in cell.metadata.get("tags", [])):
                raise TypeError("tags")
        {cell.get("id"): cell.cell_type for cell in notebook.cells}  # ids that can be looked up
    except OSError as error:
        raise MmnError(f"{path} cannot be read ({error.strerror}): hand in an .ipynb file.") from error
    except Exception as error:  # nbformat raises whatever a file of another shape makes it stumble over
        what = "no JSON" if isinstance(error, nbformat.reader.NotJSONError) else "JSON of something else"
        raise MmnError(f"{path} is no notebook that can be read ({what}): hand in an .ipynb file.") from error
    return notebook


def tagged(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell carries a tag."""
    return tag in cell.metadata.get("tags", [])


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a source notebook, in order.

    Raises MmnError where an exercise lacks its title with stars, its check or its solution, or where check and solution do not end
    with the same line, which prints the check."""
    found = []
    cells = notebook.cells
    stubs = [index for index, cell in enumerate(cells) if tagged(cell, "exercise")]
    for before, stub, end in zip([0, *stubs], stubs, [*stubs[1:], len(cells)], strict=False):
        titles = TITLE.findall("\n".join(cell.source for cell in cells[before:stub] if cell.cell_type == "markdown"))
        rest = range(stub + 1, end)
        check = next((i for i in rest if tagged(cells[i], "check")), 0)
        solution = next((i for i in rest if tagged(cells[i], "solution") and cells[i].cell_type == "code"), 0)
        if not (titles and check and solution):
            lacks = "title with stars" if not titles else "check" if not check else "solution"
            raise MmnError(f"An exercise has no {lacks}: {cells[stub].source.splitlines()[0]!r}; see CONTRIBUTING.md.")
        last = cells[check].source.splitlines()[-1]
        if not last.startswith("print(check_") or cells[solution].source.splitlines()[-1] != last:
            raise MmnError(f"The check and the solution of {titles[-1][0]!r} must both end with one line: print(check_...(...)).")
        found.append(Exercise(titles[-1][0], len(titles[-1][1]), stub, check, solution))
    return found


def student(notebook: NotebookNode) -> NotebookNode:
    """The edition without solutions and without outputs."""
    from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

    exercises(notebook)  # or a sentence
    made, resources = TagRemovePreprocessor(remove_cell_tags={"solution"}).preprocess(copy.deepcopy(notebook), {})
    return ClearOutputPreprocessor().preprocess(made, resources)[0]


def instructor(notebook: NotebookNode) -> NotebookNode:
    """The edition in which every exercise is solved, without outputs: the student's cells, their ids among them, and what solutions
    say beside."""
    from nbconvert.preprocessors import ClearOutputPreprocessor

    made = copy.deepcopy(notebook)
    found = exercises(made)
    for each in found:
        made.cells[each.stub].source = "\n".join(made.cells[each.solution].source.splitlines()[:-1]).strip()
    moved = {each.solution for each in found}
    made.cells = [cell for index, cell in enumerate(made.cells) if index not in moved]
    return ClearOutputPreprocessor().preprocess(made, {})[0]


def answered(source: NotebookNode, submission: NotebookNode) -> NotebookNode:
    """The student's edition of a source with the exercise cells of a submission; nothing else is taken from it. They are found by their
    ids or, where an older tool left none, are as many as the source's and in its order.

    Raises MmnError if the submission has none of them."""
    from nbformat.v4 import new_code_cell

    made = student(source)
    code = [cell for cell in submission.cells if cell.cell_type == "code"]
    given = {cell.get("id"): cell.source for cell in code}
    own = [cell for cell in made.cells if tagged(cell, "exercise")]
    if not any(cell.id in given for cell in own):
        others = [path.stem for path in sources() if any(tagged(c, "exercise") and c.id in given for c in read(path).cells)]
        marked = [cell.source for cell in code if tagged(cell, "exercise")]
        if others or len(marked) != len(own):
            advice = f"give --source {others[0]}, whose cells it has" if others else "hand in one that was made from it"
            ids = (
                "" if any(cell.get("id") for cell in code) else f" Its cells have no ids, and {len(marked)} are tagged `exercise`."
            )
            raise MmnError(f"The notebook handed in has none of the exercise cells of its source: {advice}.{ids}")
        given = {cell.id: answer for cell, answer in zip(own, marked, strict=True)}
    for cell in made.cells:
        if tagged(cell, "exercise"):
            cell.source = given.get(cell.id, cell.source)
        elif tagged(cell, "check"):
            cell.source = OWN_NAMES + cell.source
    made.cells.insert(0, new_code_cell(NO_EXIT))
    return made


class Stopped(NamedTuple):
    """Where a run ended before its time: the number of the cell, and why, as the end of a sentence."""

    cell: int
    why: str


def executed(notebook: NotebookNode, folder: Path, seconds: int = SECONDS) -> tuple[NotebookNode, Stopped | None]:
    """A copy of the notebook, run from top to bottom in `folder`; cells that fail don't stop it. One that takes longer than `seconds`
    does, and so does the end of the kernel: what ran before keeps its outputs, and what stands behind has none."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    made = copy.deepcopy(notebook)
    begun = [0]
    with kernels.private() as options:
        client = NotebookClient(
            made,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            timeout=seconds,
            allow_errors=True,
            on_cell_start=lambda cell, cell_index: begun.append(cell_index),
            **options,
        )
        try:
            client.execute()
        except CellTimeoutError:
            return made, Stopped(begun[-1], f"took longer than {seconds} seconds")
        except DeadKernelError:
            return made, Stopped(begun[-1], "ended the process that runs it, perhaps for want of memory")
    return made, None


def graded(source: NotebookNode, submission: NotebookNode, folder: Path) -> pd.DataFrame:
    """`results` of the exercise cells of a submission, run in `folder`. An answer that ends the kernel, or takes longer than GRADED
    seconds, is taken out and all is run again without it, so that it costs the other ones nothing.

    Raises MmnError if the submission has none of the exercise cells, and where nothing of it is to blame for the end."""
    made = answered(source, submission)
    place = {cell.id: index for index, cell in enumerate(made.cells)}
    found = exercises(source)
    stubs = [place[source.cells[each.stub].id] for each in found]
    checks = [place[source.cells[each.check].id] for each in found]
    out: dict[int, tuple[str, str]] = {}  # number of an exercise -> what its answer did, and the answer
    while True:
        run, stopped = executed(made, folder, GRADED)
        if stopped is None:
            break
        if stopped.cell < stubs[0]:
            raise MmnError(f"A cell before the first answer {stopped.why}: grade on a larger machine.")
        guilty = next(
            (n for n, (a, b) in enumerate(zip(stubs, checks, strict=True)) if a <= stopped.cell <= b and n not in out), None
        )
        if guilty is None:
            break
        cell = made.cells[stubs[guilty]]
        out[guilty] = f"the answer {stopped.why}; the others were run without it", cell.source
        cell.source = source.cells[found[guilty].stub].source
    table = results(source, run)
    if stopped is not None:
        late = [check >= stopped.cell for check in checks]
        table.loc[late, "says"] = f"not run: a cell before its check {stopped.why}"
    for number, told in out.items():
        table.loc[number, ["says", "answer"]] = told
    return table


def results(source: NotebookNode, run: NotebookNode) -> pd.DataFrame:
    """One row an exercise of a source: exercise, points, of, what the check said in the edition that was run, or why it could not say
    anything of the answer, and the answer."""
    import pandas as pd

    cells = {cell.id: cell for cell in run.cells}
    rows = []
    for each in exercises(source):
        stub, says = cells[source.cells[each.stub].id], said(cells[source.cells[each.check].id])
        right = bool(RIGHT.match(says))
        if not right and says != "nothing" and stub.source.strip() == source.cells[each.stub].source.strip():
            says = f"not attempted, the marked cell is as it was ({says})"
        elif not right and (stopped := said(stub)).startswith("stopped by"):
            says = f"the answer's own cell was {stopped}"
        rows.append((each.title, each.points * right, each.points, says, stub.source))
    return pd.DataFrame(rows, columns=["exercise", "points", "of", "says", "answer"])


def said(cell: NotebookNode) -> str:
    """The last line of what a cell printed, or the error that stopped it."""
    for output in cell.outputs:
        if output.output_type == "error":
            return f"stopped by {output.ename}: {output.evalue}"
    printed = (output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")  # warnings go to stderr
    lines = "".join(printed).strip().splitlines()
    return lines[-1] if lines else "nothing"


# -------------------------------------------------------------------------------------------------------------------- slides


def slides(notebook: NotebookNode, reveal: str = REVEAL) -> str:
    """A page of reveal.js slides: each section a slide, below it its text, figures and tables; code only where it is short.

    Parameters, imports and exercises are left out, and the code of cells that are folded in the book. reveal: address of a folder of
    reveal.js. Making the page needs no network; showing it needs `tex-svg.js` (MathJax) beside it, and a network unless `reveal` is a local
    folder."""
    from nbconvert import SlidesExporter
    from traitlets.config import Config

    made = copy.deepcopy(notebook)
    words = BRIEF  # in the text that stands before a cell's output
    for cell in made.cells:
        kind = _slide(cell)
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
            words = len(cell.source.split())
        elif kind == "subslide":
            kind = "-" if words < BRIEF else kind  # on the slide of its text
            words = BRIEF
        cell.metadata["slideshow"] = {"slide_type": kind}
        if cell.cell_type == "code" and len(cell.source.splitlines()) > SHORT:
            cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), "hide-input"})
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}}})
    exporter = SlidesExporter(config=config, raw_template=SLIDES, exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.reveal_url_prefix = reveal
    return exporter.from_notebook_node(made)[0]


def _slide(cell: NotebookNode) -> str:
    """nbconvert's name for what a cell becomes: slide (to the right), subslide (below) or skip."""
    if cell.cell_type == "markdown":
        text = plain(cell.source)
        return "skip" if not text else "slide" if re.match("##? ", text) else "subslide"
    hidden = {"parameters", "exercise", "check", "solution"} & set(cell.metadata.get("tags", []))
    return "subslide" if cell.get("outputs") and not hidden else "skip"


def plain(text: str) -> str:
    """Markdown without exercises, and without the roles that only the book understands: {cite}, {doc}, {term}."""
    text = re.split(r"^## Exercises$|\*\*\d+\. [^*]+\*\* \(★", text, flags=re.MULTILINE)[0]
    text = re.sub(r"\s*\{cite\}`[^`]*`", "", text)
    return re.sub(r"\{(?:term|doc|ref)\}`([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text).strip()


# ------------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `mmn course`, and their options."""
    commands = parser.add_subparsers(dest="what", metavar="make|slides|grade", required=True)
    make = commands.add_parser("make", help="write the editions for students and for instructors")
    make.add_argument("--check", action="store_true", help="run both: all checks pass for instructors, none for students (minutes)")
    show = commands.add_parser("slides", help="write each chapter as slides (reveal.js)")
    show.add_argument("--reveal", default=REVEAL, help="address of a folder of reveal.js (default: %(default)s)")
    for command in (make, show):
        command.add_argument("--out", type=a_path, required=True, help="folder to write; must not exist, or be empty")
        command.add_argument("--only", nargs="+", metavar="NAME", help="these notebooks only, e.g. 00_tour assignment")
    grade = commands.add_parser("grade", help="run what students handed in, which executes their code, and count points")
    grade.add_argument("submissions", nargs="+", type=a_path, metavar="NOTEBOOK")
    grade.add_argument("--source", default="assignment", help="what they were made from (default: %(default)s)")
    grade.add_argument("--json", type=a_path, metavar="FILE", help="write points and what every check said")


def run(args: argparse.Namespace) -> int:
    """`mmn course`; 1 if an edition that was run is not as it should be. Raises MmnError for bad input."""
    return {"make": _make, "slides": _slides, "grade": _grade}[args.what](args)


def _chosen(only: Sequence[str] | None) -> list[Path]:
    every = {path.stem: path for path in sources()}
    if unknown := [name for name in only or () if name not in every]:
        raise MmnError(f"There is no notebook {unknown[0]!r}; there are {', '.join(every)}.")
    return [path for name, path in every.items() if not only or name in only]


def _empty(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MmnError(f"{folder} is there already, and not empty: choose another --out.")
    return folder


def _make(args: argparse.Namespace) -> int:
    import nbformat

    wrong = 0
    chosen = _chosen(args.only)
    with whole(_empty(args.out)) as out:
        for edition, of in zip(EDITIONS, (student, instructor), strict=True):
            folder = out / edition
            shutil.copytree(ROOT / "notebooks" / "figures", folder / "figures")
            for path in chosen:
                source = read(path)
                made = of(source)
                nbformat.write(made, folder / path.name)
                if args.check:
                    print(f"{edition} {path.stem}", flush=True)
                    run, stopped = executed(made, folder)
                    if stopped:
                        print(f"stopped: cell {stopped.cell} {stopped.why}")
                    table = results(source, run)
                    print(table[["exercise", "says"]].to_string(index=False, header=False), flush=True)
                    wrong += int((table["points"].gt(0) != (edition == "instructor")).sum())
    print(f"{len(chosen)} notebooks for students and for instructors are in {args.out}")
    if wrong:
        print(f"{wrong} checks are not as they should be: right for instructors, not yet right for students")
    return min(wrong, 1)


def _slides(args: argparse.Namespace) -> int:
    chosen = _chosen(args.only)
    with whole(_empty(args.out)) as out:
        shutil.copytree(ROOT / "notebooks" / "figures", out / "figures")
        for path in chosen:
            (out / f"{path.stem}.slides.html").write_text(slides(read(path), args.reveal), encoding="utf-8")
        shutil.copy(MATHJAX, out)
    print(f"{len(chosen)} sets of slides are in {args.out}")
    return 0


def _grade(args: argparse.Namespace) -> int:
    (path,) = _chosen([args.source])
    source, left = read(path), 0
    record: dict[str, Any] = {}
    submissions = list(dict.fromkeys(args.submissions))
    times = Counter(submission.name for submission in submissions)
    for submission in submissions:
        name = submission.name if times[submission.name] == 1 else str(submission)
        print(f"{name}: ", end="", flush=True)  # who it is that takes so long
        try:
            table = graded(source, read(submission), path.parent)
        except MmnError as error:  # of one, which costs the others nothing
            print(f"not graded. {error}")
            record[name], left = {"not graded": str(error)}, left + 1
        else:
            print(f"{table['points'].sum()} of {table['of'].sum()} points")
            print(table.drop(columns="answer").to_string(index=False), flush=True)
            record[name] = table.to_dict("records")
        if args.json:
            put(args.json, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if left:
        print(f"{left} of {len(submissions)} could not be graded")
    return min(left, 1)
