"""Score neurons for a token: the paper's score and the baselines beside it, all with one signature.

Pan et al. (the released code): `score(l, i; t) = a_i(s*) <w_i, u_t>`, activation at the step that produces the token times the
inner product of the neuron's write with the token's unembedding row; signed, no final norm. Over all neurons of a layer the
scores add up to `u_t . FFN(x)` (without the projection's bias)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from mmn.errors import MmnError
from mmn.ffn import Neuron, neurons_at
from mmn.hooks import hooked
from mmn.nouns import Noun
from mmn.trace import Trace
from mmn.vlm import VLM
from mmn.weights import device, matrix

if TYPE_CHECKING:
    import pandas as pd

Scorer = Callable[[VLM, Trace, Sequence[Noun]], list[Tensor]]
Reader = Callable[[int, Tensor], Tensor]

RIVALS = 32  # likeliest words that `readout` follows one by one
BATCH = 64  # nouns that `rank_all` ranks at once: a float32 each for every neuron


@dataclass(frozen=True)
class NeuronRanking:
    """The neurons of highest score for one noun, best first.

    scores: floats, in the units of the score (logits for direct, centred and norm_aware); activations: floats at the step that
    produced the noun's token. score: the name of the score that ranked them."""

    noun: Noun
    neurons: list[Neuron]
    scores: list[float]
    activations: list[float]
    score: str

    def __len__(self) -> int:
        return len(self.neurons)

    def __getitem__(self, place: Any) -> Any:  # which is all it takes to stand for its neurons wherever some are asked for
        return self.neurons[place]

    def table(self) -> pd.DataFrame:
        """One row a neuron: rank (from 1), layer, unit, score, activation."""
        import pandas as pd  # half a second, which who wants no table need not wait for

        layers, units = zip(*self.neurons, strict=True)
        columns = {"layer": layers, "unit": units, "score": self.scores, "activation": self.activations}
        return pd.DataFrame(columns, index=pd.RangeIndex(1, len(self) + 1, name="rank"))

    def __str__(self) -> str:
        return f"{self.noun.lemma}: " + ", ".join(map(str, self.neurons))


# ------------------------------------------------------------------------------------------------- scores without gradients


def _at(trace: Trace, nouns: Sequence[Noun]) -> tuple[Tensor, ...]:
    """Activations at the nouns' steps, for each layer float32 `[nouns, neurons]`."""
    return trace.at([noun.step for noun in nouns]).split(trace.sizes, -1)


def _products(vlm: VLM, activations: Sequence[Tensor], directions: Tensor) -> list[Tensor]:
    """Activation times inner product with one direction a noun `[nouns, hidden]`, where each layer's weights are: one product a layer
    reads them once."""
    inner = [ffn.read(directions) for ffn in vlm.anatomy.ffns]  # all are asked for before the first is waited for
    return [each * active.to(each.device) for each, active in zip(inner, activations, strict=True)]


def _projected(vlm: VLM, activations: Sequence[Tensor], directions: Tensor) -> list[Tensor]:
    """The same on the CPU."""
    return [each.cpu() for each in _products(vlm, activations, directions)]


