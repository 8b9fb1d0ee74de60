"""What all tests share."""

from collections.abc import Iterator

import pytest
import tiny


@pytest.fixture(autouse=True, scope="module")
def a_model_of_its_own() -> Iterator[None]:
    """Each file builds its own tiny model: what one file does to it cannot reach another."""
    tiny.vlm.cache_clear()
    yield
    tiny.vlm.cache_clear()
