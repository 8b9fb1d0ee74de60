"""What `mmn replicate run` says of its pieces while they are at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmn import pieces, progress
from mmn.paths import put

SETTINGS = {"models": {"m.1": {}}, "shards": 2, "edits": 1}


def at_work(out: Path, piece: str, done: int, of: int) -> None:
    put(out / "logs" / f"{piece}.now", json.dumps([done, of]))


def finished(out: Path, stage: str, suffix: str, seconds: float) -> None:
    for name in pieces.FILES[stage]:
        put(out / "parts" / "m.1" / name.format(suffix), "")
    put(out / "logs" / f"m.1-{stage}{suffix}.json", json.dumps({"pictures": 4, "seconds": seconds}))
    (out / "logs" / f"m.1-{stage}{suffix}.now").unlink(missing_ok=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_in_a_log_it_is_plain_lines(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> list[str]:
        shown.look()
        return capsys.readouterr().err.splitlines()

    finished(tmp_path, "rankings", "-0", 3)
    shown = progress.Progress(tmp_path, SETTINGS, bars=False)
    assert said() == ["4 of 5 pieces to do"]
    at_work(tmp_path, "m.1-properties-0", 0, 0)
    assert said() == ["m.1, properties, shard 0: begun"] and said() == []
    at_work(tmp_path, "m.1-properties-0", 1, 4)
    clock[0] = 59
    assert said() == []
    clock[0] = 60
    assert said() == ["m.1, properties, shard 0: 1 of 4 pictures, about 3 min left"] and said() == []
    finished(tmp_path, "rankings", "-1", 12.3)  # between two looks
    finished(tmp_path, "properties", "-0", 7200)
    assert said() == [
        "m.1, rankings, shard 1: done, 4 pictures in 12 s; 3 of 5 pieces left",
        "m.1, properties, shard 0: done, 4 pictures in 2.0 h; 2 of 5 pieces left",
    ]
    at_work(tmp_path, "m.1-edits", 2, 3)
    clock[0] += 100
    assert said() == ["m.1, edits: begun"]
    clock[0] += 100
    assert said() == ["m.1, edits: 2 of 3 nouns, about 50 s left"]
    (tmp_path / "logs" / "m.1-edits.now").unlink()
    assert said() == [f"m.1, edits: stopped, see {tmp_path}/logs/m.1-edits.log; 2 of 5 pieces left"] and said() == []
    at_work(tmp_path, "m.1-edits", 0, 3)  # tried again
    assert said() == ["m.1, edits: begun"]


def test_on_a_terminal_it_is_a_bar_for_each_piece_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.Progress(tmp_path, SETTINGS, bars=True)
    at_work(tmp_path, "m.1-rankings-0", 1, 4)
    at_work(tmp_path, "m.1-rankings-1", 3, 4)
    shown.look()
    drawn = capsys.readouterr().err
    assert "m.1, rankings, shard 0:  25%" in drawn and "m.1, rankings, shard 1:  75%" in drawn and "begun" not in drawn
    finished(tmp_path, "rankings", "-0", 5)
    shown.close()
    assert "m.1, rankings, shard 0: done, 4 pictures in 5 s; 4 of 5 pieces left" in capsys.readouterr().err
    assert all(bar.disable for bar in shown.bar.values()), "all are closed"


def test_a_record_of_a_piece_that_is_half_written_is_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.Progress(tmp_path, SETTINGS, bars=False)
    put(tmp_path / "parts" / "m.1" / pieces.FILES["edits"][0].format(""), "")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "m.1-edits.now").write_text("[1,")
    shown.look()
    assert capsys.readouterr().err.splitlines() == ["5 of 5 pieces to do"]
