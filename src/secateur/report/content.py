"""What a report says, as plain data: rows of networks, rows of layers, norms of filters, and the circumstances.

Drawing and writing are elsewhere (``figures``, ``page``); the command line prints its tables from the same rows.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata

import numpy as np
import torch
from torch import nn

from secateur.core import Turnover
from secateur.operations import Layer
from secateur.sensitivities import Sensitivity


@dataclass(frozen=True)
class Row:
    """One network in the summary. ``accuracy`` is a fraction, ``size`` bytes on disk, ``latencies_ms`` milliseconds of
    one batch by engine, ``memory`` bytes of its activations at their peak; None, or no entry, is "not measured"."""

    name: str
    params: int
    macs: int
    accuracy: float | None = None
    size: int | None = None
    latencies_ms: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None

    @property
    def fastest(self) -> tuple[str, float] | None:
        """The engine that runs it fastest, with its milliseconds; None where nothing was timed."""
        timed = [(ms, engine) for engine, ms in self.latencies_ms.items()]
        return min(timed)[::-1] if timed else None


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after. ``channels``, ``macs`` and ``params`` are ``(before, after)`` pairs."""

    name: str
    kind: str
    map_size: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """How one training went, an entry an epoch: mean training loss, and accuracy on the validation images (a fraction,
    None where it was not taken)."""

    name: str
    loss: Sequence[float]
    accuracy: Sequence[float | None]


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of the convolution ``layer`` from the largest L1 norm on: ``images [O, K, L, 3]`` uint8, 127 or 128
    where a weight is 0; ``norms [O]``; and ``order [O]``, their places in the weight."""

    layer: str
    images: np.ndarray
    norms: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class Zeroed:
    """Which filters were zero while a network trained: what every choice of them changed about the one before it, and
    how many ``channels`` each group has."""

    channels: Mapping[str, int]
    history: Sequence[Turnover]


@dataclass(frozen=True)
class Whole:
    """Groups that stay as wide as they are, for one reason: the names of the groups, the channels of all of them
    together, and why. ``locked``: they cannot be pruned; else they could, and were not."""

    groups: tuple[str, ...]
    channels: int
    why: str
    locked: bool = True


@dataclass(frozen=True)
class Report:
    """All that one run tells. The first of ``rows`` is the dense network; the row named ``final`` (the last, if none
    is named) is the one it was all for, and is compared with it.

    ``norms``: layer -> norms of its filters, sorted from the largest and divided by it (Li et al. 2017, figure 2a).
    ``curves``: every training of the run, in its order. ``sensitivity``: how the dense network does when one group
    alone is pruned (figure 2b). ``filters``: those of its first layer (figure 5). ``zeroed``: which filters were zero
    while it trained. ``whole``: what did not get narrower, and why. ``images``: how many the accuracies are of.
    ``timing``: how latencies were taken, as a sentence. ``law``, ``facts`` and ``environment`` are shown as they are,
    name beside value.
    """

    title: str
    rows: Sequence[Row]
    layers: Sequence[LayerRow]
    norms: Mapping[str, np.ndarray]
    final: str = ""
    curves: Sequence[Curve] = ()
    sensitivity: Sensitivity | None = None
    filters: Filters | None = None
    zeroed: Zeroed | None = None
    whole: Sequence[Whole] = ()
    images: int = 0
    timing: str = ""
    law: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def dense(self) -> Row:
        """The network that all others are compared with."""
        return self.rows[0]

    @property
    def outcome(self) -> Row:
        """The network that it was all for."""
        return next((row for row in self.rows if row.name == self.final), self.rows[-1])


def engines_of(rows: Sequence[Row]) -> list[str]:
    """The engines that any of the networks was timed in."""
    return list(dict.fromkeys(engine for row in rows for engine in row.latencies_ms))


def layer_rows(dense: Sequence[Layer], small: Sequence[Layer]) -> list[LayerRow]:
    """The layers of ``dense`` in its order, each beside the layer of the same name in ``small``.

    A layer that runs several times in one pass is one row: its MACs add up, its parameters are there once. A layer that
    is gone from ``small`` has 0 after it.
    """
    before, after = _merged(dense), _merged(small)
    rows = []
    for name, old in before.items():
        new = after.get(name)
        rows.append(
            LayerRow(
                name=name,
                kind=old.kind,
                map_size=size_text(old.map_size),
                channels=(old.out_channels, new.out_channels if new else 0),
                macs=(old.macs, new.macs if new else 0),
                params=(old.params, new.params if new else 0),
            )
        )
    return rows


def size_text(map_size: Sequence[int]) -> str:
    """``(32, 32)`` as ``32x32``; a layer without a map is ``1``."""
    return "x".join(str(n) for n in map_size) or "1"


def filter_norms(model: nn.Module) -> dict[str, np.ndarray]:
    """Convolution -> L1 norms of its filters over the largest of them, in falling order, ``[O]`` each.

    Li et al. 2017, figure 2a: a flat curve has no filters that are clearly dispensable, a steep one has many.
    """
    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            sums = module.weight.detach().double().abs().flatten(1).sum(1).sort(descending=True).values.cpu().numpy()
            norms[name] = sums / sums[0] if sums[0] > 0 else sums
    return norms


def environment() -> dict[str, str]:
    """The machine and the versions that a figure of this run depends on."""
    found = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "system": platform.system()}
    processor = _processor()
    if processor:
        found["processor"] = processor
    found["threads"] = str(torch.get_num_threads())
    found["python"] = platform.python_version()
    for package in ("secateur", "torch", "numpy", "scipy", "onnx", "onnxruntime", "openvino"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _merged(layers: Sequence[Layer]) -> dict[str, _Merged]:
    merged: dict[str, _Merged] = {}
    for layer in layers:
        seen = merged.get(layer.name)
        merged[layer.name] = _Merged(
            kind=layer.kind,
            map_size=tuple(layer.map_size),
            out_channels=layer.out_channels,
            macs=int(layer.macs) + (seen.macs if seen else 0),
            params=seen.params if seen else int(layer.params),
        )
    return merged


@dataclass(frozen=True)
class _Merged:
    kind: str
    map_size: tuple[int, ...]
    out_channels: int
    macs: int
    params: int
