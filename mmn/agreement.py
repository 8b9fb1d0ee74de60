"""When two results are equal: their words exactly, their numbers within a tolerance.

Processors round differently, so the last digit of a number is never compared. One rule serves the outputs that chapters store
(`mmn.nbval_numbers` hands it to nbval) and the slow tables (`mmn.tables.check`): two numbers agree if they differ by no more
than the tolerance that the cell or the column states, or else by `RELATIVE`, or by one unit of the last digit that is printed.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import pandas as pd

RELATIVE = 1e-3  # the default tolerance, as a share of the number (of a column: of its largest one)
# Digits inside a word, such as the 7 of `L7`, belong to the word.
NUMBER = re.compile(r"(?<![\w.])([-+\u2212]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")


def close(stored: float, fresh: float, tolerance: float) -> bool:
    """Whether two numbers differ by at most `tolerance`, or are both missing (nan)."""
    missing = math.isnan(stored), math.isnan(fresh)
    return all(missing) or math.isclose(stored, fresh, rel_tol=1e-9, abs_tol=tolerance * (1 + 1e-6))


def column_tolerance(column: pd.Series) -> float:
    """The default tolerance of a table's column: whole numbers and text must be equal."""
    return RELATIVE * float(column.abs().max()) if pd.api.types.is_float_dtype(column) else 0.0


def same_cell(stored: Any, fresh: Any, tolerance: float) -> bool:
    """Whether two cells of a table agree; an empty cell is a missing number."""
    if stored == fresh:
        return True
    try:
        old, new = (math.nan if cell in ("", None) else float(cell) for cell in (stored, fresh))
    except ValueError:  # text
        return False
    return close(old, new, tolerance)


def same_text(stored: str, fresh: str, tolerance: float | None = None) -> bool:
    """Whether two printed texts agree: the words between the numbers are equal but for blanks, and each number agrees."""
    old, new = NUMBER.split(stored), NUMBER.split(fresh)
    words = [[" ".join(part.split()) for part in parts[::2]] for parts in (old, new)]
    return words[0] == words[1] and all(_same_number(*pair, tolerance) for pair in zip(old[1::2], new[1::2], strict=True))


def _same_number(stored: str, fresh: str, tolerance: float | None) -> bool:
    """Numbers as printed. Without a stated tolerance, whole numbers are counts and must be equal."""
    old, new = (Decimal(text.replace("\u2212", "-")) for text in (stored, fresh))
    if tolerance is None:
        places = min(int(number.as_tuple().exponent) for number in (old, new))
        tolerance = max(10.0**places, RELATIVE * abs(float(old))) if places < 0 else 0.0
    return close(float(old), float(new), tolerance)


class Printed(str):
    """Printed text that equals another where `same_text` says so: what nbval compares with `!=`."""

    tolerance: float | None

    def __new__(cls, text: str, tolerance: float | None = None) -> Printed:
        """The text of an output, with the tolerance that its cell states."""
        printed = super().__new__(cls, text)
        printed.tolerance = tolerance
        return printed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and same_text(self, other, self.tolerance)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__
