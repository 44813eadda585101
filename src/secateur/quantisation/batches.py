"""Calibration images as arrays: read from the user's data once, checked, and kept.

They are kept because they are looked at up to three times (extremes, histograms, the comparison), and data that are
shuffled or augmented would be others each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from secateur.errors import BadRequest, SecateurError
from secateur.graph import Inputs, as_arguments, plain
from secateur.nests import flatten
from secateur.statistics import no_batches


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the network is calibrated on: the arrays of each batch, in the order of the network's inputs. ``batched``:
    which of the inputs have a row for each image; ``images``: how many there are of those in all."""

    batches: tuple[tuple[np.ndarray, ...], ...]
    batched: tuple[bool, ...]
    images: int

    def rows(self, batch: tuple[np.ndarray, ...], most: int) -> list[list[np.ndarray]]:
        """``batch`` in parts of at most ``most`` images."""
        return [
            [a[start : start + most] if marked else a for a, marked in zip(batch, self.batched, strict=True)]
            for start in range(0, self.count(batch), most)
        ]

    def count(self, batch: tuple[np.ndarray, ...]) -> int:
        """How many images ``batch`` has."""
        return _count(batch, self.batched)


def read_calibration(data: Iterable[Any] | None, example_inputs: Inputs, batches: int) -> Calibration:
    """The first ``batches`` batches of ``data``: inputs, or pairs of inputs and targets, of which the inputs are taken.

    Raises ``BadRequest`` for no data, for batches that are not shaped like the examples, and for values that are not
    finite.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise BadRequest(f"batches must be a whole number of at least 1, not {batches!r}")
    # iter() is asked of nothing but iterators: a DataLoader's draws from the global generator
    readable = hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__")
    if data is None or isinstance(data, torch.Tensor) or not readable:
        raise BadRequest(
            f"quantising needs calibration data, and {_kind(data)} is given: the range of every activation is taken "
            "from what the network computes on images\n"
            "  do: pass a DataLoader over training images, or a list of batches"
        )
    wanted, skeleton = flatten(as_arguments(example_inputs))
    count = wanted[0].shape[0] if wanted[0].dim() else 0
    batched = tuple(t.dim() > 0 and t.shape[0] == count > 0 for t in wanted)
    found = [_arrays(batch, number, wanted, skeleton, batched) for number, batch in enumerate(islice(data, batches))]
    if not found:
        raise no_batches()
    images = sum(_count(batch, batched) for batch in found)
    return Calibration(tuple(found), batched, images)


def _count(batch: tuple[np.ndarray, ...], batched: tuple[bool, ...]) -> int:
    return next((len(a) for a, marked in zip(batch, batched, strict=True) if marked), 1)


def _kind(data: object) -> str:
    return "none" if data is None else f"a {type(data).__name__}"


def _arrays(
    batch: Any, number: int, wanted: list[torch.Tensor], skeleton: Any, batched: tuple[bool, ...]
) -> tuple[np.ndarray, ...]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    problem = ""
    for offer in (batch, *([batch[0]] if pair else [])):
        try:
            found, own = flatten(as_arguments(offer))
        except SecateurError:
            problem = problem or f"it is a {type(offer).__name__}"
            continue
        misfit = _misfit(found, wanted, batched) if own == skeleton else f"it is {_shapes(found)}, and not a call of it"
        if not misfit:
            return tuple(plain(t).to(plain(w).dtype).numpy().copy() for t, w in zip(found, wanted, strict=True))
        problem = problem or misfit
    raise BadRequest(
        f"batch {number} of the calibration data does not fit the network: {problem}\n"
        "  do: pass batches of inputs, or of (inputs, targets), shaped as the example inputs"
    )


def _misfit(found: list[torch.Tensor], wanted: list[torch.Tensor], batched: tuple[bool, ...]) -> str:
    """How a batch differs from the examples; empty if it fits."""
    lengths = {len(t) for t, marked in zip(found, batched, strict=True) if marked and t.dim()}
    for tensor, example, marked in zip(found, wanted, batched, strict=True):
        free = int(marked)
        if tensor.dim() != example.dim() or tensor.shape[free:] != example.shape[free:]:
            shown = ["any", *example.shape[1:]] if marked else list(example.shape)
            return f"its shape is {list(tensor.shape)}, and the examples are [{', '.join(map(str, shown))}]"
        if tensor.is_floating_point() != example.is_floating_point():
            return f"its dtype is {tensor.dtype}, and the examples are {example.dtype}"
        if tensor.numel() == 0:
            return f"it is empty, {list(tensor.shape)}"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return "it holds values that are not finite (NaN or infinite)"
    return f"its inputs have {sorted(lengths)} rows" if len(lengths) > 1 else ""


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors) or "without a tensor"
