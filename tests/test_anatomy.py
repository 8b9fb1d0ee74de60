"""The parts of a model are found by structure, checked by arithmetic, and missing ones are named."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Starcoder2Config,
)

import mmn
from mmn.anatomy import find, image_grid
from mmn.ffn import Mixture, Neuron, by_layer
from mmn.tree import describe


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


def test_gpt2s_maps_are_refused_in_a_sentence() -> None:
    """Their weights are transposed, which nothing here reads."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2)
    with pytest.raises(mmn.MmnError, match="No decoder layers with an FFN"):
        find(GPT2LMHeadModel(config).eval())


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


# -------------------------------------------------------------------------------------------------------------- routed experts

MIXED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "intermediate_size": 20}
MIXED |= {"moe_intermediate_size": 24, "num_key_value_heads": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}


@pytest.fixture(params=["routed alone", "a shared one beside"], scope="module")
def mixed(request: pytest.FixtureRequest) -> mmn.VLM:
    """A LLaVA on a mixture of 4 experts of 24 units (more than the 16 of the stream), 2 of them chosen."""
    words = SMALL | {"vocab_size": len(tiny.tokenizer()), "max_position_embeddings": 256}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if request.param == "routed alone":
        text: PreTrainedConfig = Qwen3MoeConfig(**words, **MIXED, **ids, head_dim=8)
    else:
        text = Qwen2MoeConfig(**words, **MIXED, **ids, shared_expert_intermediate_size=12)
    return mmn.VLM(llava_on(text), tiny.llava_parts()[1], "mixed", lexicon=tiny.every_letter)


def brute_force(block: nn.Module, rows: Tensor) -> Tensor:
    """Activations `[rows, 4 * 24]` of a block's routed experts, one row and one expert at a time."""
    routed = block.gate(rows)
    chosen, weights = (next(x for x in routed if x.is_floating_point() == kind and x.shape[-1] == 2) for kind in (False, True))
    experts, out = block.experts, torch.zeros(len(rows), 4, 24)
    for row in range(len(rows)):
        for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ rows[row]).chunk(2)
            out[row, expert] = torch.nn.functional.silu(gate) * up * weight
    return out.flatten(1)


def test_experts_are_found_and_their_units_are_neurons(mixed: mmn.VLM) -> None:
    anatomy = mixed.anatomy
    ids = torch.arange(10, 18).reshape(2, 4)
    for ffn, layer in zip(anatomy.ffns, anatomy.layers, strict=True):
        shared = 12 if isinstance(ffn, Mixture) else 0
        assert ffn.neurons == shared + 4 * 24 and not ffn.plain and ffn.write([]).shape == (0, mixed.hidden)
        rows: list[Tensor] = []
        seen: list[Tensor] = []
        handles = [layer.mlp.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0])), ffn.watch(seen.append)]
        with torch.no_grad():
            mixed.model(input_ids=ids)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(seen[0][..., shared:].flatten(0, 1), brute_force(layer.mlp, rows[0].flatten(0, 1)))
        down = layer.mlp.experts.down_proj
        torch.testing.assert_close(ffn.write([shared + 2 * 24 + 5, shared + 3]), torch.stack([down[2, :, 5], down[0, :, 3]]))
        directions = torch.randn(3, 16)
        torch.testing.assert_close(ffn.read(directions), directions @ ffn.write(range(ffn.neurons)).T)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in mixed.model.modules())


def test_places_of_experts_units(mixed: mmn.VLM) -> None:
    anatomy = mixed.anatomy
    shared = 12 if isinstance(anatomy.ffns[1], Mixture) else 0
    neuron = anatomy.neuron(1, 5, expert=2)
    assert neuron == Neuron(1, shared + 2 * 24 + 5) and anatomy.place(neuron) == (1, 2, 5)
    if shared:
        assert anatomy.place(Neuron(0, 11)) == (0, None, 11) and anatomy.neuron(0, 11) == Neuron(0, 11)
    for place in ({"unit": 24, "expert": 0}, {"unit": 0, "expert": 4}, {"unit": 12}):
        with pytest.raises(mmn.MmnError, match="There is no unit"):
            anatomy.neuron(0, **place)
    assert "4 experts of 24" in describe(mixed.model, anatomy) and "warning" not in describe(mixed.model, anatomy)


