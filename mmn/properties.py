"""The paper's three properties, measured: sensitivity, specificity, causal effect. Every measure here is this project's own [ours]
unless its docstring says otherwise; the paper's abstract names the properties and its release shows them on examples.

The unit of everything is a `Case`: one noun that a model said of one picture, with every neuron's score for it. Measures come as
pandas tables with one row a case and condition, `picture` among the columns, so that intervals can resample pictures:

    found = cases(vlm, scenes)                              # captions, nouns, scores
    table = effects(vlm, found[0], {"found": found[0].top(20)})
    summary(table, ["neurons", "k"], "drop")                # mean with a 95 % interval over pictures
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import false_discovery_control
from torch import Tensor

import mmn
from mmn import metrics
from mmn.bars import tqdm
from mmn.contribution import direct
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.ffn import neurons_at as neurons_at
from mmn.hooks import Removable, hooked
from mmn.intervene import copied, mean_ablate, scale, zero
from mmn.metrics import Interval
from mmn.nouns import Noun
from mmn.scenes import CONCEPTS, HELD_OUT_STYLE, PLACES, Placed, Scene, free_box, recompose, sprites
from mmn.trace import WINDOW, Trace
from mmn.vlm import PREFIX, VLM, hub
from mmn.weights import matrix

if TYPE_CHECKING:
    from mmn.sources import Picture

NEAREST = 8  # neurons among which `as_wide` draws
KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # numbers of neurons at which overlaps and effects are drawn

# ------------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, eq=False)
class Case:
    """One noun said of one picture. picture: its number among those given. scores: every neuron's score for the noun, all layers one
    after the other, float32 `[neurons]`. scene: what is true of the picture, None for a reader's own. forced: whether the caption was
    the true one put into the model's mouth, because its own names nothing that is there. known: what else is known of a reader's own."""

    picture: int
    trace: Trace
    noun: Noun
    scores: Tensor = field(repr=False)
    layers: tuple[int, ...]
    scene: Scene | None = field(default=None, repr=False)
    forced: bool = False
    known: Picture | None = field(default=None, repr=False)

    @property
    def lemma(self) -> str:
        """The noun, singular."""
        return self.noun.lemma

    @property
    def mask(self) -> np.ndarray | None:
        """Where the noun is in the picture, bool `[H, W]`; None where that is not known, where it names nothing that is there, and where
        the mask is of another size, as for a picture that EXIF turns."""
        if self.scene is not None:
            return self.scene.mask(self.lemma)
        name = self.known.name_at(self.trace.text, self.noun.span[1]) if self.known else None
        mask = self.known.mask(name) if self.known and name else None
        fits = mask is not None and self.trace.image is not None and mask.shape == self.trace.image.size[::-1]
        return mask if fits else None

    def order(self, k: int) -> np.ndarray:
        """The k neurons of highest score, best first, numbered over all layers, int `[k]`."""
        return self.scores.topk(min(k, len(self.scores))).indices.numpy()

    def top(self, k: int) -> list[Neuron]:
        """The same as neurons."""
        return neurons_at(self.layers, self.order(k))


def cases(
    vlm: VLM, pictures: Sequence[Image.Image | Scene], *, force: bool = False, known: Sequence[Picture] | None = None
) -> list[Case]:
    """Caption pictures or scenes and give every neuron its direct score for every noun.

    known: where the pictures are a reader's, what is known of each. Of a scene only nouns that it shows are kept. With `force`, a scene of
    which the model names nothing gets its true caption word by word instead: the only way to ask an untrained model. Raises MmnError for
    no pictures."""
    images = [each.image if isinstance(each, Scene) else each for each in pictures]
    found = []
    for number, (each, trace) in enumerate(zip(pictures, vlm.caption(images, batch_size=16), strict=True)):
        scene = each if isinstance(each, Scene) else None
        nouns = _shown(trace, scene)
        forced = scene is not None and force and not nouns
        if forced and scene is not None:
            trace = say(vlm, scene.image, f"{PREFIX} {scene.caption}")
            nouns = _shown(trace, scene)
        if nouns:
            scores = torch.cat(direct(vlm, trace, nouns), -1)
            sizes = tuple(vlm.anatomy.neurons)
            more = known[number] if known else None
            found += [Case(number, trace, noun, row, sizes, scene, forced, more) for noun, row in zip(nouns, scores, strict=True)]
    return found


def _shown(trace: Trace, scene: Scene | None) -> list[Noun]:
    return [noun for noun in trace.nouns if scene is None or noun.lemma in scene.names]


def say(vlm: VLM, image: Image.Image | None, text: str, prompt: str | None = None, prefix: str = PREFIX) -> Trace:
    """`text` put into the model's mouth: the Trace it would have left had it said these words. The stream is not recorded.

    Raises MmnError for a text that does not go on from `prefix`."""
    if not text.startswith(prefix) or not text[len(prefix) :].strip():
        raise MmnError(f"The text has to begin with {prefix!r} and to go on after it, not {text!r}.")
    return retrace(vlm, image, vlm.tokenizer(text[len(prefix) :], add_special_tokens=False)["input_ids"], prompt, prefix)


def retrace(vlm: VLM, image: Image.Image | None, tokens: Sequence[int], prompt: str | None = None, prefix: str = PREFIX) -> Trace:
    """The Trace of an answer whose tokens are known, from one forward pass. The stream is not recorded."""
    prompt = vlm.prompt if prompt is None else prompt
    context = vlm.inputs([image], [prompt], [prefix])["input_ids"][0, -WINDOW:].tolist()
    ids = torch.tensor(tokens)
    around = image, prompt, prefix, vlm.tokenizer, context, vlm.lexicon
    empty = Trace(ids, False, torch.zeros(len(ids)), None, vlm.anatomy.neurons, None, *around)
    return reread(vlm, empty, record=True).trace(0)


# --------------------------------------------------------------------------------------------- the same words, read once more


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model says at the steps of a given caption, one row a condition. logp: natural log of the probability of each of the
    caption's tokens `[rows, steps]`. best: the likeliest token there, int64 `[rows, steps]`. activations: for each layer `[rows, steps,
    neurons]`, empty if not recorded."""

    of: Trace
    logp: Tensor
    best: Tensor
    activations: list[Tensor]
    images: Sequence[Image.Image | None]

    def trace(self, row: int) -> Trace:
        """One row as a Trace."""
        record = list(torch.cat([layer[row] for layer in self.activations], -1)) if self.activations else None
        return replace(self.of, logprobs=self.logp[row].clone(), record=record, image=self.images[row])


