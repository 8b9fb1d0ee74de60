"""Edit what a model says: change the writes of a few neurons, and undo it bit for bit.

The paper's release has no code for editing. `Edit.fit` is a reconstruction in the shape of the first author's FiNE (Pan et al.,
ICLR 2025): the model is frozen, and Adam finds row changes `D` (from zero) of k located neurons that minimise

    max_j -log p(y_j) + 0.1 ||D|| + KL(p_before || p_after on what is to stay) + 10 max_j -log(1 - p(y_j) right after the target)

until every `p(y_j)` is at least 0.9, or for 50 steps. Here y are the tokens that differ between the model's own caption and the
same caption with the source noun (and its article) replaced, read with the caption so far given; what is to stay are the other
tokens of that caption and the captions of pictures to keep. Sums over pictures are means [ours: FiNE edits text]."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmn.anatomy import Neuron, by_layer
from mmn.errors import MmnError
from mmn.hooks import uninterrupted
from mmn.intervene import added
from mmn.scenes import CONCEPTS
from mmn.trace import Trace
from mmn.vlm import PREFIX, PROMPT, VLM

FORMAT = "mmn-edit-1"


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes of some neurons' writes, for one model.

    neurons: which, and changes: float32 `[neurons, hidden]`, what is added to each write. model_hash: the model they were found
    on. source, target: the concepts. report: how the fit went (JSON types only)."""

    neurons: list[Neuron]
    changes: Tensor = field(repr=False)
    model_hash: str
    source: str
    target: str
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def norm(self) -> float:
        """Frobenius norm of the changes."""
        return float(self.changes.norm())

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}: {len(self.neurons)} writes of {self.model_hash} changed by {self.norm:.3g}"

    def inverted(self) -> Edit:
        """The edit that undoes this one where both are applied."""
        return replace(self, changes=-self.changes, source=self.target, target=self.source, report={"inverse of": self.report})

    def __add__(self, other: Edit) -> Edit:
        """Both edits as one, each as it was found on the unedited model. Raises MmnError if they belong to different models."""
        if other.model_hash != self.model_hash:
            raise MmnError(f"These edits belong to different models ({self.model_hash} and {other.model_hash}): fit both on one.")
        neurons = list(dict.fromkeys([*self.neurons, *other.neurons]))
        changes = torch.zeros(len(neurons), self.changes.shape[1])
        for edit in (self, other):
            changes[[neurons.index(neuron) for neuron in edit.neurons]] += edit.changes
        report = {"sum of": [self.report, other.report]}
        return Edit(neurons, changes, self.model_hash, f"{self.source} + {other.source}", f"{self.target} + {other.target}", report)

    # ---------------------------------------------------------------------------------------------------------- application

    @contextmanager
    def applied(self, vlm: VLM, how: Literal["auto", "weights", "hook"] = "auto") -> Iterator[VLM]:
        """With the changes in the model, for as long as the block lasts.

        `weights` writes them into the weights and puts the originals back afterwards, bit for bit, also after an exception or
        Ctrl-C; `hook` adds `a_i * change_i` in float32 to the FFN's output and leaves the weights alone; `auto` takes weights
        where they are plain numbers, and the hook for quantised and offloaded ones. Edits may be nested and ended in any order.
        Raises MmnError on another model than the edit's, and for `weights` where they cannot be changed."""
        if vlm.hash != self.model_hash:
            raise MmnError(f"This edit belongs to the model {self.model_hash}, not to {vlm.name} ({vlm.hash}): fit it again there.")
        vlm.anatomy.check(self.neurons)
        if how not in ("auto", "weights", "hook"):
            raise MmnError(f"An edit is applied by weights, by hook or auto, not by {how!r}.")
        plain = all(vlm.anatomy.ffns[layer].plain for layer in by_layer(self.neurons))
        if how == "weights" and not plain:
            raise MmnError("The weights of this model are quantised or offloaded and cannot be changed in place: use how='hook'.")
        if how == "hook" or not plain:
            with added(vlm, self.neurons, self.changes):
                yield vlm
            return
        active = _active(vlm)
        entry = (self,)  # an entry of its own, so that an edit can be applied twice
        try:
            try:
                with uninterrupted():
                    active.edits.append(entry)
                    active.write(vlm, self)
                yield vlm
            finally:
                active.drop(vlm, entry)
        finally:  # once more: Ctrl-C may have come just before it could be held back
            active.drop(vlm, entry)

    def apply(self, vlm: VLM, how: Literal["auto", "weights", "hook"] = "auto") -> None:
        """`applied` without a block: the changes stay until `undo`. Raises MmnError as `applied` does."""
        block = self.applied(vlm, how)
        block.__enter__()
        _active(vlm).blocks.append((self, block))

    def undo(self, vlm: VLM) -> None:
        """Take back what `apply` did, bit for bit, whatever was applied or undone in between. Raises MmnError where this edit is
        not applied."""
        blocks = _active(vlm).blocks
        for place in reversed(range(len(blocks))):
            if blocks[place][0] is self:
                blocks.pop(place)[1].__exit__(None, None, None)
                return
        raise MmnError(f"The edit of {self.source} to {self.target} is not applied to {vlm.name}, so there is nothing to undo.")

    # --------------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the edit as one safetensors file, whole or not at all. Raises MmnError where it cannot be written."""
        file = Path(path)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        words = {"model_hash": self.model_hash, "source": self.source, "target": self.target, "report": json.dumps(self.report)}
        tensors = {"neurons": torch.tensor(self.neurons).reshape(-1, 2), "changes": self.changes.contiguous()}
        try:
            save_file(tensors, part, {"format": FORMAT, **words})
            part.replace(file)
        except (OSError, SafetensorError) as error:
            raise MmnError(f"The edit could not be written to {file} ({error}): choose another place.") from None
        finally:
            part.unlink(missing_ok=True)
        return file

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Edit:
        """Read an edit. Raises MmnError if there is no such file or it holds no edit."""
        if not Path(path).is_file():
            raise MmnError(f"There is no edit {path}: check the file's name and folder.")
        try:
            with safe_open(path, "pt") as file:
                words = file.metadata() or {}
                if words.get("format") != FORMAT:
                    raise MmnError(f"{path} is no edit that this version reads ({FORMAT}): fit it again and save it.")
                neurons = [Neuron(*pair) for pair in file.get_tensor("neurons").tolist()]
                changes = file.get_tensor("changes")
            return cls(neurons, changes, words["model_hash"], words["source"], words["target"], json.loads(words["report"]))
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, MmnError):
                raise
            raise MmnError(f"{path} is damaged or no edit at all ({error}): save it again.") from None

    # ----------------------------------------------------------------------------------------------------------------- fit

    @classmethod
    def fit(
        cls,
        vlm: VLM,
        images: Image.Image | Sequence[Image.Image],
        source: str,
        target: str,
        neurons: Sequence[Neuron],
        *,
        keep: Sequence[Image.Image] = (),
        prompt: str = PROMPT,
        prefix: str = PREFIX,
        max_new_tokens: int = 50,
        steps: int = 50,
        rate: float = 1e-2,
        enough: float = 0.9,
        weights: tuple[float, float, float] = (0.1, 1.0, 10.0),
        progress: bool = True,
    ) -> Edit:
        """Find changes of `neurons` after which the pictures' captions say `target` where they said `source`.

        Pictures whose caption does not say `source` are left out; `keep` are pictures whose captions shall stay. rate: Adam's
        learning rate; enough: the probability at which to stop; weights: of the changes' norm, of what is to stay, and of
        saying the target twice. A fit is deterministic. Raises MmnError if no caption says the source, there are no neurons,
        `steps` or `rate` make no sense, or the model is edited."""
        if getattr(vlm, "_active_edits", None) and _active(vlm).edits:
            raise MmnError("An edit is fitted on the unedited model: leave the block of the edit that is applied first.")
        neurons = list(dict.fromkeys(Neuron(*neuron) for neuron in neurons))
        if not neurons:
            raise MmnError("There are no neurons to edit: give at least one, such as ranking.neurons.")
        vlm.anatomy.check(neurons)
        if not isinstance(steps, int) or steps < 0:
            raise MmnError(f"steps is a whole number of at least 0, not {steps!r}.")
        if not 0 < rate < float("inf"):
            raise MmnError(f"rate is Adam's learning rate, a number above 0, not {rate!r}.")
        if not target.strip() or target.strip().lower() == source.strip().lower():
            raise MmnError(f"The target {target!r} must be a word other than the source {source!r}.")
        started = time.perf_counter()
        given = [images] if isinstance(images, Image.Image) else list(images)
        traces = vlm.caption(given, prompt, prefix, max_new_tokens, record=False)
        said = [trace for trace in traces if _says(trace, source)]
        if not said:
            texts = "; ".join(sorted({repr(trace.text) for trace in traces})[:3])
            raise MmnError(f"No caption of these {len(given)} pictures says {source!r} (they say {texts}): choose other pictures.")
        kept = vlm.caption(list(keep), prompt, prefix, max_new_tokens, record=False) if keep else []
        rows = [_Row.of(vlm, trace, replaced(trace, source, target)) for trace in said]
        rows += [_Row.of(vlm, trace, trace.text) for trace in kept]
        changes = torch.zeros(len(neurons), vlm.hidden, device=vlm.anatomy.device, requires_grad=True)
        batch = _Batch(vlm, rows)
        with torch.no_grad():
            before = [logits.log_softmax(-1) for logits in batch.logits(vlm)]
        adam = torch.optim.Adam([changes], lr=rate)
        curve: list[float] = []
        report: dict[str, Any] = {
            "neurons": len(neurons),
            "pictures": len(said),
            "kept": len(kept),
            "prompt": prompt,
            "prefix": prefix,
        }
        report |= {"rate": rate, "enough": enough, "weights": list(weights), "steps": 0, "losses": curve}
        bar = tqdm(range(steps + 1), desc=f"{source} -> {target}", leave=False, disable=not progress)
        for step in bar:
            with torch.enable_grad(), added(vlm, neurons, changes):
                after = [logits.log_softmax(-1) for logits in batch.logits(vlm)]
                loss, worst = _loss(rows, before, after, changes, weights)
            curve.append(float(loss.detach()))
            report |= {"steps": step, "probability": worst}
            bar.set_postfix(p=f"{worst:.2f}", refresh=False)
            if worst >= enough or step == steps:
                break
            changes.grad = torch.autograd.grad(loss, changes)[0]
            adam.step()
        report |= {"norm": float(changes.detach().norm()), "seconds": round(time.perf_counter() - started, 2)}
        return cls(neurons, changes.detach().cpu().clone(), vlm.hash, source, target, report)


