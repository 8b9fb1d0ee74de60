"""Heatmaps: the right activations at the right place of the picture."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import LlavaImageProcessorPil

import mmn
from mmn import Neuron
from mmn.anatomy import image_grid
from mmn.heatmap import Heatmap, heatmaps, seen_box

NEURONS = [Neuron(2, 5), Neuron(0, 1), Neuron(2, 0), Neuron(0, 1)]


def test_grid_is_the_activation_at_the_image_tokens() -> None:
    vlm = tiny.vlm()
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=2)
    heat = mmn.heatmap(vlm, trace, NEURONS)
    kept: dict[int, torch.Tensor] = {}
    layers = vlm.model.model.language_model.layers
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: kept.__setitem__(i, args[0][0]))
        for i, layer in enumerate(layers)
    ]
    inputs = vlm.inputs([trace.image], [trace.prompt], [trace.prefix])
    with torch.no_grad():
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    where = inputs["input_ids"][0] == 3
    for row, (layer, unit) in zip(heat.grid, NEURONS, strict=True):
        assert torch.equal(row.flatten(), kept[layer][where][:, unit])
    assert heat.neurons == NEURONS and heat.grid.shape == (4, 4, 4)


def test_several_from_one_pass_are_those_of_a_pass_each() -> None:
    vlm = tiny.vlm()
    trace = vlm.caption(tiny.pictures(1, size=(50, 30))[0], max_new_tokens=2)
    groups = [NEURONS, [Neuron(0, 3)], [Neuron(1, 2), Neuron(0, 3)]]
    passes = []
    handle = vlm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    together = heatmaps(vlm, trace, groups)
    assert len(passes) == 1
    handle.remove()
    for group, heat in zip(groups, together, strict=True):
        alone = mmn.heatmap(vlm, trace, group)
        assert torch.equal(heat.grid, alone.grid) and heat.neurons == group and (heat.size, heat.box) == (alone.size, alone.box)
    with pytest.raises(mmn.MmnError, match="no neurons to draw"):
        heatmaps(vlm, trace, [NEURONS, []])


def test_shapes_and_means() -> None:
    vlm = tiny.vlm()
    trace = vlm.caption(tiny.pictures(1, size=(50, 30))[0], max_new_tokens=2)
    heat = mmn.heatmap(vlm, trace, NEURONS)
    assert heat.on_image().shape == (30, 50) and heat.on_image(per_neuron=True).shape == (4, 30, 50)
    np.testing.assert_allclose(heat.on_image(per_neuron=True).mean(0), heat.on_image(), rtol=1e-4, atol=1e-6)
    assert heat.on_image().dtype == np.float32 and heat.mask().dtype == bool


def test_bilinear_as_torch_does_it() -> None:
    grid = torch.randn(2, 4, 4)
    heat = Heatmap([Neuron(0, 0)] * 2, grid, (50, 30), (0.0, 0.0, 50.0, 30.0))
    expected = torch.nn.functional.interpolate(grid[None], size=(30, 50), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(heat.on_image(per_neuron=True), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_mask_is_above_the_percentile() -> None:
    heat = Heatmap([Neuron(0, 0)], torch.arange(16.0).reshape(1, 4, 4), (40, 40), (0.0, 0.0, 40.0, 40.0))
    assert heat.mask().mean() == pytest.approx(0.05, abs=0.01) and heat.mask()[-1, -1] and not heat.mask()[0, 0]
    assert heat.mask(0).mean() > 0.9 and heat.mask(100).sum() == 0
    for wrong in (-1, 101):
        with pytest.raises(mmn.MmnError, match="between 0 and 100"):
            heat.mask(wrong)
    with pytest.raises(mmn.MmnError, match="has 2 entries and the picture 16"):
        heat.restored(torch.tensor([0, 1]))
    with pytest.raises(mmn.MmnError, match="no permutation yet"):
        heat.restored(None)  # type: ignore[arg-type]


def test_where_the_patch_is() -> None:
    """A patch that changes, changes the tokens of its own place most."""
    vlm = tiny.vlm()
    dark = Image.new("RGB", (64, 64))
    bright = dark.copy()
    bright.paste((255, 255, 255), (48, 16, 64, 32))  # column 3, row 1 of 4 x 4
    neurons = [Neuron(0, unit) for unit in range(24)]
    maps = [mmn.heatmap(vlm, vlm.caption(image, max_new_tokens=1), neurons).grid for image in (dark, bright)]
    change = (maps[0] - maps[1]).norm(dim=0)
    assert divmod(int(change.argmax()), 4) == (1, 3)


@pytest.mark.parametrize(("size", "box"), [((60, 40), (10, 0, 50, 40)), ((30, 90), (0, 30, 30, 60)), ((32, 32), (0, 0, 32, 32))])
def test_cropped_pictures(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A processor that cuts the middle out: heat lies there, and the rest is not a number."""
    vlm = tiny.llava(crop=True)
    np.testing.assert_allclose(seen_box(vlm, size), box, atol=0.4)
    trace = vlm.caption(tiny.pictures(1, size=size)[0], max_new_tokens=1)
    heat = mmn.heatmap(vlm, trace, [Neuron(0, 0)])
    seen = ~np.isnan(heat.on_image())
    assert seen.mean() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1]), abs=0.08)
    assert heat.mask().any() and not heat.mask()[~seen].any()


@pytest.mark.parametrize(
    ("size", "box"), [((64, 32), (0, -16, 64, 48)), ((40, 100), (-30, 0, 70, 100)), ((50, 50), (0, 0, 50, 50))]
)
def test_padded_pictures(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A processor that makes pictures square by padding: what the model sees is larger than the picture."""
    model, processor = tiny.llava_parts()
    processor.image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_pad=True
    )
    np.testing.assert_allclose(seen_box(mmn.VLM(model, processor, "padded"), size), box, atol=3)


@pytest.mark.parametrize("size", [(32, 32), (120, 120), (500, 333), (33, 700)])
def test_whole_pictures(size: tuple[int, int]) -> None:
    assert seen_box(tiny.vlm(), size) == (0.0, 0.0, *size)


def test_refuses() -> None:
    vlm = tiny.vlm()
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=1)
    with pytest.raises(mmn.MmnError, match="no neurons to draw"):
        mmn.heatmap(vlm, trace, [])
    with pytest.raises(mmn.MmnError, match="no neuron L7.0"):
        mmn.heatmap(vlm, trace, [Neuron(7, 0)])
    for count, reason in ((0, "no positions of its own"), (2, "no square grid"), (15, "no square grid")):
        with pytest.raises(mmn.MmnError, match=reason):
            image_grid(count)
