"""Is a neuron's write a vote for words? What the direct score assumes, tested on the neurons of one caption [ours].

The score reads the write `a_i w_i` with the unembedding alone. Between the two stand the *final norm*, whose scale depends on the whole
stream; the *later layers*, which read the write and answer it; and the *softmax*, to which a shift common to all words is nothing.
`votes` measures, neuron by neuron, what the score says and what is true at each of these stations; `cast_again` lets neurons vote after
other layers than their own; `verdicts` judges. The rest is the control word, the lens on image tokens and the figures of the chapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mmn import plots
from mmn.contribution import contributions, read_out, through_norm
from mmn.decompose import lens
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.hooks import Removable, hooked
from mmn.metrics import Interval, bootstrap, mean
from mmn.nouns import Noun
from mmn.oracle import Moment
from mmn.scenes import Scene
from mmn.trace import Trace
from mmn.vlm import VLM
from mmn.weights import matrix

# The bars of a correlation or a share that is 1 where an assumption is true; set before the run that is shipped
HOLDS, PARTLY = 0.9, 0.5

SCENES, FEWEST = 10, 3  # fewer give no verdict; fewer give no interval
ON_OBJECT = 0.35  # of a patch's area


@torch.no_grad()
def votes(vlm: VLM, trace: Trace, noun: str | Noun, k: int = 10, per_layer: int = 64) -> pd.DataFrame:
    """One row a neuron that is active where the noun is produced: the `k` of highest direct score (`found`) and up to `per_layer` others
    of each layer, at random. In logits, but for the last two:

    score, norm_aware, centred: the scores of these names. scale_aware: `norm_aware` with the scale's own change to first order: the
    gradient of the logit by the final norm's input, in closed form. direct: what the logit loses when the write leaves the final norm's
    input and nothing else changes (the norm's scale is computed anew). total: what it loses when the neuron is zeroed at this position,
    so that later layers answer. direct_log_p: as direct, of log p (nats). scale: the norm's divisor without the write over that with it.
    common: the share of the votes' mean square, over all words, that is common to all: 1 is a shift of all words alike, 0 is none;
    common_random: the same of a vector of the write's length in a random direction.

    Raises MmnError as `contributions` does, and for numbers below 1."""
    if min(k, per_layer) < 1:
        raise MmnError("k and per_layer are numbers of neurons, at least 1.")
    chosen = trace.noun(noun)
    table = pd.DataFrame({"score": torch.cat(contributions(vlm, trace, chosen)).numpy()})
    for name in ("norm_aware", "centred"):
        table[name] = torch.cat(contributions(vlm, trace, chosen, name)).numpy()
    sizes = vlm.anatomy.neurons
    table.insert(0, "layer", [layer for layer, size in enumerate(sizes) for _ in range(size)])
    table.insert(1, "unit", [unit for size in sizes for unit in range(size)])
    table["found"] = table["score"].rank(ascending=False, method="first") <= k
    active = table[(trace.at([chosen.step])[0] != 0).numpy()]
    others = active[~active["found"]].sample(frac=1, random_state=0).groupby("layer").head(per_layer)
    table = pd.concat([active[active["found"]], others]).sort_values(["layer", "unit"]).reset_index(drop=True)
    moment = Moment(vlm, trace, chosen)
    parts = [
        _measured(vlm, trace, chosen, moment, layer, table["unit"][table["layer"] == layer].tolist())
        for layer in table["layer"].unique().tolist()
    ]
    return pd.concat([table, pd.concat(parts, ignore_index=True)], axis=1)


def _measured(vlm: VLM, trace: Trace, noun: Noun, moment: Moment, layer: int, units: list[int]) -> pd.DataFrame:
    """The measured columns of `votes` for some neurons of a layer."""
    stream = trace.stream_at([noun.step])[0]
    written = _written(vlm, trace, noun, [Neuron(layer, unit) for unit in units])
    logits = read_out(vlm, torch.cat([stream[None], stream - written])).cpu()
    log_p = logits.log_softmax(-1)[:, noun.token]
    return pd.DataFrame(
        {
            "scale_aware": (written @ _towards(vlm, stream, noun.token)).numpy(),
            "direct": (logits[0] - logits[1:])[:, noun.token].numpy(),
            "total": moment.effects(layer, torch.tensor(units))[:, 1].numpy(),
            "direct_log_p": (log_p[0] - log_p[1:]).numpy(),
            "scale": _scale(vlm, stream - written, stream).numpy(),
            "common": _common(vlm, written),
            "common_random": _common(vlm, _random_like(written, noun.token + layer)),
        }
    )


def _towards(vlm: VLM, stream: Tensor, token: int) -> Tensor:
    """The gradient of a token's logit by the final norm's input at `stream` `[hidden]`, the scale's change included: `[hidden]`."""
    direction = through_norm(vlm, vlm.anatomy.words([token]), stream[None])[0].cpu()
    if vlm.anatomy.final_norm is None:
        return direction
    centre = torch.allclose(
        direction.mean(), torch.zeros(()), atol=1e-6 * float(direction.abs().max())
    )  # a norm that takes the mean off
    along = stream - stream.mean() if centre else stream
    return direction - (direction @ stream) * along / along.square().sum()


def _written(vlm: VLM, trace: Trace, noun: Noun, neurons: Sequence[Neuron]) -> Tensor:
    """What the neurons add to the stream where the noun is produced, `a_i w_i`: float32 `[neurons, hidden]`."""
    activations = torch.stack([trace.activations[layer][noun.step, unit] for layer, unit in neurons])
    return activations[:, None] * vlm.anatomy.writes(neurons).cpu()


def _scale(vlm: VLM, changed: Tensor, stream: Tensor) -> Tensor:
    """The final norm's divisor at some vectors `[n, hidden]` over that at `stream` `[hidden]`: `[n]`."""
    probe = torch.ones(len(changed) + 1, stream.shape[-1])
    probe[:, ::2] = -1  # any direction but one that a norm with a mean takes off
    sizes = through_norm(vlm, probe, torch.cat([stream[None], changed])).norm(dim=-1)
    return sizes[0] / sizes[1:]


def _common(vlm: VLM, vectors: Tensor) -> np.ndarray:
    """The share of the mean square of `<vector, u_v>`, over all words v, that is the square of their mean: `[n]`."""
    unembedding = matrix(vlm.anatomy.unembedding)
    cast = vectors.to(unembedding) @ unembedding.T
    return (cast.mean(-1).square() / cast.square().mean(-1).clamp(min=1e-30)).float().cpu().numpy()


def _random_like(vectors: Tensor, seed: int) -> Tensor:
    """Vectors of the same lengths `[n, hidden]` in random directions."""
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


@torch.no_grad()
def cast_again(vlm: VLM, trace: Trace, noun: str | Noun, neurons: Sequence[Neuron]) -> pd.DataFrame:
    """Each neuron's write added to the stream once more, where the noun is produced, after each layer in turn; beside it a vector of the
    same length in a random direction. One row a write and layer, in logits: `kind` (vote or random), `layer` (after which it is added),
    `direct` (what the noun's logit gains if no later layer answers), `divisor` (what it would gain if only the final norm's divisor
    changed) and `total` (what it truly gains). After the last layer direct and total are the same. Raises MmnError as `contributions`
    does, and for no neurons."""
    chosen = trace.noun(noun)
    if not neurons:
        raise MmnError("There are no neurons to vote: give at least one.")
    moment = Moment(vlm, trace, chosen)  # which also says whether the caption was recorded
    written = _written(vlm, trace, chosen, neurons)
    pushed = torch.cat([written, _random_like(written, 0)])
    stream = trace.stream_at([chosen.step])[0]
    every = read_out(vlm, torch.cat([torch.zeros_like(stream)[None], stream[None], stream + pushed]))
    empty, *logits = every[:, chosen.token].cpu()
    shrunk = (logits[0] - empty) * (1 / _scale(vlm, stream + pushed, stream) - 1)  # all but the biases
    direct = torch.stack(logits[1:]) - logits[0]
    rows = {"kind": ["vote"] * len(written) + ["random"] * len(written), "direct": direct.tolist(), "divisor": shrunk.tolist()}
    norm = vlm.anatomy.final_norm or vlm.anatomy.unembedding
    parts = []
    moment.logits(1)  # tries out how copies are read, before anything is pushed
    for layer, reader in enumerate([*vlm.anatomy.layers[1:], norm]):
        with hooked(_pushing(reader, torch.cat([torch.zeros(1, vlm.hidden), pushed]))):
            total = moment.measures(moment.logits(len(pushed) + 1))[:, 1]
        parts.append(pd.DataFrame({"layer": layer, **rows, "total": (total[1:] - total[0]).tolist()}))
    return pd.concat(parts, ignore_index=True)


def _pushing(reader: Any, pushed: Tensor) -> Iterator[Removable]:
    """A hook that adds `pushed` `[rows, hidden]` to what a module reads, one copy of the moment each."""

    def push(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen = args[0] if args else kwargs["hidden_states"]
        changed = (seen.float() + pushed.reshape(seen.shape).to(seen.device)).to(seen.dtype)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    yield reader.register_forward_pre_hook(push, with_kwargs=True)


# Each assumption: its name, two columns of `votes` that agree where it is true, and whether only neurons that have later layers count.
ASSUMPTIONS: tuple[tuple[str, str, str, bool], ...] = (
    ("final norm: its gain", "score", "norm_aware", False),
    ("final norm: its scale", "norm_aware", "direct", False),
    ("later layers", "direct", "total", True),
    ("common shift", "score", "centred", False),
)


def verdicts(tables: Sequence[pd.DataFrame], layers: int) -> pd.DataFrame:
    """The assumptions' verdicts from tables of `votes`, one a scene, of a model with so many layers.

    One row an assumption, with two measures of agreement, each an Interval that resamples scenes, its control, the number of scenes that
    count and a verdict. *order*: the rank correlation of a scene's neurons, averaged over the scenes with at least 5. *proportion*: the
    cosine of the two columns over all scenes' neurons, 1 where one is a multiple of the other; large values matter most. The controls are
    the same with the first column shuffled among the neurons of a layer. neurons: how many counted. For *later layers* those of the last
    layer do not count: behind them there is none. Raises MmnError for no tables."""
    if not tables:
        raise MmnError("There are no votes to judge: give the table of at least one scene.")
    whole = pd.concat([table.assign(scene=scene) for scene, table in enumerate(tables)], ignore_index=True)
    found = {}
    for name, one, other, later in ASSUMPTIONS:
        part = whole[whole["layer"] < layers - 1] if later else whole
        rng = np.random.default_rng(0)
        shuffled = part.assign(**{one: part.groupby("layer")[one].transform(lambda values, rng=rng: rng.permutation(values))})
        row: dict[str, Any] = {"neurons": len(part)}
        for measure, statistic in (("order", _orders), ("proportion", _proportions)):
            rows = statistic(part, one, other)
            value, control = _interval(rows, measure), _interval(statistic(shuffled, one, other), measure)
            row |= {measure: value, f"{measure}_control": control, f"{measure}_scenes": len(rows)}
            row[f"{measure}_verdict"] = verdict(value, control, len(rows))
        found[name] = row
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("assumption")


def order(part: pd.DataFrame, one: str, other: str) -> Interval | None:
    """Rank correlation of two columns over a scene's neurons, averaged over the scenes (`scene`) with at least 5; None for fewer than 3
    such scenes, which make no interval."""
    return _interval(_orders(part, one, other), "order")


def proportion(part: pd.DataFrame, one: str, other: str) -> Interval | None:
    """Cosine of two columns over all scenes' neurons, to which large values matter most; None for fewer than 3 scenes."""
    return _interval(_proportions(part, one, other), "proportion")


def _orders(part: pd.DataFrame, one: str, other: str) -> np.ndarray:
    rows = [spearmanr(scene[one], scene[other])[0] for _, scene in part.groupby("scene") if len(scene) >= 5]
    return np.array([row for row in rows if not math.isnan(row)])


def _proportions(part: pd.DataFrame, one: str, other: str) -> np.ndarray:
    products = pd.DataFrame({"both": part[one] * part[other], "one": part[one] ** 2, "other": part[other] ** 2})
    return products.groupby(part["scene"]).sum().to_numpy()


def _interval(rows: np.ndarray, measure: str) -> Interval | None:
    return bootstrap(rows, mean if measure == "order" else _cosine) if len(rows) >= FEWEST else None


def _cosine(rows: np.ndarray) -> float:
    both, one, other = rows.sum(0)
    return float(both / math.sqrt(one * other)) if one * other else math.nan


def verdict(value: Interval | None, control: Interval | None, scenes: int = SCENES) -> str:
    """What a figure that is 1 where an assumption is true says of it: `holds` if its interval lies above 0.9, `holds in part` if above 0.5,
    both only if it lies above the control's, too; `fails` if it lies below 0.5; else `undecided`. `too few to say` for fewer than 10
    scenes, `untested` without a figure."""
    if scenes < SCENES:
        return "too few to say"
    if value is None or math.isnan(value.value):
        return "untested"
    if value.high < PARTLY:
        return "fails"
    if value.low <= PARTLY or (control is not None and value.low <= control.high):
        return "undecided"
    return "holds" if value.low > HOLDS else "holds in part"


def control_noun(trace: Trace, nouns: Sequence[Noun], without: Sequence[str] = (), seed: int = 0) -> Noun:
    """A control word at the place of a caption's first noun: one of `nouns` that neither the caption nor `without` (lemmas) names, drawn at
    random; where there is none, any token. Raises MmnError for a caption without a noun."""
    if not trace.nouns:
        raise MmnError(f"No noun in {trace.text!r}, so there is no place for a control word.")
    first, tokens = trace.nouns[0], {noun.token for noun in trace.nouns}
    other = {noun.lemma: noun.token for noun in nouns if noun.token not in tokens and noun.lemma not in without}
    if not other:
        return first._replace(text="(any token)", lemma="(any token)", token=first.token // 2)
    word = sorted(other)[int(np.random.default_rng(seed).integers(len(other)))]
    return first._replace(text=word, lemma=word, token=other[word])


def lens_auroc(vlm: VLM, trace: Trace, control: Noun, scene: Scene, grid: tuple[int, int]) -> pd.DataFrame:
    """How well the lens tells patches that show the object of a caption's first noun from others, where the truth is known.

    One row each for `word` (noun, control), `against` (all others; other objects: the patches that show those and not this one) and
    `layers` (how many are done): `auroc`, of the word's log probability at the image tokens, laid out as `grid` (rows, columns). None
    where either kind of patch is missing. Raises MmnError as `Trace.noun` does."""
    noun = trace.nouns[0]
    at = vlm.image_positions(vlm.replay(trace, noun.step))[0].cpu()
    here = patches(scene.mask(noun.lemma), grid)
    objects = np.any([here, *(patches(scene.mask(name), grid) for name in scene.names)], axis=0)
    rows = []
    log_p = lens(vlm, trace, noun.step, at, [noun.token, control.token]).numpy()
    for against, some in (("all others", np.ones_like(here)), ("other objects", objects)):
        if not 0 < here[some].sum() < some.sum():
            continue
        for layers, level in enumerate(log_p):
            for word, values in zip(("noun", "control"), level.T, strict=True):
                auroc = float(roc_auc_score(here[some], values[some]))
                rows.append({"word": word, "against": against, "layers": layers, "auroc": auroc})
    return pd.DataFrame(rows, columns=["word", "against", "layers", "auroc"])


def patches(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which patches of a grid (rows, columns) show what a mask, bool `[H, W]`, shows: bool `[patches]`."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.resize(grid[::-1], Image.Resampling.BOX)).ravel() > ON_OBJECT * 255


def curve(lines: Mapping[tuple[str, int], Interval]) -> pd.DataFrame:
    """Intervals by (name, x) as the table that `plots.curves` draws."""
    return pd.DataFrame(list(lines.values()), pd.MultiIndex.from_tuples(lines), ["value", "low", "high"])


def draw_way() -> Axes:
    """The chapter's map: from the picture to the word."""
    stations = {
        "picture": "cut",
        "patches": "vision tower,\nprojector",
        "image\ntokens": "among\nthe words",
        "residual\nstream": "norm",
        "unem-\nbedding": "softmax",
        "word": "",
    }
    ax = plt.subplots(figsize=(7.2, 1.9), layout="constrained")[1]
    for place, (name, then) in enumerate(stations.items()):
        frame = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": plots.BLUE}
        ax.text(place, 0, name, ha="center", va="center", size=8.5, bbox=frame)
        if then:
            ax.annotate("", (place + 0.66, 0), (place + 0.34, 0), arrowprops={"arrowstyle": "->", "color": "black"})
            ax.text(place + 0.5, -0.3, then, ha="center", size=7.5, va="top", style="italic")
    loop = {"arrowstyle": "->", "connectionstyle": "arc3,rad=-1.1", "color": plots.VERMILION}
    ax.annotate("", (3.25, 0.35), (2.75, 0.35), arrowprops=loop)
    ax.text(3, 0.98, "+ attention, + FFN", ha="center", size=8.5, color=plots.VERMILION)
    ax.set(xlim=(-0.5, 5.5), ylim=(-0.75, 1.2))
    ax.set_axis_off()
    return ax


def draw_norm(table: pd.DataFrame) -> tuple[Axes, Axes]:
    """Of the neurons of `votes`: left by how much the divisor changes without each, right the score through the norm as it is against the
    true loss."""
    ax, by = _two()
    change = 100 * (table["scale"] - 1)
    bins = np.linspace(min(change.min(), -1), max(change.max(), 1), 30).tolist()
    _bars(ax, {"others": change[~table["found"]], "found": change[table["found"]]}, bins)
    ax.set_xlabel("change of the norm's divisor (%)")
    _against(by, table, "norm_aware", "direct")
    by.set(xlabel="score through the norm as it is (logit)", ylabel="true loss (logit)")
    return ax, by


def draw_later(table: pd.DataFrame, cast: pd.DataFrame, layers: int) -> tuple[Axes, Axes]:
    """Left direct against total effect of the neurons of `votes` that have later layers; right `cast`, the means of `cast_again` as
    `curve` gives them."""
    ax, by = _two()
    early = table[table["layer"] < layers - 1]
    _against(ax, early, "direct", "total")
    ax.set(xlabel="direct effect (logit)", ylabel="total effect (logit)")
    plots.curves(cast, by, "cast once more after layer", "change of the logit")
    by.axhline(0, color="black", lw=0.6)
    return ax, by


def draw_shift(table: pd.DataFrame) -> tuple[Axes, Axes]:
    """Of the neurons of `votes`: left the share of their votes that is common to all words, right the score against the centred score."""
    ax, by = _two()
    _bars(ax, {"random directions": table["common_random"], "neurons": table["common"]}, np.linspace(0, 1, 26).tolist())
    ax.set_xlabel("share of the votes common to all words")
    _against(by, table, "score", "centred")
    by.set(xlabel="score", ylabel="centred score")
    return ax, by


def _two() -> tuple[Axes, Axes]:
    ax, by = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")[1]
    return ax, by


def _bars(ax: Axes, values: Mapping[str, pd.Series], bins: list[float]) -> None:
    """Two histograms in per cent of their neurons, the control first."""
    for (name, some), colour in zip(values.items(), (plots.GREY, plots.VERMILION), strict=True):
        ax.hist(some, bins, weights=np.full(len(some), 100 / max(len(some), 1)), color=colour, alpha=0.6, label=name)
    ax.set_ylabel("neurons (%)")
    ax.legend(frameon=False, fontsize=8)


def _against(ax: Axes, table: pd.DataFrame, one: str, other: str) -> None:
    """Two columns of `votes`, a point a neuron, those found as diamonds, and the line on which both are the same."""
    for name, some, mark, colour, wide in (
        ("others", table[~table["found"]], ".", plots.GREY, 3.0),
        ("found", table[table["found"]], "D", plots.VERMILION, 3.5),
    ):
        ax.plot(some[one], some[other], mark, color=colour, ms=wide, label=name)
    if len(table):
        ends = [table[one].min(), table[one].max()]
        ax.plot(ends, ends, "--", color="black", lw=0.8)
        ax.legend(frameon=False, fontsize=8)
