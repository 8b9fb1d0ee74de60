"""The parts of a model are found by structure, checked by arithmetic, and missing ones are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    Starcoder2Config,
)

import mmn
from mmn.anatomy import Neuron, by_layer, find, image_grid


def llava_on(text: PreTrainedConfig) -> Any:
    """A random LLaVA on another language model."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    return tiny.randomise(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)).eval()
    )


SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[PreTrainedConfig, str, str]] = {
    "llama": (
        tiny.llava_parts()[0].config.text_config, "model.language_model.layers.{}.mlp.down_proj", "model.language_model.norm"
    ),
    "qwen2": (
        Qwen2Config(**SMALL, intermediate_size=20, num_hidden_layers=2, num_key_value_heads=1),
        "model.language_model.layers.{}.mlp.down_proj", "model.language_model.norm",
    ),
    "starcoder2, not gated, with biases": (
        Starcoder2Config(**SMALL, intermediate_size=28, num_hidden_layers=4, num_key_value_heads=2),
        "model.language_model.layers.{}.mlp.c_proj", "model.language_model.norm",
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Any, PreTrainedConfig, str, str]:
    return llava_on(FAMILIES[request.param][0]), *FAMILIES[request.param]


def test_the_parts_are_found(family: tuple[Any, PreTrainedConfig, str, str]) -> None:
    model, config, projection, norm = family
    anatomy, modules = find(model), dict(model.named_modules())
    assert len(anatomy.ffns) == len(anatomy.layers) == config.num_hidden_layers
    for layer, ffn in enumerate(anatomy.ffns):
        assert ffn.projection is modules[projection.format(layer)] and ffn.plain
    assert anatomy.final_norm is modules[norm]
    assert anatomy.unembedding is model.lm_head and anatomy.image_token == 3
    width = config.intermediate_size
    assert anatomy.neurons == [width] * config.num_hidden_layers and anatomy.total == width * config.num_hidden_layers


def test_activations_times_writes_are_the_ffns_output(family: tuple[Any, PreTrainedConfig, str, str]) -> None:
    """What flows into the residual stream, seen from outside, is the sum over neurons, to float32 precision."""
    model, _, projection, _ = family
    anatomy, modules = find(model), dict(model.named_modules())
    for layer, ffn in enumerate(anatomy.ffns):
        inside: list[Tensor] = []
        outside: list[Tensor] = []
        handles = [
            ffn.watch(lambda seen, kept=inside: kept.append(seen.clone())),
            modules[projection.format(layer)].register_forward_hook(lambda _, __, out, kept=outside: kept.append(out.clone())),
        ]
        with torch.no_grad():
            model(input_ids=torch.arange(10, 20)[None])
        for handle in handles:
            handle.remove()
        (activations,), (output,) = inside, outside
        writes = anatomy.writes([Neuron(layer, unit) for unit in range(ffn.neurons)]).double()
        rebuilt = torch.einsum("bpn,nh->bph", activations.double(), writes)
        if ffn.projection.bias is not None:
            rebuilt += ffn.projection.bias.double()
        torch.testing.assert_close(rebuilt, output.double(), rtol=1e-5, atol=1e-6)


def test_writes_are_columns_and_reads_their_products() -> None:
    anatomy = tiny.vlm().anatomy
    neurons = [Neuron(2, 5), Neuron(0, 1), Neuron(2, 4), Neuron(0, 1)]
    expected = torch.stack([anatomy.ffns[layer].projection.weight[:, unit] for layer, unit in neurons])
    assert torch.equal(anatomy.writes(neurons), expected)
    directions = torch.randn(3, 16)
    torch.testing.assert_close(anatomy.ffns[1].read(directions), directions @ anatomy.ffns[1].projection.weight)
    assert by_layer(neurons) == {0: [(1, 1), (3, 1)], 2: [(0, 5), (2, 4)]}
    assert torch.equal(anatomy.words([7, 3]), anatomy.unembedding.weight[[7, 3]])


def test_layers_of_other_widths() -> None:
    model, _ = tiny.llava_parts()
    mlp = model.model.language_model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
    assert find(model).neurons == [24, 40, 24]


def test_finding_leaves_nothing_behind() -> None:
    model, _ = tiny.llava_parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_is_found_too() -> None:
    for kind in (torch.bfloat16, torch.float16):
        assert find(tiny.llava_parts()[0].to(kind)).neurons == [24] * 3


# -------------------------------------------------------------------------------------------------------------- what is missing


def without(change: Any) -> Any:
    model = copy.deepcopy(tiny.llava_parts()[0])
    change(model)
    return model


def no_ffn(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.mlp = nn.Identity()


def no_words(model: Any) -> None:
    model.lm_head = nn.Identity()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_ffn, r"No decoder layers with an FFN that writes to width 16.*looked at: .*layers"),
        (no_words, "No unembedding found.*Identity"),
    ],
)
def test_what_is_missing_is_named(change: Any, sentence: str) -> None:
    with pytest.raises(mmn.MmnError, match=sentence):
        find(without(change))


def test_neurons_that_are_not_there() -> None:
    anatomy = tiny.vlm().anatomy
    for neuron in (Neuron(3, 0), Neuron(-1, 0), Neuron(0, 24), Neuron(0, -1)):
        with pytest.raises(mmn.MmnError, match="There is no neuron .* 3 layers of 24 neurons"):
            anatomy.check([neuron])
    with pytest.raises(mmn.MmnError, match="is no neuron"):
        anatomy.check([7])  # type: ignore[list-item]


def test_image_grid() -> None:
    assert image_grid(576) == (24, 24) and image_grid(1) == (1, 1)
    for count in (0, 32, 65):
        with pytest.raises(mmn.MmnError, match="no square grid"):
            image_grid(count)
