"""What a sensitivity analysis found, as plain data: how the network does when one group alone is pruned, by ratio.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.2 and figure 2. There a layer is
pruned alone; here a coupled group is, since no layer of it can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from secateur.plans import compare_shapes, fingerprint, transient


@dataclass(frozen=True)
class GroupCurve:
    """One group. ``R`` ratios.

    ``stage``: the size of the maps that its first writer makes (``"32x32"``; ``"1"`` where there is no map), by which
    the paper puts layers together. ``keep [R]``: how many channels are left at each ratio. ``scores [R]``: what
    ``evaluate`` gives there, nothing retrained; ``retrained [R]``: after a short training, empty where there was none.
    ``importance [channels]``: the criterion's scores from the largest, over the largest (figure 2a); scores that may be
    negative are first lifted to start at 0.
    """

    group: str
    channels: int
    stage: str
    keep: tuple[int, ...]
    scores: tuple[float, ...]
    retrained: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """All groups of one dense network. ``model``: its fingerprint; ``dense``: its own score.

    ``ratios [R]``: fractions removed, ascending. ``made_by``: criterion and settings, JSON values for people to read.
    """

    model: Mapping[str, tuple[int, ...]]
    criterion: str
    ratios: tuple[float, ...]
    dense: float
    curves: tuple[GroupCurve, ...]
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it as readable, versioned JSON. ``Sensitivity.from_json`` gives an equal one back."""
        from secateur.sensitivities.curve_schema import encode

        return encode(self)

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """The sensitivity in ``text``; ``BadArtifact`` for anything but what ``to_json`` could have written, and for a
        sweep that was cut short."""
        from secateur.sensitivities.curve_schema import decode, refuse_unfinished

        found = decode(text)
        refuse_unfinished(found)
        return found

    def check(self, model: nn.Module) -> None:
        """Raises ``WrongModel``, naming the first tensor that differs, unless this was found on a network like
        ``model``. Weights are not compared."""
        caches = transient(model)
        wanted = {name: shape for name, shape in self.model.items() if name not in caches}
        offered = {name: shape for name, shape in fingerprint(model).items() if name not in caches}
        compare_shapes(wanted, offered, ("the network that the sensitivity was found on", "this model"))
