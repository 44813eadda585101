"""Affine operations as matrices: every convolution, transposed convolution and linear layer is ``y = W p + b`` over
patches ``p`` of its input, whatever its stride, padding, dilation and groups.

A transposed convolution is the convolution of its input with zeros between the elements, by the mirrored kernel.

Shapes: ``G`` partitions, ``N`` samples times output positions, ``O`` and ``I`` outputs and inputs of one partition,
``K`` kernel positions; a patch has ``P = I K`` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
        """The axis of the input that is summed over, from the end: there need not be a batch."""
        return -1 - len(self.kernel)


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
        return F.linear(x.reshape(-1, x.shape[-1]), whole[0, :, :, 0])[None]
    x, stride = laid_out(x, layout)
    weight = whole.flatten(0, 1).unflatten(-1, layout.kernel)
    y = _CONVOLUTIONS[len(layout.kernel)](x, weight, stride=stride, dilation=layout.dilation, groups=layout.groups)
    return y.flatten(2).unflatten(1, (layout.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def patches(x: torch.Tensor, layout: Layout, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """``[G, n, P]`` for a part of the samples after the other, in the order of ``outputs``."""
    if layout.kind == "linear":
        for rows in x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // (x.shape[-1] * dtype.itemsize))):
            yield rows[None].to(dtype)
        return
    x, stride = laid_out(x, layout)
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


def patches_at(x: torch.Tensor, rows: torch.Tensor, parts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[n, I, K]``: patches of one partition each, ``parts [n]``, at ``rows [n]`` of ``outputs``."""
    if layout.kind == "linear":
        return x.reshape(-1, x.shape[-1])[rows].unsqueeze(2)
    x = x[None] if x.dim() == len(layout.kernel) + 1 else x
    images, *places = torch.unravel_index(rows, (len(x), *output_sizes(x.shape[2:], layout)))
    flat = rows.new_zeros(len(rows), 1)
    real = torch.ones_like(flat, dtype=torch.bool)
    for axis, (place, size) in enumerate(zip(places, x.shape[2:], strict=True)):
        zeros, step = (layout.stride[axis], 1) if layout.kind == "transposed" else (1, layout.stride[axis])
        taps = torch.arange(layout.kernel[axis], device=x.device) * layout.dilation[axis] - layout.padding[axis][0]
        at = place[:, None] * step + taps
        inside = (at >= 0) & (at < (size - 1) * zeros + 1) & (at % zeros == 0)
        flat = (flat[:, :, None] * size + (at // zeros).clamp(0, size - 1)[:, None]).flatten(1)
        real = (real[:, :, None] & inside[:, None]).flatten(1)
    columns = x.shape[1] // layout.groups
    index = (parts[:, None] * columns + torch.arange(columns, device=x.device))[:, :, None]
    return x.flatten(2)[images[:, None, None], index, flat[:, None]] * real[:, None]


def output_sizes(sizes: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """How many outputs there are along each axis of an input of these ``sizes``."""
    found = []
    axes = zip(sizes, layout.kernel, layout.stride, layout.dilation, layout.padding, strict=True)
    for size, kernel, stride, dilation, (before, after) in axes:
        size, stride = ((size - 1) * stride + 1, 1) if layout.kind == "transposed" else (size, stride)
        found.append((size + before + after - dilation * (kernel - 1) - 1) // stride + 1)
    return tuple(found)


def laid_out(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The input with its padding written out, ``[B, C, ...]``, and the stride that is left to make."""
    x = x[None] if x.dim() == len(layout.kernel) + 1 else x
    x = stuffed(x, layout)
    return F.pad(x, [n for pair in reversed(layout.padding) for n in pair]), unstuffed(layout, layout.groups).stride


def stuffed(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The input with the zeros between its elements that a transposed convolution puts there."""
    if layout.kind != "transposed":
        return x
    wide = x.new_zeros(*x.shape[:2], *[(n - 1) * s + 1 for n, s in zip(x.shape[2:], layout.stride, strict=True)])
    wide[(slice(None), slice(None), *[slice(None, None, s) for s in layout.stride])] = x
    return wide


def unstuffed(layout: Layout, groups: int) -> Layout:
    """What is done to the stuffed input, with so many partitions."""
    if layout.kind != "transposed":
        return replace(layout, groups=groups)
    return replace(layout, kind="conv", groups=groups, stride=(1,) * len(layout.kernel))


def derivative(t: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The derivative of ``sum of y t`` by ``x``, an input that is laid out; ``t [G, B, positions, O]``."""
    rank, stride = len(layout.kernel), layout.stride
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], layout.kernel, stride, layout.dilation, strict=True)
    ]
    along = t.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, sizes).contiguous()
    zero = [0] * rank
    found: torch.Tensor = torch.ops.aten.convolution_backward(
        along, x, weight, None, stride, zero, layout.dilation, False, zero, layout.groups, [True, False, False]
    )[0]
    return found
