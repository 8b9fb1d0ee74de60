"""The command line: `mmn explain PICTURE` does the job of the book's tour; the other commands are fronts of their modules.

A command is a module with `add_arguments(parser)` and `run(args) -> int`, imported when it is called for. Bad input is one sentence
on standard error and exit code 2; Ctrl-C is exit code 130, SIGTERM 143; in all cases nothing half-written stays behind.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import io
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmn.arguments import a_path, at_least
from mmn.bars import tqdm
from mmn.errors import MmnError
from mmn.paths import put, whole

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    import mmn

COMMANDS: dict[str, tuple[str, str]] = {
    "explain": ("mmn.cli", "caption a picture, find the neurons behind each noun, draw where they fire"),
    "list": ("mmn.chapter_list", "list the chapters and their parameters"),
    "run": ("mmn.chapters", "run a chapter with other parameters"),
    "train": ("mmn.train", "train the scale model"),
    "evaluate": ("mmn.evaluate", "measure a model on fresh scenes, with chance levels and random controls"),
    "tables": ("mmn.tables", "make the slow tables that the chapters show, or check a sample of them"),
    "edit": ("mmn.edit_command", "fit an edit, show it, caption with it, or merge it into a checkpoint"),
    "bench": ("mmn.bench", "time recording and ranking, and ways to score neurons at the shapes of large models"),
    "atlas": ("mmn.atlas", "every neuron on one page: its words, its pictures, its concept"),
    "fetch": ("mmn.fetch", "fetch the pictures of SBU Captions"),
    "throughput": ("mmn.throughput", "pictures a second in batches, beside plain generation"),
    "replicate": ("mmn.workflow", "all measures on several models and many pictures, on one machine or a cluster"),
    "anatomy": ("mmn.tree", "show where a model keeps its neurons, and check it by arithmetic"),
    "doctor": ("mmn.doctor", "check whether this machine will run the book, and say what to do if not"),
    "course": ("mmn.course", "editions of the chapters for students and instructors, slides, and points for what is handed in"),
    "families": ("mmn.families", "list the model families that were tried, and what was found"),
}
RECORD = "explain.json"  # marks a folder as one that `mmn explain` made and may replace


class Parser(argparse.ArgumentParser):
    """argparse's parser, with one sentence in place of the usage and the sentence."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message[:1].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which clusters, `timeout` and a shutdown ask: whatever cleans up after Ctrl-C cleans up after it."""


