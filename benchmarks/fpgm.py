"""FPGM beside the norms it sets out to replace: on which filters of trained networks they agree, where the norms'
two conditions hold, and what each choice is worth, cut at once and zeroed while training, hard and soft.

    python benchmarks/fpgm.py                     all of it; results/fpgm.json, fpgm.md and three plots beside them
    python benchmarks/fpgm.py --parts layers      only what needs no training, a minute
    python benchmarks/fpgm.py --parts training --seeds 2     others may work on the rest at the same time

*Layers*: each convolution on its own, as the paper prunes them, in networks that are trained: ResNet-20 and VGG-16 at a
quarter of its widths on Fashion-MNIST, three seeds each, beside the same networks before training, and EfficientNet-
Lite0 with the weights that come with it (``photographs.py``). *Training*: the first two, with few images, narrower by
40 and by 60 %: cut at once (*one-shot*); fine-tuned after the cut; or zeroed after every epoch of as much training,
*hard* or *soft*, and cut in the end (``zeroing``). Accuracies are of test images, by which nothing was chosen. A cell
that is in the result file already is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import common
import photographs
import secateur as sc
from common import RESULTS
from fpgm_layers import again, norms, overlaps, regrowth
from fpgm_page import LAYERS, LOCKED, MEASURED, NETWORKS, PAIRS, RATIOS, REGROWN, ROWS, WAYS, column, table
from fpgm_plots import plots
from secateur.measurement import accuracy
from secateur.recover import Hooks, fit_, recalibrate_
from secateur.schedules import Options, zeroing
from secateur.zoo.data import Data
from trials import DENSE, Cells, dense_network, fashion, fresh

IMAGES, EPOCHS, BATCHES, CALIBRATION, TEST = 6_000, 4, 12, 4, 24
"""Images that the dense network has seen; epochs of fine-tuning or zeroing, and batches of 128 in each of them; batches
to recalibrate batch norms on, and of test images."""
DENSE_TRAINING = replace(DENSE, epochs=10)
TUNING = replace(DENSE, epochs=EPOCHS, lr=0.01, schedule="cosine")
"""A tenth of the dense network's rate, as the paper has it for trained networks."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--parts", default="layers,training", help="what needs no training, what does, or both")
    options.add_argument("--networks", default=",".join(NETWORKS), help="to train: only these")
    options.add_argument("--criteria", default=",".join(ROWS), help="to train with: only these")
    options.add_argument("--ways", default=",".join(WAYS), help="to train: only these")
    options.add_argument("--again", action="store_true", help="forget the cells of these seeds and parts first")
    options.add_argument("--root", default=None, help="where Fashion-MNIST lies, if not in the usual places")
    given = options.parse_args()
    seeds, parts = [int(text) for text in given.seeds.split(",")], given.parts.split(",")
    networks, criteria, ways = given.networks.split(","), given.criteria.split(","), given.ways.split(",")
    found = Cells(RESULTS / "fpgm.json", "python benchmarks/fpgm.py")
    if given.again:
        trained = [column(*each) for each in itertools.product(networks, RATIOS, ways)]
        found.forget(seeds, [*(trained if "training" in parts else []), *(LAYERS if "layers" in parts else [])])
    if "layers" in parts:
        for seed in seeds:
            measure_layers(found, seed, given.root)
        write(found)
    if "training" in parts:
        measure_training(found, seeds, networks, criteria, ways, given.root)
        write(found)


def write(found: Cells) -> None:
    found.write_table("FPGM: where it differs from norms, and what that is worth", lambda: table(found))
    for name, drawing in plots(found).items():
        common.write(RESULTS / f"{name}.svg", drawing)


# ------------------------------------------------------------------------------------------------------- the layers


def measure_layers(found: Cells, seed: int, root: str | None) -> None:
    """How far the choices agree and how norms are distributed, in every network that this seed has."""
    for name, model in networks_of(seed, root).items():
        for one, other in PAIRS:
            found.cell(seed, name, f"{one}, {other}", functools.partial(overlaps, model, one, other))
        for row in LOCKED:
            found.cell(seed, name, f"{row}, again", functools.partial(again, model, row))
        found.cell(seed, name, "norms", functools.partial(norms, model))
        if name in REGROWN:
            batch = next(iter(fashion(root, images=IMAGES, test=TEST, seed=seed).train.epoch(0)))
            found.cell(seed, name, "regrowth", functools.partial(regrowth, model, *batch, TUNING.lr))


def networks_of(seed: int, root: str | None) -> dict[str, nn.Module]:
    """The networks of ``LAYERS``; of EfficientNet-Lite0 there is one, which is the first seed's."""
    found = {}
    for network in ("resnet20", "vgg16"):
        found[f"{network}, trained"] = dense(network, seed, fashion(root, images=IMAGES, test=TEST, seed=seed))
        found[f"{network}, untrained"] = fresh(network, seed)
    return {**found, "lite0, trained": photographs.lite0()} if seed == 0 else found


def dense(network: str, seed: int, data: Data) -> nn.Module:
    """A network of the recovery and criteria benchmarks, trained only once."""
    return dense_network(network, data, replace(DENSE_TRAINING, seed=seed), IMAGES)


