"""Which stream of a file is read, with which times, and what is said of one that is damaged or none."""

import contextlib
import functools
import http.server
import os
import socket
import threading
import warnings
from types import TracebackType
from typing import Any

import pytest

from statekv.errors import VideoError, VideoWarning
from statekv.video.decode import Damage
from statekv.video.file import count_frames, probe, read_frames
from statekv.video.resume import open_video
from tests.video.fixtures.clips import noise, write_clip, write_sound


def test_a_sound_video_has_no_complaint():
    assert Damage().complaint(0.0, 13.0, 13.0, 0.04) == ""
    assert Damage().complaint(0.0, 13.0, None, 0.04) == ""


def test_a_gap_at_the_end_must_be_real():
    assert Damage().complaint(5.0, 17.1, 13.0, 0.04) == ""
    assert Damage().complaint(5.0, 16.9, 13.0, 0.04) != ""
    assert Damage().complaint(0.0, 93.0, 100.0, 2.0) == ""


def test_times_count_from_the_start():
    assert Damage().complaint(8.0, 14.2, 13.0, 0.04).startswith(" ends at 6.2 s of 13.0 s: ")


def test_skipped_pieces_are_counted():
    assert Damage(pieces=3).complaint(0.0, 13.0, 13.0, 0.04).startswith(": 3 damaged")
    assert "; 3 damaged" in Damage(pieces=3).complaint(0.0, 6.0, 13.0, 0.04)


