"""The networks of ThiNet as recipes: VGG-16 and ResNet-50 on ImageNet.

- ``paper``: layer by layer from the front. What the layer behind puts out is sampled (10 images of each class, 10
  outputs of each image), channels are removed greedily, the kept ones rescaled by least squares, then follows an epoch
  of training: at 0.001 in VGG-16, two from 0.001 after the last layer of a stage; at 0.0001 in ResNet-50, whose blocks
  are cut inside, both convolutions without training between them. After the last cut come 12 (9) epochs, the rate from
  0.001 to a tenth at each third.
- ``tuned``: the same widths; the objective over all outputs instead of a sample, taken anew after every cut, the
  readers fitted in full by least squares, no training before the last cut, then 40 epochs down a cosine.
- ``one-shot``: as ``paper``, all layers at once, and as many epochs behind it as ``paper`` has in all.
- ``scratch``: the pruned architecture from random weights, trained as the dense network is.
- ``l1``, ``random``: as ``paper``, but the filters that go have the smallest L1 norms, or are drawn.

What differs from the paper's code, which is Caffe's: there biases learn at twice the rate, and momentum is not
Nesterov's; its images were scaled to 256x256 whatever their shape, ours by their shorter side; the scales are fitted on
10,112 images drawn without regard of the class, at all of their outputs. ThiNet-GAP gets its pooled head before the
layers are pruned, where the paper changes it when they are: every epoch then trains the head that stays. How long GAP
and Tiny train after the last cut, and Tiny on the way, the sources at hand do not say: they train as Conv does. Dense
networks are trained as is usual for them, and not as the paper's were.

ResNet-50 has its stride on the first 1x1 convolution of a block, as in Caffe, which the printed FLOPs imply. Weights
of torchvision's have it on the 3x3: for those, ``--set model.name=zoo:resnet50``, whose FLOPs are higher.

Source: Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression" (ICCV 2017), and its
authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.recipes.entries import Network

VARIANTS = ("paper", "tuned", "one-shot", "scratch", "l1", "random")

CONV1, CONV2 = ("features.0", "features.2"), ("features.5", "features.7")
CONV3, CONV4 = ("features.10", "features.12", "features.14"), ("features.17", "features.19", "features.21")
CONV5 = ("features.24", "features.26", "features.28")
TO_CONV4 = CONV1 + CONV2 + CONV3 + CONV4
"""conv1_1 to conv4_3 of VGG-16."""
BLOCKS = 16
"""Of ResNet-50, 2a to 5c."""


def _inside(ratio: float) -> dict[str, float]:
    """The same ratio for the two inner convolutions of every block."""
    return {"layer*.conv1": ratio, "layer*.conv2": ratio}


NETWORKS: Mapping[str, Network] = {
    "thinet/conv": Network("vgg16", "imagenet", dict.fromkeys(TO_CONV4, 0.5), residual="coupled"),
    "thinet/gap": Network("vgg16", "imagenet", dict.fromkeys(TO_CONV4, 0.5), residual="coupled", head="pooled"),
    "thinet/tiny": Network(
        "vgg16",
        "imagenet",
        {**dict.fromkeys(TO_CONV4 + CONV5[:2], 0.75), CONV5[2]: 0.5},
        residual="coupled",
        head="pooled",
    ),
    "thinet/r50-70": Network("resnet50_caffe", "imagenet", _inside(0.3)),
    "thinet/r50-50": Network("resnet50_caffe", "imagenet", _inside(0.5)),
    "thinet/r50-30": Network("resnet50_caffe", "imagenet", _inside(0.7)),
}
"""The numbers of ResNet-50 are what is kept, in per cent."""

DATA: Mapping[str, Any] = {"name": "imagenet", "batch": 128, "validation": 0, "workers": 8}
SAMPLED: Mapping[str, Any] = {"criterion": "thinet_sampled", "per_class": 10}
SCALED: Mapping[str, Any] = {"readers": "scale", "batchnorm": False, "batches": 79}
"""A factor for each channel; the batch norm of the layer behind is left as it is."""

THIRDS: Mapping[str, Any] = {"schedule": "step", "milestones": [1 / 3, 2 / 3], "gamma": 0.1}
DENSE: Mapping[str, Mapping[str, Any]] = {
    "vgg16": {"epochs": 90, "lr": 0.01, "weight_decay": 5e-4, **THIRDS},
    "resnet50_caffe": {"epochs": 90, "lr": 0.05, "weight_decay": 1e-4, **THIRDS},
}
BETWEEN: Mapping[str, Mapping[str, Any]] = {
    "vgg16": {"epochs": 1, "lr": 1e-3, "schedule": "constant", "weight_decay": 5e-4},
    "resnet50_caffe": {"epochs": 1, "lr": 1e-4, "schedule": "constant", "weight_decay": 5e-4},
}
LONGER: Mapping[str, Any] = {"epochs": 2, "lr": 1e-3, "weight_decay": 5e-4, "schedule": "step", "milestones": [0.5]}
"""After the last layers of VGG-16's stages."""
LAST: Mapping[str, Mapping[str, Any]] = {
    "vgg16": {"epochs": 12, "lr": 1e-3, "weight_decay": 5e-4, **THIRDS},
    "resnet50_caffe": {"epochs": 9, "lr": 1e-3, "weight_decay": 5e-4, **THIRDS},
}
TUNED: Mapping[str, Any] = {"epochs": 40, "warmup": 1, "schedule": "cosine", "label_smoothing": 0.1}
RATES: Mapping[str, float] = {"vgg16": 0.01, "resnet50_caffe": 0.02}
"""Where the tuned variant's training starts: below the dense network's, as there is less to find anew."""


