"""Affine operations as matrices: every convolution, transposed convolution and linear layer is ``y = W p + b`` over
patches ``p`` of its input, whatever its stride, padding, dilation and groups.

A transposed convolution is the convolution of its input with zeros between the elements, by the mirrored kernel.

Shapes: ``G`` partitions, ``N`` samples times output positions, ``O`` and ``I`` outputs and inputs of one partition,
``K`` kernel positions; a patch has ``P = I K`` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from secateur.nodes import named_args, op_name, shape_of

CHUNK = 2**25
"""Bytes of patches that are made at a time."""
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Layout:
    """How an operation lays its input against its weight. ``turned``: the weight of a linear operation is ``[I, O]``.
    ``padding``: zeros before and after, by axis; negative where a transposed convolution crops."""

    kind: Literal["linear", "conv", "transposed"]
    turned: bool = False
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()

    @property
    def channels_axis(self) -> int:
        """The axis of the input that is summed over."""
        return -1 if self.kind == "linear" else 1


def layout_of(node: fx.Node, turned: bool) -> Layout:
    """The layout of a captured call. ``turned``: its weight is the transpose of a parameter."""
    name, args = op_name(node), named_args(node)
    if name == "linear":
        return Layout("linear", turned)
    if name in ("matmul", "mm", "addmm"):
        return Layout("linear", not turned)
    transposed = "transpose" in name
    kernel = (shape_of(args["weight"]) or ())[2:]
    rank = len(kernel)
    stride, dilation = _each(args["stride"], rank), _each(args["dilation"], rank)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if args["padding"] == "same":
        padding = tuple((span // 2, span - span // 2) for span in spans)
    elif args["padding"] == "valid":
        padding = ((0, 0),) * rank
    else:
        padding = tuple((p, p) for p in _each(args["padding"], rank))
    if transposed:
        more = _each(args["output_padding"], rank)
        padding = tuple((s - p[0], s - p[0] + m) for s, p, m in zip(spans, padding, more, strict=True))
    kind: Literal["conv", "transposed"] = "transposed" if transposed else "conv"
    return Layout(kind, False, args["groups"], kernel, stride, dilation, padding)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """One number stands for all axes."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * rank if len(numbers) == 1 else numbers


def matrix(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[G, O, I, K]`` of a parameter as it is stored."""
    if layout.kind == "linear":
        return (weight.mT if layout.turned else weight)[None, :, :, None]
    flat = weight.flatten(2)
    if layout.kind == "conv":
        return flat.unflatten(0, (layout.groups, -1))
    return flat.unflatten(0, (layout.groups, -1)).transpose(1, 2).flip(-1)


def weight_from(whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of ``matrix``."""
    if layout.kind == "linear":
        flat = whole[0, :, :, 0]
        return flat.mT if layout.turned else flat
    if layout.kind == "transposed":
        whole = whole.flip(-1).transpose(1, 2)
    return whole.flatten(0, 1).unflatten(-1, layout.kernel)


def outputs(x: torch.Tensor, whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[G, N, O]`` of ``y = W p`` without bias."""
    if layout.kind == "linear":
        return F.linear(x.flatten(0, -2), whole[0, :, :, 0])[None]
    x, stride = _laid_out(x, layout)
    weight = whole.flatten(0, 1).unflatten(-1, layout.kernel)
    y = _CONVOLUTIONS[len(layout.kernel)](x, weight, stride=stride, dilation=layout.dilation, groups=layout.groups)
    return y.flatten(2).unflatten(1, (layout.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def patches(x: torch.Tensor, layout: Layout, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """``[G, n, P]`` for a part of the samples after the other, in the order of ``outputs``."""
    if layout.kind == "linear":
        for rows in x.flatten(0, -2).split(max(1, CHUNK // (x.shape[-1] * dtype.itemsize))):
            yield rows[None].to(dtype)
        return
    x, stride = _laid_out(x, layout)
    rank = len(layout.kernel)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], layout.kernel, stride, layout.dilation, strict=True)
    ]
    one = x.shape[1] * math.prod(layout.kernel) * math.prod(sizes) * dtype.itemsize
    for part in x.split(max(1, CHUNK // max(one, 1))):
        for axis in range(rank):
            span = layout.dilation[axis] * (layout.kernel[axis] - 1) + 1
            part = part.unfold(2 + axis, span, stride[axis])[..., :: layout.dilation[axis]]
        part = part.unflatten(1, (layout.groups, -1)).movedim(1, 0)  # [G, B, I, positions ..., kernel ...]
        part = part.movedim(2, 2 + rank).to(dtype)
        yield part.reshape(layout.groups, -1, math.prod(part.shape[2 + rank :]))


def _laid_out(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The input with its padding written out, ``[B, C, ...]``, and the stride that is left to make."""
    rank = len(layout.kernel)
    x = x[None] if x.dim() == rank + 1 else x
    stride = layout.stride
    if layout.kind == "transposed":
        wide = x.new_zeros(*x.shape[:2], *[(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)])
        wide[(slice(None), slice(None), *[slice(None, None, s) for s in stride])] = x
        x, stride = wide, (1,) * rank
    return F.pad(x, [n for pair in reversed(layout.padding) for n in pair]), stride
