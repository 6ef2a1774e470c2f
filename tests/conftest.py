"""What holds for all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.runner.demo import demo_read_once


def pytest_collection_finish() -> None:
    """What the imports have made stays as long as the process: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _demo_read_once() -> Iterator[None]:
    with demo_read_once():
        yield
