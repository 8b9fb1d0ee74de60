"""What `mmn throughput` counts: pictures by seconds, the release's loop one at a time, and memory that only grows."""

import pytest
import tiny

from mmn import throughput
from mmn.errors import MmnError


def test_pictures_a_second_are_pictures_by_seconds(monkeypatch):
    worked = []
    monkeypatch.setattr(throughput, "_ours", lambda vlm, images, limit: worked.append(("ours", len(images))))
    monkeypatch.setattr(throughput, "_plain", lambda vlm, images, limit, cache: worked.append((cache, len(images))))
    clock = {"ours": 2.0, True: 1.6, False: 0.5}

    def seconds(work):
        work()
        return clock[worked[-1][0]]

    monkeypatch.setattr(throughput, "_seconds", seconds)
    found = throughput.throughput(tiny.llava(), pictures=12, batch_size=4)
    assert found["ours"] == 2 and found["plain"] == 2.5 and found["release"] == 2 and found["share"] == pytest.approx(0.8)
    assert [n for name, n in worked if name is False] == [1] * 4 and [n for name, n in worked if name == "ours"] == [4] * 4
    assert sorted(found["peak_mb"]) == found["peak_mb"]


def test_fewer_pictures_than_a_batch_are_refused():
    with pytest.raises(MmnError, match="less than one batch"):
        throughput.throughput(tiny.llava(), pictures=3, batch_size=4)
