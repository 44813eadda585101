"""Channels moved about: concatenated, split, sliced, permuted, reshaped, padded, repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.common import Apply, Expect, Network, Sandwich, image, tensor


class Branches(nn.Module):
    """Convolutions of the same input, brought together by a function."""

    def __init__(self, widths: Sequence[int], function: Callable[..., Tensor], *, cin: int = 12) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(cin, w, 3, padding=1) for w in widths)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*[F.softplus(b(x)) for b in self.branches])


class CatInput(nn.Module):
    """Concatenates the network's own input to its features, as optical flow and segmentation nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(13, 8, 3, padding=1)
        self.head = nn.Conv2d(11, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.conv1(x)), x], 1)
        return self.head(torch.cat([x, F.relu(self.conv2(y))], 1))


class Parts(nn.Module):
    """Splits channels by a function, sends each part through its own convolution, adds the results."""

    def __init__(self, split: Callable[[Tensor], Sequence[Tensor]], widths: Sequence[int]) -> None:
        super().__init__()
        self.split = split
        self.convs = nn.ModuleList(nn.Conv2d(w, 6, 3, padding=1) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        return sum((c(p) for c, p in zip(self.convs, self.split(x), strict=True)), torch.zeros(()))


class FlattenLinear(nn.Module):
    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.flatten, self.fc = nn.Conv2d(12, 6, 3, stride=2, padding=1), flatten, nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.fc(self.flatten(F.softplus(self.conv(x)))))


class Generator(nn.Module):
    """Linear, viewed as a map, then transposed convolutions: a GAN's generator."""

    def __init__(self, unflatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 8 * 3 * 3), nn.BatchNorm2d(8)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Conv2d(6, 3, 3, padding=1)
        self.unflatten = unflatten

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.unflatten(self.fc(z))))
        return torch.tanh(self.head(F.relu(self.up(x))))


class InPlaceSlice(nn.Module):
    """``x[:, :4] = y``: overwrites some channels in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = 0.5 * self.conv1(x)
        y[:, :4] = self.conv2(x)
        return y


class InPlace(nn.Module):
    """In-place activations and an in-place residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu_(self.conv1(x)))
        y += x
        return y.mul_(0.5).add_(1.0).clamp_(min=-2.0)


