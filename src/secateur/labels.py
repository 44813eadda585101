"""Labels: integers on the positions of tensors, joined wherever two positions must be kept or removed together.

A *factor* is an int64 tensor of the rank of the tensor it describes, of size 1 on every axis that it does not vary
along (it broadcasts). A tensor carries a list of factors, because its axes may carry channels of different origin: a
convolution's weight has one factor along its outputs and one along its inputs. A position goes if any factor says so.

Label 0 means "carries no channel": it is never removed. Joining something with label 0 locks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Factor = torch.Tensor
Factors = list[torch.Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Classes:
    """Labels after joining. ``component[label]``: its class, 1-based (0 for label 0); ``free[label]``: the same, but 0
    where the class is locked; ``reason[component]``: index of the lock that holds it, or -1."""

    component: torch.Tensor
    free: torch.Tensor
    reason: np.ndarray


class Labels:
    """A store of labels, the joins between them, and the locks on them."""

    def __init__(self) -> None:
        self.count = 1
        self.locks: list[Callable[[], str]] = []
        self.no_channels: set[int] = set()  # locks on axes that are no channels at all: sizes of kernels
        self.here: Callable[[str], str] = lambda why: why  # says where a lock was set; the propagation moves it along
        self._joined: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._locked: list[tuple[torch.Tensor, int]] = []

    def fresh(self, size: int) -> torch.Tensor:
        """``[size]`` labels that were never seen before."""
        new = torch.arange(self.count, self.count + size)
        self.count += size
        return new

    def join(self, a: torch.Tensor, b: torch.Tensor, why: str = "it meets values that carry no channels") -> None:
        """Tie ``a`` and ``b``, broadcast against each other, position by position."""
        a, b = (t.reshape(-1) for t in torch.broadcast_tensors(a, b))
        differ = a != b
        a, b = a[differ], b[differ]
        half = (a == 0) | (b == 0)
        if bool(half.any()):
            self.lock(torch.maximum(a, b)[half], why)
            a, b = a[~half], b[~half]
        if len(a):
            self._joined.append((a, b))

    def join_along(self, factor: torch.Tensor, axis: int) -> torch.Tensor:
        """Make ``factor`` constant along ``axis`` by joining its labels there."""
        first = factor.narrow(axis, 0, 1)
        self.join(factor, first)
        return first

    def lock(self, labels: torch.Tensor, why: str) -> None:
        """Never remove these; ``why`` completes the sentence "it is locked because ..."."""
        labels = labels.reshape(-1)
        labels = labels[labels != 0]
        if len(labels):
            here = self.here
            self.locks.append(lambda: here(why))
            self._locked.append((labels, len(self.locks) - 1))

    def lock_kernel(self, labels: torch.Tensor) -> None:
        """Lock the positions of a kernel, which nobody would take for channels."""
        self.lock(labels, "it is the size of a kernel")
        self.no_channels.add(len(self.locks) - 1)

    def solve(self) -> Classes:
        """The classes of all labels as they stand."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        if self._joined:
            a = torch.cat([x for x, _ in self._joined])
            b = torch.cat([x for _, x in self._joined])
            self._joined = [(a, b)]
            rows, columns = a.numpy(), b.numpy()
        else:
            rows = columns = np.zeros(0, np.int64)
        links = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(self.count, self.count))
        number, component = connected_components(links, directed=False)
        component = component.astype(np.int64) + 1
        component[component == component[0]] = 0  # label 0 is alone: join() never ties anything to it
        reason = np.full(number + 1, np.iinfo(np.int64).max)
        for labels, index in self._locked:
            np.minimum.at(reason, component[labels.numpy()], index)
        reason[reason == np.iinfo(np.int64).max] = -1
        free = np.where(reason[component] >= 0, 0, component)
        return Classes(torch.from_numpy(component), torch.from_numpy(free), reason)


def varying(factor: Factor) -> list[int]:
    """The axes that a factor varies along."""
    return [d for d in range(factor.dim()) if factor.shape[d] > 1]


def compress(factor: Factor) -> Factor:
    """Size 1 on every axis along which the labels do not really change."""
    for d in varying(factor):
        if bool((factor == factor.narrow(d, 0, 1)).all()):
            factor = factor.narrow(d, 0, 1)
    return factor


def on_axis(labels: torch.Tensor, axis: int, rank: int) -> Factor:
    """``[n]`` labels as a factor of the given rank that varies along ``axis``."""
    shape = [1] * rank
    shape[axis] = -1
    return labels.reshape(shape)


def widen(factor: Factor, rank: int) -> Factor:
    """Leading axes of size 1, as in broadcasting."""
    return factor.reshape((1,) * (rank - factor.dim()) + tuple(factor.shape))


def spread(factor: Factor, shape: Sequence[int], axes: Sequence[int] | None = None) -> Factor:
    """Expand ``factor`` to the real sizes on ``axes`` (all axes if not given)."""
    wanted = range(factor.dim()) if axes is None else [d % factor.dim() for d in axes]
    return factor.expand([shape[d] if d in wanted else factor.shape[d] for d in range(factor.dim())])


def reshape_factor(factor: Factor, old: Shape, new: Shape) -> Factor:
    """The factor of ``x.reshape(new)`` from that of ``x`` of shape ``old``; axes that do not matter stay of size 1.

    Both shapes are cut into the smallest runs of axes of equal product; only the runs that the factor varies along are
    written out.
    """
    target: list[int] = []
    source: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        while (i == i0 and j == j0) or a != b:
            if (a <= b and i < len(old)) or j >= len(new):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        varies = any(factor.shape[d] > 1 for d in range(i0, i))
        source += [old[d] if varies else 1 for d in range(i0, i)]
        target += [new[d] if varies else 1 for d in range(j0, j)]
    return factor.expand(source).reshape(target)
