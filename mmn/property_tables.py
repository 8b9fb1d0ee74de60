"""The slow tables of the chapters on sensitivity, specificity and causal effect: see mmn.tables and mmn.properties.

Each scene (or concept) is one key. Where a model names nothing that a scene shows, as an untrained one does, the true caption is put
into its mouth; the column `forced` says so."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

import mmn
from mmn import properties, scenes, semantics
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.nouns import Lexicon
from mmn.properties import Case
from mmn.scenes import Scene
from mmn.tables import Row, table
from mmn.vlm import VLM

SCENES = 200
FIRST = 6 * 10**6  # the number of the first scene: no other measure uses these
KS = (1, 2, 5, 10, 20, 50, 100, 200)  # of 512 in a layer: half of them at most, so that as many others can be drawn
FEW = (5, 20, 100)
FACTORS = (-1.0, 0.5, 1.5, 2.0, 4.0)
SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in units of the writes' own spread
SHUFFLES = 3
HELD_OUT = 50  # scenes in the held-out art, for the heatmaps


def scene_of(key: int, style: str | None = None) -> Scene:
    """Scene number `key` of the tables, in a style if one is given: the first of ten that shows no planted trigger."""
    return next(scene for scene in scenes.sample(10, first=FIRST + 10 * key, style=style) if not scene.biased)


def own(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of captions that the model said itself; all of them where every caption was put into its mouth."""
    said = frame[~frame["forced"].astype(bool)]
    return said if len(said) else frame


@functools.lru_cache(maxsize=1)
def spread(vlm: VLM) -> float:
    """The root mean square of all numbers of all writes: the unit of sigma, so that noise means the same for every model."""
    squares, count = 0.0, 0
    for ffn in vlm.anatomy.ffns:
        writes = ffn.write(range(ffn.neurons))
        squares, count = squares + float(writes.square().sum()), count + writes.numel()
    return (squares / count) ** 0.5


def another(vlm: VLM, case: Case) -> Case:
    """A case of another concept, drawn by the case's scene's number: whose neurons are a control, and whose activations a resample."""
    assert case.scene is not None
    rng = np.random.default_rng([8, case.scene.seed])
    names = [name for name in scenes.sprites("noto") if name not in case.scene.names]
    seed = int(rng.integers(10**6)) + 10**7
    other = scenes.draw(seed, style="noto", concepts=[str(rng.choice(names))])
    return properties.cases(vlm, [other], force=True)[0]


def causal_rows(vlm: VLM, case: Case, *, ks: tuple[int, ...] = KS, few: tuple[int, ...] = FEW, draws: int = 3) -> list[Row]:
    """Every change of every choice of neurons for one case of a scene, each as `properties.effects` measures it."""
    base = properties.reread(vlm, case.trace)
    other = another(vlm, case)
    seed = case.scene.seed if case.scene else 0
    ranked = {"found": case.order(max(ks))}
    for name in ("activation", "gradient"):
        scores = torch.cat(mmn.contributions(vlm, case.trace, case.noun, name))
        ranked[name] = scores.topk(max(few)).indices.numpy()
    ranked["other concept"] = np.array([place for place in other.order(2 * max(few)) if place not in set(case.order(max(few)))])
    means = properties.replaced_by(mean_of_generation(vlm))
    changes = [("zero", 0.0, properties.scaled(0.0), ks), ("mean", 0.0, means, few)]
    changes += [("resample", 0.0, properties.replaced_by(properties.at_noun(other)), few)]
    changes += [("scale", factor, properties.scaled(factor), (20,)) for factor in FACTORS]
    rows: list[Row] = []

    def keep(change: str, level: float, measured: Any) -> None:
        columns = ["drop", "others", "flip", "rest"]
        for (name, k), part in measured.groupby(["neurons", "k"], sort=False):
            rows.append({"neurons": name, "change": change, "level": level, "k": k, **part[columns].astype(float).mean()})

    for change, level, how, counts in changes:
        lists: dict[str, list[list[Neuron]]] = {"found": [], "random": []}
        for k in counts:
            top = properties.neurons_at(case.layers, ranked["found"][:k])
            lists["found"].append(top)
            lists["random"] += mmn.same_layer_random(vlm, top, draws=draws, seed=seed + k)
        for name in ("activation", "gradient", "other concept") if change == "zero" else ():
            lists[name] = [properties.neurons_at(case.layers, ranked[name][:k]) for k in few]
        keep(change, level, properties.effects(vlm, case, lists, how, base=base))
    top, unit = case.top(20), spread(vlm)
    for sigma in SIGMAS:
        for name, neurons in (("found", top), ("random", mmn.same_layer_random(vlm, top, draws=1, seed=seed)[0])):
            with mmn.perturb(vlm, neurons, sigma * unit, seed=seed):
                reading = properties.reread(vlm, case.trace)
            measured = properties.measured(case, base, reading)[0]
            rows.append({"neurons": name, "change": "noise", "level": sigma, "k": 20, **{k: float(v) for k, v in measured.items()}})
    return rows


