"""The global generators of chance, torch's, Python's and numpy's, as values that can be kept, saved and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Randomness = dict[str, Any]
"""``torch``, ``cuda`` (where there is one) and ``data`` as uint8 tensors; ``python`` and ``numpy`` as plain lists."""


def seed_all(seed: int, process: int) -> None:
    """Start over: torch by seed and process, Python's and numpy's generators by the seed alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, process]).generate_state(1, np.uint64)[0]) >> 1)
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(1)[0])


def randomness(device: torch.device) -> Randomness:
    """The state of every global generator, that of ``device`` among them."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found: Randomness = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_randomness(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what ``randomness`` gave."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextmanager
def kept_randomness(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the global generators are put back."""
    before = randomness(device)
    try:
        yield
    finally:
        set_randomness(before, device)
