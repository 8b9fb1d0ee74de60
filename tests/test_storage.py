"""Weights that are spread, offloaded, in half precision or quantised: the same neurons, edits by hook, and nothing merged."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import BitsAndBytesConfig, CLIPVisionConfig

import mmn
from mmn import Edit, Neuron
from mmn.properties import OwnEncoder, word_ranks
from mmn.weights import columns, matrix

NOUN = mmn.Noun("x", "x", 7, 2, (0, 1))
NEURONS = [Neuron(0, 3), Neuron(1, 50), Neuron(2, 90)]
WITHOUT_GRADIENTS = [score for score in mmn.SCORES if not score.startswith("gradient")]
TEXT = "model.language_model"
SPREAD = {
    "model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", f"{TEXT}.embed_tokens": "disk", f"{TEXT}.layers.0": "cpu",
    f"{TEXT}.layers.1": "disk", f"{TEXT}.layers.2": "disk", f"{TEXT}.norm": "disk", f"{TEXT}.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install '.[real]' brings what these tests need.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose widths are multiples of 64, as 4-bit maps want them."""
    where = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        wide = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
        patch.setattr(tiny, "CLIPVisionConfig", lambda **given: CLIPVisionConfig(**given | wide))
        model, processor = tiny.llava_parts(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


def load(folder: Path, **options: Any) -> mmn.VLM:
    return mmn.load(folder, lexicon=tiny.every_letter, **options)


def logits(vlm: mmn.VLM) -> torch.Tensor:
    inputs = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    with torch.no_grad():
        return vlm.model(**inputs, use_cache=False).logits[0, -1].float()


def some(vlm: mmn.VLM) -> Edit:
    return Edit(NEURONS, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), vlm.hash, "a", "b")


def test_spread_over_memory_and_disk(folder: Path, tmp_path: Path) -> None:
    """What accelerate offloads gives the same bits as what lies in memory."""
    needs("accelerate")
    plain, spread = load(folder), load(folder, device_map=SPREAD, offload_folder=tmp_path)
    assert spread.anatomy.ffns[1].projection.weight.is_meta and spread.model.lm_head.weight.is_meta
    one, other = (vlm.caption(tiny.pictures(1)[0], max_new_tokens=4) for vlm in (plain, spread))
    assert one.text == other.text and all(map(torch.equal, one.activations, other.activations))
    for score in mmn.SCORES:
        for a, b in zip(mmn.contributions(plain, one, NOUN, score), mmn.contributions(spread, other, NOUN, score), strict=True):
            torch.testing.assert_close(a, b)
    assert mmn.top_tokens(plain, NEURONS).equals(mmn.top_tokens(spread, NEURONS))
    for read in (lambda vlm: word_ranks(vlm, NEURONS, 7), lambda vlm: OwnEncoder(vlm).words(["cat", "dog"]).numpy()):
        assert (read(plain) == read(spread)).all()
    assert torch.equal(mmn.heatmap(plain, one, NEURONS).grid, mmn.heatmap(spread, other, NEURONS).grid)
    for block in (lambda vlm: mmn.zero(vlm, NEURONS), lambda vlm: some(vlm).applied(vlm, "hook")):
        with block(plain), block(spread):
            assert torch.equal(logits(plain), logits(spread))


def test_an_edit_of_offloaded_weights_is_by_hook(folder: Path, tmp_path: Path) -> None:
    needs("accelerate")
    plain, spread = load(folder), load(folder, device_map=SPREAD, offload_folder=tmp_path)
    before = logits(spread)
    with some(plain).applied(plain, "weights"), some(spread).applied(spread):
        torch.testing.assert_close(logits(spread), logits(plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(spread), before)
    with pytest.raises(mmn.MmnError, match="quantised or offloaded and cannot be changed"), some(spread).applied(spread, "weights"):
        pass


def test_device_map_auto(folder: Path) -> None:
    needs("accelerate")
    plain, auto = load(folder), load(folder, device_map="auto")
    torch.testing.assert_close(logits(auto).cpu(), logits(plain), rtol=1e-3, atol=1e-3)
    assert auto.caption(tiny.pictures(1)[0], max_new_tokens=2).text.startswith(mmn.PREFIX)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder: Path, dtype: str) -> None:
    vlm = load(folder, dtype=dtype)
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=4)
    assert trace.activations[0].dtype == torch.float32
    for score in mmn.SCORES:
        assert all(layer.isfinite().all() for layer in mmn.contributions(vlm, trace, NOUN, score))
    before, name = logits(vlm), f"{TEXT}.layers.0.mlp.down_proj.weight"
    weight = vlm.model.state_dict()[name].clone()
    for how in ("weights", "hook"):
        with some(vlm).applied(vlm, how):  # type: ignore[arg-type]
            assert not torch.equal(logits(vlm), before)
        assert torch.equal(logits(vlm), before) and torch.equal(vlm.model.state_dict()[name], weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(folder: Path, bits: int) -> None:
    """Scores, zeroing and edits use the numbers that the quantised map itself uses."""
    needs("accelerate")
    needs("bitsandbytes")
    quantisation = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    plain, vlm = load(folder), load(folder, device_map="cpu", quantization_config=quantisation)
    ffn = vlm.anatomy.ffns[1]
    assert not ffn.plain and vlm.anatomy.neurons == [128] * 3
    weight, true = matrix(ffn.projection), plain.anatomy.ffns[1].columns
    assert weight.shape == true.shape == (64, 128)
    # 8 bits: half a step of 127 of a row's largest number, and float16; 4 bits: the widest gap of the code, a sixth of a block's.
    assert (weight - true).abs().max() <= {8: 0.01, 4: 0.2}[bits] * true.abs().max()
    assert torch.equal(columns(ffn.projection, [5, 90]), columns(ffn.projection, range(128))[[5, 90]])
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=4)
    u = vlm.model.lm_head.weight[NOUN.token].float()
    for layer, scores in enumerate(mmn.contributions(vlm, trace, NOUN)):
        expected = trace.activations[layer][NOUN.step] * (u @ matrix(vlm.anatomy.ffns[layer].projection))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    for score in WITHOUT_GRADIENTS:
        assert len(mmn.rank(vlm, trace, NOUN, k=3, score=score)) == 3
    before = logits(vlm)
    with some(vlm).applied(vlm):
        edited = logits(vlm)
    seen: list[torch.Tensor] = []
    with mmn.zero(vlm, NEURONS):
        handle = ffn.projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 50]))
        silenced = logits(vlm)
        handle.remove()
    assert not torch.equal(edited, before) and not torch.equal(silenced, before) and not seen[0].any()
    assert torch.equal(logits(vlm), before)
    with pytest.raises(mmn.MmnError, match="quantised or offloaded and cannot be changed"), some(vlm).applied(vlm, "weights"):
        pass
