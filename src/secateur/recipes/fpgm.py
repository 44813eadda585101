"""The networks of FPGM as recipes: ResNets and VGG-16 on CIFAR-10, ResNets on ImageNet.

Every convolution loses the same fraction of its filters, the stem and the last ones of the blocks too, whose narrow
output is added into a stream of full width (``residual="scatter"``); shortcut projections and linear layers stay whole.
A layer of ``n`` filters keeps ``n - floor(n ratio + 1e-9)``, which is not what a ratio means elsewhere in this library
(``floor(n (1 - ratio) + 1e-9)``): so the recipes give widths. What the zeroed filters leave behind their batch norms,
the constants of removed channels, is folded into what reads them: the network that was trained is the one that is cut.

- ``paper``: from random weights; filters are zeroed before training and chosen anew after every epoch, and stay zero
  (hard: what the authors' code does). Then the zeros are cut, and nothing is trained any more.
- ``mix``: as ``paper``; of the filters that go, a quarter have the smallest norms (the paper's 10 % of 40 %), and the
  others are nearest to the middle of the rest. The widths are those of the row.
- ``soft``: as ``paper``, but zeroed filters go on learning and may come back.
- ``sfp``: as ``soft``, by L2 norms: soft filter pruning (He et al., IJCAI 2018), FPGM's predecessor, whose rows the
  paper prints beside its own; that of ResNet-110 at 30 % is only there for it.
- ``l1``, ``random``: as ``paper``, by L1 norms, or drawn.
- ``pretrained``: as ``paper``, from a trained network, at a tenth of the learning rate.
- ``one-shot``: a trained network is cut once, constants folded, and trained for as long as ``pretrained`` is. Zeroed
  filters lie near the geometric median and are chosen again, so that ``pretrained`` comes to nearly the same, and costs
  more. VGG-16 begins at the full rate here, as in Table 4.
- ``tuned``: the same widths by WHC, which is FPGM's successor; readers fitted anew, batch norm recalibrated, then a
  schedule that starts high and comes down by a cosine, as for Li's networks, whose file says why.
- ``scratch``: the pruned architecture from random weights, trained as the dense network is.

What differs from the authors' code: ResNet-110 warms up by a line over its first epoch, where theirs has a tenth of the
rate; momentum is Nesterov's; the last epoch counts, not the best one on the test images. No images are held out, since
nothing is chosen by them. For VGG-16 the sources at hand name the epochs, the rate and the batch, which are those of
Liu et al., "Rethinking the Value of Network Pruning" (ICLR 2019); its steps and its weight decay are theirs, too.

ResNet-50 and -101 have their stride on the first 1x1 convolution of a block, which the printed FLOPs imply. Weights of
torchvision's have it on the 3x3: for those, ``--set model.name=zoo:resnet50``, whose FLOPs are higher.

Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration" (CVPR
2019), sections 3 and 4, Tables 1, 2 and 4, and its authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.recipes.entries import Network
from secateur.recipes.li import TUNED, VGG_A
from secateur.zoo.papers import fpgm_width
from secateur.zoo.resnet import CIFAR_WIDTHS, IMAGENET_WIDTHS
from secateur.zoo.vgg import VGG16

VARIANTS = ("paper", "mix", "soft", "sfp", "l1", "random", "pretrained", "one-shot", "tuned", "scratch")
UNTRAINED = ("paper", "mix", "soft", "sfp", "l1", "random", "scratch")
"""The variants that start from random weights."""

CRITERIA: Mapping[str, str] = {"mix": "fpgm_mix", "sfp": "l2", "l1": "l1", "random": "random", "tuned": "whc"}
"""By variant; ``fpgm`` where it is not named."""

VGG_LAYERS = tuple(f"features.{place}" for place in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40))


def _basic(stages: tuple[int, ...], ratio: float) -> Mapping[str, float]:
    """The widths of a ResNet of basic blocks: the stem's is that of the first of the ``stages``."""
    kept = [fpgm_width(width, ratio) for width in stages]
    return {"conv1": kept[0]} | {f"layer{stage}.*.conv*": width for stage, width in enumerate(kept, 1)}


def _bottleneck(ratio: float) -> Mapping[str, float]:
    """The widths of a ResNet of bottlenecks, whose last convolutions are four times as wide as the others."""
    widths: dict[str, float] = {"conv1": fpgm_width(IMAGENET_WIDTHS[0], ratio)}
    for stage, width in enumerate(IMAGENET_WIDTHS, 1):
        widths[f"layer{stage}.*.conv[12]"] = fpgm_width(width, ratio)
        widths[f"layer{stage}.*.conv3"] = fpgm_width(4 * width, ratio)
    return widths


