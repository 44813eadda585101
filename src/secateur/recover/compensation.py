"""Compensation: winning back, right after ``apply`` and without training, what the removed channels gave.

The readers of what was removed get the constant that is missing (``bias``), have the channels that they kept rescaled
(``rescaling``), or are fitted by least squares with an intercept (``reconstruction``); then batch-norm statistics are
taken anew (``batchnorm``). That is last: a constant in front of a batch norm cancels when its mean is taken anew. All
sums run over the processes, so that the outcome does not depend on how many there are.

What is fitted is the dense network under the plan's masks; what is kept of it is then written into the small one, so
that the law holds afterwards as before: the masked network with the fitted tensors computes what the small one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from secateur.capture import in_mode
from secateur.core import Edit, Evaluate
from secateur.errors import BadRequest, WrongModel, nearest
from secateur.graph import Graph, unwrap
from secateur.groups import Coupling, freed
from secateur.masks import coupling_for
from secateur.plans import Plan, check_pruned
from secateur.recover.batchnorm import Step, statistics_of
from secateur.recover.readers import Reader, find_readers
from secateur.recover.reconstruction import Fit, Fitted, Task, Way, fit_readers
from secateur.slicing import RECORD, attention_factors, named, small_tensor
from secateur.statistics import batches, check_repeatable, read_inputs
from secateur.surgery import record

READERS = ("none", "bias", "scale", "least-squares")
Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and of how much (readers, or batches; 0: unknown)."""


@dataclass(frozen=True)
class Compensation:
    """What was done, step by step. The first, ``"none"``, is the pruned network as it came."""

    steps: tuple[Step, ...]


def compensate_(
    small: nn.Module,
    model: nn.Module | Graph,
    plan: Plan,
    data: Iterable[Any],
    *,
    readers: Literal["none", "bias", "scale", "least-squares"] = "least-squares",
    batchnorm: bool = True,
    evaluate: Evaluate | None = None,
    fit: Fit | None = None,
    progress: Progress | None = None,
) -> Compensation:
    """Make up for what ``apply(model, plan)``, which is ``small``, lost; ``small`` is changed in place.

    ``readers="bias"`` adds to each affine reader the mean of what its removed inputs gave; ``"scale"`` multiplies what
    it kept by one factor for each channel, and leaves its bias alone (ThiNet); ``"least-squares"`` fits all the weights
    it kept, with an intercept (``Fit``: in sequence or not, ridge, memory). A reader without a bias keeps the constant
    in the batch norm behind it, or gets a bias: a ``bias`` edit in ``record(small).plan``, so that ``save`` and
    ``load`` know it. ``batchnorm``: running statistics are taken anew, last.

    ``data``: re-iterable batches of inputs, or of ``(inputs, targets)``; in several processes, this process's part.
    ``evaluate(small)`` is called before and after every step, in eval mode. Works on the device of ``model``; call it
    right after ``apply``, before any training.

    A plan that folds constants has given the readers what they lost already: then ``readers`` must be ``"none"``.

    Raises ``WrongModel`` if ``small`` is not what ``apply`` makes of ``model`` by ``plan``, ``BadRequest`` if it was
    changed since, for unknown settings, and for data that are empty, can be read only once, do not fit the network or
    give activations that are not finite. ``small`` is then as it was.
    """
    fit = fit or Fit()
    _check_request(readers, fit, data)
    if readers != "none":
        _check_constants(plan)
    small = unwrap(small)
    coupling = freed(coupling_for(model, plan))
    factors = _check_small(small, coupling, plan)
    steps = [Step("none", _score(small, evaluate))]
    with _all_or_nothing(small):
        if readers != "none":
            fitted, told = _fitted(coupling, plan, data, fit, (readers, record(small)), progress)
            _write_(small, plan, fitted, coupling, factors)
            steps.append(replace(told, accuracy=_score(small, evaluate)))
        if batchnorm:
            total = len(data) if isinstance(data, Sized) else 0
            tell = None if progress is None else lambda done: progress("batch norm", done, total)
            found = statistics_of(small, _InputsAlone(data, coupling.graph), tell)
            with torch.no_grad():
                for tensor, value in found.values:
                    tensor.copy_(value)
            steps.append(replace(found.step, accuracy=_score(small, evaluate)))
    return Compensation(tuple(steps))


@dataclass(frozen=True)
class _InputsAlone:
    """The same batches with nothing beside the inputs, so that all steps run the network on the same of them."""

    data: Iterable[Any]
    graph: Graph

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        for number, batch in enumerate(self.data):
            yield read_inputs(batch, self.graph, number)[0], None


def _check_request(readers: str, fit: Fit, data: Iterable[Any]) -> None:
    if readers not in READERS:
        raise BadRequest(f"unknown readers={readers!r}{nearest(readers, READERS)}")
    if not 0 <= fit.ridge < float("inf") or fit.max_bytes < 0:
        raise BadRequest(
            f"cannot fit with ridge={fit.ridge}, max_bytes={fit.max_bytes}\n  do: neither may be negative or infinite"
        )
    check_repeatable(data, "compensation")


def _folded(plan: Plan) -> list[str]:
    """The groups of which channels go whose constants stay."""
    folded = [group for group in plan.groups if plan.constants.get(group.name) == "fold"]
    return [group.name for group in folded if len(plan.keep[group.name]) < group.channels]


