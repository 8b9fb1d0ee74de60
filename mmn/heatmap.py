"""Where in the picture neurons fire: their activations at the image tokens, laid out as a grid. [code] of the paper: bilinear to the
picture's size, mask above the 95th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmn.anatomy import Neuron, image_grid
from mmn.errors import MmnError
from mmn.trace import Trace
from mmn.vlm import VLM


@dataclass(frozen=True)
class Heatmap:
    """Activations of some neurons at the image tokens of one picture.

    grid: float32 `[neurons, rows, columns]`. size: width and height of the picture in pixels."""

    neurons: list[Neuron]
    grid: Tensor
    size: tuple[int, int]

    def on_image(self, *, per_neuron: bool = False) -> np.ndarray:
        """The mean over the neurons, or each of them, bilinear to the picture's size: float32 `[height, width]`, or
        `[neurons, height, width]`."""
        grid = self.grid if per_neuron else self.grid.mean(dim=0, keepdim=True)
        width, height = self.size
        maps = F.interpolate(grid[None], size=(height, width), mode="bilinear", align_corners=False)[0].numpy()
        return maps if per_neuron else maps[0]

    def mask(self, percentile: float = 95) -> np.ndarray:
        """Where the mean is above its own percentile, bool `[height, width]`. Raises MmnError outside 0 ... 100."""
        if not 0 <= percentile <= 100:
            raise MmnError(f"The percentile is {percentile}; it must be between 0 and 100.")
        heat = self.on_image()
        return heat > np.percentile(heat, percentile)


@torch.inference_mode()
def heatmap(vlm: VLM, trace: Trace, neurons: Sequence[Neuron]) -> Heatmap:
    """Read the picture of `trace` once more and keep what these neurons do at its image tokens, and nothing else.

    Raises MmnError for no neurons, neurons that are not in the model, or image tokens that form no grid."""
    neurons = [Neuron(*neuron) for neuron in neurons]
    if not neurons:
        raise MmnError("There are no neurons to draw; give at least one.")
    vlm.anatomy.check(neurons)
    batch = vlm.replay_ids(trace, 0)
    places = batch["input_ids"][0] == vlm.anatomy.image_token
    rows, columns = image_grid(int(places.sum()))
    units: dict[int, list[int]] = {}
    for layer, unit in dict.fromkeys(neurons):
        units.setdefault(layer, []).append(unit)
    found: dict[Neuron, Tensor] = {}

    def keep(layer: int, args: tuple[Tensor, ...]) -> None:
        acts = args[0][0, places.to(args[0].device)][:, units[layer]].T.float().cpu()
        found.update({Neuron(layer, unit): row for unit, row in zip(units[layer], acts, strict=True)})

    handles = [
        vlm.anatomy.projections[layer].register_forward_pre_hook(lambda _, args, layer=layer: keep(layer, args)) for layer in units
    ]
    try:
        vlm.model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    assert trace.image is not None
    grid = torch.stack([found[neuron] for neuron in neurons]).reshape(-1, rows, columns)
    return Heatmap(neurons, grid.clone(), trace.image.size)
