"""`mmn replicate`: all measures on several models and many pictures, on one machine or a cluster, and the tables of the report.

`run` writes into its folder what was asked for and hands the graph in `workflow.smk` to Snakemake, which calls `step` for each piece
(mmn.pieces, where the folder's layout is). A run that was killed goes on where it was and ends with the same bytes."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmn import pieces
from mmn.arguments import a_path
from mmn.errors import MmnError
from mmn.images import readable
from mmn.paths import alone, put
from mmn.progress import Progress
from mmn.scenes import PROMPT

if TYPE_CHECKING:
    import psutil

GRAPH = Path(__file__).with_name("workflow.smk")
PROFILES = Path(__file__).with_name("profiles")
PATIENCE = 10  # seconds that Snakemake has to stop
MACHINE = ("batch", "device_map", "cpus", "gpus", "mem_mb", "minutes", "jobs", "profile")  # may change while a run goes on
LEAST = {"count": 1, "shards": 1, "top_k": 1, "batch": 1, "jobs": 1, "cpus": 1, "mem_mb": 1, "minutes": 1}
LEAST |= {"edits": 0, "seed": 0, "gpus": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `mmn replicate`, and their options."""
    commands = parser.add_subparsers(dest="what", metavar="run|step", required=True)
    run = commands.add_parser("run", help="run all measures on some models and pictures, or go on with a run")
    run.add_argument("--out", type=a_path, required=True, help="folder of the run")
    run.add_argument(
        "--models",
        nargs="+",
        default=["tiny-llava"],
        metavar="MODEL",
        help="folders or Hugging Face names, NAME@REVISION to pin one",
    )
    run.add_argument("--images", default="scenes", help="scenes, a folder, or what `mmn fetch` left (default: %(default)s)")
    run.add_argument("--count", type=int, default=1000, help="pictures (default: %(default)s)")
    run.add_argument("--shards", type=int, default=8, help="pieces the pictures are cut into (default: %(default)s)")
    run.add_argument("--top-k", type=int, default=10, help="neurons a noun (default: %(default)s)")
    run.add_argument("--prompt", default=PROMPT, help="default: the paper's")
    run.add_argument("--edits", type=int, default=3, help="nouns to edit, 0 for none (default: %(default)s)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")
    run.add_argument("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings")
    run.add_argument("--batch", type=int, default=16, help="pictures captioned at once (default: %(default)s)")
    run.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    run.add_argument("--jobs", type=int, help="pieces at once (default: 1; with a profile, what it says)")
    run.add_argument(
        "--cpus", type=int, help="cores for a piece (default: this machine's, shared by the pieces at once; with a profile 4)"
    )
    run.add_argument("--gpus", type=int, default=0, help="GPUs that a piece needs (default: %(default)s)")
    run.add_argument("--mem-mb", type=int, default=16000, help="memory that a piece needs, for a scheduler (default: %(default)s)")
    run.add_argument("--minutes", type=int, default=240, help="time that a piece may take, for a scheduler (default: %(default)s)")
    run.add_argument("--profile", help="a Snakemake profile: slurm, or a folder (default: this machine)")
    run.add_argument("--dry-run", action="store_true", help="say what would be computed and about how long it would take")
    step = commands.add_parser("step", help="one piece of a run; Snakemake calls this")
    step.add_argument("stage", choices=tuple(pieces.FILES))
    step.add_argument("--out", type=a_path, required=True, help="folder of the run")
    step.add_argument("--model", help="its name in settings.json")
    step.add_argument("--shard", type=int, help="which piece")


def run(args: argparse.Namespace) -> int:
    """`mmn replicate`: exit code 1 where some of the results are missing. Raises MmnError for bad input."""
    if args.what == "run":
        return _run(args)
    pieces.step(args.out, args.stage, args.model, args.shard)
    return 0


