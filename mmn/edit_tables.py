"""The slow tables of the chapters on editing and hallucination: every way of `mmn.editors` on 20 swaps, the trade-off between reliability
and locality; mentions of absent objects, and what takes them away."""

from __future__ import annotations

import contextlib
import functools
import operator

import pandas as pd

from mmn import editors, hallucination, scenes
from mmn.edit import Edit, located
from mmn.errors import MmnError
from mmn.intervene import same_layer_random
from mmn.properties import OwnEncoder
from mmn.scenes import CONCEPTS
from mmn.tables import Row, table
from mmn.vlm import VLM

# Near: of one category. Far: of two. Each half frequent and rare, with nouns of one and of two tokens, articles that change and do not.
PAIRS = (
    ("cat", "lion"), ("dog", "horse"), ("apple", "banana"), ("car", "truck"), ("bear", "elephant"), ("train", "airplane"),
    ("strawberry", "lemon"), ("tulip", "sunflower"), ("frog", "octopus"), ("hammer", "key"),
    ("cat", "car"), ("elephant", "guitar"), ("carrot", "umbrella"), ("airplane", "pizza"), ("banana", "clock"), ("horse", "tree"),
    ("pineapple", "dog"), ("cactus", "violin"), ("hot dog", "candle"), ("bird", "traffic light"),
)  # fmt: skip
SCENES = 100
SIZES = (0.5, 1.0, 2.0, 4.0)  # norms of the curve, in units of the unbounded edit's
KS = (5, 20, 100)


def kinds(vlm: VLM, source: str, target: str) -> Row:
    """What is special about a pair: near or far, how often the two are drawn (1 rare to 4), how many tokens each has, whether the
    article changes."""
    tokens = [len(vlm.tokenizer(" " + word, add_special_tokens=False).input_ids) for word in (source, target)]
    one, other = CONCEPTS[source], CONCEPTS[target]
    return {
        "source": source,
        "target": target,
        "near": one.category == other.category,
        "frequency": min(one.frequency, other.frequency),
        "tokens": max(tokens),
        "article": one.article != other.article,
    }


COLUMNS = {
    "source": "the concept replaced",
    "target": "the concept put in its place",
    "near": "whether both are of one category",
    "frequency": "how often the rarer one is drawn, 1 to 4",
    "tokens": "tokens of the longer noun",
    "article": "whether the article changes",
    "way": "the way it was done",
    "rows": "writes changed",
    "norm": "Frobenius norm of the change",
    "passes": "forward-backward passes",
    **editors.MEASURES,
}


@table("editing", keys=range(len(PAIRS)), columns=COLUMNS)
def editing(vlm: VLM, key: int) -> list[Row]:
    """One pair: every way, judged on `SCENES` fresh scenes that show the source and as many that do not. Seconds are not kept: no
    machine repeats them."""
    source, target = PAIRS[key]
    job = editors.task(source, target, seed=key)
    judge = editors.Judge(vlm, job, SCENES)
    about = kinds(vlm, source, target)
    return [
        {**about, "way": way.name, "rows": way.rows, "norm": way.norm, "passes": way.passes, **judge.of(way)}
        for way in editors.ways(vlm, job)
    ]


