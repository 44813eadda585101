"""The plots of a report, each an ``<svg>`` element for the page to hold.

Colours are names of the page's own (``var(--kept)``, ``currentColor``), so that a plot follows the reader's light or
dark theme, and text stays text. Matplotlib knows no such colours: it draws in stand-ins that are replaced afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.errors import MissingExtra
from secateur.report.content import Curve, LayerRow, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, DENSE, KEPT, ACCENT = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
PAGE_COLOURS = {
    INK: "currentColor",
    FAINT: "var(--line)",
    DENSE: "var(--dense)",
    KEPT: "var(--kept)",
    ACCENT: "var(--accent)",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def accuracy_figure(rows: Sequence[Row]) -> str:
    """A bar for each network that has an accuracy, its value written beside it."""
    shown = [row for row in rows if row.accuracy is not None]
    figure, axes = _canvas(7.3, 0.1 + 0.42 * len(shown))
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
    return _svg(figure, "accuracy", "Accuracy of each network")


def widths_figure(layers: Sequence[LayerRow]) -> str:
    """Output channels of every layer in the network's order: the dense width behind, what is kept in front."""
    figure, axes = _canvas(max(8.3, 0.19 * len(layers)), 2.6)
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
    return _svg(figure, "widths", "Channels of each layer, dense and kept")


def norms_figure(norms: Mapping[str, np.ndarray]) -> str:
    """A curve for each layer: its filters' norms from the largest, over the largest (Li et al. 2017, figure 2a).

    The colour is the layer's depth: the first layers are blue, the last ones light green.
    """
    from matplotlib import colormaps

    figure, axes = _canvas(6.9, 3.2)
    shades = colormaps["viridis"](np.linspace(0.25, 0.88, max(len(norms), 2)))
    for (name, values), shade in zip(norms.items(), shades, strict=False):
        along = np.linspace(0, 100, len(values)) if len(values) > 1 else np.array([0.0])
        axes.plot(along, values, color=tuple(shade), linewidth=1.4, label=name)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("filters of the layer, from the largest, %")
    axes.set_ylabel("L1 norm / largest of the layer")
    axes.grid(color=FAINT, linewidth=0.7)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 12:
        chosen = sorted({round(i) for i in np.linspace(0, len(labels) - 1, 10)})
        handles, labels = [handles[i] for i in chosen], [labels[i] for i in chosen]
    axes.legend(
        handles, labels, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, labelcolor=INK
    )
    return _svg(figure, "norms", "Sorted normalised filter norms of each layer")


def curves_figure(curves: Sequence[Curve]) -> str:
    """Loss and validation accuracy over the epochs of every training, side by side in one picture."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure, left = _canvas(3.4, 2.7)
    right = figure.add_axes((1.24, 0, 1, 1))
    _plain(right)
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
    return _svg(figure, "curves", "Loss and accuracy of each training, epoch by epoch")


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes measure ``width`` by ``height`` inches (96 pixels each), without background or box."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a report needs matplotlib\n  do: pip install 'secateur[report]'") from error
    figure = Figure(figsize=(width, height), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _svg(figure: Figure, name: str, title: str) -> str:
    from matplotlib import rc_context

    out = io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    with rc_context(settings):
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04)
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", rf"\1{FONT}", text)
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    # ids are unique to a page, not to a plot; references follow them
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    style = f' style="width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    opening = rf'<svg role="img" aria-label="{title}"{style} \1>'
    return re.sub(r"<svg ([^>]*?)>", opening, text, count=1, flags=re.DOTALL)
