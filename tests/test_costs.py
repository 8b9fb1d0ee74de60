"""The ways to score neurons agree where they must, and the benchmark's arithmetic is right. Nothing here judges a time."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import mmn
from mmn import costs
from mmn.costs import Graph, Shape
from mmn.paths import data_path

BOOK = Path(__file__).parent.parent / "book"
SMALL = Shape(64, 96, 1200, 2)


@pytest.fixture(scope="module")
def case() -> tuple[mmn.VLM, mmn.Trace, mmn.Noun]:
    vlm = costs.build(SMALL, side=3)
    return vlm, *costs.moment(vlm)


def gradient(case: tuple[mmn.VLM, mmn.Trace, mmn.Noun], *, cached: bool) -> list[torch.Tensor]:
    graph = Graph(*case, cached=cached)
    graph.forward()
    return graph.backward()


def test_the_model_has_the_shape_that_was_asked_for(case: tuple) -> None:
    vlm, trace, _ = case
    assert vlm.hidden == 64 and vlm.anatomy.neurons == [96, 96] and vlm.anatomy.unembedding.out_features == 1200
    assert len(trace.tokens) == costs.STEPS
    assert int(vlm.image_positions(vlm.replay(trace, 0)).sum()) == 9


def test_the_releases_way_gives_the_direct_score(case: tuple) -> None:
    direct = mmn.contributions(*case)
    for ours, theirs in zip(direct, costs.release(*case), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-4)
    assert [len(layer) for layer in costs.release(*case, neurons=10)] == [10, 10]


def test_both_gradients_are_those_of_the_package_and_of_each_other(case: tuple) -> None:
    known = mmn.contributions(*case, "gradient")
    whole, cached = gradient(case, cached=False), gradient(case, cached=True)
    for ours, all_positions, last in zip(known, whole, cached, strict=True):
        torch.testing.assert_close(all_positions[-1], ours, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(last[0], ours, atol=1e-6, rtol=1e-3)
        assert len(last) == 1 < len(all_positions)


def test_all_ways_agree_where_nothing_stands_between_write_and_logit() -> None:
    vlm = costs.build(SMALL._replace(layers=1), side=3)
    vlm.model.model.language_model.norm = torch.nn.Identity()
    bare = mmn.VLM(vlm.model, vlm.processor, "bare")
    case = (bare, *costs.moment(bare))
    (direct,), (release,) = mmn.contributions(*case), costs.release(*case)
    (whole,), (cached,) = gradient(case, cached=False), gradient(case, cached=True)
    assert float(direct.abs().max()) > 0
    for other in (release, whole[-1], cached[0]):
        torch.testing.assert_close(other, direct, atol=1e-7, rtol=1e-3)


def test_figures_scale_with_the_layers() -> None:
    one, two = ({"direct_seconds": a, "direct_mib": b, "whole_mib": c} for a, b, c in ((1.0, 5.0, 10.0), (3.0, 6.0, 14.0)))
    assert costs.scaled(one, two, 32) == {"direct_seconds": 63.0, "direct_mib": 6.0, "whole_mib": 134.0}
    assert costs.scaled(one, two, 2)["direct_seconds"] == two["direct_seconds"]


def test_the_stored_table_of_a_13b_model_is_the_releases() -> None:
    assert costs.stored(Shape(5120, 13824, 32000, 40)) * 2**20 == pytest.approx(35.4e9, rel=0.01)


def test_the_peak_is_what_a_run_holds() -> None:
    held = torch.ones(2**20)

    def two_of_three() -> torch.Tensor:
        doubled = held * 2
        fourfold = doubled * 2
        del doubled
        return fourfold * 2

    for _ in range(2):
        assert costs.peak(two_of_three, torch.device("cpu")) == pytest.approx(8, abs=1e-3)  # MiB


def made() -> pd.DataFrame:
    """A table whose ratios can be read off."""
    figures = {f"{way}_mib": 1.0 for way in costs.WAYS} | {"stored_mib": 2048.0, "limit_seconds": 0.5, "direct_seconds": 1.0}
    figures |= {"whole_seconds": 70.0, "whole_backward_seconds": 40.0, "cached_seconds": 3.0, "release_seconds": 7200.0}
    shapes = [(sweep, shape) for sweep, shapes in costs.SWEEPS.items() for shape in shapes]
    return pd.DataFrame([{"sweep": sweep, **shape._asdict(), "scaled": False, **figures} for sweep, shape in shapes])


def test_ratios_and_the_summary_are_read_from_the_table() -> None:
    table = made()
    assert costs.ratios(table).iloc[0].to_dict() == {"backward": 40, "whole": 70, "cached": 3, "release": 7200, "limit": 2}
    said = costs.summary(table)
    assert "at most 1/20" in said and "3.0 times" in said and "2 hours and 2 GiB" in said
    table.loc[3, "whole_backward_seconds"] = 19.0
    assert "more than 1/20 at some size" in costs.summary(table)
    assert costs.shown(table).shape == (len(table), 15)


def test_the_figure_has_a_line_for_each_way_and_the_limit() -> None:
    figure = costs.draw(made())
    assert [len(ax.lines) for ax in figure.axes] == [5, 5, 5]
    assert figure.axes[2].lines[3].get_ydata().tolist() == [1.0] * 4
    plt.close(figure)


def test_costs_has_a_row_for_each_shape_and_one_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Shape(32, 48, 1200, 1)
    monkeypatch.setattr(costs, "SWEEPS", {"width": (small,), "llava-1.5-7b": (small, small._replace(layers=2))})
    monkeypatch.setattr(costs, "build", functools.partial(costs.build, side=3))
    table = costs.costs(("width", "llava-1.5-7b"), repeats=1)
    assert table["layers"].tolist() == [1, 1, 2, 32] and table["scaled"].tolist() == [False, False, False, True]
    assert (table.filter(like="_seconds").iloc[:3] >= 0).all(axis=None)
    with pytest.raises(mmn.MmnError, match="no shapes 'depth'"):
        costs.costs(("depth",))


def test_the_page_shows_what_is_stored(tmp_path: Path) -> None:
    table = made()
    table.to_csv(tmp_path / "bench.csv", index=False)
    machine = {"processor": "a processor", "threads": 1, "torch": "2"}
    record = {"machine": machine, "dtype": "float32", "model": "m", "record_overhead": 0.051, "rank_overhead": 0.012, "pairs": 7}
    record |= {"record_interval": [-0.01, 0.062], "rank_interval": [0.011, 0.013]}
    (tmp_path / "bench.json").write_text(json.dumps(record))
    said = costs.page(tmp_path)
    assert (
        costs.summary(table) in said
        and "slower by 5.1% [-1.0%, 6.2%]" in said
        and "took 1.2% [1.1%, 1.3%]" in said
        and "a processor" in said
    )
    assert said.count("\n| ") == 2 * (len(table) + 1)


@pytest.mark.skipif(not (BOOK / "_costs.md").exists(), reason="there is no book beside the tests")
def test_the_books_page_is_made_from_the_stored_figures() -> None:
    assert (BOOK / "_costs.md").read_text(encoding="utf-8") == costs.page(data_path("results")), "run book/make_costs.py"
