"""The causal oracle against the model read anew for one neuron at a time, and its measures against answers known by hand."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import real
import tiny
import torch
from PIL import Image
from test_edit_families import Family
from transformers import MistralConfig

import mmn
from mmn import oracle
from mmn.calibration import Calibration
from mmn.editors import by_gradient, by_oracle
from mmn.hooks import hooked
from mmn.nouns import Noun


@pytest.fixture(scope="module")
def case() -> tuple[mmn.VLM, mmn.Trace, Noun]:
    vlm = tiny.llava()
    return vlm, vlm.caption(tiny.pictures(1)[0], max_new_tokens=6), Noun("x", "x", 9, 3, (0, 1))


def read(vlm: mmn.VLM, trace: mmn.Trace, noun: Noun, layer: int, unit: int) -> torch.Tensor:
    """Logits of the whole sequence read without a cache, one neuron silent at its last position."""

    def silence(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        changed = args[0].clone()
        changed[0, -1, unit] = 0
        return (changed,)

    handle = vlm.model.model.language_model.layers[layer].mlp.down_proj.register_forward_pre_hook(silence)
    with torch.no_grad():
        logits = vlm.model(**vlm.replay(trace, noun.step), use_cache=False).logits[0, -1]
    handle.remove()
    return logits


def test_each_effect_is_that_of_the_whole_sequence_read_again(case) -> None:
    vlm, trace, noun = case
    effects = oracle.oracle(vlm, trace, noun, batch=7)
    with torch.no_grad():
        base = vlm.model(**vlm.replay(trace, noun.step), use_cache=False).logits[0, -1]
    assert effects.log_p.shape == (72,) and float(effects.log_p.abs().max()) > 1e-3
    for layer, unit in ((0, 0), (0, 23), (1, 5), (2, 11), (2, 23)):
        now = read(vlm, trace, noun, layer, unit)
        place = 24 * layer + unit
        right = (
            base.log_softmax(-1)[9] - now.log_softmax(-1)[9],
            base[9] - now[9],
            base[9] - base.mean() - (now[9] - now.mean()),
        )
        for got, expected in zip((effects.log_p, effects.logit, effects.centred), right, strict=True):
            assert float(got[place]) == pytest.approx(float(expected), abs=2e-5)


def test_a_model_that_hands_its_words_on_to_another(monkeypatch) -> None:
    """InstructBLIP's own forward takes no cache; the model of words inside it does."""
    vlm = real.vlm("instructblip")
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=4)
    noun = Noun("x", "x", int(trace.tokens[2]), 2, (0, 1))
    effects = oracle.oracle(vlm, trace, noun, batch=7)
    start = 0
    for ffn in vlm.anatomy.ffns:

        def silence(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            changed = args[0].clone()
            changed.view(-1, changed.shape[-1])[-1, 1] = 0  # one row of positions
            return (changed,)

        inputs = vlm.replay(trace, noun.step)
        with torch.no_grad():
            base = vlm.model(**inputs).logits[0, -1].log_softmax(-1)[noun.token]
            with hooked([ffn.projection.register_forward_pre_hook(silence)]):
                now = vlm.model(**inputs).logits[0, -1].log_softmax(-1)[noun.token]
        assert float(effects.log_p[start + 1]) == pytest.approx(float(base - now), abs=2e-5)
        start += ffn.neurons
    assert float(effects.log_p.abs().max()) > 1e-4
    monkeypatch.setattr(oracle, "PreTrainedModel", torch.nn.Bilinear)
    with pytest.raises(mmn.MmnError, match="keeps no keys and values"):
        oracle.Moment(vlm, trace, noun)


def test_the_last_layers_gradient_agrees_with_small_effects(case) -> None:
    """Scaling instead of zeroing: the gradient of log p is the slope of the same function the oracle takes a step on."""
    vlm, trace, noun = case
    moment = oracle.Moment(vlm, trace, noun)
    slopes = torch.cat([layer[0] for layer in oracle.gradient_log_p(vlm, trace, [noun])])
    for place in (3, 30, 60):
        factors = torch.ones(2, 72)
        factors[0, place], factors[1, place] = 1.05, 0.95
        up, down = moment.measures(moment.without(factors))[:, 0]
        assert float(up - down) / 0.1 == pytest.approx(float(slopes[place]), abs=2e-4)


def test_integrated_gradients_add_up_to_what_all_neurons_do(case) -> None:
    vlm, trace, noun = case
    moment = oracle.Moment(vlm, trace, noun)
    scores = torch.cat([layer[0] for layer in oracle.integrated_gradients(vlm, trace, [noun])])
    log_p = moment.measures(moment.without(torch.stack([torch.ones(72), torch.zeros(72)])))[:, 0]
    assert float(scores.sum()) == pytest.approx(float(log_p[0] - log_p[1]), abs=0.02 * float((log_p[0] - log_p[1]).abs()) + 1e-3)


def test_a_layer_that_a_pass_leaves_out_has_a_slope_of_0_and_the_others_theirs() -> None:
    """Mllama asked in words alone: the layer that would read the picture does not run."""
    vlm = real.vlm("mllama")
    trace = vlm.caption(None, "hello", "", 4)
    moment = oracle.Moment(vlm, trace, Noun("x", "x", int(trace.tokens[2]), 2, (0, 1)))
    fired = [bool(each.any()) for each in moment.activations]
    assert fired.count(False) == 1
    for steps in (0, 64):
        found = oracle.slopes(moment, steps)
        assert [len(each) for each in found] == vlm.anatomy.neurons and [bool(each.any()) for each in found] == fired
    log_p = moment.measures(moment.without(torch.ones(2, vlm.anatomy.total) * torch.tensor([[1.0], [0.0]])))[:, 0]
    assert float(torch.cat(found).sum()) == pytest.approx(float(log_p[0] - log_p[1]), rel=0.02)


def test_everywhere_is_the_package_s_zero(case) -> None:
    vlm, trace, noun = case
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(1, 7), mmn.Neuron(2, 20)]
    got = oracle.oracle_everywhere(vlm, trace, noun, neurons, batch=3)
    for neuron, effect in zip(neurons, got, strict=True):
        logs = []
        for chosen in ([], [neuron]):
            with torch.no_grad(), mmn.zero(vlm, chosen):
                logs.append(vlm.model(**vlm.replay(trace, noun.step), use_cache=False).logits[0, -1].log_softmax(-1)[9])
        assert float(effect) == pytest.approx(float(logs[0] - logs[1]), abs=2e-5)


