"""Video files, wherever they were unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from statekv.errors import ConfigError
from statekv.evals.task import Broken, EvalVideo
from statekv.evals.videos import VideoFiles
from tests.evals.data_sets import place


def test_files_are_found_at_any_depth(tmp_path: Path) -> None:
    place(tmp_path, "one.mp4", "part/deep/two.MKV", "part/three.4.webm", "part/three.txt", "Ego4D/clips/five.mp4")
    files = VideoFiles(tmp_path)
    assert files.find("one") == files.find("one.mp4") == [tmp_path / "one.mp4"]
    assert files.find("two") == files.find("two.mkv") == files.find("deep/two") == [tmp_path / "part/deep/two.MKV"]
    assert files.find("three.4") == [tmp_path / "part/three.4.webm"]
    assert files.find("Ego4D/clips/five.mp4") == [tmp_path / "Ego4D/clips/five.mp4"]
    assert files.find("two.mp4") == files.find("other/two") == files.find("three") == files.find("absent") == []


def test_a_video_is_named_and_cut(tmp_path: Path) -> None:
    place(tmp_path, "part/one.mp4")
    files = VideoFiles(tmp_path)
    assert files.video("one.mp4", ()) == EvalVideo("one.mp4", tmp_path / "part/one.mp4", ())
    assert files.video("one", (), id="x", until_seconds=3.0) == EvalVideo("x", tmp_path / "part/one.mp4", (), 3.0)


def test_a_missing_file_is_left_to_the_one_who_watches(tmp_path: Path) -> None:
    place(tmp_path, "one.mp4")
    files = VideoFiles(tmp_path)
    assert files.video("two", ()) == EvalVideo("two", tmp_path / "two.mp4", ())
    assert files.video("deep/two.mkv", ()) == EvalVideo("deep/two.mkv", tmp_path / "deep/two.mkv", ())


def test_of_two_files_with_a_name_none_is_guessed(tmp_path: Path) -> None:
    place(tmp_path, "a/one.mp4", "b/one.mp4")
    told = VideoFiles(tmp_path).video("one.mp4", ())
    assert told == Broken("one.mp4", "2 files have the name one.mp4, such as a/one.mp4 and b/one.mp4")


def test_a_folder_without_videos_is_an_error(tmp_path: Path) -> None:
    place(tmp_path, "one.zip")
    with pytest.raises(ConfigError, match=r"no videos lie under .*unpack"):
        VideoFiles(tmp_path)
