"""The explorer: click a word of a caption, see the neurons that voted for it, turn them down or up, and watch what changes.

`Explorer` computes and knows no widgets; `Panel` ties it to ipywidgets; `explore` shows a panel where a reader is there to use it, and
a still picture where none is."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmn import plots
from mmn.contribution import rank
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.heatmap import Heatmap, heatmap
from mmn.intervene import same_layer_random, scale
from mmn.nouns import Found, Noun
from mmn.semantics import top_tokens
from mmn.trace import Trace
from mmn.vlm import VLM

WORD = re.compile(r"\w[\w'’-]*")


def words(trace: Trace) -> list[Noun]:
    """Every word that a caption's model wrote, nouns or not, each where it first stands. Raises MmnError if there is none."""

    def every(text: str) -> list[Found]:
        return [(match.group(), match.group().lower(), match.span()) for match in WORD.finditer(text)]

    found = replace(trace, lexicon=every).nouns
    if not found:
        raise MmnError(f"The caption {trace.text!r} has no words to click: take another picture.")
    return found


@dataclass(frozen=True)
class Change:
    """What becomes of a picture's caption when neurons are scaled.

    neurons: the ones scaled. factor: what their activations were multiplied by. caption: what the model says then. probabilities: for each
    word asked for the probability of its first token, `before`, `after`, and with `random` neurons of the same layers scaled in
    their place (one draw), each at the step that produced it, behind the words of the unchanged caption. heat and heat_before: where
    the neurons fire, or None for a model whose image tokens are no grid."""

    neurons: list[Neuron]
    factor: float
    caption: str
    probabilities: pd.DataFrame
    heat: Heatmap | None
    heat_before: Heatmap | None


class Explorer:
    """One picture, its caption (`trace`), the `words` of it and the `k` neurons of each.

    Raises MmnError where the caption has no words."""

    def __init__(self, vlm: VLM, image: Image.Image, k: int = 10):
        self.vlm, self.k = vlm, k
        self.trace = vlm.caption(image)
        self.words = words(self.trace)

    @property
    def image(self) -> Image.Image:
        """The picture."""
        assert self.trace.image is not None
        return self.trace.image

    @cached_property
    def first(self) -> Noun:
        """The word to begin with: the caption's first noun, else its first word."""
        starts = [noun.span[0] for noun in self.trace.nouns]
        return next((word for word in self.words if word.span[0] in starts), self.words[0])

    def neurons(self, word: Noun) -> pd.DataFrame:
        """The k neurons that contribute most to a word: one row each, by name, with layer, unit, score, activation and the
        tokens that it writes (best first)."""
        ranking = rank(self.vlm, self.trace, word, self.k)
        table = top_tokens(self.vlm, ranking.neurons).drop(columns="weights")
        return table.assign(score=ranking.scores, activation=ranking.activations)

    @torch.no_grad()
    def probabilities(self, asked: Sequence[Noun], neurons: Sequence[Neuron] = (), factor: float = 1.0) -> list[float]:
        """The probability of each word's first token at its step, the caption's own words before it, with neurons scaled: one
        forward pass."""
        last = max(word.step for word in asked)
        with scale(self.vlm, neurons, factor) if neurons else nullcontext():
            logits = self.vlm.model(**self.vlm.replay(self.trace, last), use_cache=False).logits[0]
        return [float(logits[word.step - last - 1].float().softmax(-1)[word.token]) for word in asked]

    def change(self, word: Noun, neurons: Sequence[Neuron], factor: float) -> Change:
        """What scaling the neurons does to a word, to the caption's nouns and to the caption. Raises MmnError for no neurons."""
        if not neurons:
            raise MmnError("There is nothing to scale: choose at least one neuron.")
        neurons = list(neurons)
        asked = [word, *(noun for noun in self.trace.nouns if noun.step != word.step)]
        asked.sort(key=lambda each: each.step)
        control = same_layer_random(self.vlm, neurons, draws=1)[0]
        table = pd.DataFrame(
            {
                "before": self.probabilities(asked),
                "after": self.probabilities(asked, neurons, factor),
                "random": self.probabilities(asked, control, factor),
            },
            index=[each.text for each in asked],
        )
        before, trace = self._heat(neurons), self.trace
        with scale(self.vlm, neurons, factor):
            after = self._heat(neurons)
            text = self.vlm.caption(self.image, trace.prompt, trace.prefix, record=False).text
        return Change(neurons, factor, text, table, after, before)

    def _heat(self, neurons: list[Neuron]) -> Heatmap | None:
        try:
            return heatmap(self.vlm, self.trace, neurons)
        except MmnError:  # image tokens that are no grid
            return None


