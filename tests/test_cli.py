"""`mmn explain` and the command line's manners: results whole or not at all, one sentence and exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import mmn
from mmn import cli, scenes
from mmn.errors import MmnError

FILES = {"caption.txt", "explain.json", "ranking.csv"}


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one run on a picture file with the shipped model."""
    folder = tmp_path_factory.mktemp("cli")
    scenes.draw(0).image.save(folder / "picture.png")
    assert cli.main(["explain", str(folder / "picture.png"), "--out", str(folder / "out"), "--top-k", "5"]) == 0
    return folder / "out"


def test_explain_writes_caption_ranking_and_figures(explained: Path) -> None:
    record = json.loads((explained / "explain.json").read_text(encoding="utf-8"))
    assert (explained / "caption.txt").read_text(encoding="utf-8").strip() == record["caption"]
    assert record["caption"].startswith("An image of")
    assert record["nouns"], "the shipped model names an object of a plain scene"
    ranking = pd.read_csv(explained / "ranking.csv")
    assert list(ranking.columns) == ["noun", "rank", "layer", "unit", "score", "tokens"]
    for noun in record["nouns"]:
        rows = ranking[ranking["noun"] == noun["noun"]]
        assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
        assert rows["score"].is_monotonic_decreasing
        assert rows["unit"].tolist() == [neuron["unit"] for neuron in noun["neurons"]]
        name = noun["noun"].replace(" ", "-")
        for figure in (f"{name}-heatmap.png", f"{name}-neurons.png"):
            with Image.open(explained / figure) as image:
                assert min(image.size) > 300
    assert len(list(explained.iterdir())) == len(FILES) + 2 * len(record["nouns"])
    assert not [path for path in explained.parent.iterdir() if path.name.startswith(".")], "something temporary stayed"


