"""`mmn doctor`: will the book run on this machine, and what is to be done if not?

Each check gives a `Finding`: `ok`; `note`, something that one can do without; or `fix`, without which the chapters do not run. The exit
code is 1 if anything is to be fixed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mmn.errors import MmnError
from mmn.paths import data_path

ROOT = Path(__file__).parent.parent
MEMORY, DISK = 2.0, 1.0  # GiB free that the chapters need at most, with room
PYTHONS = ("3.11", "3.12", "3.13")  # those of pyproject.toml, with which the tests run
LETTERS = "ΔΣσ·×≥–"  # what the figures write beside ASCII


class Finding(NamedTuple):
    """One check. state: ok, note or fix; what: what was looked at; found: what is there; todo: what to do, empty if ok."""

    state: str
    what: str
    found: str
    todo: str = ""


def python() -> Iterator[Finding]:
    """Python itself; pip has seen to it that it is new enough."""
    version = platform.python_version()
    tested = version.rpartition(".")[0] in PYTHONS
    todo = "" if tested else f"if something breaks, make the environment with Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    yield Finding("ok" if tested else "note", "Python", f"{version} on {platform.system()} {platform.machine()}", todo)


def packages() -> Iterator[Finding]:
    """What pyproject.toml asks for; and, in a checkout, whether the versions are those of constraints.txt."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    missing: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("mmn") or []:
        wanted = Requirement(line)
        group = next((g for g in ("book", "test", "real") if wanted.marker and wanted.marker.evaluate({"extra": g})), "")
        if wanted.marker and not group:
            continue  # other groups, other systems
        try:
            there = wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            there = False
        if not there:
            missing.setdefault(group, []).append(f"{wanted.name}{wanted.specifier}")
    for group, names in missing.items():
        if group:
            yield Finding("note", f"packages [{group}]", f"no {', '.join(names)}", f"pip install -e '.[{group}]'")
        else:
            yield Finding("fix", "packages", f"no {', '.join(names)}", "pip install -c constraints.txt -e .")
    if "" not in missing:
        yield Finding("ok", "packages", "all that the toolkit needs are here")
    pins = ROOT / "constraints.txt"
    if not pins.exists():
        return
    lines = [line.split("==") for line in pins.read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"]
    here = {str(canonicalize_name(each.metadata["Name"])): each.version for each in importlib.metadata.distributions()}
    near = {"torch", "transformers", "tokenizers", "numpy", "pandas", "matplotlib"}  # what outputs depend on
    other = [f"{n} {here[n]}, not {v}" for n, v in lines if n in near and n in here and here[n].split("+")[0] != v]
    if other:
        todo = "stored outputs may differ in the last digit; for the same ones: pip install -c constraints.txt -e ."
        yield Finding("note", "versions", "; ".join(other), todo)
    else:
        yield Finding("ok", "versions", "those of constraints.txt")


def device() -> Iterator[Finding]:
    """Processor and accelerator."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("ok" if cores > 1 else "note", "processor", f"{cores} cores", "" if cores > 1 else "chapters take twice as long")
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        yield Finding("ok", "GPU", f"{names}; for large checkpoints say device_map='auto'")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "MPS; for large checkpoints say device_map='mps'")
    elif torch.version.cuda:
        todo = "gigabytes for nothing; to save them install PyTorch's CPU build: see the page `Your machine`"
        yield Finding("note", "GPU", f"none, but PyTorch was built for CUDA {torch.version.cuda}", todo)
    else:
        yield Finding("ok", "GPU", "none, and none is needed for tiny-llava")


def room() -> Iterator[Finding]:
    """Memory and disk that are free, in GiB."""
    free = memory()
    if free is None:
        yield Finding("note", "memory", "cannot be told on this system", f"see that {MEMORY:.0f} GiB are free")
    elif free < MEMORY:
        yield Finding("fix", "memory", f"{free:.1f} GiB free", f"close programs until {MEMORY:.0f} GiB are free")
    else:
        yield Finding("ok", "memory", f"{free:.1f} GiB free")
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    todo = "" if disk > DISK else f"free {DISK:.0f} GiB, or work in another folder"
    yield Finding("note" if todo else "ok", "disk", f"{disk:.0f} GiB free here", todo)


def memory() -> float | None:
    """Memory that can still be used, in GiB; None where the system does not tell."""
    try:
        import psutil  # comes with Jupyter

        return psutil.virtual_memory().available / 2**30
    except ImportError:
        names = getattr(os, "sysconf_names", {})
        if not {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def model(name: str) -> Iterator[Finding]:
    """Whether a model is there, fits into memory, and captions a scene."""
    import mmn
    from mmn import scenes

    if name == "tiny-llava":
        try:
            data_path(name)
        except MmnError as error:
            yield Finding("fix", "model", str(error), "clone the project again; `git status` says what is missing")
            return
    need, free = weights(name), memory()
    if need is not None and free is not None and need > free:
        todo = "use fewer bits (dtype='bfloat16', or quantised), a GPU (device_map='auto'), or a smaller model"
        yield Finding("fix", "model", f"{name} needs {need:.1f} GiB in float32, {free:.1f} are free", todo)
        return
    try:
        vlm = mmn.load(name)
        trace = vlm.caption(scenes.draw(0).image)
    except MmnError as error:
        yield Finding("fix", "model", str(error), "see the page `Bring your own model`")
        return
    yield Finding("ok", "model", f"{vlm.name} {vlm.hash} says {trace.text!r}")


def weights(name: str) -> float | None:
    """GiB of a model's weights in float32, from its configuration alone; None where that cannot be had."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        folder = data_path(name) if name == "tiny-llava" else name
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            shapes = AutoModelForImageTextToText.from_config(config)
        return sum(each.numel() for each in shapes.parameters()) * 4 / 2**30
    except Exception:  # an odd model: `model` says what is wrong with it
        return None


def fonts() -> Iterator[Finding]:
    """Whether the font of the figures has the letters that they use."""
    from matplotlib import font_manager, ft2font, rcParams

    file = font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))
    lacks = [letter for letter in LETTERS if ord(letter) not in ft2font.FT2Font(file).get_charmap()]
    todo = "remove the font from matplotlibrc, or install DejaVu Sans" if lacks else ""
    found = Path(file).stem + (f" lacks {' '.join(lacks)}" if lacks else "")
    yield Finding("note" if lacks else "ok", "font of figures", found, todo)


