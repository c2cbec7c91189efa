"""Shares the soak's time among the fuzz targets that were collected."""

import pytest

from tests.fuzz import rounds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rounds.share_time(sum(1 for item in items if item.get_closest_marker("soak") and "tests/fuzz" in item.nodeid))
