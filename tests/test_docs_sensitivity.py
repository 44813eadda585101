"""docs/how-much-can-i-prune.md runs as it stands, prints what it says it prints, and draws the pictures that it shows.

    python tests/test_docs_sensitivity.py        runs it and writes what it prints and draws into docs/

A block of ``text`` is what the block of Python before it prints. Training ends with other weights on another processor;
then the first numbers differ, and of all that follows only the words are compared.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from secateur.cli import app

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "how-much-can-i-prune.md"
BLOCK = re.compile(r"^```python\n(?P<source>.*?)^```$(?:\n\n^```text\n(?P<text>.*?)^```$)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def run_page() -> list[tuple[str, str]]:
    """What every block of the page should print, and what it prints, run in the current folder as one session."""
    session: dict[str, object] = {"__name__": "document"}
    told = []
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block["source"], PAGE.name, "exec"), session)
        told.append((block["text"] or "", out.getvalue()))
    return told


def run_commands() -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "secateur"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output


def words(text: str) -> list[str]:
    """The words of a text; numbers are all alike."""
    return NUMBER.sub("0", text).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


def test_pictures_and_links_of_the_page_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^##+ (.*)$", text, re.M)
    }
    links = re.findall(r"\]\((?!https?:)(.*?)\)", text)
    assert len(links) >= 8
    for link in links:
        file, _, anchor = link.partition("#")
        assert (DOCS / file).exists() if file else anchor in headings, link


def test_page_runs_and_prints_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    told = run_page()
    run_commands()
    assert sum(bool(said) for said, _ in told) >= 10
    for said, printed in told:
        assert words(printed) == words(said)
    pictures = sorted(re.findall(r"\]\(images/(.*?\.svg)\)", PAGE.read_text(encoding="utf-8")))
    assert pictures == sorted(path.name for path in folder.glob("*.svg"))
    if told[0][0] == told[0][1]:  # the same weights
        assert "".join(printed for _, printed in told) == "".join(said for said, _ in told)
        for name in pictures:
            assert (folder / name).read_text() == (DOCS / "images" / name).read_text()


def rewrite() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = iter([text for _, text in run_page()])
        for picture in Path(folder).glob("*.svg"):
            (DOCS / "images" / picture.name).write_text(picture.read_text())

    def told(block: re.Match[str]) -> str:
        text = next(printed)
        return f"```python\n{block['source']}```" + (f"\n\n```text\n{text}```" if text else "")

    PAGE.write_text(BLOCK.sub(told, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
