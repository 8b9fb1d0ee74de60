"""`mmn doctor` says what is wrong with a machine, and says nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig

import mmn
from mmn import doctor
from mmn.cli import main


def states(findings: Any) -> dict[str, str]:
    return {each.what: each.state for each in findings}


def test_here_the_book_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not [each for each in found if each["state"] == "fix"]
    assert all(bool(each["todo"]) == (each["state"] != "ok") for each in found), (
        "what is not ok says what to do, and nothing else does"
    )
    (said,) = [each["found"] for each in found if each["what"] == "model"]
    assert mmn.load("tiny-llava").hash in said


def test_a_missing_package_and_another_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "no-such-package>=1 ; extra == 'test'", "also-none ; extra == 'others'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: wanted)
    findings = list(doctor.packages())
    assert states(findings)["packages"] == "fix" and states(findings)["packages [test]"] == "note"
    text = " ".join(each.found for each in findings)
    assert "numpy>=999" in text and "no-such-package" in text and "also-none" not in text
    assert main(["doctor"]) == 1


def test_other_versions_than_the_pinned_ones_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# pins\nnumpy==0.1\nno-such-package==1\n", encoding="utf-8")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (finding,) = [each for each in doctor.packages() if each.what == "versions"]
    assert finding.state == "note" and "not 0.1" in finding.found and "no-such-package" not in finding.found


def test_a_python_that_the_tests_do_not_know_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.python()
    assert finding.state == "ok" and not finding.todo
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.14.0")
    (finding,) = doctor.python()
    assert finding.state == "note" and "3.11, 3.12 or 3.13" in finding.todo


def test_little_memory_is_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: 0.5)
    assert states(doctor.room())["memory"] == "fix"
    monkeypatch.setattr(doctor, "memory", lambda: None)
    assert states(doctor.room())["memory"] == "note"


def test_a_model_too_large_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The size comes from the configuration alone: LLaVA-1.5-7B has about 7.06 billion parameters, 4 bytes each."""
    from transformers import CLIPVisionConfig, LlamaConfig

    eyes = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336)
    words = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064)
    LlavaConfig(vision_config=eyes, text_config=words).save_pretrained(tmp_path)
    size = doctor.weights(str(tmp_path))
    assert size == pytest.approx(7.06e9 * 4 / 2**30, rel=0.01)
    monkeypatch.setattr(doctor, "memory", lambda: 8.0)
    (finding,) = doctor.model(str(tmp_path))
    assert finding.state == "fix" and "float32" in finding.found and "dtype" in finding.todo


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    (finding,) = doctor.model(str(tmp_path / "nothing"))
    assert finding.state == "fix" and "nothing" in finding.found


def test_a_font_without_the_letters_is_noted() -> None:
    import matplotlib as mpl

    assert states(doctor.fonts())["font of figures"] == "ok"
    with mpl.rc_context({"font.family": "STIXSizeOneSym"}):
        (finding,) = doctor.fonts()
    assert finding.state == "note" and "lacks" in finding.found


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "fonts", broken)
    assert any("no such thing" in each.found for each in doctor.examine())


def test_no_browser_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert states(doctor.browser())["chromium"] == "note"
