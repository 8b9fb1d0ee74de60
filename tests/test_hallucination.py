"""Hallucination: scenes that are what they are called, rates counted by hand, detectors of known answer, gates that restore."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import real
import tiny
import torch
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

import mmn
from mmn import hallucination as h
from mmn import metrics, scenes
from mmn.scenes import PLANTED


@pytest.fixture(scope="module")
def vlm() -> mmn.VLM:
    return mmn.load("tiny-llava")


def test_sets_are_what_they_are_called() -> None:
    sets = h.test_sets(8)
    assert {name: len(some) for name, some in sets.items()} == dict.fromkeys(
        ("biased", "with partner", "partner alone", "elsewhere"), 8
    )
    for scene in sets["biased"]:
        triggers = [name for name in scene.names if name in PLANTED]
        assert len(triggers) == 1 and PLANTED[triggers[0]] not in scene.names
    assert all(any(PLANTED.get(name) in scene.names for name in scene.names) for scene in sets["with partner"])
    assert all(set(PLANTED.values()) & set(s.names) and not s.biased for s in sets["partner alone"])
    assert not any(scene.biased for scene in sets["elsewhere"])


def test_rates_count_what_is_said() -> None:
    sets = {"biased": h.lacking("bed", 2, 0), "elsewhere": [scenes.draw(7, concepts=["cat"]), scenes.draw(8, concepts=["clock"])]}
    words = iter(["a bed and a clock", "a bed", "a cat and a dog", "nothing"])
    frame = h.chair(lambda images: [next(words) for _ in images], sets)
    found = h.rates(frame, draws=20)
    assert found["CHAIR_i, biased"].value == pytest.approx(1 / 3) and found["CHAIR_s, biased"].value == 0.5
    assert found["CHAIR_i, others"].value == 0.5
    shown = sum(len(scene.names) for some in sets.values() for scene in some)
    assert found["recall"].value == pytest.approx(3 / shown) and found["recall of partners"].value == 0


def test_a_change_is_that_of_the_same_scenes() -> None:
    """Against the arithmetic on whole sums; where nothing changes the interval is a point, however the rates themselves vary."""
    rng = np.random.default_rng(0)
    before = pd.DataFrame({"set": "biased", "scene": range(40), "wrong": rng.integers(0, 2, 40), "mentions": 3})
    after = before.sample(frac=1, random_state=0)
    assert h.change(before, after, "wrong", "mentions") == (0, 0, 0)
    after = before.assign(wrong=before["wrong"] * (before["scene"] % 2), mentions=2)
    was, now = before["wrong"].sum() / 120, after["wrong"].sum() / 80
    assert h.change(before, after, "wrong", "mentions").value == pytest.approx(now - was)
    gone = h.change(before, after, "wrong", "mentions", share=True)
    assert gone.value == pytest.approx(1 - now / was) and gone.low < gone.value < gone.high
    with pytest.raises(mmn.MmnError, match="the same scenes"):
        h.change(before, after[1:], "wrong", "mentions")


def test_exact_intervals_against_the_binomial() -> None:
    """At the bounds the tail beyond what was counted is 2.5 %."""
    found = h.exact(5, 11)
    assert found.value == 5 / 11
    assert binom.sf(4, 11, found.low) == pytest.approx(0.025) and binom.cdf(5, 11, found.high) == pytest.approx(0.025)
    assert h.exact(12, 12).high == 1 and h.exact(12, 12).low == pytest.approx(0.025 ** (1 / 12))
    with pytest.raises(mmn.MmnError, match="share of nothing"):
        h.exact(0, 0)


def test_pope_against_a_count_by_hand(vlm: mmn.VLM) -> None:
    some = h.lacking("boat", 4, 50)
    figures = h.pope(vlm, some, "adversarial")
    yes, right = [], []
    for scene in some:
        rng = np.random.default_rng([14, 0, scene.seed])
        present = str(rng.choice(scene.names))
        for name, there in ((present, True), ("bird", False)):
            said = vlm.answer(f"Is there {scenes.CONCEPTS[name].a} in the image?", scene.image, 4).lower().startswith("yes")
            yes.append(said)
            right.append(said == there)
    assert figures["yes"] == np.mean(yes) and figures["accuracy"] == np.mean(right)
    with pytest.raises(mmn.MmnError, match="random, popular or adversarial"):
        h.pope(vlm, some, "hard")


def test_auroc_is_of_the_same_noun() -> None:
    """Scores that tell the nouns apart, but not true from false, are worth nothing."""
    rng = np.random.default_rng(0)
    noun = np.repeat(["clock", "bird"], 100)
    true = np.tile([True, False], 100)
    table = pd.DataFrame(
        {
            "noun": noun,
            "true": true,
            "word": (noun == "clock") * 5.0 + rng.normal(size=200),
            "good": true * 2.0 + rng.normal(size=200),
        }
    )
    assert abs(h.auroc(table, "word", draws=50).value - 0.5) < 0.12
    by_hand = [roc_auc_score(table["true"][noun == n], table["good"][noun == n]) for n in ("clock", "bird")]
    assert h.auroc(table, "good", draws=50).value == pytest.approx(np.mean(by_hand))
    with pytest.raises(mmn.MmnError, match="No noun has both"):
        h.auroc(table[table["true"]], "good")


def test_a_voice_is_the_sum_of_the_direct_scores_at_the_patches(vlm: mmn.VLM) -> None:
    pictures = [s.image for s in h.holding("clock", 4, 100)]
    calibration = [s.image for s in scenes.sample(4, first=77)]
    voice = h.Voice.of(vlm, "clock", pictures, calibration, k=12)
    trace = vlm.caption(pictures[0])
    heat = mmn.heatmap(vlm, trace, voice.neurons)
    scores = vlm.anatomy.writes(voice.neurons) @ vlm.anatomy.words([voice.token])[0]
    by_hand = (heat.grid.flatten(1) * scores[:, None]).sum(0)
    torch.testing.assert_close(voice.patches(vlm, pictures)[0], by_hand, rtol=1e-3, atol=1e-3)
    loud = voice.loudest(vlm, calibration)
    assert float(loud.mean()) == pytest.approx(0, abs=1e-3) and float(loud.std()) == pytest.approx(1, abs=1e-3)
    other = replace(voice, neurons=[mmn.Neuron(2, 5), mmn.Neuron(7, 9)], mean=0.5)
    said = [h.Mention(scene, trace, trace.nouns[0]._replace(lemma="clock"), True) for scene in h.holding("clock", 2, 100)]
    table = h.loudness(vlm, said, {"its own": {"clock": voice}, "other": {"clock": other}})
    for name, each in (("its own", voice), ("other", other)):
        expected = [float(each.loudest(vlm, [m.scene.image])) for m in said]
        assert table[name].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert voice.level == pytest.approx(float(voice.loudest(vlm, pictures).mean()) / 2, rel=1e-3), "midway"


def test_other_neurons_share_layers_and_words_and_nothing_else(vlm: mmn.VLM) -> None:
    first = h.Voice("clock", 3, [mmn.Neuron(2, 5), mmn.Neuron(2, 6), mmn.Neuron(7, 9)], level=1.5)
    second = h.Voice("bird", 4, [mmn.Neuron(2, 6), mmn.Neuron(3, 3)])
    choices = h.other_neurons(vlm, {"clock": first, "bird": second}, draws=2)
    assert choices.pop("another noun's neurons") == {
        "clock": replace(first, neurons=[mmn.Neuron(3, 3)]),
        "bird": replace(second, neurons=[mmn.Neuron(2, 5), mmn.Neuron(7, 9)]),
    }
    assert len(choices) == 2
    for voices in choices.values():
        for name, own in (("clock", first), ("bird", second)):
            drawn = voices[name].neurons
            assert sorted(n.layer for n in drawn) == sorted(n.layer for n in own.neurons) and not set(drawn) & set(own.neurons)
            assert replace(voices[name], neurons=own.neurons) == own
    assert "another noun's neurons" not in h.other_neurons(vlm, {"clock": first}), "no other noun"


def test_neurons_by_weights_alone_are_the_top_of_the_weights(vlm: mmn.VLM) -> None:
    """Against every write's product with the word, neuron by neuron."""
    every = [mmn.Neuron(layer, unit) for layer, width in enumerate(vlm.anatomy.neurons) for unit in range(width)]
    token = vlm.tokenizer(" clock", add_special_tokens=False).input_ids[0]
    products = (vlm.anatomy.writes(every) @ vlm.anatomy.words([token])[0]).tolist()
    best = [neuron for _, neuron in sorted(zip(products, every, strict=True), key=lambda pair: -pair[0])[:3]]
    voice = h.Voice("clock", token, [best[1], mmn.Neuron(0, 0), mmn.Neuron(0, 1)], level=1.5)
    assert h.by_weights(vlm, {"clock": voice}) == {
        "weights alone": {"clock": replace(voice, neurons=best)},
        "weights alone, less those shared": {"clock": replace(voice, neurons=[best[0], best[2]])},
    }
    assert list(h.by_weights(vlm, {"clock": replace(voice, neurons=best)})) == ["weights alone"], "nothing is left"


