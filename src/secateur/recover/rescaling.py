"""Rescaling: one number for each channel that a reader kept, shared by all its filters and kernel positions.

In the pruned network let ``z_c`` be what the kept channel ``c`` gives to the outputs of a reader, without its bias, and
``r`` what these lack of the dense network's. The weights that read ``c`` are multiplied by ``1 + a_c``, where ``a``
minimises

    |r - sum_c a_c z_c|^2 + ridge |a|^2:    a = (G + ridge I)^-1 b,    G = Z'Z,    b = Z'r,

over all outputs at all locations, and ``ridge = fraction * mean of the diagonal of G`` holds the factors at 1. Without
a ridge ``1 + a`` is ``G^-1 Z'y`` for the dense network's output ``y``, the least squares of Luo et al. 2017 ("ThiNet",
section 3.2), over all outputs instead of a sample of them. There is no intercept: a bias stays what it is. Channels
that several groups give to one reader, in a concatenation, are fitted together.

Shapes: as in ``patches``; ``C`` channels that were kept.
"""

from __future__ import annotations

import torch

from secateur.grams import Sums, add_moments_
from secateur.patches import Layout, matrix, weight_from
from secateur.recover.equations import least_change
from secateur.recover.readers import Reader
from secateur.statistics import accumulator


def channels_of(reader: Reader) -> tuple[torch.Tensor, int]:
    """``[G I]``: the number of the kept channel that each kept input of each partition is of, and ``C``."""
    numbers, own = torch.unique(reader.channels[reader.columns], return_inverse=True)
    return own.repeat(reader.layout.groups), len(numbers)


def empty_sums(reader: Reader, device: torch.device) -> Sums:
    """Where the outputs of ``reader`` are summed up: ``C x C`` numbers."""
    channels, count = channels_of(reader)
    return Sums.of(torch.arange(len(channels)), channels, count, device)


def sum_bytes(reader: Reader, device: torch.device) -> int:
    """What ``empty_sums`` take."""
    count = channels_of(reader)[1]
    return (count * (count + 1) + 3) * accumulator(device).itemsize


def add_outputs_(sums: Sums, x: torch.Tensor, whole: torch.Tensor, layout: Layout, lacks: torch.Tensor) -> None:
    """Add the outputs of one batch. ``x`` and ``whole [G, O, I, K]``: input and weight with nothing but what is kept;
    ``lacks [G, N, O]``: what their product lacks."""
    add_moments_(sums, x, weight_from(whole, layout), layout, t=lacks, energy=lacks.new_zeros(()))


def rescale_(weight: torch.Tensor, reader: Reader, sums: Sums, ridge: float) -> None:
    """Multiply what ``reader`` kept of ``weight``, the stored parameter, by the factors that fit ``sums``."""
    home = torch.device("cpu") if sums.gram.device.type == "mps" else sums.gram.device
    gram, target = (t.to(home, torch.float64) / float(sums.samples) for t in sums.tensors()[:2])  # none held back
    factors = 1 + least_change(gram[None], target[None, None], ridge)[0, 0]
    by_input = torch.ones(len(reader.columns), dtype=torch.float64)
    by_input[reader.columns] = factors.cpu()[channels_of(reader)[0][: int(reader.columns.sum())]]
    whole = matrix(weight, reader.layout)
    weight.copy_(weight_from(whole * by_input[:, None].to(whole), reader.layout))
