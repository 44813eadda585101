"""Where a training run stands: all that a checkpoint must hold so that it can go on as if never interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.recover.hooks import Hooks
from secateur.recover.randomness import Randomness, Stream, randomness, set_randomness
from secateur.recover.settings import Training

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step with (steps done, steps in all, facts): ``loss`` (of the last steps), ``accuracy`` (of the
epoch so far) and ``images_per_s`` once they were looked at, and ``score`` once there is one."""

Log = Callable[[Mapping[str, Any]], None]
"""Called with a record of plain values: ``kind`` ("step" or "epoch"), ``step`` (steps done), ``epoch``, and what they
came to."""


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss and accuracy (in train mode, while learning), and what ``evaluate`` said."""

    number: int
    loss: float
    train_accuracy: float
    score: float | None = None


@dataclass(frozen=True)
class Run:
    """How training is kept and shown.

    ``folder``: checkpoints live there, on a disk that all processes see; if there is one, training goes on from it.
    ``every``: steps between checkpoints; there is also one at every epoch's end. ``log`` (a record per epoch and per 50
    steps) and ``progress`` are called in the main process only. ``cpu``: stay there even if there is a GPU.
    """

    folder: str | os.PathLike[str] | None = None
    every: int = 200
    log: Log | None = None
    progress: Progress | None = None
    cpu: bool = False


@dataclass
class State:
    """``step``: optimiser steps done. ``epoch``: epochs done. ``batch``: batches of the running one that are done, with
    ``sums`` of loss, right answers and examples so far. ``begun``: randomness at its start. ``best``: weights."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[Epoch] = field(default_factory=list)
    best_score: float | None = None
    best: dict[str, Tensor] | None = None
    begun: Randomness | None = None


@dataclass
class Job:
    """The parts of one training run: what it trains (``net`` is ``model``, wrapped where there are several processes),
    with what, and where it stands."""

    model: nn.Module
    net: nn.Module
    training: Training
    run: Run
    hooks: tuple[Hooks, ...]
    accelerator: Any
    optimizer: torch.optim.Optimizer
    average: torch.optim.swa_utils.AveragedModel | None
    stream: Stream
    generators: dict[str, torch.Generator]
    device: torch.device
    batches: int
    state: State = field(default_factory=State)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches // self.training.accumulate)

    @property
    def epochs(self) -> int:
        return self.training.epochs if self.training.rewind is None else self.training.rewind

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def all_randomness(job: Job) -> Randomness:
    """The state of everything this process draws from: global generators, the data's stream, its own generators."""
    own = {name: generator.get_state() for name, generator in job.generators.items()}
    return {**randomness(job.device), "data": job.stream.state, "own": own}


def set_all_randomness(job: Job, state: Randomness) -> None:
    """Put back what ``all_randomness`` gave."""
    set_randomness(state, job.device)
    job.stream.state = state["data"]
    for name, generator in job.generators.items():
        generator.set_state(state["own"][name])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, detached, tied ones once: also those that ``state_dict`` leaves out."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def set_tensors_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the tensors of ``model``, which stay the same objects."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(values[name])


def kept_weights(job: Job) -> dict[str, Tensor]:
    """The tensors that would be kept now: the moving average's where there is one, else the model's."""
    return tensors_of(job.model if job.average is None else job.average.module)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is infinite or NaN: one pass, one wait."""
    floating = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not floating:
        return True
    norms = torch._foreach_norm(floating, ord=float("inf"))
    return bool(torch.stack([n.to(torch.float64) for n in norms]).isfinite().all())
