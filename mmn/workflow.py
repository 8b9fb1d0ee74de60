"""`mmn replicate`: all measures on several models and many pictures, on one machine or a cluster, and the tables of the report.

`run` writes the settings of a run into its folder and hands the graph in `workflow.smk` to Snakemake, which calls `step` for each piece
(mmn.stages). Every file is written whole or not at all, and no file tells when it was made: a run that was killed goes on where it was
and ends with the same bytes. Layout of the folder:

    settings.json   what was asked for                logs/     what each piece said, and how long it took
    parts/          the pieces, by model and shard    tables/   all models together, summary.csv first; tables.json says what they are
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmn.errors import MmnError
from mmn.paths import put

if TYPE_CHECKING:
    import pandas as pd

    from mmn.sources import Picture
    from mmn.vlm import VLM

GRAPH = Path(__file__).with_name("workflow.smk")
PROFILES = Path(__file__).with_name("profiles")
PACKAGES = ("mmn", "torch", "transformers", "numpy", "pandas", "pillow")
PROMPT = "Describe the image in few words."  # the paper's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `mmn replicate`, and their options."""
    commands = parser.add_subparsers(dest="what", metavar="run|step", required=True)
    run = commands.add_parser("run", help="run all measures on some models and pictures, or go on with a run")
    run.add_argument("--out", type=Path, required=True, help="folder of the run")
    run.add_argument("--models", nargs="+", default=["tiny-llava"], metavar="MODEL", help="folders or Hugging Face names")
    run.add_argument("--images", default="scenes", help="scenes, a folder, or what `mmn fetch` left (default: %(default)s)")
    run.add_argument("--count", type=int, default=1000, help="pictures (default: %(default)s)")
    run.add_argument("--shards", type=int, default=8, help="pieces the pictures are cut into (default: %(default)s)")
    run.add_argument("--top-k", type=int, default=10, help="neurons a noun (default: %(default)s)")
    run.add_argument("--prompt", default=PROMPT, help="default: the paper's")
    run.add_argument("--edits", type=int, default=3, help="nouns to edit, 0 for none (default: %(default)s)")
    run.add_argument("--batch", type=int, default=16, help="pictures captioned at once (default: %(default)s)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    run.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")
    run.add_argument("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings")
    run.add_argument("--jobs", type=int, default=1, help="pieces at once, on this machine (default: %(default)s)")
    run.add_argument("--gpus", type=int, default=0, help="GPUs that a piece needs (default: %(default)s)")
    run.add_argument("--mem-mb", type=int, default=16000, help="memory that a piece needs, for a scheduler (default: %(default)s)")
    run.add_argument("--minutes", type=int, default=240, help="time that a piece may take, for a scheduler (default: %(default)s)")
    run.add_argument("--profile", help="a Snakemake profile: slurm, or a folder (default: this machine)")
    run.add_argument("--dry-run", action="store_true", help="say what would be computed and about how long it would take")
    step = commands.add_parser("step", help="one piece of a run; Snakemake calls this")
    step.add_argument("stage", choices=("rankings", "properties", "edits"))
    step.add_argument("--out", type=Path, required=True, help="folder of the run")
    step.add_argument("--model", help="its name in settings.json")
    step.add_argument("--shard", type=int, help="which piece")


def run(args: argparse.Namespace) -> int:
    """`mmn replicate`: exit code 1 where some of the results are missing. Raises MmnError for bad input."""
    return _run(args) if args.what == "run" else _step(args)


