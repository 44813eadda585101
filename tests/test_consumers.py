"""Which calls read a group, and where."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils.parametrizations import weight_norm

import secateur as sc
from secateur.consumers import consumers_of
from secateur.errors import CannotPrune
from secateur.groups import couple

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Computed(nn.Module):
    """The reader's weight is computed of a parameter."""

    def __init__(self, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.weight, self.by = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(5, 8, 3, 3)), by

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self.first(x).relu(), self.by(self.weight))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), weight_norm(nn.Conv2d(8, 5, 3)), nn.Conv2d(5, 2, 1))


def standardised() -> nn.Module:
    return Computed(lambda w: (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("make", [normalised, standardised])
def test_weights_that_change_when_channels_go_have_no_parts_to_compare(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(CannotPrune, match="computed from all channels together, and changes when some go"):
        sc.plan(make(), X, criterion="thinet", ratios=0.5, data=[X])


def test_weights_that_are_computed_place_by_place_have() -> None:
    model = Computed(lambda w: torch.tanh(w) * 2)
    graph = sc.trace(model, X)
    coupling = couple(graph)
    (found,), others = consumers_of(coupling, coupling.groups[0])
    assert not others
    assert found.whole
    assert found.columns.tolist() == found.channels.tolist() == list(range(8))
    plan = sc.plan(graph, criterion="thinet", ratios=0.5, data=[X])
    gone = sorted(set(range(8)) - set(plan.keep["first"]))
    parts = conv2d(model.first(X).relu()[:, gone], model.by(model.weight)[:, gone])
    lost = model(X) - sc.apply(graph, plan)(X)
    assert torch.allclose(parts, lost, rtol=1e-5, atol=1e-5)


class Loop(nn.Module):
    """One image of a batch after the other."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(image) for image in x.unbind(0)])


@pytest.mark.parametrize("loop", [False, True])
def test_without_a_batch_channels_lie_in_front(loop: bool) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 2))
    model = Loop(one).double() if loop else one.double()
    x = torch.randn(*[2] * loop, 3, 7, 9, dtype=torch.float64)
    graph = sc.trace(model, x)
    prefix = "one." if loop else ""
    assert [(g.name, g.channels) for g in couple(graph).groups] == [(f"{prefix}0", 4), (f"{prefix}2", 3)]
    for criterion in ("l1", "thinet", "thinet_sampled", "thinet_sequential"):
        plan = sc.plan(graph, criterion=criterion, ratios=0.5, data=[x])
        assert torch.allclose(sc.apply(graph, plan)(x), sc.masked(graph, plan)(x), rtol=1e-9, atol=1e-12)
    plan = sc.plan(graph, criterion="thinet", ratios={f"{prefix}0": 0.5}, data=[x])
    with torch.no_grad():
        maps = one[1](one[0](x)).movedim(-3, 0)  # channels c and c + 4 go together
        lost = {}
        for pair in itertools.combinations(range(4), 2):
            cut = torch.zeros_like(maps)
            at = [c for channel in pair for c in (channel, channel + 4)]
            cut[at] = maps[at]
            lost[pair] = float(conv2d(cut.movedim(0, -3), one[2].weight, groups=2).square().sum())
    first = min(range(4), key=lambda c: float(alone(maps, one[2], c)))
    gone = set(range(4)) - set(plan.keep[f"{prefix}0"])
    assert gone == set(min((pair for pair in lost if first in pair), key=lost.__getitem__))


def alone(maps: Tensor, reader: nn.Module, channel: int) -> Tensor:
    cut = torch.zeros_like(maps)
    cut[[channel, channel + 4]] = maps[[channel, channel + 4]]
    return conv2d(cut.movedim(0, -3), reader.weight.detach(), groups=2).square().sum()
