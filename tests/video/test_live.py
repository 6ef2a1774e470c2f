"""Real streams on loopback: they come at their pace, go away and come back."""

import contextlib
import http.server
import itertools
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch

from statekv.errors import VideoError, VideoWarning
from statekv.video.file import probe, read_frames
from statekv.video.live import LiveSettings, LiveSource
from tests.processes.forked import Process
from tests.video.fixtures.broadcast import FPS, HOST, TcpServer, background, encoded, free_port, paced, send_datagrams
from tests.video.fixtures.clips import closest_index, write_clip
from tests.video.fixtures.rtsp import RtspServer

pytestmark = pytest.mark.filterwarnings("error::statekv.errors.VideoWarning")
ONCE = LiveSettings(depth=50, max_lag_seconds=60, reconnect_seconds=0, timeouts_seconds=(5, 2))
COMES_BACK = LiveSettings(depth=50, max_lag_seconds=60, reconnect_seconds=20, timeouts_seconds=(5, 1))


def watched(source, settings=ONCE):
    """All frames, and how the source was doing at the end."""
    with contextlib.closing(LiveSource(source, settings)) as live:
        return list(live), live.status


def greys(frames, count=37):
    return [closest_index(frame.data, count) for frame in frames]


def times(frames):
    return [frame.pts_seconds for frame in frames]


def near(values):
    return pytest.approx(values, abs=0.05)


