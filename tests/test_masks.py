"""``masked``: the dense network, removed channels never read. The reference must itself be right."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from law import relative_error, to_double, zero_readers
from networks.common import Apply, Sandwich, randomise, tensor
from secateur.interpreter import _group_norm, cut

X = to_double(tensor(2, 3, 6, 6))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.softplus(self.b(F.softplus(self.n(self.a(x))))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double().eval()
    randomise(model, 0)
    return model


def test_a_plan_that_keeps_everything_is_the_dense_network() -> None:
    model = net()
    dense = sc.masked(model, sc.plan(model, X, ratios=0.0))
    assert relative_error(dense(X), model(X)) <= 1e-12


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_the_two_oracles_agree(ratio: float) -> None:
    model = net()
    plan = sc.plan(model, X, ratios=ratio)
    want = zero_readers(model, plan, X)
    assert relative_error(sc.masked(model, plan)(X), want) < 1e-12
    assert relative_error(want, model(X)) > 1e-3


def test_parameters_are_copies_under_their_names_and_values_are_dense() -> None:
    model = net()
    plan = sc.plan(model, X, ratios=0.5)
    dense = sc.masked(model, plan)
    own = dict(model.named_parameters())
    assert [n for n, _ in dense.named_parameters()] == list(own)
    for name, p in dense.named_parameters():
        assert torch.equal(p, own[name])
        assert p.data_ptr() != own[name].data_ptr()
    with torch.no_grad():
        for p in dense.parameters():
            p.zero_()
    assert float(model.a.weight.detach().abs().max()) > 0
    assert not [n for n in vars(model) if "secateur" in n]


def test_gradients_reach_the_masked_parameters_but_not_what_is_removed() -> None:
    model = net()
    plan = sc.plan(model, X, ratios=0.5)
    dense: Any = sc.masked(model, plan)
    dense(X).square().sum().backward()
    gone = [c for c in range(8) if c not in plan.keep["a"]]
    grad = dense.b.weight.grad
    assert float(grad[:, gone].abs().max()) == 0
    assert float(dense.a.weight.grad[gone].abs().max()) == 0
    assert float(grad[:, list(plan.keep["a"])].abs().amax(0).min()) > 0
    assert model.b.weight.grad is None


def test_copies_and_dtypes() -> None:
    model = net()
    dense = sc.masked(model, sc.plan(model, X, ratios=0.5))
    twin = copy.deepcopy(dense).float()
    assert relative_error(twin(X.float()), dense(X)) < 1e-5
    assert relative_error(copy.deepcopy(dense)(X), dense(X)) == 0


def test_it_is_the_eval_pass_whatever_the_mode() -> None:
    model = net().train()
    dense = sc.masked(model, sc.plan(model, X, ratios=0.0))
    dense.train()
    mean = model.n.running_mean.clone()  # type: ignore[union-attr]
    assert relative_error(dense(X), model.eval()(X)) <= 1e-12
    assert torch.equal(model.n.running_mean, mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plan", "coupling", "sources", "skeletons", "tables"])
def test_a_users_module_may_have_any_name(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Conv2d(3, 6, 1))
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.get_submodule(name)(x).sin().roll(2, 1))

    model = Named().double().eval()
    plan = sc.plan(model, X, ratios={name: 3})
    small = sc.apply(model, dataclasses.replace(plan, keep={name: (0, 2, 3)}))
    dense = sc.masked(model, dataclasses.replace(plan, keep={name: (0, 2, 3)}))
    assert relative_error(small(X), dense(X)) < 1e-9
    assert set(dense.state_dict()) == set(model.state_dict())


def test_removed_channels_may_hold_anything() -> None:
    """Not read means not read: NaN in a filter that goes reaches nothing."""
    model = net()
    plan = sc.plan(model, X, ratios=0.5)
    want = sc.masked(model, plan)(X)
    gone = next(c for c in range(8) if c not in plan.keep["a"])
    with torch.no_grad():
        model.a.weight[gone] = float("nan")
    assert torch.equal(sc.masked(model, plan)(X), want)
    assert relative_error(sc.apply(model, plan)(X), want) < 1e-9


@pytest.mark.parametrize("parts", [1, 2, 4, 12])
def test_group_norm_by_definition(parts: int) -> None:
    """All kept: torch's own. Some removed: statistics of the kept ones of each part of the *dense* partition."""
    x = to_double(tensor(3, 12, 4, 4, seed=2))
    weight, bias = to_double((tensor(12, seed=3), tensor(12, seed=4)))
    arguments = {"input": x, "num_groups": parts, "weight": weight, "bias": bias, "eps": 1e-5}
    assert relative_error(_group_norm(arguments, None), F.group_norm(x, parts, weight, bias)) < 1e-12
    mask = torch.tensor([True, False, True, True, True, True, True, False, True, True, True, True])
    got = _group_norm(arguments, mask)
    size = 12 // parts
    for part in range(parts):
        here = [c for c in range(part * size, (part + 1) * size) if mask[c]]
        if here:
            assert relative_error(got[:, here], F.group_norm(x[:, here], 1, weight[here], bias[here])) < 1e-12
    assert float(got[:, ~mask].abs().max()) == 0


def test_norms_take_statistics_over_what_is_kept() -> None:
    model = Sandwich(
        nn.Sequential(Apply(lambda t: t.movedim(1, -1)), nn.LayerNorm(12), Apply(lambda t: t.movedim(-1, 1)))
    )
    model = randomise(model, 0).double().eval()  # type: ignore[assignment]
    plan = sc.plan(model, X, ratios={"stem": 5})
    kept = list(plan.keep["stem"])
    h = F.softplus(model.stem(X))[:, kept].movedim(1, -1)
    norm: Any = model.middle[1]  # type: ignore[index]
    h = F.layer_norm(h, (5,), norm.weight[kept], norm.bias[kept]).movedim(-1, 1)
    want = F.conv2d(h, model.head.weight[:, kept], model.head.bias)  # type: ignore[index, arg-type]
    assert relative_error(sc.masked(model, plan)(X), want) < 1e-12
    assert relative_error(sc.apply(model, plan)(X), want) < 1e-12


def test_cut_keeps_positions_in_order() -> None:
    value = torch.arange(24).view(2, 3, 4)
    masks = [None, torch.tensor([True, False, True]), torch.tensor([False, True, True, False])]
    assert torch.equal(cut(value, masks), value[:, [0, 2]][:, :, 1:3])
