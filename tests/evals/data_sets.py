"""Small data sets in the layout of the public ones, written by the tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
