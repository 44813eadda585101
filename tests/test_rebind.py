"""Carrying an optimiser over: the next step on the pruned network is the dense network's, without what went."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn, optim

from example_plans import X, network, pruned, trained
from secateur.errors import BadRequest, WrongModel
from secateur.optimisers import rebind
from secateur.plans import Plan
from secateur.surgery import rebuild

OPTIMISERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "nadam": optim.NAdam,
    "rprop": optim.Rprop,
    "asgd": optim.ASGD,
}


def sliced(plan: Plan, name: str, value: torch.Tensor) -> torch.Tensor:
    for axis, positions in plan.kept().get(name, {}).items():
        value = value.index_select(axis, torch.from_numpy(positions))
    return value


def small_and_plan() -> tuple[nn.Module, nn.Module, Plan]:
    """Dense network, pruned network, plan; the weights of both are the test's own."""
    dense = trained()
    plan = pruned()[1]
    return dense, rebuild(dense, plan), plan


def give_gradients(dense: nn.Module, small: nn.Module, plan: Plan, *, seed: int = 0) -> None:
    """The same gradients for both, sliced for the small one."""
    generator = torch.Generator().manual_seed(seed)
    successors = dict(small.named_parameters())
    for name, parameter in dense.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            successors[name].grad = sliced(plan, name, parameter.grad).clone()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_go_on_as_in_the_dense_network(name: str) -> None:
    dense, small, plan = small_and_plan()
    old = OPTIMISERS[name](dense.parameters())
    for seed in range(3):
        give_gradients(dense, small, plan, seed=seed)
        old.step()
    with torch.no_grad():  # the pruned network takes over the weights as trained so far
        for key, parameter in small.named_parameters():
            parameter.copy_(sliced(plan, key, dense.get_parameter(key)))
    new = rebind(old, small, plan, model=dense)
    assert type(new) is type(old)
    for seed in (3, 4):
        give_gradients(dense, small, plan, seed=seed)
        old.step()
        new.step()
    for key, parameter in small.named_parameters():
        assert torch.allclose(parameter, sliced(plan, key, dense.get_parameter(key)), rtol=1e-6, atol=0), key


def test_groups_hyperparameters_order_and_frozen_parameters_stay() -> None:
    dense, small, plan = small_and_plan()
    dense[0].weight.requires_grad_(False)
    small[0].weight.requires_grad_(False)
    biases = [dense[5].bias, dense[0].bias]
    weights = [dense[0].weight, dense[3].weight, dense[5].weight]
    old = optim.SGD([{"params": weights, "lr": 0.5, "name": "w"}, {"params": biases}], lr=0.1, momentum=0.9)
    give_gradients(dense, small, plan)
    old.step()
    new = rebind(old, small, plan, model=dense)
    assert [[id(p) for p in group["params"]] for group in new.param_groups] == [
        [id(small[0].weight), id(small[3].weight), id(small[5].weight)], [id(small[5].bias), id(small[0].bias)],
    ]  # fmt: skip
    assert [(g["lr"], g.get("name"), g["momentum"]) for g in new.param_groups] == [(0.5, "w", 0.9), (0.1, None, 0.9)]
    assert new.defaults == old.defaults
    assert small[0].weight not in new.state
    assert new.state[small[5].weight]["momentum_buffer"].shape == small[5].weight.shape


def test_the_old_optimiser_is_untouched_and_shares_nothing() -> None:
    dense, small, plan = small_and_plan()
    old = optim.Adam(dense.parameters(), lr=0.01)
    give_gradients(dense, small, plan)
    old.step()
    before = copy.deepcopy(old.state_dict())
    new = rebind(old, small, plan, model=dense)
    new.param_groups[0]["lr"] = 1.0
    give_gradients(dense, small, plan, seed=1)
    new.step()
    after = old.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())
    assert all(p is q for p, q in zip(old.param_groups[0]["params"], dense.parameters(), strict=True))


def test_factored_moments_are_sliced_along_the_axes_they_have() -> None:
    dense, small, plan = small_and_plan()
    old = optim.Adafactor(dense.parameters(), lr=0.01)
    give_gradients(dense, small, plan)
    old.step()
    new = rebind(old, small, plan, model=dense)
    name, parameter = "5.weight", small[5].weight
    row, column = (old.state[dense[5].weight][key] for key in ("row_var", "col_var"))
    assert (row.shape, column.shape) == ((5, 1), (1, 24))
    assert torch.equal(new.state[parameter]["row_var"], row)
    assert torch.equal(new.state[parameter]["col_var"], sliced(plan, name, column))
    new.step()


