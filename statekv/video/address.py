"""What a source is called, how FFmpeg may open it, and whether a file is still the one that was watched."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
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
        return _path_of(source) if "://" in source else Path(source)
    return None


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise VideoError(f"{url} is no address: {error}", "check its spelling") from None


def _path_of(url: str) -> Path:
    parts = _split(url)
    if parts.netloc not in ("", "localhost"):
        raise VideoError(f"{url} is a file on the machine {parts.netloc!r}", "give its path on this one, or its URL")
    return Path(url2pathname(parts.path))


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
    parts = _split(os.fspath(source))
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
    try:
        path.exists()
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise VideoError(f"{name[:80]!r} cannot be the name of a file: {told}", "check the spelling") from None
    if path.is_dir():
        raise VideoError(f"{name} is a folder, not a video", "name one file inside it")
    if not path.exists():
        raise VideoError(f"{name} does not exist", "check the spelling and the folder")
    if path.is_fifo():  # what is read to know it is gone, and whoever writes ends with the first reader
        rule = f"{name} is a named pipe, which cannot be opened twice"
        raise VideoError(rule, f"read it as standard input, as with: statekv watch - < {name}")
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
        rule = f"{name} holds no video that FFmpeg can read, or an MP4 whose index (moov) comes last"
        return VideoError(rule, "pipe MPEG-TS or MJPEG into it, or an MP4 made with -movflags +faststart")
    if is_camera(source):
        return VideoError(f"{name} cannot be opened: {reason}", "check that nobody else uses it, and its permissions")
    if path is None:
        if reason == "immediate exit requested":
            reason = "no answer in time"
        return VideoError(f"{name} cannot be opened: {reason}", "check the address and the network")
    if playlist := _playlist(path):
        return VideoError(f"{name} is {playlist}, which is not read from disk", "name the file or address it leads to")
    if reason == "invalid argument":
        return VideoError(f"{name} is of a kind that is not read", "convert it, as with: ffmpeg -i FILE FILE.mp4")
    if reason not in ("invalid data found when processing input", "end of file"):
        return VideoError(f"{name} cannot be opened: {reason}", "check the file and its permissions")
    return unusable(source, "is not a video that FFmpeg can read", "check that it plays elsewhere")


_PLAYLISTS = ((b"#EXTM3U", "an M3U playlist"), (b"ffconcat", "a list for FFmpeg's concat"), (b"v=0", "an SDP file"))


def _playlist(path: Path) -> str:
    """What a text file that names others is called; "" for all else."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"<MPD" in head:
        return "a DASH manifest"
    return next((kind for start, kind in _PLAYLISTS if head.startswith(start)), "")


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


def _is_animated_webp(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 2)


def nothing_decodes(source: PathOrUrl) -> VideoError:
    """For a source whose pictures cannot be read."""
    path = local_path(source)
    if is_stdin(source):
        rule = "standard input has no frame that decodes; an MP4 whose index (moov) comes last cannot be piped"
        return VideoError(rule, "make one with: ffmpeg -i FILE -c copy -movflags +faststart OUT.mp4; or pipe MPEG-TS")
    if path is not None and path.is_file() and _is_animated_webp(path):
        return VideoError(f"{display_name(source)} is an animated WebP, which FFmpeg does not read", "make it an MP4")
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


class _Unnamed:
    """A file as a stream of bytes, for a name that FFmpeg would take for a pattern of many names."""

    name, format = "", None

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.read, self.seek, self.tell = self._file.read, self._file.seek, self._file.tell


def numbered(source: PathOrUrl) -> _Unnamed | None:
    """A local file whose name holds what FFmpeg would replace by numbers; None for all else."""
    path = local_path(source)
    return _Unnamed(path) if path is not None and "%" in path.name else None
