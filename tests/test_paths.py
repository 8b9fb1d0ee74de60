"""Files are written whole or not at all, and an older one stays until then."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmn.errors import MmnError
from mmn.paths import alone, data_path, put, whole


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
