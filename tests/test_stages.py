"""The pieces of the replication report: each figure against arithmetic on the weights, a hand-made table, or the truth of the scenes."""

import drawn_coco
import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import mmn
from mmn import pope, scenes, sources, stages
from mmn.errors import MmnError
from mmn.nouns import scene_nouns
from mmn.sources import Picture


class Broken(Picture):
    def open(self):
        raise MmnError(f"{self.id} is damaged: get the picture again.")


def shown(name: str, scene: scenes.Scene) -> Picture:
    """As mmn.sources gives them."""
    return Picture(name, scene=scene, objects=scene.names, lexicon=scene_nouns)


@pytest.fixture(scope="module")
def vlm():
    return mmn.load("tiny-llava")


@pytest.fixture(scope="module")
def pictures():
    kinds = (["dog"], ["cat"], ["dog", "car"])
    return [shown(f"p{n}", scenes.draw(n, style="noto", concepts=kinds[n % 3])) for n in range(12)] + [
        Broken("broken", objects=("cat",))
    ]


@pytest.fixture(scope="module")
def ranked(vlm, pictures):
    return stages.rankings(vlm, pictures, top_k=5, batch_size=4)


def test_rankings_hold_what_the_weights_say(vlm, pictures, ranked):
    captions, rows = ranked["captions"], ranked["rankings"]
    assert list(captions["picture"]) == [p.id for p in pictures[:-1]]
    assert ranked["problems"].to_dict("records") == [
        {"picture": "broken", "stage": "rankings", "kind": "missing", "problem": "broken is damaged: get the picture again."}
    ]
    row = rows.iloc[7]
    write = vlm.model.model.language_model.layers[row["layer"]].mlp.down_proj.weight[:, row["unit"]]
    assert row["contribution"] == pytest.approx(float(row["activation"] * write @ vlm.model.lm_head.weight[row["token"]]), abs=1e-3)
    alone = stages.rankings(vlm, pictures[:-1], top_k=5, batch_size=1)
    pd.testing.assert_frame_equal(alone["captions"], captions)
    pd.testing.assert_frame_equal(alone["rankings"], rows, atol=2e-4)


def test_properties_are_those_of_the_models_own_captions(vlm, pictures, ranked):
    found = stages.properties_of(vlm, pictures[:2], ranked["captions"], top_k=5)["properties"]
    assert set(found["picture"]) == {"p0", "p1"}
    measure = found[(found["picture"] == "p0") & (found["measure"] == "drop of log p, zeroed") & (found["neurons"] == "found")]
    trace = vlm.caption(pictures[0].open())
    noun = trace.noun("dog")
    top = mmn.rank(vlm, trace, "dog", k=20).neurons

    def log_p() -> float:
        with torch.no_grad():
            logits = vlm.model(**vlm.replay(trace, noun.step)).logits[0, -1].float()
        return float(logits.log_softmax(-1)[noun.token])

    before = log_p()
    with mmn.zero(vlm, top):
        after = log_p()
    assert measure.set_index("k").at[20, "value"] == pytest.approx(before - after, abs=1e-3)
    ious = found[found["measure"] == "IoU of the heatmap"].groupby("neurons")["value"].mean()
    assert ious["found"] > ious["random"]


def test_pope_is_asked_of_every_picture_and_of_the_next_one(vlm, pictures, ranked):
    """Against one question at a time, on the shard of two pictures and on those of all."""
    found = stages.properties_of(vlm, pictures[1:3], ranked["captions"], every=pictures, top_k=5)["properties"]
    rows = found[found["measure"] == "POPE, popular: answers yes"]
    asked = pope.questions([p.objects for p in pictures])  # the broken one is among those that are frequent
    for number in (1, 2):
        for control, other in (("found", number), ("another picture", number + 1)):
            mine = rows[rows["picture"].eq(f"p{number}") & rows["neurons"].eq(control)]
            wanted = [q.name for q in asked[number] if q.form in ("there", "popular")]
            assert list(mine["noun"]) == wanted
            for noun, value in zip(mine["noun"], mine["value"], strict=True):
                text = vlm.answer(f"Is there a {noun} in the image?", pictures[other].open(), 4)
                assert value == text.lower().startswith("yes")
    right = found[found["measure"] == "POPE, popular: right answers"].set_index(rows.index)["value"]
    there = [
        noun in {"p1": ["cat"], "p2": ["dog", "car"]}[picture] for picture, noun in zip(rows["picture"], rows["noun"], strict=True)
    ]
    assert list(right == 1) == list((rows["value"] == 1) == there)


