"""The slow tables of the three properties, small, on a tiny random model: each row against the measure it stands for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import mmn
from mmn import nouns, properties, scenes, semantics
from mmn import property_tables as made


@pytest.fixture(scope="module")
def speaker():
    return mmn.VLM(*tiny.llava_parts(), "speaker", lexicon=nouns.scene_nouns)


@pytest.fixture(scope="module")
def case(speaker):
    return properties.cases(speaker, [made.scene_of(1)], force=True)[0]


def test_each_key_is_a_scene_of_its_own_without_a_planted_trigger():
    found = [made.scene_of(key) for key in range(30)]
    assert len({scene.seed for scene in found}) == 30 and not any(scene.biased for scene in found)


def test_forced_captions_count_only_where_there_are_no_others():
    frame = pd.DataFrame({"drop": [1, 2, 3], "forced": [True, False, False]})
    assert made.own(frame)["drop"].tolist() == [2, 3]
    assert made.own(frame[:1])["drop"].tolist() == [1]


def test_the_unit_of_noise_is_the_spread_of_all_writes(speaker):
    every = torch.cat([ffn.projection.weight.flatten() for ffn in speaker.anatomy.ffns])
    assert made.spread(speaker) == pytest.approx(float(every.square().mean().sqrt()), rel=1e-5)


def test_causal_rows_are_single_effects(speaker, case):
    rows = pd.DataFrame(made.causal_rows(speaker, case, ks=(1, 5), few=(5,), draws=2))
    assert set(rows["change"]) == {"zero", "mean", "resample", "scale", "noise"}
    zero = rows[rows["change"].eq("zero")].set_index(["neurons", "k"])["drop"]
    alone = properties.effects(speaker, case, {"found": case.top(5)})["drop"][0]
    assert zero["found", 5] == pytest.approx(alone, abs=1e-4)
    draws = mmn.same_layer_random(speaker, case.top(5), draws=2, seed=case.scene.seed + 5)
    assert zero["random", 5] == pytest.approx(properties.effects(speaker, case, {"r": draws})["drop"].mean(), abs=1e-4)
    scale = rows[rows["change"].eq("scale") & rows["neurons"].eq("found")].set_index("level")["drop"]
    assert scale[-1.0] != scale[2.0]
    other = made.another(speaker, case)
    assert other.lemma not in case.scene.names
    resampled = properties.effects(speaker, case, {"f": case.top(5)}, properties.replaced_by(properties.at_noun(other)))
    kept = rows[rows["change"].eq("resample") & rows["neurons"].eq("found")]["drop"].item()
    assert kept == pytest.approx(resampled["drop"][0], abs=1e-4)


def test_rows_of_a_scene_are_means_over_its_nouns(case):
    rows = made.mean_rows([case, case], [[{"k": 1, "drop": 1.0}], [{"k": 1, "drop": 2.0}]], ["k"], ["drop"])
    assert rows == [{"k": 1, "drop": 1.5, "nouns": 2, "forced": True}]


def test_invariance_of_an_unchanged_picture_is_one(speaker, case, monkeypatch):
    monkeypatch.setattr(properties, "variants", lambda scene, noun: {"same": scene})
    rows = {row["kind"]: row for row in made.invariance_rows(speaker, case, (1, 5, 10), shuffles=2)}
    assert [rows["same"][f"k{k}"] for k in (1, 5, 10)] == [1, 1, 1] and rows["same"]["drop"] == pytest.approx(0, abs=1e-4)
    assert rows["shuffle"]["k10"] < 1 or rows["shuffle"]["drop"] != 0
    again = properties.shuffled(speaker, case, 0)
    assert made.pair_rows(case, again, "x", (10,))[0]["k10"] == len(set(case.top(10)) & set(again.top(10))) / 10


def test_the_share_with_the_word_is_counted_from_the_token_lists(speaker, case):
    row = made.semantic_row(speaker, case, properties.OwnEncoder(speaker), k=8)
    ids, _ = semantics.top_token_ids(speaker, case.top(8), 10)
    assert row["in10"] == np.mean([case.noun.token in each for each in ids.tolist()])
    assert row["rank"] >= 1 and 0 <= row["in10_random"] <= 1


def test_words_that_are_nouns_of_the_caption_are_left_out(speaker):
    scene = next(s for s in (scenes.draw(n) for n in range(20)) if len(s.names) > 1)
    case = properties.cases(speaker, [scene], force=True)[0]
    nouns_said = {noun.lemma for noun in case.trace.nouns}
    first = {noun.token for noun in case.trace.nouns}
    neurons = case.top(6)
    ids, _ = semantics.top_token_ids(speaker, neurons, 40)
    for row, words in zip(ids.tolist(), made.word_lists(speaker, case, neurons, rest=True), strict=True):
        kept = [semantics.token_text(speaker, t) for t in row if t not in first]
        expected = [w for w in kept if w.strip() and scenes._LEMMA.get(w.strip().lower()) not in nouns_said][:10]
        assert words == expected
    assert made._lemmas(nouns.scene_nouns, "carrots") == {"carrot"} and not made._lemmas(nouns.scene_nouns, "the")


def test_each_choice_of_neurons_is_what_it_says(speaker, case):
    found = made.choices(speaker, case, 6, draws=3)
    assert found["found"] == [case.top(6)] and len(found["random"]) == 3
    every = [mmn.Neuron(layer, unit) for layer, count in enumerate(case.layers) for unit in range(count)]
    word = speaker.anatomy.words([case.noun.token])[0]
    reads = (speaker.anatomy.writes(every) @ word).tolist()
    assert found["weights alone"][0] == [n for _, n in sorted(zip(reads, every, strict=True), key=lambda p: -p[0])[:6]]
    size = [abs(float(case.trace.activations[n.layer][case.noun.step, n.unit])) for n in every]
    loudest = [n for _, n in sorted(zip(size, every, strict=True), key=lambda p: -p[0]) if n not in case.top(6)]
    assert set(found["loudest others"][0]) == set(loudest[:6])


def test_rows_of_words_agree_with_those_of_the_slow_table(speaker, case):
    encoder = properties.OwnEncoder(speaker)
    rows = {row["neurons"]: row for row in made.word_rows(speaker, case, encoder, k=8)}
    slow = made.semantic_row(speaker, case, encoder, k=8)
    for name in ("rank", "in10", "text", "image"):
        assert rows["found"][name] == pytest.approx(slow[name]) and rows["random"][name] == pytest.approx(slow[f"{name}_random"])
    lists = made.word_lists(speaker, case, case.top(8), rest=True)
    caption = encoder.words(case.trace.text[len(case.trace.prefix) :].replace(",", " ").split())
    by_hand = np.mean([properties.text_score(encoder.words(each), caption) for each in lists])
    assert rows["found"]["text_rest"] == pytest.approx(by_hand)


def test_columns_of_the_specificity_table_by_hand(speaker, monkeypatch):
    monkeypatch.setattr(made, "CONCEPTS", ("cat", "dog", "car"))
    monkeypatch.setattr(made, "TOP", 5)
    made._sets.cache_clear()
    rows = pd.DataFrame(made.specificity(speaker, "dog")).set_index("neurons")
    top = [set(made.of_concept(made.portraits(speaker, "dog", first), 5).tolist()) for first in (3 * 10**7, 4 * 10**7)]
    assert rows.loc["dog", "overlap"] == len(top[0] & top[1]) / 5
    found = made.portraits(speaker, "cat", 3 * 10**7)
    assert [each.scene.names for each in found] == [("cat",)] * made.PICTURES
    top = properties.neurons_at(found[0].layers, torch.stack([each.scores for each in found]).mean(0).topk(5).indices.numpy())
    (token,) = {each.noun.token for each in found}
    word = speaker.anatomy.words([token])[0]
    total = 0.0
    for each in made.portraits(speaker, "dog", 4 * 10**7):
        fires = [float(each.trace.activations[layer][each.noun.step, unit]) for layer, unit in top]
        total += sum(a * float(write @ word) for a, write in zip(fires, speaker.anatomy.writes(top), strict=True))
    assert rows.loc["cat", "score"] == pytest.approx(total / made.PICTURES, abs=1e-3)
    made._sets.cache_clear()


def test_a_word_that_the_answer_does_not_say_gives_no_figure(speaker, monkeypatch):
    monkeypatch.setattr(made, "CONCEPTS", ("cat", "dog"))
    monkeypatch.setattr(made, "TOP", 5)
    monkeypatch.setattr(made, "in_words", lambda vlm, concept: None)
    made._sets.cache_clear()
    (row,) = made.text_specificity(speaker, "dog")
    assert not row["said"] and np.isnan(row["k10"]) and np.isnan(row["other100"])
    made._sets.cache_clear()


def test_scenes_of_other_measures_are_not_used_again():
    assert {made.FIRST + 10 * key for key in range(made.SCENES)}.isdisjoint(range(5 * 10**6 + 1000))
    assert all(scenes.CONCEPTS[name].frequency >= 3 for name in made.CONCEPTS)
