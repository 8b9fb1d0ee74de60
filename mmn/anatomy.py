"""Where a vision-language model keeps what the method needs, found by structure and checked by arithmetic."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from mmn import weights
from mmn.errors import MmnError
from mmn.ffn import FFN, Experts, Mixture, Neuron, NoFFN, by_layer, parts


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    decoder: the module that runs the layers. layers, ffns: the decoder's layers and their FFNs. final_norm: what stands between
    the last layer and the unembedding. unembedding: the linear map to the vocabulary, weight `[vocabulary, hidden]`.
    image_token: the id that marks the positions of the picture in the prompt. stands_for: how many positions of the stream each
    mark stands for, where the model itself puts them in its place. scale: what the unembedding's products are multiplied with to be the
    logits (taken for 1 where the model reads no words alone), None where they are bent, as by a soft cap."""

    decoder: nn.Module
    layers: list[nn.Module]
    ffns: list[FFN]
    final_norm: nn.Module | None
    unembedding: nn.Linear
    image_token: int | None
    stands_for: int = 1
    scale: float | None = 1.0

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
        return weights.device(self.unembedding)

    def image_positions(self, ids: Tensor) -> Tensor:
        """Which positions of the stream hold the picture, bool `[batch, positions]`, when a prompt of `ids` is read."""
        return self.in_stream(ids, self._marks(ids))

    def in_stream(self, ids: Tensor, values: Tensor) -> Tensor:
        """What is said of each token of a prompt of `ids`, `[batch, tokens]`, of each position of the stream, `[batch, positions]`."""
        if self.stands_for == 1:
            return values
        times = 1 + self._marks(ids) * (self.stands_for - 1)
        return torch.stack([row.repeat_interleave(many) for row, many in zip(values, times, strict=True)])

    def _marks(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool) if self.image_token is None else ids == self.image_token

    def words(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """The unembedding's rows of some tokens, float32 `[tokens, hidden]`."""
        return weights.matrix(self.unembedding)[torch.as_tensor(tokens, device=self.device)].float()

    def writes(self, neurons: Sequence[Neuron]) -> Tensor:
        """The writes of some neurons, in their order, float32 `[neurons, hidden]`."""
        self.check(neurons)
        out = torch.empty(len(neurons), self.unembedding.in_features, device=self.device)
        for layer, places in by_layer(neurons).items():
            out[[place for place, _ in places]] = self.ffns[layer].write([unit for _, unit in places]).to(out.device)
        return out

    def place(self, neuron: Neuron) -> tuple[int, int | None, int]:
        """Layer, expert and unit in the expert of a neuron; expert None where it belongs to no routed expert. Raises MmnError for
        a neuron that is not there."""
        self.check([neuron])
        unit = neuron.unit
        for part in parts(self.ffns[neuron.layer]):
            if unit < part.neurons:
                return (neuron.layer, *divmod(unit, part.width)) if isinstance(part, Experts) else (neuron.layer, None, unit)
            unit -= part.neurons
        raise AssertionError

    def neuron(self, layer: int, unit: int, expert: int | None = None) -> Neuron:
        """The neuron at a place, as `place` gives it. Raises MmnError where there is none."""
        self.check([Neuron(layer, 0)])
        start = 0
        for part in parts(self.ffns[layer]):
            if expert is None and not isinstance(part, Experts) and 0 <= unit < part.neurons:
                return Neuron(layer, start + unit)
            if expert is not None and isinstance(part, Experts) and 0 <= unit < part.width and 0 <= expert < len(part.weight):
                return Neuron(layer, start + expert * part.width + unit)
            start += part.neurons
        where = f"unit {unit}" if expert is None else f"unit {unit} of expert {expert}"
        raise MmnError(f"There is no {where} in layer {layer}: `mmn anatomy` prints how many there are.")

    def check(self, neurons: Sequence[Neuron]) -> None:
        """Raises MmnError if one of the neurons is not in this model."""
        sizes = self.neurons
        for neuron in neurons:
            if not (isinstance(neuron, tuple) and len(neuron) == 2 and all(isinstance(each, Integral) for each in neuron)):
                raise MmnError(f"{neuron!r} is no neuron: give mmn.Neuron(layer, unit).")
            layer, unit = neuron
            if not (0 <= layer < len(sizes) and 0 <= unit < sizes[layer]):
                widths = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
                has = f"{len(sizes)} layers of {widths} neurons, counted from L0.0"
                raise MmnError(f"There is no neuron {Neuron(layer, unit)} in this model: it has {has}.")


# ------------------------------------------------------------------------------------------------------------------- finding


@torch.inference_mode(False)
@torch.enable_grad()
def find(model: Any) -> Anatomy:
    """The anatomy of `model`, from what happens when it reads a few words.

    Every linear map's output is cut off from what came before, so that gradients tell what lies between one map and the next. A
    map is an FFN's last one if it writes to the stream (its layer's output depends on its own, with no other map between) and
    if what it receives at a position depends on other maps at that position alone (attention's last map receives other
    positions, too). A layer's widest such map is its FFN's. Raises MmnError that names what was found where a part is
    missing."""
    unembedding = _unembedding(model)
    hidden = unembedding.in_features
    probe = _Probe(model, hidden)
    last = next(reversed(probe.outputs.values()), None) if probe.logits is None else probe.logits
    if last is not None and not (last < torch.inf).all():  # nor for nan; some models bar words by -inf
        raise MmnError(
            "The model gives no finite numbers: its weights are damaged, or float16 overflows (then load it as bfloat16)."
        )
    stack, ffns = _ffns(probe, hidden)
    names = ("image_token_id", "image_token_index", "video_token_index")  # the last where pictures are read as short films
    token = next((token for name in names if (token := getattr(model.config, name, None)) is not None), None)
    return Anatomy(
        probe.decoder, list(stack), ffns, probe.final_norm(stack, hidden), unembedding, token, scale=probe.scale(unembedding)
    )


class _Probe:
    """One forward pass over a few words: which maps ran, what they received, and what each layer gave."""

    def __init__(self, model: Any, hidden: int):
        self.names = {module: name for name, module in model.named_modules()}
        self.stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.leaves: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], Tensor]] = {}  # of modules that may be routed experts
        self.order: list[nn.Module] = []
        self.logits: Tensor | None = None
        self.decoder = _decoder(model)
        handles = []
        elements = {element for stack in self.stacks for element in stack}
        for module in self.names:
            if is_linear(module):
                handles.append(module.register_forward_pre_hook(self._receive))
                handles.append(module.register_forward_hook(self._cut))
            elif module in elements or not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(self._keep))
            if fused(module):
                handles.append(module.register_forward_hook(self._call, with_kwargs=True))
        try:
            self._run(model)
        finally:
            for handle in handles:
                handle.remove()

    def _receive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.inputs[module] = args[0]

    def _cut(self, module: nn.Module, _: Any, out: Any) -> Tensor | None:
        if not isinstance(out, Tensor):
            return None
        self.order.append(module)
        self.leaves[module] = out.detach().requires_grad_()
        return self.leaves[module].clone()  # some models write into what a map gave them

    def _keep(self, module: nn.Module, _: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) and out else out
        if isinstance(out, Tensor):
            self.order.append(module)
            self.outputs[module] = out

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = (*args, *kwargs.values())
        if isinstance(out, Tensor) and given and all(isinstance(each, Tensor) for each in given):
            self.calls[module] = tuple(each.detach() for each in given), out.detach()

    def _run(self, model: Any) -> None:
        table = weights.matrix(model.get_input_embeddings())
        ids = (torch.arange(WORDS) * 7 + 11).remainder(table.shape[0])[None].to(table.device)
        reasons = []
        # The model itself where it reads words alone, else the language model inside it, else the model with a picture.
        words: list[dict[str, Any]] = [{"input_ids": ids}, {"inputs_embeds": torch.nn.functional.embedding(ids, table)}]
        side = getattr(getattr(model.config, "vision_config", None), "image_size", 0)
        side = side if isinstance(side, int) else 0
        picture = torch.ones(1, 1, 3, side, side, device=table.device, dtype=table.dtype)
        seen = {"input_ids": ids, "pixel_values": picture, "image_attention_mask": ids.new_ones(1, WORDS, 1)}
        tries = [
            (m, given) for m in dict.fromkeys((model, getattr(model, "language_model", None), self.decoder)) for given in words
        ]
        for module, given in [*tries, (model, seen)]:
            if module is None:
                continue
            for kept in (self.inputs, self.leaves, self.outputs, self.calls, self.order):
                kept.clear()
            try:
                with torch.enable_grad():
                    self.logits = getattr(module(**given, use_cache=False), "logits", None)
                return
            except Exception as error:  # what it wants beside words is its own affair
                reasons.append(f"{type(module).__name__}: {str(error).strip().splitlines()[:1]}")
        raise MmnError(f"The model could not be run on words alone, so its parts were not found; {reasons[0]}.")

    def reaches(self, result: Tensor, leaf: Tensor) -> bool:
        """Whether `result` depends on a map's output with no other map between."""
        if result.grad_fn is None and result is not leaf:
            return False
        (gradient,) = torch.autograd.grad(result.float().sum(), leaf, allow_unused=True, retain_graph=True)
        return gradient is not None and bool(gradient.any())

    def own_position(self, module: nn.Module) -> bool:
        """Whether what a map receives at a position comes from other maps at that position alone."""
        received = self.inputs[module]
        if received.grad_fn is None:
            return False
        flat = received.flatten(0, -2)
        if flat.shape[0] != WORDS:
            return False
        leaves = [leaf for leaf in self.leaves.values() if leaf.numel() and leaf.flatten(0, -2).shape[0] == WORDS]
        weights = torch.linspace(0.5, 1.5, flat.shape[1], device=flat.device, dtype=flat.dtype)
        gradients = torch.autograd.grad((flat[2] * weights).sum(), leaves, allow_unused=True, retain_graph=True)
        rows = [g.flatten(0, -2).abs().sum(-1) for g in gradients if g is not None]
        if not rows:
            return False
        total = torch.stack([row.float() for row in rows]).sum(0)
        return bool(total[2] > 0) and not bool(total[[0, 1, 3, 4]].any())

    @torch.no_grad()
    def scale(self, unembedding: nn.Module) -> float | None:
        """What the unembedding's products are multiplied with to be the logits: 1 where that was not seen, None where they are bent."""
        if self.logits is None or unembedding not in self.leaves:
            return 1.0
        raw = self.leaves[unembedding].float()
        given = self.logits.to(raw)
        factor = float((given * raw).sum() / raw.square().sum())
        if (given - factor * raw).abs().max() > 1e-2 * given.abs().max():
            return None
        return 1.0 if abs(factor - 1) < 1e-3 else factor

    def final_norm(self, stack: nn.ModuleList, hidden: int) -> nn.Module | None:
        """The last norm that ran behind the last layer, None where there is none."""
        last = max((self.order.index(layer) for layer in stack if layer in self.order), default=0)
        inside = {module for layer in stack for module in layer.modules()}
        norms = [m for m in self.order[last:] if m not in inside and is_norm(m, hidden)]
        return norms[-1] if norms else None


