"""Which channels stay: ratios by Li's rule, budgets by property, and the text of every refusal."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import allocate
from secateur.core import Budget, Group, Slice
from secateur.costs import Cost, evaluate, make_cost
from secateur.errors import BadRequest, CannotPrune, Unreachable

LOCKED = (Group("fc", 10, (), locked="it is the network's output"),)


def _groups(*channels: int, partitions: int = 1) -> tuple[Group, ...]:
    return tuple(Group(f"conv{i}", n, (), partitions) for i, n in enumerate(channels))


def _scores(groups: tuple[Group, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.channels, generator=make, dtype=torch.float64) for g in groups}


def _chain(groups: tuple[Group, ...], areas: list[int] | None = None) -> Cost:
    """MACs of a chain of 3x3 convolutions, three channels in, ten classes out."""
    areas = areas or [1] * len(groups)
    terms: list[Any] = [(27.0 * areas[0], [(0, {0: 1})])]
    terms += [(9.0 * areas[i], [(0, {i - 1: 1}), (0, {i: 1})]) for i in range(1, len(groups))]
    return make_cost([*terms, (10.0, [(0, {len(groups) - 1: 1})])])


def _widths(keep: dict[str, tuple[int, ...]]) -> list[int]:
    return [len(kept) for kept in keep.values()]


def _dense(groups: tuple[Group, ...]) -> np.ndarray:
    return np.array([g.channels for g in groups])


# Ratios ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [
        (16, 0.1, 14),
        (32, 0.1, 28),
        (64, 0.1, 57),
        (64, 0.5, 32),
        (10, 0.7, 3),
        (3, 0.9, 1),
        (8, 0, 8),
        (1, 0.5, 1),
        (20, 0.9, 2),
    ],
)
def test_ratios_follow_lis_rule(n: int, ratio: float, kept: int) -> None:
    groups = _groups(n)
    assert _widths(allocate(groups, _scores(groups), ratios=ratio)) == [kept]
    assert _widths(allocate(groups, _scores(groups), ratios={"conv0": ratio})) == [kept]


def test_the_lowest_scores_go_and_of_ties_the_higher_index() -> None:
    groups = _groups(6)
    scores = {"conv0": torch.tensor([3.0, 1.0, 2.0, 1.0, -5.0, 2.0])}
    assert allocate(groups, scores, ratios={"conv0": 3})["conv0"] == (0, 2, 5)
    assert allocate(groups, scores, ratios={"conv0": 4})["conv0"] == (0, 1, 2, 5)
    wide = _groups(300)
    assert allocate(wide, {"conv0": torch.arange(300) % 3 // 2}, ratios={"conv0": 103})["conv0"][:4] == (0, 1, 2, 3)
    assert allocate(wide, {"conv0": torch.zeros(300)}, ratios=0.5)["conv0"] == tuple(range(150))


def test_names_go_before_globs_and_the_first_glob_counts() -> None:
    groups = _groups(10, 10, 10, 10)
    ratios = {"conv[12]": 0.5, "conv*": 0.2, "conv2": 7, "conv3": 0}
    assert _widths(allocate(groups, _scores(groups), ratios=ratios)) == [8, 5, 7, 10]
    assert _widths(allocate(groups, _scores(groups), ratios=ratios, exclude="conv[02]")) == [10, 5, 10, 10]
    assert _widths(allocate(groups, _scores(groups), ratios={"conv1": 0.5}, exclude=("fc",), locked=LOCKED))[0] == 10


@settings(deadline=None)
@given(st.integers(1, 70), st.floats(0, 0.999), st.integers(1, 20), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8]))
def test_ratio_widths_are_bounded_and_rounded_up_in_filters(n: int, ratio: float, low: int, to: int, p: int) -> None:
    groups = _groups(n, partitions=p)
    (width,) = _widths(allocate(groups, _scores(groups), ratios=ratio, min_channels=low, round_to=to))
    plain = max(1, math.floor(n * (1 - ratio) + 1e-9))
    # The smallest width that has enough filters of the writing layer, in multiples; else the dense one.
    allowed = [k for k in range(plain, n) if k * p % to == 0 and k * p >= low]
    assert width == min([*allowed, n])


@settings(deadline=None)
@given(st.integers(2, 40), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_higher_ratio_keeps_a_subset(n: int, a: float, b: float) -> None:
    groups = _groups(n)
    scores = _scores(groups)
    few, many = (set(allocate(groups, scores, ratios=r)["conv0"]) for r in (max(a, b), min(a, b)))
    assert few <= many


# Budgets ---------------------------------------------------------------------------------------------------------

CHAINS = st.tuples(
    st.lists(st.integers(1, 24), min_size=1, max_size=5),
    st.integers(0, 99),
    st.floats(0.05, 1.0),
    st.sampled_from(["global", "uniform"]),
    st.sampled_from([1, 1, 2, 3, 8]),
    st.integers(1, 4),
)


@settings(max_examples=150, deadline=None)
@given(CHAINS)
def test_budgets_are_met_from_below_as_near_as_the_groups_allow(case: Any) -> None:
    channels, seed, fraction, allocation, round_to, low = case
    groups = _groups(*channels)
    scores, cost = _scores(groups, seed), _chain(groups, [1 + (seed + 7 * i) % 5 for i in range(len(channels))])
    budget = Budget(keep=fraction, min_channels=low, round_to=round_to)
    options = [sorted({k for k in range(low, n) if k % round_to == 0} | {n}) for n in channels]
    target = fraction * evaluate(cost, _dense(groups))
    least = evaluate(cost, np.array([o[0] for o in options]))
    if least > target:
        with pytest.raises(Unreachable):
            allocate(groups, scores, budget=budget, cost=cost, allocation=allocation)
        return
    keep = allocate(groups, scores, budget=budget, cost=cost, allocation=allocation)
    assert keep == allocate(groups, scores, budget=budget, cost=cost, allocation=allocation)
    widths = _widths(keep)
    assert all(w in o for w, o in zip(widths, options, strict=True))
    for kept, values in zip(keep.values(), scores.values(), strict=True):
        assert list(kept) == sorted(values.argsort(descending=True, stable=True)[: len(kept)].tolist())
    reached = evaluate(cost, np.array(widths))
    assert reached <= target
    if reached < 0.99 * target and math.prod(len(o) for o in options) <= 3000:
        best = max(c for w in itertools.product(*options) if (c := evaluate(cost, np.array(w))) <= target)
        assert reached == best
    # Nothing that still fits was left out.
    for i, o in enumerate(options):
        if widths[i] < groups[i].channels:
            wider = [*widths[:i], o[o.index(widths[i]) + 1], *widths[i + 1 :]]
            assert evaluate(cost, np.array(wider)) > target or reached >= 0.99 * target


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("of", ["macs", "channels"])
def test_fine_groups_reach_the_budget_and_a_larger_one_never_costs_less(allocation: str, of: Any) -> None:
    groups = _groups(64, 64, 128, 128, 256, 256, partitions=2)
    cost, dense = _chain(groups, [256, 256, 64, 64, 16, 16]), _dense(groups)
    before = 0.0
    for fraction in (0.1, 0.15, 0.3, 0.5, 0.62, 0.9, 1.0):
        budget = Budget(keep=fraction, of=of)
        keep = allocate(groups, _scores(groups), budget=budget, cost=cost, allocation=allocation)
        widths = np.array(_widths(keep))
        reached = evaluate(cost, widths) / evaluate(cost, dense) if of == "macs" else widths.sum() / dense.sum()
        assert 0.99 * fraction <= reached <= fraction
        assert reached >= before
        one_more = widths + np.eye(len(groups), dtype=int)[widths < dense]
        assert of != "macs" or all(evaluate(cost, w) > fraction * evaluate(cost, dense) for w in one_more)
        before = reached


def test_an_absolute_budget_is_in_the_units_of_the_cost() -> None:
    groups = _groups(40, 40, partitions=3)
    keep = allocate(groups, _scores(groups), budget=Budget(at_most=100, of="channels"))
    assert sum(_widths(keep)) == 33  # 99 filters: a channel stands for three
    cost = _chain(groups)
    keep = allocate(groups, _scores(groups), budget=Budget(at_most=5000, of="params"), cost=cost)
    assert 4950 <= evaluate(cost, np.array(_widths(keep))) <= 5000
    keep = allocate(groups, _scores(groups), budget=Budget(at_most=1e9), cost=cost)
    assert _widths(keep) == [40, 40]


@pytest.mark.parametrize(("small", "large", "more"), [(700, 1100, 6590), (500, 1200, 1740)])
def test_coarse_units_are_exchanged_where_too_many_to_try_all(small: int, large: int, more: int) -> None:
    """Two to the sixteenth choices; putting back what fits ends below 0.99, and some exchange of units is nearer."""
    groups = tuple(Group(f"g{i}", 2, (), p) for i, p in enumerate([small] * 8 + [large] * 8))
    scores = {g.name: torch.tensor([1.0, 1.0 + i / 100]) for i, g in enumerate(groups)}
    target = 8 * (small + large) + more
    keep = allocate(groups, scores, budget=Budget(at_most=target, of="channels"))
    reached = sum(g.partitions * len(keep[g.name]) for g in groups)
    assert 0.99 * target <= reached <= target


def test_uniform_takes_the_same_ratio_everywhere() -> None:
    groups = _groups(20, 40, 80, 160)
    keep = allocate(groups, _scores(groups), budget=Budget(keep=0.4), cost=_chain(groups), allocation="uniform")
    ratios = 1 - np.array(_widths(keep)) / _dense(groups)
    steps = 1 / _dense(groups)
    assert max(ratios - steps) < min(ratios + steps)  # one ratio within a channel of all of them
    assert 0.3 < ratios.mean() < 0.5


def test_global_spares_the_group_whose_channels_matter_alike() -> None:
    """Same cost, same mean: the group with many weak channels loses more, whatever the scale of its scores."""
    groups = _groups(20, 20)
    skewed = torch.cat([torch.full((12,), 0.01), torch.full((8,), 5.0)])
    cost = make_cost([(1.0, [(0, {0: 1})]), (1.0, [(0, {1: 1})])])
    plans = [
        allocate(groups, {"conv0": skewed * scale, "conv1": torch.ones(20)}, budget=Budget(keep=0.7), cost=cost)
        for scale in (1.0, 1e-6, 1e6)
    ]
    assert [_widths(p) for p in plans] == [[8, 20]] * 3


def test_global_takes_from_where_a_channel_saves_more() -> None:
    groups = _groups(32, 32)
    cost = make_cost([(100.0, [(0, {0: 1})]), (1.0, [(0, {1: 1})])])
    scores = {g.name: torch.ones(32) for g in groups}
    assert _widths(allocate(groups, scores, budget=Budget(at_most=1632), cost=cost)) == [16, 32]


def test_no_layer_collapses_because_its_channels_are_expensive() -> None:
    """ResNet-56: a channel of the first stage's stream costs 18 convolutions, one inside a block two."""

    def group(name: str, n: int, writers: int) -> Group:
        each = np.arange(n)[:, None]
        return Group(name, n, tuple(Slice(f"{name}.{i}", 0, each, "writes") for i in range(writers)))

    groups = tuple(group(f"stream{s}", 16 << s, 10) for s in range(3))
    groups += tuple(group(f"block{s}.{b}", 16 << s, 1) for s in range(3) for b in range(9))
    terms: list[Any] = [(27.0 * 1024, [(0, {0: 1})])]
    for i in range(27):
        s, area = i // 9, 9.0 * 4 ** (5 - i // 9)
        terms += [(area, [(0, {3 + i: 1}), (0, {max(0, s - (i % 9 == 0)): 1})]), (area, [(0, {3 + i: 1}), (0, {s: 1})])]
    cost = make_cost(terms)
    for fraction, least in ((0.5, 0.4), (0.2, 0.2), (0.05, 0.06)):
        keep = allocate(groups, _scores(groups), budget=Budget(keep=fraction), cost=cost)
        assert min(len(keep[g.name]) / g.channels for g in groups) > least


