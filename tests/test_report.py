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
from secateur.report import Report, Row, Whole, environment, filter_norms, layer_rows, render, write_report
from secateur.report.answers import Card, cards, change, lead, ms_text, short_bytes, short_count, speed_text, times
from secateur.report.content import Curve

VOID = {"meta", "br", "img", "link", "input", "hr"}


def layer(name: str, channels: int, macs: int, params: int) -> Layer:
    return Layer(name, "conv", 3, channels, 1, (3, 3), (8, 8), macs, params)


def example() -> Report:
    dense = [layer("a", 16, 1000, 100), layer("b<i>", 32, 2000, 200)]
    small = [layer("a", 12, 750, 75), layer("b<i>", 16, 500, 50)]
    return Report(
        title="A net & its <half>",
        rows=[
            Row("dense", 300, 3000, 0.99, 1200, {"torch": 2.0, "openvino": 0.5}, 640),
            Row("pruned", 125, 1250, 0.97, 500, {"torch": 0.8, "openvino": 0.25}, 320),
        ],
        layers=layer_rows(dense, small),
        norms={"a": np.array([1.0, 0.5]), "b<i>": np.array([1.0, 0.9, 0.1])},
        whole=[Whole(("fc", "a"), 42, "it is <locked>"), Whole(("b<i>",), 32, "left alone", locked=False)],
        images=100,
        timing="median of 9 runs.",
        law={"largest difference": "1.0e-16"},
        facts={"criterion": "l1"},
        environment=environment(),
        command="secateur demo",
    )


