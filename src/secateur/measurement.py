"""What a network costs and how well it does: parameters, MACs, accuracy, latency.

A latency is the median over many single runs after a warm-up, on a stated number of threads. Networks that are to be
compared are timed in turns, one run of each, round after round: a machine that slows down for a second then slows them
all, and the ratio survives. Nothing about the network is changed: the train or eval mode of every module and torch's
thread count are put back.

Shapes: ``B`` batch, ``K`` classes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur.capture import in_mode
from secateur.core import Measurement
from secateur.counting import count
from secateur.errors import BadRequest, MissingExtra, nearest
from secateur.graph import Graph, Inputs, as_arguments
from secateur.nests import flatten
from secateur.onnx_file import export_onnx
from secateur.processes import sum_over_processes_

Engine = Literal["torch", "onnxruntime"]
ENGINES: tuple[Engine, ...] = ("torch", "onnxruntime")
Run = Callable[[], object]
"""One inference of one network on one fixed batch."""


def measure(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    data: Iterable[Any] | None = None,
    *,
    latency: bool = False,
    engine: str = "torch",
    threads: int = 1,
    repeats: int = 30,
) -> Measurement:
    """Parameters and MACs of ``model`` on ``example_inputs``; with ``data`` its accuracy, with ``latency`` its speed.

    ``example_inputs``: a tensor, a tuple (positional) or a dict (keyword). ``data``: batches ``(inputs, targets)``,
    targets ``[B]`` of class indices. MACs are those of one example; ``latency_ms`` is that of the whole batch, the
    median of ``repeats`` runs in ``engine`` (``"torch"`` or ``"onnxruntime"``) on ``threads`` threads.

    Raises BadRequest for an unknown engine, empty data or outputs that are not class scores, MissingExtra where
    ONNX Runtime is asked for and not installed.

    >>> sc.measure(model, torch.randn(1, 3, 224, 224), latency=True).latency_ms    # doctest: +SKIP
    """
    _check_engine(engine)
    counted = count(model, example_inputs)
    net = model.model if isinstance(model, Graph) else model
    inputs: Any = (
        (model.args or model.kwargs) if isinstance(model, Graph) and example_inputs is None else example_inputs
    )
    median_ms = None
    if latency:
        with inference_runs({"": net}, inputs, engine=engine, threads=threads) as runs:
            median_ms = interleaved_latency_ms(runs, repeats=repeats, threads=threads)[""]
    return Measurement(
        params=int(counted.params),
        macs=int(counted.macs),
        accuracy=None if data is None else accuracy(net, data),
        latency_ms=median_ms,
        engine=engine if latency else "",
        device=str(_device(net)),
        details={"threads": threads, "repeats": repeats} if latency else {},
    )


def accuracy(model: nn.Module, data: Iterable[Any], *, reduce: bool = False) -> float:
    """The fraction, 0 to 1, of samples whose highest score is that of their class (top-1), in eval mode.

    ``data`` yields ``(inputs, targets)``: inputs as ``example_inputs`` are given, targets ``[B]`` int64; the model
    returns scores ``[B, K]``. With ``reduce`` every process of several passes its own part of the data, and all get
    the fraction of the whole. Raises BadRequest where the model does not, or where there are no samples.
    """
    right = total = 0
    device = _device(model)
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


def interleaved_latency_ms(
    runs: Mapping[str, Run],
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The median milliseconds of every run, taken in turns: ``repeats`` rounds of one run each after ``warmup``.

    ``threads`` is torch's thread count meanwhile; it is restored. ``progress(done, rounds)`` is called after a round.
    """
    if repeats < 1 or warmup < 0 or threads < 1:
        raise BadRequest(f"repeats and threads must be at least 1, warmup at least 0: {repeats}, {threads}, {warmup}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(warmup + repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
            if progress is not None:
                progress(turn + 1, warmup + repeats)
    finally:
        torch.set_num_threads(before)
    return {name: statistics.median(taken) for name, taken in times.items()}


@contextmanager
def inference_runs(
    models: Mapping[str, nn.Module], example_inputs: Inputs, *, engine: str = "torch", threads: int = 1
) -> Iterator[dict[str, Run]]:
    """A run per model on the same batch, ready to be timed, while the context is open.

    ``engine="torch"``: eval mode under ``no_grad`` on the model's own device, waiting for it to finish.
    ``engine="onnxruntime"``: on the CPU, from a file that is there only meanwhile.
    """
    _check_engine(engine)
    args, kwargs = as_arguments(example_inputs)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(in_mode(model, False))
        if engine == "torch":
            yield {name: _torch_run(model, args, kwargs) for name, model in models.items()}
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-")))
        runs = {}
        for number, (name, model) in enumerate(models.items()):
            file = folder / f"{number}.onnx"
            export_onnx(model, file, example_inputs, check=False)
            runs[name] = onnx_run(file, example_inputs, threads=threads)
        yield runs


def onnx_run(path: str | Path, example_inputs: Inputs, *, threads: int = 1) -> Run:
    """A run of an ONNX file in ONNX Runtime on ``example_inputs``; returns the list of output arrays.

    Raises MissingExtra where ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtra("latency in ONNX Runtime needs onnxruntime\n  do: pip install 'secateur[export]'") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    args, kwargs = as_arguments(example_inputs)
    flat, _ = flatten((args, kwargs))
    feed = {slot.name: x.detach().cpu().numpy() for slot, x in zip(session.get_inputs(), flat, strict=True)}
    return lambda: session.run(None, feed)


def _torch_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    device = _device(model)
    args = tuple(_to(a, device) for a in args)
    kwargs = {k: _to(v, device) for k, v in kwargs.items()}

    def run() -> object:
        with torch.no_grad():  # for the reason given in ``accuracy``
            out = model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return out

    return run


def _check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise BadRequest(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")


def _device(model: nn.Module) -> torch.device:
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
