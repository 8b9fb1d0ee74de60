"""Where in the picture neurons fire: their activations at the image positions, as a grid and over the picture's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmn.anatomy import image_grid
from mmn.errors import MmnError
from mmn.ffn import Neuron, by_layer
from mmn.hooks import hooked
from mmn.intervene import Shuffle
from mmn.trace import Trace
from mmn.vlm import VLM


@dataclass(frozen=True)
class Heatmap:
    """Activations at the image positions. neurons: in the order asked for. grid: float32 `[neurons, h, w]`, one cell an image
    token. size: width and height of the picture in pixels. box: the part of the picture that the grid covers (left, top, right,
    bottom)."""

    neurons: list[Neuron]
    grid: Tensor
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    def on_image(self, per_neuron: bool = False) -> np.ndarray:
        """The heat of every pixel, bilinear: float32 `[H, W]`, the mean over the neurons, or `[neurons, H, W]`.

        Pixels that the model's processor cuts off, which the model never saw, are NaN."""
        grid = self.grid if per_neuron else self.grid.mean(0, keepdim=True)
        width, height = self.size
        left, top, right, bottom = self.box
        # Pixel centres in units of the box, -1 ... 1, as grid_sample counts them.
        x = ((torch.arange(width) + 0.5 - left) / (right - left) * 2 - 1)[None].expand(height, -1)
        y = ((torch.arange(height) + 0.5 - top) / (bottom - top) * 2 - 1)[:, None].expand(-1, width)
        place = torch.stack([x, y], -1)[None]
        values = nn.functional.grid_sample(grid[None], place, mode="bilinear", padding_mode="border", align_corners=False)[0]
        values[:, (x.abs() > 1) | (y.abs() > 1)] = torch.nan
        return (values if per_neuron else values[0]).numpy()

    def mask(self, percentile: float = 95) -> np.ndarray:
        """Pixels hotter than the percentile of all pixels, bool `[H, W]` (the paper's release: 95)."""
        if not 0 <= percentile <= 100:
            raise MmnError(f"A percentile lies between 0 and 100, not at {percentile!r}.")
        values = self.on_image()
        return values > np.nanpercentile(values, percentile)

    def restored(self, permutation: Tensor) -> Heatmap:
        """A heatmap made while `mmn.shuffle_image_tokens` moved the image tokens, each cell put back where its patch is. Raises
        MmnError for a permutation of other tokens than the picture's."""
        if permutation is None:
            raise MmnError("There is no permutation yet: take it from the shuffle after a picture was read under it.")
        flat = torch.empty_like(self.grid.flatten(1))
        flat[:, Shuffle(permutation, 0).of(flat.shape[1])] = self.grid.flatten(1)
        return Heatmap(self.neurons, flat.reshape(self.grid.shape), self.size, self.box)


class _Enough(Exception):  # noqa: N818 - not an error
    """Ends a forward pass after the last layer that is needed."""


def heatmap(vlm: VLM, trace: Trace, neurons: Sequence[Neuron]) -> Heatmap:
    """Where the neurons fire in a trace's picture: one forward pass over its prompt, as far as the last layer asked for.

    Raises MmnError without a picture or neurons, for neurons that are not there, and for a model whose image tokens are no
    grid."""
    return heatmaps(vlm, trace, [neurons])[0]


@torch.no_grad()
def heatmaps(vlm: VLM, trace: Trace, groups: Sequence[Sequence[Neuron]]) -> list[Heatmap]:
    """`heatmap` of several groups of neurons, such as those of each noun, from one forward pass for all of them. Raises MmnError as
    it does."""
    if trace.image is None:
        raise MmnError("There is no picture behind this text, so there is no heatmap.")
    if not all(map(len, groups)):
        raise MmnError("There are no neurons to draw: give at least one.")
    neurons = [neuron for group in groups for neuron in group]
    vlm.anatomy.check(neurons)
    layers = by_layer(neurons)
    inputs = vlm.inputs([trace.image], [trace.prompt], [trace.prefix])
    positions = vlm.image_positions(inputs)[0].cpu()  # which picks from a layer on any device
    rows, columns = image_grid(int(positions.sum()), inputs)
    flat = torch.empty(len(neurons), rows * columns)

    def keep(layer: int, activations: Tensor) -> None:
        places, units = zip(*layers[layer], strict=True)
        flat[list(places)] = activations[0, positions][:, list(units)].T.float().cpu()
        if layer == max(layers):
            raise _Enough

    with suppress(_Enough), hooked(vlm.anatomy.ffns[layer].watch(partial(keep, layer)) for layer in layers):
        vlm.model(**inputs, use_cache=False)
    size, box = trace.image.size, seen_box(vlm, trace.image.size)
    grids = flat.reshape(-1, rows, columns).split([len(group) for group in groups])
    return [Heatmap(list(group), grid, size, box) for group, grid in zip(groups, grids, strict=True)]


def seen_box(vlm: VLM, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture of this size (width, height) that reaches the model, in pixels (left, top, right, bottom).

    Found by arithmetic: a picture whose red grows to the right and whose green grows downwards goes through the model's own
    processor, beside a black and a white one; its colours then tell where each of the model's pixels came from."""
    processor = getattr(vlm.processor, "image_processor", None)
    width, height = size
    x = np.linspace(0, 255, width) if width > 1 else np.full(1, 127.5)
    y = np.linspace(0, 255, height) if height > 1 else np.full(1, 127.5)
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = x.round()[None], y.round()[:, None]
    whole = (0.0, 0.0, float(width), float(height))
    if processor is None or min(size) < 8:
        return whole
    pictures = [Image.fromarray(ramp), Image.new("RGB", size, "black"), Image.new("RGB", size, "white")]
    values = processor(images=pictures, return_tensors="pt")["pixel_values"]
    if values.ndim != 4 or values.shape[1] != 3:
        return whole
    place, black, white = values.double()
    share = ((place - black) / (white - black))[:2]
    across, down = share[0].nanmedian(0).values, share[1].nanmedian(1).values  # nan: padding, which no picture changes
    left, right = _ends(across)
    top, bottom = _ends(down)
    found = tuple(share * (side - 1) + 0.5 for share, side in ((left, width), (top, height), (right, width), (bottom, height)))
    return tuple(0.0 if abs(v) < 1 else round(v, 2) for v in found) if _differs(found, whole) else whole  # type: ignore[return-value]


def _ends(share: Tensor) -> tuple[float, float]:
    """Where a straight line through the shares begins and ends, from the outer edge of the first pixel to that of the last."""
    count = len(share)
    index = share.isfinite().nonzero()[:, 0]  # all but padding
    index = index[len(index) // 10 : len(index) - len(index) // 10]  # rounding may bend the line at its ends
    middle, index = share[index], index.double()
    slope = ((index - index.mean()) * (middle - middle.mean())).sum() / ((index - index.mean()) ** 2).sum()
    start = middle.mean() + slope * (-0.5 - index.mean())
    return float(start), float(start + slope * count)


def _differs(found: tuple[float, ...], whole: tuple[float, ...]) -> bool:
    extent = max(whole)
    return any(abs(a - b) > 0.015 * extent + 0.5 for a, b in zip(found, whole, strict=True))
