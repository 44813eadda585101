"""Calibration: what data show of each group's channels, streamed over one pass, for criteria that ask for it.

Feature maps and the outputs of the layers that read them are seen in the captured eval graph, at the places that labels
give, without hooks; ``products`` measures gradients. Only sums over samples are kept, in float64 (float32 on devices
that have no float64), and added up over the processes, each of which reads its part of the data.

Letters: ``C`` channels of a group, ``M`` maps of each, ``N`` samples, ``P`` positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from secateur.contributions import Contributions, Reading
from secateur.core import Group, MapStatistics
from secateur.errors import BadRequest
from secateur.generators import kept_randomness, seed_all
from secateur.graph import Graph
from secateur.groups import Coupling, freed
from secateur.interpreter import Env, walk
from secateur.processes import sum_over_processes_
from secateur.products import Loss as Loss
from secateur.products import products
from secateur.statistics import accumulator, agree, batches, check_repeatable, no_batches, place_of
from secateur.taps import Tap, activation_taps, map_taps

Progress = Callable[[int, int], None]
"""Called after each batch with how many are done and how many there are (0: the data do not say)."""
STREAMED = ("maps", "activations", "outputs", "samples")
"""What is seen in one pass through the captured network."""
CHUNK, GPU_CHUNK = 2**17, 2**25
"""How many values are worked on at a time: few enough for a processor's cache (1 MiB in float64, three times as fast as
all at once), many enough to keep a GPU busy."""


def collect(
    coupling: Coupling,
    groups: Sequence[Group],
    reads: Collection[str],
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    progress: Progress | None = None,
    locations: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """What ``data`` show of ``groups``: ``{group name: {"maps": ..., "outputs": ..., "products": ...}}``, those of
    ``maps``, ``activations``, ``outputs``, ``samples`` and ``products`` that are in ``reads``. Nothing of the user's is
    changed, gradients and random generators included; what data and networks draw is drawn from a fixed seed, so that
    the same call finds the same.

    ``data``: batches of inputs, or of ``(inputs, targets)``, on which the network runs in eval mode; in several
    processes, this process's part of them. They are read once for all kinds but ``products`` together, and once for
    those, which need targets and ``loss(outputs, targets)``. A group may be passed with fewer slices than the network's
    own has: then only the layers in its ``writes`` slices count for ``maps`` and ``activations``.

    ``outputs`` are exact: of all filters of the layers that read a group, at all locations. ``samples`` are of
    ``locations`` outputs of each image, drawn with ``seed``. Either takes ``8 C^2`` bytes for every such layer; while
    they are added up, some multiples of 64 MiB are in use, and inputs of 256 MiB may wait until there are more.

    ``products`` run the user's own forward in eval mode, once a batch: its hooks are called, and what a forward changes
    besides tensors (a counter in Python) is changed. All other kinds run the captured graph and touch neither.

    Where a network folds positions into the batch axis (window attention), each slice along it counts as a sample.

    Raises ``BadRequest`` for data that can be read only once, are empty or do not fit, for a loss that is missing or
    gives anything but one finite number, and for maps or outputs that are not finite; ``CannotPrune`` for a group that
    no layer writes, for one that no affine layer reads, and for one whose filters no gradient of the loss reaches.
    Warns (``SecateurWarning``) of readers that are not affine, and of fewer outputs than channels.
    """
    passes = [kinds for kinds in (STREAMED, ("products",)) if any(k in reads for k in kinds)]
    found: dict[str, dict[str, Any]] = {group.name: {} for group in groups}
    if not passes or not groups:
        return found
    check_repeatable(data, "calibration")
    if "products" in reads and not callable(loss):
        raise BadRequest(
            f"products of weights and gradients need a loss, not {loss!r}\n"
            "  do: pass loss=, a function of (outputs, targets), for example torch.nn.functional.cross_entropy"
        )
    tick = _ticks(data, len(passes), progress)
    device = next((t.device for t in coupling.graph.tensors.values()), torch.device("cpu"))
    for kind in passes:
        with kept_randomness(device):
            seed_all(0, 0)
            if kind == ("products",):
                assert loss is not None
                for name, value in products(coupling, groups, data, loss, tick).items():
                    found[name]["products"] = value
                continue
            watched = _Watched.of(coupling, groups, [k for k in kind if k in reads], locations=locations, seed=seed)
            for (name, field), value in watched.over(data, tick).items():
                found[name][field] = value
    return found


def _ticks(data: Iterable[Any], passes: int, progress: Progress | None) -> Callable[[], None]:
    try:
        total = len(data) * passes  # type: ignore[arg-type]
    except TypeError:  # also of a DataLoader, which has a length only where its dataset has one
        total = 0
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


# ------------------------------------------------------------------------------------------------------------- maps


@dataclass(eq=False)
class _Sums:
    """Sums over the maps at one tap: ``values [6, C, m]``, in the order of ``MapStatistics``, of ``count`` samples."""

    tap: Tap
    values: torch.Tensor
    count: torch.Tensor

    @staticmethod
    def zeros(tap: Tap, device: torch.device) -> _Sums:
        dtype = accumulator(device)
        return _Sums(
            tap, torch.zeros(6, *tap.positions.shape, device=device, dtype=dtype), torch.zeros((), dtype=dtype)
        )

    @property
    def stop(self) -> fx.Node:
        return self.tap.stop

    def add_(self, env: Env) -> None:
        """The maps of one batch."""
        maps = maps_at(self.tap, env[self.tap.value])
        samples, channels, positions = maps.shape
        step = max(1, (CHUNK if maps.device.type == "cpu" else GPU_CHUNK) // max(1, channels * positions))
        for start in range(0, samples, step):
            part = describe(maps[start : start + step], self.values.dtype).sum(1)
            self.values += part.reshape(self.values.shape)
        self.count += samples


def maps_at(tap: Tap, value: torch.Tensor) -> torch.Tensor:
    """``[N, C m, P]``: the maps that ``value`` holds of a group, one after another."""
    axis, samples = tap.axis, tap.samples
    if samples is None:
        value, axis, samples = value.unsqueeze(0), axis + 1, 0
    value = value.movedim((samples, axis), (0, 1))
    index = tap.positions.reshape(-1)
    if len(index) != value.shape[1] or bool((index != torch.arange(len(index))).any()):
        value = value.index_select(1, index.to(value.device))
    return value.reshape(*value.shape[:2], -1)


def describe(maps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[6, N, K]`` of ``maps [N, K, P]``: mean, standard deviation (divided by ``P``), L1 norm, L2 norm, its square,
    share of zeros."""
    wide, positions = maps.to(dtype), maps.shape[2]
    mean = wide.mean(2)
    l2 = torch.linalg.vector_norm(wide, dim=2)
    std = torch.linalg.vector_norm(wide - mean.unsqueeze(2), dim=2) / positions**0.5
    zeros = (maps == 0).sum(2).to(dtype) / positions
    return torch.stack([mean, std, wide.abs().sum(2), l2, l2.square(), zeros])


