"""Wrong inputs of every kind, generated from a seed: each is refused in one line or works, in bounded time and memory.

`python -m tests.wrong_inputs` tries many and prints a line for each kind; the tests try some.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.wrong_inputs import calls, commands, disks, files, models, playlists, saves, signals
from tests.wrong_inputs.trying import Try

# By kind: what generates them in a folder from a seed, how many are tried by hand, and how many by the tests.
KINDS: Mapping[str, tuple[Callable[[Path, int, int], Iterator[Try]], int, int]] = {
    "calls": (calls.tries, 2000, 200),
    "commands": (commands.tries, 300, 12),
    "models": (models.tries, 400, 24),
    "files": (files.tries, 200, 10),
    "saves": (saves.tries, 400, 20),
    "disks": (disks.tries, 100, 6),
    "signals": (signals.tries, 90, 3),
    "playlists": (playlists.tries, 150, 12),
}
