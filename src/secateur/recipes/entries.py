"""What a named recipe knows of its network: the dense one, how much of which group goes, and the layers left whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from secateur.errors import BadRequest


@dataclass(frozen=True)
class Network:
    """A pruned network of a paper. ``model``: the dense one, of the zoo. ``ratios``: ``{group or glob: ratio}``, or the
    width that is left as an integer.

    ``skip``: layers that stay whole whatever ``ratios`` says, numbered as the paper does: the stem is 1, then
    convolution by convolution without the projections, so that block ``b`` of a ResNet (from 0, over all stages) begins
    with layer ``2b + 2``. ``blocks``: how many there are in each stage. ``residual``: see ``secateur.plan``. ``train``:
    what the dense network's training needs besides what all of its paper's do. ``head``: see a recipe's model section.
    """

    model: str
    data: Literal["cifar10", "imagenet"]
    ratios: Mapping[str, float]
    skip: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    residual: Literal["coupled", "inner", "projection", "scatter"] = "inner"
    train: Mapping[str, Any] = field(default_factory=dict)
    head: Literal["own", "pooled"] = "own"

    @property
    def exclude(self) -> list[str]:
        """The groups that the skipped layers write."""
        return [first_of_block(layer, self.blocks) for layer in self.skip]


def first_of_block(layer: int, blocks: tuple[int, ...]) -> str:
    """The group that a block's first convolution writes, by the layer's number in the paper.

    >>> first_of_block(20, (9, 9, 9))
    'layer2.0.conv1'
    """
    place, odd = divmod(layer - 2, 2)
    for stage, count in enumerate(blocks, 1):
        if 0 <= place < count and not odd:
            return f"layer{stage}.{place}.conv1"
        place -= count
    raise BadRequest(
        f"layer {layer} begins no block of a network of {blocks} blocks: those have even numbers from 2 on"
    )
