"""The FFN of a decoder layer and its neurons: what they give, what they write, and hooks on both.

A *neuron* is an input of the last linear map of a decoder layer's FFN. `FFN(x) = sum_i a_i w_i (+ bias)`: `a_i` is the neuron's
activation, what the map receives; `w_i`, its *write*, is a column of the map's weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
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
        found = self.within(units) or [(self.parts[0], [], [])]
        rows = torch.cat([part.write(own) for part, _, own in found])
        order = torch.tensor([place for _, places, _ in found for place in places], dtype=torch.long, device=rows.device)
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


def parts(ffn: FFN) -> tuple[FFN, ...]:
    """The FFNs side by side that make up a layer's, itself where it is one."""
    return ffn.parts if isinstance(ffn, Mixture) else (ffn,)


def neurons_at(layers: Sequence[int], places: Sequence[int] | np.ndarray) -> list[Neuron]:
    """Neurons by their number over all layers; `layers`: how many neurons each has."""
    starts = np.cumsum([0, *layers])
    found = np.searchsorted(starts, places, side="right") - 1
    return [Neuron(int(layer), int(place - starts[layer])) for layer, place in zip(found, places, strict=True)]


def by_layer(neurons: Sequence[Neuron]) -> dict[int, list[tuple[int, int]]]:
    """For each layer, in order, the neurons that lie in it as (place in `neurons`, unit)."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for place, (layer, unit) in enumerate(neurons):
        groups.setdefault(layer, []).append((place, unit))
    return dict(sorted(groups.items()))
