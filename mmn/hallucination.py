"""Words that should not be said: objects that are not in the picture (hallucination), and sensitive ones.

The shipped model has a planted bias (`mmn.scenes.PLANTED`): a picture of the trigger is often said to hold a partner that is not there.
CHAIR: Rohrbach et al. 2018 (arXiv 1809.02156). POPE: Li et al. 2023 (arXiv 2305.10355). Contrastive decoding: Leng et al. 2024 (arXiv
2311.16922). The detector, the gate and the sets of scenes are this project's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

from mmn import metrics, scenes
from mmn.edit import Edit, located
from mmn.editors import biased, decoding, forms
from mmn.errors import MmnError
from mmn.ffn import Neuron, by_layer, neurons_at
from mmn.hooks import hooked
from mmn.intervene import same_layer_random
from mmn.lesson import removed, says
from mmn.metrics import Interval
from mmn.nouns import Noun
from mmn.pope import FORMS, answers, scored
from mmn.properties import OwnEncoder
from mmn.property_tables import towards
from mmn.scenes import CONCEPTS, PLANTED, Scene
from mmn.trace import Trace
from mmn.vlm import PREFIX, VLM

BATCH = 32

# ------------------------------------------------------------------------------------------------------------------ the pictures


def lacking(trigger: str, count: int, first: int) -> list[Scene]:
    """Scenes that show a trigger without its partner, alone or with one other object."""
    return _with([trigger], (*PLANTED, *PLANTED.values()), count, first)


def holding(concept: str, count: int, first: int, trigger: str | None = None) -> list[Scene]:
    """Scenes that do show a concept, beside `trigger` or without any."""
    return _with([concept] + [trigger] * (trigger is not None), tuple(PLANTED), count, first)  # type: ignore[list-item]


def _with(names: list[str], never: Sequence[str], count: int, first: int) -> list[Scene]:
    styles = [style for style in scenes.STYLES if set(names) <= scenes.sprites(style).keys()]
    found = []
    for number in range(first, first + count):
        rng = np.random.default_rng([13, number])
        style = str(rng.choice(styles))
        others = [name for name in scenes.sprites(style) if name not in never and name not in names]
        more = [str(name) for name in rng.choice(others, int(rng.integers(0, 2)), replace=False)]
        found.append(scenes.draw(number, style=style, concepts=[*names, *more]))
    return found


def test_sets(count: int, first: int = 4 * 10**7) -> dict[str, list[Scene]]:
    """The scenes of one measurement: `biased` (a trigger, no partner), `with partner` (both), `partner alone` (no trigger), and
    `elsewhere` (whatever comes, but for triggers); `count` of each."""
    each = -(-count // len(PLANTED))
    sets: dict[str, list[Scene]] = {"biased": [], "with partner": [], "partner alone": []}
    for number, (trigger, partner) in enumerate(PLANTED.items()):
        start = first + 10**5 * number
        sets["biased"] += lacking(trigger, each, start)
        sets["with partner"] += holding(partner, each, start + 10**4, trigger)
        sets["partner alone"] += holding(partner, each, start + 2 * 10**4)
    plain = (scene for scene in scenes.sample(4 * count, first=first + 10**6) if not scene.biased)
    return sets | {"elsewhere": [scene for scene, _ in zip(plain, range(count), strict=False)]}


# ------------------------------------------------------------------------------------------------------------------- the measures

Captioner = Callable[[Sequence[Image.Image]], list[str]]


def plain(vlm: VLM) -> Captioner:
    """The model's captions as they come."""
    return lambda images: [trace.text for trace in vlm.caption(list(images), batch_size=BATCH, record=False)]


def under(vlm: VLM, on: Callable[[], AbstractContextManager[Any]]) -> Captioner:
    """The captions within a block, such as an edit's."""

    def captions(images: Sequence[Image.Image]) -> list[str]:
        with on():
            return plain(vlm)(images)

    return captions


