"""A pytest plugin (pyproject.toml loads it): nbval compares the numbers of stored outputs as numbers, by the rule of mmn.agreement.

A cell states another tolerance than the default as `"tolerance": 0.02` in its metadata."""

from __future__ import annotations

from typing import Any

from mmn.agreement import Printed


def pytest_configure() -> None:
    """nbval cleans each text by `sanitize`, then asks whether stored and fresh differ: what it gets there knows numbers."""
    from nbval.plugin import IPyNbCell

    clean = IPyNbCell.sanitize

    def sanitize(cell: IPyNbCell, text: Any) -> Any:
        cleaned = clean(cell, text)
        return Printed(cleaned, cell.cell.metadata.get("tolerance")) if isinstance(cleaned, str) else cleaned

    IPyNbCell.sanitize = sanitize
