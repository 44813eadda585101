"""``secateur latencies``: how long a network takes at what widths, measured where it will run; and its use in plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur import cli_output as show
from secateur.cli_measuring import Base, Model, Options, Shape
from secateur.cli_models import Source, parse_options, parse_shape
from secateur.cli_reporting import open_
from secateur.core import Budget
from secateur.errors import BadArtifact, BadRequest
from secateur.files import written_aside
from secateur.graph import Graph, trace
from secateur.latencies import Latencies, measure_latencies

Given = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Latencies that secateur latencies wrote, maybe elsewhere.")
]


def latencies(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", show_default=False, help="Where to write.")],
    engine: Annotated[str, typer.Option(help="The engine that the network will run in.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads that it will have.")] = 1,
    batch: Annotated[int, typer.Option(help="Examples at a time.")] = 1,
    residual: Annotated[str, typer.Option(help="The residual rule that it will be planned by.")] = "coupled",
    shape: Shape = None,
    option: Options = None,
    base: Base = None,
) -> None:
    """Measure how long MODEL takes at what widths on this machine: for secateur plan --latencies, here or elsewhere."""
    subject = open_(Source(model, None, parse_shape(shape), 0, parse_options(option or ()), base))
    with show.working(f"tracing {subject.name}"):
        graph = trace(subject.model, subject.inputs)
    found = told(graph, engine=engine, threads=threads, batch=batch, residual=residual)
    try:
        with written_aside(output) as aside:
            aside.write_text(found.to_json(), encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"{output} cannot be written: {error.strerror}\n  do: choose another path with -o") from error
    show.say(
        f"{output}: {show.number(len(found.points), 'kind')} of layers in {found.seconds:.0f} s, on {found.machine}"
    )


def told(graph: Graph, *, engine: str, threads: int, batch: int, residual: str) -> Latencies:
    """``measure_latencies`` with a bar that says what is being measured."""
    with show.bar(f"latencies in {engine}", passing=True) as update:
        return measure_latencies(graph, engine=engine, threads=threads, batch=batch, residual=residual, progress=update)


def for_plan(graph: Graph, budget: Budget | None, file: Path | None, *, residual: str) -> Latencies | None:
    """The latencies that were given for a plan, if any; where the budget needs some and none are given, they are
    measured now, under a bar, and the plan will find them."""
    wanted = budget is not None and budget.of == "latency"
    if file is not None:
        if not wanted:
            raise BadRequest(
                "--latencies says how a budget of latency is foreseen\n  do: ask for one, with --latency 0.5"
            )
        try:
            return Latencies.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BadArtifact(f"{file} cannot be read: {error}\n  do: write it with secateur latencies") from error
        except BadArtifact as error:
            raise BadArtifact(f"{file}: {error}") from error
    if wanted and budget is not None and budget.engine is not None:
        told(graph, engine=budget.engine, threads=budget.threads, batch=budget.batch, residual=residual)
    return None


def register(app: typer.Typer) -> None:
    """Make these commands of ``app``."""
    app.command(
        epilog="[bold]Examples:[/]\n\n[cyan]secateur latencies timm:efficientnet_lite0 --threads 4 -o phone.json[/]\n\n"
        "[cyan]secateur plan timm:efficientnet_lite0 --engine onnxruntime --threads 4 --latency 0.5 "
        "--latencies phone.json -o plan.json[/]"
    )(latencies)