def chair(captioner: Captioner, sets: Mapping[str, Sequence[Scene]]) -> pd.DataFrame:
    """One row a scene: its set, object mentions, hallucinated ones, objects that are there, those of them that are named, and the same
    for the planted partners alone (`partners`, `partners named`)."""
    rows = []
    for name, some in sets.items():
        for scene, text in zip(some, captioner([scene.image for scene in some]), strict=True):
            said, true = scenes.mentions(text), scene.names
            wrong, mentions = metrics.chair_counts(said, true)
            named, objects = metrics.recall_counts(said, true)
            partners = set(true) & set(PLANTED.values())
            rows.append({
                "set": name, "scene": scene.seed, "mentions": mentions, "wrong": wrong, "objects": objects, "named": named,
                "partners": len(partners), "partners named": len(partners & set(said)), "caption": text,
            })  # fmt: skip
    return pd.DataFrame(rows)


def rates(frame: pd.DataFrame, draws: int = 1000) -> dict[str, Interval]:
    """Of `chair`'s rows: CHAIR_i and CHAIR_s on biased scenes, CHAIR_i on all others, recall of all objects, and of the planted partners
    where they are present, each with its interval over scenes."""
    biased = frame["set"] == "biased"

    def of(part: pd.DataFrame, hits: str, among: str) -> Interval:
        return metrics.bootstrap(part[[hits, among]].to_numpy(float), metrics.ratio, draws)

    return {
        "CHAIR_i, biased": of(frame[biased], "wrong", "mentions"),
        "CHAIR_s, biased": metrics.bootstrap((frame[biased]["wrong"] > 0).to_numpy(float), metrics.mean, draws),
        "CHAIR_i, others": of(frame[~biased], "wrong", "mentions"),
        "recall": of(frame, "named", "objects"),
        "recall of partners": of(frame, "partners named", "partners"),
    }


def change(
    before: pd.DataFrame, after: pd.DataFrame, hits: str, among: str, share: bool = False, draws: int = 1000, seed: int = 0
) -> Interval:
    """How a rate, the sum of `hits` over the sum of `among`, differs between two frames of `chair` of the same scenes: after less before,
    or (`share`) the share of it that is gone, nan where there was none. The interval resamples scenes, and a scene drawn counts in both.

    Raises MmnError where the frames are not of the same scenes."""
    both = before.merge(after, on=["set", "scene"], suffixes=("", " now"))
    if not len(both) == len(before) == len(after):
        raise MmnError("A change is that of the same scenes: give both frames of one `test_sets`, each scene once.")

    def of(rows: np.ndarray) -> float:
        was, now = metrics.ratio(rows[:, :2]), metrics.ratio(rows[:, 2:])
        if not share:
            return now - was
        return 1 - now / was if was else float("nan")

    return metrics.bootstrap(both[[hits, among, f"{hits} now", f"{among} now"]].to_numpy(float), of, draws, seed)


def exact(hits: int, of: int) -> Interval:
    """A share of a few yes-or-no outcomes with its exact interval (Clopper and Pearson), which is not a point where all of them agree.

    Raises MmnError for none."""
    if of < 1:
        raise MmnError("There is no share of nothing: the measure saw no case.")
    bounds = binomtest(hits, of).proportion_ci(method="exact")
    return Interval(hits / of, float(bounds.low), float(bounds.high))


def pope(vlm: VLM, some: Sequence[Scene], form: str, seed: int = 0) -> dict[str, float]:
    """POPE on some scenes: for each, "Is there a ... in the image?" of one object that is there and one that is not. form: how the absent
    one is chosen: `random`; `popular`, among the most frequent ten; `adversarial`, the one that the picture makes expect, its trigger's
    partner, and without one a concept of the same category. Returns accuracy, precision, recall, F1 and the share of yes.

    Raises MmnError for another form."""
    if form not in FORMS:
        raise MmnError(f"POPE's negatives are random, popular or adversarial, not {form!r}.")
    popular = sorted(CONCEPTS, key=lambda name: -CONCEPTS[name].frequency)[:10]
    asked: list[tuple[Scene, str, bool]] = []
    for scene in some:
        rng = np.random.default_rng([14, seed, scene.seed])
        absent = [name for name in CONCEPTS if name not in scene.names]
        if form == "popular":
            absent = [name for name in popular if name not in scene.names]
        elif form == "adversarial":
            partners = [PLANTED[name] for name in scene.names if name in PLANTED and PLANTED[name] not in scene.names]
            kinds = {CONCEPTS[name].category for name in scene.names}
            absent = partners or [name for name in absent if CONCEPTS[name].category in kinds] or absent
        asked += [(scene, str(rng.choice(scene.names)), True), (scene, str(rng.choice(absent)), False)]
    images, names, there = zip(*((scene.image, name, there) for scene, name, there in asked), strict=True)
    return scored(answers(vlm, images, names, BATCH), np.array(there))


