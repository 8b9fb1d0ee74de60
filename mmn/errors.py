"""The one exception this package raises on bad input, and the checks of numbers that many calls share."""

from __future__ import annotations

from math import inf, nan
from typing import Any


class MmnError(ValueError):
    """Bad input: one sentence that says what was wrong and what to do."""


def whole_number(what: str, value: Any, least: int = 1) -> None:
    """Raises MmnError, with a sentence that begins with `what`, for anything but a whole number of at least `least`."""
    if type(value) is not int or value < least:  # True is an int, too, and never meant as one
        raise MmnError(f"{what} is a whole number of at least {least}, not {value!r}.")


def finite(what: str, value: Any, least: float = -inf, above: float = -inf) -> float:
    """`value` as a float. Raises MmnError, with a sentence that begins with `what`, for anything but a finite number in the bounds."""
    try:
        number = nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
        number = nan
    if not (least <= number < inf and number > above):
        bounds = f" above {above:g}" if above > -inf else f" of at least {least:g}" if least > -inf else ""
        raise MmnError(f"{what} a finite number{bounds}, not {value!r}.")
    return number
