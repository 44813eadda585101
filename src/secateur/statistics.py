"""Statistics of activations, streamed over calibration data: all batches are led through the captured network together,
from one reader to the next, and nothing larger than second moments is kept of what they hold there.

Sums are taken in float64 (float32 on devices that have no float64) and added up over the processes, so that they do not
depend on how many there are.

Shapes: ``G`` partitions of a grouped convolution, ``N`` samples times output positions, ``P`` inputs of one output
(channels of a partition times kernel positions), ``O`` outputs of a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from secateur.errors import BadRequest, SecateurError
from secateur.graph import Graph, as_arguments
from secateur.interpreter import Env, Walk
from secateur.processes import sum_over_processes_

Inputs = list[torch.Tensor]
"""The tensors of one batch in the order of the captured graph's placeholders."""


def accumulator(device: torch.device) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float32 if device.type == "mps" else torch.float64


def place_of(graph: Graph) -> tuple[dict[str, torch.Tensor], torch.device, torch.dtype | None]:
    """The network's tensors, detached, floats in at least float32; where they are, and their dtype."""
    tensors = {name: t.detach() for name, t in graph.tensors.items()}
    floats = [t for t in tensors.values() if t.is_floating_point()]
    if not floats:
        return tensors, torch.device("cpu"), None
    dtype = torch.promote_types(floats[0].dtype, torch.float32)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return tensors, floats[0].device, dtype


# ---------------------------------------------------------------------------------------------------------- moments


@dataclass(eq=False)
class Moments:
    """Sums over samples of what a reader reads, ``p [G, N, P]``, and of what its outputs lack, ``r [G, N, O]``.

    ``p`` and ``pp`` are shared by all readers that read the same, and ``None`` where only means are asked for.
    """

    count: torch.Tensor
    r: torch.Tensor
    rp: torch.Tensor | None = None
    p: torch.Tensor | None = None
    pp: torch.Tensor | None = None

    @staticmethod
    def zeros(shape: tuple[int, int, int], device: torch.device, *, second: bool, shared: Moments | None) -> Moments:
        """Empty sums for ``shape = (G, O, P)``; with ``shared``, the sums over ``p`` are those of another reader."""
        parts, outputs, patch = shape

        def zero(*size: int) -> torch.Tensor:
            return torch.zeros(size, device=device, dtype=accumulator(device))

        if not second:
            return Moments(zero(), zero(parts, outputs))
        own = shared or Moments(zero(), zero(0), p=zero(parts, patch), pp=zero(parts, patch, patch))
        return Moments(zero(), zero(parts, outputs), zero(parts, outputs, patch), own.p, own.pp)

    def add_(self, r: torch.Tensor, p: torch.Tensor | None, *, own: bool) -> None:
        """More samples. ``own``: nobody else adds this ``p`` to the sums over ``p``."""
        r = r.to(self.r.dtype)
        self.count += r.shape[1]
        self.r += r.sum(1)
        if p is not None and self.rp is not None and self.p is not None and self.pp is not None:
            self.rp += r.mT @ p
            if own:
                self.p += p.sum(1)
                self.pp += p.mT @ p

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.count, self.r, self.rp, self.p, self.pp) if t is not None]


def moment_bytes(shape: tuple[int, int, int], device: torch.device, *, shared: bool) -> int:
    """What ``Moments`` of ``shape = (G, O, P)`` take: a number of 8 bytes for each of ``G P (P + 1)`` (unless they are
    shared) and ``G O (P + 1)``."""
    parts, outputs, patch = shape
    numbers = parts * outputs * (patch + 1) + (0 if shared else parts * patch * (patch + 1))
    return numbers * accumulator(device).itemsize


# ---------------------------------------------------------------------------------------------------------- batches


def batches(data: Iterable[Any], graph: Graph, device: torch.device, dtype: torch.dtype | None) -> Iterator[Inputs]:
    """The input tensors of every batch of ``data``, floats as ``dtype``, on ``device``.

    A batch is what the network was traced with, or a pair of that and targets. Raises ``BadRequest`` where it is
    neither, where its shape is not the captured one, and where the graph runs on the example's batch size only and the
    batch has another.
    """
    for number, batch in enumerate(data):
        _, found = read_inputs(batch, graph, number)
        moved = [t.to(device) for t in found]
        # copies: a network may write into its inputs, which are the user's
        yield [t.to(dtype, copy=True) if dtype is not None and t.is_floating_point() else t.clone() for t in moved]


