"""Many pictures through a few neurons: against the heatmap, a plain hook, scikit-learn, and tables made by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import mmn
from mmn import gallery, properties, scenes, semantics
from mmn.errors import MmnError


def test_peaks_are_the_heatmaps_highest_values():
    vlm = tiny.llava()
    images = tiny.pictures(5)
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(1, 0), mmn.Neuron(0, 1)]
    found = gallery.peaks(vlm, images, neurons, batch_size=2)
    for row, image in zip(found, images, strict=True):
        trace = vlm.caption(image, max_new_tokens=1)
        torch.testing.assert_close(row, mmn.heatmap(vlm, trace, neurons).grid.flatten(1).amax(1), rtol=1e-4, atol=1e-5)


def test_a_word_is_read_where_it_stands():
    vlm = mmn.load("tiny-llava")
    neuron = mmn.Neuron(7, 5)
    text = "Is an elephant in the image?"
    ids = vlm.inputs([None], [text], [""])["input_ids"][0].tolist()
    places = gallery.word_places(vlm, ids, "elephant")
    assert len(places) == 2 and vlm.tokenizer.decode([ids[p] for p in places]).strip() == "elephant"
    seen = []
    handle = vlm.model.model.language_model.layers[7].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        vlm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    expected = seen[0][0, places, 5].max()
    torch.testing.assert_close(gallery.at_word(vlm, text, "elephant", [neuron])[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(MmnError, match="does not hold the tokens of 'zebra'"):
        gallery.at_word(vlm, text, "zebra", [neuron])


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_scikit_learns(samples):
    values, positive = zip(*samples, strict=True)
    table = torch.tensor(values)[:, None].float()
    if len(set(positive)) == 1:
        with pytest.raises(MmnError, match="two kinds"):
            gallery.auroc(table, positive)
    else:
        np.testing.assert_allclose(gallery.auroc(table, positive), roc_auc_score(positive, values))


WORDS = ("dog", "hammer", "fish")


def test_choices_of_neurons():
    vlm = mmn.load("tiny-llava")
    sets = gallery.choices(vlm, WORDS, 5)
    assert list(sets) == ["found", "by pictures", "another concept's", "random"]
    assert all(list(some) == list(WORDS) and all(len(mine) == 5 for mine in some.values()) for some in sets.values())
    assert len(gallery.everyone(sets)) == 4 * 3 * 5
    assert sets["another concept's"]["fish"] == sets["found"]["dog"]
    found, random = ({n for mine in sets[name].values() for n in mine} for name in ("found", "random"))
    assert not found & random and sorted(n.layer for n in random) == sorted(
        n.layer for mine in sets["found"].values() for n in mine
    )
    # what tells the concepts' pictures apart does so on other pictures of them
    scenery = gallery.showing(WORDS, each=1)
    values = gallery.peaks(vlm, [scene.image for _, scene in scenery], gallery.everyone(sets))
    table = gallery.aurocs(values, [word for word, _ in scenery], sets)
    means = table.groupby("neurons")["auroc"].mean()
    assert min(means["found"], means["by pictures"]) > 0.8 > 0.65 > max(means["random"], means["another concept's"])
    with pytest.raises(MmnError, match="at least two"):
        gallery.choices(vlm, WORDS[:1])


def test_scenes_show_their_concept_in_every_art_and_no_other_one_asked_for():
    found = gallery.showing(WORDS, each=3)
    for word in WORDS:
        mine = [scene for name, scene in found if name == word]
        arts = [style for style in (*scenes.STYLES, scenes.HELD_OUT_STYLE) if word in scenes.sprites(style)]
        assert sorted(scene.style for scene in mine) == sorted(3 * arts)
        assert all(word in scene.names and not {*WORDS} - {word} & {*scene.names} for scene in mine)
        assert {len(scene.objects) for scene in mine if scene.style == scenes.HELD_OUT_STYLE} == {1, 2}
    assert [scene.place for name, scene in found if name == "dog"] == [scene.place for name, scene in found if name == "fish"]


def test_aurocs_and_responses_of_made_up_values():
    names = [mmn.Neuron(0, unit) for unit in range(4)]
    sets = {"found": {"a": names[:1], "b": names[1:2]}, "random": {"a": names[2:3], "b": names[3:]}}
    asked = ["a", "a", "b"]
    values = torch.tensor([[3.0, 0, 1, -2], [4, 1, 1, -1], [2, 2, 1, -3]])
    table = gallery.aurocs(values, asked, sets)
    assert table["neurons"].tolist() == ["found", "found", "random", "random"] and table["concept"].tolist() == ["a", "b", "a", "b"]
    assert table["auroc"].tolist() == [1, 1, 0.5, 0]
    assert gallery.aurocs(values[:2], asked[:2], sets)["auroc"].isna().all()
    expected = [[1, 2 / 3.5], [0.25, 1], [1, 1], [0, 0]]
    np.testing.assert_allclose(gallery.responses(values, asked, ["a", "b"]), expected, rtol=1e-6)


def test_how_selective_a_neuron_is_by_hand():
    names = [mmn.Neuron(0, unit) for unit in range(6)]
    sets = {
        "found": {"a": names[:1], "b": names[1:2], "c": names[2:3]},
        "random": {"a": names[3:4], "b": names[4:5], "c": names[5:]},
    }
    answers = torch.tensor([[1, 0.5, 0.1], [1, 0.2, 0.4], [0, 0, 1], [0, 0, 0], [0.3, 1, 0.3], [1, 1, 0.5]])
    table = gallery.selective(answers, sets)
    assert table["concept"].tolist() == ["a", "b", "c"] * 2 and (table["rank"] == 1).all()
    np.testing.assert_allclose(table["own"], [1, 0.2, 1, np.nan, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(table["others"], [0.3, 0.7, 0, np.nan, 0.3, 1], rtol=1e-6)
    np.testing.assert_array_equal(table["largest"], [1, 0, 1, np.nan, 1, 0])
    with pytest.raises(MmnError, match="give one each"):
        gallery.selective(answers[:2], sets)


def test_what_a_neuron_writes_is_compared_by_a_word_s_first_token():
    vlm = mmn.load("tiny-llava")
    (case,) = (
        case for case in properties.cases(vlm, [scenes.draw(5, concepts=["hammer"], style="noto")]) if case.lemma == "hammer"
    )
    assert case.noun.token == gallery.first_token(vlm, "hammer")
    neurons = [mmn.Neuron(7, unit) for unit in range(512)]
    ids, _ = semantics.top_token_ids(vlm, neurons, 10)
    writes = torch.tensor([[case.noun.token in row] for row in ids.tolist()])[:, 0].numpy()
    assert (gallery.written(vlm, neurons, [("hammer",)] * 512) == writes).all() and 0 < writes.sum() < 512
    assert not gallery.written(vlm, neurons, [()] * 512).any()
    one, other = neurons[int(writes.argmax())], neurons[int(writes.argmin())]
    piece = semantics.token_text(vlm, case.noun.token).strip()
    assert gallery.reads_as(vlm, one, "hammer") == ("writes it" if piece == "hammer" else f"writes its first piece {piece!r}")
    assert gallery.reads_as(vlm, other, "hammer") == "does not write it"
    back = gallery.first_token(vlm, "backpack")
    one = neurons[next(row for row, each in enumerate(ids.tolist()) if back in each)]
    assert gallery.reads_as(vlm, one, "backpack") == "writes its first piece 'back'"


def test_ious_are_those_of_the_located_heatmaps():
    vlm = mmn.load("tiny-llava")
    cases = properties.cases(vlm, list(scenes.sample(2, first=40)))
    table = gallery.ious(vlm, cases, (1, 10, 50), most=10, draws=2, seed=3)
    assert len(table) == 5 * len(cases) and set(table[table["neurons"] == "random"]["k"]) == {1, 10}
    for number, (case, (_, part)) in enumerate(zip(cases, table.groupby(["picture", "noun"], sort=False), strict=True)):
        at = part.set_index(["neurons", "k"])["iou"]
        for k in (1, 10):  # any other neuron of the layers may be drawn, not those outside of the longest list alone
            drawn = mmn.same_layer_random(vlm, case.top(k), draws=2, seed=3 + number)
            maps = [mmn.heatmap(vlm, case.trace, neurons).on_image() for neurons in (case.top(k), *drawn)]
            found, *random = (properties.agreement(values, case.scene.mask(case.lemma)).iou for values in maps)
            assert at["found", k] == pytest.approx(found, abs=1e-3)
            assert at["random", k] == pytest.approx(np.mean(random), abs=1e-3)
        assert (part["positive"] == int((case.scores > 0).sum())).all()
    assert gallery.ious(vlm, [], (1,)).empty


def test_ious_have_no_control_where_a_layer_has_too_few_others():
    vlm = mmn.load("tiny-llava")
    cases = properties.cases(vlm, list(scenes.sample(1, first=40)))[:1]
    sizes = vlm.anatomy.neurons
    table = gallery.ious(vlm, cases, (1, sum(sizes) - 1), most=sum(sizes), draws=1)
    assert list(zip(table["neurons"], table["k"], strict=True)) == [("found", 1), ("found", sum(sizes) - 1), ("random", 1)]


def test_maps():
    vlm = tiny.llava()
    (image,) = tiny.pictures(1)
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(1, 0)]
    heat = mmn.heatmap(vlm, vlm.caption(image, max_new_tokens=1), neurons)
    fig = gallery.maps(image, heat, mmn.top_tokens(vlm, neurons)["tokens"])
    assert [ax.get_title().splitlines()[0] for ax in fig.axes[:2]] == ["L0.3", "L1.0"] and not fig.axes[2].axison
    assert fig.axes[0].get_xlabel() and not fig.axes[2].get_xlabel()
    gallery.scale(fig.axes[3], np.array([[-0.0004, 0.123], [np.nan, 0.02]]))
    assert fig.axes[3].get_xlabel() == "0 to 0.12"
    gallery.one_map(vlm, image, neurons[0], fig.axes[2], 7.0, "a title")
    assert fig.axes[2].images[-1].get_clim() == (0, 7) and fig.axes[2].get_title() == "a title"
    plt.close(fig)


def test_faces():
    vlm = tiny.llava()
    images = tiny.pictures(3)
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(1, 0)]
    excites = torch.tensor([[1.0, 5], [3, 4], [2, 6]])
    fig = gallery.faces(vlm, neurons, images, excites, k=2)
    rows = np.array(fig.axes).reshape(2, 5)
    assert [ax.get_title() for ax in rows[0, 1:]] == ["peak 3.0", "peak 2.0", "peak 1.0", ""] and not rows[0, 4].axison
    assert [ax.get_title() for ax in rows[1, 1:4]] == ["peak 6.0", "peak 5.0", "peak 4.0"]
    assert {ax.images[-1].get_clim() for ax in rows[1, 1:4]} == {(0, 6)}
    text = rows[1, 0].texts[0].get_text().splitlines()
    written = mmn.top_tokens(vlm, neurons[1:], k=2)["tokens"].iloc[0]
    assert text[0] == "L1.0" and text[1:] == [gallery.plots.label(word.strip()) for word in written]
    plt.close(fig)


def test_what_a_scene_shows_are_its_objects_and_its_place():
    scene = scenes.draw(3, concepts=["dog"], place="snow", style="noto")
    assert gallery.visible(scene) == ("dog", "clouds", "snow")
