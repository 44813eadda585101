"""ThiNet's criteria against the paper's loops over the rows themselves, and what their scores promise."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.allocation import highest
from secateur.core import GroupView, OutputMoments
from secateur.criteria import CRITERIA, locations, needs_data, reads, thinet_with
from secateur.criteria.outputs import pooled, pursuit_order, removal_order, rising
from secateur.errors import BadRequest
from secateur.scores import normalise
from turns_by_hand import pursued_by_loops, removed_by_loops

D = torch.float64


def rows(channels: int, seed: int, samples: int = 300) -> Tensor:
    """Parts of outputs ``[n, C]`` that hang together as real ones do."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.eye(channels, dtype=D) + 0.3 * torch.randn(channels, channels, generator=make, dtype=D)
    size = torch.rand(channels, generator=make, dtype=D) + 0.1
    return torch.randn(samples, channels, generator=make, dtype=D) @ mix * size


def other_target(parts: Tensor, seed: int) -> Tensor:
    """A dense network's output that the parts, of a network already pruned, do not sum to."""
    make = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(len(parts), generator=make, dtype=D)
    return parts.sum(1) + parts[:, ::3].sum(1) * 0.7 + 0.5 * noise * parts.sum(1).std()


def moments(
    parts: Sequence[Tensor], targets: Sequence[Tensor], energies: Sequence[float] | None = None
) -> OutputMoments:
    """What streaming the rows of each reader would have found."""
    goal = torch.stack([t.square().sum() for t in targets])
    return OutputMoments(
        tuple(f"u{i}" for i in range(len(parts))),
        torch.tensor([float(len(x)) for x in parts]),
        torch.stack([x.mT @ x for x in parts]),
        torch.stack([x.mT @ t for x, t in zip(parts, targets, strict=True)]),
        goal,
        goal if energies is None else torch.tensor(energies, dtype=D),
    )


def seen(given: OutputMoments, field: str = "outputs") -> GroupView:
    channels = given.gram.shape[-1]
    empty = torch.empty(channels, 0)
    return GroupView("g", empty, empty, empty, **{field: given})  # type: ignore[arg-type]


def objective(parts: Tensor, target: Tensor, gone: Sequence[int]) -> float:
    left = [c for c in range(parts.shape[1]) if c not in gone]
    return float((target - parts[:, left].sum(1)).square().sum())


# The paper's loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 7, 32, 64])
@pytest.mark.parametrize("same", [True, False])
def test_removal_is_the_greedy_loop_over_the_rows(channels: int, same: bool) -> None:
    parts = rows(channels, channels)
    target = parts.sum(1) if same else other_target(parts, channels)
    gram, goal = parts.mT @ parts, parts.mT @ target
    found = removal_order(gram, None if same else goal - gram.sum(1))
    assert found.order.tolist() == removed_by_loops(parts, target, channels)
    before = objective(parts, target, [])
    for step in range(channels + 1):
        cost = before + float(found.costs[:step].sum())
        direct = objective(parts, target, found.order[:step].tolist())
        assert cost == pytest.approx(direct, rel=1e-9, abs=1e-9 * float(gram.trace()))


@pytest.mark.parametrize("channels", [1, 2, 7, 32, 64])
@pytest.mark.parametrize("same", [True, False])
def test_pursuit_is_the_loop_over_the_rows(channels: int, same: bool) -> None:
    parts = rows(channels, channels)
    target = parts.sum(1) if same else other_target(parts, channels)
    found = pursuit_order(parts.mT @ parts, parts.mT @ target)
    kept = found.order.flip(0).tolist()
    assert kept == pursued_by_loops(parts, target, channels)
    for count in range(1, channels + 1):
        weights = torch.linalg.lstsq(parts[:, kept[:count]], target[:, None]).solution
        rest = float((target - (parts[:, kept[:count]] @ weights)[:, 0]).square().sum())
        direct = float(target.square().sum() - found.costs[channels - count :].sum())
        assert direct == pytest.approx(rest, rel=1e-9, abs=1e-9 * float(target.square().sum()))