def test_copies_of_a_picture_in_flat_patches() -> None:
    """Qwen2-VL's pixels are `[patches, width]`, whose first axis counts no pictures."""
    vlm = Family("qwen2_vl")
    trace = vlm.caption(Image.new("RGB", (8, 8)), "", "", 3)
    assert len(vlm.given["pixel_values"]) > 1
    word = trace.nouns[-1]
    neurons = by_gradient(vlm, [trace], word.lemma, 6)
    inputs = vlm.replay(trace, word.step)

    def log_p(chosen: list[mmn.Neuron]) -> float:
        with torch.no_grad(), mmn.zero(vlm, chosen):
            return float(vlm.model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)[word.token])

    effects = [log_p([]) - log_p([neuron]) for neuron in neurons]
    assert max(map(abs, effects)) > 1e-2
    assert oracle.oracle_everywhere(vlm, trace, word, neurons, batch=4).tolist() == pytest.approx(effects, abs=1e-4)
    order = sorted(neurons, key=lambda neuron: -effects[neurons.index(neuron)])
    assert by_oracle(vlm, [trace], word.lemma, 3, candidates=6) == order[:3]


def test_agreement_by_hand() -> None:
    effect = torch.arange(200.0)
    perfect = oracle.agreement(effect * 3, effect)
    assert perfect == {"spearman": pytest.approx(1), "p10": 1.0, "p50": 1.0, "auroc": 1.0}
    opposite = oracle.agreement(-effect, effect)
    assert opposite["spearman"] == pytest.approx(-1) and opposite["p50"] == 0 and opposite["auroc"] == 0
    half = effect.clone()
    half[195:] = -1  # five of the ten best are missed, and both of the largest two
    assert oracle.agreement(half, effect)["p10"] == 0.5 and oracle.agreement(half, effect)["auroc"] < 0.03
    assert oracle.agreement(torch.zeros(200), effect)["spearman"] == 0
    with pytest.raises(mmn.MmnError, match="one of each"):
        oracle.agreement(effect, effect[:9])


