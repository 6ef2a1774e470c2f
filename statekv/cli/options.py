"""Options and arguments, each with its help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from statekv.config import CARRIES, KERNELS, LAYOUTS, METHODS, ON_HORIZON, RECALLS, RETRIEVED_POSITIONS
from statekv.errors import ConfigError

Video = Annotated[str, typer.Argument(help="A video file or URL.", show_default=False)]
Questions = Annotated[list[str], typer.Argument(help="One or more questions.", show_default=False)]
AskedVideo = Annotated[
    str | None, typer.Argument(help="A video file or URL; left out with --restore.", show_default=False)
]
AskedQuestions = Annotated[list[str] | None, typer.Argument(help="One or more questions.", show_default=False)]
Model = Annotated[str, typer.Option(help="A hub id, a folder, or demo.")]
Method = Annotated[str | None, typer.Option(help=f"One of: {', '.join(METHODS)}.")]
Budget = Annotated[int, typer.Option(help="Tokens carried per layer and KV head.")]
Fps = Annotated[float, typer.Option(help="Frames per second at most.")]
MaxFrames = Annotated[int | None, typer.Option(help="Frames at most, spread over the video.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Carry = Annotated[str | None, typer.Option(help=f"Keys that go on: {', '.join(CARRIES)}.")]
Recall = Annotated[str | None, typer.Option(help=f"Keys that answers see: {', '.join(RECALLS)}.")]
Sinks = Annotated[int, typer.Option(help="First tokens that sink_recent keeps.")]
PinPrefix = Annotated[
    bool | None,
    typer.Option(
        "--pin-prefix/--no-pin-prefix", help="Always carry the prompt's prefix; by default as the method does."
    ),
]
Decay = Annotated[float, typer.Option(help="What a key's former score counts, 0 to 1.")]
ValueNorms = Annotated[bool, typer.Option("--value-norms", help="Multiply a key's score by the length of its value.")]
LayerSlope = Annotated[
    float, typer.Option(help="Share by which the first layer carries more than the mean, and the last less.")
]
PinNewest = Annotated[int, typer.Option(help="Newest steps that are carried whatever their scores.")]
Coverage = Annotated[float, typer.Option(help="Share of the budget for a random sample of the whole stream, 0 to 1.")]
Retrieve = Annotated[int, typer.Option(help="Steps that recall retrieve shows to an answer, chosen in each layer.")]
RetrieveNewest = Annotated[int, typer.Option(help="Newest steps that it shows besides those.")]
RetrieveCarried = Annotated[bool, typer.Option("--retrieve-carried", help="Let it show the carried keys too.")]
RetrievePositions = Annotated[str, typer.Option(help=f"Positions of retrieved keys: {', '.join(RETRIEVED_POSITIONS)}.")]
LastFrames = Annotated[int, typer.Option(help="Newest frames that recall last_frames shows.")]
LayoutName = Annotated[str, typer.Option(help=f"Prompt layout: {', '.join(LAYOUTS)}.")]
Horizon = Annotated[int | None, typer.Option(help="Positions that RoPE is scaled for.")]
OnHorizon = Annotated[
    str | None,
    typer.Option(
        help=f"When the horizon is reached: {', '.join(ON_HORIZON)}; by default error for files, else compact."
    ),
]
Memory = Annotated[str | None, typer.Option(help="Most that the stream may take on the device: 8GiB, 500MB.")]
HostMemory = Annotated[
    str | None, typer.Option(help="Most that moves from there to the host's memory; nothing if left out.")
]
Disk = Annotated[str | None, typer.Option(help="Most that moves from there to files; nothing if left out.")]
DiskFolder = Annotated[str | None, typer.Option(help="Where these files lie; by default among temporary files.")]
Bits = Annotated[
    int | None, typer.Option(help="Quantise what leaves the newest part of the device's memory: 8, 4 or 2.")
]
Kernel = Annotated[str, typer.Option(help=f"Attention with key scores: {', '.join(KERNELS)}.")]
ScoreEvery = Annotated[int, typer.Option(help="Score keys with every n-th query only.")]
VisionBatch = Annotated[int, typer.Option(help="Steps whose pictures pass the vision tower together.")]
Graph = Annotated[bool, typer.Option(help="On CUDA, replay recorded steps.")]
Pack = Annotated[bool, typer.Option(help="On a CPU in float32, step on packed weights: a second copy in memory.")]
Seed = Annotated[int, typer.Option(help="Of carry random.")]
VideoStream = Annotated[int | None, typer.Option(help="Which video stream of the file, from 0.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed on to transformers, for example auto.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Save = Annotated[
    Path | None, typer.Option(help="Folder that keeps what was seen, for --restore; a session in it is replaced.")
]
Restore = Annotated[
    Path | None,
    typer.Option(help="Go on with what --save kept; every argument is a question, model and settings stay."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per answer.")]

Csv = Annotated[
    Path | None,
    typer.Option("--csv", help="Rows are appended here; by default in benchmarks/results or statekv-bench."),
]
Picture = Annotated[Path | None, typer.Option(help="PNG to write; by default beside the rows.")]
Runs = Annotated[int, typer.Option(help="Timed runs of each candidate, taken in turns.", min=1)]
Sizes = Annotated[
    str | None, typer.Option("--models", help="Language models in real size, with commas; all if left out.")
]
Budgets = Annotated[str, typer.Option(help="Carried tokens, with commas.")]
BenchDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]
BenchDtype = Annotated[str, typer.Option("--dtype", help="auto: bfloat16 on CUDA, else float32.")]
Peer = Annotated[Path | None, typer.Option(help="A Python file with flash_attn_with_key_scores; it is run.")]


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(text: str, name: str) -> float:
    """Return the seconds of "30s", "2m", "1.5h" or "30".

    Raises:
        ConfigError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|)", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"{name} is {text!r}, but must be a length of time", "write 30s, 2m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def clock(seconds: float) -> str:
    """0:00:07 for 7.4 seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
