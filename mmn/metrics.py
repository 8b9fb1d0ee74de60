"""Measures of captions, answers and heatmaps against what is known to be true, each a few lines on numpy arrays.

CHAIR: Rohrbach et al. 2018 (arXiv 1809.02156). POPE: Li et al. 2023 (arXiv 2305.10355).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score

from mmn.errors import MmnError


class Interval(NamedTuple):
    """A figure with the bounds of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:.3f}"

    def __format__(self, spec: str) -> str:
        """`0.72 [0.70, 0.75]` for the spec `.2f`: no line breaks it, no zero is negative, and minus is a minus."""
        value, low, high = (format(each, "z" + (spec or ".3f")).replace("-", "−") for each in self)
        return f"{value} [{low},\u00a0{high}]"


def bootstrap(rows: Sequence | np.ndarray, statistic: Callable[[np.ndarray], float], draws: int = 1000, seed: int = 0) -> Interval:
    """`statistic(rows)` with its percentile interval; a row is one scene, `[rows, ...]`, so that scenes are resampled, never tokens.

    Raises MmnError for no rows."""
    table = np.asarray(rows, float)
    if len(table) == 0:
        raise MmnError("There is nothing to resample: the measure saw no scene.")
    rng = np.random.default_rng(seed)
    values = [statistic(table[rng.integers(0, len(table), len(table))]) for _ in range(draws)]
    return Interval(float(statistic(table)), *(float(v) for v in np.nanpercentile(values, [2.5, 97.5])))


def mean(rows: np.ndarray) -> float:
    """The mean of the rows, `[rows]`."""
    return float(rows.mean())


def ratio(rows: np.ndarray) -> float:
    """Sum of the first column over sum of the second, `[rows, 2]`: precision, recall, CHAIR; nan where the second is 0."""
    hits, of = rows.sum(axis=0)[:2]
    return float(hits / of) if of else float("nan")


def precision_counts(said: Iterable[str], true: Iterable[str]) -> tuple[int, int]:
    """Of the objects a caption mentions: how many are in the picture, and how many it mentions."""
    said, true = set(said), set(true)
    return len(said & true), len(said)


def recall_counts(said: Iterable[str], true: Iterable[str]) -> tuple[int, int]:
    """Of the objects in the picture: how many the caption mentions, and how many there are."""
    said, true = set(said), set(true)
    return len(said & true), len(true)


def chair_counts(said: Iterable[str], true: Iterable[str]) -> tuple[int, int]:
    """For CHAIR_i: hallucinated object mentions, and object mentions."""
    right, mentioned = precision_counts(said, true)
    return mentioned - right, mentioned


def by_area(heat: np.ndarray, area: int) -> np.ndarray:
    """The `area` hottest pixels of a heatmap, bool `[height, width]`."""
    order = np.argsort(heat, axis=None, kind="stable")
    mask = np.zeros(heat.size, bool)
    mask[order[heat.size - area :]] = True
    return mask.reshape(heat.shape)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks, bool `[height, width]`; nan for two empty ones."""
    union = np.logical_or(one, other).sum()
    return float(np.logical_and(one, other).sum() / union) if union else float("nan")


def iou_ceiling(share: float, kept: float = 0.05) -> float:
    """The best IoU a mask of the hottest `kept` of a picture can reach with an object that covers `share` of it."""
    return min(share, kept) / max(share, kept)


def auprc(heat: np.ndarray, mask: np.ndarray) -> float:
    """Area under the precision-recall curve of the pixels' heat as a detector of the mask; chance is the mask's share."""
    return float(average_precision_score(mask.ravel(), heat.ravel()))
