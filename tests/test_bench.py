"""`mmn bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import tiny

import mmn
from mmn import atlas, bench, costs


def test_figures() -> None:
    figures = bench.bench(tiny.vlm(), pictures=1, repeats=2, max_new_tokens=4)
    assert figures["pairs"] == 2 and figures["model_hash"] == tiny.vlm().hash and figures["steps"] == 4
    assert figures["record_seconds"] > figures["rank_seconds"] > 0
    assert figures["gradient_ratio"] > 0
    for name in ("record", "rank"):
        low, high = figures[f"{name}_interval"]  # over two runs, which a draw may take one of twice
        assert low < figures[f"{name}_overhead"] < high and figures[f"{name}_overhead"] == pytest.approx((low + high) / 2)
    with pytest.raises(mmn.MmnError, match="at least 1"):
        bench.bench(tiny.vlm(), pictures=0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, processor = tiny.llava_parts()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["--model", str(tmp_path), "--pictures", "1", "--repeats", "1", "--shapes", "--json"])) == 0
    assert {"record_overhead", "rank_overhead"} <= set(json.loads(capsys.readouterr().out))
    assert bench.run(parser.parse_args(["--model", str(tmp_path), "--pictures", "1", "--repeats", "1", "--shapes"])) == 0
    assert "recording: " in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_the_atlas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What every neuron needs is held: four grids of half a byte a place, at least; bad numbers are refused before a model is built."""
    small = costs.Shape(64, 20_000, 4008, 2)
    least = small.layers * small.neurons * atlas.BEST * 24 * 24 / 2 / 2**30
    assert least < bench.atlas_memory(small, 4) < 2
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    refused = {"a number of layers": ["--atlas", "0"], "no dtype of their own": ["--atlas", "1", "--dtype", "auto"]}
    for sentence, options in refused.items():
        with pytest.raises(mmn.MmnError, match=sentence):
            bench.run(parser.parse_args(options))
    monkeypatch.setattr(costs, "SEVEN", small)
    assert bench.run(parser.parse_args(["--atlas", "1", "--pictures", "4"])) == 0
    assert capsys.readouterr().out.startswith("1 layers, 4 pictures: the atlas takes 0.")
