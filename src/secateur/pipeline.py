"""The whole flow in one function: capture, groups, calibration, scores, kept counts, plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import lcm
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from secateur.allocation import allocate, check_budget, excluded_groups, fixed_widths, highest
from secateur.calibration import Loss, collect
from secateur.core import Budget, Criterion, Group
from secateur.costs import Cost, evaluate_many
from secateur.criteria import CRITERIA, check_given, is_sequential, label, locations, needs_width, reads, resolve
from secateur.errors import BadRequest, WrongModel, nearest
from secateur.graph import Graph, Inputs, trace
from secateur.groups import Coupling, Prefer, couple
from secateur.latencies import Latencies, decide_within
from secateur.layer_weights import as_read
from secateur.liveness import memory_of
from secateur.operations import costs_of
from secateur.plans import CONSTANTS, Constant, Plan, fingerprint, input_specs
from secateur.residuals import RULES, kept_whole, scored_by_projection
from secateur.scores import score
from secateur.selection import front_to_back
from secateur.sensitivities import Sensitivity
from secateur.sensitivities.choice import losses
from secateur.sequential import KINDS, front_to_back_on_data
from secateur.version import __version__

Keep = dict[str, tuple[int, ...]]
Residual = Literal["coupled", "inner", "projection", "scatter"]
Constants = Literal["drop", "fold"] | Mapping[str, Literal["drop", "fold"]]


def plan(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    criterion: str | Criterion = "l1",
    budget: Budget | None = None,
    ratios: float | Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
    allocation: Literal["global", "uniform"] = "global",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    residual: Residual = "coupled",
    constants: Constants = "drop",
    greedy: bool = False,
    sensitivity: Sensitivity | None = None,
    latencies: Latencies | None = None,
    prefer: Prefer = "channels",
    min_channels: int = 1,
    round_to: int = 1,
    seed: int = 0,
) -> Plan:
    """Decide which channels of ``model`` stay. Nothing of the model is changed.

    ``budget`` says what the result may cost, ``ratios`` what fraction of which groups goes (or an absolute width); with
    both, ``ratios`` fixes the groups that it names and the rest meets the budget. ``exclude``: names or globs of groups
    that stay whole; they are neither scored nor measured. ``allocation``: ``"global"`` compares normalised scores per
    cost over the whole network, ``"uniform"`` takes the same fraction everywhere. With ``sensitivity``, the budget is
    met with the least predicted loss instead; it may be of another criterion, which then says how many channels of a
    group go, and ``criterion`` which. ``prefer="module"`` keeps the halves of even splits equal, so that more
    networks stay plain modules of their own classes.

    ``data``: calibration batches, of inputs or of ``(inputs, targets)``, for criteria that look at activations or
    gradients; the latter need ``loss``, a function of outputs and targets, too. Criteria that look at weights only do
    not read them.

    ``residual``: ``"coupled"`` prunes all that is added up together; ``"inner"`` only what is added to nothing;
    ``"projection"`` scores a residual stream by its shortcut projection alone, and leaves whole one that has none (Li
    et al. 2017, section 3.4; see ``residuals.py``); ``"scatter"`` prunes each layer that adds to a stream on its own,
    and adds what is left of it into the full width (He et al. 2019, FPGM). ``latencies``: what a budget of latency goes
    by, where it was measured before (``measure_latencies``), maybe on another machine; if not given, it is measured
    here and now, and kept for the next time, and so is the network that is decided on, until what was predicted holds.
    Widths are then multiples of what the engine is fast at. ``constants``: what becomes of the constant
    that a channel leaves behind its batch norm when its filter is zero; ``"drop"``: it goes too, ``"fold"``: it is kept
    in what reads it, so that the small network equals the one with zeroed filters (``folding.py``); or either by name
    or glob of groups, the first that fits. ``greedy``: which channels go is decided front to back, with the
    weights of what is gone already left out (Li et al. 2017, section 3.3; see ``selection.py`` for what that means to
    criteria other than norms; those that look at what the next layers put out see it measured anew for each group,
    ``sequential.py``; ``"thinet_sequential"`` is always greedy). How many go is not affected by it.

    Raises ``CannotCapture``, ``BadRequest``, ``Unreachable``, ``CannotPrune`` or ``WrongModel`` (a sensitivity, or
    latencies, of another network), each with what to do about it; for a budget of latency, what ``measure_latencies``
    raises.
    """
    how = _Request(criterion, budget, ratios, exclude, allocation, data, loss, residual, constants, greedy, sensitivity)
    how = replace(how, latencies=latencies, prefer=prefer, min_channels=min_channels, round_to=round_to, seed=seed)
    _check(how)
    return _decide(trace(model, example_inputs), how)


def widths(graph: Graph, **options: Any) -> dict[str, int]:
    """How many channels of each group ``plan(graph, **options)`` keeps. Where ratios alone say so, nothing is measured.

    Raises what ``plan`` does, but for what is wrong with data that are not looked at.
    """
    how = _Request(**options)
    _check(how)
    kept, _, _ = _allocated(_opened(graph, how), how, measure=how.budget is not None)
    return _counts(kept)


@dataclass(frozen=True, eq=False)
class _Request:
    """The options of ``plan``."""

    criterion: str | Criterion = "l1"
    budget: Budget | None = None
    ratios: float | Mapping[str, float] | None = None
    exclude: str | Sequence[str] = ()
    allocation: str = "global"
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    residual: Residual = "coupled"
    constants: Constants = "drop"
    greedy: bool = False
    sensitivity: Sensitivity | None = None
    latencies: Latencies | None = None
    prefer: Prefer = "channels"
    min_channels: int = 1
    round_to: int = 1
    seed: int = 0


def _decide(graph: Graph, how: _Request) -> Plan:
    coupling = _opened(graph, how)
    by_turns = how.greedy or is_sequential(how.criterion)
    anew = by_turns and not set(KINDS).isdisjoint(reads(how.criterion))  # measured when a group has its turn
    keep, told, evidence = _allocated(coupling, how, measure=how.budget is not None or not anew)
    if by_turns:
        judged = {group.name: group for group in _judged(coupling, how)}
        counts = _counts(keep)
        if anew:
            assert how.data is not None
            keep = front_to_back_on_data(
                coupling, judged, counts, how.criterion, how.data, loss=how.loss, seed=how.seed, evidence=evidence
            )
        else:
            keep = front_to_back(coupling, judged, counts, how.criterion, seed=how.seed, evidence=evidence)
    return Plan(
        groups=coupling.groups,
        keep=keep,
        model=fingerprint(graph.model),
        inputs=input_specs(graph.args, graph.kwargs),
        made_by=_made_by(how) | _memory_of(coupling, how, keep) | told,
        constants=folded_groups(coupling.groups, how.constants),
        residual="coupled" if how.residual == "projection" else how.residual,
        graph=graph,
    )


def _memory_of(coupling: Coupling, how: _Request, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a plan tells of the memory that it needs, where that was the budget: bytes, before and after."""
    if how.budget is None or how.budget.of != "memory":
        return {}
    cost = memory_of(coupling, how.budget.batch)
    widths = np.array([[g.channels for g in coupling.groups], [len(keep[g.name]) for g in coupling.groups]])
    dense, pruned = (round(value) for value in evaluate_many(cost, widths))
    return {"memory": {"dense": dense, "pruned": pruned}}


