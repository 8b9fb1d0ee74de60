"""What the direct score assumes, against arithmetic on the weights and the model's own output."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import mmn
from mmn import assumptions
from mmn.metrics import Interval
from mmn.nouns import Noun

NOUN = Noun("x", "x", 9, 3, (0, 1))


def case(**options: object) -> tuple[mmn.VLM, mmn.Trace]:
    vlm = tiny.llava(**options)
    return vlm, vlm.caption(tiny.pictures(1)[0], max_new_tokens=6)


@torch.no_grad()
def logits(vlm: mmn.VLM, trace: mmn.Trace, hooks: list[tuple[torch.nn.Module, object]]) -> torch.Tensor:
    """Logits at the noun's step with forward pre-hooks on some modules, the whole sequence read."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    out = vlm.model(**vlm.replay(trace, NOUN.step), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return out


def test_each_column_of_votes_is_what_it_says() -> None:
    vlm, trace = case()
    text, weight = vlm.model.model.language_model, vlm.model.lm_head.weight
    table = assumptions.votes(vlm, trace, NOUN, k=4, per_layer=3)
    assert table["found"].sum() == 4 and len(table) <= 4 + 3 * 3 and not table.duplicated(["layer", "unit"]).any()
    best = mmn.rank(vlm, trace, NOUN, k=4)
    assert set(zip(*(table.loc[table["found"], c] for c in ("layer", "unit")), strict=True)) == set(map(tuple, best.neurons))
    plain = logits(vlm, trace, [])
    point = trace.stream[NOUN.step].clone().requires_grad_()
    gradient = torch.autograd.grad((text.norm(point) @ weight.T)[9], point)[0]
    for row in table.itertuples():
        down = text.layers[row.layer].mlp.down_proj
        written = trace.activations[row.layer][NOUN.step, row.unit] * down.weight[:, row.unit]

        def silence(_: object, args: tuple, unit: int = row.unit) -> tuple:
            seen = args[0].clone()
            seen[:, -1, unit] = 0
            return (seen,)

        def without(_: object, args: tuple, written: torch.Tensor = written) -> tuple:
            return (args[0] - written,)

        assert row.score == pytest.approx(float(written @ weight[9]), abs=1e-5)
        assert row.scale_aware == pytest.approx(float(written @ gradient), abs=1e-5)
        assert row.total == pytest.approx(float((plain - logits(vlm, trace, [(down, silence)]))[9]), abs=2e-5)
        less = logits(vlm, trace, [(text.norm, without)])
        assert row.direct == pytest.approx(float((plain - less)[9]), abs=2e-5)
        assert row.direct_log_p == pytest.approx(float((plain.log_softmax(-1) - less.log_softmax(-1))[9]), abs=2e-5)
        stream = trace.stream[NOUN.step]
        sizes = [float((x.square().mean() + text.norm.variance_epsilon).sqrt()) for x in (stream - written, stream)]
        assert row.scale == pytest.approx(sizes[0] / sizes[1], abs=1e-5)
        cast = weight @ written
        assert row.common == pytest.approx(float(cast.mean() ** 2 / cast.square().mean()), abs=1e-5)
        assert 0 <= row.common_random <= 1
    last = table[table["layer"] == 2]
    np.testing.assert_allclose(last["direct"], last["total"], atol=2e-5)  # nothing follows that could answer
    early = table[table["layer"] < 2]
    assert np.abs(early["direct"] - early["total"]).max() > 1e-3


def test_a_vote_cast_again_arrives_as_the_model_itself_says() -> None:
    vlm, trace = case()
    text = vlm.model.model.language_model
    neurons = mmn.rank(vlm, trace, NOUN, k=2).neurons
    table = assumptions.cast_again(vlm, trace, NOUN, neurons)
    assert len(table) == 2 * 2 * 3 and set(table["kind"]) == {"vote", "random"}
    plain = logits(vlm, trace, [])[9]
    layer, unit = neurons[1]
    written = trace.activations[layer][NOUN.step, unit] * text.layers[layer].mlp.down_proj.weight[:, unit]

    def push(_: object, args: tuple) -> tuple:
        seen = args[0].clone()
        seen[:, -1] += written
        return (seen, *args[1:])

    for after, reader in enumerate([*text.layers[1:], text.norm]):
        row = table[(table["kind"] == "vote") & (table["layer"] == after)].iloc[1]
        assert row["total"] == pytest.approx(float(logits(vlm, trace, [(reader, push)])[9] - plain), abs=2e-5)
    last = table[table["layer"] == 2]
    np.testing.assert_allclose(last["direct"], last["total"], atol=2e-5)
    with pytest.raises(mmn.MmnError, match="at least one"):
        assumptions.cast_again(vlm, trace, NOUN, [])


def made(scenes: int, truth: float, seed: int = 0) -> list[pd.DataFrame]:
    """Tables of 40 neurons whose second columns are the first, as far as `truth` says, and noise."""
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(scenes):
        score = rng.normal(size=40)
        columns = {name: truth * score + (1 - truth) * rng.normal(size=40) for name in ("norm_aware", "direct", "total", "centred")}
        tables.append(pd.DataFrame({"layer": np.repeat([0, 1], 20), "score": score, **columns}))
    return tables


def test_verdicts_on_what_is_true_and_what_is_noise() -> None:
    true, noise = assumptions.verdicts(made(8, 1.0), 2), assumptions.verdicts(made(8, 0.0), 2)
    assert set(true["order_verdict"]) == set(true["size_verdict"]) == {"holds"}
    assert set(noise["order_verdict"]) == set(noise["size_verdict"]) == {"fails"}
    assert true["neurons"].tolist() == [320, 320, 320, 160, 320]
    assert true["order"].iloc[0].value == pytest.approx(1) and abs(true["order_control"].iloc[0].value) < 0.2
    late = assumptions.verdicts([table.query("layer == 1") for table in made(8, 1.0)], 2)
    assert late["order_verdict"].tolist() == ["holds", "holds", "holds", "untested", "holds"]
    assert set(assumptions.verdicts(made(2, 1.0), 2)["size_verdict"]) == {"untested"}
    with pytest.raises(mmn.MmnError, match="at least one scene"):
        assumptions.verdicts([], 2)


@pytest.mark.parametrize(
    ("value", "control", "says"),
    [
        ((0.95, 0.92, 0.97), (0.1, 0.0, 0.2), "holds"),
        ((0.8, 0.6, 0.92), (0.1, 0.0, 0.2), "holds in part"),
        ((0.6, 0.4, 0.7), (0.1, 0.0, 0.2), "undecided"),
        ((0.3, 0.2, 0.4), (0.1, 0.0, 0.15), "fails"),
        ((0.95, 0.92, 0.97), (0.9, 0.8, 0.93), "fails"),
    ],
)
def test_a_verdict_is_read_from_the_intervals(value: tuple, control: tuple, says: str) -> None:
    assert assumptions.verdict(Interval(*value), Interval(*control)) == says


def test_numbers_below_one_are_refused() -> None:
    vlm, trace = case()
    with pytest.raises(mmn.MmnError, match="at least 1"):
        assumptions.votes(vlm, trace, NOUN, k=0)
