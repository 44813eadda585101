"""Which widths an engine is fast at: multiples of what its kernels work on at once.

A kernel that computes eight channels at a time takes as long for 57 as for 64. What it works on differs from engine to
engine and from kernel to kernel, so it is measured, for each family of convolutions: at a width of 64 (or 32) channels,
both in and out, 1, 2, 4, 8 and 16 channels are taken away. What 16 channels save is shared out by the MACs; the step is
the largest power of two ``s`` of which half a step less saves less than half of its share: widths in between are not
worth having. Linear layers wait for their weights, and have no stairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from secateur.core import Group
from secateur.latencies.geometries import Geometry, Placed
from secateur.latencies.timers import Sized

LESS = (0, 1, 2, 4, 8, 16)
"""So many channels are taken away."""
BASES = (64, 32)
WORTH = 0.5
"""Half a step must save at least this part of its share."""
TELLING = 0.2
"""The widest stair must save at least this part of its MACs' share, or the layer's time is mostly something else."""


def stairs(geometry: Geometry) -> list[Sized]:
    """The widths of a layer that are timed to find its family's step; none for a layer that is too narrow to tell.

    A side that is narrower than the base keeps its dense width, as the three colours of an image do.
    """
    into, out = geometry.channels
    base: int | None = next((base for base in BASES if max(into, out) >= base), None)
    if base is None or geometry.kind == "linear" or geometry.groups > 1 or geometry.multiplier > 1:
        return []
    if geometry.depthwise:
        return [(geometry, base - less, base - less) for less in LESS]
    return [(geometry, base - less if into >= base else into, base - less if out >= base else out) for less in LESS]


def steps_of(times: Mapping[Sized, float]) -> dict[str, int]:
    """The step of every family of layers whose stairs are among ``times``, in milliseconds; 1 where any width will do,
    and where 16 channels save so little that nothing can be told.

    The layers of a family are added up, so that a time that was disturbed counts little.
    """
    saved: dict[str, np.ndarray] = {}
    shares: dict[str, np.ndarray] = {}
    for geometry in dict.fromkeys(geometry for geometry, _, _ in times):
        ladder = stairs(geometry)
        if not ladder or any(sized not in times for sized in ladder):
            continue
        family, full = geometry.family, times[ladder[0]]
        less = np.array([full - times[sized] for sized in ladder])
        share = np.array([full * (1 - _macs(sized) / _macs(ladder[0])) for sized in ladder])
        saved[family] = saved.get(family, 0) + less
        shares[family] = shares.get(family, 0) + share
    return {family: _step(saved[family], shares[family]) for family in saved}


def group_steps(layers: Sequence[Placed], steps: Mapping[str, int], groups: Sequence[Group]) -> list[int]:
    """For each group the step of its widths in filters of the layer that writes it, ``[G]``: the largest of the layers
    that write or read it, but never more than half of the filters, so that a narrow group can still be pruned."""
    found = [1] * len(groups)
    for layer in layers:
        step = steps.get(layer.geometry.family, 1)
        for _, uses in (layer.into, layer.out):
            for group in uses:
                found[group] = max(found[group], step)
    filters = [group.channels * group.partitions for group in groups]
    return [min(step, 2 ** int(math.log2(max(n // 2, 1)))) for step, n in zip(found, filters, strict=True)]


def _step(saved: np.ndarray, shares: np.ndarray) -> int:
    """From what is saved, and what the MACs' share is, at every entry of ``LESS``."""
    if saved[-1] <= TELLING * shares[-1]:
        return 1
    fair = shares * saved[-1] / shares[-1]
    return max(
        [2 * less for less, own, due in zip(LESS, saved, fair, strict=True) if less and own < WORTH * due] or [1]
    )


def _macs(sized: Sized) -> float:
    geometry, into, out = sized
    return float(out) if geometry.depthwise else float(into * out)
