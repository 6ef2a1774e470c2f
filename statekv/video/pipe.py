"""Standard input as FFmpeg likes to read it."""

from __future__ import annotations

import os

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
