"""What a `with` block changes, and that nothing outlives it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import real
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmn
from mmn import Neuron, families, properties
from mmn.anatomy import find
from mmn.hooks import hooked
from mmn.nouns import Noun

NEURONS = st.lists(st.builds(Neuron, st.integers(0, 2), st.integers(0, 23)), min_size=1, max_size=12, unique=True)


def logits(vlm: mmn.VLM, count: int = 1) -> Tensor:
    inputs = vlm.inputs(tiny.pictures(count), [mmn.PROMPT] * count, [mmn.PREFIX] * count)
    with torch.no_grad():
        return vlm.model(**inputs).logits


def by_weights(vlm: mmn.VLM, neurons: list[Neuron], change) -> Tensor:  # noqa: ANN001
    """Logits with the neurons' columns of down_proj changed by hand."""
    layers = vlm.model.model.language_model.layers
    kept = [layer.mlp.down_proj.weight.data.clone() for layer in layers]
    for layer, unit in neurons:
        layers[layer].mlp.down_proj.weight.data[:, unit] = change(layers[layer].mlp.down_proj.weight.data[:, unit])
    out = logits(vlm)
    for layer, weight in zip(layers, kept, strict=True):
        layer.mlp.down_proj.weight.data = weight
    return out


@settings(max_examples=20, deadline=None)
@given(NEURONS, st.sampled_from([0.0, -1.0, 2.5]))
def test_a_factor_on_the_activation_is_one_on_the_weights(neurons: list[Neuron], factor: float) -> None:
    vlm = tiny.vlm()
    before = logits(vlm)
    with mmn.scale(vlm, neurons, factor):
        changed = logits(vlm)
    torch.testing.assert_close(changed, by_weights(vlm, neurons, lambda w: w * factor), rtol=1e-4, atol=1e-5)
    if factor == 0:
        with mmn.zero(vlm, neurons):
            assert torch.equal(logits(vlm), changed)
    assert torch.equal(logits(vlm), before), "nothing is left behind"


def test_perturbing_is_adding_noise_to_the_weights() -> None:
    vlm = tiny.vlm()
    neurons = [Neuron(0, 3), Neuron(2, 5), Neuron(2, 1)]
    before = logits(vlm)
    noise = 0.3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    rows = iter(noise)
    expected = by_weights(vlm, neurons, lambda w: w + next(rows))
    with mmn.perturb(vlm, neurons, 0.3, seed=4):
        torch.testing.assert_close(logits(vlm), expected, rtol=1e-4, atol=1e-5)
    with mmn.perturb(vlm, neurons, 0.0):
        torch.testing.assert_close(logits(vlm), before)
    cases = [(-1, 0, "sigma"), ("a", 0, "sigma"), (float("inf"), 0, "sigma"), (1.0, 2**70, "seed"), (1.0, "a", "seed")]
    for sigma, seed, sentence in cases:
        with pytest.raises(mmn.MmnError, match=f"^{sentence} is"), mmn.perturb(vlm, neurons, sigma, seed):  # type: ignore[arg-type]
            pass
    for factor in ("a", float("nan"), None):
        with pytest.raises(mmn.MmnError, match="factor is a finite number"):
            mmn.scale(vlm, neurons, factor)  # type: ignore[arg-type]


def test_means_take_the_place_of_activations() -> None:
    vlm = tiny.vlm()
    traces = vlm.caption(tiny.pictures(3), max_new_tokens=5)
    means = mmn.mean_activations(traces)
    torch.testing.assert_close(means[1], torch.stack([t.activations[1].mean(0) for t in traces]).mean(0))
    neurons = [Neuron(1, 4), Neuron(2, 7)]
    with mmn.mean_ablate(vlm, neurons, means):
        trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=5)
    for layer, unit in neurons:
        torch.testing.assert_close(trace.activations[layer][:, unit], means[layer][unit].expand(len(trace.tokens)))
    with pytest.raises(mmn.MmnError, match="recording"):
        mmn.mean_activations(vlm.caption(tiny.pictures(1), record=False))
    with pytest.raises(mmn.MmnError, match="recording"):
        mmn.mean_activations([])
    with pytest.raises(mmn.MmnError, match="give a list"):
        mmn.mean_activations(traces[0])  # type: ignore[arg-type]
    with pytest.raises(mmn.MmnError, match="other numbers"):
        mmn.mean_ablate(vlm, neurons, None)  # type: ignore[arg-type]
    with pytest.raises(mmn.MmnError, match="other numbers"):
        mmn.mean_ablate(vlm, neurons, means[:2])