@dataclass(eq=False)
class _Watched:
    """One pass over the data: sums over the maps by group name and field, and what comes through to the readers."""

    coupling: Coupling
    maps: dict[tuple[str, str], list[_Sums]]
    contributions: Contributions

    @staticmethod
    def of(
        coupling: Coupling, groups: Sequence[Group], fields: Collection[str], *, locations: int, seed: int
    ) -> _Watched:
        free = freed(coupling)
        device = place_of(free.graph)[1]
        find = {"maps": map_taps, "activations": activation_taps}
        maps = {
            (group.name, field): [_Sums.zeros(tap, device) for tap in find[field](free, group)]
            for group in groups
            for field in fields
            if field in find
        }
        kinds = [field for field in fields if field not in find]
        return _Watched(free, maps, Contributions.of(free, groups, kinds, device, locations=locations, seed=seed))

    def over(self, data: Iterable[Any], tick: Callable[[], None]) -> dict[tuple[str, str], Any]:
        """The statistics of every group, over all data of all processes."""
        graph = self.coupling.graph
        state, device, dtype = place_of(graph)
        sums = [one for own in self.maps.values() for one in own]
        seen: list[_Sums | Reading] = [*sums, *self.contributions.readings]
        at: dict[fx.Node, list[_Sums | Reading]] = {}
        for one in seen:
            at.setdefault(one.stop, []).append(one)
        examples = torch.zeros((), dtype=accumulator(device))
        problem: Exception | None = None
        try:
            with torch.no_grad():
                for inputs in batches(data, graph, device, dtype):
                    examples += _examples(graph, inputs)
                    _watch(self.coupling, state, inputs, at)
                    tick()
        except Exception as error:
            problem = error
        agree(problem, device)
        gathered = [examples, *(t for own in sums for t in (own.values, own.count))]
        moved = [t.to(device) for t in gathered]
        sum_over_processes_(moved)
        for tensor, total in zip(gathered, moved, strict=True):
            tensor.copy_(total)
        if not float(examples):
            raise no_batches()
        found: dict[tuple[str, str], Any] = {k: _finished(k, own, int(examples)) for k, own in self.maps.items()}
        return found | self.contributions.moments()


def _examples(graph: Graph, inputs: Sequence[torch.Tensor]) -> int:
    batched = (len(t) for t, marked in zip(inputs, graph.captures[0].batched, strict=True) if marked)
    return next(batched, 1)


def _watch(
    coupling: Coupling,
    state: Mapping[str, torch.Tensor],
    inputs: list[torch.Tensor],
    at: Mapping[fx.Node, Sequence[_Sums | Reading]],
) -> None:
    """Run one batch as far as the last stop, adding up what is seen on the way."""
    everything = torch.ones(len(coupling.group_of), dtype=torch.bool)
    left = len(at)
    walking = walk(coupling, everything, state, inputs, 0, at)
    for node, env in walking:
        for one in at[node]:
            one.add_(env)
        left -= 1
        if not left:
            walking.close()
            return


def _finished(key: tuple[str, str], sums: Sequence[_Sums], samples: int) -> MapStatistics:
    name, field = key
    means = torch.cat([(one.values / one.count.to(one.values.device)).cpu().double() for one in sums], 2)
    bad = int((~torch.isfinite(means)).any(2).any(0).sum())
    if bad:
        raise BadRequest(
            f"the {field} of group {name!r} are not finite (NaN or infinite) on the calibration data, in {bad} of "
            f"{means.shape[1]} channels\n  do: check the data and the network's weights"
        )
    return MapStatistics(samples, *means.unbind())
