"""A session on a live source that is saved, and goes on in another process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from statekv.engine.session import Session
from statekv.errors import ConfigError, VideoError
from tests.talk import QUESTION, assert_same_stream, shared_engine, some_frames
from tests.video.broadcast import TcpServer, encoded, paced
from tests.video.clips import write_clip

PATIENT: dict[str, Any] = {"fps": None, "budget": 20, "prefetch": 50, "max_lag_seconds": 60.0, "reconnect_seconds": 0.0}


@pytest.fixture
def server() -> TcpServer:
    return TcpServer(paced(encoded(8)), paced(encoded(8, first=10)), paced(encoded(8, first=20)))


def gaps(session: Session) -> list[Any]:
    return [span for span in session.state.spans if span.kind == "gap"]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_it_goes_on_behind_a_gap(family: str, server: TcpServer, tmp_path: Path) -> None:
    engine = shared_engine(family)
    with engine.open(server.url, **PATIENT) as session:
        session.watch()
        before = session.frames
        last = session.state.spans[-1].pts_seconds or 0.0
        session.save(tmp_path)
    for times in (1, 2):  # saved and restored again, it still knows
        with engine.restore(tmp_path, server.url) as session:
            session.watch()
            assert session.frames == before + 8 * times
            assert session.live is not None
            assert session.live.gaps == times == len(gaps(session))
            assert session.ask(QUESTION)
            session.save(tmp_path)
        steps = [span.pts_seconds or 0.0 for span in session.state.spans if span.kind == "step"]
        assert steps == sorted(steps)
    assert gaps(session)[0].pts_seconds <= last + 0.2  # of a step of two frames, that of the first is noted


def test_without_the_source_it_can_be_asked_and_saved_and_keeps_its_place(server: TcpServer, tmp_path: Path) -> None:
    engine = shared_engine("internvl")
    with engine.open(server.url, **PATIENT) as session:
        session.watch()
        session.save(tmp_path / "one")
        expected = session.ask(QUESTION)
    with engine.restore(tmp_path / "one") as session:
        assert session.live is None
        assert session.ask(QUESTION) == expected
        with pytest.raises(VideoError, match="was live, and has not been opened again"):
            session.watch()
        session.save(tmp_path / "two")
    with engine.restore(tmp_path / "two", server.url) as session:
        session.watch()
        assert session.frames == 16
        assert len(gaps(session)) == 1


def test_a_file_played_as_live_is_seen_once_and_whole(tmp_path: Path) -> None:
    engine, clip = shared_engine("internvl"), write_clip(tmp_path / "clip.mp4", range(20))
    settings = {**PATIENT, "fps": 10}
    with engine.open(clip, realtime=True, **settings) as session:
        session.watch(pause=lambda: session.frames >= 3)
        assert session.frames < 8
        session.save(tmp_path / "saved")
    with (
        engine.restore(tmp_path / "saved", clip) as restored,
        engine.open(clip, vision_batch=1, **settings) as plain,
    ):
        for each in (restored, plain):
            each.watch()
        assert_same_stream(restored, plain)


def test_a_source_cut_off_inside_a_packet_loses_nothing_that_was_seen(tmp_path: Path) -> None:
    """Asked and saved afterwards, and gone on with when it is there again."""

    def cut() -> Iterator[bytes]:
        pieces = encoded(10)
        yield from paced([*pieces[:8], pieces[8][: len(pieces[8]) // 2]])

    engine, server = shared_engine("internvl"), TcpServer(cut(), paced(encoded(8, first=15)))
    with engine.open(server.url, **PATIENT) as session:
        session.watch()
        assert 7 <= session.frames <= 9
        answer, seen = session.ask(QUESTION), session.frames
        assert session.ask(QUESTION) == answer
        session.save(tmp_path)
    with engine.restore(tmp_path, server.url) as restored:
        assert restored.ask(QUESTION) == answer
        restored.watch()
        assert restored.frames > seen
        assert len(gaps(restored)) == 1
        assert restored.ask(QUESTION)


def test_settings_of_the_source_may_be_given_anew(server: TcpServer, tmp_path: Path) -> None:
    engine = shared_engine("internvl")
    with engine.open(server.url, **PATIENT) as session:
        session.watch()
        session.save(tmp_path)
    with pytest.raises(VideoError, match="not allowed"):
        engine.restore(tmp_path, server.url, schemes="file")
    with engine.restore(tmp_path, server.url, max_lag_seconds=1.0, reconnect_seconds=0.0) as restored:
        assert restored.state.config.max_lag_seconds == 1.0


def test_a_source_of_another_kind_is_refused(tmp_path: Path) -> None:
    engine, clip = shared_engine("internvl"), write_clip(tmp_path / "clip.mp4", range(9))
    pushed = engine.open(budget=20)
    pushed.push(some_frames(3))
    pushed.save(tmp_path / "pushed")
    with pytest.raises(ConfigError, match="were pushed, they came from no source"):
        engine.restore(tmp_path / "pushed", clip)
    with engine.open(clip, budget=20) as session:
        session.save(tmp_path / "file")
    with pytest.raises(ConfigError, match="was watched before, udp://host is live"):
        engine.restore(tmp_path / "file", "udp://host:5")