# ----------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True, eq=False)
class Setting:
    """What all cells of one seed and network share. ``rules``: the options of ``plan`` that the network is measured
    with."""

    seed: int
    dense: nn.Module
    graph: sc.Graph
    data: Data
    rules: Options


def measure_training(
    found: Cells,
    seeds: Sequence[int],
    networks: Sequence[str],
    criteria: Sequence[str],
    ways: Sequence[str],
    root: str | None,
) -> None:
    """A way after the other, so that a run that is cut short leaves whole tables."""

    @functools.cache
    def setting(network: str, seed: int) -> Setting:
        kind, rules = NETWORKS[network]
        data = fashion(root, images=IMAGES, test=TEST, seed=seed)
        model = dense(kind, seed, data)
        found.cell(seed, f"{network} dense", "dense", lambda: {"accuracy": accuracy(model, data.test)})
        told = (
            f"{128 * BATCHES * EPOCHS} in {EPOCHS} epochs to fine-tune or zero on, {128 * CALIBRATION} to recalibrate"
        )
        found.say("images", f"{data.train.samples} for the dense network; {told}; {data.test.samples} to test")
        found.say("training", f"{TUNING.schedule} from lr {TUNING.lr}, weight decay {TUNING.weight_decay}")
        return Setting(seed, model, sc.trace(model, torch.zeros(1, *data.shape)), data, rules)

    for network, way, ratio, seed in itertools.product(networks, ways, RATIOS, seeds):
        for row in (row for row in criteria if row in MEASURED[network].get(way, ())):
            compute = functools.partial(run_cell, setting(network, seed), row, ratio, way)
            found.cell(seed, column(network, ratio, way), row, compute)


def run_cell(at: Setting, row: str, ratio: float, way: str) -> dict[str, float]:
    """Test accuracy as training ends, and with batch norms recalibrated; the share of the dense network's MACs that is
    left; and of zeroing what ``zeroed`` says."""
    how = Options(criterion=row, ratios=widths(at, ratio), seed=at.seed, **at.rules)
    few, training = at.data.train.first(BATCHES), replace(TUNING, seed=at.seed)
    found: dict[str, float] = {}
    if way in ("one-shot", "fine-tuned"):
        small = sc.apply(at.dense, sc.plan(at.graph, **how), check=False)
    else:
        small, found = zeroed(at, how, way)
    if way in ("fine-tuned", "soft, then tuned"):
        fit_(small, few, training if way == "fine-tuned" else replace(training, epochs=1))
    if way != "one-shot":
        found["accuracy"] = accuracy(small, at.data.test)
    recalibrate_(small, at.data.calibration.first(CALIBRATION))
    found["recalibrated"] = accuracy(small, at.data.test)
    example = torch.zeros(1, *at.data.shape)
    return {**found, "macs": sc.count(small, example).macs / sc.count(at.dense, example).macs}


def zeroed(at: Setting, how: Options, way: str) -> tuple[nn.Module, dict[str, float]]:
    """The network that is zeroed after every epoch, cut, and what happened on the way: the share of the removed filters
    that the choice before did not remove, and the accuracy of the whole network, recalibrated, before the last one."""
    model = copy.deepcopy(at.dense)
    progress = zeroing(model, torch.zeros(1, *at.data.shape), soft=way.startswith("soft"), **how)
    training = replace(TUNING, seed=at.seed, epochs=EPOCHS - way.endswith("tuned"))
    choices: list[dict[str, set[int]]] = []
    last: list[nn.Module] = []

    def before(trained: nn.Module) -> None:
        if progress.epochs == training.epochs - 1:
            last.append(copy.deepcopy(trained))

    hooks = [
        Hooks(after_epoch=before),
        progress.hooks,
        Hooks(after_epoch=lambda _: choices.append(gone(progress.plan()))),
    ]
    if way == "hard at once":
        progress.select_()
    fit_(model, at.data.train.first(BATCHES), training, hooks=hooks)
    found = {f"changed {i}": changed(*two) for i, two in enumerate(itertools.pairwise(choices), 2)}
    if way.startswith("soft"):
        recalibrate_(last[0], at.data.calibration.first(CALIBRATION))
        found["before"] = accuracy(last[0], at.data.test)
    return sc.apply(model, progress.finish_(), check=False), found


def widths(at: Setting, ratio: float) -> dict[str, float]:
    """The paper's rounding, ``n - floor(n * ratio)`` filters of every convolution that the rule lets get narrower; what
    is written by linear layers stays whole."""
    asked = sc.plan(at.graph, criterion="random", ratios=ratio, **at.rules)
    linear = {name for name, module in at.dense.named_modules() if isinstance(module, nn.Linear)}
    return {
        group.name: group.channels - math.floor(group.channels * ratio + 1e-9)
        for group in asked.groups
        if len(asked.keep[group.name]) < group.channels and group.name not in linear
    }


def gone(plan: sc.Plan) -> dict[str, set[int]]:
    """The channels that a plan removes, by group."""
    return {group.name: {*range(group.channels)} - {*plan.keep[group.name]} for group in plan.groups}


def changed(before: Mapping[str, set[int]], after: Mapping[str, set[int]]) -> float:
    """The share of what is removed now that was not removed before."""
    return sum(len(after[name] - before[name]) for name in after) / sum(map(len, after.values()))


if __name__ == "__main__":
    main()
