"""Torch-Pruning on the same networks, as it comes: the pruner with a ratio of 0.5, all last layers ignored.

What is asked of it: the pruned network runs at batch 1 and 3, trains, and nine convolutions in ten have shrunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import common
from common import Row


def pruner_for(model: nn.Module, example: Sequence[Tensor]) -> Any:
    """Torch-Pruning's pruner, constructed: L1 norm, uniform 50 %, the last layers left alone."""
    import torch_pruning as tp

    return tp.pruner.BasePruner(
        model,
        example[0] if len(example) == 1 else tuple(example),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=last_layers(model, example),
    )


def last_layers(model: nn.Module, example: Sequence[Tensor]) -> list[nn.Module]:
    """Layers with as many outputs as there are classes, and those whose output is the network's own."""
    seen: list[tuple[nn.Module, Tensor]] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [
        m.register_forward_hook(lambda module, _, out: seen.append((module, out)))
        for m in model.modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        outputs = common.tensors_of(model(*example))
    for hook in hooks:
        hook.remove()
    flat = [t.flatten() for t in outputs]
    ends = [m for m, out in seen if any(torch.equal(out.flatten(), t) for t in flat)]
    classes = {t.shape[1] for t in outputs if t.dim() in (2, 4)} & {21, 1000}
    heads = [m for m in model.modules() if isinstance(m, kinds) and len(m.weight) in classes]
    return list(dict.fromkeys([*ends, *heads]))


def prune(name: str, size: int | None = None) -> Row:
    """Prune the network ``name`` and say how it went: ``{"verdict": "ok" or a few words, ...}``."""
    model = common.build(name)
    example = common.inputs_of(name, model, size)
    common.randomise_(model, example)
    before = common.layers(model)
    row: Row = {}
    try:
        pruner, row["constructor_s"] = common.timed(lambda: pruner_for(model, example))
        _, row["step_s"] = common.timed(pruner.step)
    except Exception as error:
        return {"verdict": f"fails: {common.short(error, 90)}"}
    row |= common.shares_of(before, {n: tuple(p.shape) for n, p in model.named_parameters()})
    row["verdict"] = _verdict(model, example, row)
    return row


def _verdict(model: nn.Module, example: Sequence[Tensor], row: Row) -> str:
    model.eval()
    for batch in (1, 3):
        with torch.no_grad():
            why = common.outcome(lambda batch=batch: common.tensors_of(model(*common.redrawn(example, batch, 7))))
        if why:
            return f"batch {batch}: {why[:90]}"
    reached = common.gradients(model, common.redrawn(example, 2, 5))
    if isinstance(reached, str):
        return f"backward: {reached[:90]}"
    if row["convs_shrunk"] < 0.9 * row["convs"]:
        return f"left dense {row['convs'] - row['convs_shrunk']} of {row['convs']}"
    return "ok"
