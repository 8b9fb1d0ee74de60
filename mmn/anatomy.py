"""Where a vision-language model keeps what the method needs, found by structure and checked by arithmetic.

A *neuron* is an input of the last linear map of a decoder layer's FFN. `FFN(x) = sum_i a_i w_i (+ bias)`: `a_i` is the neuron's
activation, what the map receives; `w_i`, its *write*, is a column of the map's weight.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmn import weights
from mmn.errors import MmnError

Watcher = Callable[[Tensor], Tensor | None]


class Neuron(NamedTuple):
    """One neuron: decoder layer and unit, both counted from 0."""

    layer: int
    unit: int

    def __str__(self) -> str:
        return f"L{self.layer}.{self.unit}"


class Handles:
    """Hooks that are removed together."""

    def __init__(self, *handles: Any):
        self.handles = list(handles)

    def append(self, handle: Any) -> None:
        """One more."""
        self.handles.append(handle)

    def remove(self) -> None:
        """Remove them all."""
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class FFN:
    """The FFN of one layer. layer: the module it is in. projection: its last linear map, weight `[hidden, neurons]`. gate: the
    module whose output is the activation function's, None where there is none of its own. flat: whether it sees all positions of
    a batch in one row."""

    layer: nn.Module
    projection: Any
    gate: nn.Module | None = None
    flat: bool = False

    @property
    def neurons(self) -> int:
        """How many there are."""
        return self.projection.in_features

    @property
    def plain(self) -> bool:
        """Whether the weights are plain numbers in memory that can be changed in place: not quantised, not offloaded."""
        weight = self.projection.weight
        return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta

    @property
    def columns(self) -> Tensor:
        """The weights themselves, `[hidden, neurons]`: writing into them changes the model."""
        return self.projection.weight.data

    def write(self, units: Sequence[int]) -> Tensor:
        """The writes of some neurons, float32 `[units, hidden]`."""
        return weights.columns(self.projection, units)

    def read(self, directions: Tensor) -> Tensor:
        """Inner product of every write with some directions `[n, hidden]`: float32 `[n, neurons]`. One product reads the
        weights once."""
        weight = weights.matrix(self.projection)
        return directions.to(weight.device, torch.float32) @ weight.float()

    def watch(self, watcher: Watcher) -> Handles:
        """Call `watcher` with the activations `[batch, positions, neurons]` at every forward pass; what it returns, if
        anything, takes their place."""
        handles, rows = self._rows()

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            seen = args[0].unflatten(0, rows) if self.flat else args[0]
            changed = watcher(seen)
            return None if changed is None else (changed.reshape(args[0].shape), *args[1:])

        handles.append(self.projection.register_forward_pre_hook(hook))
        return handles

    def add(self, units: Sequence[int], changes: Tensor) -> Handles:
        """Add `changes` float32 `[units, hidden]` to the units' writes by a hook: `a_i * change_i` goes to the output, in
        float32."""
        chosen = list(units)

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            extra = args[0][..., chosen].float() @ changes.to(out.device, torch.float32)
            return (out.float() + extra).to(out.dtype)

        return Handles(self.projection.register_forward_hook(hook))

    def watch_gate(self, watcher: Watcher) -> Handles:
        """The same for the activation function's output, which the paper's release takes for the activations."""
        if self.gate is None:
            raise MmnError("This FFN's activation function is no module of its own, so its output cannot be recorded.")
        handles, rows = self._rows()
        hook = self.gate.register_forward_hook(lambda _, __, out: watcher(out.unflatten(0, rows) if self.flat else out))
        handles.append(hook)
        return handles

    def _rows(self) -> tuple[Handles, list[int]]:
        """Rows and positions of the batch that the layer is reading, for an FFN that does not see them."""
        rows: list[int] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

        handles = [self.layer.register_forward_pre_hook(hook, with_kwargs=True)] if self.flat else []
        return Handles(*handles), rows


@dataclass(frozen=True)
class Experts(FFN):
    """The routed experts of one layer, whose weights lie in one tensor. Neuron `expert * width + unit`; its activation is what the
    expert's last map receives times the routing weight, 0 where the expert is not chosen.

    projection: the module of the experts. last: the name of their last weights in it, `[experts, hidden, width]`, or `[experts,
    width, hidden]` where `turned`. No module stands between the experts' maps to be hooked: the activations are what the
    experts' own code gives when their last weights are replaced by ones that pass on what they receive."""

    last: str = ""
    turned: bool = False
    point: nn.Module = field(default_factory=nn.Identity)  # where watchers are hooked
    added: list[Any] = field(default_factory=list)  # (units, changes) of each `add`
    running: list[Any] = field(default_factory=list)  # watchers and adds that are on

    flat: bool = True
    plain = False

    @property
    def weight(self) -> Tensor:
        """The experts' last weights, `[experts, hidden, width]`: writing into them changes the model."""
        weight = getattr(self.projection, self.last).data
        return weight.transpose(1, 2) if self.turned else weight

    @property
    def width(self) -> int:
        """Neurons of one expert."""
        return self.weight.shape[2]

    @property
    def neurons(self) -> int:
        """Experts times the width of one."""
        return self.weight.shape[0] * self.width

    def write(self, units: Sequence[int]) -> Tensor:
        """The writes of some neurons, float32 `[units, hidden]`."""
        index = torch.as_tensor(list(units), dtype=torch.long, device=self.weight.device)
        return self.weight[index // self.width, :, index % self.width].float()

    def read(self, directions: Tensor) -> Tensor:
        """Inner product of every write with some directions `[n, hidden]`: float32 `[n, neurons]`."""
        directions = directions.to(self.weight.device, torch.float32)
        return torch.cat([directions @ expert.float() for expert in self.weight], -1)

    def activations(self, *given: Any) -> Tensor:
        """Activations `[rows, neurons]` when the module is called with rows `[rows, hidden]`, the experts chosen for each
        `[rows, chosen]` and their weights; with weights for all experts `[rows, experts]`; or with `[experts * rows, hidden]`
        alone, the weights in it already."""
        rows, routing = given[0].flatten(0, -2), given[1:]
        experts, _, width = self.weight.shape
        if not routing:
            return self._passed_on(rows).unflatten(0, (experts, -1)).transpose(0, 1).flatten(1)
        chosen = next((each for each in routing if not each.is_floating_point()), None)
        if chosen is None:  # all experts, each alone
            alone = routing[0].reshape(-1, 1, experts) * torch.eye(experts, device=rows.device, dtype=rows.dtype)
            return self._passed_on(rows.repeat_interleave(experts, 0), alone.flatten(0, 1)).unflatten(0, (-1, experts)).flatten(1)
        single = [each.reshape(-1, 1) for each in routing]
        seen = self._passed_on(rows.repeat_interleave(chosen.shape[-1], 0), *single).unflatten(0, chosen.shape)
        place = torch.arange(len(rows), device=chosen.device)[:, None].expand_as(chosen), chosen
        return seen.new_zeros(len(rows), experts, width).index_put(place, seen, accumulate=True).flatten(1)

    def _passed_on(self, *given: Any) -> Tensor:
        """What the last weights receive, `[rows, width]`: as many columns at a time as the output has."""
        experts, hidden, width = self.weight.shape
        columns = []
        for start in range(0, width, hidden):
            count = min(hidden, width - start)
            only = self.weight.new_zeros(hidden, width)
            only[range(count), range(start, start + count)] = 1
            columns.append((self.called(only, *given) - self.called(torch.zeros_like(only), *given))[:, :count])
        return torch.cat(columns, -1)

    def called(self, last: Tensor, *given: Any) -> Tensor:
        """What the module gives when each expert's last weights are `last` `[hidden, width]`."""
        weights = (last.T if self.turned else last).expand(self.weight.shape[0], -1, -1)
        return torch.func.functional_call(_Bare(self.projection), {f"module.{self.last}": weights}, given)

    def watch(self, watcher: Watcher) -> Handles:
        """Call `watcher` with the activations `[batch, positions, neurons]` at every forward pass; what it returns, if
        anything, takes their place."""
        return self._start(self.point.register_forward_hook(lambda _, __, seen: watcher(seen)))

    def add(self, units: Sequence[int], changes: Tensor) -> Handles:
        """Add `changes` float32 `[units, hidden]` to the units' writes by a hook, in float32."""
        self.added.append((list(units), changes))
        return self._start(_Entry(self.added))

    def _start(self, handle: Any) -> Handles:
        handles, rows = self._rows()
        entry = object()
        self.running.append(entry)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
            return self._run((*args, *kwargs.values()), out, rows) if self.running[0] is entry else None

        handles.append(handle)
        handles.append(_Entry(self.running))
        handles.append(self.projection.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _run(self, given: tuple[Any, ...], out: Tensor, rows: list[int]) -> Tensor | None:
        """All that watches and adds at one forward pass."""
        before = self.activations(*given)
        seen = before.unflatten(0, rows)
        after = self.point(seen)
        if after is seen and not self.added and not after.requires_grad:
            return None
        after = after.flatten(0, 1)
        used = ((before != 0) | (after != 0)).any(0).nonzero()[:, 0].tolist()
        writes = self.write(used)
        old, new = before[:, used].float() @ writes, after[:, used].float() @ writes
        for units, changes in self.added:
            new = new + after[:, units].float() @ changes.to(out.device, torch.float32)
        # Where each expert's rows are given apart they are summed later, so that any expert's may carry the change.
        flat = out.detach().flatten(0, -2).float()
        flat = torch.cat([flat[: len(old)] - old.detach() + new, flat[len(old) :]])
        return flat.reshape(out.shape).to(out.dtype)


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        """What the module gives."""
        return self.module.forward(*given)


class _Entry:
    """Takes the newest entry out of a list."""

    def __init__(self, entries: list[Any]):
        self.entries, self.entry = entries, entries[-1]

    def remove(self) -> None:
        """Take it out."""
        self.entries[:] = [each for each in self.entries if each is not self.entry]


@dataclass(frozen=True)
class Mixture(FFN):
    """Several FFNs of one layer side by side, such as a shared one and routed experts: their neurons one after another.

    projection: the smallest module around all of them."""

    parts: tuple[FFN, ...] = ()

    plain = False

    @property
    def neurons(self) -> int:
        """Of all parts."""
        return sum(part.neurons for part in self.parts)

    def within(self, units: Sequence[int]) -> list[tuple[FFN, list[int], list[int]]]:
        """For each part that some units lie in: the part, their places in `units`, and their numbers in the part."""
        found, start = [], 0
        for part in self.parts:
            places = [place for place, unit in enumerate(units) if start <= unit < start + part.neurons]
            found.append((part, places, [units[place] - start for place in places]))
            start += part.neurons
        return [each for each in found if each[1]]

    def write(self, units: Sequence[int]) -> Tensor:
        """The writes of some neurons, float32 `[units, hidden]`."""
        found = self.within(units)
        rows = torch.cat([part.write(own) for part, _, own in found])
        order = torch.tensor([place for _, places, _ in found for place in places], device=rows.device)
        return torch.empty_like(rows).index_copy(0, order, rows)

    def read(self, directions: Tensor) -> Tensor:
        """Inner product of every write with some directions `[n, hidden]`: float32 `[n, neurons]`."""
        return torch.cat([part.read(directions) for part in self.parts], -1)

    def watch(self, watcher: Watcher) -> Handles:
        """Call `watcher` with the activations `[batch, positions, neurons]` at every forward pass; what it returns, if
        anything, takes their place: all parts are then run once more, because one may have run before another was seen."""
        seen: dict[int, Tensor] = {}
        given: dict[int, Tensor] = {}
        cache: dict[str, Any] = {}

        def part(place: int, activations: Tensor) -> Tensor | None:
            seen[place] = activations
            return given.get(place)

        def start(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.clear()
            cache.clear()
            # Where the parts stand right in the layer, attention runs again with them and must not be cached twice.
            cache.update({name: copy.deepcopy(value) for name, value in kwargs.items() if name == "past_key_values"})

        def end(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Any:
            changed = watcher(torch.cat([seen[place] for place in range(len(self.parts))], -1))
            if changed is None:
                return None
            given.update(enumerate(changed.split([part.neurons for part in self.parts], -1)))
            return block.forward(*args, **{**kwargs, **cache})

        handles = Handles(self.projection.register_forward_pre_hook(start, with_kwargs=True))
        for place, each in enumerate(self.parts):
            handles.append(each.watch(partial(part, place)))
        handles.append(self.projection.register_forward_hook(end, with_kwargs=True))
        return handles

    def add(self, units: Sequence[int], changes: Tensor) -> Handles:
        """Add `changes` float32 `[units, hidden]` to the units' writes by a hook, in float32."""
        return Handles(*[part.add(own, changes[places]) for part, places, own in self.within(units)])


class NoFFN(FFN):
    """A layer without an FFN, or whose FFN has no neurons that can be named: it counts as a layer of no neurons."""

    def __init__(self, layer: nn.Module, hidden: int):
        super().__init__(layer, nn.Linear(0, hidden, bias=False))

    neurons = 0
    plain = False

    def write(self, units: Sequence[int]) -> Tensor:
        """Nothing, `[0, hidden]`."""
        return torch.empty(0, self.projection.out_features)

    def read(self, directions: Tensor) -> Tensor:
        """Nothing, `[n, 0]`."""
        return directions.new_empty(len(directions), 0)

    def watch(self, watcher: Watcher) -> Handles:
        """Call `watcher` with activations of no neurons."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watcher((args[0] if args else kwargs["hidden_states"])[..., :0])

        return Handles(self.layer.register_forward_pre_hook(hook, with_kwargs=True))

    watch_gate = watch


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    decoder: the module that runs the layers. layers, ffns: the decoder's layers and their FFNs. final_norm: what stands between
    the last layer and the unembedding. unembedding: the linear map to the vocabulary, weight `[vocabulary, hidden]`.
    image_token: the id that marks the positions of the picture in the prompt. stands_for: how many positions of the stream each
    mark stands for, where the model itself puts them in its place."""

    decoder: nn.Module
    layers: list[nn.Module]
    ffns: list[FFN]
    final_norm: nn.Module | None
    unembedding: nn.Linear
    image_token: int | None
    stands_for: int = 1

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
        marks = torch.zeros_like(ids, dtype=torch.bool) if self.image_token is None else ids == self.image_token
        if self.stands_for == 1:
            return marks
        return torch.stack([row.repeat_interleave(1 + row * (self.stands_for - 1)) for row in marks])

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
            if not (isinstance(neuron, tuple) and len(neuron) == 2):
                raise MmnError(f"{neuron!r} is no neuron: give mmn.Neuron(layer, unit).")
            layer, unit = neuron
            if not (0 <= layer < len(sizes) and 0 <= unit < sizes[layer]):
                widths = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
                has = f"{len(sizes)} layers of {widths} neurons, counted from L0.0"
                raise MmnError(f"There is no neuron {Neuron(layer, unit)} in this model: it has {has}.")


def parts(ffn: FFN) -> tuple[FFN, ...]:
    """The FFNs side by side that make up a layer's, itself where it is one."""
    return ffn.parts if isinstance(ffn, Mixture) else (ffn,)


def by_layer(neurons: Sequence[Neuron]) -> dict[int, list[tuple[int, int]]]:
    """For each layer, in order, the neurons that lie in it as (place in `neurons`, unit)."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for place, (layer, unit) in enumerate(neurons):
        groups.setdefault(layer, []).append((place, unit))
    return dict(sorted(groups.items()))


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
    stack, ffns = _ffns(probe, hidden)
    names = ("image_token_id", "image_token_index", "video_token_index")  # the last where pictures are read as short films
    token = next((token for name in names if (token := getattr(model.config, name, None)) is not None), None)
    return Anatomy(probe.decoder, list(stack), ffns, probe.final_norm(stack, hidden), unembedding, token)


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
                    module(**given, use_cache=False)
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

    def final_norm(self, stack: nn.ModuleList, hidden: int) -> nn.Module | None:
        """The last norm that ran behind the last layer, None where there is none."""
        last = max((self.order.index(layer) for layer in stack if layer in self.order), default=0)
        inside = {module for layer in stack for module in layer.modules()}
        norms = [m for m in self.order[last:] if m not in inside and is_norm(m, hidden)]
        return norms[-1] if norms else None


WORDS = 5  # of the probe


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's, a quantised one of the same interface, or GPT-2's."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


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


# ------------------------------------------------------------------------------------------------------------------- command


def describe(model: Any, anatomy: Anatomy) -> str:
    """The anatomy as a readable tree, with what is weak about it."""
    names = {module: name for name, module in model.named_modules()}
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index, ffn in enumerate(anatomy.ffns):
        start = len(names[ffn.layer]) + 1
        kinds.setdefault(tuple(_kind(part, {m: name[start:] for m, name in names.items()}) for part in parts(ffn)), []).append(
            index
        )
    tied = anatomy.unembedding.weight is model.get_input_embeddings().weight
    rows = [("decoder", names[anatomy.decoder] or "the model itself")]
    rows.append(("layers", f"{names[anatomy.layers[0]]} ... {names[anatomy.layers[-1]]}"))
    for kind, indices in kinds.items():
        rows += [(f"  {_ranges(indices) if not place else ''}", line) for place, line in enumerate(kind)]
    rows.append(("final norm", names[anatomy.final_norm] if anatomy.final_norm is not None else "none"))
    words = f"{names[anatomy.unembedding]}, {anatomy.unembedding.out_features:,} words" + (
        ", tied to the embedding" if tied else ""
    )
    rows.append(("unembedding", words))
    rows.append(("logits", _logits(model, anatomy)))
    rows.append(("image token", str(anatomy.image_token) if anatomy.image_token is not None else "none"))
    lines = [f"{type(model).__name__}: {anatomy.total:,} neurons in {len(anatomy.layers)} layers"]
    lines += [f"  {name:<14}{line}" for name, line in rows]
    return "\n".join(lines + [f"  warning: {warning}" for warning in warnings(anatomy)])


@torch.no_grad()
def _logits(model: Any, anatomy: Anatomy) -> str:
    """What becomes of the unembedding's products before they are logits, from a pass over a few words."""
    raw: list[Tensor] = []
    handle = anatomy.unembedding.register_forward_hook(lambda _, __, out: raw.append(out.detach().clone().float()))
    ids = torch.arange(WORDS, device=anatomy.device)[None] + 11
    try:
        given = model(input_ids=ids, use_cache=False).logits.float().to(anatomy.device)
    except Exception:  # as in finding: what a model wants beside words is its own affair
        return "not known, since it reads no words alone"
    finally:
        handle.remove()
    factor = float((given * raw[-1]).sum() / raw[-1].square().sum())
    if (given - factor * raw[-1]).abs().max() > 1e-2 * given.abs().max():
        return "the products bent, as by a soft cap: scores are in units from before that"
    return "the products as they are" if abs(factor - 1) < 1e-3 else f"the products times {factor:.4g}"


def _kind(part: FFN, names: dict[nn.Module, str]) -> str:
    """One line about one FFN of a layer."""
    if isinstance(part, NoFFN):
        return "no neurons"
    if isinstance(part, Experts):
        each = f"{len(part.weight)} experts of {part.width:,}"
        return f"{part.neurons:,} neurons, {each}: the inputs of {names[part.projection]}.{part.last} times routing weights"
    bias = ", which adds a bias" if part.projection.bias is not None else ""
    gate = f"; activation {names[part.gate]}" if part.gate is not None else "; activation no module of its own"
    return f"{part.neurons:,} neurons, the inputs of {names[part.projection]}{bias}{gate}"


def _ranges(indices: list[int]) -> str:
    """Numbers in order, runs as first-last."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def warnings(anatomy: Anatomy) -> list[str]:
    """What the anatomy leaves out or takes on trust, one sentence each."""
    found = []
    if bare := [i for i, ffn in enumerate(anatomy.ffns) if not ffn.neurons]:
        found.append(f"{len(bare)} layers have no FFN of a single linear map, so none of their neurons is named: {bare}.")
    if crowded := overlooked(anatomy):
        found.append(
            f"{len(crowded)} layers have routed experts in fused weights, whose units are not among the neurons: {crowded}."
        )
    if anatomy.final_norm is None:
        found.append("there is no final norm, so norm_aware scores are direct ones.")
    if anatomy.image_token is None:
        found.append("the configuration names no image token, so there are no image positions and no heatmaps.")
    return found


def overlooked(anatomy: Anatomy) -> list[int]:
    """Layers with weights that look like routed experts' and are not among the neurons."""
    found = []
    for index, (layer, ffn) in enumerate(zip(anatomy.layers, anatomy.ffns, strict=True)):
        known = [part.projection for part in parts(ffn)]
        if any(fused(module) and module not in known for module in layer.modules()):
            found.append(index)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn anatomy`."""
    parser.add_argument("model", nargs="?", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
    parser.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    parser.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn anatomy`."""
    from mmn.vlm import load

    vlm = load(args.model, device_map=args.device_map, dtype=args.dtype)
    print(describe(vlm.model, vlm.anatomy))
    return 0
