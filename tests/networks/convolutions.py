"""Convolutions and linear layers of every kind, their weights shared, tied, frozen or computed."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from networks.common import Apply, Expect, Network, Sandwich, conv, image, tensor


class OneDimension(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm1d(10)
        self.mid = nn.Conv1d(10, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.max_pool1d(F.relu(self.norm(self.stem(x))), 2))
        return self.head(F.adaptive_avg_pool1d(F.gelu(x), 1).flatten(1))


class ThreeDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.mid = nn.Conv3d(8, 6, (1, 3, 3))
        self.up = nn.ConvTranspose3d(6, 7, 2, stride=2)
        self.head = nn.Conv3d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.avg_pool3d(F.relu(self.norm(self.stem(x))), 2))
        return self.head(F.softplus(self.up(x)))


class LastAxis(nn.Module):
    """The point-wise MLP of ConvNeXt: linear layers on a permuted map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Twice(nn.Module):
    """One convolution used twice, with a norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(12), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv(x)))
        return F.relu(self.norm2(self.conv(x)))


class SharedHead(nn.Module):
    """One head over two branches, as detectors have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.tower, self.head = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.head(F.relu(self.tower(F.relu(f(x))))) for f in (self.a, self.b))  # type: ignore[return-value]


class Tied(nn.Module):
    """``second.weight is first.weight``; the biases differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class TiedDecoder(nn.Module):
    """An autoencoder that decodes with the encoder's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.softplus(self.enc2(F.softplus(self.enc1(x))))
        z = F.softplus(F.conv_transpose2d(z, self.enc2.weight, padding=1))
        return F.conv_transpose2d(z, self.enc1.weight, padding=1)


