"""Rewrites: the constants that a captured graph holds about channel counts, recomputed for the kept channels.

``view`` sizes, ``split`` sizes, slice bounds, index tables, group counts: each kind of operation has a short function
that changes one node. What was changed is also noted as ``(module path, old, new)``, so that the same change can be
tried as an integer attribute of the user's own module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from secateur.capture import Capture
from secateur.groups import Coupling
from secateur.labels import Factors
from secateur.nodes import as_int, module_stack, named_args, op_name, shape_of
from secateur.propagation import SCATTERED_SUMS
from secateur.wiring import scatter_table

A = torch.ops.aten
_DERIVED = {
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), "groups"),
    "group_norm": "num_groups",
    "layer_norm": "normalized_shape",
}
"""Arguments that torch's own modules keep in an attribute of this name, which slicing corrects from their weights."""
Mask = torch.Tensor | None


@dataclass(frozen=True)
class Note:
    """Inside module ``path`` the number (or tuple) ``old`` became ``new``."""

    path: str
    old: int | tuple[int, ...]
    new: int | tuple[int, ...]


@dataclass
class Rewritten:
    """A graph with new constants, new index tables by ``get_attr`` target, and what changed. ``changed``: something
    that no module of torch derives from its weights by itself."""

    graph: fx.Graph
    tables: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    changed: bool = False


def rewrite(coupling: Coupling, index: int, class_keep: torch.Tensor) -> Rewritten:
    """Pass ``index`` of the graph with every constant that speaks of removed channels recomputed."""
    capture = coupling.graph.captures[index]
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(capture.graph, mapping)
    graph.output(output)
    result = Rewritten(graph)
    for old, new in mapping.items():
        if old.op == "call_function" and op_name(old) in REWRITES and old.meta.get("val") is not None:
            site = Site(coupling, index, capture, old, new, class_keep, result)
            if site.touched():
                REWRITES[op_name(old)](site)
    graph.lint()
    return result


