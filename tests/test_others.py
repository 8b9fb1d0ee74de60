"""The same activations and the same effect of zeroing as other tools give: nnsight and TransformerLens, on a tiny LLaVA and its picture.

An optional group: `pip install '.[others]'` brings them; without them the tests are skipped."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import mmn
from mmn import Neuron

pytestmark = pytest.mark.others
NEURONS = [Neuron(0, 3), Neuron(0, 17), Neuron(2, 5)]


def other(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        pytest.skip(f"{package} is not installed; pip install '.[others]' brings it.")


def mine(vlm: mmn.VLM, inputs: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Activations of each layer, the logits, and the logits with the neurons zeroed."""
    seen: list[torch.Tensor] = []
    handles = [ffn.watch(lambda a: seen.append(a.clone())) for ffn in vlm.anatomy.ffns]
    with torch.no_grad():
        plain = vlm.model(**inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        with mmn.zero(vlm, NEURONS):
            return seen, plain, vlm.model(**inputs, use_cache=False).logits


def test_nnsight() -> None:
    nnsight = other("nnsight")
    vlm = tiny.llava()
    inputs = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    seen, plain, zeroed = mine(vlm, inputs)
    model = nnsight.NNsight(vlm.model)
    layers = model.model.language_model.layers
    with torch.no_grad(), model.trace(**inputs, use_cache=False):
        first = layers[0].mlp.down_proj.input.save()
        second = layers[1].mlp.down_proj.input.save()
        third = layers[2].mlp.down_proj.input.save()
        logits = model.output.logits.save()
    for theirs, ours in zip((first, second, third), seen, strict=True):
        assert torch.equal(theirs, ours)
    assert torch.equal(logits, plain)
    with torch.no_grad(), model.trace(**inputs, use_cache=False):
        layers[0].mlp.down_proj.input[:, :, [3, 17]] = 0
        layers[2].mlp.down_proj.input[:, :, 5] = 0
        silenced = model.output.logits.save()
    torch.testing.assert_close(silenced, zeroed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(zeroed, plain)


def test_transformer_lens(tmp_path: Path) -> None:
    """It loads its own copy, and its hook points are named by what they hold."""
    bridges = other("transformer_lens.model_bridge")
    vlm = tiny.llava()
    vlm.model.set_attn_implementation("eager")  # as TransformerLens computes attention
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    inputs = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    seen, plain, zeroed = mine(vlm, inputs)
    bridge = bridges.TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    given = {"input": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(**given)
        for layer, ours in enumerate(seen):
            assert torch.equal(cache[f"blocks.{layer}.mlp.hook_post"], ours)
        assert torch.equal(logits, plain)
        hooks = [(f"blocks.{neuron.layer}.mlp.hook_post", partial(silence, unit=neuron.unit)) for neuron in NEURONS]
        silenced = bridge.run_with_hooks(**given, fwd_hooks=hooks)
    torch.testing.assert_close(silenced, zeroed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(zeroed, plain)


def silence(activations: torch.Tensor, hook: object, unit: int) -> torch.Tensor:
    """A hook of TransformerLens: activations [batch, positions, neurons]."""
    activations[..., unit] = 0
    return activations
