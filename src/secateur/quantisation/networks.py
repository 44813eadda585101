"""A quantised file as a network, so that what evaluates networks evaluates files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.engines import prepare_file
from secateur.engines.protocol import Prepared
from secateur.graph import Inputs
from secateur.measurement import accuracy


class FileNetwork(nn.Module):
    """An ONNX file in an engine, called as the network it was exported from; no gradients, on the CPU."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        self.prepared = prepared

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | list[torch.Tensor]:
        """The only output, or the list of all."""
        outputs = self.prepared.outputs(args or kwargs)
        return outputs[0] if len(outputs) == 1 else outputs


def file_accuracy(
    path: str | Path, example_inputs: Inputs, data: Iterable[Any], *, engine: str = "onnxruntime", threads: int = 1
) -> float:
    """The accuracy of an ONNX file on ``data``; both as ``measurement.accuracy`` has it, the file in ``engine``."""
    return accuracy(FileNetwork(prepare_file(path, example_inputs, engine=engine, threads=threads)), data)
