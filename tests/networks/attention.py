"""Channels that weigh, compare or generate one another: gates, attention, contractions, and what must be locked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.common import Apply, Expect, Network, Sandwich, image, tensor


class SqueezeExcite(nn.Module):
    """Squeeze and excitation by 1x1 convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(s))))


class SqueezeExciteLinear(nn.Module):
    """The same by linear layers and views."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(x.mean((2, 3)).view(b, c)).view(b, c, 1, 1).expand_as(x)


class SpatialAttention(nn.Module):
    """CBAM's spatial half: mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.conv(s))


class LearnedSpatialAttention(nn.Module):
    """A spatial gate made by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class EfficientChannelAttention(nn.Module):
    """ECA: a 1-D convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return x * torch.sigmoid(y)


class Contraction(nn.Module):
    """A convolution, then one function of its map and a bare parameter."""

    def __init__(self, p: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.p, self.function = nn.Conv2d(12, 10, 3, padding=1), nn.Parameter(p * 0.3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x), self.p)


class SelfAttention(nn.Module):
    """Heads over a fused qkv. ``how``: ``sdpa``, ``fixed`` (softmax, scale a number), ``shape`` (by q's shape)."""

    def __init__(self, dim: int, heads: int, how: str) -> None:
        super().__init__()
        self.heads, self.how, self.scale = heads, how, (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = self.scale if self.how == "fixed" else q.shape[-1] ** -0.5
            y = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class SeparateAttention(nn.Module):
    """q, k and v from layers of their own; v of another width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, 8), nn.Linear(dim, 8), nn.Linear(dim, 10)
        self.out = nn.Linear(10, dim)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.softmax(torch.bmm(self.q(x), self.k(x).transpose(1, 2)) / 8**0.5, -1)
        return self.out(torch.bmm(near, self.v(x)))


class OnTokens(nn.Module):
    """A token module between maps, in a residual branch behind a layer norm."""

    def __init__(self, block: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(dim), block

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        t = t + self.block(self.norm(t))
        return t.transpose(1, 2).reshape(b, c, h, w)


class ModuleAttention(nn.Module):
    """``nn.MultiheadAttention`` on tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(dim, 2, batch_first=True), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


class WindowAttention(nn.Module):
    """Attention within windows of ``size`` x ``size``, shifted by a roll, with a bias for each pair of positions."""

    def __init__(self, dim: int, size: int, heads: int) -> None:
        super().__init__()
        self.size, self.inner = size, SelfAttention(dim, heads, "sdpa")

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.size
        x = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2)).view(b, h // s, s, w // s, s, c)
        t = self.inner(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c))
        x = t.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, (1, 1), (1, 2)).permute(0, 3, 1, 2)


class NonLocal(nn.Module):
    """The non-local block: attention between positions by 1x1 convolutions."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        t, p, g = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        y = torch.softmax(t.transpose(1, 2) @ p, dim=-1) @ g.transpose(1, 2)
        return x + self.out(y.transpose(1, 2).reshape(b, -1, h, w))


class ChannelAttention(nn.Module):
    """Attention between channels: softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(2)
        return x + self.scale * (torch.softmax(f @ f.transpose(1, 2), -1) @ f).view_as(x)