def values_of(found: Network, variant: str) -> dict[str, Any]:
    """The sections of a recipe that prunes ``found``, dense training included; without the model."""
    model, last = found.model, LAST[found.model]
    values: dict[str, Any] = {
        "data": dict(DATA),
        "train": dict(DENSE[model]),
        "prune": {**SAMPLED, "ratios": dict(found.ratios), "residual": found.residual},
        "compensate": dict(SCALED),
        "finetune": dict(last),
    }
    prune = values["prune"]
    if variant in ("paper", "l1", "random"):
        prune["schedule"] = _schedule(found)
    if variant in ("l1", "random"):
        del prune["per_class"]  # they look at no images
        prune["criterion"] = variant
    elif variant == "one-shot":
        values["finetune"]["epochs"] = last["epochs"] + epochs_between(found)
    elif variant == "tuned":
        del prune["per_class"]
        prune |= {"criterion": "thinet", "schedule": {"kind": "layer-by-layer"}}
        values["compensate"] = {"readers": "least-squares", "batchnorm": True, "batches": 32}
        decay = DENSE[model]["weight_decay"]
        values["finetune"] = {**TUNED, "lr": RATES[model], "weight_decay": decay}
    elif variant == "scratch":
        values["prune"] = {"criterion": "random", "ratios": dict(found.ratios), "residual": found.residual}
        values["finetune"] = values.pop("train")
        del values["compensate"]
    return values


def epochs_between(found: Network) -> int:
    """How many epochs the ``paper`` variant trains between its cuts."""
    between = BETWEEN[found.model]["epochs"]
    if found.model != "vgg16":
        return (BLOCKS - 1) * between
    layers = list(found.ratios)
    return sum(LONGER["epochs"] if layer in _ends(layers) else between for layer in layers[:-1])


def _schedule(found: Network) -> dict[str, Any]:
    schedule: dict[str, Any] = {"kind": "layer-by-layer", "training": dict(BETWEEN[found.model])}
    if found.model == "vgg16":
        schedule["longer"] = {layer: dict(LONGER) for layer in _ends(list(found.ratios))}
    else:
        schedule["together"] = ["layer*.conv1"]
    return schedule


def _ends(layers: list[str]) -> list[str]:
    """The last layers of VGG-16's stages that something is cut behind."""
    return [stage[-1] for stage in (CONV1, CONV2, CONV3, CONV4) if stage[-1] in layers[:-1]]
