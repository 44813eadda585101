"""Progressive pruning while training: after every epoch channels are chosen and set to zero, and only at the end they
are cut.

- *soft* (He et al., "Soft Filter Pruning", IJCAI 2018, algorithm 1): zeroed filters go on learning and may come back.
- *hard* (as the code of He et al., "FPGM", CVPR 2019 does): the gradients of what was zeroed are zeroed too, and after
  every step, because of momentum and weight decay, so is what was zeroed. What is zero has the lowest norm, and lies
  next to the geometric median once it is many: it is chosen again, and the choice stays what it was.

Hard zeroing at a constant rate is thus decided by its first choice. Made before training (``select_``), as the code of
FPGM does, that is a mask fixed on random weights, or one cut of a pretrained network that is then trained on; which of
the two, only the weights say. ``Zeroing.history`` shows what changed from one choice to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np
import torch
from torch import nn

from secateur.core import Criterion, Turnover
from secateur.criteria import is_sequential
from secateur.errors import BadRequest
from secateur.graph import Graph, Inputs, trace, unwrap
from secateur.masks import meaning_of
from secateur.pipeline import plan
from secateur.plans import Plan
from secateur.recover.hooks import Hooks, State
from secateur.schedules import places
from secateur.schedules.options import Options, at_widths, coupled, partway, start_of
from secateur.schedules.rankings import among_the_rest, gone_first
from secateur.schedules.turnovers import as_state, from_state, turnover


@dataclass(frozen=True)
class Pace:
    """``every``: epochs from one choice to the next. ``grow``: epochs in which what is zero grows to the whole of it.
    ``soft``: it may come back. ``exclude_zeroed``: what is zero already is no part of what a criterion compares."""

    every: int = 1
    grow: int = 0
    soft: bool = False
    exclude_zeroed: bool = False


def zeroing(
    model: nn.Module | Graph,
    example_inputs: Inputs | None = None,
    *,
    every: int = 1,
    grow: int = 0,
    soft: bool = False,
    exclude_zeroed: bool = False,
    **options: Unpack[Options],
) -> Zeroing:
    """Choose and zero channels after every ``every`` epochs of somebody's training loop; see the file's docstring.

    ``options`` are those of ``plan`` and say what the network is to end as; over the first ``grow`` epochs the kept
    part shrinks geometrically to that, with 0 it is there at once (FPGM and SFP: a constant rate; a rate that grows is
    the idea of asymptotic soft filter pruning, whose own curve is another). The network is captured once; the weights
    are read anew at every choice. Hard, the widths are those of the first choice, and what went stays gone.

        progress = zeroing(net, x, criterion="fpgm", ratios=0.4, constants="fold")
        progress.select_()                      # optional: start pruned, as FPGM's code does
        ...                                     # your loop calls progress.hooks
        small = apply(net, progress.plan())

    ``constants`` is an option of ``plan``, by group or for all. ``"drop"``: the smaller network is to go without what a
    removed channel would give. Hard, all that makes one is zeroed: filters, norm weights and layer scales, and biases.
    The zeroed network then computes just what the smaller one does wherever the channel is 0 when it is read: behind a
    batch norm and an activation that is 0 at 0 (ReLU, GELU, SiLU, Hardswish, tanh). It does not behind a sigmoid or a
    softplus, where the norm's shift is a buffer (frozen batch norm) or missing (``affine=False``, in eval mode), or
    where a norm's statistics count the zeros (group and layer norm): the smaller network drops a constant there. Soft,
    only the filters are zeroed, as in the paper: were a norm's weight and bias zero too, behind a ReLU no gradient
    would bring the channel back. Behind a batch norm a zeroed filter leaves the constant act(beta), which the smaller
    network drops; ``finish_`` zeroes the rest, so that the two agree.

    ``"fold"``: only the filters are zeroed, hard and soft, as FPGM's code does; norms and biases learn on, and the
    constants that they give are kept in what reads them, so that the two agree behind any activation.

    ``exclude_zeroed``: what a criterion compares (distances, similarities) are the filters that are not zero; those
    that are go first. It matters where the zeroed part grows, or where the network has dead filters of its own: many
    equal points draw the median to themselves.

    End with the last epoch's weights: the best epoch is mostly one from before the zeroing, whose weights undo it.
    Weights that are averaged over time (``ema``) are not zero either: ``plan`` then chooses anew on the average.

    Raises what ``plan`` raises for the goal, here and now, and ``CannotPrune`` for a network that cannot be zeroed.
    """
    if every < 1 or grow < 0:
        raise BadRequest(f"cannot zero with every={every}, grow={grow}\n  do: every at least 1, grow at least 0 epochs")
    graph = trace(model, example_inputs)
    return Zeroing(graph, Pace(every, grow, soft, exclude_zeroed), options)


class Zeroing:
    """Zeroing under way. ``hooks``: what a training loop calls. ``epochs``: how many are over."""

    def __init__(self, graph: Graph, pace: Pace, options: Options) -> None:
        self.graph, self.pace, self.options = graph, pace, options.copy()
        self._goal = plan(graph, **options)
        meaning_of(coupled(graph, options), self._goal)  # are there filters, where constants are folded?
        if pace.exclude_zeroed:
            _rank_by_(self.options, among_the_rest(options.get("criterion", "l1")))
        self.start = start_of(graph, options)
        self.epochs, self.reached = 0, 0.0
        self._history: list[Turnover] = []
        self._widths: dict[str, int] = {}
        self._removed: dict[str, np.ndarray] = {}
        spared = places.harmful(graph, self._goal)
        found = {name: t for name, t in places.parameters_of(graph.model).items() if name not in spared}
        self._zeroed = places.zeroed(self._goal, found, soft=pace.soft)
        self._made = places.zeroed(self._goal, found)
        self._index = places.Index({})
        self.hooks = Hooks(
            after_backward=None if pace.soft else self._after_backward,
            after_step=None if pace.soft else self._after_step,
            after_epoch=self._after_epoch,
            state=self._state,
            restore=self._restore,
        )

    @property
    def history(self) -> tuple[Turnover, ...]:
        """What every choice changed about the one before it, the first of all included: by group, which channels."""
        return tuple(self._history)

    @property
    def channels(self) -> dict[str, int]:
        """How many channels each group has."""
        return {group.name: group.channels for group in self._goal.groups}

    def select_(self) -> None:
        """Choose anew on the weights as they are, and zero what was chosen."""
        fraction = min(1.0, self.epochs / self.pace.grow) if self.pace.grow else 1.0
        self._remember(places.removed(self._choose(fraction)), fraction)
        self._index.zero_(places.parameters_of(self.graph.model))

    def plan(self) -> Plan:
        """The plan that cuts what is zero now. Where that is not yet the goal, or the weights are not those that were
        zeroed last (soft and trained on since, or loaded), the choice is made anew on the weights as they are."""
        return self._as_plan(places.kept_by(self._removed)) if self._is_done() else self._choose(1.0)

    def finish_(self) -> Plan:
        """After the last epoch: zero all that makes the removed channels (where constants are folded, the filters), and
        return the plan that cuts them."""
        final = self.plan()
        if not self._is_done():
            self._remember(places.removed(final), 1.0)
        index = places.Index(places.positions(self._made, self._removed))
        index.zero_(places.parameters_of(self.graph.model))
        return final

    def _is_done(self) -> bool:
        """Whether what is chosen is the goal, and is zero."""
        complete = bool(self._removed) and self.reached >= 1
        return complete and self._index.is_zero(places.parameters_of(self.graph.model))

    def _choose(self, fraction: float) -> Plan:
        if self.pace.soft:
            same = {group.name: group for group in self._goal.groups}
            return self._as_plan(plan(self.graph, **partway(self.start, self.options, fraction, same)).keep)
        if not self._widths:
            self._widths = {name: len(kept) for name, kept in plan(self.graph, **self.options).keep.items()}
        widths = {g.name: _width(g.channels, self._widths[g.name], fraction) for g in self._goal.groups}
        how = at_widths(self.options, widths)
        found = plan(self.graph, **how)
        gone = places.removed(found)
        if any((before & ~gone[name]).any() for name, before in self._removed.items()):
            # a criterion that does not put zeros last
            _rank_by_(how, gone_first(how.get("criterion", "l1"), self._removed))
            found = plan(self.graph, **how)
        return self._as_plan(found.keep)

    def _as_plan(self, keep: Mapping[str, tuple[int, ...]]) -> Plan:
        made_by = {**self._goal.made_by, "schedule": "soft zeroing" if self.pace.soft else "hard zeroing"}
        return replace(self._goal, keep=keep, made_by=made_by, graph=self.graph)

    def _remember(self, masks: dict[str, np.ndarray], fraction: float) -> None:
        self._history.append(turnover(self._removed, masks, epoch=self.epochs))
        self._set(masks, fraction)

    def _set(self, masks: dict[str, np.ndarray], fraction: float) -> None:
        self._removed, self.reached = masks, fraction
        # a state from before the first choice has no masks
        self._index = places.Index(places.positions(self._zeroed, masks) if masks else {})

    def _after_backward(self, model: nn.Module) -> None:
        gradients = {name: p.grad for name, p in places.parameters_of(self._own(model)).items()}
        self._index.zero_(gradients)

    def _after_step(self, model: nn.Module) -> None:
        self._index.zero_(places.parameters_of(self._own(model)))

    def _after_epoch(self, model: nn.Module) -> None:
        self._own(model)
        self.epochs += 1
        if self.epochs % self.pace.every == 0:
            self.select_()

    def _own(self, model: nn.Module) -> nn.Module:
        return same_network(model, self.graph)

    def _state(self) -> State:
        masks = {f"removed:{name}": torch.from_numpy(mask.copy()) for name, mask in self._removed.items()}
        widths = {f"width:{name}": width for name, width in self._widths.items()}
        history = as_state(self._history, self._goal.groups)
        return {"epochs": self.epochs, "reached": self.reached, **masks, **widths, **history}

    def _restore(self, state: State) -> None:
        masks = read_masks(state, "removed:", self._goal)
        self.epochs = int(state["epochs"])
        self._widths = {k.partition(":")[2]: int(v) for k, v in state.items() if k.startswith("width:")}
        self._history = from_state(state, self._goal.groups)
        self._set(masks, float(state["reached"]))


def same_network(model: nn.Module, graph: Graph) -> nn.Module:
    """``model`` without wrappers. Raises BadRequest unless it is the one that the hooks were made for."""
    inner = unwrap(model)
    if inner is not graph.model:
        raise BadRequest(
            f"these hooks were made for another network than the {type(inner).__name__} they are called with\n"
            "  do: make them for the very network that you train, and call them with it"
        )
    return inner


def read_masks(state: State, prefix: str, goal: Plan) -> dict[str, np.ndarray]:
    """The masks in a hook's state. Raises BadRequest for those of another network."""
    masks = {
        key.removeprefix(prefix): value.cpu().numpy().astype(bool)
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, torch.Tensor)
    }
    wanted = {group.name: group.channels for group in goal.groups}
    if masks and {name: len(mask) for name, mask in masks.items()} != wanted:
        odd = next(n for n in [*masks, *wanted] if n not in masks or len(masks[n]) != wanted.get(n))
        raise BadRequest(f"the saved state belongs to another network: it does not fit the group {odd!r}")
    return masks


def _width(dense: int, final: int, fraction: float) -> int:
    if fraction >= 1:
        return final
    return max(final, math.floor(dense * (final / dense) ** fraction + 1e-9))


def _rank_by_(options: Options, criterion: Criterion) -> None:
    """Put ``criterion``, made of the one that ``options`` have, in its place."""
    if is_sequential(options.get("criterion", "l1")):  # which is known by its identity
        options["greedy"] = True
    options["criterion"] = criterion
