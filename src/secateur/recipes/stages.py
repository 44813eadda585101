"""What one phase hands to the next: networks and plans on the disk, and how a network is trained on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.counting import count
from secateur.errors import BadArtifact, BadPlan
from secateur.plans import Plan
from secateur.processes import is_main
from secateur.recipes import folder as folders
from secateur.recipes.folder import write_whole
from secateur.recipes.job import Facts, Job, Progress, accuracy_on, evaluation
from secateur.recipes.networks import example_of, read_network, write_network
from secateur.recover import Run, fit_
from secateur.recover.checkpoints import NAME
from secateur.recover.hooks import Hooks
from secateur.recover.objectives import Objective
from secateur.recover.settings import Training


def stage_path(job: Job, name: str) -> Path:
    """Where the network of a phase lies. That of ``dense`` is of use to others, and stands in front."""
    return job.folder.path / name if name == "dense" else job.folder.phases / name


def open_stage(job: Job, name: str) -> nn.Module:
    """The network that a phase wrote, on the CPU, in eval mode."""
    return read_network(stage_path(job, name), job.origin)


def keep_stage(job: Job, name: str, model: nn.Module) -> None:
    """Write the network of a phase. Only the main process may."""
    write_network(stage_path(job, name), model, job.origin)


def keep_plan(job: Job, name: str, plan: Plan) -> None:
    """Write the plan of a phase, which speaks of the network that the phase began with. Only the main process may."""
    write_whole(_plan_path(job, name), plan.to_json().encode())


def open_plan(job: Job, name: str) -> Plan:
    """The plan that a phase wrote. Raises BadArtifact where it is missing, BadPlan where it is damaged."""
    path = _plan_path(job, name)
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror}\n  do: begin again in another folder") from error
    except (BadPlan, UnicodeDecodeError) as error:
        raise BadPlan(f"{path}: {error}") from error


def facts_of(job: Job, model: nn.Module) -> Facts:
    """What a network costs, and its accuracy on validation."""
    counted = count(model, example_of(job.origin, model))
    return {
        "params": int(counted.params),
        "macs": int(counted.macs),
        "validation": accuracy_on(job, model, job.data.validation),
    }


def train_(
    job: Job,
    phase: str,
    model: nn.Module,
    training: Training,
    progress: Progress,
    *,
    objective: Objective | None = None,
    hooks: Sequence[Hooks] = (),
) -> Facts:
    """Train ``model`` in place as the phase of that name, from its last checkpoint on if it has one.

    Returns ``epochs`` (of how many the training was), ``macs`` of an image in them, and ``validation``.
    """

    def log(record: Mapping[str, Any]) -> None:
        if record.get("kind") == "resumed":  # the log's: the metrics are to be those of a run without a break
            folders.log(job.folder, f"{phase}: goes on after step {record['step']}")
        else:
            job.record(phase, record)

    run = Run(
        folder=job.folder.checkpoints(phase),
        every=job.recipe.checkpoint_every,
        log=log,
        progress=progress,
        cpu=job.cpu,
    )
    seeded = dataclasses.replace(training, seed=job.seed(phase, training.seed))
    fit_(
        model,
        job.data.train,
        seeded,
        evaluate=evaluation(job),
        objective=objective,
        hooks=hooks,
        run=run,
    )
    return {"epochs": trained_epochs(training), **facts_of(job, model)}


def trained_epochs(training: Training) -> int:
    """How many epochs a training really runs."""
    return training.epochs if training.rewind is None else training.rewind


def note(job: Job, phase: str, values: Mapping[str, Any]) -> None:
    """Keep a record of a phase without steps, in the main process."""
    if is_main():
        job.record(phase, values)


def newest_step(checkpoints: Path) -> int:
    """How many steps the newest checkpoint in a folder is of; 0 where there is none."""
    found = [NAME.fullmatch(path.name) for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(match[1]) for match in found if match), default=0)


def _plan_path(job: Job, name: str) -> Path:
    return job.folder.phases / f"{name}.plan.json"
