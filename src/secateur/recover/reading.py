"""Reading training data so that every process gets its part and interrupted training goes on at the right batch.

Data that obey ``core.Epochs`` do both by themselves. Of any other re-iterable every process reads whole batches, in the
same order (see ``randomness``), and takes its part; what was done before an interruption is read again and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from secateur.core import Epochs
from secateur.errors import BadRequest
from secateur.processes import part, rank, sum_over_processes_, world
from secateur.recover.randomness import Stream

Data = Epochs | Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch: inputs and targets; ``whole`` is the size of the whole batch, where known."""

    inputs: Any
    targets: Tensor
    whole: int | None
    counts: bool = True

    @property
    def size(self) -> int:
        return len(self.targets) if self.counts else 0


def is_epochs(data: object) -> bool:
    """Whether ``data`` obeys ``core.Epochs``: an order that depends on nothing but the epoch's number."""
    return callable(getattr(data, "epoch", None)) and isinstance(data, Sized)


def check_data(data: object) -> None:
    """Raises BadRequest for data that can be read only once, that are not data, or that are shared out already."""
    if isinstance(data, Iterator):
        raise BadRequest("data can be read only once, and training reads it every epoch\n  do: pass a DataLoader")
    if not is_epochs(data) and not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise BadRequest(f"data is {type(data).__name__}: nothing to iterate over\n  do: pass a DataLoader or a list")
    sampler = getattr(data, "sampler", None) if isinstance(data, DataLoader) else None
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise BadRequest(
            f"data reads one part of {sampler.num_replicas} already (DistributedSampler), and training shares every "
            "batch out by itself\n  do: pass a DataLoader with shuffle=True over all of it; its batch_size is the "
            "global one"
        )


def batches_in(data: Data) -> int:
    """How many batches an epoch has; data without a length are read once to know."""
    try:
        count = len(cast(Sized, data))
    except TypeError:  # also of a DataLoader, which has a length only where its dataset has one
        count = sum(1 for _ in cast(Iterable[Any], data))
    if not count:
        raise BadRequest("there is nothing to train on: data has no batches")
    return count


def generators(data: object) -> dict[str, torch.Generator]:
    """The generators of its own that a DataLoader draws its order from, by the name of the part that holds them."""
    if not isinstance(data, DataLoader):
        return {}
    holders = {"loader": data, "sampler": data.sampler, "batches": data.batch_sampler}
    found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}


def read(data: Data, epoch: int, start: int, count: int, stream: Stream) -> Iterator[Batch]:
    """Batches ``start`` to ``count`` of epoch ``epoch`` (from 0), each as this process's part of it.

    What lies before ``start`` is passed over at once, not when the first batch is asked for. Raises BadRequest where
    the data end early, where a batch is no ``(inputs, targets)``, and where one cannot be shared by the processes.
    """
    own = is_epochs(data)  # which draw nothing from torch's global generator
    with nullcontext() if own else stream.used():
        source = _source(data, epoch, start)
    return _parts(source, own, (epoch, start, count), stream)


def _parts(source: Iterator[Any], own: bool, place: tuple[int, int, int], stream: Stream) -> Iterator[Batch]:
    epoch, start, count = place
    last: Batch | None = None
    for number in range(start, count):
        with nullcontext() if own else stream.used():
            pair = next(source, None)
        if pair is None and own and last is not None and number == count - 1 and world() > 1:
            last = _stand_in(last)  # its part of a ragged last batch is empty, and was left out
            yield last
            return
        if pair is None:
            raise BadRequest(
                f"data says it has {count} batches, but epoch {epoch + 1} ended after {number}\n"
                "  do: give it a length that holds for every epoch"
            )
        inputs, targets = _pair(pair)
        last = _own(inputs, targets, last) if own else _shared(inputs, targets)
        yield last


def _source(data: Data, epoch: int, start: int) -> Iterator[Any]:
    if is_epochs(data):
        return iter(cast(Epochs, data).epoch(epoch, start))
    for name in ("sampler", "batch_sampler"):
        set_epoch = getattr(getattr(data, name, None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    source = iter(cast(Iterable[Any], data))
    for _ in range(start):
        next(source, None)
    return source


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        shown = [type(b).__name__ for b in batch] if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise BadRequest(
            f"training needs batches (inputs, targets) with a tensor of targets, but data yields {shown}\n"
            "  do: pass a DataLoader over a labelled dataset"
        )
    if not batch[1].ndim or (not len(batch[1]) and world() == 1):
        raise BadRequest("data yields a batch without examples\n  do: leave empty batches out")
    return batch[0], batch[1]


def _own(inputs: Any, targets: Tensor, last: Batch | None) -> Batch:
    """A part that came as one. An empty one (a ragged last batch) is stood in for by an example that counts nothing,
    since all processes must take part in every step."""
    if len(targets):
        return Batch(inputs, targets, None)
    if last is None:
        raise BadRequest(
            f"process {rank()} of {world()} got no example of its batch\n"
            "  do: use batches of at least as many examples as there are processes"
        )
    return _stand_in(last)


def _stand_in(last: Batch) -> Batch:
    return Batch(cut(last.inputs, len(last.targets), slice(0, 1)), last.targets[:1], None, counts=False)


def _shared(inputs: Any, targets: Tensor) -> Batch:
    count = len(targets)
    if world() == 1:
        return Batch(inputs, targets, count)
    if count < world():
        raise BadRequest(
            f"a batch of {count} cannot be shared by {world()} processes\n"
            "  do: use larger batches, or drop_last=True if it is the last that is small"
        )
    mine = part(count)
    return Batch(cut(inputs, count, mine), targets[mine], count)


def cut(inputs: Any, count: int, mine: slice) -> Any:
    """The part of every tensor whose first axis are the examples."""
    if isinstance(inputs, Tensor):
        return inputs[mine] if inputs.ndim and len(inputs) == count else inputs
    if isinstance(inputs, Mapping):
        return {name: cut(value, count, mine) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(cut(value, count, mine) for value in inputs)
    return inputs


def examples_of(batches: list[Batch], device: torch.device) -> int | Tensor:
    """How many examples the batches of one step have over all processes; a tensor on a GPU, which nobody waits for."""
    if world() == 1:
        return sum(batch.size for batch in batches)
    if all(batch.whole is not None for batch in batches):
        return sum(batch.whole or 0 for batch in batches)
    total = torch.tensor(float(sum(batch.size for batch in batches)), device=device)
    sum_over_processes_([total])
    return total if device.type != "cpu" else int(total)