@dataclass
class Site:
    """One node to rewrite: ``old`` in the dense graph, ``new`` in the copy."""

    coupling: Coupling
    index: int
    capture: Capture
    old: fx.Node
    new: fx.Node
    class_keep: torch.Tensor
    result: Rewritten

    @property
    def args(self) -> dict[str, Any]:
        return named_args(self.old)

    @property
    def source(self) -> fx.Node:
        return next(a for a in self.args.values() if isinstance(a, fx.Node) and shape_of(a) is not None)

    def masks(self, node: fx.Node) -> list[Mask]:
        return self.coupling.node_masks(self.index, node, self.class_keep)

    def touched(self) -> bool:
        """Whether any tensor in or out loses channels."""
        nodes = [self.old, *self.old.all_input_nodes]
        single = any(m is not None for n in nodes for m in self.masks(n))
        return single or any(m is not None for part in self.out_masks() for m in part)

    def out_masks(self) -> list[list[Mask]]:
        """Masks of each of several outputs."""
        found = self.coupling.passes[self.index].factors.get(self.old, [])
        if not isinstance(found, tuple):
            return []
        values = self.old.meta["val"]
        return [self._of(factors, v.dim()) for factors, v in zip(found, values, strict=True)]

    def _of(self, factors: Factors, rank: int) -> list[Mask]:
        return self.coupling.masks(factors, rank, self.class_keep)

    def size(self, node: fx.Node) -> list[int]:
        """The new shape of a node's tensor."""
        shape = shape_of(node)
        assert shape is not None
        return [int(m.sum()) if m is not None else k for k, m in zip(shape, self.masks(node), strict=True)]

    def set(self, name: str, value: Any) -> None:
        """Set an argument by its name in the schema."""
        self._mark(named_args(self.new)[name] != value)
        for i, a in enumerate(self.old.target._schema.arguments):  # type: ignore[union-attr]
            if a.name == name:
                if i < len(self.new.args) and not a.kwarg_only:
                    self.new.update_arg(i, value)
                else:
                    self.new.update_kwarg(name, value)

    def replace(self, target: Any, *args: Any) -> None:
        self._mark(True)
        self.new.target, self.new.args, self.new.kwargs = target, args, {}

    def spread(self, narrow: Any, axis: int, masks: Sequence[Mask]) -> fx.Node:
        """``narrow`` at its full width along ``axis``, with zeros where ``masks[axis]`` is False."""
        self._mark(True)
        mask, behind = masks[axis], len(masks) - 1 - axis
        assert mask is not None
        table = self.table(scatter_table(mask))
        with self.result.graph.inserting_before(self.new):
            padded = self.result.graph.call_function(A.constant_pad_nd.default, (narrow, [0, 0] * behind + [0, 1]))
            return self.result.graph.call_function(A.index_select.default, (padded, axis, table))

    def _mark(self, differs: bool) -> None:
        stack = module_stack(self.old)
        module = self.coupling.graph.model.get_submodule(stack[-1][0]) if stack else None
        name = _DERIVED.get(op_name(self.old), "")
        number = getattr(module, name, None) if name and self.args.get("weight") is not None else None
        self.result.changed |= differs and (number is None or number != _plain(self.args[name]))

    def note(self, old: Any, new: Any) -> None:
        if old != new:
            for path, _ in module_stack(self.old)[-2:]:
                self.result.notes.append(Note(path, old, new))

    def table(self, values: torch.Tensor) -> fx.Node:
        """A new index table that the graph fetches."""
        target = f"_table_{len(self.result.tables)}"
        self.result.tables[target] = values
        with self.result.graph.inserting_before(self.new):
            return self.result.graph.get_attr(target)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _sizes(site: Site) -> None:
    """view, reshape, expand: the sizes of axes that lose positions."""
    key = "size" if "size" in site.args else "shape"
    masks, shape, new_shape = site.masks(site.old), shape_of(site.old), site.size(site.old)
    assert shape is not None
    old = list(site.args[key])
    new: list[Any] = list(site.new.args[1]) if len(site.new.args) > 1 else list(site.new.kwargs[key])  # type: ignore[arg-type]
    before = list(new)
    lead = len(old) - len(shape)
    for i, size in enumerate(old):
        mask = masks[i - lead] if i >= lead else None
        if mask is None:
            continue
        if isinstance(size, fx.Node):  # a symbolic size that holds the batch and channels: scale it
            with site.result.graph.inserting_before(site.new):
                scaled = site.result.graph.call_function(operator.mul, (new[i], new_shape[i - lead]))
                new[i] = site.result.graph.call_function(operator.floordiv, (scaled, shape[i - lead]))
        elif size != -1:
            new[i] = new_shape[i - lead]
    if all(isinstance(s, int) for s in old):
        site.note(tuple(old), tuple(new))
    for a, b in zip(old, new, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            site.note(a, b)
    if new != before:
        site.set(key, new)


def _unflatten(site: Site) -> None:
    shape, new_shape, masks = shape_of(site.old), site.size(site.old), site.masks(site.old)
    assert shape is not None
    sizes = list(site.args["sizes"])
    first = site.args["dim"] % len(shape_of(site.source) or ())
    for i in range(len(sizes)):
        if masks[first + i] is not None:
            site.note(sizes[i], new_shape[first + i])
            sizes[i] = new_shape[first + i]
    site.set("sizes", sizes)


def _split(site: Site) -> None:
    """Any even or uneven split becomes ``split_with_sizes``."""
    axis = site.args["dim"] % len(shape_of(site.source) or ())
    if site.masks(site.source)[axis] is None:
        return
    old = [as_int(v.shape[axis]) for v in site.old.meta["val"]]
    masks = [part[axis] for part in site.out_masks()]
    new = [int(m.sum()) if m is not None else k for m, k in zip(masks, old, strict=True)]
    site.note(tuple(old), tuple(new))
    site.note(sum(old), sum(new))
    for a, b in zip(old, new, strict=True):
        site.note(a, b)
    site.replace(A.split_with_sizes.default, site.new.args[0], new, axis)


def _pick(site: Site) -> None:
    """slice, select, index_select, roll, x[:, table]: the same channels at their new places."""
    source = site.source
    shape = shape_of(source)
    assert shape is not None
    args = site.args
    if op_name(site.old) == "index":
        places = [(d, t) for d, t in enumerate(args["indices"]) if t is not None]
        touched = [d for d, _ in places if site.masks(source)[d] is not None]
        if not touched:
            return
        if len(places) != 1:
            raise NotImplementedError("channels are picked along two axes at once")
        axis, chosen = places[0][0], site.coupling.passes[site.index].constants[places[0][1]]
        picked = torch.arange(shape[axis])[chosen]
        if picked.dim() != 1:
            raise NotImplementedError("channels are picked by a table of several axes")
    elif op_name(site.old) == "roll":
        axes = [d % len(shape) for d in args["dims"]]
        if all(site.masks(source)[d] is None for d in axes):
            return
        if len(axes) != 1:
            raise NotImplementedError("channels are rolled along two axes at once")
        axis = axes[0]
        picked = torch.arange(shape[axis]).roll(args["shifts"][0])
    else:
        axis = args["dim"] % len(shape)
        everything = torch.arange(shape[axis])
        picked = _picked_numbers(site, args, everything)
    mask = site.masks(source)[axis]
    if mask is None:
        return
    place = torch.cumsum(mask.long(), 0) - 1
    if op_name(site.old) == "select":
        site.set("index", int(place[picked[0]]))
        return
    new = place[picked[mask[picked]]]
    _pick_again(site, axis, new, shape[axis])


def _picked_numbers(site: Site, args: Mapping[str, Any], everything: torch.Tensor) -> torch.Tensor:
    name = op_name(site.old)
    if name == "slice":
        end = args["end"] if args["end"] is not None else len(everything)
        return everything[slice(args["start"], min(as_int(end), 2**62), args["step"])]
    if name == "narrow":
        return everything[args["start"] : args["start"] + args["length"]]
    if name == "select":
        return everything[args["index"]].view(1)
    return everything[site.coupling.passes[site.index].constants[args["index"]]]


def _sum(site: Site) -> None:
    """A sum of a residual stream that keeps its width: what is narrow is scattered into it (He et al., FPGM)."""
    if site.old not in site.coupling.passes[site.index].scatters:
        return
    for place, operand in enumerate(site.old.args):
        masks = site.masks(operand) if isinstance(operand, fx.Node) else []
        for axis, mask in enumerate(masks):
            if mask is not None:
                site.new.update_arg(place, site.spread(site.new.args[place], axis, masks))


def _pick_again(site: Site, axis: int, numbers: torch.Tensor, old_size: int) -> None:
    """A contiguous run is a slice, anything else a table."""
    source = site.new.args[0]
    first = int(numbers[0]) if len(numbers) else 0
    if bool((numbers == torch.arange(first, first + len(numbers))).all()):
        if op_name(site.old) == "slice":
            site.note(as_int(site.args["end"] or old_size), first + len(numbers))
            site.note(as_int(site.args["start"] or 0), first)
            out = shape_of(site.old)
            assert out is not None
            site.note(out[axis], len(numbers))
        site.replace(A.slice.Tensor, source, axis, first, first + len(numbers))
    else:
        site.replace(A.index_select.default, source, axis, site.table(numbers))


def _convolution(site: Site) -> None:
    """Depthwise: as many groups as channels."""
    args = site.args
    shape = shape_of(args["input"])
    assert shape is not None
    if args["groups"] == shape[1] > 1:
        groups = site.size(args["input"])[1]
        site.note(args["groups"], groups)
        site.set("groups", groups)


def _group_norm(site: Site) -> None:
    shape = shape_of(site.args["input"])
    assert shape is not None
    if site.args["num_groups"] == shape[1] > 1:
        groups = site.size(site.args["input"])[1]
        site.note(site.args["num_groups"], groups)
        site.set("num_groups", groups)


def _layer_norm(site: Site) -> None:
    old = tuple(site.args["normalized_shape"])
    new = tuple(site.size(site.args["input"])[-len(old) :])
    site.note(old, new)
    site.set("normalized_shape", list(new))


def _attention(site: Site) -> None:
    """The default scale 1/sqrt(d) speaks of the dense d: write it down."""
    masks, shape = site.masks(site.args["query"]), shape_of(site.args["query"])
    assert shape is not None
    if site.args["scale"] is None and masks[-1] is not None:
        site.set("scale", shape[-1] ** -0.5)


def _pad(site: Site) -> None:
    """Constants beside the channels: as many as are kept."""
    key = "pad" if "pad" in site.args else "padding"
    amounts, masks, rank = list(site.args[key]), site.masks(site.old), len(site.masks(site.old))
    for i in range(len(amounts) // 2):
        mask = masks[rank - 1 - i]
        if mask is None:
            continue
        front, back = amounts[2 * i], amounts[2 * i + 1]
        amounts[2 * i] = int(mask[:front].sum())
        amounts[2 * i + 1] = int(mask[len(mask) - back :].sum()) if back else 0
        site.note(front, amounts[2 * i])
        site.note(back, amounts[2 * i + 1])
    site.note(tuple(site.args[key]), tuple(amounts))
    site.set(key, amounts)


REWRITES: dict[str, Callable[[Site], None]] = {
    **dict.fromkeys("view reshape _unsafe_view expand".split(), _sizes),
    **dict.fromkeys(
        "split split_with_sizes chunk unsafe_chunk unsafe_split tensor_split".split(),
        _split,
    ),
    **dict.fromkeys("slice select narrow index_select index roll".split(), _pick),
    **dict.fromkeys(SCATTERED_SUMS, _sum),
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), _convolution),
    **dict.fromkeys(["constant_pad_nd", "pad"], _pad),
    "unflatten": _unflatten,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
