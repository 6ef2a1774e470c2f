"""Every code block of README and docs runs, in the order of its page; what they name and link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, blocks_of
from tests.docs.running import follow

LOG = sorted((ROOT / "docs" / "log").glob("*.md"))
GUIDES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
CODE = [block for page in PAGES for block in blocks_of(page) if block.is_code]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:statekv|tests|benchmarks|training|docs|examples)/[\w./-]*)`")


# Those that write a file of the reader's own are followed in test_strangers.py.
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in ("policy", "reducer")], ids=lambda page: page.stem)
def test_every_block_runs(page: Path, folder: Path) -> None:
    follow(page, folder)


def test_most_blocks_are_run() -> None:
    """Those that are not say what they need, and are few."""
    left_out = [f"{block} needs {block.needs}" for block in CODE if block.needs is not None]
    assert len(left_out) <= len(CODE) / 3, left_out


def test_every_block_says_what_it_is() -> None:
    """A comment of "not run" stands right before its block, and a block that nobody runs is not called code."""
    for page in PAGES:
        blocks = list(blocks_of(page))
        assert page.read_text(encoding="utf-8").count("<!-- not run:") == sum(
            block.needs is not None for block in blocks
        )
        for block in blocks:
            assert block.language in ("python", "bash", "text", "console"), str(block)


def test_readme_shows_itself_at_once() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("![") for line in lines[:15])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent == ROOT / "docs" and page.stem != "cli"], ids=lambda page: page.stem
)
def test_every_page_begins_with_something_to_run(page: Path) -> None:
    first = next(blocks_of(page))
    assert first.is_code
    assert first.needs is None
    assert first.line <= 6


@pytest.mark.parametrize("page", [*PAGES, *LOG, *GUIDES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not heading or heading in headings(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    """The log is left out: it names files as they were called then."""
    for name in _PATH.findall(page.read_text(encoding="utf-8")):
        path = ROOT / name
        assert (path.parent if "NAME" in path.name else path).exists(), f"{page.name} names {name}"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as hosts and mkdocs make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in found}


def test_every_picture_is_used() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, *LOG])
    unused = [path.name for path in (ROOT / "docs" / "img").iterdir() if path.name not in text]
    assert not unused
