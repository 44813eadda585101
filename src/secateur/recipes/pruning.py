"""Pruning as phases, by the recipe's schedule. Every cut is one, and so is every training between two of them.

    first, if asked   sensitivity (``trials.py``)
    one-shot          prune, compensate
    iterative         prune-1, compensate-1, train-1, prune-2, compensate-2, train-2, ... prune-n, compensate-n
    layer-by-layer    widths, then the same with a group in place of a step; some groups go without training behind them
    progressive       zero (the dense network trains, channels are zeroed), prune, compensate
    sparse            shrink (the dense network trains under a penalty), prune, compensate

Compensation makes up for one cut: it compares with the network right before it. What the recipe prunes ``beside`` the
rest, to compare criteria, starts from the same network as the one cut of ``one-shot``, and nothing goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from secateur.core import Budget
from secateur.criteria import needs_data
from secateur.errors import BadRequest, nearest
from secateur.graph import Graph, trace
from secateur.groups import couple
from secateur.pipeline import plan
from secateur.plans import Plan
from secateur.recipes import trials
from secateur.recipes.job import Facts, Job, Phase, Progress, evaluation, on_device, on_main
from secateur.recipes.networks import example_of
from secateur.recipes.schema import Compensate, Iterative, LayerByLayer, Progressive, Prune, Sparse
from secateur.recipes.stages import facts_of, keep_plan, keep_stage, note, open_plan, open_stage, train_
from secateur.recipes.turnovers import keep_turnovers, turnover_facts
from secateur.recover.compensation import compensate_
from secateur.recover.settings import Training
from secateur.report import Zeroed
from secateur.schedules import (
    Options,
    Start,
    Zeroing,
    growing_penalty,
    iterative_step,
    layer_step,
    layer_widths,
    zeroing,
)
from secateur.schedules.options import start_of
from secateur.surgery import apply, record

Decide = Callable[[Job, nn.Module], tuple[Plan, nn.Module]]
"""What a cut is: the plan, which speaks of the network it is given, and the smaller network."""

SMOKE_LAYERS = 2


def pruning_phases(job: Job, prune: Prune, before: str) -> Iterator[Phase]:
    """The phases from the network of phase ``before`` to the pruned one. To be asked for the next one only when the
    last is done: how many there are may depend on it."""
    if prune.sensitivity is not None:
        yield Phase(trials.PHASE, "measuring sensitivity", partial(trials.measure, before=before))
    schedule = prune.schedule
    cuts: Sequence[Decide] = [_cut_at_once]
    trainings: Sequence[Training | None] = [None]
    if isinstance(schedule, Iterative):
        steps = schedule.steps
        trainings = [schedule.training] * steps
        cuts = [partial(_cut_step, first=before, step=step, steps=steps) for step in range(steps)]
    elif isinstance(schedule, LayerByLayer):
        yield Phase("widths", "deciding widths", partial(_widths, before=before))
        widths = job.done["widths"]["widths"]
        cuts = [partial(_cut_layer, first=before, name=name, width=width) for name, width in widths.items()] or cuts
        trainings = [training_after(schedule, name) for name in widths]
    elif isinstance(schedule, (Progressive, Sparse)):
        name, title = ("zero", "zeroing") if isinstance(schedule, Progressive) else ("shrink", "shrinking")
        yield Phase(name, title, partial(_approach, name=name, before=before))
        cuts, before = [partial(_cut_as_planned, name=name)], name
    yield from _rounds(job, before, cuts, trainings)
    for criterion in prune.beside:
        act = partial(_beside, name=beside(criterion), criterion=criterion, before=before)
        yield Phase(beside(criterion), f"comparing {criterion}", act)


def beside(criterion: str) -> str:
    """The phase that prunes by a criterion to compare it."""
    return f"beside-{criterion}"


def training_after(schedule: LayerByLayer, name: str) -> Training | None:
    """What is trained after the cut of the group that was called ``name`` at the start; None for nothing."""
    if _fits(name, schedule.together):
        return None
    return next((training for glob, training in schedule.longer.items() if _fits(name, [glob])), schedule.training)


def _fits(name: str, globs: Iterable[str]) -> bool:
    return any(name == glob or fnmatchcase(name, glob) for glob in globs)


def last_of(job: Job, name: str) -> str:
    """The last phase of this name that is done, numbered or not; "" for none."""
    return next((each for each in reversed(job.done) if each == name or each.startswith(f"{name}-")), "")


def _rounds(job: Job, before: str, cuts: Sequence[Decide], trainings: Sequence[Training | None]) -> Iterator[Phase]:
    """Cut, compensate, train (each cut's own training; None: none), by turns; after the last cut comes no training:
    that is the finetune section's."""
    for number, decide in enumerate(cuts, 1):
        between = trainings[number - 1] if number < len(cuts) else None
        mark = f"-{number}" if len(cuts) > 1 else ""
        step = f" {number}/{len(cuts)}" if len(cuts) > 1 else ""
        cut = f"prune{mark}"
        yield Phase(cut, f"pruning{step}", partial(_cut, name=cut, before=before, decide=decide))
        after = cut
        if job.recipe.compensate is not None:
            after = f"compensate{mark}"
            yield Phase(after, f"compensating{step}", partial(_compensate, name=after, before=before, cut=cut))
        if between is not None:
            train = f"train{mark}"
            act = partial(_train, name=train, before=after, training=between)
            yield Phase(train, f"training {number}/{len(cuts)}", act)
            after = train
        before = after


def pruning_options(job: Job) -> Options:
    """What the recipe asks of ``plan``; where widths were found by trying, they are the ratios instead of a budget."""
    prune = job.recipe.prune
    assert prune is not None
    budget, ratios = prune.budget, prune.ratios
    if trials.PHASE in job.done:
        budget, ratios = None, job.done[trials.PHASE]["widths"]
    elif budget is None and ratios is None:
        budget = Budget(keep=0.5)
    return trials.evidence(job, prune.criterion) | Options(
        budget=budget,
        ratios=ratios,
        exclude=tuple(prune.exclude),
        allocation=prune.allocation,
        residual=prune.residual,
        constants=prune.constants,
        greedy=prune.greedy,
        prefer=prune.prefer,
        seed=job.seed("prune"),
    )


def foreseen(job: Job, graph: Graph) -> Plan:
    """What the recipe would cut of a network as it is now, before anything is trained or measured; of data a batch is
    looked at. Raises what is wrong with the recipe's names and numbers. All processes must call it."""
    prune = job.recipe.prune
    assert prune is not None
    options = pruning_options(job)
    if prune.sensitivity is not None:
        options["budget"], options["ratios"] = None, trials.foreseen_widths(job, graph, prune)
        if prune.sensitivity.criterion not in (None, prune.criterion):
            seen = trials.evidence(job, prune.sensitivity.criterion, batches=1)
            plan(graph, **(seen | Options(ratios=options["ratios"], residual=prune.residual)))
    _check_groups(graph, prune)
    for criterion in prune.beside:
        plan(graph, **(options | trials.evidence(job, criterion, batches=1)))
    if prune.per_class is not None:
        trials.evidence(job, prune.criterion)  # are there so many?
    if "data" in options:
        options["data"] = job.data.calibration.first(1)
    return plan(graph, **options)


def _check_groups(graph: Graph, prune: Prune) -> None:
    """Raises ``BadRequest`` for what a layer-by-layer schedule says of groups that are not there, and of one twice."""
    schedule = prune.schedule
    if not isinstance(schedule, LayerByLayer):
        return
    names = [group.name for group in couple(graph, prune.prefer, scatter=prune.residual == "scatter").groups]
    for key, globs in (("together", schedule.together), ("longer", schedule.longer)):
        for glob in globs:
            if not any(_fits(name, [glob]) for name in names):
                raise BadRequest(f"prune.schedule.{key}: no group is called {glob!r}{nearest(glob, names)}")
    both = [name for name in names if _fits(name, schedule.together) and _fits(name, schedule.longer)]
    if both:
        raise BadRequest(
            f"prune.schedule: after {both[0]!r} nothing is trained (together), and longer says what is\n"
            "  do: name each group in one of them"
        )


def _cut(job: Job, progress: Progress, *, name: str, before: str, decide: Decide) -> Facts:
    """Decided and done by the main process alone; all others read what it wrote. Statistics of data are sums over all
    processes, in which all must take part: then all decide the same, and the main one writes it."""
    assert job.recipe.prune is not None
    found = None
    if needs_data(job.recipe.prune.criterion):
        with on_device(open_stage(job, before), job.device) as model:
            found = decide(job, model)

    def act() -> Facts:
        decided, small = found or decide(job, open_stage(job, before))
        small.to("cpu")
        keep_plan(job, name, decided)
        keep_stage(job, name, small)
        applied = record(small)
        return {
            "channels": sum(group.channels for group in decided.groups),
            "kept": sum(len(kept) for kept in decided.keep.values()),
            "tier": applied.tier if applied else "",
            "difference": applied.difference if applied else None,
        }

    done = on_main(act)
    facts = {**done, **facts_of(job, open_stage(job, name))}
    note(job, name, facts)
    return facts


def _cut_at_once(job: Job, model: nn.Module) -> tuple[Plan, nn.Module]:
    graph = trace(model, example_of(job.origin, model))
    decided = plan(graph, **pruning_options(job))
    return decided, apply(graph, decided)


def _cut_as_planned(job: Job, model: nn.Module, *, name: str) -> tuple[Plan, nn.Module]:
    decided = open_plan(job, name)
    return decided, apply(model, decided)


def _cut_step(job: Job, model: nn.Module, *, first: str, step: int, steps: int) -> tuple[Plan, nn.Module]:
    example = example_of(job.origin, model)
    return iterative_step(model, example, start=_start(job, first), step=step, steps=steps, **pruning_options(job))


def _cut_layer(job: Job, model: nn.Module, *, first: str, name: str, width: int) -> tuple[Plan, nn.Module]:
    example = example_of(job.origin, model)
    return layer_step(model, example, start=_start(job, first), name=name, width=width, **pruning_options(job))


def _start(job: Job, first: str) -> Start:
    """What the steps need to know of the network that they began with: its structure alone."""
    if "start" not in job.memo:
        model = open_stage(job, first)
        job.memo["start"] = start_of(trace(model, example_of(job.origin, model)), pruning_options(job))
    return job.memo["start"]


def _widths(job: Job, progress: Progress, *, before: str) -> Facts:
    assert job.recipe.prune is not None

    def act() -> dict[str, int]:
        with on_device(open_stage(job, before), job.device) as model:
            return layer_widths(model, example_of(job.origin, model), **pruning_options(job))

    found = act() if needs_data(job.recipe.prune.criterion) else on_main(act)  # as in _cut
    return {"widths": dict(list(found.items())[:SMOKE_LAYERS]) if job.folder.smoke else found}


def _approach(job: Job, progress: Progress, *, name: str, before: str) -> Facts:
    """The dense network trains towards the cut; the plan of the cut is what the training ends with."""
    assert job.recipe.prune is not None
    schedule = job.recipe.prune.schedule
    model, options = open_stage(job, before), pruning_options(job)
    place = job.device if "data" in options else torch.device("cpu")  # where the choice is made
    example = example_of(job.origin, model.to(place))
    zeros: Zeroing | None = None
    if isinstance(schedule, Progressive):
        zeros = zeroing(
            model,
            example,
            every=schedule.every,
            grow=schedule.grow,
            soft=schedule.soft,
            exclude_zeroed=schedule.exclude_zeroed,
            **options,
        )
        if schedule.at_start:
            zeros.select_()
        hooks, finish = zeros.hooks, zeros.finish_
    else:
        assert isinstance(schedule, Sparse)
        penalty = growing_penalty(model, example, growth=schedule.penalty, **options)
        hooks, finish = penalty.hooks, penalty.plan
    facts = train_(job, name, model, schedule.training, progress, hooks=(hooks,))
    with on_device(model, place):
        decided = finish()
    zeroed = None if zeros is None else Zeroed(zeros.channels, zeros.history)

    def act() -> None:
        keep_plan(job, name, decided)
        keep_stage(job, name, model)
        if zeroed is not None:
            keep_turnovers(job.folder, zeroed)

    on_main(act)
    return facts if zeroed is None else facts | turnover_facts(zeroed)


def _compensate(job: Job, progress: Progress, *, name: str, before: str, cut: str) -> Facts:
    settings = job.recipe.compensate
    assert settings is not None
    model, small = open_stage(job, before).to(job.device), open_stage(job, cut).to(job.device)
    return _compensated(job, name, (small, model), open_plan(job, cut), settings)


def _beside(job: Job, progress: Progress, *, name: str, criterion: str, before: str) -> Facts:
    """The network of phase ``before`` pruned to the widths of the one cut, by ``criterion``, and recalibrated."""
    cut = open_plan(job, "prune")
    dense = {group.name: group.channels for group in cut.groups}
    widths = {group: len(kept) for group, kept in cut.keep.items() if len(kept) < dense[group]}
    options = pruning_options(job) | Options(budget=None, ratios=widths, greedy=False, data=None, loss=None)
    model = open_stage(job, before).to(job.device)
    graph = trace(model, example_of(job.origin, model))
    decided = plan(graph, **(options | trials.evidence(job, criterion)))
    small = apply(graph, decided).to(job.device)
    settings = job.recipe.compensate or Compensate()
    settings = settings.model_copy(update={"readers": "none", "batchnorm": True})
    return _compensated(job, name, (small, model), decided, settings)


def _compensated(job: Job, name: str, networks: tuple[nn.Module, nn.Module], cut: Plan, settings: Compensate) -> Facts:
    """Make up for ``cut`` in the first of the two networks, which came from the second by it, and keep it."""
    small, model = networks
    made = compensate_(
        small,
        model,
        cut,
        job.data.calibration.first(settings.batches),
        readers=settings.readers,
        batchnorm=settings.batchnorm,
        evaluate=evaluation(job),
    )
    small.to("cpu")
    on_main(lambda: keep_stage(job, name, small))
    steps = [
        {"step": step.name, "validation": step.accuracy, "changed": list(step.changed), "skipped": dict(step.skipped)}
        for step in made.steps
    ]
    facts = {"steps": steps, **facts_of(job, open_stage(job, name))}
    for step in steps:
        note(job, name, {"kind": "compensation", "what": step["step"], "validation": step["validation"]})
    return facts


def _train(job: Job, progress: Progress, *, name: str, before: str, training: Training) -> Facts:
    model = open_stage(job, before)
    facts = train_(job, name, model, training, progress)
    on_main(lambda: keep_stage(job, name, model))
    return facts
