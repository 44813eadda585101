"""Integers on modules that speak of channel counts: torch's own classes corrected from their weights, and the user's
own attributes (``expand_chs``, ``head_dim``, ``splits``) set to what the graph says they must become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.core import Edit
from secateur.errors import BadPlan, WrongModel
from secateur.groups import Coupling
from secateur.nodes import module_stack, named_args, op_name
from secateur.rewrites import Note

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def correct_modules(dense: nn.Module, small: nn.Module) -> None:
    """Set ``out_channels``, ``in_features``, ``num_features`` ... of every torch module to its weights' new shape."""
    originals = dict(dense.named_modules(remove_duplicate=False))
    done: set[int] = set()
    for name, module in small.named_modules(remove_duplicate=False):
        if id(module) not in done:
            done.add(id(module))
            _correct(module, originals[name])


def _weight(module: nn.Module) -> torch.Tensor | None:
    try:
        weight = module.weight
    except Exception:  # a parametrisation that cannot be computed now says nothing about shapes
        return None
    return weight if isinstance(weight, torch.Tensor) else None


def _correct(module: nn.Module, old: Any) -> None:
    weight = _weight(module)
    if isinstance(module, _ConvNd) and weight is not None:
        transposed = isinstance(module, _ConvTransposeNd)
        if old.groups > 1 and old.groups == old.in_channels:
            multiplier = 1 if transposed else old.out_channels // old.groups
            module.groups = weight.shape[0] // multiplier
        near, far = (weight.shape[0], weight.shape[1] * module.groups)
        module.in_channels, module.out_channels = (near, far) if transposed else (far, near)
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _NormBase):
        vector = weight if weight is not None else module.running_mean
        if isinstance(vector, torch.Tensor):
            module.num_features = vector.shape[0]
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        if old.num_groups == old.num_channels:
            module.num_groups = weight.shape[0]
        module.num_channels = weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.PReLU) and weight is not None:
        module.num_parameters = weight.shape[0]


def attribute_edits(model: nn.Module, notes: Iterable[Note]) -> tuple[Edit, ...]:
    """The integer attributes of ``model`` that hold a number which the graph had to change, as edits.

    A coincidence of numbers misfires: whoever sets them must check the outcome.
    """
    found: dict[tuple[str, str], Edit] = {}
    for note in notes:
        try:
            module = model.get_submodule(note.path)
        except AttributeError:
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training" or isinstance(value, bool):
                continue
            if isinstance(value, int) and value == note.old and isinstance(note.new, int):
                found[note.path, name] = Edit("attribute", note.path, name, note.new)
            elif _integers(value) and isinstance(note.old, tuple) and tuple(value) == note.old:
                assert isinstance(note.new, tuple)
                found[note.path, name] = Edit("attribute", note.path, name, note.new)
    return tuple(found.values())


def bare_norm_edits(coupling: Coupling, class_keep: torch.Tensor) -> tuple[Edit, ...]:
    """``num_features`` of norms that hold no tensor to read it from (``InstanceNorm2d`` without affine weights)."""
    found = []
    for node in coupling.graph.captures[0].graph.nodes:
        if node.op != "call_function" or op_name(node) not in ("batch_norm", "instance_norm"):
            continue
        args, stack = named_args(node), module_stack(node)
        if any(args[k] is not None for k in ("weight", "running_mean")) or not stack:
            continue
        mask = coupling.node_masks(0, args["input"], class_keep)[1]
        if mask is not None and isinstance(coupling.graph.model.get_submodule(stack[-1][0]), _NormBase):
            found.append(Edit("attribute", stack[-1][0], "num_features", int(mask.sum())))
    return tuple(found)


def add_biases_(small: nn.Module, edits: Sequence[Edit]) -> None:
    """Carry out the edits of kind ``bias``: layers of torch's own kinds get one, of zeros, that learns if their weight
    does. Raises ``WrongModel`` if the layer is gone, ``BadPlan`` if it can have none or is of another width."""
    for edit in edits:
        if edit.kind != "bias":
            continue
        try:
            layer: Any = small.get_submodule(edit.target)
        except AttributeError as error:
            raise WrongModel(f"the plan adds a bias to {edit.target!r}, which this model does not have") from error
        width: int = getattr(layer, "out_features", 0) or getattr(layer, "out_channels", 0)
        if not takes_bias(layer) or width != edit.value:
            raise BadPlan(
                f"the plan adds a bias of {edit.value} to {edit.target!r}, no layer without bias of that width\n"
                "  do: do not use this plan unless you trust where it came from; plan again"
            )
        weight: torch.Tensor = layer.weight
        zeros = torch.zeros(width, dtype=weight.dtype, device=weight.device)
        layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def takes_bias(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution or linear layer without bias whose forward, torch's own, would add one."""
    plain = any(type(layer).forward is kind.forward for kind in _LAYERS if isinstance(layer, kind))
    return plain and getattr(layer, "bias", 0) is None and isinstance(_weight(layer), nn.Parameter)


def _integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(type(v) is int for v in value)


def set_attributes(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Carry out the edits of kind ``attribute``; the attribute keeps its type.

    Raises ``WrongModel`` if it is gone, ``BadPlan`` if it is anything but a number that surgery could have set.
    """
    for edit in edits:
        if edit.kind != "attribute":
            continue
        try:
            module = model.get_submodule(edit.target)
            old = getattr(module, edit.name)
        except AttributeError as error:
            raise WrongModel(f"the plan sets {edit.target}.{edit.name}, which this model does not have") from error
        if edit.name.startswith("_") or edit.name not in vars(module) or not (type(old) is int or _integers(old)):
            raise BadPlan(
                f"the plan sets {edit.target}.{edit.name}, which is no integer, nor tuple of integers, of this model\n"
                "  do: do not use this plan unless you trust where it came from; plan again"
            )
        value = (
            type(old)(edit.value) if isinstance(old, (list, tuple)) and isinstance(edit.value, tuple) else edit.value
        )
        setattr(module, edit.name, value)
