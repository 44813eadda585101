"""Calibration: what data show of each group's channels, streamed over one pass, for criteria that ask for it.

Feature maps are seen in the captured eval graph, at the taps that labels give, without hooks; gradients are autograd's,
of the user's own network in eval mode on copies of its tensors. Only sums over samples are kept, in float64 (float32 on
devices that have no float64), and added up over the processes, each of which reads its part of the data.

Letters: ``C`` channels of a group, ``M`` maps of each, ``N`` samples, ``P`` positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from secateur.capture import in_mode
from secateur.core import Group, MapStatistics, Slice
from secateur.errors import BadRequest, CannotPrune
from secateur.graph import Graph, as_arguments, with_free_batch
from secateur.groups import Coupling, freed
from secateur.interpreter import walk
from secateur.nests import flatten, unflatten
from secateur.processes import sum_over_processes_
from secateur.statistics import accumulator, agree, batches, check_repeatable, read_inputs
from secateur.taps import Tap, activation_taps, filters_of, map_taps

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""``(outputs, targets)`` to one number, a scalar tensor that gradients can be taken of."""
Progress = Callable[[int, int], None]
"""Called after each batch with how many are done and how many there are (0: the data do not say)."""
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
) -> dict[str, dict[str, Any]]:
    """What ``data`` show of ``groups``: ``{group name: {"maps": ..., "activations": ..., "products": ...}}``, those of
    the three that are in ``reads``. Nothing of the user's is changed, gradients included.

    ``data``: batches of inputs, or of ``(inputs, targets)``, on which the network runs in eval mode; in several
    processes, this process's part of them. They are read once for ``maps`` and ``activations`` together, and once for
    ``products``, which need targets and ``loss(outputs, targets)``. A group may be passed with fewer slices than the
    network's own has: then only the layers in its ``writes`` slices count.

    Where a network folds positions into the batch axis (window attention), each slice along it counts as a sample.

    Raises ``BadRequest`` for data that can be read only once, are empty or do not fit, for a loss that is missing or
    gives anything but one finite number, and for maps that are not finite; ``CannotPrune`` for a group that no layer
    writes.
    """
    passes = [kind for kind in (("maps", "activations"), ("products",)) if any(k in reads for k in kind)]
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
    for kind in passes:
        if kind == ("products",):
            assert loss is not None
            measured: Mapping[tuple[str, str], Any] = _products(coupling, groups, data, loss, tick)
        else:
            measured = _statistics(coupling, groups, [k for k in kind if k in reads], data, tick)
        for (name, field), value in measured.items():
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


def _place(graph: Graph) -> tuple[dict[str, torch.Tensor], torch.device, torch.dtype | None]:
    """The network's tensors, detached, floats in at least float32; where they are, and their dtype."""
    tensors = {name: t.detach() for name, t in graph.tensors.items()}
    floats = [t for t in tensors.values() if t.is_floating_point()]
    if not floats:
        return tensors, torch.device("cpu"), None
    dtype = torch.promote_types(floats[0].dtype, torch.float32)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return tensors, floats[0].device, dtype


def _empty() -> BadRequest:
    return BadRequest(
        "data has no batches (an iterator that was read before?)\n  do: pass a DataLoader or a list of batches"
    )


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

    def add_(self, value: torch.Tensor) -> None:
        """The maps of one batch."""
        maps = maps_at(self.tap, value)
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


def _statistics(
    coupling: Coupling, groups: Sequence[Group], fields: Sequence[str], data: Iterable[Any], tick: Callable[[], None]
) -> dict[tuple[str, str], MapStatistics]:
    """The maps of every group, by group name and field."""
    free = freed(coupling)
    state, device, dtype = _place(free.graph)
    find = {"maps": map_taps, "activations": activation_taps}
    sums = {
        (group.name, field): [_Sums.zeros(tap, device) for tap in find[field](free, group)]
        for group in groups
        for field in fields
    }
    at: dict[Any, list[_Sums]] = {}
    for one in (one for own in sums.values() for one in own):
        at.setdefault(one.tap.stop, []).append(one)
    examples = torch.zeros((), dtype=accumulator(device))
    problem: Exception | None = None
    try:
        with torch.no_grad():
            for inputs in batches(data, free.graph, device, dtype):
                examples += _examples(free.graph, inputs)
                _watch(free, state, inputs, at)
                tick()
    except Exception as error:
        problem = error
    agree(problem, device)
    gathered = [examples, *(t for own in sums.values() for one in own for t in (one.values, one.count))]
    moved = [t.to(device) for t in gathered]
    sum_over_processes_(moved)
    for tensor, total in zip(gathered, moved, strict=True):
        tensor.copy_(total)
    if not float(examples):
        raise _empty()
    return {key: _finished(key, own, int(examples)) for key, own in sums.items()}


def _examples(graph: Graph, inputs: Sequence[torch.Tensor]) -> int:
    batched = (len(t) for t, marked in zip(inputs, graph.captures[0].batched, strict=True) if marked)
    return next(batched, 1)


