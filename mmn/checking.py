"""What the checks of exercises are made with: an answer that stops or cannot be read becomes a sentence, and floats are compared as they
deserve."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any


def says_why(check: Callable[..., str]) -> Callable[..., str]:
    """A check that never stops: what an answer raises, or gives that the check cannot read, becomes a sentence.

    Decorates `def check_x(mine) -> str`. An answer may be a function, which the check calls, or a value."""

    @functools.wraps(check)
    def told(*answers: Any) -> str:
        gave: list[Any] = []
        stopped: list[Exception] = []

        def watched(answer: Any) -> Any:
            if not callable(answer):
                gave.append(answer)
                return answer

            @functools.wraps(answer, updated=())
            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    out = answer(*args, **kwargs)
                except Exception as error:
                    stopped.append(error)
                    raise
                gave.append(out)
                return out

            return call

        try:
            return check(*map(watched, answers))
        except Exception as error:
            return _stops(error) if stopped and stopped[-1] is error else _unreadable(gave[-1] if gave else None)

    return told


def _stops(error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return "not yet: your function is still to be written"
    cells = [frame for frame in traceback.extract_tb(error.__traceback__) if "ipykernel" in frame.filename]
    where = f" (in the line {cells[-1].line!r})" if cells else ""
    return f"not yet: your code stops with {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}{where}"


def _unreadable(answer: Any) -> str:
    if answer is None:
        return "not yet: your function returns nothing (None); does it end with `return`?"
    text = " ".join(repr(answer).split())
    text = text if len(text) < 60 else text[:57] + "..."
    kind = type(answer).__name__
    return f"not yet: the check cannot read what you give, a {kind}: {text}; the first line of the cell says what it asks for"


def number(answer: Any) -> float:
    """What an answer gives as a number: of Python, NumPy, PyTorch or pandas, also in a box of one. Raises TypeError for anything else."""
    answer = answer.item() if hasattr(answer, "item") else answer
    if answer is None or isinstance(answer, str | bytes):
        raise TypeError("no number")
    return float(answer)


def near(answer: Any, right: float, within: float = 1e-5) -> bool:
    """Whether a number is the right one within rounding to float32; nan never is. Raises TypeError for what is no number."""
    return abs(number(answer) - float(right)) <= within * max(1.0, abs(float(right)))


def pairs(answer: Any) -> list[tuple[int, int]]:
    """Neurons that an answer gives, as plain pairs (layer, unit). Raises TypeError or ValueError for anything else."""
    return [(int(layer), int(unit)) for layer, unit in answer]
