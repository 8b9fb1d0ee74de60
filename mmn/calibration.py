"""A gradient-free score that knows the later layers: each layer's mean path to the logits, measured once by forward passes [ours].

What a neuron writes is read by later layers before the final norm reads the sum. To first order their answer is a matrix a layer,
`J_l`: how the final norm's input moves when layer l's FFN writes a little more. `fit` averages `J_l` over some moments by finite
differences, forward passes only; it depends on the model alone, not on the noun. The score is then `readout`, what log p(t) loses without
the neuron's part, with `a_i J_l w_i` for that part in place of `a_i w_i`: no backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmn.contribution import readout_of
from mmn.errors import MmnError
from mmn.hooks import hooked
from mmn.nouns import Noun
from mmn.oracle import Moment
from mmn.trace import Trace
from mmn.vlm import VLM

STEP = 0.02  # of the stream's length: small enough for first order, large enough for float32
BATCH = 128


@dataclass(frozen=True)
class Calibration:
    """Mean paths of a model, for each layer float32 `[hidden, hidden]`: row j is where the final norm's input goes when the layer's FFN
    writes one unit more along axis j; squares: the squared lengths of the writes at the end of the path, for each layer `[neurons]`. Call
    it as any score of mmn.SCORES."""

    paths: list[Tensor]
    squares: list[Tensor]
    model_hash: str
    moments: int

    @classmethod
    @torch.no_grad()
    def fit(cls, vlm: VLM, traces: Sequence[Trace]) -> Calibration:
        """Averaged over all nouns of some captions. Raises MmnError if they have none, or for FFNs of mixed experts."""
        found = [(trace, noun) for trace in traces for noun in trace.nouns]
        if not found:
            raise MmnError("A calibration needs captions with nouns: give some.")
        if any(not isinstance(ffn.projection, nn.Linear) or ffn.flat for ffn in vlm.anatomy.ffns):
            raise MmnError("A calibration needs FFNs that end in one linear map: this model has others.")
        paths = [torch.zeros(vlm.hidden, vlm.hidden) for _ in vlm.anatomy.ffns]
        for trace, noun in found:
            moment = Moment(vlm, trace, noun)
            small = STEP * float(trace.stream_at([noun.step]).norm())
            for layer, path in enumerate(paths):
                for axes in torch.arange(vlm.hidden).split(BATCH):
                    path[axes] += _moved(vlm, moment, layer, axes, small) / len(found)
        writes = [ffn.write(range(ffn.neurons)).cpu() for ffn in vlm.anatomy.ffns]
        squares = [(write @ path).square().sum(-1) for write, path in zip(writes, paths, strict=True)]
        return cls(paths, squares, vlm.hash, len(found))

    def __call__(self, vlm: VLM, trace: Trace, nouns: Sequence[Noun]) -> list[Tensor]:
        """The score. Raises MmnError for another model than the one calibrated."""
        if vlm.hash != self.model_hash:
            raise MmnError(f"This calibration is of the model {self.model_hash}, not of {vlm.hash}: fit one.")

        def read(layer: int, directions: Tensor) -> Tensor:
            return vlm.anatomy.ffns[layer].read(directions.cpu() @ self.paths[layer].T).cpu()

        return readout_of(vlm, trace, nouns, read, lambda layer, units: self.squares[layer][units])


def _moved(vlm: VLM, moment: Moment, layer: int, axes: Tensor, small: float) -> Tensor:
    """Central differences of the final norm's input by the layer's write along some axes: `[axes, hidden]`."""
    seen: list[Tensor] = []
    norm = vlm.anatomy.final_norm or vlm.anatomy.unembedding
    projection = vlm.anatomy.ffns[layer].projection
    more = torch.zeros(2 * len(axes), 1, vlm.hidden)
    more[torch.arange(len(axes)), 0, axes] = small
    more[len(axes) + torch.arange(len(axes)), 0, axes] = -small
    handles = (
        each
        for each in (
            projection.register_forward_hook(lambda _, __, out: out + more.reshape(out.shape).to(out.device, out.dtype)),
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, vlm.hidden).float().cpu())),
        )
    )
    with hooked(handles):
        moment.logits(len(more))
    up, down = seen[0].chunk(2)
    return (up - down) / (2 * small)
