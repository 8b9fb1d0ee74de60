"""POPE's questions and figures, against counting by hand and another library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

import mmn
from mmn import pope, scenes

NAMES = list("abcdefgh")
SHOWN = st.lists(st.lists(st.sampled_from(NAMES), max_size=6), min_size=1, max_size=12)


@given(SHOWN, st.integers(1, 4), st.integers(0, 3))
def test_the_questions_are_those_of_each_form(shown, each, seed):
    found = pope.questions(shown, each, seed)
    table = np.array([[name in some for name in NAMES] for some in shown], int)
    counts, together = table.sum(0), table.T @ table * (1 - np.eye(len(NAMES), dtype=int))
    known = [name for name, count in zip(NAMES, counts, strict=True) if count]
    for some, asked in zip(shown, found, strict=True):
        there = [name for name, form in asked if form == "there"]
        absent = [name for name in known if name not in some]
        assert len(set(there)) == len(there) == min(each, len(set(some))) and set(there) <= set(some)
        for form in pope.FORMS:
            chosen = [name for name, kind in asked if kind == form]
            assert len(set(chosen)) == len(chosen) == min(len(there), len(absent)) and set(chosen) <= set(absent)
            left = list(absent)
            for name, other in zip(there, chosen, strict=False):
                if form == "popular":
                    assert other == max(left, key=lambda o: (counts[NAMES.index(o)], -NAMES.index(o)))
                elif form == "adversarial" and max(together[NAMES.index(name)][NAMES.index(o)] for o in left):
                    assert other == max(left, key=lambda o: (together[NAMES.index(name)][NAMES.index(o)], -NAMES.index(o)))
                left.remove(other)
    assert found == pope.questions(shown, each, seed)


def test_random_ones_are_of_any_kind():
    shown = [["a"]] + [["a", name] for name in NAMES[1:]] * 30
    first = {next(q.name for q in asked if q.form == "random") for asked in pope.questions(shown)}
    assert first == set(NAMES[1:])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_figures_against_another_library(rows):
    yes, there = (np.array(each) for each in zip(*rows, strict=True))
    figures = pope.scored(yes, there)
    for name, score in (("precision", precision_score), ("recall", recall_score), ("F1", f1_score)):
        assert figures[name] == pytest.approx(score(there, yes, zero_division=0))
    assert figures["accuracy"] == pytest.approx(accuracy_score(there, yes)) and figures["yes"] == yes.mean()


def test_answers_are_those_to_one_question_at_a_time():
    vlm = mmn.load("tiny-llava")
    image = scenes.draw(3, style="noto", concepts=["owl", "car"]).image
    names = ["owl", "car", "apple", "boat"]
    single = [vlm.answer(f"Is there {scenes.CONCEPTS[name].a} in the image?", image, 4).lower().startswith("yes") for name in names]
    assert list(pope.answers(vlm, [image] * 4, names, 3)) == single and any(single) and not all(single)


def test_the_article_is_that_of_the_world():
    said = []

    class Listening:
        def caption(self, images, prompts, *_, **__):
            said.extend(prompts)
            return []

    pope.answers(Listening(), [], list(scenes.CONCEPTS))
    assert said == [f"Is there {each.a} in the image?" for each in scenes.CONCEPTS.values()]


def test_answers_are_judged_by_form():
    asked = [pope.Question("dog", "there"), pope.Question("cat", "random"), pope.Question("bus", "popular")]
    rows = list(pope.judged(asked, [True, True, False]))
    assert rows == [
        ("random", "dog", True, True),
        ("random", "cat", False, True),
        ("popular", "dog", True, True),
        ("popular", "bus", False, False),
        ("adversarial", "dog", True, True),
    ]
