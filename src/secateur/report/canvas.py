"""What every plot is drawn on: an ``<svg>`` element in the page's own colours, or a file that stands alone.

Colours are names of the page's own (``var(--kept)``, ``currentColor``), so that a plot follows the reader's light or
dark theme, and text stays text. Matplotlib knows no such colours: it draws in stand-ins that are replaced afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from math import prod
from typing import TYPE_CHECKING, Any

from secateur.errors import MissingExtra

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
LIGHT = {
    "currentColor": "#1d2521",
    "var(--line)": "#dfe3dc",
    "var(--dense)": "#c5cdc4",
    "var(--kept)": "#2f7d55",
    "var(--accent)": "#b4552d",
}
"""The colours of the page's light theme, for what stands alone."""
PAPER = "#ffffff"
MARGIN = 12
"""Around what stands alone, in points."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
DISTINCT = ("#2f7fc1", "#d55e00", "#1a9e77", "#c26bb0", "#b8860b", "#4db6d6")
"""Colours that differ for the colour-blind too (after Okabe and Ito), legible on light and on dark."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes measure ``width`` by ``height`` inches (96 pixels each), without background or box."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a report needs matplotlib\n  do: pip install 'secateur[report]'") from error
    figure = Figure(figsize=(width, height), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    plain_(axes)
    return figure, axes


def plain_(axes: Axes) -> None:
    """Axes without a box, in the page's colours."""
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def as_svg(figure: Figure, name: str, title: str, tips: Mapping[str, str] | None = None, *, told: str = "") -> str:
    """The figure as one element. ``name`` sets its ids apart from other plots' on the page, ``title`` is its text
    alternative and ``told`` the same at length, and ``tips`` what is said where the pointer rests: ``{gid of an artist:
    text}``."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for label in figure.findobj(Text):  # a name with two dollar signs in it is a name, and no formula
        label.set_parse_math(False)
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
    for gid, tip in (tips or {}).items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(tip)}</title>')
    # ids are unique to a page, not to a plot; references follow them
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    style = f' style="width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    labels, alternative = f"{name}-title", f'<title id="{name}-title">{escape(title)}</title>'
    if told:
        labels, alternative = f"{labels} {name}-desc", f'{alternative}<desc id="{name}-desc">{escape(told)}</desc>'
    found = re.search(r"<svg ([^>]*?)>", text, flags=re.DOTALL)
    assert found is not None
    opening = f'<svg role="img" aria-labelledby="{labels}"{style} {found[1]}>{alternative}'
    return opening + text[found.end() :]


def standalone(svg: str) -> str:
    """An element of ``as_svg`` as the text of a file of its own, dark on light."""
    for name, colour in LIGHT.items():
        svg = svg.replace(name, colour)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' style="[^"]*"', "", opening, count=1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    assert size is not None
    width, height = (float(length) + 2 * MARGIN for length in size.groups())
    box = f'viewBox="{-MARGIN} {-MARGIN} {width:.2f} {height:.2f}"'
    opening = re.sub(r'viewBox="[^"]*"', box, opening)
    opening = re.sub(
        r' (width|height)="[\d.]+pt"', lambda m: f' {m[1]}="{width if m[1] == "width" else height:.2f}pt"', opening
    )
    ground = f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{width:.2f}" height="{height:.2f}" fill="{PAPER}"/>'
    alternative = re.match(r"<title .*?</title>(?:<desc .*?</desc>)?", rest, flags=re.DOTALL)
    end = alternative.end() if alternative else 0
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}>{rest[:end]}\n{ground}{rest[end:]}'


def stage_colours(stages: Sequence[str]) -> dict[str, str]:
    """A colour for every feature-map size (``"32x32"``; ``"1"`` has no map), the largest first."""
    sizes = sorted(dict.fromkeys(stages), key=lambda stage: (stage == "1", -_area(stage)))
    if len(sizes) <= len(DISTINCT):
        return dict(zip(sizes, DISTINCT, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return {size: to_hex(colormaps["turbo"](0.08 + 0.84 * i / (len(sizes) - 1))) for i, size in enumerate(sizes)}


def stage_text(stage: str) -> str:
    """``32x32`` as ``32 × 32``."""
    return "no map" if stage == "1" else stage.replace("x", " × ")


def _area(stage: str) -> int:
    parts = stage.split("x")
    return prod(map(int, parts)) if all(part.isdigit() for part in parts) else 0
