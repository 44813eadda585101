"""Zeroing while training: what is zeroed, that it stays so or comes back, and what is cut in the end."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from bare_loop import X, chain, same_weights, sgd, small, train
from law import call, relative_error
from networks import NETWORKS, randomise
from secateur.plans import named_tensors
from secateur.schedules import Zeroing, zero_, zeroing
from secateur.schedules.places import harmful


def entries(model: nn.Module, plan: sc.Plan, roles: tuple[str, ...]) -> list[torch.Tensor]:
    """What removed channels own in the parameters, by a naive loop."""
    found = []
    tensors = named_tensors(model)
    for group in plan.groups:
        for c in sorted(set(range(group.channels)) - set(plan.keep[group.name])):
            for part in group.slices:
                if part.role in roles and isinstance(tensors[part.tensor], nn.Parameter):
                    for position in part.positions[c]:
                        found.append(tensors[part.tensor].detach().select(part.axis, int(position)))
    return found


def removed(plan: sc.Plan) -> dict[str, set[int]]:
    return {g.name: set(range(g.channels)) - set(plan.keep[g.name]) for g in plan.groups}


MAKERS = ("writes", "scales", "follows")


# Hard ------------------------------------------------------------------------------------------------------------


def test_hard_zeros_stay_through_momentum_and_decay_and_the_choice_is_stable() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5)
    optimizer = sgd(net)
    train(net, progress.hooks, optimizer, range(1))
    first = progress.plan()
    assert any(removed(first).values())
    moved = copy.deepcopy(net)

    def seen(model: nn.Module) -> None:
        assert not any(bool(t.any()) for t in entries(model, first, MAKERS))

    train(net, progress.hooks, optimizer, range(1, 4), seen=seen)
    assert progress.plan().keep == first.keep
    assert not same_weights(net, moved), "nothing was trained"
    assert sc.plan(net, X, ratios=0.5).keep == first.keep, "the criterion alone chooses the same"


def test_gradients_of_what_is_zero_are_zero() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5)
    progress.select_()
    net(X).square().sum().backward()
    assert net.a[1].bias.grad is not None
    net.b[0].weight.grad.fill_(1.0)
    assert progress.hooks.after_backward is not None
    progress.hooks.after_backward(net)
    gone = sorted(removed(progress.plan())["b.0"])
    assert not net.b[0].weight.grad[gone].any()
    assert int((net.b[0].weight.grad.sum((1, 2, 3)) != 0).sum()) == 12 - len(gone)


def test_the_zeroed_network_computes_what_the_smaller_one_does() -> None:
    net = small()
    progress = zeroing(net, X, budget=sc.Budget(keep=0.5))
    train(net, progress.hooks, sgd(net), range(2))
    plan = progress.plan()
    pruned = sc.apply(net, plan)
    assert relative_error(pruned(X), net(X)) < 1e-5
    assert plan.made_by["schedule"] == "hard zeroing"
    assert plan.made_by["budget"] == {"keep": 0.5, "of": "macs", "min_channels": 1, "round_to": 1}
    assert 0.9 < sc.count(pruned, X).macs / sc.count(net, X).macs / 0.5 <= 1


@pytest.mark.parametrize("name", ["residual_stage", "inverted_residual", "weight_norm"])
def test_zeroing_equals_cutting_where_the_activation_is_zero_at_zero(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model, x = randomise(make(), 0).eval(), inputs()
    groups = [g.name for g in sc.find_groups(model, x) if not g.locked]
    # the tests' networks have a softplus behind the stem of those that have a "head": not zero at zero
    leaky = ["stem"] if "stem" in groups and hasattr(model, "head") else []
    plan = sc.plan(model, x, ratios=0.5, exclude=leaky)
    zero_(model, plan)
    assert bool(torch.isfinite(call(model, x)).all())
    assert relative_error(call(sc.apply(model, plan), x), call(model, x)) < 1e-5


def test_where_an_activation_is_not_zero_at_zero_the_two_differ() -> None:
    make, inputs, _ = NETWORKS["batch_norm"]
    model, x = randomise(make(), 0).eval(), inputs()
    plan = sc.plan(model, x, ratios=0.5)
    zero_(model, plan)
    assert relative_error(call(sc.apply(model, plan), x), call(model, x)) > 1e-2


def test_what_the_network_divides_by_is_spared() -> None:
    make, inputs, _ = NETWORKS["weight_norm"]
    graph = sc.trace(randomise(make(), 0).eval(), inputs())
    spared = harmful(graph, sc.plan(graph, ratios=0.5))
    assert spared
    assert all(name.endswith("weight.original1") for name in spared)  # the direction; the length is zeroed


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y / y.square().sum((2, 3), keepdim=True).sqrt())


def test_a_network_that_cannot_be_zeroed_says_so() -> None:
    net = Divided().eval()
    with pytest.raises(sc.CannotPrune, match="NaN as soon as whole channels are zero") as error:
        zeroing(net, X, ratios=0.5)
    assert "do: prune in one cut" in str(error.value)


def test_a_growing_part_is_nested_and_ends_at_the_goal() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.75, grow=3)
    optimizer, before, widths = sgd(net), {}, []
    for epoch in range(4):
        train(net, progress.hooks, optimizer, range(epoch, epoch + 1))
        now = {name: set(np.flatnonzero(mask)) for name, mask in progress._removed.items()}
        assert all(before[name] <= now[name] for name in before)
        before = now
        widths.append({name: len(gone) for name, gone in now.items()})
    for i, gone in enumerate(widths):
        part = min(1.0, (i + 1) / 3)
        assert gone == {
            n: d - max(d // 4, int(d * 0.25**part + 1e-9)) for n, d in {"a.0": 8, "b.0": 12, "c.0": 16}.items()
        }
    assert removed(progress.plan()) == before


@pytest.mark.parametrize("criterion", ["l1", "largest", "random"])
def test_what_went_stays_gone_under_any_criterion(criterion: str) -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, grow=2, criterion=criterion)
    optimizer = sgd(net)
    train(net, progress.hooks, optimizer, range(1))
    first = {name: mask.copy() for name, mask in progress._removed.items()}
    train(net, progress.hooks, optimizer, range(1, 3))
    assert all((progress._removed[name] | ~mask).all() for name, mask in first.items())
    assert {name: len(gone) for name, gone in removed(progress.plan()).items()} == {"a.0": 4, "b.0": 6, "c.0": 8}
    assert progress.plan().made_by["criterion"] == criterion


# Soft ------------------------------------------------------------------------------------------------------------


def test_soft_zeroes_the_filters_alone_and_they_regrow() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, soft=True)
    assert progress.hooks.after_backward is None
    assert progress.hooks.after_step is None
    optimizer = sgd(net)
    train(net, progress.hooks, optimizer, range(1))
    plan = progress.plan()
    assert not any(bool(t.any()) for t in entries(net, plan, ("writes",)))
    assert all(bool(t.all()) for t in entries(net, plan, ("scales",)))
    regrown: list[list[bool]] = []

    def seen(model: nn.Module) -> None:
        regrown.append([bool(t.any()) for t in entries(model, plan, ("writes",))])

    train(net, progress.hooks, optimizer, range(1, 2), seen=seen)
    assert all(regrown[0])


def test_soft_chooses_again() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, soft=True)
    progress.select_()
    first = progress.plan()
    with torch.no_grad():
        for layer in (net.a, net.b, net.c):  # training that brings back what was gone
            layer[0].weight += 10 * (layer[0].weight.abs().sum((1, 2, 3), keepdim=True) == 0)
    second = progress.plan()
    assert all(first.keep[name] != second.keep[name] for name in first.keep)
    assert all(removed(first)[name] <= set(second.keep[name]) for name in first.keep)


def test_finish_makes_the_two_networks_agree() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, soft=True)
    train(net, progress.hooks, sgd(net), range(2))
    plan = progress.plan()
    assert relative_error(sc.apply(net, plan)(X), net(X)) > 1e-3  # act(beta), which the smaller network drops
    assert progress.finish_().keep == plan.keep
    assert relative_error(sc.apply(net, plan)(X), net(X)) < 1e-5


def test_every_second_epoch_only() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5, every=2)
    optimizer = sgd(net)
    train(net, progress.hooks, optimizer, range(1))
    assert not progress._removed
    train(net, progress.hooks, optimizer, range(1, 2))
    assert progress._removed


# Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(soft: bool) -> None:
    def make(net: nn.Module) -> Zeroing:
        return zeroing(net, X, budget=sc.Budget(keep=0.4), grow=3, soft=soft)

    net = chain()
    progress = make(net)
    optimizer = sgd(net)
    train(net, progress.hooks, optimizer, range(2))
    assert progress.hooks.state is not None
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), dict(progress.hooks.state())))
    train(net, progress.hooks, optimizer, range(2, 4))

    again = chain(3)
    resumed = make(again)
    late = sgd(again)
    again.load_state_dict(saved[0])
    late.load_state_dict(saved[1])
    assert resumed.hooks.restore is not None
    resumed.hooks.restore(saved[2])
    train(again, resumed.hooks, late, range(2, 4))
    assert same_weights(again, net)
    assert resumed.plan() == progress.plan()


@pytest.mark.parametrize("soft", [False, True])
def test_a_state_from_before_the_first_choice_is_gone_on_from(soft: bool) -> None:
    def make(net: nn.Module) -> Zeroing:
        return zeroing(net, X, ratios=0.5, soft=soft)

    net, again = chain(), chain(3)
    progress, resumed = make(net), make(again)
    assert progress.hooks.state is not None
    assert resumed.hooks.restore is not None
    resumed.select_()  # as a schedule that zeroes at its start does, before it sees the checkpoint
    resumed.hooks.restore(dict(progress.hooks.state()))
    again.load_state_dict(net.state_dict())
    assert resumed.hooks.state is not None
    assert resumed.hooks.state() == progress.hooks.state()
    train(net, progress.hooks, sgd(net), range(2))
    train(again, resumed.hooks, sgd(again), range(2))
    assert same_weights(again, net)
    assert resumed.plan() == progress.plan()


def test_the_state_is_plain() -> None:
    net = chain()
    progress = zeroing(net, X, ratios=0.5)
    progress.select_()
    assert progress.hooks.state is not None
    assert all(isinstance(value, (torch.Tensor, int, float, str)) for value in progress.hooks.state().values())


def test_weights_that_were_loaded_meanwhile_are_chosen_from_anew() -> None:
    """As when the best epoch's weights come back after the last choice."""
    net = chain()
    progress = zeroing(net, X, ratios=0.5)
    progress.select_()
    other = chain(9)
    net.load_state_dict(other.state_dict())
    assert [len(k) for k in progress.plan().keep.values()] == [4, 6, 8]
    assert not progress._index.is_zero(dict(net.named_parameters()))


