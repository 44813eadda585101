"""Gradients: what the loss would do without a filter, to first order.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).
"""

from __future__ import annotations

import torch

from secateur.core import GroupView
from secateur.errors import BadRequest


def taylor(view: GroupView, /) -> torch.Tensor:
    """``s_j = 1/B sum_b (sum_w g_bw w)^2``, ``[C]``: the squared first-order change of the loss of batch ``b`` when all
    weights ``w`` of filter ``j`` become 0, ``g`` the gradient there, averaged over ``B`` batches (Molchanov et al.)."""
    if view.products is None:
        raise BadRequest(
            f"the view of group {view.name!r} has no products of weights and gradients: nothing was measured on data\n"
            "  do: pass data= and loss= to plan, or evidence= from collect"
        )
    return view.products
