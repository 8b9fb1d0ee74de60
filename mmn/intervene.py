"""Change what neurons do, for as long as a `with` block lasts: zero, scale, mean-ablate, perturb, shuffle the picture.

Everything here works by hooks, at every position of every forward pass, and leaves the weights alone. A list of lists of
neurons in place of a list gives each row of a batch its own neurons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmn.errors import MmnError, finite, whole_number
from mmn.ffn import Neuron, Watcher, by_layer
from mmn.hooks import Removable, hooked
from mmn.trace import Trace
from mmn.vlm import VLM

Chosen = Sequence[Neuron] | Sequence[Sequence[Neuron]]


def _rows(vlm: VLM, neurons: Chosen) -> list[list[Neuron]]:
    """One list of neurons for the whole batch, or one for each row."""
    chosen = list(neurons)
    nested = bool(chosen) and not isinstance(chosen[0], Neuron) and isinstance(chosen[0], list)
    rows: list[list[Neuron]] = [list(row) for row in chosen] if nested else [chosen]  # type: ignore[arg-type, list-item]
    for row in rows:
        vlm.anatomy.check(row)
    return rows


@contextmanager
def _affine(vlm: VLM, neurons: Chosen, factor: float, means: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Multiply the neurons' activations by `factor` and add their entry of `means`, if there is one."""
    rows = _rows(vlm, neurons)
    layers = sorted({neuron.layer for row in rows for neuron in map(Neuron._make, row)})

    def watched(layer: int) -> Removable:
        ffn = vlm.anatomy.ffns[layer]
        times = torch.ones(len(rows), 1, ffn.neurons)
        plus = torch.zeros(len(rows), 1, ffn.neurons)
        for index, row in enumerate(rows):
            units = [unit for _, unit in by_layer(row).get(layer, [])]
            times[index, 0, units] = factor
            if means is not None:
                plus[index, 0, units] = means[layer][units]
        return ffn.watch(_changer(times, plus))

    with hooked(watched(layer) for layer in layers):
        yield


def _changer(times: Tensor, plus: Tensor) -> Watcher:
    adds = bool(plus.any())
    placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def change(activations: Tensor) -> Tensor:
        if len(times) not in (1, activations.shape[0]):
            rows = activations.shape[0]
            raise MmnError(f"Neurons are given for {len(times)} pictures but the model reads {rows} at once: use as large batches.")
        if activations.device not in placed:
            placed[activations.device] = tuple(t.to(activations.device, activations.dtype) for t in (times, plus))  # type: ignore[assignment]
        factor, shift = placed[activations.device]
        # torch.where and not a product alone: an activation of infinity times zero would be no number.
        changed = torch.where(factor == 0, torch.zeros_like(activations), activations * factor)
        return changed + shift if adds else changed

    return change


def zero(vlm: VLM, neurons: Chosen) -> AbstractContextManager[None]:
    """With the neurons' activations set to zero at all positions. Raises MmnError for a neuron that is not there."""
    return _affine(vlm, neurons, 0.0)


def scale(vlm: VLM, neurons: Chosen, factor: float) -> AbstractContextManager[None]:
    """With the neurons' activations multiplied by `factor` at all positions."""
    return _affine(vlm, neurons, finite("factor is", factor))


def mean_ablate(vlm: VLM, neurons: Chosen, means: Sequence[Tensor]) -> AbstractContextManager[None]:
    """With the neurons' activations replaced, at all positions, by their mean: for each layer `[neurons]`, such as
    `mean_activations` gives. Raises MmnError for means of other shapes."""
    if means is None or [len(each) for each in means] != vlm.anatomy.neurons:
        raise MmnError(
            "Means are a tensor a layer, these have other numbers of neurons: take mmn.mean_activations of the model's own captions."
        )
    return _affine(vlm, neurons, 0.0, means)


def mean_activations(traces: Sequence[Trace]) -> list[Tensor]:
    """Mean activations over the steps of some captions, each caption counting the same: for each layer float32 `[neurons]`.

    Raises MmnError if there is none, or one was not recorded."""
    if isinstance(traces, Trace) or not traces or any(not trace.recorded or not len(trace.tokens) for trace in traces):
        raise MmnError("Means come from captions with recorded activations: give a list of at least one, made with recording on.")
    layers = range(len(traces[0].activations))
    return [torch.stack([trace.activations[layer].mean(0) for trace in traces]).mean(0) for layer in layers]


