"""Statistics of feature maps: a filter whose maps say little matters little.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 4.5 (statistics of the maps right after
the convolution, before batch norm and activation, over the training images), and Hu et al., "Network Trimming"
(arXiv 1607.03250, 2016), for the zeros behind the activation.

Letters: ``N`` samples, ``M`` maps of a channel (one for every filter it stands for), ``x`` one map of ``h x w``. Each
formula is for one map; a channel of several gets the mean over them.
"""

from __future__ import annotations

import torch

from secateur.core import GroupView, MapStatistics
from secateur.errors import BadRequest


def mean_mean(view: GroupView, /) -> torch.Tensor:
    """``s_j = 1/N sum_n mean(x_jn)``, ``[C]``: how high the map stands on average (Li et al., section 4.5)."""
    return _maps(view).mean.mean(1)


def mean_std(view: GroupView, /) -> torch.Tensor:
    """``s_j = 1/N sum_n std(x_jn)``, ``[C]``: how much a map varies over its positions (Li et al., section 4.5).

    The standard deviation is that of the ``h w`` values themselves (divided by ``h w``): 0 for maps of one position.
    """
    return _maps(view).std.mean(1)


def mean_l1(view: GroupView, /) -> torch.Tensor:
    """``s_j = 1/N sum_n ||x_jn||_1``, ``[C]``: the mean L1 norm of the maps (Li et al., section 4.5)."""
    return _maps(view).l1.mean(1)


def mean_l2(view: GroupView, /) -> torch.Tensor:
    """``s_j = 1/N sum_n ||x_jn||_2``, ``[C]``: the mean Euclidean norm of the maps (Li et al., section 4.5)."""
    return _maps(view).l2.mean(1)


def var_l2(view: GroupView, /) -> torch.Tensor:
    """``s_j = var_n ||x_jn||_2``, ``[C]``: how much the norm of the map changes from one image to another, the
    "contribution variance" of Polyak and Wolf (2015) as Li et al. use it (section 4.5)."""
    found = _maps(view)
    return (found.l2_squared - found.l2**2).clamp_min(0).mean(1)


def apoz(view: GroupView, /) -> torch.Tensor:
    """``s_j = 1 - APoZ_j``, ``[C]``, ``APoZ_j`` the average percentage of zeros in the map behind its activation
    function, over all images and positions (Hu et al.). It tells nothing of a sigmoid or a SiLU, which have no
    zeros."""
    if view.activations is None:
        raise _unmeasured(view, "activations")
    return 1 - view.activations.zeros.mean(1)


def _maps(view: GroupView) -> MapStatistics:
    if view.maps is None:
        raise _unmeasured(view, "maps")
    return view.maps


def _unmeasured(view: GroupView, field: str) -> BadRequest:
    return BadRequest(
        f"the view of group {view.name!r} has no {field}: nothing was measured on data\n"
        "  do: pass data= to plan, or evidence= from collect"
    )
