"""The plots of ``fpgm.py``: agreement of the choices and norms, layer by layer, and accuracies; each says in words,
for those who do not see it, what it shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fpgm_layers import CENTRED, QUANTILES, RATIO
from fpgm_page import MEASURED, NETWORKS, RATIOS, TITLES, agreement, column, figures, measured, panels
from secateur.report.canvas import ACCENT, DISTINCT, FAINT, INK, KEPT, as_svg, canvas, plain_, standalone
from trials import Cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW, HIGH = 3.3, 0.75, 1.5
"""Sizes of panels in inches."""
AGREED = {
    "geometric_median": DISTINCT[2],
    CENTRED: DISTINCT[5],
    "l2": DISTINCT[0],
    "whc": DISTINCT[3],
    "l1": DISTINCT[1],
}
SHOWN = {"random": "#9aa29c", "l1": DISTINCT[1], "l2": DISTINCT[0], "whc": DISTINCT[3], "fpgm": DISTINCT[4]}
SHOWN["geometric_median"] = DISTINCT[2]
"""What is drawn, and its colour, which is a criterion's own in all plots."""
BANDS = ((0.0, 1.0, 0.15), (0.1, 0.9, 0.25), (0.25, 0.75, 0.35))
"""From quantile, to quantile, opacity."""
STAGGER = 0.11
"""Between the criteria of one way, of the distance between two ways."""


def plots(found: Cells) -> dict[str, str]:
    """``{name of the file: its text}`` of all that there are cells for."""
    drawn: dict[str, str] = {}
    if any(panels(found)):
        drawn["fpgm_overlap"] = _by_layer(
            found, "overlap", _agreement_, "shared with fpgm, %", _agreement_in_words(found)
        )
        drawn["fpgm_norms"] = _by_layer(found, "norms", _norms_, "norm / largest", _norms_in_words(found))
    if any(measured(found, network) for network in NETWORKS):
        drawn["fpgm_accuracy"] = _accuracies(found)
    return drawn


# ------------------------------------------------------------------------------------------------------- the layers


Panel = Callable[["Axes", Cells, str, list[str]], None]


def _by_layer(found: Cells, name: str, draw_: Panel, label: str, words: str) -> str:
    """A panel for each trained network and kind of layer, two side by side."""
    figure, first = canvas(WIDE, HIGH)
    for number, (network, told, layers) in enumerate(_trained(found)):
        across, down = number % 2, number // 2
        axes = figure.add_axes((1.16 * across, -1.6 * down, 1, 1)) if number else first
        plain_(axes)
        draw_(axes, found, network, layers)
        axes.set_title(told, fontsize=9, color=INK, loc="left")
        axes.set_xlim(0.5, len(layers) + 0.5)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        if not across:
            axes.set_ylabel(label)
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)
    first.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1.12), ncols=6)
    return standalone(as_svg(figure, f"fpgm-{name}", words)) + "\n"


def _trained(found: Cells) -> Iterator[tuple[str, str, list[str]]]:
    return (panel for panel in panels(found) if "untrained" not in panel[0])


def _agreement_(axes: Axes, found: Cells, network: str, layers: list[str]) -> None:
    places = range(1, len(layers) + 1)
    for other, colour in AGREED.items():
        shares = agreement(found, network, "fpgm", other)
        if all(layer in shares for layer in layers):
            drawn = [100 * shares[layer] for layer in layers]
            axes.plot(places, drawn, color=colour, label=other, linewidth=1.4, marker="o", markersize=2.5)
    axes.axhline(100 * RATIO, color=INK, linewidth=0.8, linestyle=":", label="by chance")
    axes.set_ylim(30, 103)


def _agreement_in_words(found: Cells) -> str:
    each = []
    for network, told, layers in _trained(found):
        shares = {other: agreement(found, network, "fpgm", other) for other in AGREED}
        means = [
            f"{other} {statistics.fmean(own[layer] for layer in layers):.0%}" for other, own in shares.items() if own
        ]
        each.append(f"{told}: {', '.join(means)}")
    return f"Share of the filters removed by FPGM that others remove too, layer by layer. Means: {'; '.join(each)}."


