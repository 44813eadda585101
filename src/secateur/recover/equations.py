"""Normal equations of least squares, solved so that what the data do not show stays as it is.

Shapes: ``G`` independent systems of ``P`` unknowns, for ``O`` right-hand sides each.
"""

from __future__ import annotations

import torch


def least_change(a: torch.Tensor, b: torch.Tensor, ridge: float) -> torch.Tensor:
    """``[G, O, P]``: ``b (a + l I)^-1`` for ``a [G, P, P]``, symmetric and positive semi-definite, and ``b [G, O, P]``,
    ``l`` being ``ridge`` times the mean of the diagonal of ``a``.

    Directions whose eigenvalue is that of rounding (``P`` epsilons of the largest), as equal or dead channels and too
    few samples leave them without a ridge, get no part of the solution: of all that are as good it is the smallest.
    Never NaN for finite ``a`` and ``b``.
    """
    size = a.shape[-1]
    level = ridge * a.diagonal(dim1=1, dim2=2).clamp_min(0).mean(1)
    a = (a + a.mT) / 2 + level[:, None, None] * torch.eye(size, device=a.device, dtype=a.dtype)
    factor, info = torch.linalg.cholesky_ex(a)
    rounding = size * torch.finfo(a.dtype).eps
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    # rounding may leave a tiny pivot where there should be none, and the factor then says nothing
    if not bool(info.any()) and bool((pivots.amin(1) > rounding * a.diagonal(dim1=1, dim2=2).amax(1)).all()):
        return torch.cholesky_solve(b.mT, factor).mT
    values, vectors = torch.linalg.eigh(a)
    inverse = torch.where(values > values[:, -1:].clamp_min(0) * rounding, 1 / values, 0.0)
    return ((b @ vectors) * inverse[:, None, :]) @ vectors.mT
