"""Planted neurons: a second ground truth, known by construction and not by measuring [ours].

In a copy of the model a neuron that does next to nothing is given new weights, so that it fires at the moment that produces a noun, as
strongly as the model's own strong neurons, and writes as much as they write. What it does to the noun is known beforehand:

- `vote`: in the last layer, it writes towards log p(t). It matters, and directly.
- `cancelled`: halfway up, it writes the same; a second neuron, two layers above, reads that it fired and takes away all that is left of
  its write. It does not matter, though its write looks like a vote.
- `quiet`: in the last layer, it fires more strongly than all others and writes where the unembedding hardly looks. It does not matter.
- `later`: halfway up, it writes where the unembedding hardly looks; a second neuron two layers above reads that and votes. It matters,
  but only through a later layer.

Which score should find which is written down in `EXPECTED`, before anything is measured: to find is to rank it among the TOP neurons of
highest score. Needs gated FFNs whose writes are added to the stream as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mmn import oracle
from mmn.contribution import Scorer, through_norm, towards_log_p
from mmn.errors import MmnError
from mmn.ffn import FFN, Neuron
from mmn.hooks import Removable, hooked
from mmn.nouns import Noun
from mmn.trace import Recorder, Trace
from mmn.vlm import VLM
from mmn.weights import matrix

KINDS = ("vote", "cancelled", "quiet", "later")
TOP = 10  # neurons a score finds
ACTIVATION = 0.999  # quantile, among all neurons of the model at the moment
WRITE = 0.75  # quantile of the write norms, among the neurons that fire there
_WRITES = ("vote", "cancelled")  # what a score of the write and the word sees: right once, deceived once
_ALL = ("vote", "cancelled", "quiet", "later")  # what fires is found, whatever it does
_TRUTH = ("vote", "later")
EXPECTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("direct", "gate_only", "centred", "norm_aware", "log_probability", "readout"), _WRITES),
    **dict.fromkeys(("activation", "write_norm"), _ALL),
    **dict.fromkeys(("gradient", "gradient_log_p", "integrated_gradients"), _TRUTH),
    **dict.fromkeys(("gradient_image", "random", "same_layer"), ()),  # the first looks at other positions
}


@dataclass(frozen=True)
class Planted:
    """A copy of the model with one neuron planted, its trace of the same caption up to the noun, and the second neuron if there is
    one."""

    kind: str
    vlm: VLM
    trace: Trace
    noun: Noun
    neuron: Neuron
    reader: Neuron | None


def plant(vlm: VLM, trace: Trace, noun: str | Noun, kind: str) -> Planted:
    """Plant one neuron for a noun of a caption, in a copy. Raises MmnError for an unknown kind or FFNs that cannot be planted in."""
    if kind not in KINDS:
        raise MmnError(f"There is no kind {kind!r} of planted neurons: choose one of {', '.join(KINDS)}.")
    chosen, ffns = trace.noun(noun), vlm.anatomy.ffns
    if len(ffns) < 3 or any(len(_inputs(ffn)) != 2 or not ffn.plain for ffn in ffns):
        raise MmnError("Planting needs at least three layers of plain gated FFNs: this model has others.")
    copied = VLM(
        copy.deepcopy(vlm.model), vlm.processor, vlm.name, lexicon=vlm.lexicon, prompt=vlm.prompt, hash=f"{vlm.hash}-{kind}"
    )
    bed = _Bed(copied, trace, chosen)
    last = len(ffns) - 1
    reading = max(1, min(last - 1, last // 2 + 2))
    layer = last if kind in ("vote", "quiet") else min(last // 2, reading - 1)
    neuron = bed.free(layer)
    bed.fire(neuron, bed.strongest if kind == "quiet" else bed.strong)
    bed.write(neuron, bed.vote if kind in _WRITES else bed.quiet)
    reader = None
    if layer != last:
        reader = bed.free(reading)
        bed.react(reader, neuron, cancel=kind == "cancelled")
    return Planted(kind, copied, bed.retrace(), chosen, neuron, reader)


class _Bed:
    """A copy of a model at one moment, whose neurons can be given new weights; sizes and directions are those of the model before."""

    def __init__(self, vlm: VLM, trace: Trace, noun: Noun):
        self.vlm, self.trace, self.noun = vlm, trace, noun
        self.inputs = vlm.replay(trace, noun.step)
        fired = trace.at([noun.step])[0]
        self.activations = list(fired.split(vlm.anatomy.neurons))
        fired = fired.abs()
        norms = torch.cat([ffn.write(range(ffn.neurons)).norm(dim=-1).cpu() for ffn in vlm.anatomy.ffns])
        self.strong, self.strongest = float(fired.quantile(ACTIVATION)), float(fired.max())
        self.length = float(norms[fired > 0].quantile(WRITE))
        vote = towards_log_p(vlm, trace, [noun])[0]
        self.vote, self.quiet = vote / vote.norm(), _quiet(vlm, trace, noun)

    def free(self, layer: int) -> Neuron:
        """The layer's neuron that writes least at the moment, so that little is lost with it."""
        ffn = self.vlm.anatomy.ffns[layer]
        size = self.activations[layer].abs() * ffn.write(range(ffn.neurons)).norm(dim=-1).cpu()
        return Neuron(layer, int(size.argmin()))

    @torch.no_grad()
    def look(self, layer: int, silent: Neuron | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer's FFN reads at all positions `[positions, hidden]`; the stream after the layer `[hidden]` and the FFN's
        activations `[neurons]` at the moment; with one neuron silent there."""
        ffn, kept = self.vlm.anatomy.ffns[layer], {}

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept["read"] = args[0][0].float()

        def leave(_: nn.Module, __: Any, out: Any) -> None:
            kept["stream"] = (out[0] if isinstance(out, tuple) else out)[0, -1].float()

        def fire(seen: Tensor) -> None:
            kept["activations"] = seen[0, -1].float()

        def silence(seen: Tensor) -> Tensor:
            assert silent is not None
            changed = seen.clone()
            changed[:, -1, silent.unit] = 0
            return changed

        handles: list[Removable] = [
            _inputs(ffn)[0].register_forward_pre_hook(read),
            ffn.layer.register_forward_hook(leave),
            ffn.watch(fire),
        ]
        if silent is not None:
            handles.append(self.vlm.anatomy.ffns[silent.layer].watch(silence))
        with hooked(handles):
            self.vlm.model(**self.inputs, use_cache=False)
        return kept["read"], kept["stream"], kept["activations"]

    def fire(self, neuron: Neuron, size: float) -> None:
        """Let the neuron fire with this activation at the moment and stay silent before it."""
        read = self.look(neuron.layer)[0]
        self._set(neuron, read, read[-1] / read[-1].square().sum(), size)

    def write(self, neuron: Neuron, direction: Tensor) -> None:
        """Let it write `direction` at the model's own length."""
        self.vlm.anatomy.ffns[neuron.layer].columns[:, neuron.unit] = self.length * direction

    def react(self, reader: Neuron, to: Neuron, *, cancel: bool) -> None:
        """Let `reader` fire where `to` does, and not without it; and vote, or write the opposite of all that `to` has left in the
        stream."""
        ffn = self.vlm.anatomy.ffns[reader.layer]
        ffn.columns[:, reader.unit] = 0
        with_it, after, _ = self.look(reader.layer)
        without, before, _ = self.look(reader.layer, to)
        off = without[-1]
        news = with_it[-1] - (with_it[-1] @ off) / (off @ off) * off
        self._set(reader, with_it, news / (news @ with_it[-1]), self.strong)
        if cancel:
            fired = self.look(reader.layer)[2][reader.unit]
            ffn.columns[:, reader.unit] = (before - after) / fired
        else:
            self.write(reader, self.vote)

    def _set(self, neuron: Neuron, read: Tensor, row: Tensor, size: float) -> None:
        """Weights with which the neuron's activation at the moment is `size`: one of its two inputs is `row` times a number, the
        other answers to the moment alone (least squares with 0 at all positions before)."""
        others = read[:-1]
        gram = others.T @ others
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        here = torch.linalg.solve(gram, read[-1])
        one, two = _inputs(self.vlm.anatomy.ffns[neuron.layer])
        for module, weights in ((one, here / (here @ read[-1])), (two, row)):
            module.weight.data[neuron.unit] = size**0.5 * weights
            if module.bias is not None:
                module.bias.data[neuron.unit] = 0
        fired = float(self.look(neuron.layer)[2][neuron.unit])
        two.weight.data[neuron.unit] *= size / fired

    @torch.no_grad()
    def retrace(self) -> Trace:
        """The caption as the planted model reads it: activations and stream at the noun's step, zeros at the others."""
        recorder = Recorder(self.vlm.anatomy)
        with recorder.on():
            self.vlm.model(**self.inputs, use_cache=False)

        def placed(last: Tensor) -> Tensor:
            rows = torch.zeros(len(self.trace.tokens), last.shape[-1])
            rows[self.noun.step] = last[0].float().cpu()
            return rows

        return replace(self.trace, record=list(placed(recorder.steps[0])), stream=placed(recorder.stream[0]))


def _inputs(ffn: FFN) -> list[Any]:
    """The linear maps that stand beside the projection and have one output a neuron: two where the FFN is gated."""
    for module in ffn.layer.modules():
        if any(child is ffn.projection for child in module.children()):
            beside = [child for child in module.children() if isinstance(child, nn.Linear) and child is not ffn.projection]
            return [child for child in beside if child.out_features == ffn.neurons]
    return []


def _quiet(vlm: VLM, trace: Trace, noun: Noun) -> Tensor:
    """The direction of the final norm's input that moves the words least against each other, and not its scale: `[hidden]`."""
    weight = matrix(vlm.anatomy.unembedding).float()
    stream = trace.stream_at([noun.step])[0].to(weight.device)
    rows = through_norm(vlm, weight - weight.mean(0), stream.expand(len(weight), -1))
    unit = stream / stream.norm()
    gram = rows.T @ rows
    aside = torch.eye(len(gram), device=gram.device) - torch.outer(unit, unit)
    gram = aside @ gram @ aside + gram.diagonal().sum() * torch.outer(unit, unit)
    return torch.linalg.eigh(gram).eigenvectors[:, 0]


def compare(
    vlm: VLM, trace: Trace, noun: str | Noun, scores: Mapping[str, Scorer] = oracle.ALL, kinds: Sequence[str] = KINDS
) -> pd.DataFrame:
    """Where each score ranks each planted neuron: one row a kind and a score with `effect` (nats, its true effect on log p in the
    planted model), `rank` (from 1, of all neurons), `found` (among the TOP of highest score) and `expected` (whether it should be)."""
    rows = []
    for kind in kinds:
        planted = plant(vlm, trace, noun, kind)
        moment = oracle.Moment(planted.vlm, planted.trace, planted.noun)
        place = sum(moment.layers[: planted.neuron.layer]) + planted.neuron.unit
        effect = float(moment.effects(planted.neuron.layer, torch.tensor([planted.neuron.unit]))[0, 0])
        for name, scorer in scores.items():
            flat = torch.cat([layer[0] for layer in scorer(planted.vlm, planted.trace, [planted.noun])])
            rank = 1 + int((flat > flat[place]).sum())
            row = {"kind": kind, "score": name, "effect": effect, "rank": rank, "found": rank <= TOP}
            rows.append(row | {"expected": kind in EXPECTED.get(name, ())})
    return pd.DataFrame(rows)
