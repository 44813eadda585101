"""Every source of chance that training draws from, as values that can be kept, saved and put back.

Data are read under a stream of their own, the same in every process, so that all see the same order; what the network
draws (dropout) differs from process to process. Neither moves the other, nor does evaluation move them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from secateur.generators import Randomness, kept_randomness, randomness, seed_all, set_randomness

__all__ = ["Randomness", "Stream", "kept_randomness", "randomness", "seed_all", "set_randomness"]


class Stream:
    """A generator of torch's that takes the place of the global one while data are read."""

    def __init__(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)
