"""Operations that move positions: the labels go through the operation themselves, so that offsets of concatenations,
repeats of flattenings and orders of shuffles need no code of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from secateur.labels import Factor, Factors, Shape, compress, on_axis, reshape_factor, spread, varying, widen
from secateur.propagation import Call, Result, Rule

_LONE = "a single channel is taken by its number"


def axes_moved(call: Call) -> Factors:
    """permute, transpose, unsqueeze, ...: run on the labels as they are."""
    node = call.node
    return [node.target(f, *node.args[1:], **node.kwargs) for f in call.factors(node.args[0])]  # type: ignore[operator]


def reshaped(call: Call) -> Factors:
    """view, reshape, flatten, unflatten, squeeze, ...: only the two shapes matter."""
    source = call.tensors()[0]
    return _kept(call, [reshape_factor(f, call.shape(source), call.out_shape) for f in call.factors(source)])


def _kept(call: Call, factors: Sequence[Factor]) -> Factors:
    """Canonical form; a factor that varies nowhere stands for one channel out of many, and is locked."""
    found = []
    for factor in map(compress, factors):
        if factor.numel() == 1:
            call.labels.lock(factor, _LONE)
        else:
            found.append(factor)
    return found


def _run(call: Call, factor: Factor, axes: Sequence[int] | None) -> Any:
    """The operation itself, on labels spread to real size along the axes it works on."""
    source = call.tensors()[0]
    spread_out = spread(factor, call.shape(source), axes)
    node = call.node

    def value(n: fx.Node) -> Any:
        return spread_out if n is source else call.constant(n)

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def picked(call: Call) -> Result:
    """slice, select, split, index_select, roll, flip, ...: run on the labels along the axis they work on."""
    axes = _axes(call)
    source = call.tensors()[0]
    if not call.several:
        return _kept(call, [_run(call, f, axes) for f in call.factors(source)])
    results: list[list[Factor]] = [[] for _ in call.out_shapes]
    for factor in call.factors(source):
        pieces = _run(call, factor, axes)
        if call.p.shared.tie_halves and len({p.shape for p in pieces}) == 1:
            for piece in pieces[1:]:
                call.labels.join(pieces[0], piece)
        for found, piece in zip(results, pieces, strict=True):
            found.append(piece)
    return tuple(_kept(call, found) for found in results)


def _axes(call: Call) -> list[int] | None:
    for key in ("dim", "dims"):
        if key in call.args:
            value = call.args[key]
            return None if value in (None, []) else list(value) if isinstance(value, (list, tuple)) else [value]
    return [0]


def indexed(call: Call) -> Factors:
    """``x[:, table]`` with constant tables; tables that are computed lock what they pick from."""
    indices = call.args["indices"]
    axes = [d for d, index in enumerate(indices) if index is not None]
    return _kept(call, [_run(call, f, axes) for f in call.factors(call.args["self"])])


def expanded(call: Call) -> Factors:
    """The same labels; a map that is copied onto every channel (axis 1) gets new ones: any of the copies may go."""
    source, rank = call.tensors()[0], len(call.out_shape)
    found = [widen(f, rank) for f in call.factors(source)]
    if call.name == "expand_as":
        other = call.args["other"]
        return call.merge([(found, call.shape(source)), (call.factors(other), call.shape(other))])
    if rank > 2 and call.shape(source)[1:2] == (1,) and len(call.shape(source)) == rank and call.out_shape[1] > 1:
        found.append(on_axis(call.labels.fresh(call.out_shape[1]), 1, rank))
    return found


def whole(call: Call) -> Result:
    """repeat, tile, pixel_shuffle, ...: run on the labels spread over all axes but a batch they do not vary along."""
    source = call.tensors()[0]
    shape = call.shape(source)
    return _kept(call, [_run(call, f, range(1, len(shape)) if f.shape[0] == 1 else None) for f in call.factors(source)])


def repeated(call: Call) -> Factors:
    source = call.tensors()[0]
    rank = len(call.out_shape)
    times = call.constant(list(call.args["repeats" if "repeats" in call.args else "dims"]))
    found = []
    for factor in call.factors(source):
        wide = widen(factor, rank)
        found.append(
            wide.repeat([k if wide.shape[d] > 1 else 1 for d, k in enumerate([1] * (rank - len(times)) + times)])
        )
    return _kept(call, found)


def channel_shuffle(call: Call) -> Factors:
    x, groups = call.args["self"], call.args["groups"]
    labels, rest = call.axis(x, 1)
    if labels is None:
        return rest
    rows = labels.view(groups, -1)
    call.labels.join(rows, rows[:1])  # what stays must still fall into equal parts
    return [*rest, on_axis(rows.t().reshape(-1), 1, len(call.shape(x)))]


def windows(call: Call) -> Factors:
    """``x.unfold(axis, size, step)``: windows along ``axis``, their content on a new last axis."""
    axis, found = call.args["dimension"], []
    for factor in call.factors(call.args["self"]):
        found.append(_run(call, factor, [axis]) if factor.shape[axis] > 1 else factor.unsqueeze(-1))
    return _kept(call, found)


def im2col(call: Call) -> Factors:
    """``[B, C, H, W]`` to ``[B, C * kernel, L]``: each channel's window side by side."""
    x = call.args["self"]
    labels, rest = call.axis(x, 1)
    call.lock(rest, "its axis is unfolded")
    if labels is None:
        return []
    return [on_axis(labels.repeat_interleave(call.out_shape[1] // call.shape(x)[1]), 1, 3)]


def padded(call: Call) -> Factors:
    """Constants beside the channels are channels of their own, free to go where they are added to others (option-A
    shortcuts); with ``prefer="module"`` they carry no label. Reflected, repeated or cropped channels are locked."""
    x, pad = call.args["self"], call.constant(list(call.args["pad" if "pad" in call.args else "padding"]))
    rank = len(call.shape(x))
    amounts = {rank - 1 - i: (int(pad[2 * i]), int(pad[2 * i + 1])) for i in range(len(pad) // 2)}
    touched = {axis: both for axis, both in amounts.items() if both != (0, 0)}
    found = []
    for factor in call.factors(x):
        on = [d for d in touched if factor.shape[d] > 1]
        if on and (call.name not in ("constant_pad_nd", "pad") or min(touched[on[0]]) < 0 or len(on) > 1):
            call.labels.lock(factor, "its axis is cropped, or padded by reflection or repetition")
        elif on:
            axis, (front, back) = on[0], touched[on[0]]
            labels = call.single(factor, (axis,)).reshape(-1)
            zeros = call.p.shared.tie_halves
            sides = [torch.zeros(k, dtype=torch.int64) if zeros else call.labels.fresh(k) for k in (front, back)]
            factor = on_axis(torch.cat([sides[0], labels, sides[1]]), axis, rank)
        found.append(factor)
    return found


def concatenated(call: Call) -> Factors:
    tensors = call.args["tensors"]
    rank = len(call.out_shape)
    items = [(call.factors(t), call.shape(t)) for t in tensors if call.shape(t) != (0,)]
    return _concatenate(call, items, call.args["dim"] % rank)


def stacked(call: Call) -> Factors:
    tensors = call.args["tensors"]
    axis = call.args["dim"] % len(call.out_shape)
    items = []
    for t in tensors:
        shape = call.shape(t)
        items.append(([f.unsqueeze(axis) for f in call.factors(t)], (*shape[:axis], 1, *shape[axis:])))
    return _concatenate(call, items, axis)


def _concatenate(call: Call, items: Sequence[tuple[Factors, Shape]], axis: int) -> Factors:
    """Along ``axis`` the parts' labels stand one after another; along other axes they are tied."""
    along = [[f for f in factors if f.shape[axis] > 1] for factors, _ in items]
    beside = [[f for f in factors if f.shape[axis] == 1] for factors, _ in items]
    result: Factors = []
    if any(beside):
        flat = [tuple(1 if d == axis else k for d, k in enumerate(shape)) for _, shape in items]
        result = call.merge(list(zip(beside, flat, strict=True)))
    for i in range(max(map(len, along))):
        axes = {d for part in along if len(part) > i for d in varying(part[i])} | {axis}
        pieces = []
        for part, (_, shape) in zip(along, items, strict=True):
            size = [k if d in axes else 1 for d, k in enumerate(shape)]
            pieces.append(part[i].expand(size) if len(part) > i else torch.zeros(size, dtype=torch.int64))
        result.append(compress(torch.cat(pieces, axis)))
    return result


def pooled(call: Call) -> Result:
    """Pooling and resampling over space: positions of labelled space are joined."""
    x = call.tensors()[0]
    rank = len(call.shape(x))
    space = next(k for k in (1, 2, 3) if f"{k}d" in call.name)
    found: Factors = []
    for factor in call.factors(x):
        axes = varying(factor)
        inside = [d for d in axes if d >= rank - space]
        if inside and len(inside) == len(axes):
            call.labels.lock(factor, "it is pooled over")
            continue
        for d in inside:
            factor = call.labels.join_along(factor, d)
        found.append(factor)
    return tuple(found for _ in call.out_shapes) if call.several else found


def glu(call: Call) -> Factors:
    """``a * sigmoid(b)`` for the two halves: they are tied."""
    axis, found = call.args["dim"], []
    for factor in call.factors(call.args["self"]):
        if factor.shape[axis] > 1:
            a, b = factor.chunk(2, axis)
            call.labels.join(a, b)
            factor = compress(a)
        found.append(factor)
    return found


def embedding(call: Call) -> Factors:
    """``weight [V, C]`` looked up by numbers: the table's rows are locked, its columns are channels."""
    weight = call.args["weight"]
    columns, rows = call.axis(weight, 1)
    call.set_role(weight, 1, "writes")
    call.lock(rows, "its rows are looked up by number")
    return [] if columns is None else [on_axis(columns, -1, len(call.out_shape))]


RULES: dict[str, Rule] = {
    **dict.fromkeys("permute transpose unsqueeze t movedim moveaxis swapaxes numpy_T mT adjoint".split(), axes_moved),
    **dict.fromkeys("view reshape _unsafe_view flatten unflatten squeeze view_as reshape_as ravel".split(), reshaped),
    **dict.fromkeys(
        "slice select narrow split split_with_sizes chunk unbind tensor_split index_select roll flip "
        "unsafe_chunk unsafe_split rot90 repeat_interleave".split(),
        picked,
    ),
    **dict.fromkeys("expand expand_as broadcast_to".split(), expanded),
    **dict.fromkeys("repeat tile".split(), repeated),
    **dict.fromkeys("pixel_shuffle pixel_unshuffle".split(), whole),
    **dict.fromkeys("channel_shuffle native_channel_shuffle".split(), channel_shuffle),
    **dict.fromkeys("constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d".split(), padded),
    **dict.fromkeys("cat concat concatenate".split(), concatenated),
    **dict.fromkeys(
        "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
        "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa".split(),
        pooled,
    ),
    "index": indexed,
    "embedding": embedding,
    "stack": stacked,
    "im2col": im2col,
    "unfold": windows,
    "glu": glu,
}
