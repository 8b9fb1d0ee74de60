"""The pieces of a run of `mmn replicate`, and how they are put together. Layout of the run's folder:

    settings.json   what was asked for                machine.json  how it is run now: memory, cores, batch, device
    pictures.csv    which pictures, with checksums    logs/         what each piece said, how long it took, and, while it is
                                                                    at work, how far it is (NAME.now)
    dead.csv        addresses that gave none
    parts/          the pieces, by model and shard    tables/       all models together; tables.json says what they are

Every file is written whole or not at all, and none of the tables tells when it was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from csv import QUOTE_NONNUMERIC
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmn.errors import MmnError
from mmn.paths import put

if TYPE_CHECKING:
    import pandas as pd

    from mmn.sources import Picture
    from mmn.stages import Report
    from mmn.vlm import VLM

DEAD = "fetch"  # what the table problems names as the stage of a dead address
PACKAGES = ("mmn", "torch", "transformers", "tokenizers", "numpy", "pandas", "pillow")
FILES = {  # of each stage; `{}` is the shard
    "rankings": ("captions{}.csv", "rankings{}.csv", "rankings-problems{}.csv", "model{}.json"),
    "properties": ("properties{}.csv", "properties-problems{}.csv"),
    "edits": ("edits.csv", "edits-problems.csv"),
}
NUMBERS = {name: ["", "nan"] for name in ("value", "logp", "activation", "contribution")}  # where an empty cell is no number


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of a run. Raises MmnError where the folder holds none."""
    path = out / "settings.json"
    if not path.exists():
        raise MmnError(f"{out} holds no run (no settings.json): start one with `mmn replicate run --out {out}`.")
    return json.loads(path.read_text(encoding="utf-8"))