def _cifar(depth: int, ratio: float, **train: Any) -> Network:
    return Network(f"resnet{depth}", "cifar10", _basic(CIFAR_WIDTHS, ratio), residual="scatter", train=train)


def _imagenet(model: str, widths: Mapping[str, float]) -> Network:
    return Network(model, "imagenet", widths, residual="scatter")


def _vgg(widths: Mapping[str, float]) -> Network:
    return Network("vgg16_cifar", "cifar10", widths, residual="coupled")


NETWORKS: Mapping[str, Network] = {
    "fpgm/r20-30": _cifar(20, 0.3),
    "fpgm/r20-40": _cifar(20, 0.4),
    "fpgm/r32-30": _cifar(32, 0.3),
    "fpgm/r32-40": _cifar(32, 0.4),
    "fpgm/r56-40": _cifar(56, 0.4),
    "fpgm/r110-30": _cifar(110, 0.3, warmup=1),
    "fpgm/r110-40": _cifar(110, 0.4, warmup=1),
    "fpgm/r18-30": _imagenet("resnet18", _basic(IMAGENET_WIDTHS, 0.3)),
    "fpgm/r34-30": _imagenet("resnet34", _basic(IMAGENET_WIDTHS, 0.3)),
    "fpgm/r50-0.7": _imagenet("resnet50_caffe", _bottleneck(0.3)),
    "fpgm/r50-0.6": _imagenet("resnet50_caffe", _bottleneck(0.4)),
    "fpgm/r101-30": _imagenet("resnet101_caffe", _bottleneck(0.3)),
    "fpgm/vgg-uniform20": _vgg({name: fpgm_width(width, 0.2) for name, width in zip(VGG_LAYERS, VGG16, strict=True)}),
    "fpgm/vgg-precfg": _vgg(dict.fromkeys(VGG_A, 0.5)),
}
"""The numbers are what is removed, in per cent; of ResNet-50 what is kept, as a fraction."""

DATA: Mapping[str, Mapping[str, Any]] = {
    "resnet": {"name": "cifar10", "batch": 128, "validation": 0},
    "vgg": {"name": "cifar10", "batch": 64, "validation": 0},
    "imagenet": {"name": "imagenet", "batch": 256, "validation": 0, "workers": 8},
}
DENSE: Mapping[str, Mapping[str, Any]] = {
    "resnet": {
        "epochs": 200,
        "lr": 0.1,
        "schedule": "step",
        "milestones": [0.3, 0.6, 0.8],
        "gamma": 0.2,
        "weight_decay": 5e-4,
        "decay_norms": True,
    },
    "vgg": {
        "epochs": 160,
        "lr": 0.1,
        "schedule": "step",
        "milestones": [0.5, 0.75],
        "gamma": 0.1,
        "weight_decay": 1e-4,
        "decay_norms": True,
    },
    "imagenet": {
        "epochs": 100,
        "lr": 0.1,
        "schedule": "step",
        "milestones": [0.3, 0.6, 0.9],
        "gamma": 0.1,
        "weight_decay": 1e-4,
        "decay_norms": True,
    },
}
"""How networks are trained from random weights, zeroed or not; weight decay is on every parameter."""

PRETRAINED = 0.01
"""The learning rate that training begins with where the network is trained already."""


def values_of(found: Network, variant: str) -> dict[str, Any]:
    """The sections of a recipe that prunes ``found``, dense training included; without the model."""
    kind = "imagenet" if found.data == "imagenet" else "vgg" if found.model == "vgg16_cifar" else "resnet"
    dense = {**DENSE[kind], **found.train}
    again = {**DENSE[kind], "lr": PRETRAINED}
    values: dict[str, Any] = {"data": dict(DATA[kind]), "train": dense}
    values["prune"] = {
        "criterion": CRITERIA.get(variant, "fpgm"),
        "ratios": dict(found.ratios),
        "residual": found.residual,
        "constants": "fold",
    }
    if variant == "scratch":
        # drawn, as nothing is learnt yet; nor does a fresh batch norm leave constants
        values["prune"] |= {"criterion": "random", "constants": "drop"}
        values["finetune"] = values.pop("train")
    elif variant == "one-shot":
        values["finetune"] = dict(dense) if kind == "vgg" else again
    elif variant == "tuned":
        values["prune"]["constants"] = "drop"  # fitting the readers makes up for more than constants
        values |= {name: dict(section) for name, section in TUNED[found.data].items()}
    else:
        training = again if variant == "pretrained" else values.pop("train")
        soft = variant in ("soft", "sfp")
        values["prune"]["schedule"] = {"kind": "progressive", "soft": soft, "at_start": True, "training": training}
    return values
