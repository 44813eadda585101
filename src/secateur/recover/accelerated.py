"""Where training runs and in which precision, by Hugging Face Accelerate: devices, processes, autocast, loss scaling.

Accelerate keeps its state in globals that can be set once; here every training run gets its own, and whatever the
user's program had made of them is put back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import BadRequest, MissingExtra
from secateur.processes import world

MISSING = "training needs Hugging Face Accelerate\n  do: pip install 'secateur[train]'"


@contextmanager
def accelerated(precision: str, *, cpu: bool = False) -> Iterator[Any]:
    """An ``Accelerator`` for ``precision`` ("fp32", "bf16", "fp16"), on the CPU if ``cpu``. Where a launcher started
    several processes, they are joined first, and stay so. Raises MissingExtra, and BadRequest for a precision that the
    device does not have."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError as error:
        raise MissingExtra(MISSING) from error
    cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    shared = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        PartialState(cpu=cpu)
        check_precision(precision, PartialState().device)
        yield Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu, device_placement=False)
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


def join_processes(*, cpu: bool = False) -> None:
    """Make the processes that ``torchrun`` or ``accelerate launch`` started one group (gloo on the CPU, nccl on GPUs),
    so that ``rank`` and ``world`` speak of them. Training does this by itself; call it for what comes before.

    Does nothing in a process that was started alone, or where there is a group already. Raises MissingExtra.
    """
    if world() > 1 or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    with accelerated("fp32", cpu=cpu):
        pass


def check_precision(precision: str, device: torch.device) -> None:
    """Raises BadRequest where ``device`` cannot train in ``precision``."""
    if precision == "fp16" and device.type == "cpu":
        raise BadRequest("precision='fp16' needs a GPU: a CPU has no loss scaling\n  do: use 'bf16', or 'fp32'")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise BadRequest(f"precision='bf16' is not supported by {torch.cuda.get_device_name()}\n  do: use 'fp16'")


def over_processes(model: nn.Module, device: torch.device) -> nn.Module:
    """``model``, wrapped so that its gradients are the means over all processes; itself where there is but one.

    Buffers are not sent round at every step: batch norm counts what its process sees, until they are made equal.
    """
    if world() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
