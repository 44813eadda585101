"""The networks of a run in int8: written after all training, and measured beside those in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from secateur.errors import BadRequest, nearest
from secateur.quantisation import file_accuracy, quantise_onnx
from secateur.recipes.job import Facts, Job, Progress, on_main
from secateur.recipes.networks import example_of
from secateur.recipes.stages import open_stage
from secateur.report import Row

PHASE, FILE = "quantise", "model.int8.onnx"
"""``FILE``: the network that the run ends with; those before it lie with the phases."""


def quantise(job: Job, progress: Progress, *, networks: Sequence[tuple[str, str]]) -> Facts:
    """Every ``(name, phase)`` of ``networks``, which score classes, in int8, calibrated on training images that are not
    augmented."""
    asked = job.recipe.quantise
    assert asked is not None

    def act() -> Facts:
        found: dict[str, Facts] = {}
        for done, (name, phase) in enumerate(networks, 1):
            model = open_stage(job, phase)
            last = done == len(networks)
            path = Path(FILE) if last else Path(job.folder.phases.name) / f"{phase}.int8.onnx"
            images = job.data.calibration.first(asked.batches).whole()
            options = asked.model_dump(exclude={"batches"})
            written = quantise_onnx(
                model, job.folder.path / path, example_of(job.origin, model), images, batches=asked.batches, **options
            )
            found[name] = {
                "file": str(path),
                "bytes": written.bytes,
                "images": written.images,
                "reduce_range": written.reduce_range,
                "difference": written.difference,
                "agreement": written.agreement,
                "layers": len(written.layers),
                "float_layers": list(written.float_layers),
            }
            progress(done, len(networks), {})
        return {"networks": found}

    return on_main(act)


def check_excluded(job: Job, model: nn.Module) -> None:
    """Raises ``BadRequest`` where ``exclude`` names a module that the network does not have: at once, and not when all
    training is over."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in job.recipe.quantise.exclude if job.recipe.quantise is not None else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadRequest(
                f"quantise.exclude: no module of the network is called {pattern!r}{nearest(pattern, names)}"
            )


def int8_files(job: Job) -> dict[str, Path]:
    """What was quantised: the names of its rows, and the files; nothing where the recipe does not ask for it."""
    written = job.done.get(PHASE, {}).get("networks", {})
    return {int8_name(name): job.folder.path / facts["file"] for name, facts in written.items()}


def int8_rows(
    job: Job, rows: Sequence[Row], example: tuple[Tensor, ...], times: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """The rows of the quantised networks: as those of ``rows`` that they were made of, with size, test accuracy (in
    ONNX Runtime) and latency of their own. ``times``: ``{row: {engine: milliseconds}}``. In the main process only."""
    own = {row.name: row for row in rows}
    written = job.done.get(PHASE, {}).get("networks", {})
    found = []
    for name, facts in written.items():
        path = job.folder.path / facts["file"]
        right = file_accuracy(path, example, job.data.test.whole()) if len(job.data.test) else None
        found.append(
            dataclasses.replace(
                own[name],
                name=int8_name(name),
                accuracy=right,
                size=facts["bytes"],
                latencies_ms=dict(times.get(int8_name(name), {})),
                memory=None,
            )
        )
    return found


def int8_facts(job: Job) -> dict[str, str]:
    """How the networks were quantised and what that changed, for people."""
    asked = job.recipe.quantise
    written = job.done.get(PHASE, {}).get("networks", {})
    if asked is None:
        return {}
    told = {}
    for name, facts in written.items():
        bits = "seven" if facts["reduce_range"] else "eight"
        agreed = f"{100 * facts['agreement']:.2f} % of them classified as in float32"
        differ = f"outputs differ by {100 * facts['difference']:.2g} %"
        left = f"; in float: {', '.join(facts['float_layers'])}" if facts["float_layers"] else ""
        told[int8_name(name)] = (
            f"ranges of {facts['images']} training images ({asked.method}), weights of {bits} bits; {agreed}, "
            f"{differ}{left}"
        )
    return told


def int8_name(name: str) -> str:
    """What the row of a network in int8 is called."""
    return f"{name}, int8"
