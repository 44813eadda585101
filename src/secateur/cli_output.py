"""How the command line speaks: tables and progress bars. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from secateur.core import Group
from secateur.plans import Plan
from secateur.report.answers import change, ms_text, short_bytes, short_count
from secateur.report.content import LayerRow, Row, engines_of
from secateur.report.sensitivities import as_percent, score_text
from secateur.sensitivities import Sensitivity
from secateur.sensitivities.choice import SLACK, largest_ratio


def out() -> Console:
    """The console for results. Made anew each time: stdout may have been redirected since."""
    return Console(highlight=False, soft_wrap=False)


def err() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True, highlight=False)


def print_error(error: Exception) -> None:
    """The first line in red, what follows as it is: our errors say there what to do."""
    first, _, rest = str(error).partition("\n")
    err().print(f"[bold red]error:[/] {escape(first)}", soft_wrap=True)
    if rest:
        err().print(escape(rest), soft_wrap=True)


def say(text: str) -> None:
    """A line of result; ``text`` is printed as it is, never cut or wrapped."""
    out().print(escape(text), soft_wrap=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on stderr while something of unknown length runs; nothing is left of it."""
    with err().status(f"{text} ..."):
        yield


@contextmanager
def bar(text: str, total: int | None = None, *, passing: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr: call what it gives with (done, total, what to say beside it). ``passing``: it shows how
    long it will still take, vanishes at the end, and is there on a terminal only."""
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    if passing:
        columns += [BarColumn(28 if err().width >= 130 else 6), TaskProgressColumn(), TimeRemainingColumn()]
    else:
        columns += [BarColumn(28), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[note]}"), *([] if passing else [TimeElapsedColumn()])]
    console = err()
    with Progress(
        *columns, console=console, transient=passing, disable=passing and not console.is_terminal
    ) as progress:
        task = progress.add_task(text, total=total, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update


def print_networks(rows: Sequence[Row], *, title: str = "", threads: int = 1) -> None:
    """Networks as rows; where they were timed in several engines, or the terminal is too narrow for their latencies
    too, a second table with those."""
    engines = engines_of(rows)
    beside = len(engines) == 1 and not (_is_narrow() and any(row.memory is not None for row in rows))
    out().print(
        networks_table(rows, title=title, engine=f"{engines[0]}, {number(threads, 'thread')}" if beside else "")
    )
    if engines and not beside:
        out().print(latencies_table(rows, threads=threads))


def networks_table(rows: Sequence[Row], *, title: str = "", engine: str = "") -> Table:
    """Networks as rows, with those columns that any of them has; changes against the first row. It fits 80 columns.

    ``engine``: what stands above the latency; without it, latencies are left to a table of their own.
    """
    dense = rows[0]
    narrow = _is_narrow()
    gap = "\n" if narrow else " "
    memory = any(row.memory is not None for row in rows)
    number_text = short_count if narrow and memory else lambda number: f"{number:,}"
    table = _framed(title, narrow=narrow)
    table.add_column("network", no_wrap=True)
    shown: list[tuple[str, Callable[[Row], str]]] = []
    if any(row.accuracy is not None for row in rows):
        shown.append(("accuracy", lambda row: "–" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"))
    for heading, name in (("params", "params"), ("MACs", "macs")):
        shown.append((heading, partial(_versus, name=name, dense=dense, gap=gap, text=number_text)))
    if any(row.size is not None for row in rows):
        shown.append(("file", lambda row: "–" if row.size is None else short_bytes(row.size)))
    if memory:
        heading = f"peak{gap}memory"
        shown.append((heading, lambda row: "–" if row.memory is None else short_bytes(row.memory)))
    if engine:
        label = "\n".join(["latency", *(engine.split(", ") if narrow else [engine])])
        shown.append((label, lambda row: "–" if row.fastest is None else f"{row.fastest[1]:.3f} ms"))
    for heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(escape(row.name), *[value(row) for _, value in shown])
    return table


def latencies_table(rows: Sequence[Row], *, threads: int = 1) -> Table:
    """Milliseconds of every network in every engine, the fastest engine of each in green; last, how many times as fast
    as the first network in *its* fastest engine it is in its own."""
    table = _framed(f"Latency, ms, {number(threads, 'thread')}", narrow=_is_narrow())
    table.add_column("network", no_wrap=True)
    engines = engines_of(rows)
    for heading in (*(engine.replace("_", "\n") for engine in engines), "speed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        best = row.fastest
        cells = []
        for engine in engines:
            text = ms_text(row.latencies_ms[engine]) if engine in row.latencies_ms else "–"
            cells.append(f"[green]{text}[/]" if best is not None and best[0] == engine else text)
        speed = f"{rows[0].fastest[1] / best[1]:.2f} ×" if best is not None and rows[0].fastest is not None else "–"
        table.add_row(escape(row.name), *cells, speed)
    return table


def _is_narrow() -> bool:
    return out().width < 110


def _framed(title: str, *, narrow: bool) -> Table:
    frame = SIMPLE_HEAD if narrow else HEAVY_HEAD
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="dim", box=frame)
    if narrow:
        table.padding, table.pad_edge = (0, 1, 0, 0), False
    return table


def layers_table(layers: Sequence[LayerRow], *, pruned: bool) -> Table:
    """The table that papers print, a row per layer; ``pruned``: with what is left and its per cent."""
    table = Table(header_style="dim", title="Layers", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for heading in ("map", "channels", "MACs", *(["%"] if pruned else []), "params", *(["%"] if pruned else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in layers:
        table.add_row(escape(row.name), row.map_size, *_cells(row.channels, row.macs, row.params, pruned=pruned))
    macs = sum(row.macs[0] for row in layers), sum(row.macs[1] for row in layers)
    params = sum(row.params[0] for row in layers), sum(row.params[1] for row in layers)
    table.add_section()
    table.add_row("all layers", "", "", *_cells((0, 0), macs, params, pruned=pruned)[1:], style="bold")
    return table


def groups_table(groups: Sequence[Group]) -> Table:
    """Free groups: the channels that can go, and how many tensors go with them."""
    table = Table(header_style="dim", title="Groups that can be pruned", title_justify="left", title_style="bold")
    table.add_column("group", overflow="fold")
    for heading in ("channels", "partitions", "tensors", "written by", "read by"):
        table.add_column(heading, justify="right")
    for group in groups:
        roles = [{part.tensor for part in group.slices if part.role == role} for role in ("writes", "reads")]
        tensors = len({part.tensor for part in group.slices})
        cells = [group.channels, group.partitions, tensors, *map(len, roles)]
        table.add_row(escape(group.name), *map(str, cells))
    return table


def locked_table(groups: Sequence[Group]) -> Table:
    """Locked groups and why; reasons may run over several lines."""
    table = Table(header_style="dim", title="Locked", title_justify="left", title_style="bold")
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("why", overflow="fold")
    for group in groups:
        table.add_row(escape(group.name), str(group.channels), escape(group.locked))
    return table


def groups_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as JSON values: name, channels, partitions, why locked (or empty), and tensor, axis and role of slices."""
    return [
        {
            "name": group.name,
            "channels": group.channels,
            "partitions": group.partitions,
            "locked": group.locked,
            "tensors": [{"name": part.tensor, "axis": part.axis, "role": part.role} for part in group.slices],
        }
        for group in groups
    ]


def plan_table(plan: Plan) -> Table:
    """What a plan keeps of every group."""
    table = Table(header_style="dim", title="Plan", title_justify="left", title_style="bold")
    table.add_column("group", overflow="fold")
    for heading in ("channels", "kept", "%"):
        table.add_column(heading, justify="right")
    for group in plan.groups:
        kept = len(plan.keep[group.name])
        style = "dim" if kept == group.channels else ""
        table.add_row(escape(group.name), str(group.channels), str(kept), _percent(kept, group.channels), style=style)
    return table


def cost_lines(plan: Plan) -> list[str]:
    """What a plan that met a budget of memory or latency says about it."""
    budget, memory, latency = (plan.made_by.get(key) or {} for key in ("budget", "memory", "latency"))
    lines = []
    if memory:
        before, after = (short_bytes(memory[key]) for key in ("dense", "pruned"))
        lines.append(f"activations of {number(budget['batch'], 'example')} need {before} → {after} of memory")
    if latency:
        measured = f", measured {latency['measured_ms']:.3g} ms" if "measured_ms" in latency else ""
        lines.append(
            f"{budget['engine']} {latency['version']}, batch {budget['batch']}, "
            f"{number(budget['threads'], 'thread')}: {latency['dense_ms']:.3g} → {latency['predicted_ms']:.3g} ms "
            f"predicted{measured}; its layers were timed in {latency['seconds']:.0f} s"
        )
    return lines


def sensitivity_table(found: Sensitivity, tolerance: float, *, retrained: bool = False) -> Table:
    """The score of each group at every ratio: red where it is more than ``tolerance`` below the dense one's, else
    green; last, up to which ratio it never was."""
    narrow = out().width < 110
    title = "Each group alone, " + ("retrained" if retrained else "not retrained")
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
    if narrow:
        table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("group", overflow="fold", min_width=8)
    for heading in ("maps", *(f"{100 * ratio:g} %" for ratio in found.ratios), "up to"):
        table.add_column(heading.replace(" %", "") if narrow else heading, justify="right", no_wrap=True)
    percent = as_percent(found)
    for curve in found.curves:
        row = curve.retrained if retrained else curve.scores
        cells = []
        for score in row:
            colour = "red" if found.dense - score > tolerance + SLACK else "green"
            cells.append(f"[{colour}]{score_text(score, percent=percent)}[/]")
        largest = largest_ratio(found, replace(curve, scores=row), tolerance)
        table.add_row(escape(curve.group), curve.stage, *cells, f"{100 * largest:g} %" if largest else "–")
    return table


def key_values(values: Mapping[str, str]) -> Table:
    """Name beside value, without a frame."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(escape(name), escape(value))
    return table


def number(count: int, noun: str) -> str:
    """``1 group``, ``2 groups``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _cells(
    channels: tuple[int, int], macs: tuple[int, int], params: tuple[int, int], *, pruned: bool
) -> tuple[str, ...]:
    if not pruned:
        return str(channels[1]), f"{macs[1]:,}", f"{params[1]:,}"
    width = f"{channels[0]} → {channels[1]}" if channels[0] != channels[1] else str(channels[0])
    return width, f"{macs[1]:,}", _percent(macs[1], macs[0]), f"{params[1]:,}", _percent(params[1], params[0])


def _versus(row: Row, *, name: str, dense: Row, gap: str, text: Callable[[float], str]) -> str:
    """A count, and its change against the first row's."""
    value, before = getattr(row, name), getattr(dense, name)
    return text(value) if row is dense else f"{text(value)}{gap}[dim]({change(before, value)})[/]"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"


__all__ = [
    "bar",
    "err",
    "escape",
    "groups_json",
    "groups_table",
    "key_values",
    "latencies_table",
    "layers_table",
    "locked_table",
    "networks_table",
    "number",
    "out",
    "plan_table",
    "print_error",
    "print_networks",
    "say",
    "sensitivity_table",
    "short_bytes",
    "short_count",
    "working",
]
