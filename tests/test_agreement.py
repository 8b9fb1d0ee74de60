"""Numbers are compared as numbers: a last digit that a processor rounds otherwise is none, anything more is a difference."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmn.agreement import Printed, column_tolerance, same_cell, same_text


@pytest.mark.parametrize(
    ("stored", "fresh", "tolerance", "equal"),
    [
        ("[0.18, 0.37]", "[0.18, 0.36]", None, True),  # these two turned the project red
        ("[0.99, 1.00]", "[1.00, 1.00]", None, True),
        ("[0.18, 0.37]", "[0.18, 0.35]", None, False),
        ("rank 3 of 4096", "rank 4 of 4096", None, False),  # whole numbers are counts
        ("rank 3 of 4096", "rank 4 of 4096", 1, True),
        ("0.031", "0.033", None, False),
        ("0.031", "0.033", 0.002, True),
        ("0.031", "0.034", 0.002, False),
        ("1234.5 MB", "1235.5 MB", None, True),  # within a thousandth
        ("-0.00", "0.00", None, True),
        ("\u22120.12", "-0.13", None, True),
        ("1.2e-05", "1.3e-05", None, True),
        ("1.2e-05", "1.4e-05", None, False),
        ("L7 0.5", "L8 0.5", None, False),  # a digit inside a word is a letter of it
        ("a dog 0.50", "a cat 0.50", None, False),
        ("0.50 0.50", "0.50", None, False),
        ("x  1.0", "x 0.99", None, True),  # a column of another width
        ("<td>0.97</td>", "<td>0.98</td>", None, True),
        ("nan", "0.97", None, False),
    ],
)
def test_words_are_equal_and_numbers_near(stored, fresh, tolerance, equal):
    assert same_text(stored, fresh, tolerance) is equal
    assert same_text(fresh, stored, tolerance) is equal
    assert (Printed(stored, tolerance) == fresh) is equal and (Printed(stored, tolerance) != fresh) is not equal


@given(st.floats(-1e6, 1e6), st.integers(1, 5), st.integers(-3, 3))
def test_one_unit_of_the_last_digit_is_the_default(value, places, units):
    old = f"{value:.{places}f}"
    new = f"{float(old) + units * 10.0**-places:.{places}f}"
    apart = abs(float(old) - float(new))
    within = max(10.0**-places, 1e-3 * abs(float(old)))
    if not math.isclose(apart, within, rel_tol=1e-3) or abs(units) == 1:
        assert same_text(f"it is {old}.", f"it is {new}.") == (apart <= within * 1.001)


def test_cells_of_a_table():
    column = pd.Series([0.5, 20.0, math.nan])
    assert column_tolerance(column) == 0.02 and column_tolerance(pd.Series([1, 2])) == 0
    assert column_tolerance(pd.Series(["a"])) == 0
    assert same_cell(0.5, 0.519, 0.02) and not same_cell(0.5, 0.53, 0.02)
    assert same_cell(math.nan, "", 0) and same_cell(math.nan, None, 0) and not same_cell(math.nan, 0.0, 1)
    assert same_cell("dog", "dog", 0) and not same_cell("dog", "cat", 9) and not same_cell(True, False, 0)
