"""What goes in and out: several inputs, keyword inputs, structured outputs, heads that exist only in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.common import Expect, Inputs, Network, conv, image, tensor


class Pair(NamedTuple):
    boxes: Tensor
    scores: Tensor


@dataclass
class Prediction:
    """A user's dataclass that nobody registered with torch."""

    boxes: Tensor
    scores: Tensor
    note: str = "as is"


class TwoHeads(nn.Module):
    """Two heads on one trunk; ``kind`` says how they are handed out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.trunk = nn.Sequential(conv(3, 10), conv(10, 8))
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> object:
        x = self.trunk(x)
        boxes, scores = self.boxes(x), self.scores(x.mean((2, 3)))
        if self.kind == "dict":
            return {"boxes": boxes, "scores": scores}
        if self.kind == "nested":
            return {"out": [boxes, (scores, {"again": scores})], "n": 2}
        if self.kind == "list":
            return [boxes, scores]
        if self.kind == "named":
            return Pair(boxes, scores)
        if self.kind == "dataclass":
            return Prediction(boxes, scores)
        return boxes, scores


class FeaturesToo(nn.Module):
    """Hands out an inner map beside its result: that map's channels belong to the user."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 8), conv(8, 10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.stem(x)
        return {"features": a, "out": self.head(self.mid(a))}


class TwoInputs(nn.Module):
    """An image and a vector that shifts its features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.embed = nn.Conv2d(3, 10, 3, padding=1), nn.Linear(4, 10)
        self.mid, self.head = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor, code: Tensor) -> Tensor:
        x = F.softplus(self.stem(image)) + self.embed(code)[:, :, None, None]
        return self.head(F.softplus(self.mid(x)))


class Siamese(nn.Module):
    """Two images through one encoder, compared channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(conv(3, 8), conv(8, 12, 3, 2)), nn.Linear(12, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.encoder(first).mean((2, 3)), self.encoder(second).mean((2, 3))
        return self.head((a - b).abs())


class OptionalInput(nn.Module):
    """An argument with a default that the example leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, gain: float = 2.0) -> Tensor:
        x = self.stem(x) * gain
        return self.head(x if mask is None else x * mask)


class Embedded(nn.Module):
    """Integers in: an embedding, then 1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(20, 10), nn.Conv1d(10, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(self.embed(ids).transpose(1, 2))).amax(2))


class Auxiliary(nn.Module):
    """A head in the middle that exists only in training, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = conv(3, 10), conv(10, 12)
        self.aux = nn.Sequential(
            nn.Conv2d(10, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        a = self.stem(x)
        out = self.head(self.mid(a).mean((2, 3)))
        return (out, self.aux(a)) if self.training else out


class AuxiliaryDict(nn.Module):
    """An auxiliary head on a branch of its own; a dict whose keys depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 10), conv(10, 8), nn.Conv2d(8, 4, 1)
        self.side, self.aux = conv(3, 10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.stem(x)
        result = {"out": self.head(self.mid(a))}
        if self.training:
            result["aux"] = self.aux(a + self.side(x))
        return result


class Unused(nn.Module):
    """A submodule that no mode runs: it must come through untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spare, self.head = conv(3, 10), nn.Conv2d(10, 8, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


class SizeDependent(nn.Module):
    """Pools and resizes by sizes read from its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 10), conv(10, 8), nn.Conv2d(18, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        h, w = a.shape[-2:]
        b = F.interpolate(self.mid(F.adaptive_avg_pool2d(a, (h // 2, w // 2))), size=(h, w), mode="bilinear")
        return self.head(torch.cat([a, b], 1)) / a.shape[2]


class WithHooks(nn.Module):
    """A forward hook that scales a map: part of what the network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 10), nn.Conv2d(10, 4, 1)
        self.stem.register_forward_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def double(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output * 2.0 + 0.5


def two(batch: int = 2) -> tuple[Tensor, Tensor]:
    return tensor(batch, 3, 8, 8), tensor(batch, 4, seed=1)


def ids() -> Inputs:
    return (torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0)),)


TRUNK = Expect(prunes=("trunk.0.0", "trunk.1.0"), oracle=True)
STEM = Expect(prunes=("stem*",), oracle=True)

INTERFACES: dict[str, Network] = {
    "outputs_tuple": (lambda: TwoHeads("tuple"), image(), TRUNK),
    "outputs_list": (lambda: TwoHeads("list"), image(), TRUNK),
    "outputs_dict": (lambda: TwoHeads("dict"), image(), TRUNK),
    "outputs_nested": (lambda: TwoHeads("nested"), image(), TRUNK),
    "outputs_named_tuple": (lambda: TwoHeads("named"), image(), TRUNK),
    "outputs_dataclass": (lambda: TwoHeads("dataclass"), image(), TRUNK),
    "outputs_inner_map": (
        FeaturesToo,
        image(),
        Expect(prunes=("mid.0",), locks=("stem.0",), reason="output", oracle=True),
    ),
    "inputs_two": (TwoInputs, two, Expect(prunes=("stem", "mid"), oracle=True)),
    "inputs_keywords": (
        TwoInputs,
        lambda: dict(zip(("code", "image"), two()[::-1], strict=True)),
        Expect(prunes=("stem", "mid"), oracle=True),
    ),
    "inputs_siamese": (
        Siamese,
        lambda: (tensor(2, 3, 8, 8), tensor(2, 3, 8, 8, seed=1)),
        Expect(prunes=("encoder.0.0", "encoder.1.0"), oracle=True),
    ),
    "inputs_bare_tensor": (Unused, lambda: tensor(2, 3, 8, 8), STEM),
    "inputs_optional_left_out": (OptionalInput, image(), STEM),
    "inputs_integers": (Embedded, ids, Expect(prunes=("conv",))),
    "auxiliary_head": (Auxiliary, image(), Expect(prunes=("stem.0", "mid.0"), oracle=True)),
    "auxiliary_head_dict": (AuxiliaryDict, image(), Expect(prunes=("stem.0", "mid.0"), oracle=True)),
    "unused_module": (Unused, image(), STEM),
    "sizes_from_tensors": (SizeDependent, image(), Expect(prunes=("stem.0", "mid.0"), oracle=True)),
    "forward_hook": (WithHooks, image(), STEM),
}
