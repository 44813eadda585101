"""Blocks of well-known architectures, and networks of several of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attention import SqueezeExcite
from networks.common import Expect, Network, Sandwich, conv, image
from networks.norms import LayerNorm2d
from networks.parameters import LayerScale


class Basic(nn.Module):
    """ResNet's basic block; a projection where the width or the stride changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(cin, cout, 1, stride), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Classifier(nn.Module):
    """stem, blocks, global average pool, linear."""

    def __init__(self, stem: int, blocks: nn.Module, features: int) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, stem), blocks
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class PreActivation(nn.Module):
    """Norm and activation before each convolution; the stream itself is only added to."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class InvertedResidual(nn.Module):
    """MobileNet V3: widen, depthwise, squeeze-excite, project."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.widen, self.depthwise = conv(width, inner, 1), conv(inner, inner, 3, groups=inner)
        self.se = SqueezeExcite(inner, 4)
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.se(self.depthwise(self.widen(x))))


class Dense(nn.Module):
    """DenseNet: each layer reads all that came before; then a transition."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [width + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths)
        self.transition = nn.Conv2d(width + layers * growth, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for norm, c in zip(self.norms, self.convs, strict=True):
            maps.append(c(F.relu(norm(torch.cat(maps, 1)))))
        return F.avg_pool2d(self.transition(torch.cat(maps, 1)), 2)


class Inception(nn.Module):
    """Parallel branches, one of them a pool, one factorised."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.a, self.b = conv(cin, 6, 1), nn.Sequential(conv(cin, 6, 1), conv(6, 8, 3))
        self.c = nn.Sequential(
            nn.Conv2d(cin, 5, (1, 5), padding=(0, 2)), nn.ReLU(), nn.Conv2d(5, 7, (5, 1), padding=(2, 0))
        )
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(cin, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


class Res2Net(nn.Module):
    """Splits channels; each part's result is carried into the next part."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.reduce, self.expand = conv(width, width, 1), conv(width, width, 1)
        self.convs = nn.ModuleList(conv(width // parts, width // parts) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.chunk(self.reduce(x), self.parts, 1)
        out, carry = [pieces[0]], None
        for piece, c in zip(pieces[1:], self.convs, strict=True):
            carry = c(piece if carry is None else piece + carry)
            out.append(carry)
        return x + self.expand(torch.cat(out, 1))


class Ghost(nn.Module):
    """GhostNet: cheap depthwise features beside the primary ones, sliced to the asked width."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.out = cout
        half = -(-cout // 2)
        self.primary, self.cheap = conv(cin, half, 1), conv(half, half, 3, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        a = self.primary(x)
        return torch.cat([a, self.cheap(a)], 1)[:, : self.out]


class CrossStage(nn.Module):
    """CSP: half of the channels goes through the blocks, the other half around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.block = conv(width, 16, 1), Basic(8, 8)
        self.merge = conv(16, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        around, through = self.expand(x).chunk(2, dim=1)
        return self.merge(torch.cat([self.block(through), around], 1))


class UNet(nn.Module):
    """Two levels; skips concatenated or added."""

    def __init__(self, *, add: bool) -> None:
        super().__init__()
        self.add = add
        self.down1, self.down2, self.bottom = conv(3, 6), conv(6, 10), conv(10, 12)
        self.up2 = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.dec2, self.dec1 = conv(10 if add else 20, 6), conv(6 if add else 12, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.add else torch.cat([a, b], 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.dec2(self.join(self.up2(self.bottom(F.max_pool2d(b, 2))), b))
        y = F.interpolate(y, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.dec1(self.join(y, a)))


class Pyramid(nn.Module):
    """FPN: lateral convolutions, upsampled sums, one output for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv(3, 6), conv(6, 8, 3, 2), conv(8, 10, 3, 2)
        self.laterals = nn.ModuleList(nn.Conv2d(w, 8, 1) for w in (6, 8, 10))
        self.heads = nn.ModuleList(nn.Conv2d(8, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.c1(x)]
        for c in (self.c2, self.c3):
            maps.append(c(maps[-1]))
        levels = [f(m) for f, m in zip(self.laterals, maps, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        return [f(m) for f, m in zip(self.heads, levels, strict=True)]


class SegNet(nn.Module):
    """Max pool with indices, unpooled later."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.head = conv(3, 8), conv(8, 8), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, where = F.max_pool2d(self.down(x), 2, return_indices=True)
        return self.head(F.max_unpool2d(self.mid(y), where, 2))


class PoolIndices(nn.Module):
    """Max pool whose indices are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(2, return_indices=True), nn.Conv2d(12, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x)[0])


class RepVGG(nn.Module):
    """3x3, 1x1 and identity branches, each with its norm, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.b = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.c = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x) + self.c(x))


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: split, one branch, concat, shuffle by views."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = width // 2
        self.branch = nn.Sequential(
            conv(h, h, 1), nn.Conv2d(h, h, 3, padding=1, groups=h), nn.BatchNorm2d(h), conv(h, h, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ConvNeXt(nn.Module):
    """Depthwise, layer norm, MLP on the last axis, layer scale, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class Fuse(nn.Module):
    """HRNet: two resolutions exchange, each sums what it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = conv(12, 6), conv(12, 10, 3, 2)
        self.up, self.down = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 10, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.high(x), self.low(x)
        high = F.relu(h + F.interpolate(self.up(w), scale_factor=2, mode="nearest"))
        low = F.relu(w + self.down(h))
        return torch.cat([F.adaptive_max_pool2d(high, 4), low], 1)


class Dropouts(nn.Module):
    """Every dropout at once, and stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(0.3), nn.Dropout2d(0.2), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)
        )
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.layers(x))
        if self.training:
            y = y * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.8, dtype=x.dtype))
        return x + F.dropout(y, 0.2, self.training)


