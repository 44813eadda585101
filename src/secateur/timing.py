"""How long a run takes, measured so that two runs can be compared.

Runs are taken in turns, one of each, round after round: a machine that slows down for a second then slows them all, and
the ratio of their medians survives. Rounds before the first that counts warm caches, allocators and clocks up. A run is
timed by itself, with Python's garbage collector held off; what is told is the median and the quartiles around it.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from secateur.core import Timing
from secateur.engines import FILE_ENGINES, Exports, find_engine, prepare_all, prepare_file
from secateur.engines.eager import TorchRun, device_of, ready, torch_threads
from secateur.engines.protocol import Prepared, check_threads
from secateur.errors import BadRequest, SecateurError
from secateur.generators import kept_randomness
from secateur.graph import Inputs, as_arguments, unwrap
from secateur.nests import flatten

Run = Callable[[], object]
"""What is timed: one inference of one network on one fixed batch."""
Progress = Callable[[int, int], None]
"""``(rounds that are over, rounds in all)``."""
K = TypeVar("K", bound=Hashable)


def take_turns(
    runs: Mapping[K, Run],
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[K, Timing]:
    """The time of every run: ``repeats`` rounds of one run each, after ``warmup`` rounds that do not count.

    ``threads`` is torch's thread count meanwhile; it is put back. Raises ``BadRequest`` for numbers out of range.
    """
    _check_rounds(repeats, warmup)
    check_threads(threads)
    taken: dict[K, list[float]] = {key: [] for key in runs}
    with torch_threads(threads), _uncollected():
        for turn in range(warmup + repeats):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= warmup:
                    taken[key].append((time.perf_counter() - start) * 1e3)
            if progress is not None:
                progress(turn + 1, warmup + repeats)
    return {key: summary(times) for key, times in taken.items()}


def summary(times: Sequence[float]) -> Timing:
    """The median and the quartiles of times in milliseconds, interpolated between the two nearest."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], times[0], 1)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, low, high, min(times), len(times))


def time_in_engines(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    *,
    engines: Sequence[str],
    threads: int = 1,
    repeats: int = 30,
    warmup: int = 5,
    files: Mapping[str, Path] | None = None,
    exports: Exports | None = None,
    progress: Progress | None = None,
    failures: MutableMapping[str, SecateurError] | None = None,
) -> dict[str, dict[str, Timing]]:
    """``{engine: {network: time of one batch}}``, all networks in all engines taken in turns with each other.

    So that the fastest way to run one network can be set against the fastest to run another. Each network is exported
    once for all engines that read ONNX, and compared with torch in each of them before anything is timed. ``files``:
    ONNX files beside them, quantised ones say, in those engines that read ONNX; they are not compared with anything.
    ``exports``: where the files of networks are kept, if somebody else reads them too.

    An engine that cannot run one of the networks is an error; with ``failures`` it is left out instead, and what kept
    it is put there under its name. Raises what ``prepare_all`` does.
    """
    _check_rounds(repeats, warmup)
    for engine in engines:
        find_engine(engine)
    with ExitStack() as stack:
        exports = stack.enter_context(Exports(free_batch=False)) if exports is None else exports
        runs: dict[tuple[str, str], Prepared] = {}
        for engine in engines:
            try:
                ready = stack.enter_context(
                    prepare_all(models, example_inputs, engine=engine, threads=threads, exports=exports)
                )
                if engine in FILE_ENGINES:
                    for name, path in (files or {}).items():
                        ready[name] = prepare_file(path, example_inputs, engine=engine, threads=threads)
            except SecateurError as error:
                if failures is None:
                    raise
                failures[engine] = error
                continue
            runs |= {(engine, name): run for name, run in ready.items()}
        times = take_turns(runs, repeats=repeats, warmup=warmup, threads=threads, progress=progress)
    found: dict[str, dict[str, Timing]] = {}
    for (engine, name), timing in times.items():
        found.setdefault(engine, {})[name] = timing
    return found


def _check_rounds(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise BadRequest(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")


@contextmanager
def _uncollected() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def training_steps(
    models: Mapping[str, nn.Module], example_inputs: Inputs, *, threads: int = 1
) -> Iterator[dict[str, Run]]:
    """A step of training per network, ready to be timed while the context is open: forward in train mode, backward from
    the sum of all outputs that have a gradient, no optimiser.

    A step runs a copy: parameters, their gradients, running statistics and the generators of chance are left alone.
    Raises ``BadRequest`` where a network has nothing to train or cannot take a step on these inputs.
    """
    check_threads(threads)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        steps: dict[str, Run] = {}
        for name, model in models.items():
            device = device_of(model)
            stack.enter_context(kept_randomness(device))
            twin = copy.deepcopy(unwrap(model)).train()
            steps[name] = _step(twin, ready(twin, device, example_inputs))
            _try(steps[name], example_inputs)
        yield steps


def _step(model: nn.Module, call: TorchRun) -> Run:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        outputs = flatten(model(*call.args, **call.kwargs))[0]
        with_gradients = [out for out in outputs if out.requires_grad]
        if not with_gradients:
            raise BadRequest(
                "the network has nothing to train: no output depends on a parameter that requires a gradient\n"
                "  do: call requires_grad_(True) on it, or leave the training step out"
            )
        torch.stack([out.sum().float() for out in with_gradients]).sum().backward()
        if call.device.type == "cuda":
            torch.cuda.synchronize(call.device)

    return step


def _try(step: Run, example_inputs: Inputs) -> None:
    """What train mode does not take (batch norm: a single value per channel) is told before anything is timed."""
    try:
        step()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, SecateurError):
            raise
        shapes = ", ".join(str(list(t.shape)) for t in flatten(as_arguments(example_inputs))[0])
        raise BadRequest(
            f"the network cannot take a training step on inputs of shape {shapes}: {str(error).splitlines()[0]}\n"
            "  do: pass example inputs that it can be trained on, of a batch of at least 2"
        ) from error
