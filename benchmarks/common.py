"""What the benchmarks and the coverage tests share: networks with nothing in them that could hide a mistake, the whole
check of one network, a process of its own for each piece of work, and the header that every result file carries.

An untrained network is a poor witness: its norms are identities, its residual branches often multiply by zero. So all
vectors are drawn anew, zero-initialised tensors get small values, and the running statistics of batch norms are first
measured (so that signals stay near 1 in any depth) and then disturbed.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.nests import flatten
from secateur.zoo import names

SEED = 0
RESULTS = Path(__file__).resolve().parent.parent / "results"
SHRUNK = 0.55
"""A layer has shrunk if it has at most this share of its output or of its input channels left."""
NORMS = (nn.modules.batchnorm._BatchNorm,)

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------- networks


def build(name: str) -> nn.Module:
    """The untrained network ``name``; ``.backbone`` after it takes that part of a detector."""
    torch.manual_seed(SEED)
    whole = name.removesuffix(".backbone")
    model = names.build(whole)
    return model.get_submodule("backbone") if whole != name else model


def inputs_of(name: str, model: nn.Module, size: int | None = None) -> tuple[Tensor, ...]:
    """Example inputs of batch 1; ``size``: side of a square image, if not the network's own."""
    if name.endswith(".backbone"):
        size = size or 224
    shape = (3, size, size) if size else None
    return names.example_inputs(name.removesuffix(".backbone"), model, shape=shape)


