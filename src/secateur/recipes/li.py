"""The networks of Li et al. as recipes: ``NETWORKS`` are the pruned rows of Table 1.

- ``paper``: prune once by the filters' L1 norms, then train for 40 epochs (ImageNet: 20) at the constant rate 0.001.
- ``tuned``: the same network, recovered as well as we can; see ``TUNED``.
- ``iterative``: the same widths and as many epochs as ``paper``, in five cuts with training between them (the paper's
  second strategy, section 3.4, for which it gives no numbers).
- ``scratch``: the pruned architecture from random weights, trained as the dense network is.
- ``random``, ``largest``: as ``paper``, but the filters that go are drawn, or are the largest.

What differs from the paper: it reports the best test accuracy of all epochs, which chooses by the test images; we keep
the last epoch. As in all of our training, momentum is Nesterov's. No images are held out for validation, since nothing
is chosen by them; ``data.validation`` holds some out.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), sections 3 and 4 and Table 1. How the dense
networks are trained follows the reproduction by Liu et al., "Rethinking the Value of Network Pruning" (ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.recipes.entries import Network

VARIANTS = ("paper", "tuned", "iterative", "scratch", "random", "largest")

CUTS = 5
"""Of the iterative variant."""

VGG_A = ("features.0", "features.24", "features.27", "features.30", "features.34", "features.37", "features.40")
"""Layers 1 and 8 to 13 of VGG-16."""
RESNET56, RESNET110, RESNET34 = (9, 9, 9), (18, 18, 18), (3, 4, 6, 3)
AROUND_STAGES = (2, 8, 14, 16, 26, 28, 30, 32)
"""Of ResNet-34: layers beside the stages' ends."""

NETWORKS: Mapping[str, Network] = {
    "li/vgg16-A": Network("vgg16_cifar", "cifar10", dict.fromkeys(VGG_A, 0.5), residual="coupled"),
    "li/resnet56-A": Network(
        "resnet56",
        "cifar10",
        {"layer*.conv1": 0.1},
        skip=(16, 20, 38, 54),
        blocks=RESNET56,
    ),
    "li/resnet56-B": Network(
        "resnet56",
        "cifar10",
        {"layer1.*.conv1": 0.6, "layer2.*.conv1": 0.3, "layer3.*.conv1": 0.1},
        skip=(16, 18, 20, 34, 38, 54),
        blocks=RESNET56,
    ),
    "li/resnet110-A": Network(
        "resnet110",
        "cifar10",
        {"layer1.*.conv1": 0.5},
        skip=(36,),
        blocks=RESNET110,
        train={"warmup": 1},
    ),
    "li/resnet110-B": Network(
        "resnet110",
        "cifar10",
        {"layer1.*.conv1": 0.5, "layer2.*.conv1": 0.4, "layer3.*.conv1": 0.3},
        skip=(36, 38, 74),
        blocks=RESNET110,
        train={"warmup": 1},
    ),
    "li/resnet34-A": Network(
        "resnet34",
        "imagenet",
        {"layer1.*.conv1": 0.3, "layer2.*.conv1": 0.3, "layer3.*.conv1": 0.3},
        skip=AROUND_STAGES,
        blocks=RESNET34,
    ),
    "li/resnet34-B": Network(
        "resnet34",
        "imagenet",
        {"layer1.*.conv1": 0.5, "layer2.*.conv1": 0.6, "layer3.*.conv1": 0.4},
        skip=AROUND_STAGES,
        blocks=RESNET34,
    ),
    # all that the third stage writes into its stream: identities, second convolutions and the projection, which decides
    "li/resnet34-C": Network("resnet34", "imagenet", {"layer3.0.conv2": 0.2}, residual="projection"),
}
"""The rows of Table 1."""

DATA: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {"name": "cifar10", "batch": 64, "validation": 0},
    "imagenet": {"name": "imagenet", "batch": 256, "validation": 0, "workers": 8},
}
LI: Mapping[str, Any] = {"weight_decay": 1e-4, "decay_norms": True}
"""What all training of the paper variant has beside momentum 0.9: weight decay on every parameter."""

DENSE: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {**LI, "epochs": 160, "lr": 0.1, "schedule": "step", "milestones": [0.5, 0.75], "gamma": 0.1},
    # 20 epochs are a quarter of the original training; the steps are the usual ones after every 30 epochs
    "imagenet": {**LI, "epochs": 80, "lr": 0.1, "schedule": "step", "milestones": [0.375, 0.75], "gamma": 0.1},
}
"""How the dense network is trained where no weights are given. ResNet-110 warms up for an epoch, as in FPGM's code."""

RETRAINING: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {**LI, "epochs": 40, "lr": 0.001, "schedule": "constant"},
    "imagenet": {**LI, "epochs": 20, "lr": 0.001, "schedule": "constant"},
}
"""A quarter of the dense network's epochs, at the constant rate 0.001 (section 4)."""

TUNED: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {
        "compensate": {"readers": "least-squares", "batchnorm": True, "batches": 64},
        "finetune": {"epochs": 160, "lr": 0.05, "warmup": 1, "schedule": "cosine", "weight_decay": 5e-4},
    },
    "imagenet": {
        "compensate": {"readers": "least-squares", "batchnorm": True, "batches": 32},
        "finetune": {
            "epochs": 40,
            "lr": 0.05,
            "warmup": 1,
            "schedule": "cosine",
            "weight_decay": 1e-4,
            "label_smoothing": 0.1,
        },
    },
}
"""At a constant 0.001 a network hardly moves away from where pruning left it, and the learning rate decides: in FPGM's
Table 3 the same pruned VGG-16 is at 93.24 % after 40 epochs at 0.001 and at 94.00 % after 160 from 0.1. So the rate
starts high once more and comes down by a cosine, over as many epochs as dense training on CIFAR took, and twice the
paper's on ImageNet. Before that, what reads removed channels is fitted anew and batch norm is recalibrated: that needs
no labels and no training, and after it fine-tuning ends higher (``results/recovery.md``)."""


def values_of(found: Network, variant: str) -> dict[str, Any]:
    """The sections of a recipe that prunes ``found``, dense training included; without the model."""
    values: dict[str, Any] = {
        "data": dict(DATA[found.data]),
        "train": {**DENSE[found.data], **found.train},
        "prune": {
            "criterion": variant if variant in ("random", "largest") else "l1",
            "ratios": dict(found.ratios),
            "exclude": found.exclude,
            "residual": found.residual,
        },
        "finetune": dict(RETRAINING[found.data]),
    }
    if variant == "tuned":
        values |= {section: dict(settings) for section, settings in TUNED[found.data].items()}
    elif variant == "iterative":
        _spread_over_cuts(values)
    elif variant == "scratch":
        # drawn: without the smallest of them, the weights would no longer be what initialisation gives
        values["prune"]["criterion"] = "random"
        values["finetune"] = values.pop("train")
    return values


def _spread_over_cuts(values: dict[str, Any]) -> None:
    """The retraining in equal parts: one behind every cut."""
    part = {**values["finetune"], "epochs": values["finetune"]["epochs"] // CUTS}
    values["prune"]["schedule"] = {"kind": "iterative", "steps": CUTS, "training": part}
    values["finetune"] = dict(part)