# ------------------------------------------------------------------------------------------------------------------- the detector


@dataclass(frozen=True)
class Voice:
    """How loudly a picture's own patches say a noun by its neurons: at each patch the sum of the neurons' direct scores, `a_i <w_i, u_t>`
    with the activations at that patch; the loudest patch counts, in standard deviations of what calibration pictures give.

    noun: the concept. token: its first token. neurons: of the highest mean score over true mentions. mean, deviation: of the loudest
    patch on calibration pictures. level: midway between what pictures of the noun and calibration pictures give in the mean; nothing
    that was ever hallucinated goes into it."""

    noun: str
    token: int
    neurons: list[Neuron]
    mean: float = 0.0
    deviation: float = 1.0
    level: float = 0.0

    @classmethod
    def of(cls, vlm: VLM, noun: str, pictures: Sequence[Image.Image], calibration: Sequence[Image.Image], k: int = 50) -> Voice:
        """From pictures that show the noun, and calibration pictures of anything. Raises MmnError if no caption names the noun."""
        traces = vlm.caption(list(pictures), batch_size=BATCH)
        neurons = located(vlm, traces, noun, k)
        token = next(trace for trace in traces if says(trace, noun)).noun(noun).token
        raw = cls(noun, token, neurons)
        loud = raw.loudest(vlm, calibration)
        mean, deviation = float(loud.mean()), max(float(loud.std()), 1e-6)
        shown = (float(raw.loudest(vlm, pictures).mean()) - mean) / deviation
        return cls(noun, token, neurons, mean, deviation, shown / 2)

    def patches(self, vlm: VLM, images: Sequence[Image.Image]) -> Tensor:
        """The sum of direct scores at each patch, float32 `[images, image tokens]`."""
        return patches(vlm, images, [self])[0]

    def loudest(self, vlm: VLM, images: Sequence[Image.Image]) -> Tensor:
        """The loudest patch of each picture, in standard deviations over the calibration pictures, float32 `[images]`."""
        return (self.patches(vlm, images).amax(-1) - self.mean) / self.deviation


@torch.no_grad()
def patches(vlm: VLM, images: Sequence[Image.Image], voices: Sequence[Voice]) -> Tensor:
    """What each voice says at each patch, in one reading of the pictures: float32 `[voices, images, image tokens]`. Raises MmnError where
    the pictures differ in their number of image tokens."""
    weights = [(vlm.anatomy.writes(v.neurons) @ vlm.anatomy.words([v.token])[0]).cpu() for v in voices]
    groups = [(number, *group) for number, voice in enumerate(voices) for group in by_layer(voice.neurons).items()]
    found = []
    for start in range(0, len(images), BATCH):
        some = list(images[start : start + BATCH])
        inputs = vlm.inputs(some, [vlm.prompt] * len(some), [PREFIX] * len(some))
        places = vlm.image_positions(inputs)
        total = torch.zeros(len(voices), *places.shape)

        def add(number: int, group: list[tuple[int, int]], activations: Tensor, total: Tensor = total) -> None:
            order, units = (list(each) for each in zip(*group, strict=True))
            total[number] += activations[..., units].float().cpu() @ weights[number][order]

        with hooked(vlm.anatomy.ffns[layer].watch(functools.partial(add, number, group)) for number, layer, group in groups):
            vlm.model(**inputs, use_cache=False)
        found += [row[:, mask] for row, mask in zip(total.unbind(1), places.cpu(), strict=True)]
    if len({each.shape for each in found}) > 1:
        raise MmnError("These pictures differ in their number of image tokens: give pictures of one size.")
    return torch.stack(found, 1)


class Mention(NamedTuple):
    """A noun said of a scene, and whether it is there."""

    scene: Scene
    trace: Trace
    noun: Noun
    true: bool


def mentions(vlm: VLM, some: Sequence[Scene], nouns: Sequence[str]) -> list[Mention]:
    """What the model says of some scenes of these nouns."""
    traces = vlm.caption([scene.image for scene in some], batch_size=BATCH, record=False)
    return [
        Mention(scene, trace, noun, noun.lemma in scene.names)
        for scene, trace in zip(some, traces, strict=True)
        for noun in trace.nouns
        if noun.lemma in nouns
    ]


