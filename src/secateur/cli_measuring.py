"""The commands that look at one network: ``measure``, ``engines`` to measure it in, and ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from secateur import cli_output as show
from secateur.cli_models import Source, Subject, parse_engines, parse_options, parse_shape, tensor_bytes
from secateur.cli_reporting import REPEATS, open_, row_of, timed
from secateur.core import Timing
from secateur.counting import layer_table
from secateur.engines import ENGINES
from secateur.errors import BadRequest
from secateur.graph import Inputs, as_arguments, trace
from secateur.measurement import batch_of
from secateur.memory import activation_memory
from secateur.nests import flatten, unflatten
from secateur.onnx_file import export_onnx
from secateur.report.content import layer_rows
from secateur.timing import take_turns, training_steps

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="zoo:NAME, torchvision:NAME, timm:NAME, package.module:function, or a saved folder.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="Your trained weights: .safetensors, .pth, .pt.")
]
Shape = Annotated[
    str | None, typer.Option("--input", metavar="N,C,H,W", help="Shape of the example input, the batch included.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of a network without weights.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Passed to what builds MODEL, as num_classes=10; repeatable."),
]
Base = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The dense network of a saved folder, if not recorded.")
]


def measure(
    model: Model,
    weights: Weights = None,
    shape: Shape = None,
    seed: Seed = 0,
    option: Options = None,
    base: Base = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time it: median of one batch.")] = True,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="torch, onnxruntime ...; repeatable, or all that are installed."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads while timing.")] = 1,
    batch: Annotated[int | None, typer.Option(help="So many examples at once; as --input says, if not given.")] = None,
    train_step: Annotated[bool, typer.Option("--train-step", help="Time forward and backward in torch, too.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory of activations.")] = True,
) -> None:
    """Print the per-layer table, totals, size, memory and latency; of a saved folder beside its dense network."""
    engines = parse_engines(engine or ()) if latency else []
    subjects = _subjects(Source(model, weights, parse_shape(shape), seed, parse_options(option or ()), base), batch)
    graphs = {}
    for name, subject in subjects.items():
        with show.working(f"tracing {name}"):
            graphs[name] = trace(subject.model, subject.inputs)
    tables = [layer_table(graph) for graph in graphs.values()]
    layers = layer_rows(tables[0], tables[-1])
    show.out().print(show.layers_table(layers, pruned=len(subjects) > 1))
    times = timed(subjects, engines, threads)
    steps = _training(subjects, threads) if train_step else {}
    rows = [row_of(name, subject, graphs[name], times) for name, subject in subjects.items()]
    rows = rows if memory else [replace(row, memory=None) for row in rows]
    show.print_networks(rows, title="Networks", threads=threads)
    _tell_times(subjects, times, steps, threads)
    if memory:
        _tell_memory(subjects)


def engines() -> None:
    """List the engines that networks can be measured in: which are installed, and how to install the others."""
    table = Table(header_style="dim")
    table.add_column("engine", no_wrap=True)
    table.add_column("installed", no_wrap=True)
    table.add_column("what it is, or what it lacks", overflow="fold")
    for name, engine in ENGINES.items():
        missing = engine.missing()
        lacks = missing.partition("\n  do: ")[2]
        cells = ("[red]no[/]", show.escape(lacks)) if missing else (f"[green]{engine.version()}[/]", engine.about)
        table.add_row(name, *cells)
    show.out().print(table)


def export(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", show_default=False, help="Where to write.")],
    base: Base = None,
    weights: Weights = None,
    shape: Shape = None,
    seed: Seed = 0,
    option: Options = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set; the exporter's choice, if not given.", min=1)
    ] = None,
) -> None:
    """Write ONNX with a dynamic batch, and compare it with torch in ONNX Runtime."""
    subject = open_(Source(model, weights, parse_shape(shape), seed, parse_options(option or ()), base))
    with show.working("exporting"):
        written = export_onnx(subject.model, output, subject.inputs, opset=opset)
    show.say(
        f"{output}: {show.short_bytes(written.bytes)}, opset {written.opset}, "
        f"largest difference to torch {written.max_difference:.1e}"
    )


def register(app: typer.Typer) -> None:
    """Make these commands of ``app``."""
    app.command(
        epilog="[bold]Examples:[/]\n\n[cyan]secateur measure small --engine onnxruntime --engine openvino[/]\n\n"
        "[cyan]secateur measure torchvision:resnet50 --engine all --batch 8 --threads 4 --train-step[/]"
    )(measure)
    app.command(epilog="[bold]Example:[/]  [cyan]secateur engines[/]")(engines)
    app.command(
        epilog="[bold]Examples:[/]\n\n[cyan]secateur export small -o small.onnx[/]\n\n"
        "[cyan]secateur export small --model mypackage.nets:net -o small.onnx[/]"
    )(export)


def _subjects(source: Source, batch: int | None) -> dict[str, Subject]:
    """The network, after its dense one where it has one, on inputs of ``batch`` examples."""
    subject = open_(source)
    if batch is not None:
        subject = replace(subject, inputs=with_batch(subject.inputs, batch))
    if subject.dense is None:
        return {subject.name: subject}
    dense = Subject(
        "dense", subject.dense, subject.inputs, tensor_bytes(subject.dense), trained=False, built=subject.built
    )
    return {"dense": dense, subject.name: subject}


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """``inputs`` with ``batch`` examples: those that are there, again and again, or the first of them."""
    if batch < 1:
        raise BadRequest(f"--batch must be at least 1, not {batch}")
    tensors, skeleton = flatten(as_arguments(inputs))
    length, rows = batch_of(inputs), torch.arange(batch)
    args, kwargs = unflatten(
        skeleton, [t.index_select(0, rows % length) if t.dim() and len(t) == length else t for t in tensors]
    )
    return args or kwargs


def _training(subjects: Mapping[str, Subject], threads: int) -> dict[str, Timing]:
    models = {name: subject.model for name, subject in subjects.items()}
    inputs = next(iter(subjects.values())).inputs
    with training_steps(models, inputs, threads=threads) as steps, show.bar("timing a training step") as update:
        return take_turns(steps, repeats=REPEATS, threads=threads, progress=lambda done, total: update(done, total, ""))


def _tell_times(
    subjects: Mapping[str, Subject],
    times: Mapping[str, Mapping[str, Timing]],
    steps: Mapping[str, Timing],
    threads: int,
) -> None:
    """Medians and quartiles, an engine a line, and what they are of."""
    if not times and not steps:
        return
    lines = {f"{name} {ENGINES[name].version()}": _spread(own) for name, own in times.items()}
    if steps:
        lines["training step"] = _spread(steps)
    batch = batch_of(next(iter(subjects.values())).inputs)
    show.out().print(show.key_values(lines))
    show.say(
        f"Median (quartiles) of {REPEATS} runs of {show.number(batch, 'example')} on {show.number(threads, 'thread')}, "
        "all in turns after a warm-up"
        + ("; every engine's outputs were compared with torch's first." if times else ".")
    )


def _spread(timings: Mapping[str, Timing]) -> str:
    return "; ".join(f"{name} {t.ms:.3f} ms ({t.low:.3f} to {t.high:.3f})" for name, t in timings.items())


def _tell_memory(subjects: Mapping[str, Subject]) -> None:
    found = {name: activation_memory(subject.model, subject.inputs) for name, subject in subjects.items()}
    held = "; ".join(f"{name} {show.short_bytes(own.held)}" for name, own in found.items())
    show.say(f"Activations at their peak, each freed after its last use; torch, run eagerly, held {held}.")


__all__ = ["engines", "export", "measure", "register", "with_batch"]