def test_where_the_next_picture_is_broken_answers_have_no_control(vlm, pictures, ranked):
    last, broken = pictures[-2:]
    captions = ranked["captions"].assign(said="")
    found = stages.properties_of(vlm, [last], captions, every=[pictures[0], last, broken])
    assert found["problems"].empty and set(found["properties"]["neurons"]) == {"found"} and len(found["properties"]) > 4


def test_scenes_dressed_as_coco_give_what_scenes_give(vlm, tmp_path, monkeypatch):
    """CHAIR, POPE and IoU by the official tools' files and masks, against the world's own."""
    monkeypatch.setattr(stages, "_causal", lambda *_: ())
    drawn = sources.load("scenes", 3)
    dressed = sources.load(drawn_coco.write(tmp_path, [picture.scene for picture in drawn]))
    found = []
    for some in (drawn, dressed):
        tables = stages.rankings(vlm, some, top_k=5)
        rows = stages.properties_of(vlm, some, tables["captions"], top_k=5)["properties"]
        found.append(pd.concat([stages._chair(tables["captions"]), rows], ignore_index=True))
        found[-1]["picture"] = found[-1]["picture"].map({picture.id: number for number, picture in enumerate(some)})
    pd.testing.assert_frame_equal(*found)
    measures = set(found[0]["measure"])
    assert {"CHAIR_s, captions that name such an object", "IoU of the heatmap", "POPE, adversarial: right answers"} <= measures
    others = [Picture("unknown", path=tmp_path / "val2017" / "000.png"), Broken("b", objects=("cat",))]
    alone = stages.truth(vlm, [*dressed, *others])
    assert alone["measure"].str.startswith(("CHAIR", "recall", "POPE")).all()
    rows = found[0][found[0]["property"] == "hallucination"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="picture"), rows.drop(columns="picture"), check_dtype=False)
    assert stages.truth(vlm, []).empty


def test_one_noun_is_edited_into_another_and_the_weights_stay(vlm, pictures, ranked):
    before = vlm.model.lm_head.weight.clone(), vlm.model.model.language_model.layers[7].mlp.down_proj.weight.clone()
    some = [p for p in pictures if p.id in set(ranked["captions"]["picture"])]
    rows = stages.edits(vlm, some, ranked["captions"], count=1)["edits"]
    assert set(rows["source"]) == {"dog"} and not set(rows["picture"][rows["measure"] == "says the target"]) & {"p0", "p2", "p3"}
    means = rows.groupby(["neurons", "measure"])["value"].mean()
    assert means["found", "says the target"] > means["random", "says the target"]
    assert torch.equal(before[0], vlm.model.lm_head.weight)
    assert torch.equal(before[1], vlm.model.model.language_model.layers[7].mlp.down_proj.weight)


@pytest.mark.parametrize("reason", ["it reads no such picture", "out of memory"])
def test_a_model_that_can_caption_nothing_leaves_no_result(pictures, reason):
    """So that its piece is tried again when the model is mended; what lacks memory is tried again anyway, and one bad picture is a row."""

    class Refuses:
        def caption(self, images, prompt, batch_size):
            raise MmnError(reason)

    if reason == "out of memory":
        assert len(stages.rankings(Refuses(), pictures[:3])["problems"]) == 3
    else:
        with pytest.raises(MmnError, match="No picture can be captioned: it reads no such picture"):
            stages.rankings(Refuses(), pictures[:3])
    assert len(stages.rankings(Refuses(), pictures[:1])["problems"]) == 1


def test_where_memory_is_short_batches_get_smaller_and_one_picture_fails_alone():
    sizes, failed = [], []

    def work(items):
        sizes.append(len(items))
        if 5 in items or len(items) > 2:
            raise torch.OutOfMemoryError("no memory")
        return [10 * item for item in items]

    found = stages.sparing(work, list(range(8)), lambda item, why: failed.append((item, why)))
    assert found == [(n, 10 * n) for n in range(8) if n != 5]
    assert failed == [(5, "out of memory")] and sizes[0] == 8


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_has_many_names(error):
    assert stages.reason_of(error) == "out of memory"


def test_what_goes_wrong_with_one_item_is_its_own():
    failed = []

    def work(items):
        return [1 / item for item in items]

    assert [item for item, _ in stages.sparing(work, [1, 0, 2], lambda item, why: failed.append((item, why)))] == [1, 2]
    assert failed == [(0, "ZeroDivisionError: division by zero")]


