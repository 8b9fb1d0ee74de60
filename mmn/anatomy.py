"""Where a vision-language model keeps what the method needs, found by structure and checked by arithmetic.

A *neuron* is an input of the last linear map of a decoder layer's FFN. `FFN(x) = sum_i a_i w_i (+ bias)`: `a_i` is the neuron's
activation, what the map receives; `w_i`, its *write*, is a column of the map's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmn.errors import MmnError

Watcher = Callable[[Tensor], Tensor | None]


class Neuron(NamedTuple):
    """One neuron: decoder layer and unit, both counted from 0."""

    layer: int
    unit: int

    def __str__(self) -> str:
        return f"L{self.layer}.{self.unit}"


@dataclass(frozen=True)
class FFN:
    """The FFN of one layer. projection: its last linear map, weight `[hidden, neurons]`. gate: the module whose output is the
    activation function's, None where there is none of its own."""

    projection: nn.Linear
    gate: nn.Module | None

    @property
    def neurons(self) -> int:
        """How many there are."""
        return self.projection.in_features

    def write(self, units: Sequence[int]) -> Tensor:
        """The writes of some neurons, float32 `[units, hidden]`."""
        return self.projection.weight.detach()[:, list(units)].T.float()

    @property
    def plain(self) -> bool:
        """Whether the weights are plain numbers in memory that can be changed in place: not quantised, not offloaded."""
        weight = self.projection.weight
        return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta

    @property
    def columns(self) -> Tensor:
        """The weights themselves, `[hidden, neurons]`: writing into them changes the model."""
        return self.projection.weight.data

    def read(self, directions: Tensor) -> Tensor:
        """Inner product of every write with some directions `[n, hidden]`: float32 `[n, neurons]`. One product reads the
        weights once."""
        weight = self.projection.weight.detach()
        return directions.to(weight.device, torch.float32) @ weight.float()

    def watch(self, watcher: Watcher) -> RemovableHandle:
        """Call `watcher` with the activations `[batch, positions, neurons]` at every forward pass; what it returns, if
        anything, takes their place."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = watcher(args[0])
            return None if changed is None else (changed, *args[1:])

        return self.projection.register_forward_pre_hook(hook)

    def add(self, units: Sequence[int], changes: Tensor) -> RemovableHandle:
        """Add `changes` float32 `[units, hidden]` to the units' writes by a hook: `a_i * change_i` goes to the output, in
        float32."""
        chosen = list(units)

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            extra = args[0][..., chosen].float() @ changes.to(out.device, torch.float32)
            return (out.float() + extra).to(out.dtype)

        return self.projection.register_forward_hook(hook)

    def watch_gate(self, watcher: Watcher) -> RemovableHandle:
        """The same for the activation function's output, which the paper's release takes for the activations."""
        if self.gate is None:
            raise MmnError("This FFN's activation function is no module of its own, so its output cannot be recorded.")
        return self.gate.register_forward_hook(lambda _, __, out: watcher(out))


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    decoder: the module that runs the layers. layers, ffns: the decoder's layers and their FFNs. final_norm: what stands between
    the last layer and the unembedding. unembedding: the linear map to the vocabulary, weight `[vocabulary, hidden]`.
    image_token: the id that marks the positions of the picture in the prompt."""

    decoder: nn.Module
    layers: list[nn.Module]
    ffns: list[FFN]
    final_norm: nn.Module
    unembedding: nn.Linear
    image_token: int

    @property
    def neurons(self) -> list[int]:
        """Neurons of each layer."""
        return [ffn.neurons for ffn in self.ffns]

    @property
    def total(self) -> int:
        """Neurons of the whole decoder."""
        return sum(self.neurons)

    @property
    def device(self) -> torch.device:
        """Where the unembedding is."""
        return self.unembedding.weight.device

    def words(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """The unembedding's rows of some tokens, float32 `[tokens, hidden]`."""
        return self.unembedding.weight.detach()[torch.as_tensor(tokens, device=self.device)].float()

    def writes(self, neurons: Sequence[Neuron]) -> Tensor:
        """The writes of some neurons, in their order, float32 `[neurons, hidden]`."""
        self.check(neurons)
        out = torch.empty(len(neurons), self.unembedding.in_features, device=self.device)
        for layer, places in by_layer(neurons).items():
            out[[place for place, _ in places]] = self.ffns[layer].write([unit for _, unit in places]).to(out.device)
        return out

    def check(self, neurons: Sequence[Neuron]) -> None:
        """Raises MmnError if one of the neurons is not in this model."""
        sizes = self.neurons
        for neuron in neurons:
            if not (isinstance(neuron, tuple) and len(neuron) == 2):
                raise MmnError(f"{neuron!r} is no neuron: give mmn.Neuron(layer, unit).")
            layer, unit = neuron
            if not (0 <= layer < len(sizes) and 0 <= unit < sizes[layer]):
                widths = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
                has = f"{len(sizes)} layers of {widths} neurons, counted from L0.0"
                raise MmnError(f"There is no neuron {Neuron(layer, unit)} in this model: it has {has}.")


def by_layer(neurons: Sequence[Neuron]) -> dict[int, list[tuple[int, int]]]:
    """For each layer, in order, the neurons that lie in it as (place in `neurons`, unit)."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for place, (layer, unit) in enumerate(neurons):
        groups.setdefault(layer, []).append((place, unit))
    return dict(sorted(groups.items()))


def find(model: Any) -> Anatomy:
    """The anatomy of `model`. Raises MmnError that names what was found where a part is missing."""
    unembedding = model.get_output_embeddings()
    if not isinstance(unembedding, nn.Linear):
        raise MmnError(
            f"No unembedding found: get_output_embeddings() gave {type(unembedding).__name__}, not a linear map to words."
        )
    hidden = unembedding.in_features
    decoder = model.get_decoder()
    layers, ffns = _layers(decoder, hidden)
    norms = [m for m in decoder.children() if not isinstance(m, nn.ModuleList) and _is_norm(m, hidden)]
    if not norms:
        kinds = ", ".join(sorted({type(m).__name__ for m in decoder.children()}))
        raise MmnError(f"No final norm of width {hidden} found beside the decoder's layers, only: {kinds}.")
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if token is None:
        raise MmnError("The model's configuration names no image token, so its image positions are unknown.")
    return Anatomy(decoder, list(layers), ffns, norms[-1], unembedding, int(token))


def _is_norm(module: nn.Module, hidden: int) -> bool:
    shapes = [tuple(p.shape) for p in module.parameters()]
    return bool(shapes) and all(shape == (hidden,) for shape in shapes)


def _layers(decoder: nn.Module, hidden: int) -> tuple[nn.ModuleList, list[FFN]]:
    """The longest list of layers that all hold an FFN, and their FFNs."""
    best: tuple[nn.ModuleList, list[FFN]] | None = None
    tried = []
    for name, stack in decoder.named_modules():
        if not isinstance(stack, nn.ModuleList) or (best and len(stack) <= len(best[0])):
            continue
        found = [ffn for layer in stack if (ffn := _ffn(layer, hidden)) is not None]
        tried.append(f"{name} ({len(found)} of {len(stack)} layers)")
        if len(found) == len(stack) > 0:
            best = stack, found
    if best is None:
        looked = "; ".join(tried) or "no list of modules"
        raise MmnError(f"No decoder layers with an FFN that writes to width {hidden} found; looked at: {looked}.")
    return best


def _ffn(layer: nn.Module, hidden: int) -> FFN | None:
    """The layer's FFN: the one part of it that works on each position alone and whose output is that of a linear map in it, as
    a probe with random numbers shows."""
    for block in _blocks(layer):
        for projection in block.children():
            if isinstance(projection, nn.Linear) and projection.out_features == hidden:
                gate = _probe(block, projection, hidden)
                if gate is not False:
                    return FFN(projection, gate if isinstance(gate, nn.Module) else None)
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
