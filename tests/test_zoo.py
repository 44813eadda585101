"""The papers' networks have the papers' sizes, and torchvision's weights load into them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import BadRequest
from secateur.zoo import MODELS, cifar_resnet, imagenet_resnet, imagenet_vgg16, li_inner, vgg16_cifar
from secateur.zoo.names import build
from secateur.zoo.torchvision_shim import import_torchvision

# the machine that runs this may have a torchvision that does not match its torch
pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")


@cache
def meta(name: str) -> nn.Module:
    """The network without memory or time spent on its weights; shared by the tests, which only read it."""
    with torch.device("meta"):
        return MODELS[name]()


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def weights(model: nn.Module) -> int:
    """Conv and linear weights alone: Li's count."""
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        out = model.eval()(torch.empty(1, *model.input_size, device="meta"))
    assert out.shape == (1, 10 if model.input_size[1] == 32 else 1000)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet50_caffe", 25_557_032),
        ("resnet101", 44_549_160),
        ("vgg16", 138_357_544),
        ("resnet56_projection", 855_770),
        ("vgg16_swp", 14_724_042),
    ],
)
def test_parameters(name: str, expected: int) -> None:
    assert params(meta(name)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 1_814_073_344),
        ("resnet34", 3_663_761_408),
        ("resnet50", 4_089_184_256),
        ("resnet101", 7_801_405_440),
        ("vgg16", 15_470_264_320),
        ("resnet50_caffe", 7_715_946_496 // 2),
        ("thinet_resnet50_70", 4_880_052_680 // 2),
        ("thinet_conv", 9_582_411_776 // 2),
        ("resnet56_projection", 125_747_200 + 640),
    ],
)
def test_macs(name: str, expected: int) -> None:
    assert macs(meta(name)) == expected


@pytest.mark.parametrize(
    ("name", "expected_macs", "expected_weights"),
    [
        ("vgg16_cifar", 313_463_808, 14_977_728),
        ("vgg16_cifar_a", 206_279_680, 5_390_176),
        ("resnet56", 125_485_696, 848_944),
        ("resnet56_a", 112_435_840, 769_456),
        ("resnet56_b", 90_907_264, 732_016),
        ("resnet110", 252_887_680, 1_719_856),
    ],
)
def test_lis_networks(name: str, expected_macs: int, expected_weights: int) -> None:
    model = meta(name)
    assert (macs(model), weights(model)) == (expected_macs, expected_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected_macs", "expected_weights"),
    [("resnet110_a", "2.13e+08", "1.68e+06"), ("resnet110_b", "1.55e+08", "1.16e+06")],
)
def test_lis_resnet110_printed_digits(name: str, expected_macs: str, expected_weights: str) -> None:
    model = meta(name)
    assert (f"{macs(model):.2e}", f"{weights(model):.2e}") == (expected_macs, expected_weights)


@pytest.mark.parametrize(("name", "expected"), [("resnet34_a", 19_962_560), ("resnet34_b", 19_280_576)])
def test_lis_resnet34_without_projections(name: str, expected: int) -> None:
    model = meta(name)
    projections = sum(p.numel() for n, p in model.named_parameters() if "downsample.0" in n)
    assert weights(model) - projections == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vgg16", 138_344_128), ("thinet_conv", 131_440_480)],
)
def test_thinet_vgg_weights(name: str, expected: int) -> None:
    assert weights(meta(name)) == expected


@pytest.mark.parametrize(
    ("name", "millions", "billion_flops"), [("thinet_gap", 8.32, 9.34), ("thinet_tiny", 1.32, 2.01)]
)
def test_thinet_gap_printed_digits(name: str, millions: float, billion_flops: float) -> None:
    model = meta(name)
    assert round(weights(model) / 1e6, 2) == millions
    assert round(2 * macs(model) / 1e9, 2) == billion_flops


@pytest.mark.parametrize(
    ("name", "millions", "giga_macs"), [("thinet_resnet50_50", 12.38, 1.71), ("thinet_resnet50_30", 8.66, 1.10)]
)
def test_thinet_resnet50_printed_digits(name: str, millions: float, giga_macs: float) -> None:
    """The 2.20B FLOPs printed for the last one are twice the rounded 1.10: the count is 2,194,985,078."""
    model = meta(name)
    assert round((params(model) - 1000) / 1e6, 2) == millions
    assert round(macs(model) / 1e9, 2) == giga_macs


def test_thinet_resnet50_70_weights_and_norms() -> None:
    assert params(meta("thinet_resnet50_70")) - 1000 == 16_944_246


@pytest.mark.parametrize(
    ("percent", "widths"), [(70, (44, 89, 179, 358)), (50, (32, 64, 128, 256)), (30, (19, 38, 76, 153))]
)
def test_thinet_resnet50_widths(percent: int, widths: tuple[int, ...]) -> None:
    model = meta(f"thinet_resnet50_{percent}")
    for stage, width in enumerate(widths, start=1):
        for block in getattr(model, f"layer{stage}"):
            assert block.conv1.out_channels == block.conv2.out_channels == width
            assert block.conv3.out_channels == 256 * 2 ** (stage - 1)