def test_ratios_fix_some_groups_and_the_budget_is_met_by_the_others() -> None:
    groups = _groups(32, 32, 32, 32)
    cost = _chain(groups)
    keep = allocate(
        groups, _scores(groups), ratios={"conv1": 0.25}, budget=Budget(keep=0.5), cost=cost, exclude=("conv3",)
    )
    assert _widths(keep)[1] == 24
    assert _widths(keep)[3] == 32
    assert 0.495 <= evaluate(cost, np.array(_widths(keep))) / evaluate(cost, _dense(groups)) <= 0.5


@pytest.mark.parametrize("scores", [torch.zeros(8), -torch.arange(8.0), torch.full((8,), 1e-300)])
def test_odd_scores_still_meet_the_budget(scores: torch.Tensor) -> None:
    groups = _groups(8, 8)
    given_ = {"conv0": scores, "conv1": torch.arange(8.0)}
    widths = _widths(allocate(groups, given_, budget=Budget(keep=0.5, of="channels")))
    assert sum(widths) == 8
    assert min(widths) >= 1


def test_budget_and_call_share_their_bounds() -> None:
    groups, cost = _groups(32, 32), _chain(_groups(32, 32))
    one = allocate(groups, _scores(groups), budget=Budget(keep=0.5, round_to=8, min_channels=16), cost=cost)
    two = allocate(groups, _scores(groups), budget=Budget(keep=0.5), cost=cost, round_to=8, min_channels=16)
    assert one == two
    assert all(w % 8 == 0 and w >= 16 for w in _widths(one))


