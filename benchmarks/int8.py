"""Quantisation after pruning: accuracy, size and speed of dense and pruned networks, in float32 and in int8.

    python benchmarks/int8.py                 # about 20 minutes on one core; what is on file is not computed again
    python benchmarks/int8.py --only resnet20
    python benchmarks/int8.py --times         # times anew, on an idle machine

ResNet-20 and a VGG-16 of a quarter of its widths are trained on Fashion-MNIST (6,000 images), pruned to half of their
MACs (L1 norms, widths in steps of 8) and trained again for three epochs. EfficientNet-Lite0 comes with its ImageNet
weights, and is pruned to 80 % of its MACs with least-squares recovery, untrained, on photographs; there it is told how
often a network agrees with the dense one in float32 on photographs that nothing was calibrated on.

Latency is that of one image on one thread, all networks and all engines taken in turns. Sums of int8 products saturate
on processors without VNNI: weights have seven bits there, and a row says what eight do.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur as sc
from common import RESULTS, Row, markdown, prepare
from photographs import crops, lite0
from secateur.engines import FILE_ENGINES, Exports, prepare_file
from secateur.machines import machine
from secateur.measurement import accuracy
from secateur.quantisation import (
    METHODS,
    FileNetwork,
    QuantiseReport,
    Settings,
    quantise_file,
    read_calibration,
    saturates,
)
from secateur.recover import Training, compensate_
from secateur.timing import time_in_engines
from secateur.zoo.data import Data
from trials import DENSE, Cells, dense_network, fashion, spread, trained

COMMAND = "python benchmarks/int8.py"
IMAGES, TEST, BATCHES = 6000, 20, 8
SEEDS = (0, 1, 2)
TUNED = Training(epochs=3, lr=0.02, schedule="cosine", weight_decay=5e-4)
ENGINES = ("torch", *FILE_ENGINES)
TIMES, APART = "milliseconds", "quartiles apart at most"
BITS = {True: "seven bits", False: "eight bits"}


@dataclass(frozen=True)
class Subject:
    """Two networks, what to calibrate on, and how well one does: a network, or a file as a network, to a fraction."""

    networks: Mapping[str, nn.Module]
    example: Tensor
    calibration: Iterable[object]
    score: Callable[[nn.Module], float]


def trained_pair(network: str, data: Data, seed: int) -> Subject:
    """Dense and pruned, both trained."""
    dense = dense_network(network, data, replace(DENSE, epochs=10, seed=seed), IMAGES)
    example = torch.randn(1, 1, 28, 28)
    plan = sc.plan(dense, example, criterion="l1", budget=sc.Budget(keep=0.5, round_to=8))
    tag = f"seed{seed}-{network}-int8-half"
    small = trained(sc.apply(dense, plan, check=False), data, replace(TUNED, seed=seed), tag).eval()
    test = data.test
    return Subject({"dense": dense, "pruned": small}, example, data.calibration, lambda net: accuracy(net, test))


def photographed_pair(seed: int) -> Subject:
    """EfficientNet-Lite0 and what is left of it, untrained; the score is how often the dense network agrees."""
    dense = lite0()
    calibration, held_out = crops(seed, each=20, batch=20)
    plan = sc.plan(dense, calibration[0][:1], criterion="l1", budget=sc.Budget(keep=0.8, round_to=8))
    small = sc.apply(dense, plan, check=False)
    compensate_(small, dense, plan, calibration)
    with torch.no_grad():
        labels = [dense(batch).argmax(1) for batch in held_out]
    judged = list(zip(held_out, labels, strict=True))
    return Subject(
        {"dense": dense, "pruned": small.eval()},
        torch.randn(1, 3, 224, 224),
        calibration,
        lambda net: accuracy(net, judged),
    )


def fill(cells: Cells, column: str, seed: int, subject: Subject, repeats: int) -> None:
    """All cells of one seed of a network that are not there yet."""
    needed, other = saturates(), not saturates()
    kinds = [*((method, needed) for method in METHODS), ("minmax", other)]
    with Exports() as exports:
        for name, network in subject.networks.items():
            cells.cell(seed, column, f"{name}, float32", partial(_float, subject, network))
            for method, reduced in kinds:
                what = f"{name}, int8, {method}, {BITS[reduced]}"
                settings = Settings(method, reduce_range=reduced)
                cells.cell(seed, column, what, partial(_int8, subject, network, settings, exports))
        if seed == SEEDS[0]:
            cells.cell(seed, column, TIMES, partial(_times, subject, repeats, exports))


def _float(subject: Subject, network: nn.Module) -> Row:
    counted = sc.count(network, subject.example)
    return {"score": subject.score(network), "macs": int(counted.macs), "bytes": 4 * int(counted.params)}


def _int8(subject: Subject, network: nn.Module, settings: Settings, exports: Exports) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        report = _written(subject, network, settings, exports, path)
        score = subject.score(FileNetwork(prepare_file(path, subject.example)))
        return {"score": score, "difference": report.difference, "bytes": report.bytes}


def _written(subject: Subject, network: nn.Module, settings: Settings, exports: Exports, path: Path) -> QuantiseReport:
    calibration = read_calibration(subject.calibration, subject.example, BATCHES)
    return quantise_file(exports.path(network, subject.example), path, calibration, settings)


def _times(subject: Subject, repeats: int, exports: Exports) -> Row:
    """Milliseconds of one image by engine and network, and how far the quartiles are apart at most."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, network in subject.networks.items():
            files[f"{name}, int8"] = Path(folder) / f"{name}.onnx"
            _written(subject, network, Settings(), exports, files[f"{name}, int8"])
        found = time_in_engines(
            subject.networks, subject.example, engines=ENGINES, files=files, exports=exports, repeats=repeats
        )
    times = {f"{engine}: {name}": round(t.ms, 4) for engine, own in found.items() for name, t in own.items()}
    apart = [(t.high - t.low) / t.ms for own in found.values() for t in own.values()]
    return {**times, APART: round(max(apart), 3)}