@functools.lru_cache(maxsize=1)
def mean_of_generation(vlm: VLM) -> list[torch.Tensor]:
    """Mean activations over the captions of 32 scenes of their own, for each layer `[neurons]`; worked out once a model."""
    pictures = [scenes.draw(seed).image for seed in range(FIRST - 32, FIRST)]
    return mmn.mean_activations(vlm.caption(pictures, batch_size=16))


def mean_rows(cases: list[Case], rows: list[list[Row]], names: list[str], values: list[str]) -> list[Row]:
    """One row a condition: the mean over the nouns of a scene, rounded to four places; `nouns` says over how many."""
    frame = pd.DataFrame([row for each in rows for row in each])
    if frame.empty:
        return []
    means = frame.groupby(names, sort=False)[values].mean().round(4).reset_index()
    counts = {"nouns": len(cases), "forced": cases[0].forced}
    return [{**row, **counts} for row in means.to_dict("records")]


@table(
    "causal",
    keys=range(SCENES),
    columns={
        "neurons": "whose activations are changed: found (direct score), random (same layers, mean of 3 draws), activation, gradient "
        "(ranked by these scores), other concept",
        "change": "zero, mean, resample (as at another picture's noun), scale, noise (on the writes)",
        "level": "factor of scale; sigma of noise in units of the writes' root mean square; else 0",
        "k": "neurons",
        "drop": "of log p(noun's first token) where it was said, nats, mean over the scene's nouns",
        "others": "the same for the caption's other nouns",
        "flip": "share of nouns that are no longer the likeliest token",
        "rest": "share of the steps of no noun whose likeliest token stays",
        "nouns": "how many",
        "forced": "whether the caption is the true one, not the model's",
    },
)
def causal(vlm: VLM, key: int) -> list[Row]:
    """What changing neurons does to a caption held fixed."""
    found = properties.cases(vlm, [scene_of(key)], force=True)
    rows = [causal_rows(vlm, case) for case in found]
    return mean_rows(found, rows, ["neurons", "change", "level", "k"], ["drop", "others", "flip", "rest"])


@table(
    "flips",
    keys=range(SCENES),
    columns={
        "neurons": "found, random (same layers, one draw a noun), other concept; zeroed at every position",
        "k": "neurons",
        "nouns": "nouns that the model says of the scene and the scene shows",
        "gone": "how many of them the new caption lacks",
        "others": "other nouns of these captions",
        "kept": "how many of them the new caption still has",
        "same": "captions whose words other than nouns stay",
    },
)
def flips(vlm: VLM, key: int) -> list[Row]:
    """What a new caption says while neurons are silent."""
    found = properties.cases(vlm, [scene_of(key)])
    rows: list[Row] = []
    others = {id(case): another(vlm, case) for case in found}
    for k in (1, 2, 5, 10, 20, 50, 100):
        for name in ("found", "random", *(["other concept"] if k == 20 else [])):
            chosen = [(case, _chosen(vlm, case, others[id(case)], name, k)) for case in found]
            count = {"gone": 0, "others": 0, "kept": 0, "same": 0}
            if chosen:
                count = {column: int(value) for column, value in properties.flips(vlm, chosen)[[*count]].sum().items()}
            rows.append({"neurons": name, "k": k, "nouns": len(found), **count})
    return rows


def _chosen(vlm: VLM, case: Case, other: Case, name: str, k: int) -> list[Neuron]:
    top = case.top(k)
    if name == "found":
        return top
    if name == "random":
        return mmn.same_layer_random(vlm, top, draws=1, seed=case.scene.seed if case.scene else 0)[0]
    return [neuron for neuron in other.top(2 * k) if neuron not in top][:k]


