"""Peaks of activation memory, against sums by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.memory import activation_memory

FLOAT = 4


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Kept(nn.Module):
    """Holds an activation in a variable that nobody reads again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x, x, x], 1)
        narrow = wide.mean(1, keepdim=True)
        a = narrow + 1
        return a * 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(2, 2), conv(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y + self.b(y)


class Views(nn.Module):
    """Views, and operations in place: one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        left, right = y.chunk(2, 1)
        left.relu_()
        right.mul_(2)
        return y.flatten(1)


MAP = 3 * 36 * FLOAT
"""Bytes of one channel of a batch of three maps of 6 x 6."""

X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
CASES = {
    "one layer": (conv(2, 5), 5, 5),
    "two layers": (nn.Sequential(conv(2, 5), conv(5, 3)), 8, 8),
    "the first of three": (nn.Sequential(conv(2, 9), conv(9, 4), conv(4, 1)), 13, 13),
    "in place": (nn.Sequential(conv(2, 5), nn.ReLU(inplace=True), nn.Hardswish(inplace=True)), 5, 5),
    "not in place": (nn.Sequential(conv(2, 5), nn.ReLU()), 10, 10),
    "a shortcut": (Residual(), 2 + 2 + 2, 2 + 2 + 2),
    "views": (Views(), 8, 8),
    # wide and narrow; and wide still, while the product is taken
    "a variable": (Kept(), 8 + 1, 8 + 1 + 1 + 1),
    "nothing at all": (nn.Flatten(), 0, 0),
}


@pytest.mark.parametrize("case", list(CASES))
def test_peaks_by_hand(case: str) -> None:
    model, needed, held = CASES[case]
    found = activation_memory(model, X)
    assert (found.needed, found.held, found.allocated) == (needed * MAP, held * MAP, None)


def test_results_that_nobody_reads_need_nothing() -> None:
    """A max pooling makes indices in int64, twice as large as what it gives."""
    found = activation_memory(nn.Sequential(conv(2, 1), nn.MaxPool2d(2)), X)
    assert found.needed == MAP + MAP // 4
    assert found.held == MAP + MAP // 4 + 2 * MAP // 4


def test_the_batch_counts_and_the_weights_do_not() -> None:
    wide = nn.Sequential(nn.Linear(10, 5000), nn.Linear(5000, 3))
    one, seven = (activation_memory(wide, torch.randn(batch, 10)).needed for batch in (1, 7))
    assert one == (5000 + 3) * FLOAT
    assert seven == 7 * one


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            first = a + 1
            return {"first": first, "second": first * b["x"], "again": first[:, :1]}

    found = activation_memory(Two(), {"a": X, "b": {"x": X}})
    assert found.needed == found.held == 4 * MAP


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(conv(2, 3), nn.BatchNorm2d(3), nn.Dropout()).train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    activation_memory(model, X)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
