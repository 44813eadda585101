"""Batch-norm statistics, taken anew: what a pruned network's activations are is not what its dense one's were.

Every batch norm normalises by the statistics of the current batch, of all processes together, as in train mode, while
nothing else of train mode happens; what it normalised is summed up, and its running mean and variance become those of
all the calibration data (Li et al. 2020, "EagleEye", section 3.3, "adaptive batch normalization", without momentum).
Calls of ``batch_norm`` are seen where they happen, so that modules of any class, functional calls and networks that are
captured graphs are treated alike, without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.capture import all_tensors, canonical_names, in_mode
from secateur.errors import BadRequest
from secateur.graph import as_arguments, unwrap
from secateur.nests import flatten, unflatten
from secateur.processes import sum_over_processes_, world
from secateur.statistics import accumulator, agree, check_repeatable

Progress = Callable[[int], None]
"""Called after each batch with how many are done."""


@dataclass(frozen=True)
class Step:
    """One step of recovery. ``accuracy``: what ``evaluate`` said after it, if it was given. ``changed``: modules whose
    tensors it set; ``skipped``: those it could not, and why; ``notes``: what else there is to know, by module."""

    name: str
    accuracy: float | None = None
    changed: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def recalibrate_(model: nn.Module, data: Iterable[Any], *, progress: Progress | None = None) -> Step:
    """Set the running mean and variance of every batch norm of ``model`` to those of ``data``; returns what was set.

    ``data``: batches of inputs (a tensor, or a dict of keyword arguments) or pairs ``(inputs, targets)``, of which the
    inputs may be a tuple of positional ones; in several processes, this process's part. The statistics are those of
    all batches together, the variance unbiased, as torch keeps it; a batch that has a single value for each channel is
    normalised by the statistics so far. Modes, counters and all other tensors stay as they are. Nothing is changed if
    an error is raised: ``BadRequest`` for data that are empty, do not fit or give activations that are not finite.
    """
    found = statistics_of(model, data, progress)
    for tensor, value in found.values:
        with torch.no_grad():
            tensor.copy_(value)
    return found.step


@dataclass(frozen=True, eq=False)
class Found:
    """Running statistics and their new values, and what to report."""

    values: list[tuple[torch.Tensor, torch.Tensor]]
    step: Step


def statistics_of(model: nn.Module, data: Iterable[Any], progress: Progress | None = None) -> Found:
    """The new statistics of every batch norm; nothing is changed."""
    check_repeatable(data, "recalibration")
    model = unwrap(model)
    tensors = [t for _, t in all_tensors(model)]
    device = tensors[0].device if tensors else torch.device("cpu")
    seen = _Seen(_names(model), device)
    done = 0
    with in_mode(model, False), torch.no_grad():
        for args, kwargs in _together(data, device):
            with seen:
                model(*args, **kwargs)
            done += 1
            if progress is not None:
                progress(done)
    values, changed = [], []
    for name, (mean, variance, sums) in seen.sums.items():
        count, total, squares = sums.unbind()
        n = float(count[0])
        exact = total / n
        spread = (squares / n - exact**2).clamp_min(0) * (n / max(n - 1, 1))
        if not bool(torch.isfinite(exact).all() and torch.isfinite(spread).all()):
            raise BadRequest(
                f"the inputs of batch norm {name!r} are not finite (NaN or infinite) on the calibration data\n"
                "  do: check the data and the network's weights"
            )
        if n < 2:
            raise BadRequest(
                f"batch norm {name!r} saw a single value for each channel: no variance can be taken\n"
                "  do: pass more calibration data"
            )
        values += [(mean, exact.to(mean)), (variance, spread.to(variance))]
        changed.append(name)
    return Found(values, Step("batch norm", changed=tuple(changed), skipped=seen.skipped | _unread(model, seen)))


def _names(model: nn.Module) -> dict[int, str]:
    """``id`` of a running mean -> the module that holds it, or the tensor's own name if it has another."""
    names = canonical_names(model)
    return {id(t): names[name].removesuffix(".running_mean") for name, t in reversed(all_tensors(model))}


def _unread(model: nn.Module, seen: _Seen) -> dict[str, str]:
    """Batch norms of torch's own kind that no call was seen of, or that keep no statistics."""
    skipped = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in seen.sums:
            none = module.running_mean is None
            skipped[name] = "it keeps no running statistics" if none else "it was not called on the calibration data"
    return skipped


def _together(data: Iterable[Any], device: torch.device) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of batch after batch; all processes go on, stop or fail together."""
    batches = iter(data)
    count = 0
    while True:
        found, problem = None, None
        try:
            batch = next(batches, None)
            found = None if batch is None else _arguments(batch, device)
        except Exception as error:
            problem = error
        agree(problem, device)
        there = torch.tensor([float(found is not None)], device=device)
        sum_over_processes_([there])
        if not float(there):
            break
        if found is None or float(there) != world():
            raise BadRequest(
                f"after {count} batches some processes have more data and some have not\n"
                "  do: give every process the same number of batches"
            )
        count += 1
        yield found
    if not count:
        raise BadRequest(
            "data has no batches (an iterator that was read before?)\n  do: pass a DataLoader or a list of batches"
        )


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    args, kwargs = as_arguments(batch[0] if pair else batch)
    tensors, skeleton = flatten((args, dict(kwargs)))
    return unflatten(skeleton, [t.to(device) for t in tensors])


class _Seen(TorchFunctionMode):
    """Answers every batch norm by the statistics of the batch, and sums up its inputs: ``sums``, by module, holds the
    running statistics and ``[3, C]``: count, sum, sum of squares."""

    def __init__(self, names: Mapping[int, str], device: torch.device) -> None:
        super().__init__()
        self.names, self.dtype = names, accumulator(device)
        self.sums: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.skipped: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._normalised(**_bound(_FUNCTIONAL, args, kwargs))
        if func in _ATEN:
            return self._normalised(**_bound(_NATIVE, args, kwargs))
        return func(*args, **kwargs)

    def _normalised(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
        **_: Any,
    ) -> torch.Tensor:
        x = input.to(self.dtype)
        axes = [0, *range(2, x.dim())]
        count = x.new_full((x.shape[1],), x.numel() / max(x.shape[1], 1))
        sums = torch.stack([count, x.sum(axes), (x * x).sum(axes)])
        sum_over_processes_([sums])
        if running_mean is not None and running_var is not None:
            name = self.names.get(id(running_mean), f"batch norm of {x.shape[1]} channels")
            before = self.sums.get(name)
            self.sums[name] = (running_mean, running_var, sums if before is None else before[2] + sums)
        n = float(sums[0, 0])
        mean = sums[1] / n
        variance = (sums[2] / n - mean**2).clamp_min(0)
        if n < 2 and running_mean is not None and running_var is not None:
            mean, variance = running_mean, running_var
        like = running_mean if running_mean is not None else weight if weight is not None else input
        return F.batch_norm(input, mean.to(like), variance.to(like), weight, bias, False, 0.0, eps)


_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NATIVE = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_ATEN = (torch.batch_norm, torch.ops.aten.batch_norm, torch.ops.aten.batch_norm.default)


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}
