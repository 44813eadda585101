"""The Gram matrix of an affine reader from the second moments of its input: ``WᵀW`` times patch moments, folded.

For a reader ``y = W p`` and kernel positions ``k``, ``l`` of its patches

    sum over outputs of z_i z_j = sum over k, l of (W_kᵀ W_l)[i, j] M_kl[i, j],   M_kl[i, j] = sum over n of p_ik p_jl,

where ``z_i`` is what comes through column ``i``. At stride 1, ``M_kl`` sums ``x_i(m) x_j(m + d)`` over the window of
positions ``m`` that ``k`` sees, and ``d`` is all else that it depends on: so the sum over *all* positions is taken once
for each ``d``, and what lies outside of a window, thin boxes along the borders, is taken off. As the result is
symmetric, ``d`` and ``-d`` need only one of them: 13 sums instead of 81 for a 3x3 kernel. At stride ``s`` the same
holds between the images of every ``s``-th position.

Sums for consecutive displacements along the last axis need fewer products than one by one: over tiles of ``t``
positions, the ``r`` sums of products of ``t`` by ``t + r - 1`` numbers are a linear function of ``t + r - 1`` products
of linear functions of either (Toom and Cook's algorithm, transposed; Winograd 1980, "Arithmetic complexity of
computations"). For a 3x3 kernel, 6 products a position remain of 13.

Shapes: ``G`` partitions, ``I`` columns and ``O`` filters of each, ``K`` kernel positions, ``B`` samples, ``T`` tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from secateur.patches import Layout

POINTS = 12
"""The most products of a tile: with more, float64 would lose more than two digits."""
TRANSFORM, COPY = 120.0, 50.0
"""What it costs to make, or to copy, one number that a matrix product takes, in its floating-point operations."""

Box = tuple[tuple[int, int], ...]
"""From and to, by axis."""
Step = tuple[int, int, int]
"""Along one axis: the phases of two images, and the displacement between them."""


@dataclass(frozen=True)
class Axis:
    """One axis of the geometry. All positions are in a frame of ``size`` that the images of all phases share.

    ``outputs``: how many there are. ``real``: where the image of each phase lies in the frame; ``origin``: its first
    element in the input. ``pairs``: for every step, the pairs of kernel positions that it stands between, and the parts
    whose signed sum is their window.
    """

    size: int
    stride: int
    outputs: int
    real: dict[int, tuple[int, int]]
    origin: dict[int, int]
    pairs: dict[Step, dict[tuple[int, int], tuple[tuple[int, tuple[int, int]], ...]]]


@lru_cache(maxsize=256)
def axis_of(length: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int]) -> Axis:
    """The geometry along one axis of an input of ``length``."""
    low, high = padding
    outputs = (length + low + high - dilation * (kernel - 1) - 1) // stride + 1
    places = [(k * dilation % stride, k * dilation // stride) for k in range(kernel)]
    phases = sorted({phase for phase, _ in places})
    real = {p: (-((p - low) // stride), -((p - low - length) // stride)) for p in phases}
    start = min(low for low, _ in real.values())
    origin = {p: real[p][0] * stride + p - low for p in phases}
    real = {p: (a - start, b - start) for p, (a, b) in real.items()}
    pairs: dict[Step, dict[tuple[int, int], tuple[tuple[int, tuple[int, int]], ...]]] = {}
    for (k, (phase, shift)), (j, (other, second)) in itertools.product(enumerate(places), repeat=2):
        d = second - shift
        first, last = max(real[phase][0], real[other][0] - d), min(real[phase][1], real[other][1] - d)
        begin, end = max(first, shift - start), min(last, shift - start + outputs)
        if begin < end:
            parts = [(1, (first, last)), (-1, (first, begin)), (-1, (end, last))]
            kept = tuple((sign, part) for sign, part in parts if part[0] < part[1])
            pairs.setdefault((phase, other, d), {})[k, j] = kept
    return Axis(max(b for _, b in real.values()), stride, outputs, real, origin, pairs)


@dataclass(frozen=True, eq=False)
class Geometry:
    """How the moments of a layout's patches are put together. ``keys``: what stands between two images, by axis, half
    of all (each once with its mirror image). ``padding``: zeros behind each axis that displacements may run into."""

    axes: tuple[Axis, ...]
    kernel: tuple[int, ...]
    keys: tuple[tuple[Step, ...], ...]
    padding: tuple[int, ...]

    def whole(self, key: tuple[Step, ...]) -> Box:
        """All positions at which both images of a key are real."""
        spans = []
        for axis, (phase, other, d) in zip(self.axes, key, strict=True):
            (a, b), (c, e) = axis.real[phase], axis.real[other]
            spans.append((max(a, c - d), min(b, e - d)))
        return tuple(spans)

    @cached_property
    def products(self) -> int:
        """How many positions of a sample all sums together are taken over, tiles left out of account."""
        return sum(math.prod(b - a for a, b in self.whole(key)) for key in self.keys)

    @cached_property
    def matrices(self) -> tuple[int, int]:
        """How many sums are held, and how many products of weights are needed."""
        classes = [self.classes(key) for key in self.keys]
        boxes = sum(len({box for own in found for _, box in own}) for found in classes)
        return boxes, sum(len(pairs) for found in classes for pairs in found.values())

    @cache  # noqa: B019
    def classes(self, key: tuple[Step, ...]) -> dict[tuple[tuple[int, Box], ...], list[tuple[int, int]]]:
        """Pairs of kernel positions (flat numbers), by the signed boxes whose sum is their window."""
        found: dict[tuple[tuple[int, Box], ...], list[tuple[int, int]]] = {}
        for chosen in itertools.product(*(axis.pairs[step].items() for axis, step in zip(self.axes, key, strict=True))):
            first = second = 0
            for ((k, j), _), size in zip(chosen, self.kernel, strict=True):
                first, second = first * size + k, second * size + j
            boxes = tuple(
                (math.prod(sign for sign, _ in parts), tuple(part for _, part in parts))
                for parts in itertools.product(*(parts for _, parts in chosen))
            )
            found.setdefault(boxes, []).append((first, second))
        return found


@lru_cache(maxsize=256)
def geometry_of(sizes: tuple[int, ...], layout: Layout) -> Geometry:
    """The geometry of a convolution of an input of these sizes, or, without any, of a linear operation."""
    stride = (1,) * len(sizes) if layout.kind == "transposed" else layout.stride
    axes = tuple(map(axis_of, sizes, layout.kernel, stride, layout.dilation, layout.padding))
    keys = []
    for key in itertools.product(*(axis.pairs for axis in axes)):
        if key >= mirrored(key):
            keys.append(key)
    keys.sort(key=_alike)
    padding = tuple(max((abs(d) for _, _, d in axis.pairs), default=0) for axis in axes)
    return Geometry(axes, layout.kernel, tuple(keys), padding)


def _alike(key: tuple[Step, ...]) -> tuple[object, ...]:
    """Equal for keys that differ in nothing but their last displacement."""
    return (key[:-1], key[-1][:2]) if key else ()


def mirrored(key: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same the other way round."""
    return tuple((other, phase, -d) for phase, other, d in key)


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``tile`` positions against the same moved on by ``start``, ``start + 1``, ..., ``sums`` of them."""

    tile: int
    sums: int
    start: int

    @property
    def points(self) -> int:
        return self.tile + self.sums - 1

    def tiles(self, size: int) -> int:
        return -(-size // self.tile)


@lru_cache(maxsize=64)
def _transforms(tile: int, sums: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``A [sums, P]``, ``L [P, tile]`` and ``R [P, P]``: ``A ((L g) (R h))`` are the sums of products of ``g`` with
    ``h`` moved on by 0, 1, .... Polynomials are evaluated at Chebyshev nodes, and at infinity."""
    points = tile + sums - 1
    nodes = np.cos(np.pi * (np.arange(points - 1) + 0.5) / max(points - 1, 1))
    infinity = np.eye(points)[-1:]
    powers = np.concatenate([np.vander(nodes, points, increasing=True), infinity])
    left, sums_of = powers[:, :tile].copy(), powers[:, :sums].copy()
    left[-1], sums_of[-1] = np.eye(tile)[-1], np.eye(sums)[-1]
    return torch.from_numpy(sums_of.T.copy()), torch.from_numpy(left), torch.from_numpy(np.linalg.inv(powers).T.copy())


