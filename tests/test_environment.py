"""pyproject.toml, constraints.txt and environment.yml say the same, and none of them names a machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

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
    assert SpecifierSet(project()["requires-python"]).contains(found.pop("python"))
    assert set(found) == {canonicalize_name(r.name) for r in required(("book", "test"))}
    assert other == ["pip", "spacy-model-en_core_web_sm", "."]


def test_pins_are_exact_and_name_no_machine() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    # no local version, path, flag or address
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert pins()["torch"] == "2.13.0"
    assert not re.search(r"https?://|--|/\w+/", (ROOT / "environment.yml").read_text(encoding="utf-8"))
