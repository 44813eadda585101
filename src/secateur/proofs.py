"""The proof behind ``apply``: a candidate against the masked dense network, in float64 on the CPU.

Weights and inputs are chosen so that nothing hides: vectors are stretched, what is nearly zero or constant becomes
random, and random inputs stand beside the user's example. A check that would prove nothing (all outputs the same, or
NaN) is not accepted. Branches that exist only in train mode are compared in train mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.capture import in_mode
from secateur.errors import CannotPrune
from secateur.graph import plain
from secateur.groups import Coupling
from secateur.interpreter import run_masked
from secateur.masks import Meaning, zeroed_filters
from secateur.nests import flatten, unflatten
from secateur.slicing import State

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Proof:
    """What a candidate is compared with. ``state``: dense weights to build it from; ``inputs``: flat tensors, copies
    for every run, since a network may write into its inputs; ``wanted``: eval outputs of the masked network;
    ``wanted_train``: those of its train pass, if that was captured."""

    coupling: Coupling
    state: State
    examples: Sequence[torch.Tensor]
    wanted: Outputs
    wanted_train: Outputs | None
    tolerance: float

    @property
    def inputs(self) -> list[torch.Tensor]:
        return _copies(self.examples)

    @property
    def coarse(self) -> bool:
        """Whether all outputs are whole numbers (a class, a yes or no), so that a small mistake may not show."""
        reals = map(_real, self.wanted)
        return all(not t.is_floating_point() or bool((t == t.round()).all()) for t in reals)


def prove(coupling: Coupling, meaning: Meaning, *, copies: int = 1, anew: bool = False) -> Proof:
    """Run the masked network on telling weights and inputs, ``copies`` random ones (more than one needs a capture with
    a free batch). ``anew``: with vectors drawn anew, so that no gate that training closed hides what is behind it.
    Where constants are folded only the eval pass is compared: in train mode a batch norm takes the statistics of the
    zeros. Raises ``CannotPrune`` if nothing tells."""
    tensors = coupling.graph.tensors
    why = ""
    for inputs in (telling_inputs(coupling, copies), _example(coupling)):
        for make in (redrawn if anew else perturbed, doubles):
            state = zeroed_filters(make(tensors), meaning.zeros)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                wanted = run_masked(coupling, meaning.keep, state, _copies(inputs))
                why = _tells_nothing(wanted)
                if not why:
                    train = None if meaning.zeros else _masked_train(coupling, meaning.keep, state, inputs)
                    return Proof(coupling, state, inputs, wanted, train, 1e-5 if casts(coupling) else 1e-9)
    raise CannotPrune(
        f"the network's outputs are {why}, on the example inputs and on random ones, so nothing can be proved\n"
        "  do: check its weights for NaN and dead layers, or pass example inputs like the real ones"
    )


def difference(proof: Proof, trial: nn.Module) -> float:
    """The largest relative difference between ``trial`` and the masked network, train pass included."""
    _, skeleton = flatten((proof.coupling.graph.args, dict(proof.coupling.graph.kwargs)))
    with torch.no_grad():
        with in_mode(trial, False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            args, kwargs = unflatten(skeleton, proof.inputs)
            found = tuple(flatten(trial(*args, **kwargs))[0])
        worst = relative_difference(found, proof.wanted)
        if proof.wanted_train is not None and worst <= proof.tolerance:
            with in_mode(trial, True), _NoDropout(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                args, kwargs = unflatten(skeleton, proof.inputs)
                found = tuple(flatten(trial(*args, **kwargs))[0])
            worst = max(worst, relative_difference(found, proof.wanted_train))
    return worst


def relative_difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest ``max|a - b| / max|b|`` over the outputs; infinite if shapes, numbers or finiteness disagree."""
    if len(found) != len(wanted):
        return float("inf")
    worst = 0.0
    for a, b in zip(map(_real, found), map(_real, wanted), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        size = max(float(b.detach().double().abs().max()), 1e-30)
        gap = float((a.double() - b.double()).abs().max()) / size
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def perturbed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float64 copies on the CPU in which nothing can hide a mistake: vectors (scales, shifts, statistics) are stretched
    by 0.5 to 1.5, all that is nearly zero or constant becomes random; other matrices and kernels stay."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, value in doubles(tensors).items():
        if value.is_floating_point() and value.numel():
            is_vector = value.dim() < 2 or value.numel() == max(value.shape)
            if is_vector or float(value.max() - value.min()) < 1e-6:
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                tiny = float(value.abs().max()) < 1e-2 or not is_vector
                value = noise - 0.5 if tiny else value * (0.5 + noise)
        found[name] = value
    return found


def redrawn(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Like ``perturbed``, but vectors forget their values: positive ones lie in 0.5 to 1.5, others in -0.5 to 0.5."""
    generator = torch.Generator().manual_seed(1)
    found = perturbed(tensors)
    for name, value in found.items():
        if value.is_floating_point() and value.numel() and (value.dim() < 2 or value.numel() == max(value.shape)):
            positive = value.numel() > 1 and float(tensors[name].detach().min()) > 0
            found[name] = torch.rand(value.shape, generator=generator, dtype=torch.float64) + (
                0.5 if positive else -0.5
            )
    return found


def doubles(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float64 copies on the CPU; integers as they are."""
    return {name: _double(plain(tensor)) for name, tensor in tensors.items()}


def casts(coupling: Coupling) -> bool:
    """Whether the captured forward names a floating dtype itself."""
    for node in coupling.graph.captures[0].graph.nodes:
        values = [*node.args, *node.kwargs.values()]
        if any(isinstance(v, torch.dtype) and v in (torch.float32, torch.float16, torch.bfloat16) for v in values):
            return True
    return False


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


def _example(coupling: Coupling) -> list[torch.Tensor]:
    """The user's example as the capture has it: two examples of what is batched."""
    graph = coupling.graph
    tensors = [_double(plain(t)) for t in flatten((graph.args, dict(graph.kwargs)))[0]]
    marks = graph.captures[0].batched
    return [torch.cat([t[:1], t[-1:]]) if m else t for t, m in zip(tensors, marks, strict=True)]


def telling_inputs(coupling: Coupling, copies: int) -> list[torch.Tensor]:
    """One example of the user's and ``copies`` random ones of its size behind it; where there is no batch, random
    numbers instead of a constant example."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for tensor, batched in zip(_example(coupling), coupling.graph.captures[0].batched, strict=True):
        if tensor.is_floating_point():
            size = float(tensor.std()) if tensor.numel() > 1 else 0.0
            shape = (copies, *tensor.shape[1:]) if batched else tensor.shape
            noise = torch.randn(shape, generator=generator, dtype=torch.float64) * (size or 1.0)
            tensor = torch.cat([tensor[:1], noise]) if batched else (tensor if size else noise)
        elif batched:
            tensor = torch.cat([tensor[:1]] + [tensor[1:]] * copies)
        found.append(tensor)
    return found


def _tells_nothing(outputs: Outputs) -> str:
    floats = [_real(t) for t in outputs if t.is_floating_point() or t.is_complex()]
    if any(not bool(torch.isfinite(t).all()) for t in floats):
        return "NaN or infinite"
    if floats and all(t.numel() == 0 or (t.numel() > 1 and float(t.max() - t.min()) == 0.0) for t in floats):
        return "the same number everywhere"
    return ""


def _masked_train(
    coupling: Coupling, class_keep: torch.Tensor, state: State, inputs: Sequence[torch.Tensor]
) -> Outputs | None:
    if len(coupling.passes) < 2:
        return None
    own = {name: t.clone() for name, t in state.items()}  # running statistics move in train mode
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run_masked(coupling, class_keep, own, _copies(inputs), index=1)


class _NoDropout(TorchFunctionMode):
    """Every kind of dropout does nothing: its random choice depends on how many channels there are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))