def _terminated(*_: object) -> NoReturn:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 when it did its job, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), "")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold what the locale cannot write
            stream.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        args = _parser(command).parse_args(words)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except MmnError as error:
        print(f"mmn {command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # which may be what found no space, and still has to be flushed
        print(f"mmn {command}: nothing more can be written ({error.strerror}): free some space.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"mmn {command}: interrupted; nothing was left half-written.", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = Parser(prog="mmn", description="Find, understand and edit multi-modal neurons in vision-language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, purpose) in COMMANDS.items():
        front = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if name == command:  # the others stay unimported: torch takes seconds
            home = importlib.import_module(module)
            home.add_arguments(front)
            front.set_defaults(run=home.run)
    return parser


# ---------------------------------------------------------------------------------------------------------------- explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mmn explain`."""
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="a picture file; without one, a synthetic scene")
    parser.add_argument("--noun", action="append", help="a noun of the caption, may be repeated (default: all of them)")
    parser.add_argument("--model", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
    parser.add_argument("--top-k", type=at_least(1), default=10, help="neurons per noun (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="which synthetic scene (default: %(default)s)")
    parser.add_argument("--out", type=a_path, help="folder for the results (default: out/<name of the picture>)")
    parser.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    parser.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Caption a picture and write caption, ranking and figures; raises MmnError for bad input."""
    out = args.out or Path("out") / (Path(args.picture or "").stem or f"scene-{args.seed}")
    with replaced(out) as folder, tqdm(total=5, desc="loading", unit="step", disable=None) as bar:

        def step(name: str) -> None:
            bar.update()
            bar.set_description(name)

        record = explain(args, folder, step)
        bar.update()
    print(record["caption"])
    for noun in record["nouns"]:
        neurons = ", ".join(f"L{n['layer']}.{n['unit']}" for n in noun["neurons"][:5])
        print(f"  {noun['noun']}: {neurons}{', ...' if len(noun['neurons']) > 5 else ''}")
    if record["problem"]:
        print(f"Without figures: {record['problem']}")
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def explain(args: argparse.Namespace, folder: Path, step: Callable[[str], None]) -> dict[str, Any]:
    """Do the work of `mmn explain`, write it into `folder`, and return the record that explain.json holds."""
    import pandas as pd

    import mmn
    from mmn import scenes

    image = scenes.draw(args.seed).image if args.picture is None else mmn.open_image(args.picture)
    vlm = mmn.load(args.model, device_map=args.device_map, dtype=args.dtype)
    step("captioning")
    trace = vlm.caption(image)
    step("ranking")
    rankings = mmn.rank(vlm, trace, k=args.top_k)
    wanted = list(dict.fromkeys(trace.noun(noun).lemma for noun in args.noun)) if args.noun else list(rankings)
    tables: list[pd.DataFrame] = []
    nouns = []
    problem = ""
    step("drawing")
    for noun in wanted:
        table = tabulate(vlm, noun, rankings[noun])
        try:
            draw(vlm, trace, image, noun, table, folder)
        except MmnError as error:  # image tokens that are no grid: the rest is worth having
            problem = str(error)
        tables.append(table)
        nouns.append({"noun": noun, "neurons": table.drop(columns="noun").to_dict("records")})
    step("writing")
    record = {
        "caption": trace.text,
        "picture": Path(args.picture or "").name or f"synthetic scene {args.seed}",
        "prompt": mmn.PROMPT,
        "prefix": mmn.PREFIX,
        "model": vlm.name,
        "model_hash": vlm.hash,
        "top_k": args.top_k,
        "nouns": nouns,
        "problem": problem,
        "versions": {name: version(name) for name in ("mmn", "torch", "transformers")} | {"python": platform.python_version()},
    }
    put(folder / "caption.txt", trace.text + "\n")
    put(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    columns = ["noun", "rank", "layer", "unit", "score", "tokens"]
    ranking = pd.concat(tables) if tables else pd.DataFrame(columns=columns)
    ranking.assign(tokens=[" | ".join(t) for t in ranking["tokens"]]).to_csv(folder / "ranking.csv", index=False)
    return record


def tabulate(vlm: mmn.VLM, noun: str, ranking: mmn.NeuronRanking) -> pd.DataFrame:
    """One row a neuron: noun, rank from 1, layer, unit, score, and the tokens it writes."""
    import mmn

    table = ranking.table().reset_index().drop(columns="activation")
    table.insert(0, "noun", noun)
    return table.assign(tokens=mmn.top_tokens(vlm, ranking.neurons, k=10)["tokens"].tolist())


def draw(
    vlm: mmn.VLM,
    trace: mmn.Trace,
    image: Image.Image,
    noun: str,
    table: pd.DataFrame,
    folder: Path,
) -> None:
    """Write the two figures of a noun: where its neurons fire on average, and each neuron with what it writes."""
    from matplotlib.figure import Figure

    import mmn
    from mmn import plots

    found = [mmn.Neuron(layer, unit) for layer, unit in zip(table["layer"], table["unit"], strict=True)]
    heat = mmn.heatmap(vlm, trace, found)
    name = os.fsdecode(re.sub(r"\W+", "-", noun).encode())  # in UTF-8, whatever the locale
    mean = Figure(figsize=(4, 4), layout="constrained")
    plots.heatmap(image, heat.on_image(), heat.mask(), mean.subplots(), f"{noun}: mean of {len(found)} neurons")
    mean.savefig(folder / f"{name}-heatmap.png", dpi=150)
    shown = min(len(found), 10)
    each = Figure(figsize=(9, 2.7 * -(-shown // 5)), layout="constrained")
    axes = each.subplots(-(-shown // 5), 5, squeeze=False).ravel().tolist()
    for spare in axes[shown:]:
        spare.set_axis_off()
    plots.neurons(
        image, heat.grid[:shown], [str(n) for n in found[:shown]], list(table["tokens"])[:shown], axes[:shown], box=heat.box
    )
    each.savefig(folder / f"{name}-neurons.png", dpi=150)


# ---------------------------------------------------------------------------------------------------------- whole or not at all


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A fresh folder that becomes `out` when the block ends well and vanishes when it does not.

    An older result of this command in `out` stays until the new one is whole. Raises MmnError where `out` holds anything else, or
    cannot be written."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / RECORD).exists())):
        raise MmnError(f"{out} exists and is no result of this command; choose another --out.")
    made = [parent for parent in out.parents if not parent.exists()]  # deepest first
    try:
        with whole(out) as fresh:
            fresh.mkdir()
            yield fresh
    finally:
        for parent in made if not out.exists() else ():
            with suppress(OSError):
                parent.rmdir()


if __name__ == "__main__":
    sys.exit(main())
