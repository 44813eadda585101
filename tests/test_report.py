"""The HTML report: complete, self-contained, and right in its arithmetic."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import BadArtifact
from secateur.operations import Layer
from secateur.report import Report, Row, environment, filter_norms, layer_rows, render, write_report
from secateur.report.content import Curve
from secateur.report.page import change, short_bytes, short_count

VOID = {"meta", "br", "img", "link", "input", "hr"}


def layer(name: str, channels: int, macs: int, params: int) -> Layer:
    return Layer(name, "conv", 3, channels, 1, (3, 3), (8, 8), macs, params)


def example() -> Report:
    dense = [layer("a", 16, 1000, 100), layer("b<i>", 32, 2000, 200)]
    small = [layer("a", 12, 750, 75), layer("b<i>", 16, 500, 50)]
    return Report(
        title="A net & its <half>",
        rows=[Row("dense", 300, 3000, 0.99, 1200, 0.5), Row("pruned", 125, 1250, 0.97, 500, 0.25)],
        layers=layer_rows(dense, small),
        norms={"a": np.array([1.0, 0.5]), "b<i>": np.array([1.0, 0.9, 0.1])},
        law={"largest difference": "1.0e-16"},
        facts={"criterion": "l1"},
        environment=environment(),
        command="secateur demo",
    )


class Balanced(HTMLParser):
    """Fails on a closing tag that closes nothing; collects ids and what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        links = [values.get(key) or "" for key in ("src", "href", "xlink:href", "data")]
        self.fetched += [link for link in links if link and not link.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained() -> None:
    text = render(example())
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert parser.fetched == []
    assert "<link" not in text
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(parser.ids) == len(set(parser.ids))
    references = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    assert references <= set(parser.ids)
    assert text.count("<svg") == 3


def test_page_says_what_happened() -> None:
    text = render(example())
    assert "A net &amp; its &lt;half&gt;" in text
    assert "b<i>" not in text
    for expected in ("−58.3 %", "2.00 ×", "−2.00 points", "16 → 12", "97.00 %", "1.0e-16", "secateur demo", "3,000"):
        assert expected in text, expected


def test_the_row_it_was_all_for_is_compared() -> None:
    report = replace(example(), rows=[*example().rows, Row("scratch", 125, 1250, 0.5)])
    assert "−49.00 points" in render(report)
    assert "−2.00 points" in render(replace(report, final="pruned"))


def test_curves_of_every_training_are_drawn() -> None:
    curves = [Curve("dense", [2.0, 1.0, 0.5], [0.25, None, 0.75]), Curve("fine-<i>tuned", [0.5], [None])]
    text = render(replace(example(), curves=curves))
    assert text.count("<svg") == 4
    assert "fine-&lt;i&gt;tuned" in text
    assert "validation accuracy, %" in text
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))


def test_page_follows_the_readers_theme() -> None:
    text = render(example())
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert not re.search("#0[1-9a-e]0[1-9a-e]0[1-9a-f]", text), "a stand-in colour was left"


def test_what_was_not_measured_is_left_out() -> None:
    bare = Report("t", [Row("dense", 10, 20), Row("pruned", 5, 10)], [], {})
    text = render(bare)
    assert "<svg" not in text
    assert "Speed" not in text
    assert "The check" not in text


def test_layer_rows_pair_by_name_and_add_repeated_calls() -> None:
    dense = [layer("a", 8, 100, 10), layer("shared", 4, 50, 5), layer("shared", 4, 50, 5), layer("gone", 2, 7, 3)]
    rows = layer_rows(dense, [layer("shared", 2, 10, 2), layer("shared", 2, 10, 2), layer("a", 8, 100, 10)])
    assert [(r.name, r.channels, r.macs, r.params) for r in rows] == [
        ("a", (8, 8), (100, 100), (10, 10)),
        ("shared", (4, 2), (100, 20), (5, 2)),
        ("gone", (2, 0), (7, 0), (3, 0)),
    ]
    assert rows[0].map_size == "8x8"


def test_filter_norms_are_sorted_and_relative() -> None:
    conv = nn.Conv2d(1, 3, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -4.0, 2.0])[:, None, None, None])
    norms = filter_norms(nn.Sequential(conv, nn.Linear(3, 3)))
    assert list(norms) == ["0"]
    np.testing.assert_array_equal(norms["0"], [1.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9,999"), (12_345, "12.3 k"), (270_896, "271 k"), (41_500_000, "41.5 M"), (4.09e9, "4.09 G")],
)
def test_short_count(number: float, text: str) -> None:
    assert short_count(number) == text


def test_short_bytes_and_change() -> None:
    assert [short_bytes(n) for n in (12, 1200, 56_700, 1_100_000)] == ["12 B", "1.20 kB", "56.7 kB", "1.10 MB"]
    assert [change(200, n) for n in (100, 300, 200)] == ["−50.0 %", "+50.0 %", "±0.0 %"]


def test_writing_leaves_one_file_or_none(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", example())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadArtifact, match="cannot be written"):
        write_report(tmp_path / "taken" / "report.html", example())
    (tmp_path / "folder" / "report.html").mkdir(parents=True)
    with pytest.raises(BadArtifact, match="cannot be written"):
        write_report(tmp_path / "folder" / "report.html", example())
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["report.html"]
