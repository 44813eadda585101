"""A recipe carried out: its phases in order, each only if it is not done yet, in a folder that one run owns.

Killed at any moment, the same call goes on from what is whole in the folder, and on the CPU in one process ends with
the same weights, bit for bit. In several processes (``torchrun``) all of them call it; the main one writes and speaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError, WrongModel
from secateur.graph import trace
from secateur.processes import from_main, is_main, wait_for_all, world
from secateur.recipes import folder as folders
from secateur.recipes.folder import RunFolder
from secateur.recipes.job import SILENT, Facts, Job, Phase, Tell, derived_seed, on_main
from secateur.recipes.metrics import keep_metrics, recorder
from secateur.recipes.networks import check_fits, check_teacher, example_of, first_network, origin_of
from secateur.recipes.phases import distillation, open_teacher, phases_of, scratch_settings
from secateur.recipes.pruning import foreseen
from secateur.recipes.quantising import check_excluded
from secateur.recipes.reading import write_recipe
from secateur.recipes.results import check_extras, read_results, read_rows
from secateur.recipes.schema import RANDOM, Iterative, LayerByLayer, Progressive, Recipe, absolute, is_folder
from secateur.recipes.stages import newest_step
from secateur.recipes.trials import open_curves
from secateur.recover.accelerated import join_processes
from secateur.recover.settings import Training
from secateur.report import Row, environment
from secateur.sensitivities import Sensitivity
from secateur.surgery import apply
from secateur.zoo.data import Data, DataSettings, open_data

SMOKE_BATCHES, SMOKE_STEPS = 2, 2


@dataclass(frozen=True)
class Outcome:
    """What a run came to. ``rows``: its networks, the dense one first, with their accuracy on the test images.
    ``threads``: how many the latencies were taken on. ``sensitivity``: where the widths were found by trying, what was
    found. ``again``: it was finished before, and this is what it came to then."""

    folder: Path
    rows: tuple[Row, ...]
    threads: int = 1
    test_images: int = 0
    sensitivity: Sensitivity | None = None
    again: bool = False


def run_recipe(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    smoke: bool = False,
    tell: Tell = SILENT,
    allow_import: bool = False,
    cpu: bool = False,
) -> Outcome:
    """Carry out ``recipe`` in ``folder`` (see ``secateur.recipes.folder`` for what is in it), or go on with it there.

    ``smoke``: all phases on a few batches and one epoch each, to see that they work. ``allow_import``: the recipe may
    name code of its own. ``cpu``: stay there even if there is a GPU.

    Raises BadArtifact for a folder that is another run's, in use, or cannot be written; BadRequest for a recipe that
    does not fit its data; what the phases raise; KeyboardInterrupt, after a checkpoint.
    """
    join_processes(cpu=cpu)
    recipe = resolved(recipe)
    place = RunFolder(Path(folder).expanduser().resolve(), smoke)
    state = on_main(lambda: folders.own_state(place, recipe))
    if state is not None and state.get("finished"):
        return on_main(lambda: dataclasses.replace(_outcome(place), again=True))
    job = _prepared(recipe, place, tell, allow_import=allow_import, cpu=cpu)
    if state is None:
        _check_start(job)
    with ExitStack() as stack:
        on_main(lambda: _begin(stack, job, recipe))
        record, close = recorder(place)
        stack.callback(close)
        done = on_main(lambda: folders.done_phases(place))
        job = dataclasses.replace(job, record=record, done=done)
        stack.enter_context(_logged(job))
        _run(job, stack.enter_context(_listening()))
        return on_main(lambda: _outcome(place))


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with paths that do not depend on the current folder. Where the data have no ``root``, there is none to
    resolve: they are looked for where the system keeps them, too."""
    model = recipe.model
    recipe = recipe.model_copy(update={"data": _resolved_data(recipe.data)})
    if is_folder(model.name):
        model = model.model_copy(update={"name": absolute(model.name)})
    elif model.weights not in (None, RANDOM):
        model = model.model_copy(update={"weights": absolute(str(model.weights))})
    recipe = recipe.model_copy(update={"model": model})
    if recipe.distil is not None and recipe.distil.teacher is not None:
        teacher = recipe.distil.teacher
        teacher = teacher.model_copy(update={"weights": absolute(teacher.weights)})
        recipe = recipe.model_copy(update={"distil": recipe.distil.model_copy(update={"teacher": teacher})})
    return recipe


