"""`mmn list` and `mmn run`: the chapters and their parameters, and a chapter run with other ones. A thin front for papermill.

    mmn list
    mmn run 04 --model llava-hf/llava-1.5-7b-hf -p images=pictures -p top_k=20 --out results

Parameters are checked before anything slow starts. The chapter as it was run, its tables and `run.json` (settings, versions, commit) go to
the folder `--out`, never into the checkout; a chapter that stops leaves `CHAPTER.failed.ipynb` there, and the sentence it stopped with."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmn.errors import MmnError
from mmn.paths import put
from mmn.pieces import PACKAGES, commit

FOLDER = Path(__file__).parent.parent / "notebooks"
CELL_SECONDS = 3600  # after which a cell is given up
FILES = ("image", "images")  # parameters that name a file or folder of the reader's


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
    """Name of each parameter of a notebook -> its type, default (as written) and meaning."""
    import papermill

    found = papermill.inspect_notebook(str(path))
    return {
        name: {"type": each["inferred_type_name"], "default": each["default"], "help": each["help"]} for name, each in found.items()
    }


def checked(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """The values given as text, turned into the types of the notebook's parameters.

    Raises MmnError for a parameter that is not there, a value of another type, a file or folder that does not exist, a device that this
    machine does not have, and an unknown dtype."""
    known = parameters(path)
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            raise MmnError(f"{path.stem} has no parameter {name!r}: it has {', '.join(known)}.")
        kind = known[name]["type"]
        try:
            values[name] = KINDS[kind](text)
        except ValueError:
            raise MmnError(f"{name} is a value of type {kind}, not {text!r}: {known[name]['help']}.") from None
        if name in FILES and text:
            if not Path(text).exists():
                raise MmnError(f"There is no file or folder {text}: give {name} another one.")
            values[name] = str(Path(text).resolve())
        if name == "model" and Path(text).is_dir():
            values[name] = str(Path(text).resolve())
    if values.keys() & {"device", "dtype"}:
        from mmn import vlm  # reads torch, which takes seconds

        vlm.place(values.get("device") or None, values.get("dtype", "float32"))
    return values


def execute(path: Path, values: Mapping[str, Any], out: Path, *, progress: bool = True) -> Path:
    """Run a notebook and leave it, with `run.json`, in `out`; returns its place there.

    Raises MmnError, with the sentence of the cell that stopped, where it does not run through."""
    import papermill

    out.mkdir(parents=True, exist_ok=True)
    values = dict(values)
    if "out" in parameters(path):
        values["out"] = str(out.resolve())
    part, done = out / f".{path.stem}.part.ipynb", out / f"{path.stem}.ipynb"
    try:
        papermill.execute_notebook(
            str(path), str(part), values, progress_bar=progress, execution_timeout=CELL_SECONDS, kernel_name="python3",
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        os.replace(part, out / f"{path.stem}.failed.ipynb")
        raise MmnError(f"{path.stem} stopped: {error.ename}: {error.evalue}") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, done)
    versions = {name: version(name) for name in (*PACKAGES, "papermill")}
    record = {"chapter": path.stem, "parameters": values, "versions": versions, "commit": commit()}
    put(out / "run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn run`."""
    parser.add_argument("chapter", help="its number or name (see `mmn list`), or a notebook's path")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--model", help="short for -p model=MODEL")
    parser.add_argument("--images", help="short for -p images=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder of the notebook as it was run, and of its tables")


def run(args: argparse.Namespace) -> int:
    """`mmn run`. Raises MmnError for bad input and for a chapter that stops."""
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
    print(f"Written to {execute(path, checked(path, given), args.out)}")
    return 0


def listing(paths: Iterable[Path]) -> str:
    """Chapters and their parameters as text, one a line: name, type, default, meaning."""
    lines = []
    for path in paths:
        lines.append(path.stem)
        for name, each in parameters(path).items():
            lines.append(f"  {name + ':':<12} {each['type']:<6} = {each['default']:<14} {each['help']}")
    return "\n".join(lines)
