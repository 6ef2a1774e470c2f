"""Run by a process that finds lmms-eval: its prompts, settings and figures, for records and answers on stdin."""

from __future__ import annotations

import argparse
import json
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

# Two of its modules import OpenCV at their top, for what is not called here.
sys.modules["cv2"] = types.ModuleType("cv2")

TASKS = {
    "videomme": ("videomme", "videomme", "doc_to_text", "process_results", "aggregate_results"),
    "mlvu": ("mlvu", "mlvu_dev", "doc_to_text", "process_results", "aggregate_results_dev"),
    "ovo_realtime": ("ovobench", "ovo_realtime", "back_real_doc_to_text", "back_real_process_results", "back_real_acc"),
    "ovo_backward": ("ovobench", "ovo_backward", "back_real_doc_to_text", "back_real_process_results", "back_real_acc"),
}


def settings_of(functions: Any, name: str) -> dict[str, Any]:
    """The task's YAML, without what it takes from Python."""
    lines = (Path(functions.__file__).parent / f"{name}.yaml").read_text().splitlines()
    return dict(import_module("yaml").safe_load("\n".join(line for line in lines if "!function" not in line)))


def main(folder: str) -> None:
    found = {}
    for name, case in json.load(sys.stdin).items():
        package, task, *members = TASKS[name]
        functions = import_module(f"lmms_eval.tasks.{package}.utils")
        prefix = "ovo" if package == "ovobench" else package
        text, process, aggregate = (getattr(functions, f"{prefix}_{member}") for member in members)
        settings = settings_of(functions, task)
        results = [process(doc, [answer.strip()]) for doc, answer in zip(case["records"], case["answers"], strict=True)]
        rows = [row for result in results for row in result.values()]
        extra = (argparse.Namespace(output_path=folder),) if prefix == "ovo" else ()
        found[name] = {
            "prompts": [text(doc, settings["lmms_eval_specific_kwargs"]["default"]) for doc in case["records"]],
            "max_new_tokens": settings["generation_kwargs"]["max_new_tokens"],
            "figure": aggregate(rows, *extra),
        }
    Path(folder, "found.json").write_text(json.dumps(found))


main(sys.argv[1])
