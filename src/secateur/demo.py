"""The whole flow on real data in two or three minutes: train, prune to half the MACs, fine-tune, export, report.

The data are the 1,797 handwritten digits that scikit-learn carries (8x8 pixels, here enlarged to 16x16), split once
into training, validation and test images with every digit in proportion. The network is the CIFAR ResNet-20. Nothing is
tuned on the test images, and nothing is downloaded. ``run`` reads top to bottom; every stage is a function.

Shapes: ``B`` images of ``[3, 16, 16]``, grey in three equal channels, so that the zoo's network fits as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import secateur as sc
from secateur.artifact import save
from secateur.cli_output import bar, key_values, networks_table, out, say, working
from secateur.errors import BadArtifact, MissingExtra
from secateur.measurement import accuracy, interleaved_latency_ms, onnx_run
from secateur.onnx_file import export_onnx
from secateur.recover import Run, Training, fit_
from secateur.report import Report, Row, environment, filter_norms, layer_rows, write_report
from secateur.zoo.names import build

MODEL = "zoo:resnet20"
SIZE = 16
TRAINING = Training(epochs=12, lr=0.1, schedule="one-cycle", label_smoothing=0.1)
TUNING = Training(epochs=8, lr=0.05, schedule="one-cycle", label_smoothing=0.1)


HOW = {
    "module": "the tensors of the network's own modules were sliced",
    "attributes": "tensors were sliced and the sizes that the forward computes with were set",
    "graph": "the captured graph was rewritten",
}


@dataclass(frozen=True)
class Batches:
    """Images ``[N, 3, H, W]`` and digits ``[N]`` as re-iterable batches; ``shift`` moves every image at random by up to
    so many pixels, anew each time it is read, in an order drawn from torch's generator."""

    images: Tensor
    digits: Tensor
    batch: int = 64
    shift: int = 0

    def __len__(self) -> int:
        return math.ceil(len(self.digits) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.digits)) if self.shift else torch.arange(len(self.digits))
        for chosen in order.split(self.batch):
            yield self._moved(self.images[chosen]), self.digits[chosen]

    def _moved(self, images: Tensor) -> Tensor:
        if not self.shift:
            return images
        size = images.shape[-1]
        wide = nn.functional.pad(images, (self.shift,) * 4, value=float(images.min()))
        corners = torch.randint(0, 2 * self.shift + 1, (len(images), 2)).tolist()
        return torch.stack([w[:, y : y + size, x : x + size] for w, (y, x) in zip(wide, corners, strict=True)])


@dataclass(frozen=True)
class Digits:
    """The three parts of the data: 70 %, 10 % and 20 % of it."""

    train: Batches
    validation: Batches
    test: Batches


def run(folder: Path, *, seed: int = 0, training: Training = TRAINING, tuning: Training = TUNING) -> list[Row]:
    """The demonstration. Writes weights, plan, ONNX files and ``report.html`` to ``folder``; returns the table's rows.

    Raises MissingExtra where an optional package is missing, before anything is trained.
    """
    start = time.perf_counter()
    data = load_digits(seed)
    example = data.test.images[:1]
    _make(folder)

    dense = train(data, training, seed)
    with working("deciding, removing channels, checking"):
        plan = sc.plan(dense, example, criterion="l1", budget=sc.Budget(keep=0.5, of="macs", round_to=8))
        pruned = sc.apply(dense, plan)
    tuned = fine_tune(pruned, data, tuning, seed)

    models = {"dense": dense, "pruned": pruned, "pruned + fine-tuned": tuned}
    _save_all(folder, dense, tuned, plan)
    files = export_all(folder, models, example)
    rows = compare(models, files, data.test, example)
    report = write_report(folder / "report.html", _report(models, rows, plan, data, seed))

    out().print()
    out().print(networks_table(rows, engine="ONNX Runtime, 1 thread"))
    say(f"accuracy on {len(data.test.digits)} test images; {time.perf_counter() - start:.0f} s in all")
    out().print(
        key_values(
            {"report": str(report), "weights": f"{folder / 'pruned'}/", "ONNX": str(files["pruned + fine-tuned"])}
        )
    )
    return rows


def load_digits(seed: int = 0) -> Digits:
    """The digits, standardised by the training images, split by ``seed``."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtra("the demo's images come with scikit-learn\n  do: pip install 'secateur[all]'") from error
    raw = datasets.load_digits()
    digits = torch.from_numpy(raw.target).long()
    small = torch.from_numpy(raw.images).float()[:, None] / 16
    images = nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    rest, test = train_test_split(range(len(digits)), test_size=0.2, stratify=digits, random_state=seed)
    learn, validation = train_test_split(rest, test_size=0.125, stratify=digits[rest], random_state=seed)
    images = ((images - images[learn].mean()) / images[learn].std()).repeat(1, 3, 1, 1)
    return Digits(
        train=Batches(images[learn], digits[learn], shift=2),
        validation=Batches(images[validation], digits[validation], batch=256),
        test=Batches(images[test], digits[test], batch=256),
    )


def train(data: Digits, how: Training, seed: int) -> nn.Module:
    """The dense network, trained from random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(MODEL)
    _fit(model, data, how, "training the dense network")
    return model


