"""One neuron over many pictures and texts: how much each excites it, and what tells those that show a concept from those that do not.

Every measure here is this project's own [ours]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from mmn import metrics, plots, properties, property_tables, scenes
from mmn.bars import tqdm
from mmn.errors import MmnError
from mmn.ffn import Neuron, by_layer
from mmn.heatmap import Heatmap, heatmap
from mmn.hooks import hooked
from mmn.intervene import same_layer_random
from mmn.properties import Case
from mmn.scenes import Scene
from mmn.semantics import token_text, top_token_ids
from mmn.vlm import PREFIX, VLM

PORTRAITS = 9 * 10**7  # the number of the first picture on which a concept's neurons are found
FIRST = 9 * 10**6  # of the first scene on which they are tested: no other measure uses these
Sets = dict[str, dict[str, list[Neuron]]]  # how they were chosen -> concept -> its neurons
TEXTS = ("What is {a}?", "Tell me about {a}.", "Is {a} in the image?", "I have seen {a}.")  # of words in no picture

Reader = Callable[[int, int, Tensor], None]


@torch.no_grad()
def read_pictures(vlm: VLM, images: Sequence[Image.Image], reader: Reader, batch_size: int = 16) -> None:
    """Show pictures to the model, without an answer, and call `reader(picture, layer, activations [image positions, neurons])` for every
    picture and layer while the model reads them, so that nothing more than one layer of one batch is ever held.

    Raises MmnError for a model that has no image positions."""
    for start in tqdm(range(0, len(images), batch_size), desc="pictures", leave=False, delay=5):
        part = images[start : start + batch_size]
        inputs = vlm.inputs(part, [vlm.prompt] * len(part), [PREFIX] * len(part))
        here = vlm.image_positions(inputs)

        def keep(layer: int, activations: Tensor, start: int = start, here: Tensor = here) -> None:
            for row in range(len(here)):
                reader(start + row, layer, activations[row, here[row].to(activations.device)])

        with hooked(ffn.watch(partial(keep, layer)) for layer, ffn in enumerate(vlm.anatomy.ffns)):
            vlm.model(**inputs, use_cache=False)


def peaks(vlm: VLM, images: Sequence[Image.Image], neurons: Sequence[Neuron], batch_size: int = 16) -> Tensor:
    """How much each picture excites each neuron, its highest activation at an image position: float32 `[pictures, neurons]`.

    Raises MmnError for neurons that are not there, and as `read_pictures`."""
    vlm.anatomy.check(neurons)
    groups = by_layer(list(neurons))
    found = torch.zeros(len(images), len(neurons))

    def keep(picture: int, layer: int, activations: Tensor) -> None:
        if layer in groups:
            places, units = zip(*groups[layer], strict=True)
            found[picture, list(places)] = activations[:, list(units)].amax(0).float().cpu()

    read_pictures(vlm, images, keep, batch_size)
    return found


@torch.no_grad()
def at_word(vlm: VLM, text: str, word: str, neurons: Sequence[Neuron]) -> Tensor:
    """The highest activation of each neuron on the tokens of a word, in a prompt without a picture: float32 `[neurons]`.

    Raises MmnError where the prompt does not hold the word's tokens."""
    vlm.anatomy.check(neurons)
    groups = by_layer(list(neurons))
    inputs = vlm.inputs([None], [text], [""])
    ids = inputs["input_ids"][0].tolist()
    places = word_places(vlm, ids, word)
    found = torch.zeros(len(neurons))

    def keep(layer: int, activations: Tensor) -> None:
        rows, units = zip(*groups[layer], strict=True)
        found[list(rows)] = activations[0, places][:, list(units)].amax(0).float().cpu()

    with hooked(vlm.anatomy.ffns[layer].watch(partial(keep, layer)) for layer in groups):
        vlm.model(**inputs, use_cache=False)
    return found


def word_places(vlm: VLM, ids: Sequence[int], word: str) -> list[int]:
    """Where a word's tokens stand among `ids`, its first occurrence. Raises MmnError if it does not."""
    for form in (f" {word}", word):
        wanted = vlm.tokenizer(form, add_special_tokens=False)["input_ids"]
        for start in range(len(ids) - len(wanted) + 1):
            if list(ids[start : start + len(wanted)]) == list(wanted):
                return list(range(start, start + len(wanted)))
    raise MmnError(f"The prompt does not hold the tokens of {word!r}: choose another text.")


