"""`mmn list` and `mmn run`: the chapters and their parameters, and a chapter run with other ones. A thin front for papermill.

    mmn list
    mmn run 04 --model llava-hf/llava-1.5-7b-hf -p images=pictures -p top_k=20 --out results

Parameters are checked before anything slow starts, by `mmn run` and, with `check`, by the chapter itself. What a chapter leaves goes to
`results/04_sensitivity/`, never into the checkout: the chapter as it was run, its tables with `settings.json` (settings, versions, commit,
model, units; see `write`), and `figures/`. One that stops leaves `CHAPTER.failed.ipynb` there, and the sentence it stopped with."""

from __future__ import annotations

import argparse
import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmn.errors import MmnError
from mmn.paths import put, whole
from mmn.pieces import about, csv

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from mmn.vlm import VLM

FOLDER = Path(__file__).parent.parent / "notebooks"
CELL_SECONDS = 3600  # after which a cell is given up
MODELS = ("model", "clip", "bert")  # parameters that name a checkpoint
LEAST = {"seed": 0, "concepts": 2}  # of whole numbers; of all others 1
UNITS = {  # of the columns of the chapters' tables
    "score": "logits, direct score, unless the table names another",
    "activation": "as the FFN's last linear map receives it",
    "drop": "nats, of log p of the noun",
    "rank": "1 is the highest",
    "k": "neurons",
    "sigma": "root mean squares of the writes",
    "iou": "0 to 1",
    "pointing": "share",
    "auprc": "0 to 1",
    "flip": "share of nouns that are said no longer",
    "rest": "share of other words kept",
    "picture": "number, in the order of the source; see pictures.csv",
    "norm": "Frobenius norm of the change of weights",
    "reliability": "share of captions",
    "image_top1": "share of steps",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


KINDS: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": _truth}


def chapters() -> dict[str, Path]:
    """The notebooks by name, in reading order. Raises MmnError where they are not beside the package."""
    found = sorted(FOLDER.glob("[0-9]*.ipynb")) + sorted(FOLDER.glob("report.ipynb"))
    if not found:
        raise MmnError(
            "The chapters are not part of an installed package: run this in a checkout of the project (`pip install -e .`)."
        )
    return {path.stem: path for path in found}


def chapter(name: str) -> Path:
    """A notebook by its name (`04_sensitivity`), its number (`04` or `4`), or its path. Raises MmnError for any other."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name)
    found = chapters()
    alike = [path for stem, path in found.items() if name == stem or name.zfill(2) == stem.partition("_")[0]]
    if len(alike) != 1:
        raise MmnError(f"There is no chapter {name!r}: choose one of {', '.join(found)}.")
    return alike[0]


def parameters(path: Path) -> dict[str, dict[str, Any]]:
    """Name of each parameter of a notebook -> its type, default (as written) and meaning. Raises MmnError for what is no notebook."""
    import nbformat
    import papermill

    try:
        found = papermill.inspect_notebook(str(path))
    except (ValueError, nbformat.ValidationError) as error:  # no JSON, or JSON of something else
        raise MmnError(f"{path} is no notebook that can be read ({type(error).__name__}): give another one.") from None
    return {
        name: {"type": each["inferred_type_name"], "default": each["default"], "help": each["help"]} for name, each in found.items()
    }


def checked(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """The values given as text, turned into the types of the notebook's parameters.

    Raises MmnError for a parameter that is not there, a value of another type, and whatever `check` refuses."""
    known = parameters(path)
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            raise MmnError(f"{path.stem} has no parameter {name!r}: it has {', '.join(known)}.")
        kind = known[name]["type"]
        try:
            values[name] = KINDS.get(kind, str)(text)
        except ValueError:
            raise MmnError(f"{name} is a value of type {kind}, not {text!r}: {known[name]['help']}.") from None
    check(**values)
    if values.get("images"):
        from mmn import sources

        values["images"] = sources.absolute(values["images"])
    for name in ("image", *MODELS):
        if values.get(name) and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    return values


def check(**values: Any) -> dict[str, Any]:
    """The parameters of a chapter, as they were given. Raises MmnError for a number too small or not whole, a file, folder or model
    that does not exist, a source without pictures, a device that this machine does not have, an unknown dtype, and a place for results
    that is a file."""
    from mmn import sources, vlm  # reads torch, which takes seconds

    for name, value in values.items():
        least, whole_number = LEAST.get(name, 1), isinstance(value, int) and not isinstance(value, bool)
        if (whole_number and value < least) or (name in ("seed", "top_k", "pictures") and not whole_number):
            raise MmnError(f"{name} is a whole number of at least {least}, not {value!r}.")
        if name in MODELS and value:
            vlm.resolve(value)
    if values.get("image") and not Path(values["image"]).is_file():
        raise MmnError(f"There is no file {values['image']}: give image another one.")
    if values.get("images"):
        sources.load(values["images"], 1)
    if values.keys() & {"device", "dtype"}:
        vlm.place(values.get("device") or None, values.get("dtype", "float32"))
    if values.get("out") and Path(values["out"]).exists() and not Path(values["out"]).is_dir():
        raise MmnError(f"{values['out']} is a file: give a folder for out.")
    return values


def opened(images: str, count: int) -> tuple[list[Image.Image], pd.DataFrame]:
    """At most `count` pictures of a source (see mmn.sources), and a table of all: columns picture (its number among those that could be
    opened, or -1), name, problem. One that cannot be opened is told in a printed line.

    Raises MmnError if none can be opened."""
    import pandas as pd

    from mmn import sources

    found: list[Image.Image] = []
    rows = []
    for each in sources.load(images, count):
        try:
            found.append(each.open())
            rows.append((len(found) - 1, each.id, ""))
        except MmnError as error:
            print(f"left out: {error}")
            rows.append((-1, each.id, str(error)))
    if not found:
        raise MmnError(f"None of the {len(rows)} pictures of {images} can be opened: {rows[0][2]}")
    return found, pd.DataFrame(rows, columns=["picture", "name", "problem"])


def write(settings: Mapping[str, Any], vlm: VLM, tables: Mapping[str, pd.DataFrame | None], **more: Any) -> None:
    """Write the tables of a chapter (None: this run has none) into `settings["out"]`, and beside them `settings.json`: the settings,
    what computed them (see mmn.pieces.about), the units of the columns, and `more`. Raises MmnError where they cannot be written."""
    import pandas as pd

    out = Path(settings["out"])
    some = {}
    for name, table in tables.items():
        if table is not None:
            plain = isinstance(table.index, pd.RangeIndex) and table.index.name is None
            some[name] = table if plain else table.rename_axis(index=[each or "row" for each in table.index.names]).reset_index()
            put(out / f"{name}.csv", csv(some[name]))
    columns = {str(column) for table in some.values() for column in table.columns}
    units = {column: UNITS[column] for column in sorted(columns & UNITS.keys())}
    record = {"settings": dict(settings), **about(vlm), "tables": sorted(some), "units": units, **more}
    put(out / "settings.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def execute(path: Path, values: Mapping[str, Any], out: Path, *, progress: bool = True, cell_seconds: int = CELL_SECONDS) -> Path:
    """Run a notebook and leave it, with its figures, in the folder of its name in `out`; returns its place there.

    Raises MmnError, with the sentence of the cell that stopped, where it does not run through."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    folder = out / path.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MmnError(f"{folder} cannot be written ({error.strerror}): give another --out.") from None
    values = dict(values)
    if "out" in parameters(path):
        values["out"] = str(folder.resolve())
    part, done = folder / f".{path.stem}.part.ipynb", folder / f"{path.stem}.ipynb"
    try:
        papermill.execute_notebook(
            str(path), str(part), values, progress_bar=progress, execution_timeout=cell_seconds, kernel_name="python3",
        )  # fmt: skip
    except (papermill.PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
        os.replace(part, folder / f"{path.stem}.failed.ipynb")
        if isinstance(error, CellTimeoutError):
            raise MmnError(f"{path.stem} stopped: a cell took more than {cell_seconds} seconds; see --cell-seconds.") from None
        if isinstance(error, DeadKernelError):
            raise MmnError(
                f"{path.stem} stopped: its process was killed, perhaps for want of memory: take fewer pictures."
            ) from None
        raise MmnError(f"{path.stem} stopped: {error.ename}: {error.evalue}") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, done)
    figures(done, folder / "figures")
    return done


def figures(notebook: Path, folder: Path) -> list[Path]:
    """Write the pictures among a notebook's outputs as files, named by cell."""
    import nbformat

    written = []
    for number, cell in enumerate(nbformat.read(notebook, 4).cells):
        kinds = {"image/png": "png", "image/jpeg": "jpg"}
        bodies = [
            (data[kind], end)
            for each in cell.get("outputs", ())
            for kind, end in kinds.items()
            if kind in (data := each.get("data", {}))
        ]
        for place, (body, end) in enumerate(bodies):
            target = folder / f"cell-{number:02d}{f'-{place}' if place else ''}.{end}"
            with whole(target) as part:
                part.write_bytes(base64.b64decode(body))
            written.append(target)
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn run`."""
    parser.add_argument("chapter", help="its number or name (see `mmn list`), or a notebook's path")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--model", help="short for -p model=MODEL")
    parser.add_argument("--images", help="short for -p images=FOLDER")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder; the chapter as it was run and its tables go to OUT/CHAPTER"
    )
    parser.add_argument("--cell-seconds", type=int, default=CELL_SECONDS, help="time that a cell may take (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn run`: exit code 1 where pictures had to be left out. Raises MmnError for bad input and for a chapter that stops."""
    path = chapter(args.chapter)
    given: dict[str, str] = {}
    for word in args.parameter:
        name, sign, value = word.partition("=")
        if not sign:
            raise MmnError(f"A parameter is given as NAME=VALUE, not {word!r}.")
        given[name] = value
    given |= {name: value for name, value in (("model", args.model), ("images", args.images)) if value}
    if "out" in given:
        raise MmnError("Where results go is said by --out alone: leave -p out=... away.")
    done = execute(path, checked(path, given), args.out, cell_seconds=args.cell_seconds)
    print(f"Written to {done}")
    return int(_left_out(done.parent / "pictures.csv"))


def _left_out(table: Path) -> bool:
    import pandas as pd

    return table.exists() and bool(pd.read_csv(table, keep_default_na=False)["problem"].ne("").any())


def listing(paths: Iterable[Path]) -> str:
    """Chapters and their parameters as text, one a line: name, type, default, meaning."""
    lines = []
    for path in paths:
        lines.append(path.stem)
        for name, each in parameters(path).items():
            lines.append(f"  {name + ':':<12} {each['type']:<6} = {each['default']:<14} {each['help']}")
    return "\n".join(lines)
