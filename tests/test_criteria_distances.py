"""FPGM and its relatives against naive loops of their formulas, on sound and on bad input."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.core import GroupView
from secateur.criteria import CRITERIA, fpgm_mix_with, fpgm_with, needs_width, reads
from secateur.criteria.medians import median_of
from secateur.criteria.mixtures import by_norm
from secateur.errors import BadRequest, CannotPrune, SecateurWarning

EUCLIDEAN = ("fpgm", "fpgm_mix", "geometric_median", "similarity", "whc")
ALL = (*EUCLIDEAN, "fpgm_l1", "fpgm_cosine")


def shown(filters: Tensor, n_keep: int | None = None) -> GroupView:
    empty = filters[:, :0]
    return GroupView("g", filters, empty, empty, n_keep=n_keep)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def removed(scores: Tensor, count: int) -> list[int]:
    """The ``count`` lowest; of equal scores the higher index goes."""
    return sorted(sorted(range(len(scores)), key=lambda j: (float(scores[j]), -j))[:count])


def minkowski(a: Tensor, b: Tensor, p: float) -> float:
    apart = [abs(x - y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return max(apart) if math.isinf(p) else sum(d**p for d in apart) ** (1 / p)


def angle(a: Tensor, b: Tensor) -> float:
    long = math.sqrt(sum(x * x for x in a.tolist())) * math.sqrt(sum(x * x for x in b.tolist()))
    return 1 - sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / long if long else 0.0


# --------------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("p", [1, 1.5, 2, 3.0, math.inf])
@pytest.mark.parametrize("block", [7, 2**22])
def test_minkowski_sums_equal_the_naive_loop(p: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.criteria.sums.BLOCK", block)
    rows = torch.cat([random(7, 9), random(7, 9)[:2], torch.zeros(2, 9, dtype=torch.float64)])
    want = [sum(minkowski(a, b, p) for b in rows) for a in rows]
    assert fpgm_with(distance=p)(shown(rows)).tolist() == pytest.approx(want, rel=1e-12)
    name = {1: "fpgm_l1", 2: "fpgm"}.get(p)
    if name:
        assert torch.equal(CRITERIA[name](shown(rows)), fpgm_with(distance=p)(shown(rows)))


@pytest.mark.parametrize("p", [200, 1000.0, 1e300])
def test_powers_of_small_weights_do_not_vanish(p: float) -> None:
    rows = 1e-3 * random(6, 9)
    largest = 1e-2  # what is divided by it has powers in range; from 1000 on the largest difference is all that counts
    scaled = [[max(abs(x - y) for x, y in zip(a, b, strict=True)) for b in rows.tolist()] for a in rows.tolist()]
    want = [sum(each) for each in scaled]
    if p < 1000:
        want = [largest * sum(minkowski(a / largest, b / largest, p) for b in rows) for a in rows]
    assert fpgm_with(distance=p)(shown(rows)).tolist() == pytest.approx(want, rel=1e-2 if p == 1000 else 1e-9)


def test_filters_of_zeros_go_before_the_only_ones_with_a_direction() -> None:
    rows = torch.zeros(5, 4, dtype=torch.float64)
    rows[3] = torch.tensor([1.0, 2.0, 0.0, -1.0])
    assert removed(CRITERIA["fpgm_cosine"](shown(rows)), 4) == [0, 1, 2, 4]
    rows[4] = 2 * rows[3]
    assert removed(CRITERIA["fpgm_cosine"](shown(rows)), 3) == [0, 1, 2]


def test_cosine_sums_equal_the_naive_loop_and_the_most_alike_go_first() -> None:
    rows = torch.cat([random(6, 9), 3 * random(6, 9)[:1], -random(6, 9)[1:2], torch.zeros(2, 9, dtype=torch.float64)])
    want = [sum(angle(a, b) for b in rows) for a in rows]
    assert fpgm_with(distance="cosine")(shown(rows)).tolist() == pytest.approx(want, rel=1e-12)
    assert CRITERIA["fpgm_cosine"](shown(rows)).tolist() == pytest.approx(want, rel=1e-12)
    assert removed(CRITERIA["fpgm_cosine"](shown(rows)), 2) == [8, 9]  # zeros
    bundle = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [-1.0, 2.0]], dtype=torch.float64)
    assert removed(CRITERIA["fpgm_cosine"](shown(bundle)), 1) == [0]  # like all others, the one far away included
    assert removed(CRITERIA["fpgm_cosine"](shown(bundle)), 3) == [0, 1, 2]


def test_cosine_distances_of_nearly_parallel_filters_keep_their_digits() -> None:
    rows = random(1, 30) + 1e-7 * random(5, 30, seed=1)
    units = [(row / row.norm()) for row in rows]
    want = [sum(float((a - b).square().sum()) / 2 for b in units) for a in units]
    assert CRITERIA["fpgm_cosine"](shown(rows)).tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("distance", ["manhattan", 0.5, 0, -1, math.nan, True, None, "1"])
def test_what_is_no_distance(distance: object) -> None:
    with pytest.raises(
        BadRequest, match=r"distance=.* is no distance between filters\n  do: take 'euclidean', 'cosine'"
    ):
        fpgm_with(distance=distance)  # type: ignore[arg-type]


def test_factories_say_what_they_made() -> None:
    assert fpgm_with(distance=1).__name__ == "fpgm_with(distance=1)"  # type: ignore[attr-defined]
    assert fpgm_mix_with().__name__ == "fpgm_mix_with(norm=0.1, distance=0.3)"  # type: ignore[attr-defined]
    assert reads(fpgm_with()) == reads(fpgm_mix_with()) == ("filters",)
    assert [name for name in CRITERIA if needs_width(name)] == ["fpgm_mix"]
    assert needs_width(fpgm_mix_with(norm=0.2))
    assert not needs_width(fpgm_with())


def wide_layer(channels: int, size: int) -> Tensor:
    """float32 filters of which some are equal, some nearly, some zero, some long."""
    rows = random(channels, size) * (0.5 + torch.rand(channels, 1, generator=torch.Generator().manual_seed(1)))
    rows[5:9] = rows[4]
    rows[20:60] = 0
    rows[100:110] = rows[99] + 1e-6 * rows[100:110]
    rows[200] *= 100
    return rows.float()


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_wide_layers_are_ordered_as_in_float64(offset: float) -> None:
    rows = wide_layer(700, 40) + offset
    exact = (rows.double()[:, None] - rows.double()).square().sum(2).sqrt().sum(1)
    found = CRITERIA["fpgm"](shown(rows))
    assert float((found / exact - 1).abs().max()) < 1e-6
    order = found.argsort(stable=True)
    assert bool((exact[order].diff() >= -1e-9 * exact.mean()).all())
    assert float(found[4:9].max()) == float(found[4:9].min())  # equal filters score the same
    assert float(found[20:60].max()) == float(found[20:60].min())
    assert removed(found, 280) == removed(exact.round(decimals=6), 280)


def test_sums_that_float32_cannot_tell_apart_are_taken_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters around two far points: in float32 all sums look the same. Without the last step this fails."""
    middle = torch.zeros(600, 3)
    middle[:300, 0], middle[300:, 0] = 1000, -1000
    rows = middle + 1e-3 * random(600, 3).float()
    exact = (rows.double()[:, None] - rows.double()).square().sum(2).sqrt().sum(1)
    assert CRITERIA["fpgm"](shown(rows)).tolist() == pytest.approx(exact.tolist(), rel=1e-13)
    monkeypatch.setattr("secateur.criteria.sums._settled", lambda rough, filters, counts: rough)
    assert CRITERIA["fpgm"](shown(rows)).argsort().tolist() != exact.argsort().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_compared_in_float64(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3)).to(dtype)
    rows = net[0].weight.detach().double().flatten(1)
    plan = sc.plan(net, torch.randn(1, 3, 8, 8, dtype=dtype), criterion="fpgm", ratios={"0": 0.5})
    scores = CRITERIA["fpgm"](shown(rows))
    assert set(range(12)) - set(plan.keep["0"]) == set(removed(scores, 6))


