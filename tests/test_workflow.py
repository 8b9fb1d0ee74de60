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
import psutil
import pytest
from safetensors.torch import load_file, save_file
from test_paths import no_file_beyond

import mmn
from mmn import nouns, pieces, scenes, sources, stages, workflow
from mmn.errors import MmnError
from mmn.paths import put

OPTIONS = ["--count", "4", "--shards", "2", "--edits", "0", "--top-k", "5", "--cpus", "1"]
TABLES = ("captions", "edits", "problems", "properties", "rankings", "summary")


def parsed(*words):
    parser = ArgumentParser()
    workflow.add_arguments(parser)
    return parser.parse_args(["run", *words])


def started(out: Path, *more: str, largest: int = resource.RLIM_INFINITY, python: str = sys.executable) -> subprocess.Popen:
    """A run of its own process, whose files, and those of what it starts, cannot grow beyond `largest` bytes."""
    command = [python, "-m", "mmn.cli", "replicate", "run", "--out", str(out), *OPTIONS, *more]  # the last of two counts
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run on scenes, of a Python whose place has a space and braces in its name."""
    place = tmp_path_factory.mktemp("my {python}")
    for name in ("bin", "lib", "pyvenv.cfg"):
        (place / name).symlink_to(Path(sys.prefix) / name)
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = started(out, python=str(place / "bin" / Path(sys.executable).name))
    output = done.communicate()
    assert done.returncode == 0, output
    return out


@pytest.mark.slow
def test_the_tables_say_what_was_run(whole):
    record = json.loads((whole / "tables" / "tables.json").read_text())
    model = record["models"]["tiny-llava"]
    assert record["settings"]["count"] == record["pictures"]["found"] == 4 and model["neurons"] == 4096
    assert set(model["versions"]) >= {"torch", "transformers", "python"} and model["commit"] == pieces.commit()
    assert model["nouns by"] == "scene_nouns" and model["device"] == "cpu"
    tables = {name: pd.read_csv(whole / "tables" / f"{name}.csv") for name in TABLES}
    assert list(tables["captions"]["picture"]) == ["scene-0", "scene-2", "scene-1", "scene-3"]
    assert all(set(table["model"]) <= {"tiny-llava"} for table in tables.values())
    assert {"sensitivity", "causal effect", "specificity"} <= set(tables["summary"]["property"])


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    out = tmp_path / "killed"

    def at_work() -> list[psutil.Process]:
        """Snakemake and what it started."""
        every = [p for p in psutil.process_iter(["cmdline"]) if {str(out), "snakemake"} <= set(p.info["cmdline"] or ())]
        return every + [each for process in every for each in process.children(recursive=True)]

    def begun(files: int) -> subprocess.Popen:
        """A run that has so many files of pieces, and is at work on the next one."""
        run = started(out)
        while len(list(out.glob("parts/*/*"))) < files or not list(out.glob("logs/*.now")):
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        return run

    os.killpg(begun(0).pid, signal.SIGKILL)
    run = begun(1)
    run.terminate()  # it alone, which stops the others
    assert "interrupted" in run.communicate()[1] and run.returncode == 143 and not at_work()
    run = begun(4)
    run.kill()  # it alone: Snakemake works on, and holds the folder
    run.wait()
    (snakemake, *_) = others = at_work()
    second = started(out)
    assert "Another run is at work in" in second.communicate()[1] and second.returncode == 2
    snakemake.terminate()
    assert not psutil.wait_procs(others, timeout=60)[1]
    run = begun(5)
    (snakemake, *others) = at_work()
    snakemake.kill()  # it alone: nobody would take what its pieces still do
    assert "is missing" in run.communicate()[1] and run.returncode == 1
    assert others and not psutil.wait_procs(others, timeout=10)[1]
    last = started(out)
    said, complaints = last.communicate()
    assert last.returncode == 0, (said, complaints)
    lines = complaints.splitlines()
    assert lines[0].endswith("of 4 pieces to do") and lines[0][0] in "12" and lines[-1].endswith("; 0 of 4 pieces left"), lines
    for name in (*(f"{name}.csv" for name in TABLES), "tables.json"):
        assert (out / "tables" / name).read_bytes() == (whole / "tables" / name).read_bytes(), name
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
def test_where_nothing_more_can_be_written_it_says_so_and_goes_on_later(tmp_path):
    out = tmp_path / "full"
    few = ("--count", "2", "--shards", "1")
    run = started(out, *few, largest=8000)  # captions and rankings fit, the properties do not
    said, complaints = run.communicate()
    assert run.returncode == 1 and "2 captions, 0 measures, 1 problems" in said
    line = complaints.splitlines()[-1]
    assert line.startswith("tiny-llava, properties: shard 0 is missing:") and "(File too large): free some space" in line
    problems = pd.read_csv(out / "tables" / "problems.csv", keep_default_na=False)
    assert list(problems["stage"]) == ["properties"]
    last = started(out, *few)
    said, complaints = last.communicate()
    assert last.returncode == 0 and "2 captions" in said and " 0 measures" not in said and " 0 problems" in said, complaints


@pytest.mark.slow
def test_a_broken_picture_and_a_broken_model_are_a_line_each_and_the_rest_is_done(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    scenes.draw(1).image.save(pictures / "1.png")
    (pictures / "2.png").write_bytes((pictures / "1.png").read_bytes()[:300])
    (pictures / "3.heic").touch()
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
    assert complaints.startswith("left out: 3.heic cannot be read here: convert to JPEG or PNG.\n")


@pytest.mark.slow
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
        (["--models", "tiny-llava", "tiny-llava"], "the same name"),
        (["--models", "a"], "There is no model 'a'"),
        (["--edits", "-1"], "--edits is a whole number of at least 0"),
        (["--seed", "-1"], "--seed is a whole number of at least 0"),
        (["--dtype", "float8"], "There is no dtype 'float8'"),
        (["--device-map", "warp"], "The device 'warp' cannot be used"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, words, message):
    with pytest.raises(MmnError, match=message):
        workflow.settings_of(parsed("--out", str(tmp_path), *words))


def test_a_job_asks_for_its_own_cores_and_not_for_all_of_the_machine_that_submits():
    assert workflow.machine_of(parsed("--out", "run", "--profile", "slurm"))["cpus"] == 4
    assert workflow.machine_of(parsed("--out", "run", "--profile", "slurm", "--cpus", "9"))["cpus"] == 9


def test_the_commit_is_never_another_projects(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=b", "-C", tmp_path]
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "a thesis"], check=True)
    monkeypatch.setattr(pieces, "__file__", str(tmp_path / "lib" / "mmn" / "pieces.py"))
    (tmp_path / "lib" / "mmn").mkdir(parents=True)
    assert pieces.commit() is None
    monkeypatch.setattr(pieces, "__file__", str(tmp_path / "mmn" / "pieces.py"))
    (tmp_path / "mmn").mkdir()
    assert len(pieces.commit()) >= 40


def test_only_what_lacked_memory_is_tried_again(tmp_path):
    folder = tmp_path / "parts" / "m"
    for name, problem in (("a", "out of memory"), ("b", "out of memory.png is damaged")):
        row = {"picture": "out of memory.png", "stage": "rankings", "kind": "missing", "problem": problem}
        put(folder / f"rankings-problems-{name}.csv", pieces.csv(stages.table("problems", [row])))
    workflow._forget(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["rankings-problems-b.csv"]


@pytest.mark.slow
def test_weights_that_change_on_the_way_are_noticed(tmp_path):
    model, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(mmn.data_path("tiny-llava"), model)
    options = ("--out", str(out), "--models", str(model), "--count", "1", "--shards", "1", "--edits", "0")
    workflow.kept(out, workflow.settings_of(parsed(*options)))
    put(out / "machine.json", json.dumps(workflow.machine_of(parsed(*options))))
    (name,) = pieces.read_settings(out)["models"]
    pieces.step(out, "rankings", name, 0)
    weights = load_file(model / "model.safetensors")
    for value in weights.values():
        value *= 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MmnError, match="The weights of .* are not those that wrote its captions"):
        pieces.step(out, "properties", name, 0)
    assert not list(out.glob("parts/*/properties*"))


def test_drawn_scenes_have_words_of_their_own_for_any_model(tmp_path):
    settings = {"models": {"m": {"name": "tiny-llava"}}, "images": "scenes"}
    assert pieces.load(settings, "m").lexicon is nouns.scene_nouns
    assert pieces.load(settings | {"images": "pictures"}, "m").lexicon is nouns.lexicon(True), "the shipped model knows no others"


@pytest.mark.slow
def test_a_guess_is_made_from_pictures_that_open(tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(b"broken")
    options = ("--out", str(out), "--images", str(folder), "--count", "9", "--shards", "1", "--edits", "0")
    settings, machine = workflow.settings_of(parsed(*options)), workflow.machine_of(parsed(*options))
    workflow.kept(out, settings)
    assert "no guess" in (said := workflow.forecast(out, settings, machine)) and "none of its pictures can be opened" in said
    scenes.draw(1).image.save(folder / "2.png")
    shutil.rmtree(out)
    workflow.kept(out, settings)
    assert "s to begin a piece (from two pictures)" in workflow.forecast(out, settings, machine)


def test_with_a_profile_the_device_is_another_machines(tmp_path):
    assert workflow.settings_of(parsed("--out", str(tmp_path), "--device-map", "warp", "--profile", "slurm"))


def test_sources_and_models_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, full in (("sbu:got:test", f"sbu:{tmp_path}/got:test"), ("~/x", f"{tmp_path}/x"), ("coco:c", f"coco:{tmp_path}/c")):
        assert workflow.settings_of(parsed("--out", "run", "--images", given))["images"] == full
    Path("small").symlink_to(mmn.data_path("tiny-llava"))
    models = workflow.settings_of(parsed("--out", "run", "--models", "./small", "owner/name@v1"))["models"]
    assert models["small"]["name"] == str(mmn.data_path("tiny-llava")) and "revision" not in models["small"]
    assert models["owner_name_v1"]["name"] == "owner/name" and models["owner_name_v1"]["revision"] == "v1"


@pytest.mark.slow
def test_how_it_is_run_may_change(whole):
    workflow.kept(whole, workflow.settings_of(parsed("--out", str(whole), *OPTIONS, "--minutes", "9", "--batch", "2")))
    machine = workflow.machine_of(parsed("--out", "run", "--jobs", "2"))
    assert machine["cpus"] == max(1, (os.cpu_count() or 1) // 2)
    with pytest.raises(MmnError, match="There is no profile nonsense"):
        workflow.machine_of(parsed("--out", "run", "--profile", "nonsense"))


def test_the_pictures_are_those_that_the_run_began_with(tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for name in (b"b.png", b"c.png", b"d\xff.png"):
        scenes.draw(1).image.save(os.path.join(os.fsencode(folder), name), "PNG")
    options = ("--out", str(out), "--images", str(folder), "--count", "9", "--shards", "2")
    settings = workflow.settings_of(parsed(*options))
    with pytest.raises(MmnError, match="3 pictures cannot be cut into 4 shards"):
        workflow.kept(out, settings | {"shards": 4})
    assert not out.exists()
    workflow.kept(out, settings)
    scenes.draw(2).image.save(folder / "a.png")
    named = [[each.id for each in pieces.pictures_of(out, settings, shard)] for shard in (None, 0, 1)]
    assert named == [["b.png", "c.png", "d\\xff.png"], ["b.png", "d\\xff.png"], ["c.png"]]
    scenes.draw(3).image.save(folder / "c.png")
    assert len(pieces.pictures_of(out, settings, 0)) == 2, "the other shard's pictures are as they were"
    with pytest.raises(MmnError, match="1 pictures are not as they were when the run began, such as c.png"):
        pieces.pictures_of(out, settings, 1)
    (folder / "c.png").unlink()
    with pytest.raises(MmnError, match="such as c.png: put them back"):
        pieces.pictures_of(out, settings)


@pytest.mark.slow
def test_what_is_gone_is_a_line_and_what_lacked_memory_is_tried_again(whole, tmp_path):
    out = tmp_path / "gone"
    shutil.copytree(whole, out)
    rankings, problems = (out / "parts" / "tiny-llava" / name for name in ("rankings-0.csv", "properties-problems-1.csv"))
    kept = rankings.rename(tmp_path / "rankings-0.csv")
    problems.write_text("picture,stage,kind,problem\nscene-1,properties,missing,out of memory\n")
    tables, _ = pieces.gathered(out)
    assert list(tables["problems"]["stage"]) == ["rankings", "properties"] and set(tables["problems"]["kind"]) == {"missing"}
    dry = started(out, "--dry-run")
    assert "rankings" in dry.communicate()[0], "it would be made again"
    kept.rename(rankings)
    last = started(out)
    output = last.communicate()
    assert last.returncode == 0, output
    for name in TABLES:
        assert (out / "tables" / f"{name}.csv").read_bytes() == (whole / "tables" / f"{name}.csv").read_bytes(), name


@pytest.mark.slow
def test_pieces_that_the_run_does_not_have_are_refused(whole):
    with pytest.raises(MmnError, match="--shard is a number from 0 to 1, not 2"):
        pieces.step(whole, "rankings", "tiny-llava", 2)
    for stage, model, shard in (("rankings", "tiny-llava", None), ("rankings", None, 0), ("edits", "tiny-llava", 0)):
        with pytest.raises(MmnError, match="A piece is a stage and --model, one of tiny-llava"):
            pieces.step(whole, stage, model, shard)


def test_pieces_at_once_have_gpus_of_their_own(tmp_path, monkeypatch):
    machine = {"jobs": 2, "gpus": 2, "profile": None}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    first = pieces.own_gpus(tmp_path, machine)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    second = pieces.own_gpus(tmp_path, machine)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    with pytest.raises(MmnError, match="2 pieces at once with 2 GPUs each are more than 4 GPUs"):
        pieces.own_gpus(tmp_path, machine)
    first.release()
    second.release()
    assert pieces.own_gpus(tmp_path, machine | {"jobs": 1}) is None


def test_on_slurm_each_piece_is_a_job_with_what_it_needs(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sacct", "sacctmgr", "scancel", "scontrol", "sinfo", "squeue", "sshare"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
    (tools / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit 1\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    profile = tmp_path / "profile"
    profile.mkdir()
    ours = (workflow.PROFILES / "slurm" / "config.yaml").read_text()
    quick = ours.replace("latency-wait: 60", "latency-wait: 0").replace("retries: 1", "retries: 0")
    (profile / "config.yaml").write_text(f"{quick}slurm-init-seconds-before-status-checks: 1\n")
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "mmn.cli", "replicate", "run", "--out", str(tmp_path / "run"), "--count", "1", "--shards", "1"]
    command += ["--profile", str(profile), "--gpus", "1", "--cpus", "3", "--mem-mb", "64000", "--minutes", "30", "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert done.returncode == 1 and len(asked) == 1, done.stderr
    for word in ("--gpus=1", "--mem 64000", "--cpus-per-task=3", "-t 30", "-p gpu"):
        assert word in asked[0], asked


def test_a_noun_may_be_called_nan(tmp_path):
    (tmp_path / "t.csv").write_text("picture,noun,value\n1,nan,\n2,null,0.5\n3,dog,nan\n")
    table = pieces.read(tmp_path / "t.csv")
    assert list(table["noun"]) == ["nan", "null", "dog"] and list(table["picture"]) == ["1", "2", "3"]
    assert table["value"].isna().tolist() == [True, False, True]


def test_a_table_comes_back_as_it_was_written(tmp_path):
    for odd in ("a\rb", 'c\nd"e', "|", " lead ", "nul\0", "é\u2028"):
        table = pd.DataFrame({"picture": [odd, "x"], "noun": [odd, ""], "value": [0.5, None]})
        put(tmp_path / "t.csv", pieces.csv(table))
        pd.testing.assert_frame_equal(pieces.read(tmp_path / "t.csv"), table)


@pytest.mark.slow
def test_a_dead_address_is_a_line_and_the_pictures_stay_when_more_are_fetched(whole, tmp_path):
    sbu, out = tmp_path / "sbu", tmp_path / "run"
    (sbu / "images").mkdir(parents=True)
    rows = ["number,url,caption,file,reason"]
    for number in range(6):
        scenes.draw(number).image.save(sbu / "images" / f"{number}.png")
        rows.append(f"{number},http://x/{number},said,{number}.png,")
    dead = "9,http://x/9,said,,status 404"
    (sbu / "manifest.csv").write_text("\n".join([*rows[:5], dead]))
    settings = workflow.settings_of(parsed("--out", str(out), *OPTIONS, "--images", f"sbu:{sbu}:train"))
    workflow.kept(out, settings)
    first = [each.id for each in pieces.pictures_of(out, settings)]
    (sbu / "manifest.csv").write_text("\n".join(rows))
    assert len(first) == 4 and [each.id for each in pieces.pictures_of(out, settings)] == first
    shutil.copytree(whole / "parts", out / "parts")
    problems = pieces.gathered(out)[0]["problems"]
    assert problems.to_numpy().tolist() == [["", "http://x/9", "fetch", "note", "dead address: status 404"]]


def test_a_run_that_was_killed_while_it_began_goes_on(tmp_path):
    out = tmp_path / "run"
    settings = workflow.settings_of(parsed("--out", str(out), *OPTIONS))
    out.mkdir()
    for left in (".lock", ".settings.json.7.part"):
        (out / left).write_text("")
    workflow.kept(out, settings)
    pinned = (out / "pictures.csv").read_bytes()
    (out / "pictures.csv").unlink()
    with pytest.raises(MmnError, match="holds a run with other settings"):
        workflow.kept(out, settings | {"seed": 5})
    workflow.kept(out, settings)
    assert (out / "pictures.csv").read_bytes() == pinned


def test_on_a_full_disk_no_record_says_that_the_tables_are_there(tmp_path):
    tables = {"captions": pd.DataFrame({"picture": ["1.png"]}), "rankings": pd.DataFrame({"picture": ["1.png"] * 1000})}
    with no_file_beyond(1000), pytest.raises(MmnError, match=r"rankings.csv could not be written \(File too large\): free some"):
        pieces.write(tmp_path, tables, {"settings": {}})
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["captions.csv"]


def test_a_broken_picture_may_have_any_name(tmp_path):
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).write_text("none")
    notes = stages.Notes("rankings")
    assert not list(stages.opened(sources.load(str(tmp_path)), notes))
    put(tmp_path / "t.csv", pieces.csv(stages.table("problems", notes.rows)))
    assert r"\xff.png is no picture" in (tmp_path / "t.csv").read_text()


@pytest.mark.slow
def test_another_runs_folder_is_refused_and_left_alone(whole, tmp_path):
    before = (whole / "settings.json").read_text()
    with pytest.raises(MmnError, match="other settings .*seed"):
        workflow.kept(whole, workflow.settings_of(parsed("--out", str(whole), *OPTIONS, "--seed", "1")))
    assert (whole / "settings.json").read_text() == before
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(MmnError, match="is not empty"):
        workflow.kept(tmp_path, workflow.settings_of(parsed("--out", str(tmp_path), *OPTIONS)))
    with pytest.raises(MmnError, match="holds no run"):
        pieces.read_settings(tmp_path)


def test_one_piece_that_has_just_ended_does_not_keep_the_others_running(monkeypatch):
    """What does not stop when it is asked is killed, each process, although one of them is gone by then."""
    killed = []

    class Process:
        def __init__(self, name, gone=False):
            self.pid, self.name, self.gone = 1, name, gone

        def kill(self):
            if self.gone:
                raise psutil.NoSuchProcess(self.pid)
            killed.append(self.name)

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("snakemake", seconds)

        def send_signal(self, number):
            assert number == signal.SIGINT

        def children(self, recursive):
            return [Process("first", gone=True), Process("second")]

    monkeypatch.setattr(psutil, "Process", lambda pid: Process("snakemake"))
    workflow._stopped(Process("snakemake"))
    assert killed == ["second", "snakemake"]
