"""How wide every group becomes, found by trying: the phase ``sensitivity``, which stands before the first cut.

What it decides are widths, so that every schedule can go about them in its own way: one cut, several, or zeroing on
the way. They follow from a tolerance (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2: one
ratio a group or a stage, sensitive groups left whole), or meet the recipe's budget with the least predicted loss.

All processes take part, each with groups of its own on all of the validation images; ``sensitivity.json`` in the run's
folder has what is known after every single trial, and a run that was interrupted goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.nn.functional import cross_entropy

from secateur.allocation import excluded_groups, fixed_widths, width_at
from secateur.core import Budget
from secateur.criteria import needs_data, needs_loss
from secateur.errors import BadArtifact, BadRequest
from secateur.graph import Graph, trace
from secateur.groups import couple
from secateur.pipeline import plan
from secateur.plans import fingerprint
from secateur.recipes.folder import RunFolder
from secateur.recipes.job import Facts, Job, Progress, on_device, on_main
from secateur.recipes.networks import example_of
from secateur.recipes.schema import Prune
from secateur.recipes.stages import open_stage
from secateur.residuals import kept_whole
from secateur.schedules import Options
from secateur.sensitivities import GroupCurve
from secateur.sensitivities import Sensitivity as Found
from secateur.sensitivities.choice import ratios_from
from secateur.sensitivities.sweep import sensitivity
from secateur.zoo.data import DataSettings

PHASE, CURVES = "sensitivity", "sensitivity.json"


def measure(job: Job, progress: Progress, *, before: str) -> Facts:
    """Try every group of the network of phase ``before`` at every ratio, and decide the widths."""
    prune = job.recipe.prune
    assert prune is not None
    asked = prune.sensitivity
    assert asked is not None
    assert prune.residual != "scatter"  # that is a fault of the recipe
    with on_device(open_stage(job, before), job.device) as model:
        graph = trace(model, example_of(job.origin, model))
        criterion = asked.criterion or prune.criterion
        seen = evidence(job, criterion)
        images = job.data.validation if asked.batches is None else job.data.validation.first(asked.batches)
        found = sensitivity(
            graph,
            evaluate=images.whole(),
            criterion=criterion,
            data=seen.get("data"),
            loss=seen.get("loss"),
            ratios=asked.ratios,
            exclude=_untried(graph, prune),
            residual=prune.residual,
            path=job.folder.path / CURVES,
            note=noted(job.recipe.data, asked.batches),
            progress=lambda done, total, text: progress(done, total, {}),
            seed=job.seed("prune"),
        )
    widths = on_main(lambda: decided_widths(graph, prune, found))
    dense = {curve.group: curve.channels for curve in found.curves}
    narrower = sum(widths.get(name, channels) < channels for name, channels in dense.items())
    return {"widths": widths, "dense": found.dense, "tried": len(dense), "narrower": narrower}


def decided_widths(graph: Graph, prune: Prune, found: Found) -> dict[str, int]:
    """``{group: channels kept}`` of all groups that get narrower, as ``prune`` makes it follow from ``found``.

    Groups that its ratios name get what those say. Raises what ``plan`` and ``ratios_from`` raise.
    """
    asked = prune.sensitivity
    assert asked is not None
    exclude = [*prune.exclude, *asked.skip]
    if asked.tolerance is None:
        budget = prune.budget or Budget(keep=0.5)
        decided = plan(
            graph,
            budget=budget,
            ratios=prune.ratios,
            exclude=exclude,
            residual=prune.residual,
            sensitivity=found,
        )
    else:
        ratios = ratios_from(found, tolerance=asked.tolerance, per=asked.per, skip=asked.skip)
        decided = plan(graph, ratios={**ratios, **_given(graph, prune)}, exclude=exclude, residual=prune.residual)
    channels = {group.name: group.channels for group in decided.groups}
    return {name: len(kept) for name, kept in decided.keep.items() if len(kept) < channels[name]}


def foreseen_widths(job: Job, graph: Graph, prune: Prune) -> dict[str, int]:
    """The widths if no trial lost anything, before there is any. Raises what trying and deciding would, where that can
    be known beforehand: no images to try on, names that no group has, a budget that is out of reach of the ratios.
    """
    if not len(job.data.validation):
        raise BadRequest(
            f"prune.sensitivity is measured on validation images, and of {job.data.name} none are held out\n"
            "  do: hold some out"
        )
    return decided_widths(graph, prune, _imagined(graph, prune))


def evidence(job: Job, criterion: str, *, batches: int | None = None) -> Options:
    """A criterion and what it must be shown: ``batches`` of training images, or as many as the recipe says. Raises
    ``BadRequest`` where a class has fewer images than it says."""
    assert job.recipe.prune is not None
    found = Options(criterion=criterion)
    if needs_data(criterion):
        calibration, each = job.data.calibration, job.recipe.prune.per_class
        if each is not None and batches is None:
            found["data"] = calibration.of_each_class(each)
        else:
            found["data"] = calibration.first(batches or job.recipe.prune.calibration)
    if needs_loss(criterion):
        found["loss"] = cross_entropy
    return found


def noted(data: DataSettings, batches: int | None, **more: Any) -> dict[str, Any]:
    """What a sweep cannot know of what it is measured on, JSON values: curves of other images do not go on. Where the
    files lie, and how many processes read them, changes no image."""
    settings = {name: value for name, value in asdict(data).items() if name not in ("root", "workers")}
    return {"data": settings, "batches": batches, **more}


def open_curves(folder: RunFolder) -> Found | None:
    """What was measured; None where nothing was. Raises BadArtifact where it is damaged."""
    path = folder.path / CURVES
    try:
        return Found.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (BadArtifact, OSError, UnicodeDecodeError) as error:
        raise BadArtifact(f"{path} is damaged: {error}\n  do: begin again in another folder") from error


def _imagined(graph: Graph, prune: Prune) -> Found:
    """What would be found if no group lost anything."""
    asked = prune.sensitivity
    assert asked is not None
    coupling = couple(graph)
    untried = excluded_groups(coupling.groups, _untried(graph, prune), coupling.locked)
    untried |= kept_whole(coupling, prune.residual).keys()
    curves = []
    for group in coupling.groups:
        if group.name not in untried:
            keep = tuple(width_at(group.channels, ratio) for ratio in asked.ratios)
            curves.append(GroupCurve(group.name, group.channels, "", keep, (1.0,) * len(keep)))
    return Found(fingerprint(graph.model), prune.criterion, asked.ratios, 1.0, tuple(curves))


def _untried(graph: Graph, prune: Prune) -> list[str]:
    """Groups whose width is known already."""
    return [*prune.exclude, *_given(graph, prune)]


def _given(graph: Graph, prune: Prune) -> Mapping[str, float]:
    """The widths or ratios that the recipe gives itself, by the groups' names."""
    coupling = couple(graph)
    return fixed_widths(coupling.groups, prune.ratios, coupling.locked)
