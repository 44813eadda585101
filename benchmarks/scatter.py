"""What a scattered residual stream costs at run time, beside the dense network and the other residual rules.

    python benchmarks/scatter.py [--networks zoo:resnet20,...] [--engines torch,onnxruntime] [--seconds 5]

Each network is pruned to half its MACs by each rule, the same fraction everywhere (``allocation="uniform"``), with
widths as they come and in multiples of eight, where the budget can be met so; scatter also with what zeroed filters
leave folded in (``constants="fold"``). All that is compared takes turns, in one process and one thread; times are
processor time of one batch, so that other work on the machine disturbs them little. A speed is the median over the
rounds of the dense network's time by the pruned one's in the same round.

Beside them stand other ways to write the same sum. In torch: "joined" puts zeros behind the narrow tensor by a
concatenation, "added" and "copied" write it by index into a tensor of zeros; "nothing moved" hands on memory as it
is: its results are wrong, its time is what is left if the scatter were free. In ONNX: "masked" gathers and multiplies
by a mask, "convolved" lets a 1x1 convolution put the channels where they belong, "widened" gives the last convolution
of the branch its full width again, with filters of zeros.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
import secateur as sc
from common import RESULTS, Row
from secateur import wiring
from secateur.graph import trace

NETWORKS = {"zoo:resnet20": 32, "zoo:resnet56": 32, "torchvision:resnet18": 224, "torchvision:resnet50": 224}
RULES = ("inner", "coupled", "scatter")
ENGINES = ("torch", "onnxruntime", "inductor")
BATCHES = (1, 8)
KEEP = 0.5
ROUNDS = (5, 200)
PROFILED = 12
FILE = RESULTS / "scatter.json"
OURS, FREE = "padded", "nothing moved"

Call = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--engines", default="torch,onnxruntime")
    parser.add_argument("--seconds", type=float, default=5.0, help="of processor time for each row of a table")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    options = parser.parse_args(arguments)
    common.prepare()
    found: dict[str, Row] = json.loads(FILE.read_text())["cells"] if FILE.exists() else {}
    for name in options.networks.split(","):
        pruned = Pruned.of(name)
        for engine in options.engines.split(","):
            for batch in map(int, options.batches.split(",")):
                key = f"{name}, {engine}, batch {batch}"
                found[key] = {"seconds": options.seconds, **measured(pruned, engine, batch, options.seconds)}
                found[key]["macs"] = pruned.macs
                print(f"{key}: {found[key]['speed']}", flush=True)
                write(found)
    return 0


@dataclass(frozen=True, eq=False)
class Pruned:
    """A dense network, what each rule makes of it by name, and their MACs relative to the dense ones."""

    networks: dict[str, nn.Module]
    macs: dict[str, float]
    inputs: Tensor

    @classmethod
    def of(cls, name: str) -> Pruned:
        model, x = common.build(name).eval(), torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
        common.randomise_(model, (x,))
        graph, networks = trace(model, x), {"dense": model}
        dense = sc.count(model, x).macs
        for rule in RULES:
            for multiple in (1, 8):
                budget = sc.Budget(keep=KEEP, round_to=multiple)
                try:
                    plan = sc.plan(graph, criterion="fpgm", budget=budget, residual=rule, allocation="uniform")
                except sc.Unreachable:
                    continue
                label = rule if multiple == 1 else f"{rule}, multiples of {multiple}"
                networks[label] = sc.apply(model, plan)
        plan = sc.plan(
            graph,
            criterion="fpgm",
            budget=sc.Budget(keep=KEEP),
            residual="scatter",
            constants="fold",
            allocation="uniform",
        )
        networks["scatter, constants folded"] = sc.apply(model, plan)
        macs = {name: round(sc.count(network, x).macs / dense, 4) for name, network in networks.items()}
        return cls(networks, macs, x)


def measured(pruned: Pruned, engine: str, batch: int, seconds: float) -> Row:
    """Speeds and times of all that ``engine`` can run, and its profile of three of them."""
    x = common.redrawn((pruned.inputs,), batch, common.SEED)[0]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        calls = {"torch": in_torch, "onnxruntime": in_onnxruntime, "inductor": in_inductor}[engine](pruned, x, folder)
        times = interleaved(calls, seconds)
        profile = {"torch": torch_profile, "onnxruntime": onnx_profile}.get(engine)
        kinds = {} if profile is None else {k: profile(pruned, k, x, folder) for k in ("dense", *RULES)}
    return summary(times) | {"ops_ms": kinds}


def interleaved(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Processor time of single calls that take turns, after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, number = math.inf, 0
    while number < rounds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
        number += 1
        if number == 2:
            once = max(median(taken[1:]) for taken in times.values())
            rounds = 2 + min(max(int(seconds / once), ROUNDS[0]), ROUNDS[1])
    return {name: taken[2:] for name, taken in times.items()}


def summary(times: Mapping[str, Sequence[float]]) -> Row:
    """Milliseconds (median and least), and how many times faster than dense (median of the rounds, and quartiles)."""
    found: Row = {"ms": {}, "least_ms": {}, "speed": {}, "quartiles": {}, "rounds": len(times["dense"])}
    for name, taken in times.items():
        ratios = [dense / own for dense, own in zip(times["dense"], taken, strict=True)]
        found["ms"][name] = round(1e3 * median(taken), 3)
        found["least_ms"][name] = round(1e3 * min(taken), 3)
        found["speed"][name] = round(median(ratios), 3)
        found["quartiles"][name] = [round(q, 3) for q in quantiles(ratios, n=4)[::2]]
    return found


# ------------------------------------------------------------------------------------------------- torch


def in_torch(pruned: Pruned, x: Tensor, folder: str) -> dict[str, Call]:
    calls: dict[str, Call] = {name: (lambda net=net: net(x)) for name, net in pruned.networks.items()}
    network = pruned.networks["scatter"]
    wanted = network(x)
    for name, way in TORCH_WAYS.items():
        with scattering(network, way):
            gap = common.difference([network(x)], [wanted])
        assert gap < 1e-5 or name == FREE, f"{name} is off by {gap}"

        def call(way: Callable[..., Tensor] = way) -> None:
            with scattering(network, way):
                network(x)

        calls[f"scatter: {name}"] = call
    return calls


def in_inductor(pruned: Pruned, x: Tensor, folder: str) -> dict[str, Call]:
    compiled = {name: torch.compile(net) for name, net in pruned.networks.items() if "," not in name}
    return {name: (lambda net=net: net(x)) for name, net in compiled.items()}


@contextmanager
def scattering(network: nn.Module, way: Callable[..., Tensor]) -> Iterator[None]:
    """While open, wired modules scatter by ``way(narrow, axis, kept, width)``."""
    for module in network.modules():
        table = module._buffers.get(wiring.SCATTER)
        if table is not None and id(table) not in _KEPT:
            _KEPT[id(table)] = (table, torch.nonzero(table < table.max()).flatten())
    ours = wiring.scattered
    wiring.scattered = lambda narrow, axis, table, constants=None: way(narrow, axis, table, _KEPT[id(table)][1])
    try:
        yield
    finally:
        wiring.scattered = ours


_KEPT: dict[int, tuple[Tensor, Tensor]] = {}
"""By the identity of a table, the table (so that it lives) and the positions it keeps."""


def _wide(narrow: Tensor, axis: int, table: Tensor) -> list[int]:
    return [*narrow.shape[:axis], len(table), *narrow.shape[axis + 1 :]]


def _joined(narrow: Tensor, axis: int, table: Tensor, kept: Tensor) -> Tensor:
    zero = narrow.new_zeros([*narrow.shape[:axis], 1, *narrow.shape[axis + 1 :]])
    return torch.cat([narrow, zero], axis).index_select(axis, table)


TORCH_WAYS: dict[str, Callable[..., Tensor]] = {
    "joined": _joined,
    "added": lambda y, axis, table, kept: y.new_zeros(_wide(y, axis, table)).index_add_(axis, kept, y),
    "copied": lambda y, axis, table, kept: y.new_zeros(_wide(y, axis, table)).index_copy_(axis, kept, y),
    FREE: lambda y, axis, table, kept: y.new_empty(_wide(y, axis, table)),
}


def torch_profile(pruned: Pruned, name: str, x: Tensor, folder: str) -> dict[str, float]:
    """Milliseconds of wall-clock time in each operation itself, the least of several runs."""
    runs = []
    for _ in range(PROFILED):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            pruned.networks[name](x)
        own: dict[str, float] = {}
        for event in profile.key_averages():
            own[event.key] = own.get(event.key, 0.0) + event.self_cpu_time_total / 1e3
        runs.append(own)
    return _largest(runs)


def _largest(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least of each kind, without the runs in which something else had the processor, largest first."""
    least = {kind: min(run.get(kind, 0.0) for run in runs) for kind in runs[0]}
    ordered = sorted(least.items(), key=lambda item: -item[1])
    return {name.removeprefix("aten::"): round(ms, 3) for name, ms in ordered[:10]}


