"""The end of a run: what its networks cost and how well they do, and what is kept of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur import artifact
from secateur.core import Measurement, Timing
from secateur.counting import count
from secateur.engines import ENGINES, find_engine, installed
from secateur.errors import BadArtifact, MissingExtra, SecateurError
from secateur.memory import activation_memory
from secateur.onnx_file import export_onnx
from secateur.quantisation import check_packages
from secateur.recipes.folder import RunFolder, write_json, write_whole
from secateur.recipes.job import Facts, Job, Progress, accuracy_on, on_main
from secateur.recipes.networks import example_of, write_network
from secateur.recipes.quantising import int8_files, int8_rows
from secateur.recipes.schema import ALL, Measure, Recipe
from secateur.recipes.stages import note, open_stage, stage_path
from secateur.report import Row
from secateur.surgery import record
from secateur.timing import time_in_engines

RESULTS, ONNX, PRUNED, PLAN, MODEL = "results.json", "model.onnx", "pruned", "plan.json", "model"
REPEATS, SMOKE_REPEATS = 50, 3


def check_extras(recipe: Recipe) -> None:
    """Raises MissingExtra now for what the end of the run will need: hours later would be a pity."""
    needed = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export"} if recipe.export.onnx else {}
    needed |= {"jinja2": "report", "matplotlib": "report"} if recipe.export.report else {}
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"the end of this recipe needs {package}\n"
                f"  do: pip install 'secateur[{extra}]', or switch it off in the recipe's export section"
            )
    if recipe.quantise is not None:
        check_packages()
    for engine in engines_of(recipe.measure):
        find_engine(engine)


def engines_of(settings: Measure) -> list[str]:
    """The engines that latencies are taken in; of ``all``, those that are installed here."""
    if not settings.latency:
        return []
    if settings.engine == ALL:
        return installed()
    return [settings.engine] if isinstance(settings.engine, str) else list(settings.engine)


def measure(job: Job, progress: Progress, *, networks: Sequence[tuple[str, str]]) -> Facts:
    """Test accuracy, parameters, MACs, size, memory and latency of every ``(name, phase)``; written as results.json.

    Latency is that of one image on the CPU, all networks in all engines timed in turns; an engine that cannot run them
    all is left out, and that is told. Networks of the same shapes take the same time, and are timed as one.
    """
    models = {name: open_stage(job, phase) for name, phase in networks}
    accuracies = {}
    for done, (name, model) in enumerate(models.items(), 1):
        accuracies[name] = accuracy_on(job, model, job.data.test)
        progress(done, len(models), {})

    def act() -> Facts:
        example = example_of(job.origin, next(iter(models.values())))
        same = {name: alike(model, models) for name, model in models.items()}
        shapes = {first: models[first] for first in same.values()}
        times, failures = _timed(job, progress, shapes, int8_files(job), example)
        memory = {first: activation_memory(model, example).needed for first, model in shapes.items()}
        rows = []
        for name, phase in networks:
            counted = count(models[name], example)
            row = Row(
                name,
                params=int(counted.params),
                macs=int(counted.macs),
                accuracy=accuracies[name],
                size=_size(stage_path(job, phase)),
                latencies_ms={engine: timed[same[name]].ms for engine, timed in times.items()},
                memory=memory[same[name]],
            )
            rows.append(row)
        by_file = {
            name: {engine: timed[name].ms for engine, timed in times.items() if name in timed}
            for name in int8_files(job)
        }
        rows += int8_rows(job, rows, example, by_file)
        found = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "engines": {engine: ENGINES[engine].version() for engine in times},
            "left_out": failures,
            "quartiles_ms": {
                engine: {name: [one.low, one.high] for name, one in timed.items()} for engine, timed in times.items()
            },
            "threads": job.recipe.measure.threads,
            "repeats": _repeats(job),
            "test_images": job.data.test.samples,
            "phases": dict(job.done),
        }
        write_json(job.folder.path / RESULTS, found)
        return found

    found = on_main(act)
    for engine, why in found["left_out"].items():
        job.say(f"measuring: {engine} is left out: {why}")
    for row in found["rows"]:
        note(job, "measure", {"kind": "result", **row})
    return {"rows": found["rows"]}


def alike(model: nn.Module, models: Mapping[str, nn.Module]) -> str:
    """The name of the first network that does the same arithmetic on other numbers: its modules say the same of
    themselves, and hold tensors of the same names, shapes and types."""

    def shape(net: nn.Module) -> tuple[object, ...]:
        tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in net.state_dict().items()]
        return type(net), repr(net), getattr(net, "code", ""), tensors

    own = shape(model)
    return next(name for name, other in models.items() if other is model or shape(other) == own)


def _timed(
    job: Job,
    progress: Progress,
    models: Mapping[str, nn.Module],
    files: Mapping[str, Path],
    example: Any,
) -> tuple[dict[str, dict[str, Timing]], dict[str, str]]:
    """``{engine: {network: time}}``, and why engines are left out. Raises what kept the last one if all of them are."""
    settings, failures = job.recipe.measure, dict[str, SecateurError]()
    engines = engines_of(settings)
    if not engines:
        return {}, {}
    times = time_in_engines(
        models,
        example,
        engines=engines,
        files=files,
        threads=settings.threads,
        repeats=_repeats(job),
        progress=lambda done, total: progress(done, total, {}),
        failures=failures,
    )
    if not times:
        raise failures[engines[-1]]
    return times, {engine: str(error).partition("\n")[0] for engine, error in failures.items()}


def _repeats(job: Job) -> int:
    return SMOKE_REPEATS if job.folder.smoke else REPEATS


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
        row = next(row for row in read_rows(read_results(job.folder)) if row.name == name)
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


def read_results(folder: RunFolder) -> dict[str, Any]:
    """What ``measure`` wrote. Raises BadArtifact where it is missing or damaged."""
    path = folder.path / RESULTS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadArtifact(f"{path} is missing or damaged: {error}\n  do: run again in another folder") from error


def read_rows(found: Mapping[str, Any]) -> list[Row]:
    """The networks of ``results.json``, also as it was written when a run knew one engine only."""
    rows = []
    for values in found["rows"]:
        own = {key: value for key, value in values.items() if key != "latency_ms"}
        if values.get("latency_ms") is not None:
            own["latencies_ms"] = {found["engine"]: values["latency_ms"]}
        rows.append(Row(**own))
    return rows


def timing_text(found: Mapping[str, Any]) -> str:
    """How the latencies of ``results.json`` were taken, as a sentence; empty where none were."""
    spreads = [
        (high - low) / (high + low)
        for timed in found.get("quartiles_ms", {}).values()
        for low, high in timed.values()
        if high + low
    ]
    if not spreads:
        return ""
    threads, repeats = found["threads"], found["repeats"]
    text = (
        f"median of {repeats} runs of one image on {threads} thread{'s' * (threads != 1)}, all networks in all engines "
        f"in turns; the quartiles lie within {100 * max(spreads):.1f} % of the middle between them. Networks of the "
        "same shapes are timed as one."
    )
    for engine, why in found["left_out"].items():
        text += f" {engine} is left out: {why}."
    return text


def _measurement(job: Job, row: Row) -> Measurement:
    engine, ms = row.fastest or ("", None)
    return Measurement(
        params=row.params,
        macs=row.macs,
        accuracy=row.accuracy,
        latency_ms=ms,
        engine=engine,
        memory=row.memory,
        details={"threads": job.recipe.measure.threads, "batch": 1, "latencies_ms": dict(row.latencies_ms)}
        if row.latencies_ms
        else {},
    )


def _size(path: Path) -> int:
    file = path / artifact.WEIGHTS_FILE if path.is_dir() else path.with_name(f"{path.name}.safetensors")
    return file.stat().st_size