def browser() -> Iterator[Finding]:
    """Chromium, with which the tests look at the built pages."""
    lacks = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    todo = "needed for the tests of the pages alone; Debian and Ubuntu: apt install chromium chromium-driver" if lacks else ""
    yield Finding("note" if lacks else "ok", "chromium", f"no {' and no '.join(lacks)}" if lacks else "here", todo)


def examine(name: str = "tiny-llava") -> list[Finding]:
    """All findings; a check that breaks is one, too. Without the packages the checks that need them are left out."""
    findings = [*python(), *packages()]
    if any(each.state == "fix" for each in findings):
        return findings
    rest: dict[str, Callable[[], Iterator[Finding]]] = {
        "device": device, "room": room, "model": lambda: model(name), "fonts": fonts, "browser": browser,
    }  # fmt: skip
    for what, check in rest.items():
        try:
            findings += check()
        except Exception as error:  # a doctor who faints helps nobody
            found = f"the check broke: {type(error).__name__}: {error}"
            todo = "look at the checkpoint's files, or take another" if what == "model" else "install the packages again"
            findings.append(Finding("fix", what, found, todo))
    return findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn doctor`."""
    parser.add_argument(
        "--model", default="tiny-llava", help="also look at this one: a folder or a Hugging Face name (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """`mmn doctor`; 1 if anything is to be fixed."""
    findings = examine(args.model)
    if args.json:
        print(json.dumps([each._asdict() for each in findings], indent=2, ensure_ascii=False))
    else:
        for each in findings:
            print(f"{each.state:4}  {each.what}: {each.found}" + (f"\n      -> {each.todo}" if each.todo else ""))
    bad = sum(each.state == "fix" for each in findings)
    if not args.json:
        print(f"{bad} to be fixed" if bad else "The book will run here.")
    return min(bad, 1)