class OptionA(nn.Module):
    """The parameter-free shortcut of ResNet for CIFAR: every second pixel, channels padded with zeros."""

    def __init__(self, pad: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(y + self.pad(x[:, :, ::2, ::2]))


class Coordinates(nn.Module):
    """CoordConv: two coordinate planes beside the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(14, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        ys, xs = torch.linspace(-1, 1, h, dtype=x.dtype), torch.linspace(-1, 1, w, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij"))
        return self.conv(torch.cat([x, grid.expand(b, -1, -1, -1)], dim=1))


def shuffle(x: Tensor, groups: int = 3) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def space_to_depth(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def moved(function: Callable[[Tensor], Tensor], *, width: int = 12, out: int = 12) -> Network:
    """stem, the function, head; the stem's channels must be free."""
    return (lambda: Sandwich(Apply(function), width=width, out=out), image(), STEM)


def branches(function: Callable[..., Tensor], *widths: int, out: int, prunes: Sequence[int]) -> Network:
    expect = Expect(prunes=("stem", *(f"middle.branches.{i}" for i in prunes)), oracle=True)
    return (lambda: Sandwich(Branches(widths, function), out=out), image(), expect)


def parts(split: Callable[[Tensor], Sequence[Tensor]], *widths: int) -> Network:
    return (
        lambda: Sandwich(Parts(split, widths), out=6),
        image(),
        Expect(prunes=("stem", "middle.convs.*"), oracle=True),
    )


def generator(unflatten: Callable[[Tensor], Tensor]) -> Network:
    return (lambda: Generator(unflatten), lambda: (tensor(2, 6),), Expect(prunes=("fc", "up"), oracle=True))


STEM = Expect(prunes=("stem",), oracle=True)
PERMUTATION = [5, 2, 11, 0, 7, 3, 9, 1, 10, 4, 8, 6]
FLAT = Expect(prunes=("stem", "middle.conv", "middle.fc"), oracle=True)
WIDER = Expect(prunes=("stem", "middle.conv1"), oracle=True)

MOVEMENT: dict[str, Network] = {
    "cat": branches(lambda a, b: torch.cat([a, b], 1), 7, 10, out=17, prunes=(0, 1)),
    "cat_with_network_input": (CatInput, image(), Expect(prunes=("conv1", "conv2"), oracle=True)),
    "cat_same_tensor_twice": branches(lambda a: torch.cat([a, a], 1), 8, out=16, prunes=(0,)),
    "cat_along_space": branches(lambda a, b: torch.cat([a, b], 2), 8, 8, out=8, prunes=(0, 1)),
    "cat_then_add": branches(lambda a, b, c: torch.cat([a, b], 1) + c, 6, 8, 14, out=14, prunes=(0, 1, 2)),
    "stack_summed": branches(lambda a, b: torch.stack([a, b], 1).sum(1), 8, 8, out=8, prunes=(0, 1)),
    "stack_maximum": branches(lambda a, b: torch.stack([a, b]).max(0).values, 8, 8, out=8, prunes=(0, 1)),
    "stack_flattened": branches(lambda a, b: torch.stack([a, b], 1).flatten(1, 2), 8, 8, out=16, prunes=(0, 1)),
    "stack_interleaved": branches(lambda a, b: torch.stack([a, b], 2).flatten(1, 2), 8, 8, out=16, prunes=(0, 1)),
    "split_uneven": parts(lambda x: x.split([3, 7, 2], 1), 3, 7, 2),
    "split_even": parts(lambda x: torch.split(x, 4, dim=1), 4, 4, 4),
    "split_with_rest": parts(lambda x: torch.split(x, 5, dim=1), 5, 5, 2),
    "chunk": parts(lambda x: x.chunk(2, 1), 6, 6),
    "chunk_uneven": parts(lambda x: x.chunk(5, 1), 3, 3, 3, 3),
    "tensor_split": parts(lambda x: torch.tensor_split(x, [2, 9], dim=1), 2, 7, 3),
    "narrow": parts(lambda x: (x.narrow(1, 0, 5), x.narrow(1, 4, 8)), 5, 8),
    "slices_with_steps": parts(lambda x: (x[:, ::2], x[:, 1::3], x[:, -3:]), 6, 4, 3),
    "unbind_of_view": parts(lambda x: x.view(-1, 3, 4, 8, 8).unbind(1), 4, 4, 4),
    "select_one_channel": (
        lambda: Sandwich(Apply(lambda x: x * x[:, 3].unsqueeze(1))),
        image(),
        Expect(),
    ),
    "index_select": parts(lambda x: (x.index_select(1, torch.tensor([0, 2, 9])), x), 3, 12),
    "index_with_permutation": moved(lambda x: x[:, PERMUTATION]),
    "index_with_repeats": moved(lambda x: x[:, [0, 0, 3, 5, 5, 5, 7]], out=7),
    "flip_channels": moved(lambda x: x.flip(1)),
    "flip_added": moved(lambda x: x + x.flip(1)),
    "flip_space": moved(lambda x: x.flip((2, 3))),
    "roll_channels": moved(lambda x: torch.roll(x, 5, dims=1)),
    "roll_space": moved(lambda x: torch.roll(x, (1, 2), dims=(2, 3))),
    "swap_halves": moved(lambda x: torch.cat([x[:, 6:], x[:, :6]], 1)),
    "shuffle_by_view": moved(shuffle),
    "shuffle_by_function": moved(lambda x: torch.channel_shuffle(x, 3)),
    "shuffle_by_module": (lambda: Sandwich(nn.ChannelShuffle(4)), image(), STEM),
    "shuffle_by_index": moved(lambda x: x[:, [i * 4 + j for j in range(4) for i in range(3)]]),
    "shuffle_between_grouped": (
        lambda: Sandwich(
            nn.Sequential(nn.Conv2d(12, 12, 1, groups=3), Apply(shuffle), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3)),
        ),
        image(),
        Expect(prunes=("stem",), oracle=True),
    ),
    "pixel_shuffle": moved(lambda x: F.pixel_shuffle(x, 2), out=3),
    "pixel_unshuffle": moved(lambda x: F.pixel_unshuffle(x, 2), width=6, out=24),
    "space_to_depth_by_view": moved(space_to_depth, width=6, out=24),
    "option_a_pad": (
        lambda: Sandwich(OptionA(lambda x: F.pad(x, (0, 0, 0, 0, 4, 4))), width=8, out=16),
        image(),
        WIDER,
    ),
    "option_a_cat_zeros": (
        lambda: Sandwich(OptionA(lambda x: torch.cat([x, torch.zeros_like(x)], 1)), width=8, out=16),
        image(),
        WIDER,
    ),
    "pad_channels": moved(lambda x: F.pad(x, (0, 0, 0, 0, 0, 5)), out=17),
    "flatten_linear": (lambda: Sandwich(FlattenLinear(lambda x: x.flatten(1)), out=10, flat=True), image(), FLAT),
    "view_linear": (
        lambda: Sandwich(FlattenLinear(lambda x: x.view(x.size(0), -1)), out=10, flat=True),
        image(),
        FLAT,
    ),
    "flatten_last_linear": (
        lambda: Sandwich(FlattenLinear(lambda x: x.permute(0, 2, 3, 1).reshape(-1, 96)), out=10, flat=True),
        image(),
        FLAT,
    ),
    "linear_to_map": generator(lambda x: x.view(-1, 8, 3, 3)),
    "linear_to_map_by_module": generator(nn.Unflatten(1, (8, 3, 3))),
    "linear_to_map_channels_last": generator(lambda x: x.reshape(-1, 3, 3, 8).permute(0, 3, 1, 2)),
    "expand_channels": moved(lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(-1, 24, 8, 8), out=24),
    "expand_one_channel_as": branches(lambda a, b: a * b.expand_as(a), 8, 1, out=8, prunes=(0,)),
    "expand_one_channel": branches(lambda a, b: a * b.expand(-1, 8, -1, -1), 8, 1, out=8, prunes=(0,)),
    "repeat_channels": moved(lambda x: x.repeat(1, 2, 1, 1), out=24),
    "repeat_interleave": moved(lambda x: x.repeat_interleave(2, dim=1), out=24),
    "broadcast_map_and_vector": branches(
        lambda a, b: a.mean(1, keepdim=True).detach() * 0 + b.mean((2, 3), keepdim=True) * a[:, :1].sigmoid(),
        1,
        9,
        out=9,
        prunes=(1,),
    ),
    "unfold_space": moved(lambda x: F.unfold(x, 3, padding=1).unflatten(2, (8, 8)), out=108),
    "tensor_unfold_space": moved(lambda x: x.unfold(2, 4, 2).mean(-1)),
    "where_mask": branches(lambda a, b: torch.where(a > 0.7, a, b), 8, 8, out=8, prunes=(0, 1)),
    "where_scalar": moved(lambda x: torch.where(x > 0.7, x, -0.3)),
    "masked_fill": moved(lambda x: x.masked_fill(x < 0.5, 0.25)),
    "boolean_of_space": moved(lambda x: x * (torch.arange(8) % 2 == 0)),
    "slice_assignment": (lambda: Sandwich(InPlaceSlice(), out=10), image(), Expect(oracle=True)),
    "in_place": (lambda: Sandwich(InPlace()), image(), Expect(prunes=("stem", "middle.conv1"), oracle=True)),
    "coordinates": (
        lambda: Sandwich(Coordinates(), out=8),
        image(),
        Expect(prunes=("stem", "middle.conv"), oracle=True),
    ),
}