WORDS = 5  # of the probe


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's, or a quantised one of the same interface."""
    return isinstance(module, nn.Linear)


def _unembedding(model: Any) -> nn.Linear:
    """The map to the vocabulary: what the model names, else the last linear map with as many outputs as there are words."""
    named = model.get_output_embeddings()
    if isinstance(named, nn.Linear):
        return named
    words = model.get_input_embeddings().weight.shape[0]
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == words]
    if not found:
        raise MmnError(
            f"No unembedding found: get_output_embeddings() gave {type(named).__name__}, and no linear map has {words} outputs."
        )
    return found[-1]


def _decoder(model: Any) -> nn.Module:
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return found if isinstance(found, nn.Module) else model


def is_norm(module: nn.Module, hidden: int) -> bool:
    """Whether a module can be a norm of the stream: all it has are vectors of its width, and it reads one thing."""
    shapes = [tuple(p.shape) for p in module.parameters()]
    alone = len(inspect.signature(module.forward).parameters) == 1 and not any(True for _ in module.children())
    return bool(shapes) and alone and all(shape == (hidden,) for shape in shapes)


def _ffns(probe: _Probe, hidden: int) -> tuple[nn.ModuleList, list[FFN]]:
    """The decoder's list of layers and each layer's FFN."""
    best: nn.ModuleList | None = None
    found: dict[nn.Module, FFN] = {}
    tried = []
    for stack in probe.stacks:
        chosen = {layer: ffn for layer in stack if (ffn := _ffn(probe, layer, hidden)) is not None}
        if any(layer in probe.outputs for layer in stack):
            tried.append(f"{probe.names[stack]} ({len(chosen)} of {len(stack)} layers)")
        if len(chosen) > len(found):
            best, found = stack, chosen
    if best is None:
        looked = "; ".join(tried) or "no list of layers that reads words"
        raise MmnError(f"No decoder layers with an FFN that writes to width {hidden} found; looked at: {looked}.")
    # A layer that words alone do not run, such as one that reads the picture by cross-attention, is built as its neighbours are.
    layer, known = next(iter(found.items()))
    path = probe.names[known.projection][len(probe.names[layer]) + 1 :]
    ffns: list[FFN] = []
    for layer in best:
        twin = dict(layer.named_modules()).get(path) if layer not in probe.outputs and type(known) is FFN else None
        if layer in found:
            ffns.append(found[layer])
        elif twin is not None:
            ffns.append(FFN(layer, twin, None, known.flat))
        else:
            ffns.append(NoFFN(layer, hidden))
    return best, ffns


