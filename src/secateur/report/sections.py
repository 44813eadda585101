"""What a report says about one run after the answer, in its order: sections of text, a picture, and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from secateur.report.answers import speed_text
from secateur.report.content import Report, engines_of
from secateur.report.figures import curves_figure, engines_figure, norms_figure, widths_figure
from secateur.report.filters import filters_list
from secateur.report.fronts import STRETCHED, front_figure, has_front, is_stretched
from secateur.report.sensitivities import as_percent, importance_figure, score_text, sensitivity_figure
from secateur.report.turnovers import summary, tallies, turnover_figure
from secateur.sensitivities import GroupCurve, Sensitivity


@dataclass(frozen=True)
class Section:
    """``key`` is its place on the page, ``short`` what it is called where there is little room. ``wide`` and
    ``narrow``: a picture for either kind of screen; the wide one for both, if there is one only. ``table``: which of
    the page's tables follows."""

    key: str
    short: str
    heading: str
    text: str = ""
    wide: str = ""
    narrow: str = ""
    table: str = ""


Draw = Callable[..., str]
"""Draws a picture; told its ``name`` and whether it is to be ``narrow``."""


def sections(report: Report, prefix: str = "") -> Iterator[Section]:
    """All that the report has something for. ``prefix`` sets the ids of one run apart from those of others."""
    yield from _networks(report, prefix)
    yield from _what_went(report, prefix)
    yield from _why(report, prefix)
    yield from _trainings(report, prefix)
    if report.environment:
        text = report.timing and f"Latencies: {report.timing}"
        yield Section(f"{prefix}environment", "Environment", "Where it was measured", text, table="environment")


def both(draw: Draw, name: str) -> tuple[str, str]:
    """The picture for a wide and for a narrow screen."""
    return draw(name=name, narrow=False), draw(name=f"{name}-narrow", narrow=True)


def _networks(report: Report, prefix: str) -> Iterator[Section]:
    dense, final = report.dense, report.outcome
    text = "Of one example. A multiply-accumulate counts as one MAC; papers often call it a FLOP."
    yield Section(f"{prefix}networks", "Networks", "Networks", text, table="networks")
    runs, finals = {"": report.rows}, {"": final.name}
    if has_front(runs):
        text = (
            "Up and to the left is better. The line joins the networks that no other one beats in both; "
            f"{dense.name} is the square, {final.name} the large point."
        )
        text += STRETCHED * is_stretched(runs)
        wide, narrow = both(lambda **how: front_figure(runs, finals, **how), f"{prefix}front")
        yield Section(f"{prefix}trade-off", "Trade-off", "Accuracy against cost", text, wide, narrow)
    timed = {row.name: row.latencies_ms for row in (dense, final) if row.latencies_ms}
    if len(timed) > 1:
        text = speed_text(report.rows, final)
        wide, narrow = both(lambda **how: engines_figure(timed, **how), f"{prefix}engines")
        table = "engines" if len(engines_of(report.rows)) > 1 else ""
        yield Section(f"{prefix}speed", "Speed", "Speed in every engine", text, wide, narrow, table)


def _what_went(report: Report, prefix: str) -> Iterator[Section]:
    if report.layers:
        text = "Output channels in the network's order, before and after; then what each layer costs."
        wide, narrow = both(lambda **how: widths_figure(report.layers, **how), f"{prefix}widths")
        yield Section(f"{prefix}layers", "Layers", "Width of every layer", text, wide, narrow, "layers")
    if report.whole:
        text = (
            "What is locked cannot get narrower without changing what the network computes or returns; "
            "the rest could, and was left as it is."
        )
        yield Section(f"{prefix}whole", "Locked", "What stayed whole, and why", text, table="whole")
    if report.facts:
        yield Section(f"{prefix}how", "How", "How it was pruned", table="facts")
    if report.law:
        text = "The pruned network must compute what the dense one computes when its removed channels are never read."
        yield Section(f"{prefix}check", "Check", "The check", text, table="law")


def _why(report: Report, prefix: str) -> Iterator[Section]:
    """What the choice of channels rests on."""
    found = report.sensitivity
    if found is not None:
        text = (
            "Each group pruned alone, at every ratio, and how well the network does then on images held out for "
            "choosing (Li et al. 2017, figure 2b). What falls early is sensitive, and wants a small ratio or none."
        )
        wide, narrow = both(lambda **how: sensitivity_figure(found, **how), f"{prefix}sensitivity")
        yield Section(f"{prefix}sensitive", "Sensitivity", "Sensitivity", text, wide, narrow, "heat")
    if report.norms:
        text = (
            "Each layer's L1 norms from the largest, over the largest, in the dense network. A steep curve has many "
            "filters to spare, a flat one few (Li et al. 2017, figure 2a)."
        )
        stages = {row.name: row.map_size for row in report.layers}
        wide, narrow = both(lambda **how: norms_figure(report.norms, stages, **how), f"{prefix}norms")
        yield Section(f"{prefix}filter-norms", "Norms", "Norms of the filters", text, wide, narrow)
    if found is not None and not (found.criterion == "l1" and report.norms):
        text = f"Each group's scores under the criterion {found.criterion}, from the largest, over the largest."
        wide, narrow = both(lambda **how: importance_figure(found, **how), f"{prefix}importance")
        yield Section(f"{prefix}scores", "Scores", "Scores of the groups", text, wide, narrow)
    if report.filters is not None:
        layer = report.filters.layer or "the only layer"
        text = (
            f"Those of {layer} in the dense network from the largest L1 norm to the smallest, which stands below each. "
            "All share one scale, middle grey is 0 (Li et al. 2017, figure 5)."
        )
        images = filters_list(report.filters)
        yield Section(f"{prefix}filters", "Filters", "Filters of the first layer", text, images)


def _trainings(report: Report, prefix: str) -> Iterator[Section]:
    if report.curves:
        text = (
            "Every training of the run: the loss it was trained on, and the accuracy on images held out for choosing."
        )
        wide, narrow = both(lambda **how: curves_figure(report.curves, **how), f"{prefix}curves")
        yield Section(f"{prefix}training", "Training", "Training", text, wide, narrow)
    zeroed = report.zeroed
    if zeroed is not None and len(zeroed.history) > 1 and tallies(zeroed):
        heading = "Zeroed filters from choice to choice"
        drawn = turnover_figure(zeroed, name=f"{prefix}turnover")
        yield Section(f"{prefix}zeroed", "Zeroed filters", heading, summary(zeroed), drawn)
    if zeroed is not None and tallies(zeroed):
        text = (
            "How many filters were zero after the first choice and in the end, and which came in or left in between, "
            "by their places in the layer."
        )
        heading = "Zeroed filters, group by group"
        yield Section(f"{prefix}tallies", "By group", heading, text, table="tallies")


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
