"""Accuracy against cost: which networks no other beats, where their names stand, and what is drawn."""

import re

import numpy as np
import pytest

from secateur.report import Row
from secateur.report.fronts import (
    MEGA_MACS,
    MILLISECONDS,
    front,
    front_figure,
    has_front,
    is_stretched,
    points_of,
    spread,
)

DENSE = Row("dense", 10, 8_000_000, 0.9, latencies_ms={"torch": 5.0, "openvino": 2.0})
PRUNED = Row("pruned", 5, 4_000_000, 0.85, latencies_ms={"torch": 1.0})
LOST = Row("lost", 5, 4_000_000, None, latencies_ms={"torch": 1.0})
PLAIN = Row("<plain>", 5, 4_000_000, 0.8)


def beaten(points: list[tuple[float, float]]) -> set[int]:
    """Those that some other one beats, by the definition."""
    return {
        i
        for i, (cost, worth) in enumerate(points)
        if any(c <= cost and w >= worth and (c < cost or w > worth) for c, w in points)
    }


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = [(float(c), float(w)) for c, w in rng.integers(0, 6, (rng.integers(1, 9), 2))]
        found = front(points)
        kept = [points[i] for i in found]
        assert kept == sorted(set(kept))  # from the cheapest on, equal ones once
        assert set(kept) == {points[i] for i in range(len(points)) if i not in beaten(points)}


def test_names_are_pushed_apart_and_stay_in_order() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])
    assert spread([], 0.1) == []
    rng = np.random.default_rng(1)
    for _ in range(200):
        heights = rng.random(rng.integers(1, 9)).tolist()
        found = spread(heights, 0.1)
        order = sorted(range(len(heights)), key=lambda i: heights[i])
        gaps = np.diff([found[i] for i in order])
        assert (gaps >= 0.1 - 1e-12).all()
        assert min(found) >= -1e-12
        assert max(found) <= 1 + 1e-12


def test_points_are_networks_whose_accuracy_and_cost_are_known() -> None:
    runs = {"": [DENSE, PRUNED, LOST, PLAIN]}
    timed = points_of(runs, {"": "pruned"}, MILLISECONDS)
    assert [(point.row.name, point.x, point.first, point.last) for point in timed] == [
        ("dense", 2.0, True, False), ("pruned", 1.0, False, True),
    ]  # fmt: skip
    assert [point.x for point in points_of(runs, {}, MEGA_MACS)] == [8, 4, 4]
    assert [point.last for point in points_of(runs, {}, MEGA_MACS)] == [False, False, True]


def test_there_is_nothing_to_draw_of_one_cost() -> None:
    assert has_front({"": [DENSE, PRUNED]})
    assert not has_front({"": [DENSE, LOST]})
    assert not has_front({"a": [PLAIN], "b": [PLAIN]})


def test_small_errors_are_stretched() -> None:
    good, bad = Row("good", 1, 1, 0.999), Row("bad", 1, 2, 0.5)
    assert is_stretched({"": [good, bad]})
    assert not is_stretched({"": [DENSE, PRUNED, PLAIN]})
    svg = front_figure({"": [bad, good, Row("right", 1, 3, 1.0)]}, {})
    assert "<!-- 99.8 -->" in svg or ">99.8<" in svg
    heights = [float(y) for y in re.findall(r'<g id="front-point0-\d+">.*?<use [^>]*?y="([\d.]+)"', svg, re.DOTALL)]
    assert heights[0] > heights[1] > heights[2]
    errors = -np.log10([50.0, 0.1, 0.02])
    np.testing.assert_allclose(np.diff(heights) / np.diff(errors), np.diff(heights)[0] / np.diff(errors)[0], rtol=1e-4)


def test_the_figure_draws_and_tells_every_point() -> None:
    runs = {"one": [DENSE, PRUNED], "two<": [DENSE, PLAIN]}
    svg = front_figure(runs, {"one": "pruned", "two<": "<plain>"}, name="f")
    assert "two&lt;, &lt;plain&gt;: 80.00 %, 4.00 M MACs" in svg
    assert "one, pruned: 85.00 %, 4.00 M MACs, 1.00 ms in PyTorch" in svg
    assert "<plain>" not in svg
    assert len(re.findall(r'<g id="f-point0-\d+">', svg)) == 3  # with a latency
    assert len(re.findall(r'<g id="f-point1-\d+">', svg)) == 4
    assert "latency in the fastest engine, ms" in svg
    bare = front_figure({"": [PLAIN, Row("p", 1, 1, 0.7)]}, {})
    assert "latency" not in bare
