"""Scores against arithmetic done another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import real
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_edit_families import Family
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmn
from mmn import decompose, oracle, properties
from mmn.calibration import Calibration
from mmn.ffn import NoFFN
from mmn.hooks import hooked
from mmn.nouns import Noun


def caption(seed: int = 0, **options: object) -> tuple[mmn.VLM, mmn.Trace]:
    vlm = tiny.llava(**options) if options else tiny.vlm()
    return vlm, vlm.caption(tiny.pictures(1, seed)[0], max_new_tokens=8)


def at(vlm: mmn.VLM, trace: mmn.Trace, step: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """FFN outputs of each layer, stream before the final norm, and logits where a step's token was produced: by other hooks
    than the package's, from a forward pass of its own."""
    ffns: dict[int, Tensor] = {}
    stream: list[Tensor] = []
    text = vlm.model.model.language_model
    handles = [
        layer.mlp.register_forward_hook(lambda _, __, out, i=i: ffns.__setitem__(i, out[0, -1]))
        for i, layer in enumerate(text.layers)
    ]
    handles.append(text.norm.register_forward_pre_hook(lambda _, args: stream.append(args[0][0, -1])))
    with torch.no_grad():
        logits = vlm.model(**vlm.replay(trace, step)).logits[0, -1]
    for handle in handles:
        handle.remove()
    return [ffns[i] for i in range(len(ffns))], stream[0], logits


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 50), st.integers(0, 7), st.integers(0, 318))
def test_contributions_add_up_to_the_ffns_output(seed: int, step: int, token: int) -> None:
    vlm, trace = caption(seed)
    step = min(step, len(trace.tokens) - 1)
    scores = mmn.contributions(vlm, trace, Noun("x", "x", token, step, (0, 1)))
    outputs, _, _ = at(vlm, trace, step)
    for layer, out in zip(scores, outputs, strict=True):
        assert layer.shape == (24,) and layer.dtype == torch.float32
        right = float(vlm.model.lm_head.weight[token].double() @ out.double())
        assert abs(float(layer.double().sum()) - right) <= 1e-5 * max(1e-2, float(layer.abs().sum()))


def test_contributions_add_up_with_a_bias() -> None:
    vlm, trace = caption(mlp_bias=True)
    noun = Noun("x", "x", 9, 2, (0, 1))
    for layer, out, module in zip(
        mmn.contributions(vlm, trace, noun), at(vlm, trace, 2)[0], vlm.model.model.language_model.layers, strict=True
    ):
        row = vlm.model.lm_head.weight[9]
        assert module.mlp.down_proj.bias.abs().sum() > 0
        torch.testing.assert_close(layer.sum() + row @ module.mlp.down_proj.bias, row @ out, rtol=1e-4, atol=1e-5)


def test_norm_aware_is_the_part_of_the_logit() -> None:
    """Through the final norm with its scale frozen, the stream's own logit is the sum of its parts."""
    vlm, trace = caption()
    noun = Noun("x", "x", 9, 3, (0, 1))
    outputs, stream, logits = at(vlm, trace, 3)
    norm = vlm.model.model.language_model.norm
    scale = norm.weight / (stream.pow(2).mean() + norm.variance_epsilon).sqrt()
    torch.testing.assert_close((stream * scale) @ vlm.model.lm_head.weight[9], logits[9], rtol=1e-4, atol=1e-5)
    for layer, out in zip(mmn.contributions(vlm, trace, noun, score="norm_aware"), outputs, strict=True):
        torch.testing.assert_close(layer.sum(), (out * scale) @ vlm.model.lm_head.weight[9], rtol=1e-4, atol=1e-5)


def test_norm_aware_through_a_layer_norm() -> None:
    vlm, _ = caption(mlp_bias=False)
    norm = torch.nn.LayerNorm(16)
    norm.weight.data, norm.bias.data = torch.randn(16), torch.randn(16)
    vlm.model.model.language_model.norm = norm
    vlm = mmn.VLM(vlm.model, vlm.processor, lexicon=tiny.every_letter)
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=4)
    outputs, stream, _ = at(vlm, trace, 2)
    scale = norm.weight / (stream.var(correction=0) + norm.eps).sqrt()
    for layer, out in zip(mmn.contributions(vlm, trace, Noun("x", "x", 9, 2, (0, 1)), "norm_aware"), outputs, strict=True):
        torch.testing.assert_close(layer.sum(), ((out - out.mean()) * scale) @ vlm.model.lm_head.weight[9], rtol=1e-4, atol=1e-5)


