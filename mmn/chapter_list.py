"""`mmn list`: the chapters and their parameters."""

from __future__ import annotations

import argparse

from mmn import chapters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`mmn list` has no options."""


def run(args: argparse.Namespace) -> int:
    """`mmn list`. Raises MmnError where there are no chapters beside the package."""
    print(chapters.listing(chapters.chapters().values()))
    return 0