# ------------------------------------------------------------------------------------------------------- true median


def median_by_descent(rows: Tensor) -> Tensor:
    """Weiszfeld's iteration and nothing else, for filters that it does not hit."""
    x = rows.mean(0)
    for _ in range(2_000):
        weights = 1 / (rows - x).norm(dim=1)
        x = (weights @ rows) / weights.sum()
    return x


@pytest.mark.parametrize("shape", [(5, 2), (8, 3), (30, 20), (16, 27)])
def test_the_median_is_that_of_plain_iteration(shape: tuple[int, int]) -> None:
    rows = random(*shape, seed=2)
    want = median_by_descent(rows)
    assert median_of(rows).tolist() == pytest.approx(want.tolist(), rel=1e-8, abs=1e-9)
    assert CRITERIA["geometric_median"](shown(rows)).tolist() == pytest.approx((rows - want).norm(dim=1).tolist())


@pytest.mark.parametrize("seed", range(40))
def test_no_point_around_the_median_is_better(seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    channels, size = (int(torch.randint(low, 9, (1,), generator=make)) for low in (3, 1))
    rows = random(channels, size, seed=seed) * random(channels, 1, seed=seed + 99).exp() ** 2
    rows[: int(torch.randint(0, 3, (1,), generator=make))] = rows[-1]  # some occur several times
    found = median_of(rows)
    best = float((rows - found).norm(dim=1).sum())
    tries = [found + step * d for step in (1e-3, 1e-5) for d in (*torch.eye(size).double(), *-torch.eye(size).double())]
    for point in (*tries, *rows, rows.mean(0)):
        assert best <= float((rows - point).norm(dim=1).sum()) * (1 + 1e-13)


@pytest.mark.parametrize("degrees", [1, 0.1, 1e-2, 1e-4, 1e-6])
def test_a_median_close_to_a_filter_is_found_by_newtons_steps(degrees: float) -> None:
    """Three filters whose angle is a little less than 120 degrees: the median is as close to the middle one."""
    turn = math.radians(120 - degrees)
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [math.cos(turn), math.sin(turn)]], dtype=torch.float64)
    towards = rows - median_of(rows)
    if degrees > 1e-5:
        assert float(towards[0].norm()) > 0
        pull = (towards / towards.norm(dim=1, keepdim=True)).sum(0)
        assert float(pull.norm()) < 1e-9
    assert float(towards[0].norm()) < math.radians(degrees)