# ------------------------------------------------------------------------------------------------------------------- drawing


def draw_heat(explorer: Explorer, change: Change, ax: Axes) -> None:
    """The neurons' mean activation over the picture, in the colours that it has with a factor of 1."""
    heat, before = change.heat, change.heat_before
    if heat is None or before is None:
        plots.picture(explorer.image, ax, "no heatmap: this model's image\ntokens are no grid")
        return
    count = len(change.neurons)
    title = f"where {count} neurons fire (mean), × {change.factor:g}" if count > 1 else f"{change.neurons[0]}, × {change.factor:g}"
    plots.heatmap(explorer.image, heat.grid.mean(0), ax=ax, title=title, box=heat.box)
    usual = before.grid.mean(0)
    ax.images[-1].set_clim(float(usual.min()), float(usual.max()))


def draw_probabilities(change: Change, ax: Axes) -> None:
    """Three bars a word: its probability before, after, and with random neurons scaled."""
    looks = {
        "before": {"color": plots.BLUE, "label": "as it is"},
        "after": {"color": plots.VERMILION, "label": f"neurons chosen × {change.factor:g}"},
        "random": {"color": plots.GREY, "hatch": "//", "edgecolor": "white", "label": "as many random ones of their layers"},
    }
    rows = range(len(change.probabilities))
    for place, (column, look) in enumerate(looks.items()):
        bars = ax.barh([row + 0.27 * (place - 1) for row in rows], change.probabilities[column], 0.25, **look)  # type: ignore[arg-type]
        ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)  # so that a bar of nothing is seen to be one
    names = [plots.label(name) for name in change.probabilities.index]
    ax.set(yticks=list(rows), yticklabels=names, xlim=(0, 1.12), xlabel="probability of the word")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw(explorer: Explorer, change: Change) -> Figure:
    """Heatmap and probabilities side by side."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_heat(explorer, change, left)
    draw_probabilities(change, right)
    return figure


def still(explorer: Explorer) -> Figure:
    """What the explorer shows for its first word: its neurons as they are, then at zero; as one figure that says so."""
    word = explorer.first
    table = explorer.neurons(word)
    change = explorer.change(word, _named(table), 0.0)
    figure = plt.figure(figsize=(7.4, 6.4), layout="constrained")
    axes = figure.subplot_mosaic([["heat", "bars"], ["list", "list"], ["caption", "caption"]], height_ratios=[3.4, 1.9, 0.8])
    figure.suptitle(
        "A still of the explorer. Run this cell in JupyterLab or Notebook 7: words to click, a slider to drag.", fontsize=9
    )
    draw_heat(explorer, replace(change, factor=1.0, heat=change.heat_before), axes["heat"])
    draw_probabilities(change, axes["bars"])
    axes["list"].set_axis_off()
    lines = "\n".join(plots.label(line) for line in lines_of(table.head(10)))
    axes["list"].set_title(plots.label(f"the neurons of “{word.text}”: contribution, and what they write"), fontsize=9)
    axes["list"].text(0, 1, lines, va="top", family="monospace", fontsize=9)
    plots.caption_change(explorer.trace.text, change.caption, axes["caption"], ("as it is", "× 0"))
    return figure


def lines_of(table: pd.DataFrame) -> list[str]:
    """Neurons as lines of text in columns: name, contribution, the first tokens it writes."""
    return [
        f"{row.Index:<9}{row.score:>7.2f}   {' · '.join(token.strip() for token in row.tokens[:6])}" for row in table.itertuples()
    ]


def marked(before: str, after: str) -> str:
    """Two captions as HTML; words that only one of them has are marked as deleted and inserted."""
    lines = [
        " ".join(f"<{mark}>{html.escape(word)}</{mark}>" if changed else html.escape(word) for word, changed in words)
        for mark, words in zip(("del", "ins"), plots.compared(before, after), strict=True)
    ]
    return "<p><b>as it is:</b> {}<br><b>now:</b> {}</p>".format(*lines)


def _named(table: pd.DataFrame) -> list[Neuron]:
    return [Neuron(*pair) for pair in zip(table["layer"].tolist(), table["unit"].tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------------------------- widgets


class Panel:
    """The explorer's controls, from top to bottom: picture, word, neurons, factor; then the figure and the captions. `box` holds
    them all. Every one works by keyboard."""

    def __init__(self, vlm: VLM, images: Mapping[str, Image.Image], k: int = 10):
        import ipywidgets as widgets  # not every reader has it

        self.vlm, self.images, self.k = vlm, images, k
        wide = {"width": "98%"}
        self.picture = widgets.Dropdown(options=list(images), description="picture")
        self.word = widgets.ToggleButtons(description="word", style={"button_width": "auto"})
        self.chosen = widgets.SelectMultiple(description="neurons", rows=min(k, 12), layout=wide)
        self.factor = widgets.FloatSlider(
            1.0, min=-1, max=3, step=0.25, description="activation ×", continuous_update=False, layout=wide
        )
        self.view, self.captions, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        style = (
            "<style>.mmn-neurons select {font-family: monospace} .mmn-explorer ins, .mmn-explorer del {font-weight: bold}</style>"
        )
        self.chosen.add_class("mmn-neurons")
        parts = [self.picture, self.word, self.chosen, self.factor, self.status, self.view, self.captions, widgets.HTML(style)]
        self.box = widgets.VBox(parts)
        self.box.add_class("mmn-explorer")
        self.setting = False
        self.open()
        for control, act in ((self.picture, self.open), (self.word, self.list_neurons), (self.chosen, self.show)):
            control.observe(act, "value")
        self.factor.observe(self.show, "value")

    @contextmanager
    def _working(self) -> Iterator[None]:
        """While the panel sets its own controls they call nothing; bad input becomes a sentence below the controls."""
        self.setting, self.status.value = True, "<p role=status>Working ...</p>"
        try:
            yield
            self.status.value = "<p role=status>Ready.</p>"
        except MmnError as error:
            self.status.value = f"<p role=status><b>{html.escape(str(error))}</b></p>"
        finally:
            self.setting = False

    def open(self, _: object = None) -> None:
        """Take the picture that is chosen and caption it."""
        if not self.setting:
            with self._working():
                self.explorer = Explorer(self.vlm, self.images[self.picture.value], self.k)
                self.word.options = [(word.text, word) for word in self.explorer.words]
                self.word.value = self.explorer.first
                self._list()

    def list_neurons(self, _: object = None) -> None:
        """List the neurons of the word that is chosen, all of them chosen."""
        if not self.setting:
            with self._working():
                self._list()

    def show(self, _: object = None) -> None:
        """Scale the neurons that are chosen and show what changes."""
        if not self.setting:
            with self._working():
                self._show()

    def _list(self) -> None:
        table = self.explorer.neurons(self.word.value)
        lines = [line.replace(" ", "\u00a0") for line in lines_of(table)]  # which a list does not close up
        self.chosen.options = list(zip(lines, _named(table), strict=True))
        self.chosen.value = tuple(_named(table))
        self._show()

    def _show(self) -> None:
        change = self.explorer.change(self.word.value, self.chosen.value, self.factor.value)
        png = BytesIO()
        draw(self.explorer, change).savefig(png, format="png", dpi=100)
        numbers = "; ".join(f"{name} {row.before:.2f}, now {row.after:.2f}" for name, row in change.probabilities.iterrows())
        told = html.escape(f"The heatmap of the neurons chosen, and the probabilities of words: {numbers}.", quote=True)
        data = b64encode(png.getvalue()).decode()
        self.view.value = f'<img style="max-width: 100%" alt="{told}" src="data:image/png;base64,{data}">'
        self.captions.value = marked(self.explorer.trace.text, change.caption)


def reader_present() -> bool:
    """Whether somebody sits before this cell. Jupyter's protocol says it in each request to run code: `allow_stdin`, whether who sent
    it can be asked a question. JupyterLab, Notebook 7, VS Code and Colab say yes; jupyter execute, papermill, nbconvert, nbval and the
    book's build say no."""
    kernel = getattr(get_ipython(), "kernel", None)
    request: dict[str, Any] = kernel.get_parent("shell") if kernel is not None else {}
    return bool(request.get("content", {}).get("allow_stdin"))


def explore(
    vlm: VLM, images: Image.Image | Sequence[Image.Image] | Mapping[str, Image.Image], k: int = 10, live: bool | None = None
) -> None:
    """Show the explorer of some pictures (with names, if a mapping) with `k` neurons a word.

    live: with controls, or as a still picture of the first picture's first noun; None: with controls where a reader is present
    (`reader_present`) and ipywidgets is installed. Raises MmnError for no pictures, or a first caption without words."""
    pictures = [images] if isinstance(images, Image.Image) else images
    named = dict(pictures) if isinstance(pictures, Mapping) else {f"picture {i}": each for i, each in enumerate(pictures, 1)}
    if not named:
        raise MmnError("There are no pictures to explore: give at least one.")
    if live is None:
        live = reader_present() and find_spec("ipywidgets") is not None
    if live:
        display(Panel(vlm, named, k).box)
    else:
        still(Explorer(vlm, next(iter(named.values())), k))
        plt.show()
