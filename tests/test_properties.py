"""The measures of the three properties, on cases whose answer is known by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import mmn
from mmn import metrics, nouns, properties, scenes, semantics
from mmn.errors import MmnError
from mmn.properties import KS, Case


@pytest.fixture(scope="module")
def vlm():
    """A model of this file's own: tests plant neurons in it."""
    return tiny.llava()


@pytest.fixture(scope="module")
def speaker():
    """One that knows the world's nouns."""
    return mmn.VLM(*tiny.llava_parts(), "speaker", lexicon=nouns.scene_nouns)


@pytest.fixture(scope="module")
def case(vlm):
    found = properties.cases(vlm, tiny.pictures(2))
    return max(found, key=lambda each: each.noun.step)


def logits_of(vlm, image, tokens, prompt=mmn.PROMPT, prefix=mmn.PREFIX):
    """Log probabilities at the steps of `tokens`, by a plain forward pass with nothing of the module under test."""
    inputs = vlm.inputs([image], [prompt], [prefix])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None, :-1]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return vlm.model(**inputs, use_cache=False).logits[0, -len(tokens) :].log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------- cases, rereading


def test_a_case_ranks_as_the_library_does(vlm, case):
    ranking = mmn.rank(vlm, case.trace, case.noun, k=20)
    assert case.top(20) == ranking.neurons
    assert np.allclose(case.scores[case.order(20)].numpy(), ranking.scores, atol=1e-6)
    assert properties.neurons_at((3, 0, 2), [0, 2, 3, 4]) == [(0, 0), (0, 2), (2, 0), (2, 1)]


def test_a_scenes_noun_counts_only_if_the_scene_shows_it(speaker):
    scene = scenes.draw(1)
    assert properties.cases(speaker, [scene]) == []  # it babbles
    forced = properties.cases(speaker, [scene], force=True)
    assert sorted(each.lemma for each in forced) == sorted(scene.names)
    assert all(each.forced and each.scene is scene and each.trace.text.endswith(scene.caption) for each in forced)
    other = next(name for name in scenes.CONCEPTS if name not in scene.names)
    true, false = (properties.say(speaker, scene.image, f"{mmn.PREFIX} a {name}") for name in (scene.names[0], other))
    assert [n.lemma for n in properties._shown(true, scene)] == [scene.names[0]]
    assert properties._shown(false, scene) == [] and [n.lemma for n in properties._shown(false, None)] == [other]


def test_reading_again_gives_what_the_caption_left(vlm, case):
    reading = properties.reread(vlm, case.trace, rows=3, record=True)
    expected = logits_of(vlm, case.trace.image, case.trace.tokens)
    for row in range(3):
        assert torch.equal(reading.best[row], case.trace.tokens)
        assert torch.allclose(reading.logp[row], case.trace.logprobs, atol=1e-4)
        assert torch.allclose(reading.logp[row], expected.gather(-1, case.trace.tokens[:, None])[:, 0], atol=1e-4)
    for layer, recorded in enumerate(case.trace.activations):
        assert torch.allclose(reading.activations[layer][1], recorded, atol=1e-4)


def test_each_row_reads_its_own_picture(vlm, case):
    others = tiny.pictures(3, seed=9)
    reading = properties.reread(vlm, case.trace, others, record=True)
    for row, image in enumerate(others):
        expected = logits_of(vlm, image, case.trace.tokens)
        assert torch.allclose(reading.logp[row], expected.gather(-1, case.trace.tokens[:, None])[:, 0], atol=1e-4)
    again = properties.on_pictures(vlm, case, [case.trace.image, others[0]])
    assert torch.allclose(again[0].scores, case.scores, atol=1e-4)
    assert not torch.allclose(again[1].scores, case.scores, atol=1e-4)
    assert again[1].trace.image is others[0]


