"""Where the data that comes with the package is: beside it in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from mmn.errors import MmnError


def data_path(name: str) -> Path:
    """The folder or file `name` of the shipped data. Raises MmnError if it is not there."""
    package = Path(__file__).parent
    for root in (package.parent / "data", package / "_data"):
        if (root / name).exists():
            return root / name
    raise MmnError(f"The shipped data has no {name!r}; install the package again, or make it as data/README.md says.")