def direct(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """`a_i <w_i, u_t>`, Pan et al. with the full product as activation."""
    return _projected(vlm, _at(trace, nouns), vlm.anatomy.words([noun.token for noun in nouns]))


def centred(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """The direct score without what the neuron adds to every token alike, which softmax ignores: `u_t` less the mean row
    [ours]."""
    weight = matrix(vlm.anatomy.unembedding)
    mean = weight.mean(0, dtype=torch.float32)
    return _projected(vlm, _at(trace, nouns), vlm.anatomy.words([noun.token for noun in nouns]) - mean)


def norm_aware(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """The direct score through the final norm, its scale frozen as it was at the step: `u_t` becomes `gain * u_t / rms`
    [ours]."""
    words = vlm.anatomy.words([noun.token for noun in nouns])
    return _projected(vlm, _at(trace, nouns), through_norm(vlm, words, trace.stream_at([noun.step for noun in nouns])))


def log_probability(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """The direct score with `log p(t)` in the logit's place, to first order: `a_i <w_i, n_t>` with n_t of `towards_log_p` [ours].
    Unlike `centred` it takes off what goes to the noun's *rivals*. Reads the vocabulary's rows once."""
    return _projected(vlm, _at(trace, nouns), towards_log_p(vlm, trace, nouns))


@torch.no_grad()
def towards_log_p(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> Tensor:
    """The direction in the final norm's input that raises `log p(t)` most, its scale frozen: `u_t - sum_v p(v) u_v` through the norm,
    float32 `[nouns, hidden]`; the gradient of log p in closed form but for the norm's scale. Raises MmnError where the stream was not
    recorded or the model bends its logits."""
    stream, logits = _moments(vlm, trace, nouns)
    words = vlm.anatomy.words([noun.token for noun in nouns])
    own = torch.tensor([[noun.token] for noun in nouns], device=logits.device)
    rest, mean = _others(vlm, logits.softmax(-1), own)
    return through_norm(vlm, rest.to(words.device) * (words - mean.to(words.device)), stream)


def _others(vlm: VLM, p: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of all words but some `own` `[nouns, n]`, `[nouns, 1]`, and the mean of those words' rows by probability,
    `[nouns, hidden]`: the words left out are left out before the product, whose rounding in half precision may exceed all the rest."""
    weight = matrix(vlm.anatomy.unembedding)
    others = p.scatter(-1, own, 0)
    rest = others.sum(-1, keepdim=True).clamp(min=1e-30)
    return rest, ((others / rest).to(weight) @ weight).float()


def _moments(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> tuple[Tensor, Tensor]:
    """At each noun's step the final norm's input and the logits, float32 `[nouns, hidden]` and `[nouns, vocabulary]`."""
    stream = trace.stream_at([noun.step for noun in nouns]).to(vlm.anatomy.device)
    return stream, read_out(vlm, stream)


@torch.no_grad()
def read_out(vlm: VLM, stream: Tensor) -> Tensor:
    """The final norm and the unembedding applied to vectors of the stream `[n, hidden]`: logits, float32 `[n, vocabulary]`, where the
    unembedding is. Raises MmnError for a model that bends its logits."""
    if vlm.anatomy.scale is None:
        raise MmnError(
            "This model bends its logits, as by a soft cap, so they are not read off the stream: take a score that runs the model."
        )
    weight = matrix(vlm.anatomy.unembedding)
    return vlm.anatomy.unembedding(normed(vlm, stream).to(weight.device, weight.dtype)).float() * vlm.anatomy.scale


def readout(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """What log p(t) loses, nats, when the neuron's write is taken out of the final norm's input and the rest of the stream stays: not a
    slope but the difference [ours]. Later layers are left out, so it is the true effect for neurons of the last layer, where their
    writes reach the stream as they are (no norm or factor behind the FFN). Raises MmnError where the model bends its logits."""
    ffns = vlm.anatomy.ffns

    def squares(layer: int, units: Tensor) -> Tensor:
        return ffns[layer].write(units.tolist()).square().sum(-1).cpu()

    return readout_of(vlm, trace, nouns, lambda layer, directions: ffns[layer].read(directions).cpu(), squares)


@torch.no_grad()
def readout_of(vlm: VLM, trace: Trace, nouns: Sequence[Noun], read: Reader, squares: Reader) -> list[Tensor]:
    """The same for writes that reach the final norm changed: `read(layer, directions [n, hidden])` is their inner product with some
    directions, `[n, neurons]`, `squares(layer, units)` the squared lengths of some, `[units]`. Silent neurons are left out.

    With s the norm's input and d a neuron's part in it, word v's logit `z_v = u_v . gain s / |s|` becomes that of s - d, whose length
    follows from `|s|^2 - 2 s.d + |d|^2`. The RIVALS likeliest words are followed one by one and all others as one of their mean (by
    probability), which keeps the cost at one product with so many directions a layer. The norm's epsilon is left out."""
    stream, logits = _moments(vlm, trace, nouns)
    count = len(nouns)
    p, first = logits.softmax(-1), logits.clone()
    first[range(count), [noun.token for noun in nouns]] = float("inf")  # the noun itself comes first
    followed = first.topk(min(RIVALS + 1, p.shape[-1] - 1)).indices
    own = p.gather(-1, followed)
    rest, mean = _others(vlm, p, followed)
    words = vlm.anatomy.words(followed.flatten()).unflatten(0, followed.shape)
    vectors = torch.cat([words, mean.to(words.device)[:, None]], 1)
    size = vectors.shape[1]
    directions = through_norm(vlm, vectors.flatten(0, 1), stream.repeat_interleave(size, 0)).unflatten(0, (count, size))
    mass = torch.cat([own, rest], -1).double().log().cpu()[..., None]
    stream = stream.to(directions.device)
    before = (directions * stream[:, None]).sum(-1).double().cpu()[..., None]
    centre = vlm.anatomy.final_norm is not None and _norm_gain(vlm)[1]
    line = stream - stream.mean(-1, keepdim=True) if centre else stream
    asked = torch.cat([directions.flatten(0, 1), line, torch.ones_like(line[:1])])
    length = line.square().sum(-1).double().cpu()[:, None]
    found = []
    for layer, fired in enumerate(_at(trace, nouns)):
        losses = torch.zeros_like(fired)
        found.append(losses)
        if not len(units := fired.any(0).nonzero()[:, 0]):
            continue
        told, a = read(layer, asked)[:, units].double(), fired[:, units].double()
        moved = told[: count * size].unflatten(0, (count, size)) * a[:, None]
        if vlm.anatomy.final_norm is None:
            ratio = torch.ones_like(a)
        else:
            square = squares(layer, units).double() - (told[-1].square() / vlm.hidden if centre else 0)
            ratio = (length / (length - 2 * a * told[count * size : -1] + a.square() * square)).sqrt()
        change = (ratio[:, None] - 1) * before - ratio[:, None] * moved
        loss = (mass + change).logsumexp(1) - mass.logsumexp(1) - change[:, 0]
        losses[:, units] = torch.where(a == 0, 0, loss).float()
    return found


def through_norm(vlm: VLM, directions: Tensor, stream: Tensor) -> Tensor:
    """Directions of the unembedding's input `[n, hidden]` as directions of the final norm's input, its scale frozen as it is at
    `stream` `[n, hidden]`: adding x to the stream moves the logits by `x . direction`, to first order but for the scale's own change.
    Where the model bends its logits: the logits before that."""
    directions = directions * (vlm.anatomy.scale or 1.0)
    if vlm.anatomy.final_norm is None:
        return directions
    stream = stream.to(directions.device)
    gain, centre = _norm_gain(vlm)
    gain = gain.to(stream.device)
    scaled = gain * (stream - stream.mean(-1, keepdim=True) if centre else stream)
    out = normed(vlm, stream) - normed(vlm, torch.zeros_like(stream))
    directions = directions * gain * (out.norm(dim=-1, keepdim=True) / scaled.norm(dim=-1, keepdim=True))
    return directions - directions.mean(-1, keepdim=True) if centre else directions


@torch.no_grad()
def normed(vlm: VLM, vectors: Tensor) -> Tensor:
    """Vectors of the stream through the final norm, where it is and in its dtype, as they are where there is none: float32 on the
    vectors' own device."""
    norm = vlm.anatomy.final_norm
    if norm is None:
        return vectors
    like = next(norm.parameters())
    return norm(vectors.to(device(norm), like.dtype)).float().to(vectors.device)


def _norm_gain(vlm: VLM) -> tuple[Tensor, bool]:
    """The final norm's gain up to a factor, float32 `[hidden]`, and whether it takes the mean off: read from what it does, not
    its code."""
    probe = torch.ones(1, vlm.hidden, device=vlm.anatomy.device)
    probe[:, ::2] = -1
    probe[:, -1] *= 3  # so that its mean is not zero
    bias = normed(vlm, torch.zeros_like(probe))
    out = normed(vlm, probe) - bias
    centre = torch.allclose(normed(vlm, probe + 5) - bias, out, rtol=1e-2, atol=1e-3)
    return (out / (probe - probe.mean() if centre else probe))[0], centre


def activation(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """`|a_i|` alone, the same for every token: what the weights add to a ranking shows beside it."""
    return [active.abs() for active in _at(trace, nouns)]


def write_norm(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """`|a_i| ||w_i||`, how much the neuron writes, whatever it says."""
    return [
        active.abs() * ffn.write(range(ffn.neurons)).norm(dim=-1).cpu()
        for active, ffn in zip(_at(trace, nouns), vlm.anatomy.ffns, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------------ controls


def random(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """A number between 0 and 1 for each neuron, the same whenever the same token is asked for at the same step."""
    flat = torch.stack([torch.rand(vlm.anatomy.total, generator=_generator(noun)) for noun in nouns])
    return list(flat.split(vlm.anatomy.neurons, -1))


def same_layer(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """The direct score shuffled within each layer: right about the layers, ignorant of the neurons."""
    scores = direct(vlm, trace, nouns)
    shuffled = [torch.empty_like(layer) for layer in scores]
    for row, noun in enumerate(nouns):
        generator = _generator(noun)
        for old, new in zip(scores, shuffled, strict=True):
            new[row] = old[row, torch.randperm(old.shape[-1], generator=generator)]
    return shuffled


def _generator(noun: Noun) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * noun.token + noun.step)


# ----------------------------------------------------------------------------------------- scores that run the model once more


@torch.no_grad()
def gate_only(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """As released: the activation function's output alone in place of its product with the up projection. One forward pass."""
    last = max(noun.step for noun in nouns)
    seen: list[Tensor] = []

    def keep(out: Tensor) -> None:
        seen.append(out[0, out.shape[1] - last - 1 :].float().cpu())

    with hooked(ffn.watch_gate(keep) for ffn in vlm.anatomy.ffns):
        vlm.model(**vlm.replay(trace, last), use_cache=False)
    directions = vlm.anatomy.words([noun.token for noun in nouns])
    steps = [noun.step for noun in nouns]
    return [ffn.read(directions).cpu() * gate[steps] for ffn, gate in zip(vlm.anatomy.ffns, seen, strict=True)]


def gradient(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """`a_i dy_t/da_i` at the generating position: the total effect to first order, later layers included. One backward pass a
    noun."""
    values = [_activations_and_gradients(vlm, trace, noun) for noun in nouns]
    return [
        torch.stack([(z[0, -1].float() * g[0, -1].float()).cpu() for z, g in each])
        for each in zip(*(v[0] for v in values), strict=True)
    ]


def gradient_image(vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
    """`sum over image positions of a_i dy_t/da_i`, Schwettmann et al.: total effect of what the neuron does at the picture."""
    if trace.image is None:
        raise MmnError("The score gradient_image needs a picture, and this text was written without one.")
    values = [_activations_and_gradients(vlm, trace, noun) for noun in nouns]
    return [
        torch.stack([(z[mask].float() * g[mask].float()).sum(0).cpu() for (z, g), (_, mask) in zip(each, values, strict=True)])
        for each in zip(*(v[0] for v in values), strict=True)
    ]


@torch.inference_mode(False)
def _activations_and_gradients(vlm: VLM, trace: Trace, noun: Noun) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """For each layer the activations and the gradient of the noun's logit by them, `[1, positions, neurons]`, and where the
    picture is."""
    inputs = vlm.replay(trace, noun.step)
    places = vlm.image_positions(inputs).cpu()
    # A layer that the pass leaves out, as Mllama does without a picture, has activations of 0, as in a Trace.
    seen = [torch.zeros(*places.shape, ffn.neurons, requires_grad=True) for ffn in vlm.anatomy.ffns]

    def watch(layer: int, activations: Tensor) -> Tensor:
        # A layer of no neurons goes on with what it was given, so that any may be the first to need a leaf.
        seen[layer] = activations if activations.requires_grad else activations.detach().requires_grad_()
        return seen[layer]

    with torch.enable_grad(), hooked(ffn.watch(partial(watch, layer)) for layer, ffn in enumerate(vlm.anatomy.ffns)):
        logit = vlm.model(**inputs, use_cache=False).logits[0, -1, noun.token].float()
    gradients = torch.autograd.grad(logit, seen, materialize_grads=True, allow_unused=True)
    return [(z.detach(), g) for z, g in zip(seen, gradients, strict=True)], places


# ------------------------------------------------------------------------------------------------------------------- ranking

SCORES: dict[str, Scorer] = {
    "direct": direct,
    "gate_only": gate_only,
    "activation": activation,
    "write_norm": write_norm,
    "centred": centred,
    "norm_aware": norm_aware,
    "log_probability": log_probability,
    "readout": readout,
    "random": random,
    "same_layer": same_layer,
    "gradient": gradient,
    "gradient_image": gradient_image,
}


def _scores(vlm: VLM, trace: Trace, nouns: Sequence[Noun], score: str) -> list[Tensor]:
    _check(vlm, trace, nouns, score)
    return SCORES[score](vlm, trace, nouns)


def _check(vlm: VLM, trace: Trace, nouns: Sequence[Noun], score: str) -> None:
    if not isinstance(score, str) or score not in SCORES:
        raise MmnError(f"There is no score {score!r}: choose one of {', '.join(SCORES)}.")
    if not trace.recorded:
        raise MmnError("This caption was made with record=False, so there is nothing to score: caption again with recording on.")
    if trace.sizes != vlm.anatomy.neurons:
        raise MmnError("This trace comes from another model: its layers have other numbers of neurons.")
    words = vlm.anatomy.unembedding.out_features
    if odd := [noun.token for noun in nouns if not 0 <= noun.token < words]:
        raise MmnError(f"There is no token {odd[0]} in this model's vocabulary of {words}.")


def contributions(vlm: VLM, trace: Trace, noun: str | Noun, score: str = "direct") -> list[Tensor]:
    """Every neuron's score for one noun of a caption: for each layer float32 `[neurons]`.

    `noun` is a word of the caption or a Noun of your own making (any token and step). `score` is a key of `mmn.SCORES`. Raises
    MmnError if the caption does not say the noun, was not recorded, or there is no such score."""
    return [layer[0] for layer in _scores(vlm, trace, [trace.noun(noun)], score)]


@overload
def rank(vlm: VLM, trace: Trace, noun: None = None, k: int = ..., score: str = ...) -> dict[str, NeuronRanking]: ...


@overload
def rank(vlm: VLM, trace: Trace, noun: str | Noun, k: int = ..., score: str = ...) -> NeuronRanking: ...


def rank(
    vlm: VLM, trace: Trace, noun: str | Noun | None = None, k: int = 10, score: str = "direct"
) -> NeuronRanking | dict[str, NeuronRanking]:
    """The k neurons of all layers with the largest score for a noun; without a noun, for all nouns of the caption, by lemma.

    All nouns together cost one product a layer. Raises MmnError as `contributions` does, and for a `k` outside 1 ... neurons."""
    _check_k(vlm, k)
    nouns = trace.nouns if noun is None else [trace.noun(noun)]
    if not nouns:
        return {}
    found = _ranked(vlm, nouns, _scores(vlm, trace, nouns, score), trace.at([noun.step for noun in nouns]), k, score)
    return {each.noun.lemma: each for each in found} if noun is None else found[0]


def rank_all(vlm: VLM, traces: Sequence[Trace], k: int = 10) -> list[dict[str, NeuronRanking]]:
    """`rank` by the direct score for all nouns of several captions, which together cost one product a layer for every BATCH of them:
    for a batch of captions of a 7B model that is what ranking takes. Raises MmnError as `rank` does."""
    _check_k(vlm, k)
    for trace in traces:
        _check(vlm, trace, trace.nouns, "direct")
    said = [(trace, noun) for trace in traces for noun in trace.nouns]
    rankings: list[NeuronRanking] = []
    for start in range(0, len(said), BATCH):
        some = said[start : start + BATCH]
        nouns = [noun for _, noun in some]
        activations = torch.cat([trace.at([noun.step]) for trace, noun in some])
        words = vlm.anatomy.words([noun.token for noun in nouns])
        scores = _products(vlm, activations.split(vlm.anatomy.neurons, -1), words)
        rankings += _ranked(vlm, nouns, scores, activations, k, "direct")
    each = iter(rankings)
    return [{noun.lemma: next(each) for noun in trace.nouns} for trace in traces]


def _check_k(vlm: VLM, k: int) -> None:
    total = vlm.anatomy.total
    if type(k) is not int or not 1 <= k <= total:
        raise MmnError(f"k is a number of neurons between 1 and {total}, not {k!r}.")


def _ranked(
    vlm: VLM, nouns: Sequence[Noun], scores: Sequence[Tensor], activations: Tensor, k: int, score: str
) -> list[NeuronRanking]:
    """One ranking a noun from scores, for each layer `[nouns, neurons]`, and activations, `[nouns, neurons of all layers]`."""
    # Each layer's best are picked where its scores are: a GPU gives back k of them and not hundreds of thousands.
    best = [layer.topk(min(k, layer.shape[-1]), -1) for layer in scores]
    starts = np.cumsum([0, *vlm.anatomy.neurons]).tolist()
    device = best[0].values.device  # one wait for it, and not one a layer
    values, order = torch.cat([each.values.to(device) for each in best], -1).cpu().topk(k, -1)
    every = [each.indices.to(device) + start for each, start in zip(best, starts, strict=False)]
    places = torch.cat(every, -1).cpu().gather(-1, order)
    active = activations.gather(-1, places)
    found = []
    for row, noun in enumerate(nouns):
        neurons = neurons_at(vlm.anatomy.neurons, places[row].tolist())
        found.append(NeuronRanking(noun, neurons, values[row].tolist(), active[row].tolist(), score))
    return found
