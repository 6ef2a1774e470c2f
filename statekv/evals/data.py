"""Records of a data set: read from the files that it ships, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from statekv.errors import ConfigError, need
from statekv.evals.task import Broken, EvalQuestion, EvalVideo

_KINDS: Mapping[type, str] = {str: "text", list: "a list of texts", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Record:
    """One record: where it stands (file and line, or number in the file), its number in the data set from 0, its values
    by name.
    """

    where: str
    number: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """Where the records of a data set are found, and what they must have.

    Attributes:
        repository: on the Hugging Face hub, asked where a folder holds no records.
        patterns: of the files in a folder; the first that matches any is it, and all that it matches are read.
        needed: fields that every record must have, with their types.
    """

    repository: str
    patterns: Sequence[str]
    needed: Mapping[str, type]

    def read(self, folder: Path) -> Iterator[Record | Broken]:
        """All records, in order; those that cannot be used are told.

        Raises:
            ConfigError: no records in the folder nor from the hub, a file that cannot be read, or none of use in it.
        """
        files = self._matches(folder) or self._matches(self._fetched(folder))
        number, first, usable = 0, "", False
        for file in files:
            for where, fields, reason in _rows(file):
                reason = reason or fault(fields, self.needed)
                usable, first = usable or not reason, first or reason
                yield Broken(where, reason) if reason else Record(where, number, fields)
                number += 1
        if not usable:
            told = f"no record in {files[0]} can be used; the first {first}" if first else f"{files[0]} has no records"
            raise ConfigError(told, "docs/evals.md lists the fields")

    def holds(self, folder: Path) -> bool:
        """Whether a folder has records of this data set, one at least with all the fields; the hub is not asked.

        Raises:
            ConfigError: a file that cannot be read.
        """
        rows = (row for file in self._matches(folder) for row in _rows(file))
        return any(not reason and not fault(fields, self.needed) for _, fields, reason in rows)

    def _matches(self, folder: Path) -> list[Path]:
        return next((found for pattern in self.patterns if (found := sorted(folder.glob(pattern)))), [])

    def _fetched(self, folder: Path) -> Path:
        from huggingface_hub import snapshot_download

        try:
            patterns = list(self.patterns)
            fetched = Path(snapshot_download(self.repository, repo_type="dataset", allow_patterns=patterns))
            if self._matches(fetched):
                return fetched
            reason = f"{self.repository} has none"
        except Exception as error:  # of the network, of its library, or of the disk
            why = str(error).strip().splitlines() or [repr(error)]
            reason = f"{self.repository} cannot be read: {why[0]}"
        rule = f"{folder} holds no records ({', '.join(self.patterns)}), and {reason}"
        raise ConfigError(rule, f"hf download {self.repository} --repo-type dataset --local-dir {folder}")


def fault(fields: Mapping[str, Any], needed: Mapping[str, type]) -> str:
    """What keeps a record from being used: a field that it lacks, or of another type; "" if nothing does."""
    for name, kind in needed.items():
        if name not in fields:
            return f"lacks the field {name!r}; it has {', '.join(fields) or 'none'}"
        if not _is(fields[name], kind):
            return f"has {name} {fields[name]!r}, but it must be {_KINDS[kind]}"
    return ""


def distinct(records: Iterable[Record | Broken], field: str) -> Iterator[Record | Broken]:
    """Records, but the second one with an id is told instead."""
    seen: dict[Any, str] = {}
    for record in records:
        if isinstance(record, Record):
            id = record.fields[field]
            if id in seen:
                yield Broken(record.where, f"has the {field} {id!r} of {seen[id]}, which is used instead")
                continue
            seen[id] = record.where
        yield record


def _is(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind) and value != ""


_Row = tuple[str, Mapping[str, Any], str]  # where it stands, its fields, what is wrong with it or ""


def _rows(file: Path) -> Iterator[_Row]:
    if file.suffix == ".jsonl":
        yield from _lines(file)
        return
    whole = _parquet(file) if file.suffix == ".parquet" else _json(file)
    for number, fields in enumerate(whole):
        yield _row(f"{file.name} record {number}", fields)


def _lines(file: Path) -> Iterator[_Row]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        where = f"{file.name} line {number}"
        if not line.strip():
            continue
        try:
            yield _row(where, json.loads(line))
        except ValueError as error:
            yield where, {}, f"is not JSON: {error}"


def _row(where: str, fields: Any) -> _Row:
    return (where, fields, "") if isinstance(fields, dict) else (where, {}, f"is {fields!r}, but must be an object")


def _json(file: Path) -> list[Any]:
    try:
        found = json.loads(_text(file))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}", "mend it or download it again") from None
    if not isinstance(found, list):
        raise ConfigError(f"{file} holds {type(found).__name__}, but must hold a list of records", "name another")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "download it again") from None


def _parquet(file: Path) -> list[Any]:
    with need("pyarrow", "eval", f"{file.name} is a Parquet file"):
        import pyarrow
        from pyarrow import parquet
    try:
        found: list[Any] = parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}", "download it again") from None
    return found


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there; a ConfigError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be a folder: {error.strerror}", "name another") from None


_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov"}


class VideoFiles:
    """All video files under a folder of a data set, or of its videos alone; a ConfigError if there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_stem: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in _SUFFIXES:
                self._by_stem.setdefault(path.stem, []).append(path)
        if not self._by_stem:
            raise ConfigError(
                f"no videos lie under {folder}", "unpack those of the data set there, or name their folder"
            )

    def find(self, name: str) -> list[Path]:
        """Files of a name, with the folders above them if it has some; whatever their kind if it has no ending."""
        wanted = PurePosixPath(name)
        ends = wanted.suffix.lower() in _SUFFIXES
        stem, above = wanted.stem if ends else wanted.name, wanted.parent.parts
        found = [
            path for path in self._by_stem.get(stem, []) if not ends or path.suffix.lower() == wanted.suffix.lower()
        ]
        return [path for path in found if path.parts[-1 - len(above) : -1] == above]

    def video(
        self, name: str, questions: Iterable[EvalQuestion], *, id: str = "", until_seconds: float | None = None
    ) -> EvalVideo | Broken:
        """A video with its questions; one whose file is missing fails when it is watched, as one that is damaged.

        Args:
            id: of the video; "": its name.
            until_seconds: where it ends.
        """
        found = self.find(name)
        if len(found) > 1:
            places = " and ".join(str(path.relative_to(self.folder)) for path in found[:2])
            return Broken(id or name, f"{len(found)} files have the name {name}, such as {places}")
        missing = name if PurePosixPath(name).suffix.lower() in _SUFFIXES else f"{name}.mp4"
        path = found[0] if found else self.folder / missing
        return EvalVideo(id or name, path, tuple(questions), until_seconds)


def gathered(
    folder: Path, records: Iterable[Record | Broken], name: str, question_of: Callable[[Record], EvalQuestion | Broken]
) -> Iterator[EvalVideo | Broken]:
    """Records of one question each by the video that a field names, in order of its first record; before those, what
    cannot be used.

    Raises:
        ConfigError: no videos lie in the folder.
    """
    found: dict[str, list[EvalQuestion]] = {}
    for record in records:
        question = question_of(record) if isinstance(record, Record) else record
        if isinstance(record, Record) and isinstance(question, EvalQuestion):
            found.setdefault(record.fields[name], []).append(question)
        elif isinstance(question, Broken):
            yield question
    files = VideoFiles(folder)
    for video, questions in found.items():
        yield files.video(video, questions)
