"""The networks of the four papers, written so that a pruned one can be built directly, by its widths.

``MODELS`` maps a name to a function that builds it; all of them take ``classes`` and ``in_channels``, and the widths
that their papers prune. Every network carries ``input_size``, the (channels, height, width) it was designed for.
``secateur.zoo.names`` builds them, and torchvision's and timm's, from a string; ``secateur.zoo.weights`` fills them.
Nothing of torchvision is needed here, but the ImageNet networks name their parameters as it does, so its weights load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from secateur.zoo.resnet import cifar_resnet, imagenet_resnet, li_inner, thinet_resnet50
from secateur.zoo.vgg import LI_A, THINET, THINET_TINY, imagenet_vgg16, vgg16_cifar

__all__ = ["MODELS", "cifar_resnet", "imagenet_resnet", "imagenet_vgg16", "li_inner", "thinet_resnet50", "vgg16_cifar"]

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    # CIFAR, 3x32x32; the suffixes _a and _b are the pruned networks of Li et al., Table 1
    "vgg16_cifar": vgg16_cifar,
    "vgg16_cifar_a": partial(vgg16_cifar, widths=LI_A),
    "vgg16_swp": partial(vgg16_cifar, head="swp"),
    "resnet20": partial(cifar_resnet, 20),
    "resnet32": partial(cifar_resnet, 32),
    "resnet44": partial(cifar_resnet, 44),
    "resnet56": partial(cifar_resnet, 56),
    "resnet110": partial(cifar_resnet, 110),
    "resnet20_projection": partial(cifar_resnet, 20, shortcut="projection"),
    "resnet32_projection": partial(cifar_resnet, 32, shortcut="projection"),
    "resnet44_projection": partial(cifar_resnet, 44, shortcut="projection"),
    "resnet56_projection": partial(cifar_resnet, 56, shortcut="projection"),
    "resnet110_projection": partial(cifar_resnet, 110, shortcut="projection"),
    "resnet56_a": partial(cifar_resnet, 56, inner=li_inner(56, (0.1, 0.1, 0.1), skip=(16, 20, 38, 54))),
    "resnet56_b": partial(cifar_resnet, 56, inner=li_inner(56, (0.6, 0.3, 0.1), skip=(16, 18, 20, 34, 38, 54))),
    "resnet110_a": partial(cifar_resnet, 110, inner=li_inner(110, (0.5, 0.0, 0.0), skip=(36,))),
    "resnet110_b": partial(cifar_resnet, 110, inner=li_inner(110, (0.5, 0.4, 0.3), skip=(36, 38, 74))),
    # ImageNet, 3x224x224
    "vgg16": imagenet_vgg16,
    "vgg16_gap": partial(imagenet_vgg16, head="gap"),
    "thinet_conv": partial(imagenet_vgg16, widths=THINET),
    "thinet_gap": partial(imagenet_vgg16, widths=THINET, head="gap"),
    "thinet_tiny": partial(imagenet_vgg16, widths=THINET_TINY, head="gap"),
    "resnet18": partial(imagenet_resnet, 18),
    "resnet34": partial(imagenet_resnet, 34),
    "resnet50": partial(imagenet_resnet, 50),
    "resnet101": partial(imagenet_resnet, 101),
    "resnet34_a": partial(
        imagenet_resnet, 34, inner=li_inner(34, (0.3, 0.3, 0.3, 0.0), skip=(2, 8, 14, 16, 26, 28, 30, 32))
    ),
    "resnet34_b": partial(
        imagenet_resnet, 34, inner=li_inner(34, (0.5, 0.6, 0.4, 0.0), skip=(2, 8, 14, 16, 26, 28, 30, 32))
    ),
    "resnet50_caffe": partial(imagenet_resnet, 50, stride_on="1x1"),
    "resnet101_caffe": partial(imagenet_resnet, 101, stride_on="1x1"),
    "thinet_resnet50_70": partial(thinet_resnet50, 70),
    "thinet_resnet50_50": partial(thinet_resnet50, 50),
    "thinet_resnet50_30": partial(thinet_resnet50, 30),
}
"""Every ``zoo:NAME``. A function may be called with more keywords, ``MODELS["resnet20"](classes=100)``."""
