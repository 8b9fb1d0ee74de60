"""The causal oracle: what each neuron truly does to a noun, against which every score is measured [ours].

A neuron's *effect* at a moment (the position that produces a noun's token t) is `log p(t)` of the model as it is, less `log p(t)` with
the neuron's activation set to zero at that position: nats, positive where the neuron speaks for the noun. Beside it the same difference
of the logit and of the centred logit (the logit less its mean over the vocabulary, which softmax ignores). What stands before the
moment is read once; its keys and values serve all neurons, which are zeroed in many copies of one token. Where the model's code allows
it, the copies stand side by side at one position, each blind to the others, and share one set of keys and values.

Areas under faithfulness curves follow MIB (Mueller et al. 2025, arXiv 2504.13151), with neurons at one position for its components and
zero for its counterfactual."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmn import metrics
from mmn.contribution import SCORES, Scorer
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.hooks import Removable, hooked
from mmn.intervene import copied, zero
from mmn.nouns import Noun
from mmn.trace import Trace
from mmn.vlm import VLM

BATCH = 128  # neurons zeroed at once
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of all neurons, kept or removed; MIB's
LARGEST = 0.01  # of all neurons: those with the largest effects are what AUROC asks for
TRIED = 16  # copies side by side, to see whether a model's code allows it

# The longest text for which it does, and the shortest for which it does not, as where attention reaches no further than a window.
_PACKS: weakref.WeakKeyDictionary[VLM, tuple[float, float]] = weakref.WeakKeyDictionary()


class Moment:
    """The position that produces a noun's token, with what stands before it read once.

    layers: neurons of each layer. token: the noun's token. activations: for each layer float32 `[neurons]` there."""

    def __init__(self, vlm: VLM, trace: Trace, noun: str | Noun):
        chosen = trace.noun(noun)
        self.vlm, self.token = vlm, chosen.token
        self.layers = vlm.anatomy.neurons
        self.activations = list(trace.at([chosen.step])[0].split(self.layers))
        inputs = vlm.replay(trace, chosen.step)
        ids = inputs["input_ids"]
        before = {k: v[:, :-1] if v.shape[:2] == ids.shape and k != "pixel_values" else v for k, v in inputs.items()}
        with torch.no_grad():
            self._reader, self._cache = _read(vlm, before)
        self._last, self._length = ids[:, -1:], vlm.image_positions(inputs).shape[1]
        self._packs()  # now, while no watcher is on

    def logits(self, rows: int, handles: Sequence[Any] = (), *, grad: bool = False) -> Tensor:
        """Logits `[rows, vocabulary]` of so many copies of the moment, float32, with the watchers `handles` (layer, watcher) on, which see
        activations `[rows, 1, neurons]`."""
        packed = self._packs()
        with torch.set_grad_enabled(grad), hooked(_watched(self.vlm, handles, packed)):
            return self._packed(rows) if packed else self._repeated(rows)

    def _repeated(self, rows: int) -> Tensor:
        """The copies as a batch: as many copies of the keys and values, which any model can read."""
        cache = copy.deepcopy(self._cache)
        try:
            cache.batch_repeat_interleave(rows)
        except AttributeError as error:  # of a kind of layer that is no attention
            raise MmnError(
                f"What {self.vlm.name} keeps of what it has read cannot be copied for many neurons at once: choose another model for the "
                "causal oracle."
            ) from error
        mask = self._last.new_ones(rows, self._length)
        given = {"input_ids": self._last.expand(rows, 1), "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        return self._reader(**given).logits[:, -1].float()

    def _packed(self, rows: int) -> Tensor:
        """The copies side by side in one sequence, all at the same position; each sees what stands before and itself alone."""
        before = self._length - 1
        like = self.vlm.anatomy.unembedding.weight
        dtype = like.dtype if like.is_floating_point() else torch.float32
        mask = torch.full((rows, before + rows), torch.finfo(dtype).min, dtype=dtype, device=self._last.device)
        mask[:, :before] = 0
        mask[:, before:].fill_diagonal_(0)
        places = self._last.new_full((1, rows), before)
        cache = copy.deepcopy(self._cache)
        given = {"input_ids": self._last.expand(1, rows), "attention_mask": mask[None, None], "position_ids": places}
        return self._reader(**given, past_key_values=cache, use_cache=True).logits[0].float()

    @torch.no_grad()
    def _packs(self) -> bool:
        """Whether the model gives copies side by side the logits of one alone: tried at each new length, not read off its code."""
        longest, shortest = _PACKS.get(self.vlm, (0, float("inf")))
        if longest < self._length < shortest:
            alone = self._repeated(1)
            try:
                together = self._packed(TRIED)
                same = bool(((together - alone).abs().amax() <= 1e-4 * alone.abs().amax()).item())
            except Exception:  # its code has another idea of masks, positions or caches, each with an error of its own
                same = False
            longest, shortest = (self._length, shortest) if same else (longest, self._length)
            _PACKS[self.vlm] = longest, shortest
        return self._length <= longest

    def without(self, kept: Tensor) -> Tensor:
        """Logits `[rows, vocabulary]` with the activations multiplied by `kept` `[rows, neurons of all layers]`."""
        parts = kept.split(self.layers, -1)
        changed = [layer for layer, part in enumerate(parts) if not bool((part == 1).all())]

        def watcher(layer: int) -> Any:
            return lambda seen: seen * parts[layer][:, None].to(seen.device, seen.dtype)

        return self.logits(len(kept), [(layer, watcher(layer)) for layer in changed])

    def effects(self, layer: int, units: Tensor, batch: int = BATCH) -> Tensor:
        """What silencing some neurons of a layer, one by one, takes from each of `measures`: `[units, 3]`."""
        found = [torch.zeros(0, 3)]
        for some in units.split(batch - 1):

            def silence(seen: Tensor, some: Tensor = some) -> Tensor:
                changed = seen.clone()
                changed[torch.arange(1, len(some) + 1), -1, some] = 0
                return changed

            # Row 0 of each batch is the model as it is, so that rounding of a batch's size cancels.
            measured = self.measures(self.logits(len(some) + 1, [(layer, silence)]))
            found.append(measured[0] - measured[1:])
        return torch.cat(found)

    def measures(self, logits: Tensor) -> Tensor:
        """log p, logit and centred logit of the noun's token: `[rows, 3]`."""
        own = logits[:, self.token]
        return torch.stack([own - logits.logsumexp(-1), own, own - logits.mean(-1)], -1).cpu()


def _read(vlm: VLM, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """What goes on from a cache of keys and values, and that cache after `inputs`: the model itself or, where it takes none, the model of
    words inside it, as in InstructBLIP. Raises MmnError for a model without one."""
    found: list[tuple[nn.Module, Any]] = []  # from the inside to the outside

    def keep(module: nn.Module, _: Any, out: Any) -> None:
        if getattr(out, "logits", None) is not None and getattr(out, "past_key_values", None) is not None:
            found.append((module, out.past_key_values))

    with hooked(module.register_forward_hook(keep) for module in vlm.model.modules() if isinstance(module, PreTrainedModel)):
        vlm.model(**inputs, use_cache=True)
    if not found:
        raise MmnError(
            f"{vlm.name} keeps no keys and values of what it has read, which the causal oracle needs: choose another model."
        )
    return found[-1]


def _watched(vlm: VLM, handles: Sequence[Any], packed: bool) -> Any:
    for layer, watcher in handles:
        handle: Removable = vlm.anatomy.ffns[layer].watch(_turned(watcher) if packed else watcher)
        yield handle


def _turned(watcher: Any) -> Any:
    """A watcher of rows, for copies side by side `[1, rows, neurons]`."""

    def watch(seen: Tensor) -> Tensor | None:
        changed = watcher(seen.transpose(0, 1))
        return None if changed is None else changed.transpose(0, 1)

    return watch


@dataclass(frozen=True)
class Effects:
    """Every neuron's effect on one noun, float32 `[neurons of all layers]` each: of log p (nats), logit and centred logit."""

    log_p: Tensor
    logit: Tensor
    centred: Tensor


@torch.no_grad()
def oracle(vlm: VLM, trace: Trace, noun: str | Noun, *, moment: Moment | None = None, batch: int = BATCH) -> Effects:
    """Zero every neuron at the position that produces the noun, one by one, all else as it was.

    Neurons that are silent there (activation 0) have effect 0 and are not run. Raises MmnError as `Moment` does."""
    moment = moment or Moment(vlm, trace, noun)
    effects = torch.zeros(sum(moment.layers), 3)
    start = 0
    for layer, count in enumerate(moment.layers):
        units = moment.activations[layer].nonzero()[:, 0]
        effects[start + units] = moment.effects(layer, units, batch)
        start += count
    return Effects(*effects.T)


# ------------------------------------------------------------------------------------- gradients on the prefix that was read once


def gradient_log_p(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """`a_i d log p(t)/da_i` at the generating position, one token forward and backward: the strongest first-order baseline, since the
    effect is one of log p."""
    return _by_gradient(vlm, trace, nouns, 0)


def integrated_gradients(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """Integrated gradients of log p(t) (Sundararajan et al. 2017) at the generating position: all layers' activations go together from
    zero to what they are, in 16 steps (midpoints), one batch of one token. Over all neurons the scores add up to what all of them
    together do to log p(t)."""
    return _by_gradient(vlm, trace, nouns, 16)


def _by_gradient(vlm: VLM, trace: Trace, nouns: Sequence[Noun], steps: int) -> list[Tensor]:
    found = [slopes(Moment(vlm, trace, noun), steps) for noun in nouns]
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


@torch.inference_mode(False)
def slopes(moment: Moment, steps: int = 0) -> list[Tensor]:
    """Activation times gradient of log p, for each layer float32 `[neurons]`: at the activations themselves, or averaged over `steps`
    points on the way to them. What stands before the moment is not read again."""
    points = (torch.arange(steps) + 0.5) / steps if steps else torch.ones(1)
    # A layer that the pass leaves out, as Mllama does without a picture, has activations of 0, and a gradient of 0.
    leaves = [torch.zeros(1, 1, count, requires_grad=True) for count in moment.layers]

    def put(layer: int) -> Any:
        def watch(seen: Tensor) -> Tensor:
            if steps:  # every layer starts anew from its share
                leaves[layer] = (points[:, None, None] * moment.activations[layer]).to(seen).requires_grad_()
            else:
                leaves[layer] = seen if seen.requires_grad else seen.detach().requires_grad_()
            return leaves[layer]

        return watch

    logits = moment.logits(len(points), [(layer, put(layer)) for layer in range(len(leaves))], grad=True)
    log_p = logits.log_softmax(-1)[:, moment.token].sum()
    gradients = torch.autograd.grad(log_p, leaves, materialize_grads=True, allow_unused=True)
    return [a * g[:, -1].float().mean(0).cpu() for a, g in zip(moment.activations, gradients, strict=True)]


@torch.no_grad()
def oracle_everywhere(vlm: VLM, trace: Trace, noun: str | Noun, neurons: Sequence[Neuron], batch: int = 32) -> Tensor:
    """The effect on log p, float32 `[neurons]` in nats, of zeroing each of some neurons at *all* positions, picture and prompt
    included. Without a cache: the whole sequence is read once a neuron."""
    chosen = trace.noun(noun)
    inputs = vlm.replay(trace, chosen.step)
    found = []
    for start in range(0, len(neurons), batch - 1):
        some = [[], *([neuron] for neuron in neurons[start : start + batch - 1])]
        with copied(vlm, len(some)), zero(vlm, some):
            logits = vlm.model(**inputs, use_cache=False).logits[:, -1].float()
        log_p = logits.log_softmax(-1)[:, chosen.token].cpu()
        found.append(log_p[0] - log_p[1:])
    return torch.cat(found)


# ----------------------------------------------------------------------------------------------------- how well a score does


def agreement(scores: Tensor, effect: Tensor, ks: Sequence[int] = (10, 50)) -> dict[str, float]:
    """A score `[neurons]` against the true effect `[neurons]`: `spearman` over all neurons; `p10`, `p50`, ...: the share of the k
    neurons of highest score that are among the k of largest effect; `auroc`: whether a neuron is among the 1 % of largest
    effects. A score without spread has Spearman 0."""
    if scores.shape != effect.shape:
        raise MmnError(f"There are {tuple(scores.shape)} scores and {tuple(effect.shape)} effects: give one of each a neuron.")
    order, truth = scores.argsort(descending=True, stable=True), effect.argsort(descending=True, stable=True)
    largest = torch.zeros(len(effect), dtype=torch.bool)
    largest[truth[: max(1, round(LARGEST * len(effect)))]] = True
    flat = bool((scores == scores[0]).all() or (effect == effect[0]).all())
    found = {"spearman": 0.0 if flat else float(spearmanr(scores, effect)[0])}
    for k in ks:
        found[f"p{k}"] = len(set(order[:k].tolist()) & set(truth[:k].tolist())) / k
    return found | {"auroc": float(roc_auc_score(largest, scores))}


@torch.no_grad()
def curves(moment: Moment, scores: Tensor, shares: Sequence[float] = SHARES) -> pd.DataFrame:
    """log p of the noun with the neurons of highest score alone kept at the moment (`kept`) and with them removed (`removed`), nats,
    for each share of all neurons, 0 first."""
    total = len(scores)
    order = scores.argsort(descending=True, stable=True)
    counts = [0, *(max(1, round(share * total)) for share in shares)]
    keep = torch.zeros(len(counts), total)
    for row, count in enumerate(counts):
        keep[row, order[:count]] = 1
    logp = moment.measures(moment.without(torch.cat([keep, 1 - keep])))[:, 0].numpy()
    return pd.DataFrame({"share": [0.0, *shares], "kept": logp[: len(counts)], "removed": logp[len(counts) :]})


def areas(curve: pd.DataFrame) -> dict[str, float]:
    """Areas of a faithfulness curve, after MIB: with `f = (log p(kept) - log p(none)) / (log p(all) - log p(none))` over the share of
    neurons, `cpr` is the area under f (more is better) and `cmd` that of |1 - f| (less is better); `removal` is the mean loss of
    log p over the shares up to 2 %, in nats (more is better)."""
    none, whole = curve["kept"].iloc[0], curve["removed"].iloc[0]
    faithful = (curve["kept"] - none) / (whole - none)
    few = curve["share"].between(1e-9, 0.02)
    return {
        "cpr": float(np.trapezoid(faithful, curve["share"])),
        "cmd": float(np.trapezoid((1 - faithful).abs(), curve["share"])),
        "removal": float((whole - curve["removed"][few]).mean()),
    }


ALL: dict[str, Scorer] = SCORES | {"gradient_log_p": gradient_log_p, "integrated_gradients": integrated_gradients}


def compare(vlm: VLM, trace: Trace, noun: str | Noun, scores: Mapping[str, Scorer] = ALL) -> pd.DataFrame:
    """Every score against the oracle for one noun: one row a score with `agreement`, `areas`, and `ms`, its time in milliseconds
    (for this noun alone, not counting the caption); `spearman_logit`, `spearman_centred`: against those effects."""
    chosen = trace.noun(noun)
    moment = Moment(vlm, trace, chosen)
    effects = oracle(vlm, trace, chosen, moment=moment)
    rows = {}
    for name, scorer in scores.items():
        start = time.perf_counter()
        try:
            flat = torch.cat([layer[0] for layer in scorer(vlm, trace, [chosen])])
        except MmnError:  # a model whose gate is no module of its own has no `gate_only`
            continue
        spent = 1000 * (time.perf_counter() - start)
        row = agreement(flat, effects.log_p) | areas(curves(moment, flat))
        row |= {f"spearman_{what}": agreement(flat, getattr(effects, what), ())["spearman"] for what in ("logit", "centred")}
        rows[name] = row | {"ms": spent}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("score")


def difference(table: pd.DataFrame, one: str, other: str, column: str) -> metrics.Interval:
    """How much larger a measure is for one score than for another, in rows of the table `oracle` (columns key, score and the measure):
    the mean over scenes of the difference of the scene's means, its interval over scenes. Raises MmnError if no scene has both."""
    by_scene = table.pivot_table(index="key", columns="score", values=column)
    missing = [name for name in (one, other) if name not in by_scene]
    if missing:
        raise MmnError(f"The table has no score {missing[0]!r}; it has: {', '.join(map(str, by_scene.columns))}.")
    return metrics.bootstrap((by_scene[one] - by_scene[other]).dropna().to_numpy(), metrics.mean)
