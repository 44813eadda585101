"""Norms: over the batch, over the channels, over groups of them; as modules and written by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.common import Apply, Expect, Network, Sandwich, image


class PermutedLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a map, by way of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """Channels-first layer norm, written by hand as in the ConvNeXt paper's code."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RMSNorm2d(nn.Module):
    """Channels-first root mean square norm, written by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight.view(1, -1, 1, 1)


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 on channels-last maps: the spread over channels of their norms over space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        g = x.norm(p=2, dim=(1, 2), keepdim=True)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.bias, self.weight, x * n).add(x).permute(0, 3, 1, 2)


class FilterResponseNorm(nn.Module):
    """FRN with a thresholded linear unit: statistics over space alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gamma, self.beta, self.tau = (nn.Parameter(torch.ones(shape)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(dim=(2, 3), keepdim=True) + 1e-6)
        return torch.max(self.gamma * x + self.beta, self.tau)


class FunctionalBatchNorm(nn.Module):
    """``F.batch_norm`` on the module's own buffers and parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta, self.training, 0.1, 1e-5)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with everything a buffer, as detectors fine-tune it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=torch.Generator().manual_seed(len(name))) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class LastAxisNorm(nn.Module):
    """A norm between two linear layers on the last axis."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 16), norm, nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


def after(norm: nn.Module) -> nn.Module:
    """stem, conv, the norm, SiLU, conv."""
    layers = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), norm, nn.SiLU(), nn.Conv2d(12, 10, 3))
    return Sandwich(layers, out=10)


FREE = Expect(prunes=("stem", "middle.0", "middle.3"))
EXACT = Expect(prunes=("stem", "middle.0", "middle.3"), oracle=True)
LAST = Expect(prunes=("stem", "middle.fc1"))

NORMS: dict[str, Network] = {
    "batch_norm": (lambda: after(nn.BatchNorm2d(12)), image(), EXACT),
    "batch_norm_plain": (lambda: after(nn.BatchNorm2d(12, affine=False)), image(), EXACT),
    "batch_norm_without_statistics": (lambda: after(nn.BatchNorm2d(12, track_running_stats=False)), image(), EXACT),
    "batch_norm_of_nothing": (
        lambda: after(nn.BatchNorm2d(12, affine=False, track_running_stats=False)),
        image(),
        EXACT,
    ),
    "batch_norm_before_conv": (
        lambda: Sandwich(nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3)), out=8),
        image(),
        Expect(prunes=("stem", "middle.2"), oracle=True),
    ),
    "batch_norm_functional": (lambda: after(FunctionalBatchNorm(12)), image(), EXACT),
    "batch_norm_frozen": (lambda: after(FrozenBatchNorm2d(12)), image(), EXACT),
    "layer_norm": (lambda: Sandwich(LastAxisNorm(nn.LayerNorm(16))), image(), LAST),
    "layer_norm_plain": (lambda: Sandwich(LastAxisNorm(nn.LayerNorm(16, elementwise_affine=False))), image(), LAST),
    "layer_norm_without_bias": (lambda: Sandwich(LastAxisNorm(nn.LayerNorm(16, bias=False))), image(), LAST),
    "layer_norm_over_map": (lambda: after(nn.LayerNorm([12, 8, 8])), image(), Expect()),
    "layer_norm_permuted": (lambda: after(PermutedLayerNorm(12)), image(), FREE),
    "layer_norm_by_hand": (lambda: after(LayerNorm2d(12)), image(), FREE),
    "group_norm": (lambda: after(nn.GroupNorm(3, 12)), image(), FREE),
    "group_norm_plain": (lambda: after(nn.GroupNorm(4, 12, affine=False)), image(), FREE),
    "group_norm_one_group": (lambda: after(nn.GroupNorm(1, 12)), image(), FREE),
    "group_norm_each_channel": (lambda: after(nn.GroupNorm(12, 12)), image(), FREE),
    "instance_norm": (lambda: after(nn.InstanceNorm2d(12)), image(), EXACT),
    "instance_norm_affine": (lambda: after(nn.InstanceNorm2d(12, affine=True)), image(), EXACT),
    "instance_norm_tracking": (
        lambda: after(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)),
        image(),
        EXACT,
    ),
    "rms_norm": (lambda: Sandwich(LastAxisNorm(nn.RMSNorm(16))), image(), LAST),
    "rms_norm_by_hand": (lambda: after(RMSNorm2d(12)), image(), FREE),
    "global_response_norm": (lambda: after(GlobalResponseNorm(12)), image(), FREE),
    "filter_response_norm": (lambda: after(FilterResponseNorm(12)), image(), EXACT),
    "local_response_norm": (
        lambda: after(nn.LocalResponseNorm(5)),
        image(),
        Expect(prunes=("stem",), locks=("middle.0",)),
    ),
    "normalize_over_channels": (
        lambda: after(Apply(lambda x: F.normalize(x, dim=1))),
        image(),
        Expect(prunes=("stem",)),
    ),
}
