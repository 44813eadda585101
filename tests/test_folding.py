"""``constants="fold"``: the pruned network equals the dense one whose filters are zero, or there is a refusal."""

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
from law import call, fresh, prepared, random_ratios, relative_error, zero_filters
from networks import NETWORKS, randomise
from networks.common import Apply, tensor
from residual_networks import BRANCHES, X, graph, network, plan_of, shared
from secateur.recover import compensate_, recalibrate_
from secateur.zoo.names import build

pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")
SIZES = [(9, 9), (8, 8), (12, 7), (17, 16)]


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with norms and biases that leave a constant of their own in every channel."""
    return randomise(model, seed).double().eval()


def chain(*middle: nn.Module, norm: bool = True) -> nn.Module:
    """A stem of 8 channels, an activation that is not 0 at 0, the layers that read it."""
    torch.manual_seed(0)
    first: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=not norm), *([nn.BatchNorm2d(8)] if norm else [])]
    return made(nn.Sequential(*first, nn.Softplus(), *middle))


def folded(model: nn.Module, x: Tensor = X, **options: Any) -> tuple[sc.Plan, Any]:
    options = {"ratios": {"*": 0.5}, "constants": "fold", "criterion": "random", "seed": 1} | options
    plan = sc.plan(model, x, **options)
    return plan, sc.apply(model, plan)


def edits(small: nn.Module) -> list[tuple[str, str]]:
    return [(edit.kind, edit.target) for edit in sc.record(small).plan.edits]  # type: ignore[union-attr]


# Exactly -------------------------------------------------------------------------------------------------------------

READERS: dict[str, tuple[Callable[[], list[nn.Module]], list[tuple[str, str]]]] = {
    "bias": (lambda: [nn.Conv2d(8, 6, 3)], []),
    "mean": (lambda: [nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)], []),
    "added bias": (lambda: [nn.Conv2d(8, 6, 3, bias=False), nn.Tanh()], [("bias", "3")]),
    "padded": (lambda: [nn.Conv2d(8, 6, 3, padding=1)], [("constant", "3")]),
    "padded in front of a norm": (
        lambda: [nn.Conv2d(8, 6, 5, padding=2, bias=False), nn.BatchNorm2d(6)],
        [("constant", "3")],
    ),
    "strided": (lambda: [nn.Conv2d(8, 6, 3, 2, padding=1)], [("constant", "3")]),
    "grouped": (lambda: [nn.Conv2d(8, 6, 3, padding=1, groups=2)], [("constant", "3")]),
    "dilated": (lambda: [nn.Conv2d(8, 6, 3, padding=(2, 1), dilation=(2, 3))], [("constant", "3")]),
    "same": (lambda: [nn.Conv2d(8, 6, (4, 2), padding="same")], [("constant", "3")]),
    "reflected": (lambda: [nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")], []),
    "circular": (lambda: [nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")], []),
    "transposed": (lambda: [nn.ConvTranspose2d(8, 6, 3, stride=2)], [("constant", "3")]),
    "transposed, cropped": (
        lambda: [nn.ConvTranspose2d(8, 6, 4, stride=3, padding=2, output_padding=1, dilation=2, groups=2)],
        [("constant", "3")],
    ),
    "a pooled linear layer": (lambda: [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)], []),
    "a linear layer without bias": (
        lambda: [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 5, bias=False)],
        [("bias", "5")],
    ),
    "average pooling": (lambda: [nn.AvgPool2d(3, 2), nn.Conv2d(8, 6, 1)], []),
    "average pooling that counts no padding": (
        lambda: [nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(8, 6, 1)],
        [],
    ),
    "maximum pooling": (lambda: [nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 6, 1)], []),
    "upsampling": (lambda: [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 6, 1)], []),
    "depthwise": (
        lambda: [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Softplus(), nn.Conv2d(8, 6, 1)],
        [],  # the depthwise filters are zero as well, and leave their bias
    ),
    "two in a row": (
        lambda: [nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus(), nn.Conv2d(6, 4, 3, padding=1)],
        [("constant", "3"), ("constant", "6")],
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "bias"])
def test_dense_with_zero_filters_and_compact_are_equal(name: str, norm: bool) -> None:
    """At the borders too, and at sizes that the plan was not made with."""
    layers, wanted = READERS[name]
    model = chain(*layers(), norm=norm)
    plan, small = folded(model)
    assert edits(small) == [(kind, target if norm else str(int(target) - 1)) for kind, target in wanted]
    for size in SIZES:
        x = tensor(2, 3, *size, seed=5).double()
        want = zero_filters(model, plan, x)
        assert relative_error(small(x), want) < 1e-12, size
        assert relative_error(sc.masked(model, plan)(X), zero_filters(model, plan, X)) < 1e-12
    dropped = sc.apply(model, sc.plan(model, X, ratios={"*": 0.5}, criterion="random", seed=1))
    assert relative_error(dropped(X), zero_filters(model, plan, X)) > 1e-3  # it is the constants that make it equal


def test_the_borders_get_less_than_the_interior() -> None:
    """By hand: a padded 3x3 kernel sees 4 ones in a corner, 6 at an edge, 9 inside."""
    stem, reader = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 3, padding=1)
    with torch.no_grad():
        stem.bias.copy_(torch.tensor([0.5, 2.0]))  # type: ignore[union-attr]
        reader.weight.fill_(1.0)
        reader.bias.zero_()  # type: ignore[union-attr]
    model, x = nn.Sequential(stem, reader).double().eval(), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    plan = sc.plan(model, torch.randn(2, 1, 4, 4).double(), ratios={"0": 1}, constants="fold")
    assert len(plan.keep["0"]) == 1
    lost = [0.5, 2.0][1 - plan.keep["0"][0]]
    small = sc.apply(model, plan)
    without = sc.apply(model, sc.Plan(**{**vars(plan), "constants": {}, "graph": None}))
    ones = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]])
    assert torch.allclose(small(x) - without(x), lost * ones.double(), rtol=1e-12)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("residual", ["scatter", "coupled", "inner"])
def test_residual_blocks(residual: Any, seed: int) -> None:
    model = graph().model
    groups = sc.plan(graph(), ratios=0.0, residual=residual).groups
    ratios = {g.name: 0.0 if residual == "inner" and "conv1" not in g.name else 0.3 + 0.2 * seed for g in groups}
    plan, small = folded(graph(), ratios=ratios, residual=residual, seed=seed)  # type: ignore[arg-type]
    for batch, size in ((1, (9, 9)), (3, (8, 14)), (2, (5, 1))):
        x = tensor(batch, 3, *size, seed=seed).double()
        assert relative_error(small(x), zero_filters(model, plan, x)) < 1e-12
        assert relative_error(small(x), sc.masked(graph(), plan)(x)) < 1e-12


def test_what_is_scattered_is_what_the_norm_makes_of_nothing() -> None:
    """Behind the last norm of a branch lies b0 = beta - gamma mean / sqrt(var + eps) itself: He et al., as released."""
    plan, small = shared("fold")
    for group, module in BRANCHES.items():
        norm: Any = graph().model.get_submodule(module)
        b0 = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
        removed = [c for c in range(len(b0)) if c not in plan.keep[group]]
        assert torch.allclose(small.get_buffer(f"{module}.scatter_constants"), b0[removed], rtol=1e-12)


def test_each_group_as_it_is_told() -> None:
    """A group whose constants are dropped is not read; one whose constants are folded leaves them."""
    model = chain(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus(), nn.Conv2d(6, 4, 3, padding=1))
    plan, small = folded(model, constants={"0": "fold", "*": "drop"})
    assert dict(plan.constants) == {"0": "fold"}
    assert edits(small) == [("constant", "3")]
    for x in (X, tensor(1, 3, 6, 11).double()):
        kept = list(plan.keep["3"])
        alone = sc.Plan(**{**vars(plan), "keep": {**plan.keep, "3": tuple(range(6))}, "graph": None})
        with torch.no_grad():
            state = {name: t.clone() for name, t in model.state_dict().items()}
            model.get_parameter("6.weight")[:, [c for c in range(6) if c not in kept]] = 0.0
            want = zero_filters(model, alone, x)
            model.load_state_dict(state)
        assert relative_error(small(x), want) < 1e-12
        assert relative_error(sc.masked(model, plan)(x), want) < 1e-12


def test_constants_that_gamma_and_beta_do_not_leave() -> None:
    """With beta zero and a ReLU there is nothing to fold, and folding changes nothing."""
    model = network()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.bias.zero_()
                module.running_mean.zero_()
    small, other = sc.apply(model, plan_of("fold")), sc.apply(model, plan_of("drop"))
    assert relative_error(small(X), other(X)) < 1e-12


# Everywhere ----------------------------------------------------------------------------------------------------------

PICKED = """shared_module tied_decoder codebook layer_norm weight_standardisation linear_to_map option_a_pad res2net
slice_assignment transposed_grouped transposed_depthwise_multiplier_2 cond_conv""".split()


def exact_or_refused(name: str, residual: Any, seed: int) -> None:
    factory, example, expect = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = randomise(factory(), seed=1), example()
    captured = prepared(model, inputs)
    groups = sc.plan(captured, ratios=0.0, residual=residual).groups
    ratios = random_ratios(groups, seed) if groups else 0.5
    options: Any = {"criterion": "random", "seed": seed, "residual": residual, "constants": "fold"}
    plan = sc.plan(captured, ratios=ratios, **options)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    small, said = None, ""
    try:
        small = sc.apply(captured, plan)
    except sc.CannotPrune as error:
        said = str(error)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    if small is None:
        assert "\n  do: " in said
        return
    dense = sc.masked(captured, plan)
    for batch in (1, 3):
        x = fresh(captured.args or dict(captured.kwargs), batch, seed)  # type: ignore[arg-type]
        with torch.no_grad():
            found = call(small, x)
            assert relative_error(found, zero_filters(model, plan, x)) <= expect.tol
            assert relative_error(found, call(dense, x)) <= expect.tol


@pytest.mark.parametrize("name", PICKED)
def test_exact_or_refused(name: str) -> None:
    exact_or_refused(name, "coupled", 1)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["scatter", "coupled"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_or_refused_everywhere(name: str, residual: str) -> None:
    for seed in (1, 2):
        exact_or_refused(name, residual, seed)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["scatter", "coupled"])
@pytest.mark.parametrize(
    ("name", "size"),
    {"zoo:resnet20": 16, "zoo:vgg16_cifar": 32, "torchvision:resnet18": 32, "torchvision:resnet50": 32}.items(),
)
def test_real_networks(name: str, size: int, residual: Any) -> None:
    torch.manual_seed(0)
    model = made(build(name))
    plan, small = folded(model, tensor(2, 3, size, size).double(), residual=residual)
    for side in (size, size + (16 if "vgg" not in name else 0)):
        x = tensor(2, 3, side, side, seed=3).double()
        with torch.no_grad():
            assert relative_error(small(x), zero_filters(model, plan, x)) < 1e-9


# Refused -------------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A gate that depends on the image multiplies what the filters leave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.stem(x)) * torch.sigmoid(self.gate(x)))


class Chosen(nn.Module):
    """What the filters leave is the same in all places, and depends on the image, or on the whole batch."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        map_ = F.softplus(self.stem(x))
        choice = x.mean() > 0
        return self.head(map_ + x.mean() if self.mixed else torch.where(choice, map_, 2 * map_))