@pytest.fixture
def site():
    """An HTTP server that answers with what is put under a path: pieces that are sent one by one."""
    pages: dict[str, Callable[[], str | Iterable[bytes]]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = pages[self.path]()
            if isinstance(page, str):
                self.send_response(302)
                self.send_header("Location", page)
                page = ()
            else:
                self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for piece in page:
                    self.wfile.write(piece)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield pages, f"http://{HOST}:{server.server_port}"
        server.shutdown()


def test_a_file_played_as_live_shows_what_the_file_holds(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(25))
    frames, status = watched(clip, LiveSettings(fps=10, depth=50, max_lag_seconds=60))
    plain = list(read_frames(clip, fps=10))
    assert times(frames) == times(plain)
    assert all(torch.equal(frame.data, other.data) for frame, other in zip(frames, plain, strict=True))
    assert (status.dropped, status.gaps, status.connected) == (0, 0, False)


def test_a_file_played_as_live_takes_its_time(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(25))
    began = time.monotonic()
    with contextlib.closing(LiveSource(clip, ONCE)) as live:
        for frame in live:
            assert time.monotonic() >= began + frame.pts_seconds


def test_limits_hold(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(25))
    spread, _ = watched(clip, LiveSettings(max_frames=4, duration_seconds=1.0))
    assert times(spread) == times(read_frames(clip, max_frames=4))
    cut, _ = watched(clip, LiveSettings(until_seconds=0.2))
    assert times(cut) == near([0, 0.04, 0.08, 0.12, 0.16])


def test_a_slow_reader_sees_the_newest_and_the_rest_is_counted(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(25))
    with contextlib.closing(LiveSource(clip, LiveSettings(depth=3, max_lag_seconds=60))) as live:
        while live.status.connected:
            time.sleep(0.02)
        assert greys(live, 25) == [22, 23, 24]
        assert live.status.dropped == 22
        assert live.status.lag_seconds > 0


def test_mpegts_over_tcp():
    server = TcpServer(paced(encoded(20)))
    frames, status = watched(server.url)
    assert greys(frames) == list(range(20))
    assert times(frames) == near([index / FPS for index in range(20)])
    assert status.gaps == 0


def test_a_source_that_dies_and_returns_leaves_a_gap_and_true_times(caplog):
    caplog.set_level("INFO", logger="statekv")
    server = TcpServer(paced(encoded(10)), paced(encoded(10, first=15, start_seconds=500)), away_seconds=0.3)
    frames, status = watched(server.url, replace(COMES_BACK, max_frames=20))
    assert greys(frames) == [*range(10), *range(15, 25)]
    assert times(frames) == sorted(times(frames))
    gaps = [(index, frame.gap_seconds) for index, frame in enumerate(frames) if frame.gap_seconds]
    assert [index for index, _ in gaps] == [10]
    assert status.gaps == 1
    # It was away for 0.3 s at least, and the second connection's own clock counts for nothing.
    assert 0.3 < gaps[0][1] < 5
    assert status.gap_seconds == gaps[0][1] == pytest.approx(frames[10].pts_seconds - frames[9].pts_seconds)
    assert times(frames[10:]) == near([frames[10].pts_seconds + index / FPS for index in range(10)])
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith(f"tcp://{HOST} is away; it is called again in 0.5 s")
    assert told[-1] == f"tcp://{HOST} is back after a gap of {gaps[0][1]:.2f} s"


def test_a_source_that_stays_away_is_given_up_with_a_warning():
    server = TcpServer(paced(encoded(6)))
    with pytest.warns(VideoWarning, match="went away 0.6 s ago and has not come back"):
        frames, status = watched(server.url, replace(COMES_BACK, reconnect_seconds=0.6))
    assert len(frames) == 6
    assert (status.connected, status.gaps) == (False, 0)


def test_a_source_cut_off_inside_a_packet_goes_on_with_what_was_whole():
    pieces = encoded(10)
    cut = [*pieces[:8], pieces[8][: len(pieces[8]) // 2]]
    server = TcpServer(paced(cut), paced(encoded(12, first=15)))
    frames, status = watched(server.url, replace(COMES_BACK, max_frames=17))
    gap = next(index for index, frame in enumerate(frames) if frame.gap_seconds)
    assert greys(frames)[:7] == list(range(7))
    assert greys(frames[gap:]) == list(range(15, 15 + len(frames) - gap))
    assert status.gaps == 1


def test_mpegts_over_udp_that_falls_silent_and_returns():
    port = free_port(socket.SOCK_DGRAM)

    def send():
        for first in (0, 15):
            send_datagrams(port, paced(encoded(15, first=first, start_seconds=first)))
            time.sleep(1.2)

    with background(send):
        settings = replace(COMES_BACK, timeouts_seconds=(5, 0.5), until_seconds=3.2)
        frames, status = watched(f"udp://{HOST}:{port}", settings)
    assert status.gaps == 1
    (gap,) = [frame for frame in frames if frame.gap_seconds]
    assert times(frames) == sorted(times(frames))
    # A receiver that comes late waits for the next whole picture.
    before, after = greys(frames[: frames.index(gap)]), greys(frames[frames.index(gap) :])
    assert before == list(range(15))[-len(before) :]
    assert after == list(range(after[0], after[0] + len(after)))
    assert 15 <= after[0] <= 20


def test_rtsp_that_hangs_up_and_answers_again():
    server = RtspServer(paced(encoded(20)), paced(encoded(17, first=20)))
    frames, status = watched(server.url, replace(COMES_BACK, max_frames=29))
    gap = next(index for index, frame in enumerate(frames) if frame.gap_seconds)
    # The frame that was on its way when the server hung up may be lost.
    assert greys(frames[:gap])[:19] == list(range(19))
    assert greys(frames[gap:]) == list(range(20, 20 + len(frames) - gap))
    assert times(frames) == sorted(times(frames))
    assert status.gaps == 1


def test_http_without_a_length(site):
    pages, url = site
    pages["/live.ts"] = lambda: paced(encoded(12))
    assert probe(f"{url}/live.ts").duration_seconds is None
    frames, _ = watched(f"{url}/live.ts")
    assert greys(frames) == list(range(12))
    assert times(frames) == near([index / FPS for index in range(12)])


def test_hls_comes_at_its_pace_and_ends_when_its_playlist_does(site):
    pages, url = site
    asked = itertools.count()
    listed = "".join(f"#EXTINF:0.5,\n{index}.ts\n" for index in range(3))
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n"
    pages["/live.m3u8"] = lambda: [(head + listed + ("#EXT-X-ENDLIST\n" if next(asked) else "")).encode()]
    for index in range(3):
        pages[f"/{index}.ts"] = lambda index=index: encoded(5, first=5 * index, start_seconds=1 + index / 2)
    frames, status = watched(f"{url}/live.m3u8", COMES_BACK)
    assert greys(frames) == list(range(15))
    assert times(frames) == near([index / FPS for index in range(15)])
    assert status.gaps == 0


def test_neither_a_playlist_nor_a_redirection_reaches_a_local_file(site, tmp_path):
    pages, url = site
    secret = tmp_path / "secret.ts"
    secret.write_bytes(b"".join(encoded(10)))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    pages["/live.m3u8"] = lambda: [playlist.encode()]
    pages["/moved"] = lambda: f"file://{secret}"
    for path in pages:
        with pytest.raises(VideoError):
            LiveSource(url + path, ONCE)


@pytest.mark.parametrize(
    ("name", "names"),
    [("list.m3u8", "list.m3u8"), ("list.ts", "list.ts"), ("list.m3u8", "moved.ts")],
    ids=["itself", "itself as a segment", "what moves for ever"],
)
def test_a_playlist_without_an_end_is_refused_in_time(site, name, names):
    pages, url = site
    asked = itertools.count()
    pages[f"/{name}"] = lambda: [f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{names}\n#EXT-X-ENDLIST\n".encode()]
    pages["/moved.ts"] = lambda: (next(asked), "/moved.ts")[1]
    with pytest.raises(VideoError, match=r"cannot be opened: \w[^\n]*$"):
        LiveSource(f"{url}/{name}", replace(ONCE, timeouts_seconds=(1, 1)))
    assert next(asked) < 100


def test_variants_that_name_themselves_are_refused_in_time(site):
    pages, url = site
    pages["/list.m3u8"] = lambda: [b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nlist.m3u8\n"]
    with pytest.raises(VideoError, match="holds no video stream"):
        LiveSource(f"{url}/list.m3u8", replace(ONCE, timeouts_seconds=(1, 1)))


READ_STDIN = """
import sys
from statekv.video.live import LiveSettings, LiveSource
print("ready", flush=True)
for frame in LiveSource("-", LiveSettings(depth=99, max_lag_seconds=99)):
    print(frame.pts_seconds, frame.data.float().mean().item(), flush=True)
"""


@pytest.mark.parametrize(("format", "codec"), [("mpegts", "mpeg2video"), ("mjpeg", "mjpeg")])
def test_a_pipe(format, codec):
    (reads, writes), (hears, tells) = os.pipe(), os.pipe()
    reader = Process(program=READ_STDIN, streams=(reads, tells, 2))
    os.close(reads)
    os.close(tells)
    with open(hears) as said:
        assert said.readline() == "ready\n"
        with open(writes, "wb") as pipe:
            for piece in paced(encoded(15, format=format, codec=codec)):
                pipe.write(piece)
                pipe.flush()
        told = [tuple(map(float, one.split())) for one in said]
    assert reader.wait() == 0
    shown = [closest_index(torch.tensor(mean), 37) for _, mean in told]
    assert shown == list(range(15))
    pts = [pts for pts, _ in told]
    # JPEGs bear no times: theirs are when they came, those that FFmpeg looked at first at once.
    assert pts == near([index / FPS for index in range(15)]) if format == "mpegts" else pts == sorted(pts)
    assert 0.4 < pts[-1] < 5


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (f"tcp://{HOST}:1", "connection refused"),
        (f"rtsp://{HOST}:1/live", "connection refused"),
        ("udp://no-such-host.invalid:5", "cannot be opened"),
        ("gopher://host/live", "not allowed"),
        ("/dev/video987", "no camera"),
        ("missing.mp4", "does not exist"),
    ],
)
def test_what_cannot_be_opened_is_one_error(source, told):
    with pytest.raises(VideoError, match=told):
        LiveSource(source, COMES_BACK)


def test_a_terminal_is_no_video(monkeypatch):
    monkeypatch.setattr("os.isatty", lambda _: True)
    with pytest.raises(VideoError, match="is a terminal"):
        LiveSource("-", ONCE)


def test_a_silent_network_is_given_up():
    port = free_port(socket.SOCK_DGRAM)
    with pytest.raises(VideoError, match="no answer in time"):
        LiveSource(f"udp://{HOST}:{port}", LiveSettings(timeouts_seconds=(0.2, 0.2)))


def test_closing_ends_the_thread_and_the_iterator(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(250))
    before = threading.active_count()
    live = LiveSource(clip, ONCE)
    next(live)
    live.close()
    live.close()
    assert threading.active_count() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(live) == []
