"""What an edit is fitted on: captions as they shall become and captions that shall stay, as batches, and the loss over them."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmn.coco import plural
from mmn.errors import MmnError
from mmn.hooks import Removable, hooked
from mmn.scenes import CONCEPTS
from mmn.trace import Trace
from mmn.vlm import VLM


def says(trace: Trace, noun: str) -> bool:
    """Whether a caption says a noun, in any number."""
    return any(noun.strip().lower() in (each.lemma, each.text.lower()) for each in trace.nouns)


def captions(
    vlm: VLM, images: Image.Image | Sequence[Image.Image], source: str, keep: Image.Image | Sequence[Image.Image],
    texts: Sequence[str], prompt: str | Sequence[str] | None, prefix: str, limit: int, record: bool,
) -> tuple[list[Trace], list[Trace]]:  # fmt: skip
    """What the model says of the pictures where it says the source, and of what is to be kept. Raises MmnError for texts that are one
    text and no list, and where no caption says the source."""
    if isinstance(texts, str):
        raise MmnError(f"texts is a list of texts, not {texts!r}: put it in brackets.")
    prompt = vlm.prompt if prompt is None else prompt
    if not isinstance(prompt, str) and not prompt:
        raise MmnError("There is no prompt: give one, or a list of some.")
    prompts = itertools.cycle([prompt] if isinstance(prompt, str) else prompt)
    given, keep = (list(each) if isinstance(each, Iterable) else [each] for each in (images, keep))
    traces = vlm.caption(given, [next(prompts) for _ in given], prefix, limit, record=record)
    said = [trace for trace in traces if says(trace, source)]
    if not said:
        found = "; ".join(sorted({repr(trace.text) for trace in traces})[:3])
        raise MmnError(f"No caption of these {len(given)} pictures says {source!r} (they say {found}): choose other pictures.")
    kept = vlm.caption(keep, [next(prompts) for _ in keep], prefix, limit, record=record) if keep else []
    kept += vlm.caption([None] * len(texts), list(texts), "", limit, record=record) if texts else []
    return said, kept


def replaced(trace: Trace, source: str, target: str, fitting: bool = True) -> str:
    """A trace's text with every mention of the noun `source` replaced by `target`, in its number, and an article a or an before
    it made to fit, unless `fitting` is false. Raises MmnError if the text does not say the source."""
    lemma = trace.noun(source).lemma
    text = trace.text
    spans = [span for _, found, span in trace.lexicon(text) if found == lemma and span[0] >= len(trace.prefix)]
    for first, last in reversed(spans):
        plural = text[first:last].lower() != lemma and text[first:last].lower() != source.strip().lower()
        word = plural_of(target) if plural else target
        head = text[:first]
        if fitting and not plural and (article := re.search(r"\b(an?)(\s+)$", head, re.IGNORECASE)):
            other = "an" if takes_an(word) else "a"
            other = other.capitalize() if article.group(1)[0].isupper() else other
            head = head[: article.start()] + other + article.group(2)
        text = head + word + text[last:]
    return text


_LINK = r"(?:,|\s+(?:and|with|next to|near|beside|above|below|over|under|to the (?:left|right) of|in front of|behind))\s+"
_BEFORE = re.compile(rf"({_LINK})?\b(?:an?|the|two|three|four|some|several)\s+$", re.IGNORECASE)


def removed(trace: Trace, noun: str, text: str = "") -> str:
    """A trace's text (or what is already left of it) without its mentions of a noun: each goes with its article and the word that joins it
    to another noun. Raises MmnError if the trace does not say the noun, or says nothing else."""
    lemma, text = trace.noun(noun).lemma, text or trace.text
    spans = [span for _, found, span in trace.lexicon(text) if found == lemma and span[0] >= len(trace.prefix)]
    for first, last in reversed(spans):
        before = _BEFORE.search(text[:first])
        begin = max(before.start(), len(trace.prefix)) if before else first
        if before and before.group(1) and begin == before.start():
            text = text[:begin].rstrip() + text[last:]
        elif after := re.match(_LINK, text[last:]):
            text = f"{text[:begin].rstrip()} {text[last + after.end() :]}"
        else:
            raise MmnError(f"Without {noun!r} nothing is left of {text!r}: choose another picture.")
    if "," in text and " and " in trace.text and " and " not in text:  # a list of three has become one of two
        head, _, tail = text.rpartition(",")
        text = f"{head} and{tail}"
    return text


def plural_of(word: str) -> str:
    """The plural: the synthetic world's own, else by rule."""
    return CONCEPTS[word].plural if word in CONCEPTS else plural(word)


