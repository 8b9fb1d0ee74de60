"""Planted neurons do what they were built to do: by arithmetic on the copy's weights and by reading it anew."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmn
from mmn import oracle, planted
from mmn.nouns import Noun


@pytest.fixture(scope="module")
def case() -> tuple[mmn.VLM, mmn.Trace, Noun]:
    vlm = tiny.llava(num_hidden_layers=6)
    return vlm, vlm.caption(tiny.pictures(1)[0], max_new_tokens=4), Noun("x", "x", 9, 2, (0, 1))


@pytest.fixture(scope="module")
def all_four(case) -> dict[str, planted.Planted]:
    return {kind: planted.plant(*case, kind) for kind in planted.KINDS}


def effect(found: planted.Planted, neuron: mmn.Neuron) -> float:
    return float(oracle.oracle(found.vlm, found.trace, found.noun).log_p[24 * neuron.layer + neuron.unit])


def test_planted_neurons_are_of_natural_size_and_the_model_stays_as_it_was(case, all_four) -> None:
    vlm, trace, noun = case
    fired = torch.cat([layer[noun.step] for layer in trace.activations]).abs()
    norms = torch.cat([ffn.projection.weight.norm(dim=0) for ffn in vlm.anatomy.ffns])
    for kind, found in all_four.items():
        layer, unit = found.neuron
        wanted = fired.max() if kind == "quiet" else fired.quantile(planted.ACTIVATION)
        assert float(found.trace.activations[layer][noun.step, unit]) == pytest.approx(float(wanted), rel=1e-3)
        length = found.vlm.anatomy.ffns[layer].projection.weight[:, unit].norm()
        assert float(length) == pytest.approx(float(norms.quantile(planted.WRITE)), rel=1e-4)
        assert found.vlm.hash != vlm.hash  # what was fitted on the one is refused on the other
    assert mmn.VLM(vlm.model, vlm.processor).hash == vlm.hash


def test_a_vote_counts_by_arithmetic(all_four) -> None:
    found = all_four["vote"]
    stream = found.trace.stream[found.noun.step]
    column = found.vlm.anatomy.ffns[-1].projection.weight[:, found.neuron.unit]
    part = found.trace.activations[-1][found.noun.step, found.neuron.unit] * column
    language = found.vlm.model.model.language_model
    with torch.no_grad():
        log_p = found.vlm.model.lm_head(language.norm(torch.stack([stream, stream - part]))).log_softmax(-1)[:, 9]
    assert effect(found, found.neuron) == pytest.approx(float(log_p[0] - log_p[1]), abs=1e-4)
    assert float(log_p[0] - log_p[1]) > 0.05


def test_a_cancelled_write_looks_like_the_vote_and_does_nothing(case, all_four) -> None:
    found = all_four["cancelled"]
    layer, unit = found.neuron
    assert found.reader is not None and found.reader.layer > layer
    assert abs(effect(found, found.neuron)) < 1e-3 < 0.01 < abs(effect(found, found.reader))
    assert float(mmn.contributions(found.vlm, found.trace, found.noun, "log_probability")[layer][unit]) > 0.02


def test_a_quiet_write_hardly_counts_and_one_read_later_does(all_four) -> None:
    vote, quiet, later = (all_four[kind] for kind in ("vote", "quiet", "later"))
    assert abs(effect(quiet, quiet.neuron)) < 0.2 * effect(vote, vote.neuron)
    direct = mmn.contributions(later.vlm, later.trace, later.noun, "log_probability")[later.neuron.layer][later.neuron.unit]
    assert later.reader is not None and effect(later, later.neuron) > 3 * abs(float(direct))
    assert effect(later, later.neuron) > 0.3 * effect(later, later.reader) > 0


def test_ranks_are_counted_and_expectations_cover_every_score(case) -> None:
    table = planted.compare(*case, scores={"direct": mmn.SCORES["direct"], "random": mmn.SCORES["random"]}, kinds=("vote",))
    found = planted.plant(*case, "vote")
    flat = torch.cat(mmn.contributions(found.vlm, found.trace, found.noun))
    order = flat.argsort(descending=True).tolist()
    row = table.set_index("score").loc["direct"]
    assert row["rank"] == 1 + order.index(24 * found.neuron.layer + found.neuron.unit)
    assert (
        row["found"] == (row["rank"] <= planted.TOP) and row["expected"] and not table.set_index("score").loc["random", "expected"]
    )
    assert set(planted.EXPECTED) == set(oracle.ALL)


def test_rows_of_the_table_are_those_of_the_first_noun_that_is_shown(case, monkeypatch) -> None:
    from mmn import oracle_tables, scenes

    vlm, trace, noun = case
    name = scenes.draw(oracle_tables.FIRST + oracle_tables.SCENES).names[0]
    said = [Noun("absent", "absent", 5, 1, (0, 1)), Noun(name, name, 9, 2, (0, 1))]
    monkeypatch.setattr(vlm, "caption", lambda image: trace)
    monkeypatch.setitem(trace.__dict__, "nouns", said)
    rows = oracle_tables.planted_table(vlm, 0)
    assert len(rows) == len(planted.KINDS) * len(oracle.ALL) and {row["noun"] for row in rows} == {name}
    vote = next(row for row in rows if (row["kind"], row["score"]) == ("vote", "direct"))
    found = planted.plant(vlm, trace, said[1], "vote")
    assert vote["effect"] == pytest.approx(effect(found, found.neuron), abs=1e-3)
    monkeypatch.setitem(trace.__dict__, "nouns", said[:1])
    assert oracle_tables.planted_table(vlm, 0) == []


def test_what_cannot_be_planted_is_said(case) -> None:
    with pytest.raises(mmn.MmnError, match="no kind 'odd'"):
        planted.plant(*case, "odd")
    with pytest.raises(mmn.MmnError, match="three layers"):
        vlm = tiny.llava(num_hidden_layers=2)
        planted.plant(vlm, vlm.caption(tiny.pictures(1)[0], max_new_tokens=4), Noun("x", "x", 9, 2, (0, 1)), "vote")
