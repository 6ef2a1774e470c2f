"""Four streams on one model, stepped as batches; one is asked while all go on: python examples/many_streams.py"""

import tempfile
from pathlib import Path

import statekv
from statekv.engine.progress import Progress
from statekv.evals.cards import write_film, write_story

engine = statekv.load("demo", budget=128)


def tell(session: statekv.Session, progress: Progress) -> None:
    if session is sessions[0] and progress.step == 30:
        # Asked on a fork: the stream itself does not wait for the answer.
        print("half a minute in:", session.fork().ask("how many cards?"))


with tempfile.TemporaryDirectory() as folder:
    films = [Path(folder, f"{seed}.mp4") for seed in range(7, 11)]
    for seed, film in enumerate(films, 7):
        write_film(write_story(seed=seed, duration_seconds=60), film)
    sessions = [engine.open(film) for film in films]
    failed = engine.watch_all(sessions, on_step=tell)

for film, session in zip(films, sessions, strict=True):
    print(film.name, failed.get(session, session.ask("how many cards?")))