def test_a_difference_is_paired_by_scene() -> None:
    rows = [(0, "a", 0.9), (0, "a", 0.5), (0, "b", 0.6), (1, "a", 0.2), (1, "b", 0.0), (2, "a", 1.0)]  # scene 2 has no b
    table = pd.DataFrame(rows, columns=["key", "score", "auroc"])
    found = oracle.difference(table, "a", "b", "auroc")
    assert found.value == pytest.approx((0.1 + 0.2) / 2) and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.2)
    with pytest.raises(mmn.MmnError, match="no score 'c'"):
        oracle.difference(table, "a", "c", "auroc")


def test_areas_by_hand() -> None:
    straight = pd.DataFrame({"share": [0, 0.5, 1], "kept": [-4.0, -2.0, 0.0], "removed": [0.0, -2.0, -4.0]})
    assert oracle.areas(straight)["cpr"] == pytest.approx(0.5) and oracle.areas(straight)["cmd"] == pytest.approx(0.5)
    at_once = pd.DataFrame({"share": [0, 0.01, 1], "kept": [-4.0, 0.0, 0.0], "removed": [0.0, -3.0, -4.0]})
    assert oracle.areas(at_once)["cpr"] == pytest.approx(0.995)
    assert oracle.areas(at_once)["removal"] == 3


def test_curves_begin_and_end_with_none_and_all(case) -> None:
    vlm, trace, noun = case
    moment = oracle.Moment(vlm, trace, noun)
    curve = oracle.curves(moment, torch.rand(72))
    assert curve["kept"].iloc[-1] == pytest.approx(curve["removed"].iloc[0], abs=1e-4)
    assert curve["kept"].iloc[0] == pytest.approx(curve["removed"].iloc[-1], abs=1e-4)
    assert curve["kept"].iloc[0] != pytest.approx(curve["kept"].iloc[-1], abs=1e-3)


def test_every_score_is_compared_and_the_oracle_would_win(case) -> None:
    vlm, trace, noun = case
    effects = oracle.oracle(vlm, trace, noun)

    def truth(vlm: mmn.VLM, trace: mmn.Trace, nouns: list[Noun]) -> list[torch.Tensor]:
        return [layer[None] for layer in effects.log_p.split([24, 24, 24])]

    table = oracle.compare(vlm, trace, noun, oracle.ALL | {"truth": truth})
    assert set(table.index) == {*mmn.SCORES, "gradient_log_p", "integrated_gradients", "truth"}
    assert table.loc["truth", "spearman"] == pytest.approx(1) and table.loc["truth", "p10"] == 1
    assert (table["spearman"].drop("truth") < 1).all() and np.isfinite(table.to_numpy(float)).all()


def test_log_probability_is_the_slope_of_log_p_with_the_norms_scale_frozen(case) -> None:
    vlm, trace, noun = case
    norm = vlm.model.model.language_model.norm
    stream = trace.stream[noun.step].clone().requires_grad_()
    scale = norm.weight / (stream.detach().pow(2).mean() + norm.variance_epsilon).sqrt()
    (slope,) = torch.autograd.grad((vlm.model.lm_head.weight @ (stream * scale)).log_softmax(-1)[9], stream)
    got = mmn.contributions(vlm, trace, noun, "log_probability")
    for layer, module in enumerate(vlm.model.model.language_model.layers):
        right = trace.activations[layer][noun.step] * (slope @ module.mlp.down_proj.weight)
        torch.testing.assert_close(got[layer], right.detach(), rtol=1e-3, atol=1e-5)