class FunctionalConv(nn.Module):
    """A bare parameter as the weight of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(tensor(10, 12, 3, 3) * 0.1)
        self.offset = nn.Parameter(tensor(10))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.kernel, self.offset, padding=1))


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, written out (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean(dim=(1, 2, 3), keepdim=True), w.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (w - mean) / torch.sqrt(var + 1e-5), self.bias)


class ScaledStdConv(nn.Conv2d):
    """Weight standardisation by ``F.batch_norm`` with a gain for each filter, as in NF-ResNets."""

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(cout, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, w.reshape_as(self.weight), self.bias)


def frozen() -> nn.Module:
    net = Sandwich(conv(12, 8), out=8)
    net.stem.requires_grad_(False)
    net.middle[1].requires_grad_(False)  # type: ignore[index]
    return net


def old_weight_norm() -> nn.Module:
    net = Sandwich(nn.Conv2d(12, 10, 3), out=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in many networks
        net.stem, net.middle = nn.utils.weight_norm(net.stem), nn.utils.weight_norm(net.middle)
    return net


def old_spectral_norm() -> nn.Module:
    net = Sandwich(nn.Conv2d(12, 10, 3), out=10)
    net.middle = nn.utils.spectral_norm(net.middle)
    return net


def parametrised(wrap: object) -> nn.Module:
    net = Sandwich(nn.Conv2d(12, 10, 3), out=10)
    net.stem, net.middle = wrap(net.stem), wrap(net.middle)  # type: ignore[operator]
    return net


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)
    )


def dilated_strided() -> nn.Module:
    a = nn.Conv2d(12, 10, 3, dilation=2, padding=2)
    return Sandwich(nn.Sequential(a, nn.SiLU(), nn.Conv2d(10, 8, (3, 5), stride=(2, 1), padding=(0, 2))), out=8)


def padded(mode: str) -> nn.Module:
    return Sandwich(nn.Conv2d(12, 8, 3, padding=2, padding_mode=mode), out=8)


def wide(*layers: nn.Module, out: int) -> nn.Module:
    return Sandwich(nn.Sequential(*layers), out=out)


BOTH = Expect(prunes=("stem", "middle"), oracle=True)
STEM = Expect(prunes=("stem",), oracle=True)

CONVOLUTIONS: dict[str, Network] = {
    "conv": (lambda: Sandwich(nn.Conv2d(12, 8, 3), out=8), image(), BOTH),
    "conv_batch_of_one": (lambda: Sandwich(nn.Conv2d(12, 8, 3), out=8), image(batch=1), BOTH),
    "conv_grouped": (lambda: Sandwich(nn.Conv2d(12, 12, 3, groups=3)), image(), BOTH),
    "conv_grouped_widening": (lambda: Sandwich(nn.Conv2d(12, 18, 3, groups=3), out=18), image(), BOTH),
    "conv_grouped_in_a_row": (
        lambda: wide(nn.Conv2d(12, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 12, 1, groups=4), out=12),
        image(),
        Expect(prunes=("stem", "middle.0", "middle.2"), oracle=True),
    ),
    "depthwise": (lambda: Sandwich(nn.Conv2d(12, 12, 3, groups=12)), image(), STEM),
    "depthwise_multiplier_2": (lambda: Sandwich(nn.Conv2d(12, 24, 3, groups=12), out=24), image(), STEM),
    "depthwise_separable": (
        lambda: wide(conv(12, 12, 3, groups=12), conv(12, 16, 1), nn.Conv2d(16, 48, 3, groups=16), out=48),
        image(),
        Expect(prunes=("stem", "middle.1.0"), oracle=True),
    ),
    "transposed": (lambda: Sandwich(nn.ConvTranspose2d(12, 8, 2, stride=2), out=8), image(size=6), BOTH),
    "transposed_grouped": (lambda: Sandwich(nn.ConvTranspose2d(12, 18, 3, groups=3), out=18), image(size=6), BOTH),
    "transposed_depthwise": (lambda: Sandwich(nn.ConvTranspose2d(12, 12, 3, groups=12)), image(size=6), STEM),
    "transposed_depthwise_multiplier_2": (
        lambda: Sandwich(nn.ConvTranspose2d(12, 24, 3, groups=12), out=24),
        image(size=6),
        Expect(oracle=True),
    ),
    "conv1d": (OneDimension, lambda: (tensor(2, 3, 20),), Expect(prunes=("stem", "mid"), oracle=True)),
    "conv3d": (ThreeDimensions, lambda: (tensor(2, 2, 4, 6, 6),), Expect(prunes=("stem", "mid", "up"), oracle=True)),
    "dilated_strided": (dilated_strided, image(size=10), Expect(prunes=("stem", "middle.0", "middle.2"), oracle=True)),
    "padding_reflect": (lambda: padded("reflect"), image(), BOTH),
    "padding_circular": (lambda: padded("circular"), image(), BOTH),
    "padding_replicate": (lambda: padded("replicate"), image(), BOTH),
    "padding_same": (lambda: Sandwich(nn.Conv2d(12, 8, 5, padding="same"), out=8), image(), BOTH),
    "asymmetric_pad": (lambda: wide(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(12, 8, 3), out=8), image(), STEM),
    "constant_pad": (lambda: wide(nn.ConstantPad2d(1, 0.7), nn.Conv2d(12, 8, 3), out=8), image(), STEM),
    "linear_on_last_axis": (
        lambda: Sandwich(LastAxis()),
        image(),
        Expect(prunes=("stem", "middle.fc1", "middle.fc2"), oracle=True),
    ),
    "perceptron": (perceptron, lambda: (tensor(4, 6),), Expect(prunes=("0", "3"), oracle=True)),
    "linear_without_batch_norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.GELU(), nn.Linear(12, 4)),
        image(size=4),
        Expect(prunes=("1",), oracle=True),
    ),
    "shared_module": (lambda: Sandwich(Twice()), image(), Expect(prunes=("stem", "middle.conv"), oracle=True)),
    "shared_head": (SharedHead, image(), Expect(prunes=("a", "tower"), oracle=True)),
    "tied_weights": (lambda: Sandwich(Tied()), image(), Expect(prunes=("stem",), oracle=True)),
    "tied_decoder": (TiedDecoder, image(), Expect(prunes=("enc1", "enc2"))),
    "frozen_layers": (frozen, image(), Expect(prunes=("stem", "middle.0"), oracle=True)),
    "functional_conv": (
        lambda: Sandwich(FunctionalConv(), out=10),
        image(),
        Expect(prunes=("stem", "middle*"), oracle=True),
    ),
    "weight_norm_old": (old_weight_norm, image(), Expect()),
    "weight_norm": (lambda: parametrised(parametrizations.weight_norm), image(), Expect()),
    "spectral_norm_old": (old_spectral_norm, image(), Expect()),
    "spectral_norm": (lambda: parametrised(parametrizations.spectral_norm), image(), Expect()),
    "orthogonal": (lambda: parametrised(parametrizations.orthogonal), image(), Expect()),
    "weight_standardisation": (
        lambda: wide(StandardisedConv(12, 10, 3), nn.ReLU(), StandardisedConv(10, 8, 3), out=8),
        image(),
        Expect(prunes=("stem", "middle.0", "middle.2")),
    ),
    "weight_standardisation_by_batch_norm": (
        lambda: wide(ScaledStdConv(12, 10, 3), nn.ReLU(), ScaledStdConv(10, 8, 3), out=8),
        image(),
        Expect(prunes=("middle.0", "middle.2")),
    ),
    "bilinear_layer": (
        lambda: wide(Apply(lambda x: x.mean((2, 3))), nn.Linear(12, 8), nn.Unflatten(1, (8, 1, 1)), out=8),
        image(),
        Expect(prunes=("stem", "middle.1"), oracle=True),
    ),
}