def takes_an(word: str) -> bool:
    """Whether the article before a word is `an`: the synthetic world's own, else before a vowel letter."""
    return CONCEPTS[word].article == "an" if word in CONCEPTS else word[:1].lower() in "aeiou"


# --------------------------------------------------------------------------------------------------------------------- loss


@dataclass(frozen=True)
class Row:
    """One caption to teach or to keep. text: what is read. answer: the answer's token ids after the prompt. new: places in `answer`
    (its end included) where the model shall learn something else, wanted: the token it shall say there. after: for each place right
    behind a run of new tokens, that run's tokens, which shall not come again (unless one does by right). stay: the other places.
    swaps: steps of the trace and the tokens that come in their place. was: for places that stay, where they were in the trace's own
    caption."""

    trace: Trace
    text: str
    answer: list[int]
    new: list[int]
    wanted: list[int]
    after: dict[int, list[int]]
    stay: list[int]
    swaps: list[tuple[int, int]]
    was: dict[int, int]

    @classmethod
    def of(cls, vlm: VLM, trace: Trace, text: str) -> Row:
        """The row that teaches a trace's picture the caption `text`, or keeps it if that is the trace's own."""
        changed = text != trace.text
        text = text if trace.prefix else text.lstrip()  # the template sets the space before an answer
        prompt = vlm.inputs([trace.image], [trace.prompt], [trace.prefix])["input_ids"][0].tolist()
        whole = vlm.inputs([trace.image], [trace.prompt], [text])["input_ids"][0].tolist()
        start = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        own, answer = prompt[start:] + trace.tokens.tolist(), whole[start:]
        new: list[int] = []
        after: dict[int, list[int]] = {}
        swaps: list[tuple[int, int]] = []
        was = {len(answer): len(own)}
        if changed:
            for kind, begin, _, first, last in difflib.SequenceMatcher(a=own, b=answer, autojunk=False).get_opcodes():
                if kind in ("replace", "insert"):
                    new += range(first, last)
                    after[last] = [token for token in answer[first:last] if token != _at(answer, last)]
                elif kind == "delete":  # what follows, or the end, comes at once
                    new.append(first)
                else:
                    was |= dict(zip(range(first, last), range(begin, begin + last - first), strict=True))
                if kind == "replace" and begin >= len(prompt) - start:
                    swaps.append((begin - (len(prompt) - start), answer[first]))
            new = list(dict.fromkeys(new))
        wanted = [answer[place] if place < len(answer) else vlm.end_token for place in new]
        # The place behind the last token counts too: there the caption ends, or would go on.
        stay = [place for place in range(len(answer) + 1) if place not in new]
        return cls(trace, text, answer, new, wanted, after, stay, swaps, {place: was[place] for place in stay if place in was})


def _at(answer: list[int], place: int) -> int | None:
    return answer[place] if place < len(answer) else None


