"""Products of weights and gradients: what the loss would do without a channel, measured batch by batch.

Gradients are autograd's, of the user's own network in eval mode on copies of its tensors. Where a layer reads a weight
that the forward computes from parameters, the gradient there is wanted (a weight-normalised direction has none along
itself), and the captured eval pass is run in the network's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.func import functional_call

from secateur.capture import in_mode
from secateur.core import Group, Slice
from secateur.errors import BadRequest, CannotPrune
from secateur.graph import Graph, as_arguments, with_free_batch
from secateur.groups import Coupling, freed
from secateur.interpreter import walk
from secateur.layer_weights import slices_read
from secateur.nests import flatten, unflatten
from secateur.nodes import shape_of
from secateur.processes import sum_over_processes_
from secateur.statistics import accumulator, agree, no_batches, place_of, read_inputs

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""``(outputs, targets)`` to one number, a scalar tensor that gradients can be taken of."""
Place = str | fx.Node
"""Where a gradient is taken: at a tensor, by its name, or at what a node of the captured pass computes."""
Run = tuple[torch.Tensor, Mapping[Place, torch.Tensor]]
"""The loss of a batch, and the tensors that gradients are taken of."""


def products(
    coupling: Coupling, groups: Sequence[Group], data: Iterable[Any], loss: Loss, tick: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """``{group name: [C]}``: the mean over batches of ``(sum_w g w)^2`` over the weights of the channel's filters.

    Raises ``CannotPrune`` for a group that has no filters, or whose filters no gradient reaches in any batch.
    """
    pieces = {group.name: _filters(group, coupling) for group in groups}
    computed = any(isinstance(place, fx.Node) for own in pieces.values() for place, _ in own)
    if computed:
        coupling = freed(coupling)
        pieces = {group.name: _filters(group, coupling) for group in groups}
    graph = coupling.graph if computed else with_free_batch(coupling.graph)
    tensors, device, dtype = place_of(graph)
    exact = accumulator(device)
    problem: Exception | None = None
    with torch.inference_mode(False):  # what is made inside inference mode can be neither trained nor added to
        totals = {group.name: torch.zeros(group.channels, device=device, dtype=exact) for group in groups}
        reached = {group.name: torch.zeros((), device=device, dtype=exact) for group in groups}
        count = torch.zeros((), device=device, dtype=exact)
        try:
            with in_mode(graph.model, False), torch.enable_grad():
                state = {name: t.clone() for name, t in tensors.items()}
                places = {place: None for own in pieces.values() for place, _ in own}
                runs = _Runs(graph, state, list(places), data, loss, device, dtype)
                for value, weights in runs.of_graph(coupling) if computed else runs.of_model():
                    slopes = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                    change = {
                        place: weight.detach().to(exact) * slope.to(exact)
                        for (place, weight), slope in zip(weights.items(), slopes, strict=True)
                        if slope is not None
                    }
                    for name, own in pieces.items():
                        parts = [_by_channel(change[place], piece) for place, piece in own if place in change]
                        totals[name] += torch.stack(parts).sum(0).square() if parts else 0
                        reached[name] += bool(parts)
                    count += 1
                    tick()
        except Exception as error:
            problem = error
        agree(problem, device)
        sum_over_processes_([count, *totals.values(), *reached.values()])
    if not float(count):
        raise no_batches()
    _check_reached(name for name, batches in reached.items() if not float(batches))
    return {name: (total / count).cpu().double() for name, total in totals.items()}


def _filters(group: Group, coupling: Coupling) -> list[tuple[Place, Slice]]:
    """The filters of ``group``, each with where its gradient is taken."""
    tensors = coupling.graph.tensors
    found: list[tuple[Place, Slice]] = []
    for piece, node in slices_read(coupling, group):
        rank = tensors[piece.tensor].dim() if node is None else len(shape_of(node) or ())
        if piece.role == "writes" and rank >= 2:
            found.append((piece.tensor if node is None else node, piece))
    if not found:
        raise CannotPrune(
            f"group {group.name!r} has no filters to take gradients of: no weight writes its channels\n"
            "  do: exclude it, or use a criterion that looks at weights, such as 'l1'"
        )
    return found


def _check_reached(without: Iterable[str]) -> None:
    names = list(without)
    if names:
        shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise CannotPrune(
            f"no gradient of the loss reached the filters of {len(names)} groups in any batch: {shown}\n"
            "  the forward detaches what they put out, runs them under no_grad, or the loss does not depend on them\n"
            "  do: let gradients through, exclude these groups, or use a criterion that needs none, such as 'l1'"
        )


def _by_channel(change: torch.Tensor, piece: Slice) -> torch.Tensor:
    """``[C]``: the sum over all that each channel owns in a tensor."""
    along = change.movedim(piece.axis, 0).flatten(1).sum(1)
    return along[torch.from_numpy(piece.positions).to(along.device)].sum(1)


class _Runs:
    """The loss of every batch, with the tensors in ``state``."""

    def __init__(
        self,
        graph: Graph,
        state: dict[str, torch.Tensor],
        places: Sequence[Place],
        data: Iterable[Any],
        loss: Loss,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.graph, self.state, self.data, self.loss, self.device, self.dtype = graph, state, data, loss, device, dtype
        self.nodes = [place for place in places if isinstance(place, fx.Node)]
        self.named: dict[Place, torch.Tensor] = {
            place: state[place].requires_grad_() for place in places if isinstance(place, str)
        }

    def of_model(self) -> Iterator[Run]:
        """By the user's own network."""
        for number, (offer, targets) in enumerate(self._batches()):
            args, kwargs = as_arguments(offer)
            outputs = functional_call(self.graph.model, dict(self.state), args, kwargs)
            yield self._loss(outputs, targets, number), self.named

    def of_graph(self, coupling: Coupling) -> Iterator[Run]:
        """By the captured eval pass, where what nodes compute of weights is a tensor to take gradients of."""
        capture = self.graph.captures[0]
        everything = coupling.class_keep({})
        behind = {node.next: node for node in self.nodes}
        for number, (offer, targets) in enumerate(self._batches()):
            weights = dict(self.named)
            walking = walk(coupling, everything, self.state, self.graph.inputs.flat(*as_arguments(offer)), 0, behind)
            while True:
                try:
                    stop, env = next(walking)
                except StopIteration as end:
                    outputs = unflatten(capture.skeleton, end.value)
                    break
                node = behind[stop]
                weights[node] = env[node] = env[node].detach().requires_grad_()
            yield self._loss(outputs, targets, number), weights

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        for number, batch in enumerate(self.data):
            offer, _ = read_inputs(batch, self.graph, number)
            if offer is batch:
                raise BadRequest(
                    f"batch {number} of the data has no targets, and a loss needs them\n"
                    "  do: pass batches of (inputs, targets)"
                )
            yield self._own(offer, cast=True), self._own(batch[1], cast=False)

    def _own(self, value: Any, *, cast: bool) -> Any:
        tensors, skeleton = flatten(value)
        # copies: a network may write into its inputs, which are the user's
        kinds = [self.dtype if cast and t.is_floating_point() else None for t in tensors]
        return unflatten(skeleton, [t.to(self.device, kind, copy=True) for t, kind in zip(tensors, kinds, strict=True)])

    def _loss(self, outputs: Any, targets: Any, number: int) -> torch.Tensor:
        try:
            value = self.loss(outputs, targets)
        except Exception as error:
            error.add_note(f"while the loss of batch {number} of the calibration data was computed")
            raise
        return _checked(value, number)


def _checked(value: object, number: int) -> torch.Tensor:
    problem = ""
    if not isinstance(value, torch.Tensor):
        problem = f"returned {type(value).__name__}, not a tensor"
    elif value.numel() != 1:
        problem = f"returned the shape {list(value.shape)}, not one number"
    elif not bool(torch.isfinite(value).all()):
        problem = f"is {float(value)}"
    elif not value.requires_grad:
        problem = "does not depend on the network's weights (detached, or computed without its outputs)"
    if problem:
        raise BadRequest(
            f"the loss of batch {number} {problem}\n"
            "  do: return a scalar tensor computed from the outputs, as torch.nn.functional.cross_entropy does"
        )
    assert isinstance(value, torch.Tensor)
    return value.reshape(())
