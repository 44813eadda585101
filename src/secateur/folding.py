"""Folding: the constants that zeroed filters leave behind, moved into what reads them.

A filter of zeros puts out its bias; behind a batch norm and an activation that is ``act(b0)``, ``b0 = beta + gamma
(bias - mean) / sqrt(var + eps)``, the same at every position of every image, and the network goes on reading it. A
plan with ``constants={group: "fold"}`` stands for that network, the filters of what it removes set to zero and all else
as it was: what a removed channel gave its readers is added to their biases, or subtracted from the running mean of the
batch norm behind. Under zero padding the borders get less of it than the interior: there the reader gets a small
convolution of ones (``wiring.py``), which is exact as well. Sums that keep their width get the constants themselves.
The constants are read off a run of the zeroed network, so that whatever lies in between needs no code of its own.

Sources: He et al. (FPGM, CVPR 2019), whose released code adds ``b0`` in the scattered positions and drops it elsewhere;
the fold into consumers is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from secateur.consumers import Affine, affine, caller
from secateur.core import Edit, Group
from secateur.errors import CannotPrune
from secateur.groups import Coupling
from secateur.homes import home_of
from secateur.interpreter import Masks, walk
from secateur.masks import Meaning, meaning_of, zeroed_filters
from secateur.nodes import module_stack, named_args, op_name, shape_of, source_line
from secateur.patches import layout_of, matrix
from secateur.plans import CONSTANT_KERNEL, Plan
from secateur.proofs import doubles, telling_inputs
from secateur.slicing import State
from secateur.wiring import CONSTANTS, Spread, takes_kernel

EVEN = 1e-9
"""How much a constant may differ between positions and images, relative to the largest value around."""


@dataclass(frozen=True, eq=False)
class Folded:
    """``edits``: what the pruned network needs besides slicing. ``shifts``: what is added to tensors of the dense
    network, dense shapes. ``values``: the tensors that only the pruned network has. float64 on the CPU."""

    edits: list[Edit] = field(default_factory=list)
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)


def fold(
    coupling: Coupling,
    plan: Plan,
    state: State,
    spreads: Sequence[Spread],
    *,
    images: Sequence[torch.Tensor] | None = None,
) -> Folded:
    """What becomes of the constants that ``plan`` folds, by the dense tensors in ``state``. ``spreads``: where modules
    scatter. ``images``: the inputs that they are read off from; any will do, since constants do not depend on them.

    Raises ``CannotPrune`` where something reads them that has no place for a constant, or where they are none, because
    they depend on the image or on the position.
    """
    found = Folded()
    meaning = meaning_of(coupling, plan)
    if not meaning.zeros:
        return found
    folding = _Folding(coupling, Masks(coupling, meaning.folded), meaning, found)
    firsts = [(next(iter(spread.node.users)), spread) for spread in spreads]
    nodes = coupling.graph.captures[0].graph.nodes
    readers = {node for node in nodes if folding.reads(node)}
    padders = {node for node in nodes if node not in readers and folding.pads(node)}
    walking = walk(
        coupling,
        meaning.keep,
        zeroed_filters(doubles(state), meaning.zeros),
        telling_inputs(coupling, 1) if images is None else images,
        watch=readers | padders | {node for node, _ in firsts},
    )
    kept = Masks(coupling, coupling.class_keep(plan.keep))
    with torch.no_grad():
        for node, env in walking:
            for first, spread in firsts:
                if first is node:
                    folding.scatter(spread, env[spread.node])
            if node in padders:
                folding.padded(node, env)
            if node in readers:
                folding.reader(node, env, kept)
    return found


def check_constant(coupling: Coupling, plan: Plan, spreads: Sequence[Spread], found: Folded) -> None:
    """Raises ``CannotPrune`` unless ``found``, which ``fold`` made of the network as it is, is the same on other
    images: where a forward mixes those of a batch, or chooses by them, a single run cannot tell."""
    if not found.shifts and not found.values:
        return
    images = [-1.5 * t if t.is_floating_point() else t for t in telling_inputs(coupling, 1)]
    again = fold(coupling, plan, coupling.graph.tensors, spreads, images=images)
    there = {**again.shifts, **again.values}
    for name, constant in {**found.shifts, **found.values}.items():
        if float((constant - there[name]).abs().max()) > EVEN * max(1.0, float(constant.abs().max())):
            raise CannotPrune(
                f"constants='fold' cannot be carried out: what zeroed filters would add to {name!r} is no constant: it "
                f"depends on the images{_DO}"
            )


def shifted(state: State, shifts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with what is added to its tensors, each in its own dtype and on its own device."""
    return dict(state) | {n: (state[n].detach().double().cpu() + more).to(state[n]) for n, more in shifts.items()}