def redrawn(example: Sequence[Tensor], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Standard normal inputs like the example's, of another batch size."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *t.shape[1:], generator=generator) for t in example)


def randomise_(model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
    """Draw all vectors, zeros and running statistics of ``model`` anew, in place; it is left in eval mode.

    Scales lie in [0.5, 1.5], shifts in [-0.2, 0.2]; running means move by a fifth of a deviation, running variances by
    a factor in [0.5, 1.5] from what a batch of two shows.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.numel():
                value.copy_(_anew(name.rpartition(".")[2], value, generator))
        _measure_statistics(model, redrawn(example, 2, SEED + 1))
        for norm in _norms(model):
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            variance.nan_to_num_(1.0).clamp_(1e-2, 1e4)
            mean.nan_to_num_(0.0).add_(0.2 * variance.sqrt() * torch.randn(mean.shape, generator=generator))
            variance.mul_(0.5 + torch.rand(variance.shape, generator=generator))
    return model.eval()


def _anew(leaf: str, value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(value.shape, generator=generator)
    constant = bool(value.max() == value.min())
    if value.numel() == 1:  # gains, temperatures, exponents
        return value * (0.8 + 0.4 * noise) if bool(value != 0) else 0.2 + 0.3 * noise
    if value.dim() < 2 or value.numel() == max(value.shape):
        if "bias" in leaf or bool((value == 0).all()):
            return 0.4 * (noise - 0.5)
        return 0.5 + noise if constant else value
    if constant:
        return 0.2 * (noise - 0.5) if bool((value == 0).all()) else value * (0.5 + noise)
    return value


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]


def _measure_statistics(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Running statistics from one batch; networks that do not run in train mode keep those they have."""
    norms = _norms(model)
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    model.train()
    try:
        model(*inputs)
    except Exception as error:  # reported again, as a dense network that does not train, by the check
        print(f"    does not run in train mode: {short(error)}", file=sys.stderr)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


# ---------------------------------------------------------------------------------------------- the check


def check_network(name: str, size: int | None = None, *, pure: bool = True) -> Row:
    """Capture, plan, apply and examine one network at 50 % and at random ratios; every number of its row.

    ``pure``: whether it is a pure CNN, of whose convolutions nine in ten must shrink. ``row["problems"]`` is empty
    where all holds that is promised. Raises what the library raises.
    """
    model = build(name)
    example = inputs_of(name, model, size)
    randomise_(model, example)
    row: Row = {"name": name, "version": sc.__version__, "size": example[0].shape[-1], "pure": pure, "problems": []}
    row["params"] = sum(p.numel() for p in model.parameters())
    graph, row["capture_s"] = timed(lambda: sc.trace(model, tuple(example)))
    groups, row["groups_s"] = timed(lambda: sc.find_groups(graph))
    free = [g for g in groups if not g.locked]
    row["groups"], row["locked"] = len(free), len(groups) - len(free)
    row["reasons"] = sorted({g.locked for g in groups if g.locked})[:8]
    dense_gradients = gradients(model, redrawn(example, 2, 5))
    model.eval()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for label, ratios in (("half", 0.5), ("random", {g.name: float(rng.uniform(0.0, 0.9)) for g in free})):
        plan, plan_s = timed(lambda ratios=ratios: sc.plan(graph, criterion="l1", ratios=ratios))
        small, apply_s = timed(lambda plan=plan: sc.apply(model, plan))
        found: Row = {"plan_s": plan_s, "apply_s": apply_s}
        applied = sc.record(small)
        assert applied is not None
        found["tier"], found["casts"] = applied.tier, applied.casts
        found |= shares(model, small)
        found |= examine(model, small, plan, example, dense_gradients)
        row["problems"] += [f"{label}: {problem}" for problem in problems(found, pure=pure and label == "half")]
        row[label] = found
        del small
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def examine(
    model: nn.Module, small: nn.Module, plan: sc.Plan, example: Sequence[Tensor], dense_gradients: set[str] | str
) -> Row:
    """The law, the forward passes and the backward pass of one pruned network, with our own eyes.

    ``dense_gradients``: what the dense network trains (see ``gradients``).
    """
    found: Row = {"batches": {}, "law": {}}
    for batch in (1, 3):
        with torch.no_grad():
            found["batches"][str(batch)] = outcome(lambda batch=batch: tensors_of(small(*redrawn(example, batch, 7))))
    dense = sc.masked(model, plan).double().eval()
    small.double()
    for batch in (1, 3):
        x = [t.double() for t in redrawn(example, batch, 11 + batch)]
        with torch.no_grad():
            wanted, got = tensors_of(dense(*x)), tensors_of(small(*x))
        found["law"][str(batch)] = difference(got, wanted)
        if batch == 3:
            found["alive"] = liveliness(wanted)
    del dense
    small.float()
    if isinstance(dense_gradients, str):
        found["backward"] = f"the dense network does not train: {dense_gradients}"
    else:
        reached = gradients(small, redrawn(example, 2, 5))
        missing = sorted(dense_gradients - reached) if isinstance(reached, set) else []
        found["backward"] = f"no gradient reaches {', '.join(missing[:4])}" if missing else ""
        if isinstance(reached, str):
            found["backward"] = reached
    small.eval()
    return found


def problems(found: Row, *, pure: bool) -> list[str]:
    """What of ``examine`` and ``shares`` is not as promised, in words."""
    said = []
    limit = 1e-5 if found["casts"] else 1e-9
    for batch, gap in found["law"].items():
        if not gap <= limit:
            said.append(f"the law is off by {gap:.1e} at batch {batch}")
    if found["alive"] < 1e-6:
        said.append("the check is blind: outputs do not depend on inputs")
    said += [f"batch {batch}: {why}" for batch, why in found["batches"].items() if why]
    if found["backward"]:
        said.append(f"backward: {found['backward']}")
    if pure and found["convs_shrunk"] < 0.9 * found["convs"]:
        said.append(f"{len(found['dense_convs'])} of {found['convs']} convolutions stay dense")
    return said


def gradients(model: nn.Module, inputs: Sequence[Tensor]) -> set[str] | str:
    """Names of the parameters that a backward pass in train mode reaches, or why there is none."""
    torch.manual_seed(SEED)
    state = {n: b.clone() for n, b in model.named_buffers()}
    try:
        outputs = [t for t in tensors_of(model.train()(*inputs)) if t.requires_grad]
        torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    except Exception as error:
        return short(error)
    finally:
        for n, b in model.named_buffers():
            b.copy_(state[n])
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return reached


def layers(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Weight name -> ``("conv" or "linear", shape)``. Weights of four axes in other modules are convolutions too; those
    of one channel in and one out (ECA slides them over the channels) have none to lose and are left out."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, module in model.named_modules():
        for leaf, value in module.named_parameters(path, recurse=False):
            is_conv = isinstance(module, nn.modules.conv._ConvNd) and value.dim() >= 3 and value.shape[:2] != (1, 1)
            if is_conv or (value.dim() == 4 and leaf.endswith("weight") and value.numel() > max(value.shape)):
                found[leaf] = ("conv", tuple(value.shape))
            elif isinstance(module, nn.Linear) and value.dim() == 2:
                found[leaf] = ("linear", tuple(value.shape))
    return found


def shares(model: nn.Module, small: nn.Module | Mapping[str, tuple[int, ...]]) -> Row:
    """How many convolutions and linear layers have at most 55 % of their output or input channels left."""
    now = small if isinstance(small, Mapping) else {n: tuple(p.shape) for n, p in small.named_parameters()}
    return shares_of(layers(model), now)


def shares_of(before: Mapping[str, tuple[str, tuple[int, ...]]], now: Mapping[str, tuple[int, ...]]) -> Row:
    row: Row = {"convs": 0, "convs_shrunk": 0, "linears": 0, "linears_shrunk": 0, "dense_convs": []}
    for name, (kind, shape) in before.items():
        row[f"{kind}s"] += 1
        left = now.get(name, shape)
        if left[0] <= SHRUNK * shape[0] or left[1] <= SHRUNK * shape[1]:
            row[f"{kind}s_shrunk"] += 1
        elif kind == "conv":
            row["dense_convs"].append(name.removesuffix(".weight"))
    return row


def tensors_of(output: object) -> list[Tensor]:
    return [t for t in flatten(output)[0] if t.is_floating_point()]


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest ``max|a - b| / max|b|`` over the outputs; infinite where shapes differ or numbers are not finite."""
    if [t.shape for t in got] != [t.shape for t in wanted] or not wanted:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
            return float("inf")
        worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30))
    return worst


def liveliness(outputs: Sequence[Tensor]) -> float:
    """How much the examples of a batch differ, relative to the outputs' size; the least lively output counts."""
    return min(float((t - t[:1]).abs().max()) / max(float(t.abs().max()), 1e-30) for t in outputs)


def outcome(forward: Callable[[], Iterable[Tensor]]) -> str:
    """Empty if the forward pass gives finite numbers, else what went wrong."""
    try:
        finite = all(bool(torch.isfinite(t).all()) for t in forward())
    except Exception as error:
        return short(error)
    return "" if finite else "outputs are not finite"


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds of processor time it took; with one thread, other processes do not disturb it."""
    start = time.process_time()
    result = function()
    return result, round(time.process_time() - start, 3)


def short(error: BaseException, limit: int = 160) -> str:
    """An error in one line, without anybody's paths."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"(/[\w.+-]+){2,}/", "", text)
    return f"{type(error).__name__}: {text}"[:limit] if text else type(error).__name__


# ---------------------------------------------------------------------------------------------- processes, files


def in_process(function: Callable[[], Row], *, cpu_s: int, gib: float = 14.0) -> Row:
    """``function()`` in a process of its own, or ``{"error": why}``; limits are processor time and address space."""
    context = multiprocessing.get_context("fork")  # everything is imported already
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), int(gib * 2**30)))
        try:
            sender.send(function())
        except Exception as error:
            sender.send({"error": short(error, 400), "kind": type(error).__name__})

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        found: Row = receiver.recv()
    except EOFError:
        found = {}
    process.join()
    if found:
        return found
    if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"error": f"over {cpu_s} s of processor time", "kind": "Timeout"}
    return {"error": f"the process ended with {process.exitcode}", "kind": "Crash"}


def prepare() -> None:
    """One thread, no warnings, and both model libraries imported before any process is forked."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names.build("zoo:resnet20")
    importlib.import_module("torch._dynamo")  # torch.export imports it at its first use
    from secateur.zoo.torchvision_shim import import_torchvision

    import_torchvision()
    import timm

    assert timm


def header(command: str) -> Row:
    """Machine, versions, seed and the command, as every result file carries them."""
    packages = ("torch", "torchvision", "timm", "torch-pruning", "numpy")
    return {
        "command": command,
        "machine": f"{_processor()}, {os.cpu_count()} cores, one thread",
        "python": platform.python_version(),
        "secateur": sc.__version__,
        **{name: _version(name) for name in packages},
        "seed": SEED,
        "times": "seconds of processor time",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, text: str) -> None:
    """Write aside, then rename: a run that is cut short leaves the last whole file."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def write_json(path: Path, value: object) -> None:
    write(path, json.dumps(value, indent=1) + "\n")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def head_of(record: Mapping[str, object]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in record.items()) + "\n"
