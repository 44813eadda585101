"""docs/int8.md runs as it stands and prints what it says it prints.

python tests/test_docs_int8.py        runs it and writes what it prints into docs/
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import DOCS, check_links, check_page, rewrite

PAGE = DOCS / "int8.md"


def test_links_of_the_page_lead_somewhere() -> None:
    check_links(PAGE, at_least=6)


@pytest.mark.slow
def test_page_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    check_page(PAGE, tmp_path, at_least=3)


if __name__ == "__main__":
    rewrite(PAGE)
