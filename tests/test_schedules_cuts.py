"""Cutting and training by turns: what each round leaves, and that the rounds add up to one plan."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from bare_loop import X, chain, same_weights, sgd, small, train
from law import relative_error
from networks import NETWORKS
from secateur.groups import couple
from secateur.recover import compensate_
from secateur.recover.hooks import Hooks
from secateur.schedules import (
    iterative,
    iterative_step,
    layer_by_layer,
    layer_step,
    layer_widths,
    starting_point,
)
from secateur.schedules.options import Options, partway, start_of, successors
from secateur.schedules.steps import forward_order
from turns_by_hand import removed_by_loops, rows_of


def widths(plan: sc.Plan) -> dict[str, int]:
    return {name: len(kept) for name, kept in plan.keep.items()}


def nothing(model: nn.Module, step: int) -> None:
    pass


def training(model: nn.Module, step: int) -> None:
    train(model, Hooks(), sgd(model, 0.01), range(step, step + 1))


# Iterative -------------------------------------------------------------------------------------------------------


def test_the_kept_cost_falls_geometrically() -> None:
    net, found = chain(), []
    iterative(net, X, steps=3, between=lambda m, i: found.append(sc.count(m, X).macs), budget=sc.Budget(keep=0.3))
    dense = sc.count(net, X).macs
    for i, got in enumerate(found):
        target = dense * 0.3 ** ((i + 1) / 3)
        assert 0.97 * target <= got <= target, (i, got, target)


@pytest.mark.parametrize("budget", [sc.Budget(keep=0.25, of="params"), sc.Budget(at_most=9, of="channels")])
def test_what_a_part_of_the_way_asks_for(budget: sc.Budget) -> None:
    graph = sc.trace(chain(), X)
    options: Options = {"budget": budget, "round_to": 2, "exclude": "c.*"}
    start = start_of(graph, options)
    dense = sum(p.numel() for p in graph.model.parameters()) if budget.of == "params" else 8 + 12 + 16
    assert start.cost[budget.of] == dense
    found = successors(start, graph, options)
    keep = 0.25  # 9 of 36 channels is a quarter too
    for part in (0.0, 0.5, 1.0):
        asked = partway(start, options, part, found)
        assert asked["budget"] == sc.Budget(at_most=pytest.approx(dense * keep**part), of=budget.of)
        assert (asked["round_to"], asked["exclude"]) == (2, ["c.0"])
    if budget.of == "channels":  # a group down to its last channel may be none any more, and counts all the same
        without = {name: groups for name, groups in found.items() if name != "a.0"}
        assert partway(start, options, 1.0, without)["budget"] == sc.Budget(at_most=8, of="channels")


def test_iterative_reaches_the_budget_and_its_plan_is_of_the_dense_network(tmp_path: Path) -> None:
    net, steps = small(), []
    before = copy.deepcopy(net.state_dict())

    def between(model: nn.Module, step: int) -> None:
        steps.append(step)
        training(model, step)

    result = iterative(net, X, steps=3, between=between, budget=sc.Budget(keep=0.4))
    made = sc.record(result)
    assert steps == [0, 1, 2]
    assert made is not None
    macs = sc.count(result, X).macs / sc.count(net, X).macs
    assert 0.97 < macs / 0.4 <= 1  # groups of 8 to 16 channels do not come nearer than that
    assert made.plan.model == {name: tuple(t.shape) for name, t in net.state_dict().items()}
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    sc.save(tmp_path / "saved", result, made.plan)
    loaded = sc.load(tmp_path / "saved", small(7))
    assert relative_error(loaded.eval()(X), result.eval()(X)) < 1e-6
    assert sc.Plan.from_json(made.plan.to_json()) == made.plan


def test_ratios_are_of_the_dense_network_at_every_step() -> None:
    found = []
    net = chain()
    iterative(net, X, steps=3, between=lambda m, i: found.append(sc.record(m)), ratios={"c.*": 0.5, "a.0": 3})
    for i, made in enumerate(found):
        part = (i + 1) / 3
        want = {"a.0": math.floor(8 * (3 / 8) ** part + 1e-9), "b.0": 12, "c.0": math.floor(16 * 0.5**part + 1e-9)}
        assert widths(made.plan) == want


def test_one_step_is_one_shot() -> None:
    net = chain()
    once = sc.plan(net, X, budget=sc.Budget(keep=0.5), exclude="a*")
    result = iterative(net, X, steps=1, between=nothing, budget=sc.Budget(keep=0.5), exclude="a*")
    made = sc.record(result)
    assert made is not None
    assert made.plan.keep == once.keep
    assert len(made.plan.keep["a.0"]) == 8


def test_rounding_and_ratios_beside_a_budget_hold_at_every_step() -> None:
    found = []
    iterative(
        chain(),
        X,
        steps=2,
        between=lambda m, i: found.append(sc.record(m)),
        budget=sc.Budget(keep=0.4, round_to=2),
        ratios={"a.0": 4},
    )
    assert all(kept % 2 == 0 for made in found for kept in widths(made.plan).values())
    assert [len(made.plan.keep["a.0"]) for made in found] == [6, 4]  # 8 sqrt(1/2) = 5.7, rounded up to an even number


def test_steps_alone_give_what_the_whole_does() -> None:
    net = chain()
    whole = iterative(net, X, steps=2, between=training, budget=sc.Budget(keep=0.4), criterion="l2")
    model: nn.Module = net
    for step in range(2):
        start = starting_point(chain(5), X, budget=sc.Budget(keep=0.4))  # made again, from other weights
        options = {"budget": sc.Budget(keep=0.4), "criterion": "l2"}
        plan, model = iterative_step(model, X, start=start, step=step, steps=2, **options)
        assert plan.model.keys() == net.state_dict().keys()
        training(model, step)
        made = sc.record(model)
        assert made is not None
        again = sc.apply(net, sc.Plan.from_json(made.plan.to_json()))  # a crash: only what was written is left
        again.load_state_dict(model.state_dict())
        model = again
    assert same_weights(whole, model)


def test_between_may_hand_over_another_network() -> None:
    handed = []

    def between(model: nn.Module, step: int) -> nn.Module:
        handed.append(copy.deepcopy(model))
        return handed[-1]

    result = iterative(chain(), X, steps=2, between=between, ratios=0.5)
    assert result is handed[-1]
    assert set(widths(sc.record(result).plan).values()) == {4, 6, 8}  # type: ignore[union-attr]


def test_between_may_not_hand_over_a_stranger() -> None:
    with pytest.raises(sc.SecateurError, match="returned a Chain that is not a network made by apply") as error:
        iterative(chain(), X, steps=2, between=lambda m, i: chain(), ratios=0.5)
    assert "do: train in place and return nothing" in str(error.value)


def test_a_goal_out_of_reach_is_said_before_the_first_cut() -> None:
    calls: list[int] = []
    with pytest.raises(sc.Unreachable, match="no choice of channels"):
        iterative(chain(), X, steps=5, between=lambda m, i: calls.append(i), budget=sc.Budget(keep=1e-4))
    assert not calls
    with pytest.raises(sc.BadRequest, match="steps=0 is not a number of cuts"):
        iterative(chain(), X, steps=0, between=nothing, ratios=0.5)
    with pytest.raises(sc.BadRequest, match="there is no step 3 of 3"):
        iterative_step(chain(), X, start=starting_point(chain(), X, ratios=0.5), step=3, steps=3, ratios=0.5)


def test_it_goes_on_from_a_network_that_was_pruned_before() -> None:
    net = chain()
    half = sc.apply(net, sc.plan(net, X, ratios=0.25))
    result = iterative(half, X, steps=2, between=nothing, ratios=0.5, exclude="a*")
    plan = sc.record(result).plan  # type: ignore[union-attr]
    assert plan.model == {name: tuple(t.shape) for name, t in net.state_dict().items()}
    assert widths(plan)["a.0"] == 6
    assert widths(plan)["c.0"] == 6
    assert set(plan.keep["a.0"]) == set(sc.record(half).plan.keep["a.0"])  # type: ignore[union-attr]


def test_names_that_shift_between_the_cuts_do_not_matter() -> None:
    """The first part of the split ends at one channel and is no group any more: its name goes to the next part."""
    make, inputs, _ = NETWORKS["split_uneven"]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    once = sc.plan(model, x, ratios=0.6, exclude="stem#3")
    result = iterative(model, x, steps=2, between=nothing, ratios=0.6, exclude="stem#3")
    assert widths(sc.record(result).plan) == widths(once)  # type: ignore[union-attr]
    first = {g.name for g in sc.find_groups(model, x) if not g.locked}
    assert {g.name for g in sc.find_groups(result, x) if not g.locked} < first


# Layer by layer --------------------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Registers its layers in another order than it runs them in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.second, self.first = nn.Conv2d(8, 6, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_layers_are_cut_in_the_order_of_the_forward_pass() -> None:
    graph = sc.trace(Backwards(), X)
    assert [g.name for g in couple(graph).groups] == ["second", "first"]
    assert forward_order(couple(graph)) == ["first", "second"]
    assert list(layer_widths(graph, ratios=0.5)) == ["first", "second"]


def test_layer_by_layer_ends_at_the_widths_decided_up_front() -> None:
    net, cuts = small(), []
    budget = sc.Budget(keep=0.4)
    once = sc.plan(net, X, budget=budget)

    def after_cut(pruned: nn.Module, previous: nn.Module, plan: sc.Plan) -> None:
        removed = [g.name for g in plan.groups if len(plan.keep[g.name]) < g.channels]
        assert plan.graph is not None
        assert plan.graph.model is previous
        cuts.append(("cut", *removed))

    def between(model: nn.Module, step: int) -> None:
        cuts.append(("train", str(step)))
        training(model, step)

    result = layer_by_layer(net, X, between=between, after_cut=after_cut, budget=budget)
    made = sc.record(result)
    assert made is not None
    assert widths(made.plan) == widths(once)
    narrower = list(layer_widths(net, X, budget=budget))
    assert cuts == [entry for i, name in enumerate(narrower) for entry in (("cut", name), ("train", str(i)))]
    assert relative_error(sc.apply(net, made.plan).eval()(X), sc.masked(net, made.plan)(X)) < 1e-4


def test_layers_that_are_cut_together_have_no_training_between_them() -> None:
    net, calls = chain(), []
    options: Options = {"ratios": 0.5, "criterion": "l1"}
    for together in ("b.0", ["[a]*", "b.0", "c.0"], ()):
        calls.append([])
        layer_by_layer(net, X, between=lambda m, i: calls[-1].append(i), together=together, **options)
    assert calls == [[0, 2], [2], [0, 1, 2]]
    with pytest.raises(sc.BadRequest, match=r"together: no group is called, or matches, 'd'"):
        layer_by_layer(net, X, between=nothing, together="d", **options)


def test_thinet_layer_by_layer_measures_what_cuts_and_compensation_have_left() -> None:
    """Cut, compensate, measure anew: as the paper does it, by hand."""
    net, data = chain().double().eval(), [x.double() for x in (torch.randn(8, 3, 8, 8), torch.randn(4, 3, 8, 8))]
    x = X.double()

    def compensated(pruned: nn.Module, previous: nn.Module, plan: sc.Plan) -> None:
        compensate_(pruned, previous, plan, data)

    result = layer_by_layer(
        net, x, between=nothing, after_cut=compensated, criterion="thinet", data=data, ratios={"a.0": 4, "b.0": 6}
    )
    here: nn.Module = net
    for name, width in (("a.0", 4), ("b.0", 6)):
        groups = {group.name: group for group in sc.find_groups(here, x) if not group.locked}
        parts, target = rows_of(here, groups, name, {}, data)
        gone = removed_by_loops(parts, target, groups[name].channels - width)
        kept = tuple(c for c in range(groups[name].channels) if c not in gone)
        plan = dataclasses.replace(
            sc.plan(here, x, ratios={name: width}),
            keep={g: tuple(range(groups[g].channels)) for g in groups} | {name: kept},
        )
        small = sc.apply(here, plan)
        compensate_(small, here, plan, data)
        here = small
    assert same_weights(result, here)


def test_a_layer_is_scored_on_the_network_that_training_has_left() -> None:
    net = chain()

    weakest: list[int] = []

    def swap(model: nn.Module, step: int) -> None:
        if step == 0:  # training that turns the order of the next layer's filters round
            with torch.no_grad():
                norms = model.b[0].weight.abs().sum((1, 2, 3), keepdim=True)
                weakest.extend(sorted(norms.flatten().argsort()[:6].tolist()))
                model.b[0].weight /= norms.square()

    result = layer_by_layer(net, X, between=swap, ratios={"a.0": 0.5, "b.0": 0.5})
    assert list(sc.record(result).plan.keep["b.0"]) == weakest  # type: ignore[union-attr]


def test_nothing_to_cut_gives_a_copy() -> None:
    net = chain()
    result = layer_by_layer(net, X, between=lambda m, i: pytest.fail("trained"), ratios=0.0)
    assert result is not net
    assert same_weights(result, net)
    assert sc.record(result) is not None


def test_a_group_that_is_gone_is_said() -> None:
    net = chain()
    start = starting_point(net, X, ratios=0.5)
    one = sc.apply(net, sc.plan(net, X, ratios={"b.0": 1}))
    with pytest.warns(sc.SecateurWarning, match=r"group 'b.0' cannot be cut any more"):
        _, same = layer_step(one, X, start=start, name="b.0", width=1)
    assert same_weights(same, one)
