"""Pairs of filters that are nearly the same: one of them is enough.

After "Network Compression Based on Filter Similarity Pruning for Fast Inference on Edge Devices", a method related to
FPGM: Euclidean distances between all filters of a layer, and one of a close pair is dropped. Which of the pair is left
open there; here it is the one of the smaller norm.

Letters: ``C`` channels, ``f`` weights of a filter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from secateur.core import GroupView
from secateur.criteria.norms import weights
from secateur.criteria.sums import kinds_of, squared_distances


def similarity(view: GroupView, /) -> torch.Tensor:
    """Scores ``[C]``: of the two filters that are closest to each other among all that are left, the one of the smaller
    L2 norm goes (of equal norms the higher index), until one is left. A filter's score is the distance at which it
    goes; the last one's is that at which it lost its last neighbour.

    These distances never fall along the order. Where one equals that before it and neither is 0, the score is the next
    larger number, so that any number that is kept is what the search keeps; equal filters all score 0 but one. All
    distances are held, ``8 C^2`` bytes.
    """
    filters = weights(view)
    scores = np.zeros(len(filters))
    last = 0.0
    for channel, distance in closest_first(filters):
        last = distance if distance > last or not last else float(np.nextafter(last, np.inf))
        scores[channel] = last
    return torch.from_numpy(scores)


def closest_first(filters: torch.Tensor) -> Iterator[tuple[int, float]]:
    """The channels of ``filters [C, f]`` in the order in which they go, with their distances to the nearest that is
    left then; at last the one that stays, with the distance of the one before it (0 if there is none)."""
    apart = _distances(filters)
    norms = torch.linalg.vector_norm(filters, dim=1, dtype=torch.float64).numpy()
    nearest, gaps = apart.argmin(1), apart.min(1)
    there = np.ones(len(apart), dtype=bool)
    distance = 0.0
    for _ in range(len(apart) - 1):
        one = int(gaps.argmin())
        other, distance = int(nearest[one]), float(gaps[one])
        goes = max((one, other), key=lambda c: (-norms[c], c))
        yield goes, distance
        there[goes], gaps[goes] = False, np.inf
        apart[:, goes] = np.inf
        lonely = np.flatnonzero((nearest == goes) & there)
        nearest[lonely], gaps[lonely] = apart[lonely].argmin(1), apart[lonely].min(1)
    yield int(there.argmax()), distance


def _distances(filters: torch.Tensor) -> np.ndarray:
    """``[C, C]``, the diagonal infinite."""
    differing, _, of = kinds_of(filters.to(torch.float64))
    apart = torch.empty(len(differing), len(differing), dtype=torch.float64)
    for first, values in squared_distances(differing):
        rows = slice(first, first + len(values))
        apart[rows, first:] = values.sqrt_()
        apart[rows.stop :, rows] = values[:, len(values) :].mT
    if len(differing) < len(filters):
        apart = apart[of][:, of]
    return apart.fill_diagonal_(torch.inf).numpy()