def table(cells: Cells, column: str) -> str:
    """What is on file of one network."""
    rows = []
    times = cells.found["cells"].get(str(SEEDS[0]), {}).get(column, {}).get(TIMES, {})
    for what in cells.names([column]):
        if what == TIMES:
            continue
        name, _, kind = what.partition(", ")
        scores = cells.values(column, what, "score")
        timed = f"{name}, int8" if kind == f"int8, minmax, {BITS[saturates()]}" else name if kind == "float32" else ""
        sizes = list(cells.values(column, what, "bytes").values())
        rows.append(
            [
                name,
                kind,
                spread(list(scores.values())),
                f"{sum(sizes) / len(sizes) / 2**20:.2f}",
                *(f"{times[key]:.2f}" if (key := f"{engine}: {timed}") in times else "–" for engine in ENGINES),
            ]
        )
    columns = ("network", "kind", "score, %", "MiB", *(f"{engine}, ms" for engine in ENGINES))
    apart = times.get(APART)
    note = "" if apart is None else f"\nThe quartiles of a time are at most {100 * apart:.0f} % of it apart.\n"
    return f"## {column}\n\n{markdown(columns, rows)}{note}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="where Fashion-MNIST lies")
    parser.add_argument("--only", choices=("resnet20", "vgg16", "efficientnet_lite0"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--times", action="store_true", help="take the times anew")
    args = parser.parse_args()
    prepare()
    cells = Cells(RESULTS / "int8.json", COMMAND)
    cells.say("processor", machine())
    cells.say("saturates", saturates())
    cells.say("calibration", f"{BATCHES} batches")
    if args.times:
        cells.drop(SEEDS[0], TIMES)
    for network in ("resnet20", "vgg16"):
        if args.only in (None, network):
            for seed in args.seeds:
                data = fashion(args.root, images=IMAGES, test=TEST, seed=seed)
                fill(cells, network, seed, trained_pair(network, data, seed), args.repeats)
    if args.only in (None, "efficientnet_lite0"):
        for seed in args.seeds:
            fill(cells, "efficientnet_lite0", seed, photographed_pair(seed), args.repeats)
    columns = ("resnet20", "vgg16", "efficientnet_lite0")
    cells.write_table("Quantisation after pruning", lambda: "".join(table(cells, column) for column in columns))


if __name__ == "__main__":
    main()
