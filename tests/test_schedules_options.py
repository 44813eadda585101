"""Schedules honour what ``plan`` can be asked for: data and loss, residual rules, greedy selection, sensitivity."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from bare_loop import X, batches, chain, same_weights, sgd, small, train
from secateur.groups import couple
from secateur.plans import fingerprint
from secateur.residuals import meeting_sums
from secateur.schedules import Growth, growing_penalty, iterative, layer_by_layer, starting_point, zeroing
from secateur.sensitivities import GroupCurve, Sensitivity

DATA = list(batches(0, 2))
TAYLOR: dict[str, Any] = {"criterion": "taylor", "data": DATA, "loss": F.cross_entropy}


def nothing(model: nn.Module, step: int) -> None:
    pass


def final(net: nn.Module) -> sc.Plan:
    made = sc.record(net)
    assert made is not None
    return made.plan


def streams(net: nn.Module) -> set[str]:
    found = meeting_sums(couple(sc.trace(net, X)))
    assert found
    return found


def cut(plan: sc.Plan) -> set[str]:
    return {g.name for g in plan.groups if len(plan.keep[g.name]) < g.channels}


# Residual rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [{"ratios": 0.5}, {"budget": sc.Budget(keep=0.6)}], ids=str)
def test_streams_stay_whole_in_every_cut(goal: dict[str, Any]) -> None:
    net, seen = small(), []
    whole = streams(net)
    result = iterative(net, X, steps=2, between=lambda m, i: seen.append(final(m)), residual="inner", **goal)
    assert final(result) == seen[-1]
    for plan in seen:
        assert plan.residual == "inner"
        assert cut(plan)
        assert not cut(plan) & whole
    once = sc.plan(net, X, residual="inner", **goal)
    if "ratios" in goal:
        assert {n: len(k) for n, k in seen[-1].keep.items()} == {n: len(k) for n, k in once.keep.items()}


def test_the_widths_of_a_plan_are_good_for_every_schedule() -> None:
    """Also those of the groups that stay whole, which nothing else may be asked of."""
    net = small()
    once = sc.plan(net, X, residual="inner", budget=sc.Budget(keep=0.6))
    options: dict[str, Any] = {"ratios": {name: len(kept) for name, kept in once.keep.items()}, "residual": "inner"}
    assert sc.plan(net, X, **options).keep == once.keep
    for result in (
        iterative(net, X, steps=2, between=nothing, **options),
        layer_by_layer(net, X, between=nothing, **options),
    ):
        assert {name: len(kept) for name, kept in final(result).keep.items()} == options["ratios"]
    with pytest.raises(sc.CannotPrune, match="residual='inner' leaves it whole"):
        iterative(net, X, steps=2, between=nothing, residual="inner", ratios=dict.fromkeys(streams(net), 2))


def test_layer_by_layer_passes_over_streams() -> None:
    net = small()
    plan = final(layer_by_layer(net, X, between=nothing, residual="inner", ratios=0.5))
    assert plan.residual == "inner"
    assert cut(plan) == {g.name for g in plan.groups} - streams(net)


def test_streams_by_their_projection_in_every_cut() -> None:
    net = small()
    plan = final(iterative(net, X, steps=2, between=nothing, residual="projection", ratios=0.5))
    once = sc.plan(net, X, residual="projection", ratios=0.5)
    assert {n: len(k) for n, k in plan.keep.items()} == {n: len(k) for n, k in once.keep.items()}
    projected = cut(plan) & streams(net)
    assert projected, "one stream of the network has a projection"
    assert cut(plan) != {g.name for g in plan.groups}, "and one has none"
    assert final(iterative(net, X, steps=1, between=nothing, residual="projection", ratios=0.5)).keep == once.keep


@pytest.mark.parametrize("soft", [False, True])
def test_zeroing_leaves_streams_alone(soft: bool) -> None:
    net = small()
    progress = zeroing(net, X, ratios=0.5, residual="inner", soft=soft, grow=2)
    train(net, progress.hooks, sgd(net), range(2))
    plan = progress.finish_()
    assert plan.residual == "inner"
    assert cut(plan) == {g.name for g in plan.groups} - streams(net)


@pytest.mark.parametrize("growth", [Growth("depgraph"), Growth("greg"), Growth("greg", choose_at=1e-3)], ids=str)
def test_a_penalty_leaves_streams_alone(growth: Growth) -> None:
    net = small()
    sparse = growing_penalty(net, X, growth=growth, ratios=0.5, residual="inner")
    whole = streams(net)
    groups = {g.name: g for g in couple(sc.trace(net, X)).groups}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    assert sparse.hooks.after_backward is not None
    sparse.hooks.after_backward(net)
    tensors = dict(net.named_parameters())
    for name, group in groups.items():
        pulled = any(
            bool(tensors[s.tensor].grad.movedim(s.axis, 0)[torch.from_numpy(s.positions.ravel())].any())  # type: ignore[union-attr]
            for s in group.slices
            if s.role == "writes" and s.tensor in tensors
        )
        assert pulled is (name not in whole), name
    assert not cut(sparse.plan()) & whole


# Data, loss, greedy ------------------------------------------------------------------------------------------------


def test_data_are_measured_anew_on_the_network_at_hand() -> None:
    seen: list[tuple[str, int]] = []

    def mine(view: sc.GroupView, /) -> Tensor:
        assert view.maps is not None
        seen.append((view.name, view.maps.mean.shape[0]))
        return view.maps.l1.sum(1)

    mine.reads = ("maps",)  # type: ignore[attr-defined]
    plan = final(iterative(chain(), X, steps=2, between=nothing, criterion=mine, data=DATA, ratios={"b.0": 3}))
    assert len(plan.keep["b.0"]) == 3
    assert [number for name, number in seen if name == "b.0"] == [12, 6]  # two cuts: ratios say the goal by themselves


@pytest.mark.parametrize(
    "options", [TAYLOR, {"criterion": "apoz", "data": DATA}, {"greedy": True}], ids=["t", "a", "g"]
)
def test_one_step_is_one_shot(options: dict[str, Any]) -> None:
    net = chain()
    once = sc.plan(net, X, budget=sc.Budget(keep=0.5), **options)
    plan = final(iterative(net, X, steps=1, between=nothing, budget=sc.Budget(keep=0.5), **options))
    assert plan.keep == once.keep


def test_layer_by_layer_is_greedy_by_itself() -> None:
    """A layer that has its turn reads nothing of what went before."""
    net = chain()
    greedy = sc.plan(net, X, ratios=0.5, greedy=True)
    alone = sc.plan(net, X, ratios=0.5)
    assert greedy.keep != alone.keep
    plan = final(layer_by_layer(net, X, between=nothing, ratios=0.5, greedy=True))
    assert plan.keep == greedy.keep


def test_layer_by_layer_measures_the_layer_whose_turn_it_is() -> None:
    plan = final(layer_by_layer(chain(), X, between=nothing, ratios=0.5, **TAYLOR))
    assert [len(kept) for kept in plan.keep.values()] == [4, 6, 8]


def contrary(view: sc.GroupView, /) -> Tensor:
    """Keeps what puts out least, and so would bring back whatever was zeroed."""
    assert view.maps is not None
    return -view.maps.l1.sum(1)


contrary.reads = ("maps",)  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [TAYLOR, {"criterion": contrary, "data": DATA}], ids=["taylor", "contrary"])
@pytest.mark.parametrize("soft", [False, True])
def test_zeroing_by_what_data_show(options: dict[str, Any], soft: bool) -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, grow=3, soft=soft, **options)
    kept: list[dict[str, set[int]]] = []
    for epoch in range(3):
        train(net, progress.hooks, sgd(net), range(epoch, epoch + 1))
        kept.append({n: set(torch.from_numpy(~m).nonzero().flatten().tolist()) for n, m in progress._removed.items()})
    plan = progress.plan()
    assert [len(own) for own in plan.keep.values()] == [4, 6, 8]
    if not soft:  # what went stays gone, whatever the criterion says
        assert all(later[name] <= before[name] for before, later in pairwise(kept) for name in later)


def test_a_penalty_on_what_gradients_choose() -> None:
    net = chain()
    before = copy.deepcopy(net)
    sparse = growing_penalty(net, X, ratios=0.5, **TAYLOR)
    assert same_weights(net, before)
    assert all(p.grad is None for p in net.parameters())
    for p in net.train().parameters():
        p.grad = torch.ones_like(p)
    assert sparse.hooks.after_backward is not None
    sparse.hooks.after_backward(net)
    plan = sparse.plan()
    assert plan.keep == sc.plan(before, X, ratios=0.5, **TAYLOR).keep
    kept = list(plan.keep["b.0"])
    grad = net.b[0].weight.grad  # to choose, gradients were taken of another loss: nothing of that is left here
    assert bool((grad[kept] == 1).all())
    assert not bool((grad == 1).all())
    assert net.training


def test_missing_data_are_said_before_the_first_cut() -> None:
    with pytest.raises(sc.BadRequest, match="criterion 'apoz' looks at activations"):
        iterative(chain(), X, steps=2, between=nothing, ratios=0.5, criterion="apoz")
    with pytest.raises(sc.BadRequest, match="greedy means nothing to criterion 'random'"):
        starting_point(chain(), X, ratios=0.5, criterion="random", greedy=True)


# Sensitivity -------------------------------------------------------------------------------------------------------


def known(net: nn.Module) -> Sensitivity:
    curve = GroupCurve("b.0", 12, "8x8", (9, 6, 3), (0.9, 0.8, 0.6))
    return Sensitivity(fingerprint(net), "l1", (0.25, 0.5, 0.75), 0.9, (curve,))


def test_a_sensitivity_sets_the_widths_of_all_but_several_cuts() -> None:
    net = chain()
    options: dict[str, Any] = {"budget": sc.Budget(keep=0.8), "sensitivity": known(net)}
    widths = {name: len(kept) for name, kept in sc.plan(net, X, **options).keep.items()}
    assert (widths["a.0"], widths["c.0"]) == (8, 16)
    for result in (
        layer_by_layer(net, X, between=nothing, **options),
        iterative(net, X, steps=2, between=nothing, ratios=widths),
    ):
        assert {name: len(kept) for name, kept in final(result).keep.items()} == widths
    progress = zeroing(net, X, **options)
    progress.select_()
    assert {name: len(kept) for name, kept in progress.plan().keep.items()} == widths
    with pytest.raises(sc.BadRequest) as caught:
        iterative(net, X, steps=2, between=nothing, **options)
    assert str(caught.value) == (
        "a sensitivity was measured on the network before the first cut, and does not know those in between\n"
        "  do: plan once with it, and give what comes out as widths: "
        "ratios={name: len(kept) for name, kept in plan.keep.items()}"
    )
