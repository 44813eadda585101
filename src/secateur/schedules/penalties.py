"""Sparse training: a penalty that grows until the channels to be cut are nearly zero, so that the cut hardly hurts.

    P = lambda / 2 * sum_c w_c * ||all that makes channel c||^2

over all coupled groups; lambda grows by ``step`` every ``every`` steps up to ``ceiling``. As a gradient, which is how
it is applied: ``lambda * w_c * W`` on every weight ``W`` of channel ``c``.

- *greg*: ``w_c`` is 1 for the channels that a plan removes, chosen at the start, and 0 for all others. Wang et al.,
  "Neural Pruning via Growing Regularization" (ICLR 2021), section 3.2 (GReg-1). With ``choose_at`` above 0 the penalty
  first grows on all channels alike, which drives their norms apart, and the choice is made when lambda gets there
  (section 3.3, GReg-2).
- *depgraph*: ``w_c = 2 ** (alpha (s_max - s_c) / (s_max - s_min))`` with ``s_c = ||all that makes channel c||^2`` and
  the extremes of its group: all are penalised, the least important 2^alpha times as much. Fang et al., "DepGraph" (CVPR
  2023), section 3.3; ``s`` is taken anew whenever lambda grows.

The papers differ in what they count as making a channel: GReg the filters alone (``roles=("writes",)``), DepGraph also
what reads it (add ``"reads"``). Here it is, by default, all that must be zero for the channel to be zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Unpack, get_args

import numpy as np
import torch
from torch import nn

from secateur.allocation import excluded_groups
from secateur.core import Role
from secateur.errors import BadRequest, nearest
from secateur.graph import Graph, Inputs, trace
from secateur.pipeline import plan
from secateur.plans import Plan
from secateur.recover.hooks import Hooks, State
from secateur.schedules import places
from secateur.schedules.options import Options, whole_groups
from secateur.schedules.zeros import read_masks, same_network

Kind = Literal["greg", "depgraph"]


@dataclass(frozen=True)
class Growth:
    """How the penalty grows and whom it meets (see the file's docstring).

    At step ``t`` (from 0) ``lambda = min(ceiling, step * (1 + t // every))``. ``choose_at``: the lambda at which greg
    chooses; 0: before the first step. ``roles``: what of a channel is penalised. ``alpha``: how unevenly depgraph does.
    """

    kind: Kind = "greg"
    step: float = 1e-4
    every: int = 10
    ceiling: float = 1.0
    choose_at: float = 0.0
    alpha: float = 4.0
    roles: tuple[Role, ...] = ("writes", "scales", "follows")


def growing_penalty(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    growth: Growth | None = None,
    as_loss: bool = False,
    **options: Unpack[Options],
) -> GrowingPenalty:
    """A growing penalty on coupled channels, for somebody's training loop; then cut by its ``plan()``.

    ``options`` are those of ``plan``: what the network is to end as, and which groups are left alone (``exclude``).
    By default ``hooks.after_backward`` adds the gradient, which costs one multiplication a weight; ``as_loss`` gives
    ``hooks.penalty`` instead, the value itself, to be added to the loss once a step. Both train alike, except where the
    loop clips gradients over a loss of several parts. Steps are counted by ``hooks.after_step``.

        sparse = growing_penalty(net, x, budget=Budget(keep=0.5))
        ...                                     # your loop calls sparse.hooks
        small = apply(net, sparse.plan())

    End with the last epoch's weights: the best epoch is mostly an early one, whose weights the penalty hardly met.

    Raises what ``plan`` raises for the goal, and BadRequest for settings out of range, here and now.
    """
    growth = growth or Growth()
    _check(growth)
    return GrowingPenalty(trace(model, example_inputs), growth, as_loss, options)


class GrowingPenalty:
    """A growing penalty under way. ``hooks``: what a training loop calls. ``steps``: how many are over."""

    def __init__(self, graph: Graph, growth: Growth, as_loss: bool, options: Options) -> None:
        self.graph, self.growth, self.options = graph, growth, options
        self.steps = 0
        self._goal = plan(graph, **options)
        found = places.parameters_of(graph.model)
        spared = (
            excluded_groups(self._goal.groups, options.get("exclude", ()), ()) | whole_groups(graph, options).keys()
        )
        self._groups = [group for group in self._goal.groups if group.name not in spared]
        self._slices = {group.name: places.makers(group, found, growth.roles) for group in self._groups}
        self._chosen: dict[str, np.ndarray] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._coefficients: dict[places.Place, torch.Tensor] = {}
        self._moved: dict[tuple[places.Place, torch.device, torch.dtype], torch.Tensor] = {}
        self.hooks = Hooks(
            penalty=self._penalty if as_loss else None,
            after_backward=None if as_loss else self._after_backward,
            after_step=self._after_step,
            state=self._state,
            restore=self._restore,
        )

    @property
    def strength(self) -> float:
        """Lambda at the step that comes next."""
        return min(self.growth.ceiling, self.growth.step * (1 + self.steps // self.growth.every))

    def plan(self) -> Plan:
        """What to cut: greg what was chosen; depgraph, and greg before its choice, what the options choose now."""
        keep = places.kept_by(self._chosen) if self._chosen else plan(self.graph, **self.options).keep
        made_by = {**self._goal.made_by, "schedule": f"growing penalty, {self.growth.kind}"}
        return replace(self._goal, keep=keep, made_by=made_by, graph=self.graph)

    def _weigh(self) -> None:
        """The weights of the channels for the step that comes next, where they are not known or have changed."""
        growth = self.growth
        if growth.kind == "depgraph":
            if not self._weights or self.steps % growth.every == 0:
                self._set({name: _relative(s, growth.alpha) for name, s in self._importance().items()})
        elif not self._chosen and self.strength >= growth.choose_at:
            self._chosen = places.removed(plan(self.graph, **self.options))
            self._set({group.name: torch.from_numpy(self._chosen[group.name]).double() for group in self._groups})
        elif not self._weights:
            self._set({group.name: torch.ones(group.channels, dtype=torch.float64) for group in self._groups})

    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights, self._moved = weights, {}
        self._coefficients = places.coefficients(self._slices, weights, places.parameters_of(self.graph.model))

    def _importance(self) -> dict[str, torch.Tensor]:
        """``s_c``, ``[C]`` float64 for every group."""
        found = places.parameters_of(self.graph.model)
        squares: dict[places.Place, torch.Tensor] = {}
        result = {}
        for group in self._groups:
            total = torch.zeros(group.channels, dtype=torch.float64)
            for part in self._slices[group.name]:
                place = (part.tensor, part.axis)
                if place not in squares:
                    squares[place] = _squares(found[part.tensor].detach(), part.axis).double().cpu()
                total += squares[place][torch.from_numpy(part.positions)].sum(1)
            result[group.name] = total
        return result

    def _coefficient(self, place: places.Place, like: torch.Tensor) -> torch.Tensor:
        key = (place, like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = self._coefficients[place].to(like)
        return self._moved[key]

    def _penalty(self, model: nn.Module) -> torch.Tensor:
        found = places.parameters_of(same_network(model, self.graph))
        self._weigh()
        parts = [
            (self._coefficient(place, found[place[0]]) * _squares(found[place[0]], place[1])).sum()
            for place in self._coefficients
            if found[place[0]].requires_grad
        ]
        if not parts:
            return torch.zeros((), device=next(iter(found.values())).device)
        return torch.stack([part.to(parts[0]) for part in parts]).sum() * (self.strength / 2)

    @torch.no_grad()
    def _after_backward(self, model: nn.Module) -> None:
        found = places.parameters_of(same_network(model, self.graph))
        self._weigh()
        strength = self.strength
        for place in self._coefficients:
            tensor = found[place[0]]
            if tensor.requires_grad:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
                weights = places.along(self._coefficient(place, tensor), place[1], tensor.dim())
                tensor.grad.addcmul_(tensor.detach(), weights, value=strength)

    def _after_step(self, model: nn.Module) -> None:
        same_network(model, self.graph)
        self.steps += 1

    def _state(self) -> State:
        chosen = {f"chosen:{name}": torch.from_numpy(mask.copy()) for name, mask in self._chosen.items()}
        weights = {f"weight:{name}": weight.clone() for name, weight in self._weights.items()}
        return {"steps": self.steps, **chosen, **weights}

    def _restore(self, state: State) -> None:
        chosen = read_masks(state, "chosen:", self._goal)
        weights = {
            key.removeprefix("weight:"): value.cpu().double()
            for key, value in state.items()
            if key.startswith("weight:") and isinstance(value, torch.Tensor)
        }
        wanted = {group.name: group.channels for group in self._groups}
        if weights and {name: len(weight) for name, weight in weights.items()} != wanted:
            raise BadRequest("the saved state belongs to another network, or to other groups of it (exclude)")
        self.steps, self._chosen = int(state["steps"]), chosen
        self._weights, self._coefficients, self._moved = {}, {}, {}
        if weights:
            self._set(weights)


def _squares(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """The sum of squares at each position along ``axis``, ``[N]``."""
    return tensor.movedim(axis, 0).flatten(1).square().sum(1) if tensor.dim() > 1 else tensor.square()


def _relative(s: torch.Tensor, alpha: float) -> torch.Tensor:
    """``2 ** (alpha (s_max - s) / (s_max - s_min))``, ``[C]``; 1 where all are alike."""
    span = s.max() - s.min()
    return torch.ones_like(s) if span <= 0 else torch.exp2(alpha * (s.max() - s) / span)


def _check(growth: Growth) -> None:
    if growth.kind not in get_args(Kind):
        raise BadRequest(f"there is no penalty {growth.kind!r}{nearest(str(growth.kind), get_args(Kind))}")
    numbers = (growth.step, growth.ceiling, growth.choose_at, growth.alpha)
    if not all(math.isfinite(n) and n >= 0 for n in numbers) or growth.step == 0 or growth.every < 1:
        raise BadRequest(
            f"cannot grow a penalty with {growth}\n"
            "  do: step above 0, every at least 1, ceiling, choose_at and alpha not negative"
        )
    if growth.choose_at > growth.ceiling:
        raise BadRequest(
            f"choose_at={growth.choose_at} is above the ceiling={growth.ceiling}, so that nothing would ever be chosen"
        )
    known = get_args(Role)
    odd = next((role for role in growth.roles if role not in known), None)
    if odd is not None or not growth.roles:
        raise BadRequest(f"roles={growth.roles!r} are not some of {', '.join(known)}")