def test_what_is_recorded_is_what_was_received() -> None:
    vlm = tiny.vlm()
    with mmn.zero(vlm, [Neuron(1, 4)]):
        trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=5)
    assert not trace.activations[1][:, 4].any() and trace.activations[1][:, 3].any()


def test_neurons_for_each_row_of_a_batch() -> None:
    vlm = tiny.vlm()
    images = tiny.pictures(3)
    rows = [[Neuron(0, 1), Neuron(2, 9)], [], [Neuron(2, n) for n in range(24)]]
    with mmn.zero(vlm, rows):
        together = vlm.caption(images, max_new_tokens=6)
    for image, row, trace in zip(images, rows, together, strict=True):
        with mmn.zero(vlm, row):
            alone = vlm.caption(image, max_new_tokens=6)
        assert alone.text == trace.text
        for a, b in zip(alone.activations, trace.activations, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(mmn.MmnError, match="for 3 pictures but the model reads 2"), mmn.zero(vlm, rows):
        vlm.caption(images[:2], max_new_tokens=6)


def test_no_neurons_and_wrong_ones() -> None:
    vlm = tiny.vlm()
    before = logits(vlm)
    with mmn.zero(vlm, []):
        assert torch.equal(logits(vlm), before)
    for wrong in ([Neuron(9, 0)], [[Neuron(0, 0)], [Neuron(0, 24)]], [Neuron(1.0, 1.5)], "L0.1", [("0", "1")]):
        with pytest.raises(mmn.MmnError, match="no neuron"), mmn.zero(vlm, wrong):  # type: ignore[arg-type, list-item]
            pass
    assert torch.equal(logits(vlm), before)


def test_nothing_outlives_an_exception() -> None:
    vlm = tiny.vlm()
    before = logits(vlm)
    neurons = [Neuron(0, 1), Neuron(1, 1)]
    blocks = [
        lambda: mmn.zero(vlm, neurons), lambda: mmn.perturb(vlm, neurons, 1.0), lambda: mmn.shuffle_image_tokens(vlm),
        lambda: mmn.scale(vlm, neurons, 3.0),
    ]  # fmt: skip
    for block in blocks:
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error), block():
                assert not torch.equal(logits(vlm), before)
                raise error
            assert torch.equal(logits(vlm), before)


def test_blocks_can_be_nested() -> None:
    vlm = tiny.vlm()
    with mmn.zero(vlm, [Neuron(0, 1)]), mmn.zero(vlm, [Neuron(0, 2)]):
        nested = logits(vlm)
    with mmn.zero(vlm, [Neuron(0, 1), Neuron(0, 2)]):
        assert torch.equal(nested, logits(vlm))


def test_shuffling_moves_the_pictures_tokens() -> None:
    vlm = tiny.vlm()
    image = tiny.pictures(1)[0]
    trace = vlm.caption(image, max_new_tokens=4)
    seen: list[Tensor] = []
    handle = vlm.model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = vlm.inputs([image], [mmn.PROMPT], [mmn.PREFIX])
    where = vlm.image_positions(inputs)[0]
    with torch.no_grad():
        vlm.model(**inputs)
        with mmn.shuffle_image_tokens(vlm, seed=3) as shuffle:
            vlm.model(**inputs)
            moved = mmn.heatmap(vlm, trace, [Neuron(0, 0)])
    handle.remove()
    assert torch.equal(seen[1][0, where], seen[0][0, where][shuffle.permutation])
    assert torch.equal(seen[1][0, ~where], seen[0][0, ~where])
    back = moved.restored(shuffle.permutation)
    assert torch.equal(back.grid.flatten()[shuffle.permutation], moved.grid.flatten())
    with mmn.shuffle_image_tokens(vlm, torch.arange(16)):
        assert vlm.caption(image).text == vlm.caption(image).text
        torch.testing.assert_close(mmn.heatmap(vlm, trace, [Neuron(1, 2)]).grid, plain(vlm, trace, Neuron(1, 2)))
    with mmn.shuffle_image_tokens(vlm):
        assert vlm.answer("Describe"), "a text without a picture is read as it is"


