"""What comes through each channel of a group into the layers that read it, added up while a walk passes them: over all
outputs (``outputs``), or over some that are drawn (``samples``).

The drawn ones are ThiNet's (Luo et al. 2017, section 3.2, and the code published with it): for every image so many
pairs of a filter and a location of its output, uniform, with replacement. An image is a slice of what is read along the
axis that counts examples, wherever that lies; of a sequence, locations are drawn like those of a map. Draws depend on
the seed, the reader, the process and the image's number in it, not on how the data are cut into batches.

Letters: ``C`` channels of a group, ``U`` its readers.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from secateur.consumers import Affine, Consumer, consumers_of, value_read
from secateur.core import Group, OutputMoments
from secateur.errors import BadRequest, CannotPrune, SecateurWarning
from secateur.grams import Sums, add_draws_, add_moments_, finish_, packed, places_of
from secateur.groups import Coupling
from secateur.interpreter import Env
from secateur.patches import matrix, outputs
from secateur.processes import rank
from secateur.taps import examples_axis

HELD = 2**28
"""Bytes of inputs that all readers together hold back until there are enough of them to be added up at once."""
Key = tuple[str, str]
"""A group's name and a kind, ``outputs`` or ``samples``."""


@dataclass(eq=False)
class Reading:
    """All that is added up in front of one call: sums for every group that it reads, exact ones and drawn ones.

    ``samples``: the axis of what it reads that counts images, ``None`` if none does; ``images``: how many it has seen.
    ``identity``: what its draws are seeded by, beside the image's number.
    """

    call: Affine
    samples: int | None
    identity: tuple[int, ...]
    locations: int
    whole: list[tuple[Consumer, Sums]] = field(default_factory=list)
    drawn: list[tuple[Consumer, Sums]] = field(default_factory=list)
    images: int = 0

    @property
    def stop(self) -> fx.Node:
        return self.call.node

    def add_(self, env: Env) -> None:
        """The outputs of one batch."""
        x, weight = value_read(self.call, env)
        layout = self.call.layout
        energy: torch.Tensor | None = None
        for consumer, sums in self.whole:
            if not consumer.whole and energy is None:
                energy = outputs(x, matrix(weight, layout), layout).to(sums.gram.dtype).square().sum()
            add_moments_(sums, x, weight, layout, energy=None if consumer.whole else energy)
        if self.drawn:
            draws = self.draw(x, weight)
            for _, sums in self.drawn:
                add_draws_(sums, x, weight, layout, draws=draws)

    def draw(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Filter, and row in ``patches.outputs``, of every draw from a batch; to be called once for each."""
        places = places_of(x, self.call.layout, self.samples)
        filters = math.prod(matrix(weight, self.call.layout).shape[:2])
        pairs = [
            np.random.default_rng((*self.identity, number)).integers(0, (filters, places.shape[1]), (self.locations, 2))
            for number in range(self.images, self.images + len(places))
        ]
        self.images += len(places)
        drawn = torch.from_numpy(np.stack(pairs)).to(x.device)
        return drawn[..., 0].flatten(), places.gather(1, drawn[..., 1]).flatten()


@dataclass(eq=False)
class Contributions:
    """The readings of several groups: ``at`` their stops, and by group and kind, in graph order."""

    readings: list[Reading]
    consumers: dict[Key, list[Consumer]]
    sums: dict[Key, list[Sums]]

    @staticmethod
    def of(
        coupling: Coupling,
        groups: Sequence[Group],
        kinds: Collection[str],
        device: torch.device,
        *,
        locations: int = 10,
        seed: int = 0,
    ) -> Contributions:
        """Empty sums for the affine readers of ``groups``.

        Raises ``CannotPrune`` for a group that has none; warns (``SecateurWarning``) of others that are left out.
        """
        found = Contributions([], {}, {})
        by_call: dict[fx.Node, Reading] = {}
        calls: dict[str, int] = {}
        left_out: dict[str, dict[str, str]] = {}
        groups = groups if kinds else ()
        own_readers = readers(coupling, groups)
        for group in groups:
            consumers, others = own_readers[group.name]
            if others:
                left_out[group.name] = others
            for consumer in consumers:
                if consumer.call.node not in by_call:
                    number = calls[consumer.name] = calls.get(consumer.name, -1) + 1
                    identity = (seed, rank(), zlib.crc32(consumer.name.encode()), number)
                    call = consumer.call
                    samples = examples_axis(coupling.graph.captures[0], call.source, call.layout.channels_axis)
                    by_call[call.node] = Reading(call, samples, identity, locations)
                reading = by_call[consumer.call.node]
                for kind, into in (("outputs", reading.whole), ("samples", reading.drawn)):
                    if kind in kinds:
                        own = Sums.of(consumer.columns, consumer.channels, group.channels, device)
                        into.append((consumer, own))
                        found.consumers.setdefault((group.name, kind), []).append(consumer)
                        found.sums.setdefault((group.name, kind), []).append(own)
        found.readings.extend(by_call.values())
        every = [sums for own in found.sums.values() for sums in own]
        for sums in every:
            sums.hold = min(sums.hold, HELD // len(every))
        _warn_of_others(left_out)
        return found

    def moments(self) -> dict[Key, OutputMoments]:
        """What was added up, by all processes. Raises ``BadRequest`` where it is not finite; warns
        (``SecateurWarning``) where there are fewer samples than channels."""
        finish_([one for own in self.sums.values() for one in own])
        result: dict[Key, OutputMoments] = {}
        for key, sums in self.sums.items():
            result[key] = packed([c.name for c in self.consumers[key]], sums)
            bad = int((~torch.isfinite(result[key].gram)).any(2).any(0).sum())
            if bad or not bool(torch.isfinite(result[key].energy).all()):
                raise BadRequest(
                    f"the outputs of the layers that read group {key[0]!r} are not finite (NaN or infinite) on the "
                    f"calibration data, in {bad} of {result[key].gram.shape[1]} channels\n"
                    "  do: check the data and the network's weights"
                )
        _warn_of_few(result)
        return result


def readers(coupling: Coupling, groups: Sequence[Group]) -> dict[str, tuple[list[Consumer], dict[str, str]]]:
    """``consumers_of`` each group, by its name. Raises ``CannotPrune``, which names all the groups that no call reads
    whose outputs could be compared."""
    found = {group.name: consumers_of(coupling, group) for group in groups}
    without = {name: others for name, (consumers, others) in found.items() if not consumers}
    if without:
        reasons = {name: "; ".join(f"{call}: {why}" for call, why in own.items()) for name, own in without.items()}
        shown = [f"group {name!r} ({why or 'nothing reads it'})" for name, why in reasons.items()]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        raise CannotPrune(
            f"no convolution or linear layer whose outputs could be compared reads {', '.join(shown[:5])}{more}\n"
            f"  do: leave them whole, exclude={[*without]!r}, or use a criterion that looks at weights, such as 'l1'"
        )
    return found


def _warn_of_others(left_out: Mapping[str, Mapping[str, str]]) -> None:
    if not left_out:
        return
    shown = [f"{group!r}: {name} ({why})" for group, own in left_out.items() for name, why in own.items()]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    warnings.warn(
        f"some readers of {len(left_out)} groups are not affine in what they read, and their outputs do not count: "
        f"{'; '.join(shown[:5])}{more}",
        SecateurWarning,
        stacklevel=5,
    )


def _warn_of_few(found: Mapping[Key, OutputMoments]) -> None:
    few = [
        f"{name!r} ({int(own.samples.sum())} samples, {own.gram.shape[1]} channels)"
        for (name, _), own in found.items()
        if float(own.samples.sum()) < own.gram.shape[1]
    ]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        warnings.warn(
            f"there are fewer samples than channels to tell apart in {', '.join(few[:5])}{more}: which of them stay is "
            "in part left to chance\n  do: pass more calibration images, or draw more locations of each",
            SecateurWarning,
            stacklevel=5,
        )
