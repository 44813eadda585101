"""The page that a run ends with, and the same page again from what the run's folder keeps.

``report.json`` has all that the page tells, so that no network, data or code is needed to make it anew, or one page of
several runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from secateur import artifact
from secateur.counting import layer_table
from secateur.errors import BadArtifact
from secateur.graph import Graph, trace
from secateur.groups import couple
from secateur.recipes.folder import ENVIRONMENT, STATE, RunFolder, done_phases, read_state, write_whole
from secateur.recipes.job import Facts, Job, Progress, on_main
from secateur.recipes.metrics import read_metrics
from secateur.recipes.networks import example_of
from secateur.recipes.quantising import int8_facts
from secateur.recipes.results import read_results, read_rows, timing_text
from secateur.recipes.schema import Prune, Sensitivity
from secateur.recipes.stages import open_stage, stage_path
from secateur.recipes.trials import PHASE as TRIALS
from secateur.recipes.trials import open_curves
from secateur.recipes.turnovers import open_turnovers
from secateur.report import (
    Curve,
    Report,
    Whole,
    environment,
    filter_norms,
    first_filters,
    layer_rows,
    parse_report,
    report_json,
    write_report,
)
from secateur.residuals import kept_whole
from secateur.surgery import record

PAGE, RECORD = "report.html", "report.json"
LARGEST_RECORD = 256 * 2**20
OUTCOMES = ("fine-tuned", "compensated", "pruned")
"""What a run may end with: the first of these that it has. Other rows stand beside it."""
HOW = {
    "module": "the tensors of the network's own modules were sliced",
    "attributes": "tensors were sliced and the sizes that the forward computes with were set",
    "graph": "the captured graph was rewritten",
}


def report(job: Job, progress: Progress, *, dense: str, final: str, name: str) -> Facts:
    """All of it as one page, and as the record that the page can be made from."""

    def act() -> None:
        told = page(job, dense=dense, final=final, name=name)
        write_whole(job.folder.path / RECORD, report_json(told).encode())
        write_report(job.folder.path / PAGE, told)

    on_main(act)
    return {}


def read_report(path: Path) -> Report:
    """What the page of the run in the folder ``path`` tells.

    Of a run that wrote no record (its recipe wanted no report) it is what its results tell: all but its layers.
    Raises BadArtifact for what is no run, for a run that is not finished, and for damaged files.
    """
    folder = finished(path)
    try:
        if (folder.path / RECORD).stat().st_size > LARGEST_RECORD:
            raise BadArtifact("it is huge")
        return parse_report((folder.path / RECORD).read_bytes())
    except FileNotFoundError:
        return _from_results(folder)
    except (OSError, BadArtifact) as error:
        why = str(error) if isinstance(error, BadArtifact) else error.strerror
        raise BadArtifact(f"{folder.path / RECORD}: {why}\n  do: carry the recipe out in another folder") from error


def finished(path: Path) -> RunFolder:
    """The run in the folder ``path``. Raises BadArtifact if there is none, and if it is not finished: then with what is
    done, and how to go on."""
    state = read_state(RunFolder(path, smoke=False)) if path.is_dir() else None
    if state is None:
        kind = "has no run in it" if path.is_dir() else "is no folder"
        raise BadArtifact(
            f"{path} {kind}\n  do: name the folder of a run of secateur run, demo or finetune: it holds a {STATE}"
        )
    folder = RunFolder(path, smoke=bool(state.get("smoke")))
    if not state.get("finished"):
        done = ", ".join(done_phases(folder)) or "none"
        again = command_of(folder) or f"secateur run {path}/recipe.yaml -o {path}"
        raise BadArtifact(
            f"the run in {path} is not finished: of its phases these are done: {done}\n"
            f"  do: go on with it, by the same command as before: {again}"
        )
    return folder


def is_run(path: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (path / STATE).is_file()


def page(job: Job, *, dense: str, final: str, name: str) -> Report:
    """What the report says. ``dense`` and ``final``: phases; ``name``: what the final network is called."""
    models = [open_stage(job, dense), open_stage(job, final)]
    graphs = [trace(model, example_of(job.origin, model)) for model in models]
    results = read_results(job.folder)
    return Report(
        title=f"{job.origin.source.name} on {job.data.name}",
        rows=read_rows(results),
        layers=layer_rows(layer_table(graphs[0]), layer_table(graphs[1])),
        norms=filter_norms(models[0]),
        final=name,
        curves=curves_of(job.folder, job.done),
        sensitivity=open_curves(job.folder),
        filters=first_filters(models[0]),
        zeroed=open_turnovers(job.folder),
        whole=whole_groups(job, graphs[0], models[1], final),
        images=results["test_images"],
        timing=timing_text(results),
        law=_law(job.done),
        facts=_facts(job),
        environment=environment(),
        command=command_of(job.folder),
    )


def _from_results(folder: RunFolder) -> Report:
    results, state = read_results(folder), read_state(folder) or {}
    rows = read_rows(results)
    recipe = state.get("recipe", {})
    named = [recipe.get(part, {}).get("name", part) for part in ("model", "data")]
    return Report(
        title=" on ".join(named),
        rows=rows,
        layers=[],
        norms={},
        final=next((name for name in OUTCOMES if name in {row.name for row in rows}), rows[0].name),
        curves=curves_of(folder, done_phases(folder)),
        sensitivity=open_curves(folder),
        zeroed=open_turnovers(folder),
        images=results["test_images"],
        timing=timing_text(results),
        law=_law(done_phases(folder)),
        facts={"left out": f"layers, filters and what stayed whole: the run wrote no {RECORD}"},
        command=command_of(folder),
    )


def curves_of(folder: RunFolder, done: Mapping[str, Facts]) -> list[Curve]:
    """Every training of the run, from its records."""
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for one in read_metrics(folder):
        if one.get("kind") == "epoch" and one["phase"] in done:
            losses, scores = found.setdefault(one["phase"], ([], []))
            losses.append(one["loss"])
            scores.append(one.get("score"))
    return [Curve(phase, losses, scores) for phase, (losses, scores) in found.items()]


def whole_groups(job: Job, dense: Graph, model: nn.Module, final: str) -> list[Whole]:
    """What did not get narrower, and why: what is locked, what the recipe leaves out, and what the choice left alone.
    ``model``: the network of the phase ``final``."""
    prune = job.recipe.prune
    if prune is None or record(model) is None:
        return []
    plan = artifact.read_plan(stage_path(job, final))
    coupling = couple(dense, prune.prefer, scatter=prune.residual == "scatter")
    kept = {name: len(channels) for name, channels in plan.keep.items()}
    residual = kept_whole(coupling, prune.residual)
    free = [group for group in coupling.groups if kept.get(group.name) == group.channels]
    reasons = [(group, _why_whole(group.name, prune, residual), False) for group in free]
    found: dict[tuple[str, bool], list[Any]] = {}
    for group, why, locked in [*((group, group.locked, True) for group in coupling.locked), *reasons]:
        found.setdefault((" ".join(why.split()), locked), []).append(group)
    return [
        Whole(tuple(group.name for group in groups), sum(group.channels for group in groups), why, locked)
        for (why, locked), groups in found.items()
    ]


def _why_whole(name: str, prune: Prune, residual: Mapping[str, str]) -> str:
    if name in residual:
        return residual[name]
    glob = next((glob for glob in prune.exclude if fnmatchcase(name, glob)), None)
    if glob is not None:
        return f"the recipe excludes {glob}"
    if prune.sensitivity is not None:
        if any(fnmatchcase(name, glob) for glob in prune.sensitivity.skip):
            return "the recipe tries it out, and skips it when it prunes"
        return "too much is lost by making it narrower, as trying it out has shown"
    return "nothing of it was chosen: other channels cost more, or score less"


def _law(done: Mapping[str, Facts]) -> dict[str, str]:
    """How far every cut's outcome was from the masked network, at worst."""
    cuts = [facts for facts in done.values() if facts.get("difference") is not None]
    if not cuts:
        return {}
    worst = max(facts["difference"] for facts in cuts)
    how = {facts["tier"]: HOW[facts["tier"]] for facts in cuts}
    return {
        "largest difference": f"{worst:.1e} of the largest output, in float64, at random weights too",
        "how it was cut": "; ".join(how.values()),
    }


