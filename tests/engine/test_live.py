"""A session on a live source: what enters and when, what a gap leaves, and who may interrupt."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from statekv.cache.spec import Span
from statekv.config import Config
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import ConfigError, VideoError
from statekv.video.frame import Frame
from statekv.video.source import PushedSource
from tests.talk import QUESTION, assert_same_stream, shared_engine, some_frames
from tests.tiny import TWO_FAMILIES
from tests.video.fixtures.broadcast import TcpServer, encoded, paced
from tests.video.fixtures.clips import write_clip

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)
PATIENT: dict[str, Any] = {"fps": None, "budget": 20, "prefetch": 50, "max_lag_seconds": 60.0, "reconnect_seconds": 0.0}


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_a_live_step_enters_as_soon_as_its_frames_are_there(family: str) -> None:
    """The source sends on only when the step before has entered: whoever waits for a batch waits for ever."""
    engine = shared_engine(family)
    per_step = engine.model.frames_per_step
    entered = threading.Semaphore(12)  # FFmpeg looks ahead before it shows the first

    def waiting() -> Iterator[bytes]:
        for piece in paced(encoded(24)):
            if not entered.acquire(timeout=5):
                return
            yield piece

    def on_step(_: Progress) -> None:
        entered.release(per_step)

    with engine.open(TcpServer(waiting()).url, vision_batch=50, **PATIENT) as session:
        session.watch(on_step=on_step)
        assert session.frames == 24


@EVERY_FAMILY
def test_a_file_played_as_live_becomes_the_same_stream(family: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", range(20))
    settings = {**PATIENT, "fps": 10}
    engine = shared_engine(family)
    with (
        engine.open(clip, realtime=True, vision_batch=1, **settings) as live,
        engine.open(clip, vision_batch=1) as file,
    ):
        live.watch()
        assert live.live is not None
        assert live.live.dropped == 0
        assert file.live is None
        with engine.open(clip, vision_batch=1, fps=10, budget=20) as plain:
            plain.watch()
            assert_same_stream(live, plain)


def test_a_gap_is_noted_where_it_was_and_changes_no_token() -> None:
    engine = shared_engine("internvl")
    frames = some_frames(6)
    whole, broken = engine.open(budget=20), engine.open(budget=20)
    whole.push(frames)
    broken.push([*frames[:3], replace(frames[3], gap_seconds=0.75), *frames[4:]])
    gaps = [index for index, span in enumerate(broken.state.spans) if span.kind == "gap"]
    behind = broken.state.spans[gaps[0] + 1]
    assert [broken.state.spans[index] for index in gaps] == [Span("gap", behind.start, 0, 2.25, behind.position)]
    assert [span for span in broken.state.spans if span.kind != "gap"] == whole.state.spans
    assert broken.ask(QUESTION) == whole.ask(QUESTION)


def test_a_source_that_returns_is_told_in_the_progress() -> None:
    told: list[Progress] = []
    entered = threading.Semaphore(0)

    def returns() -> Iterator[bytes]:
        for _ in range(8):  # not before all frames of the first connection are in
            assert entered.acquire(timeout=15)
        yield from paced(encoded(8, first=10))

    def on_step(progress: Progress) -> None:
        told.append(progress)
        entered.release()

    server = TcpServer(paced(encoded(8)), returns(), away_seconds=0.2)
    settings = {**PATIENT, "reconnect_seconds": 60.0, "max_frames": 16}
    with shared_engine("internvl").open(server.url, **settings) as session:
        session.watch(on_step=on_step)
        assert [progress.live.gaps for progress in told if progress.live] == [0] * 8 + [1] * 8
        assert [span.kind for span in session.state.spans].count("gap") == 1
        pts = [progress.pts_seconds for progress in told]
        assert pts == sorted(pts)
        assert told[8].live is not None
        assert pts[8] - pts[7] == pytest.approx(told[8].live.gap_seconds)


def test_who_asks_need_not_wait_for_the_next_frame() -> None:
    silent = threading.Event()

    def falls_silent() -> Iterator[bytes]:
        pieces = encoded(12)
        yield from paced(pieces[:8])
        silent.wait(10)

    with shared_engine("internvl").open(TcpServer(falls_silent()).url, **PATIENT) as session:
        polls = 0

        def pause() -> bool:
            nonlocal polls
            polls += session.frames > 3
            return polls > 10

        session.watch(pause=pause)
        seen = session.frames
        assert 3 < seen <= 8
        assert session.ask(QUESTION)
        assert session.live is not None
        assert session.live.connected
        silent.set()
        session.watch()
        assert session.frames >= seen


def test_frames_that_come_during_an_answer_are_dropped_and_counted() -> None:
    everything = threading.Event()

    def two_parts() -> Iterator[bytes]:
        pieces = encoded(30)
        yield from paced(pieces[:6])
        yield from paced(pieces[6:], speed=3)
        everything.set()

    settings = {**PATIENT, "prefetch": 2}
    with shared_engine("internvl").open(TcpServer(two_parts()).url, **settings) as session:
        session.watch(pause=lambda: session.frames > 0)
        answer = session.stream(QUESTION)
        next(answer)
        assert everything.wait(10)
        while session.live is not None and session.live.connected:
            time.sleep(0.02)
        "".join(answer)
        session.watch()
        assert session.live is not None
        assert session.live.dropped > 10
        assert session.frames + session.live.dropped == 30


def test_a_session_that_is_closed_lets_go_of_its_source(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", range(250))
    before = threading.active_count()
    session = shared_engine("internvl").open(clip, realtime=True, **PATIENT)
    session.watch(pause=lambda: session.frames > 0)
    session.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("scheme", ["https://host/a.mp4", "rtsp://host/live", "udp://127.0.0.1:5"])
def test_schemes_may_be_narrowed(scheme: str) -> None:
    with pytest.raises(VideoError, match="not allowed"):
        shared_engine("internvl").open(scheme, schemes="file,http")


def test_uniform_sampling_of_a_live_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="length of this source is unknown"):
        shared_engine("internvl").open("udp://127.0.0.1:5", method="uniform")


@pytest.mark.parametrize(
    "wrong", [{"schemes": "file,data"}, {"schemes": ""}, {"max_lag_seconds": -1}, {"reconnect_seconds": "soon"}]
)
def test_settings_of_live_sources_are_checked(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).removesuffix("s")):
        Config.of(**wrong)


def test_pause_also_stops_a_file() -> None:
    session: Session = shared_engine("internvl").open(budget=20)
    session.source = iter(some_frames(9))
    session.watch(pause=lambda: session.frames >= 4)
    assert session.frames == 4
    session.watch()
    assert session.frames == 9


PATIENT_LIVE_RESTORED: dict[str, Any] = {
    "fps": None,
    "budget": 20,
    "prefetch": 50,
    "max_lag_seconds": 60.0,
    "reconnect_seconds": 0.0,
}


@pytest.fixture
def server() -> TcpServer:
    return TcpServer(paced(encoded(8)), paced(encoded(8, first=10)), paced(encoded(8, first=20)))


def gaps(session: Session) -> list[Any]:
    return [span for span in session.state.spans if span.kind == "gap"]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_it_goes_on_behind_a_gap(family: str, server: TcpServer, tmp_path: Path) -> None:
    engine = shared_engine(family)
    with engine.open(server.url, **PATIENT_LIVE_RESTORED) as session:
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
    with engine.open(server.url, **PATIENT_LIVE_RESTORED) as session:
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
    settings = {**PATIENT_LIVE_RESTORED, "fps": 10}
    with engine.open(clip, realtime=True, **settings) as session:
        session.watch(pause=lambda: session.frames >= 3)
        assert session.frames < 8
        session.save(tmp_path / "saved")
    with (
        engine.restore(tmp_path / "saved", clip) as restored,
        engine.open(clip, vision_batch=1, fps=10, budget=20) as plain,
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
    with engine.open(server.url, **PATIENT_LIVE_RESTORED) as session:
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
    with engine.open(server.url, **PATIENT_LIVE_RESTORED) as session:
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


def socket_of(frames: list[Frame]) -> PushedSource:
    """All of them there, and the end told."""
    source = PushedSource(depth=len(frames), max_lag_seconds=60)
    for frame in frames:
        source.put(frame)
    source.end()
    return source


@EVERY_FAMILY
def test_frames_of_a_socket_become_the_same_stream_as_pushed_ones(family: str) -> None:
    engine, frames = shared_engine(family), some_frames(8)
    with engine.open(socket_of(frames), budget=20) as session, engine.open(budget=20) as pushed:
        session.watch()
        pushed.push(frames)
        assert_same_stream(session, pushed)
        assert session.ask(QUESTION) == pushed.ask(QUESTION)


def test_frames_enter_while_another_thread_hands_them_over_and_questions_come_between() -> None:
    engine, frames, source = shared_engine("internvl"), some_frames(12), PushedSource(depth=12, max_lag_seconds=60)
    told: list[Progress] = []

    def talk() -> None:
        for frame in frames:
            source.put(frame)
            time.sleep(0.01)
        source.end()

    with engine.open(source, budget=20) as session, engine.open(budget=20) as pushed:
        speaker = threading.Thread(target=talk)
        speaker.start()
        session.watch(on_step=told.append, pause=lambda: session.frames >= 5)
        assert session.frames == 5
        assert session.ask(QUESTION)
        session.watch(on_step=told.append)
        speaker.join(5)
        pushed.push(frames)
        assert_same_stream(session, pushed)
        assert [progress.live is not None and progress.live.dropped for progress in told] == [0] * 12


def test_a_socket_that_is_too_fast_is_seen_at_its_newest() -> None:
    source = PushedSource(depth=2, max_lag_seconds=60)
    with shared_engine("internvl").open(source, budget=20) as session:
        for frame in some_frames(9):
            source.put(frame)
        source.end()
        session.watch()
        assert session.live is not None
        assert (session.frames, session.live.dropped, session.live.connected) == (2, 7, False)
        assert [span.pts_seconds for span in session.state.spans if span.kind == "step"] == [7.0, 8.0]


def test_who_closes_the_session_tells_the_socket() -> None:
    source = PushedSource()
    with shared_engine("internvl").open(source, budget=20):
        source.put(some_frames(1)[0])
    with pytest.raises(ConfigError, match="after the end"):
        source.put(some_frames(1)[0])


def test_several_sockets_are_watched_together() -> None:
    engine = shared_engine("internvl")
    films = [some_frames(count, seed) for seed, count in enumerate((6, 9, 3))]
    sessions = [engine.open(socket_of(film), budget=20) for film in films]
    slow = PushedSource(depth=9, max_lag_seconds=60)
    late = engine.open(slow, budget=20)

    def on_step(session: Session, progress: Progress) -> None:
        if session is sessions[1] and progress.step == 9:
            for frame in films[0]:
                slow.put(frame)
            slow.end()

    assert engine.watch_all([*sessions, late], on_step) == {}
    assert [session.frames for session in (*sessions, late)] == [6, 9, 3, 6]


def test_a_fork_has_no_part_in_the_socket() -> None:
    engine, frames, source = shared_engine("internvl"), some_frames(6), PushedSource(max_lag_seconds=60)
    with engine.open(source, budget=20) as session:
        for frame in frames[:3]:
            source.put(frame)
        session.watch(pause=lambda: session.frames >= 3)
        with session.fork() as fork:
            with pytest.raises(ConfigError, match="has no source to watch"):
                fork.watch()
            fork.push(frames[3:])
            for frame in frames[3:]:
                source.put(frame)
            source.end()
            session.watch()
            assert_same_stream(session, fork)


def test_a_save_goes_on_with_frames_that_are_handed_over_anew(tmp_path: Path) -> None:
    engine, frames = shared_engine("internvl"), some_frames(8)
    with engine.open(socket_of(frames[:5]), budget=20) as session:
        session.watch()
        session.save(tmp_path)
    with engine.open(budget=20) as whole:
        whole.push(frames)
        with engine.restore(tmp_path) as pushed:
            assert pushed.source is None
            pushed.push(frames[5:])
            assert_same_stream(pushed, whole)
        with engine.restore(tmp_path, socket_of(frames[5:])) as watched:
            watched.watch()
            assert_same_stream(watched, whole)


def test_any_frames_can_be_opened_but_what_gives_none_cannot(tmp_path: Path) -> None:
    engine, clip = shared_engine("internvl"), write_clip(tmp_path / "clip.mp4", range(9))
    with engine.open(iter(some_frames(3)), budget=20) as session, engine.open(some_frames(3), budget=20) as other:
        session.watch()
        other.watch()
        assert session.live is None
        assert_same_stream(session, other)
        session.save(tmp_path / "frames")
    with engine.restore(tmp_path / "frames") as restored, engine.open(clip, budget=20) as file:
        assert restored.source is None
        file.save(tmp_path / "file")
    with pytest.raises(ConfigError, match="which pushed frames cannot go on with"):
        engine.restore(tmp_path / "file", PushedSource())
    with pytest.raises(ConfigError, match="cannot be drawn from a whole number"):
        engine.open(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", [{"realtime": True}, {"stream": 0}, {"until_seconds": 3.0}])
def test_ways_to_open_mean_nothing_for_what_is_open(way: dict[str, Any]) -> None:
    for source in (None, PushedSource()):
        with pytest.raises(ConfigError, match=f"{next(iter(way))} is .*, but says how to open a path or a URL"):
            shared_engine("internvl").open(source, **way)


def test_uniform_sampling_of_a_socket_is_refused() -> None:
    with pytest.raises(ConfigError, match="length of this source is unknown"):
        shared_engine("internvl").open(PushedSource(), method="uniform")
