"""The toolkit on every family of vision-language models that the installed transformers builds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import transformers

import mmn
from mmn import families
from mmn.anatomy import find
from mmn.tree import describe

# One of each kind: separators between tiles, Q-Former and flat positions, GELU and sandwich norms, scaled logits, cross layers,
# rotary sections, patches of any size, no gate.
KINDS = ["llava_next", "blip-2", "instructblip", "gemma3", "cohere2_vision", "qwen2_vl", "fuyu", "mllama", "qwen3_5"]
CONFORMING = 76  # of the 97 families of transformers 5.23
# Routed experts: beside a shared one, in latent attention, weighted before they run, all run at once, between mixers.
KINDS += ["qwen3_5_moe", "kimi_k25", "llama4", "inkling_mm_model", "nemotron_h_omni"]


@pytest.mark.parametrize("family", KINDS)
def test_kinds(family: str) -> None:
    row = families.check(family)
    assert row.conforms, row
    assert row.neurons > 0 and (row.image_tokens > 0) == (family != "mllama") and all(row.checks.values())


def test_the_table(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    families.add_arguments(parser)
    assert families.run(parser.parse_args(["llava", "florence2", "--json"])) == 0
    one, other = json.loads(capsys.readouterr().out)
    assert one["family"] == "llava" and one["conforms"] and not one["reason"] and one["seconds"] > 0
    assert one["neurons"] == 3 * 48 and one["image_tokens"] == 16 and all(one["checks"].values()) and len(one["checks"]) == 8
    assert not other["conforms"] and "encoder-decoder" in other["reason"] and not other["checks"]
    assert families.run(parser.parse_args(["florence2"])) == 0
    assert "0 of 1 families conform." in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_table(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    families.add_arguments(parser)
    assert families.run(parser.parse_args(["--json"])) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in rows} == set(families.FAMILIES)
    assert sum(row["conforms"] for row in rows) >= CONFORMING
    for row in rows:
        assert bool(row["reason"]) != row["conforms"] and "\n" not in row["reason"]
        assert row["conforms"] or not any(word in row["reason"] for word in ("yet", "fails", "Error")), row
    assert sum(row["seconds"] for row in rows) < 600


def test_checks_can_fail() -> None:
    """A wrong anatomy does not pass: the gate's map in place of the projection, another image token."""
    model = families.build("llava")
    anatomy, inputs = find(model), families.with_picture(model)
    assert families.sees(model, anatomy, inputs) == (16, True)
    assert not families.sees(model, type(anatomy)(**vars(anatomy) | {"image_token": 25}), inputs)[1]
    assert families.adds_up(model, anatomy, inputs)
    layer = model.model.language_model.layers[1]
    layer.register_buffer("extra", torch.full((32,), 0.3))  # something that writes to the stream and is no part of the sum
    layer.register_forward_hook(lambda module, _, out: (out[0] if isinstance(out, tuple) else out) + module.extra)
    assert not families.adds_up(model, anatomy, inputs)


def test_left_out_families_say_why() -> None:
    assert "encoder-decoder" in families.check("florence2").reason
    assert "no pictures" in families.check("mistral4").reason
    assert "not one vector a position but 10 x 4 x 32" in families.check("glm5_next").reason
    assert families.check("evolla").reason == families.LEFT_OUT["evolla"] and set(families.LEFT_OUT) < set(families.FAMILIES)
    parser = argparse.ArgumentParser()
    families.add_arguments(parser)
    with pytest.raises(mmn.MmnError, match="no family 'nonsense'"):
        families.run(parser.parse_args(["nonsense"]))


FAILS = {
    "blip": "sum",
    "ernie4_5_vl_moe": "experts",
    "git": "picture",
    "hunyuan_vl": "batch",
    "inkling2": "sum",
    "muse_spark": "experts",
}


@pytest.mark.parametrize("family", FAILS)
def test_reasons_that_are_given_hold(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that is left out by hand fails the check that its reason is about."""
    monkeypatch.setattr(families, "LEFT_OUT", {})
    row = families.check(family)
    assert not row.conforms and row.checks[FAILS[family]] is False, row


@pytest.mark.parametrize(
    ("family", "found"), [("evolla", "reads no pictures"), ("pi0", "No unembedding"), ("diffusion_gemma", "reads no pictures")]
)
def test_reasons_that_no_check_is_about(family: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, `mmn families` does not come as far as a check: it reads no pictures or gives no logits."""
    monkeypatch.setattr(families, "LEFT_OUT", {})
    assert found in families.check(family).reason
    if family == "diffusion_gemma":  # its pictures go to an encoder, and its text comes from here
        assert hasattr(type(families.build(family)), "_denoising_step")


def test_several_vectors_a_position() -> None:
    """What runs between the layers of qwen4_exp is as wide as several unembeddings."""
    config = type(families.CONFIG_MAPPING["qwen4_exp"]().get_text_config())(num_hidden_layers=1)
    with torch.device("meta"):
        mixer = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].mlp_hyper_connection
    assert config.hc_count > 1 and mixer.hc_norm.weight.shape == (config.hc_count * config.hidden_size,)


def test_nothing_asks_for_a_models_name() -> None:
    text = (Path(mmn.__file__).parent / "anatomy.py").read_text()
    for word in ("model_type", "architectures", "ForConditionalGeneration", "ForCausalLM"):
        assert word not in text


def test_anatomy_as_a_tree() -> None:
    model = families.build("blip-2")
    text = describe(model, find(model))
    assert "144 neurons in 3 layers" in text and "fc2, which adds a bias" in text
    assert "the products as they are" in text
    for family, logits in (("granite4_vision", "the products times 0.5"), ("gemma4", "bent, as by a soft cap")):
        model = families.build(family)
        assert logits in describe(model, find(model))
    model = families.build("qwen3_5_moe")
    assert "4 experts of 16: the inputs of mlp.experts.down_proj times routing weights" in describe(model, find(model))
