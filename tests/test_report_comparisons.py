"""Several runs or networks on one page."""

import html
import re
from dataclasses import replace

import pytest

from secateur.report import Comparison, Row, compared, render
from secateur.report.comparisons import comparison_sections, shared_layers, verdict
from test_report import check, example


def said(found: Comparison) -> str:
    return "".join(plain + loud for plain, loud in verdict(found))


def runs() -> Comparison:
    one = replace(example(), final="pruned", command="secateur run one.yaml")
    dense, pruned = one.rows
    better = replace(pruned, accuracy=0.98, params=100, latencies_ms={"torch": 0.5})
    return compared({"runs/one": one, "runs/<two>": replace(one, rows=[dense, better])}, command="secateur report a b")


@pytest.fixture(scope="module")
def text() -> str:
    return render(runs())


def test_the_page_of_several_runs_is_whole(text: str) -> None:
    check(text)
    assert text.count('<details class="run"') == 2
    assert "<two>" not in text
    assert "secateur run one.yaml" in text
    assert "secateur report a b" in text
    for run in (1, 2):
        assert f'href="#run{run}"' in text
        assert f'<section id="run{run}-layers">' in text


def test_outcomes_stand_beside_their_own_dense_networks(text: str) -> None:
    table = text[text.index('<section id="networks">') : text.index('<section id="trade-off">')]
    rows = [re.sub("<.*?>|\\s+", " ", row).split() for row in re.findall("<tr.*?</tr>", table, re.DOTALL)][1:]
    assert [row[:2] for row in rows] == [
        ["runs/one", "dense"], ["runs/one", "pruned"], ["runs/&lt;two&gt;", "dense"], ["runs/&lt;two&gt;", "pruned"],
    ]  # fmt: skip
    assert "−66.7" in rows[3]
    assert rows[3][-2:] == ["1.00", "×"]  # 0.5 ms in another engine


def test_the_verdict_names_the_best() -> None:
    assert said(runs()) == (
        "runs/one is the fastest, 2.00 × faster than runs/<two>, runs/<two> the smallest, with 100 parameters and "
        "runs/<two> the most accurate, with 98.00 %."
    )
    networks = {name: [Row(name, params, 10)] for name, params in (("a", 20), ("b", 10), ("c", 30))}
    assert said(Comparison("t", networks)) == "b is the smallest, with 10 parameters."
    assert said(Comparison("t", {"a": networks["a"], "b": [Row("b", 20, 9)]})) == "They cost the same."


def test_networks_are_compared_with_the_first() -> None:
    rows = [Row("a", 100, 10, latencies_ms={"torch": 2.0}), Row("b", 50, 10, latencies_ms={"torch": 1.0})]
    channels = {"a": {"conv": 8, "own": 4, "fc": 2}, "b": {"fc": 2, "conv": 6}}
    found = Comparison("a, b", {row.name: [row] for row in rows}, channels=channels, timing="median of 3 runs.")
    assert found.dense("b") is rows[0]
    assert found.outcome("b") is rows[1]
    assert shared_layers(found) == [("conv", [8, 6]), ("fc", [2, 2])]
    assert [part.key for part in comparison_sections(found)] == ["networks", "speed", "widths"]
    text = render(found)
    check(text)
    assert "Changes are against a; speed is fastest against fastest." in text
    assert "Latencies: median of 3 runs." in text
    assert '<td class="other">6</td>' in text
    assert text.count('<td class="other">') == 1
    assert "−50.0 %" in text


@pytest.mark.parametrize("name", ["$\\frac$", "$x_1$", "_own", "<b>", "100 %"])
def test_any_name_will_do(name: str) -> None:
    rows = [Row(f"{name} {place}", 100, 10, 0.9, latencies_ms={"torch": 1.0 + place}) for place in (0, 1)]
    text = render(Comparison(name, {row.name: [row] for row in rows}))
    check(text)
    assert html.unescape(text).count(f"{name} 1") >= 8