class Gated(nn.Module):
    """Two branches multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


class CondConv(nn.Module):
    """A mixture of expert kernels for each sample, run as one grouped convolution."""

    def __init__(self, cin: int, cout: int, experts: int) -> None:
        super().__init__()
        self.route = nn.Linear(cin, experts)
        self.experts = nn.Parameter(tensor(experts, cout * cin * 9) * 0.1)
        self.shape = (cout, cin, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        mix = torch.sigmoid(self.route(x.mean((2, 3))))
        kernel = (mix @ self.experts).view(b * self.shape[0], *self.shape[1:])
        return F.conv2d(x.reshape(1, b * c, h, w), kernel, padding=1, groups=b).view(b, -1, h, w)


class ExpertMix(nn.Module):
    """Experts' outputs mixed by routing weights: what CondConv computes, without a generated kernel."""

    def __init__(self, cin: int, cout: int, experts: int) -> None:
        super().__init__()
        self.route = nn.Linear(cin, experts)
        self.experts = nn.Parameter(tensor(experts, cout, cin) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        mix = torch.softmax(self.route(x.mean((2, 3))), -1)
        kernel = torch.einsum("be,eoi->boi", mix, self.experts)
        return torch.bmm(kernel, x.flatten(2)).unflatten(2, x.shape[2:])


class HyperConv(nn.Module):
    """A convolution whose weight another layer generates from a learned code."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(tensor(4)), nn.Linear(4, cout * cin)
        self.shape = (cout, cin, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.make(self.code).view(self.shape))


class SelectiveKernel(nn.Module):
    """SK: a softmax over two branches for each channel."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], dim=1)
        s = self.fc2(F.relu(self.fc1(both.sum(1).mean((2, 3), keepdim=True))))
        weights = s.view(s.shape[0], 2, -1, 1, 1).softmax(dim=1)
        return (both * weights).sum(1)


def gram(x: Tensor) -> Tensor:
    f = x.flatten(2)
    return torch.bmm(f, f.transpose(1, 2)) / 64


def locked(function: Callable[[Tensor], Tensor], reason: str, *, out: int = 12) -> Network:
    return (lambda: Sandwich(Apply(function), out=out), image(), Expect(locks=("stem",), reason=reason))


def mixed(p: Tensor, function: Callable[[Tensor, Tensor], Tensor], *, out: int) -> Network:
    return (
        lambda: Sandwich(Contraction(p, function), out=out),
        image(),
        Expect(prunes=("stem", "middle.conv", "middle")),
    )


def attend(make: Callable[[], nn.Module], *prunes: str, norm: bool = True) -> Network:
    def build() -> nn.Module:
        return Sandwich(OnTokens(make(), 12) if norm else make())

    return (build, image(size=6), Expect(prunes=("stem", *prunes)))


GATES: dict[str, Network] = {
    "squeeze_excite": (
        lambda: Sandwich(SqueezeExcite(12, 4)),
        image(),
        Expect(prunes=("stem", "middle.reduce"), oracle=True),
    ),
    "squeeze_excite_linear": (
        lambda: Sandwich(SqueezeExciteLinear(12, 4)),
        image(),
        Expect(prunes=("stem", "middle.fc.0"), oracle=True),
    ),
    "spatial_attention": (lambda: Sandwich(SpatialAttention()), image(), Expect(locks=("stem",))),
    "spatial_attention_learned": (
        lambda: Sandwich(LearnedSpatialAttention()),
        image(),
        Expect(prunes=("stem",), oracle=True),
    ),
    "efficient_channel_attention": (lambda: Sandwich(EfficientChannelAttention()), image(), Expect(locks=("stem",))),
    "gating": (
        lambda: Sandwich(Gated(), out=8),
        image(),
        Expect(prunes=("stem", "middle.value", "middle.gate"), oracle=True),
    ),
    "glu": (lambda: Sandwich(nn.GLU(dim=1), out=6), image(), Expect(prunes=("stem",), oracle=True)),
    "maxout_by_view": (
        lambda: Sandwich(Apply(lambda x: x.view(-1, 6, 2, 8, 8).max(2).values), out=6),
        image(),
        Expect(prunes=("stem",), oracle=True),
    ),
    "maxout_of_halves": (
        lambda: Sandwich(Apply(lambda x: torch.max(x[:, :6], x[:, 6:])), out=6),
        image(),
        Expect(prunes=("stem",), oracle=True),
    ),
    "selective_kernel": (
        lambda: Sandwich(SelectiveKernel(12, 6)),
        image(),
        Expect(prunes=("stem", "middle.a", "middle.fc1"), oracle=True),
    ),
    "sum_over_channels": (lambda: Sandwich(Apply(lambda x: x * x.sum(1, keepdim=True).tanh())), image(), Expect()),
}

CONTRACTIONS: dict[str, Network] = {
    "einsum_with_parameter": mixed(tensor(8, 10), lambda x, p: torch.einsum("bchw,dc->bdhw", x, p), out=8),
    "einsum_of_maps": (
        lambda: Sandwich(
            Contraction(
                tensor(10),
                lambda x, p: (
                    torch.einsum("bchw,bcij->bhwij", x, x * p.view(10, 1, 1)).flatten(1, 2).mean((2, 3)).view(-1, 64)
                ),
            ),
            out=64,
            flat=True,
        ),
        image(),
        Expect(prunes=("stem", "middle.conv")),
    ),
    "matmul_over_channels": mixed(
        tensor(10, 8), lambda x, p: (x.flatten(2).transpose(1, 2) @ p).transpose(1, 2).unflatten(2, (8, 8)), out=8
    ),
    "matmul_over_space": (
        lambda: Sandwich(Contraction(tensor(8, 8), lambda x, p: x @ p), out=10),
        image(),
        Expect(prunes=("stem", "middle.conv")),
    ),
    "gram_matrix": (
        lambda: Sandwich(Apply(lambda x: gram(x).flatten(1)), width=6, out=36, flat=True),
        image(),
        Expect(),
    ),
    "gram_applied": (
        lambda: Sandwich(Apply(lambda x: (gram(x) @ x.flatten(2)).view_as(x))),
        image(),
        Expect(prunes=("stem",)),
    ),
    "gram_as_map": (lambda: Sandwich(Apply(lambda x: gram(x).unsqueeze(1)), out=1), image(), Expect()),
    "expert_mix": (lambda: Sandwich(ExpertMix(12, 10, 3), out=10), image(), Expect(prunes=("stem", "middle"))),
    "cond_conv": (lambda: Sandwich(CondConv(12, 10, 3), out=10), image(), Expect()),
    "hyper_conv": (lambda: Sandwich(HyperConv(12, 10), out=10), image(), Expect()),
}

ATTENTION: dict[str, Network] = {
    "attention_sdpa": attend(lambda: SelfAttention(12, 2, "sdpa"), "middle.block.qkv"),
    "attention_by_hand": attend(lambda: SelfAttention(12, 2, "fixed"), "middle.block.qkv"),
    "attention_scale_from_shape": attend(lambda: SelfAttention(12, 3, "shape"), "middle.block.qkv"),
    "attention_separate": attend(lambda: SeparateAttention(12), "middle.block.q", "middle.block.v"),
    "attention_module": attend(lambda: ModuleAttention(12)),
    "attention_in_windows": attend(lambda: WindowAttention(12, 3, 2), norm=False),
    "non_local": attend(lambda: NonLocal(12, 6), "middle.theta", "middle.g", norm=False),
}

LOCKED: dict[str, Network] = {
    "softmax_over_channels": locked(lambda x: x.softmax(1), "softmax"),
    "log_softmax_over_channels": locked(lambda x: F.log_softmax(x, dim=1), "softmax"),
    "mean_subtracted": locked(lambda x: x - x.mean(1, keepdim=True), "mean"),
    "maximum_over_channels": locked(lambda x: x / (1 + x.amax(1, keepdim=True)), "amax"),
    "sort_channels": locked(lambda x: x.sort(dim=1).values, "sort"),
    "topk_channels": locked(lambda x: x.topk(5, dim=1).values, "topk", out=5),
    "argmax_over_channels": locked(lambda x: x * x.argmax(1, keepdim=True).to(x.dtype), "argmax"),
    "cumsum_over_channels": locked(lambda x: x.cumsum(1), "cumsum"),
    "unknown_op": locked(lambda x: torch.fft.fft2(x).real, "fft"),
    "unknown_op_on_half": (
        lambda: Sandwich(Apply(lambda x: torch.cat([x[:, :5], torch.fft.fft2(x[:, 5:]).real], 1))),
        image(),
        Expect(prunes=("stem",), reason="fft"),
    ),
    "conv_along_channels": (
        lambda: Sandwich(Apply(lambda x: F.avg_pool3d(x.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1))),
        image(),
        Expect(locks=("stem",)),
    ),
    "channel_attention": (lambda: Sandwich(ChannelAttention()), image(), Expect(locks=("stem",), reason="softmax")),
}
