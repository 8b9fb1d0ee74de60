"""Every quick command, in a folder and on files whose names are not UTF-8, under a locale that knows only ASCII, with a umask of
its own: it does its job, and what it writes has the permissions of new files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_paths import other_than_the_umask_gives

import mmn
from mmn import scenes
from mmn.paths import in_utf8

UMASK = 0o027
NAME = os.fsdecode(b"caf\xe9 \xff")  # as Python reads a name in Latin-1
COMMANDS = {
    "explain": ["explain", f"{NAME}.png", "--top-k", "2"],
    "edit fit": [
        "edit",
        "fit",
        "cat",
        "dog",
        "--way",
        "closed",
        "--top-k",
        "5",
        "--pictures",
        NAME,
        "--out",
        f"{NAME}.safetensors",
    ],
    "edit show": ["edit", "show", f"{NAME}.safetensors"],
    "edit apply": ["edit", "apply", f"{NAME}.safetensors", "--picture", f"{NAME}.png"],
    "edit merge": ["edit", "merge", f"{NAME}.safetensors", "--out", f"merged {NAME}"],
    "train": ["train", "--scale", "0", "--out", f"trained {NAME}", "--work", f"work {NAME}"],
    "atlas": ["atlas", "--images", NAME, "--most", "9", "--out", f"{NAME}.html"],
    "course make": ["course", "make", "--only", "00_tour", "--out", f"course {NAME}"],
    "course grade": ["course", "grade", f"{NAME}.ipynb", "--json", f"{NAME}.json"],
    "no such picture": ["explain", f"no {NAME}.png"],
}
MAIN = """
import json, sys
from mmn import cli
codes = {}
for name, words in json.load(open(sys.argv[1], encoding="ascii")).items():
    print("==", name, flush=True)
    codes[name] = cli.main(words)
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """The folder that all commands were run in, their exit codes, and all that they said."""
    root = tmp_path_factory.mktemp("written")
    place = root / NAME
    (place / NAME).mkdir(parents=True)
    for number in range(3):
        scenes.draw(number, concepts=["cat"]).image.save(place / NAME / f"{NAME}{number}.png")
    (place / NAME / f"{NAME}.heic").touch()
    (place / NAME / f"{NAME}-broken.png").touch()
    scenes.draw(0).image.save(place / f"{NAME}.png")
    (place / f"{NAME}.ipynb").write_text("no notebook")
    (root / "commands.json").write_text(json.dumps(COMMANDS))  # names as \\udcff
    done = subprocess.run(
        [sys.executable, "-c", MAIN, root / "commands.json"], cwd=place, umask=UMASK, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said = done.stdout.decode("ascii")
    assert done.returncode == 0, said
    return place, json.loads(said.splitlines()[-1]), said


def test_every_command_does_its_job(written: tuple[Path, dict[str, int], str]) -> None:
    place, codes, said = written
    failing = {"course grade": 1, "no such picture": 2}
    assert codes == {name: failing.get(name, 0) for name in COMMANDS}, said
    assert said.count("Traceback") == 0 and r"left out: caf\xe9 \xff.heic cannot be read" in said
    record = json.loads((place / "out" / NAME / "explain.json").read_text(encoding="utf-8"))
    assert record["picture"] == f"{NAME}.png" and record["nouns"]
    assert mmn.Edit.load(place / f"{NAME}.safetensors").report["pictures"] == 3
    for kind in ("merged", "trained"):
        with in_utf8(place / f"{kind} {NAME}") as there:
            assert mmn.load(there).hash != mmn.load().hash
    assert list(json.loads((place / f"{NAME}.json").read_text(encoding="utf-8"))) == [f"{NAME}.ipynb"]


def test_what_they_write_has_the_permissions_of_new_files(written: tuple[Path, dict[str, int], str]) -> None:
    place, _, said = written
    new = [path for path in place.iterdir() if path.name not in (NAME, f"{NAME}.png", f"{NAME}.ipynb")]
    folders = {"out", f"merged {NAME}", f"trained {NAME}", f"work {NAME}", f"course {NAME}"}
    assert {path.name for path in new} == folders | {f"{NAME}.{end}" for end in ("safetensors", "html", "json")}, said
    wrong = {path.name: found for path in new if (found := other_than_the_umask_gives(path, UMASK))}
    assert wrong == {}
