"""How far the pieces of a run are, told while `mmn replicate run` waits for them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.std import tqdm as std_tqdm

from mmn import pieces
from mmn.bars import tqdm

EVERY = 60  # seconds between two lines of a piece that is at work
Piece = tuple[str, str, str]  # model, stage, and the end of its files' names


class Progress:
    """Tells on standard error how far the pieces of a run are: a line for each that ends, with how many are left. Of those at
    work it shows a bar each, or, where there is no terminal to draw on, writes a line at the beginning and every minute."""

    def __init__(self, out: Path, settings: dict[str, Any], bars: bool):
        every = [(model, *piece) for model in settings["models"] for piece in pieces.pieces_of(settings)]
        self.out, self.bars, self.total = out, bars, len(every)
        self.left = [piece for piece in every if not self._whole(piece)]
        self.begun: dict[Piece, float] = {}  # by the monotonic clock, in seconds
        self.told: dict[Piece, float] = {}
        self.bar: dict[Piece, Any] = {}
        self._say(f"{len(self.left)} of {self.total} pieces to do")

    def look(self) -> None:
        """Tell what has changed since the last look."""
        for piece in list(self.left):
            try:
                done, of = json.loads(self._log(piece, "now").read_text(encoding="utf-8"))
            except (OSError, ValueError):  # it has not begun, or it has ended
                if self._whole(piece):
                    self.left.remove(piece)
                    self._ended(piece, f"done{self._took(piece)}")
                elif piece in self.begun:
                    self._ended(piece, f"stopped, see {self._log(piece, 'log')}")
            else:
                self._at_work(piece, done, of)

    def close(self) -> None:
        """Look for the last time, and take the bars away."""
        self.look()
        for bar in self.bar.values():
            bar.close()

    def _at_work(self, piece: Piece, done: int, of: int) -> None:
        now = time.monotonic()
        if piece not in self.begun:
            self.begun[piece] = self.told[piece] = now
            if self.bars:
                self.bar[piece] = tqdm(desc=_name(piece), unit=_unit(piece), leave=False)
            else:
                self._say(f"{_name(piece)}: begun")
        if self.bars:
            bar = self.bar[piece]
            bar.n, bar.total = done, of or None
            bar.refresh()
        elif done and now - self.told[piece] >= EVERY:
            self.told[piece] = now
            seconds = (now - self.begun[piece]) * (of - done) / done
            self._say(f"{_name(piece)}: {done} of {of} {_unit(piece)}s, about {_time(seconds)} left")

    def _ended(self, piece: Piece, how: str) -> None:
        self.begun.pop(piece, None)
        if piece in self.bar:
            self.bar.pop(piece).close()
        self._say(f"{_name(piece)}: {how}; {len(self.left)} of {self.total} pieces left")

    def _took(self, piece: Piece) -> str:
        try:
            record = json.loads(self._log(piece, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # such as on a disk that is full
            return ""
        return f", {record['pictures']} pictures in {_time(record['seconds'])}"

    def _whole(self, piece: Piece) -> bool:
        model, stage, suffix = piece
        return all((self.out / "parts" / model / name.format(suffix)).is_file() for name in pieces.FILES[stage])

    def _log(self, piece: Piece, end: str) -> Path:
        model, stage, suffix = piece
        return self.out / "logs" / f"{model}-{stage}{suffix}.{end}"

    def _say(self, line: str) -> None:
        std_tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def _name(piece: Piece) -> str:
    model, stage, suffix = piece
    return f"{model}, {stage}{f', shard {suffix[1:]}' if suffix else ''}"


def _unit(piece: Piece) -> str:
    return "noun" if piece[1] == "edits" else "picture"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
