"""How much each neuron contributed to a token: the paper's score and others beside it, one signature for all.

The paper's, as its code defines it but with the full activation: `score(l, i; t) = a_i(s) * <w_i, u_t>`, where `a_i(s)` is what the
FFN's output projection receives from the neuron at the step s that produces token t, `w_i` its write and `u_t` the token's row of the
unembedding. With no bias the scores of a layer add up to `u_t . FFN(x)` exactly. Sums are taken in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from mmn.anatomy import Neuron
from mmn.errors import MmnError
from mmn.nouns import Noun
from mmn.trace import Trace
from mmn.vlm import VLM

Score = Callable[[VLM, Trace, Sequence[Noun]], list[Tensor]]


def _project(vlm: VLM, directions: Tensor) -> list[Tensor]:
    """`<w_i, direction>` for every neuron, a list over layers of `[directions, neurons]`: one product a layer for all directions."""
    return [
        (directions.to(projection.weight.device, projection.weight.dtype) @ projection.weight.detach()).float().cpu()
        if projection.weight.dtype == torch.float32
        else (directions.to(projection.weight.device) @ projection.weight.detach().float()).cpu()
        for projection in vlm.anatomy.projections
    ]


def _unembed(vlm: VLM, nouns: Sequence[Noun]) -> Tensor:
    """The nouns' rows of the unembedding, float32 `[nouns, hidden]`."""
    return vlm.anatomy.unembedding.weight.detach()[[noun.token for noun in nouns]].float()


