"""COCO's objects in sentences: against CHAIR's way over the words of a caption, one after the other."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmn import coco

TABLE = coco.words(Path("nowhere"))
LEXICON = coco.lexicon(TABLE)


def test_the_words_are_those_of_80_categories_each_once():
    lines = [line.split(", ") for line in coco.WORDS.strip().splitlines()]
    every = [word for line in lines for word in line]
    assert len({line[0] for line in lines}) == 80 and len(set(every)) == len(every) - (len(lines) - 80), (
        "person takes several lines"
    )
    assert {"person", "traffic light", "hair drier", "toothbrush", "tv", "potted plant"} <= {line[0] for line in lines}


@pytest.mark.parametrize(
    ("word", "plural"),
    [("policeman", "policemen"), ("wine glass", "wine glasses"), ("bench", "benches"), ("puppy", "puppies"), ("toy", "toys"),
     ("computer mouse", "computer mice"), ("sheep", "sheep"), ("calf", "calves"), ("men", "men"), ("catcher's mitt", "catcher's mitts"),
     ("person", "people"), ("box", "boxes"), ("scissors", "scissors"), ("tv", "tvs"), ("baby ox", "baby oxen")],
)  # fmt: skip
def test_plurals(word, plural):
    assert coco.plural(word) == plural


def by_words(text: str) -> list[str]:
    """CHAIR's loop: pairs of words (here: up to three) that are one name, else single words; then the categories."""
    singular = {form: word for word in TABLE for form in (coco.plural(word), word)}
    words, found, place = text.lower().split(), [], 0
    while place < len(words):
        size = next((n for n in (3, 2, 1) if " ".join(words[place : place + n]) in singular), 1)
        found.append(singular.get(" ".join(words[place : place + size]), ""))
        place += size
    names = [TABLE[word] for word in found if word]
    seats = sum(word == "seat" for word in found) if "toilet" in names else 0
    return sorted(names)[:] if not seats else sorted([n for n, w in zip(names, filter(None, found), strict=True) if w != "seat"])


WORDS = st.sampled_from(sorted({*TABLE, "grass", "baby", "seat", "toilet", "dogma", "adult", "red"}))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(WORDS, st.booleans(), st.booleans()), max_size=8))
def test_a_sentence_names_what_its_words_name(given):
    text = " ".join((coco.plural(word) if many else word).upper() if big else word for word, many, big in given)
    assert sorted(name for _, name, _ in LEXICON(text)) == by_words(text)
    assert all(text[start:end] == said for said, _, (start, end) in LEXICON(text))


def test_what_is_no_object():
    assert not LEXICON("A carpet of cattails, the scarf of a category, the doghouse")
    assert [name for _, name, _ in LEXICON("A toilet with the seat up")] == ["toilet"]
    assert [name for _, name, _ in LEXICON("A seat by the window")] == ["chair"]
    assert [name for _, name, _ in LEXICON("Baby elephants, a passenger train, hot dogs")] == ["elephant", "train", "hot dog"]
    assert LEXICON("buSes".replace("S", chr(0x17F)))[0][1] == "bus", "what lower case and upper case make equal"