def test_words_put_into_its_mouth_are_read_as_if_it_had_said_them(vlm, case):
    image = case.trace.image
    text = f"{mmn.PREFIX} a strawberry and a dog"
    trace = properties.say(vlm, image, text)
    assert trace.text == text
    expected = logits_of(vlm, image, trace.tokens)
    assert torch.allclose(trace.logprobs, expected.gather(-1, trace.tokens[:, None])[:, 0], atol=1e-4)
    with pytest.raises(MmnError, match="begin with"):
        properties.say(vlm, image, "A dog")


# --------------------------------------------------------------------------------------------------------------- causal effect


def test_effects_are_those_of_one_intervention_at_a_time(vlm, case):
    lists = {"found": case.top(5), "random": mmn.same_layer_random(vlm, case.top(5), draws=3)}
    table = properties.effects(vlm, case, lists, rows_at_once=3)
    base = logits_of(vlm, case.trace.image, case.trace.tokens)
    step, token = case.noun.step, case.noun.token
    for _, row in table.iterrows():
        neurons = lists["found"] if row["neurons"] == "found" else lists["random"][row["draw"]]
        with mmn.zero(vlm, neurons):
            now = logits_of(vlm, case.trace.image, case.trace.tokens)
        assert row["drop"] == pytest.approx(float(base[step, token] - now[step, token]), abs=1e-4)
        assert row["flip"] == float(int(now[step].argmax()) != token)
        others = [noun for noun in case.trace.nouns if noun.step != step]
        drops = [float(base[noun.step, noun.token] - now[noun.step, noun.token]) for noun in others]
        assert row["others"] == pytest.approx(np.mean(drops), abs=1e-4)


def test_changing_nothing_has_no_effect(vlm, case):
    means = properties.at_noun(case)
    none = properties.effects(vlm, case, {"none": []})
    same = properties.effects(vlm, case, {"same": case.top(5)}, properties.scaled(1.0))
    for table in (none, same):
        assert table["drop"].abs().max() < 1e-4 and not table["flip"].any()
        assert table["rest"].dropna().eq(1).all()
    swapped = properties.effects(vlm, case, {"found": case.top(5)}, properties.replaced_by(means))
    with mmn.mean_ablate(vlm, case.top(5), means):
        now = logits_of(vlm, case.trace.image, case.trace.tokens)
    before = logits_of(vlm, case.trace.image, case.trace.tokens)
    step, token = case.noun.step, case.noun.token
    assert swapped["drop"][0] == pytest.approx(float(before[step, token] - now[step, token]), abs=1e-4)


def planted(vlm, case, size=30.0):
    """A model in which one neuron of the last layer alone makes the noun: its write points along the noun's row, the other rows are
    put across it."""
    twin = tiny.llava()
    anatomy = twin.anatomy
    neuron = mmn.Neuron(len(anatomy.ffns) - 1, 7)
    trace = properties.say(twin, case.trace.image, f"{mmn.PREFIX} a cat")
    step = len(trace.tokens) - 1
    noun = mmn.Noun("cat", "cat", int(trace.tokens[step]), step, (0, 0))
    sign = torch.sign(trace.activations[neuron.layer][step, neuron.unit])
    row = anatomy.words([noun.token])[0]
    anatomy.ffns[neuron.layer].columns[:, neuron.unit] = sign * size * row / row.norm()
    trace = properties.say(twin, case.trace.image, f"{mmn.PREFIX} a cat")
    scores = torch.cat(mmn.contributions(twin, trace, noun))
    return twin, neuron, Case(0, trace, noun, scores, tuple(anatomy.neurons))


def test_a_planted_neuron_is_found_needed_and_enough(vlm, case):
    twin, neuron, found = planted(vlm, case)
    assert found.top(1) == [neuron]
    assert properties.word_ranks(twin, [neuron], found.noun.token).tolist()[0] in (1, len(twin.tokenizer))
    lists = {"found": [neuron], "random": mmn.same_layer_random(twin, [neuron], draws=10)}
    table = properties.effects(twin, found, lists).groupby("neurons")["drop"].mean()
    assert table["found"] > 10 * abs(table["random"])


