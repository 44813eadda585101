"""Small networks, data and whole training runs for the tests of training, also to be run as processes of their own.

python tests/training_cases.py CASE FOLDER           one run of a case, which goes on from FOLDER
python tests/training_cases.py crash CASE FOLDER N   the same, killed N times on the way (see ``crash``)
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.processes import part
from secateur.recover import Epoch, Hooks, Run, Training, fit_

Pair = tuple[torch.Tensor, torch.Tensor]


def net(norm: str = "batch", classes: int = 3, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8), "none": nn.Identity()}
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        norms[norm],
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def images(n: int = 48, classes: int = 3) -> Pair:
    """Kinds of images that differ in brightness: easy to learn, impossible to get right by chance."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(n) % classes
    return torch.randn(n, 1, 6, 6, generator=generator) * 0.1 + targets[:, None, None, None] - 1, targets


def blobs(n: int = 48, batch: int = 16) -> list[Pair]:
    inputs, targets = images(n)
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


@dataclass(frozen=True)
class Shuffled:
    """Re-iterable data in an order and with noise from every global generator there is, anew each time."""

    n: int = 50
    batch: int = 8

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch)

    def __iter__(self) -> Iterator[Pair]:
        inputs, targets = images(self.n)
        for chosen in torch.randperm(self.n).split(self.batch):
            noise = torch.randn(len(chosen), 1, 6, 6) * 0.1 + random.random() + np.random.rand()
            yield inputs[chosen] + noise, targets[chosen]


@dataclass(frozen=True)
class Numbered:
    """Data that obey ``core.Epochs``; ``skips``: an empty part is left out."""

    n: int = 50
    batch: int = 8
    skips: bool = False

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch)

    def epoch(self, number: int, start: int = 0) -> Iterator[Pair]:
        inputs, targets = images(self.n)
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(number))
        for chosen in order.split(self.batch)[start:]:
            mine = chosen[part(len(chosen))]
            if len(mine) or not self.skips:
                yield inputs[mine], targets[mine]


def loader(workers: int = 0) -> DataLoader[Any]:
    """A DataLoader with a generator of its own, which goes on from epoch to epoch."""
    return DataLoader(
        TensorDataset(*images(50)), 8, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(3)
    )


@dataclass
class Fading:
    """A method with a memory: every step shrinks the first weight by what it counted, and a running mean of it."""

    steps: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(8))

    def hooks(self) -> Hooks:
        return Hooks(self._penalty, self._backward, self._step, self._epoch, self._state, self._restore)

    def _penalty(self, model: nn.Module) -> torch.Tensor:
        return 1e-4 * (self.steps % 7) * model[0].weight.square().sum()  # type: ignore[index, operator, union-attr]

    def _backward(self, model: nn.Module) -> None:
        model[0].weight.grad[0] *= 0.9  # type: ignore[index, operator, union-attr]

    @torch.no_grad()
    def _step(self, model: nn.Module) -> None:
        self.steps += 1
        weight = model[0].weight  # type: ignore[index, union-attr]
        self.mean.lerp_(weight.flatten(1).mean(1), 0.1)  # type: ignore[operator]
        weight -= 1e-3 * self.mean[:, None, None, None]  # type: ignore[operator]

    @torch.no_grad()
    def _epoch(self, model: nn.Module) -> None:
        model[0].weight[0] *= 0.5  # type: ignore[index, operator, union-attr]

    def _state(self) -> Mapping[str, Any]:
        return {"steps": self.steps, "a/mean": self.mean}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.steps, self.mean = int(state["steps"]), state["a/mean"].clone()


FULL = Training(
    epochs=3, lr=0.05, warmup=1.0, label_smoothing=0.1, mixup=0.4, clip=1.0, accumulate=2, ema=0.8, keep="best", seed=5
)
CASES: dict[str, Callable[[], tuple[Any, Training]]] = {
    "shuffled": lambda: (Shuffled(), FULL),
    "loader": lambda: (loader(), Training(epochs=3, lr=0.01, optimizer="adamw", schedule="one-cycle")),
    "workers": lambda: (loader(workers=2), Training(epochs=3, lr=0.05)),
    "numbered": lambda: (Numbered(), Training(epochs=3, lr=0.05, schedule="step", precision="bf16", accumulate=2)),
}


def train(
    case: str, folder: Path | None, *, every: int = 1, progress: Any = None, log: Any = None
) -> tuple[nn.Module, list[Epoch]]:
    """A whole run of a case: dropout, batch norm, hooks with a state, evaluation that draws from chance."""
    data, training = CASES[case]()
    model = net(dropout=0.3)

    def evaluate(model: nn.Module) -> float:
        torch.rand(3), random.random(), np.random.rand()
        with torch.no_grad():
            inputs, targets = images(24)
            # the worst is best: the first epoch's weights must be remembered to the end
            return float(nn.functional.cross_entropy(model(inputs), targets))

    run = Run(folder=folder, every=every, progress=progress, log=log)
    history = fit_(model, data, training, evaluate=evaluate, hooks=[Hooks(), Fading().hooks()], run=run)
    return model, history


def outcome(case: str, folder: Path, **options: Any) -> bytes:
    """Everything that a run must give again: the weights and the history, as bytes in ``folder / "out"``."""
    model, history = train(case, folder / "checkpoints", **options)
    out = folder / "out.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, out)
    written = out.read_bytes() + repr(history).encode()
    (folder / "out").write_bytes(written)
    return written


def crash(case: str, folder: Path, kills: int) -> None:
    """Runs a case to its end in ``folder / "whole"``, then in ``folder / "killed"`` in child processes that are killed
    (SIGKILL) ``kills`` times, and to its end; prints the steps at which they died. Every other child dies at a moment
    chosen at random, the rest at a file operation chosen at random: most of them belong to checkpoints."""
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
    outcome(case, folder / "whole")
    draw = random.Random(case)
    died: list[int] = []
    while True:
        reader, writer = os.pipe()
        # operation 3 opens the second of a checkpoint's two files; 13 of them write one and delete the last
        fatal = (3 if len(died) == 1 else draw.randint(2, 14)) if len(died) % 2 and len(died) < kills else 0
        child = os.fork()
        if not child:
            os.close(reader)
            die_at_file_operation(fatal)
            outcome(case, folder / "killed", progress=partial(tell, writer))
            os._exit(0)
        os.close(writer)
        told = b""
        for _ in range(draw.randint(1, 4) if len(died) < kills and not fatal else 1000):
            told += os.read(reader, 1)
        if len(died) < kills and not fatal:
            time.sleep(draw.random() * 0.03)  # a step takes some 10 ms, most of it the checkpoint
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reader)
        if os.WIFEXITED(status):
            assert status == 0
            break
        died.append(max(told, default=0))
    print(json.dumps(died))


def tell(writer: int, done: int, total: int, facts: Mapping[str, float]) -> None:
    os.write(writer, bytes([done]))


def die_at_file_operation(number: int) -> None:
    """Kill this process at the ``number``-th operation on a checkpoint's files, just before it is done."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            if "step-" in str(arguments[0]) or event in ("os.remove", "os.rmdir"):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    if number:
        sys.addaudithook(watch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "crash":
        crash(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        outcome(sys.argv[1], Path(sys.argv[2]))
