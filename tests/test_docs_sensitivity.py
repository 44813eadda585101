"""docs/how-much-can-i-prune.md runs as it stands, prints what it says it prints, and draws the pictures that it shows.

python tests/test_docs_sensitivity.py        runs it and writes what it prints and draws into docs/
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import DOCS, check_links, check_page, rewrite

PAGE = DOCS / "how-much-can-i-prune.md"


def test_pictures_and_links_of_the_page_exist() -> None:
    check_links(PAGE, at_least=8)


def test_page_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_page(PAGE, tmp_path, at_least=10)


if __name__ == "__main__":
    rewrite(PAGE)
