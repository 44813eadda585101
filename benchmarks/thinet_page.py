"""The page of ``thinet.py``: tables and plot of the cells that are on file."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import common
from next_layer import WAYS
from secateur.report.canvas import DISTINCT, FAINT, INK, as_svg, canvas, plain_, standalone
from trials import Cells, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIOS = (0.3, 0.5, 0.7)
PLAIN = ("random", "l1", "fpgm")
THINET = ("thinet", "thinet_omp", "thinet_sampled")
SEQUENTIAL = "thinet_sequential"
"""Chooses group after group on what the groups before it give: of one group alone it says what ``thinet`` does."""
ROWS = (*PLAIN, *THINET, SEQUENTIAL)
REFIT = "refit, greedy"
"""No criterion of secateur's: the objective where readers are fitted anew (``next_layer.refit_order``)."""
TITLES = {
    "resnet20": "ResNet-20, Fashion-MNIST",
    "vgg16": "VGG-16 at a quarter of its widths, Fashion-MNIST",
    "lite0": "EfficientNet-Lite0, photographs",
}
PARTS = {"inner": "groups that are added to nothing", "streams": "residual streams"}
AFTER = {"": "batch norms as they were", ", recalibrated": "batch norms recalibrated"}
SHOWN = {"random": "#9aa29c", "l1": DISTINCT[4], "fpgm": DISTINCT[2], "thinet": DISTINCT[0], "thinet_omp": DISTINCT[1]}
"""What is drawn, and its colour: enough to see the rest by."""


def table(found: Cells) -> str:
    text = (
        "Mean ± standard deviation over the seeds, in %. A seed is another dense network and other random choices on\n"
        "Fashion-MNIST, and another split of the photographs for EfficientNet-Lite0.\n"
        f"`{REFIT}` is no criterion but a reference: it removes, channel by channel, what least squares of the\n"
        "readers can best replace (moments of whole patches). It takes no part in what is counted.\n"
    )
    for network, title in TITLES.items():
        own = [f"{network} {ratio} {what}" for ratio in RATIOS for what in (*WAYS, "whole")]
        if found.names(own):
            text += f"\n## {title}\n{_next_layer_table(found, network)}{_whole_table(found, network)}"
    return text + _lost(found)


def group_errors(
    found: Cells, network: str, ratio: float, way: str, row: str, part: str
) -> dict[tuple[str, str], float]:
    """``{(seed, group): error}``."""
    cells = found.found["cells"]
    return {
        (seed, name): value
        for seed in sorted(cells)
        for name, value in cells[seed].get(f"{network} {ratio} {way}", {}).get(row, {}).items()
        if name.startswith(f"{part}:")
    }


def means(found: Cells, network: str, ratio: float, way: str, row: str, part: str) -> list[float]:
    """For every seed the mean over the groups."""
    each: dict[str, list[float]] = {}
    for (seed, _), value in group_errors(found, network, ratio, way, row, part).items():
        each.setdefault(seed, []).append(value)
    return [statistics.fmean(values) for values in each.values()]


def _next_layer_table(found: Cells, network: str) -> str:
    text = ""
    for part, told in PARTS.items():
        shown = [row for row in (*ROWS, REFIT) if means(found, network, RATIOS[0], "least-squares", row, part)]
        rows = [row for row in shown if row != REFIT]
        if not rows:
            continue
        text += f"\nError of the next layer's output, {told}, each pruned alone:\n\n"
        lines = [
            [row, *[spread(means(found, network, ratio, way, row, part)) for way in WAYS for ratio in RATIOS]]
            for row in shown
        ]
        text += common.markdown(["", *_heads()], lines)
        count = len(group_errors(found, network, RATIOS[0], "none", rows[0], part))
        text += f"\nIn how many of these {count} (groups times seeds) it has the least error:\n\n"
        lines = [
            [row, *[_firsts(found, network, ratio, way, rows, part)[row] for way in WAYS for ratio in RATIOS]]
            for row in rows
        ]
        lines.append(["any ThiNet", *[sum(line[i] for line in lines if line[0] in THINET) for i in _columns(lines)]])
        text += common.markdown(["", *_heads()], lines)
    return text


def _columns(lines: Sequence[Sequence[Any]]) -> range:
    return range(1, len(lines[0]))


def _heads() -> list[str]:
    return [f"{way} {100 * ratio:.0f} %" for way in WAYS for ratio in RATIOS]


def _firsts(found: Cells, network: str, ratio: float, way: str, rows: Iterable[str], part: str) -> dict[str, int]:
    each = {row: group_errors(found, network, ratio, way, row, part) for row in rows}
    first = dict.fromkeys(each, 0)
    for key in next(iter(each.values())):
        first[min(each, key=lambda row: each[row].get(key, float("inf")))] += 1
    return first