def texts_of(vlm: VLM, words: Sequence[tuple[str, str]], neurons: Sequence[Neuron]) -> Tensor:
    """`at_word` for every text of `TEXTS` and every word, given as (word, with its article): float32 `[words, texts, neurons]`."""
    rows = [[at_word(vlm, text.format(a=named), word, neurons) for text in TEXTS] for word, named in words]
    return torch.stack([torch.stack(row) for row in rows])


def auroc(values: Tensor, positive: Sequence[bool] | np.ndarray) -> np.ndarray:
    """For each column of `values [samples, neurons]` the chance that a positive sample has a higher value than a negative one (half for
    ties): float `[neurons]`, 0.5 for a neuron that cannot tell. Mann and Whitney's U, divided by the number of pairs.

    Raises MmnError where all samples are of one kind."""
    chosen = np.asarray(positive, bool)
    if chosen.all() or not chosen.any():
        raise MmnError("AUROC compares two kinds of samples: give some of each.")
    count = int(chosen.sum())
    wins = rankdata(values.float().numpy(), axis=0)[chosen].sum(0) - count * (count + 1) / 2
    return wins / (count * (len(chosen) - count))


# ------------------------------------------------------------------------------------------------- concepts, their neurons, their scenes


def choices(vlm: VLM, words: Sequence[str], k: int = 10, seed: int = 0) -> Sets:
    """Four choices of k neurons for each concept, from pictures that show it alone, with its name put into the model's mouth:

    found: highest mean score. by pictures: highest mean peak on the concept's pictures over that on the other concepts' ones, in units of
    the standard deviation of all; what the model says plays no part. another concept's: those found for the next concept, which fire, but
    for something else. random: same-layer random neurons. Raises MmnError for fewer than two concepts."""
    if len(words) < 2:
        raise MmnError("Concepts are told from one another: take at least two.")
    apart = {word: property_tables.portraits(vlm, word, PORTRAITS) for word in words}
    sizes = vlm.anatomy.neurons
    found = {word: properties.neurons_at(sizes, property_tables.of_concept(some, k)) for word, some in apart.items()}
    starts = np.cumsum([0, *sizes])
    images = [case.trace.image for some in apart.values() for case in some if case.trace.image is not None]
    highest = torch.zeros(len(images), int(starts[-1]))

    def keep(picture: int, layer: int, activations: Tensor) -> None:
        highest[picture, starts[layer] : starts[layer + 1]] = activations.float().amax(0).cpu()

    read_pictures(vlm, images, keep)
    labels = np.repeat(list(apart), [len(some) for some in apart.values()])
    pictured = {}
    for word in words:
        own = torch.tensor(labels == word)
        gap = (highest[own].mean(0) - highest[~own].mean(0)) / highest.std(0).clamp(min=1e-6)
        pictured[word] = properties.neurons_at(sizes, gap.topk(min(k, len(gap))).indices.numpy())
    chance = iter(same_layer_random(vlm, [neuron for some in found.values() for neuron in some], draws=1, seed=seed)[0])
    others = {word: found[words[(place + 1) % len(words)]] for place, word in enumerate(words)}
    random = {word: [next(chance) for _ in some] for word, some in found.items()}
    return {"found": found, "by pictures": pictured, "another concept's": others, "random": random}


def everyone(sets: Sets) -> list[Neuron]:
    """The neurons of all choices and concepts in order: the columns of the tables that `aurocs` takes."""
    return [neuron for some in sets.values() for mine in some.values() for neuron in mine]


def showing(words: Sequence[str], each: int = 4, seed: int = 0) -> list[tuple[str, Scene]]:
    """(concept, scene): `each` scenes of every concept in every art that has it, the held-out one included, every second with another
    object beside it, never one of `words`. Scene for scene place and layout are the same for every concept."""
    rng = np.random.default_rng([seed, 1])
    found = []
    for word in words:
        for n, style in enumerate(style for style in (*scenes.STYLES, scenes.HELD_OUT_STYLE) for _ in range(each)):
            if word not in scenes.sprites(style):
                continue
            others = [name for name in scenes.sprites(style) if name not in (*words, *scenes.PLANTED)]
            names = [word, str(rng.choice(others))] if others and n % 2 else [word]
            found.append((word, scenes.draw(FIRST + 1000 * seed + n, style=style, concepts=names)))
    return found