def _facts(job: Job) -> dict[str, str]:
    recipe, data = job.recipe, job.data
    sizes = (
        f"{data.train.samples} images to train on, {data.validation.samples} to validate, {data.test.samples} to test"
    )
    facts = {"data": f"{data.name}: {sizes}"}
    if recipe.prune is not None:
        facts["criterion"] = recipe.prune.criterion
        facts["schedule"] = recipe.prune.schedule.kind
        facts["residual sums"] = recipe.prune.residual
        facts["constants of zeroed filters"] = _how_constants(recipe.prune.constants)
        if recipe.prune.sensitivity is not None:
            facts["widths"] = _how_widths_followed(recipe.prune.sensitivity, job.done)
    for name, done in job.done.items():
        if "kept" in done:
            facts[f"{name}, channels"] = f"{done['kept']} of {done['channels']} kept"
        if "choices" in done:
            facts[f"{name}, zeroed filters"] = _how_choices_went(done)
        if "epochs" in done:
            facts[f"{name}, trained"] = f"{done['epochs']} epoch{'s' * (done['epochs'] != 1)}"
        for step in done.get("steps", ()):
            if step["validation"] is not None:
                what = "as it came" if step["step"] == "none" else f"after {step['step']}"
                facts[f"{name}, {what}"] = f"{100 * step['validation']:.2f} % of the validation images right"
    facts |= int8_facts(job)
    facts["seed"] = str(recipe.seed)
    if job.folder.smoke:
        facts["smoke run"] = "cut short: its figures mean nothing"
    return facts


def _how_choices_went(done: Facts) -> str:
    """How often the zeroed filters were chosen, and whether they stayed the same, for people."""
    changes = sum(bool(came or went) for came, went in zip(done["entered"], done["left"], strict=True))
    times = f"chosen {done['choices']} time{'s' * (done['choices'] != 1)}"
    return f"{times}, and others than before {changes} time{'s' * (changes != 1)}" if done["entered"] else times


def _how_constants(asked: str | Mapping[str, str]) -> str:
    """What becomes of constants, for people."""
    told = {"drop": "dropped", "fold": "folded into what reads them"}
    if isinstance(asked, str):
        return told[asked]
    return ", ".join(f"{glob}: {told[what]}" for glob, what in asked.items())


def _how_widths_followed(asked: Sensitivity, done: Mapping[str, Facts]) -> str:
    """How the widths were found, for people."""
    if asked.tolerance is None:
        way = "the least predicted loss within the budget"
    else:
        each = "group" if asked.per == "group" else "stage"
        way = f"the largest ratio of each {each} at which accuracy falls by {100 * asked.tolerance:g} points at most"
    facts = done[TRIALS]
    return f"{way}; {facts['narrower']} of {facts['tried']} groups got narrower"


def command_of(folder: RunFolder) -> str:
    """The command that began the run, as it was given; empty where that is not known."""
    try:
        return str(json.loads((folder.path / ENVIRONMENT).read_text(encoding="utf-8"))["sessions"][0]["command"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
