"""From curves to ratios and widths: by the rules' naive loops, and by trying all combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur import tradeoffs
from secateur.budgets import Problem, ladder_of, meet
from secateur.core import Budget, Group
from secateur.costs import Cost, evaluate, evaluate_many, make_cost
from secateur.errors import BadRequest, Unreachable, WrongModel
from secateur.plans import fingerprint
from secateur.sensitivities import GroupCurve, Sensitivity
from secateur.sensitivities.choice import losses, ratios_from

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def kept(channels: int, ratios: Sequence[float] = RATIOS) -> tuple[int, ...]:
    return tuple(max(1, math.floor(channels * (1 - ratio) + 1e-9)) for ratio in ratios)


def found(curves: dict[str, tuple[str, int, Sequence[float]]], dense: float = 0.9) -> Sensitivity:
    """``{group: (stage, channels, scores)}``."""
    made = tuple(GroupCurve(name, n, stage, kept(n), tuple(scores)) for name, (stage, n, scores) in curves.items())
    return Sensitivity({}, "l1", RATIOS, dense, made)


EXAMPLE = found(
    {
        "a1": ("8x8", 10, (0.90, 0.90, 0.89, 0.70, 0.10)),
        "a2": ("8x8", 10, (0.90, 0.88, 0.87, 0.86, 0.10)),
        "a3": ("8x8", 10, (0.60, 0.90, 0.90, 0.90, 0.90)),
        "a4": ("8x8", 10, (0.91, 0.88, 0.60, 0.89, 0.10)),
        "b1": ("4x4", 20, (0.90, 0.90, 0.90, 0.90, 0.88)),
        "fc": ("1", 8, (0.2, 0.2, 0.2, 0.2, 0.1)),
    }
)


# Ratios ----------------------------------------------------------------------------------------------------------


def test_the_largest_ratio_up_to_which_the_score_never_fell_further() -> None:
    assert ratios_from(EXAMPLE, tolerance=0.02) == {
        "a1": 0.5, "a2": 0.3, "a3": 0.0, "a4": 0.3, "b1": 0.9, "fc": 0.0,
    }  # fmt: skip
    assert ratios_from(EXAMPLE, tolerance=0) == {"a1": 0.3, "a2": 0.1, "a3": 0.0, "a4": 0.1, "b1": 0.7, "fc": 0.0}
    assert ratios_from(EXAMPLE, tolerance=0.8)["fc"] == 0.9


def test_a_tolerance_is_met_although_differences_of_scores_are_not_exact() -> None:
    assert 0.93 - 0.91 > 0.02
    curve = found({"a": ("1", 10, (0.91, 0.9, 0, 0, 0))}, dense=0.93)
    assert ratios_from(curve, tolerance=0.02) == {"a": 0.1}


def test_one_ratio_a_stage_and_what_disagrees_is_skipped() -> None:
    ratios = ratios_from(EXAMPLE, tolerance=0.02, per="stage")
    assert ratios == {"a1": 0.3, "a2": 0.3, "a3": 0.0, "a4": 0.3, "b1": 0.9, "fc": 0.0}
    few = ratios_from(EXAMPLE, tolerance=0.02, per="stage", quorum=0.25)
    assert few == {"a1": 0.5, "a2": 0.0, "a3": 0.0, "a4": 0.0, "b1": 0.9, "fc": 0.0}
    assert ratios_from(EXAMPLE, tolerance=0.02, per="stage", quorum=1)["a1"] == 0.0


def test_what_is_skipped_stays_whole_and_has_no_say() -> None:
    ratios = ratios_from(EXAMPLE, tolerance=0.02, per="stage", quorum=1, skip=("a3", "b*"))
    assert ratios == {"a1": 0.3, "a2": 0.3, "a3": 0.0, "a4": 0.3, "b1": 0.0, "fc": 0.0}
    assert ratios_from(EXAMPLE, tolerance=0.02, skip="a*")["a1"] == 0.0
    assert ratios_from(EXAMPLE, tolerance=0.02, skip="*") == dict.fromkeys([c.group for c in EXAMPLE.curves], 0.0)


SCORES = st.lists(st.sampled_from([0.5, 0.8, 0.85, 0.88, 0.9, 0.92]), min_size=5, max_size=5)
CURVES = st.lists(st.tuples(st.sampled_from(["8x8", "4x4"]), SCORES), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(CURVES, st.sampled_from([0.0, 0.02, 0.05, 0.1]), st.sampled_from([0.25, 0.5, 0.7, 1.0]))
def test_ratios_are_those_of_the_naive_rule(curves: Any, tolerance: float, quorum: float) -> None:
    made = found({f"g{i}": (stage, 10, scores) for i, (stage, scores) in enumerate(curves)})

    def within(curve: GroupCurve, ratio: float) -> bool:
        upto = [s for r, s in zip(RATIOS, curve.scores, strict=True) if r <= ratio]
        return all(0.9 - s <= tolerance + 1e-9 for s in upto)

    for curve in made.curves:
        largest = max([r for r in RATIOS if within(curve, r)], default=0.0)
        assert ratios_from(made, tolerance=tolerance)[curve.group] == largest
    staged = ratios_from(made, tolerance=tolerance, per="stage", quorum=quorum)
    for stage in {curve.stage for curve in made.curves}:
        members = [curve for curve in made.curves if curve.stage == stage]
        agreed = [r for r in RATIOS if sum(within(c, r) for c in members) >= quorum * len(members) - 1e-9]
        for curve in members:
            assert staged[curve.group] == (max(agreed) if agreed and within(curve, max(agreed)) else 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1 is not a number of 0 or more\n  do: say how far .* 0.02 is two points"),
        ({"tolerance": True}, "tolerance=True is not a number"),
        ({"tolerance": math.nan}, "tolerance=nan is not a number"),
        ({"tolerance": "0.1"}, "tolerance='0.1' is not a number"),
        ({"tolerance": 2}, "more than the dense network's whole score, 0.9000\n  do: .* 2 points of accuracy are 0.02"),
        ({"tolerance": 0.1, "per": "layer"}, "per='layer' means nothing; known: 'group', 'stage'"),
        ({"tolerance": 0.1, "quorum": 0}, r"quorum=0 is not a fraction in \(0, 1\]: it says how many of a stage"),
        ({"tolerance": 0.1, "skip": "a9"}, "skip: no group that was measured .* 'a9'; did you mean 'a4'"),
        ({"tolerance": 0.1, "skip": [3]}, "skip: 3 is not a group's name or a glob"),
    ],
)
def test_requests_that_mean_nothing(options: Any, match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        ratios_from(EXAMPLE, **options)


# Losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_linear_between_what_was_measured_and_never_fall() -> None:
    table = losses(found({"a": ("1", 10, (0.91, 0.8, 0.85, 0.5, 0.4))}))["a"]
    drop = {10: 0.0, 9: 0.0, 7: 0.1, 5: 0.1, 3: 0.4, 1: 0.5}
    assert math.isinf(table[0])
    for width, lost in drop.items():
        assert table[width] == pytest.approx(lost, rel=1e-9, abs=1e-12)
    for low, high in itertools.pairwise(sorted(drop)):
        for width in range(low, high):
            expected = drop[low] + (drop[high] - drop[low]) * (width - low) / (high - low)
            assert table[width] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_losses_of_few_channels_and_few_ratios() -> None:
    table = losses(found({"a": ("1", 3, (0.8, 0.7, 0.6, 0.5, 0.4)), "one": ("1", 1, (0.9,) * 5)}))
    np.testing.assert_allclose(table["a"], [np.inf, 0.5, 0.2, 0.0])  # 0.7 and 0.9 keep one, 0.1 and 0.3 keep two
    np.testing.assert_array_equal(table["one"], [np.inf, 0.0])
    narrow = Sensitivity({}, "l1", (0.25,), 0.9, (GroupCurve("a", 8, "1", (6,), (0.7,)),))
    np.testing.assert_allclose(losses(narrow)["a"], [np.inf] * 6 + [0.2, 0.1, 0.0])


# Budgets ---------------------------------------------------------------------------------------------------------


def chain(groups: Sequence[Group], areas: Sequence[int]) -> Cost:
    """MACs of a chain of 3x3 convolutions, three channels in, ten classes out."""
    terms: list[Any] = [(27.0 * areas[0], [(0, {0: 1})])]
    terms += [(9.0 * areas[i], [(0, {i - 1: 1}), (0, {i: 1})]) for i in range(1, len(groups))]
    return make_cost([*terms, (10.0, [(0, {len(groups) - 1: 1})])])


def drawn(channels: Sequence[int], seed: int) -> tuple[tuple[Group, ...], Cost, Sensitivity]:
    """A chain of groups and made-up curves: plateaus, cliffs, and scores that rise again."""
    rng = np.random.default_rng(seed)
    groups = tuple(Group(f"g{i}", n, ()) for i, n in enumerate(channels))
    curves = {}
    for group in groups:
        scores = 0.9 - np.sort(rng.random(5)) ** rng.integers(1, 5) * rng.random() + 0.02 * rng.standard_normal(5)
        curves[group.name] = ("1", group.channels, np.round(scores, 2).tolist())
    return groups, chain(groups, rng.integers(1, 6, len(channels)).tolist()), found(curves)


def met(groups: Sequence[Group], cost: Cost, curves: Sensitivity, budget: Budget, **options: Any) -> np.ndarray:
    width = np.array([g.channels for g in groups])
    scores = {g.name: torch.zeros(g.channels) for g in groups}
    ladder = ladder_of(groups, budget.min_channels, budget.round_to)
    problem = Problem(groups, scores, cost, width, np.ones(len(groups), dtype=bool), ladder)
    return meet(problem, budget, "global", 0, (), losses=losses(curves), **options)


def best_of_all(
    groups: Sequence[Group], cost: Cost, curves: Sensitivity, budget: Budget, target: float
) -> float | None:
    """The least sum of losses within [0.99, 1.00] of the budget; None where nothing is."""
    table = losses(curves)
    options = [
        [
            k
            for k in range(1, g.channels + 1)
            if np.isfinite(table[g.name][k])
            and (k == g.channels or (k % budget.round_to == 0 and k >= budget.min_channels))
        ]
        for g in groups
    ]
    widths = np.array(list(itertools.product(*options)))
    costs = evaluate_many(cost, widths)
    lost = sum(table[g.name][widths[:, i]] for i, g in enumerate(groups))
    near = (costs <= target) & (costs >= 0.99 * target)
    return float(lost[near].min()) if near.any() else None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 14), min_size=1, max_size=3),
    st.integers(0, 999),
    st.floats(0.1, 1.0),
    st.sampled_from([1, 1, 2, 3]),
    st.integers(1, 3),
)
def test_the_least_loss_is_that_of_all_combinations(
    channels: list[int], seed: int, fraction: float, round_to: int, low: int
) -> None:
    groups, cost, curves = drawn(channels, seed)
    budget = Budget(keep=fraction, round_to=round_to, min_channels=low)
    target = fraction * evaluate(cost, np.array(channels))
    best = best_of_all(groups, cost, curves, budget, target)
    try:
        widths = met(groups, cost, curves, budget)
    except Unreachable:
        assert best is None
        return
    assert evaluate(cost, widths) <= target
    table = losses(curves)
    lost = sum(table[g.name][k] for g, k in zip(groups, widths, strict=True))
    assert np.isfinite(lost)
    if best is not None:
        assert evaluate(cost, widths) >= 0.99 * target or widths.tolist() == channels
        assert lost <= best + 1e-12


def test_of_many_combinations_the_search_mostly_finds_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = []
    for seed in range(16):
        rng = np.random.default_rng(seed)
        groups, cost, curves = drawn(rng.integers(10, 20, 3).tolist(), seed)
        fraction = float(rng.uniform(0.3, 0.9))
        target = fraction * evaluate(cost, np.array([g.channels for g in groups]))
        best = best_of_all(groups, cost, curves, Budget(keep=fraction), target)
        with monkeypatch.context() as patch:
            patch.setattr(tradeoffs, "FEW", 0)
            widths = met(groups, cost, curves, Budget(keep=fraction))
        assert evaluate(cost, widths) <= target
        table = losses(curves)
        lost = sum(table[g.name][k] for g, k in zip(groups, widths, strict=True))
        if best is not None:
            assert evaluate(cost, widths) >= 0.99 * target
            gaps.append(float(lost - best))
    assert len(gaps) > 10
    assert sum(gap < 1e-9 for gap in gaps) >= 0.8 * len(gaps)
    assert min(gaps) > -1e-9


@pytest.mark.parametrize(
    "fraction", [0.5, pytest.param(0.3, marks=pytest.mark.slow), pytest.param(0.8, marks=pytest.mark.slow)]
)
def test_a_deep_network_meets_its_budget_and_no_exchange_of_channels_helps(fraction: float) -> None:
    groups, cost, curves = drawn([16] * 9 + [32] * 9 + [64] * 9, 3)
    target = fraction * evaluate(cost, np.array([g.channels for g in groups]))
    widths = met(groups, cost, curves, Budget(keep=fraction))
    assert 0.99 * target <= evaluate(cost, widths) <= target
    table = [losses(curves)[g.name] for g in groups]
    for giver, taker in itertools.permutations(range(len(groups)), 2):
        for step in (1, 2, 4):
            other = widths.copy()
            other[giver] -= step
            while other[taker] < groups[taker].channels and evaluate(cost, other) <= target:
                other[taker] += 1
            other[taker] -= evaluate(cost, other) > target
            if other[giver] >= 1 and other[taker] >= widths[taker]:
                before = table[giver][widths[giver]] + table[taker][widths[taker]]
                assert table[giver][other[giver]] + table[taker][other[taker]] >= before - 1e-9


def test_what_costs_nothing_goes_before_what_costs_something() -> None:
    groups = tuple(Group(f"g{i}", 20, ()) for i in range(2))
    curves = found({"g0": ("1", 20, (0.9, 0.9, 0.9, 0.9, 0.9)), "g1": ("1", 20, (0.8, 0.7, 0.6, 0.5, 0.4))})
    cost = make_cost([(1.0, [(0, {0: 1})]), (1.0, [(0, {1: 1})])])
    assert met(groups, cost, curves, Budget(keep=0.6)).tolist() == [4, 20]


def test_groups_that_were_not_analysed_stay_whole_and_bound_what_can_be_reached() -> None:
    groups = tuple(Group(f"g{i}", 20, ()) for i in range(2))
    cost = make_cost([(1.0, [(0, {0: 1})]), (1.0, [(0, {1: 1})])])
    curves = found({"g0": ("1", 20, (0.9, 0.8, 0.7, 0.6, 0.5))})
    assert met(groups, cost, curves, Budget(keep=0.75)).tolist() == [10, 20]
    with pytest.raises(Unreachable) as raised:
        met(groups, cost, curves, Budget(keep=0.5))
    assert str(raised.value) == (
        "no choice of channels has at most 20 macs, 0.5000 of the dense network\n"
        "  reachable: 22 to 40 macs, 0.5500 to 1.0000\n"
        "  bounded by: one channel of every group stays; no group is narrower than the sensitivity analysis has tried "
        "it; 1 of 2 groups were not analysed ('g1')\n"
        "  do: ask for a budget in that range, or loosen what bounds it"
    )


def test_losses_of_another_width_are_told() -> None:
    groups = (Group("g0", 16, ()),)
    cost = make_cost([(1.0, [(0, {0: 1})])])
    with pytest.raises(
        BadRequest, match="'g0' has 16 channels, and its losses are known for 20\n  do: measure the sens"
    ):
        met(groups, cost, found({"g0": ("1", 20, (0.9,) * 5)}), Budget(keep=0.5))


# On a network ----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5),
    ).eval()  # fmt: skip


def test_a_plan_by_sensitivity_keeps_the_least_loss_of_all_widths() -> None:
    model, example = network(), torch.zeros(1, 3, 8, 8)
    curves = Sensitivity(
        fingerprint(model), "l1", RATIOS, 0.9,
        tuple(
            GroupCurve(name, n, "8x8", kept(n), scores)
            for name, n, scores in [
                ("0", 8, (0.9, 0.85, 0.8, 0.6, 0.2)),
                ("2", 12, (0.9, 0.9, 0.89, 0.85, 0.5)),
                ("4", 10, (0.9, 0.88, 0.87, 0.5, 0.3)),
            ]
        ),
    )  # fmt: skip
    plan = sc.plan(model, example, budget=sc.Budget(keep=0.5), sensitivity=curves)
    dense = sc.count(model, example).macs
    assert 0.99 * 0.5 * dense <= sc.count(sc.apply(model, plan), example).macs <= 0.5 * dense
    table = losses(curves)
    lost = sum(table[name][len(indices)] for name, indices in plan.keep.items())

    def macs(a: int, b: int, c: int) -> int:
        return 64 * 9 * (3 * a + a * b + b * c) + 5 * c

    assert macs(8, 12, 10) == dense
    every = itertools.product(range(1, 9), range(1, 13), range(1, 11))
    near = [widths for widths in every if 0.495 * dense <= macs(*widths) <= 0.5 * dense]
    assert lost == pytest.approx(min(sum(table[n][k] for n, k in zip("024", w, strict=True)) for w in near), rel=1e-9)


def test_a_sensitivity_of_another_network_is_refused() -> None:
    curves = Sensitivity({"0.weight": (4, 3, 3, 3)}, "l1", RATIOS, 0.9, ())
    with pytest.raises(WrongModel, match=r"0\.weight"):
        sc.plan(network(), torch.zeros(1, 3, 8, 8), budget=sc.Budget(keep=0.5), sensitivity=curves)
