"""What holds for all tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

from tests.runner.demo import demo_read_once

# A shell's `&` leaves Ctrl-C ignored, and nohup the end of a terminal; what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """What the imports have made stays as long as the process: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _demo_read_once() -> Iterator[None]:
    with demo_read_once():
        yield