def test_a_read_error_is_named_even_without_a_known_length():
    text = Damage(stop_reason="reading stopped (timed out)").complaint(0.0, 6.0, None, 0.04)
    assert text == " ends at 6.0 s: reading stopped (timed out)"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Five seconds, index first, about the same number of bytes for each frame."""
    path = tmp_path_factory.mktemp("noisy") / "clip.mp4"
    return write_clip(
        path, range(125), pictures=list(noise(125)), muxer={"movflags": "+faststart"}, options={"g": "10"}
    )


def first(path):
    return next(read_frames(path))


def read_all(path, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frames = list(read_frames(path, **settings))
    return frames, [str(one.message) for one in caught if one.category is VideoWarning]


def not_there(folder):
    return folder / "missing.mp4"


def a_folder(folder):
    return folder


def empty(folder):
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def text(folder):
    (folder / "text.mp4").write_text("not a video\n" * 100)
    return folder / "text.mp4"


def prose(folder):
    (folder / "notes.txt").write_text("not a video\n" * 100)
    return folder / "notes.txt"


def sound(folder):
    return write_sound(folder / "sound.m4a")


def blank(folder):
    path = write_clip(folder / "blank.mp4", range(5), muxer={"movflags": "+faststart"})
    data = path.read_bytes()
    media = data.find(b"mdat") + 4
    path.write_bytes(data[:media] + bytes(len(data) - media))
    return path


def unknown_codec(folder):
    path = write_clip(folder / "odd.mp4", range(5))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    return path


def index_missing(folder):
    path = write_clip(folder / "cut.mp4", range(50), pictures=list(noise(50)))
    os.truncate(path, path.stat().st_size // 2)
    return path


def index_cut(folder):
    path = write_clip(folder / "cut.mp4", range(50), muxer={"movflags": "+faststart"})
    os.truncate(path, path.read_bytes().find(b"moov") + 40)
    return path


def unknown_protocol(folder):
    return "nothing://host/clip.mp4"


def unreachable(folder):
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    return f"http://me:secret@127.0.0.1:{port}/clip.mp4?token=abc"


@pytest.mark.parametrize("read", [first, probe])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_there, "missing.mp4 does not exist"),
        (a_folder, "is a folder"),
        (empty, "empty.mp4 is empty"),
        (text, "text.mp4 is not a video"),
        (prose, "notes.txt is of a kind that is not read"),
        (sound, "sound.m4a holds only sound"),
        (blank, "blank.mp4 has no frame that decodes"),
        (unknown_codec, "odd.mp4 has no frame that decodes"),
        (index_missing, "cut.mp4 has no complete index .* file is incomplete"),
        (index_cut, "cut.mp4 has no complete index .* file is incomplete"),
        (unknown_protocol, "is not allowed"),
        (unreachable, "127.0.0.1/clip.mp4 cannot be opened: connection refused"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_a_hint(tmp_path, make, message, read):
    with pytest.raises(VideoError, match=message) as caught:
        read(make(tmp_path))
    text = str(caught.value)
    assert caught.value.hint
    assert "\n" not in text
    assert not any(leak in text for leak in ("0x", "Errno", "secret", "token", str(tmp_path)))


def test_errors_reach_the_consumer_from_the_thread(tmp_path):
    with pytest.raises(VideoError, match="does not exist"):
        next(read_frames(tmp_path / "missing.mp4", ahead=2))


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("fps", [None, 5])
def test_a_clip_cut_off_is_read_as_far_as_it_goes(noisy, tmp_path, ahead, fps):
    path = tmp_path / "cut.mp4"
    path.write_bytes(noisy.read_bytes()[: noisy.stat().st_size // 2])
    frames, warned = read_all(path, ahead=ahead, fps=fps)
    assert len(warned) == 1
    assert warned[0].startswith("cut.mp4 ends at 2.")
    assert " of 5.0 s: " in warned[0]
    whole = [frame.pts_seconds for frame in read_frames(noisy, fps=fps)]
    assert [frame.pts_seconds for frame in frames] == whole[: len(frames)]
    assert 0.4 < len(frames) / len(whole) < 0.6


def test_damage_in_the_middle_is_skipped_and_counted(noisy, tmp_path):
    path = tmp_path / "bad.mp4"
    data = bytearray(noisy.read_bytes())
    data[len(data) * 2 // 5 : len(data) // 2] = bytes(len(data) // 2 - len(data) * 2 // 5)
    path.write_bytes(data)
    frames, warned = read_all(path)
    assert len(warned) == 1
    assert warned[0].startswith("bad.mp4: ")
    assert " damaged packets or frames" in warned[0]
    assert 12 <= int(warned[0].split()[1]) <= 40
    assert 80 < len(frames) <= 125
    assert frames[-1].pts_seconds == pytest.approx(124 / 25, abs=0.05)


def test_the_warning_comes_after_the_last_frame_on_the_consumers_thread(noisy, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(noisy.read_bytes()[: noisy.stat().st_size // 2])
    everything = len(read_all(path)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoWarning)
        stream = read_frames(path, ahead=200)
        for _ in range(everything):
            next(stream)
        with pytest.raises(VideoWarning) as caught:
            next(stream)
    functions = []
    trace: TracebackType | None = caught.tb
    while trace is not None:
        functions.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert functions[0].startswith("test_")
    assert functions[-1] == "_issue_warnings"


def test_stopping_early_is_no_damage(noisy, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(noisy.read_bytes()[: noisy.stat().st_size // 2])
    assert read_all(path)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoWarning)
        stream = read_frames(path)
        next(stream)
        stream.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(noisy):
    handler = functools.partial(Quiet, directory=str(noisy.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_url_reads_like_the_file(served, noisy):
    remote = [frame.pts_seconds for frame in read_frames(f"{served}/clip.mp4", fps=5)]
    assert remote == [frame.pts_seconds for frame in read_frames(noisy, fps=5)]
    assert probe(f"{served}/clip.mp4") == probe(noisy)


@pytest.mark.parametrize("suffix", [".ts", ".gif", ".mjpeg"])
def test_a_clip_of_known_size_is_no_live_source(served, noisy, suffix):
    how: dict[str, dict[str, Any]] = {
        ".gif": {"codec": "gif", "pix_fmt": "rgb8"},
        ".mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    }
    path = write_clip(noisy.parent / f"clip{suffix}", range(20), **how.get(suffix, {}))
    with contextlib.closing(open_video(f"{served}/clip{suffix}")) as found:
        assert not found.live
        assert len(list(found)) == len(list(read_frames(path))) == 20


def test_a_url_that_is_not_there(served):
    with pytest.raises(VideoError, match=r"nothing\.mp4 cannot be opened: .*404"):
        first(f"{served}/nothing.mp4")


def test_a_url_is_not_counted(served):
    with pytest.raises(VideoError, match="is not local"):
        count_frames(f"{served}/clip.mp4")