def test_ten_thousand_channels_in_four_hundred_groups_take_a_moment() -> None:
    groups = _groups(*[25] * 400)
    scores, cost = _scores(groups), _chain(groups)
    for allocation in ("global", "uniform"):
        taken_s = []
        for _ in range(3):
            start = time.perf_counter()
            allocate(groups, scores, budget=Budget(keep=0.5), cost=cost, allocation=allocation)
            taken_s.append(time.perf_counter() - start)
        assert min(taken_s) < 0.6  # 0.1 on an idle core


# Steps of each group, and costs that are no polynomials -------------------------------------------------------------


def test_each_group_may_have_steps_of_its_own() -> None:
    groups = _groups(64, 60, 30)
    steps = {"conv0": 16, "conv1": 8}
    assert _widths(allocate(groups, _scores(groups), ratios=0.5, round_to=steps)) == [32, 32, 15]
    assert _widths(allocate(groups, _scores(groups), ratios={"conv1": 56}, round_to=steps)) == [64, 56, 30]
    with pytest.raises(BadRequest, match=r"'conv1' cannot keep 57 of 60 .* 60 and the multiples of 8 from 8 on"):
        allocate(groups, _scores(groups), ratios={"conv1": 57}, round_to=steps)
    budget, cost = Budget(keep=0.4, round_to=12), _chain(groups)
    widths = _widths(allocate(groups, _scores(groups), budget=budget, cost=cost, round_to=steps))
    allowed = [{48, 64}, {24, 48, 60}, {12, 24, 30}]  # multiples of both
    assert all(width in own for width, own in zip(widths, allowed, strict=True))
    assert evaluate(cost, np.array(widths)) <= 0.4 * evaluate(cost, _dense(groups))