def test_a_transplant_of_everything_closes_the_gap_and_of_nothing_leaves_it(vlm, case):
    other = tiny.pictures(1, seed=20)[0]
    everything = [mmn.Neuron(layer, unit) for layer, size in enumerate(vlm.anatomy.neurons) for unit in range(size)]
    lists = {"nothing": [], "some": case.top(10), "everything": everything}
    moved = properties.transplant(vlm, case, other, lists).set_index("neurons")
    step, token = case.noun.step, case.noun.token
    there, here = (logits_of(vlm, image, case.trace.tokens)[step, token] for image in (case.trace.image, other))
    assert moved.loc["nothing", "gain"] == pytest.approx(0, abs=1e-4)
    same = properties.transplant(vlm, case, case.trace.image, lists).set_index("neurons")
    assert same["gain"].abs().max() < 1e-4  # its own activations, put where they were
    last = properties.transplant(vlm, case, other, lists, where="last").set_index("neurons")

    def by_hand(mask_of):
        """The patch, done once more by plain hooks on the projections."""
        short = replace(case.trace, tokens=case.trace.tokens[: step + 1])
        given, taken = vlm.replay(short, step), []
        hooks = [f.projection.register_forward_pre_hook(lambda _, a: taken.append(a[0])) for f in vlm.anatomy.ffns]
        with torch.no_grad():
            vlm.model(**given, use_cache=False)
        for hook in hooks:
            hook.remove()
        mask = mask_of(given)[None, :, None]
        hooks = [
            f.projection.register_forward_pre_hook(lambda _, a, t=t: (torch.where(mask, t, a[0]),))
            for f, t in zip(vlm.anatomy.ffns, taken, strict=True)
        ]
        with torch.no_grad():
            out = vlm.model(**vlm.replay(replace(short, image=other), step), use_cache=False).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return float(out.log_softmax(-1)[token] - here)

    positions = torch.arange(vlm.replay(case.trace, step)["input_ids"].shape[1])
    assert moved.loc["everything", "gain"] == pytest.approx(by_hand(lambda given: positions >= 0), abs=1e-3)
    assert last.loc["everything", "gain"] == pytest.approx(by_hand(lambda given: positions == len(positions) - 1), abs=1e-3)
    gap = float(there - here)
    if gap > 0.1:
        assert moved.loc["everything", "share"] == pytest.approx(moved.loc["everything", "gain"] / gap, rel=1e-3)
    with pytest.raises(MmnError, match="where is"):
        properties.transplant(vlm, case, other, lists, where="nowhere")


def test_flips_say_what_a_new_caption_says(vlm, case):
    chosen = [(case, case.top(5)), (case, [])]
    table = properties.flips(vlm, chosen)
    with mmn.zero(vlm, case.top(5)):
        new = vlm.caption(case.trace.image, record=False)
    before, after = [n.lemma for n in case.trace.nouns], [n.lemma for n in new.nouns]
    assert table["gone"].tolist() == [case.lemma not in after, False]
    assert table["kept"][0] == len(set(before) & set(after) - {case.lemma})
    assert table["kept"][1] == table["others"][1] == len(before) - 1
    assert bool(table["same"][1]) and table["instead"][1] == ""


def test_flips_ask_what_the_case_was_asked(vlm, case):
    trace = vlm.caption(case.trace.image, "Who is it?", "The", max_new_tokens=50)
    assert trace.text != vlm.caption(case.trace.image).text
    assert bool(properties.flips(vlm, [(replace(case, trace=trace), [])])["same"][0])


# ----------------------------------------------------------------------------------------------------------------- sensitivity


def test_the_rank_of_a_word_is_its_place_among_sorted_products(vlm):
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(2, 5)]
    ids, _ = semantics.top_token_ids(vlm, neurons, 12)
    for place in (0, 4, 11):
        for row, neuron in enumerate(neurons):
            assert properties.word_ranks(vlm, [neuron], int(ids[row, place])).tolist() == [place + 1]


