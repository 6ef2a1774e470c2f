"""Reading goes on where it stopped, in the same file, and gives no secret away."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from statekv.errors import ConfigError, VideoError
from statekv.video.file import read_frames
from statekv.video.frame import Frame
from statekv.video.live import LiveSettings, LiveSource, ResumePoint, Unopened
from statekv.video.resume import Reading, ResumableVideo, open_video
from tests.video.fixtures.broadcast import FPS, TcpServer, encoded, paced
from tests.video.fixtures.clips import closest_index, level, write_clip

EVERY = Reading(fps=None)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_clip(tmp_path / "clip.mp4", range(30))
    return tmp_path / "clip.mp4"


def same(found: list[Frame], expected: list[Frame]) -> bool:
    times = [[(frame.pts_seconds, frame.duration_seconds) for frame in frames] for frames in (found, expected)]
    pixels = (torch.equal(a.data, b.data) for a, b in zip(found, expected, strict=True))
    return times[0] == times[1] and all(pixels)


@pytest.mark.parametrize("reading", [EVERY, Reading(fps=5), Reading(fps=5, max_frames=4, ahead=2)])
@pytest.mark.parametrize("drawn", [0, 1, 3])
def test_what_follows_is_what_would_have_followed(clip: Path, reading: Reading, drawn: int) -> None:
    whole = list(ResumableVideo(clip, reading))
    assert len(whole) > 3
    footage = ResumableVideo(clip, reading)
    first = [next(footage) for _ in range(drawn)]
    facts = json.loads(json.dumps(footage.facts()))
    for rest in (footage.fork(), ResumableVideo.resumed(facts), footage):
        assert same([*first, *rest], whole)
    assert footage.drawn == len(whole)


def test_a_video_ends_where_it_was_cut(clip: Path) -> None:
    footage = ResumableVideo(clip, Reading(until_seconds=0.5))
    next(footage)
    rest = list(ResumableVideo.resumed(footage.facts()))
    assert rest[-1].pts_seconds < 0.5
    assert len(rest) == len(list(footage))


def test_an_end_is_remembered(clip: Path) -> None:
    footage = ResumableVideo(clip, EVERY)
    assert len(list(footage)) == 30
    clip.unlink()
    assert list(ResumableVideo.resumed(footage.facts())) == list(footage) == []


def test_a_closed_one_can_be_read_on(clip: Path) -> None:
    footage = ResumableVideo(clip, EVERY)
    whole = list(footage.fork())
    first = [next(footage), next(footage)]
    footage.close()
    footage.close()
    assert same([*first, *footage], whole)


def test_a_relative_name_is_found_from_anywhere(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(clip.parent)
        facts = ResumableVideo(clip.name, EVERY).facts()
    assert len(list(ResumableVideo.resumed(facts))) == 30


@pytest.mark.parametrize("change", ["grown", "other pixels"])
def test_a_file_that_changed_is_refused(clip: Path, change: str) -> None:
    footage = ResumableVideo(clip, EVERY)
    next(footage)
    if change == "grown":
        with clip.open("ab") as file:
            file.write(b"x")
    else:
        data = bytearray(clip.read_bytes())
        data[len(data) // 2] ^= 1
        clip.write_bytes(data)
    with pytest.raises(VideoError, match=r"clip\.mp4 is not the file that was watched"):
        next(ResumableVideo.resumed(footage.facts()))
    with pytest.raises(VideoError, match="is not the file"):
        ResumableVideo.resumed(footage.facts(), clip)


def test_a_file_elsewhere_is_taken_by_its_content(clip: Path, tmp_path: Path) -> None:
    footage = ResumableVideo(clip, EVERY)
    next(footage)
    moved = clip.rename(tmp_path / "moved.mp4")
    for _ in range(2):
        resumed = ResumableVideo.resumed(footage.facts())
        with pytest.raises(VideoError, match=r"clip\.mp4 is not there any more"):
            next(resumed)
    assert len(list(ResumableVideo.resumed(footage.facts(), moved))) == 29


def test_passwords_and_tokens_are_not_written_down() -> None:
    address = "rtsp://me:secret@camera:554/live?token=abc"
    facts = ResumableVideo(address, EVERY, drawn=3).facts()
    told = json.dumps(facts)
    assert not any(word in told for word in ("me:", "secret", "abc"))
    with pytest.raises(VideoError, match="held a password or a token") as caught:
        next(ResumableVideo.resumed(facts))
    assert "secret" not in str(caught.value)
    assert ResumableVideo.resumed(facts, address).source == address


def test_a_plain_address_is_written_down() -> None:
    address = "http://somewhere/film.mp4"
    assert ResumableVideo.resumed(ResumableVideo(address, EVERY).facts()).source == address


def test_a_pipe_is_not_read_for_its_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert ResumableVideo(tmp_path / "pipe", EVERY).digest is None


def test_frames_are_as_written(clip: Path) -> None:
    greys = [float(frame.data.float().mean()) for frame in ResumableVideo(clip, EVERY)]
    assert [abs(grey - level(index)) < 4 for index, grey in enumerate(greys)] == [True] * 30


pytestmark = pytest.mark.filterwarnings("error::statekv.errors.VideoWarning")
ONCE = LiveSettings(depth=50, max_lag_seconds=60, reconnect_seconds=0, timeouts_seconds=(5, 2))
HOUR = 3600.0


def seen(source: str | Path, count: int, settings: LiveSettings = ONCE, left: ResumePoint | None = None) -> list[Frame]:
    with contextlib.closing(LiveSource(source, settings, left=left)) as live:
        return list(islice(live, count))


def left_after(source: str | Path, count: int, settings: LiveSettings = ONCE) -> ResumePoint:
    """Where it stands after so many frames, as it comes back from a file."""
    with contextlib.closing(LiveSource(source, settings)) as live:
        assert len(list(islice(live, count))) == count
        return ResumePoint(**json.loads(json.dumps(live.facts()))["left"])


def times(frames: list[Frame]) -> list[float]:
    return [frame.pts_seconds for frame in frames]


def test_times_go_on_by_the_clock_on_the_wall_and_what_is_between_is_a_gap() -> None:
    server = TcpServer(paced(encoded(8)), paced(encoded(6, first=20, start_seconds=500)))
    left = left_after(server.url, 8)
    assert left.seconds is not None
    assert left.seconds == pytest.approx(7 / FPS, abs=0.05)
    assert left.began_at is not None
    # As if it had begun an hour earlier: an hour has passed since.
    frames = seen(server.url, 6, left=replace(left, began_at=left.began_at - HOUR))
    assert HOUR < frames[0].pts_seconds < HOUR + 60
    assert frames[0].gap_seconds == pytest.approx(frames[0].pts_seconds - left.seconds)
    assert times(frames) == pytest.approx([frames[0].pts_seconds + index / FPS for index in range(6)], abs=0.05)
    assert [frame.gap_seconds for frame in frames[1:]] == [0.0] * 5


def test_a_clock_that_was_set_back_does_not_turn_time_back() -> None:
    server = TcpServer(paced(encoded(4)), paced(encoded(6, start_seconds=500)))
    left = left_after(server.url, 4)
    assert left.began_at is not None
    assert left.seconds is not None
    frames = seen(server.url, 6, left=replace(left, began_at=left.began_at + HOUR))
    assert left.seconds <= frames[0].pts_seconds < left.seconds + 60
    assert times(frames) == pytest.approx([frames[0].pts_seconds + index / FPS for index in range(6)], abs=0.05)


def test_counts_go_on() -> None:
    server = TcpServer(paced(encoded(4)), paced(encoded(4)))
    left = replace(left_after(server.url, 4), dropped=5, gaps=2, gap_seconds=10.0)
    with contextlib.closing(LiveSource(server.url, replace(ONCE, max_frames=6), left=left)) as live:
        frames = list(live)
        assert len(frames) == 2  # of six in all
        assert (live.status.dropped, live.status.gaps) == (5, 3)
        assert live.status.gap_seconds == pytest.approx(10.0 + frames[0].gap_seconds)


@pytest.mark.parametrize("settings", [{"fps": 10.0}, {"max_frames": 6, "duration_seconds": 1.0}])
def test_a_file_played_as_live_goes_on_where_it_was(settings: dict[str, float], tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", range(25))
    how = LiveSettings(depth=50, max_lag_seconds=60, **settings)  # type: ignore[arg-type]
    plain = list(read_frames(clip, fps=how.fps, max_frames=how.max_frames))
    assert len(plain) > 5
    frames = seen(clip, 99, how, left_after(clip, 4, how))
    assert times(frames) == times(plain[4:])
    assert all(torch.equal(frame.data, other.data) for frame, other in zip(frames, plain[4:], strict=True))
    assert [closest_index(frame.data, 25) for frame in frames][-1] > 20
    assert not any(frame.gap_seconds for frame in frames)


def test_whatever_has_pictures_is_opened(tmp_path: Path) -> None:
    clip, server = write_clip(tmp_path / "clip.mp4", range(25)), TcpServer(paced(encoded(6)))
    how = replace(ONCE, fps=10, until_seconds=0.6)
    plain = list(read_frames(clip, fps=10, until_seconds=0.6))
    for realtime in (False, True):
        with contextlib.closing(open_video(clip, how, realtime=realtime)) as source:
            assert (source.live, source.status is not None) == (realtime, realtime)
            assert same(list(source), plain)
    with contextlib.closing(open_video(server.url, ONCE)) as source:
        assert source.live
        assert len(list(source)) == 6
    assert len(list(open_video(clip))) == 25
    with pytest.raises(VideoError, match="does not exist"):
        open_video(tmp_path / "missing.mp4")


def test_a_source_tells_a_debugger_where_it_is(clip: Path) -> None:
    footage = ResumableVideo(clip, EVERY)
    next(footage)
    assert repr(footage) == "ResumableVideo('clip.mp4', drawn=1, ended=False)"
    with contextlib.closing(LiveSource(clip, ONCE)) as live:
        next(live)
        assert repr(live).startswith("LiveSource('clip.mp4', pts_seconds=0.0, LiveStatus(connected=True")


def test_only_the_file_that_was_played_can_follow_it(tmp_path: Path) -> None:
    clip, other = (write_clip(tmp_path / name, range(count)) for name, count in (("clip.mp4", 9), ("other.mp4", 12)))
    left = left_after(clip, 2)
    with pytest.raises(VideoError, match=r"other\.mp4 is not the file that was watched before"):
        LiveSource(other, ONCE, left=left)
    with pytest.raises(ConfigError, match=r"the file clip\.mp4 was watched before, udp://host"):
        LiveSource("udp://host:5", ONCE, left=left)
    with pytest.raises(ConfigError, match=r"udp://host was watched before, clip\.mp4 is a file"):
        LiveSource(clip, ONCE, left=ResumePoint("udp://host"))


def test_what_is_noted_holds_no_password() -> None:
    server = TcpServer(paced(encoded(4)))
    address = server.url.replace("tcp://", "tcp://user:secret@") + "?token=secret"
    with contextlib.closing(LiveSource(address, ONCE)) as live:
        next(live)
        assert "secret" not in json.dumps(live.facts())


def test_a_source_that_nobody_opened_again_keeps_its_place_and_says_so() -> None:
    left = ResumePoint("rtsp://camera/stream", seconds=9.0, began_at=5.0, gaps=1)
    source = Unopened(left)
    assert ResumePoint(**source.facts()["left"]) == left
    with pytest.raises(VideoError, match="rtsp://camera/stream was live, and has not been opened again"):
        next(source)
