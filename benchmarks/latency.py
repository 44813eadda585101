"""Latency foreseen against latency measured, and what a budget of milliseconds gives beside one of MACs.

    python benchmarks/latency.py [--networks torchvision:resnet50,...] [--engines onnxruntime,...] [--batch 1]

For every network and engine: what the tables cost, in seconds, with nothing known before; the milliseconds that they
foresee, beside those of the networks themselves: dense, of random widths (multiples of what the engine is fast at), and
cut to 0.75, 0.5 and 0.35 of the latency by the L1 norm, "foreseen" without having timed any network of the kind
(``latencies=``), and "timed and corrected", as ``plan`` does it by itself. Beside them, networks of half the MACs: of
widths as they come, and in multiples of 8 and 16, whose MACs say one thing and whose time another.

All networks of a row of the table are timed in turns, in one process. Times are the least of all rounds, since what
disturbs a time makes it longer; medians and quartiles stand in the JSON file. Weights are untrained: what is timed does
not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

import common
import secateur as sc
from common import Row
from secateur.engines import find_engine
from secateur.groups import couple
from secateur.latencies import predicted_ms, width_steps
from secateur.latencies.measuring import cut
from secateur.latencies.timers import TIMERS
from secateur.timing import time_in_engines

NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:vgg16")
SIZE = 224
KEEP = (0.75, 0.5, 0.35)
MULTIPLES = (1, 8, 16)
RANDOM = 3
REPEATS = 25
FILE = common.RESULTS / "latency.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--engines", default="onnxruntime", help=f"of {', '.join(TIMERS)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=float, nargs="*", default=KEEP, help="parts of the latency that are asked for")
    parser.add_argument("--again", action="store_true", help="also what is on file")
    asked = parser.parse_args()
    common.prepare()
    torch.set_num_threads(asked.threads)
    record: Row = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    record = {**common.header(" ".join(["python benchmarks/latency.py", *sys.argv[1:]])), "rows": record["rows"]}
    record["times"] = "the least milliseconds of a batch in turns with all others of the table"
    for engine in asked.engines.split(","):
        for name in asked.networks.split(","):
            key = f"{name}, {engine} {find_engine(engine).version()}, batch {asked.batch}, {asked.threads} thread(s)"
            if key in record["rows"] and not asked.again:
                continue
            record["rows"][key] = of_network(name, engine, asked.batch, asked.threads, asked.keep)
            common.write_json(FILE, record)
            head = {name: value for name, value in record.items() if name != "rows"}
            text = f"# Latency, foreseen and measured\n\n{common.head_of(head)}\n{report(record['rows'])}"
            common.write(FILE.with_suffix(".md"), text)
    return 0


def of_network(name: str, engine: str, batch: int, threads: int, asked: Sequence[float]) -> Row:
    """Every variant of one network in one engine: its MACs and parameters, what was foreseen, and its time."""
    model = common.build(name).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    graph = sc.trace(model, x)
    coupling = couple(graph)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SECATEUR_CACHE"] = folder
        start = time.perf_counter()
        found = sc.measure_latencies(graph, engine=engine, batch=batch, threads=threads)
        seconds = time.perf_counter() - start
        models: dict[str, nn.Module] = {"dense": model}
        foreseen: dict[str, float] = {"dense": predicted_ms(coupling, found, {})}
        draw, steps = np.random.default_rng(0), width_steps(coupling, found)
        for number in range(RANDOM):
            widths = {group.name: _random_width(draw, group, steps[group.name]) for group in coupling.groups}
            label = f"random widths {number + 1}"
            models[label], foreseen[label] = cut(coupling, widths), predicted_ms(coupling, found, widths)
        spent = {}
        for keep in asked:
            budget = sc.Budget(keep=keep, of="latency", engine=engine, batch=batch, threads=threads)
            for how, given in (("foreseen", found), ("timed and corrected", None)):
                start = time.perf_counter()
                plan = sc.plan(graph, budget=budget, latencies=given)
                label = f"{keep} of the latency, {how}"
                spent[label] = round(time.perf_counter() - start, 1)
                models[label], told = sc.apply(graph, plan, check=False), plan.made_by["latency"]
                foreseen[label] = (
                    told.get("measured_ms", told["predicted_ms"]) if given is None else told["predicted_ms"]
                )
    for multiple in MULTIPLES:
        label = "half the MACs" + (f", multiples of {multiple}" if multiple > 1 else "")
        plan = sc.plan(graph, budget=sc.Budget(keep=0.5, round_to=multiple))
        models[label] = sc.apply(graph, plan, check=False)
        foreseen[label] = predicted_ms(coupling, found, {group: len(kept) for group, kept in plan.keep.items()})
    times = time_in_engines(models, x.repeat(batch, 1, 1, 1), engines=[engine], threads=threads, repeats=REPEATS)[
        engine
    ]
    counts = {label: sc.count(each, x) for label, each in models.items()}
    rows = {
        label: {
            "macs": counts[label].macs,
            "params": counts[label].params,
            "foreseen_ms": round(foreseen[label], 4),
            "plan_s": spent.get(label),
            **asdict(times[label]),
        }
        for label in models
    }
    print(f"{name} in {engine}: {seconds:.0f} s for the tables; off by {_off(rows):.1%} at most", flush=True)
    return {"tables_s": round(seconds, 1), "steps": dict(found.steps), "networks": rows}


def _random_width(draw: np.random.Generator, group: sc.Group, step: int) -> int:
    own = step // np.gcd(step, group.partitions)
    return int(min(group.channels, max(own, round(draw.uniform(0.2, 1) * group.channels / own) * own)))


def _off(rows: Mapping[str, Row]) -> float:
    """The largest relative error of what was foreseen, of widths that a plan for latency takes."""
    own = [row for label, row in rows.items() if not label.startswith("half the MACs")]
    return max(abs(row["foreseen_ms"] / row["least"] - 1) for row in own)


def report(rows: Mapping[str, Row]) -> str:
    parts = []
    for key, row in rows.items():
        networks = row["networks"]
        dense = networks["dense"]
        lines = []
        for label, one in networks.items():
            lines.append(
                [
                    label,
                    f"{one['macs'] / dense['macs']:.3f}",
                    f"{one['params'] / dense['params']:.3f}",
                    f"{one['foreseen_ms']:.2f}",
                    f"{one['least']:.2f}",
                    f"{one['foreseen_ms'] / one['least'] - 1:+.1%}",
                    f"{_share_off(one, dense):+.1%}",
                    f"{one['ms']:.2f} ({one['low']:.2f} to {one['high']:.2f})",
                    f"{dense['least'] / one['least']:.2f}",
                    f"{dense['least'] / one['least'] / (dense['macs'] / one['macs']):.2f}",
                    "–" if one["plan_s"] is None else one["plan_s"],
                ]
            )
        columns = [
            "network",
            "MACs",
            "params",
            "foreseen, ms",
            "least, ms",
            "error",
            "error of the share",
            "median (quartiles), ms",
        ]
        columns += ["times faster", "of the MACs' promise", "planned in, s"]
        own = [one for label, one in networks.items() if "half the MACs" not in label]
        errors = [abs(one["foreseen_ms"] / one["least"] - 1) for one in own]
        shares = [abs(_share_off(one, dense)) for one in own]
        parts.append(
            f"## {key}\n\nTables in {row['tables_s']:.0f} s; steps of widths: {_steps(row['steps'])}. Foreseen and "
            f"least time differ by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most; as shares "
            f"of the dense network's time, which a machine that is busier at one time than at another leaves as they "
            f"are, by {statistics.median(shares):.1%} and {max(shares):.1%} (half the MACs aside, whose widths are not "
            f"those that were timed).\n\n{common.markdown(columns, lines)}"
        )
    return "\n".join(parts)


def _share_off(one: Row, dense: Row) -> float:
    """The relative error of what was foreseen as a share of the dense network's time."""
    return (one["foreseen_ms"] / dense["foreseen_ms"]) / (one["least"] / dense["least"]) - 1


def _steps(steps: Mapping[str, int]) -> str:
    return ", ".join(f"{family} {step}" for family, step in sorted(steps.items()))


if __name__ == "__main__":
    sys.exit(main())