class Stairs:
    """Each group costs a tread for every started ``step`` of its channels: within a step, nothing is saved."""

    def __init__(self, treads: list[float], step: int) -> None:
        self.treads, self.step = np.array(treads), step

    def at(self, keep: np.ndarray) -> np.ndarray:
        return np.asarray(np.ceil(keep / self.step) @ self.treads)

    def marginals(self, keep: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.asarray(self.treads * (np.ceil(keep / self.step) - np.ceil((keep - steps) / self.step)))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("by_steps", [False, True])
def test_costs_that_fall_in_steps_are_met_from_below(allocation: str, by_steps: bool) -> None:
    groups, cost = _groups(64, 100, 48, 17), Stairs([3.5, 1.25, 8.0, 2.0], 16)
    dense = evaluate(cost, _dense(groups))
    for fraction in (0.35, 0.5, 0.7, 0.95):
        steps: Any = {g.name: 16 for g in groups} if by_steps else 1
        keep = allocate(
            groups, _scores(groups), budget=Budget(keep=fraction), cost=cost, allocation=allocation, round_to=steps
        )
        widths = np.array(_widths(keep))
        options = [range(16, n + 16, 16) for n in _dense(groups)]
        best = max(c for w in itertools.product(*options) if (c := evaluate(cost, np.array(w))) <= fraction * dense)
        assert evaluate(cost, widths) <= fraction * dense
        # with the steps unknown, no exchange of single channels may lead to the best
        assert evaluate(cost, widths) >= (min(best, 0.99 * fraction * dense) if by_steps else 0.85 * fraction * dense)
        # a step that is paid for is used
        assert all(w == n or (w % 16 == 0) for w, n in zip(widths, _dense(groups), strict=True))


def test_losses_are_least_where_costs_fall_in_steps() -> None:
    groups, cost = _groups(64, 100, 48), Stairs([3.0, 1.0, 8.0], 16)
    losses = {g.name: np.linspace(1.0 + i, 0, g.channels + 1) ** 2 for i, g in enumerate(groups)}
    widths = _widths(allocate(groups, _scores(groups), budget=Budget(keep=0.7), cost=cost, losses=losses))
    target = 0.7 * evaluate(cost, _dense(groups))
    assert evaluate(cost, np.array(widths)) <= target
    for i in range(3):
        wider = [w + (j == i) for j, w in enumerate(widths)]
        assert wider[i] > groups[i].channels or evaluate(cost, np.array(wider)) > target


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({}, "nothing says how much to prune\n  do: give ratios, or a budget"),
        ({"ratios": 1.0}, r"ratios: 1.0 is not a ratio in \[0, 1\)\n  a ratio is the fraction removed"),
        ({"ratios": -0.1}, r"ratios: -0.1 is not a ratio"),
        ({"ratios": math.nan}, r"ratios: nan is not a ratio"),
        ({"ratios": True}, r"ratios: True is not a ratio"),
        ({"ratios": "half"}, r"ratios: 'half' is not a ratio"),
        ({"ratios": 8}, r"ratios: 8 is not a ratio"),
        ({"ratios": {"conv0": 1.5}}, r"ratios\['conv0'\]: 1.5 is not a ratio in \[0, 1\) or a width of 1 or more"),
        ({"ratios": {"conv0": False}}, r"ratios\['conv0'\]: False is not a ratio"),
        ({"ratios": {"conv0": -3}}, r"ratios\['conv0'\]: -3 is not a ratio"),
        ({"ratios": {"conv*": 20}}, r"group 'conv0' has 16 channels: it cannot keep 20"),
        (
            {"ratios": {"conv0": 6}, "round_to": 4},
            r"'conv0' cannot keep 6 of 16 .* 16 and the multiples of 4 from 4 on",
        ),
        ({"ratios": {"conv0": 2}, "min_channels": 3}, r"group 'conv0' cannot keep 2 of 16 channels"),
        ({"ratios": {"cov1": 0.5}}, r"ratios: no group is called, or matches, 'cov1'; did you mean 'conv1'\?"),
        ({"ratios": {3: 0.5}}, r"ratios: 3 is not a group's name or a glob"),
        ({"ratios": 0.5, "exclude": ("layer9.*",)}, r"exclude: no group is called, or matches, 'layer9.\*'; known: "),
        ({"ratios": 0.5, "exclude": "conv9"}, r"exclude: no group is called, or matches, 'conv9'; did you mean 'conv"),
        ({"ratios": 0.5, "allocation": "globl"}, r"there is no allocation 'globl'; did you mean 'global'\?"),
        ({"ratios": 0.5, "round_to": 0}, r"round_to=0 is not a whole number of channels"),
        ({"ratios": 0.5, "min_channels": 1.5}, r"min_channels=1.5 is not a whole number"),
        ({"ratios": 0.5, "budget": Budget(keep=0.5)}, r"ratios=0.5 fixes every group, so nothing is left to meet"),
        ({"budget": 0.5}, r"a budget is a Budget\(keep=... or at_most=...\), not 0.5"),
        ({"budget": Budget()}, r"exactly one of keep .* and at_most .*, not keep=None with at_most=None"),
        ({"budget": Budget(keep=0.5, at_most=9)}, r"exactly one of .* not keep=0.5 with at_most=9"),
        ({"budget": Budget(keep=0.0)}, r"Budget.keep=0.0 is not a fraction in \(0, 1\]: it says what stays"),
        ({"budget": Budget(keep=50)}, r"Budget.keep=50 is not a fraction"),
        ({"budget": Budget(keep=True)}, r"Budget.keep=True is not a fraction"),
        ({"budget": Budget(keep=math.nan)}, r"Budget.keep=nan is not a fraction"),
        ({"budget": Budget(at_most=0)}, r"Budget.at_most=0 is not a positive number of macs"),
        ({"budget": Budget(at_most=math.inf)}, r"Budget.at_most=inf is not a positive number of macs"),
        ({"budget": Budget(keep=0.5, of="flops")}, r"a budget of 'flops' is not known; known: macs, params, channels"),
        ({"budget": Budget(keep=0.5, round_to=8), "round_to": 4}, r"round_to=4 contradicts Budget.round_to=8"),
        ({"budget": Budget(keep=0.5, min_channels=0)}, r"min_channels=0 is not a whole number"),
        ({"budget": Budget(keep=0.5), "cost": None}, r"a budget of macs needs the cost of the network"),
        ({"budget": Budget(keep=0.5, of="memory"), "cost": None}, r"a budget of memory needs the cost of the network"),
        ({"budget": Budget(of="memory")}, r"exactly one of keep \(a fraction\) and at_most \(a number of bytes\)"),
        ({"budget": Budget(at_most=-1, of="memory")}, r"Budget.at_most=-1 is not a positive number of bytes"),
        (
            {"budget": Budget(keep=0.5, of="latency")},
            r"a latency is that of an engine, and Budget.engine is None\n  do: say which, as in Budget\(keep=0.5, of=",
        ),
        (
            {"budget": Budget(at_most=0, of="latency", engine="torch")},
            r"Budget.at_most=0 is not a positive number of milliseconds",
        ),
        (
            {"budget": Budget(keep=0.5, engine="torch")},
            r"Budget.engine='torch' means nothing to a budget of macs, which is counted and not timed\n"
            r"  do: leave engine out, or ask for of='latency'",
        ),
        (
            {"budget": Budget(keep=0.5, of="memory", engine="torch")},
            r"engine='torch' means nothing to a budget of memory",
        ),
        ({"budget": Budget(keep=0.5, of="memory", threads=2)}, r"Budget.threads=2 means nothing to a budget of memory"),
        ({"budget": Budget(keep=0.5, of="params", batch=8)}, r"Budget.batch=8 means nothing to a budget of params"),
        ({"budget": Budget(keep=0.5, of="memory", batch=0)}, r"Budget.batch=0 is not a whole number, 1 or more"),
        ({"budget": Budget(keep=0.5, threads=True)}, r"Budget.threads=True is not a whole number, 1 or more"),
        ({"ratios": 0.5, "round_to": {"conv9": 4}}, r"round_to: there is no group 'conv9'; did you mean 'conv"),
        ({"ratios": 0.5, "round_to": {"conv0": 0}}, r"round_to\['conv0'\]=0 is not a whole number of channels"),
    ],
)
def test_bad_requests_say_what_is_wrong(request_: dict[str, Any], match: str) -> None:
    groups = _groups(16, 32)
    with pytest.raises(BadRequest, match=match):
        allocate(groups, _scores(groups), **{"cost": _chain(groups), "locked": LOCKED, **request_})


