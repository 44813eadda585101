"""What a recipe may say: a model, data, how to train, prune, recover and measure. Plain data, checked when made.

Sections that other parts of the library already describe (``Training``, ``DataSettings``, ``Budget``) are those very
dataclasses. Nothing is converted on the way: text is no number, 1 is no truth value, and an unknown key is an error.
What no single section can know, such as that distillation needs a fine-tuning to happen in, ``faults.py`` tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.core import Budget
from secateur.quantisation import Method
from secateur.recover.settings import Training
from secateur.schedules.penalties import Growth
from secateur.zoo.data.settings import DataSettings

Where = tuple[str | int, ...]
"""A place in a recipe: keys and list indices from the top."""

RANDOM, ALL = "random", "all"

for settings in (Training, Budget, Growth):  # pydantic looks for this on dataclasses, which need not know of it
    settings.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]


class Section(BaseModel):
    """Frozen, strict, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """The network."""

    name: str
    """zoo:NAME, torchvision:NAME, timm:NAME, package.module:function, or a folder that secateur saved."""
    options: dict[str, Any] = {}
    """Passed to what builds it, such as classes: 10."""
    weights: str | None = None
    """A file of trained weights, or "random" for those that building gives; null with a train section, or a folder."""
    head: Literal["own", "pooled"] = "own"
    """pooled: all that follows the last feature map becomes global average pooling and one linear layer (ThiNet-GAP),
    which begins as the least-squares fit to the network's outputs where there are weights."""
    base: str | None = None
    """Of a saved folder: the dense network it was pruned from, if the folder does not say or is not trusted with it."""


class OneShot(Section):
    """All at once."""

    kind: Literal["one-shot"] = "one-shot"


class Iterative(Section):
    """In several steps, with training between them."""

    kind: Literal["iterative"]
    steps: int = Field(default=5, ge=2, le=1000)
    """How many cuts lead to the whole of the budget."""
    training: Training | None = None
    """Between two cuts; after the last one comes the finetune section."""


class LayerByLayer(Section):
    """One group after the other in the network's order, with training between them, as ThiNet does."""

    kind: Literal["layer-by-layer"]
    training: Training | None = None
    """Between two cuts; after the last one comes the finetune section."""
    together: list[str] = []
    """Names or globs of groups after whose cut the next one follows at once, without training: the first of a block."""
    longer: dict[str, Training] = {}
    """By name or glob of groups: what is trained after their cut instead; the first glob that fits counts."""


class Progressive(Section):
    """Channels are set to zero again and again while the dense network trains, and cut at the end, as FPGM does."""

    kind: Literal["progressive"]
    soft: bool = False
    """What was zeroed may come back; false: it stays zero."""
    every: int = Field(default=1, ge=1)
    """Epochs from one choice of channels to the next."""
    grow: int = Field(default=0, ge=0)
    """Epochs over which what is zeroed grows to the whole of it; 0: it is the whole at once."""
    at_start: bool = False
    """Choose before the first epoch, too."""
    exclude_zeroed: bool = False
    """Compare only filters that are not zero with each other: many zeros draw the median to themselves."""
    training: Training


class Sparse(Section):
    """A growing penalty makes the channels small that will go, while the dense network trains; then they are cut."""

    kind: Literal["sparse"]
    penalty: Growth = Growth()
    training: Training


Schedule = Annotated[OneShot | Iterative | LayerByLayer | Progressive | Sparse, Field(discriminator="kind")]


class Sensitivity(Section):
    """How much of each group can go, tried out on the validation images; the widths follow from it, before the first
    cut."""

    criterion: str | None = None
    """How the channels that go are chosen while trying; null: by the criterion that prunes."""
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """The fractions of a group that are removed, ascending."""
    batches: int | None = Field(default=None, ge=1)
    """How many batches of validation images each trial is evaluated on; null: all."""
    tolerance: float | None = Field(default=None, ge=0, lt=1)
    """Each group loses the largest fraction at which the accuracy never fell by more than this (0.01: one point); null:
    the budget is met with the least predicted loss."""
    per: Literal["group", "stage"] = "group"
    """stage: with a tolerance, one fraction for all groups of the same map size, sensitive ones left whole."""
    skip: list[str] = []
    """Names or globs of groups that are tried out, and stay whole whatever comes out."""


class Prune(Section):
    """Which channels go, and when."""

    criterion: str = "l1"
    """How channels are ranked."""
    calibration: int = Field(default=16, ge=1)
    """How many batches of training images are looked at by a criterion that needs data."""
    per_class: int | None = Field(default=None, ge=1)
    """Look at so many training images of each class instead."""
    budget: Budget | None = None
    """What the pruned network may cost; half the MACs, if neither this nor ratios is given."""
    ratios: float | dict[str, int | float] | None = None
    """The fraction to remove from every group, or by glob over their names: a fraction (0.5) or a width (48)."""
    exclude: list[str] = []
    """Names or globs of groups that stay whole."""
    allocation: Literal["global", "uniform"] = "global"
    """How a budget is shared: by score per cost over the whole network, or the same fraction everywhere."""
    residual: Literal["coupled", "inner", "projection", "scatter"] = "coupled"
    """What meets in a residual sum: pruned together by all that writes it; or whole, so that only the inside of blocks
    is pruned; or by the norms of the shortcut's projection (ResNet-34-C of Li et al.), whole where there is none; or
    each on its own, its narrow output added into a stream of full width (FPGM)."""
    constants: Literal["drop", "fold"] | dict[str, Literal["drop", "fold"]] = "drop"
    """What a zeroed filter leaves behind its batch norm: given up with the channel, or folded into what reads it; for
    all groups, or by glob over their names."""
    greedy: bool = False
    """Rank a layer's filters without the inputs that pruning the layers before has removed already."""
    sensitivity: Sensitivity | None = None
    """Where widths are found by trying; null: nowhere."""
    prefer: Literal["channels", "module"] = "channels"
    """module: keep the halves of even splits equal, so that more networks stay plain modules."""
    beside: list[str] = []
    """Criteria to compare, where the schedule is one-shot: each prunes the same network to the same widths, has its
    batch norm recalibrated, and is measured; nothing else is made of it."""
    schedule: Schedule = OneShot()


