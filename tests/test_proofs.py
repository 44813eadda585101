"""What could hide a mistake from the check, one at a time: each is seen, proved by other means, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from networks.common import tensor
from secateur.proofs import redrawn

X = tensor(1, 3, 8, 8)


class Block(nn.Module):
    """Three convolutions, two heads and a gate that training closed; ``function`` puts them together."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.c, self.d = nn.Conv2d(10, 4, 1), nn.Conv2d(10, 4, 1)
        self.gate = nn.Parameter(torch.tensor(-60.0))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Hidden:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def tier_of(function: Callable[[Any, Tensor], Any]) -> str:
    torch.manual_seed(0)
    model = Block(function).eval()
    made = sc.record(sc.apply(model, sc.plan(model, X, ratios=0.4)))
    assert made is not None
    assert made.difference is not None
    assert made.difference < 1e-9
    return made.tier


def rolled(net: Any, x: Tensor) -> Tensor:
    """Slicing alone gets this branch wrong."""
    return net.d(net.b(net.a(x).roll(3, 1)))


def test_a_closed_gate_hides_nothing() -> None:
    assert tier_of(lambda net, x: net.c(net.a(x)) + torch.sigmoid(net.gate) * rolled(net, x)) == "graph"


def test_the_imaginary_part_counts() -> None:
    assert tier_of(lambda net, x: torch.complex(net.c(net.a(x)), rolled(net, x))) == "graph"


def test_random_numbers_are_the_same_on_both_sides() -> None:
    assert tier_of(lambda net, x: net.c(net.b(net.a(x)) + torch.rand(()))) == "module"


def test_an_expanded_map_is_tied_to_what_it_is_expanded_as() -> None:
    assert tier_of(lambda net, x: net.c(net.a(x) * net.b(net.a(x)).expand_as(net.a(x)))) == "module"


def test_switched_off_autocast_and_no_grad_are_written_out() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = net.a(x)
        with torch.autocast("cpu", enabled=False):
            return net.c(net.b(h))

    assert tier_of(forward) == "module"


def test_autocast_inside_forward_is_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.c(net.b(net.a(x)))

    with pytest.raises(sc.CannotCapture, match=r"switches autocast on inside its forward(.|\n)*around the call"):
        tier_of(forward)


@pytest.mark.parametrize(
    "wrap", [Hidden, lambda y: {"logits": y, "other": Hidden(y)}], ids=["alone", "beside a tensor"]
)
def test_outputs_that_cannot_be_seen_are_refused(wrap: Callable[[Tensor], Any]) -> None:
    with pytest.raises(sc.CannotCapture, match=r"returns a Hidden, which may hide tensors(.|\n)*dataclasses"):
        tier_of(lambda net, x: wrap(net.c(net.b(net.a(x)))))


def test_no_output_is_refused() -> None:
    with pytest.raises(sc.CannotCapture, match="returns no tensor"):
        tier_of(lambda net, x: None)


def test_a_number_that_depends_on_the_batch_is_left_to_the_users_own_code() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.c(net.b(net.a(x))), x.shape[0]

    model = Block(forward).eval()
    plan = sc.plan(model, X, ratios=0.4)
    assert sc.apply(model, plan)(torch.cat([X, X, X]))[1] == 3
    with pytest.raises(sc.CannotCapture, match="a number that depends on the batch"):
        sc.masked(model, plan)


def test_drawing_anew_says_nothing_about_gradients() -> None:
    """A warning would make a way of cutting fail for those who turn warnings into errors."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        found = redrawn({"scale": nn.Parameter(torch.ones(3)), "shift": nn.Parameter(torch.zeros(3))})
    finally:
        torch.set_warn_always(before)
    assert float(found["scale"].min()) >= 0.5
    assert float(found["shift"].max()) <= 0.5


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).add_(0.1)
        return self.c(self.b(self.a(x).relu()).relu())


def test_a_network_that_writes_into_its_input() -> None:
    """Every run has inputs of its own."""
    torch.manual_seed(0)
    model, x = WritesIntoItsInput().eval(), X.clone()
    plan = sc.plan(model, x, ratios=0.4)
    small = sc.apply(model, plan)
    assert torch.equal(x, X)
    with torch.no_grad():
        torch.testing.assert_close(small(X.clone()), sc.masked(model, plan)(X.clone()), rtol=1e-5, atol=1e-6)