def _opened(graph: Graph, how: _Request) -> Coupling:
    """The groups of the network, sure to be those that a sensitivity speaks of."""
    if how.sensitivity is not None:
        how.sensitivity.check(graph.model)
    coupling = couple(graph, how.prefer, scatter=how.residual == "scatter")
    _check_curves(coupling, how)
    return coupling


def _allocated(
    coupling: Coupling, how: _Request, *, measure: bool
) -> tuple[Keep, dict[str, Any], dict[str, dict[str, Any]]]:
    """What every group keeps, scored on the dense network, what the plan tells of it, and what was measured there.
    Without ``measure``, only how many channels are kept counts."""
    judged = _judged(coupling, how)
    evidence: dict[str, dict[str, Any]] = {}
    blank = {group.name: torch.zeros(group.channels) for group in judged}
    if not measure:
        return *_at(coupling, how, blank), evidence
    fields = reads(how.criterion)
    if how.data is not None:
        drawn = locations(how.criterion)
        evidence = collect(coupling, judged, fields, how.data, loss=how.loss, locations=drawn, seed=how.seed)
    shown, tensors = as_read(coupling, judged, fields)
    known = None if how.budget is not None else _counts(_at(coupling, how, blank)[0])
    scores = score(shown, tensors, how.criterion, n_keep=known, seed=how.seed, evidence=evidence)
    keep, told = _at(coupling, how, scores)
    if known is None and needs_width(how.criterion):  # how many go is decided now, and which of them depends on it
        known = _counts(keep)
        scores = score(shown, tensors, how.criterion, n_keep=known, seed=how.seed, evidence=evidence)
        keep |= {name: highest(own, known[name]) for name, own in scores.items()}
    return keep, told, evidence


