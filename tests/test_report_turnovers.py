"""The picture of zeroed filters from choice to choice: right in what it draws and tells, in words too."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from secateur.core import Turnover
from secateur.report import Report, Row, Zeroed, render, standalone, turnover_figure, write_report
from secateur.report.turnovers import COLUMNS, NAMED, SHADES, listed, row_text, summary, tallies
from test_report import Balanced
from test_report_sensitivity import BROWSER, near, shot

Box = tuple[int, float, float, float]

ZEROED = Zeroed(
    {"stem": 8, "a<1>": 10, "untouched": 4},
    (
        Turnover(0, {"stem": (0, 1), "a<1>": (2, 3, 4, 5)}, {}),
        Turnover(1, {"stem": (2, 3), "a<1>": (6,)}, {"stem": (0, 1), "a<1>": (2,)}),
        Turnover(2, {"a<1>": (7,)}, {"a<1>": (6,)}),
        Turnover(4, {}, {}),
    ),
)
STABLE = Zeroed({"stem": 8}, (Turnover(0, {"stem": (0, 5)}, {}), Turnover(1, {}, {}), Turnover(2, {}, {})))


def naive_shares(zeroed: Zeroed, group: str) -> list[float]:
    """The share of the zeroed filters that changed, from sets of them."""
    sets: list[set[int]] = [set()]
    for choice in zeroed.history:
        sets.append((sets[-1] | set(choice.entered.get(group, ()))) - set(choice.left.get(group, ())))
    return [max(len(now - then), len(then - now)) / len(now) for then, now in pairwise(sets[1:])]


def boxes(svg: str) -> list[Box]:
    """``(shade, left, right, middle)`` of every rectangle that is drawn, in the plot's own coordinates."""
    root, found = ET.fromstring(re.sub(r' xmlns="[^"]+"', "", svg, count=1)), []
    for group in root.iter("g"):
        match = re.search(r"-shade(\d)$", group.get("id", ""))
        if match:
            for part in (next(group.iter("path")).get("d") or "").split("z")[:-1]:
                x, y = np.array([pair.split() for pair in re.findall(r"[ML] (\S+ \S+)", part)], dtype=float).T
                found.append((int(match[1]), x.min(), x.max(), y.mean()))
    return found


def made(groups: int, choices: int, every: int = 1) -> Zeroed:
    """Groups of eight filters of which two are zero, one of which moves on at every so many choices."""
    start = {f"layer{i}": (0, 1) for i in range(groups)}

    def choice(epoch: int) -> Turnover:
        turn, rest = divmod(epoch, every)
        came, went = (dict.fromkeys(start, (place % 8,)) for place in (turn + 1, turn - 1))
        return Turnover(epoch, {}, {}) if rest else Turnover(epoch, came, went)

    return Zeroed(dict.fromkeys(start, 8), (Turnover(0, start, {}), *map(choice, range(1, choices))))


def page(zeroed: Zeroed) -> Report:
    return Report("t", [Row("dense", 10, 20, 0.9), Row("pruned", 5, 10, 0.8)], [], {}, zeroed=zeroed)


# What is told ----------------------------------------------------------------------------------------------------


def test_what_became_of_each_group() -> None:
    stem, other = tallies(ZEROED)
    assert (stem.group, stem.channels, stem.first, stem.last) == ("stem", 8, (0, 1), (2, 3))
    assert (stem.entered, stem.left, stem.changed, stem.settled) == (2, 2, (0, 1, 2, 3), 1)
    assert (other.first, other.last) == ((2, 3, 4, 5), (3, 4, 5, 7))
    assert (other.entered, other.left, other.changed, other.settled) == (2, 2, (2, 6, 7), 2)
    for tally in (stem, other):
        np.testing.assert_allclose(tally.shares, naive_shares(ZEROED, tally.group))
    assert tallies(STABLE)[0].settled is None


def test_a_part_that_grows_is_what_came_in() -> None:
    grown = Zeroed({"a": 8}, (Turnover(0, {}, {}), Turnover(1, {"a": (1, 2)}, {}), Turnover(2, {"a": (5,)}, {})))
    (tally,) = tallies(grown)
    assert (tally.first, tally.last, tally.entered, tally.left) == ((), (1, 2, 5), 3, 0)
    np.testing.assert_allclose(tally.shares, [1, 1 / 3])