def test_a_median_that_is_a_filter_is_found_exactly() -> None:
    wide = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.6, 0.8], [0.0, 0.0]], dtype=torch.float64)
    assert median_of(wide[:3]).tolist() == [0, 0]  # an angle of more than 120 degrees
    assert median_of(wide).tolist() == [0, 0]  # two of four are there
    zeros = torch.cat([random(20, 30), torch.zeros(21, 30, dtype=torch.float64)])
    assert median_of(zeros).tolist() == [0] * 30


def test_medians_that_are_not_unique() -> None:
    assert median_of(random(1, 6)).tolist() == random(1, 6)[0].tolist()
    two = random(2, 6)
    assert median_of(two).tolist() == pytest.approx(two.mean(0).tolist(), rel=1e-14)
    line = torch.tensor([[-3.0], [0.0], [1.0], [7.0]], dtype=torch.float64) * random(1, 5)
    assert median_of(line).tolist() == pytest.approx((0.5 * random(1, 5)[0]).tolist(), rel=1e-12)
    odd = line[1:]
    assert median_of(odd).tolist() == pytest.approx(random(1, 5)[0].tolist(), rel=1e-12)
    same = random(1, 5).expand(4, 5)
    assert torch.equal(median_of(same), same[0])
    assert CRITERIA["geometric_median"](shown(same)).tolist() == [0, 0, 0, 0]
    near = line + 1e-7 * random(4, 5, seed=3)
    best = (near - median_of(near)).norm(dim=1).sum()
    assert float(best) <= float((near[:, None] - near).norm(dim=2).sum(1).min()) * (1 + 1e-13)


