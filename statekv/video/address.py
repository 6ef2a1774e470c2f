"""How FFmpeg is told to open a source, and which protocols it may use on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from statekv.errors import VideoError
from statekv.video.source import Source, display_name, is_camera, is_stdin, local_path, scheme_of

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


def locate(source: Source) -> Address:
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


def check_scheme(source: Source, allowed: tuple[str, ...]) -> str:
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
