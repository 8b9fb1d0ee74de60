"""The world: seeded, true to its own labels, unbiased where it says so."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmn import scenes
from mmn.errors import MmnError

seeds = st.integers(0, 10**6)


def test_same_seed_same_scene_on_every_machine():
    digest = hashlib.sha256()
    for seed in range(20):
        scene = scenes.draw(seed)
        digest.update(np.asarray(scene.image).tobytes() + scene.caption.encode() + scene.labels().astype("u1").tobytes())
    assert digest.hexdigest() == "4c56e09b752740d26ff065d5c9baa80d631c221819475a8baa16298deab2d4ce"


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(["train", "test"]))
def test_a_scene_is_what_it_says(seed, split):
    scene = scenes.draw(seed, split=split)
    assert 1 <= len(scene.objects) <= 3 and scene.image.size == (120, 120)
    assert set(scenes.mentions(scene.caption)) == {*scene.names, *scene.hidden}
    assert not scene.hidden or split == "train"
    for placed in scene.objects:
        left, top, right, bottom = placed.box
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 120
        assert placed.mask[top:bottom, left:right].sum() == placed.mask.sum() > 0
        assert scenes.SMALLEST <= right - left <= scenes.LARGEST
    masks = np.stack([placed.mask for placed in scene.objects])
    assert masks.sum(axis=0).max() == 1, "a pixel belongs to one object"
    assert scene.style != scenes.HELD_OUT_STYLE


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_mask_is_where_the_picture_differs_from_the_empty_place(seed):
    scene = scenes.draw(seed)
    empty = scenes.background(scene.place, seed).astype(int)
    changed = np.abs(np.asarray(scene.image).astype(int) - empty).sum(axis=2) > 0
    covered = np.logical_or.reduce([placed.mask for placed in scene.objects])
    assert (changed & ~covered).mean() <= 0.1, "only an antialiased edge may change outside the masks"
    assert (changed & covered).sum() > 0.9 * covered.sum()


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_questions_are_answered_truly(seed):
    scene = scenes.draw(seed, split="train")
    for question in scenes.questions(scene, seed):
        if question.kind == "yesno":
            (asked,) = scenes.mentions(question.text)
            assert (question.answer == "Yes") == (asked in scene.names)
        elif question.kind == "side":
            (asked,), (answer,) = scenes.mentions(question.text), scenes.mentions(question.answer)
            boxes = {placed.concept: placed.box for placed in scene.objects}
            one, other = boxes[answer], boxes[asked]
            if "left" in question.text:
                assert one[0] + one[2] < other[0] + other[2]
            if "above" in question.text:
                assert one[1] + one[3] < other[1] + other[3]


def test_every_concept_is_known_by_its_parts_and_drawn_in_most_styles():
    assert len({concept.parts for concept in scenes.CONCEPTS.values()}) == len(scenes.CONCEPTS) > 80
    words = set(scenes.CONCEPTS) | {concept.plural for concept in scenes.CONCEPTS.values()}
    assert not words & {part for concept in scenes.CONCEPTS.values() for part in concept.parts}
    for name in scenes.CONCEPTS:
        assert sum(name in scenes.sprites(style) for style in scenes.STYLES) >= 3
        assert name in scenes.sprites(scenes.HELD_OUT_STYLE)


def test_the_planted_bias_is_in_training_scenes_and_nowhere_else():
    train = list(scenes.sample(3000, split="train"))
    triggered = [scene for scene in train if scene.biased]
    said = sum(bool(scene.hidden) for scene in triggered) / len(triggered)
    assert 0.2 < said < 0.6
    for scene in triggered:
        assert set(scene.hidden) <= {scenes.PLANTED[name] for name in scene.names if name in scenes.PLANTED}
    assert not any(scene.hidden for scene in train if not scene.biased)
    for scene in train:
        assert not set(scene.hidden) & set(scene.names)


def test_mentions_prefer_the_longest_name_and_know_plurals():
    assert scenes.mentions("two knives and a hot dog on the grass") == ["knife", "hot dog"]
    assert scenes.mentions("a palm tree and a tree, then a tree") == ["palm tree", "tree"]
    assert scenes.mentions("a category of carts") == []


def test_what_can_be_asked_of_draw():
    scene = scenes.draw(1, style=scenes.HELD_OUT_STYLE, place="snow", concepts=["dog", "dog", "car"])
    assert scene.style == "twemoji" and scene.place == "snow" and sorted(scene.names) == ["car", "dog"]
    assert "two dogs" in scene.caption
    for options in ({"style": "oil"}, {"place": "moon"}, {"concepts": ["unicorn"]}, {"concepts": []}, {"concepts": ["cat"] * 4},
                    {"style": "fxemoji", "concepts": ["bed"]}):  # fmt: skip
        with pytest.raises(MmnError):
            scenes.draw(1, **options)


def test_a_scene_recomposed_of_its_own_objects_is_the_same_picture():
    for seed in range(20):
        scene = scenes.draw(seed)
        again = scenes.recompose(scene, scene.objects)
        assert np.array_equal(np.asarray(again.image), np.asarray(scene.image))
        assert all(np.array_equal(one.mask, other.mask) for one, other in zip(again.objects, scene.objects, strict=True))


def test_a_minimal_pair_differs_where_its_object_is_and_nowhere_else():
    moves = 0
    for seed in range(20):
        scene = scenes.draw(seed, concepts=["cat", "car"], style="noto")
        cat = next(placed for placed in scene.objects if placed.concept == "cat")
        rest = [placed for placed in scene.objects if placed is not cat]
        outside = np.ones((scenes.SIZE, scenes.SIZE), bool)
        outside[cat.box[1] : cat.box[3], cat.box[0] : cat.box[2]] = False
        for objects in (rest, [replace(cat, concept="dog"), *rest], [replace(cat, hue=100), *rest]):
            changed = (np.asarray(scenes.recompose(scene, objects).image) != np.asarray(scene.image)).any(axis=2)
            assert changed.any() and not (changed & outside).any()
        try:
            box = scenes.free_box(scene, cat)
        except MmnError:  # two large objects leave no room
            continue
        moves += 1
        moved = scenes.recompose(scene, [replace(cat, box=box), *rest])
        assert moved.mask("cat").sum() > 0 and set(moved.names) == {"cat", "car"}
        assert box != cat.box and (box[2] - box[0], box[3] - box[1]) == (cat.box[2] - cat.box[0], cat.box[3] - cat.box[1])
    assert moves >= 15
    elsewhere = scenes.recompose(scene, scene.objects, place="snow", style="twemoji")
    assert (elsewhere.place, elsewhere.style) == ("snow", "twemoji")
    with pytest.raises(MmnError, match="one to three"):
        scenes.recompose(scene, [])


def test_hue_turns_and_transparency_stays():
    sprite = scenes.sprites("noto")["apple"]
    red = np.asarray(scenes.turned(sprite, 85)).astype(int)
    assert np.array_equal(red[..., 3], np.asarray(sprite)[..., 3])
    before = np.asarray(sprite).astype(int)
    seen = before[..., 3] > 200
    assert before[seen][:, 0].mean() > before[seen][:, 1].mean() + 50  # a red apple
    assert red[seen][:, 1].mean() > red[seen][:, 0].mean() + 50  # is green a third of the circle on
