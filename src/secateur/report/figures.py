"""The plots of a report, each an ``<svg>`` element for the page to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.report.answers import engine_name, ms_text
from secateur.report.canvas import DENSE, DISTINCT, FAINT, INK, KEPT, as_svg, canvas, plain_, stage_colours, stage_text
from secateur.report.content import Curve, LayerRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def engines_figure(networks: Mapping[str, Mapping[str, float]], *, name: str = "engines", narrow: bool = False) -> str:
    """Milliseconds of the networks in every engine, ``{network: {engine: ms}}``: a bar each, those of an engine
    together, with how many times as fast as the first network each is."""
    engines = list(dict.fromkeys(engine for timed in networks.values() for engine in timed))
    colours = _network_colours(list(networks))
    bar = 0.17
    step = bar * (len(networks) + 1)
    figure, axes = canvas(1.55 if narrow else 6.3, step * len(engines))
    longest = max(ms for timed in networks.values() for ms in timed.values())
    fastest = {network: min(timed.values()) for network, timed in networks.items() if timed}
    first = next(iter(networks))
    for place, engine in enumerate(engines):
        for number, (network, timed) in enumerate(networks.items()):
            if engine not in timed:
                continue
            ms, height = timed[engine], place + (number + 1) / (len(networks) + 1) - 0.5
            axes.barh(height, ms, color=colours[network], height=0.86 / (len(networks) + 1))
            text = ms_text(ms)
            if network != first and engine in networks[first]:
                text += f"  ({networks[first][engine] / ms:.2f} ×)"
            weight = "bold" if ms == fastest[network] else "normal"
            axes.text(ms + 0.015 * longest, height, text, va="center", color=INK, fontsize=8, fontweight=weight)
    labels = [_wrapped(engine_name(engine)) if narrow else engine_name(engine) for engine in engines]
    axes.set_yticks(range(len(engines)), labels)
    axes.set_ylim(len(engines) - 0.5, -0.5)
    axes.set_xlim(0, longest)
    axes.set_xlabel("ms")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(_ticks(3 if narrow else 6))
    _legend_above_(axes, colours, narrow=narrow)
    told = "; ".join(
        f"{network} in {engine_name(engine)}: {ms_text(ms)} ms"
        for engine in engines
        for network, timed in networks.items()
        for ms in [timed.get(engine)]
        if ms is not None
    )
    return as_svg(figure, name, "Latency of the networks in every engine", told=f"{told}.")


def _network_colours(networks: Sequence[str]) -> dict[str, str]:
    """Of two the first is dense and the second is what is kept; of more each has a colour of its own."""
    if len(networks) <= 2:
        return dict(zip(networks, (DENSE, KEPT), strict=False))
    return {network: (DENSE, *DISTINCT)[place % (len(DISTINCT) + 1)] for place, network in enumerate(networks)}


def _ticks(most: int = 9, *, integer: bool = False, min_n_ticks: int = 2) -> Any:
    """At most so many round numbers along an axis."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer, min_n_ticks=min_n_ticks)


def _wrapped(text: str) -> str:
    """In two lines, at the last comma or blank."""
    head, comma, tail = text.rpartition(", ")
    return f"{head},\n{tail}" if comma else "\n".join(text.rsplit(" ", 1))


def _legend_above_(axes: Axes, colours: Mapping[str, str], *, narrow: bool = False) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=1 if narrow and len(colours) > 2 else 4,
        fontsize=8,
        labelcolor=INK,
        borderpad=0,
    )


def widths_figure(layers: Sequence[LayerRow], *, name: str = "widths", narrow: bool = False) -> str:
    """Output channels of every layer in the network's order: the dense width behind, what is kept in front. Narrow: the
    layers go down the page."""
    places = np.arange(len(layers))
    before = [row.channels[0] for row in layers]
    after = [row.channels[1] for row in layers]
    long = 0.19 * len(layers)
    figure, axes = canvas(1.75, max(1.0, long)) if narrow else canvas(max(9.0, long), 2.5)
    tips = {}
    for place, row in enumerate(layers):
        tips[f"layer{place}"] = f"{row.name}, {stage_text(row.map_size)}: {row.channels[1]} of {row.channels[0]}"
    draw = axes.barh if narrow else axes.bar
    for label, values, colour in (("dense", before, DENSE), ("kept", after, KEPT)):
        for place, bar in enumerate(draw(places, values, 0.78, color=colour, label=label)):
            if label == "dense":
                bar.set_gid(f"layer{place}")
    names = [row.name for row in layers]
    if narrow:
        axes.set_yticks(places, names, fontsize=7)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.xaxis.set_major_locator(_ticks(3, integer=True))
    else:
        axes.set_xticks(places, names, rotation=90, fontsize=8)
        axes.set_xlim(-0.7, len(layers) - 0.3)
    (axes.set_xlabel if narrow else axes.set_ylabel)("output channels")
    axes.grid(axis="x" if narrow else "y", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="y" if narrow else "x", length=0)
    _legend_above_(axes, {"dense": DENSE, "kept": KEPT})
    told = "; ".join(f"{row.name} {row.channels[1]} of {row.channels[0]}" for row in layers)
    return as_svg(figure, name, "Channels of each layer, dense and kept", tips, told=f"{told}.")


