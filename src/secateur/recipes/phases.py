"""The phases of a run, in their order: each reads what the ones before have written, and writes what it makes.

    dense (or given)  ->  cuts, with compensation and training between (``pruning.py``)  ->  finetune  ->  scratch
    ->  quantise (``quantising.py``)  ->  measure  ->  save  ->  export (``results.py``)  ->  report (``reports.py``)

What a phase hands on is read back from the disk also where nothing interrupts the run, so that there is one way only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import nn

from secateur import artifact
from secateur.counting import count
from secateur.errors import BadRequest
from secateur.recipes import quantising, reports, results
from secateur.recipes.job import Facts, Job, Phase, Progress, on_main
from secateur.recipes.networks import (
    check_fits,
    example_of,
    first_network,
    teacher_network,
    unlearned_network,
)
from secateur.recipes.pruning import beside, last_of, pruning_phases
from secateur.recipes.schema import RANDOM, Recipe, trainings
from secateur.recipes.stages import facts_of, keep_stage, open_stage, stage_path, train_
from secateur.recover.distillation import distil
from secateur.recover.objectives import Objective
from secateur.recover.settings import Training

APPROACHED = {"zero": "zeroed", "shrink": "shrunk"}
"""What the dense network is called that a schedule has trained towards its cut, by phase."""
HEAD_BATCHES = 64
"""Of calibration images, to fit a pooled head on."""


def phases_of(job: Job) -> Iterator[Phase]:
    """All phases of the run. To be asked for the next one only when the last is done."""
    recipe = job.recipe
    first = "given" if job.origin.given is not None else "dense"
    titles = {"given": "opening", "dense": "opening dense"}
    yield Phase(first, "training dense" if recipe.train else titles[first], partial(_first, name=first))
    rivals: list[tuple[str, str]] = []
    untrained = recipe.model.weights == RANDOM and recipe.train is None
    networks = [("as given" if first == "given" else "untrained" if untrained else "dense", first)]
    pruned = first
    if recipe.prune is not None:
        yield from pruning_phases(job, recipe.prune, first)
        pruned = last_of(job, "prune")
        networks += [(APPROACHED[name], name) for name in APPROACHED if name in job.done]
        networks += [("pruned", pruned)]
        networks += [("compensated", last_of(job, "compensate"))] if recipe.compensate is not None else []
        rivals = [(f"{criterion}, recalibrated", beside(criterion)) for criterion in recipe.prune.beside]
    before_training = len(networks)
    if recipe.finetune is not None:
        act = partial(_finetune, before=networks[-1][1], dense=first)
        yield Phase("finetune", "distilling" if recipe.distil else "fine-tuning", act)
        networks += [("fine-tuned", "finetune")]
    name, final = networks[-1]
    if recipe.scratch != "none":
        yield Phase("scratch", "training from scratch", partial(_scratch, pruned=pruned))
        networks += [("from scratch", "scratch")]
    if recipe.quantise is not None:
        both = list(dict.fromkeys([networks[0], (name, final)]))
        yield Phase(quantising.PHASE, "quantising", partial(quantising.quantise, networks=both))
    shown = [*networks[:before_training], *rivals, *networks[before_training:]]
    yield Phase("measure", "measuring", partial(results.measure, networks=shown))
    yield Phase("save", "saving", partial(results.save, name=name, final=final))
    if recipe.export.onnx:
        yield Phase("export", "exporting", partial(results.export, final=final))
    if recipe.export.report:
        yield Phase("report", "reporting", partial(reports.report, dense=first, final=final, name=name))


def _first(job: Job, progress: Progress, *, name: str) -> Facts:
    seen = job.data.calibration.first(HEAD_BATCHES) if job.recipe.train is None else None
    model = first_network(job.origin, seen)
    if job.recipe.train is None:
        facts = facts_of(job, model)
    else:
        facts = train_(job, name, model, job.recipe.train, progress)
    on_main(lambda: keep_stage(job, name, model))
    return facts


def _finetune(job: Job, progress: Progress, *, before: str, dense: str) -> Facts:
    training, settings = job.recipe.finetune, job.recipe.distil
    assert training is not None
    model = open_stage(job, before)
    objective = None
    if settings is not None:
        objective = distillation(job, open_stage(job, dense) if settings.teacher is None else open_teacher(job))
    facts = train_(job, "finetune", model, training, progress, objective=objective)
    on_main(lambda: keep_stage(job, "finetune", model))
    return facts


def open_teacher(job: Job) -> nn.Module:
    """The teacher that the recipe names. Raises BadRequest for one that does not know the data's classes, and what
    loading its weights raises."""
    assert job.recipe.distil is not None
    teacher = job.recipe.distil.teacher
    assert teacher is not None
    network = teacher_network(job.origin, teacher)
    check_fits(job.origin, network, len(job.data.classes), job.data.name, teacher=teacher)
    return network


def distillation(job: Job, teacher: nn.Module) -> Objective:
    """What fine-tuning minimises, as the recipe has it."""
    settings, training = job.recipe.distil, job.recipe.finetune
    assert settings is not None
    assert training is not None
    return distil(
        teacher,
        temperature=settings.temperature,
        weight=settings.weight,
        features=settings.features,
        label_smoothing=training.label_smoothing,
    )


def _scratch(job: Job, progress: Progress, *, pruned: str) -> Facts:
    """The control: the pruned architecture, from weights that nothing has touched, trained as long as the run was.

    ``epochs``: as many epochs as all training of this run took together: that of the dense network (if this run did it:
    what came with loaded weights is not known, and not counted), between the cuts, and the fine-tuning. ``compute``: as
    many epochs as cost the same multiply-adds: the sum of epochs x MACs of the network that they trained, over the MACs
    of the small one, rounded. Both see equally many images an epoch. The settings are those of ``train``, or of
    ``finetune`` where there is none, with that number of epochs and no rewinding (after Liu et al., "Rethinking the
    value of network pruning", ICLR 2019: scratch-E and scratch-B, whose budget is the dense training's alone).
    """
    trained = [facts for facts in job.done.values() if "epochs" in facts]
    plan = artifact.read_plan(stage_path(job, pruned))
    model = unlearned_network(job.origin, plan, job.seed("scratch weights"))
    epochs = sum(facts["epochs"] for facts in trained)
    if job.recipe.scratch == "compute":
        small = int(count(model, example_of(job.origin, model)).macs)
        epochs = max(1, round(sum(facts["epochs"] * facts["macs"] for facts in trained) / small))
    training = replace(scratch_settings(job.recipe), epochs=1 if job.folder.smoke else epochs, rewind=None)
    facts = train_(job, "scratch", model, training, progress)
    on_main(lambda: keep_stage(job, "scratch", model))
    return facts


def scratch_settings(recipe: Recipe) -> Training:
    """How the control is trained: as the dense network was, or as the pruned one is. Raises BadRequest for neither."""
    found = {where[0]: training for where, training in trainings(recipe)}
    for section in ("train", "finetune", "prune"):
        if section in found:
            return found[section]
    raise BadRequest("scratch: nothing in the recipe trains, so that there is no training to repeat")
