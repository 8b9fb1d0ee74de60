"""Words of the command line that are refused, in one sentence, before anything slow begins."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number of at least `least`."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"a whole number of at least {least} is wanted, not {text!r}")
        return value

    return whole


def a_path(text: str) -> Path:
    """The `type` of an argument that is a path: not nothing, as `"$UNSET"` gives, which pathlib takes for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a path is wanted, not nothing: leave the option out, or give one")
    return Path(text)
