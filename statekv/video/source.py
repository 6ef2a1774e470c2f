"""What a source is called, and why it cannot be opened, in words a user can act on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from statekv.errors import VideoError

Source = str | os.PathLike[str]

_MP4_FIRST_BOXES = (b"ftyp", b"mdat", b"moov", b"free", b"skip", b"wide")


def local_path(source: Source) -> Path | None:
    """Return the path of a local file, or None for a URL, a camera or a pipe."""
    if is_camera(source) or is_stdin(source):
        return None
    if not isinstance(source, str):
        return Path(source)
    if scheme_of(source) == "file":
        return Path(url2pathname(urlsplit(source).path)) if "://" in source else Path(source)
    return None


def scheme_of(source: Source) -> str:
    """Return the scheme of a URL in lower case; "file" for what is none."""
    text = os.fspath(source)
    if not isinstance(source, str) or text.startswith("pipe:"):
        return "pipe" if text.startswith("pipe:") else "file"
    scheme, separator, _ = text.partition("://")
    return scheme.lower() if separator else "file"


def is_stdin(source: Source) -> bool:
    """True for "-"."""
    return os.fspath(source) == "-"


def is_camera(source: Source) -> bool:
    """True for a camera as Linux names it: /dev/video0."""
    return re.fullmatch(r"/dev/video\d+", os.fspath(source)) is not None


def display_name(source: Source) -> str:
    """Return a short name for messages, without folders, passwords or access tokens."""
    if is_stdin(source):
        return "standard input"
    path = local_path(source)
    if path is not None:
        return path.name or str(path)
    parts = urlsplit(os.fspath(source))
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts.netloc else os.fspath(source)


def check_camera(source: Source) -> None:
    """Raise VideoError if there is no such camera."""
    if not Path(source).exists():
        found = sorted(str(path) for path in Path("/dev").glob("video*") if is_camera(path))
        raise VideoError(
            f"there is no camera {os.fspath(source)}", f"found: {', '.join(found)}" if found else "no camera was found"
        )


def check_file(path: Path) -> None:
    """Raise VideoError if no file with content lies there."""
    name = display_name(path)
    if path.is_dir():
        raise VideoError(f"{name} is a folder, not a video", "name one file inside it")
    if not path.exists():
        raise VideoError(f"{name} does not exist", "check the spelling and the folder")
    if path.is_file() and path.stat().st_size == 0:
        raise VideoError(f"{name} is empty (0 bytes)", "record or download it again")


def check_there(source: Source) -> None:
    """Raise VideoError for a file or camera that is not there; nothing is known of other sources beforehand."""
    path = local_path(source)
    if path is not None:
        check_file(path)
    elif is_camera(source):
        check_camera(source)


def explain(source: Source, reason: str) -> VideoError:
    """Return the error for a source that FFmpeg refused to open with this short reason in lower case."""
    path, name = local_path(source), display_name(source)
    if is_stdin(source):
        return VideoError(f"{name} holds no video that FFmpeg can read", "pipe MPEG-TS or MJPEG into it")
    if is_camera(source):
        return VideoError(f"{name} cannot be opened: {reason}", "check that nobody else uses it, and its permissions")
    if path is None:
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
