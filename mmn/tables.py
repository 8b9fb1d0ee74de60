"""Slow tables: what takes minutes to hours is made by a command, kept small in data/results/, shown by the chapters, and rechecked.

A table is a function `(vlm, key) -> rows` with the list of its keys (a scene, a noun, a pair of concepts, ...), so that a run can go on
where it stopped and any part of it can be computed again. `mmn tables NAME` writes `data/results/NAME.csv`, the rows, and `NAME.json`:
the command, settings, versions and the model's hash. A table of another model (another seed, end to end, untrained) has a label:
`NAME.LABEL.csv`.

    @table("flips", keys=range(200), columns={"gone": "the caption no longer names it"})
    def flips(vlm, key): return [{"scene": key, "noun": "dog", "gone": True}]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mmn.agreement import column_tolerance, same_cell
from mmn.arguments import a_path
from mmn.bars import tqdm
from mmn.errors import MmnError, whole_number
from mmn.paths import data_path, put

if TYPE_CHECKING:
    from mmn.vlm import VLM

Row = dict[str, Any]
Rows = Callable[["VLM", Any], list[Row]]

# The modules whose import registers tables.
MODULES: tuple[str, ...] = ("mmn.oracle_tables", "mmn.property_tables", "mmn.edit_tables")


@dataclass(frozen=True)
class Table:
    """A slow table: its name, its keys (anything JSON can write), the function of one key, what its columns mean, with units, and the
    tolerance of columns whose default (see mmn.agreement) another processor's rounding exceeds, such as ranks."""

    name: str
    keys: tuple[Any, ...]
    rows: Rows
    columns: dict[str, str]
    tolerance: dict[str, float]

    def of(self, vlm: VLM, key: Any) -> list[Row]:
        """The rows of one key, each with its number among the keys, `key`, in front."""
        return [{"key": self.keys.index(key), **row} for row in self.rows(vlm, key)]


_TABLES: dict[str, Table] = {}


def table(
    name: str, keys: Iterable[Any], columns: dict[str, str], tolerance: dict[str, float] | None = None
) -> Callable[[Rows], Rows]:
    """Register the decorated function as the table `name`, one call a key; `columns`: name to meaning, with units; `tolerance`: of
    columns that jump where two values are nearly equal, such as ranks, the difference that counts as none."""

    def register(rows: Rows) -> Rows:
        _TABLES[name] = Table(name, tuple(keys), rows, columns, tolerance or {})
        return rows

    return register


