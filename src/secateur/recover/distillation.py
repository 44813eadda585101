"""Distillation: the pruned network learns from the dense one, which it was cut out of, as well as from the labels.

    loss = (1 - weight) CE(z, y) + weight T^2 KL(softmax(t / T) || softmax(z / T)) + features F

with the scores ``z [B, K]`` of the student and ``t [B, K]`` of the teacher (Hinton et al., "Distilling the Knowledge in
a Neural Network", 2015, section 2; T^2 keeps the gradients' size when T changes). ``F`` compares feature maps where
groups are written, the student's against those channels of the teacher's that were kept (FitNets, Romero et al. 2015,
equation 3, where pruning stands for the regressor: a kept channel has its own counterpart):

    F = mean over groups and examples of  mean((s - t)^2) / mean(t^2)

with the means over one example's map: its size counts for itself alone, and ``F`` is the same whether a batch is
computed as a whole, in parts (``accumulate``), or in several processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import BadRequest, nearest
from secateur.graph import as_arguments, unwrap
from secateur.graph_network import GraphNetwork
from secateur.plans import Plan, check_model
from secateur.recover.objectives import Objective, check_targets
from secateur.slicing import named, sliced
from secateur.surgery import record

LEAST_ENERGY = 1e-6
"""A feature map whose mean square is below this counts as having this one: a map of zeros has no size to compare with.
"""


@dataclass(frozen=True)
class Tap:
    """A module whose output is compared: its channels lie on axis ``axis``; ``kept``: those of the teacher's that the
    student still has, ``None`` for all."""

    module: str
    axis: int
    kept: Tensor | None


def distil(
    teacher: nn.Module,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
    features: float = 0.0,
    groups: Sequence[str] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """The loss of a student of ``teacher``, for ``fit_`` or your own loop: ``loss, scores = objective(model, x, y)``.

    ``temperature`` softens both networks' scores; ``weight`` (0 to 1) is the teacher's share against the labels';
    ``features`` weighs the feature maps, compared where the modules named by ``groups`` (default: all that can be)
    write them. For these the student must have been made by ``apply`` or ``load``, so that it is known which channels
    it has kept, and still consist of its own modules. Under ``torch.compile`` steps with feature maps run uncompiled.

    ``teacher`` is copied at once (one more set of its weights in memory): nothing of it is changed, and later changes
    to it do not show. The copy runs in eval mode, without gradients, on the device of the inputs. Mixed targets
    ``[B, K]`` (mixup) work; the teacher sees the same mixed inputs.

    Raises BadRequest for settings out of range; the objective raises it for a teacher of other classes, and for maps
    that cannot be compared.
    """
    _check((temperature, weight, features, label_smoothing), groups)
    frozen = sliced(unwrap(teacher), {}, named(unwrap(teacher))).eval().requires_grad_(False)
    known: dict[int, tuple[nn.Module, tuple[Tap, ...]]] = {}

    def taps_of(student: nn.Module) -> tuple[Tap, ...]:
        found = known.get(id(student))
        if found is None or found[0] is not student:
            known.clear()  # one student at a time: those before may be freed
            found = known[id(student)] = (student, find_taps(frozen, student, groups))
        return found[1]

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        args, kwargs = as_arguments(inputs)
        device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), torch.device("cpu"))
        if any(t.device != device for t in frozen.parameters()):
            frozen.to(device)
        taps = taps_of(unwrap(model)) if features else ()
        with _tapped(unwrap(model), taps) as seen, _uncompiled(bool(taps)):
            scores = _scores(model(*args, **kwargs), "the student")
        with _tapped(frozen, taps) as wanted, torch.no_grad():
            soft = _scores(frozen(*args, **kwargs), "the teacher")
        if scores.shape != soft.shape:
            raise BadRequest(
                f"the student's scores are {list(scores.shape)} and the teacher's {list(soft.shape)}: they know other "
                "classes\n  do: distil from the network that this one was pruned from, or one of the same classes"
            )
        if targets.device.type == "cpu":  # on a GPU, looking is waiting for it
            check_targets(targets, scores.shape[1])
        hard = nn.functional.cross_entropy(_precise(scores), targets, label_smoothing=label_smoothing)
        loss = (1 - weight) * hard + weight * divergence(scores, soft, temperature)
        if taps:
            loss = loss + features * feature_distance(taps, seen, wanted)
        return loss, scores

    return objective


def _check(numbers: tuple[float, float, float, float], groups: Sequence[str] | None) -> None:
    temperature, weight, features, label_smoothing = numbers
    if not (temperature > 0 and 0 <= weight <= 1 and features >= 0 and 0 <= label_smoothing < 1):
        raise BadRequest(
            f"cannot distil with temperature={temperature}, weight={weight}, features={features}, "
            f"label_smoothing={label_smoothing}\n"
            "  do: temperature above 0, weight in [0, 1], features not negative, label_smoothing in [0, 1)"
        )
    if groups is not None and (isinstance(groups, str) or not features):
        raise BadRequest("groups is a list of names, and needs features above 0: the weight of their feature maps")


def divergence(scores: Tensor, soft: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(soft / T) || softmax(scores / T))``, the mean over the batch, in float32 or more."""
    log_q = torch.log_softmax(_precise(scores) / temperature, 1)
    log_p = torch.log_softmax(_precise(soft) / temperature, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean() * temperature**2


def feature_distance(
    taps: Sequence[Tap], seen: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Sequence[Tensor]]
) -> Tensor:
    """``mean((s - t)^2) / mean(t^2)`` of each example (an entry of a map's first axis; a map of one axis is one), the
    mean over the examples, then over the taps (a module that ran several times counts each of them). A ``mean(t^2)``
    below ``LEAST_ENERGY`` counts as that."""
    distances = []
    for tap in taps:
        own, theirs = seen[tap.module], wanted[tap.module]
        if not own or len(own) != len(theirs):
            raise BadRequest(
                f"the module {tap.module!r} ran {len(own)} times in the student and {len(theirs)} times in the "
                "teacher: their feature maps cannot be compared\n  do: leave it out of groups, or set features=0"
            )
        for s, t in zip(own, theirs, strict=True):
            if tap.kept is not None:
                t = t.index_select(tap.axis, tap.kept.to(t.device))
            s, t = _precise(s), _precise(t)
            if s.shape != t.shape:
                raise BadRequest(
                    f"the module {tap.module!r} gives maps {list(s.shape)} in the student and {list(t.shape)} in the "
                    "teacher\n  do: leave it out of groups, or set features=0"
                )
            energy = _by_example(t).clamp_min(LEAST_ENERGY)
            distances.append((_by_example(s - t) / energy).mean())
    return torch.stack(distances).mean()


