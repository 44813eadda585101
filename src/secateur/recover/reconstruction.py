"""Reconstruction: the readers of what was removed, fitted anew to what they gave before, from second moments.

For a reader ``y = W p + b`` of the dense network let ``p'`` be its kept inputs in the pruned network, patches of them
for a convolution, and ``r = W p - W' p'`` what its output lacks. ``W'`` and ``b`` are changed by the ``D`` and ``d``
that minimise ``E |r - D p' - d|^2 + ridge |D|^2``:

    D = Cov(r, p') (Cov(p', p') + ridge I)^-1,    d = E[r] - D E[p'],    ridge = fraction * mean of the variances of p'

(He et al. 2017, "Channel pruning for accelerating very deep neural networks", section 3.1, equation 5, with an
intercept and in closed form.) The ridge holds ``W'`` near what it was, not near zero: where the data say nothing, it
stays. With ``D = 0`` this is bias absorption, ``d = E[r]``. In sequence (their section 3.3: "asymmetric"), readers are
fitted front to back, each on what the readers before it now give; else all on the activations of the dense network.

Shapes: as in ``patches``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from secateur.errors import BadRequest
from secateur.groups import Coupling
from secateur.interpreter import Env, Walk, cut, walk
from secateur.patches import Layout, matrix, outputs, patches, weight_from
from secateur.recover.bias import give_constant_
from secateur.recover.readers import Reader
from secateur.statistics import (
    Inputs,
    Moments,
    Stops,
    accumulator,
    agree,
    moment_bytes,
    sum_moments_,
)


@dataclass(frozen=True)
class Fit:
    """How readers are fitted.

    ``sequential``: front to back on what the pruned network now gives, else on the dense network's activations.
    ``ridge``: the fraction of the mean variance of the inputs that is added to each (see the module's formula).
    ``max_bytes`` bounds the sums of the readers that are fitted together (``8 G P (P + O + 1)`` bytes for one, with
    ``P`` its kept inputs times kernel positions, ``O`` its kept outputs, of each of ``G`` partitions), and, once more,
    the activations held between readers: beyond that, prefixes of the network are run again. A reader whose sums alone
    would be larger has only its bias corrected.
    """

    sequential: bool = True
    ridge: float = 1e-2
    max_bytes: int = 2**30


@dataclass
class Fitted:
    """``state``: the dense network's tensors with the fitted readers in them. ``added``: constants behind calls that
    have no bias. ``changed``: readers by name; ``notes`` and ``skipped``: what there is to say of others."""

    state: dict[str, torch.Tensor]
    added: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    changed: list[Reader] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Task:
    """What stays the same while readers are fitted."""

    coupling: Coupling
    class_keep: torch.Tensor
    dense: Mapping[str, torch.Tensor]
    read: Callable[[], Iterator[Inputs]]
    fit: Fit
    weights: bool
    device: torch.device


def fit_readers(task: Task, readers: Sequence[Reader], progress: Callable[[int, int], None] | None = None) -> Fitted:
    """Fits all readers; nothing of the user's is changed. ``task.weights=False``: their constants only.

    Raises ``BadRequest`` for data that are empty or do not fit, and for activations that are not finite.
    """
    result = Fitted({name: t.clone() for name, t in task.dense.items()})
    able = [r for r in readers if task.weights or r.home.kind != "none"]
    result.skipped |= {r.name: r.home.why for r in readers if r not in able}
    order = {node: i for i, node in enumerate(task.coupling.graph.captures[0].graph.nodes)}
    levels = _levels(able, order)
    stops = Stops(task.read, _beginner(task, result, levels), order, task.fit.max_bytes)
    for number, level in enumerate(levels):
        for part in _within(level, task, result):
            _fit_together_(part, task, result, stops)
        if progress is not None:
            progress(number + 1, len(levels))
    return result


def _levels(readers: Sequence[Reader], order: Mapping[fx.Node, int]) -> list[list[Reader]]:
    """Readers that read the same tensor once are fitted together; those that are called several times, alone, and not
    before their last call. Front to back."""
    levels: dict[object, list[Reader]] = {}
    for reader in sorted(readers, key=lambda r: max(order[u.node] for u in r.uses)):
        once = len(reader.uses) == 1
        levels.setdefault(reader.uses[0].source if once else reader, []).append(reader)
    return list(levels.values())


def _beginner(task: Task, result: Fitted, levels: list[list[Reader]]) -> Callable[[Inputs], tuple[Walk, ...]]:
    watch = {use.node for level in levels for reader in level for use in reader.uses}
    everything = torch.ones_like(task.class_keep)

    def begin(inputs: Inputs) -> tuple[Walk, ...]:
        walks = [walk(task.coupling, everything, task.dense, [t.clone() for t in inputs], 0, watch)]
        if task.fit.sequential:
            walks.append(walk(task.coupling, task.class_keep, result.state, inputs, 0, watch, result.added))
        return tuple(walks)

    return begin


def _within(level: list[Reader], task: Task, result: Fitted) -> Iterator[list[tuple[Reader, bool]]]:
    """Parts of a level whose sums fit into memory, each reader with whether its weights are fitted."""
    part: list[tuple[Reader, bool]] = []
    room, most = task.fit.max_bytes, task.fit.max_bytes
    for reader in level:
        needed = moment_bytes(reader.shape, task.device, shared=False)
        full = task.weights and needed <= most and bool(reader.shape[2])
        if task.weights and needed > most:
            result.notes[reader.name] = (
                f"its sums need {needed / 2**20:.1f} MiB, more than max_bytes ({most / 2**20:.1f} MiB): bias only"
            )
            if reader.home.kind == "none":
                result.skipped[reader.name] = f"{result.notes.pop(reader.name)}, and {reader.home.why}"
                continue
        if full and needed > room and part:
            yield part
            part, room = [], most
        part.append((reader, full))
        room -= needed if full else 0
    if part:
        yield part


def _fit_together_(part: list[tuple[Reader, bool]], task: Task, result: Fitted, stops: Stops) -> None:
    shared: dict[tuple[Layout, int], Moments] = {}
    moments: list[Moments] = []
    for reader, full in part:
        key = (reader.layout, reader.shape[2])
        one = Moments.zeros(reader.shape, task.device, second=full, shared=shared.get(key) if full else None)
        moments.append(one)
        if full:
            shared.setdefault(key, one)
    owners = {id(m) for m in shared.values()}
    problem: Exception | None = None
    try:
        for index in range(len(part[0][0].uses)):
            first = min((r.uses[index] for r, _ in part), key=lambda u: stops.order[u.node])
            for envs in stops.at(first.node):
                _add_batch_(part, moments, index, envs, task, result.state, owners)
    except Exception as error:
        problem = error
    agree(problem, task.device)
    sum_moments_(moments)
    for (reader, full), sums in zip(part, moments, strict=True):
        _check(reader, sums)
        _change_(reader, sums if full else Moments(sums.count, sums.r), task, result)
    if len(part[0][0].uses) > 1:
        stops.forget()  # what its earlier calls gave has changed


def _add_batch_(
    part: list[tuple[Reader, bool]],
    moments: list[Moments],
    index: int,
    envs: tuple[Env, ...],
    task: Task,
    state: Mapping[str, torch.Tensor],
    owners: set[int],
) -> None:
    for (reader, full), sums in zip(part, moments, strict=True):
        use = reader.uses[index]
        x, now = envs[0][use.source], envs[-1][use.source]
        axis = use.layout.channels_axis % x.dim()
        beside = [None if d == axis else m for d, m in enumerate(use.masks)]
        x, now = cut(x, beside), cut(now, beside)
        small = cut(now, [m if d == axis else None for d, m in enumerate(use.masks)])
        lacks = outputs(x, _rows(reader, task.dense, all_columns=True), use.layout)
        lacks = lacks - outputs(small, _rows(reader, state, all_columns=False), use.layout)
        if not full:
            sums.add_(lacks, None, own=False)
            continue
        start = 0
        for p in patches(small, use.layout, accumulator(task.device)):
            sums.add_(lacks[:, start : start + p.shape[1]], p, own=id(sums) in owners)
            start += p.shape[1]


def _rows(reader: Reader, state: Mapping[str, torch.Tensor], *, all_columns: bool) -> torch.Tensor:
    """``[G, O, I, K]`` of the outputs that are kept, on all inputs or the kept ones."""
    whole = matrix(state[reader.weight], reader.layout)
    parts, _, inputs, kernel = whole.shape
    whole = whole[reader.rows.to(whole.device)].reshape(parts, -1, inputs, kernel)
    return whole if all_columns else whole[:, :, reader.columns.to(whole.device)]


def _check(reader: Reader, sums: Moments) -> None:
    if not float(sums.count):
        raise BadRequest(
            "data has no batches (an iterator that was read before?)\n  do: pass a DataLoader or a list of batches"
        )
    if not all(bool(torch.isfinite(t).all()) for t in sums.tensors()):
        raise BadRequest(
            f"what {reader.name!r} reads on the calibration data is not finite (NaN or infinite)\n"
            "  do: check the data and the dense network's weights"
        )


def _change_(reader: Reader, sums: Moments, task: Task, result: Fitted) -> None:
    """Solve, and put what was found into ``result``."""
    constant = sums.r / sums.count
    if sums.rp is not None:
        change, constant = solve(sums, task.fit.ridge, intercept=reader.home.kind != "none")
        parts, kept, patch = reader.shape
        if int(sums.count) <= patch:
            result.notes[reader.name] = f"{int(sums.count)} samples for {patch + 1} unknowns: held by the ridge alone"
        weight = result.state[reader.weight]
        whole = matrix(weight, reader.layout).clone()
        rows, columns = reader.rows.to(whole.device), torch.nonzero(reader.columns).flatten().to(whole.device)
        own = whole[rows].reshape(parts, kept, *whole.shape[2:])
        own = own.index_add(2, columns, change.to(whole).reshape(parts, kept, len(columns), -1))
        whole[rows] = own.flatten(0, 1)
        weight.copy_(weight_from(whole, reader.layout))
    full = torch.zeros(reader.rows.shape, device=constant.device, dtype=constant.dtype)
    full[reader.rows.to(constant.device)] = constant.flatten()
    behind = {u.node: len(u.layout.kernel) for u in reader.uses}
    give_constant_(reader.home, full.flatten().to(result.state[reader.weight]), result.state, result.added, behind)
    result.changed.append(reader)


def solve(sums: Moments, ridge: float, *, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(D [G, O, P], d [G, O])`` of the module's formula; never NaN for finite moments. Without ``intercept`` the
    moments are not centred, and ``d`` is zero."""
    assert sums.rp is not None
    assert sums.p is not None
    assert sums.pp is not None
    home = torch.device("cpu") if sums.r.device.type == "mps" else sums.r.device
    count = sums.count.to(home, torch.float64)
    r, rp, p, pp = (t.to(home, torch.float64) / count for t in (sums.r, sums.rp, sums.p, sums.pp))
    if intercept:
        rp = rp - r[:, :, None] * p[:, None, :]
        pp = pp - p[:, :, None] * p[:, None, :]
    level = pp.diagonal(dim1=1, dim2=2).clamp_min(0).mean(1)
    level = torch.where(level > 0, level, 1.0) * ridge
    a = (pp + pp.mT) / 2 + level[:, None, None] * torch.eye(pp.shape[-1], device=home, dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(a)
    if not bool(info.any()):
        change = torch.cholesky_solve(rp.mT, factor).mT
    else:  # no ridge, or rounding: the directions that the data do not show stay as they are
        values, vectors = torch.linalg.eigh(a)
        floor = values[:, -1:].clamp_min(0) * a.shape[-1] * torch.finfo(torch.float64).eps
        inverse = torch.where(values > floor, 1 / values, 0.0)
        change = ((rp @ vectors) * inverse[:, None, :]) @ vectors.mT
    constant = r - (change @ p[:, :, None])[:, :, 0] if intercept else torch.zeros_like(r)
    return change.to(sums.r.device), constant.to(sums.r.device)
