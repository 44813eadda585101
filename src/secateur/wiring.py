"""Wiring: modules of the user's that hand on more channels than they have, or read some of those they are handed.

Where a residual stream keeps its width, the last module of a branch scatters what is left of its output into it, with
zeros, or constants, in between; a layer that reads a narrow tensor which is handed on at full width gathers what it
needs. A convolution can also be given the constant that its removed inputs left: under zero padding that is a small
convolution of ones, which has the right borders at any image size. Source of the scatter: He et al. (FPGM, CVPR 2019),
whose code adds the narrow output into the shortcut by index.

Such a module gets a class of its own, made of the user's: its name, its tensors and its hooks stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from secateur.core import Edit
from secateur.errors import BadPlan, WrongModel
from secateur.groups import Coupling
from secateur.interpreter import Masks
from secateur.nodes import module_stack, shape_of
from secateur.plan_checks import SCATTERED_WITH, WIRINGS
from secateur.plans import CONSTANT_KERNEL

GATHER, SCATTER, CONSTANTS, KERNEL = "gather_table", "scatter_table", SCATTERED_WITH[1], CONSTANT_KERNEL
"""The buffers of a wired module; the last two hold values, and are saved."""
_OPERATIONS: dict[Any, Any] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}


@dataclass(frozen=True, eq=False)
class Spread:
    """Where a narrow tensor gets its full width: the output ``node`` of module ``target``, along ``axis``, of which the
    positions in ``mask`` are there."""

    target: str
    node: fx.Node
    axis: int
    mask: torch.Tensor


class Wired(nn.Module):
    """What the classes of wired modules have in common; the other base is the class that the module had."""

    _secateur_axes: dict[str, int | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        buffers: dict[str, Any] = self._buffers
        axes: Any = self._secateur_axes
        if GATHER in buffers:
            args, kwargs = _gathered(args, kwargs, axes[GATHER], buffers[GATHER])
        out = super().forward(*args, **kwargs)
        if KERNEL in buffers:
            x = args[0] if args else next(iter(kwargs.values()))
            out = out + constant_map(self, buffers[KERNEL], x, out.shape)
        return scattered(out, axes[SCATTER], buffers[SCATTER], buffers.get(CONSTANTS)) if SCATTER in buffers else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _anew, (type(self).__mro__[2],), self.__dict__


def _gathered(args: Any, kwargs: Any, axis: Any, table: torch.Tensor) -> tuple[Any, Any]:
    """The first argument, by place or by name, gathered."""
    if args:
        return (args[0].index_select(axis, table), *args[1:]), kwargs
    name, x = next(iter(kwargs.items()))
    return args, {**kwargs, name: x.index_select(axis, table)}


def scattered(
    narrow: torch.Tensor, axis: int, table: torch.Tensor, constants: torch.Tensor | None = None
) -> torch.Tensor:
    """``narrow`` at its full width along ``axis``: position ``i`` is ``table[i]`` of what is there; behind what is
    narrow lie the ``constants``, without them a single zero."""
    behind = narrow.dim() - 1 - axis
    if constants is None:
        whole = functional.pad(narrow, [0, 0] * behind + [0, 1])
    else:
        shape = [*narrow.shape[:axis], -1, *narrow.shape[axis + 1 :]]
        whole = torch.cat([narrow, constants.to(narrow.dtype).view(-1, *[1] * behind).expand(shape)], axis)
    return whole.index_select(axis, table)


def scatter_table(mask: torch.Tensor, *, constants: bool = False) -> torch.Tensor:
    """The table of ``scattered`` for the positions that ``mask [N]`` keeps, int64 ``[N]``."""
    behind = (~mask).cumsum(0) - 1 if constants else 0
    return torch.where(mask, mask.cumsum(0) - 1, int(mask.sum()) + behind)


def constant_map(conv: Any, kernel: torch.Tensor, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What ``conv``, which put out the ``shape`` for ``x``, would add if it read one more channel of ones through
    ``kernel``: one image for the whole batch. A transposed convolution may have been told how large its output is."""
    kind = next(kind for kind in _OPERATIONS if isinstance(conv, kind))
    space = x.shape[2 - kernel.dim() :]
    ones = torch.ones((1, 1, *space), dtype=x.dtype, device=x.device)
    more = {}
    if conv.transposed:
        own = (conv.stride, conv.padding, conv.dilation, conv.kernel_size)
        sizes = zip(shape[-len(space) :], space, *own, strict=True)
        more["output_padding"] = [out - (n - 1) * s + 2 * p - d * (k - 1) - 1 for out, n, s, p, d, k in sizes]
    found = _OPERATIONS[kind](ones, kernel.to(x.dtype), None, conv.stride, conv.padding, dilation=conv.dilation, **more)
    return found if x.dim() == kernel.dim() else found[0]


