"""Images and their labels as a whole batch wants them: taken, augmented, in float32 and normalised.

**Small images** (all of one size, as bytes) are augmented as CIFAR's are since Lee et al. 2015 and He et al. 2016
(section 4.2): padded with black by an eighth of their size (4 of 32 pixels, 2 of 16), a window of the original size cut
out at random, and, but for digits, mirrored with probability one half. This gives bit for bit what torchvision's v2
``pad``, ``crop`` and ``horizontal_flip`` give; it is done for a whole batch at once because calling those for every
image takes six times as long.

Shapes: ``N`` images in the set, ``B`` in a batch, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from secateur.zoo.data.randomness import generator, preserved


class Items(Protocol):
    """Images that are read one by one: the image at ``index`` as ``[C, H, W]``, all of one shape; uint8, or float32
    that is taken as it is. ``epoch`` None: not augmented. It may seed the generators that everyone shares."""

    def __call__(self, index: int, epoch: int | None) -> Tensor: ...


@dataclass(frozen=True)
class Normalisation:
    """``(pixel - mean) / std`` for each channel, pixels between 0 and 1; ``channels`` repeats a single one so often."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, c, H, W]`` of bytes, or of floats between 0 and 1, to ``[B, channels, H, W]`` float32."""
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        mean, std = (scale * torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        normal = (images.float() - mean).div_(std)
        if normal.shape[1] == self.channels:
            return normal
        return normal.expand(-1, self.channels, -1, -1).contiguous()


@dataclass(frozen=True)
class Shift:
    """Every image moved by up to ``pixels`` in each direction, black where nothing was; ``flip``: every other mirrored.

    What happens to an image depends on ``(seed, epoch, index)`` alone: it is row ``index`` of a table that is drawn
    for all ``count`` images of the set at once.
    """

    pixels: int
    flip: bool
    count: int
    seed: int

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """``[B, C, H, W]`` to the same shape; ``indices`` ``[B]`` are their places in the set."""
        height, width = images.shape[-2:]
        corners, flips = shift_table(self, epoch)
        top, left = corners[indices].unbind(1)
        wide = functional.pad(images, (self.pixels,) * 4)
        windows = wide.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2 pixels + 1, 2 pixels + 1, H, W], a view
        moved = windows[torch.arange(len(images)), :, top, left]
        return torch.where(flips[indices, None, None, None], moved.flip(-1), moved) if self.flip else moved


@lru_cache(maxsize=8)
def shift_table(shift: Shift, epoch: int) -> tuple[Tensor, Tensor]:
    """For every image the corner ``[N, 2]`` (top, left) of the window and whether it is mirrored ``[N]``."""
    rng = generator(shift.seed, "augment", epoch)
    corners = torch.randint(0, 2 * shift.pixels + 1, (shift.count, 2), generator=rng)
    return corners, torch.rand(shift.count, generator=rng) < 0.5


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their labels ``[N]`` int64. ``pixels``: ``[N, C, H, W]`` in memory, or what reads them one by one."""

    pixels: Tensor | Items
    labels: Tensor
    normalise: Normalisation | None
    shift: Shift | None = None

    def read(self, indices: Tensor, epoch: int | None) -> Tensor:
        """The images at ``indices`` ``[B]`` as ``[B, C, H, W]`` float32; augmented as of ``epoch``, None: none."""
        pixels = self.pixels
        if isinstance(pixels, Tensor):
            images = pixels[indices]
        else:
            with preserved():
                images = torch.stack([pixels(index, epoch) for index in indices.tolist()])
        if epoch is not None and self.shift is not None:
            images = self.shift(images, indices, epoch)
        return images.float() if self.normalise is None else self.normalise(images)


def shift_for(size: int, count: int, *, seed: int, flip: bool) -> Shift:
    """The standard augmentation of ``count`` small images: shifts by an eighth of their ``size``, at least a pixel."""
    return Shift(pixels=max(1, round(size / 8)), flip=flip, count=count, seed=seed)


def resized(images: Tensor, size: int | None) -> Tensor:
    """``[N, C, H, W]`` enlarged or reduced to ``size`` (bilinear, antialiased); bytes stay bytes."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    bytes_ = images.dtype == torch.uint8
    parts = []
    for chunk in images.split(4096):  # a float copy of the whole set at once need not fit
        smaller = functional.interpolate(
            chunk.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=size < images.shape[-1]
        )
        parts.append(smaller.round_().clamp_(0, 255).byte() if bytes_ else smaller)
    return torch.cat(parts)


def moments(read: Callable[[Tensor], Tensor], indices: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the images at ``indices``, pixels between 0 and 1.

    ``read`` gives ``[B, C, H, W]`` of bytes or floats. A channel that is constant gets the deviation 1.
    """
    count, first, second = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for chunk in indices.split(1024):
        images = read(chunk)
        values = images.double() / (255 if images.dtype == torch.uint8 else 1)
        count += values[:, 0].numel()
        first = first + values.sum((0, 2, 3))
        second = second + values.square().sum((0, 2, 3))
    mean = first / count
    std = (second / count - mean**2).clamp(min=0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return tuple(mean.tolist()), tuple(std.tolist())