def _resolved_data(data: DataSettings) -> DataSettings:
    root = None if data.root is None else absolute(str(data.root))
    form, colon, written = data.name.partition(":")
    if form != "folder" or not written:
        return dataclasses.replace(data, root=root)
    path = Path(written).expanduser()
    return dataclasses.replace(data, root=root, name=form + colon + absolute(str(Path(root or "") / path)))


def smoked(recipe: Recipe) -> Recipe:
    """The same phases with one epoch in each, in as few steps as show that they work."""

    def short(training: Training | None) -> Training | None:
        if training is None:
            return None
        return dataclasses.replace(training, epochs=1, rewind=None, warmup=min(training.warmup, 1.0), accumulate=1)

    changes: dict[str, Any] = {"train": short(recipe.train), "finetune": short(recipe.finetune)}
    if recipe.prune is not None:
        schedule = recipe.prune.schedule
        update: dict[str, Any] = {}
        if hasattr(schedule, "training"):
            update["training"] = short(schedule.training)
        if isinstance(schedule, Iterative):
            update["steps"] = min(schedule.steps, SMOKE_STEPS)
        if isinstance(schedule, LayerByLayer):
            update["longer"] = {glob: short(training) for glob, training in schedule.longer.items()}
        if isinstance(schedule, Progressive):
            update |= {"every": 1, "grow": min(schedule.grow, 1)}
        few: dict[str, Any] = {"schedule": schedule.model_copy(update=update), "calibration": 1, "per_class": None}
        asked = recipe.prune.sensitivity
        if asked is not None:
            ends = tuple(dict.fromkeys((asked.ratios[0], asked.ratios[-1])))
            few["sensitivity"] = asked.model_copy(update={"ratios": ends, "batches": 1})
        changes["prune"] = recipe.prune.model_copy(update=few)
    if recipe.compensate is not None:
        changes["compensate"] = recipe.compensate.model_copy(update={"batches": 1})
    if recipe.quantise is not None:
        changes["quantise"] = recipe.quantise.model_copy(update={"batches": 1})
    return recipe.model_copy(update=changes)


def _prepared(recipe: Recipe, place: RunFolder, tell: Tell, *, allow_import: bool, cpu: bool) -> Job:
    """What the phases need; nothing is written yet."""
    check_extras(recipe)
    if recipe.scratch != "none":
        scratch_settings(recipe)
    seed = recipe.seed
    data = open_data(recipe.data, seed=derived_seed(seed, "data"), allow_import=allow_import)
    origin = origin_of(recipe.model, data.shape, seed=derived_seed(seed, "weights"), allow_import=allow_import)
    if recipe.distil is not None and recipe.distil.teacher is not None:
        check_teacher(recipe.distil.teacher, allow_import=allow_import)
    if place.smoke:
        recipe, data = smoked(recipe), _few(data)
    return Job(recipe, place, data, origin, tell, _no_record, cpu=cpu)


def _check_start(job: Job) -> None:
    """What is wrong with the recipe's files, names and numbers should show now and not after hours of training."""
    model = first_network(job.origin)
    check_fits(job.origin, model, len(job.data.classes), job.data.name)
    check_excluded(job, model)
    student, settings = model, job.recipe.distil
    if job.recipe.prune is not None:
        graph = trace(model, example_of(job.origin, model))
        decided = foreseen(job, graph)
        if settings is not None and settings.features:
            student = apply(graph, decided)
    if settings is not None:
        teacher = model if settings.teacher is None else open_teacher(job)
        if settings.features:
            _check_maps(job, teacher, student)


def _check_maps(job: Job, teacher: nn.Module, student: nn.Module) -> None:
    """Raises what distilling feature maps would. ``student``: the first network, cut as the recipe would cut it now;
    what is cut in the end has other channels, but the same modules."""
    inputs = example_of(job.origin, student)
    try:
        with torch.no_grad():
            distillation(job, teacher)(student.eval(), inputs, torch.zeros(len(inputs[0]), dtype=torch.int64))
    except WrongModel as error:
        raise WrongModel(
            f"distil.features: the teacher's feature maps are not those of the network that is pruned: {error}\n"
            "  do: name a teacher of the same architecture, or set features to 0"
        ) from error


