"""Propagation: every node of a captured graph gets its label factors from the rule for its operation.

A rule is a function of a ``Call``: it reads the factors of the arguments and returns those of the result, joining or
locking labels on the way. An operation without a rule, or a rule that raises, locks everything that goes in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx

from secateur.capture import Capture, is_tensor_node
from secateur.core import Role
from secateur.labels import Factor, Factors, Labels, Shape, compress, on_axis, varying, widen
from secateur.nodes import as_int, module_stack, named_args, op_name, shape_of, source_line

Result = Factors | tuple[Factors, ...]
"""What a rule returns: the factors of one tensor, or of each of several."""
Rule = Callable[["Call"], Result]
_CREATES = frozenset({"arange", "full", "zeros", "ones", "scalar_tensor", "eye", "linspace", "empty"})

_LABELS_ANEW = frozenset({"expand", "expand_as"})
SCATTERED_SUMS = frozenset({"add", "sub", "rsub"})
"""Sums of two operands, each of which may be narrow where the sum is not."""


class Propagation:
    """The factors of every node of one captured pass.

    ``readers``: nodes that sum over channels; ``norms``: nodes that take statistics over the kept channels;
    ``scatters``: sums that keep their full width, where what is narrow has to be scattered (``Shared.scatter``).
    ``layers``: for every node the layers whose outputs it is made of, as the bits of a number; what is behind other
    layers does not count, and neither do parameters (0: no activation). Parameter factors (``tensors``) and the roles
    of their axes are shared between passes.
    """

    def __init__(
        self, capture: Capture, labels: Labels, tensors: Mapping[str, torch.Tensor], shared: Shared, rules: Rules
    ) -> None:
        self.capture, self.labels, self.shared, self.rules = capture, labels, shared, rules
        self.factors: dict[fx.Node, Result] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.readers: set[fx.Node] = set()
        self.norms: set[fx.Node] = set()
        self.scatters: set[fx.Node] = set()
        self.layers: dict[fx.Node, int] = {}
        self.weights_only: set[fx.Node] = set()
        for index, node in enumerate(capture.graph.nodes):
            self._visit(node, tensors)
            parts = [self.layers[source] for source in node.all_input_nodes]
            own = node.op == "placeholder" or (node in self.readers and any(parts))
            self.layers[node] = 1 << index if own else reduce(operator.or_, parts, 0)

    def _visit(self, node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> None:
        if node.op == "get_attr":
            self.factors[node] = []
            name = self.capture.names.get(str(node.target))
            value = tensors[name] if name else self.capture.constants.get(str(node.target))
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                self.constants[node] = value.detach().cpu().clone()  # folding may write into it
            elif is_tensor_node(node, self.capture) and name and value is not None:
                self.factors[node] = self.shared.parameter(name, value.shape)
                self.weights_only.add(node)
        elif node.op == "output":
            self.labels.here = lambda why: why
            for source in node.all_input_nodes:
                self.lock_all(source, "it is an output of the network")
        elif node.op == "placeholder":
            self.factors[node] = []
        else:
            self.factors[node] = self._call(node)

    def _call(self, node: fx.Node) -> Result:
        name, inputs, value = op_name(node), node.all_input_nodes, node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            self.constants[node] = as_int(value)
            return []
        if name == "getitem":
            return self._getitem(node)
        if value is None:
            return []
        if inputs and all(i in self.weights_only or i in self.constants for i in inputs):
            self.weights_only.add(node)
        if all(i in self.constants for i in inputs) and (inputs or name in _CREATES):
            self._fold(node, value)
            return []
        if name not in _LABELS_ANEW and not any(self.factors.get(i) for i in inputs):
            return tuple([] for _ in value) if isinstance(value, (tuple, list)) else []
        self.labels.here = lambda why: f"{why}, at {name} in {source_line(node)}"
        if self.shared.scatter and name in SCATTERED_SUMS and len({self.layers[i] for i in inputs} - {0}) > 1:
            self.scatters.add(node)
            return self._full_width(node)
        rule = self.rules.get(name)
        try:
            if rule is None:
                raise NotImplementedError(f"no rule is known for the operation {name!r}")
            result = rule(Call(node, self))
            if isinstance(result, tuple) is not isinstance(value, (tuple, list)):
                raise TypeError("the rule answers for another number of results")
            return result
        except Exception as error:  # whatever is not understood is locked, never guessed
            why = str(error) if rule is None else f"its rule failed ({type(error).__name__}: {error})"
            for source in inputs:
                self.lock_all(source, f"it feeds something not understood: {why}")
            return tuple([] for _ in value) if isinstance(value, (tuple, list)) else []

    def _full_width(self, node: fx.Node) -> Factors:
        """The factors of a sum that keeps its width, whatever is left of what it adds up."""
        shape = shape_of(node) or ()
        offset = {source: len(shape) - len(shape_of(source) or ()) for source in node.all_input_nodes}
        found = [(f, offset[s]) for s in node.all_input_nodes for f in self.factors[s] if isinstance(f, torch.Tensor)]
        axes = sorted({axis + shift for factor, shift in found for axis in varying(factor)})
        factors = [on_axis(self.labels.fresh(shape[axis]), axis, len(shape)) for axis in axes]
        for factor in factors:
            self.labels.lock(factor, "residual='scatter' adds into the full width of a residual stream")
        return factors

    def _getitem(self, node: fx.Node) -> Result:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if source in self.constants:
            self.constants[node] = self.constants[source][index]
        if source in self.weights_only:
            self.weights_only.add(node)
        found = self.factors[source]
        return found[index] if isinstance(found, tuple) else []

    def _fold(self, node: fx.Node, value: Any) -> None:
        """Compute integer tensors (index tables) that depend on nothing but constants."""
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.constants[n])
        try:
            self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # not a table we can compute: whoever indexes with it will lock its input
            return

    def lock_all(self, node: fx.Node, why: str) -> None:
        found = self.factors.get(node, [])
        for factors in found if isinstance(found, tuple) else (found,):
            for factor in factors:
                self.labels.lock(factor, why)


class Shared:
    """What the passes over one model have in common: the factors of its tensors and the roles of their axes.

    ``tie_halves``: join the parts of an even split, so that ``chunk`` still cuts where it should, and let padded
    channels be. ``scatter``: sums of different layers keep their width, and tie nothing that they add up.
    """

    def __init__(self, labels: Labels, tie_halves: bool = False, scatter: bool = False) -> None:
        self.labels, self.tie_halves, self.scatter = labels, tie_halves, scatter
        self.factors: dict[str, Factors] = {}
        self._roles: list[tuple[torch.Tensor, Role]] = []

    def parameter(self, name: str, shape: Sequence[int]) -> Factors:
        """One factor of fresh labels for every axis longer than 1."""
        if name not in self.factors:
            sized = [(axis, size) for axis, size in enumerate(shape) if size > 1]
            self.factors[name] = [on_axis(self.labels.fresh(size), axis, len(shape)) for axis, size in sized]
        return self.factors[name]

    def note_role(self, labels: torch.Tensor, role: Role) -> None:
        """The parameter axis that ``labels`` come from has this role; the first role that is noted stays."""
        self._roles.append((labels[labels != 0], role))

    def roles(self) -> dict[tuple[str, int], Role]:
        """The role of every parameter axis, ``(name, axis) -> role``."""
        names: list[Role] = ["follows", "writes", "reads", "scales"]
        role_of = torch.zeros(self.labels.count, dtype=torch.int8)
        for labels, role in reversed(self._roles):
            role_of[labels] = names.index(role)
        axes = {(name, varying(f)[0]): f for name, factors in self.factors.items() for f in factors}
        return {place: names[int(role_of[f.reshape(-1)[0]])] for place, f in axes.items()}


class Call:
    """What a rule sees of one operation: its arguments by name, their factors and shapes, and the label store."""

    def __init__(self, node: fx.Node, propagation: Propagation) -> None:
        self.node, self.p, self.labels = node, propagation, propagation.labels
        self.name = op_name(node)
        self.args = {name: self._number(value) for name, value in named_args(node).items()}

    def _number(self, value: Any) -> Any:
        """Sizes that depend on the batch are what they were in the capture."""
        known = self.p.constants.get(value) if isinstance(value, fx.Node) else None
        return known if isinstance(known, int) else value

    @property
    def out_shape(self) -> Shape:
        shape = shape_of(self.node)
        assert shape is not None
        return shape

    @property
    def out_shapes(self) -> list[Shape]:
        return [tuple(as_int(k) for k in v.shape) for v in self.node.meta["val"]]

    @property
    def several(self) -> bool:
        return isinstance(self.node.meta["val"], (tuple, list))

    def factors(self, x: Any) -> Factors:
        found = self.p.factors.get(x, []) if isinstance(x, fx.Node) else []
        assert isinstance(found, list)
        return found

    def shape(self, x: Any) -> Shape:
        shape = shape_of(x) if isinstance(x, fx.Node) else ()
        return shape or ()

    def tensors(self) -> list[fx.Node]:
        """The tensor arguments in order, without symbolic sizes."""
        return [a for a in self.args.values() if isinstance(a, fx.Node) and shape_of(a) is not None]

    def constant(self, x: Any) -> Any:
        """The value of a constant argument: symbolic sizes become numbers, index tables their tensors."""
        return fx.node.map_arg(x, lambda n: self.p.constants[n])

    def mark_reader(self) -> None:
        self.p.readers.add(self.node)

    def mark_norm(self) -> None:
        self.p.norms.add(self.node)

    def set_role(self, x: Any, axis: int, role: Role) -> None:
        """Note what axis ``axis`` of a parameter, or of a tensor computed from parameters alone, does."""
        if x in self.p.weights_only:
            for factor in self.factors(x):
                if varying(factor) == [axis]:
                    self.p.shared.note_role(factor.reshape(-1), role)

    def in_norm(self) -> bool:
        """Whether statistics taken here are those of a normalisation, so that they follow the kept channels."""
        if all(t in self.p.weights_only for t in self.tensors()):
            return True  # weight standardisation
        kinds = [kind.rsplit(".", 1)[-1].lower() for _, kind in module_stack(self.node)[-1:]]
        return any("norm" in kind or "grn" in kind for kind in kinds)

    # ------------------------------------------------------------------ working on factors

    def single(self, factor: Factor, prefer: Sequence[int] = ()) -> Factor:
        """Make a factor vary along one axis, joining over the others; the last varying one unless one is preferred."""
        axes = varying(factor)
        if len(axes) <= 1:
            return factor
        stays = next((d for d in prefer if d in axes), axes[-1])
        for d in axes:
            if d != stays:
                factor = self.labels.join_along(factor, d)
        return factor

    def axis(self, x: Any, axis: int) -> tuple[torch.Tensor | None, Factors]:
        """``([n] labels along axis, or None; the factors that do not vary along it)``."""
        along: list[torch.Tensor] = []
        rest: Factors = []
        for factor in self.factors(x):
            if factor.shape[axis] > 1:
                along.append(self.single(factor, (axis,)).reshape(-1))
            else:
                rest.append(factor)
        if any(not torch.equal(along[0], other) for other in along[1:]):
            for labels in along:
                self.labels.lock(labels, "two kinds of channels meet on one axis")
        return (along[0] if along else None), rest

    def lock(self, factors: Factors, why: str) -> None:
        for factor in factors:
            self.labels.lock(factor, why)

    def tie(self, a: torch.Tensor | None, b: torch.Tensor | None, why: str) -> None:
        """Join two label vectors; if only one side carries labels, lock it."""
        if a is None and b is None:
            return
        if a is None or b is None:
            lone = b if a is None else a
            assert lone is not None
            self.labels.lock(lone, why)
        else:
            self.labels.join(a, b)

    def merge(self, items: Sequence[tuple[Factors, Shape]]) -> Factors:
        """The factors of an elementwise result: factors of different operands on the same axes are joined.

        ``items``: factors and shape of each operand, shapes broadcasting against each other.
        """
        rank = max(len(shape) for _, shape in items)
        found: list[tuple[Factor, set[int]]] = []
        for i, (factors, _) in enumerate(items):
            for narrow in factors:
                factor = widen(narrow, rank)
                axes = set(varying(factor))
                hits = [k for k, (f, origin) in enumerate(found) if i not in origin and axes & set(varying(f))]
                if len(hits) > 1:
                    hits = [k for k in hits if set(varying(found[k][0])) == axes] or hits
                if len(hits) > 1:
                    self.lock([found[k][0] for k in hits] + [factor], "two kinds of channels meet on one axis")
                elif hits:
                    old, origin = found[hits[0]]
                    self.labels.join(old, factor)
                    wide, other = torch.broadcast_tensors(old, factor)
                    found[hits[0]] = (compress(other if factor.numel() > old.numel() else wide), origin | {i})
                else:
                    found.append((factor, {i}))
        for factor, origin in found:
            for j, (_, shape) in enumerate(items):
                full = (1,) * (rank - len(shape)) + tuple(shape)
                if j not in origin and any(full[d] > 1 for d in varying(factor)):
                    self.labels.lock(factor, "it meets a tensor that carries no channels")
        return [factor for factor, _ in found]

    def contract(
        self, items: Sequence[tuple[Factors, Shape]], letters: Sequence[Sequence[str]], out: Sequence[str]
    ) -> Factors:
        """A generic contraction (einsum): a letter that two operands carry ties their channels; a letter that only one
        of them carries channels on locks them."""
        self.mark_reader()
        carried: list[dict[str, torch.Tensor]] = []
        for (factors, _), own in zip(items, letters, strict=True):
            summed = [i for i, letter in enumerate(own) if letter not in out]
            labels: dict[str, torch.Tensor] = {}
            for factor in factors:
                one = self.single(factor, summed)
                for axis in varying(one):
                    flat = one.reshape(-1)
                    known = labels.setdefault(own[axis], flat)
                    if not torch.equal(known, flat):
                        self.lock([known, flat], "two kinds of channels meet on one axis")
            carried.append(labels)
        result: Factors = []
        for letter in dict.fromkeys(x for own in letters for x in own):
            sides = [
                carried[i].get(letter)
                for i, own in enumerate(letters)
                if letter in own and items[i][1][list(own).index(letter)] > 1
            ]
            labelled = [side for side in sides if side is not None]
            if not labelled:
                continue
            if len(labelled) < len(sides):
                self.lock(labelled, "it is multiplied with something that carries no channels")
            for other in labelled[1:]:
                self.labels.join(labelled[0], other)
            if letter in out:
                result.append(on_axis(labelled[0], list(out).index(letter), len(out)))
        return result


Rules = Mapping[str, Rule]
