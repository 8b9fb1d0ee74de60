"""What one caption leaves behind: its tokens, and every neuron's activation at the position that produced each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmn.anatomy import Anatomy
from mmn.errors import MmnError
from mmn.hooks import Removable, hooked
from mmn.nouns import Lexicon, Noun

WINDOW = 4  # tokens of context in which the next one is decoded


@dataclass(frozen=True, eq=False)
class Trace:
    """The record of one picture's caption.

    tokens: generated ids, int64 `[steps]`, without the end mark; ended: whether the model set
    one. logprobs: natural log of each token's probability `[steps]`. record: for each step, in the model's dtype until `activations` is
    asked for, what the FFNs' output projections received at the position that *produced* its token, one layer of `sizes` neurons after
    another `[neurons]`. stream: float32 `[steps, hidden]`, what the final norm received there. Both are None if recording was off.
    image, prompt and prefix: what was asked."""

    tokens: Tensor
    ended: bool
    logprobs: Tensor
    record: list[Tensor] | None = field(repr=False)
    sizes: list[int] = field(repr=False)
    stream: Tensor | None = field(repr=False)
    image: Image.Image | None
    prompt: str
    prefix: str
    tokenizer: Any = field(repr=False)
    context: list[int] = field(repr=False)
    lexicon: Lexicon = field(repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """The fields, each tensor with no more memory behind it than its own: a pickle writes all of it for each."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state | {"record": self.record and [row.clone() for row in self.record]}

    @property
    def recorded(self) -> bool:
        """Whether its activations were kept."""
        return self.record is not None

    @cached_property
    def activations(self) -> list[Tensor]:
        """For each layer float32 `[steps, neurons]`, empty if recording was off. Put together when first asked for: 70 MB a caption
        of a 7B model, of which a ranking reads a step or two (`at`)."""
        if self.record is None:
            return []
        whole = torch.stack(self.record).float() if self.record else torch.zeros(0, sum(self.sizes))
        self.record[:] = whole  # its rows now, so that nothing is kept twice
        return list(whole.split(self.sizes, -1))

    def at(self, steps: Sequence[int]) -> Tensor:
        """All neurons' activations at some steps, layer after layer: float32 `[steps, neurons of all layers]`. Raises MmnError if
        recording was off."""
        if self.record is None:
            raise MmnError("This caption was made with record=False: caption again with recording on.")
        return torch.stack([self.record[step] for step in steps]).float()

    def stream_at(self, steps: Sequence[int]) -> Tensor:
        """What the final norm received at some steps: float32 `[steps, hidden]`. Raises MmnError if it was not recorded."""
        if self.stream is None:
            raise MmnError("This needs the residual stream, which this trace does not hold: make it with `vlm.caption`.")
        return self.stream[list(steps)]

    @cached_property
    def text(self) -> str:
        """The prefix and what was generated, without special tokens."""
        return self.prefix + "".join(self.pieces)

    @cached_property
    def pieces(self) -> list[str]:
        """The text that each step added, leading space included; a part of a character adds nothing until the character is
        whole."""
        return self._decoded[0]

    @cached_property
    def ends(self) -> list[int]:
        """For each step where in `text` its piece ends; for a part of a character, where the character does."""
        return self._decoded[1]

    @cached_property
    def _decoded(self) -> tuple[list[str], list[int]]:
        # Decode in the context of the tokens before, as a stream does: many tokenizers drop the space of a first token.
        context = self.context
        while context and self.decode(context).startswith("\ufffd"):
            context = context[1:]  # begins in the middle of a character
        ids = context + self.tokens.tolist()
        read = len(context)
        start, length = 0, len(self.prefix)
        whole = [start] * WINDOW  # where characters are whole
        pieces: list[str] = []
        ends: list[int] = []
        for end in range(read + 1, len(ids) + 1):
            before, after = self.decode(ids[start:read]), self.decode(ids[start:end])
            # No character has more than four parts: what is still broken then stays so.
            broken = after.endswith("\ufffd") and end - read < 4 and end < len(ids)
            piece = "" if broken else after[len(before) :]
            length += len(piece)
            pieces.append(piece)
            ends.append(length)
            if not broken:
                ends[read - end :] = [length] * (end - read)
                whole.append(end)
                start, read = whole[-WINDOW], end
        return pieces, ends

    def decode(self, ids: list[int]) -> str:
        """Text of some tokens, without special ones, spaces as they are."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def nouns(self) -> list[Noun]:
        """The nouns the model said, each once, where it first said it; those of the given prefix do not count."""
        start = len(self.prefix)
        found: dict[str, Noun] = {}
        for text, lemma, (first, last) in self.lexicon(self.text):
            if first >= start and lemma not in found and self.ends and first < self.ends[-1]:
                step = next(s for s, end in enumerate(self.ends) if end > first)
                found[lemma] = Noun(text, lemma, int(self.tokens[step]), step, (first, last))
        return list(found.values())

    def noun(self, word: str | Noun) -> Noun:
        """The noun that `word` (its lemma or its form in the text) stands for. Raises MmnError if the caption does not say it."""
        if isinstance(word, Noun):
            if not 0 <= word.step < len(self.tokens):
                raise MmnError(f"The caption has {len(self.tokens)} steps, so there is no step {word.step} of {word.text!r}.")
            return word
        if not isinstance(word, str):
            raise MmnError(f"A noun is a word or one of trace.nouns, not {word!r}.")
        for noun in self.nouns:
            if word.strip().lower() in (noun.lemma, noun.text.lower()):
                return noun
        said = ", ".join(noun.lemma for noun in self.nouns) or "none"
        raise MmnError(f"The caption {self.text!r} does not say {word!r}; its nouns are: {said}.")

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Trace({self.text!r}, {len(self.tokens)} steps)"


class Recorder:
    """Keeps, while it is on, all FFNs' activations, layer after layer, and the final norm's input at the last position of every
    forward pass: `[batch, neurons of all layers]` and `[batch, hidden]` a step, in the model's dtype. A layer that a pass leaves out,
    as Mllama does those that read the picture where there is none, writes nothing: its activations are 0."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.steps: list[Tensor] = []
        self.stream: list[Tensor] = []
        self._now: dict[int, Tensor] = {}  # of the step that is being computed, by layer
        self._device = torch.device("cpu")  # from which steps are copied

    @contextmanager
    def on(self) -> Iterator[None]:
        """Keep what passes during the block."""
        norm = self.anatomy.final_norm or self.anatomy.unembedding

        def handles() -> Iterator[Removable]:
            for layer, ffn in enumerate(self.anatomy.ffns):
                yield ffn.watch(partial(self._see, layer))
            yield norm.register_forward_pre_hook(lambda _, args: self._end_step(args[0]))

        with hooked(handles()):
            yield
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # copies that are still on their way

    def _see(self, layer: int, seen: Tensor) -> None:
        last = seen[:, -1].detach()
        self._now[layer] = last if seen.shape[1] == 1 else last.clone()  # a view would keep every position

    def _end_step(self, stream: Tensor) -> None:
        # One copy a step and not one a layer, which goes on beside the computing into memory that a GPU reaches by itself.
        layers = [
            self._now.pop(layer).to(stream.device) if layer in self._now else stream.new_zeros(len(stream), ffn.neurons)
            for layer, ffn in enumerate(self.anatomy.ffns)
        ]
        self._device = stream.device
        self.steps.append(torch.cat(layers, -1).to("cpu", non_blocking=True))
        self.stream.append(stream[:, -1].detach().clone().to("cpu", non_blocking=True))