def test_each_removal_is_the_cheapest_there_is() -> None:
    parts = rows(8, 3)
    target = other_target(parts, 3)
    gram = parts.mT @ parts
    order = removal_order(gram, parts.mT @ target - gram.sum(1)).order.tolist()
    for step in range(8):
        costs = [objective(parts, target, [*order[:step], j]) for j in order[step:]]
        assert min(costs) == costs[0]
    # greedy is not the best of all sets, but no worse than most
    all_costs = sorted(objective(parts, target, gone) for gone in combinations(range(8), 4))
    assert objective(parts, target, order[:4]) <= all_costs[len(all_costs) // 10]


# What must go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["removal", "pursuit"])
def test_what_says_nothing_goes_first_and_the_lower_index_stays(order: Any) -> None:
    parts = rows(6, 0)
    parts[:, [1, 4]] = 0
    gone = thinet_with(order=order)(seen(moments([parts], [parts.sum(1)]))).argsort().tolist()
    assert gone[:2] == [4, 1]


def test_what_another_undoes_goes_with_it() -> None:
    """A channel and its negative cancel: removing both costs nothing, and they go before anything that matters."""
    parts = rows(6, 1)
    parts[:, 3] = -parts[:, 0]
    parts[:, 3] *= 1 + 1e-9
    found = removal_order(parts.mT @ parts)
    assert set(found.order.tolist()[:2]) != {0, 3} or float(found.costs[:2].sum()) < 1e-6
    at = found.order.tolist()
    first = min(at.index(0), at.index(3))
    assert at.index(0) + at.index(3) == 2 * first + 1  # once one is gone, nothing is cheaper than the other


@pytest.mark.parametrize("sign", [1.0, -2.0])
def test_the_pursuit_needs_no_copy_of_what_it_has(sign: float) -> None:
    parts = rows(6, 2)
    parts[:, 5] = sign * parts[:, 2]
    found = pursuit_order(parts.mT @ parts, parts.mT @ parts.sum(1))
    assert found.order[0] == 5  # in the span of what is kept; of equal gains the lower index is kept
    assert found.costs[0] == 0
    assert bool(torch.isfinite(found.costs).all())


def test_equal_costs_do_not_depend_on_rounding() -> None:
    """However the rows are summed: of two channels that cost the same, by sums of the same numbers in another order,
    the higher index goes first. Each pair has rows of its own, in which the two change places."""
    make = torch.Generator().manual_seed(5)
    parts = torch.zeros(12, 400, 24, dtype=D)
    for c in range(12):
        two = torch.randn(200, 2, generator=make, dtype=D) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=D)
        parts[c, :, [c, c + 12]] = torch.cat([two, two.flip(1)])
    rows_in_turn = parts.flatten(0, 1)
    found = []
    for step in (7, 100, 4800):
        gram = sum((part.mT @ part for part in rows_in_turn.split(step)), torch.zeros(24, 24, dtype=D))
        assert step < 4800 or bool((gram.diagonal()[:12] != gram.diagonal()[12:]).any()), "no rounding to see through"
        found.append((removal_order(gram).order.tolist(), pursuit_order(gram, gram.sum(1)).order.tolist()))
    assert found[0] == found[1] == found[2]
    for order in found[0]:
        assert all(order.index(c + 12) < order.index(c) for c in range(12))


@pytest.mark.parametrize("large", [0, 1])
def test_a_cost_is_known_as_well_as_its_terms(large: int) -> None:
    """What is left of large terms may be off by their rounding: within it, equal, and the higher index goes first."""
    for off, first in ((1e-8, 1), (1e-4, 0)):
        gram, slope = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)
        gram[large], slope[large] = 1e8, -(1e8 - 1) / 2  # costs one, too
        slope[0] -= off / 2
        assert removal_order(gram.diag(), slope).order[0] == first


@pytest.mark.parametrize(("samples", "channels"), [(5, 20), (1, 4), (30, 60)])
def test_fewer_samples_than_channels_give_no_nan(samples: int, channels: int) -> None:
    parts = rows(channels, 4, samples)
    target = other_target(parts, 4) if samples > 1 else parts.sum(1)
    gram, goal = parts.mT @ parts, parts.mT @ target
    for found in (removal_order(gram, goal - gram.sum(1)), pursuit_order(gram, goal)):
        assert sorted(found.order.tolist()) == list(range(channels))
        assert bool(torch.isfinite(found.costs).all())
    assert int((pursuit_order(gram, goal).costs > 0).sum()) <= samples


def test_sizes_of_any_magnitude_are_ranked() -> None:
    for size, exact in ((3, True), (60, False)):
        parts = rows(8, 6) * torch.logspace(-size, size, 8, dtype=D)
        gram = parts.mT @ parts
        for found in (removal_order(gram), pursuit_order(gram, gram.sum(1))):
            assert sorted(found.order.tolist()) == list(range(8))
            assert found.order.tolist() == list(range(8)) or not exact
            assert bool(torch.isfinite(found.costs).all())


# Scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thinet", "thinet_omp", "thinet_sequential", "thinet_sampled", "thinet_sampled_omp"])
@pytest.mark.parametrize("same", [True, False])
def test_any_width_keeps_what_the_search_keeps(name: str, same: bool) -> None:
    parts = rows(24, 9)
    target = parts.sum(1) if same else other_target(parts, 9)
    (field,) = reads(name)
    scores = CRITERIA[name](seen(moments([parts], [target]), field))
    for width in range(1, 25):
        if name.endswith("omp"):
            want = sorted(pursued_by_loops(parts, target, width))
        else:
            gone = removed_by_loops(parts, target, 24 - width)
            want = [c for c in range(24) if c not in gone]
        assert list(highest(scores, width)) == want
        assert list(highest(normalise({"g": scores})["g"], width)) == want