@dataclass(frozen=True, eq=False)
class _Folding:
    """One fold under way; ``masks``: of what is folded alone."""

    coupling: Coupling
    masks: Masks
    meaning: Meaning
    found: Folded

    def reads(self, node: fx.Node) -> bool:
        """Whether a call reads constants, and puts out anything by them that is not zero itself."""
        read = self.masks.read(node)
        if not read or node in self.coupling.passes[0].scatters:
            return False
        call = affine(node, self.coupling)
        return not isinstance(call, Affine) or call.source not in read or bool(self._rows(call).any())

    def _rows(self, call: Affine) -> torch.Tensor:
        """``[G, O]``: the outputs of a call that some constant goes into."""
        layout, shape = call.layout, shape_of(call.weight) or ()
        rows = torch.ones(matrix(torch.empty(shape, device="meta"), layout).shape[:2], dtype=torch.bool)
        name, axis = self._parameter(call.weight), 1 if layout.turned or layout.kind == "transposed" else 0
        positions = self.meaning.zeros.get((name, axis), torch.zeros(0, dtype=torch.int64))
        if axis == 0:
            rows.view(-1)[positions] = False
        else:  # a transposed convolution has its filters on axis 1, alike in all partitions
            rows[:, positions] = False
        removed = ~self._mask(call).view(layout.groups, -1)
        return rows & removed.any(1)[:, None]

    def _mask(self, call: Affine) -> torch.Tensor:
        """What stays of the inputs of ``call``, ``[I]``."""
        read = self.masks.read(call.node)[call.source]
        mask = read[call.layout.channels_axis]
        if mask is None:
            raise CannotPrune(f"{self._where(call.node)}: constants lie along an axis that it does not sum over{_DO}")
        return mask

    def reader(self, node: fx.Node, env: Mapping[fx.Node, torch.Tensor], kept: Masks) -> None:
        """Give what one call reads of constants a home."""
        call = affine(node, self.coupling)
        if isinstance(call, str) or call.source not in self.masks.read(node):
            why = call if isinstance(call, str) else "its weight carries them"
            raise CannotPrune(f"{self._where(node)}: {why}{_DO}")
        name, layout = self._parameter(call.weight), call.layout
        if not name or self._calls(call) > 1:
            raise CannotPrune(f"{self._where(node)}: its weight is computed, or read by several calls{_DO}")
        constants = self._constants(env[call.source], self._mask(call), layout.channels_axis, node)
        kernel = torch.einsum("goik,gi->gok", matrix(env[call.weight], layout), constants.view(layout.groups, -1))
        rows = kept.of(node)[layout.channels_axis] if kept.of(node) else None
        rows = torch.ones(kernel.shape[0] * kernel.shape[1], dtype=torch.bool) if rows is None else rows
        if layout.kind == "transposed" or any(p != (0, 0) for p in layout.padding):
            self._kernel(call, kernel.flatten(0, 1)[rows])
            return
        constant = kernel.sum(2).flatten()
        home = home_of([node], name, self.coupling, may_add=True)
        if home.kind in ("bias", "mean"):
            sign = 1 if home.kind == "bias" else -1
            self.found.shifts[home.name] = self.found.shifts.get(home.name, 0) + sign * constant
        elif home.kind == "added":
            self.found.edits.append(Edit("bias", home.module, "", int(rows.sum())))
            self.found.values[home.name] = constant[rows]
        else:
            raise CannotPrune(f"{self._where(node)}: {home.why}{_DO}")

    def _kernel(self, call: Affine, kernel: torch.Tensor) -> None:
        """A convolution of ones for a reader that pads; ``kernel [O, K]``, of the outputs that stay."""
        stack = module_stack(call.node)
        path = stack[-1][0] if stack else ""
        module = self.coupling.graph.model.get_submodule(path)
        if not takes_kernel(module) or self._parameter(call.weight).rpartition(".")[0] != path:
            raise CannotPrune(
                f"{self._where(call.node)}: it pads, and is no convolution of torch's own that could be given one more "
                f"input{_DO}"
            )
        turned = call.layout.kind == "transposed"
        kernel = (kernel.flip(-1) if turned else kernel).unflatten(-1, call.layout.kernel).unsqueeze(0 if turned else 1)
        self.found.edits.append(Edit("constant", path, "", tuple(kernel.shape)))
        self.found.values[f"{path}.{CONSTANT_KERNEL}"] = kernel

    def pads(self, node: fx.Node) -> bool:
        """Whether a call puts zeros around constants that it passes on."""
        if node.op != "call_function" or self.masks.read(node) or not any(m is not None for m in self.masks.of(node)):
            return False
        name = op_name(node)
        if name not in ("constant_pad_nd", "pad") and not name.startswith(("avg_pool", "conv")):
            return False
        args = named_args(node)
        if all(mask is None for mask in self.masks.of(node.all_input_nodes[0])):
            return False  # a kernel of earlier constants, over ones
        if name in ("constant_pad_nd", "pad"):
            around = [
                n for n, mask in zip(_pairs(args["pad"]), reversed(self.masks.of(node)), strict=False) if mask is None
            ]
            added = any(amount > 0 for pair in around for amount in pair)
            return added and args.get("mode", "constant") == "constant"
        if name.startswith("avg_pool"):
            if args.get("divisor_override") is not None:  # a window over the edge is divided by it all the same
                return any(args["padding"]) or bool(args["ceil_mode"])
            return bool(args["count_include_pad"]) and any(args["padding"])
        return any(map(any, layout_of(node, turned=False).padding))

    def padded(self, node: fx.Node, env: Mapping[fx.Node, torch.Tensor]) -> None:
        """Raises ``CannotPrune`` where constants other than zero lie in what a call pads: they are none behind it, even
        if the maps of the example are so small that it does not show."""
        source = next(s for s in node.all_input_nodes if any(m is not None for m in self.masks.of(s)))
        kept = [mask for mask in self.masks.of(source) if mask is not None]
        axis = next(axis for axis, mask in enumerate(self.masks.of(source)) if mask is not None)
        removed = torch.nonzero(~kept[0]).flatten()
        passed_on = env[source].index_select(axis, removed)
        if op_name(node).startswith("conv"):
            filters = matrix(env[named_args(node)["weight"]], layout_of(node, turned=False)).flatten(0, 1)
            rows = self.masks.of(node)[axis]
            passed_on = filters[~rows] if rows is not None and bool(passed_on.any()) else passed_on
        if bool(passed_on.any()):
            raise CannotPrune(
                f"{self._where(node)}: it puts zeros around what is constant there when filters are zero{_DO}"
            )

    def scatter(self, spread: Spread, value: torch.Tensor) -> None:
        """The constants that a scatter puts between what is left; zeros where channels are dropped."""
        mask = self.masks.of(spread.node)[spread.axis]
        if mask is not None:
            constants = self._constants(value, mask, spread.axis, spread.node)
            self.found.values[f"{spread.target}.{CONSTANTS}"] = constants[~spread.mask]

    def _constants(self, value: torch.Tensor, mask: torch.Tensor, axis: int, node: fx.Node) -> torch.Tensor:
        """``[N]``: what ``value`` is at the positions that ``mask`` removes, the same everywhere else; else 0."""
        flat = value.movedim(axis, 0).flatten(1)
        removed = torch.nonzero(~mask).flatten()
        found = flat[removed]
        uneven = (found.amax(1) - found.amin(1)) > EVEN * flat.abs().max()
        if bool(uneven.any()):
            raise CannotPrune(
                f"{self._where(node)}: what channel {int(removed[uneven][0])} holds there when its filter is zero "
                f"is no constant: it depends on the image, or on the position{_DO}"
            )
        return torch.zeros(len(mask), dtype=flat.dtype).index_copy(0, removed, found[:, 0].contiguous())

    def _where(self, node: fx.Node) -> str:
        names = ", ".join(sorted({group.name for group in self._groups(node)})[:3])
        where = f"at {op_name(node)} in {caller(node)!r}, {source_line(node)}"
        return f"constants='fold' cannot be carried out for {names} {where}"

    def _groups(self, node: fx.Node) -> list[Group]:
        """The folded groups whose channels lie on what ``node`` reads or puts out."""
        factors = [f for n in (node, *node.all_input_nodes) for f in self.coupling.passes[0].factors.get(n, [])]
        classes = torch.cat([self.coupling.classes.free[f.reshape(-1)] for f in factors if isinstance(f, torch.Tensor)])
        gone = classes[~self.meaning.folded[classes]].numpy()
        return [self.coupling.groups[g] for g in dict.fromkeys(self.coupling.group_of[gone].tolist())]

    def _parameter(self, node: fx.Node) -> str:
        names = self.coupling.graph.captures[0].names
        return names.get(str(node.target), "") if node.op == "get_attr" else ""

    def _calls(self, call: Affine) -> int:
        name = self._parameter(call.weight)
        nodes = [n for n in call.node.graph.nodes if n.op == "get_attr" and self._parameter(n) == name]
        return len({user for node in nodes for user in node.users})


def _pairs(amounts: Sequence[int]) -> list[tuple[int, int]]:
    """What is added in front and behind, by axis, the last one first."""
    return list(zip(amounts[::2], amounts[1::2], strict=True))


_DO = (
    "\n  do: leave such groups out (exclude=), drop their constants (constants={'NAME': 'drop', '*': 'fold'}), or "
    "zero gamma and beta too while training, which leaves none"
)