def aurocs(values: Tensor, asked: Sequence[str] | np.ndarray, sets: Sets) -> pd.DataFrame:
    """How well each neuron tells its concept's samples from the others': one row a neuron, with the columns neurons (how it was chosen),
    concept, auroc; nan where all samples are of one kind. `values [samples, neurons]` of `everyone(sets)`; `asked`: each sample's
    concept."""
    rows, place, names = [], 0, np.asarray(asked)
    for name, some in sets.items():
        for word, mine in some.items():
            part, own = values[:, place : place + len(mine)], names == word
            place += len(mine)
            told = auroc(part, own) if own.any() and not own.all() else np.full(len(mine), np.nan)
            rows.append(pd.DataFrame({"neurons": name, "concept": word, "auroc": told}))
    return pd.concat(rows, ignore_index=True)


def responses(values: Tensor, asked: Sequence[str] | np.ndarray, words: Sequence[str]) -> Tensor:
    """Each neuron's mean value on the samples of each concept (0 where it is negative) over its largest: float32 `[neurons, concepts]`; 0
    for a neuron that no concept excites."""
    means = torch.stack([values[torch.tensor(np.asarray(asked) == word)].mean(0) for word in words], 1).clamp(min=0)
    return means / means.amax(1, keepdim=True).clamp(min=1e-6)


def selective(answers: Tensor, sets: Sets) -> pd.DataFrame:
    """How far each neuron answers to its own concept alone: one row a neuron, in the order of `everyone(sets)`.

    `answers [neurons, concepts]`: `responses`, the concepts in the order of `sets`. Columns: neurons (how it was chosen), concept, rank
    (its place in its list, from 1), largest (1 where the own concept's cell is the largest of the row), own (that cell), others (the mean
    of the other cells); the last three nan for a neuron that no concept excites. Raises MmnError for an answer too few or too many."""
    keys = [(name, word, rank) for name, some in sets.items() for word, mine in some.items() for rank in range(1, len(mine) + 1)]
    columns = list(dict.fromkeys(word for _, word, _ in keys))
    if answers.shape != (len(keys), len(columns)):
        raise MmnError(
            f"There are {len(keys)} neurons of {len(columns)} concepts and answers {list(answers.shape)}: give one each."
        )
    own = torch.tensor([columns.index(word) for _, word, _ in keys], dtype=torch.long)[:, None]
    table = torch.where(answers.amax(1, keepdim=True) > 0, answers, torch.nan)
    cells = {
        "largest": torch.where(table[:, 0].isnan(), torch.nan, (answers.argmax(1) == own[:, 0]).float()),
        "own": table.gather(1, own)[:, 0],
        "others": table.scatter(1, own, torch.nan).nanmean(1),
    }
    return pd.DataFrame(keys, columns=["neurons", "concept", "rank"]).assign(**{name: each.numpy() for name, each in cells.items()})


# ------------------------------------------------------------------------------------------------------------ words and pictures