def test_overlap_counts_what_two_rankings_share():
    rng = np.random.default_rng(0)
    one, other = rng.permutation(300), rng.permutation(300)
    ks = (1, 3, 10, 100, 300)
    expected = [len(set(one[:k]) & set(other[:k])) / k for k in ks]
    assert properties.overlap(one, other, ks).tolist() == expected
    assert properties.overlap(one, one, ks).tolist() == [1.0] * 5
    assert properties.overlap(np.arange(10), np.arange(10, 20), (1, 10)).tolist() == [0, 0]
    many = properties.overlap(np.stack([one, one]), np.stack([other, one]), ks)
    assert many[0].tolist() == expected and many[1].tolist() == [1.0] * 5
    draws = [properties.overlap(rng.permutation(300), one, (30,))[0] for _ in range(400)]
    assert np.mean(draws) == pytest.approx(30 / 300, abs=0.01)  # chance is k / neurons
    with pytest.raises(MmnError, match="fewer"):
        properties.overlap(one, other, KS)


def test_a_heatmap_equal_to_the_mask_is_perfect_and_its_reverse_is_not():
    mask = np.zeros((20, 20), bool)
    mask[3:9, 4:12] = True
    assert properties.agreement(mask.astype(float), mask) == (1.0, True, 1.0)
    worst = properties.agreement(1 - mask.astype(float), mask)
    assert worst.iou == 0 and not worst.pointing and worst.auprc == pytest.approx(mask.mean(), abs=0.01)
    noise = np.random.default_rng(0).random((20, 20))
    hot = np.unravel_index(noise.argmax(), noise.shape)
    assert properties.agreement(noise, mask).pointing == mask[hot]
    half = np.zeros((20, 20))
    half[3:9, 4:8] = 1.0  # the left half of the object, and nothing else
    assert properties.agreement(half, mask).iou >= 24 / (48 + 24)  # the rest of its pixels fall anywhere
    unseen = np.where(np.arange(20)[:, None] < 15, mask.astype(float), np.nan)  # the model never saw the rows below
    assert properties.agreement(unseen, mask)[:2] == (1.0, True)
    with pytest.raises(MmnError, match="empty"):
        properties.agreement(noise, np.zeros_like(mask))


def test_a_neuron_that_fires_on_the_object_locates_it(speaker, monkeypatch):
    """The heatmap's activations are replaced by the object's own cover of each patch; random neurons keep noise."""
    scene = scenes.draw(3)
    (case, *_) = properties.cases(speaker, [scene], force=True)
    cover = torch.from_numpy(scene.mask(case.lemma).reshape(4, 30, 4, 30).mean((1, 3))).float()
    generator = torch.Generator().manual_seed(0)

    def heat(vlm, trace, neurons):
        grid = torch.rand(len(neurons), 4, 4, generator=generator) * 0.1
        grid[:10] = cover
        return mmn.Heatmap(list(neurons), grid, trace.image.size, (0, 0, 120, 120))

    monkeypatch.setattr(mmn, "heatmap", heat)
    row = properties.localisation(speaker, case, k=10, draws=3)
    assert row["iou"] > 0.4 > row["iou_random"] and row["pointing"] == 1
    assert row["auprc"] > 2 * row["share"] > 0
    with pytest.raises(MmnError, match="drawn scenes"):
        properties.localisation(speaker, replace(case, scene=None))


def test_a_shuffle_that_moves_nothing_changes_nothing(vlm, case, monkeypatch):
    moved = properties.shuffled(vlm, case, seed=1)
    assert not torch.allclose(moved.scores, case.scores, atol=1e-4)
    identity = torch.arange(16)
    with mmn.shuffle_image_tokens(vlm, identity):
        same = properties.on_pictures(vlm, case, [case.trace.image])[0]
    assert torch.allclose(same.scores, case.scores, atol=1e-4)


