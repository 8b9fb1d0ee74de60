"""What `mmn throughput` counts: pictures by seconds, the release's loop one at a time, and memory that only grows."""

import functools
import json

import pytest
import tiny

from mmn import cli, costs, study_costs, throughput
from mmn.errors import MmnError


def test_pictures_a_second_are_pictures_by_seconds(monkeypatch):
    worked = []
    monkeypatch.setattr(throughput, "_ours", lambda vlm, images, limit: worked.append(("ours", len(images))))
    monkeypatch.setattr(throughput, "_plain", lambda vlm, images, limit, cache: worked.append((cache, len(images))))
    clock = {True: 1.6, False: 0.5}
    ours = iter((9.0, 2.0, 1.6, 3.2))  # the first warms up

    def timed(work, device):
        work()
        return next(ours) if worked[-1][0] == "ours" else clock[worked[-1][0]], None

    monkeypatch.setattr(costs, "timed", timed)
    found = throughput.throughput(tiny.llava(), pictures=12, batch_size=4)
    assert found["ours"] == 2 and found["plain"] == 2.5 and found["release"] == 2 and found["share"] == pytest.approx(0.8)
    assert found["share_interval"] == pytest.approx((0.5, 1.0)), "of .8, 1 and .5, drawn again"
    assert [n for name, n in worked if name is False] == [1] * 4 and [n for name, n in worked if name == "ours"] == [4] * 4
    assert sorted(found["peak_mb"]) == found["peak_mb"]


def test_fewer_pictures_than_a_batch_are_refused():
    with pytest.raises(MmnError, match="less than one batch"):
        throughput.throughput(tiny.llava(), pictures=3, batch_size=4)


def test_a_random_model_of_a_large_ones_shape_can_be_measured(monkeypatch, capsys):
    monkeypatch.setattr(study_costs, "SHAPES", {"7B": costs.Shape(64, 496, 1200, 2)})
    monkeypatch.setattr(costs, "build", functools.partial(costs.build, side=3))
    assert cli.main(["throughput", "--random", "7B", "--pictures", "2", "--batch", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "mmn throughput --random 7B --dtype float32 --pictures 2 --batch 1"
    assert found["layers"] == 2 and found["neurons"] == 992
    assert found["share"] > 0 and found["nouns by"] == "first_word"
