"""Measures on cases whose answer is known by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmn import metrics
from mmn.errors import MmnError


def test_counts_of_a_caption():
    said, true = ["cat", "car", "cat"], ["cat", "dog", "bus"]
    assert metrics.precision_counts(said, true) == (1, 2)
    assert metrics.recall_counts(said, true) == (1, 3)
    assert metrics.chair_counts(said, true) == (1, 2)
    assert metrics.ratio(np.array([[1, 2], [0, 2]])) == 0.25
    assert np.isnan(metrics.ratio(np.zeros((3, 2))))


def test_iou_of_masks_known_by_hand():
    one, other = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[:2, :2], other[1:3, :2] = True, True
    assert metrics.iou(one, other) == pytest.approx(2 / 6)
    assert metrics.iou(one, one) == 1 and metrics.iou(one, ~one) == 0
    assert np.isnan(metrics.iou(one & ~one, one & ~one))
    assert metrics.iou_ceiling(0.05) == 1 and metrics.iou_ceiling(0.2) == pytest.approx(0.25)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(float, (6, 5), elements=st.floats(-3, 3)), st.integers(1, 29))
def test_by_area_keeps_the_hottest_pixels(heat, area):
    mask = metrics.by_area(heat, area)
    assert mask.sum() == area and heat[mask].min() >= heat[~mask].max()


def test_a_heatmap_equal_to_the_mask_scores_one_and_noise_scores_chance():
    rng = np.random.default_rng(0)
    mask = np.zeros((60, 60), bool)
    mask[10:30, 20:45] = True
    assert metrics.auprc(mask.astype(float), mask) == 1
    assert metrics.iou(metrics.by_area(mask.astype(float), int(mask.sum())), mask) == 1
    assert metrics.auprc(rng.random(mask.shape), mask) == pytest.approx(mask.mean(), abs=0.02)


def test_the_bootstrap_covers_the_truth_and_resamples_rows():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        interval = metrics.bootstrap(rng.normal(2, 1, 80), metrics.mean, draws=300, seed=seed)
        hits += interval.low <= 2 <= interval.high
    assert 49 <= hits <= 60
    same = metrics.bootstrap(np.full((10, 2), 3.0), metrics.ratio)
    assert (
        f"{metrics.Interval(-0.0004, -1.5, 0.25):.2f}" == "0.00 [\u22121.50,\u00a00.25]"
        and f"{same:.0%}" == "100% [100%,\u00a0100%]"
    )
    assert same == (1, 1, 1) and str(same) == "1.000 [1.000,\u00a01.000]"
    with pytest.raises(MmnError):
        metrics.bootstrap([], metrics.mean)
