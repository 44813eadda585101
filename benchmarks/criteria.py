"""Criteria against each other, and L1 norms chosen independently against greedily, at 30, 50, 70 and 90 % of all groups
of ResNet-20 and of VGG-16 at a quarter of its widths, on Fashion-MNIST.

    python benchmarks/criteria.py                 three seeds on few images; results/criteria.json and criteria.md
    python benchmarks/criteria.py --full          all 60,000 images and long training, for a GPU
    python benchmarks/criteria.py --seeds 2 --networks vgg16     others may work on the rest at the same time

For every seed a dense network is trained, and every criterion removes the same share of every group of it, residual
streams too. Accuracy is measured three times: straight after the cut; with batch norms recalibrated, which needs no
labels; and after a short fine-tune of what was cut. It is that of test images, by which nothing was chosen; criteria
that need data see training images. A cell that is in the result file already is not computed again.

Criteria that look at what the next layers put out (ThiNet) have a benchmark of their own, `thinet.py`.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import common
import secateur as sc
from common import RESULTS
from secateur.calibration import collect
from secateur.criteria import needs_data, reads
from secateur.graph import Graph
from secateur.groups import couple
from secateur.measurement import accuracy
from secateur.recover import Training, recalibrate_
from secateur.scores import score
from secateur.zoo.data import Data
from trials import DENSE, NETWORKS, Cells, dense_network, fashion, spread, trained

RATIOS = (0.3, 0.5, 0.7, 0.9)
GREEDY = "l1, greedy"
CRITERIA = [name for name in sc.CRITERIA if {"outputs", "samples"}.isdisjoint(reads(name))]
"""Those that are compared here."""
TITLES = {"resnet20": "ResNet-20", "vgg16": "VGG-16 at a quarter of its widths"}
STAGES = {
    "cut": "Straight after the cut",
    "recalibrated": "Batch norms recalibrated, nothing trained",
    "tuned": "After a short fine-tune",
}


@dataclass(frozen=True)
class Size:
    """How much is trained. ``images``: of the training set, None for all; epochs of the dense network and of tuning,
    and at most how many batches of 128 an epoch of tuning has (None: all); batches to calibrate with, and at most to
    test on. ``kept``: fine-tuning can be resumed."""

    images: int | None
    dense: int
    tune: int
    batches: int | None
    calibration: int
    test: int
    kept: bool


SMALL = {
    "resnet20": Size(images=6_000, dense=10, tune=1, batches=32, calibration=8, test=12, kept=False),
    "vgg16": Size(images=6_000, dense=10, tune=1, batches=None, calibration=8, test=24, kept=False),
}
FULL = Size(images=None, dense=60, tune=20, batches=None, calibration=64, test=10**6, kept=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--networks", default=",".join(NETWORKS))
    options.add_argument("--criteria", default=None, help="only these, of all and of 'greedy'")
    options.add_argument("--full", action="store_true", help="all images and long training")
    options.add_argument("--again", action="store_true", help="forget the cells of these seeds and networks first")
    options.add_argument("--root", default=None, help="where Fashion-MNIST lies, if not in the usual places")
    given = options.parse_args()
    seeds, networks = [int(text) for text in given.seeds.split(",")], given.networks.split(",")
    name = "criteria_full" if given.full else "criteria"
    found = Cells(RESULTS / f"{name}.json", "python benchmarks/criteria.py" + (" --full" if given.full else ""))
    if given.again:
        found.forget(seeds, [column for network in networks for column in columns(network)])
    rows = {row.removeprefix("l1, "): row for row in [*CRITERIA, GREEDY]}
    wanted = given.criteria.split(",") if given.criteria else [*rows]
    if not rows.keys() >= set(wanted):
        options.error(f"--criteria {given.criteria}: none but {', '.join(rows)}")
    for seed in seeds:
        for network in networks:
            size = FULL if given.full else SMALL[network]
            run_network(found, seed, network, size, root=given.root, rows=[rows[name] for name in wanted])
            found.write_table("Criteria against each other", lambda: table(found))


def columns(network: str) -> list[str]:
    return [f"{network} dense", *[f"{network} {ratio}" for ratio in RATIOS]]


# ---------------------------------------------------------------------------------------------- one network


@dataclass(frozen=True)
class Setting:
    """What all cells of one seed and network share. ``evidence``: what data show, gathered when it is first needed."""

    dense: nn.Module
    graph: Graph
    data: Data
    tuning: Training
    size: Size
    evidence: Callable[[], dict[str, dict[str, Any]]]


def run_network(found: Cells, seed: int, network: str, size: Size, *, root: str | None, rows: list[str]) -> None:
    data = fashion(root, images=size.images, test=size.test, seed=seed)
    training = replace(DENSE, epochs=size.dense, seed=seed)
    tuning = replace(training, epochs=size.tune, lr=0.05)
    calibrated = f"{size.calibration * 128} of them for criteria that need data and for batch norms"
    few = len(data.train) if size.batches is None else size.batches
    short = f"{128 * few} to fine-tune on, {data.test.samples} to test"
    found.say(f"images ({network})", f"{data.train.samples} to train on, {calibrated}, {short}")
    found.say("training", f"{_told(training)}; fine-tuning: {_told(tuning)}")

    dense = dense_network(network, data, training, size.images)
    found.cell(seed, f"{network} dense", "dense", lambda: {"accuracy": accuracy(dense, data.test)})
    graph = sc.trace(dense, torch.zeros(1, *data.shape))
    calibration = data.calibration.first(size.calibration)

    @functools.cache
    def evidence() -> dict[str, dict[str, Any]]:
        coupling = couple(graph)
        wanted = {name for row in CRITERIA if needs_data(row) for name in reads(row)}
        return collect(coupling, coupling.groups, wanted, calibration, loss=torch.nn.functional.cross_entropy)

    at = Setting(dense, graph, data, tuning, size, evidence)
    for ratio in RATIOS:
        for row in rows:
            found.cell(seed, f"{network} {ratio}", row, lambda r=ratio, w=row: run_cell(at, network, w, r))  # type: ignore[misc]


def _told(training: Training) -> str:
    epochs = f"{training.epochs} epoch{'s' * (training.epochs != 1)}"
    return f"{epochs}, {training.schedule} up to lr {training.lr}, weight decay {training.weight_decay}"


def run_cell(at: Setting, network: str, row: str, ratio: float) -> dict[str, float]:
    """The three accuracies of one criterion at one ratio, and the share of the dense network's MACs that is left."""
    plan = plan_of(at, row, ratio)
    small = sc.apply(at.dense, plan, check=False)
    example = torch.zeros(1, *at.data.shape)
    found = {"cut": accuracy(small, at.data.test)}
    recalibrated = copy.deepcopy(small)
    recalibrate_(recalibrated, at.data.calibration.first(at.size.calibration))
    found["recalibrated"] = accuracy(recalibrated, at.data.test)
    tag = f"seed{at.tuning.seed}-{network}-{ratio}-{row.replace(', ', '-')}" if at.size.kept else None
    tuning = at.data
    if at.size.batches is not None:
        tuning = replace(tuning, train=tuning.train.first(at.size.batches))
    found["tuned"] = accuracy(trained(small, tuning, at.tuning, tag), at.data.test)
    found["macs"] = sc.count(small, example).macs / sc.count(at.dense, example).macs
    return found


