"""Pooled heads: where they are found, what they compute, and that the rest of the library takes them as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.errors import BadRequest, CannotPrune
from secateur.zoo import imagenet_vgg16, vgg16_cifar
from secateur.zoo.resnet import cifar_resnet

WIDTHS = (4, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7)


def vgg() -> nn.Module:
    return imagenet_vgg16(widths=WIDTHS, hidden=(9, 8), classes=5)


def conv(inputs: int, outputs: int, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), *more)


class Loose(nn.Module):
    """Pools, and flattens, in its forward."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features, self.pool = conv(3, 6), pool
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


class Fire(nn.Module):
    """Ends in a convolution, as SqueezeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 3), conv(6, 4)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(7, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.cat([self.b(x), self.c(x)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


class Convolved(nn.Module):
    """Fully connected layers written as convolutions, as timm's VGG has them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = conv(3, 6)
        self.pre_logits = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 9, 4), nn.ReLU(), nn.Conv2d(9, 8, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pre_logits(self.features(x)))


class Squeezed(nn.Module):
    """Averages in a branch do not end the map, and convolutions behind the average belong to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = conv(3, 6), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(10, 5)
        self.wide, self.act = nn.Conv2d(6, 10, 1), nn.Hardswish()

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.wide(self.pool(self.features(x)))).flatten(1))


def flat() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 9), nn.ReLU(), nn.Linear(9, 5))


def tiny() -> nn.Module:
    """Its map is down to one position long before its head."""
    return nn.Sequential(
        conv(3, 6), nn.AvgPool2d(8), conv(6, 7), nn.Flatten(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5)
    )


def line() -> nn.Module:
    """One axis of positions, and batch norm between the layers of the head."""
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(36, 8),
        nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip


Case = tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Any, Tensor], Tensor]]
NETWORKS: dict[str, Case] = {
    "vgg16": (vgg, (3, 32, 32), lambda m, x: m.features[:30](x)),
    "vgg16_cifar": (lambda: vgg16_cifar(widths=WIDTHS), (3, 32, 32), lambda m, x: m.features[:43](x)),
    "resnet": (lambda: cifar_resnet(8, classes=5), (3, 16, 16), lambda m, x: m.layer3(m.layer2(m.layer1(stem(m, x))))),
    "loose pool": (
        lambda: Loose(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
        (3, 8, 8),
        lambda m, x: m.features(x),
    ),
    "loose mean": (lambda: Loose(lambda x: x.mean([2, 3])), (3, 8, 8), lambda m, x: m.features(x)),
    "loose window": (lambda: Loose(lambda x: F.avg_pool2d(x, 8).view(-1, 6)), (3, 8, 8), lambda m, x: m.features(x)),
    "fire": (Fire, (3, 8, 8), lambda m, x: m.features(x)),
    "convolved": (Convolved, (3, 8, 8), lambda m, x: m.features(x)),
    "squeezed": (Squeezed, (3, 8, 8), lambda m, x: m.features(x)),
    "flat": (flat, (3, 8, 8), lambda m, x: m[0](x)),
    "tiny": (tiny, (3, 8, 8), lambda m, x: m[:3](x)),
    "line": (line, (3, 14), lambda m, x: m[:3](x)),
}


def stem(model: Any, x: Tensor) -> Tensor:
    return F.relu(model.bn1(model.conv1(x)))


def make(name: str) -> tuple[nn.Module, Tensor, Callable[[Any, Tensor], Tensor]]:
    build, shape, features = NETWORKS[name]
    torch.manual_seed(0)
    return build().double().eval(), torch.randn(3, *shape, dtype=torch.float64), features


def new_layer(pooled: nn.Module) -> nn.Linear:
    (found,) = [m for m in pooled.modules() if isinstance(m, nn.Linear)]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_one_linear_layer_on_the_average_of_the_last_map(name: str) -> None:
    model, x, features = make(name)
    before = copy.deepcopy(model.state_dict())
    pooled = sc.pool_head(model, x)
    linear, average = new_layer(pooled), features(model, x).flatten(2).mean(2)
    assert torch.allclose(pooled(x), linear(average), rtol=1e-12, atol=1e-14)
    assert pooled(x).shape == model(x).shape
    assert type(pooled) is type(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in pooled.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_vgg16_becomes_the_zoos_network_with_the_pooled_head() -> None:
    pooled = sc.pool_head(vgg().eval(), torch.zeros(1, 3, 32, 32))
    same = imagenet_vgg16(widths=WIDTHS, classes=5, head="gap").eval()
    same.load_state_dict(pooled.state_dict())
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pooled(x), same(x))


def test_the_new_layer_is_drawn_by_the_seed_and_nothing_else_is() -> None:
    model, x, _ = make("flat")
    state = torch.get_rng_state()
    one, same, other = (new_layer(sc.pool_head(model, x, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not one.bias.any()


def test_other_classes_modes_and_dtypes() -> None:
    model = make("vgg16")[0].float().train()
    pooled = sc.pool_head(model, torch.zeros(1, 3, 32, 32), classes=11)
    assert all(module.training for module in pooled.modules())
    assert new_layer(pooled).weight.dtype == torch.float32
    assert pooled.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 11)
    assert not sc.pool_head(model.half().eval(), torch.zeros(1, 3, 32, 32)).training
    assert new_layer(sc.pool_head(model, torch.zeros(1, 3, 32, 32))).weight.dtype == torch.float16


def test_what_is_put_in_is_in_the_mode_of_what_it_replaces() -> None:
    model: Any = Loose(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1))
    for training in (True, False):
        model.train(not training)
        model.classifier.train(training)
        pooled: Any = sc.pool_head(model, torch.zeros(1, 3, 8, 8))
        assert [module.training for module in pooled.classifier.modules()] == [training] * 2
        assert pooled.training == pooled.features.training == (not training)
        assert [model.training, model.classifier.training] == [not training, training]


def test_hooks_of_what_is_replaced_are_told_of_and_all_others_stay() -> None:
    model: Any = make("flat")[0]
    model[3].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[5].register_full_backward_hook(lambda module, before, behind: None)
    model[1].register_forward_pre_hook(lambda module, inputs: None)
    model[0][0].register_forward_hook(lambda module, inputs, output: 3 * output)
    told = r"^hooks on '1', '3', '5' are gone, with the modules .*\n  do: register them anew on what pool_head returns"
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.warns(sc.SecateurWarning, match=told):
        pooled: Any = sc.pool_head(model, x)
    features = F.relu(3 * F.conv2d(x, model[0][0].weight, model[0][0].bias, padding=1))
    assert torch.allclose(pooled(x), new_layer(pooled)(features.mean([2, 3])), rtol=1e-12)
    assert [len(model[n]._forward_hooks) for n in (3, 1)] == [1, 0]


def test_a_graph_does_as_well_and_only_the_replaced_is_left_out_of_the_copy() -> None:
    model, x, _ = make("convolved")
    pooled = sc.pool_head(sc.trace(model, x), check=False)
    names = {name.rpartition(".")[0] for name, _ in pooled.named_parameters()}
    assert names == {"features.0", "head.1"}
    assert torch.equal(pooled(x), sc.pool_head(model, x)(x))


# Fitted to data --------------------------------------------------------------------------------------------------


def test_fitted_by_least_squares_to_what_the_network_puts_out() -> None:
    model, _, features = make("vgg16")
    x = torch.randn(60, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    linear = new_layer(sc.pool_head(model, x[:1], data=[(x[:20], None), (x[20:50], None), (x[50:], None)]))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        average, wanted = features(model, x).flatten(2).mean(2), model(x)
    average_c, wanted_c = average - average.mean(0), wanted - wanted.mean(0)
    ridge = (0.01 * average_c.square().mean() * len(x)) ** 0.5
    stacked = torch.cat([average_c, ridge * torch.eye(7, dtype=torch.float64)])
    targets = torch.cat([wanted_c, torch.zeros(7, 5, dtype=torch.float64)])
    weight = torch.linalg.lstsq(stacked, targets).solution.mT
    assert torch.allclose(linear.weight, weight, rtol=1e-8, atol=1e-12)
    assert torch.allclose(linear(average).mean(0), wanted.mean(0), rtol=1e-9)


def test_features_that_are_dead_or_equal_are_no_harm() -> None:
    model, x, _ = make("flat")
    with torch.no_grad():
        model[0][0].weight[1] = model[0][0].weight[0]  # type: ignore[index]
        model[0][0].bias[1] = model[0][0].bias[0]  # type: ignore[index]
        model[0][0].weight[2], model[0][0].bias[2] = 0, -1  # type: ignore[index]
    linear = new_layer(sc.pool_head(model, x, data=[x[:2]]))
    assert torch.isfinite(linear.weight).all()
    assert torch.allclose(linear.weight[:, 0], linear.weight[:, 1], rtol=1e-6)
    assert not linear.weight[:, 2].any()
    dead = copy.deepcopy(model)
    for parameter in dead[0].parameters():  # type: ignore[union-attr]
        nn.init.constant_(parameter, -1.0)
    assert torch.isfinite(new_layer(sc.pool_head(dead, x, data=[x.abs()])).weight).all()


# The rest of the library -----------------------------------------------------------------------------------------


def test_planned_applied_saved_and_loaded(tmp_path: Path) -> None:
    model, x, _ = make("convolved")
    pooled = sc.pool_head(model, x)
    new_layer(pooled).weight.data.normal_()
    found = sc.plan(pooled, x, ratios=0.5)
    small = sc.apply(pooled, found)
    assert torch.allclose(small(x), sc.masked(pooled, found)(x), rtol=1e-9, atol=1e-12)
    assert new_layer(small).in_features == 3
    sc.save(tmp_path / "s", small, found)
    again = sc.load(tmp_path / "s", sc.pool_head(Convolved(), x.float(), seed=3))
    assert torch.equal(again.double().eval()(x), small(x))
    with pytest.raises(sc.WrongModel):
        sc.load(tmp_path / "s", Convolved())
    with pytest.raises(CannotPrune, match=r"pruned already.*\n  do: pool the head of the dense network"):
        sc.pool_head(small, x)


# What is refused -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A head that its forward computes in part; ``how`` says which way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.c1, self.c2, self.pool, self.how = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.MaxPool2d(2), how
        self.fc, self.matrix = nn.Linear(6 if how in ("matrix", "largest") else 96, 5), nn.Parameter(torch.randn(5, 96))
        self.seq = nn.TransformerEncoderLayer(6, 1) if how == "tokens" else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.c1(x))
        x = self.pool(x) if self.how == "shared" else x
        x = F.relu(self.c2(x))
        if self.how == "map":
            return x
        if self.how == "flat":
            return self.fc(torch.flatten(x, 1))
        if self.how == "tokens":
            return self.seq(x.flatten(2).mT)[:, 0]
        if self.how == "matrix":
            return F.linear(self.pool(x).flatten(1), self.matrix)
        if self.how == "largest":
            return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))
        x = torch.flatten(self.pool(x), 1)
        if self.how == "two":
            return self.fc(x), x
        return self.fc(x).log_softmax(1) if self.how == "log" else self.fc(x)


class Auxiliary(Loose):
    """Has a second head that only train mode calls, as GoogLeNet does; ``how`` says where, and whether it can be
    captured."""

    def __init__(self, how: str) -> None:
        super().__init__(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1))
        self.how, self.aux, self.unused = how, nn.Linear(6, 5), nn.Parameter(torch.zeros(3))
        if how == "inside":
            self.aux, self.classifier = nn.Identity(), Doubled()

    def forward(self, x: Tensor) -> Any:
        x = self.pool(self.features(x))
        if self.how == "unseen" and self.training and x.sum() > 0:
            x = 2 * x
        return (self.classifier(x), self.aux(x)) if self.training and self.how != "inside" else self.classifier(x)


class Doubled(nn.Module):
    """Computes another layer in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.extra(x) if self.training else self.fc(x)


