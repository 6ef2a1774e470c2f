"""Whether a file is still the one that was watched."""

from __future__ import annotations

import hashlib
from pathlib import Path

from statekv.errors import VideoError
from statekv.video.source import Source, display_name, local_path

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def digest_of(source: Source) -> str | None:
    """SHA-256 over the size and 16 evenly spread samples of 64 KiB of a local file; None for all else.

    A change between the samples that leaves the size alone is not seen.
    """
    path = local_path(source)
    if path is None or not Path(path).is_file():
        return None
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()


def check_same(source: Source, digest: str | None) -> None:
    """Raise a VideoError unless a local file is the one with this digest; None: not known, and not asked for."""
    if digest is None or local_path(source) is None:
        return
    name, found = display_name(source), digest_of(source)
    if found is None:
        raise VideoError(f"{name} is not there any more", "say where it is with source, or ask about what was seen")
    if found != digest:
        raise VideoError(f"{name} is not the file that was watched before", "use that one, or watch it anew")
