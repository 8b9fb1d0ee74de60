"""Where a vision-language model keeps what the method needs, found by structure and checked by arithmetic.

A *neuron* is an input of the last linear map of a decoder layer's FFN. `FFN(x) = sum_i a_i w_i (+ bias)`: `a_i` is the neuron's
activation, what the map receives; `w_i`, its *write*, is a column of the map's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmn.errors import MmnError


class Neuron(NamedTuple):
    """One neuron: decoder layer and unit, both counted from 0."""

    layer: int
    unit: int

    def __str__(self) -> str:
        return f"L{self.layer}.{self.unit}"


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    layers: the decoder's layers. projections: for each layer the FFN's last linear map, weight `[hidden, neurons]`.
    gates: for each layer the module whose output is the FFN's activation function, None where there is none of its own.
    decoder: the module that runs the layers. final_norm: what stands between the last layer and the unembedding.
    unembedding: the linear map to the vocabulary, weight `[vocabulary, hidden]`. image_token: the id that marks image positions."""

    decoder: nn.Module
    layers: list[nn.Module]
    projections: list[nn.Linear]
    gates: list[nn.Module | None]
    final_norm: nn.Module
    unembedding: nn.Linear
    image_token: int

    @property
    def neurons(self) -> list[int]:
        """Neurons of each layer."""
        return [projection.in_features for projection in self.projections]

    @property
    def total(self) -> int:
        """Neurons of the whole decoder."""
        return sum(self.neurons)

    def write(self, layer: int, units: list[int] | Tensor) -> Tensor:
        """The writes of some neurons of one layer, float32 `[units, hidden]`."""
        return self.projections[layer].weight.detach()[:, units].T.float()

    def check(self, neurons: list[Neuron]) -> None:
        """Raises MmnError if one of the neurons is not in this model."""
        for layer, unit in neurons:
            if not (0 <= layer < len(self.layers) and 0 <= unit < self.neurons[layer]):
                sizes = f"{len(self.layers)} layers of {min(self.neurons)} to {max(self.neurons)} neurons"
                raise MmnError(f"There is no neuron {Neuron(layer, unit)} in this model: it has {sizes}.")


def find(model: nn.Module) -> Anatomy:
    """The anatomy of `model`. Raises MmnError that names what was found where a part is missing."""
    unembedding = model.get_output_embeddings()
    if not isinstance(unembedding, nn.Linear):
        raise MmnError(f"No unembedding: get_output_embeddings() gave {type(unembedding).__name__}, not a linear map to words.")
    hidden = unembedding.in_features
    decoder = model.get_decoder()
    layers, found = _layers(decoder, hidden)
    norms = [m for m in decoder.children() if not isinstance(m, nn.ModuleList) and _is_norm(m, hidden)]
    if not norms:
        kinds = ", ".join(sorted({type(m).__name__ for m in decoder.children()}))
        raise MmnError(f"No final norm of width {hidden} beside the decoder's layers; it holds {kinds}.")
    image_token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if image_token is None:
        raise MmnError("The model's configuration names no image token, so its image positions are unknown.")
    projections, gates = zip(*found, strict=True)
    return Anatomy(decoder, list(layers), list(projections), list(gates), norms[-1], unembedding, int(image_token))


def _is_norm(module: nn.Module, hidden: int) -> bool:
    shapes = [tuple(p.shape) for p in module.parameters()]
    return bool(shapes) and all(shape == (hidden,) for shape in shapes)


def _layers(decoder: nn.Module, hidden: int) -> tuple[nn.ModuleList, list[tuple[nn.Linear, nn.Module | None]]]:
    """The longest list of layers that all hold an FFN, with each layer's output projection and activation module."""
    best: tuple[nn.ModuleList, list[tuple[nn.Linear, nn.Module | None]]] | None = None
    tried = []
    for name, stack in decoder.named_modules():
        if not isinstance(stack, nn.ModuleList) or (best and len(stack) <= len(best[0])):
            continue
        found = [ffn for layer in stack if (ffn := _ffn(layer, hidden)) is not None]
        tried.append(f"{name} ({len(found)} of {len(stack)} layers)")
        if len(found) == len(stack) > 0:
            best = stack, found
    if best is None:
        raise MmnError(
            f"No list of decoder layers with an FFN that writes to width {hidden}; looked at {'; '.join(tried) or 'none'}."
        )
    return best


def _ffn(layer: nn.Module, hidden: int) -> tuple[nn.Linear, nn.Module | None] | None:
    """The FFN's output projection and its activation module: the one part of the layer that works on each position alone and whose
    output is that projection's, as a probe with random numbers shows."""
    for block in _blocks(layer):
        for projection in block.children():
            if isinstance(projection, nn.Linear) and projection.out_features == hidden:
                gate = _probe(block, projection, hidden)
                if gate is not False:
                    return projection, gate if isinstance(gate, nn.Module) else None
    return None


def _blocks(layer: nn.Module) -> Iterator[nn.Module]:
    return (module for module in layer.modules() if module is not layer and any(True for _ in module.children()))


@torch.no_grad()
def _probe(block: nn.Module, projection: nn.Linear, hidden: int) -> nn.Module | None | bool:
    """False unless `block(x)` is the projection of its own input at each position; else its activation module, or None."""
    weight = projection.weight
    probe = torch.randn(1, 3, hidden, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    seen: dict[str, Tensor] = {}
    outputs: dict[nn.Module, tuple[int, ...]] = {}
    handles = [projection.register_forward_pre_hook(lambda _, args: seen.__setitem__("input", args[0]))]
    handles += [
        module.register_forward_hook(lambda module, _, out: outputs.__setitem__(module, tuple(out.shape)))
        for module in block.modules()
        if not any(True for _ in module.parameters()) and not isinstance(module, nn.Dropout)
    ]
    try:
        out = block(probe)
        alone = block(probe[:, 1:2])
    except Exception:  # attention wants more than one argument: not an FFN
        return False
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(out, Tensor) or out.shape != probe.shape or "input" not in seen:
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
    rebuilt = nn.functional.linear(seen["input"], weight, projection.bias)
    if not torch.allclose(out[:, 1:2], alone, rtol=tolerance, atol=tolerance) or not torch.allclose(
        alone, rebuilt, rtol=tolerance, atol=tolerance
    ):
        return False
    wide = [module for module, shape in outputs.items() if shape[-1] == projection.in_features]
    return wide[0] if wide else None


def image_grid(count: int) -> tuple[int, int]:
    """Rows and columns of `count` image tokens that stand for a square picture. Raises MmnError where they cannot."""
    side = round(count**0.5)
    if side * side != count or count == 0:
        raise MmnError(f"{count} image tokens are no square grid, so there is no heatmap to draw for this model.")
    return side, side