def norms_figure(
    norms: Mapping[str, np.ndarray],
    stages: Mapping[str, str],
    *,
    label: str = "L1 norm",
    noun: str = "layer",
    name: str = "norms",
    narrow: bool = False,
) -> str:
    """A curve for each layer: its filters' norms from the largest, over the largest (Li et al. 2017, figure 2a).

    ``stages``: the size of each layer's maps, which gives the curve its colour. ``label`` and ``noun``: what is
    drawn, and of what; ``name`` sets the plot apart from others of the page. ``narrow``: for a small screen.
    """
    figure, axes = canvas(2.45, 2.4) if narrow else canvas(6.9, 3.2)
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
    stage_legend_(axes, [stages.get(owner, "1") for owner in norms], noun, narrow=narrow)
    return as_svg(
        figure,
        name,
        f"Sorted normalised filter norms of each {noun}, coloured by the size of its maps",
        tips,
        told=_steepness(norms, noun),
    )


def _steepness(norms: Mapping[str, np.ndarray], noun: str) -> str:
    """Where the middle of each curve lies, in words: a small one is a steep curve, with filters to spare."""
    middles = "; ".join(f"{owner} {float(np.median(values)):.2f}" for owner, values in norms.items())
    return f"The median over the largest of the {noun}: {middles}."


def stage_legend_(
    axes: Axes, stages: Sequence[str], noun: str, worst: Mapping[str, str] | None = None, *, narrow: bool = False
) -> None:
    """A line of legend for each size of maps, right of the axes or, narrow, below them: how many layers have it, and
    its most sensitive one.

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
        loc="upper left" if narrow else "center left",
        bbox_to_anchor=(0, -0.2) if narrow else (1.01, 0.5),
        fontsize=8,
        labelcolor=INK,
        labelspacing=0.5 if narrow else 1.0,
        borderaxespad=0.5,
    )


def curves_figure(curves: Sequence[Curve], *, name: str = "curves", narrow: bool = False) -> str:
    """Loss and validation accuracy over the epochs of every training: side by side, or one above the other."""
    figure, left = canvas(2.45, 2.0) if narrow else canvas(4.1, 2.9)
    right = figure.add_axes((0, -1.35, 1, 1) if narrow else (1.2, 0, 1, 1))
    plain_(right)
    for curve, shade in zip(curves, _shades(len(curves)), strict=True):
        epochs = np.arange(1, len(curve.loss) + 1)
        marks: dict[str, Any] = {"color": shade, "linewidth": 1.5, "marker": "o", "markersize": 3}
        left.plot(epochs, curve.loss, label=curve.name, **marks)
        taken = [(epoch, 100 * a) for epoch, a in zip(epochs, curve.accuracy, strict=True) if a is not None]
        right.plot([epoch for epoch, _ in taken], [a for _, a in taken], **marks)
    longest = max((len(curve.loss) for curve in curves), default=1)
    for axes, label in ((left, "training loss"), (right, "validation accuracy, %")):
        axes.set_xlim(0.5, longest + 0.5)
        axes.xaxis.set_major_locator(_ticks(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(color=FAINT, linewidth=0.7)
    columns = 2 if narrow else 4
    left.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8, labelcolor=INK, borderpad=0
    )
    told = " ".join(_course(curve) for curve in curves)
    return as_svg(figure, name, "Loss and accuracy of each training, epoch by epoch", told=told)


def _shades(number: int) -> list[Any]:
    """So many colours: distinct ones, or, where there are too many, one after the other as the trainings follow."""
    if number <= len(DISTINCT):
        return list(DISTINCT[:number])
    from matplotlib import colormaps

    return [tuple(shade) for shade in colormaps["viridis"](np.linspace(0.3, 0.9, number))]


def _course(curve: Curve) -> str:
    """A training in words."""
    text = f"{curve.name}, {len(curve.loss)} epoch{'s' * (len(curve.loss) != 1)}"
    if curve.loss:
        text += f": loss from {curve.loss[0]:.3g} to {curve.loss[-1]:.3g}"
    taken = [score for score in curve.accuracy if score is not None]
    if taken:
        text += f", validation accuracy from {100 * taken[0]:.1f} to {100 * taken[-1]:.1f} %"
    return f"{text}."
