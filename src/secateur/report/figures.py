"""The plots of a report, each an ``<svg>`` element for the page to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.report.canvas import DENSE, FAINT, INK, KEPT, as_svg, canvas, plain_, stage_colours, stage_text
from secateur.report.content import Curve, LayerRow, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy_figure(rows: Sequence[Row]) -> str:
    """A bar for each network that has an accuracy, its value written beside it."""
    shown = [row for row in rows if row.accuracy is not None]
    figure, axes = canvas(7.3, 0.1 + 0.42 * len(shown))
    values = [100 * (row.accuracy or 0.0) for row in shown]
    colours = [DENSE, *[KEPT] * (len(shown) - 1)]
    axes.barh(range(len(shown)), values, color=colours[: len(shown)], height=0.62)
    for place, value in enumerate(values):
        axes.text(value + 1, place, f"{value:.2f} %", va="center", color=INK)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 113)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("test accuracy, %")
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="y", length=0)
    return as_svg(figure, "accuracy", "Accuracy of each network")


def widths_figure(layers: Sequence[LayerRow]) -> str:
    """Output channels of every layer in the network's order: the dense width behind, what is kept in front."""
    figure, axes = canvas(max(8.3, 0.19 * len(layers)), 2.6)
    places = np.arange(len(layers))
    before = [row.channels[0] for row in layers]
    after = [row.channels[1] for row in layers]
    axes.bar(places, before, color=DENSE, width=0.78, label="dense")
    axes.bar(places, after, color=KEPT, width=0.78, label="kept")
    axes.set_xticks(places, [row.name for row in layers], rotation=90, fontsize=8)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylabel("output channels")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="x", length=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, labelcolor=INK, borderpad=0)
    return as_svg(figure, "widths", "Channels of each layer, dense and kept")


def norms_figure(
    norms: Mapping[str, np.ndarray],
    stages: Mapping[str, str],
    *,
    label: str = "L1 norm",
    noun: str = "layer",
    name: str = "norms",
) -> str:
    """A curve for each layer: its filters' norms from the largest, over the largest (Li et al. 2017, figure 2a).

    ``stages``: the size of each layer's maps, which gives the curve its colour. ``label`` and ``noun``: what is
    drawn, and of what; ``name`` sets the plot apart from others of the page.
    """
    figure, axes = canvas(6.9, 3.2)
    colours = stage_colours([stages.get(owner, "1") for owner in norms])
    tips = {}
    for place, (owner, values) in enumerate(norms.items()):
        stage = stages.get(owner, "1")
        along = np.linspace(0, 100, len(values)) if len(values) > 1 else np.array([0.0])
        tips[f"line{place}"] = f"{owner}, {stage_text(stage)}"
        axes.plot(along, values, color=colours[stage], linewidth=1.4, alpha=0.85, gid=f"line{place}")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"filters of the {noun}, from the largest, %")
    axes.set_ylabel(f"{label} / largest of the {noun}")
    axes.grid(color=FAINT, linewidth=0.7)
    stage_legend_(axes, [stages.get(owner, "1") for owner in norms], noun)
    return as_svg(
        figure, name, f"Sorted normalised filter norms of each {noun}, coloured by the size of its maps", tips
    )


def stage_legend_(axes: Axes, stages: Sequence[str], noun: str, worst: Mapping[str, str] | None = None) -> None:
    """A line of legend for each size of maps, right of the axes: how many layers have it, and its most sensitive one.

    ``worst``: ``{size: name}``, if that is known.
    """
    from matplotlib.lines import Line2D

    handles = []
    for stage, colour in stage_colours(stages).items():
        count = sum(each == stage for each in stages)
        text = f"{stage_text(stage)}: {count} {noun}{'s' * (count != 1)}"
        if worst:
            text += f"\nmost sensitive: {worst[stage]}"
        handles.append(Line2D([], [], color=colour, linewidth=2, label=text))
    axes.legend(
        handles=handles,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=8,
        labelcolor=INK,
        labelspacing=1.0,
    )


def curves_figure(curves: Sequence[Curve]) -> str:
    """Loss and validation accuracy over the epochs of every training, side by side in one picture."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure, left = canvas(3.4, 2.7)
    right = figure.add_axes((1.24, 0, 1, 1))
    plain_(right)
    shades = colormaps["viridis"](np.linspace(0.25, 0.88, max(len(curves), 2)))
    for curve, shade in zip(curves, shades, strict=False):
        epochs = np.arange(1, len(curve.loss) + 1)
        marks: dict[str, Any] = {"color": tuple(shade), "linewidth": 1.5, "marker": "o", "markersize": 3}
        left.plot(epochs, curve.loss, label=curve.name, **marks)
        taken = [(epoch, 100 * a) for epoch, a in zip(epochs, curve.accuracy, strict=True) if a is not None]
        right.plot([epoch for epoch, _ in taken], [a for _, a in taken], **marks)
    longest = max((len(curve.loss) for curve in curves), default=1)
    for axes, label in ((left, "training loss"), (right, "validation accuracy, %")):
        axes.set_xlim(0.5, longest + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(color=FAINT, linewidth=0.7)
    left.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, labelcolor=INK, borderpad=0
    )
    return as_svg(figure, "curves", "Loss and accuracy of each training, epoch by epoch")