class Batch:
    """Some rows as one left-padded batch, so that row r's last logits are those behind its last token."""

    def __init__(self, vlm: VLM, rows: list[Row]):
        self.rows = rows
        traces = [row.trace for row in rows]
        self.inputs = vlm.inputs([t.image for t in traces], [t.prompt for t in traces], [row.text for row in rows])
        self.longest = max(len(row.answer) for row in rows) + 1
        takes = inspect.signature(vlm.model.forward).parameters
        self.options = {"logits_to_keep": self.longest} if "logits_to_keep" in takes else {}
        self.before: list[Tensor] = []  # log probabilities of the unedited model
        self.begun: tuple[int, Any] | None = None  # a layer, and what the one before it gives

    def logits(self, vlm: VLM) -> list[Tensor]:
        """For each row the logits that predict its answer's tokens and what follows, float32 `[answer + 1, vocabulary]`."""
        with self._skipping(vlm) as inputs:
            out = vlm.model(**inputs, **self.options, use_cache=False).logits
        return [out[index, out.shape[1] - len(row.answer) - 1 :].float() for index, row in enumerate(self.rows)]

    @torch.no_grad()
    def remember(self, vlm: VLM) -> None:
        """Keep what the model, unedited as it must be now, says: `before`. What follows a new word shall be as it was after the old one:
        where a caption changes, what stays is compared with the model's own caption, read as it was."""
        self.before = [logits.log_softmax(-1) for logits in self.logits(vlm)]
        changed = [place for place, row in enumerate(self.rows) if row.new]
        if not changed:
            return
        own = Batch(vlm, [Row.of(vlm, self.rows[place].trace, self.rows[place].trace.text) for place in changed])
        for place, row, logits in zip(changed, own.rows, own.logits(vlm), strict=True):
            was = self.rows[place].was
            if was and max(was.values()) == len(row.answer):  # else the text's tokens are not those that were said
                self.before[place][list(was)] = logits.log_softmax(-1)[list(was.values())]

    @torch.no_grad()
    def begin(self, vlm: VLM, layer: int) -> None:
        """From now on start at a decoder layer: what is changed lies there or later, so all before it, the picture's tower too, stays as
        it is now. Where that does not give the same logits bit for bit, the whole model is run as before."""
        if self.begun is not None and self.begun[0] == layer:
            return
        self.begun = None
        if not layer:
            return
        kept: list[Any] = []
        with hooked([vlm.anatomy.layers[layer - 1].register_forward_hook(lambda _, __, out: kept.append(out))]):
            whole = self.logits(vlm)
        self.begun, same = (layer, kept[-1]), False
        try:
            same = all(map(torch.equal, self.logits(vlm), whole))
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):  # some families want what is left out
            pass
        finally:  # of Ctrl-C, too: what was not found to be the same is not used
            if not same:
                self.begun = None

    @contextmanager
    def _skipping(self, vlm: VLM) -> Iterator[dict[str, Any]]:
        """With the layers before the one begun at giving what is kept, whatever they get. Gives the inputs: text alone will do then."""
        if self.begun is None:
            yield self.inputs
            return
        layer, kept = self.begun
        skipped = vlm.anatomy.layers[:layer]
        own = [vars(each).get("forward") for each in skipped]
        try:
            for each in skipped:
                each.forward = lambda *_, **__: kept
            shape = self.inputs["input_ids"].shape
            yield {name: value for name, value in self.inputs.items() if value.shape == shape}
        finally:
            for each, before in zip(skipped, own, strict=True):
                if before is None:
                    vars(each).pop("forward", None)
                else:
                    each.forward = before


def lesson(vlm: VLM, said: Sequence[Trace], kept: Sequence[Trace], source: str, target: str, batch_size: int) -> list[Batch]:
    """Batches that teach the captions `said` with the target in the source's place (without the source, for an empty target), and
    those `kept` as they are. Where the article changes too, a second row teaches the noun behind the article as it was, of which it
    asks nothing: *an* is said a step before the noun, where an edit of the noun's neurons may not reach, and what is taught only
    behind *an* would then never be said."""
    rows = []
    for trace in said:
        text = replaced(trace, source, target) if target else removed(trace, source)
        rows.append(Row.of(vlm, trace, text))
        if target and (as_it_was := replaced(trace, source, target, fitting=False)) != text:
            row = Row.of(vlm, trace, as_it_was)
            rows.append(replace(row, stay=[place for place in row.stay if place + 1 not in row.new]))
    return batched(vlm, rows + [Row.of(vlm, trace, trace.text) for trace in kept], batch_size)