def _counts(keep: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: len(kept) for name, kept in keep.items()}


def _at(coupling: Coupling, how: _Request, scores: Mapping[str, torch.Tensor]) -> tuple[Keep, dict[str, Any]]:
    """What every group keeps by these scores, and what the plan tells of how that was found."""

    def decide(cost: Cost | None, steps: Mapping[str, int]) -> Keep:
        return allocate(
            coupling.groups,
            scores,
            ratios=how.ratios,
            budget=how.budget,
            cost=cost,
            allocation=how.allocation,
            exclude=how.exclude,
            min_channels=how.min_channels,
            round_to={name: lcm(step, how.round_to) for name, step in steps.items()} if steps else how.round_to,
            locked=coupling.locked,
            whole=kept_whole(coupling, how.residual),
            losses=None if how.sensitivity is None else losses(how.sensitivity),
        )

    if how.budget is None or how.budget.of == "channels":
        return decide(None, {}), {}
    if how.budget.of == "latency":
        decision = decide_within(coupling, how.budget, how.latencies, decide)
        return decision.keep, {"latency": decision.told()}
    if how.budget.of == "memory":
        return decide(memory_of(coupling, how.budget.batch), {}), {}
    return decide(costs_of(coupling, how.budget.of), {}), {}


def _judged(coupling: Coupling, how: _Request) -> list[Group]:
    """The groups that may get narrower, as the criterion is to see them: the others need not be scored."""
    whole = kept_whole(coupling, how.residual)
    excluded = excluded_groups(coupling.groups, how.exclude, coupling.locked)
    fixed = fixed_widths(coupling.groups, how.ratios, coupling.locked, whole)
    projected = scored_by_projection(coupling) if how.residual == "projection" else {}
    judged = []
    for group in coupling.groups:
        asked = fixed.get(group.name, 0 if how.budget is None else None)
        if asked not in (0, group.channels) and group.name not in excluded and group.name not in whole:
            judged.append(projected.get(group.name, group))
    return judged


def folded_groups(groups: Sequence[Group], asked: Constants) -> dict[str, Constant]:
    """``Plan.constants``: the groups whose constants are folded. Raises ``BadRequest`` for what is none of the two, and
    for a glob that matches no group."""
    by_glob = {} if isinstance(asked, str) else dict(asked)
    names = [group.name for group in groups]
    for value in [asked] if isinstance(asked, str) else by_glob.values():
        if value not in CONSTANTS:
            raise BadRequest(f"constants: there is no {value!r}{nearest(str(value), CONSTANTS)}")
    for glob in by_glob:
        if not any(fnmatchcase(name, glob) for name in names):
            raise BadRequest(f"constants: no group of the network matches {glob!r}{nearest(glob, names)}")
    if isinstance(asked, str):
        by_glob = {"*": asked}
    return {name: "fold" for name in names if _first_fit(name, by_glob) == "fold"}


def _first_fit(name: str, by_glob: Mapping[str, Constant]) -> Constant:
    return next((value for glob, value in by_glob.items() if fnmatchcase(name, glob)), "drop")


# What may be asked for -------------------------------------------------------------------------------------------


def _check(how: _Request) -> None:
    _check_request(how)
    _check_sensitivity(how)
    _check_criterion(how)


def _check_request(how: _Request) -> None:
    if how.budget is None and how.ratios is None:
        raise BadRequest("say how much to prune: budget=sc.Budget(keep=0.5) or ratios=0.5")
    if how.budget is not None and not isinstance(how.budget, Budget):
        raise BadRequest(f"a budget is a Budget, not {how.budget!r}: say sc.Budget(keep=0.5, of='macs')")
    if how.budget is not None:
        check_budget(how.budget)
        _check_memory(how.budget, how)
    if how.residual not in RULES:
        raise BadRequest(f"there is no residual rule {how.residual!r}{nearest(str(how.residual), RULES)}")