def _norms_(axes: Axes, found: Cells, network: str, layers: list[str]) -> None:
    places = range(1, len(layers) + 1)
    lines = {q: [figures(found, network, f"q{100 * q:.0f}")[layer] for layer in layers] for q in QUANTILES}
    for low, high, opacity in BANDS:
        told = "all" if low == 0 else f"the middle {high - low:.0%}"
        axes.fill_between(places, lines[low], lines[high], color=KEPT, alpha=opacity, linewidth=0, label=told)
    axes.plot(places, lines[0.5], color=INK, linewidth=1.2, label="median")
    axes.plot(places, lines[0.0], color=ACCENT, linewidth=1.2, label="smallest")
    axes.set_ylim(0, 1.02)


def _norms_in_words(found: Cells) -> str:
    each = []
    for network, told, layers in _trained(found):
        least = [figures(found, network, "smallest")[layer] for layer in layers]
        each.append(f"{told}: the smallest norm is {min(least):.2f} to {max(least):.2f} of the largest")
    return f"Distribution of the filters' L2 norms over the largest of their layer. {'; '.join(each)}."


# ----------------------------------------------------------------------------------------------------- the training


def _accuracies(found: Cells) -> str:
    """A row for each network, for each ratio a narrow panel of what nothing is trained for and a wide one of the ways
    that train; the criteria side by side."""
    figure, first = canvas(NARROW, HIGH)
    networks = [network for network in NETWORKS if measured(found, network)]
    words = []
    for down, network in enumerate(networks):
        ways = [way for way in measured(found, network) if len(MEASURED[network].get(way, ())) > 1]
        for across, ratio in enumerate(RATIOS):
            for untrained in (True, False):
                shown = [way for way in ways if (way == "one-shot") == untrained]
                if not shown:
                    continue
                place = (5.1 * across + 1.4 * (not untrained), -1.6 * down, 1 if untrained else 3.2, 1)
                axes = figure.add_axes(place) if any(place[:2]) else first
                plain_(axes)
                words += _points_(axes, found, network, ratio, shown)
                axes.set_xticks(range(len(shown)), [way.replace(", ", ",\n") for way in shown])
                axes.set_xlim(-0.5, len(shown) - 0.5)
                axes.grid(axis="y", color=FAINT, linewidth=0.7)
                if untrained:
                    told = f"{TITLES[network].split(',')[0]}, {100 * ratio:.0f} %"
                    axes.set_title(told, fontsize=9, color=INK, loc="left")
                if untrained and not across:
                    axes.set_ylabel("test accuracy, %")
    first.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1.12), ncols=6)
    told = f"Test accuracy with batch norms recalibrated, by way and criterion. {'; '.join(words)}."
    return standalone(as_svg(figure, "fpgm-accuracy", told)) + "\n"


def _points_(axes: Axes, found: Cells, network: str, ratio: float, ways: list[str]) -> list[str]:
    words = []
    for number, (row, colour) in enumerate(SHOWN.items()):
        each = [[*found.values(column(network, ratio, way), row, "recalibrated").values()] for way in ways]
        there = [i for i, values in enumerate(each) if values]
        if not there:
            continue
        middle = [100 * statistics.fmean(each[i]) for i in there]
        spans = [100 * statistics.stdev(each[i]) if len(each[i]) > 1 else 0.0 for i in there]
        places = [i + STAGGER * (number - (len(SHOWN) - 1) / 2) for i in there]
        axes.errorbar(
            places, middle, spans, label=row, color=colour, fmt="o", markersize=3.5, capsize=2, elinewidth=0.8
        )
        told = ", ".join(f"{ways[i]} {value:.0f}" for i, value in zip(there, middle, strict=True))
        words.append(f"{network} {ratio:.0%} {row}: {told}")
    return words
