"""Which channels go, each group judged by what its readers put out once all that was decided before it is gone.

Luo et al. (ICCV 2017, section 3.3) prune one layer after the other. Here nothing is cut or trained in between: two
walks lead every batch through the network side by side, one dense, one in which the channels that are decided to go are
never read. For a reader of a group let ``x`` be what it reads in the second, ``z_c`` what comes of it through channel
``c``, and ``t`` the dense network's output without what comes through other groups in the second:

    t = W x_dense - W x_others,    f(T) = || t - sum_{c not in T} z_c ||^2

(He et al. 2017, "Channel pruning for accelerating very deep neural networks", section 3.3, call this "asymmetric": the
errors of the layers before are seen, and can be made up for.) Filters of the reader that are gone themselves, as in a
residual stream that was decided before, do not count.

Shapes: as in ``patches``; ``C`` channels of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from secateur.calibration import Loss, Progress, collect
from secateur.consumers import Affine, Consumer, value_read
from secateur.contributions import Contributions, Reading, readers
from secateur.core import Criterion, Group
from secateur.criteria import locations, reads
from secateur.generators import kept_randomness, seed_all
from secateur.grams import add_draws_, add_moments_
from secateur.groups import Coupling, freed
from secateur.interpreter import Env, Masks, Walk, cut, walk
from secateur.patches import Layout, matrix, outputs, weight_from
from secateur.processes import sum_over_processes_
from secateur.selection import forward_order, front_to_back
from secateur.statistics import Inputs, Stops, accumulator, agree, batches, check_repeatable, no_batches, place_of

MOST = 2**30
"""Bytes of activations that are held between groups; prefixes of the network are run again for batches beyond."""
KINDS = ("outputs", "samples")
"""What is measured anew for every group."""


def front_to_back_on_data(
    coupling: Coupling,
    judged: Mapping[str, Group],
    widths: Mapping[str, int],
    criterion: str | Criterion,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    evidence: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[int, ...]]:
    """The sorted indices of the ``widths[name]`` channels that each group keeps, as ``front_to_back``; ``outputs`` and
    ``samples``, if the criterion reads them, are measured anew when a group has its turn.

    ``data``: batches as for ``collect``; in several processes, this process's part of them, and all take part.
    What else the criterion reads is that of the dense network: ``evidence``, or else measured now, with ``loss`` where
    that is needed. ``progress`` is called after each group with how many are done and how many there are.

    Activations of all batches are held between groups as long as they take at most 1 GiB. Where they do, the network is
    run about once, and from the start again behind every group that is read in several places; where they do not, once
    for every reader.

    Raises and warns as ``collect``; nothing of the user's is changed.
    """
    check_repeatable(data, "calibration")
    kinds = [kind for kind in KINDS if kind in reads(criterion)]
    turns = [
        n for n in forward_order(coupling) if n in judged and widths.get(n, judged[n].channels) < judged[n].channels
    ]
    others = [field for field in reads(criterion) if field not in kinds]
    if not evidence:
        evidence = collect(coupling, [judged[name] for name in turns], others, data, loss=loss)
    network = _opened(freed(coupling), turns, data)
    asked = (kinds, locations(criterion), seed)
    done = 0

    def measure(name: str, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        nonlocal done
        _decide_(network, keep)
        with kept_randomness(network.device):
            found = _measured(network, network.groups[name], *asked)
        done += 1
        if progress is not None:
            progress(done, len(turns))
        return found

    return front_to_back(coupling, judged, widths, criterion, seed=seed, evidence=evidence, measure=measure)


@dataclass(eq=False)
class _Network:
    """The network with what is decided by now. ``class_keep`` is shared with the walks under way; they stand in front
    of the node whose number in ``order`` is ``reached``."""

    coupling: Coupling
    device: torch.device
    order: Mapping[fx.Node, int]
    class_keep: torch.Tensor
    stops: Stops
    decided: set[str] = field(default_factory=set)
    reached: int = -1

    @property
    def groups(self) -> dict[str, Group]:
        return {group.name: group for group in self.coupling.groups}


def _opened(coupling: Coupling, turns: Sequence[str], data: Iterable[Any]) -> _Network:
    """The dense network, in front of its first node."""
    state, device, dtype = place_of(coupling.graph)
    groups = {group.name: group for group in coupling.groups}
    watch = {c.call.node for own in readers(coupling, [groups[name] for name in turns]).values() for c in own[0]}
    order = {node: i for i, node in enumerate(coupling.graph.captures[0].graph.nodes)}
    everything = torch.ones(len(coupling.group_of), dtype=torch.bool)
    class_keep = everything.clone()

    def read() -> Iterator[Inputs]:
        seed_all(0, 0)  # data that draw, draw the same whenever they are read
        yield from batches(data, coupling.graph, device, dtype)

    def begin(inputs: Inputs) -> tuple[Walk, ...]:
        dense = walk(coupling, everything, state, [t.clone() for t in inputs], 0, watch)
        return dense, walk(coupling, class_keep, state, inputs, 0, watch)

    return _Network(coupling, device, order, class_keep, Stops(read, begin, order, MOST))


def _decide_(network: _Network, keep: Mapping[str, tuple[int, ...]]) -> None:
    """What goes by ``keep`` is not read from now on. Walks that have come past a place where it was read start anew."""
    for group in network.coupling.groups:
        kept = keep[group.name]
        if len(kept) == group.channels or group.name in network.decided:
            continue
        network.decided.add(group.name)
        without = network.coupling.class_keep({group.name: kept})
        network.class_keep &= without
        masks = Masks(network.coupling, without)
        first = next((n for node, n in network.order.items() if masks.read(node)), len(network.order))
        if first < network.reached:
            network.stops.forget()
            network.reached = -1


def _measured(network: _Network, group: Group, kinds: Sequence[str], drawn: int, seed: int) -> dict[str, Any]:
    """The moments of each of the ``kinds``, on the network as it is decided by now."""
    found = Contributions.of(network.coupling, [group], kinds, network.device, locations=drawn, seed=seed)
    masks = Masks(network.coupling, network.class_keep)
    count = torch.zeros((), device=network.device)
    problem: Exception | None = None
    try:
        with torch.no_grad():
            for reading in found.readings:
                for dense, pruned in network.stops.at(reading.stop):
                    _add_(reading, dense, pruned, masks)
                    count += 1
                network.reached = network.order[reading.stop]
    except Exception as error:
        problem = error
    agree(problem, network.device)
    sum_over_processes_([count])
    if not float(count):
        raise no_batches()
    return {kind: moments for (_, kind), moments in found.moments().items()}


def _add_(reading: Reading, dense: Env, pruned: Env, masks: Masks) -> None:
    """What a call gives in one batch."""
    layout = reading.call.layout
    x_before, weight_before = _read(reading.call, dense, masks, whole=True)
    x, weight = _read(reading.call, pruned, masks)
    y = _wide_outputs(x_before, weight_before, layout)
    for consumer, sums in reading.whole:
        t = y - _beside(consumer, x, weight)
        add_moments_(sums, x, weight, layout, t=t, energy=y.square().sum())
    if reading.drawn:
        filters, rows = draws = reading.draw(x, weight)
        at = filters // y.shape[2], rows, filters % y.shape[2]
        for consumer, sums in reading.drawn:
            t = y - _beside(consumer, x, weight)
            add_draws_(sums, x, weight, layout, draws=draws, t=t[at], energy=y[at].square().sum())


def _read(call: Affine, env: Env, masks: Masks, *, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What a call reads, zeros where its channels are gone, or as it is (``whole``); and its weight. Only the outputs
    that stay: positions along other axes, and filters, that are gone are left out."""
    x, weight = value_read(call, env, None if whole else masks)
    axis = call.layout.channels_axis % x.dim()
    gone = masks.read(call.node).get(call.source, ())
    x = cut(x, [None if d == axis else mask for d, mask in enumerate(gone)])
    own = masks.of(call.node)
    rows = own[call.layout.channels_axis] if own else None
    if rows is not None:
        values = matrix(weight, call.layout)
        stay = rows.reshape(values.shape[:2]).to(values.device)
        weight = weight_from(values[stay].reshape(values.shape[0], -1, *values.shape[2:]), call.layout)
    return x, weight


def _beside(consumer: Consumer, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | float:
    """``[G, N, O]``: what comes through the channels of other groups."""
    if consumer.whole:
        return 0.0
    layout = consumer.call.layout
    others = x.index_fill(layout.channels_axis % x.dim(), consumer.columns.to(x.device), 0)
    return _wide_outputs(others, weight, layout)


def _wide_outputs(x: torch.Tensor, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``patches.outputs`` in the dtype of the sums: what remains of a target may be small beside both its terms."""
    dtype = accumulator(x.device)
    return outputs(x.to(dtype), matrix(weight.to(dtype), layout), layout)
