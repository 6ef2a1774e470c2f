"""What a source is called, how FFmpeg may open it, and whether a file is still the one that was watched."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from statekv.errors import VideoError

PathOrUrl = str | os.PathLike[str]

_MP4_FIRST_BOXES = (b"ftyp", b"mdat", b"moov", b"free", b"skip", b"wide")


def local_path(source: PathOrUrl) -> Path | None:
    """Return the path of a local file, or None for a URL, a camera or a pipe."""
    if is_camera(source) or is_stdin(source):
        return None
    if not isinstance(source, str):
        return Path(source)
    if scheme_of(source) == "file":
        return Path(url2pathname(urlsplit(source).path)) if "://" in source else Path(source)
    return None


def scheme_of(source: PathOrUrl) -> str:
    """Return the scheme of a URL in lower case; "file" for what is none."""
    text = os.fspath(source)
    if not isinstance(source, str) or text.startswith("pipe:"):
        return "pipe" if text.startswith("pipe:") else "file"
    scheme, separator, _ = text.partition("://")
    return scheme.lower() if separator else "file"


def is_stdin(source: PathOrUrl) -> bool:
    """True for "-"."""
    return os.fspath(source) == "-"


def is_camera(source: PathOrUrl) -> bool:
    """True for a camera as Linux names it: /dev/video0."""
    return re.fullmatch(r"/dev/video\d+", os.fspath(source)) is not None


def display_name(source: PathOrUrl) -> str:
    """Return a short name for messages, without folders, passwords or access tokens."""
    if is_stdin(source):
        return "standard input"
    path = local_path(source)
    if path is not None:
        return path.name or str(path)
    parts = urlsplit(os.fspath(source))
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts.netloc else os.fspath(source)


def check_camera(source: PathOrUrl) -> None:
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


def check_there(source: PathOrUrl) -> None:
    """Raise VideoError for a file or camera that is not there; nothing is known of other sources beforehand."""
    path = local_path(source)
    if path is not None:
        check_file(path)
    elif is_camera(source):
        check_camera(source)


def explain(source: PathOrUrl, reason: str) -> VideoError:
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


def unusable(source: PathOrUrl, problem: str, hint: str) -> VideoError:
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


def nothing_decodes(source: PathOrUrl) -> VideoError:
    """For a source whose pictures cannot be read."""
    return unusable(source, "has no frame that decodes", "check that it plays elsewhere")


# What each scheme may reach for: its transports, and for HTTP what a playlist may name. Never "file" behind a network
# address, so that a playlist cannot read local files; concat:, subfile:, data: and the like nowhere.
_WEB = "http,https,httpproxy,tcp,tls,crypto"
_PROTOCOLS: Mapping[str, str] = {
    "file": "file,crypto",
    "http": _WEB,
    "https": _WEB,
    "tcp": "tcp",
    "udp": "udp",
    "rtp": "rtp,udp",
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsps,rtsp,rtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,rtmp,tcp,tls",
}
# Sources that cannot be opened twice, have no length and do not wait.
_ALWAYS_LIVE = ("tcp", "udp", "rtp", "rtsp", "rtsps", "rtmp", "rtmps")
# Arrival sets the pace of these: a reader that waits would only lose packets.
_PUSHED = ("udp", "rtp", "rtsp", "rtsps")


@dataclass(frozen=True, slots=True)
class Address:
    """What FFmpeg needs to know of a source.

    Attributes:
        url: in FFmpeg's spelling.
        format: FFmpeg's demuxer; None: it finds out.
        options: of the demuxer and its protocol.
        live: whether it can be opened only once at a time and has no end that is known beforehand.
        paced: whether it may hand out frames before their time, so that the reader waits for it.
        returns: whether it may come back after it ended.
    """

    url: str
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    live: bool = False
    paced: bool = True
    returns: bool = False


def locate(source: PathOrUrl) -> Address:
    """Return the address of a file, URL, camera or of standard input.

    Raises:
        VideoError: a scheme that is never allowed, or standard input is a terminal.
    """
    path = local_path(source)
    if path is not None:
        # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
        return Address(f"file:{path}", options=_only("file"))
    text = os.fspath(source)
    if is_stdin(source):
        if os.isatty(0):
            raise VideoError("standard input is a terminal, not a video", "pipe MPEG-TS or MJPEG into it")
        return Address("pipe:0", options={"protocol_whitelist": "pipe"}, live=True)
    if is_camera(source):
        return Address(text, format="v4l2", live=True, paced=False, returns=True)
    scheme = check_scheme(source, tuple(_PROTOCOLS))
    options = dict(_only(scheme))
    if scheme in ("rtsp", "rtsps"):
        options["rtsp_flags"] = "prefer_tcp"  # UDP is often filtered on the way, and then nothing comes at all
    return Address(text, None, options, scheme in _ALWAYS_LIVE, scheme not in _PUSHED, returns=True)


def check_scheme(source: PathOrUrl, allowed: tuple[str, ...]) -> str:
    """Return a source's scheme in lower case; what is no URL counts as a file.

    Raises:
        VideoError: it is not among those allowed.
    """
    scheme = scheme_of(source)
    if scheme not in allowed:
        known = ", ".join(name for name in allowed if name in _PROTOCOLS)
        raise VideoError(f"{display_name(source)}: the protocol {scheme!r} is not allowed", f"allowed: {known}")
    return scheme


def _only(scheme: str) -> dict[str, str]:
    return {"protocol_whitelist": _PROTOCOLS[scheme]}


_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def digest_of(source: PathOrUrl) -> str | None:
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


def check_same(source: PathOrUrl, digest: str | None) -> None:
    """Raise a VideoError unless a local file is the one with this digest; None: not known, and not asked for."""
    if digest is None or local_path(source) is None:
        return
    name, found = display_name(source), digest_of(source)
    if found is None:
        raise VideoError(f"{name} is not there any more", "say where it is with source, or ask about what was seen")
    if found != digest:
        raise VideoError(f"{name} is not the file that was watched before", "use that one, or watch it anew")


_STDIN = 0
# FFmpeg would read up to a megabyte of small pictures before it believes them.
_FORMATS = ((b"\xff\xd8\xff", "mjpeg"), (b"\x47", "mpegts"))


class StandardInput:
    """Hands out what is there instead of waiting for a full buffer, and knows its format by the first bytes.

    Attributes:
        format: FFmpeg's demuxer; None: FFmpeg finds out.
    """

    name = "pipe:0"

    def __init__(self) -> None:
        self._head = b""
        while len(self._head) < 3 and (more := os.read(_STDIN, 3 - len(self._head))):
            self._head += more
        self.format = next((name for start, name in _FORMATS if self._head.startswith(start)), None)

    def read(self, size: int) -> bytes:
        """At least one byte and at most `size`; none at the end."""
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        return os.read(_STDIN, size)
