"""`mmn replicate`: killed at any moment it goes on and ends with the same bytes; what is broken is one line, and the rest is done."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd
import pytest

import mmn
from mmn import scenes, workflow
from mmn.errors import MmnError

OPTIONS = ["--count", "4", "--shards", "2", "--edits", "0", "--top-k", "5"]
TABLES = ("captions", "edits", "problems", "properties", "rankings", "summary")


def parsed(*words):
    parser = ArgumentParser()
    workflow.add_arguments(parser)
    return parser.parse_args(["run", *words])


def started(out: Path, *more: str, largest: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """A run of its own process, whose files, and those of what it starts, cannot grow beyond `largest` bytes."""
    command = [sys.executable, "-m", "mmn.cli", "replicate", "run", "--out", str(out), *OPTIONS, *more]  # the last of two counts
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run on scenes."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = started(out)
    output = done.communicate()
    assert done.returncode == 0, output
    return out


def test_the_tables_say_what_was_run(whole):
    record = json.loads((whole / "tables" / "tables.json").read_text())
    assert record["settings"]["count"] == 4 and record["models"]["tiny-llava"]["neurons"] == 4096
    assert set(record["versions"]) >= {"torch", "transformers"} and "commit" in record
    tables = {name: pd.read_csv(whole / "tables" / f"{name}.csv") for name in TABLES}
    assert list(tables["captions"]["picture"]) == ["scene-0", "scene-2", "scene-1", "scene-3"]
    assert all(set(table["model"]) <= {"tiny-llava"} for table in tables.values())
    assert {"sensitivity", "causal effect", "specificity"} <= set(tables["summary"]["property"])


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    out = tmp_path / "killed"
    for files in (1, 5, 9):  # pieces that are there when the axe falls
        run = started(out)
        while run.poll() is None and len(list(out.glob("parts/*/*"))) < files:
            time.sleep(0.02)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        assert not (out / "tables").exists() or files > 5
    last = started(out)
    output = last.communicate()
    assert last.returncode == 0, output
    for name in (*(f"{name}.csv" for name in TABLES), "tables.json"):
        assert (out / "tables" / name).read_bytes() == (whole / "tables" / name).read_bytes(), name
    assert not list(out.rglob("*.part"))


def test_where_nothing_more_can_be_written_it_says_so_and_goes_on_later(tmp_path):
    out = tmp_path / "full"
    few = ("--count", "2", "--shards", "1")
    run = started(out, *few, largest=8000)  # captions and rankings fit, the properties do not
    said, complaints = run.communicate()
    assert run.returncode == 1 and "2 captions, 0 measures, 1 problems" in said
    (line,) = [line for line in complaints.splitlines() if line]
    assert line.startswith("tiny-llava, properties: shard 0 is missing:") and "(File too large): free some space" in line
    problems = pd.read_csv(out / "tables" / "problems.csv", keep_default_na=False)
    assert list(problems["stage"]) == ["properties"]
    last = started(out, *few)
    said, complaints = last.communicate()
    assert last.returncode == 0 and "2 captions" in said and " 0 measures" not in said and " 0 problems" in said, complaints


def test_a_broken_picture_and_a_broken_model_are_a_line_each_and_the_rest_is_done(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    scenes.draw(1).image.save(pictures / "1.png")
    (pictures / "2.png").write_bytes((pictures / "1.png").read_bytes()[:300])
    broken = tmp_path / "broken"
    shutil.copytree(mmn.data_path("tiny-llava"), broken)
    (broken / "model.safetensors").write_bytes(b"half a file")
    run = started(tmp_path / "run", "--images", str(pictures), "--shards", "1", "--models", "tiny-llava", str(broken))
    said, complaints = run.communicate()
    assert run.returncode == 1
    tables = {name: pd.read_csv(tmp_path / "run" / "tables" / f"{name}.csv", keep_default_na=False) for name in TABLES}
    lines = tables["problems"].set_index(["model", "stage"])["problem"]
    assert "damaged" in lines["tiny-llava", "rankings"]
    other = lines.drop("tiny-llava")
    assert len(other) == 2 and "shard 0 is missing" in other.iloc[0] and "could not be loaded" in other.iloc[0]
    assert list(tables["captions"]["picture"]) == ["1.png"] and set(tables["properties"]["picture"]) == {"1.png"}
    assert "2.png" in complaints and "1 captions" in said


def test_a_dry_run_says_how_much_is_left_and_computes_nothing(whole, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "tables")
    for path in half.glob("parts/tiny-llava/properties*-1.csv"):
        path.unlink()
    run = started(half, "--dry-run")
    said, complaints = run.communicate()
    assert run.returncode == 0, complaints
    assert "properties" in said and "from pieces that are done" in said and "minutes left" in said
    assert not (half / "tables").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count is a whole number of at least 1"),
        (["--count", "2", "--shards", "3"], "cannot be cut into 3 shards"),
        (["--models", "a", "a"], "the same name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, words, message):
    with pytest.raises(MmnError, match=message):
        workflow.settings_of(parsed("--out", str(tmp_path), *words))


def test_another_runs_folder_is_refused_and_left_alone(whole, tmp_path):
    before = (whole / "settings.json").read_text()
    with pytest.raises(MmnError, match="other settings .*seed"):
        workflow.kept(whole, workflow.settings_of(parsed("--out", str(whole), *OPTIONS, "--seed", "1")))
    assert (whole / "settings.json").read_text() == before
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(MmnError, match="is not empty"):
        workflow.kept(tmp_path, workflow.settings_of(parsed("--out", str(tmp_path), *OPTIONS)))
    with pytest.raises(MmnError, match="holds no run"):
        workflow.read_settings(tmp_path)
