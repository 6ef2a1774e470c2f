"""OVO-Bench: cuts and shared streams, the substring rule and the strict letter."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from statekv.evals import open_task
from statekv.evals.task import Broken, EvalQuestion, EvalVideo
from statekv.evals.tasks.ovo import OVOBackward, OVORealtime
from statekv.video.file import read_frames
from statekv.video.writer import write_video
from tests.evals.data_sets import ovo, place, write_lines

PROMPT = (
    "\nQuestion: Where is the ring?\nOptions:\nA. Right.; B. Left.; C. Above.; D. Below.;\n\n"
    "Respond only with the letter corresponding to your chosen option (e.g., A, B, C). \n"
    "Do not include any additional text or explanation in your response.\n"
)


def videos(folder: Path, *records: dict) -> list[EvalVideo]:
    write_lines(folder / "realtime" / "data.jsonl", records)
    found = list(OVORealtime(folder).videos())
    assert all(isinstance(thing, EvalVideo) for thing in found), found
    return [thing for thing in found if isinstance(thing, EvalVideo)]


def test_cuts_are_streams_of_their_own(tmp_path: Path) -> None:
    place(tmp_path, "chunked_videos/631.mp4", "Ego4D/a.mp4", "AutoEvalMetaData/632.mp4")
    first, missing = videos(tmp_path, ovo(631, "Ego4D/a.mp4", 172), ovo(632, "Ego4D/a.mp4", 488))
    asked = EvalQuestion("631", "STU", PROMPT, "B", chance=0.25)
    assert first == EvalVideo("631", tmp_path / "chunked_videos/631.mp4", (asked,))
    assert missing.path == tmp_path / "chunked_videos/632.mp4"


def test_questions_about_a_source_share_its_stream_where_sampling_coincides(tmp_path: Path) -> None:
    place(tmp_path, "Ego4D/a.mp4")
    records = [ovo(1, "Ego4D/a.mp4", seconds) for seconds in (300.4, 20, 512, 512.5, 90.05, 512.5)]
    records = [record | {"id": number} for number, record in enumerate(records)]
    shared, late, barely = videos(tmp_path, *records)
    assert (shared.id, shared.until_seconds) == ("Ego4D/a.mp4", 512.0)
    assert [question.id for question in shared.questions] == ["1", "0", "2"]
    assert [question.at_seconds for question in shared.questions] == pytest.approx([19, 300, 511], abs=0.01)
    assert (late.id, late.until_seconds) == ("Ego4D/a.mp4@512.5", 512.5)
    assert [(question.id, question.at_seconds) for question in late.questions] == [("3", None), ("5", None)]
    assert (barely.id, barely.until_seconds) == ("Ego4D/a.mp4@90.05", 90.05)


@pytest.mark.parametrize("rate", [10, 25, 30000 / 1001])
def test_a_shared_stream_has_shown_what_a_cut_would_show(tmp_path: Path, rate: float) -> None:
    """Frames before a question in the stream, which goes on to the first frame at its time, and frames of the cut."""
    write_video(tmp_path / "a.mp4", (np.full((3, 16, 16), i % 256, np.uint8) for i in range(int(9 * rate))), rate)
    cuts = [0.5, 1, 2.04, 3, 3.1, 4.7, 6, 7.99, 8]
    found = videos(tmp_path, *(ovo(number, "a.mp4", seconds) for number, seconds in enumerate(cuts)))
    stream, alone = found
    assert [question.id for question in alone.questions] == ["2"]
    source = list(read_frames(stream.path, 1.0, 512, until_seconds=stream.until_seconds))
    shown: dict[float, list[float]] = defaultdict(list)
    for question in stream.questions:
        for frame in source:
            shown[cuts[int(question.id)]].append(frame.pts_seconds)
            if frame.pts_seconds >= (question.at_seconds or 0.0):
                break
    assert len(shown) == 8
    for cut, times in shown.items():
        assert times == [frame.pts_seconds for frame in read_frames(stream.path, 1.0, 512, until_seconds=cut)], cut


def test_the_benchmark_s_own_file_holds_all_parts(tmp_path: Path) -> None:
    records = [ovo(0, "a.mp4", 20, task="EPM"), ovo(631, "a.mp4", 30), {"id": 1468, "task": "REC", "video": "a.mp4"}]
    (tmp_path / "ovo_bench_new.json").write_text(json.dumps(records))
    place(tmp_path, "a.mp4")
    for name, id in (("ovo_backward", "0"), ("ovo_realtime", "631")):
        (video,) = open_task(name, tmp_path).videos()
        assert isinstance(video, EvalVideo)
        assert [question.id for question in video.questions] == [id]


def test_faults_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    faulty = [
        ovo(1, "a.mp4", 20, task="XYZ"),
        ovo(2, "a.mp4", 20, gt=4),
        ovo(3, "a.mp4", 0),
        ovo(4, "a.mp4", 20, options=[]),
        ovo(5, "a.mp4", 20),
        ovo(5, "a.mp4", 20),
    ]
    write_lines(tmp_path / "realtime" / "data.jsonl", faulty)
    place(tmp_path, "a.mp4")
    *told, video = OVORealtime(tmp_path).videos()
    assert [(thing.id, thing.reason) for thing in told if isinstance(thing, Broken)] == [
        ("data.jsonl line 1", "has the unknown task 'XYZ'"),
        ("data.jsonl line 2", "has gt 4, but 4 options"),
        ("data.jsonl line 3", "is asked at 0 s, where there is no frame before"),
        ("data.jsonl line 4", "has options [], but it must be a list of texts"),
        ("data.jsonl line 6", "has the id 5 of data.jsonl line 5, which is used instead"),
    ]
    assert isinstance(video, EvalVideo)
    assert [question.id for question in video.questions] == ["5"]


@pytest.mark.parametrize(
    ("answered", "score", "letter"),
    [("B", True, True), ("B. Left.", True, False), ("Between", True, False), ("A", False, False), ("b", False, False)],
)
def test_the_substring_rule_and_the_strict_letter(answered: str, score: bool, letter: bool) -> None:
    question = EvalQuestion("1", "STU", PROMPT, "B", 0.25)
    assert OVORealtime().right(question, answered) == {"score": score, "letter": letter}


def test_figures_weigh_sub_tasks_alike() -> None:
    rows = [{"kind": "EPM", "score": True, "letter": False} for _ in range(3)]
    rows += [{"kind": "ASI", "score": False, "letter": False}]
    figures = OVOBackward().headlines(rows)
    parts = {"mean, strict letter": 0.0, "EPM": 1.0, "ASI": 0.0}
    assert figures == {"mean of sub-tasks": 0.5, "mean of questions": 0.75, **parts}
    assert next(iter(figures)) == "mean of sub-tasks"


def test_the_setting_is_the_paper_s() -> None:
    assert OVORealtime().settings == {"fps": 1.0, "max_frames": 512, "max_new_tokens": 128}
