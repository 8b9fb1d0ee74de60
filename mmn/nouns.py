"""The nouns of a caption, by one interface: a `Lexicon` gives each noun's text, lemma and place in the sentence.

Scenes of the synthetic world always use the world's own words. For real captions spaCy tags the parts of speech where its English
model is installed; without it a word after an article, a number or a preposition that is not on a short list of function words is
taken for a noun, which finds most of them and no more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

Found = tuple[str, str, tuple[int, int]]
Lexicon = Callable[[str], list[Found]]


class Noun(NamedTuple):
    """A noun the model said: its form in the text, its lemma, the id of its first sub-token, the step that produced that token,
    and where it stands in the text (first character, one past the last)."""

    text: str
    lemma: str
    token: int
    step: int
    span: tuple[int, int]


def scene_nouns(text: str) -> list[Found]:
    """Nouns of the synthetic world."""
    from mmn import scenes

    return [(match.group(), scenes.lemma(match.group()), match.span()) for match in scenes.MENTION.finditer(text)]


def tagged_nouns(text: str) -> list[Found]:
    """Nouns by spaCy's part-of-speech tags."""
    tagger = _tagger()
    assert tagger is not None
    return [(t.text, t.lemma_.lower(), (t.idx, t.idx + len(t.text))) for t in tagger(text) if t.pos_ == "NOUN"]


@functools.cache
def _tagger() -> Any:
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        return None


# Function words, colours and adjectives that end a run of words without being its noun.
_NOT_NOUNS = frozenset(
    re.findall(
        r"\w+",
        """
        a an the two three four five some several many his her their its of on in at by with near under over and to from for as or
        is are was were be been being has have it this that there front top next left right up down out into very large small big
        little old new young red blue green white black brown yellow orange pink grey gray purple wooden sitting standing holding
        wearing looking walking riding playing eating flying lying image picture photo
        """,
    )
)


def guessed_nouns(text: str) -> list[Found]:
    """Nouns by a rule of thumb: the last of a run of words that no function word, colour or common adjective breaks."""
    words = [(m.group(), m.span()) for m in re.finditer(r"[^\W\d_]+|\S", text)]
    found = []
    for index, (word, span) in enumerate(words):
        following = words[index + 1][0].lower() if index + 1 < len(words) else "."
        ends = following in _NOT_NOUNS or not following.isalpha()
        if ends and len(word) > 2 and word.isalpha() and word.lower() not in _NOT_NOUNS:
            lemma = word.lower()
            if lemma.endswith("s") and not lemma.endswith(("ss", "us", "is")):
                lemma = lemma[:-1]
            found.append((word, lemma, span))
    return found


def drawn_world(config: Any) -> bool:
    """Whether a model knows nothing but the drawn world, by its configuration."""
    return getattr(config, "mmn_world", None) == "scenes"


def lexicon(synthetic: bool) -> Lexicon:
    """The lexicon to use: the world's for a model of the synthetic world, else spaCy's if it is there, else the rule of thumb."""
    if synthetic:
        return scene_nouns
    return tagged_nouns if _tagger() is not None else guessed_nouns
