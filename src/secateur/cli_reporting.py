"""The commands that tell: ``compare`` sets several networks side by side, ``report`` makes the pages of runs.

``compare`` measures everything anew, on inputs of one shape and in turns; ``report`` tells what the runs have kept.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from secateur import cli_output as show
from secateur.artifact import read_measurement
from secateur.cli_models import Source, Subject, open_model, parse_engines, parse_options, parse_shape
from secateur.core import Timing
from secateur.counting import count, layer_table
from secateur.errors import BadArtifact, BadRequest, SecateurError
from secateur.graph import Graph, as_arguments, trace
from secateur.memory import activation_memory
from secateur.nests import flatten
from secateur.report import Comparison, Row, compared, environment, layer_rows, write_report
from secateur.timing import time_in_engines

Page = Annotated[Path | None, typer.Option("-o", "--output", metavar="PAGE.html", help="Write a page, too.")]

REPEATS = 30


def compare(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...", show_default=False, help="Two or more: MODELs, saved folders, or folders of runs."
        ),
    ],
    output: Page = None,
    shape: Annotated[
        str | None, typer.Option("--input", metavar="N,C,H,W", help="Shape of the example input, the batch included.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of networks without weights.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="Passed to what builds MODELs; repeatable."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The dense network of folders, if not recorded."),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time them in turns.")] = True,
    engine: Annotated[
        list[str] | None, typer.Option(help="torch, onnxruntime ...; repeatable, or all that are installed.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads while timing.")] = 1,
) -> None:
    """Networks side by side: size, cost, memory, and latency in turns on inputs of the same shape."""
    if len(networks) < 2:
        raise BadRequest("one network cannot be compared\n  do: name two or more, or see secateur measure for one")
    engines = parse_engines(engine or ()) if latency else []
    known = [_finished(name) for name in networks]
    options, size = parse_options(option or ()), parse_shape(shape)
    sources = [Source(place, None, size, seed, options, None if ":" in place else base) for place, _ in known]
    subjects = _named([replace(open_(source), name=name) for name, source in zip(networks, sources, strict=True)])
    accuracies = {name: accuracy for name, (_, accuracy) in zip(subjects, known, strict=True)}
    with show.working("counting"):
        graphs = {name: trace(subject.model, subject.inputs) for name, subject in subjects.items()}
    times = timed(subjects, engines, threads)
    rows = [row_of(name, subject, graphs[name], times, accuracies[name]) for name, subject in subjects.items()]
    show.print_networks(rows, title="Networks", threads=threads)
    if output is not None:
        _page(output, rows, graphs, subjects, threads)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", show_default=False, help="Folders of finished runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="PAGE.html", show_default=False, help="Of one run, its report.html if not given."
        ),
    ] = None,
) -> None:
    """The page of a run anew, or one page of several runs side by side."""
    from secateur.recipes.reports import PAGE, read_report

    if len(runs) > 1 and output is None:
        raise BadRequest("where should the page of several runs be written?\n  do: say -o page.html")
    twice = next((run for place, run in enumerate(runs) if run in runs[:place]), None)
    if twice is not None:
        raise BadRequest(f"{twice} is there twice\n  do: name each run once")
    reports = {str(run): read_report(run) for run in runs}
    page = output or runs[0] / PAGE
    told = next(iter(reports.values())) if len(reports) == 1 else compared(reports, command=_command())
    show.say(f"written to {write_report(page, told)}")


def register(app: typer.Typer) -> None:
    """Make these commands of ``app``."""
    app.command(
        epilog="[bold]Examples:[/]\n\n[cyan]secateur compare zoo:resnet56 small smaller --engine all[/]\n\n"
        "[cyan]secateur compare runs/l1 runs/thinet runs/fpgm --engine openvino -o page.html[/]"
    )(compare)
    app.command(
        epilog="[bold]Examples:[/]\n\n[cyan]secateur report runs/mine[/]\n\n"
        "[cyan]secateur report runs/l1 runs/thinet runs/fpgm -o page.html[/]"
    )(report)


# What measuring commands share -----------------------------------------------------------------------------------


def open_(source: Source) -> Subject:
    """The network, with a word on stderr meanwhile."""
    with show.working(f"opening {source.name}"):
        return open_model(source)


def timed(subjects: Mapping[str, Subject], engines: Sequence[str], threads: int) -> dict[str, dict[str, Timing]]:
    """``{engine: {network: time}}``, all in turns. Of several engines, those that cannot run a network are left out,
    and that is told; of one, what it raises is raised."""
    first, *others = subjects.values()
    for other in others:
        _same_inputs(first, other)
    if not engines:
        return {}
    failures: dict[str, SecateurError] | None = {} if len(engines) > 1 else None
    models = {name: subject.model for name, subject in subjects.items()}
    with show.bar(f"timing in {', '.join(engines)}") as update:
        found = time_in_engines(
            models,
            first.inputs,
            engines=engines,
            threads=threads,
            repeats=REPEATS,
            progress=lambda done, total: update(done, total, ""),
            failures=failures,
        )
    for name, error in (failures or {}).items():
        show.err().print(f"[yellow]note:[/] {name} is left out: {show.escape(str(error))}", soft_wrap=True)
    if not found and failures:
        raise failures[engines[-1]]
    return found


def row_of(
    name: str,
    subject: Subject,
    graph: Graph,
    times: Mapping[str, Mapping[str, Timing]],
    accuracy: float | None = None,
) -> Row:
    """The network as a row of a table."""
    counted = count(graph)
    return Row(
        name,
        params=int(counted.params),
        macs=int(counted.macs),
        accuracy=accuracy,
        size=subject.size,
        latencies_ms={engine: own[name].ms for engine, own in times.items() if name in own},
        memory=activation_memory(subject.model, subject.inputs).needed,
    )


def _finished(name: str) -> tuple[str, float | None]:
    """The saved network that ``name`` means, and its accuracy where somebody has measured it: of a run, what it ended
    with."""
    from secateur.recipes.reports import is_run, read_report
    from secateur.recipes.results import PRUNED

    path = Path(name)
    if ":" in name or not path.is_dir():
        return name, None
    if not is_run(path):
        known = read_measurement(path)
        return name, None if known is None else known.accuracy
    outcome = read_report(path).outcome
    if not (path / PRUNED).is_dir():
        raise BadArtifact(
            f"the run in {path} pruned nothing: it holds no network to compare\n"
            f"  do: see secateur report {path} for what it came to"
        )
    return str(path / PRUNED), outcome.accuracy


def _named(subjects: Sequence[Subject]) -> dict[str, Subject]:
    """By their names, numbered where a name is there twice."""
    names = [subject.name for subject in subjects]
    repeated = len(set(names)) < len(names)
    return {f"{s.name} #{place}" if repeated else s.name: s for place, s in enumerate(subjects, 1)}


def _same_inputs(first: Subject, second: Subject) -> None:
    shapes = [[list(t.shape) for t in flatten(as_arguments(s.inputs))[0]] for s in (first, second)]
    if shapes[0] != shapes[1]:
        raise BadRequest(
            f"{first.name} is run on {shapes[0]} and {second.name} on {shapes[1]}: what they cost cannot be compared\n"
            "  do: give all of them one shape with --input"
        )


def _page(
    output: Path, rows: Sequence[Row], graphs: Mapping[str, Graph], subjects: Mapping[str, Subject], threads: int
) -> None:
    shape = " and ".join(str(list(t.shape)) for t in flatten(as_arguments(next(iter(subjects.values())).inputs))[0])
    layers = {name: layer_rows(layer_table(graph), layer_table(graph)) for name, graph in graphs.items()}
    timing = f"median of {REPEATS} runs of inputs {shape} on {show.number(threads, 'thread')}, all in turns."
    page = Comparison(
        title=", ".join(subjects),
        runs={row.name: [row] for row in rows},
        channels={name: {row.name: row.channels[1] for row in own} for name, own in layers.items()},
        timing=timing if any(row.latencies_ms for row in rows) else "",
        environment=environment(),
        command=_command(),
    )
    show.say(f"written to {write_report(output, page)}")


def _command() -> str:
    return shlex.join(["secateur", *sys.argv[1:]])
