"""Distances between the filters of a group: what is close to all others can be replaced by them.

Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (CVPR
2019), and Chen et al., "WHC: Weighted Hybrid Criterion for Filter Pruning on Convolutional Neural Networks" (ICASSP
2023).

Letters: ``C`` channels, ``f`` weights of a filter. Nothing of ``[C, C, f]`` is ever made: products are taken in
float64, a block of rows at a time. As norms do, these look at readers, or scales, where a group has no filters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from secateur.core import GroupView
from secateur.criteria.norms import weights

BLOCK = 2**22
"""How many entries of a matrix of ``[C, C]`` are worked on at a time (32 MiB)."""
NEAR = 1e-4
"""Squared distances below this fraction of the squared norms are taken from the differences themselves: in
``a^2 + b^2 - 2ab`` they would lose most of their digits."""


def fpgm(view: GroupView, /) -> torch.Tensor:
    """``s_j = sum_k ||F_j - F_k||_2``, ``[C]``: the sum of the distances of filter ``j`` to all others (He et al.,
    equation 4). The smallest lies nearest to the geometric median, and is what the others can replace best."""
    filters = weights(view).to(torch.float64)
    filters = filters - filters.mean(0)  # distances stay, cancellation shrinks
    squares = filters.square().sum(1)
    scores = torch.empty_like(squares)
    for rows, products in _blocks(filters):
        sums = squares[rows, None] + squares
        distances = (sums - 2 * products).clamp_min_(0)
        near = (distances < NEAR * sums).nonzero()
        for pairs in near.split(max(1, BLOCK // max(1, filters.shape[1]))):
            a, b = pairs.unbind(1)
            distances[a, b] = (filters[a + rows.start] - filters[b]).square_().sum(1)
        scores[rows] = distances.sqrt_().sum(1)
    return scores


def whc(view: GroupView, /) -> torch.Tensor:
    """``s_j = ||F_j|| sum_k ||F_k|| (1 - |cos(F_j, F_k)|)``, ``[C]``: large are filters that are long and unlike all
    others that are long (Chen et al.). A filter of zeros scores 0."""
    filters = weights(view).to(torch.float64)
    norms = torch.linalg.vector_norm(filters, dim=1)
    scores = torch.empty_like(norms)
    for rows, products in _blocks(filters):
        # ||a|| ||b|| (1 - |cos|) without a division that zeros could not stand
        scores[rows] = (norms[rows, None] * norms - products.abs_()).clamp_min_(0).sum(1)
    return scores


def _blocks(filters: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of ``filters @ filters.T``, a block at a time: ``[rows, C]``."""
    channels = filters.shape[0]
    step = max(1, BLOCK // max(1, channels))
    for start in range(0, channels, step):
        rows = slice(start, min(start + step, channels))
        yield rows, filters[rows] @ filters.mT
