"""What one caption leaves behind: its tokens, and every neuron's activation at the position that produced each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image
from torch import Tensor, nn

from mmn import nouns
from mmn.anatomy import Anatomy
from mmn.errors import MmnError


@dataclass(frozen=True)
class Trace:
    """The record of one picture's caption.

    text: prefix and generated words. tokens: generated ids, int64 `[steps]`, without the end mark. pieces: the same as the tokenizer
    writes them. ends: for each step where in `text` its piece ends. logprobs: natural log of each token's probability `[steps]`.
    activations: for each layer float32 `[steps, neurons]`, what the FFN's output projection received at the position that *produced*
    the step's token; empty if recording was off. image, prompt and prefix: what was asked."""

    text: str
    tokens: Tensor
    pieces: list[str]
    ends: list[int]
    logprobs: Tensor
    activations: list[Tensor] = field(repr=False)
    image: Image.Image | None
    prompt: str
    prefix: str
    lexicon: nouns.Lexicon = field(repr=False)

    @cached_property
    def nouns(self) -> list[nouns.Noun]:
        """The nouns the model said, each once, where it first said it."""
        start = len(self.prefix)
        found: dict[str, nouns.Noun] = {}
        for text, lemma, (first, last) in self.lexicon(self.text):
            if first >= start and lemma not in found:
                step = next(s for s, end in enumerate(self.ends) if end > first)
                found[lemma] = nouns.Noun(text, lemma, int(self.tokens[step]), step, (first, last))
        return list(found.values())

    def noun(self, word: str | nouns.Noun) -> nouns.Noun:
        """The noun that `word` (its lemma or its form in the text) stands for. Raises MmnError if the caption does not say it."""
        if isinstance(word, nouns.Noun):
            return word
        for noun in self.nouns:
            if word.strip().lower() in (noun.lemma, noun.text.lower()):
                return noun
        said = ", ".join(noun.lemma for noun in self.nouns) or "none"
        raise MmnError(f"The caption does not say {word!r}; its nouns are: {said}.")

    def __str__(self) -> str:
        return self.text


class Recorder:
    """Keeps, while it is on, each FFN's input at the last position of every forward pass: `[batch, neurons]` a layer and step."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.steps: list[list[Tensor]] = [[] for _ in anatomy.layers]

    def __enter__(self) -> Recorder:
        self.handles = [
            projection.register_forward_pre_hook(self._keep(layer)) for layer, projection in enumerate(self.anatomy.projections)
        ]
        return self

    def _keep(self, layer: int):  # noqa: ANN202
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.steps[layer].append(args[0][:, -1].clone())

        return hook

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
