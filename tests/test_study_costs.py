"""What the stages of `mmn replicate` cost: what was measured is what the stages do. Nothing here judges a time."""

from __future__ import annotations

import functools

import pandas as pd
import pytest

import mmn
from mmn import cli, costs, stages, study_costs
from mmn.costs import Shape
from mmn.sources import load

SMALL = Shape(64, 496, 1200, 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_costs, "SHAPES", {"7B": SMALL._replace(layers=5)})
    monkeypatch.setattr(costs, "build", functools.partial(costs.build, side=3))


def test_a_random_model_says_words_and_has_one_noun() -> None:
    vlm = study_costs.talking(costs.build(SMALL, side=3))
    trace = vlm.caption(load("scenes", 1)[0].open())
    assert len(trace.tokens) == 50 and len(trace.nouns) == 1
    words = trace.text.removeprefix("An image of").split()
    assert len(words) == 50 and all(word.isalpha() for word in words) and trace.nouns[0].text == words[0]


@pytest.mark.slow
def test_the_measured_stages_are_whole() -> None:
    vlm = costs.build(SMALL, side=3)
    row = study_costs.measure(vlm)
    (picture,) = load("scenes", 1)
    ranked = stages.rankings(vlm, [picture])
    more = stages.properties_of(vlm, [picture], ranked["captions"], every=[])["properties"]
    assert set(more["property"]) == {"sensitivity", "causal effect"} and ranked["rankings"]["place"].tolist() == list(range(1, 11))
    assert row["bytes"] == sum(len(t.to_csv(index=False)) for t in (ranked["captions"], ranked["rankings"], more))
    assert row["positions"] == 9 + len(vlm.tokenizer(vlm.chat(vlm.prompt, "An image of"))["input_ids"]) - 1 + 49
    assert all(row[f"{part}_seconds"] > 0 for part in ("pass", "captions", "properties"))
    with pytest.raises(mmn.MmnError, match="cannot be measured here: 100 neurons are too many"):
        study_costs.measure(costs.build(SMALL._replace(neurons=96), side=3))


def test_parameters_are_those_that_are_built() -> None:
    model = costs.build(SMALL, side=3).model.model.language_model
    norms = (2 * SMALL.layers + 1) * SMALL.hidden
    unembedding = SMALL.vocabulary * SMALL.hidden
    assert study_costs.parameters(SMALL) == sum(p.numel() for p in model.parameters()) - norms + unembedding
    assert study_costs.parameters(costs.SEVEN) / 1e9 == pytest.approx(6.74, abs=0.01)


def test_every_further_layer_costs_what_the_second_did(small: None, tmp_path, capsys) -> None:
    assert cli.main(["bench", "--study", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "study.csv")
    assert table["layers"].tolist() == [1, 2, 5] and table["scaled"].tolist() == [False, False, True]
    one, two, five = (table.loc[n, "properties_seconds"] for n in range(3))
    assert five == pytest.approx(one + 4 * (two - one), rel=1e-3)
    assert table.loc[2, ["positions", "bytes"]].tolist() == table.loc[1, ["positions", "bytes"]].tolist()
    shown = study_costs.shown(table)
    assert list(shown) == ["7B"] and "captions: GiB" in capsys.readouterr().out
    last = table.iloc[-1]
    assert shown.loc["step: passes", "7B"] == pytest.approx(last["step_seconds"] / last["pass_seconds"], abs=0.01)


def test_figures_have_three_digits_or_more() -> None:
    assert [study_costs.told(value) for value in (0.0415, 3.14159, 12.25, 99.94, 642.0, 2567.1)] == [
        "0.04", "3.14", "12.2", "99.9", "642", "2,567"]  # fmt: skip


def test_a_whole_run_is_the_sum_of_its_parts() -> None:
    row = {"size": "7B", **costs.SEVEN._asdict(), "captions_seconds": 10.0, "pass_seconds": 2.0, "properties_seconds": 40.0}
    row |= {"step_seconds": 6.0, "bytes": 5000.0, "positions": 600.0}
    found = study_costs.whole_run(pd.DataFrame([row]), pictures=90, nouns=2, edits=1)["7B"]
    steps = 2 * 50 * 2 * stages.FIT
    assert found["of which edits"] == pytest.approx(steps * 6 / 3600, abs=0.05)
    assert found["hours"] == pytest.approx((90 * 2 * 40 + steps * 6 + 90 * 10) / 3600, abs=0.05)
    assert found["tables, MB"] == 0.9
    weights = study_costs.parameters(costs.SEVEN)
    passes = (90 * 2 * 40 + steps * 6) / 2 + 90
    on_card = passes * 2 * weights * 600 / 150e12 + 90 * 50 * 2 * weights / 1.5e12 / 16
    assert found["hours, estimated for a card"] == pytest.approx(on_card / 3600, abs=0.05)
