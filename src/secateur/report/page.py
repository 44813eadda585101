"""A ``Report`` as one HTML file: style, tables and plots inside it, nothing fetched from anywhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import BadArtifact, MissingExtra
from secateur.report.canvas import stage_text
from secateur.report.content import Report, Row
from secateur.report.figures import accuracy_figure, curves_figure, norms_figure, widths_figure
from secateur.report.filters import filters_list
from secateur.report.sensitivities import as_percent, importance_figure, score_text, sensitivity_figure
from secateur.report.turnovers import listed, summary, tallies, turnover_figure
from secateur.sensitivities import GroupCurve, Sensitivity


def write_report(path: str | Path, report: Report) -> Path:
    """Writes ``report`` to ``path`` (one .html file) and returns it; written aside first, so never half there.

    Raises MissingExtra without jinja2 or matplotlib, BadArtifact where the file cannot be written.
    """
    text = render(report)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise BadArtifact(f"the report cannot be written to {path}: {error.strerror}") from error
    return path


def render(report: Report) -> str:
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
    found = report.sensitivity
    percent = found is not None and as_percent(found)
    page = engine.get_template("page.html.j2")
    final = next((row for row in report.rows if row.name == report.final), report.rows[-1])
    return page.render(
        report=report,
        final=final,
        cards=cards(report.rows[0], final),
        figures=list(_figures(report)),
        heat=[] if found is None else heat_rows(found),
        tallies=[] if report.zeroed is None else tallies(report.zeroed),
        percent=percent,
        dense_score="" if found is None else score_text(found.dense, percent=percent),
        total_macs=sum(row.macs[0] for row in report.layers),
        total_params=sum(row.params[0] for row in report.layers),
    )


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    """Heading, text and element of every picture that the report has something for."""
    if any(row.accuracy is not None for row in report.rows):
        yield "Accuracy", "Of the same test images, none of which was seen in training.", accuracy_figure(report.rows)
    if report.curves:
        text = (
            "Every training of the run: the loss it was trained on, and the accuracy on images held out for choosing."
        )
        yield "Training", text, curves_figure(report.curves)
    if report.layers:
        yield "Width of every layer", "Output channels in the network's order.", widths_figure(report.layers)
    if report.norms:
        text = (
            "Each layer's L1 norms from the largest, over the largest, in the dense network. A steep curve has many "
            "filters to spare, a flat one few (Li et al. 2017, figure 2a)."
        )
        stages = {row.name: row.map_size for row in report.layers}
        yield "Norms of the filters", text, norms_figure(report.norms, stages)
    if report.zeroed is not None and len(report.zeroed.history) > 1 and tallies(report.zeroed):
        yield "Zeroed filters from choice to choice", summary(report.zeroed), turnover_figure(report.zeroed)
    found = report.sensitivity
    if found is not None and not (found.criterion == "l1" and report.norms):
        text = f"Each group's scores under the criterion {found.criterion}, from the largest, over the largest."
        yield "Scores of the groups", text, importance_figure(found)
    if found is not None:
        text = (
            "Each group pruned alone, at every ratio, and how well the network does then on images held out for "
            "choosing (Li et al. 2017, figure 2b). What falls early is sensitive, and wants a small ratio or none."
        )
        yield "Sensitivity", text, sensitivity_figure(found)
    if report.filters is not None:
        layer = report.filters.layer or "the only layer"
        text = (
            f"Those of {layer} in the dense network from the largest L1 norm to the smallest, which stands below each. "
            "All share one scale, middle grey is 0 (Li et al. 2017, figure 5)."
        )
        yield "Filters of the first layer", text, filters_list(report.filters)


def heat_rows(found: Sensitivity) -> list[tuple[GroupCurve, list[tuple[str, float]]]]:
    """Each group with ``(score, share of the dense score that is lost)`` at every ratio, the share in per cent."""
    percent = as_percent(found)
    span = found.dense - min(score for curve in found.curves for score in (found.dense, *curve.scores))
    return [
        (
            curve,
            [
                (score_text(score, percent=percent), 100 * max(0.0, found.dense - score) / (span or 1.0))
                for score in curve.scores
            ],
        )
        for curve in found.curves
    ]


def cards(dense: Row, final: Row) -> list[tuple[str, str, str]]:
    """The headline figures, ``(what, change, from -> to)``, of those that were measured."""
    found = []
    for what, before, after in (("MACs", dense.macs, final.macs), ("Parameters", dense.params, final.params)):
        found.append((what, change(before, after), f"{short_count(before)} → {short_count(after)}"))
    if dense.latency_ms and final.latency_ms:
        times = f"{dense.latency_ms:.2f} → {final.latency_ms:.2f} ms"
        found.append(("Speed", f"{dense.latency_ms / final.latency_ms:.2f} ×", times))
    if dense.accuracy is not None and final.accuracy is not None:
        points = 100 * (final.accuracy - dense.accuracy)
        sign = "±" if abs(points) < 0.005 else "+" if points > 0 else "−"
        seen = f"{100 * dense.accuracy:.2f} → {100 * final.accuracy:.2f} %"
        found.append(("Accuracy", f"{sign}{abs(points):.2f} points", seen))
    return found


def change(before: float, after: float) -> str:
    """The relative change, as ``−50.0 %``."""
    if not before:
        return "–"
    percent = 100 * (after - before) / before
    return f"{'−' if percent < 0 else '+' if percent > 0 else '±'}{abs(percent):.1f} %"


def short_count(number: float) -> str:
    """``41.5 M``: three digits and a letter, thousands written out below 10,000."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            unit = 1e3 if letter == "k" else size
            value = number / unit
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {letter}"
    return f"{number:,.0f}"


def short_bytes(number: float) -> str:
    """``1.1 MB``, in powers of ten as file managers show them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{number:.0f} B"