def test_centred_is_direct_less_its_mean_over_the_vocabulary() -> None:
    vlm, trace = caption()
    tokens = range(vlm.model.lm_head.out_features)
    direct = torch.stack([mmn.contributions(vlm, trace, Noun("x", "x", t, 1, (0, 1)))[1] for t in tokens])
    centred = mmn.contributions(vlm, trace, Noun("x", "x", 7, 1, (0, 1)), "centred")[1]
    torch.testing.assert_close(centred, direct[7] - direct.mean(0), rtol=1e-4, atol=1e-6)


def test_gate_only_is_the_activation_function_alone() -> None:
    vlm, trace = caption()
    layer = vlm.model.model.language_model.layers[1].mlp
    seen: list[Tensor] = []
    handle = layer.gate_proj.register_forward_hook(lambda _, __, out: seen.append(out[0, -1]))
    with torch.no_grad():
        vlm.model(**vlm.replay(trace, 2))
    handle.remove()
    got = mmn.contributions(vlm, trace, Noun("x", "x", 7, 2, (0, 1)), "gate_only")[1]
    expected = torch.nn.functional.silu(seen[0]) * (vlm.model.lm_head.weight[7] @ layer.down_proj.weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_gradient_is_the_effect_of_a_small_change() -> None:
    vlm, trace = caption()
    noun = Noun("x", "x", 7, 3, (0, 1))
    gradient = mmn.contributions(vlm, trace, noun, "gradient")
    picture = mmn.contributions(vlm, trace, noun, "gradient_image")
    inputs = vlm.replay(trace, 3)
    mask = vlm.image_positions(inputs)[0]
    assert int(mask.sum()) == 16
    model, small = vlm.model.double(), 1e-2
    try:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        for layer, unit in ((0, 3), (1, 20), (2, 11)):
            for scores, where in ((gradient, torch.arange(len(mask)) == len(mask) - 1), (picture, mask)):
                found = []
                for factor in (1 + small, 1 - small):

                    def change(seen: Tensor, unit: int = unit, where: Tensor = where, factor: float = factor) -> Tensor:
                        changed = seen.clone()
                        changed[0, where, unit] *= factor
                        return changed

                    handle = vlm.anatomy.ffns[layer].watch(change)
                    with torch.no_grad():
                        found.append(float(model(**wide).logits[0, -1, 7]))
                    handle.remove()
                slope = (found[0] - found[1]) / (2 * small)
                assert abs(slope - float(scores[layer][unit])) <= 1e-3 * abs(slope) + 1e-5
    finally:
        vlm.model.float()
        tiny.vlm.cache_clear()


def test_activation_and_size_of_the_write() -> None:
    vlm, trace = caption()
    noun = Noun("x", "x", 7, 2, (0, 1))
    for layer in range(3):
        a = trace.activations[layer][2].abs()
        torch.testing.assert_close(mmn.contributions(vlm, trace, noun, "activation")[layer], a)
        weight = vlm.model.model.language_model.layers[layer].mlp.down_proj.weight
        torch.testing.assert_close(mmn.contributions(vlm, trace, noun, "write_norm")[layer], a * weight.norm(dim=0))


def test_half_precision_scores_are_summed_in_float32() -> None:
    vlm, trace = caption(mlp_bias=False)
    vlm.model.to(torch.bfloat16)
    (layer, *_) = mmn.contributions(vlm, trace, Noun("x", "x", 7, 2, (0, 1)))
    weight = vlm.model.model.language_model.layers[0].mlp.down_proj.weight.float()
    expected = trace.activations[0][2] * (vlm.model.lm_head.weight[7].float() @ weight)
    assert layer.dtype == torch.float32
    torch.testing.assert_close(layer, expected)
    again = vlm.caption(tiny.pictures(1)[0], max_new_tokens=3)
    assert again.activations[0].dtype == torch.float32


def taken_out(vlm: mmn.VLM, trace: mmn.Trace, noun: Noun, bend: Callable[[Tensor], Tensor] = lambda logits: logits) -> Tensor:
    """What log p of a noun loses when each write of the last layer is taken out of the stream, in float64 with the norm by hand."""
    norm, weight = vlm.anatomy.final_norm, vlm.anatomy.unembedding.weight.double()
    stream = trace.stream_at([noun.step]).double()
    part = trace.activations[-1][noun.step].double()[:, None] * vlm.anatomy.ffns[-1].projection.weight.double().T

    def log_p(x: Tensor) -> Tensor:
        x = x * norm.weight.double() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return bend(x @ weight.T).log_softmax(-1)[:, noun.token]

    return log_p(stream) - log_p(stream - part)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that anything gives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kept = [each.untyped_storage().nbytes() for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.bytes = max([self.bytes, *kept])
        return out


@pytest.mark.parametrize("score", list(mmn.SCORES))
def test_many_nouns_take_little_more_memory_than_their_scores(score: str) -> None:
    """Nothing on the way is larger for 64 nouns than the scores themselves, or than what 16 nouns take."""
    vlm, trace = caption()
    nouns = [Noun("x", "x", 5 + n, n % len(trace.tokens), (0, 1)) for n in range(64)]
    with Largest() as few:
        mmn.SCORES[score](vlm, trace, nouns[:16])
    with Largest() as many:
        mmn.SCORES[score](vlm, trace, nouns)
    words = vlm.anatomy.unembedding.out_features
    assert many.bytes <= max(few.bytes, 4 * len(nouns) * max(vlm.anatomy.total, words))


@pytest.mark.parametrize("score", ["readout", "gradient", "gradient_image", "gate_only"])
def test_scores_of_many_nouns_are_those_of_each(score: str) -> None:
    vlm, trace = caption()
    nouns = [Noun("x", "x", 5 + n, n % len(trace.tokens), (0, 1)) for n in range(40)]
    found = mmn.SCORES[score](vlm, trace, nouns)
    for row, noun in enumerate(nouns):
        for layer, one in zip(found, mmn.SCORES[score](vlm, trace, [noun]), strict=True):
            torch.testing.assert_close(layer[row], one[0], rtol=1e-4, atol=1e-5)


def test_readout_of_many_nouns_is_the_true_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every other word followed, what log p loses is exact; blocks of 16 and a rest."""
    vlm, trace = caption()
    monkeypatch.setattr("mmn.contribution.RIVALS", 10**6)
    nouns = [Noun("x", "x", 5 + n, n % len(trace.tokens), (0, 1)) for n in range(36)]
    found = mmn.SCORES["readout"](vlm, trace, nouns)[-1]
    right = torch.stack([taken_out(vlm, trace, noun) for noun in nouns])
    torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-4)


def test_scores_of_log_p_in_half_precision_where_the_noun_is_certain() -> None:
    """All other words have a thousandth of the probability, less than half precision's rounding of the noun's own part."""
    vlm = tiny.llava()
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=3)
    row = vlm.model.lm_head.weight.data[int(trace.tokens[2])]
    row *= 14 / float(trace.stream_at([2]).div(trace.stream_at([2]).square().mean().sqrt()) @ (row * vlm.anatomy.final_norm.weight))
    vlm.model.to(torch.bfloat16)
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=3)
    noun = Noun("x", "x", int(trace.tokens[2]), 2, (0, 1))
    assert -1e-2 < float(trace.logprobs[2]) < -1e-6
    weight, norm = vlm.anatomy.unembedding.weight.double(), vlm.anatomy.final_norm
    stream = trace.stream_at([2])[0].double()
    gain = norm.weight.double() / stream.square().mean().sqrt()
    slope = (weight[noun.token] - (weight @ (stream * gain)).softmax(-1) @ weight) * gain
    part = trace.activations[-1][2].double()[:, None] * vlm.anatomy.ffns[-1].projection.weight.double().T
    for score, right in (("readout", taken_out(vlm, trace, noun)), ("log_probability", part @ slope)):
        got = mmn.contributions(vlm, trace, noun, score)[-1]
        assert float((got - right).abs().max()) < 0.1 * float(right.abs().max()), score


def test_scores_of_log_p_know_what_becomes_of_the_products() -> None:
    """Granite multiplies them by a half; Gemma 4 bends them, so that they are not read off the stream."""
    halved, capped = (Family(name) for name in ("granite4_vision", "gemma4"))
    halved.given.pop("position_ids", None)  # the model counts itself
    ask = {"prompt": "", "prefix": "", "max_new_tokens": 3}
    trace = halved.caption(Image.new("RGB", (8, 8)), **ask)
    noun = Noun("x", "x", int(trace.tokens[1]), 1, (0, 1))
    right = taken_out(halved, trace, noun, lambda logits: logits / 2)
    got = mmn.contributions(halved, trace, noun, "readout")[-1]
    assert float((got - right).abs().max()) < 0.1 * float(right.abs().max()), "words beyond the likeliest count as one"
    assert float((taken_out(halved, trace, noun) - right).abs().max()) > 0.5 * float(right.abs().max())
    assert float(decompose.lens(halved, trace, 1)[-1, 0, noun.token]) == pytest.approx(float(trace.logprobs[1]), abs=1e-4)
    trace = capped.caption(Image.new("RGB", (8, 8)), **ask)
    for score in ("readout", "log_probability"):
        with pytest.raises(mmn.MmnError, match="bends its logits"):
            mmn.contributions(capped, trace, noun, score)
    assert mmn.contributions(capped, trace, noun, "norm_aware")[-1].any(), "up to a factor a noun's own logit is what it was"


def test_a_layer_that_a_pass_leaves_out_has_scores_of_0_and_no_others() -> None:
    """Mllama asked in words alone: the layer that would read the picture does not run, and its followers keep their scores."""
    vlm = real.vlm("mllama")
    trace = vlm.caption(None, "hello", "", 4)
    noun = Noun("", "", int(trace.tokens[1]), 1, (0, 0))
    (left_out,) = [layer for layer, each in enumerate(trace.activations) if not each.any()]
    scores = mmn.contributions(vlm, trace, noun, "gradient")
    assert [len(each) for each in scores] == vlm.anatomy.neurons
    assert [bool(each.any()) for each in scores] == [layer != left_out for layer in range(len(scores))]
    again = properties.reread(vlm, trace, record=True).trace(0)
    for one, other in zip(trace.activations, again.activations, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_pass_layers_without_neurons() -> None:
    """Nemotron-H has mixers between its FFNs, the first of them before any neuron."""
    vlm = Family("nemotron_h_omni")
    trace = vlm.caption(Image.new("RGB", (8, 8)), "", "", 3)
    noun = Noun("x", "x", int(trace.tokens[1]), 1, (0, 1))
    inputs = vlm.replay(trace, 1)
    picture = vlm.image_positions(inputs)[0]
    assert vlm.anatomy.neurons[0] == vlm.anatomy.neurons[2] == 0

    def slope(unit: int, where: Tensor) -> float:
        found = []
        for factor in (1.02, 0.98):

            def change(seen: Tensor, factor: float = factor) -> Tensor:
                changed = seen.clone()
                changed[0, where, unit] *= factor
                return changed

            with torch.no_grad(), hooked([vlm.anatomy.ffns[1].watch(change)]):
                logits = vlm.model(**inputs, use_cache=False).logits[0, -1]
            found.append(float(logits[noun.token]))
        return (found[0] - found[1]) / 0.04

    last = torch.arange(len(picture)) == len(picture) - 1
    for name, where in (("gradient", last), ("gradient_image", picture)):
        scores = mmn.contributions(vlm, trace, noun, name)
        assert [len(each) for each in scores] == vlm.anatomy.neurons
        unit = int(scores[1].abs().argmax())
        assert float(scores[1][unit]) == pytest.approx(slope(unit, where), rel=2e-2) and abs(scores[1][unit]) > 1e-3, name
    with pytest.raises(mmn.MmnError, match="cannot be copied"):
        oracle.Moment(vlm, trace, noun)


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_of_the_other_layers_stay_where_one_has_no_neurons(layer: int) -> None:
    vlm, trace = caption()
    ffns = list(vlm.anatomy.ffns)
    ffns[layer] = NoFFN(vlm.anatomy.layers[layer], vlm.hidden)
    fewer = mmn.VLM(vlm.model, vlm.processor, anatomy=replace(vlm.anatomy, ffns=ffns), lexicon=vlm.lexicon)
    again = fewer.caption(trace.image, max_new_tokens=8)
    noun = Noun("x", "x", 7, 3, (0, 1))
    for name in ("gradient", "gradient_image", "gradient_log_p"):
        right, got = (oracle.ALL[name](*pair, [noun]) for pair in ((vlm, trace), (fewer, again)))
        for place, (one, other) in enumerate(zip(right, got, strict=True)):
            assert other.shape == (1, 0) if place == layer else torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert oracle.integrated_gradients(fewer, again, [noun])[2].any()


def test_scores_that_need_the_stream_say_so() -> None:
    vlm, trace = caption()
    again = properties.retrace(vlm, trace.image, trace.tokens.tolist())
    noun = Noun("x", "x", 9, 2, (0, 1))
    for score in ("norm_aware", "log_probability", "readout"):
        with pytest.raises(mmn.MmnError, match="needs the residual stream"):
            mmn.contributions(vlm, again, noun, score)
    again.__dict__["nouns"] = [noun]
    with pytest.raises(mmn.MmnError, match="needs the residual stream"):
        Calibration.fit(vlm, [again])


# ------------------------------------------------------------------------------------------------------------------- ranking


@pytest.mark.parametrize("score", list(mmn.SCORES))
def test_rank_is_the_sorted_scores(score: str) -> None:
    vlm, trace = caption()
    rankings = mmn.rank(vlm, trace, k=72, score=score)
    assert list(rankings) == [noun.lemma for noun in trace.nouns] != []
    for noun in trace.nouns:
        ranking = rankings[noun.lemma]
        single = mmn.rank(vlm, trace, noun.lemma, k=72, score=score)
        scores = mmn.contributions(vlm, trace, noun, score)
        assert sorted(ranking.neurons) == sorted(single.neurons) == [mmn.Neuron(i // 24, i % 24) for i in range(72)]
        assert ranking.scores == sorted(ranking.scores, reverse=True) and ranking.noun == noun and ranking.score == score
        for (layer, unit), value, activation in zip(ranking.neurons, ranking.scores, ranking.activations, strict=True):
            torch.testing.assert_close(torch.tensor(value), scores[layer][unit], rtol=1e-4, atol=1e-6)
            assert activation == float(trace.activations[layer][noun.step, unit])
        table = ranking.table()
        assert list(table.columns) == ["layer", "unit", "score", "activation"] and list(table.index) == list(range(1, 73))


def test_rankings_of_several_captions_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.vlm()
    traces = vlm.caption(tiny.pictures(5), max_new_tokens=5)
    for number, trace in enumerate(traces):  # none of one, four of another
        trace.__dict__["nouns"] = [Noun(f"n{step}", f"n{step}", 5 + number + step, step, (0, 1)) for step in range(number)]
    monkeypatch.setattr("mmn.contribution.BATCH", 3)  # so that batches end in the middle of a caption
    together = mmn.rank_all(vlm, traces, k=72)
    assert list(map(len, together)) == [0, 1, 2, 3, 4]
    for trace, found in zip(traces, together, strict=True):
        alone = mmn.rank(vlm, trace, k=72)
        assert list(found) == list(alone)
        for lemma, one in found.items():
            other = alone[lemma]
            assert one.noun == other.noun and one.score == other.score == "direct"
            torch.testing.assert_close(torch.tensor(one.scores), torch.tensor(other.scores), rtol=1e-4, atol=1e-6)
            values = dict(zip(other.neurons, other.activations, strict=True))
            assert one.activations == [values[neuron] for neuron in one.neurons]
    assert mmn.rank_all(vlm, []) == []
    quiet = vlm.caption(tiny.pictures(1), record=False)
    with pytest.raises(mmn.MmnError, match="record=False"):
        mmn.rank_all(vlm, quiet)
    with pytest.raises(mmn.MmnError, match="between 1 and 72"):
        mmn.rank_all(vlm, traces, k=73)


def test_ranking_twice_is_bit_identical() -> None:
    vlm, trace = caption()
    for score in mmn.SCORES:
        one, other = (mmn.rank(vlm, trace, k=10, score=score) for _ in range(2))
        for lemma in one:
            assert one[lemma].neurons == other[lemma].neurons and one[lemma].scores == other[lemma].scores


def test_layers_of_other_sizes() -> None:
    """The places of a ranking are counted through layers of their own widths."""
    model, processor = tiny.llava_parts()
    for layer, width in zip(model.model.language_model.layers, (5, 40, 11), strict=True):
        layer.mlp.gate_proj, layer.mlp.up_proj = (torch.nn.Linear(16, width, bias=False) for _ in range(2))
        layer.mlp.down_proj = torch.nn.Linear(width, 16, bias=False)
    vlm = mmn.VLM(model, processor, lexicon=tiny.every_letter)
    assert vlm.anatomy.neurons == [5, 40, 11] and vlm.anatomy.total == 56
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=4)
    noun = Noun("x", "x", 7, 1, (0, 1))
    ranking = mmn.rank(vlm, trace, noun, k=56)
    scores = mmn.contributions(vlm, trace, noun)
    assert len(set(ranking.neurons)) == 56
    for (layer, unit), value in zip(ranking.neurons, ranking.scores, strict=True):
        assert value == float(scores[layer][unit])


def test_refuses() -> None:
    vlm, trace = caption()
    image = tiny.pictures(1)[0]
    cases = [
        (lambda: mmn.contributions(vlm, trace, "no-such-noun"), "does not say 'no-such-noun'"),
        (lambda: mmn.contributions(vlm, trace, trace.nouns[0], score="best"), "no score 'best'"),
        (lambda: mmn.contributions(vlm, trace, Noun("x", "x", 10**6, 0, (0, 1))), "no token 1000000"),
        (lambda: mmn.rank(vlm, trace, trace.nouns[0], k=0), "between 1 and 72, not 0"),
        (lambda: mmn.rank(vlm, trace, trace.nouns[0], k=73), "between 1 and 72, not 73"),
        (lambda: mmn.rank(vlm, trace, trace.nouns[0], k=2.5), "not 2.5"),
        (lambda: mmn.rank(vlm, trace, trace.nouns[0], k=True), "not True"),
        (lambda: mmn.rank(vlm, trace, trace.nouns[0], score=["direct"]), "no score"),
        (lambda: mmn.rank(vlm, vlm.caption(image, record=False), trace.nouns[0]), "record=False"),
        (lambda: mmn.rank(tiny.llava(intermediate_size=32), trace, trace.nouns[0]), "another model"),
    ]
    for call, sentence in cases:
        with pytest.raises(mmn.MmnError, match=sentence):
            call()


# ------------------------------------------------------------------------------------------------------- words a neuron writes


def test_top_tokens() -> None:
    vlm = tiny.vlm()
    neurons = [mmn.Neuron(layer, unit) for layer in range(3) for unit in range(24)]
    table = mmn.top_tokens(vlm, neurons, k=5)
    assert list(table.index) == [f"L{n.layer}.{n.unit}" for n in neurons]
    for row, (layer, unit) in zip(table.itertuples(), neurons, strict=True):
        logits = vlm.model.lm_head.weight @ vlm.model.model.language_model.layers[layer].mlp.down_proj.weight[:, unit]
        best = logits.sort(descending=True)
        torch.testing.assert_close(torch.tensor(row.weights), best.values[:5])
        assert row.tokens == [vlm.tokenizer.decode([t]) for t in best.indices[:5].tolist()]
        assert (row.layer, row.unit) == (layer, unit)


def test_top_tokens_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.vlm()
    neurons = [mmn.Neuron(layer, unit) for layer in (2, 0, 1) for unit in range(20)]
    whole = mmn.top_tokens(vlm, neurons, k=3)
    monkeypatch.setattr("mmn.semantics.BLOCK", 7)
    assert mmn.top_tokens(vlm, neurons, k=3).tokens.tolist() == whole.tokens.tolist()


def test_top_tokens_keeps_the_space_of_a_word() -> None:
    vlm = tiny.llava(style="pieces")
    words = mmn.top_tokens(vlm, [mmn.Neuron(0, 0)], k=len(vlm.tokenizer)).tokens.iloc[0]
    assert " image" in words


def test_a_ranking_stands_for_its_neurons() -> None:
    vlm, trace = caption()
    ranking = mmn.rank(vlm, trace, trace.nouns[0], k=3)
    assert mmn.top_tokens(vlm, ranking).equals(mmn.top_tokens(vlm, ranking.neurons))
    assert torch.equal(mmn.heatmap(vlm, trace, ranking).grid, mmn.heatmap(vlm, trace, ranking.neurons).grid)
    image = tiny.pictures(1)[0]
    with mmn.zero(vlm, ranking):
        zeroed = vlm.caption(image, max_new_tokens=2).stream
    with mmn.zero(vlm, ranking.neurons):
        assert torch.equal(vlm.caption(image, max_new_tokens=2).stream, zeroed)


def test_top_tokens_refuses() -> None:
    vlm = tiny.vlm()
    for k in (0, 10**6, "3", True):
        with pytest.raises(mmn.MmnError, match="k is a number of tokens"):
            mmn.top_tokens(vlm, [mmn.Neuron(0, 0)], k=k)  # type: ignore[arg-type]
    for neuron in (mmn.Neuron(3, 0), mmn.Neuron(0, 24), mmn.Neuron(-1, 0), mmn.Neuron(0, -1)):
        with pytest.raises(mmn.MmnError, match="no neuron"):
            mmn.top_tokens(vlm, [neuron])
    with pytest.raises(mmn.MmnError, match="is no neuron"):
        mmn.top_tokens(vlm, ["L0.3"])  # type: ignore[list-item]
    assert len(mmn.top_tokens(vlm, [])) == 0
