"""One neuron over many pictures and texts: how much each excites it, and what tells those that show a concept from those that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mmn.errors import MmnError
from mmn.ffn import Neuron, by_layer
from mmn.hooks import hooked
from mmn.vlm import PREFIX, VLM

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
    table = values.float().numpy()
    yes, no = table[chosen], table[~chosen]
    return ((yes[:, None] > no[None]).mean((0, 1)) + 0.5 * (yes[:, None] == no[None]).mean((0, 1))).astype(float)
