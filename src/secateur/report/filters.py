"""The filters of the first layer as small images, ordered by their norms (Li et al. 2017, figure 5)."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import torch
from torch import nn

from secateur.report.content import Filters

COLOURS = 3


def first_filters(model: nn.Module) -> Filters | None:
    """The filters of the first 2-d convolution of ``model``, in the order of its modules; None where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return filters_of(name, module.weight)
    return None


def filters_of(layer: str, weight: torch.Tensor) -> Filters:
    """``weight [O, I, K, L]`` as images. Of three inputs each is a colour; else the image is their mean, in grey.

    All filters share one scale, on which 0 is the middle grey: what is small looks flat.
    """
    values = weight.detach().to("cpu", torch.float64)
    norms = values.abs().flatten(1).sum(1)
    order = torch.argsort(norms, descending=True, stable=True)
    shown = values if values.shape[1] == COLOURS else values.mean(1, keepdim=True)
    shown = shown / max(float(shown.abs().max()), np.finfo(float).tiny)
    pixels = (127.5 + 127.5 * shown[order]).round().to(torch.uint8).expand(-1, COLOURS, -1, -1)
    return Filters(layer, pixels.permute(0, 2, 3, 1).contiguous().numpy(), norms[order].numpy(), order.numpy())


def filters_list(filters: Filters) -> str:
    """The images as an HTML list, each with its norm below it and with a text that tells both."""
    items = []
    for image, norm, index in zip(filters.images, filters.norms, filters.order, strict=True):
        address = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
        shown = f"{norm:#.3g}".rstrip(".")
        text = f"filter {index}, L1 norm {shown}"
        items.append(f'<li title="{text}"><img alt="{text}" src="{address}"><span>{shown}</span></li>')
    return f'<ol class="filters">\n{chr(10).join(items)}\n</ol>'


def png(pixels: np.ndarray) -> bytes:
    """``pixels [K, L, 3]`` uint8 as a PNG file: one chunk of zlib-compressed rows, each behind a filter byte of 0."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a sample, red green blue
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