class Compensate(Section):
    """Recovery without training, from activations on training images."""

    readers: Literal["none", "bias", "scale", "least-squares"] = "least-squares"
    """What becomes of the layers that read removed channels: nothing; they get the mean of what is missing; or one
    factor for each channel that they kept (ThiNet); or all their weights are fitted."""
    batchnorm: bool = True
    """Recalibrate the statistics of batch norm, last."""
    batches: int = Field(default=16, ge=1)
    """How many batches of calibration images are looked at."""


class Teacher(Section):
    """The network to learn from."""

    name: str | None = None
    """As a model's name; null: the dense network of this recipe's model."""
    options: dict[str, Any] = {}
    weights: str
    """A file of trained weights."""


class Distil(Section):
    """While fine-tuning, learn from the dense network's outputs too."""

    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.9, ge=0, le=1)
    """Of the teacher's outputs; the labels have the rest."""
    features: float = Field(default=0.0, ge=0)
    """Weight of the difference of feature maps at the groups' outputs."""
    teacher: Teacher | None = None
    """Null: the dense network of this run."""


class Quantise(Section):
    """ONNX files in int8 too, of the dense network and of the one that the run ends with, measured beside them."""

    batches: int = Field(default=8, ge=1)
    """How many batches of training images the ranges of activations are taken from."""
    method: Method = "minmax"
    """How wide a range is: minmax, all that was seen; percentile, without the outermost 0.001 %; entropy, clipped where
    that changes the distribution least."""
    per_channel: bool = True
    """A scale for each output channel of a weight; false: one for all."""
    exclude: list[str] = []
    """Names or globs of modules that stay in float."""
    reduce_range: bool | None = None
    """Weights in seven bits, for processors whose sums of int8 products saturate; null: if this machine's does."""


class Measure(Section):
    """What is measured besides test accuracy, parameters and MACs."""

    latency: bool = True
    engine: str | list[str] = "torch"
    """In what: torch, channels_last, inductor, onnxruntime, openvino; several of them; or all that are installed."""
    threads: int = Field(default=1, ge=1)


class Export(Section):
    """What is written besides the saved network."""

    onnx: bool = True
    report: bool = True


class Recipe(Section):
    """A run of secateur from data to report."""

    model: Model
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of weights, split, order, augmentation and training: every phase's own is derived from it."""
    data: DataSettings
    train: Training | None = None
    """How the dense network is trained; null: it comes with weights."""
    prune: Prune | None = None
    compensate: Compensate | None = None
    finetune: Training | None = None
    distil: Distil | None = None
    scratch: Literal["none", "epochs", "compute"] = "none"
    """Train the pruned architecture from fresh weights too, for as many epochs or as many MACs as the run took."""
    quantise: Quantise | None = None
    measure: Measure = Measure()
    export: Export = Export()
    checkpoint_every: int = Field(default=200, ge=1)
    """Training steps from one checkpoint to the next; there is one at the end of every epoch, too."""


def is_folder(name: str) -> bool:
    """Whether a model's name means a saved folder: all other forms have a colon."""
    return ":" not in name


def trainings(recipe: Recipe) -> Iterator[tuple[Where, Training]]:
    """Every training section of the recipe and its place."""
    schedule = None if recipe.prune is None else recipe.prune.schedule
    between = getattr(schedule, "training", None)
    longer = schedule.longer if isinstance(schedule, LayerByLayer) else {}
    for where, training in (
        (("train",), recipe.train),
        (("prune", "schedule", "training"), between),
        *((("prune", "schedule", "longer", glob), training) for glob, training in longer.items()),
        (("finetune",), recipe.finetune),
    ):
        if training is not None:
            yield where, training


def json_schema() -> str:
    """The JSON schema of recipes, for editors and other programs."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def known_keys(place: Where, *, kind: object = None) -> list[str]:
    """The keys that the section at ``place`` may have; none for a place that is no section. ``kind``: where several
    sections may stand, the one that is meant."""
    schema = Recipe.model_json_schema()
    nodes = [schema]
    for part in place:
        forms = [form for node in nodes for form in _forms(schema, node)]
        nodes = [form["properties"][part] for form in forms if part in form["properties"]]
    found = [form["properties"] for node in nodes for form in _forms(schema, node)]
    meant = [keys for keys in found if kind is not None and keys.get("kind", {}).get("const") == kind]
    return list(dict.fromkeys(key for keys in meant or found for key in keys))


def _forms(schema: dict[str, Any], node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sections that a node of the schema allows, references followed."""
    if "$ref" in node:
        yield from _forms(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    for form in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _forms(schema, form)
    if "properties" in node:
        yield node


def as_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values with every default written out. ``weights`` files as they were given."""
    return recipe.model_dump(mode="json")


def first_difference(one: Any, other: Any, place: str = "") -> str | None:
    """The first key, dotted, at which two recipes' values differ; None where they are equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in one or key not in other:
                return inner
            found = first_difference(one[key], other[key], inner)
            if found is not None:
                return found
        return None
    return None if one == other and type(one) is type(other) else place


def absolute(path: str) -> str:
    """A path that does not depend on where the command is run."""
    return str(Path(path).expanduser().resolve())
