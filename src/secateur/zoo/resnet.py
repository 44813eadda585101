"""ResNets as the papers have them: CIFAR's 6n+2 layers (Li, FPGM, SWP) and ImageNet's 18, 34, 50, 101.

A block reads the residual stream, goes through ``inner`` channels that only it knows, and writes back. ``inner`` gives
those widths, one per stage or one per block, so that a network whose blocks were pruned inside (ResNet-56-A of Li,
ThiNet-70) is built by its widths alone. ``widths`` are those of the stream, one per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import BadRequest

CIFAR_WIDTHS = (16, 32, 64)
IMAGENET_WIDTHS = (64, 128, 256, 512)
IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# (inputs, inner, outputs, stride) -> a block
MakeBlock = Callable[[int, int, int, int], nn.Module]


class PadShortcut(nn.Module):
    """Option A of He et al. 2016, no parameters: every ``stride``-th pixel, then ``zeros`` channels of zeros."""

    def __init__(self, stride: int, zeros: int) -> None:
        super().__init__()
        self.stride = stride
        self.zeros = zeros

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.zeros))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: ``inputs -> inner -> outputs`` channels."""

    def __init__(self, inputs: int, outputs: int, *, inner: int, stride: int, shortcut: str = "projection") -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride=stride, kind=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions: ``inputs -> inner -> inner -> outputs`` channels."""

    def __init__(self, inputs: int, outputs: int, *, inner: int, stride: int, stride_on: str = "3x3") -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner, 1, stride if stride_on == "1x1" else 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride if stride_on == "3x3" else 1)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride=stride, kind="projection")

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages, ``[B, C, 32, 32] -> [B, classes]``; any even size from 4x4 up will do."""

    def __init__(self, stem: nn.Conv2d, stages: Sequence[nn.Sequential], *, features: int, classes: int) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)
        self.input_size = (stem.in_channels, 32, 32)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ImageNetResNet(nn.Module):
    """A 7x7 stem with a max-pool and four stages, ``[B, C, 224, 224] -> [B, classes]``; torchvision's names."""

    def __init__(self, stem: nn.Conv2d, stages: Sequence[nn.Sequential], *, features: int, classes: int) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)
        self.input_size = (stem.in_channels, 224, 224)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(
    depth: int,
    *,
    classes: int = 10,
    in_channels: int = 3,
    shortcut: Literal["A", "projection"] = "A",
    inner: Sequence[int] | None = None,
    widths: Sequence[int] = CIFAR_WIDTHS,
) -> CifarResNet:
    """ResNet-``depth`` for CIFAR, depth 6n+2: three stages of n basic blocks (He et al. 2016, Section 4.2).

    ``shortcut``, where a stage begins: ``"A"`` (strided pixels and zero channels: Li, FPGM) or ``"projection"`` (1x1
    convolution and batch norm: SWP). ``inner``: output channels of the blocks' first convolutions, one per stage or
    one per block; ``None``: those of the stream.

    Raises ``BadRequest`` for a depth that is not 6n+2, an unknown shortcut, widths of a wrong number or below 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise BadRequest(f"depth={depth}: a CIFAR ResNet has 6n+2 layers; take 20, 32, 44, 56 or 110")
    if shortcut not in ("A", "projection"):
        raise BadRequest(f"shortcut={shortcut!r} is not known; take 'A' (zero padding) or 'projection' (1x1 conv)")
    if shortcut == "A" and list(widths) != sorted(widths):
        raise BadRequest(f"widths={tuple(widths)}: a zero-padded shortcut can only widen; take shortcut='projection'")
    blocks = ((depth - 2) // 6,) * 3

    def block(inputs: int, inner_width: int, outputs: int, stride: int) -> nn.Module:
        return BasicBlock(inputs, outputs, inner=inner_width, stride=stride, shortcut=shortcut)

    _check_stream(widths, blocks)
    stages = _stages(block, widths=(widths[0], *widths), inner=_per_block(inner, widths, blocks))
    stem = _conv(in_channels, widths[0], 3)
    return CifarResNet(stem, stages, features=widths[-1], classes=classes)


def imagenet_resnet(
    depth: int,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    inner: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    stride_on: Literal["3x3", "1x1"] = "3x3",
) -> ImageNetResNet:
    """ResNet-18, -34 (basic blocks), -50 or -101 (bottlenecks) for ImageNet; torchvision's weights load.

    ``stride_on``: which convolution of a bottleneck halves the map: the ``"3x3"`` (torchvision) or the first ``"1x1"``
    (He et al. 2016, Caffe, and so ThiNet's counts). ``inner``: output channels of a block's first convolution (in a
    bottleneck of the first two), one per stage or one per block; ``None``: 64, 128, 256, 512.

    Raises ``BadRequest`` for another depth, widths of a wrong number or below 1, or a stride that is not there.
    """
    if depth not in IMAGENET_BLOCKS:
        raise BadRequest(f"depth={depth} is not known; take one of {sorted(IMAGENET_BLOCKS)}")
    basic = depth < 50
    if stride_on not in (("3x3",) if basic else ("3x3", "1x1")):
        have = "basic blocks, which have only '3x3'" if basic else "bottlenecks: '3x3' or '1x1'"
        raise BadRequest(f"stride_on={stride_on!r}: ResNet-{depth} is made of {have}")
    blocks = IMAGENET_BLOCKS[depth]
    stream = tuple(widths or (w * (1 if basic else 4) for w in IMAGENET_WIDTHS))

    def block(inputs: int, inner_width: int, outputs: int, stride: int) -> nn.Module:
        if basic:
            return BasicBlock(inputs, outputs, inner=inner_width, stride=stride)
        return Bottleneck(inputs, outputs, inner=inner_width, stride=stride, stride_on=stride_on)

    _check_stream(stream, blocks)
    inners = _per_block(inner, stream if basic else IMAGENET_WIDTHS, blocks)
    stages = _stages(block, widths=(64, *stream), inner=inners)
    stem = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return ImageNetResNet(stem, stages, features=stream[-1], classes=classes)


def thinet_resnet50(percent: int, *, classes: int = 1000, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-50 with ``percent`` (70, 50, 30) of the channels kept inside every block, rounded down.

    Luo et al. 2017, Section 4.3: both inner convolutions; the stride is on the first 1x1, as in Caffe.
    Raises ``BadRequest`` for a percentage outside [2, 100].
    """
    if not 2 <= percent <= 100:
        raise BadRequest(f"percent={percent} is the share that is kept; take one from 2 to 100")
    inner = [width * percent // 100 for width in IMAGENET_WIDTHS]
    return imagenet_resnet(50, classes=classes, in_channels=in_channels, inner=inner, stride_on="1x1")


def li_inner(depth: int, ratios: Sequence[float], *, skip: Sequence[int] = ()) -> tuple[int, ...]:
    """Widths of the blocks' first convolutions after Li et al. 2017, Section 4.2: one ratio removed per stage.

    ``skip`` lists the layers left whole, in the paper's numbers: the stem is 1, then convolution by convolution
    without the projections, so block b (from 0) begins with layer 2b+2. A layer of n filters keeps floor(n(1-ratio)),
    at least one. Depth 18 and 34 are ImageNet's, any other is CIFAR's 6n+2.

    Raises ``BadRequest`` unless there is one ratio in [0, 1) per stage.
    """
    imagenet = depth in (18, 34)
    widths = IMAGENET_WIDTHS if imagenet else CIFAR_WIDTHS
    blocks = IMAGENET_BLOCKS[depth] if imagenet else ((depth - 2) // 6,) * 3
    if len(ratios) != len(blocks) or not all(0 <= ratio < 1 for ratio in ratios):
        raise BadRequest(f"ratios={tuple(ratios)}: give {len(blocks)} in [0, 1), the fraction removed in each stage")
    stage_of_block = [stage for stage, count in enumerate(blocks) for _ in range(count)]
    return tuple(
        widths[stage] if 2 * b + 2 in skip else max(1, int(widths[stage] * (1 - ratios[stage]) + 1e-9))
        for b, stage in enumerate(stage_of_block)
    )


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, *, stride: int, kind: str) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if kind == "A":
        return PadShortcut(stride, outputs - inputs)
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _check_stream(widths: Sequence[int], blocks: Sequence[int]) -> None:
    if len(widths) != len(blocks) or min(widths) < 1:
        raise BadRequest(f"widths={tuple(widths)}: give {len(blocks)} positive integers, one per stage")


def _stages(block: MakeBlock, *, widths: Sequence[int], inner: Sequence[Sequence[int]]) -> list[nn.Sequential]:
    """One Sequential per stage; ``widths`` has the stem's first. Every stage but the first halves the map."""
    stages = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        first = block(inputs, inner[number][0], outputs, 1 if number == 0 else 2)
        rest = [block(outputs, width, outputs, 1) for width in inner[number][1:]]
        stages.append(nn.Sequential(first, *rest))
    return stages


def _per_block(inner: Sequence[int] | None, default: Sequence[int], blocks: Sequence[int]) -> list[Sequence[int]]:
    """``inner`` as one sequence of widths per stage."""
    given = tuple(default if inner is None else inner)
    if len(given) not in (len(blocks), sum(blocks)) or min(given) < 1:
        raise BadRequest(
            f"inner={given}: give {len(blocks)} positive integers, one per stage, or {sum(blocks)}, one per block"
        )
    if len(given) == len(blocks):
        return [(width,) * count for width, count in zip(given, blocks, strict=True)]
    starts = [sum(blocks[:n]) for n in range(len(blocks) + 1)]
    return [given[start:end] for start, end in pairwise(starts)]


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
