"""Feature maps as forward hooks in plain torch see them, and what is to be known of them by naive loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from secateur.capture import canonical_names
from secateur.core import Group, MapStatistics

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)
FIELDS = ("mean", "std", "l1", "l2", "l2_squared", "zeros")
Calls = list[tuple[str, nn.Module, Tensor]]


@contextmanager
def hooked(model: nn.Module) -> Iterator[Calls]:
    """Every call of a plain layer: the name of its weight, the layer, its output."""
    names, calls, handles = canonical_names(model), [], []
    for name, module in model.named_modules():
        if isinstance(module, PLAIN) and isinstance(module._parameters.get("weight"), nn.Parameter):
            weight = names[f"{name}.weight" if name else "weight"]

            def seen(layer: nn.Module, _: object, out: Tensor, weight: str = weight) -> None:
                calls.append((weight, layer, out.detach().clone()))

            handles.append(module.register_forward_hook(seen))
    with torch.no_grad():
        yield calls
    for handle in handles:
        handle.remove()


def naive(calls: Calls, group: Group, model: nn.Module) -> Tensor | None:
    """``[6, C, M]`` by loops over samples and channels; ``None`` where something else than plain layers writes."""
    tensors = dict(model.named_parameters())
    writes = [s for s in group.slices if s.role == "writes" and s.tensor in tensors and tensors[s.tensor].dim() > 1]
    called = {weight for weight, _, _ in calls}
    if not writes or any(s.tensor not in called for s in writes):
        return None
    found = []
    for weight, layer, out in calls:
        for piece in (s for s in writes if s.tensor == weight):
            if out.dim() < (2 if isinstance(layer, nn.Linear) else 3):
                return None
            maps = out.movedim(-1, 1) if isinstance(layer, nn.Linear) else out
            for_each = outputs_of(layer, piece.axis, piece.positions)
            found.append(torch.stack([describe(maps, row) for row in for_each], 1))
    return torch.cat(found, 2)


def outputs_of(layer: nn.Module, axis: int, positions: np.ndarray) -> np.ndarray:
    """``[C, m]``: the outputs of a layer that rows of its weight stand for."""
    if not isinstance(layer, TRANSPOSED):
        assert axis == 0
        return positions
    per_group = layer.weight.shape[1]
    if axis == 1:
        return np.concatenate([positions + per_group * k for k in range(layer.groups)], 1)
    return (positions[:, :, None] * per_group + np.arange(per_group)).reshape(len(positions), -1)


def describe(maps: Tensor, row: np.ndarray) -> Tensor:
    """``[6, m]``: the statistics of some channels of ``[N, C, ...]``, sample by sample."""
    columns = []
    for channel in row.tolist():
        total = torch.zeros(6, dtype=torch.float64)
        for sample in maps[:, channel].double().flatten(1) if maps.dim() > 2 else maps[:, channel, None].double():
            mean = sample.sum() / len(sample)
            square = (sample * sample).sum()
            std = (((sample - mean) ** 2).sum() / len(sample)).sqrt()
            zeros = sum(v == 0 for v in sample.tolist()) / len(sample)
            total += torch.stack(
                [mean, std, sample.abs().sum(), square.sqrt(), square, torch.tensor(zeros, dtype=total.dtype)]
            )
        columns.append(total / len(maps))
    return torch.stack(columns, 1)


def describe_all(maps: Tensor) -> Tensor:
    return describe(maps, torch.arange(maps.shape[1])[:, None].numpy()).unsqueeze(2)


def compare(found: MapStatistics, want: Tensor) -> None:
    """Equal up to the order of a channel's maps."""
    got = torch.stack([getattr(found, field) for field in FIELDS])
    assert got.shape == want.shape
    torch.testing.assert_close(got.sort(2).values, want.sort(2).values, rtol=1e-9, atol=1e-12)
