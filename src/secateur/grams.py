"""Output moments: second moments of what comes through each channel into an affine reader, over all its outputs.

For ``y = W p`` over patches ``p`` let ``z_c`` be the part of an output that comes through channel ``c``: the sum of
``W[o, i, k] p[i, k]`` over the columns ``i`` that ``c`` owns and the kernel positions ``k``. ``Sums`` adds up
``z_c z_c'``, ``z_c t``, ``t^2`` and ``y^2`` over all filters ``o`` and all locations of all images.

Shapes: as in ``patches``; ``C`` channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from secateur.core import OutputMoments
from secateur.correlations import Geometry, Images, Place, add_sums_, folded, geometry_of
from secateur.patches import (
    Layout,
    derivative,
    laid_out,
    matrix,
    output_sizes,
    outputs,
    patches,
    patches_at,
    stuffed,
    unstuffed,
)
from secateur.processes import sum_over_processes_
from secateur.statistics import accumulator

BLOCK = 2**26
"""Bytes of what is made at a time: sums of one reader, or its outputs by channel."""
PIECE = 2**24
"""Bytes of the input, as float64, that are worked on at a time: few enough to stay in a processor's cache, enough for
matrix products to be fast (measured; half of it costs a fifth more time)."""
HOLD = 2**24
"""Bytes of inputs that are held back for a reader whose weights cost more than its moments (small maps of many
channels), until there are enough of them."""


@dataclass(eq=False)
class Sums:
    """Sums over the outputs of one reader, in the names of ``OutputMoments``: ``gram [C, C]``, ``target [C]``, scalars
    ``goal``, ``energy`` and ``samples``; to be read after ``finish_``. ``columns`` and ``channels``: as a ``Consumer``
    has them. ``held``: inputs that were not added yet, at most ``hold`` bytes."""

    columns: torch.Tensor
    channels: torch.Tensor
    gram: torch.Tensor
    target: torch.Tensor
    goal: torch.Tensor
    energy: torch.Tensor
    samples: torch.Tensor
    hold: int
    held: Held | None = None

    @staticmethod
    def of(
        columns: torch.Tensor, channels: torch.Tensor, count: int, device: torch.device, *, hold: int | None = None
    ) -> Sums:
        """Empty sums for ``count`` channels that lie at ``columns``. ``hold``: how many bytes of inputs may be held
        back, ``HOLD`` at most."""

        def zero(*size: int) -> torch.Tensor:
            return torch.zeros(size, device=device, dtype=accumulator(device))

        most = HOLD if hold is None else min(hold, HOLD)
        return Sums(columns, channels, zero(count, count), zero(count), zero(), zero(), zero(), most)

    def tensors(self) -> list[torch.Tensor]:
        """All sums, with what was held back."""
        settle_(self)
        return [self.gram, self.target, self.goal, self.energy, self.samples]


@dataclass(frozen=True, eq=False)
class Table:
    """Where channels lie in the partitions that have any: ``columns [G, C, m]`` of the input, ``channels [G, C]``.
    Where partitions or channels have fewer, any other stands in their place, and ``real [G, C, m]`` is 0."""

    parts: torch.Tensor
    columns: torch.Tensor
    channels: torch.Tensor
    real: torch.Tensor

    @staticmethod
    def of(columns: torch.Tensor, channels: torch.Tensor, inputs: int) -> Table:
        """``inputs``: how many columns a partition has."""
        key = columns // inputs * (int(channels.max()) + 1) + channels
        order = torch.argsort(key, stable=True)
        owners, counts = torch.unique_consecutive(key[order], return_counts=True)
        part = columns[order][counts.cumsum(0) - 1] // inputs
        parts, sizes = torch.unique_consecutive(part, return_counts=True)
        row = torch.repeat_interleave(torch.arange(len(parts)), sizes)
        place = torch.arange(len(owners)) - (sizes.cumsum(0) - sizes)[row]
        shape = (len(parts), int(sizes.max()), int(counts.max()))
        index = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        at = (row.repeat_interleave(counts), place.repeat_interleave(counts), index)
        table = (parts * inputs)[:, None, None].expand(shape).clone()
        table[at] = columns[order]
        owner = torch.zeros(shape[:2], dtype=torch.long)
        owner[row, place] = channels[order][counts.cumsum(0) - 1]
        real = torch.zeros(shape, dtype=torch.bool)
        real[at] = True
        return Table(parts, table, owner, real)

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, G C m, ...]`` of ``[B, columns, ...]``."""
        index = self.columns.reshape(-1)
        whole = len(index) == x.shape[1] and bool((index == torch.arange(len(index))).all())
        return x if whole else x.index_select(1, index.to(x.device))

    def of_weight(self, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[G, K, O, C m]`` of ``[all partitions, O, columns of one, K]``."""
        own = whole[self.parts.to(whole.device)].permute(0, 3, 1, 2).to(dtype)
        index = (self.columns % whole.shape[2]).flatten(1).to(whole.device)
        picked = own.gather(3, index[:, None, None].expand(*own.shape[:3], -1))
        return picked * self.real.flatten(1)[:, None, None].to(picked)

    def scattered(self, found: torch.Tensor, count: int) -> torch.Tensor:
        """``[count, count]`` of ``[G, C, C]``, summed over the partitions."""
        channels = self.channels.to(found.device)
        if channels.shape[1] == count and bool((channels == torch.arange(count, device=found.device)).all()):
            return found.sum(0)
        whole = found.new_zeros(count, count)
        return whole.index_put_((channels[:, :, None], channels[:, None, :]), found, accumulate=True)


@dataclass(frozen=True)
class Follows:
    """Whether target and goal are those of the same inputs, and whether the energy is, so that their Gram matrix gives
    them."""

    target: bool
    energy: bool


@dataclass(eq=False)
class Held:
    """Inputs of a reader that were not added yet, ``[B, G C m, ...]`` each, and how it reads them. ``follows``: what
    else follows from their Gram matrix."""

    weight: torch.Tensor
    layout: Layout
    table: Table
    geometry: Geometry
    follows: Follows
    images: list[torch.Tensor] = field(default_factory=list)


def add_moments_(
    sums: Sums,
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: Layout,
    *,
    t: torch.Tensor | None = None,
    energy: torch.Tensor | None = None,
) -> None:
    """Add the outputs of one batch. ``x``: all that the reader reads; ``weight``: the parameter as it is stored, the
    same in every call until ``finish_``.

    ``t [G, N, O]``, in the order of ``patches.outputs``: what the parts of all channels should sum to; without it, what
    they do sum to. ``energy``: the sum of the squares of the outputs; without it, those of all that is read here.
    """
    whole = matrix(weight, layout)
    x = x.reshape(-1, x.shape[-1]) if layout.kind == "linear" else x[None] if x.dim() == len(layout.kernel) + 1 else x
    if energy is None and len(sums.columns) < whole.shape[0] * whole.shape[2]:
        energy = outputs(x, whole, layout).to(sums.gram.dtype).square().sum()
    if energy is not None:
        sums.energy += energy
    if t is not None:
        _add_target_(sums, x, whole, layout, t.to(sums.gram.dtype))
    table = Table.of(sums.columns.cpu(), sums.channels.cpu(), whole.shape[2])
    x = table.of_input(stuffed(x, layout))
    geometry = geometry_of(tuple(x.shape[2:]), layout)
    sums.samples += whole.shape[0] * whole.shape[1] * len(x) * math.prod(axis.outputs for axis in geometry.axes)
    follows = Follows(t is None, energy is None)
    one, fixed, other = _costs(table, geometry, whole.shape[1])
    size = max(1, x[:1].numel() * x.element_size())
    if other < one + fixed / max(1, sums.hold // size):
        _add_gram_(sums, _by_outputs(x, table, whole, layout, sums.gram.dtype), table, follows)
        return
    if sums.held is not None and (sums.held.follows != follows or sums.held.geometry is not geometry):
        settle_(sums)
    held = sums.held = sums.held or Held(weight, layout, table, geometry, follows)
    held.images.append(x)
    count = sum(map(len, held.images))
    if count * one >= 16 * fixed or count * size >= sums.hold:
        settle_(sums)
    else:  # the network may write into either
        held.images[-1] = x.clone()
        held.weight = held.weight.clone() if len(held.images) == 1 else held.weight


def _costs(table: Table, geometry: Geometry, filters: int) -> tuple[float, float, float]:
    """Floating-point operations of either way (see the module's docstring): of the first for each sample, and once for
    all that are added together; and of the second for each sample."""
    parts, channels, own = table.columns.shape
    square = 2.0 * parts * (channels * own) ** 2
    samples = 2.0 * parts * filters * math.prod(axis.outputs for axis in geometry.axes)
    kernel = math.prod(geometry.kernel)
    return (
        square * geometry.products,
        square * filters * geometry.matrices[1],
        samples * (channels * own * kernel + channels**2),
    )


def settle_(sums: Sums) -> None:
    """Add what was held back."""
    held, sums.held = sums.held, None
    if held is None:
        return
    table, geometry, dtype = held.table, held.geometry, sums.gram.dtype
    parts, channels, own = table.columns.shape
    weights = table.of_weight(matrix(held.weight, held.layout), dtype)
    x = torch.cat(held.images) if len(held.images) > 1 else held.images[0]
    held.images.clear()
    columns = channels * own
    piece = max(PIECE, 32 * columns**2) // max(1, dtype.itemsize * x[:1].numel())
    rows = max(1, BLOCK // (dtype.itemsize * (geometry.matrices[0] + 4) * parts * own * columns))
    half = weights.new_empty(parts, channels, channels)
    for start in range(0, channels, rows):
        stop = min(start + rows, channels)
        totals: dict[Place, torch.Tensor] = {}
        for part in x.split(max(1, piece)):
            add_sums_(totals, Images(part, parts, geometry, dtype), slice(start * own, stop * own))
        found = folded(totals, weights, geometry, slice(start * own, stop * own))
        half[:, start:stop] = found.reshape(parts, stop - start, own, channels, own).sum((2, 4))
    _add_gram_(sums, half + half.mT, table, held.follows)


def _by_outputs(x: torch.Tensor, table: Table, whole: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """``[G, C, C]``, of the outputs themselves, in blocks of filters."""
    parts, channels, own = table.columns.shape
    gram = torch.zeros(parts, channels, channels, dtype=dtype, device=x.device)
    for p in patches(x, unstuffed(layout, parts), dtype):
        by_channel = p.unflatten(2, (channels, -1)).transpose(1, 2)  # [G, C, n, m K]
        one = dtype.itemsize * parts * channels * (p.shape[1] + by_channel.shape[3])
        for block in whole.split(max(1, BLOCK // (2 * one)), 1):
            weights = table.of_weight(block, dtype)  # [G, K, O, C m]
            weights = weights.unflatten(3, (channels, own)).permute(0, 3, 4, 1, 2).flatten(2, 3)
            z = (by_channel @ weights).flatten(2)
            gram += z @ z.mT
    return gram


def _add_gram_(sums: Sums, found: torch.Tensor, table: Table, follows: Follows) -> None:
    """``found [G, C, C]`` of new outputs, and what else follows from it."""
    gram = table.scattered(found, len(sums.target))
    sums.gram += gram
    if follows.target:
        sums.target += gram.sum(1)
        sums.goal += gram.sum()
    if follows.energy:
        sums.energy += gram.sum()


def _add_target_(sums: Sums, x: torch.Tensor, whole: torch.Tensor, layout: Layout, t: torch.Tensor) -> None:
    """The sum of ``z_c t`` is the product of ``x`` with the derivative of ``sum of y t`` by it, summed over all that
    the channel owns."""
    sums.goal += t.square().sum()
    found = t.new_zeros(x.shape[layout.channels_axis])
    if layout.kind == "linear":
        wide, slope = x.to(t.dtype), t.new_zeros(x.shape)
        step = max(1, BLOCK // (t.element_size() * x.shape[1]))
        for part, weights in zip(t[0].split(step, 1), whole[0, :, :, 0].split(step), strict=True):
            slope += part @ weights.to(t.dtype)
        found = (wide * slope).sum(0)
    else:
        weight = whole.to(t.dtype).flatten(0, 1).unflatten(-1, layout.kernel)
        step = max(1, BLOCK // (t.element_size() * max(x[:1].numel(), t[:, : t.shape[1] // len(x)].numel())))
        for part, own in zip(x.split(step), t.unflatten(1, (len(x), -1)).split(step, 1), strict=True):
            wide, stride = laid_out(part.to(t.dtype), layout)
            slope = derivative(own, wide, weight, replace(layout, stride=stride))
            found += (wide * slope).transpose(0, 1).flatten(1).sum(1)
    columns, channels = sums.columns.to(found.device), sums.channels.to(found.device)
    sums.target.index_add_(0, channels, found[columns])


def places_of(x: torch.Tensor, layout: Layout, samples: int | None = None) -> torch.Tensor:
    """``[B, L]``: the rows of ``patches.outputs`` that each of the ``B`` samples of a batch has; ``samples``: the axis
    that counts them in the input of a linear operation, ``None`` if none does."""
    if layout.kind == "linear":
        rows = torch.arange(x[..., 0].numel(), device=x.device).reshape(x.shape[:-1])
        return rows.reshape(1, -1) if samples is None else rows.movedim(samples, 0).reshape(x.shape[samples], -1)
    batch = len(x) if x.dim() > len(layout.kernel) + 1 else 1
    sizes = output_sizes(x.shape[-len(layout.kernel) :], layout)
    return torch.arange(batch * math.prod(sizes), device=x.device).reshape(batch, -1)


def add_draws_(
    sums: Sums,
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: Layout,
    *,
    draws: tuple[torch.Tensor, torch.Tensor],
    t: torch.Tensor | None = None,
    energy: torch.Tensor | None = None,
) -> None:
    """Add some outputs of one batch: ``draws`` are the filter, counted over all partitions, and the row in
    ``patches.outputs`` of each, ``[n]``. ``t [n]``: what the parts of each should sum to, ``energy``: the sum of the
    squares of the outputs drawn, as in ``add_moments_``."""
    dtype, whole = sums.gram.dtype, matrix(weight, layout)
    parts, outs, columns, kernel = whole.shape
    owner = torch.full((parts * columns,), len(sums.target), device=x.device)
    owner[sums.columns.to(x.device)] = sums.channels.to(x.device)
    size = max(1, BLOCK // (4 * dtype.itemsize * columns * kernel))
    for start in range(0, len(draws[0]), size):
        filters, rows = (d[start : start + size] for d in draws)
        part = filters // outs
        p = patches_at(x, rows, part, layout).to(dtype)
        through = (p * whole[part, filters % outs]).sum(2)
        index = owner.reshape(parts, columns)[part]
        z = through.new_zeros(len(rows), len(sums.target) + 1).scatter_add_(1, index, through)[:, :-1]
        goal = z.sum(1) if t is None else t[start : start + size].to(dtype)
        sums.gram += z.mT @ z
        sums.target += z.mT @ goal
        sums.goal += goal.square().sum()
        if energy is None:
            sums.energy += through.sum(1).square().sum()
    if energy is not None:
        sums.energy += energy
    sums.samples += len(draws[0])


def finish_(sums: Sequence[Sums]) -> None:
    """All that was added, by all processes; to be called once, by all of them, before sums are read."""
    sum_over_processes_([tensor for one in sums for tensor in one.tensors()])


def packed(readers: Sequence[str], sums: Sequence[Sums]) -> OutputMoments:
    """The sums of a group's readers, side by side, on the CPU."""
    kept = [
        torch.stack([t.cpu().double() for t in column]) for column in zip(*(s.tensors() for s in sums), strict=True)
    ]
    gram, target, goal, energy, samples = kept
    return OutputMoments(tuple(readers), samples, gram, target, goal, energy)
