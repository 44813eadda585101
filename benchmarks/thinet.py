"""ThiNet against random choice, L1 norms and FPGM, at 30, 50 and 70 %, before any training: what the next layer's
output loses, and what the whole network does. Every criterion under the same three reconstructions of the layers that
read what was removed: none, a scalar for each input channel (the paper's), and least squares of all weights.

    python benchmarks/thinet.py                   all networks and seeds; results/thinet.json, thinet.md and thinet.svg
    python benchmarks/thinet.py --networks vgg16 --seeds 2     others may work on the rest at the same time

ResNet-20 and VGG-16 at a quarter of its widths are trained on Fashion-MNIST; calibrated on training images, judged on
test images. EfficientNet-Lite0 comes trained (``photographs.py``); calibrated on crops of seven photographs, judged by
whether it says the same as the dense network on crops of seven others. Nothing is chosen on what it is judged by.

*Next layer*: each group is pruned alone; closed forms in ``next_layer.py``. *Whole network*: all groups that are added
to nothing (``residual="inner"``) get narrower at once, by ``compensate_``, with batch norms as they were or
recalibrated. A cell that is in the result file already is not computed again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import common
import photographs
import secateur as sc
from common import RESULTS
from next_layer import WAYS, Reader, errors, readers_of, refit_order
from secateur.allocation import allocate
from secateur.calibration import collect
from secateur.groups import couple
from secateur.measurement import accuracy
from secateur.recover import Fit, compensate_, recalibrate_
from secateur.residuals import kept_whole
from secateur.scores import score
from thinet_page import RATIOS, REFIT, ROWS, SEQUENTIAL, THINET, TITLES, plot, table
from trials import DENSE, Cells, dense_network, fashion

DRAWS = 3
"""Random choices of each group alone, for each seed; of whole networks one for each seed."""
SEEN, HELD, TEST = 4, 2, 12
"""Batches of 128 images of Fashion-MNIST: to calibrate on, and of test images for the next layer's output and for the
accuracy of whole networks."""
CROPS = 8
"""Of each photograph."""


@dataclass(frozen=True)
class Setting:
    """What all cells of one seed and network share. ``seen``: batches to calibrate on; ``held``: those that errors are
    taken on; ``judge``: what a whole network does. ``scores`` and ``readers`` are found when they are first needed."""

    seed: int
    dense: nn.Module
    graph: sc.Graph
    seen: Any
    held: Any
    judge: Callable[[nn.Module], dict[str, float]]
    scores: Callable[[str, int], dict[str, torch.Tensor]]
    readers: Callable[[], dict[str, list[Reader]]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--networks", default=",".join(TITLES))
    options.add_argument("--criteria", default=";".join((*ROWS, REFIT)), help="only these, with ; between them")
    options.add_argument("--parts", default="next,whole", help="the next layer's output, whole networks, or both")
    options.add_argument("--again", action="store_true", help="forget the cells of these seeds and networks first")
    options.add_argument("--root", default=None, help="where Fashion-MNIST lies, if not in the usual places")
    given = options.parse_args()
    seeds, networks = [int(text) for text in given.seeds.split(",")], given.networks.split(",")
    rows = [row for row in (*ROWS, REFIT) if row in given.criteria.split(";")]
    found = Cells(RESULTS / "thinet.json", "python benchmarks/thinet.py")
    if given.again:
        found.forget(seeds, [column for network in networks for column in columns(network)])
    for seed in seeds:
        for network in networks:
            at = photographed(seed, found) if network == "lite0" else clothed(network, seed, given.root, found)
            measure(found, network, at, rows, given.parts.split(","))
            found.write_table("ThiNet: does it help?", lambda: table(found))
            common.write(RESULTS / "thinet.svg", plot(found))


# ---------------------------------------------------------------------------------------------------- the networks


def clothed(network: str, seed: int, root: str | None, found: Cells) -> Setting:
    """A network of the recovery and criteria benchmarks, trained on 6,000 images of Fashion-MNIST."""
    data = fashion(root, images=6_000, test=TEST, seed=seed)
    dense = dense_network(network, data, replace(DENSE, epochs=10, seed=seed), 6_000)
    seen, held = data.calibration.first(SEEN), data.test.first(HELD)
    told = f"{128 * SEEN} training images to calibrate on, {128 * HELD} test images for the next layer's output"
    found.say("Fashion-MNIST", f"{told}, {data.test.samples} for accuracy")
    found.cell(seed, f"{network} dense", "dense", lambda: {"accuracy": accuracy(dense, data.test)})
    example = torch.zeros(1, *data.shape)
    return setting(seed, dense, example, seen, held, lambda model: {"accuracy": accuracy(model, data.test)})


def photographed(seed: int, found: Cells) -> Setting:
    """EfficientNet-Lite0, beside what it says of the crops that are held out."""
    dense = photographs.lite0()
    seen, held = photographs.crops(seed, CROPS, 14)
    found.say(
        "photographs", f"{sum(map(len, seen))} crops of 7 to calibrate on, {sum(map(len, held))} of 7 others held out"
    )
    with torch.no_grad():
        wanted = torch.cat([dense(batch) for batch in held])

    def judge(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            given = torch.cat([model(batch) for batch in held])
        same = (given.argmax(1) == wanted.argmax(1)).double().mean()
        return {"accuracy": float(same), "logits": float((given - wanted).norm() / wanted.norm())}

    return setting(seed, dense, torch.zeros(1, 3, photographs.SIZE, photographs.SIZE), seen, held, judge)


def setting(
    seed: int,
    dense: nn.Module,
    example: torch.Tensor,
    seen: Any,
    held: Any,
    judge: Callable[[nn.Module], dict[str, float]],
) -> Setting:
    graph = sc.trace(dense, example)
    coupling = couple(graph)

    @functools.cache
    def evidence() -> dict[str, dict[str, Any]]:
        return collect(coupling, coupling.groups, ("outputs", "samples"), seen, seed=seed)

    readers = functools.cache(lambda: readers_of(coupling, seen, held))

    @functools.cache
    def scores(row: str, draw: int) -> dict[str, torch.Tensor]:
        if row == REFIT:
            return {name: refit_order(own, Fit()) for name, own in readers().items()}
        known = evidence() if row in THINET else None
        return score(coupling.groups, graph.tensors, row, seed=draw, evidence=known)

    return Setting(seed, dense, graph, seen, held, judge, scores, readers)


# -------------------------------------------------------------------------------------------------------- the cells


def columns(network: str) -> list[str]:
    return [f"{network} dense", *[f"{network} {ratio} {what}" for ratio in RATIOS for what in (*WAYS, "whole")]]


def measure(found: Cells, network: str, at: Setting, rows: Sequence[str], parts: Sequence[str]) -> None:
    if "next" in parts:
        for ratio, row, way in itertools.product(RATIOS, (row for row in rows if row != SEQUENTIAL), WAYS):
            compute = functools.partial(next_layer, at, row, ratio, way)
            found.cell(at.seed, f"{network} {ratio} {way}", row, compute)
    if "whole" in parts:
        for ratio in RATIOS if at.seed == 0 else ():
            found.cell(at.seed, f"{network} dense", f"macs {ratio}", functools.partial(macs_left, at, ratio))
        for ratio, row in itertools.product(RATIOS, rows):
            found.cell(at.seed, f"{network} {ratio} whole", row, functools.partial(whole, at, row, ratio))


def next_layer(at: Setting, row: str, ratio: float, way: str) -> dict[str, float]:
    """The held-out error of every group pruned alone, by ``part:name``."""
    coupling = couple(at.graph)
    streams = kept_whole(coupling, "inner")
    draws = [at.seed * DRAWS + i for i in range(DRAWS)] if row == "random" else [at.seed]
    each = []
    for draw in draws:
        scores = at.scores(row, draw)
        kept = allocate(coupling.groups, scores, ratios=ratio, locked=coupling.locked)
        each.append(errors(at.readers(), kept, way))
    return {
        f"{'streams' if name in streams else 'inner'}:{name}": statistics.fmean(own[name] for own in each)
        for name in each[0]
    }


def whole(at: Setting, row: str, ratio: float) -> dict[str, float]:
    """What the whole network does with all inner groups narrower: for each way, with batch norms as they were and
    recalibrated."""
    plan = plan_of(at, row, ratio)
    found: dict[str, float] = {}
    for way in WAYS:
        small = sc.apply(at.dense, plan, check=False)
        compensate_(small, at.dense, plan, at.seen, readers=way, batchnorm=False)  # type: ignore[arg-type]
        found |= {f"{way}:{key}": value for key, value in at.judge(small).items()}
        recalibrate_(small, at.seen)
        found |= {f"{way}, recalibrated:{key}": value for key, value in at.judge(small).items()}
    return found


def macs_left(at: Setting, ratio: float) -> dict[str, float]:
    """The share of the dense network's MACs that is left, by whatever criterion."""
    small = sc.apply(at.dense, plan_of(at, "l1", ratio), check=False)
    example = torch.zeros_like(at.graph.args[0])
    return {"macs": sc.count(small, example).macs / sc.count(at.dense, example).macs}


def plan_of(at: Setting, row: str, ratio: float) -> sc.Plan:
    """Statistics are gathered once for all ratios, but for the sequential choice, which gathers its own."""
    if row == SEQUENTIAL:
        return sc.plan(at.graph, criterion=row, ratios=ratio, residual="inner", data=at.seen, seed=at.seed)
    scores = at.scores(row, at.seed)
    return sc.plan(at.graph, criterion=lambda view: scores[view.name], ratios=ratio, residual="inner")


if __name__ == "__main__":
    main()