def _whole_table(found: Cells, network: str) -> str:
    if not found.names([f"{network} {ratio} whole" for ratio in RATIOS]):
        return ""
    dense = spread([*found.values(f"{network} dense", "dense", "accuracy").values()])
    macs = [spread([*found.values(f"{network} dense", f"macs {ratio}", "macs").values()]) for ratio in RATIOS]
    said = f"Test accuracy (dense {dense})" if network != "lite0" else "Agreement with the dense network's first guess"
    kinds = {"accuracy": said}
    if network == "lite0":
        kinds["logits"] = "Relative error of the logits"
    text = f"\nWhole network, MACs left: {', '.join(macs)} %.\n"
    for key, title in kinds.items():
        for after, told in AFTER.items():
            rows = [
                [
                    row,
                    *[
                        spread(_whole(found, network, ratio, f"{way}{after}:{key}", row))
                        for way in WAYS
                        for ratio in RATIOS
                    ],
                ]
                for row in (*ROWS, REFIT)
                if _whole(found, network, RATIOS[0], f"none:{key}", row)
            ]
            text += f"\n{title}, {told}:\n\n" + common.markdown(["", *_heads()], rows)
    return text


def _lost(found: Cells) -> str:
    """Every place where the best mean is not ThiNet's."""
    lines = []
    for network, title in TITLES.items():
        for what, told, sign in _measures(network):
            for way, ratio in itertools.product(WAYS, RATIOS):
                each = {row: what(found, network, ratio, way, row) for row in ROWS}
                most = max(map(len, each.values()))
                full = {row: statistics.fmean(own) for row, own in each.items() if own and len(own) == most}
                ours = [row for row in full if row.startswith("thinet")]
                if not ours or len(full) == len(ours):
                    continue
                best, mine = (max(names, key=lambda row: sign * full[row]) for names in (full, ours))
                if sign * full[best] > sign * full[mine]:
                    values = [f"{row} {spread(each[row])}" for row in (best, mine)]
                    lines.append([title.split(",")[0], told, f"{way} {100 * ratio:.0f} %", *values])
    if not lines:
        return "\n## Where ThiNet is not first\n\nNowhere, by the means.\n"
    heads = ["network", "what", "reconstruction, ratio", "first", "best of ThiNet's"]
    return "\n## Where ThiNet is not first\n\nBy the means:\n\n" + common.markdown(heads, lines)


Values = Callable[[Cells, str, float, str, str], Sequence[float]]


def _measures(network: str) -> list[tuple[Values, str, int]]:
    """What is measured of a network, in words, and whether more of it is better."""
    found: list[tuple[Values, str, int]] = []
    for part, told in PARTS.items():
        found.append((functools.partial(means, part=part), f"next layer, {told}", -1))
    for after, told in AFTER.items():
        for key, noun, sign in (
            ("accuracy", "accuracy" if network != "lite0" else "agreement", 1),
            ("logits", "logits", -1),
        ):
            found.append((functools.partial(_whole_of, key=key, after=after), f"{noun}, {told}", sign))
    return found


def _whole_of(found: Cells, network: str, ratio: float, way: str, row: str, *, key: str, after: str) -> list[float]:
    return _whole(found, network, ratio, f"{way}{after}:{key}", row)


def _whole(found: Cells, network: str, ratio: float, key: str, row: str) -> list[float]:
    """Of the seeds that have every row, so that all rows speak of the same networks."""
    column = f"{network} {ratio} whole"
    seeds = set.intersection(*(set(found.values(column, each, key)) for each in ROWS))
    return [value for seed, value in found.values(column, row, key).items() if seed in seeds]


# --------------------------------------------------------------------------------------------------------- the plot


def plot(found: Cells) -> str:
    """A row a network: the next layer's error under each reconstruction, and what the whole network does with readers
    rescaled and batch norms recalibrated, over the ratio; without a panel where cells are missing."""
    networks = [network for network in TITLES if found.names([f"{network} {RATIOS[0]} none"])]
    figure, first = canvas(2.1, 1.7)
    for down, network in enumerate(networks):
        ways = [w for w in (*WAYS, "whole") if any(all(_drawn(found, network, w, row)) for row in SHOWN)]
        for across, way in enumerate(ways):
            axes = first if not down and not across else figure.add_axes((1.28 * across, -1.5 * down, 1, 1))
            plain_(axes)
            _panel_(axes, found, network, way)
            if not across:
                axes.set_ylabel(TITLES[network].split(",")[0].replace(" at a quarter of its widths", "/4") + ", %")
            axes.set_title(_told(network, way), fontsize=9, color=INK, loc="left")
    first.legend(fontsize=8, frameon=False, labelcolor=INK)
    title = "Error of the next layer's output and quality of the whole network over the ratio, by criterion"
    return standalone(as_svg(figure, "thinet", title)) + "\n"


def _told(network: str, way: str) -> str:
    if way == "whole":
        return "agreement with the dense" if network == "lite0" else "accuracy, rescaled"
    return f"next layer's error, {way}"


def _panel_(axes: Axes, found: Cells, network: str, way: str) -> None:
    for row, colour in SHOWN.items():
        each = _drawn(found, network, way, row)
        if all(each):
            middle = [100 * statistics.fmean(values) for values in each]
            spans = [100 * statistics.stdev(values) if len(values) > 1 else 0.0 for values in each]
            marks: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.6, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar([100 * ratio for ratio in RATIOS], middle, spans, label=row, color=colour, **marks)
    axes.set_xticks([100 * ratio for ratio in RATIOS])
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.grid(color=FAINT, linewidth=0.7)


def _drawn(found: Cells, network: str, way: str, row: str) -> list[Sequence[float]]:
    """The values of all seeds at each ratio."""
    if way == "whole":
        return [_whole(found, network, ratio, "scale, recalibrated:accuracy", row) for ratio in RATIOS]
    return [means(found, network, ratio, way, row, "inner") for ratio in RATIOS]