def _by_example(value: Tensor) -> Tensor:
    """The mean square of every example, ``[B]``."""
    return (value.flatten(1) if value.dim() > 1 else value[None]).square().mean(1)


def find_taps(teacher: nn.Module, student: nn.Module, groups: Sequence[str] | None) -> tuple[Tap, ...]:
    """Where the feature maps of ``teacher`` and ``student`` are compared.

    Raises BadRequest where the student does not say what it has kept, or a named group has no module to look at, and
    WrongModel if the student was not cut out of a network like the teacher.
    """
    made = record(student)
    if isinstance(student, GraphNetwork) or isinstance(teacher, GraphNetwork) or (made and made.tier == "graph"):
        raise BadRequest(
            "feature maps are looked up by module, and this network is a captured graph without modules\n"
            "  do: set features=0 and distil the scores only, or plan with prefer='module'"
        )
    if made is None:
        raise BadRequest(
            "the student does not say which channels it has kept: it was not made by apply or load\n"
            "  do: pass the network that secateur returned, or set features=0"
        )
    plan = made.plan
    check_model(plan, teacher)
    names = list(dict.fromkeys(g.name for g in plan.groups) if groups is None else groups)
    kept = plan.kept()
    found: dict[str, Tap] = {}
    for name in names:
        tap = _tap(name, plan, kept, teacher, student)
        if isinstance(tap, Tap):
            found[tap.module] = tap
        elif groups is not None:
            raise BadRequest(f"the group {name!r} has no feature map to compare: {tap}")
    if not found:
        raise BadRequest("no group of this network is written by a convolution or linear layer\n  do: set features=0")
    return tuple(found.values())


def _tap(
    name: str,
    plan: Plan,
    kept: Mapping[str, Mapping[int, np.ndarray]],
    teacher: nn.Module,
    student: nn.Module,
) -> Tap | str:
    """The tap of one group, or why there is none."""
    known = [group.name for group in plan.groups]
    if name not in known:
        return f"there is no such group{nearest(name, known)}"
    path = name.partition("#")[0].removesuffix(" input")
    modules = dict(teacher.named_modules()), dict(student.named_modules())
    if any(path not in own for own in modules):
        return f"there is no module {path!r}"
    module = modules[0][path]
    if isinstance(module, nn.Linear):
        axis, of = -1, 0
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axis, of = 1, 0
    elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and module.groups == 1:
        axis, of = 1, 1
    else:
        return f"{path!r} is a {type(module).__name__}, whose outputs' channels are not known"
    group = plan.groups[known.index(name)]
    slices = [s for s in group.slices if s.role == "writes" and s.axis == of and s.tensor.startswith(f"{path}.")]
    if not slices:
        return f"{path!r} does not write it"
    cut = kept.get(slices[0].tensor, {}).get(of)
    return Tap(path, axis, None if cut is None else torch.from_numpy(cut))


@contextlib.contextmanager
def _tapped(model: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[str, list[Tensor]]]:
    """What the tapped modules of ``model`` put out during the block."""
    outputs: dict[str, list[Tensor]] = {tap.module: [] for tap in taps}
    handles = []

    def listen(name: str) -> Any:
        return lambda module, args, output: outputs[name].append(output)

    try:
        for tap in taps:
            handles.append(model.get_submodule(tap.module).register_forward_hook(listen(tap.module)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _uncompiled(wanted: bool) -> Iterator[None]:
    """A compiled network does not see hooks that come and go."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _scores(output: Any, who: str) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() < 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadRequest(f"{who} returns {shape}, not scores [B, K]\n  do: wrap it so that it returns the scores alone")
    return output


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