@torch.no_grad()
def reread(vlm: VLM, trace: Trace, images: Sequence[Image.Image] | None = None, *, rows: int = 1, record: bool = False) -> Reading:
    """One forward pass over a caption's own words, each put where the model said it: no new caption, no drift of the words.

    `images` gives each row a picture of its own; else `rows` copies of the trace's are read, seen once by the vision tower and copied
    where the decoder begins, so that an intervention with as many rows costs the decoder alone. Raises MmnError where pictures differ
    in their number of tokens."""
    steps = len(trace.tokens)
    if images is None:
        images = [trace.image] * rows  # type: ignore[list-item]
        inputs = vlm.replay(trace, steps - 1)
        copies: AbstractContextManager[None] = copied(vlm, rows)
    else:
        inputs = _batch([vlm.replay(replace(trace, image=image), steps - 1) for image in images])
        copies = nullcontext()
    keep = {"logits_to_keep": steps} if "logits_to_keep" in inspect.signature(vlm.model.forward).parameters else {}
    # A layer that the pass leaves out, as Mllama does without a picture, has activations of 0, as in a Trace.
    seen = [torch.zeros(len(images), steps, neurons) for neurons in vlm.anatomy.neurons] if record else []

    def watch(layer: int, activations: Tensor) -> None:
        last = activations[:, activations.shape[1] - steps :]
        seen[layer] = last.to("cpu", torch.float32, copy=True)  # a view would keep every position

    watched = vlm.anatomy.ffns if record else []
    with copies, hooked(ffn.watch(partial(watch, layer)) for layer, ffn in enumerate(watched)):
        logits = vlm.model(**inputs, use_cache=False, **keep).logits[:, -steps:].float()
    logp = logits.log_softmax(-1)
    tokens = trace.tokens.to(logp.device).expand(len(images), -1)
    return Reading(trace, logp.gather(-1, tokens[..., None])[..., 0].cpu(), logits.argmax(-1).cpu(), seen, images)


