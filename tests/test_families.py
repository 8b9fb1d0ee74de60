"""The toolkit on every family of vision-language models that the installed transformers builds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import mmn
from mmn import families
from mmn.anatomy import describe, find

# One of each kind: separators between tiles, Q-Former and flat positions, GELU and sandwich norms, scaled logits, cross layers,
# rotary sections, patches of any size, no gate.
KINDS = ["llava_next", "blip-2", "instructblip", "gemma3", "paligemma", "cohere2_vision", "qwen2_vl", "fuyu", "idefics3", "qwen3_5"]


@pytest.mark.parametrize("family", KINDS)
def test_kinds(family: str) -> None:
    row = families.check(family)
    assert row.conforms, row
    assert row.neurons > 0 and row.image_tokens > 0 and all(row.checks.values())


def test_at_least_forty_families_conform(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    families.add_arguments(parser)
    assert families.run(parser.parse_args(["--json"])) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in rows} == set(families.FAMILIES)
    assert sum(row["conforms"] for row in rows) >= 40
    for row in rows:
        assert bool(row["reason"]) != row["conforms"] and "\n" not in row["reason"]
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
    assert "no pictures" in families.check("evolla").reason
    parser = argparse.ArgumentParser()
    families.add_arguments(parser)
    with pytest.raises(mmn.MmnError, match="no family 'nonsense'"):
        families.run(parser.parse_args(["nonsense"]))


def test_nothing_asks_for_a_models_name() -> None:
    text = (Path(mmn.__file__).parent / "anatomy.py").read_text()
    for word in ("model_type", "architectures", "ForConditionalGeneration", "ForCausalLM"):
        assert word not in text


def test_anatomy_as_a_tree() -> None:
    model = families.build("blip-2")
    text = describe(model, find(model))
    assert "144 neurons in 3 layers" in text and "fc2, which adds a bias" in text
    model = families.build("qwen3_5_moe")
    assert "4 experts of 16: the inputs of mlp.experts.down_proj times routing weights" in describe(model, find(model))
