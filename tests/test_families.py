"""The toolkit on every family of vision-language models that the installed transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import mmn
from mmn import cli, families, family_table
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
    assert family_table.differences([row], [each for each in family_table.stored() if each.family == family]) == []
    assert row.neurons > 0 and (row.image_tokens > 0) == (family != "mllama") and all(row.checks.values())


def command(*words: str) -> int:
    return cli.main(["families", *words])


def test_families_that_are_named_are_tried(capsys: pytest.CaptureFixture) -> None:
    assert command("llava", "florence2", "--json") == 0
    one, other = json.loads(capsys.readouterr().out)
    assert one["family"] == "llava" and one["conforms"] and not one["reason"]
    assert one["neurons"] == 3 * 48 and one["image_tokens"] == 16 and all(one["checks"].values()) and len(one["checks"]) == 8
    assert not other["conforms"] and "encoder-decoder" in other["reason"] and not other["checks"]
    assert command("florence2") == 0
    assert "0 of 1 families conform." in capsys.readouterr().out


def test_the_table_is_printed_without_torch() -> None:
    code = "import sys, mmn.cli; mmn.cli.main(['families']); assert not {'torch', 'transformers', 'pandas'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(families.FAMILIES)
    assert lines[-1] == f"{CONFORMING} of 97 families conform."


def test_the_table_is_whole() -> None:
    rows = family_table.stored()
    assert [row.family for row in rows] == list(families.FAMILIES) and sum(row.conforms for row in rows) == CONFORMING
    for row in rows:
        assert bool(row.reason) != row.conforms and "\n" not in row.reason
        assert row.conforms or not any(word in row.reason for word in ("yet", "fails", "Error")), row
        assert row.conforms == (len(row.checks) == 8 and all(row.checks.values()))
        assert row.reason == families.LEFT_OUT.get(row.family, row.reason)


def test_a_check_says_what_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    kept = {row.family: row for row in family_table.stored()}
    monkeypatch.setattr(families, "FAMILIES", {"llava": "", "blip": ""})
    monkeypatch.setattr(family_table, "stored", lambda: [kept["llava"], kept["blip"]])
    monkeypatch.setattr(families, "check", lambda family: kept[family])
    assert command("--check") == 0 and "2 families are as the table has them." in capsys.readouterr().out
    wrong = replace(kept["llava"], neurons=1, checks=kept["llava"].checks | {"sum": False})
    monkeypatch.setattr(families, "check", lambda family: wrong)
    assert command("--check", "llava") == 1
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0].startswith("llava, failed: '' is stored, 'sum' was found") and "llava, neurons: '144'" in said[2] and len(said) == 3
    )
    monkeypatch.setattr(families, "FAMILIES", {"llava": ""})
    assert command("--check") == 1 and "blip: only in the table." in capsys.readouterr().out


def test_another_transformers_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(family_table, "version", lambda _: "99.0")
    assert command() == 0
    assert "99.0 is installed: try it with `mmn families --check`." in capsys.readouterr().err


def test_what_is_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = family_table.Row("odd", False, 'fails: a, "b"', {"a": False, "c": True}, 5, 6)
    family_table.write([row], tmp_path / "results")
    monkeypatch.setattr(family_table, "data_path", lambda name: tmp_path / name)
    assert family_table.stored() == [row]
    assert json.loads((tmp_path / "results" / "families.json").read_text())["command"] == "mmn families --out data/results"


@pytest.mark.slow
def test_the_whole_table_is_found_again(capsys: pytest.CaptureFixture) -> None:
    assert command("--check") == 0, capsys.readouterr().out


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


def test_unknown_families_and_names_beside_out_are_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert command("nonsense") == 2 and "no family 'nonsense'" in capsys.readouterr().err
    assert command("llava", "--out", str(tmp_path)) == 2 and "leave the names or --out away" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