# -------------------------------------------------------------------------------------------------- ONNX Runtime


def in_onnxruntime(pruned: Pruned, x: Tensor, folder: str) -> dict[str, Call]:
    import onnx

    models = {}
    for number, (name, network) in enumerate(pruned.networks.items()):
        path = Path(folder) / f"{number}.onnx"
        sc.export_onnx(network, path, pruned.inputs)
        models[name] = onnx.load(path)
    calls = {name: _session_call(model, x) for name, model in models.items()}
    wanted = calls["scatter"]()
    for name, way in ONNX_WAYS.items():
        own = rewritten(models["scatter"], way)
        call = _session_call(own, x)
        gap = common.difference([torch.tensor(call())], [torch.tensor(wanted)])
        assert gap < 1e-5, f"{name} is off by {gap}"
        calls[f"scatter: {name}"] = call
    return calls


def _session_call(model: Any, x: Tensor) -> Callable[[], Any]:
    session = _session(model)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _session(model: Any, *, profile: str = "") -> Any:
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnx_profile(pruned: Pruned, name: str, x: Tensor, folder: str) -> dict[str, float]:
    """Milliseconds of wall-clock time in each kind of kernel, the least of several runs."""
    import onnx

    sc.export_onnx(pruned.networks[name], Path(folder) / "profiled.onnx", pruned.inputs, check=False)
    model = onnx.load(Path(folder) / "profiled.onnx")
    session = _session(model, profile=str(Path(folder) / "profile"))
    for _ in range(PROFILED):
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
    calls: list[dict[str, float]] = [{}]
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("name") == "model_run":
            calls.append({})
        elif event.get("cat") == "Node" and re.search("kernel_time$", event["name"]):
            kind = event["args"]["op_name"]
            calls[-1][kind] = calls[-1].get(kind, 0.0) + event["dur"] / 1e3
    return _largest([own for own in calls if own])


