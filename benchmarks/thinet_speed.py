"""Speed and memory of ThiNet's statistics and of its selection.

``--collect``: processor time of collecting the exact output moments of what ResNet-50's 3x3 convolutions read
(224x224, batches of 8, one thread), beside plain forward passes over the same images; and the peak memory, beyond the
model, of collecting them for all convolutions of VGG-16 (batches of 4). ``--selection``:
processor time of the greedy orders from second moments, beside loops over the rows that these sum up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import RESULTS, SEED, Row, head_of, header, in_process, markdown, prepare, write, write_json
from secateur.calibration import collect
from secateur.criteria.outputs import pursuit_order, removal_order
from secateur.graph import trace
from secateur.groups import Coupling, couple
from secateur.zoo import names

FILE = RESULTS / "thinet_speed.json"


def readers_of(coupling: Coupling, model: nn.Module, kernel: tuple[int, int] | None) -> list[str]:
    """The groups that a convolution (of this kernel) reads."""
    found = set()
    for group in coupling.groups:
        for piece in group.slices:
            module = model.get_submodule(piece.tensor.rpartition(".")[0]) if piece.role == "reads" else None
            if isinstance(module, nn.Conv2d) and kernel in (None, module.kernel_size):
                found.add(group.name)
    return sorted(found)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def collecting(batches: int, rounds: int = 3) -> Row:
    """Forward passes and collection in turns, the median of each."""
    torch.manual_seed(0)
    model = names.build("torchvision:resnet50").eval()
    data = [torch.randn(8, 3, 224, 224) for _ in range(batches)]
    coupling = couple(trace(model, data[0][:2]))
    chosen = readers_of(coupling, model, (3, 3))
    groups = [group for group in coupling.groups if group.name in chosen]

    def forward() -> None:
        with torch.no_grad():
            for x in data:
                model(x)

    times = [(seconds(forward), seconds(lambda: collect(coupling, groups, ["outputs"], data))) for _ in range(rounds)]
    ratios = [b / a for a, b in times]
    return {
        "network": "torchvision:resnet50",
        "groups": len(groups),
        "images": 8 * batches,
        "forward_s": round(statistics.median(a for a, _ in times), 2),
        "collect_s": round(statistics.median(b for _, b in times), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
    }


def memory(batches: int = 2) -> Row:
    """What the peak of the process grows by while the moments of VGG-16 are collected."""
    torch.manual_seed(0)
    model = names.build("torchvision:vgg16").eval()
    data = [torch.randn(4, 3, 224, 224) for _ in range(batches)]
    coupling = couple(trace(model, data[0][:2]))
    chosen = [g for g in coupling.groups if g.name.startswith("features")]
    before = resident("VmRSS")
    with torch.no_grad():
        model(data[0])
    forward = resident("VmHWM")
    took = seconds(lambda: collect(coupling, chosen, ["outputs"], data))
    return {
        "network": "torchvision:vgg16",
        "groups": len(chosen),
        "images": 4 * batches,
        "forward_mib": round((forward - before) / 2**10),
        "collect_mib": round((resident("VmHWM") - before) / 2**10),
        "collect_s": round(took, 1),
    }


def resident(field: str) -> int:
    """KiB of this process that are in memory: now (``VmRSS``), or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# ------------------------------------------------------------------------------------------------------- selection


