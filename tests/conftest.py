"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What the imports have made stays as long as the process: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