def rewritten(model: Any, way: Callable[..., Any]) -> Any:
    """A copy of an ONNX ``model`` in which every scatter, a ``Pad`` and a ``Gather``, is done by ``way``."""
    import onnx

    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    gathers = {node.input[0]: node for node in graph.node if node.op_type == "Gather"}

    def constant(value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"way_{len(graph.initializer)}"))
        return str(graph.initializer[-1].name)

    for pad in [node for node in graph.node if node.op_type == "Pad" and node.output[0] in gathers]:
        gather = gathers[pad.output[0]]
        table = values[gather.input[1]]
        place = list(graph.node).index(gather)
        before = next(node for node in graph.node if pad.input[0] in node.output)
        new = way(pad.input[0], gather.output[0], table, constant, before, values)
        if new is None:
            continue
        graph.node.remove(gather)
        for offset, node in enumerate(new):
            graph.node.insert(place + offset, node)
        graph.node.remove(pad)
    return model


def _masked(source: str, target: str, table: np.ndarray, constant: Callable[..., str], *_: Any) -> list[Any]:
    from onnx import helper

    mask = (table < table.max()).astype(np.float32).reshape(1, -1, 1, 1)
    near = constant(np.minimum(table, table.max() - 1))
    gather = helper.make_node("Gather", [source, near], [f"{target}_near"], axis=1)
    return [gather, helper.make_node("Mul", [f"{target}_near", constant(mask)], [target])]


