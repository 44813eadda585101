"""How much of a ridge compensation should have: the error that it leaves on held-out images, by fraction of the ridge.

    python benchmarks/ridge.py                    three seeds; results/ridge.json and ridge.md
    python benchmarks/ridge.py --seeds 0          others may work on other seeds at the same time

ResNet-20 and VGG-16 with a quarter of its widths, trained on Fashion-MNIST for every seed as in ``recovery.py``, lose
half the filters of every layer by L1 norm (ResNet-20: inside its blocks); their readers are then rescaled, or fitted by
least squares, on few and on more images of the training set, and nothing else is done. The error is the norm of what
the scores differ by from those of the dense network, as a fraction of the norm of these, on 1,000 validation images. A
cell that is in the result file is not computed again.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import common
import secateur as sc
from common import RESULTS
from secateur.recover import Fit, compensate_
from trials import DENSE, DEVICE, Cells, dense_network, fashion

FRACTIONS = (1e-9, 1e-4, 1e-3, 1e-2, 1e-1)
IMAGES = (32, 128)
READERS = ("scale", "least-squares")
NAMES = {"resnet20": "ResNet-20", "vgg16": "VGG-16, a quarter as wide"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--root", default=None, help="where Fashion-MNIST lies, if not in the usual places")
    given = options.parse_args()
    found = Cells(RESULTS / "ridge.json", "python benchmarks/ridge.py")
    for seed in map(int, given.seeds.split(",")):
        for network in NAMES:
            run(found, seed, network, given.root)
            found.write_table("How much of a ridge", lambda: table(found))


def run(found: Cells, seed: int, network: str, root: str | None) -> None:
    data = fashion(root, images=6000, test=1, seed=seed)
    dense = dense_network(network, data, replace(DENSE, epochs=10, seed=seed), 6000)
    held_out = torch.cat([x for x, _ in data.validation]).to(DEVICE)
    images = torch.cat([x for x, _ in data.calibration.first(1)]).to(DEVICE)
    wanted = scores(dense, held_out)
    residual: Any = "inner" if network == "resnet20" else "coupled"
    plan = sc.plan(dense, torch.zeros(1, *data.shape), criterion="l1", ratios=0.5, residual=residual)

    def error(readers: Any, count: int, ridge: float) -> dict[str, float]:
        small = sc.apply(dense, plan, check=False).eval()
        if readers != "none":
            batches = images[:count].split(64)
            compensate_(small, dense, plan, batches, readers=readers, batchnorm=False, fit=Fit(ridge=ridge))
        return {"error": float((scores(small, held_out) - wanted).norm() / wanted.norm())}

    found.cell(seed, network, "none", lambda: error("none", 0, 0.0))
    for count in IMAGES:
        for readers in READERS:
            for ridge in FRACTIONS:
                what = f"{readers}, {count} images, {ridge:g}"
                found.cell(seed, network, what, lambda r=readers, c=count, f=ridge: error(r, c, f))  # type: ignore[misc]


@torch.no_grad()
def scores(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in x.split(250)])


def table(found: Cells) -> str:
    """A row for each network and way of fitting, a column for each fraction: mean ± standard deviation."""
    rows = []
    for network, name in NAMES.items():
        none = shown([*found.values(network, "none", "error").values()])
        rows.append([f"{name}, nothing fitted", none, *[""] * (len(FRACTIONS) - 1)])
        for readers in READERS:
            for count in IMAGES:
                values = [found.values(network, f"{readers}, {count} images, {f:g}", "error") for f in FRACTIONS]
                rows.append([f"{name}, {readers}, {count} images", *[shown([*v.values()]) for v in values]])
    text = "Relative error of the scores on held-out images, mean ± standard deviation over the seeds.\n\n"
    return text + common.markdown(["", *[f"{fraction:g}" for fraction in FRACTIONS]], rows)


def shown(errors: list[float]) -> str:
    if not errors:
        return "–"
    mean = f"{statistics.fmean(errors):.3f}"
    return f"{mean} ± {statistics.stdev(errors):.3f}" if len(errors) > 1 else mean


if __name__ == "__main__":
    main()
