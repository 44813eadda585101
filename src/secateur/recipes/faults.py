"""What contradicts itself in a recipe whose sections are right each for themselves: where, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise

from secateur.allocation import check_budget
from secateur.core import Budget
from secateur.criteria import CRITERIA
from secateur.engines import ENGINES
from secateur.errors import BadRequest, nearest
from secateur.recipes.schema import (
    ALL,
    RANDOM,
    Iterative,
    LayerByLayer,
    Measure,
    OneShot,
    Progressive,
    Prune,
    Recipe,
    Sensitivity,
    Sparse,
    Where,
    is_folder,
    trainings,
)
from secateur.recover.settings import Training, check_training
from secateur.zoo.data.settings import DataSettings, check_settings


def faults(recipe: Recipe) -> Iterator[tuple[Where, str]]:
    """What is wrong with ``recipe``, one fault after the other: its place, and the text for it."""
    yield from _faults_of_start(recipe)
    for where, training in trainings(recipe):
        yield from _raised(where, training, partial(check_training, training))
    yield from _raised(("data",), recipe.data, partial(check_settings, recipe.data))
    if recipe.prune is not None:
        yield from _faults_of_pruning(recipe.prune)
        if recipe.prune.sensitivity is not None:
            yield from _faults_of_sensitivity(recipe.prune, recipe.prune.sensitivity, recipe.data)
    elif recipe.compensate is not None:
        yield ("compensate",), "there is nothing to make up for: the recipe has no prune section"
    elif recipe.scratch != "none" and not is_folder(recipe.model.name):
        yield ("scratch",), "there is no pruned architecture to train from scratch: the recipe has no prune section"
    yield from _faults_of_measuring(recipe.measure)
    making_up = recipe.compensate is not None and recipe.compensate.readers != "none"
    if recipe.prune is not None and making_up and _folds(recipe.prune):
        yield (
            ("compensate", "readers"),
            "constants that are folded into the readers leave nothing to make up for: write none, or drop them in "
            "prune.constants",
        )
    if recipe.distil is not None and recipe.finetune is None:
        yield ("distil",), "distillation happens while fine-tuning: add a finetune section"
    if recipe.distil is not None and recipe.distil.teacher is None and is_folder(recipe.model.name):
        yield ("distil",), "a saved folder has no trained dense network to learn from: name a teacher with its weights"
    if (
        recipe.distil is not None
        and recipe.distil.features
        and recipe.prune is None
        and not is_folder(recipe.model.name)
    ):
        yield (
            ("distil", "features"),
            "feature maps are compared on the channels that pruning kept: add a prune section, or leave this out",
        )


def _raised(where: Where, settings: Training | DataSettings, check: Callable[[], None]) -> Iterator[tuple[Where, str]]:
    """What a check of the section itself raises, at the key that it names."""
    try:
        check()
    except BadRequest as error:
        text = str(error).replace("\n  do: ", ": ")
        named = next((key for key in vars(settings) if f"{key}=" in text), None)
        yield (*where, named) if named else where, text


def _faults_of_start(recipe: Recipe) -> Iterator[tuple[Where, str]]:
    model = recipe.model
    if is_folder(model.name):
        if model.head != "own":
            yield ("model", "head"), "a saved folder has the head that it was saved with: leave this out"
        if model.weights is not None:
            yield ("model", "weights"), "a saved folder has its own weights: leave this out"
        if recipe.train is not None:
            yield ("train",), "a saved folder is trained already: call the section finetune"
        return
    if model.base is not None:
        yield ("model", "base"), f"this is for a saved folder, and {model.name!r} is none"
    if model.weights is None and recipe.train is None:
        yield (
            ("model",),
            "the network would have random weights: give a file as weights, or a train section, or say "
            f"weights: {RANDOM} if that is what you want",
        )


def _faults_of_measuring(measure: Measure) -> Iterator[tuple[Where, str]]:
    place = ("measure", "engine")
    if measure.engine == ALL:
        return
    asked = [measure.engine] if isinstance(measure.engine, str) else measure.engine
    if not asked:
        yield place, f"an empty list: name an engine, or say {ALL}, or latency: false"
    for number, engine in enumerate(asked):
        where = place if isinstance(measure.engine, str) else (*place, number)
        if engine == ALL:
            yield where, f"{ALL} is for all engines, and others are named beside it: write engine: {ALL}"
        elif engine not in ENGINES:
            yield where, f"there is no engine {engine!r}{nearest(engine, ENGINES)}"
        elif engine in asked[:number]:
            yield where, f"{engine!r} is there already"


def _faults_of_budget(prune: Prune, budget: Budget) -> Iterator[tuple[Where, str]]:
    """Of a budget that says how much."""
    place = ("prune", "budget")
    try:
        check_budget(budget)
    except BadRequest as error:
        yield place, str(error).partition("\n")[0]
        return
    if budget.engine is not None and budget.engine not in ENGINES:
        yield (*place, "engine"), f"there is no engine {budget.engine!r}{nearest(budget.engine, ENGINES)}"
    if budget.of == "memory" and prune.residual == "scatter":
        yield place, "memory is not foreseen where branches are scattered: leave residual out, or ask for macs"
    if budget.of == "memory" and prune.constants != "drop":
        yield place, "memory is not foreseen where constants are folded: leave constants out, or ask for macs"


def _faults_of_pruning(prune: Prune) -> Iterator[tuple[Where, str]]:
    if prune.criterion not in CRITERIA:
        yield ("prune", "criterion"), f"there is no criterion {prune.criterion!r}{nearest(prune.criterion, CRITERIA)}"
    budget = prune.budget
    if budget is not None and (budget.keep is None) == (budget.at_most is None):
        yield ("prune", "budget"), "give one of keep (a fraction) and at_most (an absolute cost)"
    if budget is not None and budget.keep is not None and not 0 < budget.keep <= 1:
        yield (
            ("prune", "budget", "keep"),
            f"a fraction of the dense cost, above 0 and at most 1, not {budget.keep}",
        )
    elif budget is not None and (budget.keep is None) != (budget.at_most is None):
        yield from _faults_of_budget(prune, budget)
    if budget is not None and isinstance(prune.ratios, (int, float)):
        yield (
            ("prune", "ratios"),
            "one ratio fixes every group, which leaves nothing to meet the budget: give one of them",
        )
    by_glob = prune.ratios.values() if isinstance(prune.ratios, Mapping) else [prune.ratios or 0.0]
    for ratio in by_glob:
        if ratio < 0 or (isinstance(ratio, float) and ratio >= 1):
            yield ("prune", "ratios"), f"{ratio} is neither a fraction to remove, in [0, 1), nor a width"
    for place, criterion in enumerate(prune.beside):
        if criterion not in CRITERIA:
            yield ("prune", "beside", place), f"there is no criterion {criterion!r}{nearest(criterion, CRITERIA)}"
        elif criterion in prune.beside[:place]:
            yield ("prune", "beside", place), f"{criterion!r} is there already"
    schedule = prune.schedule
    if prune.beside and not isinstance(schedule, OneShot):
        yield ("prune", "beside"), "criteria are compared where all is cut at once: take the schedule one-shot"
    if isinstance(schedule, (Progressive, Sparse)) and schedule.training.keep == "best":
        undone = "zeroing" if isinstance(schedule, Progressive) else "penalty"
        yield (
            ("prune", "schedule", "training", "keep"),
            f"the best epoch is mostly one from before the {undone} was there in full, and its weights would undo the "
            f"{undone}: write keep: last",
        )
    if isinstance(schedule, (Iterative, LayerByLayer)):
        yield from _faults_of_several_cuts(prune)


def _folds(prune: Prune) -> bool:
    """Whether any constants are folded."""
    constants = prune.constants
    return "fold" in ([constants] if isinstance(constants, str) else constants.values())


def _faults_of_several_cuts(prune: Prune) -> Iterator[tuple[Where, str]]:
    """What only one cut can do: modules that it has rewired are not cut once more."""
    if _folds(prune):
        yield (
            ("prune", "constants"),
            "what one cut folds into a layer is in the way of the cut of that layer: drop constants, or cut once",
        )
    if prune.residual == "scatter" and isinstance(prune.schedule, Iterative):
        yield (
            ("prune", "residual"),
            "the end of a branch that one cut has rewired is not cut once more: take inner, or cut once",
        )


def _faults_of_sensitivity(prune: Prune, asked: Sensitivity, data: DataSettings) -> Iterator[tuple[Where, str]]:
    place = ("prune", "sensitivity")
    criterion, ratios = asked.criterion, asked.ratios
    if criterion is not None and criterion not in CRITERIA:
        yield (*place, "criterion"), f"there is no criterion {criterion!r}{nearest(criterion, CRITERIA)}"
    if not ratios or not all(0 < ratio < 1 for ratio in ratios) or any(a >= b for a, b in pairwise(ratios)):
        yield (*place, "ratios"), f"fractions to remove, between 0 and 1 and ascending, not {list(ratios)}"
    if not data.validation:
        yield place, "it is measured on validation images, and data.validation holds none out"
    if isinstance(prune.ratios, (int, float)):
        yield (
            ("prune", "ratios"),
            "one ratio fixes every group, which leaves nothing to find by trying: give one of them",
        )
    if prune.ratios is not None and prune.budget is None and asked.tolerance is None:
        yield place, "the ratios say all that goes, and nothing is left to find: add a budget, or a tolerance"
    if prune.residual == "scatter":
        yield (
            ("prune", "residual"),
            "what a branch bears that is pruned on its own is not tried out: take another rule, or give ratios",
        )
    if prune.allocation == "uniform":
        yield ("prune", "allocation"), "what is found by trying differs from group to group: leave uniform out"
    if prune.prefer == "module":
        yield ("prune", "prefer"), "groups are tried as they are coupled, halves of splits one by one: leave module out"
    if asked.tolerance is None and asked.per == "stage":
        yield (*place, "per"), "one ratio a stage follows from a tolerance, and there is none"
    if asked.tolerance is not None and prune.budget is not None:
        yield (*place, "tolerance"), "a tolerance says how much goes, and so does the budget: give one of them"
