"""The nouns that every stage passes to the next: frozen, plain data, no behaviour beyond reading it.

A *channel* is one thing that is kept or removed as a whole. A *group* is a set of channels that live in the same
tensors; removing channel ``c`` of a group removes ``positions[c]`` along ``axis`` of every tensor it has a slice in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

Role = Literal["writes", "reads", "scales", "follows"]
"""What a tensor does with a channel: ``writes`` it (a filter), ``reads`` it (the next layer's input slice), ``scales``
it (the weight of a norm, a layer scale), or ``follows`` it (biases, running statistics and all else on that axis)."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the channels of a group lie in one tensor.

    ``positions`` is an int64 array ``[channels, k]``: channel ``c`` owns the ``k`` indices ``positions[c]`` along
    ``axis`` of the tensor that ``state_dict()`` calls ``tensor`` (tied weights: the first of their names).
    """

    tensor: str
    axis: int
    positions: np.ndarray
    role: Role

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slice):
            return NotImplemented
        same = (self.tensor, self.axis, self.role) == (other.tensor, other.axis, other.role)
        return same and np.array_equal(self.positions, other.positions)

    def __hash__(self) -> int:
        return hash((self.tensor, self.axis, self.role))


@dataclass(frozen=True)
class Group:
    """Channels that are written, scaled and read by the same tensors.

    ``name`` is the module that writes them first (``layer1.0.conv1``; with ``#2``, ``#3`` ... where one module writes
    several groups, as in front of a split). ``partitions`` is how many filters of that module one channel stands for
    (32 in a convolution of 32 groups, 49 in a linear layer behind a flattened 7x7 map, else 1). ``locked`` is empty for
    a group that can be pruned, else the reason why it cannot.
    """

    name: str
    channels: int
    slices: tuple[Slice, ...]
    partitions: int = 1
    locked: str = ""


@dataclass(frozen=True, eq=False)
class MapStatistics:
    """What calibration data show of a group's feature maps: float64 ``[C, M]`` each, on the CPU.

    A channel has ``M`` maps, one for every filter it stands for in every layer that writes the group. Each entry is the
    mean over all samples of what a single map ``x`` of ``h x w`` shows: its ``mean``, its standard deviation ``std``
    (over the ``h w`` positions), its norms ``l1`` and ``l2``, its squared norm ``l2_squared``, and the share ``zeros``
    of its positions that are exactly 0.
    """

    samples: int
    mean: torch.Tensor
    std: torch.Tensor
    l1: torch.Tensor
    l2: torch.Tensor
    l2_squared: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """What the layers that read a group put out through each of its channels, on calibration data.

    For reader ``u`` of ``U``, ``z_c`` is the part of its output that comes through channel ``c``: the kernel slices of
    ``c`` on the feature map of ``c``, without bias; ``t`` is what the ``z_c`` should sum to, and ``y`` the whole output
    without bias. Sums run over samples, which are outputs at all locations of all images, or drawn from them. float64
    on the CPU: ``gram [U, C, C]``, the sum of ``z_c z_c'``; ``target [U, C]``, of ``z_c t``; ``goal [U]``, of ``t^2``;
    ``energy [U]``, of ``y^2``; ``samples [U]``, how many there are. ``readers``: the modules' names.
    """

    readers: tuple[str, ...]
    samples: torch.Tensor
    gram: torch.Tensor
    target: torch.Tensor
    goal: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class GroupView:
    """All that a criterion sees of a group. ``C`` channels, float64 or float32 on the CPU, detached.

    ``filters``: ``[C, fan_in]``, the weights that write each channel, all writers side by side. ``readers``:
    ``[C, fan_out]``, the weights that read it. ``scales``: ``[C, s]``, norm weights and layer scales on it. Any of
    them may have no columns. ``n_keep`` is how many channels will stay, where that is known beforehand.

    With calibration data, what the criterion asks for, else ``None``: ``maps``, the feature maps right after the layers
    that write the group, before norm and activation; ``activations``, the same maps behind the activation function;
    ``products``: ``[C]``, the mean over batches of ``(sum_w g w)^2`` over the weights ``w`` of the channel's filters,
    ``g`` the gradient of the loss there; ``outputs``, what comes through the channels in the layers that read them;
    ``samples``, the same of some outputs that are drawn.
    """

    name: str
    filters: torch.Tensor
    readers: torch.Tensor
    scales: torch.Tensor
    n_keep: int | None = None
    seed: int = 0
    maps: MapStatistics | None = None
    activations: MapStatistics | None = None
    products: torch.Tensor | None = None
    outputs: OutputMoments | None = None
    samples: OutputMoments | None = None


class Criterion(Protocol):
    """Scores the channels of one group: ``[C]``, higher is kept longer. Only the order inside a group matters to
    uniform pruning; global allocation normalises."""

    def __call__(self, view: GroupView, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Budget:
    """What the pruned network may cost.

    Exactly one of ``keep`` (fraction of the dense cost) and ``at_most`` (absolute: MACs of one example, parameters,
    channels, bytes of memory, or milliseconds of latency). The result lies within [0.99, 1.00] of it where the groups
    allow, and never above. Every pruned group keeps at least ``min_channels``; kept widths are multiples of
    ``round_to`` (the dense width itself is always allowed).

    Memory is what the activations of ``batch`` examples need at once in inference, each freed after its last use: what
    ``measure(...).memory`` finds. Latency is that of ``batch`` examples in an ``engine`` on ``threads`` threads.
    """

    keep: float | None = None
    at_most: float | None = None
    of: Literal["macs", "params", "channels", "memory", "latency"] = "macs"
    min_channels: int = 1
    round_to: int = 1
    engine: str | None = None
    batch: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Edit:
    """One structural change besides slicing, replayed in order by ``apply`` and ``load``.

    ``kind="attribute"``: on the module ``target`` the integer, or tuple of integers, ``name`` becomes ``value``.
    ``kind="graph"``: the captured graph with its constants recomputed stands for the user's module (no target).
    ``kind="bias"``: the convolution or linear layer ``target``, which had no bias, has one of ``value`` zeros, as many
    as the pruned layer has outputs. ``kind="scatter"``: the output of the module ``target`` gets its full width along
    ``axis``; ``value`` has for each position of it the number of what is there, -1 for what is zero, or a constant if
    ``name`` says so. ``kind="gather"``: the module ``target`` reads of its input nothing but the positions ``value``
    along ``axis``. ``kind="constant"``: the convolution ``target`` reads one more channel, of ones, by a kernel of the
    shape ``value`` (``wiring.py``). Later kinds (a stripe convolution) are reserved.
    """

    kind: str
    target: str
    name: str = ""
    value: int | tuple[int, ...] | None = None
    axis: int | None = None


@dataclass(frozen=True)
class Turnover:
    """What one choice of the channels that are zero, while a network trains, changed about the choice before it.

    ``epoch``: how many epochs were over. ``entered`` and ``left``: ``{group: channels}``, sorted, for the groups that
    have any: what is chosen now and was not, and what was chosen and is not any more.
    """

    epoch: int
    entered: Mapping[str, tuple[int, ...]]
    left: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Timing:
    """How long one batch takes, in milliseconds: the median of ``runs`` runs, the quartiles below and above it, and the
    ``least``, which is what an undisturbed machine would take."""

    ms: float
    low: float
    high: float
    least: float
    runs: int


@dataclass(frozen=True)
class Measurement:
    """What a network costs and how well it does.

    ``macs``: of one example. ``latency_ms``: the median of one batch in ``engine``; ``memory``: bytes, the peak of the
    activations of one batch (``memory.py`` says of what); ``training_ms``: median of one batch forward and backward.
    ``details``: threads, batch, number of runs, quartiles, the engine's version and its difference to torch.
    """

    params: int
    macs: int
    accuracy: float | None = None
    latency_ms: float | None = None
    engine: str = ""
    device: str = "cpu"
    memory: int | None = None
    training_ms: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)


Evaluate = Callable[[torch.nn.Module], float]
"""The user's own measure of quality: a model in eval mode to a number, higher is better."""


class Epochs(Protocol):
    """Batches ``(inputs, targets)`` whose order and randomness depend on nothing but the number of the epoch.

    ``epoch(number, start)`` gives this process's part of every batch of that epoch from batch ``start`` on, so that
    interrupted training goes on where it was; ``len`` is the number of batches in an epoch, the same in every process.
    """

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Any, torch.Tensor]]: ...
