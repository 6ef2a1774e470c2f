"""Small data sets in the layout of the public ones, written by the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from statekv.video.writer import write_video
from tests.tiny import video as pictures


def write_lines(path: Path, records: Iterable[Mapping[str, Any] | str]) -> Path:
    """JSON lines; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def place(folder: Path, *names: str) -> None:
    """Files that stand for videos, where nobody watches them."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def videomme(number: int, video: str, **fields: Any) -> dict[str, Any]:
    """A record of Video-MME."""
    return {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": f"https://www.youtube.com/watch?v={video}",
        "videoID": video,
        "question_id": f"001-{number}",
        "task_type": "Counting Problem",
        "question": "How many cards are shown?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": "C",
    } | fields


def mlvu(video: str, **fields: Any) -> dict[str, Any]:
    """A record of MLVU's dev set."""
    return {
        "video_name": video,
        "duration": 467.98,
        "question": "What comes first?\n(A) a ring\n(B) a cross\n(C) a square\n(D) a circle\n",
        "candidates": ["a ring", "a cross", "a square", "a circle"],
        "answer": "B",
        "task_type": "order",
    } | fields


def ovo(number: int, video: str, seconds: float, **fields: Any) -> dict[str, Any]:
    """A record of OVO-Bench's real-time part."""
    return {
        "id": number,
        "task": "STU",
        "video": video,
        "realtime": seconds,
        "question": "Where is the ring?",
        "answer": "Left.",
        "options": ["Right.", "Left.", "Above.", "Below."],
        "gt": 1,
    } | fields


def write_videos(folder: Path, *names: str) -> None:
    """Videos of 11 seconds at two frames a second, 56 x 40 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / names[0], pictures(22), fps=2)
    for name in names[1:]:
        shutil.copy(folder / names[0], folder / name)


def write_videomme(folder: Path) -> None:
    """Three questions on two videos."""
    write_videos(folder, "a.mp4", "b.mp4")
    write_lines(folder / "test.jsonl", [videomme(number, name) for number, name in enumerate(("a", "a", "b"))])


def write_mlvu(folder: Path) -> None:
    """The same."""
    write_videos(folder, "a.mp4", "b.mp4")
    write_lines(folder / "test.jsonl", [mlvu(f"{name}.mp4") for name in ("a", "b", "a")])


def write_ovo(folder: Path) -> None:
    """Three questions on two videos, the second watched to its end."""
    write_videos(folder, "a.mp4", "b.mp4")
    write_lines(folder / "realtime" / "data.jsonl", [ovo(1, "a.mp4", 4.0), ovo(2, "a.mp4", 7.5), ovo(3, "b.mp4", 99.0)])
