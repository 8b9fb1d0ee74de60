"""From tokens to text, and from nouns to the step that produced them."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmn
from mmn import nouns, scenes
from mmn.trace import Trace


def spoken(text: str, style: str, lexicon: nouns.Lexicon = tiny.every_word, ids: list[int] | None = None) -> Trace:
    """A trace whose model said `text` after "An image of"."""
    words = tiny.tokenizer(style)
    context = words("USER: An image of", add_special_tokens=False).input_ids
    if ids is None:
        ids = words(f"USER: An image of{text}", add_special_tokens=False).input_ids[len(context) :]
    return Trace(
        torch.tensor(ids), True, torch.zeros(len(ids)), [], [], None, None, "", "An image of", words, context[-4:], lexicon
    )


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")), st.sampled_from(tiny.STYLES[:-1]))
def test_text_is_what_was_said(text: str, style: str) -> None:
    text = " " + " ".join(text.split())
    if len(text) < 2 or any(mark in text for mark in ("<", "\u2581")):
        return
    trace = spoken(text, style)
    assert trace.text == "An image of" + text
    assert "".join(trace.pieces) == text and len(trace.pieces) == len(trace.tokens)
    assert trace.ends == sorted(trace.ends) and (not trace.ends or trace.ends[-1] == len(trace.text))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(4, 400), max_size=20), st.sampled_from(tiny.STYLES))
def test_any_tokens_have_a_text(ids: list[int], style: str) -> None:
    ids = [4 + id % (len(tiny.tokenizer(style)) - 4) for id in ids]
    trace = spoken("", style, ids=ids)
    assert len(trace.pieces) == len(trace.ends) == len(ids) and trace.ends == sorted(trace.ends)
    for noun in trace.nouns:
        assert noun.token == ids[noun.step]


@pytest.mark.parametrize("style", tiny.STYLES)
def test_a_noun_is_its_first_sub_token(style: str) -> None:
    trace = spoken(" a cat next to a strawberry and a dog, an Ärger", style)
    words = trace.tokenizer.convert_ids_to_tokens(trace.tokens.tolist())
    for noun in trace.nouns:
        assert trace.text[slice(*noun.span)] == noun.text
        assert noun.token == trace.tokens[noun.step]
        piece = words[noun.step].replace("\u0120", "").replace("\u2581", "")
        if "Ä" not in noun.text:
            assert piece and noun.text.startswith(piece)
        # Alone, the first sub-tokens up to this one say nothing but a space, and with it the word begins.
        before = trace.ends[noun.step - 1] if noun.step else len(trace.prefix)
        assert not trace.text[before : noun.span[0]].strip()
        assert before <= noun.span[0] < trace.ends[noun.step]


def test_a_character_of_several_tokens_belongs_to_its_first() -> None:
    trace = spoken(" a \u2603man", "pieces", lambda text: [("\u2603man", "snowman", (text.index("\u2603"), len(text)))])
    (noun,) = trace.nouns
    pieces = trace.tokenizer.convert_ids_to_tokens(trace.tokens.tolist())
    assert pieces[noun.step] in ("<0xE2>", "\u2581") and (pieces[noun.step] == "<0xE2>" or pieces[noun.step + 1] == "<0xE2>")


def test_each_noun_once_where_it_was_first_said() -> None:
    trace = spoken(" a cat and a dog and a cat", "bytes", nouns.scene_nouns)
    assert [noun.lemma for noun in trace.nouns] == ["cat", "dog"]
    assert trace.noun("CAT ") is trace.noun("cat") and trace.noun(trace.nouns[1]).lemma == "dog"
    assert trace.nouns[0].span[0] == trace.text.index("cat")


def test_the_given_prefix_has_no_nouns() -> None:
    assert [noun.text for noun in spoken(" a cat", "bytes").nouns] == ["a", "cat"]


def test_words_of_the_scenes() -> None:
    trace = spoken(" two palm trees next to a traffic light, a hot dog and three mice", "bytes", nouns.scene_nouns)
    assert [(noun.text, noun.lemma) for noun in trace.nouns] == [
        ("palm trees", "palm tree"), ("traffic light", "traffic light"), ("hot dog", "hot dog")
    ]  # fmt: skip
    for concept in scenes.CONCEPTS.values():
        for form in {concept.name, concept.plural}:
            assert [found[:2] for found in nouns.scene_nouns(f"a {form} here")] == [(form, concept.name)]


def test_rule_of_thumb() -> None:
    found = nouns.guessed_nouns("A large brown dog sitting on a wooden bench near the red cars.")
    assert [lemma for _, lemma, _ in found] == ["dog", "bench", "car"]
    for text, _, (first, last) in found:
        assert "A large brown dog sitting on a wooden bench near the red cars."[first:last] == text


def test_refuses() -> None:
    trace = spoken(" a cat", "bytes")
    with pytest.raises(mmn.MmnError, match="does not say 'lion'; its nouns are: a, cat"):
        trace.noun("lion")
    with pytest.raises(mmn.MmnError, match="is a word"):
        trace.noun(3)  # type: ignore[arg-type]
    with pytest.raises(mmn.MmnError, match="no step 99"):
        trace.noun(nouns.Noun("cat", "cat", 5, 99, (0, 3)))
    with pytest.raises(mmn.MmnError, match="its nouns are: none"):
        spoken("", "bytes").noun("cat")