def test_scores_must_fit_their_groups() -> None:
    groups = _groups(4)
    with pytest.raises(BadRequest, match=r"group 'conv0' has no scores; did you mean 'conv1'\?"):
        allocate(groups, {"conv1": torch.ones(4)}, ratios=0.5)
    with pytest.raises(BadRequest, match=r"scores of group 'conv0' are not 4 finite numbers: shape \[3\], 3 finite"):
        allocate(groups, {"conv0": torch.ones(3)}, ratios=0.5)
    with pytest.raises(BadRequest, match=r"not 4 finite numbers: shape \[4\], 3 finite"):
        allocate(groups, {"conv0": torch.tensor([1, 2, 3, math.nan])}, ratios=0.5)


@pytest.mark.parametrize("pattern", ["fc", "f*"])
def test_a_request_for_locked_groups_tells_the_reason(pattern: str) -> None:
    groups = _groups(4)
    match = (
        rf"ratios: {pattern[:1]}?.*asks for group 'fc' \(10 channels\), which is locked\n  it is the network's output"
    )
    with pytest.raises(CannotPrune, match=match):
        allocate(groups, _scores(groups), ratios={pattern: 0.5}, locked=LOCKED)


def test_an_unreachable_budget_states_the_reachable_range_and_its_bounds() -> None:
    groups = _groups(40, 40, 40, 40)
    budget = Budget(keep=0.1, of="channels", min_channels=4, round_to=8)
    with pytest.raises(Unreachable) as caught:
        allocate(groups, _scores(groups), ratios={"conv1": 16}, budget=budget, exclude="conv0", locked=LOCKED)
    assert str(caught.value) == (
        "no choice of channels has at most 16 channels, 0.1000 of the dense network\n"
        "  reachable: 72 to 136 channels, 0.4500 to 0.8500\n"
        "  bounded by: min_channels=4; round_to=8; 1 of 4 groups excluded; 1 of 4 groups fixed by ratios; "
        "1 groups locked ('fc': it is the network's output)\n"
        "  do: ask for a budget in that range, or loosen what bounds it"
    )
    at_the_edge = allocate(groups, _scores(groups), budget=Budget(at_most=72, of="channels"), exclude=("conv0",))
    assert sum(_widths(at_the_edge)) == 72


