"""Change what neurons do while a `with` block lasts: zero, scale, mean-ablate, perturb, or shuffle the picture's tokens.

All of it is done by hooks, so the weights are never touched, and what a block changes ends with the block, also after an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmn.anatomy import Neuron
from mmn.errors import MmnError
from mmn.vlm import VLM

Neurons = Sequence[Neuron] | Sequence[Sequence[Neuron]]


def _by_layer(vlm: VLM, neurons: Neurons) -> tuple[dict[int, list[tuple[int, int]]], int]:
    """For each layer its (row, unit) pairs, and the number of rows: 0 where the same neurons are meant for every picture."""
    per_row = bool(neurons) and not isinstance(neurons[0], Neuron) and not isinstance(neurons[0][0], int)
    rows: Sequence[Sequence[Neuron]] = neurons if per_row else [neurons]  # type: ignore[assignment, list-item]
    layers: dict[int, list[tuple[int, int]]] = {}
    for row, some in enumerate(rows):
        vlm.anatomy.check([Neuron(*neuron) for neuron in some])
        for layer, unit in some:
            layers.setdefault(layer, []).append((row, unit))
    return layers, len(rows) if per_row else 0


@contextlib.contextmanager
def _replaced(vlm: VLM, neurons: Neurons, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts `change(layer, activations)` gives the neurons' new activations, `[..., neurons of the layer chosen]`."""
    layers, rows = _by_layer(vlm, neurons)

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        chosen_rows, units = (list(each) for each in zip(*layers[layer], strict=True))

        def replace(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            if rows == 0:
                x[..., units] = change(layer, x[..., units]).to(x.dtype)
            else:
                if len(x) != rows:
                    raise MmnError(
                        f"Neurons are given for {rows} pictures but the model reads {len(x)} at once; use batch_size={rows}."
                    )
                x[chosen_rows, :, units] = change(layer, x[chosen_rows, :, units].T).T.to(x.dtype)
            return (x, *args[1:])

        return replace

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = vlm.anatomy.projections[layer].register_forward_pre_hook(hook(layer))
            stack.callback(handle.remove)
        yield


def zero(vlm: VLM, neurons: Neurons) -> contextlib.AbstractContextManager[None]:
    """Neurons that say nothing at any position. `neurons` may be one list for all pictures, or a list of lists, one for each picture
    of a batch. Raises MmnError for neurons that are not in the model."""
    return _replaced(vlm, neurons, lambda _, x: torch.zeros_like(x))


def scale(vlm: VLM, neurons: Neurons, factor: float) -> contextlib.AbstractContextManager[None]:
    """Neurons that say `factor` times what they would. Raises MmnError for neurons that are not in the model."""
    return _replaced(vlm, neurons, lambda _, x: factor * x)


def mean_ablate(vlm: VLM, neurons: Sequence[Neuron], means: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Neurons that always say their mean; `means` is a list over layers of `[neurons]`, measured on pictures of your choice.

    Raises MmnError for neurons that are not in the model."""
    layers, _ = _by_layer(vlm, neurons)
    values = {layer: means[layer][[unit for _, unit in pairs]] for layer, pairs in layers.items()}
    return _replaced(vlm, neurons, lambda layer, x: values[layer].to(x.device).expand_as(x))


@contextlib.contextmanager
def perturb(vlm: VLM, neurons: Sequence[Neuron], sigma: float, *, seed: int = 0) -> Iterator[None]:
    """Neurons whose writes carry N(0, 1) * sigma of noise, as in the paper's perturbation [code].

    Raises MmnError for neurons that are not in the model."""
    layers, _ = _by_layer(vlm, neurons)
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        for layer, pairs in sorted(layers.items()):
            projection = vlm.anatomy.projections[layer]
            units = [unit for _, unit in pairs]
            noise = sigma * torch.randn(len(units), projection.out_features, generator=generator)

            def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, units: list[int] = units, noise: Tensor = noise) -> Tensor:
                return out + args[0][..., units] @ noise.to(out.device, out.dtype)

            stack.callback(projection.register_forward_hook(add).remove)
        yield


@contextlib.contextmanager
def shuffle_image_tokens(vlm: VLM, order: Sequence[int] | None = None, *, seed: int = 0) -> Iterator[np.ndarray]:
    """The picture's tokens in another order at the language model's input: position p holds what token `order[p]` held.

    Yields the order as `[tokens]` (drawn from `seed` at the first picture if none is given), so that heatmaps can be put back:
    `grid.flatten()[np.argsort(order)]`. Raises MmnError for an order that is no permutation of the tokens."""
    chosen = np.array([] if order is None else order, dtype=int)
    result = chosen if order is not None else np.zeros(0, int)

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        embeds = kwargs.get("inputs_embeds")
        places = vlm.image_positions
        if embeds is None or places is None or embeds.shape[1] < places.shape[1]:
            return args, kwargs  # a later step of generation, which reads no picture
        count = int(places[0].sum())
        nonlocal result
        if len(result) == 0:
            result = np.random.default_rng(seed).permutation(count)
            drawn.resize(count, refcheck=False)
            drawn[:] = result
        if sorted(result.tolist()) != list(range(count)):
            raise MmnError(f"The order must hold each of the {count} image tokens once.")
        mixed = embeds.clone()
        for row in range(len(embeds)):
            where = places[row].to(embeds.device).nonzero()[:, 0]
            mixed[row, where] = embeds[row, where[torch.as_tensor(result, device=embeds.device)]]
        return args, {**kwargs, "inputs_embeds": mixed}

    drawn = result.copy()
    handle = vlm.anatomy.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield drawn
    finally:
        handle.remove()


def same_layer_random(vlm: VLM, neurons: Sequence[Neuron], *, draws: int = 20, seed: int = 0) -> list[list[Neuron]]:
    """The control: `draws` lists in which each neuron is replaced by another of its layer, never one of `neurons`, none twice.

    Raises MmnError where a layer has too few other neurons."""
    vlm.anatomy.check([Neuron(*neuron) for neuron in neurons])
    rng = np.random.default_rng(seed)
    taken = {layer: {unit for la, unit in neurons if la == layer} for layer, _ in neurons}
    free = {layer: np.setdiff1d(np.arange(vlm.anatomy.neurons[layer]), list(units)) for layer, units in taken.items()}
    for layer, units in taken.items():
        if len(free[layer]) < len(units):
            raise MmnError(f"Layer {layer} has too few other neurons to replace {len(units)} of them.")
    lists = []
    for _ in range(draws):
        drawn = {layer: iter(rng.choice(free[layer], len(units), replace=False).tolist()) for layer, units in taken.items()}
        lists.append([Neuron(layer, next(drawn[layer])) for layer, _ in neurons])
    return lists
