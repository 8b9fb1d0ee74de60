"""POPE (Li et al. 2023, arXiv 2305.10355): is there a ... in the image? Its questions for pictures of which it is known what they show.

As its authors' code asks (github.com/AoiDragon/POPE), but for five things: objects that are there are drawn by chance and not taken in the
order of the annotations; they are asked for once, and not anew for each form of the others; a picture of fewer objects is asked for fewer,
and not left out; the article stands for itself (replacing every `a` of the sentence by `an`, as the code does, asks of an `imange`); and an
answer is a yes where it begins with one, not where its first sentence holds no `no` or `not`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmn.vlm import VLM

FORMS = ("random", "popular", "adversarial")


class Question(NamedTuple):
    """Is there an object? form: "there" for one that the picture shows, else how one that it does not show was chosen."""

    name: str
    form: str


def questions(shown: Sequence[Sequence[str]], each: int = 3, seed: int = 0) -> list[list[Question]]:
    """For each picture, given by what it shows, questions for `each` of its objects (for all where it has fewer), and in each form for as
    many that others show and it does not (fewer where there are no more): `random`; `popular`, the most frequent; `adversarial`, those that
    most often stand beside the objects asked for, and random ones where no more do. Of equal ones the first in the alphabet."""
    counts = Counter(name for some in shown for name in set(some))
    beside: dict[str, Counter[str]] = {name: Counter() for name in counts}
    for some in shown:
        for name in set(some):
            beside[name].update(set(some) - {name})
    found = []
    for number, some in enumerate(shown):
        rng = np.random.default_rng([15, seed, number])
        there = [str(name) for name in rng.permutation(sorted(set(some)))[:each]]
        chance = [str(name) for name in rng.permutation(sorted(counts))]
        asked = [Question(name, "there") for name in there]
        for form in FORMS:
            left = dict.fromkeys(name for name in (_frequent(counts) if form == "popular" else chance) if name not in some)
            for name in there:
                first = _frequent(beside[name]) if form == "adversarial" else ()
                chosen = next((other for other in (*first, *left) if other in left), None)
                if chosen is not None:
                    del left[chosen]
                    asked.append(Question(chosen, form))
        found.append(asked)
    return found


def _frequent(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


def answers(vlm: VLM, images: Sequence[Image.Image], names: Sequence[str], batch_size: int = 32) -> np.ndarray:
    """Whether the model says yes when it is asked whether the picture shows the object, one object a picture: bool `[pictures]`."""
    asked = [f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?" for name in names]
    traces = vlm.caption(list(images), asked, "", 4, batch_size=batch_size, record=False)
    return np.array([trace.text.strip().lower().startswith("yes") for trace in traces], bool)


def scored(yes: np.ndarray, there: np.ndarray) -> dict[str, float]:
    """Of answers and truths, bool `[questions]`: accuracy, precision, recall, F1, and the share of yes; precision and recall of nothing
    are 0."""
    hits = float((yes & there).sum())
    precision, recall = hits / max(float(yes.sum()), 1.0), hits / max(float(there.sum()), 1.0)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"accuracy": float((yes == there).mean()), "precision": precision, "recall": recall, "F1": f1, "yes": float(yes.mean())}


def judged(asked: Sequence[Question], yes: Sequence[bool] | np.ndarray) -> Iterator[tuple[str, str, bool, bool]]:
    """The questions of each form, those for what is there among them: form, object, whether it is there, whether the answer is yes."""
    for form in FORMS:
        for question, said in zip(asked, yes, strict=True):
            if question.form in ("there", form):
                yield form, question.name, question.form == "there", bool(said)
