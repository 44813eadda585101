"""Networks, recipes and processes for the tests of runs: small enough that a whole run takes a second or two.

``Warm`` is a process that has imported and warmed up everything and forks for each command: the command is a process of
its own, that can be killed like any other, without seconds of imports before it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def small(classes: int = 10, width: int = 8) -> nn.Module:
    """Two convolutions with batch norm, for digits of 8x8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 12, 3, 2, 1),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, classes),
    )  # fmt: skip


def grouped() -> nn.Module:
    """The same with group norm: no example sees another."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1),
        nn.GroupNorm(2, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def shuffled() -> nn.Module:
    """Channels change places, so that cutting it leaves a captured graph."""
    from networks.architectures import ShuffleUnit

    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), ShuffleUnit(12), ShuffleUnit(12),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def plain() -> nn.Module:
    """No norms, and so no scales."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


class Around(nn.Module):
    """A body with an identity around it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def added() -> nn.Module:
    """A residual sum."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Around(nn.Conv2d(8, 8, 3, padding=1)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def unvalidated() -> Any:
    """Digits, of which none are held out for validation."""
    from dataclasses import replace

    from secateur.zoo.data import DataSettings, open_data

    data = open_data(DataSettings("digits", batch=64, size=8, validation=0))
    return replace(data, name="unvalidated")


def flat() -> nn.Module:
    """Not class scores."""
    return nn.Conv2d(1, 3, 1)


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of all phases but export and report, which take seconds."""
    values: dict[str, Any] = {
        "model": {"name": "tiny_runs:small"},
        "data": {"name": "digits", "batch": 64, "size": 8, "limit": 512},
        "train": {"epochs": 2, "lr": 0.1},
        "prune": {},
        "compensate": {"batches": 2},
        "finetune": {"epochs": 2, "lr": 0.05},
        "measure": {"latency": False},
        "export": {"onnx": False, "report": False},
        "checkpoint_every": 2,
    }
    return {**values, **changes}


def write(path: Path, values: Mapping[str, Any]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(values))
    return path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}


def until(there: Callable[[], bool], process: Any = None, seconds: float = 120.0) -> bool:
    """Wait until something is there; False if the process ended before."""
    end = time.monotonic() + seconds
    while not there():
        if process is not None and process.ended():
            return False
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)
    return True


class Command:
    """A command under way in a process of its own."""

    def __init__(self, warm: Warm, pid: int, output: Path) -> None:
        self.warm, self.pid, self.output = warm, pid, output
        self.status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            self.status = self.warm.ask({"poll": self.pid})
        return self.status is not None

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        while not self.ended():
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def text(self) -> str:
        return self.output.read_text()


class Warm:
    """See the file's docstring."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert self.ask({"ready": True})

    def start(self, *arguments: object) -> Command:
        self.count += 1
        output = self.folder / f"{self.count}.out"
        pid = self.ask({"start": [str(argument) for argument in arguments], "output": str(output)})
        return Command(self, pid, output)

    def run(self, *arguments: object, code: int = 0) -> str:
        command = self.start(*arguments)
        assert command.wait() == code, command.text()
        return command.text()

    def ask(self, what: Mapping[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


@contextmanager
def warm(folder: Path) -> Iterator[Warm]:
    server = Warm(folder)
    try:
        yield server
    finally:
        server.close()


def _serve() -> None:
    torch.set_num_threads(1)
    import secateur as sc
    from secateur.cli import main
    from secateur.zoo.data import open_data

    for name in ("accelerate", "tensorboard", "torch.utils.tensorboard", "secateur.recipes"):
        importlib.import_module(name)
    open_data("digits")
    graph = sc.trace(small().eval(), torch.zeros(1, 1, 8, 8))
    sc.apply(graph, sc.plan(graph, ratios=0.5))  # no training: autograd does not go with a fork
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Any = True
        if "start" in asked:
            answer = os.fork()
            if answer == 0:
                handle = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for standard in (1, 2):
                    os.dup2(handle, standard)
                os.close(0)
                sys.argv = ["secateur", *asked["start"]]
                main()
                os._exit(0)
        elif "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
