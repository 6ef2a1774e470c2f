"""A stream under a cap on memory, saved in the middle and gone on with: python examples/fixed_memory.py"""

import tempfile
from pathlib import Path

import statekv
from statekv.evals.cards import write_film, write_story

QUESTION = "how many cards?"
engine = statekv.load("demo", budget=128, method="statekv_retrieve")

with tempfile.TemporaryDirectory() as folder:
    film, saved = Path(folder, "film.mp4"), Path(folder, "film.session")
    write_film(write_story(seed=7, duration_seconds=120), film)

    # 6 MiB on the device, then a quarter of the host's memory; what has no room there is forgotten, and counted.
    session = engine.open(film, memory="6MiB", host_memory="256KiB", bits=8, retrieve=16, max_new_tokens=16)
    session.watch(until_seconds=60)
    print("half way:", session.ask(QUESTION), {tier: size for tier, size in session.state.nbytes.items() if size})
    session.save(saved)
    session.close()

    session = engine.restore(saved)  # another process, another day
    session.watch()
    print("the end:", session.ask(QUESTION), {tier: size for tier, size in session.state.nbytes.items() if size})
    print(session.state.forgotten, "steps forgotten of", session.steps)
