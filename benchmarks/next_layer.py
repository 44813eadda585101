"""What the next layer's output loses when one group is pruned alone, in closed form from second moments.

For a layer ``y = W p + b`` that reads the group, ``p`` its input patches in the dense network, let ``T`` be the entries
of ``p`` that are removed and ``S`` those that stay. Three ways to make up for ``W_T p_T``, each fitted on calibration
images and judged by its error on held-out ones:

    none            nothing:                                                r = W_T p_T
    scale           an input channel's kernel slices times a scalar 1 + a:  r - sum_c a_c W_c p_c
    least-squares   all kept weights and an intercept:                      r - D p_S - d

Every error is quadratic in the moments ``M = sum [p, 1] [p, 1]^T``, which are taken once for all criteria and ratios:
``|A [p, 1]|^2`` sums up to ``tr(A M A^T)``. Fits are those of ``secateur.recover``. An
error is ``sqrt(|y - y'|^2 / |y|^2)``, both without bias; of several layers that read a group, the root of the mean of
the squares. All layers here have one partition.

Shapes: ``O`` outputs, ``I`` inputs, ``K`` kernel positions, ``P = I K``, position ``i K + k``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.consumers import Consumer, consumers_of
from secateur.groups import Coupling, freed
from secateur.interpreter import walk
from secateur.patches import matrix, patches
from secateur.recover.equations import least_change
from secateur.recover.reconstruction import Fit, solve
from secateur.statistics import Moments, batches, place_of

WAYS = ("none", "scale", "least-squares")


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a group: ``weight [O, P]``, ``channels [P]`` (of the group, -1: others), ``inputs [P]``, and
    the ``moments [P + 1, P + 1]`` of its patches on calibration and on held-out images."""

    name: str
    weight: Tensor
    channels: Tensor
    inputs: Tensor
    seen: Tensor
    held: Tensor


def readers_of(coupling: Coupling, seen: Iterable[Any], held: Iterable[Any]) -> dict[str, list[Reader]]:
    """The readers of every group, by its name, with their moments on both kinds of images."""
    free = freed(coupling)
    found = {group.name: consumers_of(free, group)[0] for group in free.groups}
    every = [consumer for own in found.values() for consumer in own]
    assert all(consumer.call.layout.groups == 1 for consumer in every)
    first, second = (_moments(free, every, data) for data in (seen, held))
    state, *_ = place_of(free.graph)
    values = _weights(free, every, state)
    readers: dict[str, list[Reader]] = {}
    for group in free.groups:
        for consumer in found[group.name]:
            _, outputs, inputs, kernel = values[consumer.call.node].shape
            channels = torch.full((inputs,), -1)
            channels[consumer.columns] = consumer.channels
            one = Reader(
                consumer.name,
                values[consumer.call.node].double().reshape(outputs, inputs * kernel),
                channels.repeat_interleave(kernel),
                torch.arange(inputs).repeat_interleave(kernel),
                first[_key(consumer)],
                second[_key(consumer)],
            )
            readers.setdefault(group.name, []).append(one)
    return readers


def _key(consumer: Consumer) -> tuple[fx.Node, Any]:
    """Layers that read the same in the same way share their moments."""
    return consumer.call.source, consumer.call.layout