def _ffn(probe: _Probe, layer: nn.Module, hidden: int) -> FFN | None:
    """The FFN of a layer: its widest last map, its routed experts, or both."""
    if layer not in probe.outputs:
        return None
    found: list[FFN] = []
    if (linear := _widest(probe, layer, hidden)) is not None:
        found.append(FFN(layer, linear, _gate(probe, layer, linear), probe.inputs[linear].ndim == 2))
    for module in layer.modules():
        if module in probe.calls and (experts := _experts(layer, module, *probe.calls[module])) is not None:
            found.append(experts)
    if len(found) < 2:
        return found[0] if found else None
    block = [m for m in layer.modules() if all(part.projection in set(m.modules()) for part in found)][-1]
    return Mixture(layer, block, parts=tuple(found))


def fused(module: nn.Module) -> bool:
    """Whether a module has weights of its own that could be those of several experts in one tensor."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return not isinstance(module, convolutions) and any(p.ndim > 2 for p in module.parameters(recurse=False))


@torch.no_grad()
def _experts(layer: nn.Module, module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Experts | None:
    """The experts that a module is, if the sum of some neurons' writes is what it gave."""
    hidden = out.shape[-1]
    for name, weight in module.named_parameters(recurse=False):
        for turned in (False, True):
            if weight.ndim != 3 or weight.shape[2 if turned else 1] != hidden:
                continue
            found = Experts(layer, module, last=name, turned=turned)
            try:
                seen, target = found.activations(*given).float(), (out - found.called(0 * found.weight[0], *given)).float()
            except Exception:  # it is called in another way, or these are not its last weights
                continue
            used = (seen != 0).any(0).nonzero()[:, 0].tolist()
            target = target.flatten(0, -2).unflatten(0, (-1, len(seen))).sum(0)
            if (seen[:, used] @ found.write(used) - target).norm() < 0.02 * target.norm():
                return found
    return None


