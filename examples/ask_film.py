"""Ask about a film while it goes by and at its end: python examples/ask_film.py [FILM [QUESTION]]"""

import sys
import tempfile
from pathlib import Path

import statekv
from statekv.evals.cards import write_film, write_story

question = sys.argv[2] if len(sys.argv) > 2 else "how many cards?"
engine = statekv.load("demo", budget=256)  # a hub id, a folder, or the model that comes with the package

with tempfile.TemporaryDirectory() as folder:
    film = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "film.mp4")
    if len(sys.argv) == 1:
        write_film(write_story(seed=7, duration_seconds=60), film)
    with engine.open(film) as session:
        for seconds in (25, 45, None):  # None: to the end
            session.watch(until_seconds=seconds)
            print(f"{question} after {session.frames} frames:", end=" ")
            for piece in session.stream(question):  # as `ask`, piece by piece
                print(piece, end="", flush=True)
            print(f"   ({session.state.carried.length} tokens carried, {session.state.tokens} seen)")