def _fits(layer: nn.Module, edit: Edit) -> bool:
    """Whether the kernel of a ``constant`` edit has one input channel and else the shape of the layer's weight."""
    if not takes_kernel(layer) or not isinstance(edit.value, tuple):
        return False
    convolution: Any = layer
    ends = (1, convolution.out_channels) if convolution.transposed else (convolution.out_channels, 1)
    return edit.value == (*ends, *convolution.kernel_size)


def takes_kernel(layer: nn.Module | None) -> bool:
    """Whether ``constant_map`` speaks for ``layer``: a convolution of torch's own that pads with zeros."""
    kind: Any = type(layer).__mro__[2] if isinstance(layer, Wired) else type(layer)
    own = any(issubclass(kind, base) and kind.forward is base.forward for base in _OPERATIONS)
    return own and getattr(layer, "padding_mode", "") == "zeros"


_classes: dict[type[nn.Module], type[Wired]] = {}


def _class_of(kind: type[nn.Module]) -> type[Wired]:
    if kind not in _classes:
        own = {"__module__": __name__, "__doc__": Wired.__doc__}
        _classes[kind] = type(f"Wired{kind.__name__}", (Wired, kind), own)
    return _classes[kind]


def _anew(kind: type[nn.Module]) -> Wired:
    made = _class_of(kind)
    return made.__new__(made)


# Edits -------------------------------------------------------------------------------------------------------------


def rewire_(small: nn.Module, edits: Sequence[Edit]) -> None:
    """Carry out the edits of kinds ``gather``, ``scatter`` and ``constant``; constants that are new are zero.

    Raises ``WrongModel`` if a module is gone, ``BadPlan`` if it is wired already or cannot hold what is asked for.
    """
    for edit in edits:
        if edit.kind not in WIRINGS:
            continue
        module = _module(small, edit)
        own = GATHER if edit.kind == "gather" else SCATTER if edit.kind == "scatter" else KERNEL
        fits = _fits(module, edit) if edit.kind == "constant" else own not in module._buffers
        if not fits:
            raise BadPlan(
                f"the plan has a {edit.kind} edit for {edit.target!r}, a {type(module).__name__} that it does not fit\n"
                "  do: do not use this plan unless you trust where it came from; plan again"
            )
        assert isinstance(edit.value, tuple)
        if not isinstance(module, Wired):
            module.__class__ = _class_of(type(module))
            module.__dict__["_secateur_axes"] = {}
        device, dtype = _kind_of(module, small)
        if edit.kind == "constant":
            if KERNEL not in module._buffers:  # an earlier cut may have given it one, which goes on counting
                module.register_buffer(KERNEL, torch.zeros(edit.value, dtype=dtype, device=device))
            continue
        assert isinstance(module, Wired)
        module._secateur_axes = {**module._secateur_axes, own: edit.axis}
        if edit.kind == "gather":
            table = torch.tensor(edit.value)
        else:
            mask = torch.tensor(edit.value) >= 0
            table = scatter_table(mask, constants=edit.name == CONSTANTS)
            if edit.name == CONSTANTS:
                module.register_buffer(CONSTANTS, torch.zeros(int((~mask).sum()), dtype=dtype, device=device))
        module.register_buffer(own, table.to(device), persistent=False)


def _module(small: nn.Module, edit: Edit) -> nn.Module:
    try:
        return small.get_submodule(edit.target)
    except AttributeError as error:
        raise WrongModel(f"the plan rewires {edit.target!r}, which this model does not have") from error