def _widest(probe: _Probe, layer: nn.Module, hidden: int) -> nn.Linear | None:
    maps = [m for m in layer.modules() if m in probe.leaves and m in probe.inputs and probe.leaves[m].shape[-1] == hidden]
    good = [m for m in maps if probe.reaches(probe.outputs[layer], probe.leaves[m]) and probe.own_position(m)]
    return max(good, key=lambda m: probe.inputs[m].shape[-1], default=None)  # type: ignore[return-value]


def _gate(probe: _Probe, layer: nn.Module, projection: nn.Linear) -> nn.Module | None:
    """The module of the activation function in front of a projection."""
    width = projection.in_features
    near = [
        m
        for m in layer.modules()
        if m in probe.outputs and not any(True for _ in m.parameters()) and not isinstance(m, (nn.Dropout, nn.Identity))
        and not any(True for _ in m.children()) and probe.outputs[m].shape[-1] == width
    ]  # fmt: skip
    return near[-1] if near else None


def image_grid(count: int, inputs: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
    """Rows and columns of the `count` image tokens of one picture, given what the model reads: the grid that its processor names,
    in patches, of which a square of several may make one token; else a square. Raises MmnError where there is none."""
    inputs = inputs or {}
    if count < 2:
        raise MmnError(
            "The picture has no positions of its own in this model's prompt, as where words see it by cross-attention, so there is no "
            "heatmap to draw."
        )
    for name in ("image_grid_thw", "image_grid_hws", "image_grid_hw", "spatial_shapes"):
        if name in inputs and len(inputs[name]) == 1:
            height, width = inputs[name][0, -2:].tolist()
            side = (height * width / count) ** 0.5
            if round(height / side) * round(width / side) == count:
                return round(height / side), round(width / side)
    pixels = inputs.get("pixel_values")
    tiles = 1 if pixels is None or pixels.ndim not in (4, 5) else pixels.shape[pixels.ndim - 4]
    if tiles > 1:
        raise MmnError(f"The picture is read as {tiles} tiles, whose image tokens are no one grid, so there is no heatmap to draw.")
    side = round(count**0.5)
    if side * side != count:
        raise MmnError(f"{count} image tokens are no square grid, so there is no heatmap to draw for this model.")
    return side, side
