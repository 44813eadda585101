"""What a sensitivity analysis found, drawn as Li et al. 2017 do, figure 2: norms by filter, and accuracy by ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.report.canvas import FAINT, INK, as_svg, canvas, plain_, stage_colours, stage_text
from secateur.report.figures import norms_figure, stage_legend_
from secateur.sensitivities import GroupCurve, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"l1": "L1 norm", "l2": "L2 norm"}


def importance_figure(found: Sensitivity, *, name: str = "importance", narrow: bool = False) -> str:
    """Figure 2a: each group's scores under the criterion, from the largest, over the largest."""
    norms = {curve.group: np.array(curve.importance) for curve in found.curves if curve.importance}
    stages = {curve.group: curve.stage for curve in found.curves}
    label = NAMES.get(found.criterion, found.criterion)
    return norms_figure(norms, stages, label=label, noun="group", name=name, narrow=narrow)


def sensitivity_figure(found: Sensitivity, *, name: str = "sensitivity", narrow: bool = False) -> str:
    """Figure 2b: the score over the fraction of a group that is gone, one colour for each size of maps; where the small
    networks were retrained, figure 2c beside it."""
    retrained = any(curve.retrained for curve in found.curves)
    figure, axes = canvas(2.45, 2.4) if narrow else canvas(3.7 if retrained else 6.4, 3.4)
    panels = [(axes, "scores", "pruned, not retrained")]
    if retrained:
        right = figure.add_axes((0, -1.35, 1, 1) if narrow else (1.16, 0, 1, 1))
        plain_(right)
        panels.append((right, "retrained", "pruned and retrained"))
    tips: dict[str, str] = {}
    for panel, row, title in panels:
        _lines_(panel, found, row, tips)
        panel.set_xlim(0, 100)
        panel.set_xlabel("of the group's channels removed, %")
        panel.set_title(title, fontsize=9, color=INK, loc="left")
        panel.grid(color=FAINT, linewidth=0.7)
    if retrained:
        low = min(panel.get_ylim()[0] for panel, *_ in panels)
        high = max(panel.get_ylim()[1] for panel, *_ in panels)
        for panel, *_ in panels:
            panel.set_ylim(low, high)
    axes.set_ylabel("accuracy, %" if as_percent(found) else "score")
    worst = _most_sensitive(found)
    stage_legend_(panels[-1][0], [curve.stage for curve in found.curves], "group", worst, narrow=narrow)
    title = "Accuracy over the ratio at which each group alone is pruned, coloured by the size of its maps"
    return as_svg(figure, name, title, tips, told=_told(found))


def _told(found: Sensitivity) -> str:
    """The curves in words: what is left of each group's score at the largest ratio."""
    percent = as_percent(found)
    ends = "; ".join(f"{curve.group} {score_text(curve.scores[-1], percent=percent)}" for curve in found.curves)
    last = f"{100 * found.ratios[-1]:g}" if found.ratios else "0"
    unit = " %" if percent else ""
    return f"{score_text(found.dense, percent=percent)}{unit} when nothing is pruned; with {last} % removed: {ends}."


def as_percent(found: Sensitivity) -> bool:
    """Whether the scores are accuracies, and told in per cent: not what a function of the user's own gave."""
    return found.made_by.get("measure") == "accuracy"


def score_text(score: float, *, percent: bool) -> str:
    """``93.1`` of 0.931 in per cent, else four digits."""
    return f"{100 * score:.1f}" if percent else f"{score:.4g}"


def _lines_(panel: Axes, found: Sensitivity, row: str, tips: dict[str, str]) -> None:
    """A line a group; the most sensitive one of each size is a heavier one."""
    scale = 100 if as_percent(found) else 1
    colours = stage_colours([curve.stage for curve in found.curves])
    heavy = _most_sensitive(found).values()
    panel.axhline(scale * found.dense, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    along = [0.0, *(100 * ratio for ratio in found.ratios)]
    for place, curve in enumerate(found.curves):
        scores = [scale * score for score in (found.dense, *getattr(curve, row))]
        if len(scores) == len(along):
            gid, width = f"{row}{place}", 2.4 if curve.group in heavy else 1.2
            tips[gid] = f"{curve.group}, {stage_text(curve.stage)}, {curve.channels} channels"
            marks: dict[str, Any] = {"linewidth": width, "marker": "o", "markersize": 1.6 + width / 2}
            panel.plot(along, scores, color=colours[curve.stage], alpha=0.85, gid=gid, **marks)


def _most_sensitive(found: Sensitivity) -> dict[str, str]:
    """The group of each map size that loses most, over all ratios together."""
    worst: dict[str, GroupCurve] = {}
    for curve in found.curves:
        if curve.stage not in worst or sum(curve.scores) < sum(worst[curve.stage].scores):
            worst[curve.stage] = curve
    return {stage: curve.group for stage, curve in worst.items()}