def _kind_of(module: nn.Module, root: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for constants of ``module``: its own, or those of the network."""
    for tensor in (*module.parameters(), *root.parameters()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


# Where ---------------------------------------------------------------------------------------------------------------


Wiring = tuple[list[Spread], tuple[Edit, ...]]
"""Which modules must scatter, and the edits of those that gather."""


def find_wiring(coupling: Coupling, class_keep: torch.Tensor) -> Wiring | None:
    """Which modules must scatter, and the ``gather`` edits of those that read what is scattered; ``None`` where the
    user's modules have no place for it, and only the captured graph has."""
    masks = Masks(coupling, class_keep)
    spreads: dict[str, Spread] = {}
    gathers: dict[str, Edit] = {}
    for node in coupling.graph.captures[0].graph.nodes:
        for operand in masks.read(node) if node in coupling.passes[0].scatters else ():
            found = _spread(operand, masks)
            if found is None or spreads.setdefault(found.target, found).node is not found.node:
                return None
            readers = _narrow_readers(found, masks)
            if readers is None or any(gathers.setdefault(e.target, e) != e for e in readers):
                return None
    return list(spreads.values()), tuple(gathers.values())


def scatter_edit(spread: Spread, *, constants: bool) -> Edit:
    """The edit that makes a module scatter."""
    table = torch.where(spread.mask, spread.mask.cumsum(0) - 1, -1)
    return Edit("scatter", spread.target, CONSTANTS if constants else "", tuple(table.tolist()), spread.axis)


def _spread(operand: fx.Node, masks: Masks) -> Spread | None:
    """The last module that made ``operand``; what was done to every position since is done at full width instead."""
    node = operand
    while True:
        path = _innermost(node)
        if path and _is_its_only_output(node, path):
            axes = [(axis, mask) for axis, mask in enumerate(masks.of(node)) if mask is not None]
            return Spread(path, node, *axes[0]) if len(axes) == 1 else None
        sources = [source for source in node.all_input_nodes if shape_of(source) is not None]
        if len(sources) != 1 or masks.read(node):
            return None
        node = sources[0]


def _innermost(node: fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def _inside(node: fx.Node, path: str) -> bool:
    return any(own == path for own, _ in module_stack(node))


def _is_its_only_output(node: fx.Node, path: str) -> bool:
    """Whether ``node`` is all that the module ``path`` hands on, in a single call."""
    given = [n for n in node.graph.nodes if _inside(n, path) and any(not _inside(u, path) for u in n.users)]
    return given == [node] and not any(_inside(user, path) for user in node.users)


def _narrow_readers(spread: Spread, masks: Masks) -> list[Edit] | None:
    """A ``gather`` edit for every layer that reads the narrow part of what is scattered; ``None`` if one cannot."""
    edits, todo = [], [spread.node]
    while todo:
        wide = todo.pop()
        for user in wide.users:
            if user in masks.coupling.passes[0].scatters:
                continue
            tensors = [source for source in user.all_input_nodes if shape_of(source) is not None]
            if tensors == [wide] and not masks.read(user):
                todo.append(user)
                continue
            path, first = _innermost(user), next(iter(user.args), None)
            axes = [(axis, mask) for axis, mask in enumerate(masks.of(wide)) if mask is not None]
            foreign = first is not wide or not path or _inside(wide, path)
            if foreign or len(axes) != 1 or any(_others(user, path, wide)):
                return None
            ((axis, mask),) = axes
            edits.append(Edit("gather", path, "", tuple(torch.nonzero(mask).flatten().tolist()), axis))
    return edits


def _others(node: fx.Node, path: str, wide: fx.Node) -> Iterator[bool]:
    """Whether anything else in module ``path`` reads ``wide``, or is called there again."""
    for other in node.graph.nodes:
        if other is not node and _inside(other, path):
            yield wide in other.all_input_nodes or other.target is node.target


def fill_(small: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Add constants, by tensor name, to the buffers that ``rewire_`` made for them, and to added biases."""
    every: Any = {"remove_duplicate": False}
    tensors = {**dict(small.named_parameters(**every)), **dict(small.named_buffers(**every))}
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].add_(value.to(tensors[name]))
