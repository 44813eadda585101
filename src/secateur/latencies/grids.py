"""At which widths the layers of a network are timed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from secateur.latencies.geometries import Placed
from secateur.latencies.timers import Sized

LEVELS = (1.0, 0.75, 0.5, 0.25, 0.125)
"""The fractions of a dense width at which layers are timed."""


def grid(layer: Placed, steps: Mapping[str, int]) -> list[Sized]:
    """The widths at which a layer is timed, the widest first: its dense ones and fractions of them, in multiples of its
    family's step (``steps``). A side that no group changes stays as it is, and both sides of a depthwise convolution go
    together."""
    geometry = layer.geometry
    step = steps.get(geometry.family, 1)
    into, out = (
        levels(side, math.lcm(step, max(geometry.groups, 1))) if dim[1] else [side]
        for side, dim in zip(geometry.channels, (layer.into, layer.out), strict=True)
    )
    if geometry.depthwise:
        return [(geometry, i, i * geometry.multiplier) for i in into]
    return [(geometry, i, o) for i in into for o in out]


def levels(channels: int, step: int) -> list[int]:
    """The fractions of a width, each the next multiple of ``step``, from the dense one on."""
    return sorted({min(channels, math.ceil(level * channels / step) * step) for level in LEVELS}, reverse=True)


def point_text(into: int, out: int) -> str:
    """What the widths of a layer are called in a file."""
    return f"{into}x{out}"