def test_minimal_pairs_change_one_thing():
    scene = scenes.draw(11, concepts=["cat", "car"], style="noto")
    pairs = properties.variants(scene, "cat")
    assert {"removed", "replaced", "neighbour", "recoloured", "elsewhere", "restyled"} <= set(pairs)
    assert pairs["removed"].names == ("car",)
    assert "cat" not in pairs["replaced"].names and "car" in pairs["replaced"].names
    assert "cat" in pairs["neighbour"].names and "car" not in pairs["neighbour"].names
    assert pairs["elsewhere"].place != scene.place and pairs["restyled"].style == scenes.HELD_OUT_STYLE
    car = scene.mask("car")
    assert all(np.array_equal(pairs[name].mask("car"), car) for name in ("replaced", "recoloured", "elsewhere"))
    with pytest.raises(MmnError, match="no dog"):
        properties.variants(scene, "dog")


def test_scores_in_the_form_of_bertscore_and_clipscore():
    words = torch.eye(4)
    assert properties.text_score(words[:2], words[:2]) == 1
    assert properties.text_score(words[:2], words[2:]) == 0
    assert properties.text_score(words[:1], words[:2]) == pytest.approx(2 * 1 * 0.5 / 1.5)  # precision 1, recall a half
    assert properties.image_score(words[:2], words[:1]) == pytest.approx(2.5 / 2)
    assert properties.image_score(words[:1], -words[:1]) == 0


def test_the_own_encoder_reads_the_embeddings(vlm):
    encoder = properties.OwnEncoder(vlm)
    table = vlm.model.get_input_embeddings().weight
    ids = vlm.tokenizer(" strawberry", add_special_tokens=False)["input_ids"]
    vector = table[ids].mean(0) - table[: len(vlm.tokenizer)].mean(0)
    assert torch.allclose(encoder.words(["strawberry"])[0], vector / vector.norm(), atol=1e-5)
    assert encoder.picture(tiny.pictures(1)[0]).shape == (16, 16)


def test_known_pairs_tell_a_perfect_encoder_from_a_blind_one():
    names = list(scenes.CONCEPTS)
    kinds = sorted({concept.category for concept in scenes.CONCEPTS.values()})

    class Perfect:
        def words(self, texts):
            each = torch.eye(len(names) + len(kinds))
            rows = [each[names.index(t)] + each[len(names) + kinds.index(scenes.CONCEPTS[t].category)] for t in texts]
            return torch.stack(rows) / 2**0.5

        def picture(self, image):
            return self.words(shown)

    found = [scenes.draw(2)]
    shown = list(found[0].names)
    assert properties.known_pairs(Perfect(), found) == {"text": 1.0, "image": 1.0}


# ----------------------------------------------------------------------------------------------------------------- specificity


def test_dominance_of_a_diagonal_matrix_and_of_a_shuffled_one():
    perfect = properties.dominance(np.eye(12))
    assert perfect.rows == 1 and perfect.ratio == np.inf and perfect.p < 0.001
    shifted = properties.dominance(np.roll(np.eye(12), 1, axis=1))
    assert shifted.rows == 0 and shifted.p > 0.9
    rng = np.random.default_rng(0)
    ps = [properties.dominance(rng.random((8, 8)), draws=400, seed=n).p for n in range(60)]
    assert 0.3 < np.mean(ps) < 0.7  # what no matrix has, the test does not find
    assert properties.dominance([[2.0, 1.0], [0.5, 3.0]]).ratio == pytest.approx(2.5 / 0.75)
    with pytest.raises(MmnError, match="square"):
        properties.dominance(np.ones((2, 3)))


def test_selectivity_is_one_for_a_neuron_of_one_concept_and_nought_for_one_of_all():
    means = np.array([[1.0, 2, 0, 3], [0.0, 2, 0, -1], [0.0, 2, 0, 1]])
    found = properties.selectivity(means)
    assert found[:2].tolist() == [1, 0] and np.isnan(found[2])
    assert found[3] == pytest.approx((3 - 1) / (3 + 1))


