"""The checks' tools: nothing that a student writes stops a check, and every number that is right is taken as such."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from mmn.checking import near, number, pairs, says_why


@says_why
def check_double(mine) -> str:
    return "right" if near(mine(2.0), 4) else "not yet: twice as much"


def raises(_: float) -> float:
    raise KeyError("ffn")


def unwritten(_: float) -> float:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: 2 * x, "right"),
        (lambda x: np.float32(4.0000003), "right"),
        (lambda x: torch.tensor([4.0]), "right"),
        (lambda x: pd.Series([4]), "right"),
        (lambda x: x, "not yet: twice as much"),
        (lambda x: math.nan, "not yet: twice as much"),
        (lambda x: None, "not yet: your function returns nothing (None); does it end with `return`?"),
        (raises, "not yet: your code stops with KeyError: 'ffn'"),
        (unwritten, "not yet: your function is still to be written"),
        (lambda x: "4", "not yet: the check cannot read what you give, a str: '4'; the first line"),
        (lambda x: [4.0, 5.0], "not yet: the check cannot read what you give, a list: [4.0, 5.0]; the first line"),
        (4.0, "not yet: the check cannot read what you give, a float: 4.0; the first line"),
        (lambda: 4.0, "not yet: your code stops with TypeError: "),
    ],
)
def test_whatever_is_given_a_sentence_comes_back(answer, said):
    assert check_double(answer).startswith(said)


def test_a_check_may_take_a_value():
    assert says_why(lambda value: "right" if near(value, 1) else "not yet")(torch.ones(1)) == "right"
    assert says_why(lambda value: value.shape)(None).startswith("not yet: your function returns nothing")


def test_numbers_and_what_is_none():
    assert number(np.array([[3]])) == 3 and not near(math.nan, 0) and not near(1.001, 1) and near(1e6 + 1, 1e6)
    for other in (None, "3", b"3", [1, 2]):
        with pytest.raises(TypeError):
            number(other)


def test_neurons_as_plain_pairs():
    given = [torch.tensor([1, 2]), np.array([3, 4]), (5, torch.tensor(6))]
    assert pairs(given) == [(1, 2), (3, 4), (5, 6)]
    with pytest.raises((TypeError, ValueError)):
        pairs([1, 2])
