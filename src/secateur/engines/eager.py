"""Torch as it comes, one operator after the other: on the model itself, or on a copy in ``channels_last``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.capture import all_tensors, in_mode
from secateur.engines.protocol import Exports, Prepared
from secateur.graph import Inputs, as_arguments, unwrap
from secateur.nests import flatten, unflatten

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The layout with channels last, by the number of axes."""


class OnTensors(nn.Module):
    """Calls a model that is in eval mode with tensors only, in and out, as exporters want it."""

    def __init__(self, model: nn.Module, skeleton: Any) -> None:
        super().__init__()
        self.model, self.training = model, False
        self.skeleton = lambda: skeleton  # a closure: torch.export would look into a container

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = unflatten(self.skeleton(), tensors)
        return tuple(flatten(self.model(*args, **kwargs))[0])


@dataclass(frozen=True)
class TorchRun:
    """A call of ``function`` on tensors on ``device``, laid out by ``layout``, gradients off."""

    function: Callable[..., Any]
    device: torch.device
    layout: Callable[[torch.Tensor], torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> object:
        # no inference_mode: what the model keeps of its first forward (a table of positions) must do for training too
        with torch.no_grad():
            out = self.function(*self.args, **self.kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return out

    def outputs(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        call = self if inputs is None else ready(self.function, self.device, inputs, layout=self.layout)
        # copies: an output may be a view of what the model holds, or the same memory run after run
        return [t.detach().cpu().clone() for t in flatten(call())[0]]


def ready(
    function: Callable[..., Any],
    device: torch.device,
    inputs: Inputs,
    *,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> TorchRun:
    """A call of ``function`` on ``inputs``, moved to where they are needed."""
    tensors, skeleton = flatten(as_arguments(inputs))
    args, kwargs = unflatten(skeleton, [layout(tensor.detach().to(device)) for tensor in tensors])
    return TorchRun(function, device, layout, args, kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU for a model without any."""
    for _, tensor in all_tensors(model):
        return tensor.device
    return torch.device("cpu")


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its channels innermost in memory, if it has rows and columns."""
    wanted = FORMATS.get(tensor.dim())
    return tensor if wanted is None else tensor.contiguous(memory_format=wanted)


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights want no gradient: an engine may do with it what it likes."""
    twin = copy.deepcopy(unwrap(model))
    for module in twin.modules():
        module.training = False
    for _, tensor in all_tensors(twin):
        tensor.requires_grad_(False) if tensor.is_leaf else tensor.detach_()
    return twin


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch on ``threads`` threads for the block's length."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def prepare_eager(
    model: nn.Module, example_inputs: Inputs, *, threads: int = 1, exports: Exports | None = None
) -> Iterator[Prepared]:
    """The model itself, in eval mode while the context is open."""
    with torch_threads(threads), in_mode(model, False):
        yield ready(model, device_of(model), example_inputs)


@contextmanager
def prepare_channels_last(
    model: nn.Module, example_inputs: Inputs, *, threads: int = 1, exports: Exports | None = None
) -> Iterator[Prepared]:
    """A copy with channels innermost in weights and inputs: a processor's vectors then run along them."""
    twin = copied(model)
    with torch.no_grad():
        for _, tensor in all_tensors(twin):
            tensor.data = channels_last(tensor.data)
    with torch_threads(threads):
        yield ready(twin, device_of(twin), example_inputs, layout=channels_last)


def torch_version() -> str:
    """Torch's version, the build included."""
    return str(torch.__version__)