def _watch(
    coupling: Coupling, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor], at: Mapping[Any, list[_Sums]]
) -> None:
    """Run one batch as far as the last stop, adding up what is seen on the way."""
    everything = torch.ones(len(coupling.group_of), dtype=torch.bool)
    left = len(at)
    walking = walk(coupling, everything, state, inputs, 0, at)
    for node, env in walking:
        for one in at[node]:
            one.add_(env[one.tap.value])
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


# --------------------------------------------------------------------------------------------------------- products


def _products(
    coupling: Coupling, groups: Sequence[Group], data: Iterable[Any], loss: Loss, tick: Callable[[], None]
) -> dict[tuple[str, str], torch.Tensor]:
    """``[C]`` for every group: the mean over batches of ``(sum_w g w)^2`` over the weights of the channel's filters."""
    graph = with_free_batch(coupling.graph)
    tensors, device, dtype = _place(graph)
    exact = accumulator(device)
    pieces = {group.name: filters_of(group, coupling) for group in groups}
    _check_filters(pieces)
    totals = {group.name: torch.zeros(group.channels, device=device, dtype=exact) for group in groups}
    count = torch.zeros((), device=device, dtype=exact)
    problem: Exception | None = None
    try:
        with in_mode(graph.model, False), torch.inference_mode(False), torch.enable_grad():
            state = {name: t.clone() for name, t in tensors.items()}
            weights = {s.tensor: state[s.tensor].requires_grad_() for own in pieces.values() for s in own}
            for value in _losses(graph, state, data, loss, device, dtype):
                slopes = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                change = {
                    name: weight.detach().to(exact) * slope.to(exact)
                    for (name, weight), slope in zip(weights.items(), slopes, strict=True)
                    if slope is not None
                }
                for name, own in pieces.items():
                    parts = [_by_channel(change[s.tensor], s) for s in own if s.tensor in change]
                    totals[name] += torch.stack(parts).sum(0).square() if parts else 0
                count += 1
                tick()
    except Exception as error:
        problem = error
    agree(problem, device)
    sum_over_processes_([count, *totals.values()])
    if not float(count):
        raise _empty()
    return {(name, "products"): (total / count).cpu().double() for name, total in totals.items()}


def _check_filters(pieces: Mapping[str, Sequence[Slice]]) -> None:
    for name, own in pieces.items():
        if not own:
            raise CannotPrune(
                f"group {name!r} has no filters to take gradients of: no weight writes its channels\n"
                "  do: exclude it, or use a criterion that looks at weights, such as 'l1'"
            )


def _by_channel(change: torch.Tensor, piece: Slice) -> torch.Tensor:
    """``[C]``: the sum over all that each channel owns in a tensor."""
    along = change.movedim(piece.axis, 0).flatten(1).sum(1)
    return along[torch.from_numpy(piece.positions).to(along.device)].sum(1)


def _losses(
    graph: Graph,
    state: Mapping[str, torch.Tensor],
    data: Iterable[Any],
    loss: Loss,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[torch.Tensor]:
    """The loss of every batch, of the user's own network with the tensors in ``state``."""

    def moved(value: Any, *, cast: bool) -> Any:
        tensors, skeleton = flatten(value)
        # copies: a network may write into its inputs, which are the user's
        kinds = [dtype if cast and t.is_floating_point() else None for t in tensors]
        return unflatten(skeleton, [t.to(device, kind, copy=True) for t, kind in zip(tensors, kinds, strict=True)])

    for number, batch in enumerate(data):
        offer, _ = read_inputs(batch, graph, number)
        if offer is batch:
            raise BadRequest(
                f"batch {number} of the data has no targets, and a loss needs them\n"
                "  do: pass batches of (inputs, targets)"
            )
        args, kwargs = moved(as_arguments(offer), cast=True)
        outputs = functional_call(graph.model, dict(state), args, kwargs)
        try:
            value = loss(outputs, moved(batch[1], cast=False))
        except Exception as error:
            error.add_note(f"while the loss of batch {number} of the calibration data was computed")
            raise
        yield _checked(value, number)


def _checked(value: object, number: int) -> torch.Tensor:
    problem = ""
    if not isinstance(value, torch.Tensor):
        problem = f"returned {type(value).__name__}, not a tensor"
    elif value.numel() != 1:
        problem = f"returned the shape {list(value.shape)}, not one number"
    elif not bool(torch.isfinite(value).all()):
        problem = f"is {float(value)}"
    elif not value.requires_grad:
        problem = "does not depend on the network's weights (detached, or computed without its outputs)"
    if problem:
        raise BadRequest(
            f"the loss of batch {number} {problem}\n"
            "  do: return a scalar tensor computed from the outputs, as torch.nn.functional.cross_entropy does"
        )
    assert isinstance(value, torch.Tensor)
    return value.reshape(())