def _weights(coupling: Coupling, every: Sequence[Consumer], state: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    """``[1, O, I, K]`` of every call."""
    names = coupling.graph.captures[0].names
    return {c.call.node: matrix(state[names[str(c.call.weight.target)]], c.call.layout) for c in every}


def _moments(coupling: Coupling, every: Sequence[Consumer], data: Iterable[Any]) -> dict[Any, Tensor]:
    """``{key: sum of [p, 1] [p, 1]^T}`` over all output positions of all images, float64."""
    state, device, dtype = place_of(coupling.graph)
    everything = torch.ones(len(coupling.group_of), dtype=torch.bool)
    at = {consumer.call.node: _key(consumer) for consumer in reversed(every)}
    sums: dict[Any, Tensor] = {}
    with torch.no_grad():
        for inputs in batches(data, coupling.graph, device, dtype):
            added = set()
            for node, env in walk(coupling, everything, state, inputs, 0, at):
                key = at[node]
                if key in added:
                    continue
                added.add(key)
                for p in patches(env[key[0]], key[1], torch.float64):
                    wide = torch.cat([p[0], p.new_ones(p.shape[1], 1)], 1)
                    sums[key] = sums.get(key, 0) + wide.mT @ wide
    return sums


# ------------------------------------------------------------------------------------------------------- the errors


def error(readers: Sequence[Reader], kept: Sequence[int], way: str, fit: Fit) -> float:
    """The held-out error of a group of which ``kept`` channels stay."""
    squares = [_lost(reader, kept, way, fit) / _energy(reader) for reader in readers]
    return float(torch.stack(squares).mean().clamp_min(0).sqrt())


def _energy(reader: Reader) -> Tensor:
    return ((reader.weight @ reader.held[:-1, :-1]) * reader.weight).sum()


def _lost(reader: Reader, kept: Sequence[int], way: str, fit: Fit) -> Tensor:
    stays = (reader.channels < 0) | torch.isin(reader.channels, torch.tensor(list(kept)))
    lack = torch.cat([torch.where(stays, 0.0, reader.weight), reader.weight.new_zeros(len(reader.weight), 1)], 1)
    if way == "scale":
        lack[:, :-1] -= reader.weight * _scalars(reader, stays, fit)
    elif way == "least-squares":
        change, constant = _refit(reader, stays, fit)
        lack[:, torch.nonzero(stays).flatten()] -= change
        lack[:, -1] -= constant
    return ((lack @ reader.held) * lack).sum()


def _scalars(reader: Reader, stays: Tensor, fit: Fit) -> Tensor:
    """``a [P]`` of the kept input channels, zero of the others: ``(G_SS + ridge mean(diag) I) a = G_ST 1``."""
    inputs = int(reader.inputs[-1]) + 1
    products = (reader.weight.mT @ reader.weight) * reader.seen[:-1, :-1]
    gram = products.reshape(inputs, -1, inputs, products.shape[0] // inputs).sum((1, 3))
    kept = torch.zeros(inputs, dtype=torch.bool)
    kept[reader.inputs[stays]] = True
    own = gram[kept][:, kept]
    goal = gram[kept][:, ~kept].sum(1)
    scalars = torch.zeros(inputs, dtype=torch.float64)
    scalars[kept] = least_change(own[None], goal[None, None], fit.ridge)[0, 0]
    return scalars[reader.inputs]


def _refit(reader: Reader, stays: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    """``D [O, S]`` and ``d [O]``."""
    lacks = reader.weight[:, ~stays]
    rest = reader.seen[:-1, -1]
    sums = Moments(
        reader.seen[-1, -1],
        (lacks @ rest[~stays])[None],
        (lacks @ reader.seen[:-1, :-1][~stays][:, stays])[None],
        rest[stays][None],
        reader.seen[:-1, :-1][stays][:, stays][None],
    )
    change, constant = solve(sums, fit.ridge, intercept=True)
    return change[0], constant[0]


def errors(readers: Mapping[str, Sequence[Reader]], kept: Mapping[str, Sequence[int]], way: str) -> dict[str, float]:
    """The held-out error of every group that is in ``kept``."""
    return {name: error(readers[name], own, way, Fit()) for name, own in kept.items()}


# -------------------------------------------------------------------------------------- what least squares replaces


def refit_order(readers: Sequence[Reader], fit: Fit) -> Tensor:
    """Scores ``[C]``, higher is kept longer: of all channels that are left, the one goes without which least squares
    loses least, on calibration images. No criterion of secateur's, which know no moments of patches: it shows what
    ThiNet's objective leaves out, where the readers are fitted anew.

    With ``L`` the inverse of the inputs' covariance (and ridge) and ``W`` the weights as fitted so far, to remove the
    entries ``c`` costs ``tr(W_c L_cc^-1 W_c^T)``; then ``W -= W_c L_cc^-1 L_c`` and ``L -= L_c^T L_cc^-1 L_c`` (Hassibi
    and Stork 1993, "Optimal Brain Surgeon", equation 5, for a block).
    """
    state = [_Fitted.of(reader, fit) for reader in readers]
    left = list(range(len(state[0].entries)))
    scores = torch.zeros(len(left))
    for step in range(len(left)):
        costs = sum((one.costs(left) for one in state), start=torch.zeros(len(left), dtype=torch.float64))
        gone = left.pop(int(costs.argmin()))
        scores[gone] = step
        for one in state:
            one.remove_(gone)
    return scores


@dataclass(eq=False)
class _Fitted:
    """A reader while channels are taken from it: ``entries [C, m]`` of its patches by channel, ``weight [O, P]``,
    ``inverse [P, P]``, and ``energy`` of its output."""

    entries: Tensor
    weight: Tensor
    inverse: Tensor
    energy: Tensor

    @staticmethod
    def of(reader: Reader, fit: Fit) -> _Fitted:
        count = int(reader.channels.max()) + 1
        entries = torch.stack([torch.nonzero(reader.channels == c).flatten() for c in range(count)])
        second, mean = (t / reader.seen[-1, -1] for t in (reader.seen[:-1, :-1], reader.seen[:-1, -1]))
        spread = second - mean[:, None] * mean
        spread += fit.ridge * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
        energy = ((reader.weight @ second) * reader.weight).sum()
        return _Fitted(entries, reader.weight.clone(), torch.linalg.inv(spread), energy)

    def costs(self, left: Sequence[int]) -> Tensor:
        """Of each channel that is left, as a fraction of the output's energy."""
        own = self.entries[left]
        blocks = torch.linalg.inv(self.inverse[own[:, :, None], own[:, None, :]])
        weights = self.weight[:, own].movedim(1, 0)
        return ((weights @ blocks) * weights).sum((1, 2)) / self.energy

    def remove_(self, channel: int) -> None:
        own = self.entries[channel]
        block = torch.linalg.inv(self.inverse[own][:, own]) @ self.inverse[own]
        self.weight -= self.weight[:, own] @ block
        self.inverse -= self.inverse[:, own] @ block