# ----------------------------------------------------------------------------------------------------------------- captions


def _says(trace: Trace, noun: str) -> bool:
    return any(noun.strip().lower() in (each.lemma, each.text.lower()) for each in trace.nouns)


def replaced(trace: Trace, source: str, target: str) -> str:
    """A trace's text with every mention of the noun `source` replaced by `target`, in its number, and an article a or an before
    it made to fit. Raises MmnError if the text does not say the source."""
    lemma = trace.noun(source).lemma
    text = trace.text
    spans = [span for _, found, span in trace.lexicon(text) if found == lemma and span[0] >= len(trace.prefix)]
    for first, last in reversed(spans):
        plural = text[first:last].lower() != lemma and text[first:last].lower() != source.strip().lower()
        word = plural_of(target) if plural else target
        head = text[:first]
        if not plural and (article := re.search(r"\b(an?)(\s+)$", head, re.IGNORECASE)):
            fitting = "an" if takes_an(word) else "a"
            fitting = fitting.capitalize() if article.group(1)[0].isupper() else fitting
            head = head[: article.start()] + fitting + article.group(2)
        text = head + word + text[last:]
    return text


def plural_of(word: str) -> str:
    """The plural: the synthetic world's own, else by rule."""
    if word in CONCEPTS:
        return CONCEPTS[word].plural
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def takes_an(word: str) -> bool:
    """Whether the article before a word is `an`: the synthetic world's own, else before a vowel letter."""
    return CONCEPTS[word].article == "an" if word in CONCEPTS else word[:1].lower() in "aeiou"


