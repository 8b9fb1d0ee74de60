"""`mmn list` and `mmn run`: the chapters and their parameters, and a chapter run with other ones. A thin front for papermill.

    mmn list
    mmn run 04 --model llava-hf/llava-1.5-7b-hf -p images=pictures -p top_k=20 --out results

Parameters are checked before anything slow starts, by `mmn run` and, with `check`, by the chapter itself. What a chapter leaves goes to
`results/04_sensitivity/`, never into the checkout: the chapter as it was run, its tables with `settings.json` (settings, versions, commit,
model, units; see `write`), and `figures/`. One that stops leaves `CHAPTER.failed.ipynb` there, and the sentence it stopped with."""

from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmn import kernels
from mmn.arguments import a_path
from mmn.errors import MmnError
from mmn.paths import alone, put, whole
from mmn.pieces import PACKAGES, about, commit, csv

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from mmn.sources import Picture
    from mmn.vlm import VLM

FOLDER = Path(__file__).parent.parent / "notebooks"
CELL_SECONDS = 3600  # after which a cell is given up
PIXELS = 1_500_000  # of a picture in memory at most, 4.5 MB; LLaVA-1.5 sees 336 x 336 of them, LLaVA-NeXT at most 672 x 672
MODELS = ("model", "clip", "bert")  # parameters that name a checkpoint
RANGES = dict.fromkeys(("pictures", "top_k", "sample", "live"), (1, 10**6)) | {"concepts": (3, 10**6), "seed": (0, 2**32 - 1)}
NEEDED = ("model", "target", "harmless")  # texts that must not be empty
TEXTS = (*MODELS, *NEEDED, "image", "images", "noun", "source", "sensitive", "prompt", "device", "dtype", "out")
SHARE = "share, 0 to 1"
UNITS = {  # of a column; of a column of one table, as TABLE.COLUMN, or of all its other columns, as TABLE.*
    "picture": "the file's name; of drawn scenes their number in this run",
    "scene": "its number in this run",
    "key": "number of the scene",
    "layer": "from 0; -1 is the embedding",
    "unit": "number of the neuron in its layer, from 0",
    "rank": "1 is the highest",
    "draw": "number of the random draw",
    "k": "neurons",
    "sigma": "root mean squares of the writes",
    "factor": "times the fitted change",
    "score": "logits, direct score",
    "logit": "logits",
    "activation": "as the FFN's last linear map receives it",
    "drop": "nats, of log p of the noun",
    "others": "nats, mean drop of the other nouns",
    "iou": "intersection over union, 0 to 1",
    "pointing": SHARE,
    "auprc": "area under the curve, 0 to 1",
    "auroc": "area under the curve, 0 to 1; 0.5 is chance",
    "share": SHARE,
    "overlap": SHARE,
    "objects": "how many",
    "flip": "share of draws in which the noun is the likeliest token no longer",
    "rest": "share of other words that stay the likeliest",
    "norm": "Frobenius norm of the change of weights",
    "passes": "forward-backward passes that the fit took",
    "ms": "milliseconds",
    "spearman": "rank correlation with the effect on log p",
    "spearman_logit": "rank correlation with the effect on the logit",
    "spearman_centred": "rank correlation with the effect on the centred logit",
    "p10": "share of the 10 best that are among the 10 of largest effect",
    "p50": "share of the 50 best that are among the 50 of largest effect",
    "cpr": "area under the faithfulness of the best kept alone",
    "cmd": "area of its distance from 1",
    "removal": "nats, mean loss of log p with the best removed",
    "in10": "share of neurons that write the word among their ten",
    "text": "nearness of the words written to the caption, 1 at most",
    "image": "nearness of the words written to the picture, 1 at most",
    "value": "as the table's measure, or as the column measure says",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "pictures": "how many",
    "claims.*": "as the column measure says",
    "pictures.picture": "number among the pictures that could be opened, -1 for one that could not",
    "other_scenes.value": SHARE,
    "shuffled.value": SHARE,
    "captions.others": "how many other nouns the caption said",
    "captions.kept": "how many of them it still says",
    "silenced.*": "nats, drop of log p of the noun",
    "swap.fitted to p": "probability of the target",
    "swap.size of the change": "Frobenius norm of the change of weights",
    "swap.*": SHARE,
    "votes.direct_log_p": "nats",
    "votes.scale": "ratio of the norm's divisors",
    "votes.common": "share of the mean square, 0 to 1",
    "votes.*": "logits",
    "verdicts.neurons": "how many",
    "verdicts.order_scenes": "how many",
    "verdicts.proportion_scenes": "how many",
    "peaks.*": "highest activation in the picture, a row a picture",
    "multimodal.*": "area under the curve, 0 to 1; 0.5 is chance",
    "multimodal.picture": "area under the curve, 0 to 1; 0.5 is chance",
    "scores.*": "logits, direct score",
    "overlaps.*": SHARE,
    "sensitive.*": "share of captions that say the word",
    "mitigation.*": SHARE,
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
    if name.endswith(".ipynb") and os.path.isfile(name):
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
        found = papermill.inspect_notebook(_plain(path))
    except (ValueError, AttributeError, nbformat.ValidationError) as error:  # no JSON, or JSON of something else
        if "kernel name" in str(error):
            raise MmnError(f"{path} does not say which kernel runs it: open it in Jupyter and save it.") from None
        raise MmnError(f"{path} is no notebook that can be read ({type(error).__name__}): give another one.") from None
    return {
        name: {"type": _kind(each["inferred_type_name"], each["default"]), "default": each["default"], "help": each["help"]}
        for name, each in found.items()
    }


def _kind(told: str, default: str) -> str:
    """The type of a parameter: as it is annotated, else that of its default."""
    return told if told != "None" else type(_literal(default)).__name__


def _literal(default: str) -> Any:
    """What a default stands for; the text itself, where it is an expression."""
    try:
        return ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return default


def checked(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """The values given as text, turned into the types of the notebook's parameters.

    Raises MmnError for a parameter that is not there, a value of another type, and whatever `check` refuses."""
    known = parameters(path)
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            raise MmnError(f"{path.stem} has no parameter {name!r}: it has {', '.join(known) or 'no cell tagged `parameters`'}.")
        kind = known[name]["type"]
        if kind not in KINDS:
            raise MmnError(f"{name} is a value of type {kind}, which cannot be given here: only {', '.join(KINDS)} can.")
        try:
            values[name] = KINDS[kind](text)
        except ValueError:
            raise MmnError(f"{name} is a value of type {kind}, not {text!r}: {known[name]['help']}.") from None
    for name in ("image", *MODELS):
        if str(values.get(name, "")).startswith("~"):
            values[name] = str(Path(values[name]).expanduser())
    if values.get("images") == "":  # a variable of the shell that is not set must not become drawn scenes
        raise MmnError("images must not be empty: name a source of pictures, or scenes for drawn ones.")
    if values.get("images") == "scenes":
        values["images"] = ""  # a chapter draws its own
    kinds = dict.fromkeys(RANGES, "int") | dict.fromkeys(TEXTS, "str")  # a notebook of one's own may mean something else by a name
    _fitting({name: value for name, value in values.items() if kinds.get(name) == known[name]["type"]})
    if values.get("images"):
        from mmn import sources

        values["images"] = sources.absolute(values["images"])
    for name in ("image", *MODELS):
        if values.get(name) and os.path.exists(values[name]):
            values[name] = str(Path(values[name]).resolve())
    return values


def check(**values: Any) -> dict[str, Any]:
    """All parameters of a chapter, as they were given; those of other names than the chapters' pass.

    Raises MmnError for a parameter that papermill set and that is not among them, a number out of range or not whole, a picture that is
    none, a folder or model that does not exist, a source without pictures, a device that this machine does not have, an unknown dtype, and
    a place for results that is no folder."""
    if unknown := [name for name in _injected() if name not in values]:
        raise MmnError(f"There is no parameter {unknown[0]!r}: this notebook has {', '.join(values)}.")
    _fitting(values)
    return values


def _injected() -> list[str]:
    """The names that papermill set in the notebook that runs this, in the cell that it adds: a comment `Parameters`, then a line for each
    value. None outside of a notebook, or where nothing was set."""
    own = kernels.shell()
    cells = [cell for cell in (own.user_ns["In"] if own else []) if cell.startswith("# Parameters\n")]
    return re.findall(r"^(\w+) = ", cells[-1], re.MULTILINE) if cells else []  # the last: it may have been mended and run again


def _fitting(values: Mapping[str, Any]) -> None:
    """Raises MmnError for a value that `check` refuses."""
    for name, value in values.items():
        if name in RANGES:
            low, high = RANGES[name]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise MmnError(f"{name} is a whole number from {low:,} to {high:,}, not {value!r}.")
        elif name in TEXTS and not isinstance(value, str):
            raise MmnError(f"{name} is text, not {value!r}.")
        elif name in NEEDED and not value.strip():
            raise MmnError(f"{name} must not be empty.")
    if values.get("out"):
        _place(Path(values["out"]))
    if values.get("image"):
        from mmn.images import open_image

        open_image(values["image"])
    if values.get("images"):
        from mmn import sources

        if os.path.isfile(values["images"]):
            raise MmnError(f"{values['images']} is a file: images names a folder or another source of pictures.")
        if values["images"] == "scenes":
            raise MmnError('Scenes are drawn where images is "": leave it empty.')
        sources.load(values["images"], 1)
    for name in MODELS:
        if values.get(name):
            _checkpoint(name, values[name])
    if values.keys() & {"device", "dtype"}:
        from mmn import vlm  # reads torch, which takes seconds

        vlm.place(values.get("device") or None, values.get("dtype", "float32"))


def _place(folder: Path) -> None:
    """Raises MmnError where no folder can be made, or nothing can be written to it."""
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise MmnError(f"{folder} cannot be a folder ({error.strerror}): give another one for out.") from None
    if not there.is_dir():
        raise MmnError(f"{there} is a file: give a folder for out.")
    if not os.access(there, os.W_OK):
        raise MmnError(f"{there} may not be written to: give another folder for out.")


def _checkpoint(name: str, value: str) -> None:
    """Raises MmnError where there is no such model. Encoders may have old names without an owner, such as `roberta-large`."""
    from mmn import vlm

    try:
        vlm.resolve(value)
    except MmnError:
        if name == "model" or os.path.exists(value) or value.startswith((".", "/", "~")):
            raise
        from huggingface_hub import model_info, try_to_load_from_cache

        try:
            if not isinstance(try_to_load_from_cache(value, "config.json"), str):
                model_info(value, timeout=10)
        except Exception:  # whatever the Hub's client raises, offline or for no such name
            raise MmnError(f"There is no model {value!r} here: give {name} a folder, or its name while you are online.") from None


def opened(images: str, count: int) -> tuple[list[Image.Image], pd.DataFrame]:
    """The first `count` pictures of a source (see mmn.sources) that can be opened, and a table of those tried: columns picture (its number
    among the opened, or -1), name, problem. One that cannot be opened is told in a printed line.

    Raises MmnError if none can be opened."""
    import pandas as pd

    from mmn import sources

    found: list[Image.Image] = []
    rows = []
    smaller = 0
    if dead := len(sources.dead(images)):
        print(f"{dead} addresses of the list were dead: see its manifest.csv")
    for each in sources.load(images, sys.maxsize):
        if len(found) == count:
            break
        try:
            image = each.open()
        except MmnError as error:
            print(f"left out: {error}")
            rows.append((-1, each.id, str(error)))
            continue
        if (shrink := (PIXELS / (image.width * image.height)) ** 0.5) < 1:
            image.thumbnail((image.width * shrink, image.height * shrink))
            smaller += 1
        found.append(image)
        rows.append((len(found) - 1, each.id, ""))
    if not found:
        raise MmnError(f"None of the {len(rows)} pictures of {images} can be opened: {rows[0][2]}")
    if smaller:
        print(f"{smaller} of {len(found)} pictures were made smaller, to {PIXELS / 1e6:g} million pixels at most")
    return found, pd.DataFrame(rows, columns=["picture", "name", "problem"])


def known(images: str, files: pd.DataFrame) -> list[Picture]:
    """What is known of the pictures that `opened` gave with the table `files`, in their order."""
    from mmn import sources

    every = {each.id: each for each in sources.load(images, sys.maxsize)}
    return [every[name] for name in files.loc[files["picture"] >= 0, "name"]]


def write(settings: Mapping[str, Any], vlm: VLM, tables: Mapping[str, pd.DataFrame | None], **more: Any) -> None:
    """Write the tables of a chapter into `settings["out"]` (not None, nor one without columns: this run has none), and beside them
    `settings.json`: the settings, what computed them (see mmn.pieces.about), the units of the numbers, and `more`. With the table
    `pictures`, of `opened`, the columns `picture` of the others name files. Raises MmnError where they cannot be written."""
    import pandas as pd

    out = Path(settings["out"])
    some = {}
    files = tables.get("pictures")
    names = {} if files is None else dict(zip(files["picture"], files["name"], strict=True))
    for name, table in tables.items():
        if table is not None and len(table.columns):
            plain = table.index.name is None and pd.api.types.is_integer_dtype(table.index)
            flat = table if plain else table.rename_axis(index=[each or "row" for each in table.index.names]).reset_index()
            if names and table is not files and "picture" in flat:
                flat = flat.assign(picture=[names.get(each, each) for each in flat["picture"]])
            some[name] = flat
            put(out / f"{name}.csv", csv(flat))
    units = {}
    for name, table in some.items():
        numbers = table.select_dtypes("number").columns.union([c for c in ("picture",) if c in table], sort=False)
        units[name] = {str(column): unit for column in numbers if (unit := _unit(name, str(column)))}
    record = {"settings": dict(settings), **about(vlm), "tables": sorted(some), "units": units, **more}
    put(out / "settings.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _unit(table: str, column: str) -> str | None:
    """What the numbers of a column are; the control of a measure, its name with `_random`, is as the measure."""
    from mmn.editors import MEASURES

    known = {f"measures.{name}": text for name, text in MEASURES.items()} | {
        f"trade_off.{name}": text for name, text in MEASURES.items()
    }
    plain = column.removesuffix("_random")
    keys = (f"{table}.{column}", f"{table}.{plain}", column, plain, f"{table}.*")
    return next((found[key] for found in (known, UNITS) for key in keys if key in found), None)


def execute(path: Path, values: Mapping[str, Any], out: Path, *, progress: bool = True, cell_seconds: int = CELL_SECONDS) -> Path:
    """Run a notebook and leave it, with its figures, in the folder of its name in `out`; returns its place there.

    Raises MmnError, with the sentence of the cell that stopped, where it does not run through."""
    folder = out.expanduser() / path.stem
    known = parameters(path)
    if "out" in known:
        values = {**values, "out": str(folder.resolve())}
    with alone(folder):
        try:
            _clear(folder, path)
            done = _run_through(path, values, folder, progress, cell_seconds)
            figures(done, folder / "figures")
        except OSError as error:
            raise MmnError(f"{path.stem} could not be run ({error}): free some space or choose another --out.") from error
        if not (folder / "settings.json").exists():  # a notebook that does not call `write`
            settings = {name: _literal(each["default"]) for name, each in known.items()} | dict(values)
            versions = {name: version(name) for name in (*PACKAGES, "papermill")}
            record: dict[str, Any] = {"settings": settings, "versions": versions, "commit": commit(), "tables": []}
            put(folder / "settings.json", json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
    return done


def _run_through(path: Path, values: Mapping[str, Any], folder: Path, progress: bool, cell_seconds: int) -> Path:
    """The notebook as it was run; where it stopped, `CHAPTER.failed.ipynb` and a MmnError."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    part, done = folder / f".{path.stem}.part.ipynb", folder / f"{path.stem}.ipynb"
    try:
        with kernels.private() as options:
            papermill.execute_notebook(
                _plain(path), _plain(part), values, progress_bar=progress, execution_timeout=cell_seconds, kernel_name="python3",
                **options,
            )  # fmt: skip
    except NoSuchKernel:
        part.unlink(missing_ok=True)
        raise MmnError("There is no kernel python3 here: pip install ipykernel, then python -m ipykernel install --user.") from None
    except (papermill.PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
        if part.exists():
            os.replace(part, folder / f"{path.stem}.failed.ipynb")
        if isinstance(error, CellTimeoutError):
            raise MmnError(f"{path.stem} stopped: a cell took more than {cell_seconds} seconds; see --cell-seconds.") from None
        if isinstance(error, DeadKernelError):
            raise MmnError(
                f"{path.stem} stopped: its process was killed, perhaps for want of memory: take fewer pictures."
            ) from None
        raise MmnError(f"{path.stem} stopped: {error.ename}: {error.evalue}") from None
    except BaseException:
        for left in folder.rglob(".*.part*"):  # also what the chapter's process wrote when a scheduler stopped it as well
            left.unlink(missing_ok=True)
        raise
    os.replace(part, done)
    return done


def _plain(path: Path) -> str:
    """A path as papermill takes it, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _clear(folder: Path, path: Path) -> None:
    """Take away what an earlier run of the chapter left in its folder, so that nothing of two runs stands side by side."""
    try:
        told = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["tables"]
        tables = {each.stem for each in folder.glob("*.csv")} & set(told)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # there was none, or it is no file of ours
        tables = set()
    names = (
        f"{path.stem}.ipynb",
        f"{path.stem}.failed.ipynb",
        "pictures.csv",
        "settings.json",
        *(f"{each}.csv" for each in tables),
    )
    for old in (*(folder / name for name in names), *(folder / "figures").glob("cell-*"), *folder.rglob(".*.part")):
        if old.resolve() != path.resolve():  # which may be run where it stands
            old.unlink(missing_ok=True)


def figures(notebook: Path, folder: Path) -> list[Path]:
    """Write the pictures among a notebook's outputs as files, named by the number of the code cell, as the chapter counts it, and the first
    words of its alternative text, else of the heading above."""
    import nbformat

    ends = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
    written, number, heading = [], 0, ""
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            heading = ([line for line in cell.source.splitlines() if line.startswith("#")] or [heading])[-1]
        if cell.cell_type != "code" or "injected-parameters" in cell.metadata.get("tags", []):
            continue
        number += 1
        said = cell.metadata.get("mystnb", {}).get("image", {}).get("alt") or heading
        name = "-".join([f"cell-{number:02d}", *re.findall(r"[a-z0-9]+", said.lower())[:6]])
        data = [output.get("data", {}) for output in cell.outputs]
        for place, (end, body) in enumerate(((end, each[kind]) for each in data for kind, end in ends.items() if kind in each), 1):
            target = folder / f"{name}{f'-{place}' if place > 1 else ''}.{end}"
            with whole(target) as part:
                part.write_bytes(body.encode() if end == "svg" else base64.b64decode(body))
            written.append(target)
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn run`."""
    parser.add_argument("chapter", help="its number or name (see `mmn list`), or a notebook's path")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--model", help="short for -p model=MODEL")
    parser.add_argument("--images", help="short for -p images=FOLDER")
    parser.add_argument(
        "--out", type=a_path, required=True, help="folder; the chapter as it was run and its tables go to OUT/CHAPTER"
    )
    parser.add_argument("--cell-seconds", type=int, default=CELL_SECONDS, help="time that a cell may take (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn run`: exit code 1 where pictures had to be left out. Raises MmnError for bad input and for a chapter that stops."""
    path = chapter(args.chapter)
    given: dict[str, str] = {}
    short = [f"{name}={value}" for name, value in (("model", args.model), ("images", args.images)) if value is not None]
    for word in (*args.parameter, *short):
        name, sign, value = word.partition("=")
        if not sign:
            raise MmnError(f"A parameter is given as NAME=VALUE, not {word!r}.")
        if name in given:
            raise MmnError(f"{name} is given twice: leave one of the two away.")
        given[name] = value
    if "out" in given:
        raise MmnError("Where results go is said by --out alone: leave -p out=... away.")
    if args.cell_seconds < 1:
        raise MmnError(f"--cell-seconds is a whole number of at least 1, not {args.cell_seconds}.")
    _place(args.out.expanduser() / path.stem)
    done = execute(path, checked(path, given), args.out, cell_seconds=args.cell_seconds)
    print(f"Written to {done}")
    missing = _left_out(done.parent / "pictures.csv")
    if missing:
        print(f"Pictures that could not be opened: {missing}; see {done.parent / 'pictures.csv'}")
    return int(missing > 0)


def _left_out(table: Path) -> int:
    """How many pictures of a table as `opened` makes it could not be opened; 0 without such a table."""
    import pandas as pd

    try:
        return int(pd.read_csv(table, keep_default_na=False)["problem"].ne("").sum())
    except (FileNotFoundError, ValueError, KeyError):  # there is none, or a notebook of one's own means something else by it
        return 0


def listing(paths: Iterable[Path]) -> str:
    """Chapters and their parameters as text, one a line: name, type, default, meaning."""
    lines = []
    for path in paths:
        lines.append(path.stem)
        for name, each in parameters(path).items():
            lines.append(f"  {name + ':':<12} {each['type']:<6} = {each['default']:<14} {each['help']}")
    return "\n".join(lines)
