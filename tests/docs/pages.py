"""README and docs as pages of code blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]

_NEEDS = re.compile(r"<!-- not run: needs (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: file that it stands in.
        line: of its fence, from 1.
        language: what the fence says; "" where it says nothing.
        text: without the fences.
        needs: what a reader must have to run it, by the comment in front of it; None: nothing.
    """

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    @property
    def is_code(self) -> bool:
        """Whether a reader may want to run it."""
        return self.language in ("python", "bash")

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a shell, without comments; lines that are continued count as one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """All blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened, needs, last = None, None, ""
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if opened is None:
                found = _NEEDS.fullmatch(last)
                opened, needs = number, found[1] if found else None
            else:
                text = "\n".join(lines[opened : number - 1])
                yield Block(page, opened, lines[opened - 1].removeprefix("```").strip(), text, needs)
                opened = None
        last = line
    assert opened is None, f"{page}: a block that begins in line {opened} does not end"
