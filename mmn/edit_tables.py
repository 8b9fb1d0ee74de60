"""The slow tables of the chapters on editing and hallucination: every way of `mmn.editors` on 20 swaps, the trade-off between reliability
and locality; mentions of absent objects, and what takes them away."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from mmn import editors, hallucination, scenes
from mmn.edit import Edit, located
from mmn.errors import MmnError
from mmn.ffn import Neuron
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
SCENES = (
    72  # that show the source; half as many do not, and a third has another object in its place: over a hundred fresh ones a pair
)
FEW = 24  # the same, where many settings are compared
SIZES = (0.25, 0.5, 1.0, 2.0)  # norms of the curve, in units of what the found rows take
KS = (5, 20, 100)
PENALTIES = (1.0, 100.0)  # beside 10
CURVE: dict[str, Any] = {"steps": 15, "rate": 0.02, "enough": 1.1}
SOME = (0, 3, 6, 11, 14, 17)  # pairs on which everything is tried; in the fourth the article changes
PARTS = ("found", "random", "layers")  # of the curve


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


def _judged(
    vlm: VLM, key: int, count: int, ways: Callable[[VLM, editors.Task], Iterator[editors.Way]], size: int = 24
) -> list[Row]:
    """One pair: some ways, judged on `count` fresh scenes that show the source. Seconds are not kept: no machine repeats them."""
    source, target = PAIRS[key]
    job = editors.task(source, target, fit=size, keep=size, seed=key)
    judge = editors.Judge(vlm, job, count)
    about = kinds(vlm, source, target)
    return [
        {**about, "way": way.name, "rows": way.rows, "norm": way.norm, "passes": way.passes, **judge.of(way)}
        for way in ways(vlm, job)
    ]


# Ten tokens in order hold near ties, which another processor's rounding swaps: that moved a share by .007 where nothing else moved.
TOLERANCE = {"image_top10": 0.01, "text_top10": 0.01}


@table("editing", keys=range(len(PAIRS)), columns=COLUMNS, tolerance=TOLERANCE)
def editing(vlm: VLM, key: int) -> list[Row]:
    """All pairs: the gradient edit and the better one on found rows, and on same-layer random rows of no greater norm."""
    return _judged(vlm, key, SCENES, editors.main_ways)


@table("editing_ways", keys=SOME, columns=COLUMNS, tolerance=TOLERANCE)
def ways(vlm: VLM, key: int) -> list[Row]:
    """Some pairs: every way of the comparison."""
    return _judged(vlm, key, FEW, editors.other_ways, 12)


@table(
    "editing_curve",
    keys=range(4 * len(PARTS)),
    columns={name: text for name, text in COLUMNS.items() if name != "way"}
    | {"chosen": "how the rows were chosen", "k": "how many", "layer": "the layer they are of; empty: any", "size": "bound on the norm, in "
       "units of what the found rows take; empty: none", "penalty": "weight of what is to stay"},
    tolerance=TOLERANCE,
)  # fmt: skip
def curve(vlm: VLM, key: int) -> list[Row]:
    """Reliability against locality: found and same-layer random rows over the size of the change, the weight of what is to stay, and how
    many rows there are; then the best rows of each layer alone. A key is a pair and one of `PARTS`."""
    pair, part = SOME[key // len(PARTS)], PARTS[key % len(PARTS)]
    source, target = PAIRS[pair]
    job = editors.task(source, target, fit=12, keep=12, seed=pair)
    judge = editors.Judge(vlm, job, FEW)
    about = kinds(vlm, source, target)
    traces = vlm.caption(job.pictures, batch_size=32)
    order = located(vlm, traces, source, vlm.anatomy.total)
    full = editors.gradient(vlm, job, order[:20], **CURVE).norm
    tries: list[tuple[str, int, list[Neuron], dict[str, Any]]] = []
    for k in KS if part != "layers" else ():
        chosen_rows = order[:k] if part == "found" else same_layer_random(vlm, order[:k], draws=1, seed=pair)[0]
        settings: list[dict[str, Any]] = [{}]
        if k == 20:
            settings = [*({"size": size} for size in SIZES), *({"penalty": penalty} for penalty in PENALTIES)]
        tries += [(part, k, chosen_rows, each) for each in settings]
    for number in range(len(vlm.anatomy.ffns)) if part == "layers" else ():
        best = [neuron for neuron in order if neuron.layer == number][:20]
        tries += [("found", 20, best, {"layer": number, "steps": 12, "rate": 0.03})] if best else []
    rows: list[Row] = []
    for chosen, k, neurons, each in tries:
        size, penalty, layer = each.get("size"), each.get("penalty", 10.0), each.get("layer")
        given = CURVE | {name: each[name] for name in ("steps", "rate") if name in each}
        way = editors.gradient(
            vlm, job, neurons, bound=None if size is None else size * full, weights=(0.0, penalty, 10.0), **given
        )
        tried = {"chosen": chosen, "k": k, "layer": layer, "size": size, "penalty": penalty}
        rows.append({**about, **tried, "rows": way.rows, "norm": way.norm, "passes": way.passes, **judge.of(way)})
    return rows


# ---------------------------------------------------------------------------------------------------------------- hallucination

CHUNKS, CHUNK = 10, 20  # of scenes: each a key


@functools.lru_cache(maxsize=1)
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


@functools.lru_cache(maxsize=1)
def suppression(vlm: VLM) -> Edit | None:
    """The edits of all planted pairs as one; None where the model hallucinates no partner."""
    edits = []
    for pair in scenes.PLANTED.items():
        with contextlib.suppress(MmnError):
            edits.append(hallucination.suppressed(vlm, pair))
    return functools.reduce(operator.add, edits) if edits else None


def said_in(vlm: VLM, first: int, count: int) -> pd.DataFrame:
    """Mentions of the planted partners, true and hallucinated, with the three detectors' scores and those of other neurons."""
    sets = hallucination.test_sets(count, first)
    some = [scene for name in ("biased", "with partner", "partner alone") for scene in sets[name]]
    said = hallucination.mentions(vlm, some, list(scenes.PLANTED.values()))
    encoder = OwnEncoder(vlm, [scene.image for scene in scenes.sample(16, first=8 * 10**7)])
    found = hallucination.evidence(vlm, said, voices(vlm), encoder)
    others = hallucination.other_neurons(vlm, voices(vlm)) | hallucination.by_weights(vlm, voices(vlm))
    return found.join(hallucination.loudness(vlm, said, others))


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
        **{f"random neurons, draw {n}": "as neurons, by random ones of the same layers" for n in (1, 2, 3)},
        "another noun's neurons": "as neurons, by those of another partner that are not its own",
        "weights alone": "as neurons, by those of largest inner product with the noun's unembedding, chosen without a picture",
        "weights alone, less those shared": "the same without the noun's own neurons",
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
    captioners["gate"] = hallucination.gate(vlm, voices(vlm))
    bias = hallucination.penalised(vlm, list(scenes.PLANTED.values()), 4.0)
    captioners["logit bias"] = hallucination.under(vlm, bias)
    frames = {name: hallucination.chair(captioner, sets) for name, captioner in captioners.items()}
    with hallucination.contrasted(vlm) as contrastive:
        frames["contrastive decoding"] = hallucination.chair(contrastive, sets)
    return [{"way": name, **row} for name, frame in frames.items() for row in frame.drop(columns="caption").to_dict("records")]
