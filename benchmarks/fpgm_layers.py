"""What weights alone say of each convolution of a network: which filters each criterion would remove, how much two of
these choices have in common, and how the norms of the filters are distributed.

The norm criterion rests on two conditions (He et al., CVPR 2019, section 1): norms differ widely, and the smallest is
close to 0. Letters: ``N`` filters of a convolution, ``f`` weights of each.
"""

from __future__ import annotations

import copy
import math
from statistics import fmean

import torch
from torch import nn

import secateur as sc

RATIO = 0.4
"""Of the filters, as in the paper's tables."""
CENTRED = "centred l2"
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def convolutions(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every convolution by name, in the network's order: its filters ``[N, f]``, float64."""
    return {
        name: module.weight.detach().flatten(1).double().cpu()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def removed(filters: torch.Tensor, criterion: str) -> frozenset[int]:
    """The ``floor(N * RATIO)`` filters of least score: ``filters [N, f]`` as a layer of their own. ``CENTRED`` is the
    L2 norm of what is left of a filter when the mean of all is taken away."""
    if criterion == CENTRED:
        filters, criterion = filters - filters.mean(0), "l2"
    empty = torch.empty(len(filters), 0)
    scores = sc.CRITERIA[criterion](sc.GroupView(name="layer", filters=filters, readers=empty, scales=empty))
    count = math.floor(len(filters) * RATIO + 1e-9)
    return frozenset(scores.argsort(stable=True)[:count].tolist())


def overlaps(model: nn.Module, one: str, other: str) -> dict[str, float]:
    """For each convolution the share of what ``one`` removes that ``other`` removes too; by chance it is ``RATIO``."""
    found = {}
    for name, filters in convolutions(model).items():
        first, second = removed(filters, one), removed(filters, other)
        found[name] = len(first & second) / len(first)
    return found


def again(model: nn.Module, criterion: str) -> dict[str, float]:
    """For each convolution the share of what the criterion removes that it chooses again once that is zero."""
    found = {}
    for name, filters in convolutions(model).items():
        first, zeroed = removed(filters, criterion), filters.clone()
        zeroed[sorted(first)] = 0.0
        found[name] = len(first & removed(zeroed, criterion)) / len(first)
    return found


def norms(model: nn.Module) -> dict[str, float]:
    """``{layer:figure}`` of the L2 norms of each convolution's filters.

    ``spread``: standard deviation over mean; ``smallest``: the least over the largest; ``held``: the share of all
    squared norms that the ``RATIO`` of least norm hold; ``centre``: the norm of the mean filter over the root mean
    square norm, 1 where all filters are equal; ``q0`` ... ``q100``: quantiles over the largest norm; ``filters``: how
    many; ``weights``: of each; ``kind``: see there.
    """
    found: dict[str, float] = {}
    for name, filters in convolutions(model).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        sizes = torch.linalg.vector_norm(filters, dim=1)
        squares = sizes.square().sort().values
        few = math.floor(len(sizes) * RATIO + 1e-9)
        figures = {
            "spread": float(sizes.std(correction=0) / sizes.mean()),
            "smallest": float(sizes.min() / sizes.max()),
            "held": float(squares[:few].sum() / squares.sum()),
            "centre": float(filters.mean(0).norm() / squares.mean().sqrt()),
            **{f"q{100 * q:.0f}": float(sizes.quantile(q) / sizes.max()) for q in QUANTILES},
            "filters": float(filters.shape[0]),
            "weights": float(filters.shape[1]),
            "kind": float(kind(layer)),
        }
        found |= {f"{name}:{key}": round(value, 6) for key, value in figures.items()}
    return found


def regrowth(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, rate: float) -> dict[str, float]:
    """What the first step after zeroing does to the filters that FPGM zeroes, in all convolutions at once: ``moving``,
    the share of them that any gradient reaches; of these ``gradient``, the median of its norm over that of the filters
    that stay, and ``step``, the median of ``rate`` times it over the norm of those; means over the layers that have
    any. Behind a batch norm a filter of zeros has a variance of 0, and its gradient is divided by the square root of
    the norm's ``eps`` where that of others is divided by their deviation."""
    model = copy.deepcopy(model).train()
    gone = {name: sorted(removed(filters, "fpgm")) for name, filters in convolutions(model).items()}
    with torch.no_grad():
        for name, at in gone.items():
            model.get_parameter(f"{name}.weight")[at] = 0.0
    nn.functional.cross_entropy(model(inputs), targets).backward()
    found: dict[str, list[float]] = {"gradient": [], "step": []}
    moving = 0
    for name, at in gone.items():
        weight = model.get_parameter(f"{name}.weight")
        assert weight.grad is not None
        sizes, lengths = weight.detach().flatten(1).norm(dim=1), weight.grad.flatten(1).norm(dim=1)
        stay = [i for i in range(len(sizes)) if i not in at]
        awake = [i for i in at if lengths[i] > 0]
        moving += len(awake)
        if awake:
            found["gradient"].append(float(lengths[awake].median() / lengths[stay].median()))
            found["step"].append(rate * float(lengths[awake].median() / sizes[stay].median()))
    return {"moving": moving / sum(map(len, gone.values())), **{key: fmean(own) for key, own in found.items()}}


def kind(layer: nn.Conv2d) -> int:
    """1: depthwise, every filter sees a channel of its own; 2: 1 x 1, with fewer channels out than in (what ends an
    inverted bottleneck, without an activation behind it); 0: all others."""
    if layer.groups == layer.out_channels > 1:
        return 1
    return 2 if max(layer.kernel_size) == 1 and layer.out_channels < layer.in_channels else 0