def test_without_free_groups_only_a_budget_that_asks_for_nothing_is_met() -> None:
    cost = make_cost([(100.0, [])])
    assert allocate((), {}, budget=Budget(keep=1.0), cost=cost) == {}
    with pytest.raises(Unreachable, match=r"reachable: 100 to 100 macs, 1\.0000 to 1\.0000"):
        allocate((), {}, budget=Budget(keep=0.5), cost=cost)


# What a rule leaves whole, and losses ------------------------------------------------------------------------------

WHOLE = {"conv1": "the rule leaves it whole"}


def test_groups_that_stay_whole_need_no_scores() -> None:
    groups = _groups(16, 16, 16)
    scores = _scores(groups)
    del scores["conv1"]
    found = _widths(allocate(groups, scores, ratios=0.5, whole=WHOLE))
    assert found == [8, 16, 8]
    assert _widths(allocate(groups, scores, ratios=0.5, exclude="conv1")) == [8, 16, 8]
    assert _widths(allocate(groups, scores, ratios={"conv*": 0.5}, whole=WHOLE)) == [8, 16, 8]
    assert _widths(allocate(groups, scores, ratios={"conv1": 16, "conv0": 4}, whole=WHOLE)) == [4, 16, 16]
    assert _widths(allocate(groups, {}, ratios={"conv1": 0.0})) == [16, 16, 16]
    budget = Budget(at_most=32, of="channels")
    assert _widths(allocate(groups, scores, budget=budget, whole=WHOLE, exclude="conv1"))[1] == 16
    with pytest.raises(BadRequest, match="group 'conv1' has no scores"):
        allocate(groups, scores, budget=budget)