def test_a_control_fires_on_as_many_pictures():
    fires = np.zeros((20, 12), bool)
    for neuron, count in enumerate([10, 9, 11, 0, 0, 20, 10, 2, 3, 2, 0, 20]):
        fires[:count, neuron] = True
    rows = properties.firing_alike(fires, (7, 5), [0, 7], never=[6], draws=2)
    assert set(rows[0].tolist()) == {1, 2} and set(rows[1].tolist()) == {8, 9}  # neuron 6 would be as good as any
    assert [len(row) for row in properties.firing_alike(fires, (7, 5), [8], draws=9)] == [4]  # the layer has no more
    drawn = {properties.firing_alike(np.ones((3, 12)), (12,), [0], draws=1, seed=seed)[0].item() for seed in range(40)}
    assert len(drawn) > 5 and 0 not in drawn  # equals are drawn at random
    with pytest.raises(MmnError, match="layer 1 was found"):
        properties.firing_alike(fires, (7, 5), range(7, 12))


def test_neurons_of_a_category_are_told_from_the_best_of_many():
    kinds = {name: "ab"[n % 2] for n, name in enumerate("pqrstuvwxyz1")}
    sets = {name: {100 + n, 1 if kind == "a" else 3 + n % 3} for n, (name, kind) in enumerate(kinds.items())}
    table = properties.category_neurons(sets, kinds, draws=300)
    assert table.loc["a", ["neuron", "inside", "outside"]].tolist() == [1, 1, 0]
    assert table.loc["a", "difference"] > table.loc["a", "dealt_high"] > table.loc["a", "dealt"] > 0
    names = list(kinds)
    for kind, row in table.iterrows():  # by counting
        best = max(
            sum(place in sets[n] for n in names if kinds[n] == kind) / 6
            - sum(place in sets[n] for n in names if kinds[n] != kind) / 6
            for place in set().union(*sets.values())
        )
        assert row["difference"] == pytest.approx(best) and row["inside"] - row["outside"] == pytest.approx(best)
    with pytest.raises(MmnError, match="two categories"):
        properties.category_neurons(sets, dict.fromkeys(names, "a"))


def test_shared_neurons_of_related_concepts_are_told_from_chance():
    kinds = {name: "ab"[n % 2] for n, name in enumerate("pqrstuvwxy")}
    related = {name: {ord(kind), n} for n, (name, kind) in enumerate(kinds.items())}
    found = properties.kinship(related, kinds)
    assert found.share == (1, 1, 1) and found.chance.value == pytest.approx(4 / 9, abs=0.03) and found.p < 0.05
    mixed = {name: {0, n} for n, name in enumerate(kinds)}  # all share one neuron
    found = properties.kinship(mixed, kinds)
    assert found.share.value == pytest.approx(20 / 45) and found.share.low < 20 / 45 < found.share.high and found.p > 0.3
    with pytest.raises(MmnError, match="No two"):
        properties.kinship({name: {n} for n, name in enumerate(kinds)}, kinds)


# ------------------------------------------------------------------------------------------------------------------ statistics


def test_intervals_resample_pictures():
    frame = pd.DataFrame({"picture": [0, 0, 0, 1, 2], "neurons": "found", "drop": [1.0, 1, 1, 3, np.nan]})
    mean = properties.clustered(frame, "drop")
    assert mean.value == pytest.approx(1.5) and (mean.low, mean.high) == (1, 3)  # two pictures: three, one or none of each
    table = properties.summary(frame, ["neurons"], "drop")
    assert table["value"].tolist() == [1.5] and table["pictures"].tolist() == [2]  # one has no value
    table = properties.summary(frame.assign(kind="all"), ["kind"], "drop", draws=1000)
    assert properties.told(table, ".4f").to_dict() == {("all",): f"{mean:.4f}"}
    ratio = properties.clustered(pd.DataFrame({"picture": [0, 1], "kept": [1, 3], "others": [2, 3]}), "kept", "others")
    assert ratio.value == pytest.approx(4 / 5)