def plan_of(at: Setting, row: str, ratio: float) -> sc.Plan:
    """The plan of one row. Statistics are gathered once for all: ``sc.plan(..., data=, loss=)`` gathers them anew."""
    if row == GREEDY:
        return sc.plan(at.graph, criterion="l1", ratios=ratio, greedy=True)
    evidence = at.evidence() if needs_data(row) else None
    scores = score(couple(at.graph).groups, at.graph.tensors, row, seed=at.tuning.seed, evidence=evidence)
    return sc.plan(at.graph, criterion=lambda view: scores[view.name], ratios=ratio)


# ---------------------------------------------------------------------------------------------- the table


def table(found: Cells) -> str:
    """For each network three tables, a row for each criterion, a column for each ratio; greedy against independent."""
    text = (
        "Test accuracy in %, mean ± standard deviation over the seeds; `ratios=` so much of every group, residual\n"
        "streams too. The same dense networks in every row of a table.\n"
    )
    for network in NETWORKS:
        dense = found.values(f"{network} dense", "dense", "accuracy")
        if not dense:
            continue
        cut = [f"{network} {ratio}" for ratio in RATIOS]
        names = [row for row in [*CRITERIA, GREEDY] if row in found.names(cut)]
        macs = [spread([*found.values(column, "l1", "macs").values()][:1]) for column in cut]
        text += f"\n## {TITLES[network]}\n\nDense: {spread([*dense.values()])}. MACs left: {', '.join(macs)} %.\n"
        for key, title in STAGES.items():
            rows = [[row, *[spread([*found.values(c, row, key).values()]) for c in cut]] for row in names]
            text += f"\n{title}:\n\n" + common.markdown(["", *[f"{100 * ratio:.0f} %" for ratio in RATIOS]], rows)
        text += f"\n{GREEDY} minus l1, seed by seed:\n\n"
        rows = [[title.lower(), *[_difference(found, column, key) for column in cut]] for key, title in STAGES.items()]
        text += common.markdown(["", *[f"{100 * ratio:.0f} %" for ratio in RATIOS]], rows)
    return text


def _difference(found: Cells, column: str, key: str) -> str:
    greedy, independent = (found.values(column, row, key) for row in (GREEDY, "l1"))
    return spread([greedy[seed] - independent[seed] for seed in greedy if seed in independent], sign=True)


if __name__ == "__main__":
    main()