# --------------------------------------------------------------------------------------------------------------- sensitivity

OVERLAPS = (1, 5, 10, 20, 50, 100, 1000)  # k of the overlaps


@functools.lru_cache(maxsize=1)
def encoder_of(vlm: VLM) -> properties.OwnEncoder:
    """The model's own encoder, calibrated on 32 scenes of their own; made once a model."""
    return properties.OwnEncoder(vlm, [scenes.draw(seed).image for seed in range(FIRST - 32, FIRST)])


@functools.cache
def _lemmas(lexicon: Lexicon, text: str) -> frozenset[str]:
    """The nouns that a token's text is, by a lexicon that reads sentences."""
    return frozenset(lemma for _, lemma, _ in lexicon(f"a {text}"))


def word_lists(vlm: VLM, case: Case, neurons: list[Neuron], k: int = 10, rest: bool = False) -> list[list[str]]:
    """The k tokens that each neuron's write raises most, blank ones left out; with `rest`, the first k that are no noun of the case's
    caption (no form of it, nor its first token)."""
    if not rest:
        return [[t for t in each if t.strip()] for each in mmn.top_tokens(vlm, neurons, k)["tokens"]]
    nouns = case.trace.nouns
    said, first = {noun.lemma for noun in nouns}, {noun.token for noun in nouns}
    ids, _ = semantics.top_token_ids(vlm, neurons, min(4 * k, len(vlm.tokenizer)))
    lists = []
    for row in ids.tolist():
        texts = [semantics.token_text(vlm, token) for token in row if token not in first]
        lists.append([t for t in texts if t.strip() and not _lemmas(vlm.lexicon, t.strip().lower()) & said][:k])
    return lists


class _Near:
    """Nearness of lists of words to one case's caption and picture: the scores in the form of BERTScore and of CLIPScore."""

    def __init__(self, case: Case, encoder: properties.Encoder, reader: properties.Encoder | properties.BertEncoder | None = None):
        self.encoder, self.reader = encoder, reader or encoder
        caption = case.trace.text[len(case.trace.prefix) :].replace(",", " ").split()
        self.caption = self.reader.words(caption)
        self.content = self.reader.words([word for word in caption if word.lower() not in ENGLISH_STOP_WORDS] or caption)
        self.picture = encoder.picture(case.trace.image) if case.trace.image is not None else encoder.words(caption)

    def __call__(self, lists: list[list[str]]) -> tuple[float, float, float]:
        """Nearness to the caption, to the picture, and to the caption's words that are no stop words (of scikit-learn)."""
        words = [self.encoder.words(each) for each in lists]
        read = words if self.reader is self.encoder else [self.reader.words(each) for each in lists]
        text, content = ([properties.text_score(each, some) for each in read] for some in (self.caption, self.content))
        image = [properties.image_score(each, self.picture) for each in words]
        return float(np.mean(text)), float(np.mean(image)), float(np.mean(content))


def semantic_row(vlm: VLM, case: Case, encoder: properties.Encoder, k: int = 10) -> Row:
    """What the top k neurons write, against the word, the caption and the picture; beside same-layer random neurons (5 draws).

    Keys: rank (best place of the word in any neuron's list), in10 (share of the neurons with the word among their ten), text and image
    (scores of their ten words each, mean over the neurons), each also as NAME_random."""
    near = _Near(case, encoder)
    draws = mmn.same_layer_random(vlm, case.top(k), draws=5, seed=case.picture)
    out: dict[str, list[list[float]]] = {"": [], "_random": []}
    for kind, neurons in (("", case.top(k)), *(("_random", draw) for draw in draws)):
        ranks = properties.word_ranks(vlm, neurons, case.noun.token)
        out[kind].append([float(ranks.min()), float((ranks <= 10).mean()), *near(word_lists(vlm, case, neurons))[:2]])
    names = ("rank", "in10", "text", "image")
    return {f"{name}{kind}": float(np.mean([row[i] for row in rows])) for kind, rows in out.items() for i, name in enumerate(names)}