def tables() -> dict[str, Table]:
    """All tables by name."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(_TABLES)


def get(name: str) -> Table:
    """The table `name`. Raises MmnError if there is none."""
    found = tables()
    if name not in found:
        raise MmnError(f"There is no table {name!r}; there are: {', '.join(sorted(found)) or 'none'}.")
    return found[name]


def write(
    name: str, vlm: VLM, *, label: str = "", first: int | None = None, folder: Path | None = None, progress: bool = True
) -> pd.DataFrame:
    """Compute a table and keep it in `folder` (default data/results), going on where an interrupted run stopped.

    `first` computes this many keys only, for a comparison of models. What is done is kept in `NAME.part` until the table is whole; a part
    of another model's is thrown away."""
    chosen, folder = get(name), folder or data_path("results")
    if first is not None:
        whole_number("first", first)
        chosen = replace(chosen, keys=chosen.keys[:first])
    if not re.fullmatch(r"[\w-]*", label):
        raise MmnError(f"A label is letters, digits, _ and -, as part of a file's name, not {label!r}.")
    stem = _stem(name, label)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{stem}.part"
    done: dict[int, list[Row]] = {}
    if part.exists():
        for line in part.read_text(encoding="utf-8").splitlines():
            try:
                saved = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                break
            if saved["model_hash"] == vlm.hash and saved["keys"] == len(chosen.keys):
                done[saved["key"]] = saved["rows"]
    with part.open("w", encoding="utf-8") as handle:
        for number, key in enumerate(tqdm(chosen.keys, desc=stem, disable=not progress)):
            if number not in done:
                done[number] = chosen.of(vlm, key)
            entry = {"model_hash": vlm.hash, "keys": len(chosen.keys), "key": number, "rows": done[number]}
            handle.write(json.dumps(entry) + "\n")
            handle.flush()
    frame = pd.DataFrame([row for number in range(len(chosen.keys)) for row in done[number]])
    record = {
        "command": f"mmn tables {name}"
        + (f" --model {vlm.name} --label {label}" if label else "")
        + (f" --first {first}" if first is not None else ""),
        "model_hash": vlm.hash,
        "label": label,
        "keys": len(chosen.keys),
        "versions": {package: version(package) for package in ("mmn", "torch", "transformers", "numpy")},
        "columns": chosen.columns,
    }
    put(folder / f"{stem}.csv", frame.to_csv(index=False, float_format="%.6g"))
    put(folder / f"{stem}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    part.unlink()
    return frame


def read(name: str, vlm: VLM | None = None, *, label: str = "", folder: Path | None = None) -> pd.DataFrame:
    """A stored table. Raises MmnError if it was never made, or if it is another model's than `vlm`."""
    record = _record(name, label, folder)
    if vlm is not None and record["model_hash"] != vlm.hash:
        of = f"The table {_stem(name, label)!r} is of the model {record['model_hash']}, not of {vlm.hash}"
        raise MmnError(f"{of}, so it is not shown here; if the shipped model has changed, make it anew: `mmn tables {name}`.")
    return pd.read_csv((folder or data_path("results")) / f"{_stem(name, label)}.csv")


def _stem(name: str, label: str) -> str:
    return f"{name}.{label}" if label else name


def _record(name: str, label: str, folder: Path | None) -> dict[str, Any]:
    path = (folder or data_path("results")) / f"{_stem(name, label)}.json"
    if not path.exists():
        made = f"`mmn tables {name}{f' --label {label}' * bool(label)}`"
        raise MmnError(f"The slow table {path.stem!r} has not been made; make it with {made}.")
    return json.loads(path.read_text(encoding="utf-8"))


def labels(name: str, folder: Path | None = None) -> list[str]:
    """The labels under which a table is stored, the shipped model's ("") first."""
    folder = folder or data_path("results")
    found = [json.loads(path.read_text(encoding="utf-8"))["label"] for path in folder.glob(f"{name}*.json") if _is(path, name)]
    return sorted(found)


def _is(path: Path, name: str) -> bool:
    return path.stem == name or path.stem.startswith(f"{name}.")


def check(name: str, vlm: VLM, count: int, seed: int, folder: Path | None = None, label: str = "") -> list[str]:
    """Compute the rows of `count` keys again, chosen by `seed`, and return a sentence for each cell that differs from the stored one,
    and for each key with other columns. What equal means is in mmn.agreement; a column may state its own tolerance."""
    whole_number("check", count)
    chosen, stored = get(name), read(name, vlm, label=label, folder=folder)
    kept = _record(name, label, folder)["keys"]  # a table of another model may hold the first keys only
    numbers = pd.Series(range(kept)).sample(min(count, kept), random_state=seed)
    faults = []
    for number in sorted(numbers):
        fresh = pd.DataFrame(chosen.of(vlm, chosen.keys[number]))
        old = stored[stored["key"] == number].reset_index(drop=True)
        if len(fresh) != len(old):
            faults.append(f"{name}, key {number}: {len(old)} rows are stored, {len(fresh)} were computed.")
            continue
        if odd := sorted({*fresh.columns} ^ {*old.columns}):
            faults.append(f"{name}, key {number}: stored and computed columns differ in {', '.join(odd)}.")
            continue
        for column in fresh.columns:
            tolerance = chosen.tolerance.get(column, column_tolerance(stored[column]))
            for place, (before, now) in enumerate(zip(old[column], fresh[column], strict=True)):
                if not same_cell(before, now, tolerance):
                    faults.append(f"{name}, key {number}, row {place}, {column}: {before!r} is stored, {now!r} was computed.")
    return faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn tables`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables to make (default: all)")
    parser.add_argument("--model", default="tiny-llava", help="shipped model or checkpoint folder")
    parser.add_argument("--label", default="", help="keep the table as another model's, e.g. seed-1")
    parser.add_argument("--first", type=int, metavar="KEYS", help="only so many keys, for a comparison of models")
    parser.add_argument("--out", type=a_path, help="folder of the tables (default: data/results)")
    parser.add_argument("--check", type=int, metavar="KEYS", help="compute this many keys again and compare, instead of writing")
    parser.add_argument("--seed", type=int, default=0, help="which keys are checked")
    parser.add_argument("--list", action="store_true", help="only say which tables there are")


def run(args: argparse.Namespace) -> int:
    """`mmn tables`: exit code 1 where a check found a difference."""
    import mmn

    names: Sequence[str] = args.names or sorted(tables())
    if args.list:
        for name in names:
            print(f"{name}: {len(get(name).keys)} keys; {', '.join(get(name).columns)}")
        return 0
    vlm = mmn.load(args.model)
    faults: list[str] = []
    for name in names:
        if args.check is not None:
            faults += check(name, vlm, args.check, args.seed, args.out, args.label)
        else:
            print(f"{name}: {len(write(name, vlm, label=args.label, first=args.first, folder=args.out))} rows")
    for fault in faults:
        print(fault)
    return 1 if faults else 0