def _begin(stack: ExitStack, job: Job, recipe: Recipe) -> None:
    """The folder is ours from here on, and says so before it holds anything else."""
    stack.enter_context(folders.locked(job.folder, recipe))
    place = job.folder.path
    if folders.read_state(job.folder) is None:
        folders.begin(job.folder, recipe)
    if not (place / folders.RECIPE).exists():
        folders.write_whole(place / folders.RECIPE, write_recipe(recipe).encode())
    folders.add_session(
        job.folder,
        seeds={"recipe": recipe.seed, **{name: job.seed(name) for name in ("data", "weights", "prune")}},
        session={
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": " ".join(["secateur", *sys.argv[1:]]),
            "processes": world(),
            "device": str(job.device),
            **environment(),
        },
    )


def _run(job: Job, heard: Callable[[], None]) -> None:
    fresh = True
    for phase in phases_of(job):
        heard()
        if phase.name in job.done:
            job.say(f"{phase.title}: done before")
            continue
        if fresh:
            on_main(partial(_forget, job, phase))
            fresh = False
        started = time.perf_counter()
        facts = _carry_out(job, phase)
        on_main(partial(folders.mark_done, job.folder, phase.name, facts, time.perf_counter() - started))
        job.done[phase.name] = facts
        job.say(f"{phase.title}: {_summary(facts)}")
    on_main(lambda: folders.finish(job.folder))


def _forget(job: Job, phase: Phase) -> None:
    """What an interrupted run has recorded of ``phase`` beyond its checkpoint will be recorded again."""
    keep_metrics(job.folder, job.done, phase.name, newest_step(job.folder.checkpoints(phase.name)))


def _carry_out(job: Job, phase: Phase) -> Facts:
    """The main process's facts, in every process."""
    if is_main():
        folders.log(job.folder, f"{phase.title} ...")
    shown = job.tell.phase(phase.title) if is_main() else SILENT.phase(phase.title)
    cuda = [] if job.device.type == "cpu" else [job.device]
    with shown as progress, torch.random.fork_rng(devices=cuda):
        torch.manual_seed(job.seed(phase.name))
        facts = phase.act(job, progress)
    wait_for_all()
    return from_main(facts)


def _summary(facts: Facts) -> str:
    told = []
    if "tried" in facts:
        told.append(f"{facts['narrower']} of {facts['tried']} groups get narrower")
    if "kept" in facts:
        told.append(f"{facts['kept']} of {facts['channels']} channels stay")
    if facts.get("validation") is not None:
        told.append(f"{100 * facts['validation']:.2f} % of the validation images right")
    for name, one in facts.get("networks", {}).items():
        told.append(f"{name}: {100 * one['agreement']:.2f} % of {one['images']} images as in float32")
    for step in facts.get("steps", ()):
        if step["validation"] is not None:
            what = "as it came" if step["step"] == "none" else f"after {step['step']}"
            told.append(f"{100 * step['validation']:.2f} % {what}")
    return ", ".join(told) or "done"


@contextlib.contextmanager
def _logged(job: Job) -> Iterator[None]:
    """How it ended stands in the log, too."""
    try:
        yield
    except (KeyboardInterrupt, SecateurError) as error:
        if is_main():
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
            with contextlib.suppress(SecateurError):  # the disk may be what is wrong
                folders.log(job.folder, text)
        raise


@contextlib.contextmanager
def _listening() -> Iterator[Callable[[], None]]:
    """Ctrl-C interrupts at once, as ever. Where that gets lost (in a callback whose errors are ignored, as capturing a
    network has some), what this gives raises KeyboardInterrupt when it is called next."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def heard() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def _few(data: Data) -> Data:
    """A few batches of every part."""
    parts = {name: getattr(data, name) for name in ("train", "validation", "test", "calibration")}
    few = {name: part.first(SMOKE_BATCHES) if len(part) else part for name, part in parts.items()}
    return dataclasses.replace(data, **few)


def _outcome(place: RunFolder) -> Outcome:
    found = read_results(place)
    return Outcome(place.path, tuple(read_rows(found)), found["threads"], found["test_images"], open_curves(place))


def _no_record(phase: str, values: Mapping[str, Any]) -> None:
    """Before the folder is ours."""