def test_experts_are_scored_zeroed_and_edited(mixed: mmn.VLM) -> None:
    """The scores of a layer add up to what it writes for the word; a zeroed expert is one with no weights; several zeroings at once
    do as one; an edit by hook is one in the weights."""
    anatomy, model = mixed.anatomy, mixed.model
    trace = mixed.caption(tiny.pictures(1)[0], max_new_tokens=3)
    noun = mmn.Noun("a", "a", int(trace.tokens[1]), 1, (0, 1))
    scores = mmn.contributions(mixed, trace, noun)
    assert [len(s) for s in scores] == anatomy.neurons
    ranking = mmn.rank(mixed, trace, noun, k=6)
    assert ranking.scores == sorted(torch.cat(scores).tolist(), reverse=True)[:6]

    inputs = mixed.inputs([trace.image], [trace.prompt], [trace.prefix])

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    plain = logits()
    neurons = [anatomy.neuron(0, unit, expert=1) for unit in range(24)] + [anatomy.neuron(1, unit, expert=3) for unit in range(24)]
    with mmn.zero(mixed, neurons):
        zeroed = logits()
    with mmn.zero(mixed, neurons[:30]), mmn.zero(mixed, neurons[10:]):
        twice = logits()
    kept = copy.deepcopy(model.state_dict())
    for layer, expert in ((0, 1), (1, 3)):
        anatomy.layers[layer].mlp.experts.down_proj.data[expert] = 0
    torch.testing.assert_close(zeroed, logits(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice, zeroed, rtol=1e-4, atol=1e-5)
    model.load_state_dict(kept)
    assert torch.equal(logits(), plain) and not torch.allclose(zeroed, plain)

    changes = torch.randn(len(neurons), 16)
    edit = mmn.Edit(neurons, changes, mixed.hash, "a", "b")
    with edit.applied(mixed):
        hooked = logits()
    for neuron, change in zip(neurons, changes, strict=True):
        layer, expert, unit = anatomy.place(neuron)
        anatomy.layers[layer].mlp.experts.down_proj.data[expert, :, unit] += change
    torch.testing.assert_close(hooked, logits(), rtol=1e-4, atol=1e-5)
    model.load_state_dict(kept)
    with pytest.raises(mmn.MmnError, match="how='hook'"), edit.applied(mixed, "weights"):
        pass
    assert torch.equal(logits(), plain)


def test_gradients_of_experts(mixed: mmn.VLM) -> None:
    """`gradient` of the last layer's neurons, all else linear but the norm, is the change of the logit as a small share of each
    activation is taken away."""
    anatomy = mixed.anatomy
    trace = mixed.caption(tiny.pictures(1)[0], max_new_tokens=1)
    noun = mmn.Noun("a", "a", int(trace.tokens[0]), 0, (0, 1))
    found = mmn.contributions(mixed, trace, noun, score="gradient")
    inputs = mixed.replay(trace, 0)
    for layer in range(2):
        unit = int(trace.activations[layer][0].abs().argmax())
        values = []
        for factor in (0.99, 1.01):
            handle = anatomy.ffns[layer].watch(partial(scaled_last, unit, factor))
            with torch.no_grad():
                values.append(float(mixed.model(**inputs).logits[0, -1, noun.token].double()))
            handle.remove()
        assert float(found[layer][unit]) == pytest.approx((values[1] - values[0]) / 0.02, rel=0.03, abs=1e-4)


def scaled_last(unit: int, factor: float, activations: Tensor) -> Tensor:
    activations = activations.clone()
    activations[:, -1, unit] *= factor
    return activations


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
    assert image_grid(576) == (24, 24) and image_grid(4) == (2, 2)
    for count, reason in ((0, "no positions of its own"), (1, "no positions of its own"), (32, "no square"), (65, "no square")):
        with pytest.raises(mmn.MmnError, match=reason):
            image_grid(count)


def test_image_grids_that_are_not_square() -> None:
    """A processor's grid counts patches; tokens may stand for squares of 1, 4 or 9 of them."""
    for rows, columns, side in ((2, 7, 2), (5, 3, 1), (4, 6, 3)):
        for name, grid in (("image_grid_thw", [1, rows * side, columns * side]), ("spatial_shapes", [rows * side, columns * side])):
            assert image_grid(rows * columns, {name: torch.tensor([grid])}) == (rows, columns)
    for shape in ((4, 3, 8, 8), (1, 4, 3, 8, 8)):
        with pytest.raises(mmn.MmnError, match="4 tiles"):
            image_grid(16, {"pixel_values": torch.zeros(shape)})
    assert image_grid(16, {"pixel_values": torch.zeros(1, 1, 3, 8, 8)}) == (4, 4)