def test_a_search_that_does_not_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.criteria.medians.STEPS", 2)
    with pytest.raises(CannotPrune, match=r"of 5 filters was not found in 2 steps: .*\n  do: take 'fpgm', which needs"):
        median_of(random(5, 3))


def test_both_choose_nearly_the_same_of_gaussian_filters() -> None:
    """He et al. replace the median by the filters near it; on a layer of 64 x 576 nearly all picks of 40 % agree."""
    same = []
    for seed in range(8):
        view = shown(random(64, 576, seed=seed))
        true = removed(CRITERIA["geometric_median"](view), 26)
        same.append(len({*true} & {*removed(CRITERIA["fpgm"](view), 26)}))
    assert sum(same) / len(same) >= 24


# ----------------------------------------------------------------------------------------------------------- mixture


def mixed(rows: Tensor, by_size: int, by_distance: int) -> list[int]:
    """As the paper's code has it: the smallest norms first, then the smallest sums among those left."""
    norms = [float(row.norm()) for row in rows]
    small = sorted(range(len(rows)), key=lambda j: norms[j])[:by_size]
    left = [j for j in range(len(rows)) if j not in small]
    sums = {j: sum(float((rows[j] - rows[k]).norm()) for k in left) for j in left}
    return sorted([*small, *sorted(left, key=lambda j: sums[j])[:by_distance]])


def around_a_point(channels: int) -> Tensor:
    """Filters of which the shortest are not in the middle."""
    return random(channels, 12, seed=channels) + 3


@pytest.mark.parametrize(("norm", "distance"), [(0.1, 0.3), (0.3, 0.1), (0.25, 0.0), (0.0, 0.4), (0.5, 0.5)])
@pytest.mark.parametrize("channels", [10, 16, 33])
def test_the_mixture_is_the_papers_set(norm: float, distance: float, channels: int) -> None:
    rows = around_a_point(channels)
    by_size, by_distance = math.floor(channels * norm + 1e-9), math.floor(channels * distance + 1e-9)
    criterion = fpgm_mix_with(norm=norm, distance=distance)
    total = by_size + by_distance
    for n_keep in (None, channels - total):
        assert removed(criterion(shown(rows, n_keep)), total) == mixed(rows, by_size, by_distance)