def _convolved(source: str, target: str, table: np.ndarray, constant: Callable[..., str], *_: Any) -> list[Any]:
    from onnx import helper

    weight = np.eye(int(table.max()) + 1, dtype=np.float32)[table][:, :-1, None, None]
    return [helper.make_node("Conv", [source, constant(weight)], [target], kernel_shape=[1, 1])]


def _widened(
    source: str, target: str, table: np.ndarray, constant: Callable[..., str], before: Any, values: Mapping[str, Any]
) -> list[Any] | None:
    if before.op_type != "Conv":  # the stem, whose narrow output is read as well
        return None
    for place in range(1, len(before.input)):
        value = values[before.input[place]]
        before.input[place] = constant(np.concatenate([value, np.zeros_like(value[:1])])[table])
    before.output[0] = target
    return []


ONNX_WAYS: dict[str, Callable[..., Any]] = {"masked": _masked, "convolved": _convolved, "widened": _widened}


# ---------------------------------------------------------------------------------------------------------- page


def write(cells: Mapping[str, Row]) -> None:
    seconds = max(row["seconds"] for row in cells.values())
    engines = ",".join(e for e in ENGINES if any(f", {e}," in key for key in cells))
    head = common.header(f"python benchmarks/scatter.py --engines {engines} --seconds {seconds:g}")
    head |= {"onnxruntime": version("onnxruntime"), "times": "processor time of one batch"}
    common.write_json(FILE, {"header": head, "cells": cells})
    common.write(FILE.with_suffix(".md"), page(head, cells))


def page(head: Row, cells: Mapping[str, Row]) -> str:
    parts = ["# Scattered residual streams: speed at half the MACs\n", common.head_of(head), _legend()]
    for name in dict.fromkeys(key.partition(",")[0] for key in cells):
        own = {key.partition(", ")[2]: row for key, row in cells.items() if key.startswith(f"{name},")}
        parts += [f"## {name}\n", _table(own)]
        for key, row in own.items():
            if row["ops_ms"]:
                parts += [f"Where the time goes, {key} (ms):\n", _profiles(row["ops_ms"])]
    return "\n".join(parts)


def _legend() -> str:
    return (
        "Times faster than the dense network in the same round: the median (lower to upper quartile), and the least "
        "time of a batch in ms.\n"
    )


def _table(own: Mapping[str, Row]) -> str:
    names = list(dict.fromkeys(name for row in own.values() for name in row["speed"]))
    lines = []
    for name in names:
        cells = []
        for row in own.values():
            low, high = row["quartiles"].get(name, (0, 0))
            shown = f"{row['speed'].get(name, 0):.2f} ({low:.2f} to {high:.2f}), {row['least_ms'].get(name, 0):.2f} ms"
            cells.append(shown if name in row["speed"] else "–")
        macs = next(iter(own.values()))["macs"].get(name.partition(":")[0], "")
        lines.append([name, macs, *cells])
    return common.markdown(["", "MACs", *own], lines)


def _profiles(ops: Mapping[str, Mapping[str, float]]) -> str:
    kinds = list(dict.fromkeys(kind for row in ops.values() for kind in list(row)[:8]))
    return common.markdown(["", *kinds], [[name, *(row.get(kind, "–") for kind in kinds)] for name, row in ops.items()])


if __name__ == "__main__":
    raise SystemExit(main())