def test_what_has_no_heatmap_is_written_without(
    explained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Such as pictures in tiles, or pictures that words see by cross-attention."""
    vlm = mmn.load()
    vlm.anatomy = replace(vlm.anatomy, image_token=None)
    monkeypatch.setattr(mmn, "load", lambda *_, **__: vlm)
    out = explained.parent / "bare"
    assert cli.main(["explain", str(explained.parent / "picture.png"), "--top-k", "2", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == FILES and "no heatmap to draw" in capsys.readouterr().out
    record, full = (json.loads((folder / "explain.json").read_text(encoding="utf-8")) for folder in (out, explained))
    assert [noun["neurons"] for noun in record["nouns"]] == [noun["neurons"][:2] for noun in full["nouns"]]
    assert "no heatmap to draw" in record["problem"] and not full["problem"]


def test_all_nouns_share_one_pass_and_one_of_the_drawn_world_says_so_of_pictures_alone(
    explained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm = mmn.load()
    monkeypatch.setattr(mmn, "load", lambda *_, **__: vlm)
    passes: list[object] = []
    monkeypatch.setattr(vlm, "image_positions", lambda inputs: passes.append(1) or type(vlm).image_positions(vlm, inputs))
    picture, said = str(explained.parent / "picture.png"), {}
    for name, words, world in (("photograph", [picture], "scenes"), ("scene", [], "scenes"), ("other", [picture], None)):
        monkeypatch.setattr(vlm.model.config, "mmn_world", world)
        out = explained.parent / name
        assert cli.main(["explain", *words, "--top-k", "1", "--out", str(out)]) == 0
        said[name] = [line for line in capsys.readouterr().err.splitlines() if "drawn scenes" in line]
        record = json.loads((out / "explain.json").read_text(encoding="utf-8"))
        assert [record["note"]] == (said[name] or [""]) and len(record["nouns"]) > 1
    assert len(passes) == 3
    assert len(said["photograph"]) == 1 and "for photographs give --model" in said["photograph"][0]
    assert not said["scene"] and not said["other"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_in_a_terminal_that_is_not(tmp_path: Path) -> None:
    picture = os.fsencode(tmp_path) + b"/caf\xe9.png"
    scenes.draw(0).image.save(tmp_path / "a.png")
    os.rename(os.fsencode(tmp_path / "a.png"), picture)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "mmn.cli", "explain", picture, "--top-k", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Written to out/caf\\xe9: " in done.stdout
    record = json.loads((tmp_path / os.fsdecode(b"out/caf\xe9") / "explain.json").read_text(encoding="utf-8"))
    assert record["picture"] == "caf\\xe9.png"


def test_one_noun_and_a_second_run_replaces_the_first(explained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noun = json.loads((explained / "explain.json").read_text(encoding="utf-8"))["nouns"][0]["noun"]
    picture = explained.parent / "picture.png"
    out = explained.parent / "again"
    for _ in range(2):
        assert cli.main(["explain", str(picture), "--noun", noun, "--top-k", "2", "--out", str(out)]) == 0
    assert noun in capsys.readouterr().out
    assert pd.read_csv(out / "ranking.csv")["noun"].unique().tolist() == [noun]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["explain", "missing.png"], "missing.png"),
        (["explain", "words.txt"], "words.txt"),
        (["explain", ""], "is empty"),
        (["explain", "https://example.com/a.jpg"], "https://example.com/a.jpg is an address"),
        (["explain", "--out", ""], "--out: a path is wanted"),
        (["edit", "fit", "cat", "dog", "--pictures", "", "--out", "new"], "--pictures: a path is wanted"),
        (["explain", "--top-k", "0"], "--top-k"),
        (["explain", "--top-k", "many"], "--top-k"),
        (["explain", "--top-k", "999999"], "999999"),
        (["explain", "--noun", "chimera"], "chimera"),
        (["explain", "--model", "no/such model"], "no/such model"),
        (["explain", "--dtype", "float3"], "float3"),
        (["explain", "--out", "words.txt"], "words.txt"),
        (["explain", "--out", "words.txt/sub"], "words.txt"),
        (["explain", "--out", "full"], "full"),
        (["explain", "--colour", "red"], "--colour"),
        (["explain", "--seed", "-1"], "at least 0"),
        (["atlas", "--out", "a.html", "--batch", "0"], "at least 1"),
        (["atlas", "--out", "a.html", "--images", ""], "images must not be empty: name a source of pictures, or scenes"),
        (["evaluate", "--scenes", "0"], "at least 1"),
        (["evaluate", "--card", "words.txt"], "to put the figures between"),
        (["throughput", "--batch", "0"], "at least 1"),
        (["bench", "--shapes", "13B-and-a-half"], "13B-and-a-half"),
        (["train", "--out", "new", "--work", "w", "--scale", "nan"], "scale"),
        (["train", "--out", "new", "--work", "w", "--device", "abacus"], "abacus"),
        (["train", "--out", "new", "--work", "words.txt/sub"], "words.txt"),
        (["course", "slides", "--out", "words.txt/sub", "--only", "00_tour"], "words.txt"),
        (["edit", "fit", "cat", "dog", "--out", "full"], "is a folder"),
        (["paint"], "paint"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("no picture", encoding="utf-8")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    try:
        code = cli.main(arguments)
    except SystemExit as leave:  # argparse's way
        code = int(leave.code or 0)
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert says in said
    assert len(said.splitlines()) == 1 and said.endswith("."), said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_half_way_leaves_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / cli.RECORD).write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), cli.replaced(out) as fresh:
        (fresh / cli.RECORD).write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert (out / cli.RECORD).read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MmnError, match="No space left"), cli.replaced(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_where_what_is_said_finds_no_space_it_is_a_sentence() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mmn.cli", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "mmn list: nothing more can be written (No space left on device): free some space.\n"


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_leave_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mmn.cli", "explain", "--out", "deep/out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's child is born deaf to it
    )
    waited = time.monotonic()
    while not any(tmp_path.glob("deep/.out.*.part")) and time.monotonic() - waited < 60:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == code
    assert said[-1] == "mmn explain: interrupted; nothing was left half-written."
    assert not list(tmp_path.iterdir())


def test_a_line_of_pixels_is_drawn_and_a_reader_who_has_enough_is_no_error(tmp_path: Path) -> None:
    scenes.draw(0).image.resize((60, 1)).save(tmp_path / "line.png")
    command = [sys.executable, "-m", "mmn.cli", "explain", str(tmp_path / "line.png"), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert "Traceback" not in error and "Error" not in error
    assert (tmp_path / "out" / "explain.json").exists()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main(["--help"])
    assert leave.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)


def test_python_m_mmn_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mmn", "paint"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("mmn: ") and "paint" in done.stderr


def test_help_does_not_wait_for_torch_and_functions_are_not_hidden_by_modules() -> None:
    code = (
        "import sys, mmn, mmn.cli; parser = mmn.cli._parser(''); assert not {'torch', 'pandas'} & sys.modules.keys(); "
        "import mmn.heatmap; assert all(not isinstance(getattr(mmn, name), type(sys)) for name in mmn.__all__)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