def test_shuffling_moves_what_later_layers_add_too() -> None:
    """Qwen3-VL adds features of the picture to its positions behind the first layers: they move with the rest."""
    deep = {"vision_config": {"deepstack_visual_indexes": [0, 1]}, "text_config": {"rope_parameters": families.MROPE}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.EXTRA, "qwen3_vl", deep)
        model = families.build("qwen3_vl")
    anatomy, inputs = find(model), families.with_picture(model)
    where = anatomy.image_positions(inputs["input_ids"])[0]
    order = torch.randperm(int(where.sum()), generator=torch.Generator().manual_seed(0))
    seen: list[list[Tensor]] = []

    def keep(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append([kwargs["inputs_embeds"][0, where], *kwargs["deepstack_visual_embeds"]])

    vlm = SimpleNamespace(model=model, anatomy=anatomy)
    with torch.no_grad():
        for block in (nullcontext(), mmn.shuffle_image_tokens(vlm, order)):  # type: ignore[arg-type]
            with block, hooked([anatomy.decoder.register_forward_pre_hook(keep, with_kwargs=True)]):
                model(**inputs, use_cache=False)
    plain, moved = seen
    assert len(plain) == 3
    for before, after in zip(plain, moved, strict=True):
        assert torch.equal(after, before[order])


def plain(vlm: mmn.VLM, trace: mmn.Trace, neuron: Neuron) -> Tensor:
    layer = vlm.model.model.language_model.layers[neuron.layer].mlp.down_proj
    kept: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, :, neuron.unit]))
    inputs = vlm.inputs([trace.image], [trace.prompt], [trace.prefix])
    with torch.no_grad():
        vlm.model(**inputs)
    handle.remove()
    return kept[0][inputs["input_ids"][0] == 3].reshape(1, 4, 4)


def test_shuffling_refuses() -> None:
    vlm = tiny.vlm()
    for wrong in (torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), 5):
        with pytest.raises(mmn.MmnError, match="names every position"), mmn.shuffle_image_tokens(vlm, wrong):
            pass
    with pytest.raises(mmn.MmnError, match="has 3 entries and the picture 16"), mmn.shuffle_image_tokens(vlm, torch.arange(3)):
        logits(vlm)


@pytest.mark.parametrize("family", ["mllama", "idefics"])
def test_shuffling_refuses_pictures_without_tokens(family: str) -> None:
    """Words see them by cross-attention: the logits would stay as they are, and every neuron would look invariant."""
    vlm = real.vlm(family)
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=2)
    case = properties.Case(0, trace, Noun("x", "x", 9, 1, (0, 1)), torch.zeros(0), ())
    with pytest.raises(mmn.MmnError, match="no tokens to shuffle"):
        properties.shuffled(vlm, case)
    with mmn.shuffle_image_tokens(vlm):
        """Nothing is read."""


@settings(max_examples=30, deadline=None)
@given(NEURONS, st.integers(1, 5), st.integers(0, 99))
def test_random_neurons_of_the_same_layers(neurons: list[Neuron], draws: int, seed: int) -> None:
    vlm = tiny.vlm()
    found = mmn.same_layer_random(vlm, neurons, draws=draws, seed=seed)
    assert found == mmn.same_layer_random(vlm, neurons, draws=draws, seed=seed) and len(found) == draws
    for row in found:
        assert [n.layer for n in row] == [n.layer for n in neurons]
        assert not set(row) & set(neurons) and len(set(row)) == len(row)


def test_random_neurons_are_all_as_likely() -> None:
    counts = np.zeros(24)
    for row in mmn.same_layer_random(tiny.vlm(), [Neuron(1, 0)], draws=4600):
        counts[row[0].unit] += 1
    assert counts[0] == 0 and counts[1:].min() > 130 and counts[1:].max() < 270


def test_random_neurons_refuse() -> None:
    vlm = tiny.vlm()
    with pytest.raises(mmn.MmnError, match="only 11 other neurons to draw 13"):
        mmn.same_layer_random(vlm, [Neuron(0, n) for n in range(13)])
    with pytest.raises(mmn.MmnError, match="draws is"):
        mmn.same_layer_random(vlm, [Neuron(0, 0)], draws=0)
