"""Distillation: the loss against a naive one, the teacher untouched, feature maps of the kept channels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from bare_loop import CLASSES, X, batches, chain, same_weights, sgd, small
from networks import NETWORKS
from secateur.recover.distillation import LEAST_ENERGY, Tap, distil, feature_distance, find_taps

INPUTS, TARGETS = next(batches(0))


def pair(ratios: Any = 0.5) -> tuple[nn.Module, nn.Module, sc.Plan]:
    """A teacher in train mode, the student that was cut out of it, and the plan."""
    teacher = small()
    plan = sc.plan(teacher, X, ratios=ratios)
    return teacher, sc.apply(teacher, plan), plan


def naive(z: Tensor, t: Tensor, targets: Tensor, temperature: float, weight: float) -> float:
    """The loss, example by example and class by class."""
    total = 0.0
    for row, soft, target in zip(z.tolist(), t.tolist(), targets.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in soft]
        q = [math.exp(v / temperature) for v in row]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = math.log(sum(math.exp(v) for v in row)) - row[target]
        total += (1 - weight) * hard + weight * temperature**2 * divergence
    return total / len(targets)


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (2.0, 0.0), (8.0, 1.0)])
def test_the_loss_is_hintons(temperature: float, weight: float) -> None:
    teacher, student = small(), small(1)
    loss, scores = distil(teacher, temperature=temperature, weight=weight)(student.eval(), INPUTS, TARGETS)
    with torch.no_grad():
        want = naive(student(INPUTS), teacher.eval()(INPUTS), TARGETS, temperature, weight)
        assert torch.equal(scores, student(INPUTS))
    assert loss.item() == pytest.approx(want, rel=1e-4)


def test_a_student_equal_to_its_teacher_has_only_the_hard_loss_left() -> None:
    teacher = small().eval()
    loss, scores = distil(teacher, weight=0.75)(copy.deepcopy(teacher), INPUTS, TARGETS)
    assert loss.item() == pytest.approx(0.25 * F.cross_entropy(scores, TARGETS).item(), rel=1e-5)


def test_mixed_targets_and_smoothing_reach_the_hard_loss() -> None:
    teacher = small().eval()
    soft = torch.softmax(torch.randn(len(INPUTS), CLASSES, generator=torch.Generator().manual_seed(0)), 1)
    for targets in (TARGETS, soft):
        loss, scores = distil(teacher, weight=0.0, label_smoothing=0.2)(small(1).eval(), INPUTS, targets)
        assert loss.item() == pytest.approx(F.cross_entropy(scores, targets, label_smoothing=0.2).item(), rel=1e-5)


def test_the_teacher_is_never_changed_and_learns_nothing() -> None:
    teacher, student, _ = pair()
    teacher.train()
    teacher.block.eval()  # type: ignore[union-attr]
    before, modes = copy.deepcopy(teacher), {n: m.training for n, m in teacher.named_modules()}
    objective = distil(teacher, features=1.0)
    optimizer = sgd(student, 0.01)
    for x, y in batches(0):
        loss, _ = objective(student.train(), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same_weights(teacher, before)
    assert modes == {n: m.training for n, m in teacher.named_modules()}
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not any(m._forward_hooks for m in [*teacher.modules(), *student.modules()])


def test_the_teacher_is_the_one_it_was_when_the_objective_was_made() -> None:
    teacher = small()
    objective, student = distil(teacher, weight=1.0), small(1).eval()
    before, _ = objective(student, INPUTS, TARGETS)
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()
    after, _ = objective(student, INPUTS, TARGETS)
    assert torch.equal(before, after)


def test_distilling_brings_the_student_nearer_to_its_teacher() -> None:
    teacher, student, _ = pair(0.25)
    objective = distil(teacher, weight=1.0, features=0.1)
    optimizer = sgd(student, 0.02)
    losses = []
    for epoch in range(6):
        for x, y in batches(epoch):
            loss, _ = objective(student.train(), x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


# Feature maps ----------------------------------------------------------------------------------------------------


def feature_part(teacher: nn.Module, student: nn.Module, **options: Any) -> float:
    """What the feature maps add to the loss, per unit of their weight."""
    with_maps, _ = distil(teacher, features=2.0, **options)(student, INPUTS, TARGETS)
    without, _ = distil(teacher)(student, INPUTS, TARGETS)
    return (with_maps - without).item() / 2


def test_maps_are_compared_on_the_channels_that_were_kept() -> None:
    teacher, student, plan = pair()
    teacher.eval()
    student.eval()
    maps: dict[str, list[Tensor]] = {}
    names = ["stem.0", "block.conv1", "grouped.0", "wide.conv2"]
    for model in (teacher, student):
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_hook(lambda m, a, out, name=name: maps.setdefault(name, []).append(out.detach()))
        model(INPUTS)
    kept = plan.kept()
    distances = []
    for name in names:
        t, s = maps[name]
        t = t[:, torch.from_numpy(kept[f"{name}.weight"][0])]
        apart = [float((a - b).square().mean() / b.square().mean()) for a, b in zip(s, t, strict=True)]
        distances.append(sum(apart) / len(apart))
    assert distances[0] < 1e-10, "the stem's kept filters see the same input as before"
    assert distances[1] > 1e-3
    for name, distance in zip(names, distances, strict=True):
        assert feature_part(teacher, student, groups=[name]) == pytest.approx(distance, rel=1e-3, abs=1e-6)
    together = sum(distances) / len(distances)
    assert feature_part(teacher, student, groups=names) == pytest.approx(together, rel=1e-3)


def test_the_distance_of_maps_does_not_depend_on_how_a_batch_is_shared() -> None:
    teacher, student, _ = pair()
    taps = find_taps(teacher, student, None)
    own, theirs = {}, {}
    loud = torch.tensor([1.0, 30.0, 0.1, 3.0]).view(4, 1, 1, 1)  # examples of unlike energies
    for name, maps, seed in (("own", own, 0), ("theirs", theirs, 1)):
        g = torch.Generator().manual_seed(seed)
        for tap in taps:
            kept = student.get_submodule(tap.module).weight.shape[0]
            channels = kept if name == "own" else teacher.get_submodule(tap.module).weight.shape[0]
            maps[tap.module] = [torch.randn(4, channels, 3, 3, generator=g) * loud]
    whole = feature_distance(taps, own, theirs)

    def part(maps: dict[str, list[Tensor]], at: slice) -> dict[str, list[Tensor]]:
        return {name: [m[at] for m in each] for name, each in maps.items()}

    halves = [feature_distance(taps, part(own, at), part(theirs, at)) for at in (slice(2), slice(2, 4))]
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-5)
    assert abs(float(halves[0] / halves[1]) - 1) > 1e-3


def test_a_map_that_is_zero_does_not_drown_the_others() -> None:
    tap = Tap("a", 1, None)
    s, t = torch.full((2, 3, 4, 4), 1e-3), torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    want = (1e-6 / LEAST_ENERGY + (1 - 1e-3) ** 2) / 2
    assert float(feature_distance([tap], {"a": [s]}, {"a": [t]})) == pytest.approx(want, rel=1e-4)
    same = feature_distance([tap], {"a": [t[:, 0, 0, 0]]}, {"a": [t[:, 0, 0, 0]]})  # a map of one axis is one row
    assert float(same) == 0.0


def test_by_default_every_group_is_looked_at() -> None:
    teacher, student, plan = pair()
    taps = find_taps(teacher, student, None)
    assert [tap.module for tap in taps] == [group.name for group in plan.groups]


def test_linear_and_transposed_layers_have_maps_too() -> None:
    net = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.LazyLinear(10), nn.ReLU()
    )
    net.append(nn.Linear(10, CLASSES))
    net(X)
    student = sc.apply(net, sc.plan(net, X, ratios=0.5))
    assert [(tap.module, tap.axis) for tap in find_taps(net, student, None)] == [("0", 1), ("2", 1), ("4", -1)]
    assert math.isfinite(feature_part(net, student))


def test_a_network_that_prunes_nothing_matches_its_teacher() -> None:
    teacher, student, _ = pair(0.0)
    assert feature_part(teacher.eval(), student.eval()) == pytest.approx(0.0, abs=1e-6)


def test_the_maps_have_gradients() -> None:
    teacher, student, _ = pair()
    loss, _ = distil(teacher, weight=0.0, features=1.0, groups=["block.conv1"])(student, INPUTS, TARGETS)
    (loss - F.cross_entropy(student(INPUTS), TARGETS)).backward()
    own = student.get_parameter("block.conv1.weight").grad
    assert own is not None
    assert bool(own.any())


def test_wrapped_students_are_looked_into() -> None:
    teacher, student, _ = pair()
    student.eval()
    plain = distil(teacher, features=1.0)(student, INPUTS, TARGETS)[0]
    wrapped = distil(teacher, features=1.0)(nn.DataParallel(student), INPUTS, TARGETS)[0]
    compiled = torch.compile(student, backend="eager")
    compiled(INPUTS)
    objective = distil(torch.compile(teacher, backend="eager"), features=1.0)  # type: ignore[arg-type]
    traced = objective(compiled, INPUTS, TARGETS)[0]  # type: ignore[arg-type]
    assert wrapped.item() == pytest.approx(plain.item(), rel=1e-6)
    assert traced.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_saved_and_loaded_student_knows_what_it_kept(tmp_path: Any) -> None:
    teacher, student, plan = pair()
    sc.save(tmp_path / "saved", student, plan)
    loaded = sc.load(tmp_path / "saved", small(3))
    want = feature_part(teacher, student.eval())
    assert feature_part(teacher, loaded.eval()) == pytest.approx(want, rel=1e-4)


# Refused ---------------------------------------------------------------------------------------------------------


def test_a_teacher_of_other_classes_is_refused() -> None:
    teacher = chain()
    teacher.head = nn.Linear(16, 10)
    with pytest.raises(sc.BadRequest, match=r"student's scores are \[8, 4\] and the teacher's \[8, 10\]") as error:
        distil(teacher)(small(), INPUTS, TARGETS)
    assert "do: distil from the network that this one was pruned from" in str(error.value)


@pytest.mark.filterwarnings("ignore:the captured graph stands for the model")
def test_a_graph_has_no_maps() -> None:
    make, inputs, _ = NETWORKS["shuffle_unit"]
    model = make()
    student = sc.apply(model, sc.plan(model, inputs(), ratios=0.5))
    made = sc.record(student)
    assert made is not None
    assert made.tier == "graph"
    with pytest.raises(sc.BadRequest, match="a captured graph without modules") as error:
        find_taps(model, student, None)
    assert "do: set features=0" in str(error.value)


def test_a_student_of_another_network_has_no_maps() -> None:
    teacher, student, _ = pair()
    with pytest.raises(sc.BadRequest, match="does not say which channels it has kept"):
        distil(teacher, features=1.0)(small(), INPUTS, TARGETS)
    with pytest.raises(sc.WrongModel, match="of the plan's network is missing in this model"):
        distil(chain(), features=1.0)(student, INPUTS, TARGETS)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (["block.conv9"], "there is no such group; did you mean 'block.conv1'?"),
        (["head"], "there is no such group"),
    ],
)
def test_a_group_without_a_map_is_refused(groups: list[str], text: str) -> None:
    teacher, student, _ = pair()
    with pytest.raises(sc.BadRequest, match="has no feature map to compare") as error:
        distil(teacher, features=1.0, groups=groups)(student, INPUTS, TARGETS)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"weight": 1.5},
        {"features": -1.0},
        {"label_smoothing": 1.0},
        {"groups": ["a"]},
        {"features": 1.0, "groups": "stem.0"},
    ],
)
def test_wrong_settings_are_said_at_once(wrong: Any) -> None:
    with pytest.raises(sc.BadRequest, match=r"cannot distil with|groups is a list of names"):
        distil(small(), **wrong)


class Labelled(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def test_a_model_that_returns_no_scores_is_refused() -> None:
    with pytest.raises(sc.BadRequest, match=r"the student returns dict, not scores \[B, K\]"):
        distil(small())(Labelled(small()), INPUTS, TARGETS)
    with pytest.raises(sc.BadRequest, match=r"the teacher returns dict, not scores \[B, K\]"):
        distil(Labelled(small()))(small(), INPUTS, TARGETS)