def test_readout_is_the_true_effect_of_the_last_layer_and_knows_no_later_ones(case) -> None:
    vlm, trace, noun = case
    effects = oracle.oracle(vlm, trace, noun).log_p
    got = torch.cat(mmn.contributions(vlm, trace, noun, "readout"))
    assert float(effects[48:].abs().max()) > 1e-2
    torch.testing.assert_close(got[48:], effects[48:], atol=2e-3, rtol=2e-2)  # words beyond the likeliest count as one
    assert float((got[:48] - effects[:48]).abs().max()) > 1e-2
    # The first layer: its write taken out of the final norm's input by hand.
    ffn, norm = vlm.anatomy.ffns[0], vlm.model.model.language_model.norm
    stream = trace.stream[noun.step]
    writes = trace.activations[0][noun.step][:, None] * ffn.write(range(24))
    with torch.no_grad():
        logs = vlm.model.lm_head(norm(torch.cat([stream[None], stream - writes]))).log_softmax(-1)[:, 9]
    torch.testing.assert_close(got[:24], logs[0] - logs[1:], atol=2e-3, rtol=2e-2)


def test_readout_follows_a_norm_that_takes_the_mean_off_and_a_model_without_one(case) -> None:
    vlm, trace, noun = case
    vlm = copy.copy(vlm)
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for other in (norm, None):
        vlm.anatomy = dataclasses.replace(vlm.anatomy, final_norm=other)
        writes = trace.activations[2][noun.step][:, None] * vlm.anatomy.ffns[2].write(range(24))
        stream = torch.cat([trace.stream[noun.step][None], trace.stream[noun.step] - writes])
        with torch.no_grad():
            logs = vlm.model.lm_head(stream if other is None else other(stream)).log_softmax(-1)[:, 9]
        got = mmn.contributions(vlm, trace, noun, "readout")[2]
        torch.testing.assert_close(got, logs[0] - logs[1:], atol=3e-3, rtol=3e-2)


def test_copies_side_by_side_say_what_copies_in_a_batch_say(case, monkeypatch) -> None:
    vlm, trace, noun = case
    moment = oracle.Moment(vlm, trace, noun)
    factors = torch.rand(5, 72, generator=torch.Generator().manual_seed(0)) * 2
    together = moment.without(factors)
    assert oracle._PACKS[vlm][0] and float((together[0] - together[1]).abs().max()) > 1e-2
    monkeypatch.setitem(oracle._PACKS, vlm, (0, 0))
    torch.testing.assert_close(moment.without(factors), together, atol=1e-5, rtol=1e-4)
    monkeypatch.delitem(oracle._PACKS, vlm)
    monkeypatch.setattr(oracle.Moment, "_packed", lambda moment, rows: moment._repeated(rows) * 1.01)  # copies that see each other
    torch.testing.assert_close(moment.without(factors), together, atol=1e-5, rtol=1e-4)
    assert not oracle._PACKS[vlm][0]


def test_a_window_of_attention_is_noticed_at_the_first_text_that_exceeds_it(monkeypatch) -> None:
    monkeypatch.setattr(
        tiny, "LlamaConfig", lambda **given: MistralConfig(**given | {"sliding_window": 45, "num_key_value_heads": 2})
    )
    vlm = tiny.llava()
    noun = Noun("x", "x", 9, 1, (0, 1))
    for prompt in ("a cat", "a cat next to a dog on the beach and a strawberry " * 2):
        trace = vlm.caption(tiny.pictures(1)[0], prompt, max_new_tokens=3)
        inputs = vlm.replay(trace, 1)
        effects = oracle.oracle(vlm, trace, noun, batch=7).log_p
        logs = []
        for chosen in (None, 20):

            def silence(seen: torch.Tensor, chosen: int | None = chosen) -> torch.Tensor:
                changed = seen.clone()
                changed[0, -1, [] if chosen is None else chosen] = 0
                return changed

            with torch.no_grad(), hooked([vlm.anatomy.ffns[1].watch(silence)]):
                logs.append(vlm.model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)[9])
        assert float(effects[24 + 20]) == pytest.approx(float(logs[0] - logs[1]), abs=2e-5)
    longest, shortest = oracle._PACKS[vlm]
    assert 0 < longest < 45 < shortest == inputs["input_ids"].shape[1]


