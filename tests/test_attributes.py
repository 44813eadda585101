"""The numbers that torch's own modules hold about their widths are those of their new weights."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from networks.common import tensor
from secateur.surgery import rebuild

X = tensor(2, 3, 6, 6)


def test_numbers_of_modules_without_weights() -> None:
    """An instance norm without weights still says how many features it has, and torch warns if that is wrong."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 1))
    plan = sc.plan(model, X, ratios=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small: Any = sc.apply(model, plan)
    assert small[1].num_features == 4


def test_numbers_of_other_modules() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.d = nn.Conv2d(8, 16, 3, groups=8)
            self.p, self.g = nn.PReLU(16), nn.GroupNorm(1, 16)
            self.t = nn.ConvTranspose2d(16, 6, 2)
            self.l = nn.LayerNorm(6)
            self.f = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.g(self.p(self.d(self.a(x))))
            return self.f(self.l(self.t(h).movedim(1, -1)))

    model = Depthwise().eval()
    plan = sc.plan(model, X, ratios={"a": 5, "t": 4})
    small: Any = sc.apply(model, plan)
    assert (small.d.in_channels, small.d.out_channels, small.d.groups) == (5, 10, 5)
    assert (small.p.num_parameters, small.g.num_channels, small.g.num_groups) == (10, 10, 1)
    assert (small.t.in_channels, small.t.out_channels) == (10, 4)
    assert small.l.normalized_shape == (4,)
    assert (small.f.in_features, small.f.out_features) == (4, 4)
    assert repr(small.d).startswith("Conv2d(5, 10")


@pytest.mark.parametrize(("name", "value"), [("forward", 1), ("training", 1), ("padding_mode", 1), ("weight", 1)])
def test_a_hostile_plan_sets_no_other_attribute(name: str, value: int) -> None:
    """Edits come from a file; they may only set what surgery could have set."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    plan = dataclasses.replace(sc.plan(model, X, ratios=0.5), edits=(sc.Edit("attribute", "0", name, value),))
    with pytest.raises(sc.BadPlan, match=f"sets 0.{name}, which is no integer"):
        rebuild(model, plan)


class Padded(nn.Module):
    """An option-A shortcut: six channels, and three zeros on either side."""

    def __init__(self, by_attribute: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 1), nn.Conv2d(12, 4, 1)
        self.by_attribute, self.sides = by_attribute, (0, 0, 0, 0, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.a(x))
        pads = self.sides if self.by_attribute else (0, 0, 0, 0, 3, 3)
        return self.c(torch.sigmoid(self.b(h) + F.pad(h, pads)))


@pytest.mark.parametrize(("by_attribute", "tier"), [(True, "attributes"), (False, "graph")])
def test_padded_channels_are_channels_of_their_own(by_attribute: bool, tier: str) -> None:
    model = Padded(by_attribute).double().eval()
    plan = sc.plan(model, X.double(), criterion="random", ratios=0.4, seed=1)
    assert {g.name: g.channels for g in plan.groups} == {"a": 6, "b": 6}
    small = sc.apply(model, plan)
    made = sc.record(small)
    assert made is not None
    assert made.tier == tier
    fresh = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(small(fresh), sc.masked(model, plan)(fresh), rtol=1e-9, atol=1e-12)


def test_padded_channels_are_left_alone_to_keep_the_module() -> None:
    model = Padded(False).eval()
    plan = sc.plan(model, X, ratios=0.4, prefer="module")
    assert {g.name: g.channels for g in plan.groups} == {"a": 6}
    made = sc.record(sc.apply(model, plan))
    assert made is not None
    assert made.tier == "module"
    assert sc.Plan.from_json(plan.to_json()).made_by["prefer"] == "module"
    assert sc.record(sc.apply(model, sc.Plan.from_json(plan.to_json()))) is not None