def test_the_mixtures_shares_follow_what_goes() -> None:
    rows = around_a_point(40)
    chosen = {r: removed(CRITERIA["fpgm_mix"](shown(rows, 40 - r)), r) for r in (1, 4, 12, 21, 39)}
    assert chosen == {r: mixed(rows, r // 4, r - r // 4) for r in chosen}
    assert chosen[21] != removed(CRITERIA["fpgm_mix"](shown(rows)), 21)
    assert chosen[12] != removed(CRITERIA["fpgm"](shown(rows)), 12)


def test_how_many_go_by_their_norm() -> None:
    for channels, (norm, distance) in itertools.product(
        range(1, 130), [(0.1, 0.3), (0.3, 0.1), (0.2, 0.5), (0.7, 0.1)]
    ):
        first, second = (math.floor(channels * rate + 1e-9) for rate in (norm, distance))
        assert by_norm(channels, norm, distance, first + second) == by_norm(channels, norm, distance) == first
        assert [by_norm(channels, norm, distance, r) <= r for r in range(channels)] == [True] * channels
    assert by_norm(10, 0.7, 0.3) == 7  # 0.7 * 10 is 7.000000000000001, and 0.1 * 3 * 10 is not 3
    assert by_norm(10, 1 - 0.9, 0.3) == 1  # 1 - 0.9 is 0.09999999999999998
    assert [by_norm(10, 0.2, 0.0, r) for r in (0, 3, 10)] == [0, 3, 10]
    assert [by_norm(10, 0.0, 0.2, r) for r in (0, 3, 10)] == [0, 0, 0]
    assert [by_norm(10, 1e-320, 0.2, r) for r in (0, 3, 10)] == [0, 0, 0]


def test_scores_of_the_mixture_are_in_order_even_where_distances_say_nothing() -> None:
    equal = torch.ones(10, 3)
    scores = fpgm_mix_with(norm=0.3, distance=0.3)(shown(equal))
    assert removed(scores, 3) == [7, 8, 9]
    assert scores.tolist() == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    all_by_norm = fpgm_mix_with(norm=1.0, distance=0.0)(shown(torch.arange(1.0, 6)[:, None]))
    assert removed(all_by_norm, 2) == [0, 1]
    assert bool((all_by_norm > 0).all())


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        (
            {"norm": 0.8, "distance": 0.3},
            r"norm=0.8 and distance=0.3 sum to 1.1, .*\n  do: say fractions of all filters",
        ),
        ({"norm": 0.0, "distance": 0.0}, r"sum to 0, "),
        ({"norm": -0.1}, r"norm=-0.1 is not a fraction of the filters, 0 to 1\n  do: say which"),
        ({"distance": 1.5}, r"distance=1.5 is not a fraction"),
        ({"distance": math.nan}, r"distance=nan is not a fraction"),
        ({"norm": "some"}, r"norm='some' is not a fraction"),
        ({"norm": True}, r"norm=True is not a fraction"),
    ],
)
def test_rates_that_are_none(rates: dict[str, float], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        fpgm_mix_with(**rates)


# -------------------------------------------------------------------------------------------------------- similarity


def closest_pairs(rows: Tensor, count: int) -> list[int]:
    left = list(range(len(rows)))
    for _ in range(count):
        a, b = min(itertools.combinations(left, 2), key=lambda pair: float((rows[pair[0]] - rows[pair[1]]).norm()))
        left.remove(min((a, b), key=lambda j: (float(rows[j].norm()), -j)))
    return [j for j in range(len(rows)) if j not in left]


@pytest.mark.parametrize("seed", range(4))
def test_similarity_drops_the_shorter_of_each_closest_pair(seed: int) -> None:
    rows = torch.cat([random(14, 5, seed=seed), random(14, 5, seed=seed)[3:5], torch.zeros(2, 5, dtype=torch.float64)])
    scores = CRITERIA["similarity"](shown(rows))
    for count in range(3, len(rows)):  # one of each of three equal pairs, in whatever order
        assert removed(scores, count) == closest_pairs(rows, count)


def test_similarity_orders_pairs_that_are_equally_far_apart() -> None:
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    scores = CRITERIA["similarity"](shown(square))
    assert len(set(scores.tolist())) == 4
    assert removed(scores, 3) == [0, 1, 2]
    assert scores.tolist() == pytest.approx([1, 1, 1, 1])


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ALL)
def test_one_filter_none_that_differ_and_zeros(name: str) -> None:
    one = CRITERIA[name](shown(torch.ones(1, 4)))
    assert one.shape == (1,)
    assert bool(torch.isfinite(one).all())
    for rows in (torch.zeros(6, 4), torch.full((6, 4), 0.1), torch.full((600, 2), 0.1)):
        scores = CRITERIA[name](shown(rows, len(rows) // 2))
        assert bool(torch.isfinite(scores).all())
        assert removed(scores, len(rows) // 2) == list(range(len(rows) - len(rows) // 2, len(rows)))
    two = CRITERIA[name](shown(torch.tensor([[1.0, 2.0], [3.0, -1.0]])))
    assert bool(torch.isfinite(two).all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_not_written_to(name: str, dtype: torch.dtype) -> None:
    """Our own criteria are shown the user's very tensors."""
    rows = random(600, 9).to(dtype)
    before = rows.clone()
    CRITERIA[name](shown(rows, 300))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("name", ["fpgm", "geometric_median", "whc", "fpgm_cosine", "similarity"])
def test_equal_filters_are_warned_of(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.constant_(net[0].weight, 0.5)
    with pytest.warns(SecateurWarning, match=r"scores all channels of a group the same, in 1 of 1 groups \('0'\)"):
        plan = sc.plan(net, torch.randn(1, 3, 8, 8), criterion=name, ratios={"0": 0.5})
    assert plan.keep["0"] == (0, 1, 2, 3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        net[0].weight[2, 1, 0, 0] = value
    with pytest.raises(CannotPrune, match=r"'0.weight' holds 1 of 216 .* not finite .*\n.* group '0' .*\n  do: load"):
        sc.plan(net, torch.randn(1, 3, 8, 8), criterion=name, ratios={"0": 0.5})


def test_large_and_small_weights_stay_in_range() -> None:
    for scale in (1e30, 1e-30):
        for channels in (20, 600):
            rows = (random(channels, 6).float() * scale).float()
            plain = CRITERIA["fpgm"](shown(random(channels, 6).float()))
            assert CRITERIA["fpgm"](shown(rows)).tolist() == pytest.approx((plain * scale).tolist(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- how many go


class Seen:
    """A criterion that notes how many channels it was told will stay."""

    __name__ = "seen"
    reads: Sequence[str] = ("filters", "n_keep")

    def __init__(self) -> None:
        self.told: list[int | None] = []

    def __call__(self, view: GroupView, /) -> Tensor:
        self.told.append(view.n_keep)
        return view.filters.norm(dim=1)


def test_criteria_are_told_how_many_channels_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 10, 3), nn.ReLU(), nn.Conv2d(10, 4, 3))
    x = torch.randn(1, 3, 12, 12)
    seen = Seen()
    sc.plan(net, x, criterion=seen, ratios=0.4)
    assert seen.told == [12, 6]
    seen = Seen()
    sc.plan(net, x, criterion=seen, ratios={"0": 13})
    assert seen.told == [13]
    seen = Seen()
    plan = sc.plan(net, x, criterion=seen, budget=sc.Budget(keep=0.5))
    widths = [len(plan.keep["0"]), len(plan.keep["2"])]
    assert seen.told == [None, None, *widths]
    seen = Seen()
    seen.reads = ("filters",)
    sc.plan(net, x, criterion=seen, budget=sc.Budget(keep=0.5))
    assert seen.told == [None, None]


def test_a_plan_by_the_mixture_removes_its_set() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 4, 3))
    rows = net[0].weight.detach().double().flatten(1)
    x = torch.randn(1, 3, 12, 12)
    plan = sc.plan(net, x, criterion="fpgm_mix", ratios={"0": 0.6})
    assert sorted(set(range(40)) - set(plan.keep["0"])) == mixed(rows, 6, 18)
    plan = sc.plan(net, x, criterion="fpgm_mix", budget=sc.Budget(keep=0.5, of="channels"))
    gone = sorted(set(range(40)) - set(plan.keep["0"]))
    assert gone == mixed(rows, len(gone) // 4, len(gone) - len(gone) // 4)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "size"),
    [
        *((f"CRITERIA[{name!r}]", 4608) for name in (*ALL, "fpgm_mix")),
        ("fpgm_with(distance=float('inf'))", 1152),
        ("fpgm_with(distance=3)", 64),
    ],
)
def test_a_wide_layer_fits_in_a_gibibyte(made: str, size: int) -> None:
    code = f"""
import resource, torch
from secateur.core import GroupView
from secateur.criteria import CRITERIA, fpgm_with
torch.set_num_threads(1)
criterion = {made}
def shown(w):
    return GroupView("g", w, w[:, :0], w[:, :0])
criterion(shown(torch.randn(64, 32)))
w = torch.randn(4096, {size}, generator=torch.Generator().manual_seed(0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
criterion(shown(w))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    path = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sc.__file__).parent.parent)}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=path)
    assert told.returncode == 0, told.stderr
    print(f"{made}: {int(told.stdout) / 1024:.0f} MiB beyond 4,096 filters of {size} weights")
    assert int(told.stdout) < 2**20  # KiB
