"""The sweep: every group pruned alone, at every ratio, and how well the network does then.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.2: the filters of smallest norm go,
on held-out data, nothing is retrained (figure 2b), or each network shortly (figure 2c).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from secateur.allocation import excluded_groups, highest, matching, width_at
from secateur.calibration import collect
from secateur.core import Criterion, Evaluate, Group
from secateur.criteria import label, locations, reads
from secateur.errors import BadRequest, CannotPrune, nearest
from secateur.graph import Graph, Inputs, trace
from secateur.groups import Coupling, couple
from secateur.layer_weights import as_read
from secateur.nodes import shape_of
from secateur.plans import fingerprint, named_tensors
from secateur.processes import gathered, is_main, rank, world
from secateur.recover.randomness import kept_randomness, seed_all
from secateur.residuals import kept_whole, scored_by_projection
from secateur.scores import normalise, score
from secateur.selection import forward_order
from secateur.sensitivities.curves import GroupCurve, Sensitivity
from secateur.sensitivities.records import DENSE, Cell, check_dense, earlier, filled, finish, own_file, write
from secateur.sensitivities.requests import (
    as_function,
    check_request,
    checked_names,
    checked_note,
    checked_path,
    checked_ratios,
    checked_score,
)
from secateur.sensitivities.suffix import Suffixes, plan_for
from secateur.surgery import apply
from secateur.taps import map_taps
from secateur.version import __version__

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Progress = Callable[[int, int, str], None]
Retrain = Callable[[nn.Module], None]


@dataclass(frozen=True, eq=False)
class _Sweep:
    """What does not change from cell to cell. ``keep[group][i]``: the channels that stay at ratio ``i``."""

    coupling: Coupling
    networks: Suffixes
    evaluate: Evaluate
    retrain: Retrain | None
    keep: Mapping[str, Sequence[tuple[int, ...]]]
    ratios: Sequence[float]
    seed: int


def sensitivity(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    evaluate: Evaluate | Iterable[Any] | None = None,
    *,
    criterion: str | Criterion = "l1",
    ratios: Sequence[float] = RATIOS,
    groups: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
    residual: Literal["coupled", "inner", "projection"] = "coupled",
    retrain: Retrain | None = None,
    path: str | os.PathLike[str] | None = None,
    note: Mapping[str, Any] = MappingProxyType({}),
    max_bytes: int = 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Sensitivity:
    """How well ``model`` does when one group alone is pruned, for every group and ratio. Nothing of it is changed.

    ``evaluate``: a function from a network in eval mode to a number, higher is better, or batches ``(inputs, targets)``
    that can be read again and again, for top-1 accuracy. Take data that are held out, and not those of the final test.
    It is called once for each width of each group, always from the same state of the random generators, without
    gradients; what it is given computes what ``masked`` would, quickly: only what changes is run, from activations in
    front of the group that are held for inputs which were seen before (at most ``max_bytes`` of them).

    ``ratios``: fractions removed, rising; a group of ``n`` channels keeps ``floor(n (1 - ratio) + 1e-9)``, at least 1.
    ``groups``: names or globs, all free groups if empty; ``exclude``: those to leave out. ``criterion``, ``data``,
    ``loss`` and ``residual`` as for ``plan``. ``retrain``: trains the small network that it is given in place, which is
    then evaluated as well. ``progress(done, total, text)`` is called in the main process, about its own part.

    ``path``: a JSON file that is written after every evaluation, and from which the same call goes on: the model, the
    options, the channels that stay and the score of the dense network, which is evaluated again, must be the same.
    What else ``evaluate`` and ``retrain`` depend on is for ``note`` to say, a mapping of JSON values (which images, how
    many epochs) that is kept in ``made_by`` and must be the same too.

    Under ``torchrun`` the groups are spread over the processes, and all get the same whole result: ``evaluate`` and
    ``retrain`` must see all data in every process, and may not wait for the others.

    Raises ``BadRequest`` for arguments out of range and an ``evaluate`` that gives no finite number, ``CannotPrune``
    for groups that are locked, ``BadArtifact`` for a ``path`` that holds anything but an earlier part of this sweep.
    """
    ratios, file, noted = checked_ratios(ratios), checked_path(path), checked_note(note)
    groups, exclude = checked_names("groups", groups), checked_names("exclude", exclude)
    check_request(criterion, data, residual, max_bytes, seed, loss=loss, retrain=retrain, progress=progress)
    measure = as_function(evaluate)
    graph = trace(model, example_inputs)
    coupling = couple(graph)
    chosen = _chosen(coupling, groups, exclude, residual)
    scores = _scores(coupling, chosen, criterion, data=data, loss=loss, residual=residual, seed=seed)
    keep = {g.name: [highest(scores[g.name], width_at(g.channels, ratio)) for ratio in ratios] for g in chosen}
    curves = tuple(_blank(coupling, g, keep[g.name], scores[g.name], retrain is not None) for g in chosen)
    told = "score" if callable(evaluate) else "accuracy"
    made_by = _settings(graph, keep, noted) | {"seed": seed, "residual": residual, "measure": told}
    draft = Sensitivity(fingerprint(graph.model), label(criterion), ratios, math.nan, curves, made_by)
    cells = {} if file is None else earlier(file, draft)
    sweep = _Sweep(coupling, Suffixes(coupling, max_bytes), measure, retrain, keep, ratios, seed)
    _run(sweep, draft, cells, file, progress if is_main() else None)
    result = filled(draft, cells)
    return result if file is None else finish(file, result)


def _settings(graph: Graph, keep: Mapping[str, Sequence[tuple[int, ...]]], note: Mapping[str, Any]) -> dict[str, Any]:
    """What a file that is gone on with must have been made by."""
    settings = {"secateur": __version__, "weights": _digest(graph.model), "kept": _digest_of_kept(keep)}
    return settings | ({"note": dict(note)} if note else {})


# The cells -------------------------------------------------------------------------------------------------------


def _run(
    sweep: _Sweep, draft: Sensitivity, cells: dict[Cell, float], file: Path | None, progress: Progress | None
) -> None:
    """Evaluate what is missing in ``cells``, each process its own groups, and share it.

    The dense network is evaluated first, by every process and always: what is in ``cells`` must have been found on the
    same data.
    """
    missing = [c for c in draft.curves if any(cell not in cells for cell in _cells_of(c))]
    missing.sort(key=lambda curve: sweep.networks.start(curve.group))
    mine = missing[rank() :: world()]
    todo = [DENSE, *(cell for curve in mine for cell in _cells_of(curve) if cell not in cells)]
    total, error = len(todo), None
    try:
        for done, cell in enumerate(todo):
            if progress is not None:
                progress(done, total, _words(sweep, cell))
            if cell == DENSE and cell in cells:
                check_dense(file, cells[cell], _evaluate(sweep, cell))
            elif cell not in cells:
                value = _evaluate(sweep, cell)
                cells |= dict.fromkeys(_alike(sweep, cell), value)
                if file is not None:
                    write(own_file(file), filled(draft, cells))
        if progress is not None:
            progress(total, total, "done")
    except Exception as failed:
        error = failed
    _share(cells, error)


def _share(cells: dict[Cell, float], error: Exception | None) -> None:
    """Give every process all cells. Where one has failed, all do."""
    everything = gathered((cells, "" if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for number, (_, why) in enumerate(everything):
        if why:
            raise BadRequest(f"the sweep failed in process {number}: {why}")
    for found, _ in reversed(everything):  # all have evaluated the dense network: the main process's word counts
        cells |= found


def _cells_of(curve: GroupCurve) -> list[Cell]:
    kinds = {"scores": curve.scores, "retrained": curve.retrained}
    return [(curve.group, kind, i) for i in range(len(curve.keep)) for kind, row in kinds.items() if i < len(row)]


def _alike(sweep: _Sweep, cell: Cell) -> list[Cell]:
    """The cells that have the same answer: those of the same width."""
    group, kind, index = cell
    if cell == DENSE:
        return [cell]
    kept = sweep.keep[group]
    return [(group, kind, i) for i in range(len(kept)) if kept[i] == kept[index]]


def _evaluate(sweep: _Sweep, cell: Cell) -> float:
    group, kind, index = cell
    kept = {} if cell == DENSE else {group: sweep.keep[group][index]}
    device = next((t.device for t in sweep.coupling.graph.tensors.values()), torch.device("cpu"))
    with kept_randomness(device):
        if kind == "retrained" and sweep.retrain is not None:
            network = apply(sweep.coupling.graph, plan_for(sweep.coupling, kept))
            seed_all(sweep.seed, 0)
            sweep.retrain(network)
        else:
            network = sweep.networks.network(kept)
        seed_all(sweep.seed, 0)
        try:
            with torch.no_grad():
                value: object = sweep.evaluate(network.eval())
        except Exception as error:
            error.add_note(f"while {_words(sweep, cell)} was evaluated")
            raise
    return checked_score(value, _words(sweep, cell))


def _words(sweep: _Sweep, cell: Cell) -> str:
    group, kind, index = cell
    if cell == DENSE:
        return "the dense network"
    return f"{group} without {100 * sweep.ratios[index]:.10g}%" + (", retrained" if kind == "retrained" else "")


# The groups ------------------------------------------------------------------------------------------------------


def _chosen(coupling: Coupling, patterns: Sequence[str], exclude: Sequence[str], residual: str) -> list[Group]:
    """The groups that are swept, in forward order."""
    free = {g.name: g for g in coupling.groups}
    whole = kept_whole(coupling, residual)
    names: set[str] = set(free) - set(whole)
    if patterns:
        names = {name for pattern in patterns for name in _named(pattern, coupling, whole)}
    names -= excluded_groups(coupling.groups, exclude, coupling.locked)
    if not names:
        raise CannotPrune(
            "no group is left to analyse: all are locked, left whole by the residual rule, or excluded\n"
            "  do: exclude less; find_groups lists the groups and why they are locked"
        )
    return [free[name] for name in forward_order(coupling) if name in names]


def _named(pattern: str, coupling: Coupling, whole: Mapping[str, str]) -> list[str]:
    """The free groups of that name, or if there is none, that match the glob."""
    reasons = {g.name: "" for g in coupling.groups} | {g.name: g.locked for g in coupling.locked} | dict(whole)
    found = matching(pattern, reasons)
    if not found:
        raise BadRequest(f"groups: no group is called, or matches, {pattern!r}{nearest(pattern, reasons)}")
    free = [name for name in found if not reasons[name]]
    if not free:
        first = found[0]
        what = "cannot be pruned" if first in whole else "is locked"
        raise CannotPrune(
            f"groups: {pattern!r} asks for group {first!r}, which {what}\n  {reasons[first]}\n"
            "  do: leave it out; find_groups lists the groups that are free"
        )
    return free


def _scores(
    coupling: Coupling,
    chosen: Sequence[Group],
    criterion: str | Criterion,
    *,
    data: Iterable[Any] | None,
    loss: Callable[[Any, torch.Tensor], torch.Tensor] | None,
    residual: str,
    seed: int,
) -> dict[str, torch.Tensor]:
    judged = scored_by_projection(coupling) if residual == "projection" else {}
    shown = [judged.get(g.name, g) for g in chosen]
    evidence = None
    if data is not None:
        evidence = collect(
            coupling, shown, reads(criterion), data, loss=loss, locations=locations(criterion), seed=seed
        )
    shown, tensors = as_read(coupling, shown, reads(criterion))
    return score(shown, tensors, criterion, seed=seed, evidence=evidence)


def _blank(
    coupling: Coupling, group: Group, keep: Sequence[Sequence[int]], scores: torch.Tensor, retrained: bool
) -> GroupCurve:
    missing = (math.nan,) * len(keep)
    return GroupCurve(
        group=group.name,
        channels=group.channels,
        stage=_stage(coupling, group),
        keep=tuple(map(len, keep)),
        scores=missing,
        retrained=missing if retrained else (),
        importance=_importance(scores),
    )


def _importance(scores: torch.Tensor) -> tuple[float, ...]:
    """Sorted from the largest, over the largest."""
    values = normalise({"": scores})[""]
    largest = float(values.max())
    values = values / largest if largest > 0 else values
    return tuple(values.sort(descending=True).values.tolist())


def _stage(coupling: Coupling, group: Group) -> str:
    """The size of the maps that the group's first writer makes: the axes behind the channels."""
    try:
        first = map_taps(coupling, group)[0]
    except CannotPrune:  # nothing makes maps of it
        return "1"
    shape = shape_of(first.value) or ()
    return "x".join(map(str, shape[first.axis + 1 :])) or "1"


def _digest(model: nn.Module) -> str:
    """A hash of all values, by which another training of the same network is told apart."""
    found = hashlib.sha256()
    for tensor in named_tensors(model).values():
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _digest_of_kept(keep: Mapping[str, Sequence[tuple[int, ...]]]) -> str:
    """A hash of the channels that stay, by which two functions under one name, or other data, are told apart."""
    rows = {name: [[int(channel) for channel in row] for row in found] for name, found in keep.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