def commit() -> str | None:
    """The commit of the checkout that this package is run from, if it is one; `+` where it was changed."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    if (
        shutil.which("git") is None or not (Path(__file__).parent.parent / ".git").exists()
    ):  # git would climb on, to another project
        return None
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def csv(frame: pd.DataFrame) -> str:
    """A table as text, the same on every machine. Where a text holds a carriage return, which readers take for the end of a row unless it
    is quoted, all texts are quoted."""
    text = frame.to_csv(index=False, lineterminator="\n")
    return frame.to_csv(index=False, lineterminator="\n", quoting=QUOTE_NONNUMERIC) if "\r" in text else text


# ---------------------------------------------------------------------------------------------------------------- pictures


def pin(settings: dict[str, Any]) -> pd.DataFrame:
    """Which pictures a run is of: columns picture, sha256 (empty for drawn ones). Raises MmnError for a source without pictures."""
    import pandas as pd

    from mmn import sources

    found = sources.load(settings["images"], settings["count"], settings["seed"])
    return pd.DataFrame([(each.id, _checksum(each)) for each in found], columns=["picture", "sha256"])


def _checksum(picture: Picture) -> str:
    try:
        if picture.path is not None and picture.path.is_file():
            with picture.path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:  # what is not there or may not be read is told when it is opened
        pass
    return ""


def pictures_of(out: Path, settings: dict[str, Any], shard: int | None = None) -> list[Picture]:
    """All pictures of a run in their order, or those of one shard: every `shards`-th, so that shards are alike.

    Raises MmnError where they are not those that the run began with."""
    return shard_of(out, settings, shard)[0]


def shard_of(out: Path, settings: dict[str, Any], shard: int | None) -> tuple[list[Picture], list[Picture]]:
    """`pictures_of`, and the pictures of all shards, which are not looked into but for their being there."""
    import pandas as pd

    from mmn import sources

    pinned = pd.read_csv(out / "pictures.csv", keep_default_na=False, dtype=str)
    most = settings["count"] if settings["images"] == "scenes" else sys.maxsize
    known = {each.id: each for each in sources.load(sources.undivided(settings["images"]), most, settings["seed"])}
    wanted = list(pinned.itertuples())[slice(shard, None, settings["shards"]) if shard is not None else slice(None)]
    other = [row.picture for row in wanted if row.picture not in known or _checksum(known[row.picture]) != row.sha256]
    if other:
        raise MmnError(f"{len(other)} pictures are not as they were when the run began, such as {other[0]}: put them back.")
    return [known[row.picture] for row in wanted], [known[name] for name in pinned["picture"] if name in known]


# --------------------------------------------------------------------------------------------------------------- one piece


def load(settings: dict[str, Any], model: str, device_map: str | None = None) -> VLM:
    """A model of the run, by its name in the settings; drawn scenes have words of their own. Raises MmnError if there is none."""
    import mmn
    from mmn.nouns import scene_nouns

    if model not in settings["models"]:
        raise MmnError(f"The run has no model {model!r}, only {', '.join(settings['models'])}.")
    options = dict(settings["models"][model])
    lexicon = scene_nouns if settings["images"] == "scenes" else None
    return mmn.load(options.pop("name"), device_map=device_map, lexicon=lexicon, **options)


def own_gpus(out: Path, machine: dict[str, Any]) -> Any:
    """Leave this process the GPUs of one place among `jobs` on this machine, by CUDA_VISIBLE_DEVICES, and give the lock that holds the
    place as long as it lives. None where pieces are not run beside each other on GPUs."""
    from filelock import FileLock, Timeout

    if machine["jobs"] == 1 or not machine["gpus"] or machine["profile"]:
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(number) for number in range(machine["jobs"] * machine["gpus"])]
    for place in range(len(gpus) // machine["gpus"]):
        lock = FileLock(out / f".gpu-{place}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * machine["gpus"] : (place + 1) * machine["gpus"]])
        return lock
    raise MmnError(
        f"{machine['jobs']} pieces at once with {machine['gpus']} GPUs each are more than {len(gpus)} GPUs: give fewer --jobs."
    )


def step(out: Path, stage: str, model: str | None, shard: int | None) -> None:
    """Compute one piece and write its files, and how long it took. Raises MmnError for a piece that the run does not have."""
    settings = read_settings(out)
    if model is None or model not in settings["models"] or (shard is None) != (stage == "edits"):
        raise MmnError(
            f"A piece is a stage and --model, one of {', '.join(settings['models'])}; all but edits have a --shard, too."
        )
    if shard is not None and not 0 <= shard < settings["shards"]:
        raise MmnError(f"--shard is a number from 0 to {settings['shards'] - 1}, not {shard}.")
    machine = json.loads((out / "machine.json").read_text(encoding="utf-8"))
    place = own_gpus(out, machine)  # before torch is there; held to the end
    started = time.perf_counter()
    pictures, every = shard_of(out, settings, shard)
    suffix = "" if shard is None else f"-{shard}"
    now = out / "logs" / f"{model}-{stage}{suffix}.now"
    report = _noted(now)
    report(0, 0)  # it has begun
    try:
        _compute(out, settings, machine, stage, model, shard, pictures, every, report)
        seconds = round(time.perf_counter() - started, 2)
        record = {"stage": stage, "model": model, "shard": shard, "pictures": len(pictures), "seconds": seconds}
        put(now.with_suffix(".json"), json.dumps(record) + "\n")
    finally:
        now.unlink(missing_ok=True)
    if place is not None:
        place.release()


def _noted(path: Path) -> Report:
    """A report that writes how far a piece is, once a second at most, and lets a full disk be told by what is worth more."""
    told = -inf

    def report(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            with suppress(MmnError):
                put(path, json.dumps([done, of]) + "\n")

    return report


def _compute(
    out: Path, settings: dict[str, Any], machine: dict[str, Any], stage: str, model: str, shard: int | None, pictures: list[Picture],
    every: list[Picture], report: Report,
) -> None:  # fmt: skip
    import pandas as pd

    from mmn import stages

    folder = out / "parts" / model
    vlm = load(settings, model, machine["device_map"])
    if stage != "rankings" and {json.loads(path.read_text())["hash"] for path in folder.glob("model-*.json")} != {vlm.hash}:
        raise MmnError(f"The weights of {model} are not those that wrote its captions: start the run again in another folder.")
    common = {"prompt": settings["prompt"], "batch_size": machine["batch"], "report": report}
    if stage == "rankings":
        found = stages.rankings(vlm, pictures, top_k=settings["top_k"], **common)
        put(folder / f"model-{shard}.json", json.dumps(about(vlm), sort_keys=True) + "\n")
    elif stage == "properties":
        captions = read(folder / f"captions-{shard}.csv")
        found = stages.properties_of(
            vlm,
            pictures,
            captions,
            every=every,
            top_k=settings["top_k"],
            seed=settings["seed"],
            **common,
        )
    else:
        captions = pd.concat([read(folder / f"captions-{n}.csv") for n in range(settings["shards"])], ignore_index=True)
        found = stages.edits(vlm, pictures, captions, count=settings["edits"], seed=settings["seed"], **common)
    suffix = "" if shard is None else f"-{shard}"
    problems = found.pop("problems")
    for name, frame in found.items():
        put(folder / f"{name}{suffix}.csv", csv(frame))
    put(folder / f"{stage}-problems{suffix}.csv", csv(problems))


def about(vlm: VLM) -> dict[str, Any]:
    """What computed a piece: the model's weights and size, how nouns are found, device, versions, commit."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    lexicon = getattr(vlm.lexicon, "__name__", type(vlm.lexicon).__name__)  # a partial and an object that is called have no name
    if lexicon == "tagged_nouns":
        versions["spacy"] = version("spacy")
    return {
        "hash": vlm.hash,
        "revision": getattr(vlm.model.config, "_commit_hash", None),
        "layers": len(vlm.anatomy.layers),
        "neurons": vlm.anatomy.total,
        "nouns by": lexicon,
        "device": vlm.anatomy.device.type,
        "versions": versions,
        "commit": commit(),
    }