def batched(vlm: VLM, rows: Sequence[Row], size: int) -> list[Batch]:
    """Rows as batches, of like length together, with and without a picture apart."""
    batches = []
    for bare in (False, True):
        some = sorted((row for row in rows if (row.trace.image is None) == bare), key=lambda row: len(row.answer))
        batches += [Batch(vlm, some[start : start + size]) for start in range(0, len(some), size)]
    return batches


class Counts(NamedTuple):
    """How many rows have each part of the loss."""

    new: int
    after: int
    all: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Counts:
        """Counted over all batches."""
        rows = [row for batch in batches for row in batch.rows]
        return cls(sum(bool(r.new) for r in rows), sum(any(r.after.values()) for r in rows), len(rows))


def loss_of(batch: Batch, after: list[Tensor], of: Counts, weights: tuple[float, float, float]) -> tuple[Tensor, float]:
    """A batch's share of the module's loss, but for the changes' norm, and the smallest probability of a new token in it."""
    loss, lowest = after[0].new_zeros(()), 1.0
    for row, old, now in zip(batch.rows, batch.before, after, strict=True):
        loss = loss + weights[1] * (old[row.stay].exp() * (old[row.stay] - now[row.stay])).sum(-1).mean() / of.all
        if not row.new:
            continue
        surprise = -now[row.new, row.wanted]
        loss = loss + surprise.max() / of.new
        lowest = min(lowest, float((-surprise.max()).exp().detach()))
        repeats = [(place, token) for place, tokens in row.after.items() for token in tokens]
        if repeats:
            places, tokens = (list(each) for each in zip(*repeats, strict=True))
            again = -torch.log1p(-now[places, tokens].exp().clamp(max=1 - 1e-6))
            loss = loss + weights[2] * again.max() / of.after
    return loss, lowest


class Moments:
    """Second moments of some neurons' activations, for each layer `[neurons, neurons]`, summed over what is to be kept while a batch
    passes: of a row to keep every position, of a row to teach none."""

    def __init__(self, vlm: VLM, groups: dict[int, list[tuple[int, int]]]):
        self.vlm, self.groups = vlm, groups
        self.sums = {layer: torch.zeros(len(group), len(group)) for layer, group in groups.items()}
        self.mask: Tensor | None = None

    def __enter__(self) -> Moments:
        def watch(layer: int) -> Removable:
            units = [unit for _, unit in self.groups[layer]]

            def add(activations: Tensor) -> None:
                assert self.mask is not None
                seen = activations[..., units].float()[self.mask.to(activations.device)].cpu()
                self.sums[layer] += seen.T @ seen

            return self.vlm.anatomy.ffns[layer].watch(add)

        self.block = hooked(watch(layer) for layer in self.groups)
        self.block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.block.__exit__(*error)

    def weigh(self, batch: Batch) -> None:
        """The positions of the batch that count, bool `[rows, positions]`."""
        ids = batch.inputs["input_ids"]
        mask = batch.inputs.get("attention_mask", torch.ones_like(ids)).bool().clone()
        for index, row in enumerate(batch.rows):
            mask[index] &= not row.new
        self.mask = self.vlm.anatomy.in_stream(ids, mask)

    def whitened(self, layer: int, ridge: float) -> Tensor:
        """`(C / c + ridge)^-1/2`, c the mean of C's diagonal: changes cost the more, the more active their neurons are elsewhere."""
        values, vectors = torch.linalg.eigh(self.sums[layer].double())
        values = values.clamp(min=0) / values.mean().clamp(min=1e-12) + ridge
        return (vectors * values.rsqrt() @ vectors.T).float()
