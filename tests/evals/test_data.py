"""Records from files: every format, every fault told, none skipped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from statekv.errors import ConfigError
from statekv.evals.data import DataSet, Record, VideoFiles, distinct, fault
from statekv.evals.task import Broken, EvalVideo
from tests.evals.data_sets import place, write_lines
from tests.evals.lmms.stock_lmms import FOLDER, needs_lmms

DATA = DataSet("someone/something", ("part/test-*.parquet", "test*.jsonl", "test*.json"), {"id": int, "text": str})
GOOD: list[dict[str, Any]] = [{"id": 3, "text": "a"}, {"id": 4, "text": "b", "more": None}]


def read(folder: Path) -> list[Record | Broken]:
    return list(DATA.read(folder))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str, **_: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_lines_and_lists_are_read_alike(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", GOOD)
    lines = read(tmp_path)
    assert lines == [Record("test.jsonl line 1", 0, GOOD[0]), Record("test.jsonl line 2", 1, GOOD[1])]
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.json").write_text(json.dumps(GOOD))
    assert [record.fields for record in read(tmp_path) if isinstance(record, Record)] == GOOD


def test_files_of_the_first_pattern_are_read_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "test-2.jsonl", [{"id": 9, "text": "c"}])
    write_lines(tmp_path / "test-1.jsonl", GOOD)
    (tmp_path / "test.json").write_text("not even JSON, and not looked at")
    records = [record for record in read(tmp_path) if isinstance(record, Record)]
    assert [(record.number, record.fields["id"]) for record in records] == [(0, 3), (1, 4), (2, 9)]


def test_records_of_no_use_are_told(tmp_path: Path) -> None:
    faulty: list[dict | str] = [
        GOOD[0],
        '{"id": 4, "te',
        "",
        "7",
        {"id": 5},
        {"id": True, "text": "b"},
        {"id": 6, "text": ""},
    ]
    write_lines(tmp_path / "test.jsonl", faulty)
    first, *rest = read(tmp_path)
    assert isinstance(first, Record)
    told = {broken.id: broken.reason for broken in rest if isinstance(broken, Broken)}
    assert len(told) == len(rest) == 5
    assert told.pop("test.jsonl line 2").startswith("is not JSON: Unterminated string")
    assert told == {
        "test.jsonl line 4": "is 7, but must be an object",
        "test.jsonl line 5": "lacks the field 'text'; it has id",
        "test.jsonl line 6": "has id True, but it must be a whole number",
        "test.jsonl line 7": "has text '', but it must be text",
    }


def test_kinds_of_fields() -> None:
    needed = {"seconds": float, "options": list}
    assert fault({"seconds": 3, "options": ["a"]}, needed) == fault({"seconds": 3.5, "options": ["a"]}, needed) == ""
    assert fault({"seconds": "3", "options": ["a"]}, needed) == "has seconds '3', but it must be a number"
    for options in ([], ["a", 3], "abc", None):
        assert fault({"seconds": 3, "options": options}, needed).endswith("but it must be a list of texts")


def test_a_second_record_with_an_id_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [*GOOD, GOOD[0] | {"text": "again"}])
    *kept, told = distinct(DATA.read(tmp_path), "id")
    assert [record.fields for record in kept if isinstance(record, Record)] == GOOD
    assert told == Broken("test.jsonl line 3", "has the id 3 of test.jsonl line 1, which is used instead")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"id": 3, ', r"test\.json is not JSON: .+ \(mend it or download it again\)"),
        ('{"id": 3, "text": "a"}', r"test\.json holds dict, but must hold a list of records"),
        ("[]", r"test\.json has no records"),
        ('[{"id": 3}]', r"no record in .*test\.json can be used; the first lacks the field 'text'.*evals\.md"),
    ],
)
def test_files_of_no_use_are_errors(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read(tmp_path)


def test_without_records_the_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def hand_over(repository: str, **wanted: Any) -> str:
        asked.append((repository, wanted))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hand_over)
    write_lines(tmp_path / "cache" / "test.jsonl", GOOD)
    assert len(read(tmp_path / "videos")) == 2
    assert asked == [("someone/something", {"repo_type": "dataset", "allow_patterns": list(DATA.patterns)})]


def test_without_a_hub_the_way_to_the_records_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    patterns = "part/test-*.parquet, test*.jsonl, test*.json"
    reason = f"{tmp_path} holds no records ({patterns}), and someone/something cannot be read: no network"
    assert caught.value.message == reason
    assert caught.value.hint == f"hf download someone/something --repo-type dataset --local-dir {tmp_path}"


def test_without_pyarrow_its_installation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "test-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"test-0\.parquet is a Parquet file.*pip install 'statekv\[eval\]'"):
        read(tmp_path)


@needs_lmms
def test_parquet_is_read_like_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pyarrow that lmms-eval brings, where there is no other."""
    if importlib.util.find_spec("pyarrow") is None:
        monkeypatch.syspath_prepend(str(FOLDER))
    parquet, pyarrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    (tmp_path / "part").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "part" / "test-0.parquet")
    assert [record.fields["text"] for record in read(tmp_path) if isinstance(record, Record)] == ["a", "b"]
    (tmp_path / "part" / "test-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ConfigError, match=r"test-0\.parquet cannot be read: .+ \(download it again\)"):
        read(tmp_path)


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
