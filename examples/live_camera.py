"""A camera's frames pushed from another thread, and a question now and then: python examples/live_camera.py

The camera here is a film that a thread hands out picture by picture. What a real one needs is the same: a loop that
makes a `statekv.Frame` of each picture. For addresses (rtsp://…, /dev/video0) `engine.open` does all of it.
"""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import statekv
from statekv.evals.cards import write_film, write_story
from statekv.video.file import read_frames


def camera() -> Iterator[statekv.Frame]:
    """Pictures [3, H, W] uint8 with their times in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        write_film(write_story(seed=7, duration_seconds=60), Path(folder, "film.mp4"))
        yield from read_frames(Path(folder, "film.mp4"), fps=1)


def grab(frames: "Queue[statekv.Frame | None]") -> None:
    for frame in camera():
        frames.put(frame)
    frames.put(None)


waiting: "Queue[statekv.Frame | None]" = Queue(maxsize=4)
threading.Thread(target=grab, args=(waiting,), daemon=True).start()

session = statekv.load("demo").open(budget=256)  # without a source: frames are pushed
while (frame := waiting.get()) is not None:
    session.push([frame])
    if session.frames % 20 == 0:
        print(f"{frame.pts_seconds:.0f} s: how many cards?", session.ask("how many cards?"))
