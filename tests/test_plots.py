"""Figures draw what they are given, on the axes they are given, and refuse what does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation

from mmn import plots, scenes
from mmn.errors import MmnError

matplotlib.use("agg")
SCENE = scenes.draw(3)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No figure outlives its test, and none is drawn with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        plt.close("all")


def test_each_function_returns_the_axes_it_was_given() -> None:
    ax = plt.subplots()[1]
    assert plots.picture(SCENE.image, ax) is ax
    assert plots.heatmap(SCENE.image, np.eye(10), SCENE.objects[0].mask, ax) is ax
    assert plots.caption_change("a cat", "a dog", ax) is ax
    assert plots.zeroing({"cat": (1.0, [0.0, 0.1])}, ax) is ax
    assert plots.scores_by_layer([np.arange(3.0)], [(0, 2)], ax) is ax


def test_a_heatmap_lies_over_the_part_of_the_picture_that_was_seen() -> None:
    ax = plots.heatmap(SCENE.image, np.eye(10), box=(20, 0, 100, 120))
    assert ax.get_xlim() == (-0.5, 119.5) and ax.get_ylim() == (119.5, -0.5)
    assert tuple(ax.images[-1].get_extent()) == (19.5, 99.5, 119.5, -0.5)


def test_heatmaps_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(MmnError, match="two dimensions"):
        plots.heatmap(SCENE.image, np.ones(3))
    with pytest.raises(MmnError, match="2 heatmaps, 1 names"):
        plots.neurons(SCENE.image, np.ones((2, 3, 3)), ["L0.1"], [["cat"], ["dog"]])


def test_neurons_are_drawn_each_with_its_name_and_words() -> None:
    axes = plots.neurons(SCENE.image, np.ones((2, 3, 3)), ["L0.1", "L2.3"], [[" cat", "fur"], [" dog"]], words=1)
    assert [ax.get_title() for ax in axes] == ["L0.1", "L2.3"]
    assert [ax.get_xlabel() for ax in axes] == ["cat", "dog"]


def test_only_changed_words_are_marked() -> None:
    ax = plots.caption_change("a cat on the beach", "a lion on the beach")
    words = [text for text in ax.texts if isinstance(text, Annotation)]
    assert [text.get_text() for text in words if text.get_weight() == "bold"] == ["cat", "lion"]
    assert [text.get_text() for text in words].count("beach") == 2
    lines = plots.caption_text("a cat <on> it", "a lion <on> it", ("was", "is")).data.splitlines()
    assert lines[0] == "<div>was: a <b><u>cat</u></b> &lt;on&gt; it</div>" and lines[1].startswith("<div>is: a <b><u>lion<")


def test_bars_show_the_effect_and_dots_the_draws() -> None:
    ax = plots.zeroing({"cat": (3.0, [0.0, 1.0]), "dog": (-1.0, [0.5, 0.5])}, others={"dog": 0.2, "cat": 0.1})
    assert list(ax.lines[-2].get_xdata()) == [0.1, 0.2]  # in the order of the nouns; the last line marks 0
    assert [round(float(bar.get_width()), 6) for bar in ax.patches] == [3.0, -1.0]  # type: ignore[attr-defined]
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [[0.0, 1.0], [0.5, 0.5]]  # type: ignore[arg-type]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cat", "dog"]


def test_any_token_can_be_drawn() -> None:
    assert plots.label("$x$\n中") == r"\$x\$⏎□"
    ax = plots.picture(SCENE.image, title="$ unbalanced { 中 \\frac")
    ax.figure.canvas.draw()


def test_curves_have_a_line_and_a_band_for_each_name() -> None:
    index = pd.MultiIndex.from_product([["found", "random"], [1, 10, 100]], names=["neurons", "k"])
    table = pd.DataFrame({"value": range(6), "low": range(-1, 5), "high": range(1, 7)}, index=index)
    ax = plots.curves(table, xlabel="k", log=True)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, 1, 2], [3, 4, 5]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["found", "random"]
    assert len(ax.collections) == 2 and ax.get_xscale() == "log"
    plots.curves(table, ax, dashed="200 scenes")
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--", "--"]
    with pytest.raises(MmnError, match="at most"):
        plots.curves(pd.concat([table.rename({"found": n}, level=0) for n in "abcdef"]))


def test_a_matrix_is_named_on_both_sides() -> None:
    ax = plots.matrix([[1, 2, 3], [4, 5, 6]], ["cat", "dog"], ["a", "b", "c"], unit="logits")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cat", "dog"]
    assert [text.get_text() for text in ax.texts] == ["1.00", "2.00", "3.00", "4.00", "5.00", "6.00"]
    with pytest.raises(MmnError, match="one for each side"):
        plots.matrix(np.ones((2, 2)), ["cat"], ["a", "b"])


def test_words_stand_on_their_patches() -> None:
    ax = plots.words(SCENE.image, [[" cat", "sky"], ["a$b", "dog"]], [[0.9, 0.1], [0.2, 0.6]])
    written = {text.get_text(): (text.get_position(), text.get_weight()) for text in ax.texts}
    assert written["cat"] == ((30.0, 30.0), "bold") and written["sky"] == ((90.0, 30.0), "normal") and len(written) == 4
    many = plots.words(SCENE.image, [["x"] * 24] * 24, np.zeros((24, 24)), most=12)
    assert len(many.texts) == 144
