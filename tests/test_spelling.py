"""Common misspellings, with codespell: the pages, the chapters' own words (not their outputs), code and docstrings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent


def codespell(*paths: Path) -> str:
    """What codespell finds; '' if nothing."""
    words = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), *map(str, paths)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def chapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chapters")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        (folder / f"{path.stem}.md").write_text("\n\n".join(cell.source for cell in cells), encoding="utf-8")
    return folder


def test_spelling(chapters: Path) -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "book").glob("*.md"), ROOT / "book" / "_map.html"]
    assert codespell(chapters, *pages, ROOT / "mmn", ROOT / "tests", ROOT / "data" / "README.md") == ""


def test_a_misspelling_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Some neurons " + "recie" + "ve more than others.", encoding="utf-8")
    assert "receive" in codespell(tmp_path)
