"""What a source is called, and why it cannot be opened, in words a user can act on."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from statekv.errors import VideoError

Source = str | os.PathLike[str]

_MP4_FIRST_BOXES = (b"ftyp", b"mdat", b"moov", b"free", b"skip", b"wide")


def local_path(source: Source) -> Path | None:
    """Return the path of a local file, or None for a URL or pipe."""
    text = os.fspath(source)
    is_remote = isinstance(source, str) and ("://" in text or text.startswith("pipe:"))
    return None if is_remote else Path(text)


def display_name(source: Source) -> str:
    """Return a short name for messages, without folders, passwords or access tokens."""
    path = local_path(source)
    if path is not None:
        return path.name or str(path)
    parts = urlsplit(os.fspath(source))
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts.netloc else os.fspath(source)


def check_file(path: Path) -> None:
    """Raise VideoError if no file with content lies there."""
    name = display_name(path)
    if path.is_dir():
        raise VideoError(f"{name} is a folder, not a video", "name one file inside it")
    if not path.exists():
        raise VideoError(f"{name} does not exist", "check the spelling and the folder")
    if path.is_file() and path.stat().st_size == 0:
        raise VideoError(f"{name} is empty (0 bytes)", "record or download it again")


def explain(source: Source, reason: str) -> VideoError:
    """Return the error for a source that FFmpeg refused to open with this short reason in lower case."""
    path, name = local_path(source), display_name(source)
    if path is None:
        if reason == "protocol not found":
            return VideoError(f"{name}: FFmpeg knows no such protocol", "use a file, http(s), rtsp or rtmp")
        if reason == "immediate exit requested":
            reason = "no answer in time"
        return VideoError(f"{name} cannot be opened: {reason}", "check the address and the network")
    if reason not in ("invalid data found when processing input", "end of file"):
        return VideoError(f"{name} cannot be opened: {reason}", "check the file and its permissions")
    return unusable(source, "is not a video that FFmpeg can read", "check that it plays elsewhere")


def unusable(source: Source, problem: str, hint: str) -> VideoError:
    """Return the error for a source without usable video, or the deeper cause: an MP4 cut in its index."""
    path, name = local_path(source), display_name(source)
    if path is not None and path.is_file() and _lacks_mp4_index(path):
        problem = "has no complete index (moov) because the file is incomplete"
        hint = "copy or download it again"
    return VideoError(f"{name} {problem}", hint)


def _lacks_mp4_index(path: Path) -> bool:
    """Walk the top-level boxes; True for an MP4 or MOV file whose moov box is missing or cut."""
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset + 8 <= size:
            file.seek(offset)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if offset == 0 and kind not in _MP4_FIRST_BOXES:
                return False
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if kind == b"moov":
                return offset + length > size
            if length < 8:
                break
            offset += length
    return offset > 0


def nothing_decodes(source: Source) -> VideoError:
    """For a source whose pictures cannot be read."""
    return unusable(source, "has no frame that decodes", "check that it plays elsewhere")