def _at_steps(trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """Each noun's activations, a list over layers of `[nouns, neurons]`."""
    if not trace.activations:
        raise MmnError("This caption was made with record=False; make it again with record=True to rank its neurons.")
    return [layer[[noun.step for noun in nouns]] for layer in trace.activations]


def direct(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """The paper's score with the full activation."""
    return [a * w for a, w in zip(_at_steps(trace, nouns), _project(vlm, _unembed(vlm, nouns)), strict=True)]


def centred(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """Direct, less what the neuron adds to all tokens alike, which softmax ignores."""
    directions = _unembed(vlm, nouns) - vlm.anatomy.unembedding.weight.detach().float().mean(dim=0)
    return [a * w for a, w in zip(_at_steps(trace, nouns), _project(vlm, directions), strict=True)]


def norm_aware(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """Centred, read through the final norm with its scale frozen at the generating position: in units of logits."""
    directions = _unembed(vlm, nouns) - vlm.anatomy.unembedding.weight.detach().float().mean(dim=0)
    scales = []
    for noun in nouns:
        seen: dict[str, Tensor] = {}
        handle = vlm.anatomy.final_norm.register_forward_hook(lambda _, args, out, seen=seen: seen.update(x=args[0], y=out))
        try:
            with torch.inference_mode():
                vlm.model(**vlm.replay_ids(trace, noun.step), use_cache=False)
        finally:
            handle.remove()
        scales.append((seen["y"][0, -1].float() / seen["x"][0, -1].float()).clone())
    directions = directions * torch.stack(scales).to(directions.device)
    return [a * w for a, w in zip(_at_steps(trace, nouns), _project(vlm, directions), strict=True)]


def activation(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """The activation alone, whatever the neuron writes."""
    return [layer.clone() for layer in _at_steps(trace, nouns)]


def gate_only(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """As the paper's code was released: the activation function's output in the place of the full activation."""
    gates = vlm.anatomy.gates
    if any(gate is None for gate in gates):
        raise MmnError("This model's FFNs have no activation module of their own, so the score as released cannot be taken.")
    kept: list[dict[int, Tensor]] = [{} for _ in gates]
    for noun in nouns:
        handles = [
            gate.register_forward_hook(lambda _, __, out, keep=keep, step=noun.step: keep.__setitem__(step, out[0, -1]))
            for gate, keep in zip(gates, kept, strict=True)
            if gate is not None
        ]
        try:
            with torch.inference_mode():
                vlm.model(**vlm.replay_ids(trace, noun.step), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    writes = _project(vlm, _unembed(vlm, nouns))
    return [torch.stack([keep[noun.step] for noun in nouns]).float().cpu() * w for keep, w in zip(kept, writes, strict=True)]


def gradient(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """Gradient times activation at the generating position: `a_i * d log p(t) / d a_i`, the total effect to first order."""
    rows = []
    for noun in nouns:
        inputs: list[Tensor] = []
        handles = [projection.register_forward_pre_hook(_leaf(inputs)) for projection in vlm.anatomy.projections]
        try:
            with torch.enable_grad():
                logits = vlm.model(**vlm.replay_ids(trace, noun.step), use_cache=False).logits[0, -1]
                grads = torch.autograd.grad(logits.float().log_softmax(-1)[noun.token], inputs)
        finally:
            for handle in handles:
                handle.remove()
        rows.append([(g[0, -1] * a.detach()[0, -1]).float().cpu() for g, a in zip(grads, inputs, strict=True)])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def _leaf(inputs: list[Tensor]):  # noqa: ANN202
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        inputs.append(x)
        return (x, *args[1:])

    return hook


SCORES: dict[str, Score] = {
    "direct": direct,
    "gate_only": gate_only,
    "centred": centred,
    "norm_aware": norm_aware,
    "activation": activation,
    "gradient": gradient,
}


def contributions(vlm: VLM, trace: Trace, noun: str | Noun, *, score: str = "direct") -> list[Tensor]:
    """Every neuron's score for one noun of a caption: a list over layers of float32 `[neurons]`, signed.

    Raises MmnError for a noun the caption does not say, an unknown score, or a caption made without recording."""
    return [layer[0] for layer in _scores(vlm, trace, [trace.noun(noun)], score)]


def _scores(vlm: VLM, trace: Trace, nouns: Sequence[Noun], score: str) -> list[Tensor]:
    if score not in SCORES:
        raise MmnError(f"There is no score {score!r}; choose one of {', '.join(SCORES)}.")
    return SCORES[score](vlm, trace, nouns)


@dataclass(frozen=True)
class NeuronRanking:
    """The neurons of highest score for one noun, best first.

    scores, activations: floats, one for each of `neurons`. score: the name of the score that ranked them."""

    noun: Noun
    neurons: list[Neuron]
    scores: list[float]
    activations: list[float]
    score: str

    def table(self) -> pd.DataFrame:
        """One row a neuron: rank (from 1), layer, unit, score, activation."""
        layers, units = zip(*self.neurons, strict=True)
        columns = {"layer": layers, "unit": units, "score": self.scores, "activation": self.activations}
        return pd.DataFrame(columns, index=pd.RangeIndex(1, len(self.neurons) + 1, name="rank"))


def rank(vlm: VLM, trace: Trace, noun: str | Noun | None = None, *, k: int = 10, score: str = "direct"):  # noqa: ANN201
    """The `k` neurons of highest signed score over all layers: `NeuronRanking` for one noun, for None a dict of them over all the
    caption's nouns by lemma, with one product a layer for all.

    Raises MmnError for a noun the caption does not say, an unknown score, or a k the model is too small for."""
    if not 1 <= k <= vlm.anatomy.total:
        raise MmnError(f"k is {k}; it must be between 1 and the model's {vlm.anatomy.total} neurons.")
    nouns = trace.nouns if noun is None else [trace.noun(noun)]
    if not nouns:
        return {}
    scores = _scores(vlm, trace, nouns, score)
    values, flat = torch.cat(scores, dim=1).topk(k, dim=1)
    acts = torch.cat(_at_steps(trace, nouns), dim=1).gather(1, flat)
    edges = torch.tensor(vlm.anatomy.neurons).cumsum(0)
    layers = torch.searchsorted(edges, flat, right=True)
    units = flat - torch.cat([torch.zeros(1, dtype=edges.dtype), edges])[layers]
    found = {}
    for row, each in enumerate(nouns):
        neurons = [Neuron(*pair) for pair in zip(layers[row].tolist(), units[row].tolist(), strict=True)]
        found[each.lemma] = NeuronRanking(each, neurons, values[row].tolist(), acts[row].tolist(), score)
    return found if noun is None else found[nouns[0].lemma]