# ---------------------------------------------------------------------------------------------------------------- settings


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a run is, as settings.json holds it. Raises MmnError for numbers that make no sense."""
    for name in ("count", "shards", "top_k", "batch", "jobs"):
        if getattr(args, name) < 1:
            raise MmnError(f"--{name.replace('_', '-')} is a whole number of at least 1, not {getattr(args, name)}.")
    if args.shards > args.count:
        raise MmnError(f"{args.count} pictures cannot be cut into {args.shards} shards: give fewer shards.")
    common = {"dtype": args.dtype, "device_map": args.device_map, "trust_remote_code": args.trust_remote_code}
    names = {re.sub(r"[^\w.-]+", "_", str(name)).strip("_."): name for name in args.models}
    if len(names) < len(args.models):
        raise MmnError("Two of the models have the same name: give each once.")
    images = str(Path(args.images).resolve()) if Path(args.images).exists() else args.images
    models = {slug: {"name": str(Path(name).resolve()) if Path(name).is_dir() else name, **common} for slug, name in names.items()}
    keys = ("count", "shards", "top_k", "prompt", "edits", "batch", "seed", "gpus", "mem_mb", "minutes")
    return {"models": models, "images": images, **{key: getattr(args, key) for key in keys}}


def kept(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run. Raises MmnError where the folder holds a run with others."""
    path = out / "settings.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in settings if settings[key] != old.get(key)]:
            raise MmnError(
                f"{out} holds a run with other settings ({', '.join(differing)}): give another folder, or its own settings."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise MmnError(f"{out} is not empty and holds no run: give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    put(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of a run. Raises MmnError where the folder holds none."""
    path = out / "settings.json"
    if not path.exists():
        raise MmnError(f"{out} holds no run (no settings.json): start one with `mmn replicate run --out {out}`.")
    return json.loads(path.read_text(encoding="utf-8"))


def csv(frame: pd.DataFrame) -> str:
    """A table as text, the same on every machine."""
    return frame.to_csv(index=False, lineterminator="\n")


# --------------------------------------------------------------------------------------------------------------- one piece


def pictures_of(settings: dict[str, Any], shard: int | None = None) -> list[Picture]:
    """All pictures of a run in their order, or those of one shard: every `shards`-th, so that shards are alike."""
    from mmn import sources

    found = sources.load(settings["images"], settings["count"], settings["seed"])
    return found if shard is None else found[shard :: settings["shards"]]


def load(settings: dict[str, Any], model: str) -> VLM:
    """A model of the run, by its name in the settings. Raises MmnError if there is none."""
    import mmn

    if model not in settings["models"]:
        raise MmnError(f"The run has no model {model!r}, only {', '.join(settings['models'])}.")
    options = dict(settings["models"][model])
    return mmn.load(options.pop("name"), **options)


def _step(args: argparse.Namespace) -> int:
    import pandas as pd

    from mmn import stages

    settings = read_settings(args.out)
    folder = args.out / "parts" / args.model
    suffix = "" if args.shard is None else f"-{args.shard}"
    started = time.perf_counter()
    vlm = load(settings, args.model)
    pictures = pictures_of(settings, args.shard)
    common = {"prompt": settings["prompt"]}
    if args.stage == "rankings":
        found = stages.rankings(vlm, pictures, top_k=settings["top_k"], batch_size=settings["batch"], **common)
        about = {
            "hash": vlm.hash,
            "revision": getattr(vlm.model.config, "_commit_hash", None),
            "layers": len(vlm.anatomy.layers),
            "neurons": vlm.anatomy.total,
        }
        put(folder / f"model{suffix}.json", json.dumps(about) + "\n")
    elif args.stage == "properties":
        captions = pd.read_csv(folder / f"captions{suffix}.csv", keep_default_na=False)
        found = stages.properties_of(vlm, pictures, captions, top_k=settings["top_k"], seed=settings["seed"], **common)
    else:
        shards = [folder / f"captions-{shard}.csv" for shard in range(settings["shards"])]
        captions = pd.concat([pd.read_csv(path, keep_default_na=False) for path in shards], ignore_index=True)
        found = stages.edits(
            vlm, pictures, captions, count=settings["edits"], seed=settings["seed"], batch_size=settings["batch"], **common
        )
    problems = found.pop("problems")
    for name, frame in found.items():
        put(folder / f"{name}{suffix}.csv", csv(frame))
    put(folder / f"{args.stage}-problems{suffix}.csv", csv(problems))
    seconds = time.perf_counter() - started
    record = {"stage": args.stage, "model": args.model, "pictures": len(pictures), "seconds": round(seconds, 2)}
    put(args.out / "logs" / f"{args.model}-{args.stage}{suffix}.json", json.dumps(record) + "\n")
    return 0


# -------------------------------------------------------------------------------------------------------------- the tables


def gather(out: Path) -> dict[str, pd.DataFrame]:
    """Put the pieces of a run together: tables/*.csv, the column `model` in front, and tables.json. What is missing becomes a row of the
    table problems, with the last line of its log."""
    import pandas as pd

    from mmn import stages

    settings = read_settings(out)
    whole: dict[str, list[pd.DataFrame]] = {}
    models = {}
    for model in settings["models"]:
        parts: dict[str, list[pd.DataFrame]] = {}
        for name, frame, missing in _parts(out, settings, model):
            parts.setdefault(name, []).append(frame if missing is None else stages.table("problems", [missing]))
        merged = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
        for name in stages.COLUMNS:
            merged.setdefault(name, stages.table(name, []))
        about = [json.loads(path.read_text()) for path in sorted((out / "parts" / model).glob("model-*.json"))]
        if len({each["hash"] for each in about}) > 1:
            raise MmnError(f"The shards of {model} come from different weights: start the run again in another folder.")
        models[model] = settings["models"][model] | (about[0] if about else {})
        merged["summary"] = stages.summary(merged)
        for name, frame in merged.items():
            whole.setdefault(name, []).append(frame.assign(model=model)[["model", *frame.columns]])
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in whole.items()}
    record = {
        "settings": settings,
        "models": models,
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "units": stages.UNITS,
        "protocol": "this project's own: mmn.stages",
    }
    put(out / "tables" / "tables.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name in sorted(tables, key="summary".__eq__):  # last, so that it stands for all of them
        put(out / "tables" / f"{name}.csv", csv(tables[name]))
    return tables


def _parts(out: Path, settings: dict[str, Any], model: str) -> list[tuple[str, pd.DataFrame, dict[str, str] | None]]:
    """The pieces of one model: the table's name, the rows, and for a piece that is not there the row that says so."""
    import pandas as pd

    shards = [f"-{shard}" for shard in range(settings["shards"])]
    wanted = [("rankings", name, s) for name in ("captions", "rankings", "rankings-problems") for s in shards]
    wanted += [("properties", name, s) for name in ("properties", "properties-problems") for s in shards]
    wanted += [("edits", name, "") for name in ("edits", "edits-problems") if settings["edits"]]
    found: list[tuple[str, pd.DataFrame, dict[str, str] | None]] = []
    for stage, name, suffix in wanted:
        path = out / "parts" / model / f"{name}{suffix}.csv"
        table = "problems" if name.endswith("problems") else name
        if path.is_file():
            found.append(
                (table, pd.read_csv(path, keep_default_na=table not in ("captions", "problems"), dtype={"picture": str}), None)
            )
        elif table == "problems":  # one row for each piece that failed
            log = out / "logs" / f"{model}-{stage}{suffix}.log"
            lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            reason = lines[-1] if lines else "it was not run"
            piece = f"shard {suffix[1:]} is missing" if suffix else "all are missing"
            found.append((table, pd.DataFrame(), {"picture": "", "stage": stage, "problem": f"{piece}: {reason}"}))
    return found


def commit() -> str | None:
    """The commit of the checkout that this package is run from, if it is one; `+` where it was changed."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


# --------------------------------------------------------------------------------------------------------------- a whole run


def _run(args: argparse.Namespace) -> int:
    from filelock import FileLock, Timeout

    if find_spec("snakemake") is None:
        raise MmnError("`mmn replicate run` needs Snakemake: pip install 'mmn[cluster]'.")
    settings = settings_of(args)
    kept(args.out, settings)
    lock = FileLock(args.out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MmnError(f"Another run is at work in {args.out}: wait for it, or stop it.") from None
    with lock:
        for left in args.out.rglob(".*.part"):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        if args.dry_run:
            print(forecast(args.out, settings, args.jobs))
            return _snakemake(args, ["--dry-run", "--quiet", "rules"]).returncode
        code = _snakemake(args, ["--quiet", "all"] if args.profile is None else []).returncode
        tables = gather(args.out)
    problems = tables["problems"]
    for row in problems.itertuples():
        print(f"{row.model}, {row.stage}{f', {row.picture}' if row.picture else ''}: {row.problem}", file=sys.stderr)
    captions = len(tables["captions"])
    print(f"{captions} captions, {len(tables['properties'])} measures, {len(problems)} problems: {args.out / 'tables'}")
    return 1 if code or len(problems) else 0


def _snakemake(args: argparse.Namespace, more: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Snakemake on the graph, in the folder of the run. Locks are ours (they end with the process), and so is what counts as done: a
    file that is there is whole."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(GRAPH), "--directory", str(args.out)]
    command += ["--nolock", "--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", *more]
    if args.profile:
        own = PROFILES / args.profile
        command += ["--workflow-profile", str(own if own.is_dir() else args.profile)]
    else:
        command += ["--jobs", str(args.jobs), "--cores", str(args.jobs), "--resources", f"gpu={max(1, args.gpus) * args.jobs}"]
    return subprocess.run(command, check=False)


def forecast(out: Path, settings: dict[str, Any], jobs: int) -> str:
    """What is left of a run and about how long it will take, from the pieces that are done, or from two pictures of each model."""
    lines, total = [], 0.0
    for model in settings["models"]:
        done = [json.loads(path.read_text()) for path in (out / "logs").glob(f"{model}-*.json")]
        each = {}
        for stage in ("rankings", "properties"):
            some = [record for record in done if record["stage"] == stage and record["pictures"]]
            each[stage] = sum(r["seconds"] for r in some) / sum(r["pictures"] for r in some) if some else None
        source = "from pieces that are done"
        if None in each.values():
            each, source = _probe(settings, model), "from two pictures"
        left = 0.0
        for stage, seconds in each.items():
            finished = {record["shard"] for record in _finished(out, model, stage)}
            pictures = sum(
                len(range(shard, settings["count"], settings["shards"]))
                for shard in range(settings["shards"])
                if shard not in finished
            )
            left += pictures * (seconds or 0.0)
        lines.append(
            f"{model}: {sum(v or 0 for v in each.values()):.2f} s a picture ({source}), about {left / 60:.1f} minutes left"
        )
        total += left
    lines.append(f"together about {total / 60 / jobs:.1f} minutes with {jobs} at once, and the edits besides")
    return "\n".join(lines)


def _finished(out: Path, model: str, stage: str) -> list[dict[str, int]]:
    paths = (out / "parts" / model).glob(f"{stage}-problems-*.csv")
    return [{"shard": int(path.stem.rsplit("-", 1)[1])} for path in paths]


def _probe(settings: dict[str, Any], model: str) -> dict[str, float | None]:
    from mmn import stages

    vlm = load(settings, model)
    pictures = pictures_of(settings)[:2]
    started = time.perf_counter()
    ranked = stages.rankings(vlm, pictures, top_k=settings["top_k"], prompt=settings["prompt"])
    between = time.perf_counter()
    stages.properties_of(vlm, pictures, ranked["captions"], top_k=settings["top_k"], prompt=settings["prompt"])
    ended = time.perf_counter()
    return {"rankings": (between - started) / 2, "properties": (ended - between) / 2}
