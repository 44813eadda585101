"""Norms of filters: a filter of small weights gives a weak feature map.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.1 (L1) and 4.4 (L2 makes no
noticeable difference).

A group whose channels no weight writes (a layer scale on the network's input, say) is scored by what reads it, and if
nothing reads it, by what scales it: the first of filters, readers, scales that has columns.
"""

from __future__ import annotations

import torch

from secateur.core import GroupView
from secateur.errors import CannotPrune


def l1(view: GroupView, /) -> torch.Tensor:
    """``s_j = sum |W_j|``, ``[C]``: the sum of the absolute weights of filter ``j`` (Li et al., section 3.1)."""
    return torch.linalg.vector_norm(weights(view), ord=1, dim=1, dtype=torch.float64)


def l2(view: GroupView, /) -> torch.Tensor:
    """``s_j = sqrt(sum W_j^2)``, ``[C]``: the Euclidean norm of filter ``j`` (Li et al., section 4.4)."""
    return torch.linalg.vector_norm(weights(view), ord=2, dim=1, dtype=torch.float64)


def weights(view: GroupView) -> torch.Tensor:
    """``[C, f]``: the filters, else the readers, else the scales. Raises ``CannotPrune`` where there are none."""
    for matrix in (view.filters, view.readers, view.scales):
        if matrix.shape[1]:
            return matrix
    raise CannotPrune(
        f"group {view.name!r} has no weights to take a norm of: nothing writes, reads or scales its channels\n"
        "  do: exclude it, or score it with 'random' or a criterion of your own"
    )