def read_inputs(batch: Any, graph: Graph, number: int) -> tuple[Any, Inputs]:
    """What of a batch the network is run on, as the user gave it, and its tensors in order: all of it if that fits the
    captured inputs, else the first of a pair ``(inputs, targets)``."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    problem = ""
    for offer in (batch, *([batch[0]] if pair else [])):
        try:
            args, kwargs = as_arguments(offer)
            found = graph.inputs.flat(args, kwargs)
        except (TypeError, SecateurError) as error:
            problem = problem or str(error).splitlines()[0]
            continue
        problem = _misfit(found, graph)
        if not problem:
            return offer, found
    raise BadRequest(
        f"batch {number} of the data does not fit the network: {problem}\n"
        "  do: pass batches of inputs, or of (inputs, targets), shaped as the example that the plan was made with"
    )


def _misfit(found: Inputs, graph: Graph) -> str:
    """How the batch differs from what was captured; empty if it fits."""
    capture = graph.captures[0]
    places = [n for n in capture.graph.nodes if n.op == "placeholder"]
    free = [b and capture.free for b in capture.batched]
    for tensor, place, any_length in zip(found, places, free, strict=True):
        known = place.meta["val"]
        wanted: list[int | str] = [int(k) for k in known.shape[1:]] if any_length else [int(k) for k in known.shape]
        offered = list(tensor.shape[1:]) if any_length else list(tensor.shape)
        if tensor.dim() != known.dim() or offered != wanted:
            if not any_length and tensor.dim() == known.dim() and offered[1:] == wanted[1:]:
                return f"it has {offered[0]} examples, and the model writes down a batch size of {wanted[0]}"
            return f"its shape is {list(tensor.shape)}, and the network was captured on {_shown(wanted, any_length)}"
        if tensor.is_floating_point() != known.is_floating_point():
            return f"its dtype is {tensor.dtype}, and the network was captured on {known.dtype}"
        if tensor.numel() == 0:
            return f"it is empty, {list(tensor.shape)}"
    return ""


def _shown(wanted: Sequence[int | str], any_length: bool) -> str:
    return f"[{', '.join(map(str, (['any'] if any_length else []) + list(wanted)))}]"


def no_batches() -> BadRequest:
    """For data without a single batch."""
    return BadRequest(
        "data has no batches (an iterator that was read before?)\n  do: pass a DataLoader or a list of batches"
    )


def check_repeatable(data: Iterable[Any], who: str) -> None:
    """Raises ``BadRequest`` for what can be read only once."""
    # iter() is asked of nothing but iterators: a DataLoader's draws from the global generator
    if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
        raise BadRequest(
            f"{who} needs data that can be read batch by batch, not {type(data).__name__}\n"
            "  do: pass a DataLoader or a list of batches"
        )
    if isinstance(data, Iterator) and iter(data) is data:
        raise BadRequest(
            f"data can be read only once ({type(data).__name__}), and {who} may read it several times\n"
            "  do: pass a DataLoader or a list of batches"
        )


def agree(error: Exception | None, device: torch.device) -> None:
    """Raise ``error`` here, and a ``BadRequest`` in the processes that had none: all stop together, or none does."""
    failed = torch.tensor([float(error is not None)], device=device)
    sum_over_processes_([failed])
    if error is not None:
        raise error
    if float(failed) > 0:
        raise BadRequest("another process failed while the calibration data were read\n  do: see its message")


# ------------------------------------------------------------------------------------------------------------ stops


@dataclass
class _Place:
    """Where the walks of one batch have come to."""

    walks: tuple[Walk, ...]
    node: fx.Node
    envs: tuple[Env, ...]
    size: int


@dataclass
class Stops:
    """Leads all batches through one network, or several at once, from stop to stop.

    ``begin``: the walks for a batch. ``order``: the number of every node. Activations are held between stops as long as
    they take at most ``most`` bytes; batches beyond that are read again, and run from the start, for every stop.
    """

    read: Callable[[], Iterator[Inputs]]
    begin: Callable[[Inputs], tuple[Walk, ...]]
    order: Mapping[fx.Node, int]
    most: int
    _held: dict[int, _Place] = field(default_factory=dict)
    _count: int | None = None

    def at(self, node: fx.Node) -> Iterator[tuple[Env, ...]]:
        """The live values in front of ``node`` in each of the walks, batch after batch."""
        behind = any(self.order[place.node] > self.order[node] for place in self._held.values())
        if len(self._held) == self._count and not behind:
            for number in range(self._count):
                yield self._advance(number, None, node)
            return
        count = 0
        for number, inputs in enumerate(self.read()):
            yield self._advance(number, inputs, node)
            count = number + 1
        self._count = count

    def forget(self) -> None:
        """What is held was computed with other weights: start anew. The number of batches is not forgotten."""
        self._held.clear()
        self._count = None

    def _advance(self, number: int, inputs: Inputs | None, node: fx.Node) -> tuple[Env, ...]:
        place = self._held.pop(number, None)
        if place is not None and self.order[place.node] > self.order[node]:
            place = None  # it has come farther
        if place is None:
            assert inputs is not None
            place = _Place(self.begin(inputs), node, (), 0)
        if place.node is not node or not place.envs:
            with torch.no_grad():
                place.envs = tuple(_run_to(walk, node) for walk in place.walks)
            place.node, place.size = node, sum(map(live_bytes, place.envs))
        if sum(p.size for p in self._held.values()) + place.size <= self.most:
            self._held[number] = place
        return place.envs


def _run_to(walk: Walk, node: fx.Node) -> Env:
    for at, env in walk:
        if at is node:
            return env
    raise AssertionError(f"the walk does not come to {node}")


def live_bytes(env: Env) -> int:
    """What the activations in ``env`` take; views of one storage count once, parameters not at all."""
    sizes: dict[int, int] = {}
    for node, value in env.items():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor) and node.op != "get_attr":
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