def test_the_calibration_of_one_moment_is_its_gradient(case) -> None:
    """Where the norm's scale hardly changes the two differ little, and after the last layer the path is the identity."""
    vlm, trace, noun = case
    oracle._PACKS.pop(vlm, None)  # a model seen for the first time is tried before the calibration's hooks are on
    fitted = Calibration.fit(vlm, [trace])
    assert oracle._PACKS[vlm][0] and fitted.moments == len(trace.nouns) > 0
    torch.testing.assert_close(fitted.paths[-1], torch.eye(16), atol=1e-3, rtol=1e-3)
    alone = mmn.Trace(**{**{f: getattr(trace, f) for f in trace.__dataclass_fields__}})
    alone.__dict__["nouns"] = [noun]
    path = Calibration.fit(vlm, [alone]).paths[0]
    moved = []
    for sign in (1, -1):

        def push(_: torch.nn.Module, __: object, out: torch.Tensor, sign: int = sign) -> torch.Tensor:
            changed = out.clone()
            changed[0, -1, 5] += sign * 1e-2
            return changed

        seen: list[torch.Tensor] = []
        text = vlm.model.model.language_model
        handles = [text.layers[0].mlp.down_proj.register_forward_hook(push)]
        handles.append(text.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1])))
        with torch.no_grad():
            vlm.model(**vlm.replay(trace, noun.step), use_cache=False)
        for handle in handles:
            handle.remove()
        moved.append(seen[0])
    torch.testing.assert_close(path[5], (moved[0] - moved[1]) / 2e-2, atol=5e-3, rtol=5e-2)


def test_a_calibration_is_of_one_model(case) -> None:
    vlm, trace, noun = case
    with pytest.raises(mmn.MmnError, match="of the model other"):
        Calibration([], [], "other", 1)(vlm, trace, [noun])


def test_rows_of_the_table_are_comparisons_and_calibrate_on_no_held_out_concept(monkeypatch) -> None:
    from mmn import nouns, oracle_tables, scenes

    vlm = mmn.VLM(*tiny.llava_parts(), "speaker", lexicon=nouns.scene_nouns)
    shown: list[str] = []
    real = scenes.draw

    def watched(seed: int, **options: object) -> scenes.Scene:
        shown.extend(options.get("concepts", ()))  # type: ignore[arg-type]
        return real(seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scenes, "draw", watched)
    oracle_tables.scores(vlm)
    assert len(set(shown)) == 16 and not set(shown) & set(oracle_tables.HELD_OUT)
    assert set(oracle_tables.HELD_OUT) < set(scenes.CONCEPTS)
    scene = real(oracle_tables.FIRST)
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=6)
    trace.__dict__["nouns"] = [Noun(scene.names[0], scene.names[0], 9, 3, (0, 1))]
    monkeypatch.setattr(vlm, "caption", lambda image: trace)
    rows = {row["score"]: row for row in oracle_tables.oracle_table(vlm, 0)}
    assert set(rows) == set(oracle.ALL) and rows["direct"]["noun"] == scene.names[0]
    alone = oracle.compare(vlm, trace, trace.nouns[0], {"direct": mmn.SCORES["direct"]})
    assert rows["direct"]["spearman"] == pytest.approx(alone.loc["direct", "spearman"], abs=1e-4)
