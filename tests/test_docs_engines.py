"""docs/engines.md runs as it stands and prints what it says it prints, but for the numbers.

python tests/test_docs_engines.py        runs it and writes what it prints into docs/
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import DOCS, check_links, rewrite, run_commands, run_page, words

PAGE = DOCS / "engines.md"


def test_links_of_the_page_lead_somewhere() -> None:
    check_links(PAGE, at_least=7)


@pytest.mark.filterwarnings("ignore:the network takes:secateur.SecateurWarning")  # on a busy machine
def test_page_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    told = run_page(PAGE)
    assert sum(bool(said) for said, _ in told) == 4
    for said, printed in told:
        assert words(printed) == words(said)
    run_commands(PAGE)
    assert (tmp_path / "page.html").exists()


if __name__ == "__main__":
    rewrite(PAGE)