def stage() -> nn.Module:
    return Classifier(8, nn.Sequential(Basic(8, 8), Basic(8, 12, 2), Basic(12, 12)), 12)


def activations() -> nn.Module:
    layers = (
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.ELU(),
        nn.Hardswish(),
        nn.Mish(),
        nn.Softsign(),
        nn.Threshold(0.2, 0.4),
        nn.LogSigmoid(),
    )
    return Sandwich(nn.Sequential(*layers, nn.Conv2d(12, 8, 3)), out=8)


def pools() -> nn.Module:
    layers = (
        nn.AvgPool2d(3, 1, 1),
        nn.MaxPool2d(3, 1, 1),
        nn.LPPool2d(2, 2),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.AdaptiveMaxPool2d(6),
    )
    return Sandwich(nn.Sequential(*layers, nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d((2, 1))), out=8)


def expect(*prunes: str, oracle: bool = True) -> Expect:
    return Expect(prunes=prunes, oracle=oracle)


ARCHITECTURES: dict[str, Network] = {
    "residual_stage": (stage, image(), expect("stem.0", "blocks.0.conv1", "blocks.1.conv2", "blocks.2.conv1")),
    "pre_activation": (
        lambda: Classifier(8, nn.Sequential(PreActivation(8, 12), PreActivation(8, 10), nn.BatchNorm2d(8)), 8),
        image(),
        expect("stem.0", "blocks.0.conv1", "blocks.1.conv1"),
    ),
    "inverted_residual": (
        lambda: Classifier(8, nn.Sequential(InvertedResidual(8, 16), InvertedResidual(8, 12)), 8),
        image(),
        expect("stem.0", "blocks.0.widen.0", "blocks.0.se.reduce", "blocks.1.widen.0"),
    ),
    "dense_block": (
        lambda: Classifier(8, Dense(8, 6, 3), 8),
        image(),
        expect("stem.0", "blocks.convs.2", "blocks.transition"),
    ),
    "inception": (
        lambda: Sandwich(Inception(12), out=27),
        image(),
        expect("stem", "middle.a.0", "middle.b.0.0", "middle.c.2"),
    ),
    "res2net": (lambda: Sandwich(Res2Net(12, 4)), image(), expect("stem", "middle.reduce.0", "middle.convs.1.0")),
    "res2net_uneven_tail": (lambda: Sandwich(Res2Net(12, 3)), image(), expect("stem", "middle.reduce.0")),
    "ghost": (lambda: Sandwich(Ghost(12, 10), out=10), image(), expect("stem", "middle.primary.0")),
    "ghost_odd": (lambda: Sandwich(Ghost(12, 9), out=9), image(), expect("stem")),
    "cross_stage": (lambda: Sandwich(CrossStage(12)), image(), expect("stem", "middle.expand.0", "middle.block.conv1")),
    "unet_concat": (lambda: UNet(add=False), image(), expect("down1.0", "down2.0", "bottom.0", "up2", "dec2.0")),
    "unet_add": (lambda: UNet(add=True), image(), expect("down1.0", "down2.0", "bottom.0", "up2", "dec2.0")),
    "pyramid": (Pyramid, image(), expect("c1.0", "c3.0", "laterals.0")),
    "segnet_unpool": (SegNet, image(), Expect()),
    "max_pool_with_indices": (lambda: Sandwich(PoolIndices(), out=8), image(), expect("stem", "middle.conv")),
    "repvgg": (lambda: Sandwich(nn.Sequential(RepVGG(12), RepVGG(12))), image(), expect("stem")),
    "shuffle_unit": (
        lambda: Sandwich(nn.Sequential(ShuffleUnit(12), ShuffleUnit(12))),
        image(),
        expect("stem", "middle.0.branch.0.0"),
    ),
    "convnext": (
        lambda: Sandwich(nn.Sequential(ConvNeXt(12), LayerNorm2d(12), nn.Conv2d(12, 8, 2, 2), ConvNeXt(8)), out=8),
        image(),
        expect("stem", "middle.0.fc1", "middle.2", "middle.3.fc1", oracle=False),
    ),
    "layer_scale_chain": (lambda: Sandwich(nn.Sequential(LayerScale(12), LayerScale(12))), image(), expect("stem")),
    "high_and_low_resolution": (
        lambda: Sandwich(Fuse(), out=16),
        image(),
        expect("stem", "middle.high.0", "middle.low.0"),
    ),
    "dropouts": (lambda: Sandwich(Dropouts()), image(), expect("stem")),
    "activations": (activations, image(), expect("stem", "middle.8")),
    "pools": (pools, image(size=12), Expect()),
}
