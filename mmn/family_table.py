"""`mmn families`: the table of the model families that were tried, and what was found.

It is kept in data/results/families.csv, so that it can be shown at once; `mmn.families` makes its rows, which takes a minute:

    mmn families                       prints it
    mmn families llava gemma3          tries these now
    mmn families --check               tries all again, and says what differs from the table
    mmn families --out data/results    tries all, and makes the table anew"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from mmn.arguments import a_path
from mmn.bars import tqdm
from mmn.errors import MmnError
from mmn.paths import data_path, put

COLUMNS = {
    "family": "the model_type of its configuration",
    "conforms": "whether every check held",
    "neurons": "how many the tiny model has",
    "image_tokens": "positions that hold the picture; 0 for a model that sees by cross-attention",
    "held": "names of the checks that held",
    "failed": "names of the checks that did not",
    "reason": "why it does not conform",
}


@dataclass
class Row:
    """How one family fared. conforms: every check held. reason: why not, in a line. checks: name to whether it held. image_tokens:
    positions that hold the picture, 0 for a model that sees by cross-attention."""

    family: str
    conforms: bool = False
    reason: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    neurons: int = 0
    image_tokens: int = 0

    def cells(self) -> dict[str, str]:
        """As the table holds it, by column."""
        held, failed = (" ".join(name for name, holds in self.checks.items() if holds is which) for which in (True, False))
        values = (
            self.family,
            "yes" if self.conforms else "no",
            str(self.neurons),
            str(self.image_tokens),
            held,
            failed,
            self.reason,
        )
        return dict(zip(COLUMNS, values, strict=True))

    @classmethod
    def of(cls, cells: dict[str, str]) -> Row:
        """A row from its cells."""
        checks = dict.fromkeys(cells["held"].split(), True) | dict.fromkeys(cells["failed"].split(), False)
        numbers = int(cells["neurons"]), int(cells["image_tokens"])
        return cls(cells["family"], cells["conforms"] == "yes", cells["reason"], checks, *numbers)


def stored() -> list[Row]:
    """The shipped table. Raises MmnError if it is not there."""
    with data_path("results/families.csv").open(encoding="utf-8", newline="") as file:
        return [Row.of(cells) for cells in csv.DictReader(file)]


def differences(fresh: Sequence[Row], old: Sequence[Row]) -> list[str]:
    """A sentence for each cell in which two tables differ, and for each family that only one of them has."""
    now, then = ({row.family: row.cells() for row in rows} for rows in (fresh, old))
    said = [f"{family}: not in the table." for family in now.keys() - then.keys()]
    said += [f"{family}: only in the table." for family in then.keys() - now.keys()]
    for family in now.keys() & then.keys():
        for column, was in then[family].items():
            if now[family][column] != was:
                said.append(f"{family}, {column}: {was!r} is stored, {now[family][column]!r} was found.")
    return sorted(said)


def text(rows: Sequence[Row]) -> str:
    """The rows as aligned lines."""
    lines = [f"{'family':<24}{'conforms':<10}{'neurons':>8}{'image':>7}  reason"]
    for row in rows:
        yes = "yes" if row.conforms else "no"
        lines.append(f"{row.family:<24}{yes:<10}{row.neurons:>8}{row.image_tokens:>7}  {row.reason}".rstrip())
    return "\n".join([*lines, f"{sum(row.conforms for row in rows)} of {len(rows)} families conform."])


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the table, and beside it what made it. Raises MmnError where it cannot be written."""
    file = io.StringIO()
    table = csv.DictWriter(file, tuple(COLUMNS), lineterminator="\n")
    table.writeheader()
    table.writerows(row.cells() for row in rows)
    versions = {name: version(name) for name in ("mmn", "torch", "transformers")}
    record = {"command": "mmn families --out data/results", "versions": versions, "columns": COLUMNS}
    put(folder / "families.csv", file.getvalue())
    put(folder / "families.json", json.dumps(record, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn families`."""
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="try these now (default: print the table of all)")
    parser.add_argument("--check", action="store_true", help="try them, or all, now, and say what differs from the table")
    parser.add_argument("--out", type=a_path, help="try all now, and write families.csv and families.json into this folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """`mmn families`: exit code 1 where a check found a difference. Raises MmnError for an unknown family."""
    if args.families and args.out:
        raise MmnError("The table is made of all families: leave the names or --out away.")
    if not (args.families or args.check or args.out):
        rows = stored()
        print(_json(rows) if args.json else text(rows))
        of = json.loads(data_path("results/families.json").read_text(encoding="utf-8"))["versions"]["transformers"]
        if of != (here := version("transformers")):
            print(f"Found with transformers {of}; {here} is installed: try it with `mmn families --check`.", file=sys.stderr)
        return 0
    from mmn import families  # imports torch and transformers, which takes seconds

    if unknown := set(args.families) - set(families.FAMILIES):
        raise MmnError(f"transformers has no family {min(unknown)!r} that writes text about pictures.")
    rows = [families.check(family) for family in tqdm(args.families or list(families.FAMILIES), desc="families", leave=False)]
    if args.out:
        write(rows, args.out)
        print(f"Written to {args.out}: families.csv, families.json")
    elif args.check:
        some = [row for row in stored() if not args.families or row.family in args.families]
        said = differences(rows, some)
        print("\n".join(said) or f"{len(rows)} families are as the table has them.")
        return min(len(said), 1)
    else:
        print(_json(rows) if args.json else text(rows))
    return 0


def _json(rows: Sequence[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)
