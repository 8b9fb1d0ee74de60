"""`mmn edit`: fit, show, apply, merge, on a tiny checkpoint; what merge writes is read by transformers alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import mmn
from mmn import cli, editors, scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two pictures, and an edit of it."""
    root = tmp_path_factory.mktemp("edit")
    model, processor = tiny.llava_parts()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "pictures").mkdir()
    for number, image in enumerate(tiny.pictures(2)):
        image.save(root / "pictures" / f"{number}.png")
    vlm = mmn.load(root / "model")
    neurons = [mmn.Neuron(layer, unit) for layer in range(3) for unit in range(5)]
    changes = torch.randn(15, 16, generator=torch.Generator().manual_seed(0))
    mmn.Edit(neurons, changes, vlm.hash, "cat", "dog", {"way": "gradient", "steps": 3}).save(root / "swap.safetensors")
    return root


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["edit", "show", str(folder / "swap.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "cat -> dog" in text and "15 writes" in text and "steps: 3" in text
    assert cli.main(["edit", "show", "--json", str(folder / "swap.safetensors")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["neurons"][6] == [1, 1] and shown["source"] == "cat"


def test_apply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["edit", "apply", str(folder / "swap.safetensors"), "--model", str(folder / "model")]
    assert cli.main([*words, "--picture", str(folder / "pictures" / "0.png")]) == 0
    before, after = (line.split(":", 1)[1].strip() for line in capsys.readouterr().out.strip().splitlines()[:2])
    vlm = mmn.load(folder / "model")
    assert (
        before == " ".join(vlm.caption(tiny.pictures(1)[0]).text.splitlines()).strip()
        or before in vlm.caption(tiny.pictures(1)[0]).text
    )
    assert after != before


READ = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoProcessor.from_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
assert not any(name.split(".")[0] == "mmn" for name in sys.modules)
"""


def test_merge_is_read_without_this_package(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["edit", "merge", str(folder / "swap.safetensors"), "--model", str(folder / "model"), "--out", str(tmp_path / "new")]
    assert cli.main(words) == 0 and "rounding" in capsys.readouterr().out
    subprocess.run([sys.executable, "-c", READ, str(tmp_path / "new"), str(tmp_path / "state.pt")], check=True, timeout=300)
    merged = torch.load(tmp_path / "state.pt")
    vlm = mmn.load(folder / "model")
    edit = mmn.Edit.load(folder / "swap.safetensors")
    with edit.applied(vlm):
        expected = vlm.model.state_dict()
        assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)
    assert (folder / "swap.safetensors").stat().st_size < (tmp_path / "new" / "model.safetensors").stat().st_size / 10
    assert cli.main(words) == 2 and "exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_fit_on_scenes_and_on_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cats").mkdir()
    for seed in range(3):
        scenes.draw(seed, concepts=["cat"]).image.save(tmp_path / "cats" / f"{seed}.png")
    (tmp_path / "cats" / "0-broken.png").write_bytes(b"no picture")
    for extra in (["--count", "3"], ["--pictures", str(tmp_path / "cats")]):
        out = tmp_path / "edit.safetensors"
        assert cli.main(["edit", "fit", "cat", "dog", "--way", "closed", "--top-k", "5", "--out", str(out), *extra]) == 0
        edit = mmn.Edit.load(out)
        assert (edit.source, edit.target, len(edit.neurons)) == ("cat", "dog", 5) and edit.norm > 0
        assert edit.report["pictures"] == 3
        out.unlink()
    assert "left out: 0-broken.png" in capsys.readouterr().out


def test_the_better_way_is_that_of_the_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many rows and prompts, and texts to keep; here without a step."""
    monkeypatch.setitem(editors.BETTER, "steps", 0)
    out = tmp_path / "edit.safetensors"
    assert cli.main(["edit", "fit", "cat", "dog", "--way", "better", "--count", "2", "--out", str(out)]) == 0
    edit, job = mmn.Edit.load(out), editors.task("cat", "dog", fit=2, keep=2)
    assert len(edit.neurons) == editors.BETTER_K and edit.report["prompt"] == list(job.prompts)
    assert edit.report["rate"] == editors.BETTER["rate"] and len(job.prompts) > 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fit", "cat", "unicorn", "--out", "x.safetensors"], "no concept 'unicorn'"),
        (["fit", "cat", "dog", "--out", "nowhere/x.safetensors"], "no folder nowhere"),
        (["show", "missing.safetensors"], "no edit"),
        (["fit", "cat", "dog", "--top-k", "0", "--out", "x.safetensors"], "at least 1"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["edit", *words])
    except SystemExit as leave:  # argparse's way
        code = int(leave.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
