"""The memory that activations need while a network runs, measured on a real forward pass.

The forward runs once in torch, in eval mode, without gradients, and every operation that it calls is seen with the
memory it reads and the memory it makes. Operation ``i`` needs at once

    m_i = sum of the bytes of all storages that are made at or before i and read at or after i,
          what the forward returns included to the end, and so is what i itself makes and somebody reads later

and the peak is ``needed = max_i m_i``: what a runtime needs that frees each activation after its last use, as those on
devices do (a plan's prediction, ``Budget(of="memory")``, is the same sum over the captured graph). Not counted: the
inputs, parameters and buffers; what an operation allocates and frees inside itself; results that nobody reads (the
indices of a max pooling). Views share the storage that they look into, operations in place make none.

``held`` is the peak of what was in memory in that forward indeed. It is larger where a variable of a Python frame holds
an activation that nobody will read (the input of a stage, while its later blocks run).

Bytes are those of the whole batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.capture import all_tensors, in_mode
from secateur.engines.eager import device_of, ready
from secateur.graph import Inputs
from secateur.nests import flatten


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of activations at the peak: ``needed``, each freed after its last use, and ``held``, in torch's eager
    mode. ``allocated``: the peak of the device's allocator above what was there before, on a CUDA device."""

    needed: int
    held: int
    allocated: int | None = None


def activation_memory(model: nn.Module, example_inputs: Inputs) -> ActivationMemory:
    """What the activations of ``model`` need on ``example_inputs``, the whole batch. The model is left as it is."""
    device = device_of(model)
    run = ready(model, device, example_inputs)
    known = [tensor for _, tensor in all_tensors(model)] + flatten((run.args, run.kwargs))[0]
    with in_mode(model, False), torch.no_grad():
        with _Ledger(known) as ledger:
            out = run.function(*run.args, **run.kwargs)
        ledger.read(flatten(out)[0])
        del out
        allocated = _allocated(run, device) if device.type == "cuda" else None
    return ActivationMemory(ledger.needed(), ledger.peak, allocated)


@dataclass
class _Storage:
    """What an operation made: how many bytes, at which operation, and which one reads it last."""

    size: int
    made: int
    last: int | None = None


@dataclass
class _Ledger(TorchDispatchMode):
    """Writes down what every operation makes and reads, and how much there is at once."""

    known: list[torch.Tensor]
    peak: int = 0
    _step: int = 0
    _live: int = 0
    _made: list[_Storage] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _foreign: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        super().__init__()
        # these are alive all the time, so that no other storage can have their addresses
        self._foreign = frozenset(tensor.untyped_storage()._cdata for tensor in self.known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._step += 1
        self.read(_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self._live)
        return out

    def read(self, tensors: Iterable[torch.Tensor]) -> None:
        """The operation at hand (after the last one: the forward's caller) reads these."""
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._made[number].last = self._step

    def needed(self) -> int:
        """``max_i m_i``, by the differences between one operation and the next."""
        changes = [0] * (self._step + 2)
        for storage in self._made:
            if storage.last is not None:
                changes[storage.made] += storage.size
                changes[storage.last + 1] -= storage.size
        worst = total = 0
        for change in changes:
            total += change
            worst = max(worst, total)
        return worst

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._numbers or address in self._foreign:
            return
        self._numbers[address] = len(self._made)
        self._made.append(_Storage(storage.nbytes(), self._step))
        self._live += storage.nbytes()
        weakref.finalize(storage, self._freed, address, storage.nbytes())

    def _freed(self, address: int, size: int) -> None:
        self._numbers.pop(address, None)
        self._live -= size


def _tensors(value: Any) -> list[torch.Tensor]:
    # not ``flatten``, whose inner function refers to itself: what it saw is freed when the garbage collector comes by
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _allocated(run: Any, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