def _check_memory(budget: Budget, how: _Request) -> None:
    """That all of what a small network holds in memory can be foreseen."""
    asked = {"residual": how.residual == "scatter", "constants": how.constants != "drop"}
    for name, added in asked.items():
        if budget.of == "memory" and added:
            raise BadRequest(
                f"{name}={getattr(how, name)!r} adds tensors of its own to the small network, and how much memory they "
                f"take is not foreseen by a budget of memory\n  do: leave {name} out, or ask for a budget of macs"
            )


def _check_sensitivity(how: _Request) -> None:
    if how.sensitivity is None:
        return
    if not isinstance(how.sensitivity, Sensitivity):
        raise BadRequest(
            f"sensitivity is what sc.sensitivity returned, not {type(how.sensitivity).__name__}\n"
            "  do: read a file with sc.Sensitivity.from_json(text)"
        )
    if how.budget is None:
        raise BadRequest(
            "a sensitivity says which groups give way to meet a budget, and there is none\n"
            "  do: give budget=sc.Budget(keep=0.5), or ratios=sc.ratios_from(sensitivity, tolerance=...) without it"
        )
    if how.allocation != "global":
        raise BadRequest(
            f"allocation={how.allocation!r} and a sensitivity both say which groups give way to meet the budget\n"
            "  do: give one of them"
        )


def _check_curves(coupling: Coupling, how: _Request) -> None:
    """That the groups which were analysed are groups of this network."""
    if how.sensitivity is None:
        return
    known = {group.name: group.channels for group in coupling.groups}
    for curve in how.sensitivity.curves:
        if known.get(curve.group) != curve.channels:
            do = "analyse this network" if how.prefer == "channels" else "leave prefer out: analyses know no 'module'"
            raise WrongModel(
                f"the sensitivity has a group {curve.group!r} of {curve.channels} channels, and this network "
                f"{f'one of {known[curve.group]}' if curve.group in known else 'none of that name'}\n  do: {do}"
            )


def _check_criterion(how: _Request) -> None:
    """That what the criterion looks at is there, and that greedy selection would make a difference to it."""
    criterion = how.criterion
    function, name = resolve(criterion), label(criterion)
    check_given(criterion, how.data, how.loss)
    if not isinstance(how.greedy, bool):
        raise BadRequest(f"greedy={how.greedy!r} is neither True nor False")
    if how.greedy and (function is CRITERIA["random"] or {"filters", *KINDS}.isdisjoint(reads(criterion))):
        looks = "at nothing" if function is CRITERIA["random"] else f"at {', '.join(reads(criterion))}"
        raise BadRequest(
            f"greedy means nothing to criterion {name!r}, which looks {looks}: greedy selection leaves the weights of "
            "removed channels out of what a criterion sees of the filters, or of what comes through them\n"
            "  do: leave greedy out, or take a criterion that looks at filters, such as 'l1', or at outputs: 'thinet'"
        )


def _made_by(how: _Request) -> dict[str, Any]:
    """What a reader of the plan wants to know about its making, as JSON values; options that were not given are left
    out."""
    found: dict[str, Any] = {"secateur": __version__}
    found["criterion"] = (
        how.criterion if isinstance(how.criterion, str) else getattr(how.criterion, "__name__", "custom")
    )
    options: dict[str, Any] = {
        "allocation": how.allocation,
        "sensitivity": how.sensitivity and {"criterion": how.sensitivity.criterion, **how.sensitivity.made_by},
        "residual": None if how.residual == "coupled" else how.residual,
        "constants": None if how.constants == "drop" else how.constants,
        "greedy": how.greedy or None,
        "prefer": how.prefer,
        "seed": how.seed,
        "ratios": how.ratios,
        "budget": how.budget,
        "exclude": how.exclude,
    }
    for name, value in options.items():
        if isinstance(value, Budget):
            unmeant = {"memory": ("threads",), "latency": ()}.get(value.of, ("batch", "threads"))
            value = {key: own for key, own in vars(value).items() if own is not None and key not in unmeant}
        elif isinstance(value, Mapping):
            value = dict(value)
        if value not in (None, (), [], ""):
            found[name] = list(value) if isinstance(value, (tuple, set)) else value
    return found
