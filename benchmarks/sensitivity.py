"""A sensitivity sweep beside evaluating every pruned network anew, in turns, with the same images.

    python benchmarks/sensitivity.py [--network zoo:resnet56] [--images 128] [--batch 64] [--rounds 3] [--groups 0]

One thread, random images of 3x32x32, random weights with running statistics that follow the signals, all groups, ratios
0.1 to 0.9. *Naive*: the weights that read the removed channels are set to zero in the user's own module, and accuracy
is measured on all images; nothing is captured. *Ours*: all of ``sc.sensitivity``, its capture and scores included.
The two take turns from cell to cell: the naive evaluation of a cell runs where the sweep reports that it comes to it,
so that whatever slows the machine down slows both. Times are processor time. The scores must be equal, each of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

import common
import secateur as sc
from common import RESULTS, Row
from secateur.groups import couple
from secateur.measurement import accuracy
from secateur.zoo import names

Batches = list[tuple[Tensor, Tensor]]
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="zoo:resnet56")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=0, help="only so many groups, evenly out of all; 0: all")
    options = parser.parse_args(arguments)
    common.prepare()
    torch.manual_seed(common.SEED)
    model = names.build(options.network)
    inputs, targets = torch.randn(options.images, 3, 32, 32), torch.randint(10, (options.images,))
    settle_(model, inputs)
    data = list(zip(inputs.split(options.batch), targets.split(options.batch), strict=True))
    accuracy(model, data)  # whatever is set up at the first use
    rounds = []
    for number in range(options.rounds):
        rounds.append(one_round(model, data, options.groups))
        row = rounds[-1]
        print(
            f"round {number + 1}: naive {row['naive_s']:.1f} s, ours {row['ours_s']:.1f} s, {row['ratio']:.3f}",
            flush=True,
        )
    row = summary(rounds)
    command = f"python benchmarks/sensitivity.py --network {options.network} --images {options.images}"
    command += f" --batch {options.batch} --rounds {options.rounds}"
    command += f" --groups {options.groups}" if options.groups else ""
    head = common.header(command)
    common.write_json(RESULTS / "sensitivity.json", {"header": head, "rounds": rounds, **row})
    text = report(row, options.network, options.images)
    common.write(RESULTS / "sensitivity.md", f"# Sensitivity sweep\n\n{common.head_of(head)}\n{text}")
    print("\n" + text)
    return 0


@torch.no_grad()
def settle_(model: nn.Module, inputs: Tensor) -> None:
    """Running statistics that follow the signals, so that the classes differ from image to image."""
    model.train()
    for _ in range(10):
        model(inputs)
    model.eval()


def one_round(model: nn.Module, data: Batches, count: int) -> Row:
    """One sweep, with a naive evaluation in front of each of its own."""
    graph = sc.trace(model, data[0][0][:1])
    everything = couple(graph).groups
    chosen = [everything[i * len(everything) // count] for i in range(count)] if count else list(everything)
    cells = [(group, ratio) for group in chosen for ratio in RATIOS]
    keep = {(g.name, ratio): sc.plan(graph, ratios={g.name: ratio}).keep[g.name] for g, ratio in cells}
    scores: dict[tuple[str, float], float] = {}
    naive_s = 0.0

    def evaluate_naively(done: int, total: int, text: str) -> None:
        nonlocal naive_s
        if len(scores) < len(cells):
            group, ratio = cells[len(scores)]
            scores[group.name, ratio], taken = common.timed(
                lambda: naive(model, group, keep[group.name, ratio], data)  # not kept beyond this call
            )
            naive_s += taken

    start = time.process_time()
    found = sc.sensitivity(
        model, data[0][0][:1], data, ratios=RATIOS, groups=[g.name for g in chosen], progress=evaluate_naively
    )
    ours_s = time.process_time() - start - naive_s
    ours = {(c.group, ratio): score for c in found.curves for ratio, score in zip(RATIOS, c.scores, strict=True)}
    if ours != scores:
        odd = next(cell for cell in cells if ours[cell[0].name, cell[1]] != scores[cell[0].name, cell[1]])
        raise AssertionError(f"the scores differ, first those of {odd[0].name} at {odd[1]}")
    return {"naive_s": round(naive_s, 3), "ours_s": round(ours_s, 3), "ratio": round(ours_s / naive_s, 4)} | {
        "cells": len(scores),
        "scores": len(set(scores.values())),
    }


@torch.no_grad()
def naive(model: nn.Module, group: sc.Group, kept: Sequence[int], data: Batches) -> float:
    """Zeros in all weights that read what is removed, in the user's own module, and the whole network on all images."""
    gone = sorted(set(range(group.channels)) - set(kept))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {s.tensor: tensors[s.tensor].clone() for s in group.slices if s.role == "reads"}
    try:
        for part in group.slices:
            if part.role == "reads":
                tensors[part.tensor].index_fill_(part.axis, torch.from_numpy(part.positions[gone].ravel()), 0)
        return accuracy(model, data)
    finally:
        for name, value in before.items():
            tensors[name].copy_(value)


def summary(rounds: Sequence[Row]) -> Row:
    """Medians over the rounds; the ratio is the median of the rounds' own."""
    found: Row = {name: round(median(row[name] for row in rounds), 4) for name in ("naive_s", "ours_s", "ratio")}
    return (
        found
        | {"spread": [min(r["ratio"] for r in rounds), max(r["ratio"] for r in rounds)]}
        | {name: rounds[0][name] for name in ("cells", "scores")}
    )


def report(row: Row, network: str, images: int) -> str:
    table = common.markdown(
        ["sweep", "s", "s for each cell"],
        [
            ["naive", f"{row['naive_s']:.1f}", f"{row['naive_s'] / row['cells']:.3f}"],
            ["`sc.sensitivity`", f"{row['ours_s']:.1f}", f"{row['ours_s'] / row['cells']:.3f}"],
        ],
    )
    low, high = row["spread"]
    return (
        f"{table}\n{network}, {row['cells']} cells, {images} images: `sc.sensitivity` takes **{row['ratio']:.2f}** of "
        f"the time of naive evaluation (from {low:.2f} to {high:.2f}), with all scores equal "
        f"({row['scores']} different ones).\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
