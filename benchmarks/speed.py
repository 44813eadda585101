"""Time and peak memory of every stage, beside Torch-Pruning, in one run.

    python benchmarks/speed.py [--rounds 5] [--only resnet50,densenet121]

One thread. Each measurement is a fresh process, forked from one that has imported and warmed up both libraries on a
small network; the two take turns. Times are processor time, so that other work on the machine disturbs them little.
Memory is the highest resident size that a stage reaches (the kernel's high-water mark, reset before each stage) above
that before the first stage, with the dense network in memory already. All numbers are medians over the rounds.

Torch-Pruning's constructor traces the network and finds its groups, its step scores and prunes in place; ours are
``trace``, ``find_groups``, ``plan`` and ``apply``, which leaves the dense network as it was. The final check, which
Torch-Pruning does not have, is timed apart: ``apply`` with it less ``apply`` without.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import common
import peer
import secateur as sc
from common import RESULTS, Row
from secateur.graph import trace
from secateur.groups import couple

NETWORKS = {
    "torchvision:resnet50": 224,
    "torchvision:densenet121": 224,
    "torchvision:convnext_tiny": 224,
    "timm:pnasnet5large": 331,
}
STAGES = ("capture", "groups", "plan", "apply", "check")
PEER_STAGES = ("constructor", "step")
CPU_S = 600


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only these networks, separated by commas")
    options = parser.parse_args(arguments)
    only = options.only.split(",") if options.only else []
    wanted = {name: size for name, size in NETWORKS.items() if not only or name.partition(":")[2] in only}
    common.prepare()
    warm_up()
    path = RESULTS / "speed.json"
    rows: dict[str, Row] = json.loads(path.read_text())["networks"] if path.exists() and only else {}
    runs: dict[str, dict[str, list[Row]]] = {name: {"secateur": [], "Torch-Pruning": []} for name in wanted}
    for number in range(options.rounds):
        for name, size in wanted.items():
            for tool, work in (("secateur", ours), ("Torch-Pruning", theirs)):
                found = common.in_process(lambda work=work, name=name, size=size: work(name, size), cpu_s=CPU_S)
                runs[name][tool].append(found)
                print(f"round {number + 1}: {name} {tool}: {found.get('error') or brief(found)}", flush=True)
    for name, both in runs.items():
        rows[name] = {"rounds": options.rounds, **{tool: middle(found) for tool, found in both.items()}}
        rows[name]["ratios"] = ratios(rows[name])
    head = common.header(f"python benchmarks/speed.py --rounds {options.rounds}")
    common.write_json(path, {"header": head, "networks": rows})
    text = report(rows)
    common.write(RESULTS / "speed.md", f"# Speed\n\n{common.head_of(head)}\n{text}")
    print("\n" + text)
    return 0


def warm_up() -> None:
    """Whatever either library imports at its first use, it has imported after this."""
    model = common.build("zoo:resnet20").eval()
    x = torch.randn(1, 3, 32, 32)
    sc.apply(model, sc.plan(model, x, ratios=0.5))
    peer.pruner_for(model, (x,)).step()


def ours(name: str, size: int) -> Row:
    model = common.build(name).eval()
    x = torch.randn(1, 3, size, size)
    made: dict[str, Any] = {}

    def plan() -> None:
        made["plan"] = sc.plan(made["graph"], criterion="l1", ratios=0.5)

    stages: dict[str, Callable[[], object]] = {
        "capture": lambda: made.update(graph=trace(model, x)),
        "groups": lambda: couple(made["graph"]),
        "plan": plan,
        "apply": lambda: made.update(small=sc.apply(model, made["plan"], check=False)),
        "check": lambda: made.update(small=sc.apply(model, made["plan"])),
    }
    found = measured(stages)
    found["check_s"] = max(0.0, found["check_s"] - found["apply_s"])
    return found


def theirs(name: str, size: int) -> Row:
    model = common.build(name).eval()
    x = torch.randn(1, 3, size, size)
    made: dict[str, Any] = {}

    def construct() -> None:
        made["pruner"] = peer.pruner_for(model, (x,))

    def step() -> None:
        made["pruner"].step()

    return measured({"constructor": construct, "step": step})


def measured(stages: Mapping[str, Callable[[], object]]) -> Row:
    """``{stage}_s`` and ``{stage}_mib`` of each stage in turn."""
    gc.collect()
    before = resident("VmRSS")
    found: Row = {"before_mib": round(before)}
    for stage, work in stages.items():
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        _, found[f"{stage}_s"] = common.timed(work)
        found[f"{stage}_mib"] = round(resident("VmHWM") - before, 1)
    return found


def resident(field: str) -> float:
    """A line of the kernel's account of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def middle(runs: Sequence[Row]) -> Row:
    """The median of each number over the rounds that ended, and the spread of the times."""
    done = [run for run in runs if "error" not in run]
    if not done:
        return {"error": runs[0]["error"]}
    found: Row = {"n": len(done)}
    for key in done[0]:
        values = [run[key] for run in done]
        found[key] = round(median(values), 3)
        if key.endswith("_s"):
            found[f"{key[:-2]}_range"] = [min(values), max(values)]
    return found


