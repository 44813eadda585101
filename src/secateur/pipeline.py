"""The whole flow in one function: capture, groups, scores, kept counts, plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from secateur.allocation import allocate
from secateur.core import Budget, Criterion
from secateur.errors import BadRequest
from secateur.graph import Graph, Inputs, trace
from secateur.groups import Prefer, couple
from secateur.operations import costs_of
from secateur.plans import Plan, fingerprint, input_specs
from secateur.scores import score
from secateur.version import __version__


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
    residual: Literal["coupled", "inner", "scatter"] = "coupled",
    prefer: Prefer = "channels",
    min_channels: int = 1,
    round_to: int = 1,
    seed: int = 0,
) -> Plan:
    """Decide which channels of ``model`` stay. Nothing of the model is changed.

    ``budget`` says what the result may cost, ``ratios`` what fraction of which groups goes (or an absolute width); with
    both, ``ratios`` fixes the groups that it names and the rest meets the budget. ``exclude``: names or globs of groups
    that stay whole. ``allocation``: ``"global"`` compares normalised scores per cost over the whole network,
    ``"uniform"`` takes the same fraction everywhere. ``prefer="module"`` keeps the halves of even splits equal, so that
    more networks stay plain modules of their own classes.

    Raises ``CannotCapture``, ``BadRequest``, ``Unreachable`` or ``CannotPrune``, each with what to do about it.
    """
    _check_request(budget, ratios, data, residual)
    graph = trace(model, example_inputs)
    coupling = couple(graph, prefer)
    scores = score(coupling.groups, graph.tensors, criterion, seed=seed)
    cost = costs_of(coupling, budget.of) if budget is not None and budget.of in ("macs", "params") else None
    keep = allocate(
        coupling.groups,
        scores,
        ratios=ratios,
        budget=budget,
        cost=cost,
        allocation=allocation,
        exclude=exclude,
        min_channels=min_channels,
        round_to=round_to,
        locked=coupling.locked,
    )
    options = {
        "allocation": allocation,
        "prefer": prefer,
        "seed": seed,
        "ratios": ratios,
        "budget": budget,
        "exclude": exclude,
    }
    return Plan(
        groups=coupling.groups,
        keep=keep,
        model=fingerprint(graph.model),
        inputs=input_specs(graph.args, graph.kwargs),
        made_by=_made_by(criterion, options),
        graph=graph,
    )


def _check_request(budget: object, ratios: object, data: object, residual: str) -> None:
    if budget is None and ratios is None:
        raise BadRequest("say how much to prune: budget=sc.Budget(keep=0.5) or ratios=0.5")
    if budget is not None and not isinstance(budget, Budget):
        raise BadRequest(f"a budget is a Budget, not {budget!r}: say sc.Budget(keep=0.5, of='macs')")
    if data is not None:
        raise BadRequest("data is for criteria that look at activations; this release has none that do")
    if residual != "coupled":
        raise BadRequest(
            f"residual={residual!r} is reserved; this release prunes residual streams together, residual='coupled'"
        )


def _made_by(criterion: str | Criterion, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the plan wants to know about its making, as JSON values; options that were not given are left
    out."""
    found: dict[str, Any] = {"secateur": __version__}
    found["criterion"] = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom")
    for name, value in options.items():
        if isinstance(value, Budget):
            value = {key: own for key, own in vars(value).items() if own is not None}
        elif isinstance(value, Mapping):
            value = dict(value)
        if value not in (None, (), [], ""):
            found[name] = list(value) if isinstance(value, (tuple, set)) else value
    return found
