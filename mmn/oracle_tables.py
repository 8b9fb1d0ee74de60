"""The slow tables of the chapter on finding: every score against the causal oracle, noun by noun, and against planted neurons (see
mmn.tables, mmn.oracle and mmn.planted).

Scores are designed, calibrated and chosen on the development concepts; how good the chosen one is, the held-out ones say. Which is
which is fixed here, by the concepts' order alone: every second one of the alphabet is held out."""

from __future__ import annotations

import functools

from mmn import oracle, planted, scenes
from mmn.calibration import Calibration
from mmn.contribution import Scorer
from mmn.errors import MmnError
from mmn.tables import Row, table
from mmn.vlm import VLM

PLANTED = 20  # scenes of planted neurons
SCENES = 70  # nearly two nouns each: more than 100 nouns
FIRST = 8 * 10**6  # the number of the first scene: no other measure uses these
CALIBRATED_ON = 8  # scenes, of development concepts alone
# Of 4,096 neurons some 4,000 are silent, all of one rank; one whose effect rounds to the other side of zero passes them all. Between two
# processors the largest differences were half of these.
TOLERANCE = {"spearman": 0.06, "spearman_logit": 0.06, "spearman_centred": 0.06, "auroc": 0.07, "p10": 0.1, "p50": 0.08}
HELD_OUT = tuple(sorted(scenes.CONCEPTS))[::2]


@functools.lru_cache(maxsize=1)
def scores(vlm: VLM) -> dict[str, Scorer]:
    """All scores, the calibrated one included where the model can be calibrated; fitted once a model."""
    try:
        return oracle.ALL | {"calibrated": calibration(vlm)}
    except MmnError:  # it names nothing, or its FFNs are mixtures
        return dict(oracle.ALL)


def calibration(vlm: VLM, count: int = CALIBRATED_ON) -> Calibration:
    """Fitted on `count` scenes of development concepts, at most CALIBRATED_ON. Raises MmnError as Calibration.fit does."""
    development = [name for name in scenes.sprites("noto") if name not in HELD_OUT]
    shown = [development[place::CALIBRATED_ON][:2] for place in range(count)]
    drawn = [scenes.draw(FIRST - 1 - place, style="noto", concepts=names) for place, names in enumerate(shown)]
    return Calibration.fit(vlm, vlm.caption([scene.image for scene in drawn]))


@table(
    "oracle",
    keys=range(SCENES),
    columns={
        "noun": "the noun, which the model said and the scene shows",
        "held_out": "its concept was not looked at when scores were designed",
        "score": "key of mmn.oracle.ALL, or calibrated",
        "spearman": "rank correlation with the effect on log p, over all neurons",
        "p10": "share of the 10 best that are among the 10 of largest effect",
        "p50": "the same for 50",
        "auroc": "is a neuron among the 1 % of largest effect",
        "cpr": "area under the faithfulness of the best kept alone (more is better)",
        "cmd": "area of its distance from 1 (less is better)",
        "removal": "mean loss of log p with the best removed, up to 2 % of all, nats",
        "spearman_logit": "rank correlation with the effect on the logit",
        "spearman_centred": "rank correlation with the effect on the centred logit",
    },
    tolerance=TOLERANCE,
)
def oracle_table(vlm: VLM, key: int) -> list[Row]:
    """A scene's nouns, each with every score; times are left out, because no two machines share them."""
    scene = scenes.draw(FIRST + key)
    trace = vlm.caption(scene.image)
    rows: list[Row] = []
    for noun in trace.nouns:
        if noun.lemma in scene.names:
            found = oracle.compare(vlm, trace, noun, scores(vlm)).drop(columns="ms").round(4).reset_index()
            told = {"noun": noun.lemma, "held_out": noun.lemma in HELD_OUT}
            rows += [{**told, **row} for row in found.to_dict("records")]
    return rows


@table(
    "planted",
    keys=range(PLANTED),
    columns={
        "noun": "the noun, which the model said and the scene shows",
        "kind": "of planted neuron: one of mmn.planted.KINDS",
        "score": "key of mmn.oracle.ALL",
        "effect": "true effect of the planted neuron on log p, nats",
        "rank": "of the planted neuron among all by the score, from 1",
        "found": "it is among the mmn.planted.TOP of highest score",
        "expected": "it should be, as written down beforehand",
    },
    tolerance={"rank": 2},
)
def planted_table(vlm: VLM, key: int) -> list[Row]:
    """The first noun that a scene shows, each kind planted for it in a copy of the model, each score."""
    scene = scenes.draw(FIRST + SCENES + key)
    trace = vlm.caption(scene.image)
    for noun in trace.nouns:
        if noun.lemma in scene.names:
            found = planted.compare(vlm, trace, noun).round(4)
            return [{"noun": noun.lemma, **row} for row in found.to_dict("records")]
    return []