def test_the_plan_s_own_network_is_used_where_it_is_still_held() -> None:
    small, plan = pruned()
    assert plan.graph is not None
    dense = plan.graph.model
    old = optim.SGD(dense.parameters(), lr=0.1)
    assert rebind(old, small, plan).param_groups[0]["params"][0] is small[0].weight
    with pytest.raises(
        BadRequest, match=r"have no names\n  do: rebind\(optimizer, small, plan, model=the dense network\)"
    ):
        rebind(old, small, replace(plan, graph=None))


def test_a_scheduler_goes_on_with_the_new_optimiser() -> None:
    dense, small, plan = small_and_plan()
    old = optim.SGD(dense.parameters(), lr=1.0, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(old, step_size=1, gamma=0.5)
    give_gradients(dense, small, plan)
    old.step()
    scheduler.step()
    new = scheduler.optimizer = rebind(old, small, plan, model=dense)
    give_gradients(dense, small, plan)
    before = [parameter.clone() for parameter in (dense[0].weight, small[0].weight)]
    new.step()
    scheduler.step()
    assert new.param_groups[0]["lr"] == 0.25
    assert old.param_groups[0]["lr"] == 0.5
    assert torch.equal(dense[0].weight, before[0])
    assert not torch.equal(small[0].weight, before[1])


def test_hooks_and_plain_attributes_come_along() -> None:
    dense, small, plan = small_and_plan()
    old = optim.SGD(dense.parameters(), lr=0.1)
    seen: list[object] = []
    old.register_step_post_hook(lambda optimiser, *_: seen.append(optimiser))
    old.note = {"epoch": 3}  # type: ignore[attr-defined]
    new = rebind(old, small, plan, model=dense)
    give_gradients(dense, small, plan)
    new.step()
    assert seen == [new]
    assert new.note == {"epoch": 3}  # type: ignore[attr-defined]


def test_what_cannot_be_carried_over_is_refused() -> None:
    dense, small, plan = small_and_plan()
    other = network()
    with pytest.raises(
        BadRequest, match=r"param_groups\[0\] of the optimiser holds a parameter \[8, 3, 3, 3\] that is none"
    ):
        rebind(optim.SGD(other.parameters(), lr=0.1), small, plan, model=dense)
    with pytest.raises(
        WrongModel, match=r"tensor '0.weight' is \[8, 3, 3, 3\] in the pruned network but the plan leaves \[4"
    ):
        rebind(optim.SGD(dense.parameters(), lr=0.1), other, plan, model=dense)
    with pytest.raises(
        BadRequest, match=r"parameter '5.weight' of the optimiser is not in the pruned network any more"
    ):
        rebind(optim.SGD(dense.parameters(), lr=0.1), small[:5], plan, model=dense)
    with pytest.raises(BadRequest, match=r"LBFGS keeps tensors of its own in '_params', which cannot be carried over"):
        rebind(optim.LBFGS(dense.parameters()), small, plan, model=dense)
    old = optim.SGD(dense.parameters(), lr=0.1)
    old.state[dense[0].weight]["odd"] = torch.zeros(7)
    with pytest.raises(
        BadRequest, match=r"state 'odd' of parameter '0.weight' is \[7\] and the parameter \[8, 3, 3, 3\]"
    ):
        rebind(old, small, plan, model=dense)
    old.state[dense[0].weight]["odd"] = [torch.zeros(8, 3, 3, 3)]
    with pytest.raises(BadRequest, match=r"state 'odd' of parameter '0\.weight' is a list of tensors"):
        rebind(old, small, plan, model=dense)
    wide = network()
    wide[3] = nn.Conv2d(8, 7, 3)
    with pytest.raises(WrongModel, match=r"tensor '3.weight' is \[6, 8, 3, 3\] in the plan's network but \[7"):
        rebind(optim.SGD(wide.parameters(), lr=0.1), small, plan, model=wide)


def test_training_goes_on() -> None:
    """End to end: three steps dense, pruned, three steps small, by real gradients."""
    small, plan = pruned()
    assert plan.graph is not None
    dense = copy.deepcopy(plan.graph.model)
    old = optim.SGD(dense.parameters(), lr=1e-7, momentum=0.9)
    for model, optimiser in ((dense, old), (small, rebind(old, small, plan, model=dense))):
        losses = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
