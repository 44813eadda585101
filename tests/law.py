"""The law, as a function that tests call: ``apply(m, p)(x) == masked(m, p)(x)``, and what else ``apply`` promises.

Two oracles that know nothing of each other: ``masked`` runs the dense graph with activations masked where they are
read; ``zero_readers`` runs the user's own module with nothing but the readers' parameters zeroed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import secateur as sc

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def call(model: nn.Module, inputs: Inputs) -> object:
    """Runs ``model`` on a tensor, a tuple of positional, or a dict of keyword inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def leaves(output: object) -> list[Tensor]:
    """Every tensor in a model's output, in order; looks into dataclasses, registered or not."""
    if is_dataclass(output) and not isinstance(output, type):
        return [t for f in fields(output) for t in leaves(getattr(output, f.name))]
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(leaves(leaf))
    return found


def relative_error(small: object, dense: object) -> float:
    """The largest ``max|a - b| / max|b|`` over the outputs; infinite where number or shape differ, or not finite."""
    a, b = leaves(small), leaves(dense)
    if [t.shape for t in a] != [t.shape for t in b] or not a:
        return float("inf")
    worst = 0.0
    for s, d in zip(a, b, strict=True):
        if not (bool(torch.isfinite(s).all()) and bool(torch.isfinite(d).all())):
            return float("inf")
        s, d = s.detach().double(), d.detach().double()
        worst = max(worst, float((s - d).abs().max() / d.abs().max().clamp_min(1e-30)))
    return worst


def to_double(inputs: Inputs) -> Inputs:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def fresh(inputs: Inputs, batch: int, seed: int) -> Inputs:
    """Inputs like the example: normal floats, integers drawn from the example's, axis 0 of length ``batch``."""
    g = torch.Generator().manual_seed(seed)

    def one(t: Tensor) -> Tensor:
        shape = (batch, *t.shape[1:])
        if t.is_floating_point():
            return torch.randn(shape, generator=g, dtype=t.dtype)
        return t.flatten()[torch.randint(0, t.numel(), shape, generator=g)]

    return tree_map(one, inputs)


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Lets a test train or overwrite ``model``; puts parameters, buffers, gradients and mode back."""
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    training = {m: m.training for m in model.modules()}
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, t in model.state_dict().items():
                t.copy_(state[name])
        for m, mode in training.items():
            m.training = mode
        model.zero_grad(set_to_none=True)


def gradients(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters that a backward pass in train mode reaches."""
    torch.manual_seed(0)
    model.train()
    loss = sum((t.square().mean() for t in leaves(call(model, inputs)) if t.requires_grad), torch.zeros(()))
    assert isinstance(loss, Tensor)
    assert bool(torch.isfinite(loss)), "the loss is not finite in train mode"
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def random_ratios(groups: tuple[sc.Group, ...], seed: int, low: float = 0.1, high: float = 0.95) -> dict[str, float]:
    """One ratio for each group, independent of the others."""
    rng = np.random.default_rng(seed)
    return {g.name: float(rng.uniform(low, high)) for g in groups if not g.locked}


def zero_readers(model: nn.Module, plan: sc.Plan, inputs: Inputs) -> object:
    """What the dense module answers when only the ``reads`` slices of removed channels are zeroed in its parameters."""
    with restored(model), torch.no_grad():
        state = model.state_dict()
        for group in plan.groups:
            gone = np.setdiff1d(np.arange(group.channels), plan.keep[group.name])
            for s in group.slices:
                if s.role == "reads" and gone.size:
                    state[s.tensor].index_fill_(s.axis, torch.from_numpy(np.unique(s.positions[gone])), 0.0)
        return call(model.eval(), inputs)


def zero_filters(model: nn.Module, plan: sc.Plan, inputs: Inputs) -> object:
    """What the dense module answers when nothing but the filters of removed channels is zero: slices of parameters with
    two axes or more. ``plan`` must fold what they leave, in every group that it cuts."""
    with restored(model), torch.no_grad():
        parameters = dict(model.named_parameters())
        for group in plan.groups:
            gone = np.setdiff1d(np.arange(group.channels), plan.keep[group.name])
            assert not gone.size or plan.constants[group.name] == "fold", group.name
            for s in group.slices:
                if s.role == "writes" and gone.size and s.tensor in parameters and parameters[s.tensor].dim() >= 2:
                    parameters[s.tensor].index_fill_(s.axis, torch.from_numpy(np.unique(s.positions[gone])), 0.0)
        return call(model.eval(), inputs)


def sizes(model: nn.Module) -> int:
    return sum(t.numel() for t in model.state_dict().values())


def prepared(model: nn.Module, inputs: Inputs) -> sc.Graph:
    """Captures ``model`` in float64 and eval mode, once, for any number of ``assert_law``."""
    return sc.trace(model.double().eval(), to_double(inputs))


def assert_law(
    graph: sc.Graph,
    inputs: Inputs,
    plan: sc.Plan | None = None,
    *,
    ratios: float | Mapping[str, float] = 0.5,
    seed: int = 0,
    tol: float = 1e-9,
    oracle: bool = False,
) -> nn.Module:
    """Plans (unless a plan is given), applies, and checks the law and its promises; returns the pruned module.

    Checked: outputs equal ``masked``'s on the example and on fresh inputs of batch 1 and 3; with ``oracle``, they equal
    ``zero_readers``' too; every parameter that the dense network trains is trained; something shrank if anything
    was removed, and nothing vanished; the original's state is bit for bit what it was, its mode too.
    """
    model, inputs = graph.model, to_double(inputs)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if plan is None:
        plan = sc.plan(graph, criterion="l1", ratios=ratios)
    small, dense = sc.apply(model, plan), sc.masked(model, plan)
    assert not small.training, "apply changed the mode"
    for x in (inputs, fresh(inputs, 1, seed + 1), fresh(inputs, 3, seed + 2)):
        with torch.no_grad():
            got, want = call(small, x), call(dense, x)
            error = relative_error(got, want)
            assert error <= tol, f"the law is broken: relative error {error:.3g}"
            if oracle:
                error = relative_error(got, zero_readers(model, plan, x))
                assert error <= tol, f"zeroing the readers says otherwise: relative error {error:.3g}"
    removed = {g.name for g in plan.groups if len(plan.keep[g.name]) < g.channels}
    if removed:
        assert sizes(small) < sizes(model), f"nothing shrank though channels of {sorted(removed)} were removed"
    else:
        assert sizes(small) == sizes(model)
    assert set(small.state_dict()) == set(before), "tensors appeared or vanished"
    assert all(t.numel() > 0 for name, t in small.state_dict().items() if before[name].numel()), "a tensor was emptied"
    with restored(model):
        trained = gradients(model, fresh(inputs, 3, seed + 3))
    missing = trained - gradients(small, fresh(inputs, 3, seed + 3))
    assert not missing, f"no gradient reaches {sorted(missing)} after pruning"
    after = model.state_dict()
    assert set(after) == set(before)
    assert not model.training
    for name, t in before.items():
        assert torch.equal(after[name], t), f"the original's {name!r} was changed"
    return small
