"""Scales: the factor that a norm puts on a channel says how much of it goes on.

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017).
"""

from __future__ import annotations

import torch

from secateur.core import GroupView
from secateur.errors import CannotPrune


def bn_scale(view: GroupView, /) -> torch.Tensor:
    """``s_j = mean |gamma_j|``, ``[C]``: the magnitude of the batch norm's scale of channel ``j`` (Liu et al.), the
    mean over all norms and layer scales that the group's channels go through. Meant for networks that were trained with
    a penalty on these scales.

    Raises ``CannotPrune`` for a group that no scale belongs to.
    """
    if not view.scales.shape[1]:
        raise CannotPrune(
            f"group {view.name!r} has no scales: no norm or layer scale with weights stands on its channels\n"
            "  do: exclude it, or use a criterion that looks at filters, such as 'l1'"
        )
    return view.scales.to(torch.float64).abs().mean(1)
