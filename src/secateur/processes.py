"""Several processes as one: who am I, how many are we, and sums over all of us.

Without a process group there is one process, and everything here does nothing. With one (``torchrun``, ``accelerate
launch``), what is summed over the data is summed over the processes, so that a statistic does not depend on how many
there were. Every function but ``rank``, ``world`` and ``is_main`` is collective: all processes must call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _together() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def sum_over_processes_(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor, in place, by its sum over the processes. Integers and float64 stay exact as they can be."""
    if _together():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def from_main(value: T) -> T:
    """What the main process passed, in every process (pickled on the way: plain data only)."""
    if not _together():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_main_(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor, in place, by the main process's."""
    if _together():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def gathered(value: T) -> list[T]:
    """What every process passed, in the order of their ranks (pickled on the way: plain data only)."""
    if not _together():
        return [value]
    box: list[Any] = [None] * world()
    distributed.all_gather_object(box, value)
    return box


def wait_for_all() -> None:
    """Goes on when every process has come here."""
    if _together():
        distributed.barrier()


def part(count: int) -> slice:
    """This process's part of ``count`` things: consecutive, as even as can be, nothing left out or doubled."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