def fine_tune(pruned: nn.Module, data: Digits, how: Training, seed: int) -> nn.Module:
    """A copy of the pruned network, trained a little more."""
    model = copy.deepcopy(pruned)
    _fit(model, data, how, "fine-tuning the pruned one ")
    return model


def export_all(folder: Path, models: dict[str, nn.Module], example: Tensor) -> dict[str, Path]:
    """Every network as ONNX with a dynamic batch, each checked against torch by the export."""
    files = {}
    with bar("exporting to ONNX", len(models)) as update:
        for done, (name, model) in enumerate(models.items(), 1):
            files[name] = folder / f"{name.replace(' + ', '-')}.onnx"
            written = export_onnx(model, files[name], example)
            update(done, len(models), f"difference to torch {written.max_difference:.1e}")
    return files


def compare(models: dict[str, nn.Module], files: dict[str, Path], test: Batches, example: Tensor) -> list[Row]:
    """Accuracy on the test images, costs, size of the ONNX file, and latency of one image in ONNX Runtime, in turns."""
    runs = {name: onnx_run(path, example) for name, path in files.items()}
    with bar("timing in ONNX Runtime") as update:
        times = interleaved_latency_ms(
            runs, repeats=200, warmup=20, progress=lambda done, total: update(done, total, "")
        )
    rows = []
    for name, model in models.items():
        counted = sc.count(model, example)
        rows.append(
            Row(
                name,
                params=int(counted.params),
                macs=int(counted.macs),
                accuracy=accuracy(model, test),
                size=files[name].stat().st_size,
                latency_ms=times[name],
            )
        )
    return rows


def _fit(model: nn.Module, data: Digits, how: Training, text: str) -> None:
    with bar(text) as update:
        seen = {"validation": 0.0}

        def evaluate(net: nn.Module) -> float:
            seen["validation"] = accuracy(net, data.validation)
            return seen["validation"]

        def progress(done: int, total: int, facts: Mapping[str, float]) -> None:
            update(done, total, f"loss {facts['loss']:.3f}  validation {100 * seen['validation']:.1f} %")

        history = fit_(model, data.train, how, evaluate=evaluate, run=Run(progress=progress, cpu=True))
        steps = how.epochs * len(data.train)
        update(steps, steps, f"loss {history[-1].loss:.3f}  validation {100 * seen['validation']:.1f} %")


def _report(models: dict[str, nn.Module], rows: list[Row], plan: sc.Plan, data: Digits, seed: int) -> Report:
    dense, small, example = models["dense"], models["pruned + fine-tuned"], data.test.images[:1]
    applied = sc.record(models["pruned"])
    law = {}
    if applied is not None and applied.difference is not None:
        law["largest difference"] = f"{applied.difference:.1e} of the largest output, in float64, at random weights too"
        law["how it was cut"] = HOW[applied.tier]
    kept = sum(len(indices) for indices in plan.keep.values())
    facts = {
        "data": f"scikit-learn's digits, {SIZE}x{SIZE}: {len(data.train.digits)} images to train on, "
        f"{len(data.validation.digits)} to validate, {len(data.test.digits)} to test",
        "criterion": "L1 norm of the filters (Li et al. 2017)",
        "budget": "half the MACs, shared globally; widths in multiples of 8, which engines compute in",
        "channels": f"{kept} of {sum(group.channels for group in plan.groups)} kept, in {len(plan.groups)} groups",
        "training": f"{TRAINING.epochs} epochs, then {TUNING.epochs} of fine-tuning; seed {seed}",
    }
    return Report(
        title="ResNet-20 on handwritten digits, at half its MACs",
        rows=rows,
        layers=layer_rows(sc.layer_table(dense, example), sc.layer_table(small, example)),
        norms=filter_norms(dense),
        law=law,
        facts=facts,
        environment=environment(),
        command="secateur demo",
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArtifact(
            f"the folder {folder} cannot be made: {error.strerror}\n  do: choose another with -o"
        ) from error


def _save_all(folder: Path, dense: nn.Module, small: nn.Module, plan: sc.Plan) -> None:
    """Weights of the dense network beside the saved folder of the pruned one: the commands can work on both."""
    save_model(dense, str(folder / "dense.safetensors"))
    named = dataclasses.replace(plan, made_by={**plan.made_by, "model": MODEL, "options": {}})
    save(folder / "pruned", small, named)