def _generator(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(seed)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise MmnError(f"seed is a whole number below 2**63, not {seed!r}.") from None


@contextmanager
def perturb(vlm: VLM, neurons: Sequence[Neuron], sigma: float, seed: int = 0) -> Iterator[None]:
    """With N(0, 1) * sigma added to every number of the neurons' writes (the paper's release), drawn in float32 on the CPU."""
    sigma = finite("sigma is a standard deviation,", sigma, least=0)
    vlm.anatomy.check(neurons)
    noise = torch.randn(len(neurons), vlm.hidden, generator=_generator(seed)) * sigma
    with added(vlm, neurons, noise):
        yield


@contextmanager
def added(vlm: VLM, neurons: Sequence[Neuron], changes: Tensor) -> Iterator[None]:
    """With `changes` float32 `[neurons, hidden]` added to the neurons' writes: a hook adds `a_i * change_i` to the projection's
    output in float32, so that quantised, offloaded and half-precision weights are changed as exactly as others."""
    vlm.anatomy.check(neurons)

    def add(layer: int, group: list[tuple[int, int]]) -> Removable:
        places, units = (list(each) for each in zip(*group, strict=True))
        return vlm.anatomy.ffns[layer].add(units, changes[places])

    with hooked(add(layer, group) for layer, group in by_layer(neurons).items()):
        yield


def copied(vlm: VLM, rows: int) -> AbstractContextManager[None]:
    """With the one row that reaches the decoder copied into `rows`: the picture is seen once, and in whatever form its pixels come."""

    def copy(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def wide(value: Any) -> Any:
            return value.expand(rows, *value.shape[1:]) if isinstance(value, Tensor) and value.shape[:1] == (1,) else value

        return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}

    return hooked(each.register_forward_pre_hook(copy, with_kwargs=True) for each in [vlm.anatomy.decoder])


class Shuffle:
    """The permutation of the image tokens in use, int64 `[image tokens]`; None until the first picture."""

    def __init__(self, permutation: Tensor | None, seed: int):
        self.permutation = None if permutation is None else torch.as_tensor(permutation).reshape(-1)
        if self.permutation is not None and sorted(self.permutation.tolist()) != list(range(len(self.permutation))):
            raise MmnError("A permutation names every position from 0 once, in any order.")
        self.seed = seed

    def of(self, count: int) -> Tensor:
        """The permutation for `count` tokens. Raises MmnError if the one given has another length."""
        if self.permutation is None:
            self.permutation = torch.randperm(count, generator=_generator(self.seed))
        if len(self.permutation) != count:
            raise MmnError(f"The permutation has {len(self.permutation)} entries and the picture {count} tokens.")
        return self.permutation


@contextmanager
def shuffle_image_tokens(vlm: VLM, permutation: Tensor | None = None, *, seed: int = 0) -> Iterator[Shuffle]:
    """With the picture's tokens permuted at the language model's input: position p reads what stood at `permutation[p]`.

    Without a permutation one is drawn from `seed` at the first picture, for its number of tokens. Gives a handle whose
    `.permutation` is the one in use. Raises MmnError at its end if pictures were read and none had two tokens to move."""
    state = Shuffle(permutation, seed)
    where: list[Tensor] = []
    read = moves = False

    def find(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal read
        read = read or any(kwargs.get(name) is not None for name in ("pixel_values", "flattened_patches"))
        ids = kwargs.get("input_ids", args[0] if args else None)
        where[:] = [vlm.anatomy.image_positions(ids)] if ids is not None else []

    def move(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        nonlocal moves
        embedded = kwargs.get("inputs_embeds")
        if not where or embedded is None or embedded.shape[:2] != where[0].shape or not where[0].any():
            return None
        moved = embedded.clone()
        order: list[Tensor] = []  # of the image positions of all rows, one row after another
        for row, mask in enumerate(where[0].to(embedded.device)):
            if count := int(mask.sum()):
                moves = moves or count > 1
                turned = state.of(count).to(embedded.device)
                moved[row, mask] = embedded[row, mask][turned]
                order.append(turned + sum(map(len, order)))
        deep = kwargs.get("deepstack_visual_embeds")  # what some models add at the same positions in later layers
        more = {"deepstack_visual_embeds": [each[torch.cat(order)] for each in deep]} if deep else {}
        return args, {**kwargs, "inputs_embeds": moved, **more}

    places = (vlm.model, find), (vlm.anatomy.decoder, move)
    with hooked(module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in places):
        yield state
    if read and not moves:
        raise MmnError(
            "The picture has no tokens to shuffle in this model's prompt, as where words see it by cross-attention: take another model."
        )


def same_layer_random(vlm: VLM, neurons: Sequence[Neuron], draws: int = 20, seed: int = 0) -> list[list[Neuron]]:
    """The random control: `draws` lists in which each neuron is replaced by another of its layer, never one of the given, none
    twice.

    Raises MmnError if a layer has too few others."""
    vlm.anatomy.check(neurons)
    whole_number("draws", draws)
    generator = _generator(seed)
    groups = by_layer(neurons)
    others = {}
    for layer, group in groups.items():
        given = {unit for _, unit in group}
        others[layer] = torch.tensor([u for u in range(vlm.anatomy.neurons[layer]) if u not in given])
        if len(others[layer]) < len(group):
            raise MmnError(f"Layer {layer} has only {len(others[layer])} other neurons to draw {len(group)} from.")
    drawn = []
    for _ in range(draws):
        row: list[Neuron] = [Neuron(0, 0)] * len(neurons)
        for layer, group in groups.items():
            picks = others[layer][torch.randperm(len(others[layer]), generator=generator)[: len(group)]].tolist()
            for (place, _), unit in zip(group, picks, strict=True):
                row[place] = Neuron(layer, unit)
        drawn.append(row)
    return drawn
