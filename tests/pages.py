"""Pages of the documentation that run as one session, print what they say they print, and draw what they show.

A block of ``text`` is what the block of Python before it prints; the one block of ``sh`` holds commands that come after
all of it. Training ends with other weights on another processor; then the first numbers differ, and of all that follows
only the words are compared.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

import torch
from typer.testing import CliRunner

from secateur.cli import app

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(?P<source>.*?)^```$(?:\n\n^```text\n(?P<text>.*?)^```$)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def run_page(page: Path) -> list[tuple[str, str]]:
    """What every block of the page should print, and what it prints, run in the current folder as one session."""
    session: dict[str, object] = {"__name__": "document"}
    told = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block["source"], page.name, "exec"), session)
        told.append((block["text"] or "", out.getvalue()))
    return told


def run_commands(page: Path) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "secateur"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output


def words(text: str) -> list[str]:
    """The words of a text; numbers are all alike."""
    return NUMBER.sub("0", text).split()


def pictures(page: Path) -> list[str]:
    return sorted(re.findall(r"\]\(images/(.*?\.svg)\)", page.read_text(encoding="utf-8")))


def check_links(page: Path, at_least: int) -> None:
    """Every file and every heading that the page links to is there; it has at least so many links."""
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^##+ (.*)$", text, re.M)
    }
    links = re.findall(r"\]\((?!https?:)(.*?)\)", text)
    assert len(links) >= at_least
    for link in links:
        file, _, anchor = link.partition("#")
        assert (DOCS / file).exists() if file else anchor in headings, link


def check_page(page: Path, folder: Path, at_least: int) -> None:
    """The page, run in ``folder``, the current one, prints what it says, in at least so many places, and draws what it
    shows."""
    told = run_page(page)
    run_commands(page)
    assert sum(bool(said) for said, _ in told) >= at_least
    for said, printed in told:
        assert words(printed) == words(said)
    assert pictures(page) == sorted(path.name for path in folder.glob("*.svg"))
    if told[0][0] == told[0][1]:  # the same weights
        assert "".join(printed for _, printed in told) == "".join(said for said, _ in told)
        for name in pictures(page):
            assert (folder / name).read_text() == (DOCS / "images" / name).read_text()


def rewrite(page: Path) -> None:
    """Runs the page, and writes what it prints and draws into ``docs/``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = iter([text for _, text in run_page(page)])
        for picture in Path(folder).glob("*.svg"):
            (DOCS / "images" / picture.name).write_text(picture.read_text())

    def told(block: re.Match[str]) -> str:
        text = next(printed)
        return f"```python\n{block['source']}```" + (f"\n\n```text\n{text}```" if text else "")

    page.write_text(BLOCK.sub(told, page.read_text(encoding="utf-8")), encoding="utf-8")