def choices(vlm: VLM, case: Case, k: int, draws: int = 5) -> dict[str, list[list[Neuron]]]:
    """The neurons found and three controls, each a list of lists of k: `weights alone` (of largest `<w_i, u_t>`, which knows the word and
    no picture), `loudest others` (of largest activation, either sign, where the noun is produced, not among those found) and `random`
    (same layers, `draws` times)."""
    top = case.order(k)
    loud = torch.cat(properties.at_noun(case)).abs()
    loud[top.copy()] = -1
    others = {"weights alone": towards(vlm, case.noun.token), "loudest others": loud}
    found = {name: [properties.neurons_at(case.layers, each.topk(len(top)).indices.numpy())] for name, each in others.items()}
    return {"found": [case.top(k)], **found, "random": mmn.same_layer_random(vlm, case.top(k), draws=draws, seed=case.picture)}


def word_rows(
    vlm: VLM,
    case: Case,
    encoder: properties.Encoder,
    k: int = 10,
    reader: properties.Encoder | properties.BertEncoder | None = None,
) -> list[Row]:
    """What the neurons of `choices` write, one row a choice, means over its lists.

    Keys: picture, noun, neurons (the choice); rank, in10, text and image as in `semantic_row`; text_rest and image_rest, the scores of
    the first ten words that are no noun of the caption, and content_rest, theirs with the caption's words that are no stop words."""
    near = _Near(case, encoder, reader)
    rows: list[Row] = []
    for name, lists in choices(vlm, case, k).items():
        measured = []
        for neurons in lists:
            ranks = properties.word_ranks(vlm, neurons, case.noun.token)
            plain, rest = (near(word_lists(vlm, case, neurons, rest=without)) for without in (False, True))
            measured.append([float(ranks.min()), float((ranks <= 10).mean()), *plain[:2], *rest])
        means = np.mean(measured, 0)
        keys = ("rank", "in10", "text", "image", "text_rest", "image_rest", "content_rest")
        rows.append(
            {"picture": case.picture, "noun": case.lemma, "neurons": name}
            | {key: float(value) for key, value in zip(keys, means, strict=True)}
        )
    return rows


def invariance_rows(vlm: VLM, case: Case, ks: tuple[int, ...] = OVERLAPS, shuffles: int = SHUFFLES) -> list[Row]:
    """Overlap of a case's top k with those found again while one thing has changed; `drop`: of log p(noun), nats, under the change.

    kind: shuffle (of the image tokens), or a minimal pair of `properties.variants`; the words are held fixed."""
    assert case.scene is not None
    again = {"shuffle": [properties.shuffled(vlm, case, seed) for seed in range(shuffles)]}
    pairs = properties.variants(case.scene, case.lemma)
    read = properties.on_pictures(vlm, case, [scene.image for scene in pairs.values()])
    again |= {kind: [one] for kind, one in zip(pairs, read, strict=True)}
    step = case.noun.step
    rows = []
    for kind, some in again.items():
        shared = np.mean([properties.overlap(case.order(max(ks)), one.order(max(ks)), ks) for one in some], 0)
        drop = float(np.mean([case.trace.logprobs[step] - one.trace.logprobs[step] for one in some]))
        rows.append({"kind": kind, "drop": drop, **{f"k{k}": float(v) for k, v in zip(ks, shared, strict=True)}})
    return rows


def pair_rows(case: Case, other: Case, kind: str, ks: tuple[int, ...] = OVERLAPS) -> list[Row]:
    """Overlap of the top k of two cases of different pictures."""
    shared = properties.overlap(case.order(max(ks)), other.order(max(ks)), ks)
    return [{"kind": kind, "drop": float("nan"), **{f"k{k}": float(v) for k, v in zip(ks, shared, strict=True)}}]


def relative(vlm: VLM, case: Case, style: str | None = None) -> Case | None:
    """A case of the same concept in another scene: place, size, neighbours and (unless given) art drawn anew."""
    assert case.scene is not None
    rng = np.random.default_rng([9, case.scene.seed])
    art = style or str(rng.choice([each for each in scenes.STYLES if case.lemma in scenes.sprites(each)]))
    if case.lemma not in scenes.sprites(art):
        return None
    names = [name for name in scenes.sprites(art) if name not in (*case.scene.names, *scenes.PLANTED)]
    chosen = [case.lemma, *rng.choice(names, int(rng.integers(0, 3)), replace=False).tolist()]
    scene = scenes.draw(int(rng.integers(10**6)) + 2 * 10**7, style=art, concepts=chosen)
    return next((each for each in properties.cases(vlm, [scene], force=case.forced) if each.lemma == case.lemma), None)


