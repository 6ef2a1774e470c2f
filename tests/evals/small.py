"""A task of a few clips for tests of the harness, and rows as result files hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from statekv.config import Config
from statekv.evals.results import Header
from statekv.evals.task import Broken, EvalQuestion, EvalVideo
from statekv.video.writer import write_video
from tests.tiny import video

SETTINGS: dict[str, Any] = {"fps": 1.0, "max_new_tokens": 4}


class Small:
    """Some clips with a few questions each; an answer is right if it is not empty."""

    name, variant = "small", ""
    settings: Mapping[str, Any] = SETTINGS

    def __init__(self, videos: Sequence[EvalVideo | Broken]) -> None:
        self._videos = videos

    def videos(self) -> Iterator[EvalVideo | Broken]:
        return iter(self._videos)

    def right(self, question: EvalQuestion, answered: str) -> Mapping[str, bool]:
        return {"score": bool(answered), "exact": answered == question.expected}

    def headlines(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        return {"accuracy": sum(row["score"] for row in rows) / len(rows)}


def question(name: str, at_seconds: float | None = None, text: str = "What happens?") -> EvalQuestion:
    return EvalQuestion(name, "any", text, "something", 0.25, at_seconds, "short")


def write_clips(folder: Path, count: int) -> list[Path]:
    """Clips of 11 seconds at 2 frames a second, all different."""
    paths = [folder / f"{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        write_video(path, video(22, seed=number), fps=2)
    return paths


def videos_of(paths: Sequence[Path]) -> list[EvalVideo]:
    """Two questions for each clip, one of them on the way."""
    return [EvalVideo(f"v{n}", path, (question(f"q{n}a", 3.0), question(f"q{n}b"))) for n, path in enumerate(paths)]


def header(method: str = "full", shard: str = "0/1", **changes: Any) -> Header:
    """Of a run on cards; settings of `Config` and fields of `Header` may be changed."""
    named = {name: changes.pop(name) for name in ("task", "variant", "model", "versions") if name in changes}
    config = Config.of(method, fps=1.0, max_new_tokens=8, **changes).facts
    told = {"task": "cards", "variant": "1024 frames", "model": "demo", "versions": {"torch": "2"}, **named}
    return Header(revision=None, dtype="float32", device="cpu", config=config, shard=shard, **told)


def lines(video: str, scores: Sequence[bool], flops: int = 1000, **columns: Any) -> list[dict[str, Any]]:
    """One video's lines in a result file, its questions right or wrong."""
    rows = [
        {
            "type": "question",
            "video": video,
            "id": f"{video}/{number}",
            "kind": "color",
            "group": "early",
            "answered": "red" if score else "blue",
            "expected": "red",
            "chance": 0.25,
            "score": score,
            **columns,
        }
        for number, score in enumerate(scores)
    ]
    return [*rows, {"type": "video", "video": video, "questions": len(rows), "prefill_flops": flops}]