def test_swp_count_of_vgg16_needs_its_idle_pool() -> None:
    """SWP's hooks: 2 per MAC, +bias, 2 per BN element, 1 per ReLU element, k*k per pooled element: 627,358,218."""
    total = 0
    with torch.device("meta"):
        model = MODELS["vgg16_swp"]()

    def hook(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        elements = out.numel()
        if isinstance(module, nn.Conv2d):
            total += 2 * elements * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += 2 * module.weight.numel() + elements
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * elements
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            total += int(module.kernel_size) ** 2 * elements
        elif isinstance(module, nn.ReLU):
            total += elements

    for module in model.modules():
        module.register_forward_hook(hook)
    model.eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert total == 627_358_218


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet20_projection", "vgg16_gap", "resnet34_b"])
def test_networks_not_counted_above_map_their_input_to_classes(name: str) -> None:
    assert macs(meta(name)) > 0


def test_every_network_is_built_with_the_options_all_share() -> None:
    with torch.device("meta"):
        for name in MODELS:
            if "101" in name or "110" in name:
                continue  # as the smaller ones, only slower
            model = build(f"zoo:{name}", classes=7, in_channels=1)
            assert model.input_size[0] == next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels == 1
            assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features == 7


@pytest.mark.parametrize("size", [8, 28, 32])
def test_small_grey_images(size: int) -> None:
    x = torch.randn(2, 1, size, size)
    assert build("zoo:resnet20", in_channels=1)(x).shape == (2, 10)
    assert vgg16_cifar(in_channels=1, image_size=size, widths=(4,) * 13, hidden=8)(x).shape == (2, 10)


def test_option_a_shortcut_takes_every_second_pixel_and_appends_zeros() -> None:
    shortcut = cifar_resnet(20).layer2[0].downsample
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == x.grad[:, :, ::2, ::2].sum() == 2 * 16 * 16


@pytest.mark.parametrize(("depth", "stride_on"), [(18, "3x3"), (50, "3x3")])
def test_equal_to_torchvision(depth: int, stride_on: str) -> None:
    theirs = import_torchvision().models.get_model(f"resnet{depth}", weights=None).eval()
    ours = imagenet_resnet(depth, stride_on=stride_on).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    load = ours.load_state_dict(theirs.state_dict())
    assert not load.missing_keys
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "vgg16"])
def test_names_and_shapes_equal_torchvisions(name: str) -> None:
    models = import_torchvision().models
    with torch.device("meta"):
        theirs = models.get_model(name, weights=None).state_dict()
    assert [(n, t.shape) for n, t in meta(name).state_dict().items()] == [(n, t.shape) for n, t in theirs.items()]


def test_gap_head_reads_the_14x14_map() -> None:
    assert sum(isinstance(m, nn.MaxPool2d) for m in meta("vgg16_gap").modules()) == 4
    assert sum(isinstance(m, nn.MaxPool2d) for m in meta("vgg16").modules()) == 5


def test_inner_widths_per_stage_and_per_block() -> None:
    per_stage = cifar_resnet(20, inner=(3, 5, 7)).state_dict()
    per_block = cifar_resnet(20, inner=(3, 3, 3, 5, 5, 5, 7, 7, 7)).state_dict()
    assert {n: t.shape for n, t in per_stage.items()} == {n: t.shape for n, t in per_block.items()}
    assert per_stage["layer2.1.conv2.weight"].shape == (32, 5, 3, 3)


def test_li_inner_numbers_layers_as_the_paper_does() -> None:
    widths = li_inner(56, (0.1, 0.1, 0.1), skip=(16, 20, 38, 54))
    assert [b for b, width in enumerate(widths) if width in (16, 32, 64)] == [7, 9, 18, 26]
    assert set(widths) == {16, 14, 32, 28, 64, 57}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cifar_resnet(21), "6n\\+2 layers; take 20"),
        (lambda: cifar_resnet(20, shortcut="B"), "shortcut='B' is not known"),
        (lambda: cifar_resnet(20, inner=(1, 2)), "3 positive integers, one per stage, or 9, one per block"),
        (lambda: cifar_resnet(20, inner=(4, 0, 4)), "positive integers"),
        (lambda: cifar_resnet(20, widths=(16, 32)), "give 3 positive integers, one per stage"),
        (lambda: cifar_resnet(20, widths=(64, 32, 16)), "can only widen"),
        (lambda: imagenet_resnet(19), "one of \\[18, 34, 50, 101\\]"),
        (lambda: imagenet_resnet(18, stride_on="1x1"), "ResNet-18 is made of basic blocks"),
        (lambda: li_inner(56, (0.1, 0.2)), "give 3 in \\[0, 1\\)"),
        (lambda: vgg16_cifar(widths=(64,) * 12), "13 positive integers"),
        (lambda: vgg16_cifar(head="gap"), "'li' and 'swp'"),
        (lambda: imagenet_vgg16(hidden=(4096,)), "two positive widths"),
    ],
)
def test_impossible_widths(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make()