def test_it_is_told_in_words() -> None:
    assert summary(ZEROED) == (
        "4 choices of the filters that are zero, in 2 groups. After the first, filters changed in 2 of the groups, for "
        "the last time after 2 epochs; most in stem, where 33 % of the zeroed filters changed from one choice to the "
        "next."
    )
    assert summary(STABLE) == (
        "3 choices of the filters that are zero, in 1 group. After the first none of them changed."
    )
    once = Zeroed({"a": 4}, (Turnover(0, {"a": (1,)}, {}),))
    assert summary(once).endswith("There was no second choice to change any.")
    assert row_text(tallies(ZEROED)[0], 3) == (
        "stem: 2 of 8 filters zero in the end, changed in 1 of 3 choices after the first, last after epoch 1"
    )
    assert row_text(tallies(STABLE)[0], 2) == "stem: 2 of 8 filters zero in the end, the same in all choices"
    assert listed(()) == "–"
    assert listed(tuple(range(NAMED))) == ", ".join(map(str, range(NAMED)))
    assert listed(tuple(range(NAMED + 3))).endswith(f"{NAMED - 1} and 3 more")


# What is drawn ---------------------------------------------------------------------------------------------------


def test_every_change_is_drawn_at_its_place_in_its_shade() -> None:
    found = boxes(turnover_figure(ZEROED))
    assert sorted(shade for shade, *_ in found) == [2, 5]  # two in a row of one shade are one rectangle
    width = min(right - left for _, left, right, _ in found)
    start, rows = min(box[1] for box in found), sorted({round(box[3], 3) for box in found})
    drawn = [
        (shade, round((left - start) / width) + place, rows.index(round(y, 3)))
        for shade, left, right, y in found
        for place in range(round((right - left) / width))
    ]
    wanted = [
        (int(np.ceil(share * SHADES - 1e-9)), column, row)
        for row, tally in enumerate(tallies(ZEROED))
        for column, share in enumerate(tally.shares)
        if share
    ]
    assert sorted(drawn) == sorted(wanted)
    assert len(wanted) == 3


def test_it_has_a_text_alternative_and_a_tip_for_every_row() -> None:
    svg = turnover_figure(ZEROED)
    assert 'role="img"' in svg
    assert f'<title id="turnover-title">{summary(ZEROED)}</title>' in svg
    titles = [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")]
    assert titles[1:] == [row_text(tally, 3) for tally in tallies(ZEROED)]
    texts = " ".join(ET.fromstring(svg).itertext())
    for expected in ("stem", "a<1>", "to 20 %", "to 100 %", "epochs over when it was chosen"):
        assert expected in texts
    assert "untouched" not in texts


def test_a_stable_choice_is_drawn_as_nothing() -> None:
    svg = turnover_figure(STABLE)
    assert boxes(svg) == []
    assert "After the first none of them changed." in svg


def test_many_choices_share_columns() -> None:
    choices = 3 * COLUMNS + 1
    often, seldom = (boxes(turnover_figure(made(2, choices, every))) for every in (1, 3))
    assert [shade for shade, *_ in often] == [3, 3]  # half of the zeroed filters at every choice
    assert [shade for shade, *_ in seldom] == [1, 1]  # at every third, which is a sixth
    assert [box[1:] for box in often] == [box[1:] for box in seldom]


# On the page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_it_with_a_table() -> None:
    text = render(page(ZEROED))
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    assert text.count("<svg") == 3  # trade-off for wide and for narrow screens, turnover
    assert "<h2>Zeroed filters from choice to choice</h2>" in text
    assert f'<p class="soft">{summary(ZEROED)}</p>' in text
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]
    table = [row for row in rows if row and row[0].startswith("<code>")]
    assert table == [
        ["<code>stem</code>", "8", "2", "2", "2", "2", "epoch 1", "0, 1, 2, 3"],
        ["<code>a&lt;1&gt;</code>", "10", "4", "4", "2", "2", "epoch 2", "2, 6, 7"],
    ]


def test_nothing_is_drawn_of_nothing() -> None:
    assert "eroed filters" not in render(replace(page(ZEROED), zeroed=None))
    never = Zeroed({"a": 4}, (Turnover(0, {}, {}), Turnover(1, {}, {})))
    assert "eroed filters" not in render(page(never))
    once = render(page(Zeroed({"a": 4}, (Turnover(0, {"a": (1,)}, {}),))))
    assert "from choice to choice" not in once
    assert "group by group" in once


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")
def test_a_browser_paints_it(tmp_path: Path) -> None:
    zeroed = made(groups=6, choices=12)
    path = write_report(tmp_path / "report.html", page(zeroed))
    colours = Counter(map(tuple, shot(path, tmp_path / "page.png").reshape(-1, 3).tolist()))
    shade = [255 + 3 / SHADES * (ink - 255) for ink in (0x2F, 0x7D, 0x55)]
    assert (
        sum(n for own, n in colours.items() if max(abs(a - b) for a, b in zip(own, shade, strict=True)) <= 3) > 30_000
    )
    alone = tmp_path / "turnover.svg"
    alone.write_text(standalone(turnover_figure(zeroed)))
    colours = Counter(map(tuple, shot(alone, tmp_path / "alone.png", size="1000,400").reshape(-1, 3).tolist()))
    assert near(colours, shade) > 30_000
