"""How much of what pruning costs comes back, and by what: ResNet-20 on Fashion-MNIST at half and a quarter of its MACs.

    python benchmarks/recovery.py                 three seeds on few images; results/recovery.json and recovery.md
    python benchmarks/recovery.py --full          all 60,000 images and long training, for a GPU
    python benchmarks/recovery.py --seeds 0 --again     others may work on other seeds at the same time

For every seed a dense network is trained, pruned by L1 norm to each budget, and measured straight after the cut, under
every combination of {nothing, bias absorption, least squares} x {batch norms recalibrated last, or not}; then after a
short fine-tune from several of these starts, with distillation, with filters removed at random, and beside the same
small architecture trained from scratch for as many epochs as the dense network and its fine-tune had together. All
accuracies are of test images, by which nothing was chosen. A cell that is in the result file already is
not computed again, and a training that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import common
import secateur as sc
from common import RESULTS, Row
from secateur.measurement import accuracy
from secateur.recover import Objective, Run, Training, compensate_, distil, fit_
from secateur.zoo.data import Data, DataSettings, open_data
from secateur.zoo.names import build

MODEL = "zoo:resnet20"
BUDGETS = (0.5, 0.25)
READERS = ("none", "bias", "least-squares")
CACHE = RESULTS.parent / "build" / "recovery"


@dataclass(frozen=True)
class Size:
    """How much is trained. ``images``: of the training set, None for all; epochs of the dense network and of tuning;
    batches of 128 to calibrate with, and at most to test on."""

    images: int | None
    dense: int
    tune: int
    calibration: int
    test: int


SMALL = Size(images=6_000, dense=10, tune=2, calibration=8, test=40)
FULL = Size(images=None, dense=60, tune=20, calibration=16, test=10**6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--full", action="store_true", help="all images and long training")
    options.add_argument("--again", action="store_true", help="forget the cells of these seeds first")
    options.add_argument("--root", default=None, help="where Fashion-MNIST lies, if not in the usual places")
    given = options.parse_args()
    seeds = [int(text) for text in given.seeds.split(",")]
    name = "recovery_full" if given.full else "recovery"
    found = Cells(RESULTS / f"{name}.json", "python benchmarks/recovery.py" + (" --full" if given.full else ""))
    if given.again:
        found.forget(seeds)
    for seed in seeds:
        run_seed(found, seed, FULL if given.full else SMALL, given.root)
        found.write_table()


class Cells:
    """The result file: ``cells[seed][budget][what]``, written after every cell."""

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        head = {**common.header(command), "times": "seconds of wall time"}
        head["machine"] = head["machine"].replace("one thread", f"{torch.get_num_threads()} thread(s) a process")
        if torch.cuda.is_available():
            head["machine"] = f"{torch.cuda.get_device_name()}; {head['machine']}"
        self.found: Row = json.loads(path.read_text()) if path.exists() else {"cells": {}}
        self.found["header"] = head

    def forget(self, seeds: Sequence[int]) -> None:
        self._keep(lambda cells: [cells.pop(str(seed), None) for seed in seeds])

    def _keep(self, change: Callable[[Row], object]) -> None:
        """Change the cells on file: other processes may be at work on other seeds."""
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self.found["cells"] = json.loads(self.path.read_text())["cells"]
            change(self.found["cells"])
            common.write_json(self.path, self.found)

    def cell(self, seed: int, budget: str, what: str, compute: Callable[[], float]) -> float:
        """The accuracy that is on file, or ``compute()``, put on file."""
        row = self.found["cells"].get(str(seed), {}).get(budget, {})
        if what not in row:
            start = time.perf_counter()
            value = {"accuracy": compute(), "seconds": round(time.perf_counter() - start, 1)}
            self._keep(lambda cells: cells.setdefault(str(seed), {}).setdefault(budget, {}).update({what: value}))
            row = self.found["cells"][str(seed)][budget]
            print(f"seed {seed}  {budget:>5}  {what:<44} {100 * row[what]['accuracy']:.2f} %", flush=True)
        return float(row[what]["accuracy"])

    def say(self, key: str, value: object) -> None:
        self.found.setdefault("settings", {})[key] = value

    def write_table(self) -> None:
        """The markdown table: a row for each way, a column for each budget, mean ± standard deviation in points."""
        cells = self.found["cells"]
        seeds = sorted(cells)
        names = list(dict.fromkeys(what for seed in seeds for b in BUDGETS for what in cells[seed].get(str(b), {})))
        rows: list[list[object]] = []
        for what in names:
            found = [[cells[s].get(str(b), {}).get(what) for s in seeds] for b in BUDGETS]
            rows.append([what, *[_spread([cell["accuracy"] for cell in column if cell]) for column in found]])
        dense = _spread([cells[s]["dense"]["dense"]["accuracy"] for s in seeds])
        text = "# What comes back, and by what\n\n" + common.head_of(self.found["header"])
        text += common.head_of({**self.found.get("settings", {}), "seeds": ", ".join(seeds), "dense": f"{dense} %"})
        text += "\nTest accuracy in %, mean ± standard deviation over the seeds.\n\n"
        text += common.markdown(["", *[f"{100 * b:.0f} % of the MACs" for b in BUDGETS]], rows)
        common.write(self.path.with_suffix(".md"), text)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = 100 * statistics.fmean(values)
    return f"{mean:.2f} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


# ---------------------------------------------------------------------------------------------- one seed


def run_seed(found: Cells, seed: int, size: Size, root: str | None) -> None:
    settings = DataSettings(name="fashion-mnist", root=root, batch=128, limit=size.images, validation=1000)
    data = open_data(settings, seed=seed)
    training = Training(epochs=size.dense, lr=0.1, schedule="one-cycle", weight_decay=5e-4, seed=seed)
    tuning = replace(training, epochs=size.tune, lr=0.05)
    data = replace(data, test=data.test.first(size.test))
    calibrated = f"{size.calibration * 128} of them to calibrate with"
    found.say("images", f"{data.train.samples} to train on, {calibrated}, {data.test.samples} to test")
    found.say("training", f"{training}; fine-tuning: {size.tune} epochs, lr {tuning.lr}")

    dense = fresh(seed)
    trained(dense, data, training, f"seed{seed}-dense-{size.images}")
    found.cell(seed, "dense", "dense", lambda: accuracy(dense, data.test))
    for keep in BUDGETS:
        run_budget(found, seed, keep, Setting(dense, data, training, tuning, size))


@dataclass(frozen=True)
class Setting:
    """What all cells of one seed share."""

    dense: nn.Module
    data: Data
    training: Training
    tuning: Training
    size: Size


def run_budget(found: Cells, seed: int, keep: float, at: Setting) -> None:
    example = torch.zeros(1, *at.data.shape)
    budget = sc.Budget(keep=keep, of="macs")
    plan = sc.plan(at.dense, example, criterion="l1", budget=budget)
    calibration = at.data.calibration.first(at.size.calibration)

    @functools.cache
    def compensated(readers: str, batchnorm: bool) -> nn.Module:
        small = sc.apply(at.dense, plan, check=False)
        if readers != "none" or batchnorm:
            compensate_(small, at.dense, plan, calibration, readers=readers, batchnorm=batchnorm)
        return small

    def start(readers: str, batchnorm: bool) -> nn.Module:
        return copy.deepcopy(compensated(readers, batchnorm))

    def score(what: str, make: Callable[[], nn.Module]) -> None:
        found.cell(seed, str(keep), what, lambda: accuracy(make(), at.data.test))

    def tuned(
        small: nn.Module, tag: str, objective: Objective | None = None, training: Training = at.tuning
    ) -> nn.Module:
        return trained(small, at.data, training, f"seed{seed}-{keep}-{tag}", objective=objective)

    for readers in READERS:
        for batchnorm in (False, True):
            what = f"L1, {readers}{', batch norms recalibrated' if batchnorm else ''}"
            score(what, lambda r=readers, b=batchnorm: start(r, b))  # type: ignore[misc]
    score("L1, fine-tuned", lambda: tuned(start("none", False), "l1"))
    score("L1, least-squares, batch norms recalibrated, fine-tuned", lambda: tuned(start("least-squares", True), "ls"))
    score("L1, fine-tuned, distilled", lambda: tuned(start("none", False), "kd", distil(at.dense)))
    best = "L1, least-squares, batch norms recalibrated, fine-tuned, distilled"
    score(best, lambda: tuned(start("least-squares", True), "ls-kd", distil(at.dense)))
    # softened by T, the teacher's gradient is up to T times that of the labels: a quarter of the rate, for both alike
    slow = replace(at.tuning, lr=at.tuning.lr / 4)
    score(
        "L1, least-squares, batch norms recalibrated, fine-tuned at a quarter of the rate",
        lambda: tuned(start("least-squares", True), "ls-slow", None, slow),
    )
    score(
        f"{best} at a quarter of the rate",
        lambda: tuned(start("least-squares", True), "ls-kd-slow", distil(at.dense), slow),
    )
    random = sc.plan(at.dense, example, criterion="random", budget=budget, seed=seed)
    score("random", lambda: sc.apply(at.dense, random, check=False))
    score("random, fine-tuned", lambda: tuned(sc.apply(at.dense, random, check=False), "random"))
    long = replace(at.training, epochs=at.size.dense + at.size.tune)
    scratch = "from scratch, as many epochs as dense and fine-tuned together"
    score(scratch, lambda: tuned(sc.apply(fresh(seed + 1000), plan, check=False), "scratch", None, long))


def fresh(seed: int) -> nn.Module:
    """An untrained network."""
    torch.manual_seed(seed)
    return build(MODEL, classes=10, in_channels=1).to(DEVICE)


def trained(
    model: nn.Module, data: Data, training: Training, tag: str, *, objective: Objective | None = None
) -> nn.Module:
    """``model`` trained in place, or with the weights that an earlier run trained under this tag."""
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


if __name__ == "__main__":
    main()
