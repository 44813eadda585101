"""Hypothesis strategies: random networks out of the blocks that real ones are made of.

A network is drawn as plain data (nested tuples of names and small integers), so that a failing example prints as
something one can read and rebuild, and shrinks towards fewer, plainer blocks. Every block takes ``[B, C, H, W]`` and
returns ``[B, C', H', W']``; a block that does not fit (a split of one channel, an odd map) becomes the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.attention import OnTokens, SelfAttention, SqueezeExcite, SqueezeExciteLinear
from networks.common import Apply
from networks.movement import shuffle
from networks.norms import GlobalResponseNorm, LayerNorm2d, PermutedLayerNorm, RMSNorm2d

Spec = tuple["Spec | str | int", ...]
"""``("conv", 7, 3)``, ``("residual", (block, block))`` ...: a block's name and what it needs."""


@dataclass(frozen=True)
class Shape:
    """What a block is given: channels and the side of its square map."""

    channels: int
    size: int


Built = tuple[nn.Module, Shape]


def divisor(n: int, at_most: int) -> int:
    """The largest divisor of ``n`` up to ``at_most``."""
    return max(d for d in range(1, max(1, min(n, at_most)) + 1) if n % d == 0)


class Residual(nn.Module):
    """x + body(x), with a 1x1 projection where the shapes differ in channels, a pool where they differ in size."""

    def __init__(self, body: nn.Module, before: Shape, after: Shape, *, multiply: bool) -> None:
        super().__init__()
        self.body, self.size, self.multiply = body, after.size, multiply
        same = before.channels == after.channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(before.channels, after.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, s = self.body(x), self.shortcut(x)
        if s.shape[-1] != y.shape[-1]:
            s = F.adaptive_avg_pool2d(s, self.size)
        return y * torch.sigmoid(s) if self.multiply else y + s


class Concat(nn.Module):
    """The branches' maps beside each other, brought to the first one's size."""

    def __init__(self, branches: list[nn.Module], size: int) -> None:
        super().__init__()
        self.branches, self.size = nn.ModuleList(branches), size

    def forward(self, x: Tensor) -> Tensor:
        maps = [b(x) for b in self.branches]
        return torch.cat(
            [m if m.shape[-1] == self.size else F.interpolate(m, size=(self.size, self.size)) for m in maps], 1
        )


class SplitApply(nn.Module):
    """Splits the channels at ``cut``; one part goes through the body, the other around it; concatenates."""

    def __init__(self, body: nn.Module, cut: int) -> None:
        super().__init__()
        self.body, self.cut = body, cut

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, : self.cut], x[:, self.cut :]
        return torch.cat([b, self.body(a)], 1)


class RandomNet(nn.Module):
    """stem, blocks, pool, flatten, linear."""

    def __init__(self, spec: Spec, stem: int = 8, size: int = 8) -> None:
        super().__init__()
        self.spec = spec
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        blocks, shape = build(spec, Shape(stem, size))
        self.blocks, self.pool = blocks, nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(shape.channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(F.silu(self.stem(x)))), 1))


def build(spec: Spec, shape: Shape) -> Built:
    """A sequence of blocks."""
    layers: list[nn.Module] = []
    for block in spec:
        assert isinstance(block, tuple)
        layer, shape = BLOCKS[str(block[0])](shape, *block[1:])
        if not isinstance(layer, nn.Identity):
            layers.append(layer)
    return nn.Sequential(*layers), shape


def same(make: Callable[[int], nn.Module]) -> Callable[..., Built]:
    """A block that changes no shape, made from the number of channels."""
    return lambda shape: (make(shape.channels), shape)