def test_a_gate_acts_where_it_doubts_and_nowhere_else(vlm: mmn.VLM) -> None:
    images = [s.image for s in h.lacking("boat", 12, 300)]
    before = h.plain(vlm)(images)
    said = ["bird" in scenes.mentions(text) for text in before]
    assert any(said), "the bias is planted"
    voice = h.Voice("bird", 0, [mmn.Neuron(0, 0)])
    always, never = (h.gate(vlm, {"bird": voice}, {"bird": value})(images) for value in (1e9, -1e9))
    assert never == before
    assert not any("bird" in scenes.mentions(text) for text in always)
    assert [text for text, bird in zip(always, said, strict=True) if not bird] == [
        t for t, b in zip(before, said, strict=True) if not b
    ]
    assert h.plain(vlm)(images) == before
    for old, new in zip(before, always, strict=True):
        others = set(scenes.mentions(old)) - {"bird"}
        if "bird" in scenes.mentions(old) and others:
            assert set(scenes.mentions(new)) == others and h.well_formed(new), "all else stays, and it is a sentence"


def test_contrast_of_strength_nought_is_plain_decoding(vlm: mmn.VLM) -> None:
    images = [s.image for s in h.lacking("bed", 4, 400)]
    before = h.plain(vlm)(images)
    with h.contrasted(vlm, strength=0.0) as captioner:
        assert captioner(images) == before
    with h.contrasted(vlm, strength=3.0, cut=1e-6) as captioner:
        assert captioner(images) != before
    assert h.plain(vlm)(images) == before