@table(
    "sensitivity",
    keys=range(SCENES + HELD_OUT),
    columns={
        "noun": "the noun",
        "style": "art of the scene; the last keys are in the held-out art",
        "objects": "in the scene",
        "share": "of the picture that the object covers",
        "iou": "mean heatmap of the top 10, as many hottest pixels as the object has, against the mask",
        "iou_random": "the same of same-layer random neurons, mean of 20 draws",
        "pointing": "1 if the hottest pixel is on the object",
        "pointing_random": "mean of the draws",
        "auprc": "area under the precision-recall curve of the pixels; chance: share",
        "auprc_random": "mean of the draws",
        "rank": "best place of the word among the tokens that one of the top 10 neurons writes",
        "in10": "share of the top 10 neurons with the word among their ten tokens",
        "text": "score in the form of BERTScore of these tokens with the caption, own encoder",
        "image": "score in the form of CLIPScore with the picture, own encoder",
        "rank_random": "of same-layer random neurons, mean of 5 draws",
        "in10_random": "the same",
        "text_random": "the same",
        "image_random": "the same",
        "forced": "whether the caption is the true one, not the model's",
    },
)
def sensitivity(vlm: VLM, key: int) -> list[Row]:
    """Words and heatmaps of the neurons found, one row a noun."""
    rows = []
    scene = scene_of(key, scenes.HELD_OUT_STYLE if key >= SCENES else None)
    for case in properties.cases(vlm, [scene], force=True):
        if case.scene is None or not case.scene.mask(case.lemma).any():  # hidden behind others
            continue
        located = {k: v for k, v in properties.localisation(vlm, case, seed=key).items() if k != "picture"}
        words = semantic_row(vlm, case, encoder_of(vlm))
        row = {**located, **words, "forced": case.forced}
        rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    return rows


