"""Files are written whole or not at all, and an older one stays until then."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from mmn.errors import MmnError
from mmn.paths import alone, data_path, put, whole


def other_than_the_umask_gives(folder: Path, umask: int) -> dict[str, str]:
    """What is in a folder, and the folder itself, that has other permissions than a new file or folder would have."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        if not path.is_symlink() and path.stat().st_mode & 0o777 != wanted:
            found[path.relative_to(folder).as_posix()] = oct(path.stat().st_mode)
    return found


@contextmanager
def no_file_beyond(largest: int) -> Iterator[None]:
    """As on a full disk: what is written beyond so many bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "new" / "a.txt", "Übung\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "Übung\n".encode()
    put(tmp_path / "name.json", json.dumps("Ü\udcff", ensure_ascii=False))  # as Python names a file whose name is no UTF-8
    assert json.loads((tmp_path / "name.json").read_bytes()) == "Ü\udcff"
    (tmp_path / "name.json").unlink()
    with whole(tmp_path / "b") as part:
        part.mkdir()
        (part / "c.txt").write_text("c")
        assert not (tmp_path / "b").exists()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["c.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_stops_the_writing_leaves_the_older_file(tmp_path: Path, error: type[BaseException]) -> None:
    put(tmp_path / "a.txt", "old")
    with pytest.raises(error), whole(tmp_path / "a.txt") as part:
        part.write_text("ne")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "old")
    with no_file_beyond(1000):
        with pytest.raises(MmnError, match=r"a.txt could not be written \(File too large\): free some space"):
            put(tmp_path / "a.txt", "n" * 2000)
        with pytest.raises(MmnError, match="t.safetensors could not be written"), whole(tmp_path / "t.safetensors") as part:
            save_file({"a": torch.zeros(1000)}, part)
    with pytest.raises(MmnError, match=r"could not be written \(File exists\)"):
        put(tmp_path / "a.txt" / "b.txt", "b")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_whatever_writes_it_a_file_has_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    """Here safetensors, which makes its files for their owner alone, and copies of read-only and of executable files."""
    (tmp_path / "tool").write_text("#!/bin/sh")
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "a.txt").write_text("a")
    for path, mode in (("tool", 0o755), ("fixed/a.txt", 0o444), ("fixed", 0o555)):
        (tmp_path / path).chmod(mode)
    before = os.umask(umask)
    try:
        with whole(tmp_path / "deep" / "t.safetensors") as part:
            save_file({"a": torch.zeros(1)}, part)
        with whole(tmp_path / "deep" / "folder") as part:
            shutil.copytree(tmp_path / "fixed", part / "copied")
            shutil.copy(tmp_path / "tool", part)
            save_file({"a": torch.zeros(1)}, part / "t.safetensors")
            (part / "away").symlink_to(tmp_path / "tool")
        put(tmp_path / "deep" / "a.txt", "a")
    finally:
        os.umask(before)
    assert other_than_the_umask_gives(tmp_path / "deep", umask) == {}
    assert (tmp_path / "tool").stat().st_mode & 0o777 == 0o755, "what a link points to is left alone"


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".a.txt.{os.getpid()}.part").write_text("half")
    (tmp_path / f".b.{os.getpid()}.part" / "c").mkdir(parents=True)
    put(tmp_path / "a.txt", "new")
    with whole(tmp_path / "b") as part:
        part.mkdir()
    assert {path.name for path in tmp_path.rglob("*")} == {"a.txt", "b"} and (tmp_path / "a.txt").read_text() == "new"


def test_a_folder_is_held_as_long_as_a_child_that_was_given_its_lock_lives(tmp_path: Path) -> None:
    """Also when the process that took it has been killed."""
    code = (
        "import subprocess, sys, time; from pathlib import Path; from mmn.paths import alone\n"
        "with alone(Path(sys.argv[1])) as lock:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, pass_fds=[lock])\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = psutil.Process(int(holder.stdout.readline()))
        child.suspend()  # the end of its input comes with its parent's, and it must not end of itself
        holder.kill()
        holder.wait()
        with pytest.raises(MmnError, match="Another run is at work"), alone(tmp_path):
            pass
        child.kill()
    psutil.wait_procs([child], timeout=10)
    with alone(tmp_path):
        pass


def test_a_folder_is_one_process_s_at_a_time_and_not_made_for_nothing(tmp_path: Path) -> None:
    with alone(tmp_path / "new"):
        with pytest.raises(MmnError, match="Another run is at work in .*new: wait for it, or stop it"), alone(tmp_path / "new"):
            pass
        put(tmp_path / "new" / "a.txt", "a")
    with pytest.raises(ValueError), alone(tmp_path / "nothing"):
        raise ValueError
    with alone(tmp_path / "new"):
        pass
    with (
        pytest.raises(MmnError, match=r"a.txt cannot be written \(File exists\): give another folder"),
        alone(tmp_path / "new" / "a.txt"),
    ):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["new", "new/a.txt"]


def test_data_that_is_not_there_is_told() -> None:
    assert (data_path("tiny-llava") / "config.json").is_file()
    with pytest.raises(MmnError, match="no 'huge-llava'"):
        data_path("huge-llava")
