"""The parts of a logit against the model's own output."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image
from test_edit_families import Family

import mmn
from mmn import decompose
from mmn.nouns import Noun

NOUN = Noun("x", "x", 9, 3, (0, 1))


def case(**options: object) -> tuple[mmn.VLM, mmn.Trace]:
    vlm = tiny.llava(**options)
    return vlm, vlm.caption(tiny.pictures(1)[0], max_new_tokens=6)


@pytest.mark.parametrize("options", [{}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_the_parts_add_up_to_the_models_logit(options: dict) -> None:
    vlm, trace = case(**options)
    parts = decompose.decompose(vlm, trace, NOUN)
    with torch.no_grad():
        logit = vlm.model(**vlm.replay(trace, 3)).logits[0, -1, 9]
    assert parts["logit"].sum() == pytest.approx(float(logit), abs=2e-4) and len(parts) == 8


def test_each_part_is_what_its_module_gives() -> None:
    vlm, trace = case()
    parts = decompose.decompose(vlm, trace, NOUN).set_index(["part", "layer"])["logit"]
    text = vlm.model.model.language_model
    seen: dict[str, torch.Tensor] = {}
    handles = [
        text.layers[1].self_attn.register_forward_hook(lambda _, __, out: seen.__setitem__("attention", out[0][0, -1])),
        text.layers[1].mlp.register_forward_hook(lambda _, __, out: seen.__setitem__("FFN", out[0, -1])),
        text.norm.register_forward_pre_hook(lambda _, args: seen.__setitem__("stream", args[0][0, -1])),
    ]
    with torch.no_grad():
        vlm.model(**vlm.replay(trace, 3))
    for handle in handles:
        handle.remove()
    scale = text.norm.weight / (seen["stream"].pow(2).mean() + text.norm.variance_epsilon).sqrt()
    for part in ("attention", "FFN"):
        assert parts[part, 1] == pytest.approx(float((seen[part] * scale) @ vlm.model.lm_head.weight[9]), abs=1e-4)
    scores = mmn.contributions(vlm, trace, NOUN, "norm_aware")
    assert [parts["FFN", layer] for layer in range(3)] == pytest.approx([float(s.sum()) for s in scores], abs=1e-4)


def test_the_lens_ends_with_the_models_own_words() -> None:
    vlm, trace = case()
    with torch.no_grad():
        logits = vlm.model(**vlm.replay(trace, 3)).logits[0]
    got = decompose.lens(vlm, trace, 3, torch.arange(4, 9))
    assert got.shape == (4, 5, logits.shape[-1])
    torch.testing.assert_close(got[-1], logits[4:9].log_softmax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decompose.lens(vlm, trace, 3)[-1, 0], logits[-1].log_softmax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decompose.lens(vlm, trace, 3, torch.arange(4, 9), [9, 2]), got[..., [9, 2]])
    ids, p = decompose.likeliest(vlm, trace, 3, torch.arange(4, 9))
    assert torch.equal(ids, got.argmax(-1))
    torch.testing.assert_close(p, got.exp().amax(-1))


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen3_5_moe", "llama4", "granite4_vision"])
def test_ffns_parts_are_the_sums_of_scores_in_other_families(family: str) -> None:
    """Also behind norms of their own, and where routed experts and shared ones stand side by side."""
    vlm = Family(family)
    vlm.given.pop("position_ids", None)  # the model counts itself
    trace = vlm.caption(Image.new("RGB", (8, 8)), prompt="", prefix="", max_new_tokens=4)
    noun = Noun("x", "x", int(trace.tokens[2]), 2, (0, 1))
    parts = decompose.decompose(vlm, trace, noun)
    with torch.no_grad():
        logit = vlm.model(**vlm.replay(trace, 2), use_cache=False).logits[0, -1, noun.token]
    assert parts["logit"].sum() == pytest.approx(float(logit), abs=1e-3)
    scores = [float(layer.sum()) for layer in mmn.contributions(vlm, trace, noun, "norm_aware")]
    assert parts.loc[parts["part"] == "FFN", "logit"].tolist() == pytest.approx(scores, abs=1e-3)
