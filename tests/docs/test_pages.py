"""Every code block of README and docs runs, in the order of its page; what they name and link to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

from statekv import cli
from statekv.evals.cards import write_film, write_story
from tests.docs.pages import PAGES, ROOT, Block, blocks_of

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
LOG = sorted((ROOT / "docs" / "log").glob("*.md"))
GUIDES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
# What a shell block may begin a line with besides statekv: said to the reader, not run here.
OTHER_COMMANDS = {"accelerate", "ffmpeg", "hf", "make", "pip", "python", "cd"}
CODE = [block for page in PAGES for block in blocks_of(page) if block.is_code]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:statekv|tests|benchmarks|training|docs|examples)/[\w./-]*)`")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(seed=7, duration_seconds=6), path)
    return path


@EVERY_PAGE
def test_every_block_runs(page: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "film.mp4").symlink_to(film)
    logging.disable_progress_bar()
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.needs is None and block.language == "python":
            lines = "\n" * block.line + block.text  # errors name the page's own lines
            exec(compile(lines, str(page), "exec"), names)
        elif block.needs is None and block.language == "bash":
            run_shell(block)


def run_shell(block: Block) -> None:
    """The lines of a block that are statekv's, inside this process."""
    for command, *arguments in block.commands:
        if command != "statekv":
            assert command in OTHER_COMMANDS, f"{block}: {command}"
            continue
        found = CliRunner().invoke(cli.app, arguments, input="", catch_exceptions=False)
        assert found.exit_code == 0, f"{block}: statekv {arguments}: {found.output}"
        assert found.output, f"{block}: statekv {arguments} said nothing"


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
