"""What all tests share."""

from collections.abc import Iterator

import pytest
import tiny


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup a file's tests stay together, and so do a chapter's cells, unless a test says another group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True, scope="module")
def a_model_of_its_own() -> Iterator[None]:
    """Each file builds its own tiny model: what one file does to it cannot reach another."""
    tiny.vlm.cache_clear()
    yield
    tiny.vlm.cache_clear()
