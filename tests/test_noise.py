"""Results that are compared do not depend on the processor: a sample of `python tests/noise.py`, which runs them all."""

from __future__ import annotations

import pytest
from noise import CHAPTERS, run, settings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHAPTERS, reason="there are no notebooks beside the tests")]


@pytest.mark.parametrize("name", ["00_tour", "02_finding", "04_sensitivity", "flips", "planted"])
def test_rounding_changes_nothing_that_is_compared(name: str) -> None:
    (setting,) = settings(1)
    assert not run(name, setting)


@pytest.mark.parametrize("name", ["00_tour", "flips"])
def test_noise_that_is_no_rounding_is_seen(name: str) -> None:
    (setting,) = settings(1)
    told = run(name, {**setting, "MMN_NOISE": "0.1"})
    assert "mismatch" in told or "is stored" in told