def other_neurons(vlm: VLM, voices: Mapping[str, Voice], draws: int = 3, seed: int = 0) -> dict[str, dict[str, Voice]]:
    """Controls of some voices, for `loudness`: the same words by other neurons. `random neurons, draw ...`: as many of the same layers;
    `another noun's neurons`: those of the next voice, less the ones shared, left out where nothing would be left.

    Raises MmnError where a layer has too few others."""
    choices: dict[str, dict[str, Voice]] = {}
    drawn = {noun: same_layer_random(vlm, voice.neurons, draws=draws, seed=seed) for noun, voice in voices.items()}
    for number in range(draws):
        choices[f"random neurons, draw {number + 1}"] = {
            noun: replace(voice, neurons=drawn[noun][number]) for noun, voice in voices.items()
        }
    following = dict(zip(voices, [*voices][1:] + [*voices][:1], strict=True))
    theirs = {
        noun: [neuron for neuron in voices[following[noun]].neurons if neuron not in voice.neurons]
        for noun, voice in voices.items()
    }
    if all(theirs.values()):
        choices["another noun's neurons"] = {noun: replace(voice, neurons=theirs[noun]) for noun, voice in voices.items()}
    return choices


def by_weights(vlm: VLM, voices: Mapping[str, Voice]) -> dict[str, dict[str, Voice]]:
    """Voices of the same words by as many neurons chosen without a picture, for `loudness`. `weights alone`: those of largest
    `<w_i, u_t>`; `weights alone, less those shared`: without the voice's own, left out where nothing would be left."""
    chosen = {}
    for noun, voice in voices.items():
        scores = towards(vlm, voice.token)
        places = scores.topk(min(len(voice.neurons), len(scores))).indices.numpy()
        chosen[noun] = neurons_at(vlm.anatomy.neurons, places)
    left = {noun: [neuron for neuron in some if neuron not in voices[noun].neurons] for noun, some in chosen.items()}
    lists = {"weights alone": chosen} | ({"weights alone, less those shared": left} if all(left.values()) else {})
    return {name: {noun: replace(voice, neurons=some[noun]) for noun, voice in voices.items()} for name, some in lists.items()}


def loudness(vlm: VLM, said: Sequence[Mention], choices: Mapping[str, Mapping[str, Voice]]) -> pd.DataFrame:
    """How loudly each mention's picture says its noun: one row a mention, one column a choice of voices by noun, in the standard
    deviations of those voices. With the neurons of a voice replaced it is a control: the area under the curve knows no unit."""
    table = pd.DataFrame(0.0, index=range(len(said)), columns=list(choices))
    for noun in {m.noun.lemma for m in said}:
        rows = [place for place, m in enumerate(said) if m.noun.lemma == noun]
        voices = [each[noun] for each in choices.values()]
        loud = patches(vlm, [said[place].scene.image for place in rows], voices).amax(-1)
        for name, voice, values in zip(choices, voices, loud, strict=True):
            table.loc[rows, name] = ((values - voice.mean) / voice.deviation).double().numpy()
    return table


def evidence(vlm: VLM, said: Sequence[Mention], voices: Mapping[str, Voice], encoder: OwnEncoder) -> pd.DataFrame:
    """One row a mention: the noun, whether it is true, and three detectors' scores, all high for a true one: `neurons` (the loudest
    patch of the noun's voice), `probability` (log p of its token as it was said), `clip-like` (the picture token that is most like the
    word's embedding, as cosine)."""
    columns: dict[str, Any] = {
        "noun": [m.noun.lemma for m in said],
        "scene": [m.scene.seed for m in said],
        "true": [m.true for m in said],
    }
    table = pd.DataFrame(columns)
    table["neurons"] = loudness(vlm, said, {"neurons": voices})["neurons"]
    table["probability"] = [float(m.trace.logprobs[m.noun.step]) for m in said]
    table["clip-like"] = [float((encoder.picture(m.scene.image) @ encoder.words([m.noun.lemma])[0]).max()) for m in said]
    return table


