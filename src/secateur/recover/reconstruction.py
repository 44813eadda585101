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
from typing import Literal

import torch
from torch import fx

from secateur.errors import BadRequest
from secateur.grams import Sums
from secateur.groups import Coupling
from secateur.homes import give_constant_
from secateur.interpreter import Env, Walk, cut, walk
from secateur.patches import Layout, matrix, outputs, patches, weight_from
from secateur.processes import sum_over_processes_
from secateur.recover.equations import least_change
from secateur.recover.readers import Reader, Use
from secateur.recover.rescaling import add_outputs_, channels_of, empty_sums, rescale_, sum_bytes
from secateur.statistics import Inputs, Moments, Stops, agree, moment_bytes

Way = Literal["bias", "scale", "least-squares"]
"""What of a reader is fitted: its constant; one factor for each channel; all its weights, and a constant."""


@dataclass(frozen=True)
class Fit:
    """How readers are fitted.

    ``sequential``: front to back on what the pruned network now gives, else on the dense network's activations.
    ``ridge``: the fraction of the mean variance of the inputs that is added to each (see the module's formula); for
    factors, of the mean square of what a channel gives (see ``rescaling``). It decides what few images leave open:
    measured on held-out images in results/ridge.md.
    ``max_bytes`` bounds the sums of the readers that are fitted together (``8 G P (P + O + 1)`` bytes for one, with
    ``P`` its kept inputs times kernel positions, ``O`` its kept outputs, of each of ``G`` partitions; for factors
    ``8 C (C + 1)``, with ``C`` its kept channels), and, once more, the activations held between readers: beyond that,
    prefixes of the network are run again. A reader whose sums alone would be larger has only its bias corrected, or,
    where factors are fitted, is skipped.
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
    way: Way
    device: torch.device


def fit_readers(task: Task, readers: Sequence[Reader], progress: Callable[[int, int], None] | None = None) -> Fitted:
    """Fits all readers by ``task.way``; nothing of the user's is changed.

    Raises ``BadRequest`` for data that are empty or do not fit, and for activations that are not finite.
    """
    result = Fitted({name: t.clone() for name, t in task.dense.items()})
    able = [r for r in readers if task.way != "bias" or r.home.kind != "none"]
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


def _within(level: list[Reader], task: Task, result: Fitted) -> Iterator[list[tuple[Reader, Way]]]:
    """Parts of a level whose sums fit into memory, each reader with what of it is fitted."""
    part: list[tuple[Reader, Way]] = []
    room, most = task.fit.max_bytes, task.fit.max_bytes
    for reader in level:
        way, needed = _affordable(reader, task, result)
        if way is None:
            continue
        if needed > room and part:
            yield part
            part, room = [], most
        part.append((reader, way))
        room -= needed
    if part:
        yield part


def _affordable(reader: Reader, task: Task, result: Fitted) -> tuple[Way | None, int]:
    """What of a reader is fitted, if anything, and the bytes of the sums that it takes (none: too few to count)."""
    if task.way == "bias" or (task.way == "least-squares" and not reader.shape[2]):
        return "bias", 0
    scaled = task.way == "scale"
    needed = sum_bytes(reader, task.device) if scaled else moment_bytes(reader.shape, task.device, shared=False)
    if needed <= task.fit.max_bytes:
        return task.way, needed
    most = f"more than max_bytes ({task.fit.max_bytes / 2**20:.1f} MiB)"
    said = f"its sums need {needed / 2**20:.1f} MiB, {most}"
    if scaled or reader.home.kind == "none":
        result.skipped[reader.name] = said if scaled else f"{said}: bias only, and {reader.home.why}"
        return None, 0
    result.notes[reader.name] = f"{said}: bias only"
    return "bias", 0


def _fit_together_(part: list[tuple[Reader, Way]], task: Task, result: Fitted, stops: Stops) -> None:
    sums = _empty(part, task)
    owners = {id(one.p): id(one) for one in reversed(sums) if isinstance(one, Moments)}.values()
    problem: Exception | None = None
    try:
        for index in range(len(part[0][0].uses)):
            first = min((r.uses[index] for r, _ in part), key=lambda u: stops.order[u.node])
            for envs in stops.at(first.node):
                for (reader, _), one in zip(part, sums, strict=True):
                    _add_batch_(one, reader, reader.uses[index], envs, (task.dense, result.state), id(one) in owners)
    except Exception as error:
        problem = error
    agree(problem, task.device)
    sum_over_processes_({id(t): t for one in sums for t in one.tensors()}.values())
    for (reader, way), one in zip(part, sums, strict=True):
        _check(reader, one)
        if isinstance(one, Sums):
            _rescale_(reader, one, task, result)
        else:
            _change_(reader, one if way == "least-squares" else Moments(one.count, one.r), task, result)
    if len(part[0][0].uses) > 1:
        stops.forget()  # what its earlier calls gave has changed


def _empty(part: list[tuple[Reader, Way]], task: Task) -> list[Moments | Sums]:
    """Sums for every reader; those over what is read are shared by all that read the same."""
    shared: dict[tuple[Layout, int], Moments] = {}
    found: list[Moments | Sums] = []
    for reader, way in part:
        if way == "scale":
            found.append(empty_sums(reader, task.device))
            continue
        full, key = way == "least-squares", (reader.layout, reader.shape[2])
        one = Moments.zeros(reader.shape, task.device, second=full, shared=shared.get(key) if full else None)
        found.append(one)
        if full:
            shared.setdefault(key, one)
    return found


def _add_batch_(
    sums: Moments | Sums,
    reader: Reader,
    use: Use,
    envs: tuple[Env, ...],
    states: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    own: bool,
) -> None:
    """Add what ``use`` of ``reader`` reads, and what its outputs lack. ``states``: the dense network's tensors, and
    those fitted so far; ``own``: nobody else adds this to what is shared."""
    x, now = envs[0][use.source], envs[-1][use.source]
    axis = use.layout.channels_axis % x.dim()
    beside = [None if d == axis else m for d, m in enumerate(use.masks)]
    x, now = cut(x, beside), cut(now, beside)
    small = cut(now, [m if d == axis else None for d, m in enumerate(use.masks)])
    kept = _rows(reader, states[1], all_columns=False)
    lacks = outputs(x, _rows(reader, states[0], all_columns=True), use.layout) - outputs(small, kept, use.layout)
    if isinstance(sums, Sums):
        add_outputs_(sums, small, kept, use.layout, lacks)
    elif sums.rp is None:
        sums.add_(lacks, None, own=False)
    else:
        start = 0
        for p in patches(small, use.layout, sums.r.dtype):
            sums.add_(lacks[:, start : start + p.shape[1]], p, own=own)
            start += p.shape[1]


def _rows(reader: Reader, state: Mapping[str, torch.Tensor], *, all_columns: bool) -> torch.Tensor:
    """``[G, O, I, K]`` of the outputs that are kept, on all inputs or the kept ones."""
    whole = matrix(state[reader.weight], reader.layout)
    parts, _, inputs, kernel = whole.shape
    whole = whole[reader.rows.to(whole.device)].reshape(parts, -1, inputs, kernel)
    return whole if all_columns else whole[:, :, reader.columns.to(whole.device)]


def _check(reader: Reader, sums: Moments | Sums) -> None:
    if not float(sums.samples if isinstance(sums, Sums) else sums.count):
        raise BadRequest(
            "data has no batches (an iterator that was read before?)\n  do: pass a DataLoader or a list of batches"
        )
    if not all(bool(torch.isfinite(t).all()) for t in sums.tensors()):
        raise BadRequest(
            f"what {reader.name!r} reads on the calibration data is not finite (NaN or infinite)\n"
            "  do: check the data and the dense network's weights"
        )


def _rescale_(reader: Reader, sums: Sums, task: Task, result: Fitted) -> None:
    """Solve for the factors, and put the weights times them into ``result``."""
    samples, unknowns = int(sums.samples), channels_of(reader)[1]
    if samples < unknowns:
        result.notes[reader.name] = _too_few(samples, unknowns, task)
    rescale_(result.state[reader.weight], reader, sums, task.fit.ridge)
    result.changed.append(reader)


def _change_(reader: Reader, sums: Moments, task: Task, result: Fitted) -> None:
    """Solve, and put what was found into ``result``."""
    constant = sums.r / sums.count
    if sums.rp is not None:
        change, constant = solve(sums, task.fit.ridge, intercept=reader.home.kind != "none")
        parts, kept, patch = reader.shape
        if int(sums.count) <= patch:
            result.notes[reader.name] = _too_few(int(sums.count), patch + 1, task)
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


def _too_few(samples: int, unknowns: int, task: Task) -> str:
    held = "held by the ridge alone" if task.fit.ridge else "of all that fit, the smallest change"
    return f"{samples} samples for {unknowns} unknowns: {held}"


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
    change = least_change(pp, rp, ridge)
    constant = r - (change @ p[:, :, None])[:, :, 0] if intercept else torch.zeros_like(r)
    return change.to(sums.r.device), constant.to(sums.r.device)
