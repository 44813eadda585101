"""Randomness that depends on nothing but what it is for: seeds made of names and numbers.

An item is augmented by ``(seed, epoch, index)`` alone, an epoch is ordered by ``(seed, epoch)`` alone. So it does not
matter which process or worker reads an item, in which place of which batch, or whether training was interrupted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """63 bits that depend on every one of ``parts``: the first of BLAKE2b of their text."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator of torch's on the CPU, seeded by ``parts``."""
    return torch.Generator().manual_seed(seed_of(*parts))


@contextmanager
def preserved() -> Iterator[None]:
    """torch's, NumPy's and Python's own generators as they were, afterwards.

    Around code that calls ``seed_all_``: once for a batch, because putting NumPy's back takes longer than an image.
    """
    ours, theirs, pythons = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(ours)
        np.random.set_state(theirs)
        random.setstate(pythons)


def seed_all_(*parts: int | str) -> None:
    """Seeds torch's, NumPy's and Python's own generators by ``parts``, for code that draws from them without being
    asked, such as torchvision's transforms and the datasets of others."""
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