@table(
    "editing_curve",
    keys=range(0, len(PAIRS), 3),
    columns={name: text for name, text in COLUMNS.items() if name != "way"}
    | {"chosen": "how the rows were chosen", "k": "how many", "penalty": "weight of what is to stay"},
)
def curve(vlm: VLM, key: int) -> list[Row]:
    """Reliability against locality: found and same-layer random rows, over their number, the weight of what is to stay, and the size
    of the change (a bound, in units of what the found rows take)."""
    source, target = PAIRS[key]
    job = editors.task(source, target, fit=12, keep=12, seed=key)
    judge = editors.Judge(vlm, job, SCENES // 3)
    about = kinds(vlm, source, target)
    traces = vlm.caption(job.pictures, batch_size=32)
    rows: list[Row] = []
    for k in KS:
        found = located(vlm, traces, source, k)
        random = same_layer_random(vlm, found, draws=1, seed=key)[0]
        size = editors.gradient(vlm, job, found).norm
        settings = [(1.0, size * factor) for factor in SIZES] + [(penalty, None) for penalty in (0.1, 10.0)]
        for chosen, neurons in (("found", found), ("random", random)):
            for penalty, bound in settings if k == 20 else settings[1:2]:
                way = editors.gradient(vlm, job, neurons, weights=(0.0, penalty, 10.0), bound=bound, steps=25, rate=0.02)
                about_way = {"chosen": chosen, "k": k, "penalty": penalty, "rows": way.rows, "norm": way.norm, "passes": way.passes}
                rows.append({**about, **about_way, **judge.of(way)})
    return rows


# ---------------------------------------------------------------------------------------------------------------- hallucination

CHUNKS, CHUNK = 10, 20  # of scenes: each a key


@functools.cache
def voices(vlm: VLM) -> dict[str, hallucination.Voice]:
    """The voice of each planted partner, from pictures of their own."""
    calibration = [scene.image for scene in scenes.sample(48, first=8 * 10**7)]
    pools = {
        partner: hallucination.holding(partner, 24, 9 * 10**7 + 10**4 * number)
        for number, partner in enumerate(scenes.PLANTED.values())
    }
    return {
        partner: hallucination.Voice.of(vlm, partner, [scene.image for scene in pool], calibration)
        for partner, pool in pools.items()
    }


@functools.cache
def suppression(vlm: VLM) -> Edit | None:
    """The edits of all planted pairs as one; None where the model hallucinates no partner."""
    edits = []
    for pair in scenes.PLANTED.items():
        with contextlib.suppress(MmnError):
            edits.append(hallucination.suppressed(vlm, pair))
    return functools.reduce(operator.add, edits) if edits else None


def said_in(vlm: VLM, first: int, count: int) -> pd.DataFrame:
    """Mentions of the planted partners, true and hallucinated, with the three detectors' scores."""
    sets = hallucination.test_sets(count, first)
    some = [scene for name in ("biased", "with partner", "partner alone") for scene in sets[name]]
    said = hallucination.mentions(vlm, some, list(scenes.PLANTED.values()))
    encoder = OwnEncoder(vlm, [scene.image for scene in scenes.sample(16, first=8 * 10**7)])
    return hallucination.evidence(vlm, said, voices(vlm), encoder)


@functools.cache
def thresholds(vlm: VLM) -> dict[str, float]:
    """For each partner the gate's threshold, chosen on the other pairs, on scenes of their own."""
    table = said_in(vlm, 10**8, 32)
    return {partner: hallucination.threshold(table, partner) for partner in scenes.PLANTED.values()}


@table(
    "hallucination_mentions",
    keys=range(CHUNKS),
    columns={
        "noun": "the planted partner named",
        "scene": "its number",
        "true": "whether it is in the picture",
        "neurons": "its loudest patch, in standard deviations of calibration pictures",
        "probability": "log probability of its token",
        "clip-like": "cosine of its embedding with the likest image token",
    },
)
def mentions(vlm: VLM, key: int) -> list[Row]:
    """True and hallucinated mentions in one chunk of scenes."""
    return said_in(vlm, 11 * 10**7 + 10**7 * key, CHUNK).to_dict("records")


@table(
    "hallucination",
    keys=range(CHUNKS),
    columns={
        "way": "how the caption was made",
        "set": "the kind of scene",
        "scene": "its number",
        "mentions": "objects named",
        "wrong": "of them not in the picture",
        "objects": "objects in the picture",
        "named": "of them named",
        "partners": "planted partners in the picture",
        "partners named": "of them named",
    },
)
def mitigation(vlm: VLM, key: int) -> list[Row]:
    """What each way of mitigation says of one chunk of scenes."""
    sets = hallucination.test_sets(CHUNK, 11 * 10**7 + 10**7 * key)
    captioners = {"unedited": hallucination.plain(vlm)}
    edit = suppression(vlm)
    if edit is not None:
        captioners["edit"] = hallucination.under(vlm, lambda: edit.applied(vlm))
    captioners["gate"] = hallucination.gate(vlm, voices(vlm), thresholds(vlm))
    captioners["gate, silencing"] = hallucination.gate(vlm, voices(vlm), thresholds(vlm), silent=True)
    for amount in (2.0, 4.0, 8.0):
        bias = hallucination.penalised(vlm, list(scenes.PLANTED.values()), amount)
        captioners[f"logit bias {amount:g}"] = hallucination.under(vlm, bias)
    frames = {name: hallucination.chair(captioner, sets) for name, captioner in captioners.items()}
    with hallucination.contrasted(vlm) as contrastive:
        frames["contrastive decoding"] = hallucination.chair(contrastive, sets)
    return [{"way": name, **row} for name, frame in frames.items() for row in frame.drop(columns="caption").to_dict("records")]
