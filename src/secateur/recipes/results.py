"""The end of a run: what its networks cost and how well they do, what is kept of them, and what is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur import artifact
from secateur.core import Measurement
from secateur.counting import count, layer_table
from secateur.errors import BadArtifact, MissingExtra
from secateur.graph import trace
from secateur.measurement import inference_runs, interleaved_latency_ms
from secateur.onnx_file import export_onnx
from secateur.recipes.folder import ENVIRONMENT, RunFolder, write_json, write_whole
from secateur.recipes.job import Facts, Job, Progress, accuracy_on, on_main
from secateur.recipes.metrics import read_metrics
from secateur.recipes.networks import example_of, write_network
from secateur.recipes.schema import Recipe, Sensitivity
from secateur.recipes.stages import note, open_stage, stage_path
from secateur.recipes.trials import PHASE as TRIALS
from secateur.recipes.trials import open_curves
from secateur.recipes.turnovers import open_turnovers
from secateur.report import Curve, Report, Row, environment, filter_norms, first_filters, layer_rows, write_report
from secateur.surgery import record

RESULTS, ONNX, REPORT, PRUNED, PLAN, MODEL = (
    "results.json", "model.onnx", "report.html", "pruned", "plan.json", "model",
)  # fmt: skip
REPEATS, SMOKE_REPEATS = 50, 3
HOW = {
    "module": "the tensors of the network's own modules were sliced",
    "attributes": "tensors were sliced and the sizes that the forward computes with were set",
    "graph": "the captured graph was rewritten",
}


def check_extras(recipe: Recipe) -> None:
    """Raises MissingExtra now for what the end of the run will need: hours later would be a pity."""
    needed = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export"} if recipe.export.onnx else {}
    needed |= {"jinja2": "report", "matplotlib": "report"} if recipe.export.report else {}
    needed |= {"onnxruntime": "export"} if recipe.measure.latency and recipe.measure.engine == "onnxruntime" else {}
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"the end of this recipe needs {package}\n"
                f"  do: pip install 'secateur[{extra}]', or switch it off in the recipe's export and measure sections"
            )


def measure(job: Job, progress: Progress, *, networks: Sequence[tuple[str, str]]) -> Facts:
    """Test accuracy, parameters, MACs, size and latency of every ``(name, phase)``; written as results.json.

    Latency is that of one image on the CPU, all networks timed in turns.
    """
    models = {name: open_stage(job, phase) for name, phase in networks}
    accuracies = {}
    for done, (name, model) in enumerate(models.items(), 1):
        accuracies[name] = accuracy_on(job, model, job.data.test)
        progress(done, len(models), {})

    def act() -> Facts:
        example = example_of(job.origin, next(iter(models.values())))
        times: Mapping[str, float] = {}
        settings = job.recipe.measure
        if settings.latency:
            repeats = SMOKE_REPEATS if job.folder.smoke else REPEATS
            with inference_runs(models, example, engine=settings.engine, threads=settings.threads) as runs:
                times = interleaved_latency_ms(runs, repeats=repeats, threads=settings.threads)
        rows = []
        for name, phase in networks:
            counted = count(models[name], example)
            row = Row(
                name,
                params=int(counted.params),
                macs=int(counted.macs),
                accuracy=accuracies[name],
                size=_size(stage_path(job, phase)),
                latency_ms=times.get(name),
            )
            rows.append(dataclasses.asdict(row))
        found = {
            "rows": rows,
            "engine": settings.engine if settings.latency else "",
            "threads": settings.threads,
            "test_images": job.data.test.samples,
            "phases": dict(job.done),
        }
        write_json(job.folder.path / RESULTS, found)
        return found

    found = on_main(act)
    for row in found["rows"]:
        note(job, "measure", {"kind": "result", **row})
    return {"rows": found["rows"]}


def save(job: Job, progress: Progress, *, name: str, final: str) -> Facts:
    """The network that the run ends with, where people and commands look for it, with its plan."""

    def act() -> None:
        model = open_stage(job, final)
        if record(model) is None:
            if final != "dense":
                write_network(job.folder.path / MODEL, model, job.origin)
            return
        plan = artifact.read_plan(stage_path(job, final))
        write_whole(job.folder.path / PLAN, plan.to_json().encode())
        row = next(row for row in job.done["measure"]["rows"] if row["name"] == name)
        artifact.save(job.folder.path / PRUNED, model, plan, measurement=_measurement(job, row))

    on_main(act)
    return {}


def export(job: Job, progress: Progress, *, final: str) -> Facts:
    """The final network as ONNX, compared with torch."""

    def act() -> Facts:
        model = open_stage(job, final)
        written = export_onnx(model, job.folder.path / ONNX, example_of(job.origin, model))
        return {"bytes": written.bytes, "opset": written.opset, "max_difference": written.max_difference}

    return on_main(act)


def report(job: Job, progress: Progress, *, dense: str, final: str, name: str) -> Facts:
    """All of it as one page."""

    def act() -> None:
        write_report(job.folder.path / REPORT, page(job, dense=dense, final=final, name=name))

    on_main(act)
    return {}


def page(job: Job, *, dense: str, final: str, name: str) -> Report:
    """What the report says. ``dense`` and ``final``: phases; ``name``: what the final network is called."""
    models = [open_stage(job, dense), open_stage(job, final)]
    graphs = [trace(model, example_of(job.origin, model)) for model in models]
    return Report(
        title=f"{job.origin.source.name} on {job.data.name}",
        rows=[Row(**row) for row in job.done["measure"]["rows"]],
        layers=layer_rows(layer_table(graphs[0]), layer_table(graphs[1])),
        norms=filter_norms(models[0]),
        final=name,
        curves=curves_of(job),
        sensitivity=open_curves(job.folder),
        filters=first_filters(models[0]),
        zeroed=open_turnovers(job.folder),
        law=_law(job),
        facts=_facts(job),
        environment=environment(),
        command=_command(job.folder),
    )


def curves_of(job: Job) -> list[Curve]:
    """Every training of the run, from its records."""
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for one in read_metrics(job.folder):
        if one.get("kind") == "epoch" and one["phase"] in job.done:
            losses, scores = found.setdefault(one["phase"], ([], []))
            losses.append(one["loss"])
            scores.append(one.get("score"))
    return [Curve(phase, losses, scores) for phase, (losses, scores) in found.items()]


def _law(job: Job) -> dict[str, str]:
    """How far every cut's outcome was from the masked network, at worst."""
    cuts = [done for done in job.done.values() if done.get("difference") is not None]
    if not cuts:
        return {}
    worst = max(done["difference"] for done in cuts)
    how = {done["tier"]: HOW[done["tier"]] for done in cuts}
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


def read_results(folder: RunFolder) -> dict[str, Any]:
    """What ``measure`` wrote. Raises BadArtifact where it is missing or damaged."""
    path = folder.path / RESULTS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadArtifact(f"{path} is missing or damaged: {error}\n  do: run again in another folder") from error


def _measurement(job: Job, row: Mapping[str, Any]) -> Measurement:
    settings = job.recipe.measure
    return Measurement(
        params=row["params"],
        macs=row["macs"],
        accuracy=row["accuracy"],
        latency_ms=row["latency_ms"],
        engine=settings.engine if settings.latency else "",
        details={"threads": settings.threads} if settings.latency else {},
    )


def _size(path: Path) -> int:
    file = path / artifact.WEIGHTS_FILE if path.is_dir() else path.with_name(f"{path.name}.safetensors")
    return file.stat().st_size


def _command(folder: RunFolder) -> str:
    try:
        return str(json.loads((folder.path / ENVIRONMENT).read_text(encoding="utf-8"))["sessions"][0]["command"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