@pytest.mark.parametrize("asked", [0.5, 8, 0.1])
def test_asking_for_a_group_that_stays_whole_tells_the_reason(asked: float) -> None:
    groups = _groups(16, 16)
    with pytest.raises(CannotPrune) as caught:
        allocate(groups, _scores(groups), ratios={"*1": asked}, whole=WHOLE)
    assert str(caught.value) == (
        "ratios: '*1' asks for group 'conv1' (16 channels)\n  the rule leaves it whole\n"
        "  do: leave it out, or take residual='coupled', where it is free"
    )


def test_an_unreachable_budget_counts_what_stays_whole_once() -> None:
    groups = _groups(40, 40, 40)
    budget = Budget(keep=0.1, of="channels")
    with pytest.raises(Unreachable) as caught:
        allocate(groups, _scores(groups), ratios={"conv0": 20}, budget=budget, whole=WHOLE, exclude="conv1")
    text = str(caught.value)
    assert "reachable: 61 to 100 channels" in text
    assert "1 of 3 groups fixed by ratios; 1 groups locked ('conv1': the rule leaves it whole)" in text
    assert "excluded" not in text


def test_losses_decide_how_many_go_and_scores_which() -> None:
    groups = _groups(8, 8)
    scores = _scores(groups)
    steep, flat = np.linspace(1, 0, 9), np.linspace(0.1, 0, 9)
    budget = Budget(at_most=10, of="channels")
    found = allocate(groups, scores, budget=budget, losses={"conv0": steep, "conv1": flat})
    assert _widths(found) == [8, 2]
    assert found["conv1"] == tuple(sorted(scores["conv1"].argsort(descending=True)[:2].tolist()))
    assert _widths(allocate(groups, scores, budget=budget, losses={"conv0": flat, "conv1": steep})) == [2, 8]