@table(
    "invariance",
    keys=range(SCENES),
    columns={
        "noun": "the noun",
        "kind": "what changed: shuffle of image tokens; moved, recoloured, elsewhere (place), restyled (held-out art), neighbour, "
        "replaced, removed (minimal pairs, words held fixed); same concept, same concept held-out art, another concept (other scenes)",
        "drop": "of log p(noun), nats, where the words were held fixed",
        **{f"k{k}": f"share of the top {k} neurons that are found again; chance {k} / neurons" for k in OVERLAPS},
        "forced": "whether the caption is the true one, not the model's",
    },
    tolerance={f"k{k}": 2 / k for k in OVERLAPS},
)
def invariance(vlm: VLM, key: int) -> list[Row]:
    """Which neurons are found again when something changes, for the first noun that the caption says."""
    case = properties.cases(vlm, [scene_of(key)], force=True)[0]
    rows = invariance_rows(vlm, case)
    for kind, style in (("same concept", None), ("same concept, held-out art", scenes.HELD_OUT_STYLE)):
        one = relative(vlm, case, style)
        rows += pair_rows(case, one, kind) if one else []
    rows += pair_rows(case, another(vlm, case), "another concept")
    kept = [{name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    return [{"noun": case.lemma, **row, "forced": case.forced} for row in kept]


# --------------------------------------------------------------------------------------------------------------- specificity

CONCEPTS = tuple(name for name, concept in scenes.CONCEPTS.items() if concept.frequency >= 3 and name not in scenes.PLANTED)
PICTURES = 4  # of each concept, to find its neurons on; as many others to measure on
TOP = 10


def portraits(vlm: VLM, concept: str, first: int, count: int = PICTURES) -> list[Case]:
    """Cases of one concept alone in the picture, in several places and arts, with `a CONCEPT` put into the model's mouth."""
    styles = [style for style in scenes.STYLES if concept in scenes.sprites(style)]
    drawn = [scenes.draw(n, style=styles[n % len(styles)], concepts=[concept]) for n in range(first, first + count)]
    trace = properties.say(vlm, drawn[0].image, f"{mmn.PREFIX} {scenes.CONCEPTS[concept].a}")
    (noun,) = trace.nouns
    reading = properties.reread(vlm, trace, [scene.image for scene in drawn], record=True)
    found = []
    for row, scene in enumerate(drawn):
        each = reading.trace(row)
        scores = torch.cat(mmn.contributions(vlm, each, noun))
        found.append(Case(row, each, noun, scores, tuple(vlm.anatomy.neurons), scene, True))
    return found


def of_concept(some: list[Case], k: int) -> np.ndarray:
    """The k neurons (or all, if there are fewer) of highest mean score over some cases of one concept, numbered over all layers."""
    mean = torch.stack([case.scores for case in some]).mean(0)
    return mean.topk(min(k, len(mean))).indices.numpy()


def mean_at_noun(some: list[Case]) -> torch.Tensor:
    """Mean activations where the noun is produced, all layers one after the other, float32 `[neurons]`."""
    return torch.stack([torch.cat(properties.at_noun(case)) for case in some]).mean(0)


def towards(vlm: VLM, token: int) -> torch.Tensor:
    """Every write's inner product with a token's row of the unembedding, all layers one after the other, float32 `[neurons]`."""
    word = vlm.anatomy.words([token])
    return torch.cat([ffn.read(word).cpu()[0] for ffn in vlm.anatomy.ffns])


@functools.lru_cache(maxsize=1)
def _sets(vlm: VLM) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
    sets = {}
    for concept in CONCEPTS:
        some = portraits(vlm, concept, 3 * 10**7)
        order = of_concept(some, 100)
        sets[concept] = order, towards(vlm, some[0].noun.token)[order[:TOP].copy()]
    return sets


@table(
    "specificity",
    keys=CONCEPTS,
    columns={
        "concept": "whose pictures are shown: one object alone, 4 pictures that the neurons were not found on",
        "neurons": "whose top 10 neurons are asked (found on 4 pictures of that concept)",
        "score": "mean over the pictures of their summed contribution to their own concept's word, logits",
        "overlap": "share of these neurons that are among the top 10 found on the pictures shown",
    },
)
def specificity(vlm: VLM, key: str) -> list[Row]:
    """One column of the concept x concept matrices: one concept's pictures, every concept's neurons."""
    sets = _sets(vlm)
    shown = portraits(vlm, key, 4 * 10**7)
    fires, mine = mean_at_noun(shown), set(of_concept(shown, TOP).tolist())
    return [
        {
            "concept": key,
            "neurons": name,
            "score": round(float((fires[order[:TOP].copy()] * reads).sum()), 4),
            "overlap": len(mine & set(order[:TOP].tolist())) / TOP,
        }
        for name, (order, reads) in sets.items()
    ]


def in_words(vlm: VLM, concept: str) -> Case | None:
    """The concept's word produced without any picture, as the answer to `What is a CONCEPT?`: None if the answer does not say it."""
    known = scenes.CONCEPTS.get(concept)
    try:
        trace = vlm.caption(None, f"What is {known.a if known else f'a {concept}'}?", "", 12)
    except MmnError:  # some models answer only with a picture
        return None
    noun = next((noun for noun in trace.nouns if noun.lemma == concept), None)
    if noun is None:
        return None
    return Case(0, trace, noun, torch.cat(mmn.contributions(vlm, trace, noun)), tuple(vlm.anatomy.neurons))


@table(
    "text_specificity",
    keys=CONCEPTS,
    columns={
        "concept": "asked about in words alone: What is a CONCEPT?",
        **{
            f"k{k}": f"share of the top {k} neurons of the word there that are of the concept's top {k} on pictures"
            for k in (10, 20, 100)
        },
        **{f"other{k}": f"the same with the top {k} of other concepts, mean" for k in (10, 20, 100)},
        "said": "whether the answer says the word; overlaps are empty where it does not",
    },
)
def text_specificity(vlm: VLM, key: str) -> list[Row]:
    """Whether the neurons of a word read from a picture are those of the word in a text."""
    case, ks = in_words(vlm, key), (10, 20, 100)
    row: Row = {"concept": key}
    sets = _sets(vlm)
    shared = {
        name: properties.overlap(case.order(100), order, ks) if case else np.full(3, np.nan) for name, (order, _) in sets.items()
    }
    others = np.mean([each for name, each in shared.items() if name != key], 0)
    for prefix, values in (("k", shared[key]), ("other", others)):
        row |= {f"{prefix}{k}": round(float(value), 4) for k, value in zip(ks, values, strict=True)}
    return [{**row, "said": case is not None}]