# ---------------------------------------------------------------------------------------------------------------- settings


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a run is, as settings.json holds it. Raises MmnError for numbers that make no sense, and for
    models, dtypes and devices that do not exist."""
    from mmn import sources, vlm  # reads torch, which takes seconds

    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise MmnError(f"--{name.replace('_', '-')} is a whole number of at least {least}, not {value}.")
    if args.shards > args.count:
        raise MmnError(f"{args.count} pictures cannot be cut into {args.shards} shards: give fewer shards.")
    vlm.place(None if args.profile else args.device_map, args.dtype)  # with a profile, it is another machine's device
    models = {}
    for given in map(str, args.models):
        name, _, revision = (given, "", "") if os.path.exists(given) else given.partition("@")
        vlm.resolve(name)
        name = str(Path(name).resolve()) if os.path.isdir(name) else name
        slug = re.sub(r"[^\w.-]+", "_", given).strip("_.-") or Path(name).name
        if slug in models:
            raise MmnError("Two of the models have the same name: give each once.")
        models[slug] = {"name": name, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
        if revision:
            models[slug]["revision"] = revision
    keys = ("count", "shards", "top_k", "prompt", "edits", "seed")
    settings = {"models": models, "images": sources.absolute(args.images), **{key: getattr(args, key) for key in keys}}
    return settings | {"prompt": readable(args.prompt)}  # words, where the locale knows only ASCII, too


def machine_of(args: argparse.Namespace) -> dict[str, Any]:
    """How a run is run, as machine.json holds it. Raises MmnError for a profile that does not exist."""
    if args.profile and not (PROFILES / args.profile).is_dir() and not Path(args.profile).is_dir():
        raise MmnError(f"There is no profile {args.profile}: give a folder with a config.yaml, or slurm.")
    machine = {key: getattr(args, key) for key in MACHINE}
    machine["jobs"] = args.jobs or 1
    machine["cpus"] = args.cpus or (4 if args.profile else max(1, (os.cpu_count() or 1) // machine["jobs"]))
    return machine


def kept(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run and the list of its pictures. Raises MmnError where the folder holds a run with others."""
    from mmn import sources

    path = out / "settings.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in settings if settings[key] != old.get(key)]:
            raise MmnError(
                f"{out} holds a run with other settings ({', '.join(differing)}): give another folder, or its own settings."
            )
    elif out.exists() and any(each.name != ".lock" and not each.name.endswith(".part") for each in out.iterdir()):
        raise MmnError(f"{out} is not empty and holds no run: give another folder.")
    if (out / "pictures.csv").exists():
        return
    pictures, dead = pieces.pin(settings), sources.dead(settings["images"])
    if len(pictures) < settings["shards"]:
        raise MmnError(f"{len(pictures)} pictures cannot be cut into {settings['shards']} shards: give fewer shards.")
    put(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")  # first: it says whose folder this is
    if len(dead):
        put(out / "dead.csv", pieces.csv(dead))
    put(out / "pictures.csv", pieces.csv(pictures))  # last: it stands for all three


# --------------------------------------------------------------------------------------------------------------- a whole run


def _run(args: argparse.Namespace) -> int:
    if find_spec("snakemake") is None:
        raise MmnError("`mmn replicate run` needs Snakemake: pip install 'mmn[cluster]'.")
    from mmn import sources

    settings, machine = settings_of(args), machine_of(args)
    if left := sources.left_out(settings["images"]):
        print(f"left out: {left}", file=sys.stderr)
    if args.dry_run and not (args.out / "pictures.csv").exists():
        with tempfile.TemporaryDirectory() as folder:  # a run that is not begun leaves nothing
            kept(Path(folder), settings)
            return _dry(Path(folder), settings, machine, args)
    if args.dry_run:
        kept(args.out, settings)
        return _dry(args.out, settings, machine, args)
    with alone(args.out) as lock:
        kept(args.out, settings)
        for left in (*args.out.rglob(".*.part"), *args.out.glob("logs/*.now")):  # by a run that was killed at work
            left.unlink(missing_ok=True)
        _forget(args.out)
        put(args.out / "machine.json", json.dumps(machine, indent=1) + "\n")
        progress = Progress(args.out, settings, bars=sys.stderr.isatty() and args.profile is None)
        _snakemake(args.out, machine, args, ["--quiet", "all"] if args.profile is None else [], lock, progress.look)
        progress.close()
        tables, record = pieces.gathered(args.out)
        addresses = tables["problems"]["stage"].eq(pieces.DEAD)
        problems = tables["problems"][~addresses]
        for row in problems.itertuples():  # told first: on a full disk the tables are not written
            print(f"{row.model}, {row.stage}{f', {row.picture}' if row.picture else ''}: {row.problem}", file=sys.stderr)
        if addresses.any():
            print(f"{addresses.sum()} addresses of the list were dead.", file=sys.stderr)
        if record["pictures"]["found"] < settings["count"]:
            print(f"Only {record['pictures']['found']} of {settings['count']} pictures were there.", file=sys.stderr)
        pieces.write(args.out, tables, record)
    print(
        f"{len(tables['captions'])} captions, {len(tables['properties'])} measures, {len(problems)} problems: {args.out / 'tables'}"
    )
    return int(problems["kind"].eq("missing").any())


def _forget(out: Path) -> None:
    """Take away what a piece without enough memory left, so that it is tried again."""
    for path in out.glob("parts/*/*-problems*.csv"):
        if pieces.read(path)["problem"].str.endswith("out of memory").any():
            path.unlink()


def _snakemake(
    out: Path, machine: dict[str, Any], args: argparse.Namespace, more: Sequence[str], lock: int | None = None,
    look: Callable[[], object] = lambda: None,
) -> int:  # fmt: skip
    """Snakemake on the graph, in the folder of the run; its exit code. The lock is ours: Snakemake inherits it, so that the
    folder is held until both have ended, whichever is killed. What counts as done is ours, too: a file that is there is
    whole. `look` is called once a second."""
    import psutil

    command = [sys.executable, "-m", "snakemake", "--snakefile", str(GRAPH), "--directory", str(out)]
    command += ["--nolock", "--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", *more]
    if args.profile:
        own = PROFILES / args.profile
        command += ["--workflow-profile", str(own if own.is_dir() else args.profile)]
        command += ["--jobs", str(args.jobs)] if args.jobs else []
    else:
        jobs = machine["jobs"]
        command += ["--cores", str(jobs * machine["cpus"]), "--resources", f"gpu={max(1, machine['gpus']) * jobs}"]
    held = [lock] if lock is not None and os.name == "posix" else []
    # In UTF-8 it reads any settings.json and any name, whatever the locale.
    child = subprocess.Popen(command, pass_fds=held, env=os.environ | {"PYTHONUTF8": "1"})
    at_work: list[psutil.Process] = []
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(1)
                break
            look()
            with suppress(psutil.NoSuchProcess):
                at_work = psutil.Process(child.pid).children(recursive=True)
    except BaseException:
        _stopped(child)
        raise
    if code < 0:  # it was killed, and they work on
        _killed(at_work)
    return code


def _stopped(child: subprocess.Popen[bytes]) -> None:
    """Wait until Snakemake has stopped its pieces and taken back its jobs. A terminal's Ctrl-C reached it as well; what was meant for us
    alone is handed on, and what still works after that is ended: each file is whole or not there."""
    import psutil

    for ask in (lambda: None, lambda: child.send_signal(signal.SIGINT)):
        ask()
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
            return
    with suppress(psutil.NoSuchProcess):  # the child has just ended
        _killed(psutil.Process(child.pid).children(recursive=True))
    child.kill()


def _killed(processes: Sequence[psutil.Process]) -> None:
    import psutil

    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()


# ------------------------------------------------------------------------------------------------------------------- dry run


def _dry(out: Path, settings: dict[str, Any], machine: dict[str, Any], args: argparse.Namespace) -> int:
    print(forecast(out, settings, machine))
    with tempfile.TemporaryDirectory() as folder:  # Snakemake leaves files of its own
        shutil.copy2(out / "settings.json", folder)
        if (out / "parts").is_dir():
            shutil.copytree(out / "parts", Path(folder) / "parts", ignore=shutil.ignore_patterns("*.part"))
        put(Path(folder) / "machine.json", json.dumps(machine) + "\n")
        return _snakemake(Path(folder), machine, args, ["--dry-run", "--quiet", "rules"])


def forecast(out: Path, settings: dict[str, Any], machine: dict[str, Any]) -> str:
    """What is left of a run and about how long it will take, from the pieces that are done, or from two pictures of each model."""
    lines, total = [], 0.0
    done = [json.loads(path.read_text()) for path in (out / "logs").glob("*.json")]
    for model in settings["models"]:
        each = {}
        for stage in ("rankings", "properties"):
            some = [r for r in done if r["model"] == model and r["stage"] == stage and r["pictures"]]
            each[stage] = sum(r["seconds"] for r in some) / sum(r["pictures"] for r in some) if some else None
        source = "from pieces that are done"
        if None in each.values():
            try:
                each, source = _probe(out, settings, model, machine), "from two pictures"
            except MmnError as error:
                lines.append(f"{model}: no guess, as it cannot be tried here ({error})")
                continue
        left, begin = 0.0, each.pop("begin", None) or 0.0
        for stage, suffix in pieces.pieces_of(settings):
            folder = out / "parts" / model
            if not all((folder / name.format(suffix)).exists() for name in pieces.FILES[stage]):
                left += begin
                if stage in each:
                    left += len(pieces.pictures_of(out, settings, int(suffix[1:]))) * (each[stage] or 0.0)
        lines.append(
            f"{model}: {sum(v or 0 for v in each.values()):.2f} s a picture"
            f"{f', {begin:.1f} s to begin a piece' if begin else ''} ({source}), about {left / 60:.1f} minutes left"
        )
        total += left
    lines.append(f"together about {total / 60 / machine['jobs']:.1f} minutes with {machine['jobs']} at once; the edits come on top")
    return "\n".join(lines)


def _probe(out: Path, settings: dict[str, Any], model: str, machine: dict[str, Any]) -> dict[str, float | None]:
    """Seconds a picture of each stage, and `begin`, those until a piece's process has read this package's libraries and the model."""
    from mmn import stages

    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import mmn.stages"], check=True)
    vlm = pieces.load(settings, model, machine["device_map"])
    begin = time.perf_counter() - begun
    every = pieces.pictures_of(out, settings)
    opened = stages.opened(every, stages.Notes("rankings"))
    pictures = [picture for picture, _ in itertools.islice(opened, 2)]
    if not pictures:
        raise MmnError("none of its pictures can be opened")
    started = time.perf_counter()
    ranked = stages.rankings(vlm, pictures, top_k=settings["top_k"], prompt=settings["prompt"])
    between = time.perf_counter()
    stages.properties_of(vlm, pictures, ranked["captions"], every=every, top_k=settings["top_k"], prompt=settings["prompt"])
    ended = time.perf_counter()
    return {"rankings": (between - started) / len(pictures), "properties": (ended - between) / len(pictures), "begin": begin}
