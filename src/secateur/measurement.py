"""What a network costs and how well it does: parameters, MACs, accuracy, latency, memory.

How time is measured is said in ``timing.py``, what memory means in ``memory.py``. Nothing about the network is changed:
the train or eval mode of every module and torch's thread count are put back.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from secateur.capture import in_mode
from secateur.core import Measurement, Timing
from secateur.counting import count
from secateur.engines import checked_parity, find_engine, prepare_all
from secateur.engines.eager import device_of
from secateur.errors import BadRequest
from secateur.graph import Graph, Inputs, as_arguments
from secateur.memory import activation_memory
from secateur.nests import flatten
from secateur.processes import sum_over_processes_
from secateur.timing import take_turns, training_steps


def measure(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    data: Iterable[Any] | None = None,
    *,
    latency: bool = False,
    engine: str = "torch",
    threads: int = 1,
    repeats: int = 30,
    training: bool = False,
) -> Measurement:
    """Parameters and MACs of ``model`` on ``example_inputs``; with ``data`` its accuracy, with ``latency`` its speed
    and memory, with ``training`` how long a training step takes.

    ``example_inputs``: a tensor, a tuple (positional) or a dict (keyword). ``data``: batches ``(inputs, targets)``,
    targets ``[B]`` of class indices. MACs are those of one example; ``latency_ms`` is that of the whole batch, the
    median of ``repeats`` runs in ``engine`` (``engines.ENGINES``) on ``threads`` threads, and ``memory`` the bytes that
    its activations need. ``training_ms``: forward in train mode and backward, in torch. ``details``: batch, threads,
    runs, quartiles, the engine's version and how far its outputs are from torch's.

    Raises ``BadRequest`` for an unknown engine, empty data or outputs that are not class scores, ``MissingExtra`` where
    the engine is not installed, ``WrongOutput`` where it computes something else than torch, and what else
    ``engines.prepare_all`` does.

    >>> sc.measure(model, torch.randn(1, 3, 224, 224), latency=True).latency_ms    # doctest: +SKIP
    """
    find_engine(engine)
    counted = count(model, example_inputs)
    net = model.model if isinstance(model, Graph) else model
    inputs: Any = (
        (model.args or model.kwargs) if isinstance(model, Graph) and example_inputs is None else example_inputs
    )
    details: dict[str, object] = {}
    timed = _time_inference(net, inputs, engine, threads, repeats, details) if latency else None
    memory = activation_memory(net, inputs) if latency else None
    if memory is not None:
        details |= {"memory_held": memory.held}
        details |= {} if memory.allocated is None else {"memory_allocated": memory.allocated}
    trained = _time_training(net, inputs, threads, repeats, details) if training else None
    return Measurement(
        params=int(counted.params),
        macs=int(counted.macs),
        accuracy=None if data is None else accuracy(net, data),
        latency_ms=None if timed is None else timed.ms,
        engine=engine if latency else "",
        device=str(device_of(net)),
        memory=None if memory is None else memory.needed,
        training_ms=None if trained is None else trained.ms,
        details=details,
    )


def _time_inference(
    net: nn.Module, inputs: Inputs, engine: str, threads: int, repeats: int, details: dict[str, object]
) -> Timing:
    chosen = find_engine(engine)
    with prepare_all({"": net}, inputs, engine=engine, threads=threads, check=False) as runs:
        details["parity"] = checked_parity(runs[""], net, inputs, engine=chosen)
        timed = take_turns(runs, repeats=repeats, threads=threads)[""]
    details |= {"engine_version": chosen.version(), "quartiles_ms": [timed.low, timed.high]}
    details |= {"threads": threads, "repeats": repeats, "batch": batch_of(inputs)}
    return timed


def _time_training(net: nn.Module, inputs: Inputs, threads: int, repeats: int, details: dict[str, object]) -> Timing:
    with training_steps({"": net}, inputs, threads=threads) as steps:
        timed = take_turns(steps, repeats=repeats, threads=threads)[""]
    details |= {"training_quartiles_ms": [timed.low, timed.high]}
    details |= {"threads": threads, "repeats": repeats, "batch": batch_of(inputs)}
    return timed


def batch_of(example_inputs: Inputs) -> int:
    """The length of axis 0 of the first input that has axes."""
    return next((len(t) for t in flatten(as_arguments(example_inputs))[0] if t.dim()), 1)


def accuracy(model: nn.Module, data: Iterable[Any], *, reduce: bool = False) -> float:
    """The fraction, 0 to 1, of samples whose highest score is that of their class (top-1), in eval mode.

    ``data`` yields ``(inputs, targets)``: inputs as ``example_inputs`` are given, targets ``[B]`` int64; the model
    returns scores ``[B, K]``. With ``reduce`` every process of several passes its own part of the data, and all get
    the fraction of the whole. Raises BadRequest where the model does not, or where there are no samples.
    """
    right = total = 0
    device = device_of(model)
    # no inference_mode: what the model keeps of its first forward (a table of positions) must do for training too
    with in_mode(model, False), torch.no_grad():
        for batch in data:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise BadRequest(
                    f"accuracy needs batches (inputs, targets), but data yields {type(batch).__name__}\n"
                    "  do: pass a DataLoader over a labelled dataset"
                )
            inputs, targets = batch
            args, kwargs = as_arguments(inputs)
            scores = model(*[_to(a, device) for a in args], **{k: _to(v, device) for k, v in kwargs.items()})
            if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or len(scores) != len(targets):
                shape = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
                raise BadRequest(
                    f"accuracy needs class scores [B, K] for {len(targets)} targets, but the model returns {shape}\n"
                    "  do: measure this network with an evaluation of your own"
                )
            right += int((scores.argmax(1).cpu() == targets.cpu()).sum())
            total += len(targets)
    if reduce:
        counts = torch.tensor([right, total], device=device)
        sum_over_processes_([counts])
        right, total = (int(count) for count in counts)
    if not total:
        raise BadRequest("data has no batches (an iterator that was read before?)\n  do: pass a DataLoader or a list")
    return right / total


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