def conv_block(shape: Shape, out: int, kernel: int) -> Built:
    return nn.Conv2d(shape.channels, out, kernel, padding=kernel // 2), replace(shape, channels=out)


def strided_block(shape: Shape, out: int) -> Built:
    if shape.size < 4:
        return nn.Identity(), shape
    return nn.Conv2d(shape.channels, out, 3, 2, 1), Shape(out, (shape.size + 1) // 2)


def grouped_block(shape: Shape, groups: int, each: int) -> Built:
    g = divisor(shape.channels, groups)
    return nn.Conv2d(shape.channels, g * each, 3, padding=1, groups=g), replace(shape, channels=g * each)


def depthwise_block(shape: Shape, multiplier: int) -> Built:
    out = shape.channels * multiplier
    if out > 40:
        return nn.Identity(), shape
    return nn.Conv2d(shape.channels, out, 3, padding=1, groups=shape.channels), replace(shape, channels=out)


def transposed_block(shape: Shape, out: int) -> Built:
    if shape.size > 8:
        return nn.Identity(), shape
    return nn.ConvTranspose2d(shape.channels, out, 2, 2), Shape(out, 2 * shape.size)


def group_norm_block(shape: Shape, groups: int) -> Built:
    return nn.GroupNorm(divisor(shape.channels, groups), shape.channels), shape


def residual_block(shape: Shape, body: Spec, multiply: int) -> Built:
    inner, after = build(body, shape)
    return Residual(inner, shape, after, multiply=bool(multiply)), after


def concat_block(shape: Shape, first: Spec, second: Spec) -> Built:
    a, sa = build(first, shape)
    b, sb = build(second, shape)
    if sa.channels + sb.channels > 48:
        return a, sa
    return Concat([a, b], sa.size), Shape(sa.channels + sb.channels, sa.size)


def split_block(shape: Shape, part: int, body: Spec) -> Built:
    cut = max(1, shape.channels * part // 10)
    inner, after = build(body, Shape(cut, shape.size))
    if shape.channels - cut < 1 or after.size != shape.size:
        return nn.Identity(), shape
    return SplitApply(inner, cut), replace(shape, channels=shape.channels - cut + after.channels)


def shuffle_block(shape: Shape, groups: int, how: int) -> Built:
    g = divisor(shape.channels, groups)
    if how == 0:
        return Apply(lambda x: shuffle(x, g)), shape
    return nn.ChannelShuffle(g), shape


def pad_block(shape: Shape, before: int, after: int) -> Built:
    return Apply(lambda x: F.pad(x, (0, 0, 0, 0, before, after))), replace(
        shape, channels=shape.channels + before + after
    )


def roll_block(shape: Shape, by: int) -> Built:
    return Apply(lambda x: x + torch.roll(x.flip(1), by, dims=1)), shape


def step_block(shape: Shape, start: int, step: int) -> Built:
    out = len(range(start, shape.channels, step))
    if out < 2:
        return nn.Identity(), shape
    return Apply(lambda x: x[:, start::step]), replace(shape, channels=out)


def unshuffle_block(shape: Shape) -> Built:
    if shape.size % 2 or shape.channels > 10 or shape.size < 4:
        return nn.Identity(), shape
    return nn.PixelUnshuffle(2), Shape(4 * shape.channels, shape.size // 2)


def pixel_shuffle_block(shape: Shape) -> Built:
    if shape.channels % 4 or shape.channels < 8 or shape.size > 8:
        return nn.Identity(), shape
    return nn.PixelShuffle(2), Shape(shape.channels // 4, 2 * shape.size)


def glu_block(shape: Shape) -> Built:
    if shape.channels % 2 or shape.channels < 4:
        return nn.Identity(), shape
    return nn.GLU(1), replace(shape, channels=shape.channels // 2)


def pool_block(shape: Shape, kind: int) -> Built:
    if shape.size < 4:
        return nn.Identity(), shape
    return (nn.MaxPool2d(2) if kind == 0 else nn.AvgPool2d(2)), replace(shape, size=shape.size // 2)


def attention_block(shape: Shape, heads: int) -> Built:
    h = divisor(shape.channels, heads)
    if shape.size > 8 or shape.channels // h < 2:
        return nn.Identity(), shape
    return OnTokens(SelfAttention(shape.channels, h, "fixed"), shape.channels), shape


BLOCKS: dict[str, Callable[..., Built]] = {
    "conv": conv_block,
    "strided": strided_block,
    "grouped": grouped_block,
    "depthwise": depthwise_block,
    "transposed": transposed_block,
    "batch_norm": same(nn.BatchNorm2d),
    "group_norm": group_norm_block,
    "instance_norm": same(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "layer_norm": same(PermutedLayerNorm),
    "layer_norm_by_hand": same(LayerNorm2d),
    "rms_norm": same(RMSNorm2d),
    "global_response_norm": same(GlobalResponseNorm),
    "relu": same(lambda c: nn.ReLU()),
    "gelu": same(lambda c: nn.GELU()),
    "sigmoid": same(lambda c: nn.Sigmoid()),
    "prelu": same(nn.PReLU),
    "squeeze_excite": same(lambda c: SqueezeExcite(c, 4)),
    "squeeze_excite_linear": same(lambda c: SqueezeExciteLinear(c, 3)),
    "attention": attention_block,
    "pool": pool_block,
    "pad": pad_block,
    "roll": roll_block,
    "step": step_block,
    "shuffle": shuffle_block,
    "pixel_unshuffle": unshuffle_block,
    "pixel_shuffle": pixel_shuffle_block,
    "glu": glu_block,
    "residual": residual_block,
    "concat": concat_block,
    "split": split_block,
}

WIDTHS = st.integers(3, 12)

LEAVES: st.SearchStrategy[Spec] = st.one_of(
    st.tuples(st.just("conv"), WIDTHS, st.sampled_from([1, 3])),
    st.sampled_from([(n,) for n in ("batch_norm", "relu", "gelu", "sigmoid", "prelu")]),
    st.tuples(st.just("grouped"), st.integers(2, 4), st.integers(1, 4)),
    st.tuples(st.just("depthwise"), st.integers(1, 2)),
    st.tuples(st.just("strided"), WIDTHS),
    st.tuples(st.just("transposed"), WIDTHS),
    st.tuples(st.just("group_norm"), st.integers(1, 4)),
    st.sampled_from(
        [(n,) for n in ("layer_norm", "layer_norm_by_hand", "rms_norm", "global_response_norm", "instance_norm")]
    ),
    st.sampled_from(
        [(n,) for n in ("squeeze_excite", "squeeze_excite_linear", "pixel_unshuffle", "pixel_shuffle", "glu")]
    ),
    st.tuples(st.just("attention"), st.integers(1, 3)),
    st.tuples(st.just("pool"), st.integers(0, 1)),
    st.tuples(st.just("pad"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("roll"), st.integers(0, 5)),
    st.tuples(st.just("step"), st.integers(0, 2), st.integers(1, 3)),
    st.tuples(st.just("shuffle"), st.integers(2, 4), st.integers(0, 1)),
)


def nest(block: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    """Blocks that hold sequences of blocks."""
    body = st.lists(block, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.tuples(st.just("residual"), body, st.integers(0, 1)),
        st.tuples(st.just("concat"), body, body),
        st.tuples(st.just("split"), st.integers(1, 9), body),
    )


SPECS: st.SearchStrategy[Spec] = st.lists(
    st.one_of(LEAVES, nest(st.one_of(LEAVES, nest(LEAVES)))), min_size=1, max_size=6
).map(tuple)
"""A whole network's blocks, nested at most twice."""
