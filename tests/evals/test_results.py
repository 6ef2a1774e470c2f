"""Result files: what is written can be read, what was cut off is done again, what is not ours is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from statekv.errors import ConfigError
from statekv.evals import results
from statekv.evals.results import ResultFile, Shard, read, versions
from tests.evals.small import header, lines

FAILED = {"type": "failed", "video": "lost", "reason": "is not there"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two videos, one that failed between them."""
    path = tmp_path / "deep" / "full.jsonl"
    file = ResultFile(path, header())
    file.append(lines("a", [True, False]))
    file.append([FAILED])
    file.append(lines("b", [True]))
    return path


def test_what_is_written_can_be_read(path: Path) -> None:
    found = read(path)
    assert found.header == header()
    assert [row["id"] for row in found.questions] == ["a/0", "a/1", "b/0"]
    assert list(found.videos) == ["a", "b"]
    assert found.failed == {"lost": "is not there"}
    assert found.length == path.stat().st_size


def test_going_on(path: Path) -> None:
    file = ResultFile(path, header())
    assert file.done == {"a", "b"}
    assert file.failed == {"lost": "is not there"}
    file.append(lines("lost", [True]))
    found = read(path)
    assert list(found.videos) == ["a", "b", "lost"]
    assert not found.failed


def test_wherever_it_was_cut_off_whole_videos_stay(path: Path) -> None:
    written = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(written) if byte == ord("\n")]
    behind = {ends[0]: set(), ends[3]: {"a"}, ends[6]: {"a", "b"}}
    for length in sorted({*range(0, len(written), 23), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(written[:length])
        file = ResultFile(path, header())
        assert file.done == next((done for end, done in reversed(behind.items()) if length >= end), set())
        for video in ("a", "b"):
            if video not in file.done:
                file.append(lines(video, [True]))
        assert set(read(path).videos) == {"a", "b"}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (header(budget=7, method="statekv"), "config budget 7 instead of 4096"),
        (header(shard="1/2"), "shard '1/2' instead of '0/1'"),
        (header(model="other"), "model 'other' instead of 'demo'"),
        (header(variant="512 frames"), "variant '512 frames' instead of '1024 frames'"),
        (header(versions={"torch": "3"}), "versions torch '3' instead of '2'"),
    ],
)
def test_a_file_of_another_run_is_left_alone(path: Path, other: object, told: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        ResultFile(path, other)  # type: ignore[arg-type]
    assert told in str(caught.value)
    assert "--out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no json\n", "line 1 .* is not a JSON object"),
        (b"[1]\n", "line 1 .* is not a JSON object"),
        (b"\xff\xfe\n", "line 1 .* is not a JSON object"),
        (b'{"type": "question"}\n', "does not begin with the header"),
        (b'{"type": "header", "task": "cards"}\n', "does not begin with the header"),
    ],
)
def test_what_is_no_result_file(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    for attempt in (lambda: read(path), lambda: ResultFile(path, header())):
        with pytest.raises(ConfigError, match=told):
            attempt()
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null"])
def test_what_is_no_file_is_not_read(place: str) -> None:
    with pytest.raises(ConfigError, match=f"{place} is not a file of results"):
        read(Path(place))


def test_a_line_without_end_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_LONGEST_LINE", 1000)
    (tmp_path / "x.jsonl").write_bytes(bytes(5000))
    with pytest.raises(ConfigError, match=r"line 1 of .*x\.jsonl has no end"):
        read(tmp_path / "x.jsonl")


def test_a_line_that_is_broken_in_the_middle_is_told(path: Path) -> None:
    written = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*written[:2], "{broken\n", *written[3:]]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 3 of .* is not a JSON object"):
        ResultFile(path, header())


@pytest.mark.parametrize("missing", ["video", "reason"])
def test_a_closing_line_without_its_fields_is_told(path: Path, missing: str) -> None:
    line = {name: value for name, value in FAILED.items() if name != missing}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=f"a video without '{missing}'"):
        read(path)


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        ResultFile(tmp_path / "file" / "full.jsonl", header())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_one_line(path: Path) -> None:
    file = ResultFile(path, header())
    file.path = Path("/dev/full")
    with pytest.raises(ConfigError, match=r"cannot be written: .* \(make room"):
        file.append(lines("c", [True]))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


def test_versions_name_what_answers_depend_on() -> None:
    assert set(versions()) >= {"python", "statekv", "torch", "transformers", "av"}
    assert versions()["python"] == sys.version.split()[0]


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_shards_are_disjoint_and_everything(count: int) -> None:
    parts = [list(Shard(index, count).of(range(10))) for index in range(count)]
    assert sorted(thing for part in parts for thing in part) == list(range(10))
    assert all(part == sorted(part) for part in parts)


def test_as_the_command_line_has_it() -> None:
    assert Shard.parse("1/3") == Shard(1, 3)


@pytest.mark.parametrize("text", ["", "1", "1/", "a/2", "-1/2", "1/2/3", " 0/2", "0/2\n", "٠/٢"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match="must be two numbers"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["2/2", "0/0"])
def test_a_shard_that_is_not_there(text: str) -> None:
    with pytest.raises(ConfigError, match="counts from 0"):
        Shard.parse(text)


def test_as_a_launcher_has_it() -> None:
    assert Shard.launched({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == Shard(2, 4)
    assert Shard.launched({}) == Shard(0, 1)
    with pytest.raises(ConfigError):
        Shard.launched({"RANK": "4", "WORLD_SIZE": "4"})
