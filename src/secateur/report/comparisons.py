"""Several runs, or several networks, side by side: what one page tells of them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from secateur.report.answers import short_count, times
from secateur.report.content import Report, Row, engines_of
from secateur.report.figures import engines_figure
from secateur.report.fronts import STRETCHED, front_figure, has_front, is_stretched
from secateur.report.sections import Section, both


@dataclass(frozen=True)
class Comparison:
    """``runs``: run -> its networks, the dense one first; a network that stands for itself is a run of one, compared
    with the network of the first run. ``finals``: run -> the name of its outcome. ``channels``: run -> layer -> output
    channels of its outcome. ``reports``: run -> all that is told of it, where there is more to tell."""

    title: str
    runs: Mapping[str, Sequence[Row]]
    finals: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reports: Mapping[str, Report] = field(default_factory=dict)
    timing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def outcome(self, run: str) -> Row:
        """The network that the run was for."""
        rows = self.runs[run]
        return next((row for row in rows if row.name == self.finals.get(run)), rows[-1])

    def dense(self, run: str) -> Row:
        """The network that the outcome of the run is compared with."""
        rows = self.runs[run]
        return rows[0] if len(rows) > 1 else next(iter(self.runs.values()))[0]


def compared(reports: Mapping[str, Report], *, title: str = "", command: str = "") -> Comparison:
    """The runs of these reports side by side. Layers that are in all of them are compared by their widths."""
    return Comparison(
        title=title or f"{len(reports)} runs side by side",
        runs={run: report.rows for run, report in reports.items()},
        finals={run: report.outcome.name for run, report in reports.items()},
        channels={run: {row.name: row.channels[1] for row in report.layers} for run, report in reports.items()},
        reports=reports,
        command=command,
    )


def comparison_sections(found: Comparison) -> Iterator[Section]:
    """All that can be told of them together."""
    text = "Of one example. Changes are against the dense network of the same run"
    if not found.reports:
        text = f"Of one example. Changes are against {found.dense(next(iter(found.runs))).name}"
    yield Section(
        "networks", "Networks", "Side by side", f"{text}; speed is fastest against fastest.", table="networks"
    )
    if has_front(found.runs):
        text = "Up and to the left is better. The line joins the networks that no other one beats in both."
        if found.reports:
            text += " A colour is a run; squares are dense networks, large points what the runs came to."
        text += STRETCHED * is_stretched(found.runs)
        wide, narrow = both(lambda **how: front_figure(found.runs, found.finals, **how), "front")
        yield Section("trade-off", "Trade-off", "Accuracy against cost", text, wide, narrow)
    timed = {run: found.outcome(run).latencies_ms for run in found.runs if found.outcome(run).latencies_ms}
    if len(timed) > 1:
        text = f"Latencies: {found.timing}"
        if found.reports:
            text = (
                "What each run came to; in brackets, how many times as fast as the first. Only runs that were measured "
            )
            text += "on one and the same machine can be compared so."
        wide, narrow = both(lambda **how: engines_figure(timed, **how), "engines")
        table = "engines" if len(engines_of([row for rows in found.runs.values() for row in rows])) > 1 else ""
        yield Section("speed", "Speed", "Speed in every engine", text, wide, narrow, table)
    if shared_layers(found):
        text = "Output channels of the layers that all of them have; coloured where they differ."
        yield Section("widths", "Widths", "Widths side by side", text, table="widths")
    if found.environment:
        text = found.timing and f"Latencies: {found.timing}"
        yield Section("environment", "Environment", "Where it was measured", text, table="environment")


def shared_layers(found: Comparison) -> list[tuple[str, list[int]]]:
    """The layers that all have, in the order of the first, with their output channels in each."""
    columns = list(found.channels.values())
    if len(columns) < 2:
        return []
    return [(layer, [own[layer] for own in columns]) for layer in columns[0] if all(layer in own for own in columns)]


def verdict(found: Comparison) -> list[tuple[str, str]]:
    """The comparison as a sentence: which is the fastest, the smallest, the most accurate. In pairs of what is said
    plainly and what is said loudly behind it; nothing is said of what is the same in the first two."""
    rows = {run: found.outcome(run) for run in found.runs}
    said: list[list[tuple[str, str]]] = []
    fast = _best({run: row.fastest[1] for run, row in rows.items() if row.fastest is not None})
    if fast is not None:
        (best, ms), (worst, more) = fast
        said.append([("", best), (" is the fastest, ", times(more, ms)), (f" than {worst}", "")])
    small = _best({run: row.params for run, row in rows.items()})
    if small is not None:
        (best, params), _ = small
        said.append([("", best), (f" the smallest, with {short_count(params)} parameters", "")])
    right = _best({run: -row.accuracy for run, row in rows.items() if row.accuracy is not None})
    if right is not None:
        (best, accuracy), _ = right
        said.append([("", best), (f" the most accurate, with {-100 * accuracy:.2f} %", "")])
    if not said:
        return [("They cost the same.", "")]
    joined: list[tuple[str, str]] = []
    for place, part in enumerate(said):
        if place:
            joined.append((" and " if place == len(said) - 1 else ", ", ""))
        joined += part
    if fast is None:
        joined[1] = (f" is{joined[1][0]}", joined[1][1])
    return [*joined, (".", "")]


def _best(values: Mapping[str, float]) -> tuple[tuple[str, float], tuple[str, float]] | None:
    """The least and the largest of the values; None where there are not two, or several are the least."""
    order = sorted(values.items(), key=lambda item: item[1])
    return (order[0], order[-1]) if len(order) > 1 and order[0][1] < order[1][1] else None
