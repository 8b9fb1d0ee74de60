"""Claims: the verdict follows from the figures, and what a chapter stores is what the page collects."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mmn import claims
from mmn.claims import Claim, Contrast
from mmn.errors import MmnError
from mmn.metrics import Interval

BOOK = Path(__file__).parent.parent / "book"


def interval(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.1)


@pytest.mark.parametrize(
    ("found", "control", "bar", "verdict"),
    [
        (1.0, 0.5, None, "holds"),
        (1.0, 0.5, 0.9, "holds"),
        (1.0, 0.5, 0.95, "at the bar"),  # the interval has the bar in it
        (1.0, 0.5, 1.05, "at the bar"),
        (1.0, 0.5, 1.2, "in part"),
        (1.0, 0.9, None, "not shown"),  # the intervals meet
        (0.9, 1.0, None, "not shown"),
        (0.5, 1.0, None, "the reverse"),
        (0.5, 1.0, 0.4, "the reverse"),
        (1.0, 0.9, 0.5, "not shown"),
        (1.0, None, 0.9, "holds"),
        (1.0, None, 0.95, "at the bar"),
        (1.0, None, 1.05, "at the bar"),
        (-0.1, None, 0.0, "at the bar"),
        (1.0, None, 1.2, "misses the bar"),
    ],
)
def test_the_verdict_follows_from_the_figures(found, control, bar, verdict):
    row = Claim("it is so", "how much", interval(found), None if control is None else interval(control), bar)
    assert row.verdict == verdict
    assert claims.frame([row])["verdict"].tolist() == [verdict]


def test_other_models_stand_in_columns_of_their_own():
    others = {
        "seed-1": Contrast(0.5, 0.1), "seed-2": Contrast(0.75, 0.3), "end-to-end": Contrast(0.25), "shipped": Contrast(0.4, -0.001),
    }  # fmt: skip
    (row,) = claims.frame([Claim("c", "m", interval(1), contrasts=others)]).to_dict("records")
    assert row["plain runs of the recipe"] == "0.62 (0.50 to 0.75) against 0.20 (0.10 to 0.30); shipped there 0.40 against 0.00"
    assert row["end to end"] == "0.25" and row["untrained"] == "open"


def test_contrasts_are_read_from_the_stored_tables(tmp_path: Path):
    for label, value in (("", 9.0), ("seed-1", 1.0), ("seed-2", 2.0), ("untrained", 2.0)):
        stem = f"causal.{label}" if label else "causal"
        keys = {"seed-1": [0, 1], "seed-2": [1, 3]}.get(label, [1, 2])  # the plain runs share key 1 alone
        random = [0.5, None if label == "untrained" else 1.5]
        pd.DataFrame({"key": keys, "drop": [value, value + 1], "random": random}).to_csv(tmp_path / f"{stem}.csv")
        (tmp_path / f"{stem}.json").write_text(json.dumps({"label": label, "model_hash": label}))
    found = claims.contrasts("causal", lambda frame: frame["drop"].mean(), folder=tmp_path)
    assert found == {"seed-1": (1.5, None), "seed-2": (2.5, None), "untrained": (2.5, None), "shipped": (9.0, None)}
    pairs = claims.contrasts("causal", lambda t: t["drop"].mean(), lambda t: t["random"].sum(skipna=False), folder=tmp_path)
    assert pairs == {"seed-1": (1.5, 2.0), "seed-2": (2.5, 2.0), "untrained": (2.5, None), "shipped": (9.0, 0.5)}
    none = claims.contrasts("causal", lambda t: float("nan"), lambda t: 1.0, folder=tmp_path)
    assert none == {}


def chapter(folder: Path, name: str, rows: list[Claim], model_hash: str = "abc") -> None:
    """A notebook whose stored outputs hold the rows, as `show` leaves them."""
    kept: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda shown, metadata: kept.append(metadata))
        claims.show(rows, model_hash)
    output = nbformat.v4.new_output("display_data", data={"text/plain": ""}, metadata=json.loads(json.dumps(kept[0])))
    cell = nbformat.v4.new_code_cell("show", outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), cell]), folder / name)


def test_what_chapters_store_is_what_the_page_collects(tmp_path: Path):
    first = [
        Claim("a", "m", interval(1), interval(0.5), 0.9, contrasts={"untrained": Contrast(0.0)}),
        Claim("b", "m", interval(0.1)),
    ]
    second = [Claim("c", "m", interval(2), interval(0.5), source="ours")]
    chapter(tmp_path, "05_b.ipynb", second)
    chapter(tmp_path, "04_a.ipynb", first)
    table = claims.collect(tmp_path)
    assert table["chapter"].tolist() == ["04_a", "04_a", "05_b"]
    assert table["source"].tolist() == ["abstract", "abstract", "ours"]
    expected = claims.frame([*first, *second])
    pd.testing.assert_frame_equal(table[expected.columns], expected)
    chapter(tmp_path, "06_c.ipynb", second, "another")
    with pytest.raises(MmnError, match="different models"):
        claims.collect(tmp_path)
    with pytest.raises(MmnError, match="No chapter"):
        claims.collect(tmp_path / "nowhere")


def test_the_page_has_every_row_under_its_chapter(tmp_path: Path):
    named = {"control_name": "other words", "bar_name": "ours"}
    rows = [
        Claim(
            "a | b",
            "m",
            interval(1),
            interval(0.5),
            0.9,
            contrasts={"seed-1": Contrast(0.004), "seed-2": Contrast(-0.001)},
            **named,
        ),
        Claim("c", "m", interval(0.1), bar=1.0, source="ours"),
    ]
    chapter(tmp_path, "04_a.ipynb", rows[:1])
    chapter(tmp_path, "05_b.ipynb", rows[1:])
    text = claims.page(tmp_path)
    assert text.startswith(
        "Our measures of what the paper's abstract names, 1: 1 *holds*. "
        "Of this project's own and other authors' claims, 1: 1 *misses the bar*."
    )
    assert text.index("notebooks/04_a") < text.index("a / b") < text.index("notebooks/05_b") < text.index("| c |")
    assert (
        "| claim | whose | measured | verdict | plain runs of the recipe |\n|---|---|---|---|---|\n"
        "| a / b | abstract | 1.00 [0.90,\u00a01.10] (m); control 0.50 [0.40,\u00a00.60] (other words); bar 0.90 (ours) "
        "| **holds** | 0.00 |"
    ) in text
    assert "| claim | whose | measured | verdict |\n" in text, "no other model has a figure here"


@pytest.mark.skipif(not (BOOK / "_claims.md").exists(), reason="there is no book beside the tests")
def test_the_books_page_is_that_of_the_stored_chapters():
    assert (BOOK / "_claims.md").read_text(encoding="utf-8") == claims.page(BOOK.parent / "notebooks"), "run `make refresh`"
