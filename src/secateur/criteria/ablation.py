"""Controls: what a criterion has to beat.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 4.4: smallest filters against random
and against largest ones.
"""

from __future__ import annotations

import zlib

import torch

from secateur.core import GroupView
from secateur.criteria.norms import l1


def random(view: GroupView, /) -> torch.Tensor:
    """``s_j ~ U(0, 1)``, ``[C]``: reproducible, the stream depends on ``view.seed`` and ``view.name`` alone."""
    # A checksum and not hash(), which changes from run to run; of both, since the generator reads only 32 bits.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{view.seed} {view.name}".encode()))
    return torch.rand(view.filters.shape[0], generator=generator, dtype=torch.float64)


def largest(view: GroupView, /) -> torch.Tensor:
    """``s_j = -sum |W_j|``, ``[C]``: removes the largest filters first (Li et al., section 4.4)."""
    return -l1(view)