def first_token(vlm: VLM, word: str) -> int:
    """The token that a word begins with inside a sentence."""
    before, whole = (vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a {word}"))
    return whole[len(before)]


def written(vlm: VLM, neurons: Sequence[Neuron], names: Sequence[Sequence[str]], k: int = 10) -> np.ndarray:
    """Whether the k tokens that a neuron writes most hold the first one of any of its `names`: bool `[neurons]`."""
    ids, _ = top_token_ids(vlm, neurons, k)
    begins = {name: first_token(vlm, name) for some in names for name in some}
    rows = zip(ids.tolist(), names, strict=True)
    return np.array([any(begins[name] in row for name in some) for row, some in rows], bool)


def visible(scene: Scene) -> tuple[str, ...]:
    """What a scene shows, in words: its objects, and the two words of its place (`clouds` and `snow`)."""
    place = scenes.PLACES[scene.place]
    return (*scene.names, place.upper, place.lower)


def reads_as(vlm: VLM, neuron: Neuron, word: str, k: int = 10) -> str:
    """A few words on whether a neuron writes a word: `writes it`, `writes its first piece 'ham'`, `does not write it`."""
    token = first_token(vlm, word)
    if not written(vlm, [neuron], [[word]], k)[0]:
        return "does not write it"
    piece = token_text(vlm, token).strip()
    return "writes it" if word == piece else f"writes its first piece {piece!r}"


# ------------------------------------------------------------------------------------------------------------------- heatmaps


def ious(vlm: VLM, cases: Sequence[Case], ks: Sequence[int], most: int = 100, draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """IoU of the mean heatmap of the top k neurons with the object, as many of the hottest pixels as the object has; one row a case, a k
    and a choice of neurons. Cases without a mask are left out.

    Choices: found; random, the mean over `draws` draws of same-layer neurons, any but those k themselves, for k up to `most` as long as
    each layer has so many others. Columns: picture, noun, neurons, k, iou, and positive: how many neurons have a positive score for the
    noun."""
    rows = []
    for number, case in enumerate(cases):
        mask = case.mask
        if mask is None or not mask.any():
            continue
        order = case.top(max(ks))
        asked = [("found", k, order[:k]) for k in ks]
        for k in ks:
            enough = all(2 * len(group) <= vlm.anatomy.neurons[layer] for layer, group in by_layer(order[:k]).items())
            if k <= most and enough:
                asked += [("random", k, draw) for draw in same_layer_random(vlm, order[:k], draws, seed + number)]
        place = {neuron: row for row, neuron in enumerate(dict.fromkeys(neuron for *_, some in asked for neuron in some))}
        every = heatmap(vlm, case.trace, list(place))
        grids = torch.stack([every.grid[[place[neuron] for neuron in some]].mean(0) for *_, some in asked])
        maps = np.nan_to_num(replace(every, grid=grids).on_image(per_neuron=True), nan=-np.inf)  # what the model never saw
        found: dict[tuple[str, int], list[float]] = {}
        for (name, k, _), values in zip(asked, maps, strict=True):
            found.setdefault((name, k), []).append(metrics.iou(metrics.by_area(values, int(mask.sum())), mask))
        shared = {"picture": case.picture, "noun": case.lemma, "positive": int((case.scores > 0).sum())}
        rows += [{**shared, "neurons": name, "k": k, "iou": float(np.mean(each))} for (name, k), each in found.items()]
    return pd.DataFrame(rows, columns=["picture", "noun", "positive", "neurons", "k", "iou"])


def maps(image: Image.Image, heat: Heatmap, words: Mapping[str, Sequence[str]] | pd.Series) -> Figure:
    """At most ten neurons' heat over a picture, each on a scale of its own, which stands below it, the hottest 5 %
    outlined; under its name the first two of the words that it writes. `words`: those of each neuron by its name, in the heatmap's
    order."""
    count = min(len(heat.neurons), 10)
    fig, axes = plt.subplots(-(-count // 5), 5, figsize=(7.2, 0.2 + 2.1 * -(-count // 5)), layout="constrained", squeeze=False)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    for ax, values, (name, some) in zip(axes.flat, heat.on_image(per_neuron=True), words.items(), strict=False):
        plots.heatmap(image, values, values > np.nanpercentile(values, 95), ax)
        both = plots.label(", ".join(word.strip() for word in some[:2]))
        ax.set_title(f"{name}\n{both}", fontsize=8)
        scale(ax, values)
    return fig


def scale(ax: Axes, values: np.ndarray) -> None:
    """Write under a map which activations its colours span, from the least to the largest of `values [height, width]`, to two figures; 0
    for an end that is nearer to it than a hundredth of the span."""
    ends = np.nanmin(values), np.nanmax(values)
    low, high = (0.0 if abs(end) < 0.01 * (ends[1] - ends[0]) else end for end in ends)
    ax.set_xlabel(f"{low:.2g} to {high:.2g}", fontsize=8)


def one_map(vlm: VLM, image: Image.Image, neuron: Neuron, ax: Axes, most: float, title: str = "") -> None:
    """One neuron's heat over a picture, on a scale from 0 to `most`, so that pictures compare."""
    trace = vlm.caption(image, max_new_tokens=1)
    plots.heatmap(image, heatmap(vlm, trace, [neuron]).on_image(), None, ax, title)
    ax.images[-1].set_clim(0, max(most, 1e-6))


def faces(vlm: VLM, neurons: Sequence[Neuron], images: Sequence[Image.Image], excites: Tensor, k: int = 6) -> Figure:
    """One row a neuron: the k words that it writes most, and the four pictures that excite it most, each under its peak, with the neuron's
    heat on one scale from 0 to the row's highest. `excites [pictures, neurons]`: the peaks of these neurons on `images`."""
    fig, axes = plt.subplots(len(neurons), 5, figsize=(7.2, 0.2 + 1.65 * len(neurons)), layout="constrained", squeeze=False)
    ids, _ = top_token_ids(vlm, neurons, k)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (neuron, tokens) in enumerate(zip(neurons, ids.tolist(), strict=True)):
        words = [plots.label(token_text(vlm, token).strip()) for token in tokens]
        axes[row, 0].text(0, 0.5, "\n".join([f"L{neuron.layer}.{neuron.unit}", *words]), fontsize=8, va="center")
        peak = excites[:, row]
        for ax, index in zip(axes[row, 1:], peak.argsort(descending=True).tolist(), strict=False):
            ax.set_axis_on()
            one_map(vlm, images[index], neuron, ax, float(peak.max()), f"peak {peak[index]:.1f}")
    return fig
