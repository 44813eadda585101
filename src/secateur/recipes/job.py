"""What every phase of a run has at hand, and how the main process does what only one may do."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from secateur.core import Evaluate
from secateur.errors import SecateurError
from secateur.measurement import accuracy
from secateur.processes import from_main, is_main
from secateur.recipes import folder as folders
from secateur.recipes.folder import RunFolder
from secateur.recipes.metrics import Record
from secateur.recipes.networks import Origin
from secateur.recipes.schema import Recipe
from secateur.zoo.data import Data, Loader

T = TypeVar("T")
Facts = dict[str, Any]
Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with (steps done, steps in all, facts: loss, accuracy, images_per_s, score)."""


def _silent_phase(title: str) -> AbstractContextManager[Progress]:
    return contextlib.nullcontext(lambda done, total, facts: None)


@dataclass(frozen=True)
class Tell:
    """How a run speaks. ``say``: a line between phases. ``phase``: shows that a phase runs while its context is open,
    which gives what to call with its progress."""

    say: Callable[[str], None] = lambda text: None
    phase: Callable[[str], AbstractContextManager[Progress]] = _silent_phase


SILENT = Tell()


@dataclass(frozen=True)
class Job:
    """A run under way. ``done``: the facts of the phases that are done, in order. ``cpu``: stay there.
    ``memo``: what can be made again, and need not be."""

    recipe: Recipe
    folder: RunFolder
    data: Data
    origin: Origin
    tell: Tell
    record: Record
    cpu: bool = False
    done: dict[str, Facts] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where networks are trained and evaluated."""
        if self.cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def seed(self, *names: object) -> int:
        """A seed of its own for every purpose, from the recipe's."""
        return derived_seed(self.recipe.seed, *names)

    def say(self, text: str) -> None:
        """Tell the user, and the log, in the main process."""
        if is_main():
            folders.log(self.folder, text)
            self.tell.say(text)


@dataclass(frozen=True)
class Phase:
    """``name``: unique in a run, and that of its files. ``title``: for people. ``act`` does it, in all processes, and
    returns facts as plain values."""

    name: str
    title: str
    act: Callable[[Job, Progress], Facts]


def derived_seed(seed: int, *names: object) -> int:
    """A number below 2^31 that depends on the seed and the names, and on nothing else."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def on_main(act: Callable[[], T]) -> T:
    """What ``act`` returns in the main process, in every process (plain data only); an error of ours is raised in all
    of them. All must call it."""
    result: tuple[Any, SecateurError | None] = None, None
    if is_main():
        try:
            result = act(), None
        except SecateurError as error:
            result = None, error
    value, raised = from_main(result)
    if raised is not None:
        raise raised
    return value


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """``model`` on ``device`` within the block, and back on the CPU after it."""
    model.to(device)
    try:
        yield model
    finally:
        model.to("cpu")


def evaluation(job: Job) -> Evaluate | None:
    """Accuracy on the held-out images, on the device where the model is; None where the recipe holds none out. All
    processes must call it."""
    if not len(job.data.validation):
        return None
    return lambda model: accuracy(model, job.data.validation, reduce=True)


def accuracy_on(job: Job, model: nn.Module, data: Loader) -> float | None:
    """Accuracy on ``data``, None where they are empty. All processes must call it."""
    if not len(data):
        return None
    with on_device(model, job.device):
        return accuracy(model, data, reduce=True)