def test_a_summary_of_tables_whose_figures_are_known():
    columns = stages.COLUMNS["properties"]
    rows = [(f"p{n}", "dog", "sensitivity", "share", "found", 5, 0.5 + 0.1 * (n % 2)) for n in range(10)]
    rows += [(f"p{n}", "dog", "sensitivity", "share", "random", 5, 0.1) for n in range(10)]
    ranked = pd.DataFrame(
        [("a", "dog", 0, unit) for unit in range(4)]
        + [("b", "dog", 0, unit) for unit in (0, 1, 2, 9)]
        + [("c", "cat", 0, unit) for unit in (3, 20, 21, 22)],
        columns=["picture", "noun", "layer", "unit"],
    )
    captions = pd.DataFrame(
        [("b", "dog|grass", "dog", "dog"), ("a", "dog|cat|sky", "dog|cat", "dog|bus"), ("c", "", "", "cat"), ("d", "sky", "", "")],
        columns=["picture", "said", "named", "shown"],
    )
    tables = {
        "properties": pd.DataFrame(rows, columns=columns),
        "rankings": ranked,
        "captions": captions,
        "edits": stages.table("edits", []),
    }
    table = stages.summary(tables).set_index("measure")
    share = table.loc["share"]
    assert share["value"] == pytest.approx(0.55) and share["control_value"] == pytest.approx(0.1) and share["pictures"] == 10
    assert 0.5 < share["low"] < 0.55 < share["high"] < 0.6 and share["control_low"] == share["control_high"] == 0.1
    own = table.loc["overlap between pictures of one noun"]
    assert own["value"] == 0.75 and 0.08 <= own["control_value"] <= 0.17 and own["k"] == 4
    chair, wrong, recall = (
        table.loc[next(each for each in table.index if each.startswith(name))] for name in ("CHAIR_i", "CHAIR_s", "rec")
    )
    for measure, value, control in ((chair, 1 / 3, 2 / 3), (wrong, 1 / 3, 2 / 3), (recall, 2 / 4, 1 / 4)):
        assert measure["value"] == pytest.approx(value, abs=1e-4) and measure["control_value"] == pytest.approx(control, abs=1e-4)
        assert measure["control"] == "another picture" and measure["pictures"] == (2 if measure is chair else 3)


def test_specificity_pairs_every_picture_with_others_only():
    rng = np.random.default_rng(0)
    rows = [(f"p{n}", "dog", 0, unit) for n in range(6) for unit in rng.choice(1000, 10, replace=False)]
    table = stages.specificity(pd.DataFrame(rows, columns=["picture", "noun", "layer", "unit"]))
    assert set(table["neurons"]) == {"found"} and len(table) == 6 and table["value"].max() < 1


def test_specificity_does_not_hang_on_the_order_of_the_pictures():
    rng = np.random.default_rng(0)
    rows = [(f"p{n}", noun, 0, unit) for n in range(6) for noun in ("dog", "cat") for unit in rng.choice(40, 10, replace=False)]
    frame = pd.DataFrame(rows, columns=["picture", "noun", "layer", "unit"])
    other = pd.concat([part for _, part in sorted(frame.groupby("picture"), key=lambda each: each[0][-1] in "135")])
    one, two = (stages.specificity(each).sort_values(["picture", "noun", "neurons"]) for each in (frame, other))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), two.reset_index(drop=True))


def test_a_small_model_and_a_mask_of_another_size_cost_one_measure_each(pictures, monkeypatch):
    """3 layers of 24 neurons have no 60 beside which as many random ones could stand; what can be measured is."""
    monkeypatch.setattr(stages, "KS", (5, 20, 60))
    small = tiny.llava()

    class Turned(Picture):
        def mask(self, name):
            return np.ones((3, 5), bool)

    one = [Turned("a", scene=pictures[0].scene, lexicon=lambda text: [(noun.text, "thing", noun.span) for noun in said])]
    trace = small.caption(pictures[0].open())
    said = trace.nouns
    captions = stages.rankings(small, one, top_k=5)["captions"]
    assert captions["said"].item()
    found = stages.properties_of(small, one, captions, top_k=5)
    zeroed = found["properties"].query("measure == 'nouns flipped, zeroed'")
    assert set(zeroed["k"]) == {5, 20} and "IoU of the heatmap" not in set(found["properties"]["measure"])
    assert {"overlap after a shuffle of the image tokens", "nouns flipped, zeroed"} <= set(found["properties"]["measure"])
    notes = found["problems"]
    assert set(notes["kind"]) == {"note"} and list(notes["picture"].unique()) == ["a", ""]
    assert notes["problem"].str.contains("of another size").any()
