"""Memory of activations: what is foreseen against what a real forward pass needs, and plans that meet a budget of it.

    python benchmarks/memory.py [--only NAME]

For every network, at batch 1: the bytes that its activations need at once, foreseen from the captured graph, beside
those that ``secateur.memory`` measures on a real forward pass; then the same of the networks that plans of budgets of
memory leave, with what is left of the MACs; and of one that half of the MACs leaves, which is no budget of memory at
all. *held* is what torch's eager mode held indeed: variables of a forward keep what nobody will read. Weights are
untrained, since what is counted does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

import common
import secateur as sc
from common import Row
from secateur.costs import evaluate
from secateur.groups import couple
from secateur.liveness import memory_of
from secateur.memory import activation_memory

NETWORKS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:vgg16",
    "torchvision:densenet121",
    "timm:efficientnet_lite0",
)
SIZE = 224
KEEP = (0.75, 0.5, 0.25)
FILE = "memory"


def main() -> int:
    parser = argparse.ArgumentParser(description="Predicted and measured memory, and plans that meet budgets of it.")
    parser.add_argument("--only", choices=NETWORKS, action="append", help="this network alone; repeatable")
    asked = parser.parse_args()
    common.prepare()
    rows = {}
    for name in asked.only or NETWORKS:
        rows[name] = of_network(name)
        print(name, rows[name], flush=True)
    if asked.only:
        return 0
    head = common.header(" ".join(["python benchmarks/memory.py", *sys.argv[1:]]))
    common.write_json(common.RESULTS / f"{FILE}.json", {**head, "rows": rows})
    common.write(common.RESULTS / f"{FILE}.md", f"# Memory of activations\n\n{common.head_of(head)}\n{report(rows)}")
    return 0


def of_network(name: str) -> Row:
    """What one network needs, whole and at every budget."""
    model = common.build(name).eval()
    x = torch.zeros(1, 3, SIZE, SIZE)
    graph = sc.trace(model, x)
    coupling = couple(graph)
    macs = sc.count(graph).macs
    widths = {group.name: group.channels for group in coupling.groups}
    row: Row = {"dense": compared(model, x, graph, widths)}
    dense = row["dense"]["measured"]
    for fraction in KEEP:
        budget = sc.Budget(keep=fraction, of="memory")
        plan, seconds = common.timed(lambda budget=budget: sc.plan(graph, budget=budget))
        row[f"memory {fraction}"] = {**of_plan(model, x, graph, plan, macs, dense), "plan_s": round(seconds, 3)}
    row["macs 0.5"] = of_plan(model, x, graph, sc.plan(graph, budget=sc.Budget(keep=0.5)), macs, dense)
    return row


def of_plan(model: nn.Module, x: torch.Tensor, graph: sc.Graph, plan: sc.Plan, macs: int, dense: int) -> Row:
    small = sc.apply(model, plan, check=False)
    widths = {name: len(kept) for name, kept in plan.keep.items()}
    found = compared(small, x, graph, widths)
    return {
        **found,
        "of_dense": round(found["measured"] / dense, 4),
        "macs": round(sc.count(small, x).macs / macs, 4),
        "narrowed": sum(widths[group.name] < group.channels for group in plan.groups),
        "groups": len(plan.groups),
    }


def compared(model: nn.Module, x: torch.Tensor, graph: sc.Graph, widths: Mapping[str, int]) -> Row:
    """Bytes: foreseen from the dense ``graph`` at those widths, measured on ``model`` and held by it."""
    coupling = couple(graph)
    keep = np.array([widths[group.name] for group in coupling.groups])
    found = activation_memory(model, x)
    return {"foreseen": round(evaluate(memory_of(coupling), keep)), "measured": found.needed, "held": found.held}


def report(rows: Mapping[str, Row]) -> str:
    first = [
        [name, *(f"{row['dense'][key] / 2**20:.2f}" for key in ("foreseen", "measured", "held")), _equal(row)]
        for name, row in rows.items()
    ]
    columns = ["network", "foreseen, MiB", "measured, MiB", "held in eager mode, MiB", "foreseen to the byte"]
    text = f"## Dense, and whether every network below needs what was foreseen\n\n{common.markdown(columns, first)}\n"
    lines = [
        [
            name,
            budget,
            f"{found['measured'] / 2**20:.2f}",
            f"{found['of_dense']:.4f}",
            f"{found['macs']:.3f}",
            f"{found['narrowed']} of {found['groups']}",
            found.get("plan_s", "-"),
        ]
        for name, row in rows.items()
        for budget, found in row.items()
        if budget != "dense"
    ]
    columns = ["network", "budget", "MiB", "memory left", "MACs left", "groups narrowed", "plan, s"]
    return f"{text}\n## Plans\n\n{common.markdown(columns, lines)}"


def _equal(row: Row) -> str:
    same = [found["foreseen"] == found["measured"] for found in row.values()]
    return f"{sum(same)} of {len(same)}"


if __name__ == "__main__":
    raise SystemExit(main())
