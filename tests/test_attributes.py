"""The numbers that torch's own modules hold about their widths are those of their new weights."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

import secateur as sc
from networks.common import tensor

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
