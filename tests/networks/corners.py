"""Corners: weights computed from weights, numbers kept in attributes, attention's variants, reshapes across axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from networks.attention import OnTokens
from networks.common import Apply, Expect, Network, Sandwich, conv, image, tensor
from networks.convolutions import ScaledStdConv, Tied


class TwoWeights(nn.Module):
    """Two convolutions of one width whose weights a function turns into the one that is used."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(12, 10, 3, bias=False) for _ in range(2))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.function(self.a.weight, self.b.weight))


class LowRank(nn.Module):
    """A linear layer with a low-rank update, as LoRA trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 12)
        self.down, self.up = nn.Parameter(tensor(4, 12) * 0.2), nn.Parameter(tensor(12, 4) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.base.weight + self.up @ self.down, self.base.bias)


class ByAttribute(nn.Module):
    """A forward that computes with numbers kept on the module; ``trap`` has a number that only looks like a width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.fc = nn.Conv2d(12, 6, 3, stride=2, padding=1), nn.Linear(96, 10)
        self.features, self.parts, self.width = 96, [2, 4], 6
        self.scale_by = 6
        self.left, self.right = nn.Linear(2, 10), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.conv(x))
        if self.kind == "flatten":
            return self.fc(x.view(-1, self.features))
        if self.kind == "trap":
            return (
                self.fc(x.view(-1, self.width * 16))
                + x.view(-1, self.width, 16).mean((1, 2))[:, None].detach() * 0 / self.scale_by
            )
        if self.kind == "divisor":
            return self.fc(x.view(-1, self.width, 16).flatten(1) / self.scale_by)
        a, b = torch.split(x.mean((2, 3)), self.parts, dim=1)
        return self.left(a) + self.right(b)


class Heads(nn.Module):
    """Attention: ``norm`` of q and k, ``shared`` q and k, ``rotary``, ``grouped`` kv, ``causal``, ``own`` scale."""

    def __init__(self, kind: str, dim: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.kind, self.heads, self.size = kind, heads, 8
        kv = 1 if kind == "grouped" else heads
        self.q, self.k, self.v = (nn.Linear(dim, 8 * h) for h in (heads, kv, kv))
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.out = nn.Linear(8 * heads, dim)
        angle = torch.outer(torch.arange(36.0), 0.5 ** torch.arange(4.0)).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = (f(x).view(b, n, -1, self.size).transpose(1, 2) for f in (self.k, self.v))
        if self.kind == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.kind == "shared":
            k = q
        elif self.kind == "rotary":
            q, k = self.turn(q), self.turn(k)
        options = {"is_causal": self.kind == "causal", "enable_gqa": self.kind == "grouped"}
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3 if self.kind == "own" else None, **options)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class ConvLSTM(nn.Module):
    """Two steps of a convolutional LSTM: four gates from one convolution, the state fed back."""

    def __init__(self, cin: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.gates = hidden, nn.Conv2d(cin + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden, *x.shape[2:])
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


class Recurrent(nn.Module):
    """A GRU over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x.flatten(2).transpose(1, 2))[0][:, -1])


class Unrolled(nn.Module):
    """One block applied three times, each time adding to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(12, 8), nn.Conv2d(8, 12, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.block(x))
        return x


class Checkpointed(nn.Module):
    """Activation checkpointing around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(12, 8), nn.Conv2d(8, 12, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.block, x, use_reentrant=False)


class Bank(nn.Module):
    """Writes maps into a zero tensor, slice by slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 10, *x.shape[2:])
        out[:, :4] = self.a(x)
        out[:, 4:] = self.b(x)
        return out


class Switched(nn.Module):
    """Train and eval mode take different branches over the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(12, 8), conv(12, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.c(self.a(x)) + self.b(x)
        return self.a(x) + self.b(x) * 0.5


class InFloat(nn.Module):
    """Computes in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x.float()).to(x.dtype)


def masked_by_torch() -> nn.Module:
    net = Sandwich(nn.Conv2d(12, 10, 3), out=10)
    prune.l1_unstructured(net.middle, "weight", amount=0.3)
    return net


def weights(function: Callable[[Tensor, Tensor], Tensor], *, out: int = 10) -> Network:
    return (lambda: Sandwich(TwoWeights(function), out=out), image(), Expect())


