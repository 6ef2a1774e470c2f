"""A live source that another process goes on with: its times stay true, and what was missed is a gap."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from statekv.errors import ConfigError, VideoError
from statekv.video.frame import Frame
from statekv.video.left import Left
from statekv.video.live import LiveSettings, LiveSource, Unopened
from statekv.video.reader import read_frames

from .broadcast import FPS, TcpServer, encoded, paced
from .clips import closest_index, write_clip

pytestmark = pytest.mark.filterwarnings("error::statekv.errors.VideoWarning")
ONCE = LiveSettings(depth=50, max_lag_seconds=60, reconnect_seconds=0, timeouts_seconds=(5, 2))
HOUR = 3600.0


def seen(source: str | Path, count: int, settings: LiveSettings = ONCE, left: Left | None = None) -> list[Frame]:
    with contextlib.closing(LiveSource(source, settings, left=left)) as live:
        return list(islice(live, count))


def left_after(source: str | Path, count: int, settings: LiveSettings = ONCE) -> Left:
    """Where it stands after so many frames, as it comes back from a file."""
    with contextlib.closing(LiveSource(source, settings)) as live:
        assert len(list(islice(live, count))) == count
        return Left(**json.loads(json.dumps(live.facts()))["left"])


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


def test_only_the_file_that_was_played_can_follow_it(tmp_path: Path) -> None:
    clip, other = (write_clip(tmp_path / name, range(count)) for name, count in (("clip.mp4", 9), ("other.mp4", 12)))
    left = left_after(clip, 2)
    with pytest.raises(VideoError, match=r"other\.mp4 is not the file that was watched before"):
        LiveSource(other, ONCE, left=left)
    with pytest.raises(ConfigError, match=r"the file clip\.mp4 was watched before, udp://host"):
        LiveSource("udp://host:5", ONCE, left=left)
    with pytest.raises(ConfigError, match=r"udp://host was watched before, clip\.mp4 is a file"):
        LiveSource(clip, ONCE, left=Left("udp://host"))


def test_what_is_noted_holds_no_password() -> None:
    server = TcpServer(paced(encoded(4)))
    address = server.url.replace("tcp://", "tcp://user:secret@") + "?token=secret"
    with contextlib.closing(LiveSource(address, ONCE)) as live:
        next(live)
        assert "secret" not in json.dumps(live.facts())


def test_a_source_that_nobody_opened_again_keeps_its_place_and_says_so() -> None:
    left = Left("rtsp://camera/stream", seconds=9.0, began_at=5.0, gaps=1)
    source = Unopened(left)
    assert Left(**source.facts()["left"]) == left
    with pytest.raises(VideoError, match="rtsp://camera/stream was live, and has not been opened again"):
        next(source)