class Balanced(HTMLParser):
    """Fails on a closing tag that closes nothing; collects ids, what is fetched, and what labels or holds anything."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.named: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        links = [values.get(key) or "" for key in ("src", "href", "xlink:href", "data")]
        self.named += (values.get("aria-labelledby") or "").split()
        self.fetched += [link for link in links if link and not link.startswith(("#", "data:image/png;base64,"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text() -> str:
    return render(example())


def check(text: str) -> Balanced:
    """The page closes what it opens, fetches nothing, and every id is there once."""
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert parser.fetched == []
    assert len(parser.ids) == len(set(parser.ids))
    references = set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) | set(parser.named)
    assert references <= set(parser.ids)
    for part in ("<link", "<script", "@import"):
        assert part not in text
    assert not re.search(r"url\((?!#)", text)
    return parser


def test_page_is_whole_and_self_contained(text: str) -> None:
    check(text)
    assert text.count("<svg") == 8  # trade-off, engines, widths, norms, each for wide and for narrow screens


def test_every_picture_has_a_title_and_says_its_figures(text: str) -> None:
    assert text.count('<svg role="img" aria-labelledby=') == text.count("<svg")
    titles = re.findall(r"<title id=.*?>(.*?)</title><desc id=.*?>(.*?)</desc>", text)
    assert len(titles) == text.count("<svg")
    told = dict(titles)
    assert told["Channels of each layer, dense and kept"] == "a 12 of 16; b&lt;i&gt; 16 of 32."
    assert "pruned in OpenVINO: 0.250 ms" in told["Latency of the networks in every engine"]
    assert (
        "pruned: 97.00 %, 1,250 MACs, 0.250 ms in OpenVINO" in told["Accuracy of every network against what it costs"]
    )


def test_page_says_what_happened(text: str) -> None:
    assert "A net &amp; its &lt;half&gt;" in text
    assert "b<i>" not in text
    expected = "−58.3 %", "2.00 × faster", "−2.00 points", "16 → 12", "97.00 %", "1.0e-16", "secateur demo", "3,000"
    for each in (*expected, "<b>locked:</b> it is &lt;locked&gt;", "320 B", "median of 9 runs", "one is 1.00 points"):
        assert each in text, each


def test_the_answer_comes_first(text: str) -> None:
    answer = text[text.index('<p class="lead">') :]
    answer = re.sub("<.*?>", "", answer[: answer.index("</p>")])
    assert answer == (
        "The pruned network takes 41.7 % of the MACs and 41.7 % of the parameters of the dense one, runs 2.00 × "
        "faster, and gets 97.00 % of the test images right, 2.00 points fewer."
    )
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings[:3] == ["Networks", "Accuracy against cost", "Speed in every engine"]
    assert headings[-1] == "Where it was measured"


def test_the_row_it_was_all_for_is_compared() -> None:
    dense, pruned, scratch = *example().rows, Row("scratch", 125, 1250, 0.5)
    report = replace(example(), rows=[dense, pruned, scratch])
    assert report.outcome is scratch
    assert replace(report, final="pruned").outcome is pruned
    assert report.dense is dense


def test_curves_of_every_training_are_drawn() -> None:
    curves = [Curve("dense", [2.0, 1.0, 0.5], [0.25, None, 0.75]), Curve("fine-<i>tuned", [0.5], [None])]
    bare = Report("t", [Row("dense", 10, 20), Row("pruned", 5, 10)], [], {}, curves=curves)
    text = render(bare)
    assert text.count("<svg") == 2
    assert "fine-&lt;i&gt;tuned" in text
    assert "dense, 3 epochs: loss from 2 to 0.5, validation accuracy from 25.0 to 75.0 %." in text
    assert "validation accuracy, %" in text
    check(text)


def test_page_follows_the_readers_theme(text: str) -> None:
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert not re.search("#0[1-9a-e]0[1-9a-e]0[1-9a-f]", text), "a stand-in colour was left"


def test_cards_compare_fastest_with_fastest() -> None:
    dense = Row("dense", 100, 1000, latencies_ms={"torch": 3.0, "openvino": 1.0})
    small = Row("small", 50, 1000, latencies_ms={"torch": 0.8, "onnxruntime": 1.6})
    found = {card.what: card for card in cards(dense, small)}
    note = "from OpenVINO to PyTorch, the fastest for each"
    assert found["Speed"] == Card("Speed", "1.25 × faster", "1.00 → 0.800 ms", note, 0.8, good=True)
    assert found["Parameters"] == Card("Parameters", "−50.0 %", "100 → 50", share=0.5, good=True)
    assert found["MACs"].good is None
    assert "Accuracy" not in found
    assert speed_text([dense, small], small) == (
        "Fastest against fastest: dense takes 1.00 ms in OpenVINO, small 0.800 ms in PyTorch."
    )
    slow = replace(small, latencies_ms={"torch": 1.5, "openvino": 2.0})
    assert next(card for card in cards(dense, slow) if card.what == "Speed").change == "1.50 × slower"
    assert speed_text([dense, slow], slow).endswith(
        "In one and the same engine small is between 0.50 (OpenVINO) and 2.00 times (PyTorch) as fast."
    )


def test_the_worse_is_told_as_such() -> None:
    found = cards(Row("dense", 10, 20, 0.9, memory=5), Row("wider", 20, 20, 0.8, memory=10), images=5000)
    assert {card.what: card.good for card in found} == {
        "Accuracy": False, "MACs": None, "Parameters": False, "Peak of activations": False,
    }  # fmt: skip
    assert next(card.note for card in found) == "of 5,000 test images"
    said = "".join(plain + loud for plain, loud in lead(Row("dense", 10, 20, 0.9), Row("same", 10, 20, 0.90001)))
    assert said.endswith("gets 90.00 % of the test images right, as many as before.")


def test_numbers_of_times() -> None:
    assert [ms_text(ms) for ms in (0.0419, 0.999, 1.0, 12.34, 123.4, 1234.5)] == [
        "0.042", "0.999", "1.00", "12.3", "123", "1,234",
    ]  # fmt: skip
    assert [times(2, new) for new in (1, 4, 2.001)] == ["2.00 × faster", "2.00 × slower", "as fast"]


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
    told = Report("t", [Row("dense", 10, 20)], [], {})
    path = write_report(tmp_path / "new" / "report.html", told)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadArtifact, match="cannot be written"):
        write_report(tmp_path / "taken" / "report.html", told)
    (tmp_path / "folder" / "report.html").mkdir(parents=True)
    with pytest.raises(BadArtifact, match="cannot be written"):
        write_report(tmp_path / "folder" / "report.html", told)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["report.html"]