def test_scores_sum_to_the_part_of_the_objective_that_is_lost() -> None:
    parts = rows(30, 11)
    ranking = removal_order(parts.mT @ parts)
    scores = CRITERIA["thinet"](seen(moments([parts], [parts.sum(1)])))
    order = scores.argsort()
    goal = float(parts.sum(1).square().sum())
    assert float(scores.sum()) == pytest.approx(1, rel=1e-12)
    assert bool((scores[order].diff() > 0).all())
    lost = np.array([objective(parts, parts.sum(1), order[: k + 1].tolist()) / goal for k in range(30)])
    sums = scores[order].cumsum(0).numpy()
    assert np.all(sums <= lost + 1e-6)  # equal but where a cost is lower than those before it
    rises = np.maximum.accumulate(ranking.costs.numpy()) == ranking.costs.numpy()
    if rises.all():
        assert np.allclose(sums, lost, atol=1e-6)


def test_rising_pools_what_falls() -> None:
    assert rising(np.array([1.0, 3.0, 2.0, 2.5, 7.0, 0.0])).tolist() == pytest.approx([1, 2.5, 2.5, 2.5, 3.5, 3.5])
    assert rising(np.array([3.0, 2.0, 1.0])).tolist() == [2, 2, 2]
    assert rising(np.array([])).tolist() == []


def test_a_group_through_which_nothing_comes_is_said_to_be_tied() -> None:
    parts = torch.zeros(10, 4, dtype=D)
    assert CRITERIA["thinet"](seen(moments([parts], [parts.sum(1)]))).tolist() == [0, 0, 0, 0]


# Several readers -----------------------------------------------------------------------------------------------------


def test_readers_count_by_the_energy_of_their_outputs_or_plainly() -> None:
    first, second = rows(12, 20), 50 * rows(12, 21)
    silent = torch.zeros(5, 12, dtype=D)
    parts, targets = [first, second, silent], [first.sum(1), second.sum(1), silent.sum(1)]
    energies = [float(3 * first.sum(1).square().sum()), float(second.sum(1).square().sum()), 0.0]
    given = seen(moments(parts, targets, energies))
    even = torch.cat([first / energies[0] ** 0.5, second / energies[1] ** 0.5])
    plain = torch.cat([first, second])
    for order in ("removal", "pursuit"):
        for weighting, together in (("energy", even), ("sum", plain)):
            scores = thinet_with(order=order, weighting=weighting)(given)  # type: ignore[arg-type]
            target = together.sum(1)
            if order == "removal":
                gone = removed_by_loops(together, target, 12)
            else:
                gone = pursued_by_loops(together, target, 12)[::-1]
            assert scores.argsort().tolist() == gone
    gram, _ = pooled(moments(parts, targets, energies))
    assert torch.allclose(gram, even.mT @ even)


# Making one --------------------------------------------------------------------------------------------------------


def test_a_criterion_of_other_make_says_what_it_is() -> None:
    made = thinet_with(order="pursuit", statistics="samples", weighting="sum", locations=3)
    assert reads(made) == ("samples",)
    assert locations(made) == 3
    assert needs_data(made)
    name = "thinet_with(order='pursuit', statistics='samples', weighting='sum', locations=3)"
    assert made.__name__ == name  # type: ignore[attr-defined]
    assert locations("thinet_sampled") == locations("l1") == 10
    parts = rows(5, 0)
    given = seen(moments([parts], [parts.sum(1)]))
    assert torch.equal(thinet_with()(given), CRITERIA["thinet"](given))
    assert torch.equal(thinet_with(order="pursuit")(given), CRITERIA["thinet_omp"](given))
    assert pickle.loads(pickle.dumps(CRITERIA["thinet"])) is CRITERIA["thinet"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"order": "pursuits"}, r"there is no order 'pursuits'; did you mean 'pursuit'\?"),
        ({"statistics": "maps"}, "there is no statistics 'maps'"),
        ({"weighting": None}, "there is no weighting None"),
        ({"locations": 0}, "locations=0 is not a number of outputs of an image, 1 or more"),
        ({"locations": True}, "locations=True is not a number of outputs of an image, 1 or more"),
    ],
)
def test_bad_makes_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        thinet_with(**options)


def test_a_function_that_says_no_number_of_locations_is_refused() -> None:
    def mine(view: GroupView) -> Tensor:
        return torch.zeros(3)

    mine.reads = ("samples",)  # type: ignore[attr-defined]
    assert locations(mine) == 10
    mine.locations = 2.5  # type: ignore[attr-defined]
    with pytest.raises(BadRequest, match=r"criterion 'mine' says locations=2.5.*\n  do: set its attribute locations"):
        locations(mine)
