"""Bare parameters and buffers in the forward: scales, offsets, embeddings, learned activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from networks.common import Expect, Network, Sandwich, image, tensor


class WithParameter(nn.Module):
    """One parameter ``p`` and a function of it and the map."""

    def __init__(self, p: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.function = nn.Parameter(p), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


class WithBuffer(nn.Module):
    """The same with a buffer."""

    def __init__(self, b: Tensor, function: Callable[[Tensor, Tensor], Tensor], *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("b", b, persistent=persistent)
        self.b: Tensor
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.b)


class LayerScale(nn.Module):
    """A residual block behind a learned scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gamma = nn.Parameter(1e-5 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma.reshape(1, -1, 1, 1) * self.conv(x)


class Positions(nn.Module):
    """A class token before the tokens and a position embedding on them; reads the class token out."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.position = nn.Parameter(torch.zeros(1, length + 1, channels))
        self.fc = nn.Linear(channels, 8)
        self.mix = nn.Linear(length + 1, length + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.fc(x)[:, 0]


class ReZero(nn.Module):
    """A residual block behind one learned scalar that starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.alpha = nn.Conv2d(channels, channels, 3, padding=1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * torch.tanh(self.conv(x))


class GlobalResponse(nn.Module):
    """x (1 + a sigmoid(mean over space)) with one learned scalar ``a``."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.alpha * x.mean((2, 3), keepdim=True).sigmoid())


class ParameterBag(nn.Module):
    """Parameters in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(12, 1, 1)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.zeros(1, 12, 1, 1))})

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = torch.sin(x * scale)
        return x + self.shifts["a"]


class Codebook(nn.Module):
    """Soft assignment of every position to code vectors: distances to rows of a parameter."""

    def __init__(self, channels: int, codes: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(tensor(codes, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        near = torch.softmax(x @ self.codes.t(), dim=-1)
        return (near @ self.codes).mean(1)


SPREAD = (1, 12, 1, 1)
STEM = Expect(prunes=("stem",), oracle=True)

PARAMETERS: dict[str, Network] = {
    "prelu_one": (lambda: Sandwich(nn.PReLU()), image(), STEM),
    "prelu_each": (lambda: Sandwich(nn.PReLU(12)), image(), STEM),
    "layer_scale": (lambda: Sandwich(LayerScale(12)), image(), STEM),
    "rezero": (lambda: Sandwich(ReZero(12)), image(), STEM),
    "parameter_added": (lambda: Sandwich(WithParameter(tensor(*SPREAD), lambda x, p: x + p)), image(), STEM),
    "parameter_multiplied": (lambda: Sandwich(WithParameter(tensor(*SPREAD), lambda x, p: p * x)), image(), STEM),
    "parameter_over_map": (lambda: Sandwich(WithParameter(tensor(12, 8, 8), lambda x, p: x - p)), image(), STEM),
    "parameter_over_space": (lambda: Sandwich(WithParameter(tensor(8, 8), lambda x, p: x * p)), image(), STEM),
    "parameter_indexed": (
        lambda: Sandwich(WithParameter(tensor(12), lambda x, p: x * p[None, :, None, None].exp())),
        image(),
        STEM,
    ),
    "parameter_as_matrix": (
        lambda: Sandwich(
            WithParameter(tensor(12, 9), lambda x, p: (x.permute(0, 2, 3, 1) @ p).mean((1, 2))), out=9, flat=True
        ),
        image(),
        Expect(prunes=("stem", "middle*")),
    ),
    "parameter_halves": (
        lambda: Sandwich(WithParameter(tensor(2, 12), lambda x, p: x * p[0].view(SPREAD) + p[1].view(SPREAD))),
        image(),
        STEM,
    ),
    "parameter_pads_channels": (
        lambda: Sandwich(
            WithParameter(tensor(1, 4, 8, 8), lambda x, p: torch.cat([x, p.expand(x.shape[0], -1, -1, -1)], 1)), out=16
        ),
        image(),
        STEM,
    ),
    "parameter_bag": (lambda: Sandwich(ParameterBag()), image(), STEM),
    "buffer_scale": (lambda: Sandwich(WithBuffer(tensor(*SPREAD), lambda x, b: x * b)), image(), STEM),
    "buffer_not_persistent": (
        lambda: Sandwich(WithBuffer(tensor(*SPREAD), lambda x, b: x * b, persistent=False)),
        image(),
        Expect(oracle=True),
    ),
    "buffer_permutes": (
        lambda: Sandwich(
            WithBuffer(torch.randperm(12, generator=torch.Generator().manual_seed(3)), lambda x, b: x[:, b])
        ),
        image(),
        STEM,
    ),
    "positions_and_token": (
        lambda: Sandwich(Positions(12, 16), out=8, flat=True),
        image(size=4),
        Expect(prunes=("stem", "middle.fc")),
    ),
    "global_response_scalar": (lambda: Sandwich(GlobalResponse()), image(), STEM),
    "codebook": (lambda: Sandwich(Codebook(12, 7), flat=True), image(), Expect()),
}
