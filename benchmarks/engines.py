"""Dense and pruned networks in every engine that is installed: what pruning gains where, against the fastest dense one.

    python benchmarks/engines.py [--networks torchvision:resnet50,...] [--engines torch,...] [--batch 1]

Each network is cut to half its MACs by the L1 norm (global allocation), with widths as they come and in multiples of
16. Its variants are timed in all engines in turns, in one process, on one thread; outputs are compared with torch's
first. A speed is the median over the dense network's in the same engine; the last column compares with the fastest
dense engine of all. Beside inference, a step forward and backward in torch, at batch 8.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import nn

import common
import secateur as sc
from common import Row
from secateur.engines import ENGINES, installed
from secateur.timing import take_turns, time_in_engines, training_steps

NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:vgg16", "timm:efficientnet_lite0")
SIZE = 224
REPEATS, STEPS = 20, 5
TRAINED = 8
FILE = common.RESULTS / "engines.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--engines", default=",".join(installed()))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also what is on file")
    asked = parser.parse_args()
    common.prepare()
    torch.set_num_threads(1)
    record: Row = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    record = {**common.header(" ".join(["python benchmarks/engines.py", *sys.argv[1:]])), "rows": record["rows"]}
    record["times"] = "milliseconds of a batch, medians in turns with all others of the table"
    record |= {
        name: ENGINES[name].version() for name in asked.engines.split(",") if name in ("onnxruntime", "openvino")
    }
    for name in asked.networks.split(","):
        key = f"{name}, batch {asked.batch}"
        if key in record["rows"] and not asked.again:
            continue
        record["rows"][key] = of_network(name, asked.engines.split(","), asked.batch)
        common.write_json(FILE, record)
        head = {name: value for name, value in record.items() if name != "rows"}
        text = f"# Pruned networks in every engine\n\n{common.head_of(head)}\n{report(record['rows'])}"
        common.write(FILE.with_suffix(".md"), text)
        print(key, flush=True)
    return 0


def of_network(name: str, engines: list[str], batch: int) -> Row:
    """The variants of one network: MACs, the time of a batch in every engine, and that of a training step in torch."""
    model = common.build(name).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    common.randomise_(model, (x,))
    graph = sc.trace(model, x)
    models: dict[str, nn.Module] = {"dense": model}
    for multiple in (1, 16):
        label = "half the MACs" + (f", multiples of {multiple}" if multiple > 1 else "")
        models[label] = sc.apply(graph, sc.plan(graph, budget=sc.Budget(keep=0.5, round_to=multiple)), check=False)
    times = time_in_engines(models, x.repeat(batch, 1, 1, 1), engines=engines, repeats=REPEATS)
    with training_steps(models, torch.randn(TRAINED, 3, SIZE, SIZE)) as steps:
        trained = take_turns(steps, repeats=STEPS, warmup=1)
    return {
        label: {
            "macs": sc.count(each, x).macs,
            "engines": {engine: asdict(found[label]) for engine, found in times.items()},
            "training step": asdict(trained[label]),
        }
        for label, each in models.items()
    }


def report(rows: Mapping[str, Row]) -> str:
    parts = []
    for key, networks in rows.items():
        engines = list(networks["dense"]["engines"])
        dense = {engine: networks["dense"]["engines"][engine]["ms"] for engine in engines}
        lines = []
        for label, one in networks.items():
            own = {engine: one["engines"][engine] for engine in engines}
            fastest = min(own, key=lambda engine: own[engine]["ms"])
            cells = [
                f"{t['ms']:.2f} ({t['low']:.2f} to {t['high']:.2f}), {dense[engine] / t['ms']:.2f}×"
                for engine, t in own.items()
            ]
            step = one["training step"]["ms"]
            cells.append(f"{step:.0f}, {networks['dense']['training step']['ms'] / step:.2f}×")
            cells.append(f"{min(dense.values()) / own[fastest]['ms']:.2f}× ({fastest})")
            lines.append([label, f"{one['macs'] / networks['dense']['macs']:.3f}", *cells])
        columns = ["network", "MACs", *engines, f"training step, batch {TRAINED}", "fastest over fastest dense"]
        parts.append(f"## {key}\n\n{common.markdown(columns, lines)}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
