"""What the benchmarks that train share: Fashion-MNIST, dense networks trained only once, and a result file of cells.

A cell is one measured thing. It is written as soon as it is there, a cell that is on file is not computed again, and
several processes may fill one file, each with seeds or networks of its own. Nothing is ever chosen on test images.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import common
from common import RESULTS, Row
from secateur.recover import Objective, Run, Training, fit_
from secateur.zoo.data import Data, DataSettings, open_data
from secateur.zoo.names import build
from secateur.zoo.vgg import VGG16

CACHE = RESULTS.parent / "build" / "recovery"
"""Trained networks; also what several processes lock a result file by."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE = Training(lr=0.1, schedule="one-cycle", weight_decay=5e-4)
"""How dense networks are trained, but for epochs and seed."""
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: build("zoo:resnet20", classes=10, in_channels=1),
    "vgg16": lambda: build(
        "zoo:vgg16_cifar", in_channels=1, widths=[width // 4 for width in VGG16], hidden=128, image_size=28
    ),
}
"""CIFAR's networks for one grey channel; VGG-16 with a quarter of its widths."""


def fashion(root: str | None, *, images: int | None, test: int, seed: int) -> Data:
    """Fashion-MNIST in batches of 128: at most ``images`` to train on (None: all), ``test`` batches to test on."""
    settings = DataSettings(name="fashion-mnist", root=root, batch=128, limit=images, validation=1000)
    data = open_data(settings, seed=seed)
    return replace(data, test=data.test.first(test))


def fresh(network: str, seed: int) -> nn.Module:
    """An untrained network."""
    torch.manual_seed(seed)
    return NETWORKS[network]().to(DEVICE)


def dense_network(network: str, data: Data, training: Training, images: int | None) -> nn.Module:
    """The trained dense network of a seed, which is trained only once."""
    tag = f"seed{training.seed}-dense-{images}" if network == "resnet20" else f"seed{training.seed}-{network}-{images}"
    return trained(fresh(network, training.seed), data, training, tag).eval()


def trained(
    model: nn.Module, data: Data, training: Training, tag: str | None, *, objective: Objective | None = None
) -> nn.Module:
    """``model`` trained in place, or with the weights that an earlier run trained under this tag. An interrupted
    training goes on where it was; without a tag nothing is kept."""
    if tag is None:
        fit_(model, data.train, training, objective=objective)
        return model
    done = CACHE / f"{tag}.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
        return model.eval()
    fit_(model, data.train, training, objective=objective, run=Run(folder=CACHE / tag, every=200))
    CACHE.mkdir(parents=True, exist_ok=True)
    aside = done.with_suffix(".part")
    save_file({name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}, aside)
    aside.replace(done)
    return model


class Cells:
    """The result file: ``cells[seed][column][what]`` is a row of numbers, written as soon as it is there."""

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        head = {**common.header(command), "times": "seconds of wall time"}
        head["machine"] = head["machine"].replace("one thread", f"{torch.get_num_threads()} thread(s) a process")
        if torch.cuda.is_available():
            head["machine"] = f"{torch.cuda.get_device_name()}; {head['machine']}"
        self.found: Row = json.loads(path.read_text()) if path.exists() else {"cells": {}}
        self.found["header"] = head

    def forget(self, seeds: Sequence[int], columns: Sequence[str] | None = None) -> None:
        """Drop what is on file of these seeds, or of these columns only."""

        def drop(cells: Row) -> None:
            for seed in map(str, seeds):
                for column in list(cells.get(seed, {})):
                    if columns is None or column in columns:
                        del cells[seed][column]

        self._keep(drop)

    def drop(self, seed: int, what: str) -> None:
        """Forget ``what`` of this seed in every column."""
        self._keep(lambda cells: [column.pop(what, None) for column in cells.get(str(seed), {}).values()])

    @contextmanager
    def _locked(self) -> Iterator[Row]:
        """The cells as they are on file, where other processes may be at work on other ones."""
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self.found["cells"] = json.loads(self.path.read_text())["cells"]
            yield self.found["cells"]

    def _keep(self, change: Callable[[Row], object]) -> None:
        with self._locked() as cells:
            change(cells)
            common.write_json(self.path, self.found)

    def cell(self, seed: int, column: str, what: str, compute: Callable[[], Mapping[str, float]]) -> Row:
        """The numbers that are on file, or those of ``compute()``, put on file with the seconds that it took."""
        row = self.found["cells"].get(str(seed), {}).get(column, {})
        if what not in row:
            start = time.perf_counter()
            value = {**compute(), "seconds": round(time.perf_counter() - start, 1)}
            self._keep(lambda cells: cells.setdefault(str(seed), {}).setdefault(column, {}).update({what: value}))
            row = self.found["cells"][str(seed)][column]
            shown = {key: f"{100 * v:.2f} %" if abs(v) <= 1 else f"{v:.1f}" for key, v in value.items()}
            told = "  ".join(f"{key} {text}" for key, text in shown.items() if key != "seconds")
            print(f"seed {seed}  {column:>13}  {what:<44} {told}", flush=True)
        return dict(row[what])

    def say(self, key: str, value: object) -> None:
        """A setting, for the head of the table."""
        self.found.setdefault("settings", {})[key] = value

    def values(self, column: str, what: str, key: str) -> dict[str, float]:
        """``{seed: number}`` of all seeds that have this cell."""
        cells = self.found["cells"]
        found = {seed: cells[seed].get(column, {}).get(what, {}).get(key) for seed in sorted(cells)}
        return {seed: value for seed, value in found.items() if value is not None}

    def names(self, columns: Sequence[str]) -> list[str]:
        """Every ``what`` of these columns, in the order in which they were first measured."""
        seeds = self.found["cells"].values()
        return list(dict.fromkeys(what for cells in seeds for column in columns for what in cells.get(column, {})))

    def write_table(self, title: str, body: Callable[[], str]) -> None:
        """The markdown file beside the result file: title, head, and ``body()`` of what is on file now."""
        with self._locked() as cells:
            settings = {**self.found.get("settings", {}), "seeds": ", ".join(sorted(cells))}
            text = f"# {title}\n\n" + common.head_of(self.found["header"]) + common.head_of(settings)
            common.write(self.path.with_suffix(".md"), text + "\n" + body())


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean ± standard deviation in points, of fractions; with ``sign`` also where it is positive."""
    if not values:
        return "–"
    mean, plus = 100 * statistics.fmean(values), "+" if sign else ""
    return f"{mean:{plus}.2f} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:{plus}.2f}"
