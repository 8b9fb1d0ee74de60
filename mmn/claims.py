"""The rows with which every chapter ends: a claim, our figure, its control, the verdict; and the page that collects them.

A chapter shows its rows with `claims.show([...])`, which also writes them into the notebook's stored output, as metadata that no reader
sees; `claims.collect(folder)` reads them from there, so that no figure is ever typed in a second time. The verdict is computed: see
`Claim.verdict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from mmn import tables
from mmn.errors import MmnError
from mmn.metrics import Interval

KEY = "mmn_claims"  # of an output's metadata
VERDICTS = ("holds", "at the bar", "in part", "misses the bar", "not shown", "the reverse")
CONTRASTS = {"seed": "plain runs of the recipe", "end-to-end": "end to end", "untrained": "untrained"}
OPEN = "open"  # of other models: no table has the figure
SHIPPED = "shipped"  # the label of the shipped model's figure on the pictures of the plain runs


class Contrast(NamedTuple):
    """The figure of another model, and its control's there, where its table holds that."""

    found: float
    control: float | None = None


@dataclass(frozen=True)
class Claim:
    """One row. claim: a sentence. source: who makes it (`abstract` of Pan et al., `others`, `ours`). measure: what was measured, with its
    unit; more must be better. found, control: the figure and what chance or another choice of neurons gives; None where there is no
    control. bar: what the figure must reach besides, set by this project. contrasts: figure and control on other models, by label.
    control_name, bar_name: what they are, where it is not plain."""

    claim: str
    measure: str
    found: Interval
    control: Interval | None = None
    bar: float | None = None
    source: str = "abstract"
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    control_name: str = ""
    bar_name: str = ""

    @property
    def verdict(self) -> str:
        """By intervals: `the reverse` where it lies below the control's, `not shown` where it meets that. Else `holds` where it lies above
        the bar or there is none, `at the bar` where the bar is in it; where it lies below the bar, `in part` if there is a control that
        it beats, `misses the bar` if not."""
        if self.control is not None and self.found.low <= self.control.high:
            return "the reverse" if self.found.high < self.control.low else "not shown"
        if self.bar is None or self.found.low >= self.bar:
            return "holds"
        if self.found.high >= self.bar:
            return "at the bar"
        return "misses the bar" if self.control is None else "in part"


def contrasts(
    name: str,
    found: Callable[[pd.DataFrame], float],
    control: Callable[[pd.DataFrame], float] | None = None,
    folder: Path | None = None,
) -> dict[str, Contrast]:
    """Two figures of the slow table `name` for each other model under whose label it is stored (`seed-1`, `end-to-end`, ...), and under
    SHIPPED those of the shipped model on the keys that the plain runs' tables hold; none where `found` is nan: models that do not say
    what would be counted."""
    every = {label: tables.read(name, label=label, folder=folder) for label in tables.labels(name, folder)}
    plain = [set(frame["key"]) for label, frame in every.items() if label.startswith("seed")]
    if plain and "" in every:
        every[SHIPPED] = every[""][every[""]["key"].isin(set.intersection(*plain))]
    every.pop("", None)
    pairs = {label: [float(of(frame)) for of in (found, control) if of] for label, frame in every.items()}
    return {label: Contrast(*(v for v in pair if not np.isnan(v))) for label, pair in pairs.items() if not np.isnan(pair[0])}


def frame(rows: Sequence[Claim]) -> pd.DataFrame:
    """The rows as a table of text, one column for each kind of model."""
    out = []
    for row in rows:
        line = {
            "claim": row.claim,
            "measure": row.measure,
            "found": f"{row.found:.2f}",
            "control": f"{row.control:.2f}{_named(row.control_name)}" if row.control else "",
            "bar": "" if row.bar is None else f"{_two(row.bar)}{_named(row.bar_name)}",
            "verdict": row.verdict,
        }
        for start, title in CONTRASTS.items():
            line[title] = _spread(_of(row, start)) or OPEN
        if SHIPPED in row.contrasts:
            line[CONTRASTS["seed"]] += f"; shipped there {_spread(_of(row, SHIPPED))}"
        out.append(line)
    return pd.DataFrame(out)


def tidy(rows: Sequence[Claim]) -> pd.DataFrame:
    """The rows with every number in a column of its own, for a file; of the other models mean, least and most by kind
    (CONTRASTS), and the controls' mean."""
    none = Interval(float("nan"), float("nan"), float("nan"))
    lines = []
    for row in rows:
        line = {"claim": row.claim, "source": row.source, "measure": row.measure, **row.found._asdict()}
        line |= {"control": row.control_name}
        line |= {f"control_{name}": value for name, value in (row.control or none)._asdict().items()}
        line |= {"bar": none.value if row.bar is None else row.bar, "verdict": row.verdict}
        line[SHIPPED], line[f"{SHIPPED}_control"] = np.array(row.contrasts.get(SHIPPED, Contrast(none.value)), float)
        for start in CONTRASTS:
            some = pd.DataFrame(_of(row, start), columns=Contrast._fields, dtype=float)
            found = {"mean": some["found"].mean(), "least": some["found"].min(), "most": some["found"].max()}
            line |= {f"{start}_{name}": value for name, value in (found | {"control": some["control"].mean()}).items()}
        lines.append(line)
    return pd.DataFrame(lines)