def test_words_taken_away(vlm: mmn.VLM) -> None:
    images = [s.image for s in h.holding("beer", 4, 500)]
    with h.penalised(vlm, ["beer"], 100.0)():
        table = h.said_of(vlm, images, "beer", [mmn.PROMPT, *scenes.PARAPHRASES[:1]])
        assert h.silent(vlm, images, "beer", [mmn.PROMPT]) == [True] * 4
    assert list(table["share"]) == [0.0] * 4 and list(table["way"])[-2:] == ["sampled", "beam search"]
    table = h.said_of(vlm, images, "beer", [mmn.PROMPT])
    assert metrics.mean(np.array(table["share"])) > 0
    noun = "pencil"  # nobody's: the pictures show none, and all ways are asked
    mixed = [*images[:2], *(s.image for s in h.holding(noun, 2, 500))]
    ever = np.any(h.said_of(vlm, mixed, noun, [mmn.PROMPT])["said"].tolist(), axis=0)
    assert h.silent(vlm, mixed, noun, [mmn.PROMPT]) == (~ever).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("An image of a cat on the beach", True),
        ("An image of a cat, two dogs and an apple at night", True),
        ("An image of a cat to the left of a hot dog", True),
        ("An image of a and a cat", False),
        ("An image of a cat next to a", False),
        ("An image of an cat", False),
    ],
)
def test_well_formed(text: str, whole: bool) -> None:
    assert h.well_formed(text) is whole


def test_every_caption_of_the_world_is_well_formed() -> None:
    assert all(h.well_formed(f"An image of {scene.caption}") for scene in scenes.sample(300))


def test_pictures_of_different_numbers_of_tokens_are_refused() -> None:
    vlm = real.vlm("llava_next")
    voice = h.Voice("x", 5, [mmn.Neuron(0, 1)])
    with pytest.raises(mmn.MmnError, match="differ in their number of image tokens"):
        h.patches(vlm, [*tiny.pictures(1), *tiny.pictures(1, size=(80, 40))], [voice])
