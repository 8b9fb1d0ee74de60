"""Edit what a model says: change the writes of a few neurons, and undo it bit for bit.

The paper's release has no code for editing. `Edit.fit` is a reconstruction in the shape of the first author's FiNE (Pan et al.,
ICLR 2025): the model is frozen, and Adam finds row changes `D` (from zero) of k located neurons that minimise

    max_j -log p(y_j) + 0.1 ||D|| + KL(p_before || p_after on what is to stay) + 10 max_j -log(1 - p(y_j) right after the target)

until every `p(y_j)` is at least 0.9, or for 50 steps. Here y are the tokens that differ between the model's own caption and the
same caption with the source noun (and its article) replaced, read with the caption so far given; what is to stay are the other
tokens of that caption and the captions of pictures to keep. Sums over pictures are means, and where the article changes the noun is
taught behind either (see mmn.lesson.lesson) [ours: FiNE edits text].

`Edit.closed_form` [ours] needs no gradient: with the final norm frozen as it was, a neuron's change moves the logits of the step it is
active at linearly, so the least change that moves them as wanted is a ridge regression on the neurons' activations."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmn.bars import tqdm
from mmn.contribution import contributions, normed, through_norm
from mmn.errors import MmnError, finite, whole_number
from mmn.ffn import Neuron, by_layer, neurons_at
from mmn.hooks import uninterrupted
from mmn.intervene import added
from mmn.lesson import Counts, Moments, Row, captions, lesson, loss_of, replaced, says
from mmn.paths import in_utf8, whole
from mmn.trace import Trace
from mmn.vlm import PREFIX, VLM

FORMAT = "mmn-edit-1"
LOST = 0.1  # share of a change that rounding may take before the user is told


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
        return f"{self.source} -> {self.target or '(left out)'}: {len(self.neurons)} writes of {self.model_hash} changed by {self.norm:.3g}"

    def inverted(self) -> Edit:
        """The edit that undoes this one where both are applied."""
        return replace(self, changes=-self.changes, source=self.target, target=self.source, report={"inverse of": self.report})

    def __add__(self, other: Edit) -> Edit:
        """Both edits as one, each as it was found on the unedited model. Raises MmnError if they belong to different models."""
        if other.model_hash != self.model_hash:
            raise MmnError(f"These edits belong to different models ({self.model_hash} and {other.model_hash}): fit both on one.")
        neurons = list(dict.fromkeys([*self.neurons, *other.neurons]))
        place = {neuron: row for row, neuron in enumerate(neurons)}
        changes = torch.zeros(len(neurons), self.changes.shape[1])
        for edit in (self, other):
            changes.index_add_(0, torch.tensor([place[neuron] for neuron in edit.neurons]), edit.changes)
        report = {"sum of": [self.report, other.report]}
        target = " + ".join(word for word in (self.target, other.target) if word)
        return Edit(neurons, changes, self.model_hash, f"{self.source} + {other.source}", target, report)

    # ---------------------------------------------------------------------------------------------------------- application

    @contextmanager
    def applied(self, vlm: VLM, how: Literal["auto", "weights", "hook"] = "auto") -> Iterator[VLM]:
        """With the changes in the model, for as long as the block lasts.

        `weights` writes them into the weights and puts the originals back afterwards, bit for bit, also after an exception or
        Ctrl-C, and warns where rounding to the weights' type takes more than a tenth of the change; `hook` adds `a_i * change_i` in
        float32 to the FFN's output and leaves the weights alone; `auto` takes weights where they are plain numbers that can hold
        the change, else the hook. Edits may be nested and ended in any order. Raises MmnError on another model than the edit's,
        and for `weights` where they cannot be changed."""
        if vlm.hash != self.model_hash:
            raise MmnError(f"This edit belongs to the model {self.model_hash}, not to {vlm.name} ({vlm.hash}): fit it again there.")
        vlm.anatomy.check(self.neurons)
        if self.changes.shape != (len(self.neurons), vlm.hidden):
            raise MmnError(
                f"The changes are {list(self.changes.shape)} and not [{len(self.neurons)}, {vlm.hidden}], a row for each neuron: fit again."
            )
        if how not in ("auto", "weights", "hook"):
            raise MmnError(f"An edit is applied by weights, by hook or auto, not by {how!r}.")
        plain = all(vlm.anatomy.ffns[layer].plain for layer in by_layer(self.neurons))
        if how == "weights" and not plain:
            raise MmnError("The weights of this model are quantised or offloaded and cannot be changed in place: use how='hook'.")
        lost = self.lost(vlm) if plain and how != "hook" else 0.0
        if how == "weights" and lost > LOST:
            warnings.warn(f"Rounding to the weights' type takes {lost:.0%} of this edit: apply it by how='hook'.", stacklevel=3)
        active = _active(vlm)
        if how == "hook" or not plain or (how == "auto" and lost > LOST):
            active.hooks += 1
            try:
                with added(vlm, self.neurons, self.changes):
                    yield vlm
            finally:
                active.hooks -= 1
            return
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

    def lost(self, vlm: VLM) -> float:
        """The share of the change (of its Frobenius norm) that rounding takes when it is written into the weights: 0 in float32 but
        for its last bits, much where a small change meets bfloat16."""
        gone = 0.0
        for layer, group in by_layer(self.neurons).items():
            places, units = (list(each) for each in zip(*group, strict=True))
            columns = vlm.anatomy.ffns[layer].columns
            wanted = columns[:, units].T.float() + self.changes[places].to(columns.device)
            gone += float((wanted.to(columns.dtype).float() - wanted).square().sum())
        return gone**0.5 / max(self.norm, 1e-30)

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
        """Write the edit as one safetensors file, whole or not at all, in folders that are made. Raises MmnError where it cannot be."""
        file = Path(path)
        words = {"model_hash": self.model_hash, "source": self.source, "target": self.target, "report": json.dumps(self.report)}
        tensors = {"neurons": torch.tensor(self.neurons).reshape(-1, 2), "changes": self.changes.contiguous()}
        with whole(file) as part:
            save_file(tensors, part, {"format": FORMAT, **words})
        return file

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Edit:
        """Read an edit. Raises MmnError if there is no such file or it holds no edit."""
        if not isinstance(path, str | PathLike) or not Path(path).is_file():
            raise MmnError(f"There is no edit {path}: check the file's name and folder.")
        try:
            with in_utf8(Path(path)) as there, safe_open(there, "pt") as file:
                words = file.metadata() or {}
                if words.get("format") != FORMAT:
                    raise MmnError(f"{path} is no edit that this version reads ({FORMAT}): fit it again and save it.")
                places, changes = file.get_tensor("neurons"), file.get_tensor("changes")
            if places.dtype != torch.int64 or places.shape[1:] != (2,):
                raise ValueError(f"its neurons are no pairs of whole numbers but {places.dtype} {list(places.shape)}")
            if not changes.is_floating_point() or changes.ndim != 2 or len(changes) != len(places):
                raise ValueError(f"its changes are not one row of floats a neuron but {changes.dtype} {list(changes.shape)}")
            if not changes.double().isfinite().all():
                raise ValueError("its changes are not finite")
            neurons = [Neuron(*pair) for pair in places.tolist()]
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
        keep: Image.Image | Sequence[Image.Image] = (),
        texts: Sequence[str] = (),
        prompt: str | Sequence[str] | None = None,
        prefix: str = PREFIX,
        max_new_tokens: int = 50,
        steps: int = 50,
        rate: float = 1e-2,
        enough: float = 0.9,
        weights: tuple[float, float, float] = (0.1, 1.0, 10.0),
        protect: float | None = None,
        bound: float | None = None,
        basis: dict[int, Tensor] | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Edit:
        """Find changes of `neurons` after which the pictures' captions say `target` where they said `source`; an empty target leaves the
        source out.

        Pictures whose caption does not say `source` are left out; `keep` are pictures whose captions shall stay, `texts` questions
        without a picture whose answers shall. prompt: one, or several that the pictures take in turn. rate: Adam's learning rate;
        enough: the probability at which to stop (above 1: never before `steps`); weights: of the changes' norm, of what is to stay,
        and of saying the target twice.

        protect [ours]: look for the changes where they matter least to what is kept. With C the second moments of the neurons'
        activations there (every position of `keep` and `texts`; one matrix a layer), the changes are `(C / c + protect)^-1/2 D`, c
        the mean of C's diagonal, and Adam works on D: small values come close to MEMIT's ridge and AlphaEdit's null space. bound:
        the largest norm of the changes. basis: for each layer float32 `[neurons, directions]`, the combinations of the neurons
        that may be changed.

        A fit is deterministic. Raises MmnError if no caption says the source, there are no neurons, `steps` or `rate` make no sense,
        `protect` has nothing to keep, or the model is edited."""
        neurons = _checked(vlm, neurons, source, target)
        whole_number("steps", steps, 0)
        whole_number("batch_size", batch_size)
        rate = finite("rate is Adam's learning rate,", rate, above=0)
        bound = None if bound is None else finite("bound is the largest norm of the changes,", bound, above=0)
        if not isinstance(weights, tuple | list) or len(weights) != 3:
            raise MmnError(f"weights are three numbers, of the norm, of what stays and of saying it twice, not {weights!r}.")
        weights = tuple(finite("each of the weights is", each, least=0) for each in weights)  # type: ignore[assignment]
        enough = finite("enough is a probability,", enough)
        if protect is not None and not (finite("protect is", protect) > 0 and (keep or texts)):
            raise MmnError("protect is a number above 0 and needs pictures or texts to keep.")
        started = time.perf_counter()
        prompt = vlm.prompt if prompt is None else prompt
        said, kept = captions(vlm, images, source, keep, texts, prompt, prefix, max_new_tokens, record=False)
        batches = lesson(vlm, said, kept, source, target, batch_size)
        groups = by_layer(neurons)
        for batch in batches:
            batch.begin(vlm, min(groups))
            batch.remember(vlm)
        if basis is None and protect is not None:
            with torch.no_grad(), Moments(vlm, groups) as moments:
                for batch in batches:
                    moments.weigh(batch)
                    batch.logits(vlm)
            basis = {layer: moments.whitened(layer, protect) for layer in groups}
        elif basis is None:
            basis = {layer: torch.eye(len(group)) for layer, group in groups.items()}
        basis = {layer: each.to(vlm.anatomy.device, torch.float32) for layer, each in basis.items()}
        free = {layer: torch.zeros(each.shape[1], vlm.hidden, device=each.device) for layer, each in basis.items()}
        adam = torch.optim.Adam([each.requires_grad_() for each in free.values()], lr=rate)
        order = torch.tensor([place for group in groups.values() for place, _ in group]).argsort().to(vlm.anatomy.device)
        counts = Counts.of(batches)
        curve: list[float] = []
        report: dict[str, Any] = {"way": "gradient", "neurons": len(neurons), "pictures": len(said), "kept": len(kept)}
        report |= {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "prefix": prefix,
            "protect": protect,
            "rate": rate,
        }
        report |= {"enough": enough, "weights": list(weights), "bound": bound, "steps": 0, "losses": curve}
        bar = tqdm(range(steps + 1), desc=f"{source} -> {target}", leave=False, delay=5, disable=not progress)
        for step in bar:
            adam.zero_grad()
            with torch.enable_grad():
                changes = torch.cat([basis[layer] @ free[layer] for layer in groups])[order]
                moved = changes.detach().requires_grad_()
                slope = torch.zeros_like(changes)
                total, lowest = 0.0, 1.0
                for batch in batches:
                    with added(vlm, neurons, moved):
                        loss, probability = loss_of(
                            batch, [logits.log_softmax(-1) for logits in batch.logits(vlm)], counts, weights
                        )
                    slope += torch.autograd.grad(loss, moved)[0]
                    total, lowest = total + float(loss.detach()), min(lowest, probability)
                size = weights[0] * changes.norm()
            curve.append(total + float(size.detach()))
            report |= {"steps": step, "probability": lowest}
            bar.set_postfix(p=f"{lowest:.2f}", refresh=False)
            if lowest >= enough or step == steps:
                break
            with torch.enable_grad():
                ((changes * slope).sum() + size).backward()
            adam.step()
            if bound is not None:
                with torch.no_grad():
                    norm = torch.cat([basis[layer] @ free[layer] for layer in groups]).norm()
                    for each in free.values():
                        each.mul_((bound / norm).clamp(max=1))
        changes = changes.detach().cpu().clone()
        report |= {"norm": float(changes.norm()), "seconds": round(time.perf_counter() - started, 2)}
        return cls(neurons, _finite(changes, curve[-1]), vlm.hash, source, target, report)

    @classmethod
    @torch.no_grad()
    def closed_form(
        cls,
        vlm: VLM,
        images: Image.Image | Sequence[Image.Image],
        source: str,
        target: str,
        neurons: Sequence[Neuron],
        *,
        keep: Image.Image | Sequence[Image.Image] = (),
        texts: Sequence[str] = (),
        prompt: str | Sequence[str] | None = None,
        prefix: str = PREFIX,
        max_new_tokens: int = 50,
        margin: float = 3.0,
        ridge: float = 1e-3,
    ) -> Edit:
        """The least changes of `neurons` that put the target's logit `margin` above the source's where a caption said the source,
        and move it nowhere else: a ridge regression, without a backward pass [ours].

        One row of the regression is one step s of a caption, with the neurons' activations a(s); `a(s) . C` is how far the logits
        shall move along `u_target - u_source`: their distance plus the margin where the source was said, 0 at every other step. The
        changes are `C` times that direction as the final norm lets it through. ridge: relative to the mean square of the
        activations where the source was said. Where the article or the plural changes too, each pair of tokens has a C of its own.
        Exact where nothing follows but the read-out: what later layers make of the change is left out, as are second tokens of the
        target, which no recorded step has seen. Raises MmnError as `fit` does."""
        neurons = _checked(vlm, neurons, source, target)
        if not target.strip():
            raise MmnError("The closed form puts one word in another's place: to leave a word out use Edit.fit.")
        margin, ridge = finite("margin is a difference of logits,", margin), finite("ridge is", ridge, least=0)
        started = time.perf_counter()
        said, kept = captions(vlm, images, source, keep, texts, prompt, prefix, max_new_tokens, record=True)
        traces = [*said, *kept]
        first = dict(zip(map(id, traces), np.cumsum([0, *(len(trace.tokens) for trace in traces)]).tolist(), strict=False))
        # (token, token in its place) to the steps where it changes, counted over all captions
        swaps: dict[tuple[int, int], list[int]] = {}
        for trace in said:
            # Article and noun side by side would be one change, whose first tokens are the articles: so the noun alone, too.
            wordings = {replaced(trace, source, target, fitting) for fitting in (True, False)}
            for step, new in sorted({swap for text in wordings for swap in Row.of(vlm, trace, text).swaps}):
                swaps.setdefault((int(trace.tokens[step]), new), []).append(first[id(trace)] + step)
        activations = torch.stack([torch.cat([t.activations[layer][:, unit] for t in traces]) for layer, unit in neurons], -1)
        stream = torch.cat([trace.stream for trace in traces if trace.stream is not None])
        changes = torch.zeros(len(neurons), vlm.hidden)
        bias = getattr(vlm.anatomy.unembedding, "bias", None)
        for (old, new), steps in swaps.items():
            words = vlm.anatomy.words([new, old])
            along = through_norm(vlm, (words[:1] - words[1:]).expand(len(stream), -1), stream).cpu()
            direction = along.mean(0)
            moved = activations * (along @ direction)[:, None]  # of the logits' difference, by one unit of C
            wanted = torch.zeros(len(stream))
            distance = normed(vlm, stream).cpu() @ (words[1] - words[0]).cpu() * (vlm.anatomy.scale or 1.0)
            distance += 0.0 if bias is None else float(bias[old] - bias[new]) * (vlm.anatomy.scale or 1.0)
            wanted[steps] = distance[steps] + margin
            if not moved[steps].any():
                raise MmnError(
                    f"None of these neurons is active where {source!r} is said, so no change of theirs can matter: take others."
                )
            gram = moved.T @ moved
            gram += ridge * float(moved[steps].square().mean()) * len(steps) * torch.eye(len(neurons))
            changes += torch.linalg.solve(gram, moved.T @ wanted)[:, None] * direction
        report = {"way": "closed form", "neurons": len(neurons), "pictures": len(said), "kept": len(kept), "margin": margin}
        report |= {"ridge": ridge, "prefix": prefix, "steps": 0, "losses": [], "norm": float(changes.norm())}
        report |= {"seconds": round(time.perf_counter() - started, 2)}
        return cls(neurons, _finite(changes), vlm.hash, source, target, report)


def _finite(changes: Tensor, loss: float = 0.0) -> Tensor:
    """The changes. Raises MmnError for a fit that went astray."""
    if not (changes.isfinite().all() and np.isfinite(loss)):
        raise MmnError("The fit ended where changes or loss are no finite numbers: take a smaller rate, or a larger ridge.")
    return changes


def located(vlm: VLM, traces: Sequence[Trace], concept: str, k: int = 10, score: str = "direct") -> list[Neuron]:
    """The k neurons with the highest mean score for a concept over the captions that say it, best first: the rows to edit.

    Raises MmnError if no caption says it."""
    whole_number("k", k)
    said = [trace for trace in traces if says(trace, concept)]
    if not said:
        raise MmnError(f"None of these {len(traces)} captions says {concept!r}: choose other pictures.")
    total = torch.stack([torch.cat(contributions(vlm, trace, concept, score)) for trace in said]).mean(0)
    return neurons_at(vlm.anatomy.neurons, total.topk(min(k, len(total))).indices.tolist())


def _checked(vlm: VLM, neurons: Sequence[Neuron], source: str, target: str) -> list[Neuron]:
    """The neurons, each once. Raises MmnError for what no fit can begin with."""
    if _active(vlm).edits or _active(vlm).hooks:
        raise MmnError("An edit is fitted on the unedited model: leave the block of the edit that is applied first.")
    neurons = list(neurons)
    if not neurons:
        raise MmnError("There are no neurons to edit: give at least one, such as ranking.neurons.")
    vlm.anatomy.check(neurons)
    neurons = list(dict.fromkeys(Neuron(*neuron) for neuron in neurons))
    if target.strip().lower() == source.strip().lower():
        raise MmnError(f"The target {target!r} must be a word other than the source {source!r}.")
    return neurons


# ------------------------------------------------------------------------------------------------------- weights in place


class _Active:
    """The edits now in a model's weights, and the original columns of every layer that they change."""

    def __init__(self) -> None:
        self.edits: list[tuple[Edit]] = []
        self.blocks: list[tuple[Edit, AbstractContextManager[VLM]]] = []  # entered by `Edit.apply`
        self.hooks = 0  # edits that are on by hook
        self.originals: dict[int, dict[int, Tensor]] = {}

    @torch.no_grad()
    def write(self, vlm: VLM, changed: Edit) -> None:
        """Set every column that `changed` names to its original plus the sum of the changes of all edits that are on.

        The sum is taken in float64, where it does not depend on the order, and rounded once."""
        every: dict[Neuron, list[Tensor]] = {}
        for (edit,) in self.edits:
            for neuron, change in zip(edit.neurons, edit.changes, strict=True):
                every.setdefault(neuron, []).append(change.double())
        for layer, group in by_layer(changed.neurons).items():
            weight = vlm.anatomy.ffns[layer].columns
            originals = self.originals.setdefault(layer, {})
            for unit in dict.fromkeys(unit for _, unit in group):
                originals.setdefault(unit, weight[:, unit].clone())
                if on := every.get(Neuron(layer, unit)):
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
    model = vlm.model  # which may be another VLM's, too
    if not hasattr(model, "_active_edits"):
        model._active_edits = _Active()
    return model._active_edits
