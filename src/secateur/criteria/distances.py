"""Distances between the filters of a group: what is close to all others can be replaced by them.

Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (CVPR
2019), and Chen et al., "WHC: Weighted Hybrid Criterion for Filter Pruning on Convolutional Neural Networks" (ICASSP
2023).

What is here are criteria; the sums of distances are in ``sums.py``. As norms do, these look at readers, or scales,
where a group has no filters. Letters: ``C`` channels, ``f`` weights of a filter.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Literal

import torch

from secateur.core import Criterion, GroupView
from secateur.criteria.norms import weights
from secateur.criteria.sums import absolute_sums, cosine_sums, euclidean_sums, hybrid_sums, minkowski_sums
from secateur.errors import BadRequest

Distance = Literal["euclidean", "cosine"] | float


def fpgm(view: GroupView, /) -> torch.Tensor:
    """``s_j = sum_k ||F_j - F_k||_2``, ``[C]``: the sum of the distances of filter ``j`` to all others (He et al.,
    equation 4). The smallest lies nearest to the geometric median, and is what the others can replace best."""
    return euclidean_sums(weights(view))


def fpgm_l1(view: GroupView, /) -> torch.Tensor:
    """``s_j = sum_k ||F_j - F_k||_1``, ``[C]``: FPGM with sums of absolute differences (He et al., section 4.4)."""
    return absolute_sums(weights(view))


def fpgm_cosine(view: GroupView, /) -> torch.Tensor:
    """``s_j = sum_k (1 - cos(F_j, F_k))``, ``[C]``: FPGM with cosine distances (He et al., section 4.4). The smallest,
    which is most like the others, goes first. See ``fpgm_with`` for filters of zeros."""
    return cosine_sums(weights(view))


def whc(view: GroupView, /) -> torch.Tensor:
    """``s_j = ||F_j|| sum_k ||F_k|| (1 - |cos(F_j, F_k)|)``, ``[C]``: large are filters that are long and unlike all
    others that are long (Chen et al.). A filter of zeros scores 0."""
    return hybrid_sums(weights(view))


def fpgm_with(*, distance: Distance = "euclidean") -> Criterion:
    """FPGM with another distance: a criterion whose scores ``[C]`` are the sums of the distances of a filter to all
    others. The smallest goes first, whatever the distance.

    ``distance``: ``"euclidean"``; a number ``p`` of 1 or more, infinity included, for Minkowski's ``||F_j - F_k||_p``
    (2 is Euclid's); or ``"cosine"``, ``1 - cos(F_j, F_k)``, which does not see lengths. A filter of zeros has no
    direction, and nothing is lost with it: it is at cosine distance 0 from everything, so that it goes first and does
    not count for the others. Other ``p`` than 1, 2 and infinity take time: about ``C^2 f / 2`` powers.

    Raises ``BadRequest`` for a distance that is none of these.
    """
    sums = _sums_of(distance)

    def criterion(view: GroupView, /) -> torch.Tensor:
        return sums(weights(view))

    criterion.__name__ = f"fpgm_with(distance={distance!r})"
    criterion.__dict__.update(reads=("filters",))
    return criterion


def _sums_of(distance: object) -> Callable[[torch.Tensor], torch.Tensor]:
    if not isinstance(distance, bool) and isinstance(distance, Real) and float(distance) >= 1:
        p = float(distance)
        known = {1.0: absolute_sums, 2.0: euclidean_sums}
        return known.get(p) or (lambda filters: minkowski_sums(filters, p))
    if distance == "euclidean":
        return euclidean_sums
    if distance == "cosine":
        return cosine_sums
    raise BadRequest(
        f"distance={distance!r} is no distance between filters\n"
        "  do: take 'euclidean', 'cosine' or Minkowski's p, a number of 1 or more (below 1 it is no distance)"
    )
