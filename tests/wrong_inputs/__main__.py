"""Try many wrong inputs, and print how each kind fares."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it

from tests.runner.demo import demo_read_once
from tests.wrong_inputs import KINDS
from tests.wrong_inputs.trying import FINE, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all if left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: Counter[str] = Counter()
    for kind in given.kinds or KINDS:
        tries, count, _ = KINDS[kind]
        with tempfile.TemporaryDirectory() as folder, demo_read_once():
            some = list(ends(tries(Path(folder), given.seed, count)))
        tell(kind, here := Counter(end if end in FINE else "bad" for _, end in some))
        for told, end in some:
            if end not in FINE:
                print(f"  {told[:200]!r}: {end[:300]!r}")
        found += here
    tell("all", found)
    sys.exit(bool(found["bad"]))


def tell(kind: str, found: Counter[str]) -> None:
    print(
        f"{kind}: {found.total()} tried, {found['refused']} refused, {found['works']} work, {found['bad']} end badly",
        flush=True,
    )


if __name__ == "__main__":
    main()