@dataclass(eq=False)
class Images:
    """The images of an input, by phase, in their frame: ``[G, I, a, b ..., B, z]``, the last axis behind the samples,
    with so many zeros behind each but the first that flat displacements run into nothing else."""

    x: torch.Tensor
    groups: int
    geometry: Geometry
    dtype: torch.dtype
    _of: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _moved: dict[tuple[tuple[int, ...], Tiling, int], torch.Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """``I``."""
        return self.x.shape[1] // self.groups

    def of(self, phases: tuple[int, ...]) -> torch.Tensor:
        if phases not in self._of:
            self._of[phases] = self._image(phases)
        return self._of[phases]

    def _image(self, phases: tuple[int, ...]) -> torch.Tensor:
        axes = self.geometry.axes
        x = self.x[
            (slice(None), slice(None), *(slice(a.origin[p], None, a.stride) for a, p in zip(axes, phases, strict=True)))
        ]
        x = x.unflatten(1, (self.groups, -1)).movedim(0, -2 if axes else -1)
        sizes = [a.size + (pad if i else 0) for i, (a, pad) in enumerate(zip(axes, self.geometry.padding, strict=True))]
        if not axes:
            return x.to(self.dtype)
        last = axes[-1].size + self.geometry.padding[-1]
        whole = x.new_zeros((*x.shape[:2], *sizes[:-1], x.shape[-2], last), dtype=self.dtype)
        real = [slice(*a.real[p]) for a, p in zip(axes, phases, strict=True)]
        whole[(slice(None), slice(None), *real[:-1], slice(None), real[-1])] = x
        return whole

    def left(self, phases: tuple[int, ...], tiling: Tiling) -> torch.Tensor:
        """``[P, G, I, a, b ..., B, T]``: the tiles, transformed."""
        return self._transformed(phases, tiling, 1, 0)

    def right(self, phases: tuple[int, ...], tiling: Tiling) -> torch.Tensor:
        """The same of what the tiles are multiplied with."""
        return self._transformed(phases, tiling, 2, tiling.start)

    def _transformed(self, phases: tuple[int, ...], tiling: Tiling, which: int, start: int) -> torch.Tensor:
        key = (phases, tiling, which)
        if key not in self._moved:
            by = _transforms(tiling.tile, tiling.sums)[which]
            image = self.of(phases)[..., : self.geometry.axes[-1].size]
            tiles, width = tiling.tiles(image.shape[-1]), by.shape[1]
            behind = (tiles - 1) * tiling.tile + start + width - image.shape[-1]
            padded = F.pad(image, (max(0, -start), max(0, behind)))
            parts = padded.new_empty(width, *padded.shape[:-1], tiles)
            for j in range(width):
                parts[j] = padded[..., max(0, start) + j :: tiling.tile][..., :tiles]
            self._moved[key] = (by.to(parts) @ parts.flatten(1)).unflatten(1, parts.shape[1:])
        return self._moved[key]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[G, R, I]`` of ``[G, R, n]`` and ``[G, I, n]``."""
    return (a[0] @ b[0].mT)[None] if len(a) == 1 else a @ b.mT


def _shifted(a: torch.Tensor, b: torch.Tensor, by: int) -> torch.Tensor:
    """The product of ``a(m)`` and ``b(m + by)`` over flat positions ``m``."""
    n = a.shape[-1] - abs(by)
    begin = max(0, -by)
    return _product(a[..., begin : begin + n], b[..., begin + by : begin + by + n])


def _flat(images: torch.Tensor, lead: Sequence[int]) -> int:
    """How far a displacement along the leading axes is in flat positions. ``images [..., a, b ..., B, z]``."""
    step, total = images.shape[-1] * images.shape[-2], 0
    for size, d in zip(reversed(images.shape[-2 - len(lead) : -2]), reversed(lead), strict=True):
        total, step = total + d * step, step * size
    return total


def _full_sums(images: Images, keys: Sequence[tuple[Step, ...]], rows: slice) -> list[torch.Tensor]:
    """``[G, R, I]`` for each key, over all positions. The keys differ in their last displacement only."""
    geometry, first = images.geometry, keys[0]
    if not first:
        return [_product(images.of(())[:, rows], images.of(()))]
    phases, others = tuple(s[0] for s in first), tuple(s[1] for s in first)
    lead = [d for _, _, d in first[:-1]]
    tiling = _tiling(geometry, first[-1][:2], images.columns) if images.dtype == torch.float64 else None
    if tiling is not None:
        a, b = images.left(phases, tiling), images.right(others, tiling)
        by = _flat(a, lead)
        products = torch.stack([_shifted(u[:, rows].flatten(2), v.flatten(2), by) for u, v in zip(a, b, strict=True)])
        back = _transforms(tiling.tile, tiling.sums)[0].to(products)
        back = back[[key[-1][2] - tiling.start for key in keys]]
        return list((back @ products.flatten(1)).unflatten(1, products.shape[1:]))
    found = []
    a, b = images.of(phases), images.of(others)
    for key in keys:
        box = geometry.whole(key)
        exact, flat = math.prod(stop - start for start, stop in box), math.prod(a.shape[2:]) // a.shape[-2]
        if exact * (2 * images.columns + 2 * COPY) < flat * 2 * images.columns:
            found.append(_box_sum(images, key, box, rows))
        else:
            found.append(_shifted(a[:, rows].flatten(2), b.flatten(2), _flat(a, lead) + key[-1][2]))
    return found


@lru_cache(maxsize=256)
def _tiling(geometry: Geometry, phases: tuple[int, int], columns: int) -> Tiling | None:
    """The tiles that cost least for all displacements between two phases along the last axis, if any cost less than one
    sum after the other does."""
    axis = geometry.axes[-1]
    found = sorted(d for p, q, d in axis.pairs if (p, q) == phases)
    sums = found[-1] - found[0] + 1
    best, least = None, len(found) * axis.size * 2.0 * columns
    for tile in range(2, POINTS - sums + 2):
        tiling = Tiling(tile, sums, found[0])
        cost = tiling.points * tiling.tiles(axis.size) * (2 * columns + TRANSFORM)
        if cost < least:
            best, least = tiling, cost
    return best


Place = tuple[tuple[Step, ...], Box]
"""A key, and the positions that are summed over."""


def add_sums_(totals: dict[Place, torch.Tensor], images: Images, rows: slice) -> None:
    """Add to ``totals [G, R, I]`` all sums of products of the columns ``rows`` with all that ``folded`` needs."""
    geometry = images.geometry
    for _, group in itertools.groupby(geometry.keys, _alike):
        keys = list(group)
        for key, full in zip(keys, _full_sums(images, keys, rows), strict=True):
            whole = geometry.whole(key)
            for box in dict.fromkeys([whole, *(box for boxes in geometry.classes(key) for _, box in boxes)]):
                found = full if box == whole else _box_sum(images, key, box, rows)
                if (key, box) in totals:
                    totals[key, box] += found
                else:
                    totals[key, box] = found


def folded(totals: dict[Place, torch.Tensor], weights: torch.Tensor, geometry: Geometry, rows: slice) -> torch.Tensor:
    """``[G, R, I]``: what gives, with its transpose added, the Gram matrix of the columns ``rows`` with all.
    ``weights [G, K, O, I]``."""
    half = weights.new_zeros(len(weights), weights[0, 0, 0, rows].shape[0], weights.shape[3])
    for key in geometry.keys:
        share = 0.5 if key == mirrored(key) else 1.0
        for boxes, pairs in geometry.classes(key).items():
            total = totals[key, boxes[0][1]]
            for sign, box in boxes[1:]:
                total = torch.add(total, totals[key, box], alpha=sign)
            first, second = map(list, zip(*pairs, strict=True))
            product = weights[:, first][..., rows].flatten(1, 2).mT @ weights[:, second].flatten(1, 2)
            half.addcmul_(product, total, value=share)
    return half


def _box_sum(images: Images, key: tuple[Step, ...], box: Box, rows: slice) -> torch.Tensor:
    """``[G, R, I]``, over the positions in ``box``."""

    def part(phases: tuple[int, ...], at: Sequence[tuple[int, int]]) -> torch.Tensor:
        where = [slice(a, b) for a, b in at]
        return images.of(phases)[(slice(None), slice(None), *where[:-1], slice(None), where[-1])].flatten(2)

    moved = [(a + d, b + d) for (a, b), (_, _, d) in zip(box, key, strict=True)]
    first = part(tuple(s[0] for s in key), box)
    return _product(first[:, rows], part(tuple(s[1] for s in key), moved))