def functional() -> nn.Module:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.w = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(4, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.softplus(self.stem(x)), self.w, padding=1)

    return Functional()


def channels_last(module: nn.Module) -> list[nn.Module]:
    return [Apply(lambda t: t.movedim(1, -1)), module, Apply(lambda t: t.movedim(-1, 1))]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (
        lambda: chain(*channels_last(nn.LayerNorm(8)), nn.Conv2d(8, 4, 1)),
        r"for 0 at layer_norm in '4', .*: layer_norm is not affine in what it reads\n  do: leave such groups out",
    ),
    "group norm": (lambda: chain(nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), "group_norm is not affine in what it reads"),
    "a gate": (
        lambda: made(Gated()),
        r"for stem at conv2d in 'head', .*: what channel \d holds there when its filter is zero is no constant: it "
        "depends on the image, or on the position",
    ),
    "a constant of the batch": (
        lambda: made(Chosen(mixed=True)),
        r"cannot be carried out: what zeroed filters would add to 'head.bias' is no constant: it depends on the images"
        r"\n  do: leave such groups out",
    ),
    "a choice by the image": (
        lambda: made(Chosen(mixed=False)),
        "what zeroed filters would add to 'head.bias' is no constant",
    ),
    "a divisor of its own": (
        lambda: chain(nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=4), nn.Conv2d(8, 4, 1)),
        "at avg_pool2d in '3', .*it puts zeros around what is constant there",
    ),
    "zeros around by hand": (
        lambda: chain(nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)),
        "it puts zeros around what is constant there when filters are zero",
    ),
    "average pooling over zeros": (
        lambda: chain(nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)),
        "at avg_pool2d in '3', .*it puts zeros around what is constant there",
    ),
    "a padded kernel of nobody's": (
        lambda: made(functional()),
        "it pads, and is no convolution of torch's own that could be given one more input",
    ),
    "weight norm": (
        lambda: made(
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1))
        ),
        r"for 0: the forward computes its filters\n  do: drop its constants, with constants={'0': 'drop', ",
    ),
    "only the graph": (
        lambda: chain(
            Apply(lambda t: t.roll(3, 1)),
            nn.Conv2d(8, 6, 1),
            Apply(lambda t: t[:, 1:5] * t[:, 2:6]),
            nn.Conv2d(4, 4, 1),
        ),
        r"constants='fold' needs the network's own modules, and these cannot be cut as they are:\n  .*\n  do: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    torch.manual_seed(0)
    builder, text = REFUSED[name]
    model = builder()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    plan = sc.plan(model, X, ratios={"*": 0.5}, constants="fold")
    with pytest.raises(sc.CannotPrune, match=text):
        sc.apply(model, plan)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    sc.apply(model, sc.plan(model, X, ratios={"*": 0.5}))


def test_a_map_too_small_to_show_its_borders_is_refused_too() -> None:
    """On 1x1 maps a padded average of a constant looks constant; on larger images it is none."""
    torch.manual_seed(0)
    model = made(nn.Sequential(nn.Conv2d(3, 8, 9), nn.Softplus(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)))
    with pytest.raises(sc.CannotPrune, match="it puts zeros around"):
        folded(model)


def test_buffers_are_no_filters() -> None:
    """Training zeroes parameters; a fixed blur stays, and makes a constant of a constant where nothing is padded."""

    class Blur(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.padding = padding
            self.register_buffer("kernel", torch.full((8, 1, 3, 3), 1 / 9))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, padding=self.padding, groups=x.shape[1])  # type: ignore[arg-type]

    model = chain(Blur(0), nn.Conv2d(8, 4, 1))
    plan, small = folded(model)
    with torch.no_grad():
        stem = model.get_parameter("0.weight")
        stem[[c for c in range(8) if c not in plan.keep["0"]]] = 0.0
    assert relative_error(small(X), model(X)) < 1e-12
    with pytest.raises(sc.CannotPrune, match="it puts zeros around"):
        folded(chain(Blur(1), nn.Conv2d(8, 4, 1)))


@pytest.mark.parametrize(
    ("constants", "text"),
    [
        ("keep", "constants: there is no 'keep'"),
        ({"stem": "folds"}, "constants: there is no 'folds'; did you mean 'fold'"),
        ({"stam": "fold"}, "constants: no group of the network matches 'stam'; did you mean 'stem'"),
    ],
)
def test_bad_requests(constants: Any, text: str) -> None:
    with pytest.raises(sc.BadRequest, match=text):
        sc.plan(graph(), ratios=0.5, constants=constants)


# Afterwards ----------------------------------------------------------------------------------------------------------


def test_it_can_be_saved_and_trained(tmp_path: Path) -> None:
    model = chain(nn.Conv2d(8, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 4, 3, bias=False), nn.Tanh()).float()
    x = X.float()
    plan, small = folded(model, x)
    sc.save(tmp_path / "small", small, sc.record(small).plan)  # type: ignore[union-attr]
    loaded: Any = sc.load(
        tmp_path / "small",
        chain(nn.Conv2d(8, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 4, 3, bias=False), nn.Tanh()).float(),
    )
    assert torch.equal(loaded.eval()(x), small(x))
    assert {"3.constant_kernel", "5.bias"} <= set(loaded.state_dict())
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert {n for n, _ in small.named_parameters()} == {n for n, _ in model.named_parameters()} | {"5.bias"}
    assert dict(plan.constants) == {"0": "fold", "3": "fold"}


def test_recovery_of_what_is_folded() -> None:
    """There is no lost constant to make up for; batch norms can be measured anew."""
    model, plan = network(), plan_of("fold")
    small, data = sc.apply(model, plan), [tensor(8, 3, 9, 9).double()]
    state = {name: t.clone() for name, t in small.state_dict().items()}
    with pytest.raises(
        sc.SecateurError, match=r"of 'stem' left are folded into what reads them.*\n  do: readers='none'"
    ):
        compensate_(small, model, plan, data)
    assert all(torch.equal(state[name], t) for name, t in small.state_dict().items())
    recalibrate_(small, data)
    changed = {name for name, t in small.state_dict().items() if not torch.equal(state[name], t)}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    again = sc.apply(model, plan)
    compensate_(again, model, plan, data, readers="none")
    assert all(torch.equal(t, small.state_dict()[name]) for name, t in again.state_dict().items())


def test_statistics_are_taken_anew_where_a_bias_holds_constants() -> None:
    model = chain(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
    plan, small = folded(model)
    assert not torch.equal(small[3].bias, model[3].bias)
    made = compensate_(small, model, plan, [tensor(8, 3, 9, 9).double()], readers="none")
    assert [step.name for step in made.steps] == ["none", "batch norm"]


def test_a_second_cut_of_what_was_folded_is_refused() -> None:
    first = sc.apply(network(), plan_of("fold"))
    want = first(X)
    with pytest.raises(sc.BadPlan, match="are 'fold' in the first plan and 'drop' in the second\n  do: "):
        sc.apply(first, sc.plan(first, X, ratios={"*conv1": 0.5, "*": 0.0}, residual="inner"))
    with pytest.raises(sc.CannotPrune, match="constants='fold' cannot be carried out"):
        sc.apply(first, sc.plan(first, X, ratios={"*conv1": 0.5, "*": 0.0}, residual="inner", constants="fold"))
    assert torch.equal(first(X), want)


def test_constants_of_one_cut_after_the_other_add_up(tmp_path: Path) -> None:
    """The kernel that a layer got at the first cut is cut with it, and gets more at the second."""
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, 4, 3, padding=1)]
    net = chain(*layers)
    _, first = folded(net, ratios={"0": 0.25})
    _, small = folded(first, ratios={"0": 0.5, "3": 0.5}, constants={"3": "drop", "*": "fold"}, seed=2)
    applied = sc.record(small)
    assert applied is not None
    assert small.get_buffer("3.constant_kernel").shape == (4, 1, 3, 3)
    sc.save(tmp_path / "twice", small, applied.plan)
    again = sc.load(tmp_path / "twice", made(copy.deepcopy(net), seed=1)).eval()
    for size in SIZES:
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(small(x), sc.masked(net, applied.plan)(x)) < 1e-9
            assert torch.equal(again(x), small(x))


def test_masked_zeroes_filters_and_nothing_else() -> None:
    model = network()
    plan = plan_of("fold")
    dense = sc.masked(model, plan)
    assert relative_error(dense(X), zero_filters(model, plan, X)) < 1e-12
    assert relative_error(dense(X), sc.masked(model, plan_of("drop"))(X)) > 1e-3
    assert all(torch.equal(t, dense.state_dict()[name]) for name, t in model.state_dict().items())
