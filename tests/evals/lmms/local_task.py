"""A task of lmms-eval in a folder: records, the videos beside them, and how to ask and to score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "local_cards"

_YAML = f"""\
task: {NAME}
dataset_path: json
dataset_kwargs:
  data_files:
    test: RECORDS
test_split: test
output_type: generate_until
doc_to_visual: !function local_functions.video
doc_to_text: !function local_functions.text
doc_to_target: answer
process_results: !function local_functions.result
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""

_FUNCTIONS = """\
def video(doc):
    return [doc["video"]]


def text(doc):
    return doc["question"]


def result(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def write_task(folder: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Records have a `video`, by its path, a `question` and an `answer`."""
    folder.mkdir()
    path = folder / "records.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / f"{NAME}.yaml").write_text(_YAML.replace("RECORDS", str(path)))
    (folder / "local_functions.py").write_text(_FUNCTIONS)