# --------------------------------------------------------------------------------------------------------------------- loss


@dataclass(frozen=True)
class _Row:
    """One caption to teach or to keep. image, text: what is read. answer: the answer's token ids after the prompt, `end`
    included if the caption ended. new: places in `answer` that the model shall learn. after: for each place right behind a run
    of new tokens, that run's tokens, which shall not come again (unless one does by right). stay: the other places."""

    trace: Trace
    text: str
    answer: list[int]
    new: list[int]
    after: dict[int, list[int]]
    stay: list[int]

    @classmethod
    def of(cls, vlm: VLM, trace: Trace, text: str) -> _Row:
        prompt = vlm.inputs([trace.image], [trace.prompt], [trace.prefix])["input_ids"][0].tolist()
        whole = vlm.inputs([trace.image], [trace.prompt], [text])["input_ids"][0].tolist()
        start = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        own, answer = prompt[start:] + trace.tokens.tolist(), whole[start:]
        new: list[int] = []
        after: dict[int, list[int]] = {}
        if text != trace.text:
            for kind, _, _, first, last in difflib.SequenceMatcher(a=own, b=answer, autojunk=False).get_opcodes():
                if kind in ("replace", "insert"):
                    new += range(first, last)
                    after[last] = [token for token in answer[first:last] if token != _at(answer, last)]
            if not new:
                raise MmnError(f"To the tokenizer {text!r} only leaves words of {trace.text!r} out: choose another target.")
        # The place behind the last token counts too: there the caption ends, or would go on.
        return cls(trace, text, answer, new, after, [place for place in range(len(answer) + 1) if place not in new])