def selection(channels: int = 512, removed: int = 256, rows: int = 100_000, rounds: int = 9) -> Row:
    """Both orders from second moments, against loops over the rows themselves, a few steps of which are
    timed and interpolated."""
    make = torch.Generator().manual_seed(SEED)
    mix = torch.randn(channels, channels, generator=make) / channels**0.5
    parts = torch.randn(rows, channels, generator=make) @ (mix + 0.3) * (0.5 + torch.rand(channels, generator=make))
    wide = parts.double().mT.contiguous()
    summing = seconds(lambda: wide @ wide.mT)
    gram, total = wide @ wide.mT, wide.sum(0)
    target = wide @ total
    found: Row = {"channels": channels, "removed": removed, "rows": rows, "rounds": rounds, "moments_s": summing}
    for name, run in (
        ("removal", lambda: removal_order(gram)),
        ("pursuit", lambda: pursuit_order(gram, target)),
    ):
        times = sorted(seconds(run) for _ in range(rounds))
        found[name] = {"s": times[rounds // 2], "range": [times[0], times[-1]]}
    for name, step in (("removal", removal_step), ("pursuit", pursuit_step)):
        result = (removal_order(gram) if name == "removal" else pursuit_order(gram, target)).order
        turns = result.tolist() if name == "removal" else result.flip(0).tolist()
        timed, same = {}, True
        for at in sorted({round(removed * share / 8) for share in range(8)} | {removed - 1}):
            start = time.process_time()
            choice = step(wide, total, turns[:at])
            timed[at] = time.process_time() - start
            same = same and choice == turns[at]
        whole = float(np.interp(np.arange(removed), list(timed), list(timed.values())).sum())
        found[name] |= {"loop_s": whole, "loop_steps": timed, "same": same, "faster": round(whole / found[name]["s"])}
    return found


def removal_step(parts: torch.Tensor, total: torch.Tensor, gone: list[int]) -> int:
    """Which of the channels ``parts [C, rows]`` goes next: one candidate after the other, the squares of all that would
    be lacking."""
    lacks = parts[gone].sum(0)
    costs = {j: float((lacks + parts[j]).square().sum()) for j in range(len(parts)) if j not in gone}
    return min(costs, key=lambda j: (costs[j], -j))


def pursuit_step(parts: torch.Tensor, total: torch.Tensor, kept: list[int]) -> int:
    """Which stays next: least squares on what is kept, and the candidate that explains most of what that leaves."""
    left = total
    if kept:
        left = total - torch.linalg.lstsq(parts[kept].mT, total[:, None]).solution[:, 0] @ parts[kept]
    gains = {j: float((parts[j] @ left) ** 2 / parts[j].square().sum()) for j in range(len(parts)) if j not in kept}
    return max(gains, key=lambda j: (gains[j], -j))


# ------------------------------------------------------------------------------------------------------------- page


def page(record: Row) -> str:
    parts = ["# ThiNet: time and memory\n", head_of(record["header"])]
    if "collect" in record:
        own = record["collect"]
        parts += [
            "## Collecting output moments, against forward passes\n",
            markdown([*own], [[", ".join(map(str, v)) if isinstance(v, list) else v for v in own.values()]]),
            "Processor time of one thread, forward and collection in turns, medians of the rounds.\n",
        ]
    if "memory" in record:
        own = record["memory"]
        parts += [
            "## Memory beyond the model\n",
            markdown([*own], [[*own.values()]]),
            "The peak of a process of its own, less what it held with model, data and groups before anything ran: "
            "after one forward pass, and after the collection.\n",
        ]
    if "selection" in record:
        parts += _selected(record["selection"])
    return "\n".join(parts)


def _selected(own: Row) -> list[str]:
    table = []
    for name in ("removal", "pursuit"):
        row = own[name]
        spread = " to ".join(f"{1e3 * s:.1f}" for s in row["range"])
        table.append([name, f"{1e3 * row['s']:.1f}", spread, f"{row['loop_s']:.1f}", row["faster"], row["same"]])
    head = ["", "ms", "spread", f"loop over {own['rows']:,} rows, s", "times faster", "same choice"]
    return [
        f"## Choosing {own['removed']} of {own['channels']} channels\n",
        markdown(head, table),
        f"From the second moments, which take {own['moments_s']:.1f} s to sum over these rows. Loops are timed at a "
        "few steps and interpolated between them.\n",
    ]


def keep(command: str, **parts: Row) -> None:
    """Replace these parts of the record, leaving the others."""
    record = json.loads(FILE.read_text()) if FILE.exists() else {}
    record |= {**parts, "header": header(command) | {"times": "seconds of processor time"}}
    write_json(FILE, record)
    write(FILE.with_suffix(".md"), page(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--selection", action="store_true")
    parser.add_argument("--batches", type=int, default=6, help="batches of 8 images for ResNet-50")
    chosen = parser.parse_args()
    command = "python benchmarks/thinet_speed.py --collect --selection"
    prepare()
    if chosen.collect:
        keep(command, memory=in_process(memory, cpu_s=600))
        keep(command, collect=in_process(lambda: collecting(chosen.batches), cpu_s=1500))
    if chosen.selection:
        keep(command, selection=in_process(selection, cpu_s=900))


if __name__ == "__main__":
    main()
