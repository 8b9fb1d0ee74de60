"""Figures: each function draws one thing on matplotlib axes, makes its own if it gets none, and returns them.

Colours are those of Okabe and Ito, told apart by colour-blind readers; nothing is said by colour alone.
"""

from __future__ import annotations

import difflib
import functools
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from PIL import Image

from mmn.errors import MmnError

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
HEAT = "magma"  # even steps of lightness: reads in grey, too


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that matplotlib's default font can draw."""
    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def label(text: str) -> str:
    """`text` as matplotlib can draw it: one line, no maths, and a box for each character that the font lacks."""
    visible = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if ord(c) in _glyphs() else "□" for c in visible).replace("$", r"\$")


def _subplots(*args: Any, **more: Any) -> Any:
    """pyplot's axes, on a figure that a notebook shows; pyplot is imported where one is wanted alone."""
    import matplotlib.pyplot as plt

    return plt.subplots(*args, layout="constrained", **more)[1]


def _axes(ax: Axes | None, width: float = 3.2, height: float = 3.2) -> Axes:
    return ax if ax is not None else _subplots(figsize=(width, height))


def picture(image: Image.Image, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw a picture, without ticks."""
    ax = _axes(ax)
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.set_title(label(title), fontsize=9)
    return ax


def heatmap(
    image: Image.Image,
    values: ArrayLike,
    mask: ArrayLike | None = None,
    ax: Axes | None = None,
    title: str = "",
    box: tuple[float, float, float, float] | None = None,
) -> Axes:
    """Draw a picture in grey, `values` over it as heat, and the outline of `mask`.

    `values` is float `[h, w]`, a grid of image tokens or one value a pixel, stretched (bilinear) over the picture, or over its
    part `box` (left, top, right, bottom; pixels); `mask` is bool `[H, W]`, pixels of the picture. Raises MmnError if `values` has
    not two dimensions."""
    heat = np.asarray(values, dtype=np.float64)
    if heat.ndim != 2:
        raise MmnError(f"A heatmap has two dimensions [h, w], not {heat.ndim}: choose one neuron or average over them.")
    ax = _axes(ax)
    width, height = image.size
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)
    left, top, right, bottom = box or (0, 0, width, height)
    small = image.convert("L")
    small.thumbnail((512, 512))  # a photograph's pixels would only slow the drawing down
    ax.imshow(small, cmap="gray", vmin=0, vmax=255, extent=frame)
    seen = (left - 0.5, right - 0.5, bottom - 0.5, top - 0.5)
    ax.imshow(heat, cmap=HEAT, alpha=0.6, extent=seen, interpolation="bilinear")
    if mask is not None and np.asarray(mask).any() and min(np.asarray(mask).shape) > 1:  # a line of pixels has no outline
        # White on black, so that the line shows on any ground.
        for colour, thickness in (("black", 2.6), ("white", 1.2)):
            ax.contour(np.asarray(mask, dtype=float), levels=[0.5], colors=colour, linewidths=thickness)
    ax.set(xticks=[], yticks=[], xlim=frame[:2], ylim=frame[2:])
    ax.set_title(label(title), fontsize=9)
    return ax


def neurons(
    image: Image.Image,
    grids: ArrayLike,
    names: Sequence[str],
    tokens: Sequence[Sequence[str]],
    axes: Sequence[Axes] | None = None,
    columns: int = 5,
    words: int = 4,
    box: tuple[float, float, float, float] | None = None,
) -> Sequence[Axes]:
    """Small multiples: each neuron's heatmap under its name, over the first `words` tokens it writes.

    `grids` is float `[neurons, h, w]`, drawn over `box` as in `heatmap`; `names` and `tokens` have one entry a neuron. Each map
    has its own scale: what is compared is where a neuron fires, not how strongly. Raises MmnError if the three differ in length."""
    maps = np.asarray(grids)
    if not len(maps) == len(names) == len(tokens):
        raise MmnError(f"There are {len(maps)} heatmaps, {len(names)} names and {len(tokens)} lists of tokens: give one each.")
    if axes is None:
        rows = -(-len(maps) // columns)
        size = (1.75 * columns, (1.8 + 0.2 * words) * rows)
        grid = _subplots(rows, columns, figsize=size, squeeze=False).ravel().tolist()
        for spare in grid[len(maps) :]:
            spare.set_axis_off()
        axes = grid[: len(maps)]
    assert axes is not None
    for ax, heat, name, written in zip(axes, maps, names, tokens, strict=True):
        heatmap(image, heat, ax=ax, title=name, box=box)
        ax.set_xlabel("\n".join(label(token.strip()) for token in written[:words]), fontsize=8)
    return axes


def scores_by_layer(scores: Sequence[ArrayLike], found: Sequence[tuple[int, int]] = (), ax: Axes | None = None) -> Axes:
    """A dot a neuron: its layer (spread sideways) and its score; the neurons `found`, pairs (layer, unit), as red diamonds.

    `scores` has one array `[neurons]` a layer."""
    ax = _axes(ax, 6.5, 3.0)
    layers = [np.asarray(layer) for layer in scores]
    spread = [number + np.linspace(-0.32, 0.32, len(layer)) for number, layer in enumerate(layers)]
    ax.plot(np.concatenate(spread), np.concatenate(layers), ".", color=GREY, ms=2, label="all neurons", rasterized=True)
    if found:
        across, up = zip(*((spread[layer][unit], layers[layer][unit]) for layer, unit in found), strict=True)
        ax.plot(across, up, "D", color=VERMILION, ms=5, mec="black", mew=0.6, label=f"the {len(found)} found")
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel="layer", ylabel="direct score", xticks=range(0, len(layers), 1 + len(layers) // 16))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return ax


def caption_change(before: str, after: str, ax: Axes | None = None, names: tuple[str, str] = ("before", "after")) -> Axes:
    """Write two captions one under the other; words that only one of them has are bold, coloured and underlined."""
    ax = _axes(ax, 7.5, 1.1)
    ax.set_axis_off()
    for row, (name, words, colour) in enumerate(zip(names, compared(before, after), (BLUE, VERMILION), strict=True)):
        foot = (0.0, 0.7 - 0.5 * row)
        ax.annotate(label(name), foot, xycoords="axes fraction", color=GREY, va="bottom")
        text = ax.annotate("", foot, xycoords="axes fraction", xytext=(48, 0), textcoords="offset points", va="bottom")
        for word, changed in words:
            text = ax.annotate(
                label(word), (1, 0), xycoords=text, xytext=(5, 0), textcoords="offset points",
                va="bottom", color=colour if changed else "black", weight="bold" if changed else "normal",
            )  # fmt: skip
            if changed:  # matplotlib has no underline: an arrow without heads along the word's foot
                line = {"arrowstyle": "-", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
                ax.annotate("", (0, -0.05), (1, -0.05), xycoords=text, textcoords=text, arrowprops=line)
    return ax


def caption_text(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> HTML:
    """The same as text, which is as large as the page's own, however narrow that is: changed words are bold and underlined."""
    from IPython.display import HTML  # not among what the package itself needs

    lines = []
    for name, words in zip(names, compared(before, after), strict=True):
        said = " ".join(f"<b><u>{html.escape(word)}</u></b>" if changed else html.escape(word) for word, changed in words)
        lines.append(f"<div>{html.escape(name)}: {said}</div>")
    return HTML("\n".join(lines))


def compared(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The words of two captions, each with whether the other lacks it."""
    old, new = before.split(), after.split()
    kept = difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_matching_blocks()
    one, other = {i for m in kept for i in range(m.a, m.a + m.size)}, {i for m in kept for i in range(m.b, m.b + m.size)}
    return [(word, i not in one) for i, word in enumerate(old)], [(word, i not in other) for i, word in enumerate(new)]


def zeroing(
    effects: Mapping[str, tuple[float, Sequence[float]]], ax: Axes | None = None, xlabel: str = "", others: Mapping[str, float] = {}
) -> Axes:
    """Bars: for each noun the effect of zeroing the neurons found, beside that of same-layer random ones.

    `effects` maps a noun to the effect of the neurons found and to those of the random draws, of which each is a dot; `others` to that of
    the loudest neurons not found."""
    ax = _axes(ax, 6.0, 1.1 + 0.6 * len(effects))
    rows = np.arange(len(effects))
    for row, (found, draws) in zip(rows, effects.values(), strict=True):
        ax.barh(row - 0.15, found, 0.36, color=VERMILION, label="neurons found" if row == 0 else None)
        dots = f"same-layer random, {len(draws)} draws, a dot each" if row == 0 else None
        ax.plot(draws, np.full(len(draws), row + 0.25), "o", color=GREY, ms=5, alpha=0.6, mec="none", label=dots)
    if others:
        ax.plot([others[noun] for noun in effects], rows + 0.25, "D", color=BLUE, ms=5, mec="none", label="loudest others")
    ax.axvline(0, color="black", lw=0.8)
    ax.set(yticks=rows, yticklabels=[label(noun) for noun in effects], xlabel=xlabel, ylim=(len(effects) - 0.4, -0.6))
    ax.spines[["top", "right"]].set_visible(False)
    ax.figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return ax


MARKS = ((VERMILION, "o"), (GREY, "s"), (BLUE, "^"), (ORANGE, "D"), (GREEN, "v"))


def curves(
    table: pd.DataFrame, ax: Axes | None = None, xlabel: str = "", ylabel: str = "", *, log: bool = False, dashed: str = ""
) -> Axes:
    """One line with its interval for each name: `table` is indexed by (name, x) and has the columns value, low, high.

    log: x on a logarithmic scale, with a tick at each value.
    dashed: a word for the legend where all lines are a second set, drawn dashed in the first one's colours.
    Raises MmnError for more than five names."""
    ax = _axes(ax, 6.5, 3.6)
    names = list(dict.fromkeys(table.index.get_level_values(0)))
    if len(names) > len(MARKS):
        raise MmnError(f"{len(names)} lines cannot be told apart in one figure: draw at most {len(MARKS)}.")
    for name, (colour, mark) in zip(names, MARKS, strict=False):
        part = table.xs(name, level=0).sort_index()
        line = {"ls": "--", "lw": 1.0} if dashed else {"ls": "-", "lw": 1.6, "marker": mark, "ms": 5}
        ax.plot(part.index, part["value"], color=colour, label=label(f"{name}{dashed and ', ' + dashed}"), **line)  # type: ignore[arg-type]
        if not dashed:
            ax.fill_between(part.index, part["low"], part["high"], color=colour, alpha=0.18, lw=0)
    if log:
        ax.set_xscale("log")
        ticks = sorted({*table.index.get_level_values(1)})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return ax


def against(table: pd.DataFrame, ax: Axes | None = None, xlabel: str = "") -> Axes:
    """Points with intervals, one line a row of `table` (its index is the name): value, low, high, and beside them control_value,
    control_low, control_high where there is a control."""
    ax = _axes(ax, 6.5, 0.8 + 0.42 * len(table))
    rows = np.arange(len(table))
    for shift, prefix, (colour, mark), name in ((-0.13, "", MARKS[0], "found"), (0.13, "control_", MARKS[1], "control")):
        values = table[[f"{prefix}value", f"{prefix}low", f"{prefix}high"]].to_numpy(float)
        ax.hlines(rows + shift, values[:, 1], values[:, 2], color=colour, lw=1.6)
        ax.plot(values[:, 0], rows + shift, mark, color=colour, ms=5, label=name)
    ax.set(yticks=rows, yticklabels=[label(str(name)) for name in table.index], xlabel=xlabel)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.99))
    return ax


def matrix(
    values: ArrayLike, rows: Sequence[str], columns: Sequence[str], ax: Axes | None = None, xlabel: str = "", ylabel: str = "",
    title: str = "", unit: str = "",
) -> Axes:  # fmt: skip
    """A matrix `[rows, columns]` as colours, named on both sides, with a scale named `unit`; small ones with their numbers."""
    table = np.asarray(values, float)
    if table.shape != (len(rows), len(columns)):
        raise MmnError(f"The matrix is {table.shape} and the names are {len(rows)} and {len(columns)}: give one for each side.")
    ax = _axes(ax, 6.4, 5.6)
    shown = ax.imshow(table, cmap=HEAT, aspect="auto" if table.shape[0] != table.shape[1] else "equal")
    small = 9 if len(rows) <= 12 else 7 if len(rows) <= 30 else 5
    ax.set_xticks(range(len(columns)), [label(name) for name in columns], rotation=90, fontsize=small)
    ax.set_yticks(range(len(rows)), [label(name) for name in rows], fontsize=small)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(label(title), fontsize=10)
    if table.size <= 36:
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (row, column), value in np.ndenumerate(table):
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > middle else "white")
    ax.figure.colorbar(shown, ax=ax, shrink=0.8, label=unit)
    return ax


def words(
    image: Image.Image,
    tokens: Sequence[Sequence[str]],
    values: ArrayLike,
    ax: Axes | None = None,
    title: str = "",
    box: tuple[float, float, float, float] | None = None,
    most: int = 12,
) -> Axes:
    """A word written on each patch of a pale picture; bold and coloured where its value is above 0.5.

    `tokens` is a grid `[h][w]` of texts and `values` its numbers `[h, w]` between 0 and 1, such as probabilities, drawn over `box` as in
    `heatmap`. Where the grid has more than `most` rows or columns, every second, third, ... patch is written."""
    sure = np.asarray(values, float)
    rows, columns = sure.shape
    ax = _axes(ax, 6.6, 6.6)
    width, height = image.size
    ax.imshow(image, alpha=0.35, extent=(0, width, height, 0))
    left, top, right, bottom = box or (0, 0, width, height)
    step = -(-max(rows, columns) // most)
    for row in range(step // 2, rows, step):
        for column in range(step // 2, columns, step):
            there = sure[row, column] > 0.5
            place = left + (column + 0.5) * (right - left) / columns, top + (row + 0.5) * (bottom - top) / rows
            written = label(tokens[row][column].strip())[:9]
            colour, weight = (VERMILION, "bold") if there else ("black", "normal")
            ax.text(*place, written, ha="center", va="center", fontsize=7.5, color=colour, weight=weight)
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    ax.set_title(label(title), fontsize=9)
    return ax
