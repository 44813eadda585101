"""Which channels go, where that depends on what went before: greedy selection, front to back.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.3, figure 3. There

    s_j = sum over the input channels c that are still there of ||W[j, c]||_1,

for the filters ``j`` of one layer after the other; *independent* selection sums over all input channels.

What that means to other criteria: whoever looks at filters (norms, distances between filters) is shown them without
the input slices that are gone. Who looks at the outputs of the next layers is shown those of a network in which they
are gone (``sequential.py``). Who looks at activations or gradients beside them is shown those of the dense network. To
who looks at nothing but those, at norm weights only, or at nothing (``random``), greedy means nothing, and ``plan``
refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from secateur.allocation import highest
from secateur.core import Criterion, Group
from secateur.criteria import reads
from secateur.groups import Coupling
from secateur.layer_weights import as_read
from secateur.scores import score

Tensors = dict[str, torch.Tensor]
Measure = Callable[[str, Mapping[str, tuple[int, ...]]], Mapping[str, Any]]
"""What data show of the group of that name, by field, where all groups keep so much."""


def front_to_back(
    coupling: Coupling,
    judged: Mapping[str, Group],
    widths: Mapping[str, int],
    criterion: str | Criterion,
    *,
    seed: int = 0,
    evidence: Mapping[str, Mapping[str, Any]] | None = None,
    measure: Measure | None = None,
) -> dict[str, tuple[int, ...]]:
    """The sorted indices of the ``widths[name]`` channels that each group keeps, chosen greedily.

    The groups take their turns in the order in which the forward pass first writes them. Each is scored with the input
    slices of what went before left out: they are zero in a copy of the weights, wherever the channels lie (behind a
    concatenation, a flattening, in every partition of a grouped convolution). A group that is written in several places
    has its turn at the first of them; what is removed between that and the last counts in full.

    ``judged``: the group as the criterion sees it, by name, for all groups that get narrower. ``evidence``: as for
    ``score``; statistics of activations are those of the dense network, but for what ``measure`` finds when a group has
    its turn. Each group is scored once, so that this costs no more than independent selection, but for the copies of
    weights and for measuring.
    """
    read, tensors = as_read(coupling, [*judged.values(), *coupling.groups], reads(criterion))
    seen = {group.name: group for group in read[: len(judged)]}
    groups = {group.name: group for group in read[len(judged) :]}
    copied: set[str] = set()
    keep = {name: tuple(range(group.channels)) for name, group in groups.items()}
    for name in forward_order(coupling):
        width = widths.get(name, groups[name].channels)
        if width < groups[name].channels:
            known = evidence
            if measure is not None:
                known = {name: {**(evidence or {}).get(name, {}), **measure(name, keep)}}
            found = score([seen[name]], tensors, criterion, n_keep={name: width}, seed=seed, evidence=known)
            keep[name] = highest(found[name], width)
            _leave_out(groups[name], keep[name], tensors, copied)
    return keep


def _leave_out(group: Group, kept: tuple[int, ...], tensors: Tensors, copied: set[str]) -> None:
    """Put copies into ``tensors`` in which the slices that read the removed channels are zero."""
    gone = np.ones(group.channels, dtype=bool)
    gone[list(kept)] = False
    for part in group.slices:
        if part.role == "reads":
            if part.tensor not in copied:
                tensors[part.tensor] = tensors[part.tensor].detach().clone()
                copied.add(part.tensor)
            at = torch.from_numpy(part.positions[gone].ravel()).to(tensors[part.tensor].device)
            tensors[part.tensor].index_fill_(part.axis, at, 0)


def forward_order(coupling: Coupling) -> list[str]:
    """The names of the free groups, in the order in which the forward pass first uses a tensor that writes them.

    The groups themselves stand in the order in which the modules were registered, which need not be the same.
    """
    capture = coupling.graph.captures[0]
    first: dict[str, int] = {}
    for position, node in enumerate(capture.graph.nodes):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) in capture.names:
                first.setdefault(capture.names[str(source.target)], position)
    never = len(capture.graph.nodes)

    def begins(number: int) -> tuple[int, int]:
        slices = coupling.groups[number].slices
        writers = [s for s in slices if s.role == "writes"] or list(slices)
        return min(first.get(s.tensor, never) for s in writers), number

    return [coupling.groups[number].name for number in sorted(range(len(coupling.groups)), key=begins)]
