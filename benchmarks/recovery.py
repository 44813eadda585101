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
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import common
import secateur as sc
from common import RESULTS
from secateur.measurement import accuracy
from secateur.recover import Objective, Training, compensate_, distil
from secateur.zoo.data import Data
from trials import DENSE, Cells, dense_network, fashion, fresh, spread, trained

MODEL = "resnet20"
BUDGETS = (0.5, 0.25)
READERS = ("none", "bias", "least-squares")


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
        found.write_table("What comes back, and by what", lambda: table(found))


def table(found: Cells) -> str:
    """A row for each way, a column for each budget, mean ± standard deviation in points."""
    columns = [str(budget) for budget in BUDGETS]
    rows = [
        [way, *[spread([*found.values(c, way, "accuracy").values()]) for c in columns]] for way in found.names(columns)
    ]
    dense = spread([*found.values("dense", "dense", "accuracy").values()])
    text = f"Test accuracy in %, mean ± standard deviation over the seeds; dense: {dense}.\n\n"
    return text + common.markdown(["", *[f"{100 * b:.0f} % of the MACs" for b in BUDGETS]], rows)


# ---------------------------------------------------------------------------------------------- one seed


def run_seed(found: Cells, seed: int, size: Size, root: str | None) -> None:
    data = fashion(root, images=size.images, test=size.test, seed=seed)
    training = replace(DENSE, epochs=size.dense, seed=seed)
    tuning = replace(training, epochs=size.tune, lr=0.05)
    calibrated = f"{size.calibration * 128} of them to calibrate with"
    found.say("images", f"{data.train.samples} to train on, {calibrated}, {data.test.samples} to test")
    found.say("training", f"{training}; fine-tuning: {size.tune} epochs, lr {tuning.lr}")

    dense = dense_network(MODEL, data, training, size.images)
    found.cell(seed, "dense", "dense", lambda: {"accuracy": accuracy(dense, data.test)})
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
        found.cell(seed, str(keep), what, lambda: {"accuracy": accuracy(make(), at.data.test)})

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
    score(scratch, lambda: tuned(sc.apply(fresh(MODEL, seed + 1000), plan, check=False), "scratch", None, long))


if __name__ == "__main__":
    main()
