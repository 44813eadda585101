"""VGG-16 as the papers have it: for CIFAR with batch norm (Li, SWP), for ImageNet with biases (ThiNet).

Thirteen 3x3 convolutions in five stages of 2, 2, 3, 3, 3, each stage followed by a 2x2 max-pool. ``widths`` gives the
output channels of the thirteen, so that a pruned network is built by its widths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import BadRequest

STAGES = (2, 2, 3, 3, 3)
VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
LI_A = (32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256)
"""VGG-16-A of Li et al. 2017, Table 2: half of layers 1 and 8 to 13."""
THINET = (32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)
"""ThiNet-Conv and ThiNet-GAP (Luo et al. 2017): half of conv1_1 to conv4_3."""
THINET_TINY = (16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 256)


class VGG(nn.Module):
    """Convolutions, a pool, a classifier. ``[B, *input_size] -> [B, classes]``."""

    def __init__(
        self, features: nn.Sequential, classifier: nn.Module, *, avgpool: nn.Module, input_size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier
        self.input_size = input_size
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def vgg16_cifar(
    *,
    classes: int = 10,
    in_channels: int = 3,
    widths: Sequence[int] = VGG16,
    hidden: int = 512,
    head: Literal["li", "swp"] = "li",
    image_size: int = 32,
) -> VGG:
    """VGG-16 with batch norm for small images, ``[B, in_channels, image_size, image_size] -> [B, classes]``.

    ``head="li"``: FC to ``hidden``, batch norm, ReLU, FC to ``classes``, no dropout (Li et al. 2017, Table 2).
    ``head="swp"``: one FC (the official code of SWP, Meng et al. 2020, whose last layer before it is an average pool
    over 1x1: it does nothing, but that paper's count has it). Convolutions have no bias, as a batch norm follows.

    A max-pool that would meet a 1x1 map is left out: all five are there from 32x32 on, four at 28x28, three at 8x8.

    Raises ``BadRequest`` unless ``widths`` are 13 positive integers, and for an unknown head.
    """
    _check(widths, head, known=("li", "swp"))
    pools = min(len(STAGES), image_size.bit_length() - 1)
    features = _features(in_channels, widths, norm=True, pools=pools)
    inputs = widths[-1] * (image_size >> pools) ** 2
    if head == "swp":
        classifier: nn.Module = nn.Linear(inputs, classes)
    else:
        classifier = nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
    avgpool = nn.AvgPool2d(1) if head == "swp" else nn.Identity()
    return VGG(features, classifier, avgpool=avgpool, input_size=(in_channels, image_size, image_size))


def imagenet_vgg16(
    *,
    classes: int = 1000,
    in_channels: int = 3,
    widths: Sequence[int] = VGG16,
    hidden: Sequence[int] = (4096, 4096),
    head: Literal["fc", "gap"] = "fc",
) -> VGG:
    """VGG-16 without batch norm, ``[B, in_channels, 224, 224] -> [B, classes]``; torchvision's names.

    ``head="fc"``: three FC of widths ``hidden`` and ``classes``, with dropout, behind a 7x7 map. ``head="gap"``: the
    average over the 14x14 map right after relu5_3, no pool5, one FC (ThiNet-GAP and ThiNet-Tiny, Luo et al. 2017).

    Raises ``BadRequest`` unless ``widths`` are 13 positive integers and ``hidden`` two, and for an unknown head.
    """
    _check(widths, head, known=("fc", "gap"))
    features = _features(in_channels, widths, norm=False, pools=5 if head == "fc" else 4)
    if head == "gap":
        classifier = nn.Sequential(nn.Linear(widths[-1], classes))
        return VGG(features, classifier, avgpool=nn.AdaptiveAvgPool2d(1), input_size=(in_channels, 224, 224))
    if len(hidden) != 2 or min(hidden) < 1:
        raise BadRequest(f"hidden={tuple(hidden)}: VGG-16 has two hidden FC layers; give two positive widths")
    classifier = nn.Sequential(
        nn.Linear(widths[-1] * 49, hidden[0]),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden[0], hidden[1]),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden[1], classes),
    )
    return VGG(features, classifier, avgpool=nn.AdaptiveAvgPool2d(7), input_size=(in_channels, 224, 224))


def _features(in_channels: int, widths: Sequence[int], *, norm: bool, pools: int) -> nn.Sequential:
    """Conv (, batch norm), ReLU thirteen times; a 2x2 max-pool after each of the first ``pools`` stages."""
    stage_ends = [sum(STAGES[: n + 1]) for n in range(pools)]
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise((in_channels, *widths)), start=1):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
        if number in stage_ends:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _check(widths: Sequence[int], head: str, *, known: tuple[str, str]) -> None:
    if len(widths) != len(VGG16) or min(widths) < 1:
        raise BadRequest(f"widths={tuple(widths)}: VGG-16 has 13 convolutions; give 13 positive integers")
    if head not in known:
        raise BadRequest(f"head={head!r} is not known; this VGG-16 has {known[0]!r} and {known[1]!r}")