def read(path: Path) -> pd.DataFrame:
    """A table of text and numbers. A noun may be "nan" or "null": only in columns of numbers does an empty cell mean that there is none."""
    import pandas as pd

    return pd.read_csv(path, keep_default_na=False, na_values=NUMBERS, dtype={"picture": str})


# -------------------------------------------------------------------------------------------------------------- the tables


def gathered(out: Path) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The pieces of a run put together: tables with the column `model` in front, and what tables.json says of them. What is missing is a
    row of the table problems, with the last line of its log.

    Raises MmnError where the shards of a model were computed with different weights."""
    import pandas as pd

    from mmn import stages

    settings = read_settings(out)
    whole: dict[str, list[pd.DataFrame]] = {}
    models = {}
    for model in settings["models"]:
        parts = {name: [stages.table(name, [])] for name in stages.COLUMNS}
        for stage, suffix in pieces_of(settings):
            paths = [out / "parts" / model / name.format(suffix) for name in FILES[stage]]
            if all(path.is_file() for path in paths):
                for path in paths:
                    name = path.name.removesuffix(f"{suffix}.csv")
                    if path.suffix == ".csv":
                        parts["problems" if name.endswith("problems") else name].append(read(path))
            else:
                parts["problems"].append(stages.table("problems", [_missing(out, model, stage, suffix)]))
        computed = [json.loads(path.read_text()) for path in sorted((out / "parts" / model).glob("model-*.json"))]
        if len({each["hash"] for each in computed}) > 1:
            raise MmnError(f"The shards of {model} come from different weights: start the run again in another folder.")
        models[model] = settings["models"][model] | (computed[0] if computed else {})
        if any(each != computed[0] for each in computed):
            told = {"picture": "", "stage": "rankings", "kind": "note", "problem": "the shards were computed by different software"}
            parts["problems"].append(stages.table("problems", [told]))
        merged = {name: _joined(frames) for name, frames in parts.items()}
        merged["summary"] = stages.summary(merged)
        for name, frame in merged.items():
            whole.setdefault(name, []).append(frame.assign(model=model)[["model", *frame.columns]])
    tables = {name: _joined(frames) for name, frames in whole.items()}
    if (out / "dead.csv").exists():
        dead = read(out / "dead.csv")
        rows = {"model": "", "picture": dead["url"], "stage": DEAD, "kind": "note", "problem": "dead address: " + dead["reason"]}
        tables["problems"] = _joined([tables["problems"], pd.DataFrame(rows)])
    pictures = (out / "pictures.csv").read_bytes()
    found = pd.read_csv(out / "pictures.csv", keep_default_na=False)  # a name may hold the end of a line
    record = {
        "settings": settings,
        "pictures": {"found": len(found), "sha256": hashlib.sha256(pictures).hexdigest()},
        "models": models,
        "units": stages.UNITS,
        "protocol": "this project's own: mmn.stages",
    }
    return tables, record


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    some = [frame for frame in frames if len(frame)] or frames[:1]
    return pd.concat(some, ignore_index=True)


def pieces_of(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """The pieces of each model: stage and the end of its files' names."""
    shards = [(stage, f"-{shard}") for stage in ("rankings", "properties") for shard in range(settings["shards"])]
    return shards + ([("edits", "")] if settings["edits"] else [])


def _missing(out: Path, model: str, stage: str, suffix: str) -> dict[str, str]:
    log = out / "logs" / f"{model}-{stage}{suffix}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    reason = (
        lines[-1] if lines else "it left no word (a full disk, or refused by the scheduler?)" if log.exists() else "it was not run"
    )
    piece = f"shard {suffix[1:]} is missing" if suffix else "all are missing"
    return {"picture": "", "stage": stage, "kind": "missing", "problem": f"{piece}: {reason}"}


def write(out: Path, tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> None:
    """Write the tables of a run. Raises MmnError where they cannot be written."""
    for name, frame in tables.items():
        put(out / "tables" / f"{name}.csv", csv(frame))
    put(out / "tables" / "tables.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")  # last: it says that all are there
