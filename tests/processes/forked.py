"""A process of its own that need not wait for torch: it is forked from one that has imported everything.

It runs `statekv`, or a program. What is about the start itself, such as the installed command and its variables, starts
a process anew instead.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Each call comes with three streams and a pipe, on which its keeper tells the process's number and how it ended. The
# process itself leaves the loop and ends as any program does.
_NURSERY = """
import json, os, runpy, signal, socket, struct, sys
import av, torch, transformers.models.internvl.modeling_internvl
import statekv.cli.ask, statekv.cli.watch, statekv.engine.engine

sys.path[0] = os.getcwd()
# As the command's own variables would have it, had it come before transformers.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
calls = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, descriptors, _, _ = socket.recv_fds(calls, 1 << 20, 4)
    if not message:
        os._exit(0)
    if os.fork() == 0:
        process = os.fork()
        if process == 0:
            break
        os.write(descriptors[3], struct.pack("q", process))
        status = os.waitpid(process, 0)[1]
        os.write(descriptors[3], struct.pack("q", os.waitstatus_to_exitcode(status)))
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    while os.waitpid(-1, os.WNOHANG) != (0, 0):
        pass

call = json.loads(message)
os.setsid()
for place, descriptor in enumerate(descriptors[:3]):
    os.dup2(descriptor, place)
for descriptor in (*descriptors, calls.detach()):
    os.close(descriptor)
os.environ.clear()
os.environ.update(call["environment"])
signal.signal(signal.SIGINT, signal.SIG_IGN if call["background"] else signal.default_int_handler)
sys.stdin = open(0, closefd=False)
sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
sys.argv = ["statekv" if call["program"] is None else "-c", *call["arguments"]]
exec(call["first"], {})
if call["program"] is None:
    runpy.run_module("statekv", run_name="__main__", alter_sys=True)
else:
    exec(call["program"], {"__name__": "__main__"})
"""


@functools.cache
def _nursery() -> socket.socket:
    ours, theirs = socket.socketpair()
    line = [sys.executable, "-c", _NURSERY, str(theirs.fileno())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.Popen(line, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


class Process:
    """What runs; as much of `subprocess.Popen` as is needed.

    Args:
        arguments: of `statekv`, or of the program.
        program: as after `python -c`; None: `statekv`.
        streams: file descriptors of its standard input, output and error.
        environment: all of its variables.
        background: Ctrl-C is ignored, as in what a script has started with `&`.
        first: code that it runs before the command.
    """

    def __init__(
        self,
        *arguments: str | Path,
        program: str | None = None,
        streams: tuple[int, int, int],
        environment: Mapping[str, str] = os.environ,
        background: bool = False,
        first: str = "",
    ) -> None:
        self._told, tells = os.pipe()
        call = {
            "arguments": [*map(str, arguments)],
            "program": program,
            "environment": dict(environment),
            "background": background,
            "first": first,
        }
        socket.send_fds(_nursery(), [json.dumps(call).encode()], [*streams, tells])
        os.close(tells)
        self.returncode: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        (number,) = struct.unpack("q", os.read(self._told, 8))
        return int(number)

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.returncode is None:
            os.set_blocking(self._told, False)
            try:
                self._end()
            except BlockingIOError:
                return None
        return self.returncode

    def wait(self) -> int:
        """The exit code, when it has ended."""
        if self.returncode is None:
            os.set_blocking(self._told, True)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def _end(self) -> None:
        self.returncode = self._number()
        os.close(self._told)


def run(
    *arguments: str | Path,
    program: str | None = None,
    environment: Mapping[str, str] = os.environ,
    out: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """With nothing to read, and what it wrote; of standard output only where `out` is not given."""
    with open(os.devnull) as nothing, tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        streams = nothing.fileno(), said.fileno() if out is None else out, told.fileno()
        code = Process(*arguments, program=program, streams=streams, environment=environment).wait()
        for file in (said, told):
            file.seek(0)
        return subprocess.CompletedProcess([*map(str, arguments)], code, said.read(), told.read())
