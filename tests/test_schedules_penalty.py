"""The growing penalty: its value, its gradient, how it grows, whom it meets, and that a run can go on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from bare_loop import X, chain, same_weights, sgd, small, train
from networks import NETWORKS, randomise
from secateur.groups import couple
from secateur.plans import named_tensors
from secateur.schedules import GrowingPenalty, Growth, growing_penalty

ROLES = ("writes", "scales", "follows")


def naive(model: nn.Module, groups: Any, weights: dict[str, torch.Tensor], roles: Any = ROLES) -> torch.Tensor:
    """``1/2 sum_c w_c ||all that makes channel c||^2``, channel by channel."""
    tensors, total = named_tensors(model), torch.zeros((), dtype=torch.float64)
    for group in groups:
        for c in range(group.channels):
            for part in group.slices:
                tensor = tensors[part.tensor]
                if part.role in roles and isinstance(tensor, nn.Parameter):
                    for position in part.positions[c]:
                        piece = tensor.select(part.axis, int(position)).double()
                        total = total + weights[group.name][c] * piece.square().sum() / 2
    return total


def chosen(plan: sc.Plan) -> dict[str, torch.Tensor]:
    return {g.name: torch.tensor([float(c not in plan.keep[g.name]) for c in range(g.channels)]) for g in plan.groups}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def of_penalty(sparse: GrowingPenalty, model: nn.Module) -> torch.Tensor:
    assert sparse.hooks.penalty is not None
    return sparse.hooks.penalty(model)


# Value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_stage", "conv_grouped", "tied_weights", "split_uneven", "flatten_linear"])
@pytest.mark.parametrize("kind", ["greg", "depgraph"])
def test_value_and_gradient_are_those_of_the_naive_loop(name: str, kind: Any) -> None:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(make(), 0).double()
    graph = sc.trace(model, inputs()[0].double())
    groups = couple(graph).groups
    growth = Growth(kind=kind, step=0.3, ceiling=2.0)
    if kind == "greg":
        weights = chosen(sc.plan(graph, ratios=0.5))
    else:
        weights = {}
        for group in groups:
            s = torch.stack(
                [
                    naive(model, [group], {group.name: torch.eye(group.channels)[c]}).detach() * 2
                    for c in range(group.channels)
                ]
            )
            weights[group.name] = 2 ** (4.0 * (s.max() - s) / (s.max() - s.min()))
    want = 0.3 * naive(model, groups, weights)
    want.backward()
    wanted = gradients(model)
    model.zero_grad()

    value = of_penalty(growing_penalty(graph, growth=growth, as_loss=True, ratios=0.5), model)
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-9)
    value.backward()
    by_loss = gradients(model)
    model.zero_grad()
    hooks = growing_penalty(graph, growth=growth, ratios=0.5).hooks
    assert hooks.penalty is None
    assert hooks.after_backward is not None
    hooks.after_backward(model)
    for w, a, b in zip(wanted, by_loss, gradients(model), strict=True):
        assert torch.allclose(w, a, rtol=1e-9, atol=1e-12)
        assert torch.allclose(w, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_added_to_what_is_there() -> None:
    net = chain()
    sparse = growing_penalty(net, X, ratios=0.5)
    net(X).sum().backward()
    before = net.a[0].weight.grad.clone()
    assert sparse.hooks.after_backward is not None
    sparse.hooks.after_backward(net)
    gone = [c for c in range(8) if c not in sparse.plan().keep["a.0"]]
    added = net.a[0].weight.grad - before
    assert torch.allclose(added[gone], 1e-4 * net.a[0].weight[gone], rtol=1e-3, atol=1e-7)
    assert not added[[c for c in range(8) if c not in gone]].any()


@pytest.mark.parametrize("kind", ["greg", "depgraph"])
def test_as_gradient_and_as_loss_train_alike(kind: Any) -> None:
    ends = []
    for as_loss in (False, True):
        net = small()
        growth = Growth(kind=kind, step=0.01, every=2)
        sparse = growing_penalty(net, X, growth=growth, as_loss=as_loss, ratios=0.5)
        train(net, sparse.hooks, sgd(net, 0.01), range(2))
        ends.append(net)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_what_does_not_learn_is_left_alone() -> None:
    net = chain()
    net.a.requires_grad_(False)
    for as_loss in (False, True):
        net.zero_grad()
        sparse = growing_penalty(net, X, as_loss=as_loss, ratios=0.5)
        if as_loss:
            of_penalty(sparse, net).backward()
        else:
            assert sparse.hooks.after_backward is not None
            sparse.hooks.after_backward(net)
        assert net.a[0].weight.grad is None
        assert net.b[0].weight.grad is not None


def test_roles_choose_what_is_penalised_and_exclude_whom() -> None:
    net = chain()
    graph = sc.trace(net, X)
    for roles in (("writes",), ("writes", "scales", "follows", "reads")):
        growth = Growth(step=1.0, roles=roles)
        sparse = growing_penalty(graph, growth=growth, as_loss=True, ratios=0.5, exclude="b.*")
        plan = sc.plan(graph, ratios=0.5, exclude="b.*")
        want = naive(net, plan.groups, chosen(plan), roles)
        assert float(of_penalty(sparse, net).detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    depgraph = growing_penalty(graph, growth=Growth(kind="depgraph"), ratios=0.5, exclude="b.*")
    assert depgraph.hooks.after_backward is not None
    net.zero_grad()
    depgraph.hooks.after_backward(net)
    assert net.b[0].weight.grad is None
    assert net.c[0].weight.grad is not None


# Growth ----------------------------------------------------------------------------------------------------------


def test_lambda_grows_to_the_ceiling() -> None:
    net = chain()
    sparse = growing_penalty(net, X, growth=Growth(step=0.1, every=2, ceiling=0.35), ratios=0.5)
    found = []
    assert sparse.hooks.after_step is not None
    for _ in range(10):
        found.append(sparse.strength)
        sparse.hooks.after_step(net)
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.35, 0.35, 0.35, 0.35])


def test_greg_shrinks_what_it_has_chosen_and_cuts_that() -> None:
    net = chain()
    first = sc.plan(net, X, ratios=0.5)
    before = naive(net, first.groups, chosen(first))
    sparse = growing_penalty(net, X, growth=Growth(step=0.2, every=1, ceiling=5), ratios=0.5)
    train(net, sparse.hooks, sgd(net), range(12))
    after = naive(net, first.groups, chosen(first))
    assert after < 1e-2 * before
    plan = sparse.plan()
    assert plan.keep == first.keep
    assert plan.made_by["schedule"] == "growing penalty, greg"
    assert plan.made_by["ratios"] == 0.5
    with torch.no_grad():
        gap = (sc.apply(net, plan)(X) - net(X)).abs().max() / net(X).abs().max()
    assert gap < 1e-2, "the cut should hardly show after the penalty"


def test_greg_2_grows_on_all_alike_before_it_chooses() -> None:
    net = chain()
    growth = Growth(step=0.1, every=1, ceiling=1.0, choose_at=0.25)
    sparse = growing_penalty(net, X, growth=growth, as_loss=True, ratios=0.5)
    everyone = {g.name: torch.ones(g.channels) for g in sparse.plan().groups}
    assert sparse.hooks.after_step is not None
    for strength in (0.1, 0.2):
        want = strength * naive(net, sparse.plan().groups, everyone)
        assert float(of_penalty(sparse, net).detach()) == pytest.approx(float(want.detach()), rel=1e-5)
        sparse.hooks.after_step(net)
    with torch.no_grad():
        net.a[0].weight.copy_(net.a[0].weight.flip(0))  # the norms when it chooses count, not those at the start
    late = sc.plan(net, X, ratios=0.5)
    want = 0.3 * naive(net, late.groups, chosen(late))
    assert float(of_penalty(sparse, net).detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert sparse.plan().keep == late.keep


def test_depgraph_weighs_anew_when_lambda_grows_and_chooses_in_the_end() -> None:
    net = chain()
    growth = Growth(kind="depgraph", step=0.1, every=2)
    sparse = growing_penalty(net, X, growth=growth, as_loss=True, budget=sc.Budget(keep=0.5))
    assert sparse.hooks.after_step is not None
    seen = []
    for _ in range(3):
        of_penalty(sparse, net)
        seen.append(sparse._weights["a.0"].clone())
        sparse.hooks.after_step(net)
        with torch.no_grad():
            net.a[0].weight[0] *= 3
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert all(float(w.min()) == 1 and float(w.max()) == 16 for w in seen)
    assert sparse.plan().keep == sc.plan(net, X, budget=sc.Budget(keep=0.5)).keep


def test_channels_that_are_all_alike_weigh_one() -> None:
    net = chain()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.1)
    with pytest.warns(sc.SecateurWarning, match="scores all channels of a group the same"):
        sparse = growing_penalty(net, X, growth=Growth(kind="depgraph"), as_loss=True, ratios=0.5)
    of_penalty(sparse, net)
    assert all(bool((w == 1).all()) for w in sparse._weights.values())


# Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["greg", "greg-2", "depgraph"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(kind: str) -> None:
    settings: dict[str, Any] = {"kind": "greg", "choose_at": 0.04} if kind == "greg-2" else {"kind": kind}

    def make(net: nn.Module) -> GrowingPenalty:
        return growing_penalty(net, X, growth=Growth(step=0.01, every=2, **settings), ratios=0.5)

    net = chain()
    sparse = make(net)
    optimizer = sgd(net)
    train(net, sparse.hooks, optimizer, range(1))  # 3 steps: in the middle between two growths
    assert sparse.hooks.state is not None
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), dict(sparse.hooks.state())))
    train(net, sparse.hooks, optimizer, range(1, 4))

    again = chain(3)
    resumed = make(again)
    late = sgd(again)
    again.load_state_dict(saved[0])
    late.load_state_dict(saved[1])
    assert resumed.hooks.restore is not None
    resumed.hooks.restore(saved[2])
    train(again, resumed.hooks, late, range(1, 4))
    assert same_weights(again, net)
    assert resumed.plan() == sparse.plan()
    assert resumed.steps == 12


def test_state_of_another_network_is_refused() -> None:
    net = small()
    sparse = growing_penalty(net, X, ratios=0.5, as_loss=True)
    of_penalty(sparse, net)
    assert sparse.hooks.state is not None
    restore = growing_penalty(chain(), X, ratios=0.5).hooks.restore
    assert restore is not None
    with pytest.raises(sc.BadRequest, match="the saved state belongs to another network"):
        restore(sparse.hooks.state())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"kind": "grek"}, "there is no penalty 'grek'; did you mean 'greg'?"),
        ({"step": 0.0}, "step above 0"),
        ({"every": 0}, "every at least 1"),
        ({"choose_at": 2.0}, "choose_at=2.0 is above the ceiling=1.0"),
        ({"roles": ("wirtes",)}, "are not some of writes, reads, scales, follows"),
    ],
)
def test_wrong_settings_are_said_at_once(wrong: Any, text: str) -> None:
    with pytest.raises(sc.BadRequest) as error:
        growing_penalty(chain(), X, growth=Growth(**wrong), ratios=0.5)
    assert text in str(error.value)


def test_hooks_of_another_network_are_refused() -> None:
    sparse = growing_penalty(chain(), X, ratios=0.5)
    assert sparse.hooks.after_backward is not None
    with pytest.raises(sc.BadRequest, match="hooks were made for another network"):
        sparse.hooks.after_backward(chain())
