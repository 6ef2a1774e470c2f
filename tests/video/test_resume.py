"""Reading goes on where it stopped, in the same file, and gives no secret away."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from statekv.errors import VideoError
from statekv.video.frame import Frame
from statekv.video.resume import Footage, Reading
from tests.video.clips import level, write_clip

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
    whole = list(Footage(clip, reading))
    assert len(whole) > 3
    footage = Footage(clip, reading)
    first = [next(footage) for _ in range(drawn)]
    facts = json.loads(json.dumps(footage.facts()))
    for rest in (footage.again(), Footage.resumed(facts), footage):
        assert same([*first, *rest], whole)
    assert footage.drawn == len(whole)


def test_a_video_ends_where_it_was_cut(clip: Path) -> None:
    footage = Footage(clip, Reading(until_seconds=0.5))
    next(footage)
    rest = list(Footage.resumed(footage.facts()))
    assert rest[-1].pts_seconds < 0.5
    assert len(rest) == len(list(footage))


def test_an_end_is_remembered(clip: Path) -> None:
    footage = Footage(clip, EVERY)
    assert len(list(footage)) == 30
    clip.unlink()
    assert list(Footage.resumed(footage.facts())) == list(footage) == []


def test_a_closed_one_can_be_read_on(clip: Path) -> None:
    footage = Footage(clip, EVERY)
    whole = list(footage.again())
    first = [next(footage), next(footage)]
    footage.close()
    footage.close()
    assert same([*first, *footage], whole)


def test_a_relative_name_is_found_from_anywhere(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(clip.parent)
        facts = Footage(clip.name, EVERY).facts()
    assert len(list(Footage.resumed(facts))) == 30


@pytest.mark.parametrize("change", ["grown", "other pixels"])
def test_a_file_that_changed_is_refused(clip: Path, change: str) -> None:
    footage = Footage(clip, EVERY)
    next(footage)
    if change == "grown":
        with clip.open("ab") as file:
            file.write(b"x")
    else:
        data = bytearray(clip.read_bytes())
        data[len(data) // 2] ^= 1
        clip.write_bytes(data)
    with pytest.raises(VideoError, match=r"clip\.mp4 is not the file that was watched"):
        next(Footage.resumed(footage.facts()))
    with pytest.raises(VideoError, match="is not the file"):
        Footage.resumed(footage.facts(), clip)


def test_a_file_elsewhere_is_taken_by_its_content(clip: Path, tmp_path: Path) -> None:
    footage = Footage(clip, EVERY)
    next(footage)
    moved = clip.rename(tmp_path / "moved.mp4")
    for _ in range(2):
        resumed = Footage.resumed(footage.facts())
        with pytest.raises(VideoError, match=r"clip\.mp4 is not there any more"):
            next(resumed)
    assert len(list(Footage.resumed(footage.facts(), moved))) == 29


def test_passwords_and_tokens_are_not_written_down() -> None:
    address = "rtsp://me:secret@camera:554/live?token=abc"
    facts = Footage(address, EVERY, drawn=3).facts()
    told = json.dumps(facts)
    assert not any(word in told for word in ("me:", "secret", "abc"))
    with pytest.raises(VideoError, match="held a password or a token") as caught:
        next(Footage.resumed(facts))
    assert "secret" not in str(caught.value)
    assert Footage.resumed(facts, address).source == address


def test_a_plain_address_is_written_down() -> None:
    address = "http://somewhere/film.mp4"
    assert Footage.resumed(Footage(address, EVERY).facts()).source == address


def test_a_pipe_is_not_read_for_its_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert Footage(tmp_path / "pipe", EVERY).digest is None


def test_frames_are_as_written(clip: Path) -> None:
    greys = [float(frame.data.float().mean()) for frame in Footage(clip, EVERY)]
    assert [abs(grey - level(index)) < 4 for index, grey in enumerate(greys)] == [True] * 30
