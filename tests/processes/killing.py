"""A program that is killed again and again, each time some moments later than before."""

from __future__ import annotations

from pathlib import Path

from tests.processes import forked

# Moments are the beginnings and ends of calls. Each child has a folder of its own, named by the moment of its death.
_PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
{imports}

torch.set_num_threads(1)
rounds, stride = Path(sys.argv[1]), int(sys.argv[2])
left = 0

def dying(call):
    def instead(*args, **kwargs):
        global left
        for after in (False, True):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            found = found if after else call(*args, **kwargs)
        return found
    return instead

for owner, name in ({calls}):
    setattr(owner, name, dying(getattr(owner, name)))
{ready}
moment = 0
while True:
    moment += stride
    place = rounds / str(moment)
    place.mkdir()
    child = os.fork()
    if child == 0:
        left = moment
        {run}
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def kill_at_moments(imports: str, calls: str, ready: str, run: str, rounds: Path, stride: int) -> None:
    """Fork and kill until a child gets to its end.

    Args:
        imports: what the other pieces of code need.
        calls: pairs of an owner and the name of one of its functions, whose calls are the moments.
        ready: done once, before the first child.
        run: what a child does; `place` is its folder.
        rounds: where these folders are made.
        stride: moments from one death to the next.
    """
    program = _PROGRAM.format(imports=imports, calls=calls, ready=ready, run=run)
    forked.run(rounds, str(stride), program=program).check_returncode()