def test_state_of_another_network_is_refused() -> None:
    net, other = chain(), small()
    progress = zeroing(other, X, ratios=0.5)
    progress.select_()
    assert progress.hooks.state is not None
    state = progress.hooks.state()
    restore = zeroing(net, X, ratios=0.5).hooks.restore
    assert restore is not None
    with pytest.raises(sc.BadRequest, match="the saved state belongs to another network: it does not fit the group"):
        restore(state)


def test_hooks_of_another_network_are_refused() -> None:
    progress = zeroing(chain(), X, ratios=0.5)
    assert progress.hooks.after_epoch is not None
    with pytest.raises(sc.BadRequest, match="hooks were made for another network than the Chain") as error:
        progress.hooks.after_epoch(chain())
    assert "do: make them for the very network that you train" in str(error.value)
    assert progress.epochs == 0


def test_wrong_settings_are_said_at_once() -> None:
    with pytest.raises(sc.BadRequest, match="cannot zero with every=0, grow=0"):
        zeroing(chain(), X, every=0, ratios=0.5)
    with pytest.raises(sc.Unreachable):
        zeroing(chain(), X, budget=sc.Budget(keep=1e-4))
    net = chain()
    with pytest.raises(sc.BadRequest, match="the plan was not made on this very network"):
        zero_(chain(), sc.plan(net, X, ratios=0.5))