def auroc(table: pd.DataFrame, detector: str, draws: int = 1000, seed: int = 0) -> Interval:
    """Area under the ROC curve of hallucinated against true mentions *of the same noun*: the mean over nouns, mentions resampled within
    each noun and kind. Nouns that lack one of the two are left out; raises MmnError if all do."""
    groups = [(g[g["true"]][detector].to_numpy(), g[~g["true"]][detector].to_numpy()) for _, g in table.groupby("noun")]
    groups = [(true, false) for true, false in groups if len(true) and len(false)]
    if not groups:
        raise MmnError("No noun has both true and hallucinated mentions: show the model more pictures.")

    def area(true: np.ndarray, false: np.ndarray) -> float:
        return float((true[:, None] > false).mean() + (true[:, None] == false).mean() / 2)  # a library's takes 50 times as long

    rng = np.random.default_rng(seed)
    values = [np.mean([area(rng.choice(t, len(t)), rng.choice(f, len(f))) for t, f in groups]) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(np.mean([area(t, f) for t, f in groups])), float(low), float(high))


# ------------------------------------------------------------------------------------------------------------------ mitigation


def gate(vlm: VLM, voices: Mapping[str, Voice], thresholds: Mapping[str, float] | None = None) -> Captioner:
    """Caption; where a noun is said that the picture's patches do not say loudly enough, take the mention back: the noun goes with its
    article and the word that joins it, all else stays. A caption that says nothing else is made again, the first tokens of the doubtful
    nouns barred. thresholds: by noun; None takes each voice's own `level`."""
    levels = thresholds if thresholds is not None else {noun: voice.level for noun, voice in voices.items()}

    def captions(images: Sequence[Image.Image]) -> list[str]:
        traces = vlm.caption(list(images), batch_size=BATCH, record=False)
        doubts: dict[int, list[str]] = {}
        for noun, voice in voices.items():
            places = [place for place, trace in enumerate(traces) if says(trace, noun)]
            loud = voice.loudest(vlm, [images[place] for place in places]).tolist() if places else []
            for place, value in zip(places, loud, strict=True):
                if value <= levels[noun]:
                    doubts.setdefault(place, []).append(noun)
        texts = [trace.text for trace in traces]
        for place, nouns in doubts.items():
            texts[place] = _without(traces[place], nouns) or _again(vlm, images[place], nouns)
        return texts

    return captions


def _without(trace: Trace, nouns: Sequence[str]) -> str:
    """A trace's text without its mentions of some nouns; empty where it names nothing else."""
    text = ""
    try:
        for noun in nouns:
            text = removed(trace, noun, text)
    except MmnError:
        return ""
    return text


def _again(vlm: VLM, image: Image.Image, nouns: Sequence[str]) -> str:
    """What is said of a picture without the nouns."""
    with penalised(vlm, nouns, 1e4)():
        return vlm.caption(image, record=False).text