def _two(value: float) -> str:
    return f"{value:z.2f}".replace("-", "−")


def _named(name: str) -> str:
    return f" ({name})" * bool(name)


def _of(row: Claim, kind: str) -> list[Contrast]:
    return [pair for label, pair in row.contrasts.items() if label.startswith(kind)]


def _spread(pairs: Sequence[Contrast]) -> str:
    """Mean (least to most) of the figures and, where there are any, of the controls."""
    columns = [[value for value in column if value is not None] for column in zip(*pairs, strict=True)]
    return " against ".join(_range(values) for values in columns if values)


def _range(values: Sequence[float]) -> str:
    mean, least, most = (_two(each) for each in (float(np.mean(values)), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def markdown(table: pd.DataFrame) -> str:
    """Rows of `frame` as a Markdown table that fits a page: figure, measure, control and bar in one cell; with a column `source`, whose
    claim it is; without the columns of other models of which no row has a figure."""
    others = [title for title in CONTRASTS.values() if table[title].ne(OPEN).any()]
    titles = ["claim", *(["whose"] if "source" in table else []), "measured", "verdict", *others]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in table.rename(columns={"source": "whose"}).to_dict("records"):
        control = f"; control {row['control']}" if row["control"] else ""
        bar = f"; bar {row['bar']}" if row["bar"] else ""
        row |= {"measured": f"{row['found']} ({row['measure']}){control}{bar}", "verdict": f"**{row['verdict']}**"}
        lines.append(f"| {' | '.join(row[title].replace('|', '/') for title in titles)} |")
    return "\n".join(lines) + "\n"


def show(rows: Sequence[Claim], model_hash: str) -> None:
    """Display the rows and keep them in the notebook's output."""
    from IPython.display import Markdown, display

    record = {"model_hash": model_hash, "rows": [asdict(row) for row in rows]}
    display(Markdown(markdown(frame(rows))), metadata={KEY: record})


def page(folder: Path) -> str:
    """The tables of all chapters in a folder of notebooks, one under the other, and how many claims hold: Markdown for the book.

    Raises MmnError as `collect` does."""
    import nbformat

    rows = collect(folder)
    paper = rows["source"].eq("abstract")
    text = f"Our measures of what the paper's abstract names, {paper.sum()}: {_counted(rows[paper])}. "
    text += f"Of this project's own and other authors' claims, {(~paper).sum()}: {_counted(rows[~paper])}.\n"
    for chapter, part in rows.groupby("chapter", sort=True):
        first = nbformat.read(folder / f"{chapter}.ipynb", as_version=4).cells[0].source
        title = first.splitlines()[0].lstrip("# ").split(":")[0]
        text += f"\n## {title}\n\nFrom {{doc}}`/notebooks/{chapter}`.\n\n{markdown(part)}"
    return text


def _counted(rows: pd.DataFrame) -> str:
    counts = rows["verdict"].value_counts()
    return ", ".join(f"{counts[name]} *{name}*" for name in VERDICTS if name in counts)


def collect(folder: Path) -> pd.DataFrame:
    """The rows of all chapters in a folder of notebooks, in their order, with `chapter` (its file) in front, and `source`.

    Raises MmnError where chapters are of different models."""
    import nbformat

    parts, hashes = [], {}
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                record = output.get("metadata", {}).get(KEY)
                if record is None:
                    continue
                hashes[path.stem] = record["model_hash"]
                rows = [_claim(row) for row in record["rows"]]
                sources = [row.source for row in rows]
                parts.append(frame(rows).assign(source=sources, chapter=path.stem))
    if len(set(hashes.values())) > 1:
        raise MmnError(f"The chapters' outputs are of different models: {hashes}. Run `make refresh`.")
    if not parts:
        raise MmnError(f"No chapter in {folder} has rows of claims in its stored outputs: run `make refresh`.")
    table = pd.concat(parts, ignore_index=True)
    return table[["chapter", "source", *table.columns.drop(["chapter", "source"])]]


def _claim(row: dict) -> Claim:
    intervals = {name: Interval(*row[name]) for name in ("found", "control") if row[name]}
    others = {label: Contrast(*pair) for label, pair in row["contrasts"].items()}
    return Claim(**{**row, **intervals, "contrasts": others})