def _at(answer: list[int], place: int) -> int | None:
    return answer[place] if place < len(answer) else None


class _Batch:
    """All rows as one left-padded batch, so that row r's last logits are those behind its last token."""

    def __init__(self, vlm: VLM, rows: list[_Row]):
        self.rows = rows
        traces = [row.trace for row in rows]
        self.inputs = vlm.inputs([t.image for t in traces], [t.prompt for t in traces], [row.text for row in rows])
        self.longest = max(len(row.answer) for row in rows) + 1
        takes = inspect.signature(vlm.model.forward).parameters
        self.options = {"logits_to_keep": self.longest} if "logits_to_keep" in takes else {}

    def logits(self, vlm: VLM) -> list[Tensor]:
        """For each row the logits that predict its answer's tokens and what follows, float32 `[answer + 1, vocabulary]`."""
        out = vlm.model(**self.inputs, **self.options, use_cache=False).logits
        return [out[index, out.shape[1] - len(row.answer) - 1 :].float() for index, row in enumerate(self.rows)]


def _loss(
    rows: list[_Row], before: list[Tensor], after: list[Tensor], changes: Tensor, weights: tuple[float, float, float]
) -> tuple[Tensor, float]:
    """The loss of the module's docstring and the smallest probability of a new token."""
    says, again, stays, lowest = [], [], [], 1.0
    for row, old, now in zip(rows, before, after, strict=True):
        stays.append((old[row.stay].exp() * (old[row.stay] - now[row.stay])).sum(-1).mean())
        if not row.new:
            continue
        surprise = -now[row.new, [row.answer[place] for place in row.new]]
        says.append(surprise.max())
        lowest = min(lowest, float((-surprise.max()).exp().detach()))
        repeats = [(place, token) for place, tokens in row.after.items() for token in tokens]
        if repeats:
            places, tokens = (list(each) for each in zip(*repeats, strict=True))
            again.append(-torch.log1p(-now[places, tokens].exp().clamp(max=1 - 1e-6)).max())
    loss = torch.stack(says).mean() + weights[0] * changes.norm() + weights[1] * torch.stack(stays).mean()
    return (loss + weights[2] * torch.stack(again).mean() if again else loss), lowest


# ------------------------------------------------------------------------------------------------------- weights in place


class _Active:
    """The edits now in a model's weights, and the original columns of every layer that they change."""

    def __init__(self) -> None:
        self.edits: list[tuple[Edit]] = []
        self.blocks: list[tuple[Edit, AbstractContextManager[VLM]]] = []  # entered by `Edit.apply`
        self.originals: dict[int, dict[int, Tensor]] = {}

    @torch.no_grad()
    def write(self, vlm: VLM, changed: Edit) -> None:
        """Set every column that `changed` names to its original plus the sum of the changes of all edits that are on.

        The sum is taken in float64, where it does not depend on the order, and rounded once."""
        for layer, group in by_layer(changed.neurons).items():
            weight = vlm.anatomy.ffns[layer].columns
            originals = self.originals.setdefault(layer, {})
            for _, unit in group:
                originals.setdefault(unit, weight[:, unit].clone())
            for unit in dict.fromkeys(unit for _, unit in group):
                neuron = Neuron(layer, unit)
                on = [edit.changes[i].double() for (edit,) in self.edits for i, n in enumerate(edit.neurons) if n == neuron]
                if on:
                    total = originals[unit].double() + torch.stack(on).sum(0).to(weight.device)
                    weight[:, unit] = total.to(weight.dtype)
                else:
                    weight[:, unit] = originals[unit]
                    del originals[unit]

    def drop(self, vlm: VLM, entry: tuple[Edit]) -> None:
        """Take one edit out of the weights; no harm is done by doing it again."""
        with uninterrupted():
            self.edits[:] = [each for each in self.edits if each is not entry]
            self.write(vlm, entry[0])


def _active(vlm: VLM) -> _Active:
    if not hasattr(vlm, "_active_edits"):
        vlm._active_edits = _Active()  # type: ignore[attr-defined]
    return vlm._active_edits  # type: ignore[attr-defined]
