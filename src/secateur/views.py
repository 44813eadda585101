"""What a criterion sees of a group: its weights as plain matrices, one row a channel.

A group says where its channels lie in the network's tensors; ``view`` gathers those places. Channel ``c`` of a slice
owns the indices ``positions[c]`` along one axis; the sub-tensors found there are flattened into row ``c``, and the rows
of all slices of one role are put side by side. So a criterion needs no modules, hooks, layouts or names: a transposed
convolution, a grouped one and a linear layer behind a flattened map all look the same to it.

Letters: ``C`` channels of the group, ``k`` indices a channel owns along one axis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch

from secateur.core import Group, GroupView, Slice
from secateur.errors import CannotPrune

FIELDS = ("filters", "readers", "scales")
"""The matrices of a view."""


def view(
    group: Group,
    tensors: Mapping[str, torch.Tensor],
    *,
    n_keep: int | None = None,
    seed: int = 0,
    fields: Collection[str] = FIELDS,
    evidence: Mapping[str, Any] = MappingProxyType({}),
) -> GroupView:
    """The ``GroupView`` of ``group``, gathered from ``tensors`` (state_dict name -> tensor).

    ``filters [C, fan_in]``: every ``writes`` slice of a tensor of two or more axes (biases are not filters).
    ``readers [C, fan_out]``: every ``reads`` slice. ``scales [C, s]``: every ``scales`` slice. Slices stand in the
    group's order; where nothing writes, reads or scales a group (a bare parameter in the forward), what there is of it
    stands for its filters. float64 stays float64, all other floats become float32; tensors that are not floating point
    are indices rather than weights and are left out. ``fields`` saves the gathering of matrices that are not wanted
    (they get no columns), except for a group without filters, which is always shown in full. ``evidence``: what was
    measured of the group on data (``maps``, ``outputs``, ``products`` ...), shown as it is.

    Raises ``CannotPrune`` for a tensor that is missing or holds NaN or infinity.
    """
    filters = _rows(group, tensors, [s for s in group.slices if s.role == "writes" and _is_filter(s, tensors, group)])
    if all(s.role in ("writes", "follows") for s in group.slices) and filters.shape[1] == 0:
        filters = _rows(group, tensors, list(group.slices))  # a bare parameter is all that there is of its channels
    wanted = set(FIELDS if filters.shape[1] == 0 else fields)
    return GroupView(
        name=group.name,
        filters=filters if "filters" in wanted else filters[:, :0],
        readers=_rows(group, tensors, [s for s in group.slices if s.role == "reads"] if "readers" in wanted else []),
        scales=_rows(group, tensors, [s for s in group.slices if s.role == "scales"] if "scales" in wanted else []),
        n_keep=n_keep,
        seed=seed,
        **evidence,
    )


def _is_filter(piece: Slice, tensors: Mapping[str, torch.Tensor], group: Group) -> bool:
    return _tensor(piece.tensor, tensors, group).dim() >= 2


def _tensor(name: str, tensors: Mapping[str, torch.Tensor], group: Group) -> torch.Tensor:
    if name not in tensors:
        raise CannotPrune(
            f"group {group.name!r} lies in the tensor {name!r}, which is not among the {len(tensors)} tensors given\n"
            "  do: pass the tensors of the network that the groups were found in"
        )
    return tensors[name].detach()


def _rows(group: Group, tensors: Mapping[str, torch.Tensor], slices: list[Slice]) -> torch.Tensor:
    """``[C, columns]``: the rows of each slice, side by side."""
    parts = []
    for piece in slices:
        tensor = _tensor(piece.tensor, tensors, group)
        if not tensor.is_floating_point():
            continue
        part = _gather(tensor, piece)
        # The sum is one fast pass and not finite if any value is not; only then is it worth counting. It may also
        # overflow on finite values, so the count decides.
        if not torch.isfinite(part.sum()):
            _refuse_non_finite(piece.tensor, tensor, group)
        parts.append(part)
    if not parts:
        return torch.empty(group.channels, 0)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
    parts = [p.to(dtype) for p in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _gather(tensor: torch.Tensor, piece: Slice) -> torch.Tensor:
    """``[C, k * rest]`` on the CPU, float32 or float64."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    channels_first = tensor.movedim(piece.axis, 0)
    channels = piece.positions.shape[0]
    index = torch.from_numpy(piece.positions.reshape(-1).astype("int64"))
    whole = index.numel() == channels_first.shape[0] and bool((index == torch.arange(index.numel())).all())
    picked = channels_first if whole else channels_first.index_select(0, index)
    return picked.reshape(channels, -1)


def _refuse_non_finite(name: str, tensor: torch.Tensor, group: Group) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CannotPrune(
            f"{name!r} holds {bad} of {tensor.numel()} values that are not finite (NaN or infinity)\n"
            f"  its channels belong to group {group.name!r} and cannot be scored\n"
            "  do: load sound weights, or find the training step that diverged"
        )
