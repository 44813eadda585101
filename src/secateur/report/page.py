"""A report as one HTML file: style, tables and plots inside it, nothing fetched from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import BadArtifact, MissingExtra
from secateur.files import written_aside
from secateur.report.answers import (
    cards,
    change,
    engine_name,
    lead,
    ms_text,
    per_cent,
    points_text,
    short_bytes,
    short_count,
    times,
)
from secateur.report.canvas import stage_text
from secateur.report.comparisons import Comparison, comparison_sections, shared_layers, verdict
from secateur.report.content import Report, engines_of
from secateur.report.sections import heat_rows, sections
from secateur.report.sensitivities import as_percent, score_text
from secateur.report.turnovers import listed, tallies

TALL = 24
"""A table of more rows than this scrolls in its panel, its heading in sight."""


def write_report(path: str | Path, report: Report | Comparison) -> Path:
    """Writes ``report`` to ``path`` (one .html file) and returns it; written aside first, so never half there.

    Raises MissingExtra without jinja2 or matplotlib, BadArtifact where the file cannot be written.
    """
    text = render(report)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadArtifact(f"the report cannot be written to {path}: {error.strerror}") from error
    return path


def render(report: Report | Comparison) -> str:
    """The page's HTML."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("a report needs jinja2\n  do: pip install 'secateur[report]'") from error
    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("secateur.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"count": short_count, "bytes": short_bytes, "stage": stage_text, "listed": listed}
    engine.filters |= {"engine": engine_name, "ms": ms_text}
    engine.globals |= {"change": change, "per_cent": per_cent, "points": points_text, "times": times, "tall": TALL}
    page = engine.get_template("page.html.j2")
    if isinstance(report, Report):
        view = run_view(report)
        return page.render(title=report.title, command=report.command, main=view, runs=[])
    return page.render(
        title=report.title,
        command=report.command,
        main=comparison_view(report),
        runs=[
            {**run_view(each, f"run{place}-"), "key": f"run{place}", "name": name, "command": each.command}
            for place, (name, each) in enumerate(report.reports.items(), 1)
        ],
    )


def run_view(report: Report, prefix: str = "") -> dict[str, Any]:
    """What the page's tables show of one run. ``prefix`` sets its ids apart from those of other runs."""
    found = report.sensitivity
    percent = found is not None and as_percent(found)
    dense, final = report.dense, report.outcome
    return {
        "title": report.title,
        "lead": lead(dense, final) if final is not dense else [],
        "cards": cards(dense, final, images=report.images) if final is not dense else [],
        "sections": list(sections(report, prefix)),
        "networks": [("", row, dense, row is final) for row in report.rows],
        "engines": engines_of(report.rows),
        "layers": report.layers,
        "total": [
            sum(getattr(row, what)[side] for row in report.layers) for what in ("macs", "params") for side in (0, 1)
        ],
        "whole": report.whole,
        "facts": report.facts,
        "law": report.law,
        "environment": report.environment,
        "heat": [] if found is None else heat_rows(found),
        "ratios": [] if found is None else found.ratios,
        "heat_text": "" if found is None else _heat_text(score_text(found.dense, percent=percent), percent=percent),
        "tallies": [] if report.zeroed is None else tallies(report.zeroed),
    }


def comparison_view(report: Comparison) -> dict[str, Any]:
    """What the page's tables show of several runs together."""
    rows = []
    for run in report.runs:
        dense, final = report.dense(run), report.outcome(run)
        several = len(report.runs[run]) > 1
        rows += [(run, dense, dense, False)] if several and final is not dense else []
        rows.append((run if several else "", final, dense, several))
    return {
        "title": report.title,
        "lead": verdict(report),
        "cards": [],
        "sections": list(comparison_sections(report)),
        "networks": rows,
        "engines": engines_of([row for _, row, *_ in rows]),
        "columns": list(report.channels),
        "widths": [(layer, own, len(set(own)) > 1) for layer, own in shared_layers(report)],
        "environment": report.environment,
    }


def _heat_text(dense: str, *, percent: bool) -> str:
    return (
        f"{'Accuracy in %' if percent else 'The score'} when the group alone is pruned and nothing is retrained; "
        f"{dense} when nothing is. The ratio is the fraction of its channels that is removed. The stronger the colour, "
        "the more is lost."
    )


__all__ = ["change", "render", "short_bytes", "short_count", "write_report"]
