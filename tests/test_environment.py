"""pyproject.toml, constraints.txt and environment.yml say the same, and none of them names a machine; and what `make`
installs where."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mmn.doctor import PYTHONS

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch-cpu": "torch"}  # conda-forge's name -> PyPI's


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def required(groups: tuple[str, ...] = ("book", "test", "real", "nouns", "others")) -> list[Requirement]:
    lines = list(project()["dependencies"])
    for group in groups:
        lines += project()["optional-dependencies"][group]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    """Name -> version of every line of constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def conda() -> tuple[dict[str, str], list[str]]:
    """PyPI name -> version of every line of environment.yml, and the lines that pin nothing."""
    found, other = {}, []
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    for line in [*(x for x in lines if isinstance(x, str)), *next(x["pip"] for x in lines if isinstance(x, dict))]:
        name, _, version = re.sub("=+", "=", line).partition("=")
        if version:
            found[canonicalize_name(CONDA_NAMES.get(name, name))] = version
        else:
            other.append(name)
    return found, other


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt lacks {requirement.name}"
    assert requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("requirement", required(("book", "test")), ids=str)
def test_conda_has_every_requirement_at_the_pinned_version(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert conda()[0].get(name) == pins()[name]


def test_conda_names_nothing_else() -> None:
    found, other = conda()
    assert SpecifierSet(project()["requires-python"]).contains(version := found.pop("python")) and version in PYTHONS
    assert set(found) == {canonicalize_name(r.name) for r in required(("book", "test"))}
    assert other == ["pip", "spacy-model-en_core_web_sm", "."]


def test_pins_are_exact_and_name_no_machine() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    # no local version, path, flag or address
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert pins()["torch"] == "2.13.0"  # what the Makefile greps for
    assert not re.search(r"https?://|--|/\w+/", (ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_all_name_the_same_pythons() -> None:
    head = "Programming Language :: Python :: "
    assert [line.removeprefix(head) for line in project()["classifiers"] if line.startswith(head)] == list(PYTHONS)
    assert project()["requires-python"] == f">={PYTHONS[0]}"
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    for job in ("linux", "systems"):
        assert jobs[job]["strategy"]["matrix"]["python"] == list(PYTHONS)
    words = f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    for name in ("README.md", "book/machines.md", "Makefile"):
        assert words in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_requirements_need_in_turn_is_pinned(python: str) -> None:
    """By the metadata of what is installed, as each Python reads it; what only CUDA's build of torch needs is left out."""
    todo, seen = required(("book", "test")), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen or name == "triton" or name.startswith(("nvidia-", "cuda-")):
                continue
            seen.add((name, extra))
            assert requirement.specifier.contains(pins().get(name, "0.dev0"), prereleases=True), f"{requirement} has no pin"
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # of another Python or system
            here = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            here |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
            todo += [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(here)]


STUB = """#!/bin/sh
# A Python of version {version}: answers -c as that one would, logs what it is told, makes a .venv with itself in it.
case "$1 $2" in
-c*) exec {real} -c 'import sys; sys.version_info = ({major}, {minor}, 0); exec(sys.argv[1])' "$2" ;;
"-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip; echo "venv by ${{0##*/}}" >> log ;;
*) echo "$@" >> log; case "$*" in *{fails}*) exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that `make .venv/ready` reads, and in bin/ the few programs that it calls; no Python."""
    if os.name == "nt" or not shutil.which("make"):
        pytest.skip("make is not here")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("cp", "find", "grep", "ls", "make", "mkdir", "touch"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    program(tmp_path / "bin/uname", "#!/bin/sh\necho Linux\n")
    return tmp_path


def program(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)


def stub(file: Path, version: str, fails: str = "no such word") -> None:
    """Put a stand-in for Python there, which fails where its arguments have the word `fails`."""
    major, minor = version.split(".")
    real = sys.executable
    program(file, STUB.format(version=version, major=major, minor=minor, real=real, fails=f'"{fails}"'))


def make(checkout: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """`make .venv/ready`: exit code, what it said, and the calls of Python."""
    done = subprocess.run(
        ["make", ".venv/ready", *arguments], cwd=checkout, env={"PATH": str(checkout / "bin")}, capture_output=True, text=True
    )
    log = checkout / "log"
    return done.returncode, done.stdout + done.stderr, log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.mark.parametrize("name", [*(f"python{version}" for version in PYTHONS), "python3"])
def test_make_takes_any_of_the_pythons(checkout: Path, name: str) -> None:
    stub(checkout / "bin" / name, name.removeprefix("python") if "." in name else PYTHONS[-1])
    code, said, calls = make(checkout)
    assert code == 0 and calls[0] == f"venv by {name}", said
    assert (checkout / ".venv/ready").exists() and calls[-1].endswith("-c constraints.txt -e .[book,test]")


def test_make_passes_over_a_python_of_another_version_or_that_does_not_start(checkout: Path) -> None:
    program(checkout / "bin/python3.11", "#!/bin/sh\nexit 127\n")  # as pyenv leaves one where another is chosen
    stub(checkout / "bin/python3", "3.9")
    code, said, calls = make(checkout)
    assert code != 0 and not calls and not (checkout / ".venv").exists()
    assert "make needs Python 3.11, 3.12 or 3.13" in said and "PYTHON=/path/to/python" in said
    stub(checkout / "bin/python3.12", "3.12")
    assert make(checkout)[2][0] == "venv by python3.12"


def test_make_takes_the_python_that_it_is_told(checkout: Path) -> None:
    stub(checkout / "bin/python3.11", "3.11")
    stub(checkout / "mine", "3.13")
    stub(checkout / "old", "3.10")
    code, said, calls = make(checkout, f"PYTHON={checkout / 'old'}")
    assert code != 0 and not calls and f"found none as: {checkout / 'old'}" in said
    assert make(checkout, f"PYTHON={checkout / 'mine'}")[2][0] == "venv by mine"


cpu = pytest.mark.skipif(bool(glob.glob("/dev/nvidia*")), reason="a machine with an NVIDIA GPU")


@cpu
def test_without_a_gpu_make_takes_the_cpu_build_first(checkout: Path) -> None:
    stub(checkout / "bin/python3", PYTHONS[0])
    code, said, (_, first, last) = make(checkout)
    assert code == 0 and "https://download.pytorch.org/whl/cpu" in first and first.endswith(f" torch=={pins()['torch']}")
    assert "index-url" not in last and "cannot be had" not in said


@cpu
def test_where_the_cpu_build_cannot_be_had_make_says_so_and_goes_on(checkout: Path) -> None:
    stub(checkout / "bin/python3", PYTHONS[0], fails="download.pytorch.org")
    code, said, calls = make(checkout)
    assert code == 0 and (checkout / ".venv/ready").exists() and len(calls) == 3
    assert said.count("CPU build cannot be had") == 1


@pytest.mark.parametrize("there", ["uname", "nvidia-smi"])
def test_on_macos_and_with_a_gpu_make_takes_what_pip_gives(checkout: Path, there: str) -> None:
    stub(checkout / "bin/python3", PYTHONS[0])
    program(checkout / "bin" / there, "#!/bin/sh\necho Darwin\n")
    code, _, calls = make(checkout)
    assert code == 0 and len(calls) == 2 and "torch" not in calls[1]


def test_an_environment_that_is_there_stays(checkout: Path) -> None:
    stub(checkout / "bin/python3.12", "3.12")
    make(checkout)
    stub(checkout / "bin/python3.11", "3.11")
    (checkout / ".venv/ready").unlink()
    assert [call for call in make(checkout)[2] if call.startswith("venv")] == ["venv by python3.12"]


def test_an_environment_without_pip_is_made_again(checkout: Path) -> None:
    """What `python3 -m venv` leaves on Debian and Ubuntu where their package python3-venv is missing."""
    stub(checkout / "bin/python3.12", "3.12")
    (checkout / ".venv/bin").mkdir(parents=True)
    stub(checkout / ".venv/bin/python", "3.12")
    assert make(checkout)[2][0] == "venv by python3.12"
