"""As much of an RTSP server as one camera needs: MPEG-TS over RTP, inside the control connection (RFC 2326, 2250)."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable

from .broadcast import DATAGRAM_BYTES, HOST

_SDP = (
    f"v=0\r\no=- 0 0 IN IP4 {HOST}\r\ns=camera\r\nc=IN IP4 {HOST}\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:0\r\n"
)
_ANSWERS = {
    "OPTIONS": ("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""),
    "DESCRIBE": ("Content-Type: application/sdp\r\n", _SDP),
    "SETUP": ("Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n", ""),
    "PLAY": ("Session: 1\r\n", ""),
}


class RtspServer:
    """Sends one broadcast of MPEG-TS pieces to each caller in turn, then hangs up."""

    def __init__(self, *broadcasts: Iterable[bytes]) -> None:
        self._server = socket.create_server((HOST, 0))
        self.url = f"rtsp://{HOST}:{self._server.getsockname()[1]}/camera"
        self.asked: list[str] = []
        threading.Thread(target=self._serve, args=(broadcasts,), daemon=True).start()

    def _serve(self, broadcasts: tuple[Iterable[bytes], ...]) -> None:
        with self._server:
            for pieces in broadcasts:
                caller, _ = self._server.accept()
                with caller, contextlib.suppress(OSError):
                    self._talk(caller)
                    for number, payload in enumerate(_payloads(pieces)):
                        packet = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, 0, 1) + payload
                        caller.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)

    def _talk(self, caller: socket.socket) -> None:
        """Answer requests up to the one to play."""
        with caller.makefile("rb") as requests:
            while not self.asked or self.asked[-1] != "PLAY":
                lines = list(iter(requests.readline, b"\r\n"))
                method, headers, body = lines[0].split()[0].decode(), *_ANSWERS[lines[0].split()[0].decode()]
                number = next(line for line in lines if line.startswith(b"CSeq")).decode()
                answer = f"RTSP/1.0 200 OK\r\n{number}{headers}Content-Length: {len(body)}\r\n\r\n{body}"
                caller.sendall(answer.encode())
                self.asked.append(method)
        self.asked.append("")


def _payloads(pieces: Iterable[bytes]) -> Iterable[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), DATAGRAM_BYTES):
            yield piece[start : start + DATAGRAM_BYTES]