def numbered_shuffle(x: Tensor) -> Tensor:
    return x.view(-1, 3, 4, 8, 8).transpose(1, 2).reshape(-1, 12, 8, 8)


def rewritten(*makers: Callable[[], nn.Module]) -> Network:
    """A shuffle by views whose numbers no module holds, so that the captured graph itself must be rewritten."""

    def build() -> nn.Module:
        layers = [make() for make in makers]
        return Sandwich(nn.Sequential(Apply(numbered_shuffle), *layers, nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8)), out=8)

    return (build, image(), Expect(prunes=("stem", f"middle.{len(makers) + 1}")))


def heads(kind: str, *prunes: str) -> Network:
    expect = Expect(prunes=("stem", *prunes))
    return (lambda: Sandwich(OnTokens(Heads(kind), 12)), image(size=6), expect)


def either(function: Callable[[Tensor], Tensor], *, out: int = 12, flat: bool = False) -> Network:
    return (lambda: Sandwich(Apply(function), out=out, flat=flat), image(), Expect())


def simple(make: Callable[[], nn.Module], *prunes: str, out: int = 12, flat: bool = False) -> Network:
    return (lambda: Sandwich(make(), out=out, flat=flat), image(), Expect(prunes=("stem", *prunes), oracle=True))


CORNERS: dict[str, Network] = {
    "rewritten_batch_norm": rewritten(lambda: nn.BatchNorm2d(12)),
    "rewritten_batch_norm_without_statistics": rewritten(lambda: nn.BatchNorm2d(12, track_running_stats=False)),
    "rewritten_instance_norm": rewritten(lambda: nn.InstanceNorm2d(12)),
    "rewritten_instance_norm_tracking": rewritten(lambda: nn.InstanceNorm2d(12, affine=True, track_running_stats=True)),
    "rewritten_dropouts": rewritten(
        lambda: nn.Sequential(nn.Dropout(0.2), nn.Dropout2d(0.2), nn.AlphaDropout(0.2), nn.RReLU())
    ),
    "rewritten_standardised": rewritten(
        lambda: ScaledStdConv(12, 12, 3), lambda: nn.PReLU(12), lambda: nn.GroupNorm(3, 12)
    ),
    "rewritten_tied": rewritten(Tied),
    "weights_added": weights(lambda a, b: a + 0.5 * b),
    "weights_concatenated": weights(lambda a, b: torch.cat([a, b]), out=20),
    "weights_stacked_on_inputs": weights(lambda a, b: torch.cat([a[:, :6], b[:, 6:]], 1)),
    "weight_sliced": weights(lambda a, b: a[:7], out=7),
    "weight_turned": weights(lambda a, b: a.flip(2).transpose(2, 3) + b.rot90(1, (2, 3))),
    "weight_gated": weights(lambda a, b: a * torch.sigmoid(b.mean((1, 2, 3), keepdim=True))),
    "weight_normalised_by_hand": weights(lambda a, b: a / a.square().sum((1, 2, 3), keepdim=True).sqrt()),
    "weight_masked_by_torch_prune": (masked_by_torch, image(), Expect(prunes=("stem",))),
    "low_rank_update": (lambda: Sandwich(LowRank(), flat=True), image(), Expect(prunes=("stem",))),
    "attribute_flatten": simple(lambda: ByAttribute("flatten"), "middle.conv", "middle.fc", out=10, flat=True),
    "attribute_trap": (
        lambda: Sandwich(ByAttribute("trap"), out=10, flat=True),
        image(),
        Expect(prunes=("stem", "middle.fc")),
    ),
    "attribute_coincidence": simple(lambda: ByAttribute("divisor"), "middle.conv", "middle.fc", out=10, flat=True),
    "attribute_split": simple(lambda: ByAttribute("split"), "middle.conv", "middle.left", out=10, flat=True),
    "attention_normalised": heads("norm", "middle.block.q", "middle.block.v"),
    "attention_shared_query_key": heads("shared", "middle.block.q", "middle.block.v"),
    "attention_rotary": heads("rotary", "middle.block.v"),
    "attention_grouped": heads("grouped"),
    "attention_causal": heads("causal", "middle.block.q", "middle.block.v"),
    "attention_own_scale": heads("own", "middle.block.q", "middle.block.v"),
    "conv_lstm": (lambda: Sandwich(ConvLSTM(12, 6), out=6), image(), Expect(prunes=("stem",))),
    "recurrent": (lambda: Sandwich(Recurrent(), out=10, flat=True), image(size=4), Expect()),
    "unrolled": simple(Unrolled, "middle.block.0.0"),
    "checkpointed": simple(Checkpointed, "middle.block.0.0"),
    "written_into_zeros": simple(Bank, out=10),
    "train_and_eval_differ": simple(Switched, "middle.a.0", out=8),
    "float32_inside": (lambda: Sandwich(InFloat()), image(), Expect(prunes=("stem",), tol=1e-5)),
    "neighbours_subtracted": either(lambda x: x[:, 1:] - x[:, :-1], out=11),
    "view_mixes_channels_and_rows": either(lambda x: x.reshape(-1, 6, 16, 8), out=6),
    "view_mixes_rows_into_channels": either(lambda x: x.reshape(-1, 24, 4, 8), out=24),
    "flattened_with_steps": either(lambda x: x.flatten(1)[:, ::5], out=154, flat=True),
    "roll_of_everything": either(lambda x: torch.roll(x, 3)),
    "square_of_channels": either(lambda x: torch.einsum("bchw,bdhw->bcd", x, x).mean(2) / 64, flat=True),
    "einsum_diagonal": either(
        lambda x: torch.einsum("bcc->bc", x.flatten(2) @ x.flatten(2).transpose(1, 2)), flat=True
    ),
    "einsum_ellipsis": either(lambda x: torch.einsum("b...,b->b...", x, x.mean((1, 2, 3)))),
    "cosine_similarity": either(lambda x: F.cosine_similarity(x, x.flip(1), dim=1).unsqueeze(1) * x),
    "distances": either(lambda x: torch.cdist(x.flatten(2), x.flatten(2)).mean(2), flat=True),
    "variance_over_all": either(lambda x: x / x.var((1, 2, 3), keepdim=True)),
    "sum_of_all": either(lambda x: x * x.sum((1, 2, 3), keepdim=True).tanh()),
    "largest_positions": either(lambda x: x.flatten(2).topk(3, dim=2).values.mean(2), flat=True),
    "gathered_positions": either(lambda x: x.flatten(2).gather(2, x.flatten(2).argsort(2)[..., :4]).mean(2), flat=True),
    "constant_vector": either(lambda x: x * torch.linspace(0.5, 1.5, 12, dtype=x.dtype).view(1, 12, 1, 1)),
    "counted_channels": either(lambda x: x / x.shape[1]),
    "clamped_by_channel": either(lambda x: torch.minimum(x, x.mean((2, 3), keepdim=True))),
    "one_map_for_all": either(lambda x: x[:, :1].expand(-1, 12, -1, -1) + x),
    "copies_of_a_map": (
        lambda: Sandwich(
            nn.Sequential(nn.Conv2d(12, 1, 1), Apply(lambda x: x.expand(-1, 8, -1, -1)), nn.Conv2d(8, 8, 1)), out=8
        ),
        image(),
        Expect(prunes=("stem",)),
    ),
    "grid_sampled": either(
        lambda x: F.grid_sample(
            x, torch.zeros(1, 4, 4, 2, dtype=x.dtype).expand(x.shape[0], -1, -1, -1), align_corners=False
        )
    ),
    "outer_product": either(
        lambda x: torch.einsum("bc,bd->bcd", x.mean((2, 3)), x.mean((2, 3))).flatten(1), out=144, flat=True
    ),
    "affine_of_pairs": either(
        lambda x: torch.stack([x[:, 0::2] - x[:, 1::2], x[:, 0::2] + x[:, 1::2]], 2).flatten(1, 2)
    ),
    "zeroed_channels": either(lambda x: torch.cat([torch.zeros_like(x[:, :4]), x[:, 4:]], 1)),
    "normalised_by_maximum": either(lambda x: x / x.amax((2, 3), keepdim=True)),
    "transposed_space_and_channels": either(lambda x: x.transpose(1, 2), out=8),
    "chunks_multiplied": either(lambda x: (lambda a, b, c: a * b + c)(*x.chunk(3, 1)), out=4),
    "batch_mixed": either(lambda x: x - x.mean(0, keepdim=True).detach() * 0.5),
}
