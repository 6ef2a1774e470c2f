"""A page followed word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.cli.test_cli import command
from tests.docs.pages import Block, blocks_of

# What a shell block may begin a line with besides statekv: said to the reader, not run here.
OTHER_COMMANDS = {"accelerate", "cd", "ffmpeg", "hf", "make", "pip", "python"}

_FILE = re.compile(r"# (\w+\.py)\n")


def follow(page: Path, folder: Path) -> dict[str, Any]:
    """Do what a page says, from its first block to its last, in the current folder.

    Python that begins with the name of a file is written there, all other Python is run, and so are the lines of
    shells that are statekv's, inside this process.

    Returns:
        The names that the page's Python has made.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.needs is not None:
            continue
        if block.language == "bash":
            _run_shell(block)
        elif named := _FILE.match(block.text):
            (folder / named[1]).write_text(block.text + "\n", encoding="utf-8")
        elif block.language == "python":
            lines = "\n" * block.line + block.text  # errors name the page's own lines
            exec(compile(lines, str(page), "exec"), names)
    return names


def _run_shell(block: Block) -> None:
    for name, *arguments in block.commands:
        if name != "statekv":
            assert name in OTHER_COMMANDS, f"{block}: {name}"
            continue
        found = command(*arguments)
        assert found.code == 0, f"{block}: statekv {arguments}: {found.err}"
        assert found.out or found.err or arguments[0] == "watch", f"{block}: statekv {arguments} said nothing"
