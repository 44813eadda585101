"""Batches of a set: in an order that depends on the epoch alone, this process's part of them, from any batch on.

Shapes: ``B`` images of this process's part of a batch, ``C H W`` as ``Data.shape``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from secateur import processes
from secateur.errors import BadRequest, SecateurError
from secateur.zoo.data.images import Images
from secateur.zoo.data.randomness import generator
from secateur.zoo.data.settings import check_batch

Batch = tuple[Tensor, Tensor]
Key = tuple[int | None, Tensor]
"""Which epoch's augmentation (None: none) of which images ``[B]``: all that a worker needs to know."""


class Loader:
    """Batches ``(inputs [B, C, H, W] float32, targets [B] int64)`` of some images of a set; obeys ``core.Epochs``.

    ``batch`` counts the images of a batch over all processes; each reads its own part only, and the parts side by side
    are, bit for bit, what a single process reads. ``training=True`` shuffles anew and augments in every epoch and drops
    the last batch where it is not whole; else order and images are always the same, and the last batch may be smaller
    (a process whose part of it is empty does not get it). ``samples`` counts the images over all processes, ``len`` the
    batches of an epoch. Plain iteration is epoch 0. Nothing is drawn from torch's own generator.
    """

    def __init__(
        self,
        images: Images,
        members: Tensor,
        *,
        batch: int,
        training: bool = False,
        seed: int = 0,
        workers: int = 0,
        stop: int | None = None,
    ) -> None:
        """``members``: which images, as places in ``images`` ``[N]``; ``stop``: only the first so many batches.

        Raises BadRequest where training has fewer images than a batch.
        """
        if training and len(members) < batch:
            raise BadRequest(
                f"there are {len(members)} images to train on, fewer than one batch of {batch}\n"
                f"  do: choose batch={len(members)} or less"
            )
        whole = len(members) // batch if training else -(-len(members) // batch)
        self.batch, self.training, self.seed, self.workers = batch, training, seed, workers
        self._images, self._members = images, members
        self._batches = whole if stop is None else min(whole, stop)
        self.samples = len(members) if self._batches == whole else self._batches * batch
        self._shared = True
        self._pool: DataLoader[Any] | None = None
        self._reading = False

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process's part of every batch of that epoch from batch ``start`` on; what comes before is not read.

        Raises BadRequest where the processes cannot share a batch evenly, BadData while reading what is damaged.
        """
        if number < 0 or start < 0:
            raise BadRequest(f"epochs and batches are counted from 0: epoch({number}, start={start})")
        if self._shared:
            check_batch(self.batch)
        keys = self._keys(number, start)
        return self._read_ahead(keys) if self.workers else self._read(keys)

    def first(self, batches: int) -> Loader:
        """A loader of only the first so many batches of every epoch."""
        if batches < 1:
            raise BadRequest(f"first({batches}): it must be at least one batch")
        few = Loader(
            self._images,
            self._members,
            batch=self.batch,
            training=self.training,
            seed=self.seed,
            workers=self.workers,
            stop=min(batches, len(self)),
        )
        few._shared = self._shared
        return few

    def of_each_class(self, count: int) -> Loader:
        """A loader of only the first ``count`` images of every class, in the order in which they stand here.

        Raises BadRequest in training, whose order changes, and where a class has fewer images.
        """
        if self.training or count < 1:
            raise BadRequest(f"of_each_class({count}): it must be at least one image, of a loader of one fixed order")
        members = self._members[: self.samples]
        labels = self._images.labels[members]
        kept = torch.zeros(len(members), dtype=torch.bool)
        for label in labels.unique().tolist():
            own = (labels == label).nonzero()[:, 0]
            if len(own) < count:
                raise BadRequest(
                    f"per_class={count}: of class {label} there are only {len(own)} images among these "
                    f"{len(members)}\n  do: ask for {len(own)} or fewer"
                )
            kept[own[:count]] = True
        few = Loader(self._images, members[kept], batch=self.batch, seed=self.seed, workers=self.workers)
        few._shared = self._shared
        return few

    def whole(self) -> Loader:
        """The same batches, all of each in every process, for work that the processes share in another way."""
        alone = copy.copy(self)
        alone._shared, alone._pool, alone._reading = False, None, False
        return alone

    @property
    def members(self) -> Tensor:
        """Which images of the set these are, as places in it ``[N]``."""
        return self._members

    @property
    def targets(self) -> Tensor:
        """The labels of all samples ``[samples]``, in the order of ``members``."""
        return self._images.labels[self._members]

    def _keys(self, number: int, start: int) -> list[Key]:
        order = self._members
        if self.training:
            order = order[torch.randperm(len(order), generator=generator(self.seed, "order", number))]
        batches = order.split(self.batch)[start : len(self)] if len(order) else ()
        parts = [batch[processes.part(len(batch))] if self._shared else batch for batch in batches]
        return [(number if self.training else None, part) for part in parts if len(part)]

    def _read(self, keys: list[Key]) -> Iterator[Batch]:
        pin = torch.cuda.is_available()
        for epoch, indices in keys:
            inputs, targets = self._images.read(indices, epoch), self._images.labels[indices]
            yield (inputs.pin_memory(), targets.pin_memory()) if pin else (inputs, targets)

    def _read_ahead(self, keys: list[Key]) -> Iterator[Batch]:
        """The same from workers. Those of training stay for the next epoch; one that is begun while another is being
        read gets workers of its own."""
        if not keys:
            return
        alone = self.training and not self._reading
        pool = self._pool if alone else None
        if pool is None:
            pool = _pool(self._images, self.workers, keep=alone)
        pool.sampler.keys = keys  # type: ignore[attr-defined]
        if alone:
            self._pool, self._reading = pool, True
        try:
            for batch in pool:
                if isinstance(batch, SecateurError):
                    raise batch
                yield batch
        finally:
            if alone:
                self._reading = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_reading": False}  # workers stay with the process that has them


@dataclass(frozen=True)
class Data:
    """A set of labelled images in parts that never overlap.

    ``shape``: ``[C, H, W]`` of one input. ``validation`` is held out of the training images, and is what ratios and
    all else are chosen on; ``test`` is the set's own. ``calibration``: training images, not augmented, in one fixed
    order (shuffled once by the seed), in whole batches, or a single smaller one where there are fewer images than that.
    Inputs are ``(pixel - mean) / std`` for each channel, pixels between 0 and 1 (both empty where not known).
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Loader
    validation: Loader
    test: Loader
    calibration: Loader
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class _Keys(Sampler[Any]):
    """The keys of the epoch that is to be read, given anew before each."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[tuple[int | None, list[int]]]:
        for epoch, indices in self.keys:
            yield epoch, indices.tolist()  # a tensor would go to the worker as a file of shared memory

    def __len__(self) -> int:
        return len(self.keys)


class _Batches(Dataset[Any]):
    """A whole batch for a key. Our errors are handed over as they are: a worker would wrap them in a trace."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, key: tuple[int | None, list[int]]) -> Batch | SecateurError:
        epoch, indices = key[0], torch.tensor(key[1])
        try:
            return self.images.read(indices, epoch), self.images.labels[indices]
        except SecateurError as error:
            return error


def _pool(images: Images, workers: int, *, keep: bool) -> DataLoader[Any]:
    return DataLoader(
        _Batches(images),
        batch_size=None,
        sampler=_Keys(),
        num_workers=workers,
        persistent_workers=keep,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_it_is,
        generator=generator("workers"),  # else the seed of the workers would be drawn from torch's own
    )


def _as_it_is(batch: Any) -> Any:
    return batch