def _check_constants(plan: Plan) -> None:
    names = _folded(plan)
    if names:
        raise BadRequest(
            f"the constants that the removed channels of {names[0]!r} left are folded into what reads them: there is "
            "nothing to make up for\n  do: readers='none', or plan with constants='drop' and compensate"
        )


def _check_small(small: nn.Module, coupling: Coupling, plan: Plan) -> Mapping[str, torch.Tensor]:
    """The factors of the rows of ``small`` that write queries; raises unless it is what ``apply`` made, unchanged."""
    if record(small) is None:
        raise WrongModel(
            "small was not made by apply, or lost its record on the way\n  do: pass sc.apply(model, plan) itself"
        )
    found, dense, kept = named(small), coupling.graph.tensors, plan.kept()
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    check_pruned(plan, shapes, who=("the pruned network of the plan", "small"))
    if _folded(plan):  # what constants went into differs from the dense network, and no readers are fitted
        return {}
    factors = attention_factors(coupling, coupling.class_keep(plan.keep))
    rescaled: set[str] = set()
    for name in sorted(coupling.graph.used & found.keys()):
        if not found[name].is_floating_point():
            continue
        wanted = small_tensor(name, dense[name], kept).to(found[name])
        if torch.equal(wanted, found[name].detach()):
            continue
        if name not in factors or not torch.equal(_times(wanted, factors[name]), found[name].detach()):
            raise BadRequest(
                f"tensor {name!r} of small is not that of the dense network any more\n"
                "  do: compensate right after apply, before training, recalibration or another compensation"
            )
        rescaled.add(name)
    return {name: rows for name, rows in factors.items() if name in rescaled}


def _times(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return tensor * rows.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1))


def _score(small: nn.Module, evaluate: Evaluate | None) -> float | None:
    if evaluate is None:
        return None
    with in_mode(small, False):
        return float(evaluate(small))


def _fitted(
    coupling: Coupling, plan: Plan, data: Iterable[Any], fit: Fit, how: tuple[Way, Any], progress: Progress | None
) -> tuple[Fitted, Step]:
    """The dense network's tensors with readers fitted, and what to report. ``how``: the method, and how ``small`` was
    made."""
    method, applied = how
    dense = {name: t.detach() for name, t in coupling.graph.tensors.items()}
    floats = [t for t in dense.values() if t.is_floating_point()]
    dtype = torch.promote_types(floats[0].dtype, torch.float32) if floats else None
    dense = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in dense.items()}
    device = floats[0].device if floats else torch.device("cpu")
    keep = coupling.class_keep(plan.keep)
    graphic = any(edit.kind == "graph" for edit in applied.plan.edits)
    # factors go to readers that lost inputs; whose inputs merely changed have all channels, and a constant, to fit
    sequential = fit.sequential and method != "scale"
    found, skipped = find_readers(coupling, plan, keep, sequential=sequential, may_add=not graphic)
    task = Task(
        coupling,
        keep,
        dense,
        lambda: batches(data, coupling.graph, device, dtype),
        fit,
        method,
        device,
    )
    tell = None if progress is None else lambda done, total: progress(method, done, total)
    with torch.no_grad():
        fitted = fit_readers(task, found, tell)
    names = tuple(reader.name for reader in fitted.changed)
    return fitted, Step(method, None, names, skipped | fitted.skipped, fitted.notes)


def _write_(
    small: nn.Module, plan: Plan, fitted: Fitted, coupling: Coupling, factors: Mapping[str, torch.Tensor]
) -> None:
    """Put what is kept of the fitted tensors into ``small``, and the biases that it gets into its record."""
    found, kept = named(small), plan.kept()
    homes = {r.home.name for r in fitted.changed if r.home.kind in ("bias", "mean")}
    with torch.no_grad():
        for name in sorted({r.weight for r in fitted.changed} | homes):
            value = small_tensor(name, fitted.state[name], kept).to(found[name].device)
            found[name].copy_(_times(value, factors[name]) if name in factors else value)
    edits = [_added_(small, r, fitted, factors) for r in fitted.changed if r.uses[0].node in fitted.added]
    applied = record(small)
    if edits and applied is not None:
        whole = replace(applied.plan, edits=(*applied.plan.edits, *edits))
        small.__dict__[RECORD] = replace(applied, plan=whole)


def _added_(small: nn.Module, reader: Reader, fitted: Fitted, factors: Mapping[str, torch.Tensor]) -> Edit:
    """Give a layer of ``small`` the bias that it lacks."""
    layer: Any = small.get_submodule(reader.home.module)
    constant = fitted.added[reader.uses[0].node].flatten()
    value = constant[reader.rows.flatten().to(constant.device)].to(layer.weight)
    if reader.weight in factors:
        value = _times(value, factors[reader.weight])
    layer.bias = nn.Parameter(value.clone(), requires_grad=layer.weight.requires_grad)
    return Edit("bias", reader.home.module, "", len(value))


@contextmanager
def _all_or_nothing(small: nn.Module) -> Iterator[None]:
    """Puts every tensor of ``small`` back, and takes back what was added, if the block does not end well."""
    before = {name: (t, t.detach().clone()) for name, t in named(small).items()}
    applied = small.__dict__[RECORD]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before.values():
                tensor.copy_(value)
        for name in named(small).keys() - before.keys():
            path, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(path), leaf, None)
        small.__dict__[RECORD] = applied
        raise