TRAIN_ONLY = {
    "seen": r"'aux.weight', 'aux.bias' are used in train mode only, as by a second head, which would stay as it is",
    "unseen": r"'unused', 'aux.weight', 'aux.bias' are not used in eval mode, and what train mode does with them",
}


@pytest.mark.parametrize("how", TRAIN_ONLY)
def test_a_second_head_in_train_mode_is_refused(how: str) -> None:
    model, do = Auxiliary(how).train(), r"\n  do: build it without \(aux_logits=False\), or remove"
    with pytest.raises(CannotPrune, match=rf": its parameters {TRAIN_ONLY[how]}.*{do}"):
        sc.pool_head(model, torch.zeros(1, 3, 8, 8), classes=3)
    assert model.training


def test_what_train_mode_alone_computes_in_the_head_goes_with_it() -> None:
    pooled = sc.pool_head(Auxiliary("inside").train(), torch.zeros(1, 3, 8, 8), classes=3)
    assert pooled(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert {name.rpartition(".")[0] for name, _ in pooled.named_parameters()} == {"", "features.0", "classifier"}


REFUSED = {
    "map": (12, r"it does not end in one tensor of class scores \[B, K\]"),
    "two": (12, r"it does not end in one tensor of class scores \[B, K\]"),
    "tokens": (12, r"at no point does a feature map become one number a channel, or one vector"),
    "matrix": (
        12,
        r"test_heads.py:\d+: return F.linear\(self.pool\(x\).flatten\(1\), self.matrix\) computes a layer that",
    ),
    "shared": (24, r"goes on computing max_pool2d \(test_heads.py:\d+: x = torch.flatten\(self.pool\(x\), 1\)\)"),
    "log": (12, r"goes on computing log_softmax \(test_heads.py:\d+: return self.fc\(x\).log_softmax\(1\)"),
    "largest": (12, r"goes on computing adaptive_max_pool2d"),
    "flat": (8, r"its map is laid out as a vector in the forward itself, before any pooling \(test_heads.py:\d+: "),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_understood_is_refused(how: str) -> None:
    size, message = REFUSED[how]
    with pytest.raises(CannotPrune, match=rf"the head of this network cannot be replaced by pooling: .*{message}"):
        sc.pool_head(Plain(how).eval(), torch.zeros(1, 3, size, size))


def test_a_network_without_convolutions() -> None:
    with pytest.raises(CannotPrune, match=r"is no feature map of a convolution"):
        sc.pool_head(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), torch.zeros(1, 3, 4, 4))


def test_bad_requests() -> None:
    model, x, _ = make("flat")
    for classes in (0, -1, 2.5, True):
        with pytest.raises(BadRequest, match=rf"classes={classes}: a head has a whole number of them"):
            sc.pool_head(model, x, classes=classes)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"classes=3 is for another task .*\n  do: leave data out"):
        sc.pool_head(model, x, classes=3, data=[x])
    read: list[int] = []
    with pytest.raises(BadRequest, match=r"data can be read only once \(generator\), and the fit of a head may"):
        sc.pool_head(model, x, data=(read.append(1) or x for _ in range(2)))  # type: ignore[func-returns-value]
    assert not read
    with pytest.raises(BadRequest, match=r"data has no batches"):
        sc.pool_head(model, x, data=[])
    with pytest.raises(BadRequest, match=r"batch 0 of the data does not fit the network"):
        sc.pool_head(model, x, data=[x[:, :, :5]])
    with pytest.raises(BadRequest, match=r"the head cannot be fitted: the features or outputs .* not finite"):
        sc.pool_head(model, x, data=[x * float("inf")])
