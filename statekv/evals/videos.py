"""Video files of a data set, wherever in its folder they were unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from statekv.errors import ConfigError
from statekv.evals.records import Record
from statekv.evals.task import Broken, EvalQuestion, EvalVideo

_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov"}


class VideoFiles:
    """All video files under a folder.

    Args:
        folder: of the data set, or of its videos alone.

    Raises:
        ConfigError: there is none.
    """

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
            name: of the file, as for `find`.
            questions: in the order in which they are asked.
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
    """Records by their video, in order of its first record; before those, what cannot be used.

    Args:
        folder: of the data set.
        records: of one question each.
        name: field with the video's name.
        question_of: what a record asks.

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