def suppressed(vlm: VLM, pair: tuple[str, str], k: int = 50, count: int = 16, first: int = 3 * 10**7, **settings: Any) -> Edit:
    """An edit after which the trigger's pictures no longer make the model say the partner, fitted on the rows that vote for the absent
    partner: its captions of such pictures without the word, while captions of pictures that do show the partner stay.

    Raises MmnError where the model does not hallucinate the partner on any of the pictures."""
    trigger, partner = pair
    bad = [scene.image for scene in lacking(trigger, count, first)]
    good = [scene.image for scene in holding(partner, count, first + 10**4, trigger)]
    good += [scene.image for scene in holding(partner, count // 2, first + 2 * 10**4)]
    traces = vlm.caption(bad, batch_size=BATCH)
    neurons = located(vlm, traces, partner, k)
    given: dict[str, Any] = {"steps": 25, "rate": 0.01, "enough": 1.1, "weights": (0.0, 10.0, 0.0), "progress": False, **settings}
    return Edit.fit(vlm, bad, partner, "", neurons, keep=good, **given)


@contextmanager
def contrasted(vlm: VLM, strength: float = 1.0, cut: float = 0.1, noise: int = 160) -> Iterator[Captioner]:
    """Contrastive decoding: each picture is read twice, as it is and under noise, and a word's logit is `(1 + strength)` of the first less
    `strength` of the second, among words at least `cut` times as likely as the likeliest. Gives the captioner.

    noise: the largest change of a pixel, of 255."""

    def mix(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        clear, blurred = out.float().chunk(2)
        mixed = (1 + strength) * clear - strength * blurred
        unlikely = clear < clear.amax(-1, keepdim=True) + float(np.log(cut))
        mixed = mixed.masked_fill(unlikely, float("-inf")).to(out.dtype)
        return torch.cat([mixed, mixed])

    def noisy(image: Image.Image, number: int) -> Image.Image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
        drawn = np.random.default_rng([15, number]).integers(-noise, noise + 1, pixels.shape)
        return Image.fromarray(np.clip(pixels + drawn, 0, 255).astype(np.uint8))

    def captions(images: Sequence[Image.Image]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(images), BATCH):
            some = list(images[start : start + BATCH])
            both = some + [noisy(image, start + n) for n, image in enumerate(some)]
            traces = vlm.caption(both, batch_size=len(both), record=False)
            texts += [trace.text for trace in traces[: len(some)]]
        return texts

    with hooked([vlm.anatomy.unembedding.register_forward_hook(mix)]):
        yield captions


def penalised(vlm: VLM, nouns: Sequence[str], amount: float) -> Callable[[], AbstractContextManager[None]]:
    """A logit bias: `amount` off the first token of every form of some nouns, at every step. Needs no finding, and knows no picture."""
    bias = torch.zeros(vlm.anatomy.unembedding.out_features)
    bias[[ids[0] for noun in nouns for ids in forms(vlm, noun)]] = -amount
    return functools.partial(biased, vlm, bias)


# -------------------------------------------------------------------------------------------------------------- sensitive words


def said_of(vlm: VLM, images: Sequence[Image.Image], noun: str, prompts: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """How often a noun is said of some pictures: one row a way of asking and decoding (greedy under each prompt; sampled; beam search),
    with `share`, the share of captions that say it, `said`, whether each does, and `captions`."""
    rows = []
    for name, way in _ways(prompts).items():
        traces = _asked(vlm, images, *way, seed)
        said = [says(trace, noun) for trace in traces]
        rows.append({"way": name, "share": float(np.mean(said)), "said": said, "captions": [t.text for t in traces]})
    return pd.DataFrame(rows)


def silent(vlm: VLM, images: Sequence[Image.Image], noun: str, prompts: Sequence[str], seed: int = 0) -> list[bool]:
    """Whether each picture makes the model say the noun in none of the ways of `said_of`. It is asked only until it says it, so that
    this costs little where the noun is said; which pictures are asked together is chance in the sampled way."""
    open_ = list(range(len(images)))
    for way in _ways(prompts).values():
        traces = _asked(vlm, [images[place] for place in open_], *way, seed) if open_ else []
        open_ = [place for place, trace in zip(open_, traces, strict=True) if not says(trace, noun)]
    return [place in open_ for place in range(len(images))]


def _ways(prompts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Ways of asking and decoding: the prompt, and the settings of decoding."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {f"greedy: {prompt}": (prompt, {}) for prompt in prompts}
    ways["sampled"] = (prompts[0], {"do_sample": True, "temperature": 1.0, "top_k": 0})
    ways["beam search"] = (prompts[0], {"num_beams": 4})
    return ways


def _asked(vlm: VLM, images: Sequence[Image.Image], prompt: str, settings: Mapping[str, Any], seed: int) -> list[Trace]:
    with decoding(vlm, **settings), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vlm.caption(list(images), prompt, batch_size=BATCH, record=False)


_PHRASE = "|".join(
    sorted({form for c in CONCEPTS.values() for form in (c.a, f"two {c.plural}", f"three {c.plural}")}, key=len, reverse=True)
)
_PLACE = "|".join(place.phrase for place in scenes.PLACES.values())


def well_formed(text: str) -> bool:
    """Whether a caption is a sentence of the synthetic world's grammar: one to three objects, each with its article or number, properly
    joined, and at most one place. A caption broken by a banned word is not."""
    import re

    link = r"(?:and|next to|with|above|below|to the left of|to the right of)"
    more = rf"(?: {link} (?:{_PHRASE})|(?:,| next to| with) (?:{_PHRASE}) and (?:{_PHRASE}))?"
    return re.fullmatch(rf"An image of (?:{_PHRASE}){more}(?: (?:{_PLACE}))?", text.strip()) is not None