def ratios(row: Row) -> Row:
    """Ours over theirs: how many times faster (times) and what share of the memory."""
    mine, other = row["secateur"], row["Torch-Pruning"]
    if "error" in mine or "error" in other:
        return {}
    after = mine["groups_s"] + mine["plan_s"] + mine["apply_s"]
    peer_s = other["constructor_s"] + other["step_s"]
    peer_mib = max(other["constructor_mib"], other["step_mib"])
    peak = max(mine[f"{s}_mib"] for s in STAGES[:-1])
    return {
        "after_capture_s": round(after, 3),
        "with_capture_s": round(after + mine["capture_s"], 3),
        "peer_s": round(peer_s, 3),
        "faster_after_capture": round(peer_s / after, 2),
        "faster_with_capture": round(peer_s / (after + mine["capture_s"]), 2),
        "faster_with_capture_and_check": round(peer_s / (after + mine["capture_s"] + mine["check_s"]), 2),
        "peak_mib": peak,
        "peer_peak_mib": peer_mib,
        "memory": round(peak / peer_mib, 2),
        "memory_with_check": round(max(peak, mine["check_mib"]) / peer_mib, 2),
        "memory_of_whole_process": round((peak + mine["before_mib"]) / (peer_mib + other["before_mib"]), 2),
    }


def brief(found: Row) -> str:
    return " ".join(f"{key[:-2]} {value:.2f}" for key, value in found.items() if key.endswith("_s"))


def report(rows: Mapping[str, Row]) -> str:
    """Three tables: seconds, MiB, ratios."""
    keys = [*(("secateur", s) for s in STAGES), *(("Torch-Pruning", s) for s in PEER_STAGES)]
    columns = ["network", *STAGES, *(f"Torch-Pruning {s}" for s in PEER_STAGES)]
    parts = []
    for title, unit in (("Seconds", "s"), ("Peak memory of each stage, MiB above the start", "mib")):
        lines = [[n, *(row[tool].get(f"{s}_{unit}", "-") for tool, s in keys)] for n, row in rows.items()]
        parts.append(f"## {title}\n\n{common.markdown(columns, lines)}")
    named = {
        "times faster after capture": "faster_after_capture",
        "with capture": "faster_with_capture",
        "with capture and check": "faster_with_capture_and_check",
        "peak memory ours/theirs": "memory",
        "with check": "memory_with_check",
        "whole process": "memory_of_whole_process",
    }
    lines = [[n, *(row["ratios"].get(key, "-") for key in named.values())] for n, row in rows.items()]
    parts.append("## Against Torch-Pruning's constructor + step\n\n" + common.markdown(["network", *named], lines))
    tools = ("secateur", "Torch-Pruning")
    errors = [f"- {n}, {t}: {row[t]['error']}" for n, row in rows.items() for t in tools if "error" in row[t]]
    return "\n".join(parts) + ("\n" + "\n".join(errors) + "\n" if errors else "")


if __name__ == "__main__":
    raise SystemExit(main())