def test_a_difference_is_tested_by_flipping_signs():
    rng = np.random.default_rng(0)
    rows = []
    for picture in range(30):
        level = rng.normal()
        for name, shift in (("found", 2.0), ("random", 0.0), ("same", 2.0)):
            rows.append({"picture": picture, "neurons": name, "drop": level + shift + rng.normal(0, 0.3)})
    table = properties.against(pd.DataFrame(rows), "drop")
    assert table.loc["random", "difference"] == pytest.approx(2, abs=0.2) and table.loc["random", "p"] < 0.001
    assert table.loc["random", "d"] > 2 and table.loc["random", "low"] > 1.5
    assert abs(table.loc["same", "difference"]) < 0.3 and table.loc["same", "p"] > 0.05
    assert metrics.Interval(*table.loc["same", ["difference", "low", "high"]]).low < 0
    with pytest.raises(MmnError, match="No row"):
        properties.against(pd.DataFrame(rows), "drop", found="nobody")


# ---------------------------------------------------------------------------------------------------------------- other encoders


def test_clip_scores_words_and_pictures_as_transformers_does(tmp_path):
    """A CLIP of random weights, saved and loaded: cosines must be those that transformers' own CLIPModel computes."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    words = tiny.tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**small, **ids}, vision_config=vision, projection_dim=8)
    model = CLIPModel(config).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False), words)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = properties.ClipEncoder(str(tmp_path))
    texts, (image,) = ["cat", "beach"], tiny.pictures(1)
    assert encoder.words(texts).norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-5)
    given = processor(text=[f"A photo depicts {text}" for text in texts], images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**given).logits_per_image[0] / model.logit_scale.exp()
    cosines = (encoder.words(texts) @ encoder.picture(image).T)[:, 0]
    assert torch.allclose(cosines, expected, atol=1e-5)
    with pytest.raises(MmnError, match="no CLIP checkpoint"):
        properties.ClipEncoder(str(tmp_path / "nowhere"))


def test_a_text_encoder_reads_words_in_context(tmp_path):
    """A BERT of random weights: the score of a text with itself is 1, and vectors are those of its own forward pass."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    words = tiny.tokenizer()
    config = BertConfig(vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    encoder = properties.BertEncoder(str(tmp_path), layer=1)
    given = words("a cat", return_tensors="pt")
    with torch.no_grad():
        hidden = model(given["input_ids"], output_hidden_states=True).hidden_states[1][0, 1:]  # less <s>
    assert torch.allclose(encoder.words(["a", "cat"]), hidden / hidden.norm(dim=-1, keepdim=True), atol=1e-5)
    assert properties.text_score(encoder.words(["a", "cat"]), encoder.words(["a", "cat"])) == pytest.approx(1)
    with pytest.raises(MmnError, match="no text encoder"):
        properties.BertEncoder(str(tmp_path / "nowhere"))


def test_the_strict_control_of_heatmaps_fires_as_widely(speaker) -> None:
    """On as many image tokens of the same picture, counted here neuron by neuron."""
    (case, *_) = properties.cases(speaker, [scenes.draw(3)], force=True)
    top = case.top(5)
    draws = properties.as_wide(speaker, case.trace, top, draws=3)

    def fires(neuron: mmn.Neuron) -> int:
        return int((mmn.heatmap(speaker, case.trace, [neuron]).grid != 0).sum())

    for draw in draws:
        assert [n.layer for n in draw] == [n.layer for n in top] and not set(draw) & set(top) and len(set(draw)) == 5
        assert all(abs(fires(one) - fires(other)) <= 2 for one, other in zip(draw, top, strict=True))
    assert draws == properties.as_wide(speaker, case.trace, top, draws=3) and draws[0] != draws[1]
    rows = [properties.localisation(speaker, case, 5, draws=3, wide=wide) for wide in (False, True)]
    assert rows[0]["iou"] == rows[1]["iou"] and rows[0]["iou_random"] != rows[1]["iou_random"]
