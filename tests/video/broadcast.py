"""Live streams on loopback: encoded with PyAV, sent frame by frame at their pace."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import av

from .clips import SIZE, grey

FPS = 10
HOST = "127.0.0.1"
DATAGRAM_BYTES = 7 * 188


def encoded(
    count: int, first: int = 0, format: str = "mpegts", codec: str = "mpeg2video", start_seconds: float = 0.0
) -> list[bytes]:
    """The bytes of each frame: greys from `first` on, ten a second, each fifth one whole."""
    pieces: list[bytes] = []
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format, options={"flush_packets": "1"}) as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.max_b_frames = 5, 0
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(grey(first + index), format="rgb24")
            frame.pts, frame.time_base = index + round(start_seconds * FPS), Fraction(1, FPS)
            container.mux(stream.encode(frame))
            pieces.append(buffer.getvalue()[sum(map(len, pieces)) :])
        container.mux(stream.encode(None))
    pieces.append(buffer.getvalue()[sum(map(len, pieces)) :])
    return pieces


def paced(pieces: Iterable[bytes], speed: float = 1.0) -> Iterator[bytes]:
    """Each piece at its time."""
    began = time.monotonic()
    for index, piece in enumerate(pieces):
        time.sleep(max(0.0, began + index / FPS / speed - time.monotonic()))
        yield piece


class TcpServer:
    """Sends one broadcast to each caller in turn, then hangs up.

    Args:
        broadcasts: pieces for the first caller, the second …; afterwards nobody answers.
        away_seconds: how long nobody answers after each.
    """

    def __init__(self, *broadcasts: Iterable[bytes], away_seconds: float = 0.0) -> None:
        self.port = free_port()
        self._broadcasts = broadcasts
        self._away_seconds = away_seconds
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._listening.wait(5)

    @property
    def url(self) -> str:
        return f"tcp://{HOST}:{self.port}"

    def _serve(self) -> None:
        for pieces in self._broadcasts:
            with socket.create_server((HOST, self.port)) as server:
                self._listening.set()
                caller, _ = server.accept()
            with caller, contextlib.suppress(OSError):
                for piece in pieces:
                    caller.sendall(piece)
            time.sleep(self._away_seconds)


def send_datagrams(port: int, pieces: Iterable[bytes]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for piece in pieces:
            for start in range(0, len(piece), DATAGRAM_BYTES):
                sender.sendto(piece[start : start + DATAGRAM_BYTES], (HOST, port))


@contextlib.contextmanager
def background(work: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Do it on a thread while the block runs."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    yield
    thread.join(5)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