def _batch(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if any(one["input_ids"].shape != each[0]["input_ids"].shape for one in each):
        raise MmnError("These pictures differ in their number of image tokens: give pictures of one size.")
    return {key: torch.cat([one[key] for one in each]) for key in each[0]}


# ------------------------------------------------------------------------------------------------------------- causal effect

Change = Callable[[VLM, list[list[Neuron]]], AbstractContextManager[None]]


def scaled(factor: float) -> Change:
    """Multiply activations: 0 zeroes, above 1 amplifies, -1 reverses."""
    return lambda vlm, rows: zero(vlm, rows) if factor == 0 else scale(vlm, rows, factor)


def replaced_by(values: Sequence[Tensor]) -> Change:
    """Set activations to given values, for each layer `[neurons]`: their mean, or those of another picture (resampling)."""
    return lambda vlm, rows: mean_ablate(vlm, rows, values)


def at_noun(case: Case) -> list[Tensor]:
    """A case's activations at the step that produced its noun, for each layer float32 `[neurons]`."""
    return list(case.trace.at([case.noun.step])[0].split(case.trace.sizes))


def effects(
    vlm: VLM, case: Case, neurons: Mapping[str, Sequence[Neuron] | Sequence[Sequence[Neuron]]], change: Change | None = None,
    *, base: Reading | None = None, rows_at_once: int = 32,
) -> pd.DataFrame:  # fmt: skip
    """What changing some neurons does to a caption that is held fixed, all at every position; one row a list of neurons.

    `neurons` names each list, or each list of lists (random draws). Columns: picture, noun, neurons (the name), draw, k, drop (of log
    p(noun's first token), nats, positive when the word loses), others (mean drop of the caption's other nouns, nan without any), flip
    (1 if the noun is no longer the likeliest token at its step, nan if it never was), rest (share of the steps that belong to no noun
    whose likeliest token stays). change: how (default: zeroing). The reading without change can be given as `base`."""
    base = base or reread(vlm, case.trace)
    named = [(name, draw, list(each)) for name, some in neurons.items() for draw, each in enumerate(_lists(some))]
    rows = []
    for start in range(0, len(named), rows_at_once):
        part = named[start : start + rows_at_once]
        with (change or scaled(0))(vlm, [each for _, _, each in part]):
            reading = reread(vlm, case.trace, rows=len(part))
        for (name, draw, each), values in zip(part, measured(case, base, reading), strict=True):
            rows.append({"picture": case.picture, "noun": case.lemma, "neurons": name, "draw": draw, "k": len(each), **values})
    return pd.DataFrame(rows)


def _lists(some: Sequence[Neuron] | Sequence[Sequence[Neuron]]) -> list[Sequence[Neuron]]:
    return [some] if not len(some) or isinstance(some[0], Neuron) else list(some)  # type: ignore[list-item, arg-type]


def measured(case: Case, base: Reading, reading: Reading) -> list[dict[str, Any]]:
    """The columns drop, others, flip and rest of `effects`, one dictionary for each row of `reading`, against the one row of `base`."""
    own = case.noun.step
    others = [noun.step for noun in case.trace.nouns if noun.step != own]
    spoken = {step for noun in case.trace.nouns for step in steps_of(case.trace, noun)}
    rest = [step for step in range(len(case.trace.tokens)) if step not in spoken]
    drops = base.logp[0] - reading.logp
    return [
        {
            "drop": float(drops[row, own]),
            "others": float(drops[row, others].mean()) if others else float("nan"),
            "flip": float(reading.best[row, own] != case.noun.token) if base.best[0, own] == case.noun.token else float("nan"),
            "rest": float((reading.best[row, rest] == base.best[0, rest]).float().mean()) if rest else float("nan"),
        }
        for row in range(len(drops))
    ]


def steps_of(trace: Trace, noun: Noun) -> range:
    """The steps whose pieces make up a noun."""
    last = next((step for step, end in enumerate(trace.ends) if end >= noun.span[1]), len(trace.ends) - 1)
    return range(noun.step, last + 1)


def flips(vlm: VLM, chosen: Sequence[tuple[Case, Sequence[Neuron]]]) -> pd.DataFrame:
    """Caption anew while each case's own neurons are zeroed at every position.

    Columns: picture, noun, k, gone (the caption no longer says the noun), others (how many other nouns it said), kept (how many of them
    it still says), instead (nouns that are new, space between), same (the rest of the caption is word for word as it was)."""
    rows = []
    for start in tqdm(range(0, len(chosen), 16), desc="captions", leave=False, delay=5):
        part = chosen[start : start + 16]
        with zero(vlm, [list(neurons) for _, neurons in part]):
            given = [case.trace for case, _ in part]
            asked = [trace.image for trace in given], [trace.prompt for trace in given], [trace.prefix for trace in given]
            traces = vlm.caption(*asked, batch_size=len(part), record=False)
        for (case, neurons), trace in zip(part, traces, strict=True):
            before, after = ([noun.lemma for noun in each.nouns] for each in (case.trace, trace))
            others = [noun for noun in before if noun != case.lemma]
            rows.append(
                {
                    "picture": case.picture,
                    "noun": case.lemma,
                    "k": len(neurons),
                    "gone": case.lemma not in after,
                    "others": len(others),
                    "kept": sum(noun in after for noun in others),
                    "instead": " ".join(noun.replace(" ", "_") for noun in after if noun not in before),
                    "same": _frame(case.trace) == _frame(trace),
                }
            )
    return pd.DataFrame(rows)


def _frame(trace: Trace) -> str:
    """A caption with its nouns cut out, and the articles before them, which follow the noun."""
    text, end = [], 0
    for _, _, (first, last) in trace.lexicon(trace.text):
        text.append(trace.text[end:first].removesuffix("an ").removesuffix("a "))
        end = last
    return "_".join([*text, trace.text[end:]])


@torch.no_grad()
def transplant(
    vlm: VLM,
    donor: Case,
    image: Image.Image,
    neurons: Mapping[str, Sequence[Neuron] | Sequence[Sequence[Neuron]]],
    where: str = "all",
) -> pd.DataFrame:
    """Sufficiency: read the donor's words beside another picture, with the neurons' activations taken from the donor's own.

    where: `all` positions, `image` (those of the picture), or `last` (the one that produces the noun). Columns: picture, noun, neurons,
    draw, k, gain (of log p(noun's first token), nats, over the other picture alone), share (of the gap between the two pictures that is
    closed; nan where the gap is under 0.1 nats), follows (the donor's noun is now the likeliest). Raises MmnError for another `where`,
    or where the pictures differ in their number of tokens."""
    if where not in ("all", "image", "last"):
        raise MmnError(f"where is all, image or last, not {where!r}.")
    step, token = donor.noun.step, donor.noun.token
    short = replace(donor.trace, tokens=donor.trace.tokens[: step + 1])  # up to the noun
    given, other = vlm.replay(short, step), vlm.replay(replace(short, image=image), step)
    mask = torch.ones_like(vlm.image_positions(given)[0].cpu())
    if where == "image":
        mask = vlm.image_positions(given)[0].cpu()
    elif where == "last":
        mask[:-1] = False
    kept: list[Tensor] = []
    if given["input_ids"].shape != other["input_ids"].shape:
        raise MmnError("The two pictures differ in their number of image tokens: give pictures of one size.")
    source = _log_p(vlm, given, (ffn.watch(kept.append) for ffn in vlm.anatomy.ffns))[0, token]
    target = _log_p(vlm, other)[0, token]
    named = [(name, draw, list(each)) for name, some in neurons.items() for draw, each in enumerate(_lists(some))]
    chosen = [torch.zeros(len(named), 1, size, dtype=torch.bool) for size in vlm.anatomy.neurons]
    for row, (_, _, each) in enumerate(named):
        for layer, unit in each:
            chosen[layer][row, 0, unit] = True

    def put(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda a: torch.where((chosen[layer] & mask[:, None]).to(a.device), kept[layer], a)

    with copied(vlm, len(named)):
        patched = _log_p(vlm, other, (ffn.watch(put(layer)) for layer, ffn in enumerate(vlm.anatomy.ffns)))
    gap = float(source - target)
    return pd.DataFrame(
        {
            "picture": donor.picture,
            "noun": donor.lemma,
            "neurons": name,
            "draw": draw,
            "k": len(each),
            "gain": (gain := float(patched[row, token] - target)),
            "share": gain / gap if gap > 0.1 else float("nan"),
            "follows": bool(patched[row].argmax() == token),
        }
        for row, (name, draw, each) in enumerate(named)
    )


def _log_p(vlm: VLM, inputs: Mapping[str, Tensor], hooks: Iterable[Removable] = ()) -> Tensor:
    """Log probabilities at the last position `[rows, vocabulary]`, with some hooks on."""
    with hooked(hooks):
        return vlm.model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(-1).cpu()


# --------------------------------------------------------------------------------------------------------------- sensitivity


def word_ranks(vlm: VLM, neurons: Sequence[Neuron], token: int) -> np.ndarray:
    """The place of a token among all those that each neuron's write raises, 1 the first, int `[neurons]`. Raises MmnError for a neuron
    that is not there."""
    table = matrix(vlm.anatomy.unembedding)[: len(vlm.tokenizer)].float()
    logits = vlm.anatomy.writes(neurons) @ table.T
    return 1 + (logits > logits[:, token, None]).sum(-1).cpu().numpy()


def overlap(one: np.ndarray, other: np.ndarray, ks: Sequence[int] = KS) -> np.ndarray:
    """Share of the first k of two rankings `[... , n]` that both have, for each k, float `[..., ks]`. By chance: k / neurons.

    Raises MmnError for rankings shorter than the largest k."""
    one, other = np.asarray(one), np.asarray(other)
    if max(ks) > min(one.shape[-1], other.shape[-1]):
        raise MmnError(f"The rankings hold {min(one.shape[-1], other.shape[-1])} neurons, fewer than the largest k, {max(ks)}.")
    same = one[..., :, None] == other[..., None, : max(ks)]
    where = np.where(same.any(-1), same.argmax(-1), one.shape[-1])  # the place in `other` of each of `one`
    at = np.maximum(where, np.arange(one.shape[-1]))  # from which k on both have it
    return np.stack([(at < k).sum(-1) / k for k in ks], -1)


class Agreement(NamedTuple):
    """How well a heatmap finds an object. iou: of its hottest pixels, as many as the object has, with the object. pointing: whether the
    hottest pixel is on the object. auprc: area under the precision-recall curve."""

    iou: float
    pointing: bool
    auprc: float


def agreement(heat: np.ndarray, mask: np.ndarray) -> Agreement:
    """Heat float `[H, W]` against a mask bool `[H, W]`. Raises MmnError for an empty mask or another shape."""
    if heat.shape != mask.shape or not mask.any():
        raise MmnError("A heatmap is measured against a mask of its own shape that is not empty.")
    hottest = heat == np.nanmax(heat)
    filled = np.where(np.isnan(heat), -np.inf, heat)  # what the model never saw
    precise = metrics.auprc(np.nan_to_num(filled, neginf=float(np.nanmin(heat)) - 1), mask)
    return Agreement(
        metrics.iou(metrics.by_area(filled, int(mask.sum())), mask), bool((hottest & mask).sum() * 2 > hottest.sum()), precise
    )


def as_wide(vlm: VLM, trace: Trace, neurons: Sequence[Neuron], draws: int = 20, seed: int = 0) -> list[list[Neuron]]:
    """The stricter control for heatmaps, since most of `mmn.same_layer_random` are silent: each neuron is replaced by one of its layer
    that fires on about as many patches of the trace's picture (drawn among the NEAREST), never by one of the given, none twice [ours].

    Raises MmnError as `mmn.heatmap` does, and if a layer has too few others that fire."""
    layers = sorted({neuron.layer for neuron in neurons})
    every = [Neuron(layer, unit) for layer in layers for unit in range(vlm.anatomy.neurons[layer])]
    wide = dict(zip(every, (mmn.heatmap(vlm, trace, every).grid != 0).flatten(1).sum(1).tolist(), strict=True))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        taken: list[Neuron] = []
        for neuron in neurons:
            others = [
                each for each in every if each.layer == neuron.layer and wide[each] and each not in neurons and each not in taken
            ]
            if not others:
                raise MmnError(f"Too few other neurons of layer {neuron.layer} fire on this picture to draw {len(neurons)} from.")
            near = sorted(others, key=lambda each: abs(wide[each] - wide[neuron]))[:NEAREST]
            taken.append(near[rng.integers(len(near))])
        drawn.append(taken)
    return drawn


def localisation(vlm: VLM, case: Case, k: int = 10, draws: int = 20, seed: int = 0, wide: bool = False) -> dict[str, Any]:
    """One case's heatmap of the top k neurons against the object's mask, beside the mean over random draws: of `mmn.same_layer_random`,
    or of `as_wide` if `wide`.

    Keys: picture, noun, iou, iou_random, pointing, pointing_random, auprc, auprc_random, share (of the picture that the object covers,
    the chance level of auprc and pointing), objects, style. Raises MmnError for a case without a scene."""
    if case.scene is None:
        raise MmnError("Where the object is is known of drawn scenes alone: give cases of scenes.")
    top = case.top(k)
    random = as_wide(vlm, case.trace, top, draws, seed) if wide else mmn.same_layer_random(vlm, top, draws=draws, seed=seed)
    heat = mmn.heatmap(vlm, case.trace, [*top, *(neuron for draw in random for neuron in draw)])
    maps = replace(heat, grid=heat.grid.unflatten(0, (draws + 1, k)).mean(1)).on_image(per_neuron=True)
    mask = case.scene.mask(case.lemma)
    found, *chance = (agreement(each, mask) for each in maps)
    row: dict[str, Any] = {"picture": case.picture, "noun": case.lemma}
    for name in Agreement._fields:
        row[name] = float(getattr(found, name))
        row[f"{name}_random"] = float(np.mean([getattr(each, name) for each in chance]))
    return row | {"share": float(mask.mean()), "objects": len(case.scene.objects), "style": case.scene.style}


def shuffled(vlm: VLM, case: Case, seed: int = 0) -> Case:
    """The case read again, word for word, with the picture's tokens in another order: neurons found anew."""
    with mmn.shuffle_image_tokens(vlm, seed=seed):
        return _again(vlm, case, reread(vlm, case.trace, record=True), 0)


def on_pictures(vlm: VLM, case: Case, images: Sequence[Image.Image]) -> list[Case]:
    """The case's words read beside other pictures of the same size; every neuron's score for the same noun at the same step."""
    reading = reread(vlm, case.trace, images, record=True)
    return [_again(vlm, case, reading, row) for row in range(len(images))]


def _again(vlm: VLM, case: Case, reading: Reading, row: int) -> Case:
    trace = reading.trace(row)
    return replace(case, trace=trace, scores=torch.cat(direct(vlm, trace, [case.noun]), -1)[0])


def variants(scene: Scene, concept: str, seed: int = 0) -> dict[str, Scene]:
    """Minimal pairs of a scene: one thing about one object changed, everything else as it was.

    `removed` (scenes of two or more objects) and `replaced` take the concept away; `moved`, `recoloured`, `elsewhere` (another place),
    `restyled` (the held-out art) and `neighbour` (another object replaced) leave it. What a scene has no room or art for is left out.
    Raises MmnError if the scene does not show the concept."""
    held = [placed for placed in scene.objects if placed.concept == concept]
    if not held:
        raise MmnError(f"The scene shows {', '.join(scene.names)}, no {concept}.")
    rng = np.random.default_rng([7, seed, scene.seed])
    absent = [name for name in sprites(scene.style) if name not in scene.names]
    new = str(rng.choice(absent))
    rest = [placed for placed in scene.objects if placed.concept != concept]

    def each(change: Callable[[Placed], Placed], of: str) -> Scene:
        return recompose(scene, [change(placed) if placed.concept == of else placed for placed in scene.objects])

    found = {"replaced": each(lambda placed: replace(placed, concept=new), concept)}
    if rest:
        found["removed"] = recompose(scene, rest)
        found["neighbour"] = each(lambda placed: replace(placed, concept=new), rest[0].concept)
    if len(held) == 1:
        try:
            box = free_box(scene, held[0], seed)
            found["moved"] = each(lambda placed: replace(placed, box=box), concept)
        except MmnError:  # no room
            pass
    found["recoloured"] = each(lambda placed: replace(placed, hue=85), concept)
    others = [place for place in PLACES if place != scene.place]
    found["elsewhere"] = recompose(scene, scene.objects, place=str(rng.choice(others)))
    if all(name in sprites(HELD_OUT_STYLE) for name in scene.names):
        found["restyled"] = recompose(scene, scene.objects, style=HELD_OUT_STYLE)
    return found


# ------------------------------------------------------------------------------------- semantic similarity, and its encoders


class OwnEncoder:
    """The encoder that needs no download: the model itself.

    A word is the mean of its tokens' input embeddings, less the mean of all embeddings; a picture is its image tokens as they enter the
    decoder, each less the mean over the `calibration` pictures: the projector was trained to speak the language model's language."""

    name = "the model's own embeddings"

    def __init__(self, vlm: VLM, calibration: Sequence[Image.Image] = ()):
        self.vlm = vlm
        self.table = matrix(vlm.model.get_input_embeddings()).float().cpu()
        self.centre = self.table[: len(vlm.tokenizer)].mean(0)
        self.ground = torch.zeros(self.table.shape[1])
        self._seen: dict[str, Tensor] = {}
        if calibration:
            self.ground = torch.cat([self._tokens(image) for image in calibration]).mean(0)

    def words(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 a text, float32 `[texts, width]`."""
        for text in {*texts} - self._seen.keys():  # the same few thousand words come again and again
            ids = self.vlm.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
            self._seen[text] = self.table[ids].mean(0) if ids else self.centre
        return _unit(torch.stack([self._seen[text] for text in texts]) - self.centre)

    @torch.no_grad()
    def picture(self, image: Image.Image) -> Tensor:
        """The vectors, each of length 1, of a picture's tokens, float32 `[image tokens, width]`."""
        return _unit(self._tokens(image) - self.ground)

    @torch.no_grad()
    def _tokens(self, image: Image.Image) -> Tensor:
        seen: list[Tensor] = []
        inputs = self.vlm.inputs([image], [self.vlm.prompt], [""])
        positions = self.vlm.image_positions(inputs)[0]

        def keep(_: Any, __: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["inputs_embeds"][0, positions].float().cpu())

        decoder = self.vlm.anatomy.decoder
        with hooked(each.register_forward_pre_hook(keep, with_kwargs=True) for each in [decoder]):
            self.vlm.model(**inputs, use_cache=False)
        return seen[0]


class ClipEncoder:
    """CLIP from transformers, by name or folder: the encoder of CLIPScore (Hessel et al. 2021, arXiv 2104.08718)."""

    def __init__(self, name: str = "openai/clip-vit-base-patch32"):
        from transformers import CLIPModel, CLIPProcessor

        self.name = name
        try:
            with hub(name):
                self.model = CLIPModel.from_pretrained(name, dtype=torch.float32).eval()
                self.processor = CLIPProcessor.from_pretrained(name, backend="pil")
        except OSError as error:
            raise MmnError(
                f"There is no CLIP checkpoint {name!r} here: give a folder, or its name while you are online."
            ) from error

    @torch.no_grad()
    def words(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 a text, float32 `[texts, width]`."""
        given = self.processor(text=[f"A photo depicts {text.strip()}" for text in texts], padding=True, return_tensors="pt")
        out = self.model.text_model(**given).pooler_output
        return _unit(self.model.text_projection(out))

    @torch.no_grad()
    def picture(self, image: Image.Image) -> Tensor:
        """The picture's vector, of length 1, float32 `[1, width]`."""
        given = self.processor(images=[image], return_tensors="pt")
        return _unit(self.model.visual_projection(self.model.vision_model(**given).pooler_output))


class BertEncoder:
    """A text encoder from transformers, by name or folder, such as BERTScore uses (`roberta-large`, layer 17, is its default): words
    are encoded together, each token in its context, without the special tokens. Raises MmnError where there is no such checkpoint."""

    def __init__(self, name: str, layer: int = -1):
        from transformers import AutoModel, AutoTokenizer

        self.name, self.layer = name, layer
        try:
            with hub(name):
                self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
                self.tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise MmnError(f"There is no text encoder {name!r} here: give a folder, or its name while you are online.") from error

    @torch.no_grad()
    def words(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 a token of all texts together, float32 `[tokens, width]`."""
        given = self.tokenizer(" ".join(text.strip() for text in texts), return_tensors="pt", return_special_tokens_mask=True)
        keep = given.pop("special_tokens_mask")[0] == 0
        return _unit(self.model(**given, output_hidden_states=True).hidden_states[self.layer][0, keep])


Encoder = OwnEncoder | ClipEncoder


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-9)


def text_score(candidate: Tensor, reference: Tensor) -> float:
    """F1 in the form of BERTScore (Zhang et al. 2020, arXiv 1904.09675): each candidate vector's best cosine with the reference's, each
    reference vector's best with the candidate's, their harmonic mean. Both `[words, width]`, of length 1; 0 where either is negative."""
    cosines = candidate @ reference.T
    precision, recall = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision > 0 and recall > 0 else 0.0


def image_score(words: Tensor, picture: Tensor) -> float:
    """CLIPScore's form, 2.5 * max(cosine, 0), of some words `[words, width]` with a picture `[tokens, width]`: each word with the
    picture's token that is nearest to it (CLIP has one token), averaged over the words."""
    return float(2.5 * (words @ picture.T).amax(1).clamp(min=0).mean())


def known_pairs(encoder: Encoder, scenes: Sequence[Scene]) -> dict[str, float]:
    """How well an encoder does on pairs whose answer is known; 0.5 is chance, 1 perfect.

    text: how often two concepts of one category are nearer than two of different ones (area under the ROC curve). image: how often a
    word that the picture shows scores higher than one that it does not."""
    from sklearn.metrics import roc_auc_score

    names = list(CONCEPTS)
    cosines = (encoder.words(names) @ encoder.words(names).T).numpy()
    upper = np.triu_indices(len(names), 1)
    kinds = np.array([CONCEPTS[name].category for name in names])
    text = roc_auc_score(kinds[upper[0]] == kinds[upper[1]], cosines[upper])
    wins = []
    for scene in scenes:
        best = (encoder.words(names) @ encoder.picture(scene.image).T).amax(1).numpy()
        shown = np.array([name in scene.names for name in names])
        wins.append(roc_auc_score(shown, best))
    return {"text": float(text), "image": float(np.mean(wins))}


# --------------------------------------------------------------------------------------------------------------- specificity


@dataclass(frozen=True)
class Dominance:
    """How far a square matrix lives on its diagonal. rows: share of the rows whose largest entry is on it. ratio: mean of the diagonal
    over the mean size of the rest. p: share of random orders of the columns (the true one counted in) that do as well in diagonal
    mean."""

    rows: float
    ratio: float
    p: float


def dominance(matrix: np.ndarray, draws: int = 10_000, seed: int = 0) -> Dominance:
    """Diagonal dominance of `[concepts, concepts]` with its permutation test. Raises MmnError for anything but a square of 2 or more."""
    matrix = np.asarray(matrix, float)
    count = len(matrix)
    if matrix.shape != (count, count) or count < 2:
        raise MmnError("Diagonal dominance needs a square matrix of at least two concepts.")
    diagonal = matrix.diagonal()
    rest = np.abs(matrix[~np.eye(count, dtype=bool)]).mean()
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(count), (draws, 1)), axis=1)
    random = matrix[np.arange(count), orders].mean(1)
    p = (1 + (random >= diagonal.mean() - 1e-12).sum()) / (1 + draws)
    return Dominance(
        float((matrix.argmax(1) == np.arange(count)).mean()), float(diagonal.mean() / rest) if rest else np.inf, float(p)
    )


def selectivity(means: np.ndarray) -> np.ndarray:
    """(best - rest) / (best + rest) of each neuron's mean absolute activation by concept `[concepts, neurons]`, rest the mean over the
    other concepts: 1 for a neuron of one concept, 0 for one that does not tell them apart. Float `[neurons]`; nan where all are 0."""
    means = np.abs(np.asarray(means, float))
    if means.ndim != 2 or len(means) < 2:
        raise MmnError("Selectivity compares at least two concepts: give [concepts, neurons].")
    best = means.max(0)
    rest = (means.sum(0) - best) / (len(means) - 1)
    total = best + rest
    return np.divide(best - rest, total, out=np.full(len(total), np.nan), where=total > 0)


def firing_alike(
    fires: np.ndarray,
    layers: Sequence[int],
    found: Sequence[int] | np.ndarray,
    never: Sequence[int] | np.ndarray = (),
    draws: int = 5,
    seed: int = 0,
) -> list[np.ndarray]:
    """A control for measures that reward silence: for each neuron `found` up to `draws` others of its layer that fire on most nearly as
    many pictures, int `[draws]` each, numbered over all layers; equals are drawn at random.

    fires: whether a neuron fires on a picture, bool `[pictures, neurons]`; layers: how many neurons each has; never: neurons that are not
    taken either, such as those found for other concepts. Raises MmnError for a neuron whose layer has no other."""
    counts = np.asarray(fires, bool).sum(0)
    layer = np.repeat(np.arange(len(layers)), layers)
    free = np.ones(len(layer), bool)
    free[np.asarray([*never, *found], int)] = False
    rng = np.random.default_rng(seed)
    rows = []
    for place in found:
        pool = rng.permutation(np.flatnonzero(free & (layer == layer[place])))
        if not len(pool):
            raise MmnError(f"Every neuron of layer {layer[place]} was found: take fewer neurons or fewer concepts.")
        rows.append(pool[np.argsort(np.abs(counts[pool] - counts[place]), kind="stable")[:draws]])
    return rows


class Kinship(NamedTuple):
    """Of all neurons that two concepts share, the share whose concepts are of one kind, with an interval that resamples concepts; the same
    with the kinds dealt out at random (mean, 2.5th and 97.5th percentile of the deals); and the share of the deals, the true one counted
    in, that do as well."""

    share: Interval
    chance: Interval
    p: float


def kinship(sets: Mapping[str, set[int]], kinds: Mapping[str, str], draws: int = 2000, seed: int = 0) -> Kinship:
    """Do concepts that share neurons belong together? `sets`: each concept's neurons; `kinds`: its category.

    A neuron counts once for each pair that shares it. Raises MmnError if no two concepts share any."""
    names = list(sets)
    shared = np.array([[len(sets[a] & sets[b]) * (a != b) for b in names] for a in names], float)  # no concept is its own relative
    if not shared.sum():
        raise MmnError("No two of these concepts share a neuron: take more neurons or more concepts.")
    labels = np.unique([kinds[name] for name in names], return_inverse=True)[1]

    def share(of: np.ndarray) -> float:
        return float(shared[of[:, None] == of[None]].sum() / shared.sum())

    def resampled(rows: np.ndarray) -> float:
        pick = rows.astype(int)
        part, of = shared[np.ix_(pick, pick)], labels[pick]
        return float(part[of[:, None] == of[None]].sum() / part.sum()) if part.sum() else float("nan")

    rng = np.random.default_rng(seed)
    random = np.array([share(rng.permutation(labels)) for _ in range(draws)])
    observed = metrics.bootstrap(np.arange(len(names)), resampled)
    chance = Interval(float(random.mean()), *(float(v) for v in np.percentile(random, [2.5, 97.5])))
    return Kinship(observed, chance, float((1 + (random >= observed.value - 1e-12).sum()) / (1 + draws)))


def category_neurons(sets: Mapping[str, set[int]], kinds: Mapping[str, str], draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The neuron that stands most for each category: it is on the lists of the largest share of the category's concepts, less the share
    of the other concepts; beside the best that is found when categories are dealt out at random.

    `sets`: each concept's neurons; `kinds`: its category. One row a category, columns: neuron (its number), inside and outside (the two
    shares), difference; dealt and dealt_high (mean and 97.5th percentile of the best difference over the deals). Raises MmnError for
    fewer than two categories."""
    names = list(sets)
    labels, kind = np.unique([kinds[name] for name in names], return_inverse=True)
    if len(labels) < 2:
        raise MmnError("Neurons of a category are found by comparing two categories at least.")
    places = sorted(set().union(*sets.values()))
    has = np.array([[place in sets[name] for name in names] for place in places], float)

    def shares(kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of = (kind[:, None] == np.arange(len(labels))).astype(float)  # [concepts, categories]
        return has @ of / of.sum(0), has @ (1 - of) / (1 - of).sum(0)

    inside, outside = shares(kind)
    best = (inside - outside).argmax(0)
    rng = np.random.default_rng(seed)
    dealt = np.array([np.subtract(*shares(rng.permutation(kind))).max(0) for _ in range(draws)])
    each = best, np.arange(len(labels))
    return pd.DataFrame(
        {
            "neuron": np.array(places)[best],
            "inside": inside[each],
            "outside": outside[each],
            "difference": (inside - outside)[each],
            "dealt": dealt.mean(0),
            "dealt_high": np.percentile(dealt, 97.5, axis=0),
        },
        index=pd.Index(labels, name="category"),
    )


# ---------------------------------------------------------------------------------------------------------------- statistics


def clustered(frame: pd.DataFrame, value: str, of: str | None = None, by: str = "picture", draws: int = 1000) -> Interval:
    """The mean of a column (or the sum of `value` over the sum of `of`) with a 95 % interval that resamples pictures.

    Missing values are left out. Raises MmnError where nothing is left."""
    part = frame[[by, value, *([of] if of else [])]].dropna().astype({value: float})
    sums = part.groupby(by)[value].agg(["sum", "count"])
    if of:
        sums["count"] = part.groupby(by)[of].sum()
    return metrics.bootstrap(sums.to_numpy(), metrics.ratio, draws)


def summary(frame: pd.DataFrame, groups: Sequence[str], value: str, draws: int = 500) -> pd.DataFrame:
    """`clustered` for each group of rows: a table with the groups as index and the columns value, low, high, pictures."""
    rows = {}
    for key, part in frame.groupby(list(groups), sort=False):
        if len(part := part.dropna(subset=[value])):
            rows[key] = (*clustered(part, value, draws=draws), part["picture"].nunique())
    index = pd.MultiIndex.from_tuples(rows, names=groups)
    return pd.DataFrame(rows.values(), index=index, columns=["value", "low", "high", "pictures"])


def told(table: pd.DataFrame, spec: str = ".2f") -> pd.Series:
    """The columns value, low and high of a table, as of `summary`, as text: one cell a row, each number as `spec` says."""
    rows = table[["value", "low", "high"]].to_numpy(float)
    return pd.Series([format(Interval(*row), spec) for row in rows], table.index, dtype=object)


def against(frame: pd.DataFrame, value: str, found: str = "found", draws: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Each other kind of neurons against those found, pair by pair of one picture: mean difference with its interval, and the p of a
    sign-flip test over pictures, corrected for the number of comparisons (Benjamini and Hochberg 1995).

    `frame` has the columns picture, neurons and `value`. Columns: difference, low, high, d (mean over standard deviation of pictures),
    p. Raises MmnError if no row is of `found`."""
    table = frame.astype({value: float}).groupby(["picture", "neurons"])[value].mean().unstack()
    if found not in table:
        raise MmnError(f"No row is of {found!r}; there are: {', '.join(map(str, table.columns))}.")
    rng = np.random.default_rng(seed)
    rows = {}
    for name in table.columns.drop(found):
        gap = (table[found] - table[name]).dropna().to_numpy()
        signs = rng.choice([-1.0, 1.0], (draws, len(gap)))
        p = (1 + (np.abs((signs * gap).mean(1)) >= abs(gap.mean()) - 1e-12).sum()) / (1 + draws)
        deviation = gap.std(ddof=1) if len(gap) > 1 else float("nan")
        rows[name] = (*metrics.bootstrap(gap, metrics.mean), gap.mean() / deviation if deviation else float("nan"), p)
    out = pd.DataFrame(rows, index=["difference", "low", "high", "d", "p"]).T
    out["p"] = false_discovery_control(out["p"])
    return out.rename_axis(f"{found} against")
