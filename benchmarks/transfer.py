"""A pruned network on other data: ResNet-20 from Fashion-MNIST to scikit-learn's digits (enlarged to 28x28) and back,
at half of its MACs; and what pruning saves of an inference, and of a training step.

    python benchmarks/transfer.py                 three seeds on few images; results/transfer.json and transfer.md
    python benchmarks/transfer.py --seeds 0       others may work on other seeds at the same time
    python benchmarks/transfer.py --only times    the times alone; also: dense, transfer, more (the other rows)

A dense network is trained on the first set. *Pruned, then transferred*: pruned on images of the first set, given a new
classifier, and trained on the second. *Transferred, then pruned*: given a new classifier, trained on the second set for
half of the epochs, pruned on its images, and trained for the other half. Every row has equally many epochs on the
second set, and the pruned networks of all rows have equally wide layers: one ratio for the inner layers of all blocks,
which are what the paper prunes of residual networks (Luo et al. 2017). Right after the cut the inputs that are kept are
rescaled, as in the paper, and batch norms recalibrated, whatever the criterion. Accuracy is that of test images of the
second set, by which nothing was chosen. A cell that is in the result file already is not computed again.

Times are those of one thread, all networks in turns, as medians; a training step is forward, loss and backward.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

import common
import secateur as sc
from common import RESULTS
from secateur.measurement import accuracy
from secateur.recover import Training, compensate_
from secateur.timing import take_turns
from secateur.zoo.data import Data, DataSettings, open_data
from secateur.zoo.data.loaders import Loader
from secateur.zoo.names import build
from trials import DENSE, Cells, dense_network, fashion, fresh, spread, trained

MODEL = "resnet20"
KEEP = 0.5
TITLE = "Pruned networks on other data"
SETS = ("fashion-mnist", "digits")
TUNING = Training(lr=0.05, schedule="one-cycle", weight_decay=5e-4)
"""How networks are trained on the second set, but for epochs and seed."""


@dataclass(frozen=True)
class Size:
    """How much is trained. ``dense``: epochs on all images of the first set. ``images``: of the second one; ``tune``:
    epochs on them, an even number; images to prune and calibrate with; batches of 64 at most to test on."""

    dense: Mapping[str, int]
    images: Mapping[str, int]
    tune: Mapping[str, int]
    calibration: int
    test: int


SMALL = Size(
    dense={"fashion-mnist": 10, "digits": 10},
    images={"fashion-mnist": 512, "digits": 256},
    tune={"fashion-mnist": 8, "digits": 16},
    calibration=256,
    test=32,
)
FIRST = {"fashion-mnist": 6_000, "digits": None}
"""At most so many images of the first set, None: all. Those of Fashion-MNIST are what other benchmarks train on."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--only", default="dense,transfer,more,times", help="which of these parts")
    options.add_argument("--again", action="store_true", help="forget the cells of these seeds first")
    options.add_argument("--root", default=None, help="where Fashion-MNIST lies, if not in the usual places")
    given = options.parse_args()
    common.prepare()
    seeds, parts = [int(text) for text in given.seeds.split(",")], given.only.split(",")
    found = Cells(RESULTS / "transfer.json", "python benchmarks/transfer.py")
    if given.again:
        found.forget(seeds)
    settings = [setting(*way, seed, given.root) for seed in seeds for way in (SETS, SETS[::-1])]
    for part in parts:
        for at in settings:
            if part == "dense":
                found.cell(at.seed, at.old.name, part, lambda at=at: {"accuracy": accuracy(at.dense(), at.old.test)})
            elif part in PARTS:
                run_transfer(found, at, PARTS[part])
            found.write_table(TITLE, lambda: table(found))
    if "times" in parts:
        for seed, name in itertools.product(seeds, NETWORKS):
            run_times(found, seed, name)
        found.write_table(TITLE, lambda: table(found))


# ---------------------------------------------------------------------------------------------- one direction


@dataclass(frozen=True)
class Setting:
    """What all cells of one seed and direction share. ``dense``: the network trained on the first set, ``old``;
    ``begun``: the same with a new classifier, after half of the epochs on the second, ``new``."""

    column: str
    seed: int
    old: Data
    new: Data
    dense: Callable[[], nn.Module]
    begun: Callable[[], nn.Module]


def setting(first: str, second: str, seed: int, root: str | None) -> Setting:
    if first == "fashion-mnist":
        old = fashion(root, images=FIRST[first], test=SMALL.test // 2, seed=seed)
    else:
        old = open_data(DataSettings(first, size=28, batch=64, validation=0), seed=seed)
    settings = DataSettings(
        second,
        root=root if second == "fashion-mnist" else None,
        size=28,
        batch=64,
        limit=SMALL.images[second],
        validation=1000 if second == "fashion-mnist" else 0,
    )
    new = open_data(settings, seed=seed)
    new = replace(new, test=new.test.first(SMALL.test))

    @functools.cache
    def dense() -> nn.Module:
        training = replace(DENSE, epochs=SMALL.dense[first], seed=seed)
        if first == "fashion-mnist":
            return dense_network(MODEL, old, training, FIRST[first])
        return trained(fresh(MODEL, seed), old, training, f"seed{seed}-transfer-{first}").eval()

    @functools.cache
    def begun() -> nn.Module:
        return tuned(with_classifier(dense(), new, seed), new, SMALL.tune[second] // 2, seed)

    return Setting(f"{first} to {second}", seed, old, new, dense, begun)


def run_transfer(found: Cells, at: Setting, rows: Sequence[str]) -> None:
    epochs = SMALL.tune[at.new.name]
    found.say(
        at.column,
        f"dense network trained on {at.old.train.samples} images for {SMALL.dense[at.old.name]} epochs, pruned on "
        f"{SMALL.calibration} of them; then {SMALL.images[at.new.name]} images of {at.new.name} for {epochs} epochs "
        f"(or twice {epochs // 2}), {SMALL.calibration} of them to prune on; {at.new.test.samples} to test",
    )
    found.say(
        "training on the second set", f"batches of 64, one-cycle up to lr {TUNING.lr}, decay {TUNING.weight_decay}"
    )

    for what in rows:
        found.cell(at.seed, at.column, what, lambda make=ROWS[what]: measured(at, make(at)))  # type: ignore[misc]


def measured(at: Setting, network: nn.Module) -> dict[str, float]:
    """Its accuracy on the second set, and the share of the dense network's MACs that it needs."""
    example = torch.zeros(1, *at.new.shape)
    macs = sc.count(network, example).macs / sc.count(at.dense(), example).macs
    return {"accuracy": accuracy(network, at.new.test), "macs": macs}


def transferred(at: Setting) -> nn.Module:
    """The dense network, trained on the second set for all epochs."""
    return tuned(with_classifier(at.dense(), at.new, at.seed), at.new, SMALL.tune[at.new.name], at.seed)


def pruned_first(at: Setting, criterion: str, *, retuned: bool = False) -> nn.Module:
    """Pruned on the first set (and trained there for another epoch), transferred, and trained for all epochs."""
    small = pruned(at.dense(), at.old, criterion, at.seed)
    if retuned:
        tuned(small, at.old, 1, at.seed)
    return tuned(with_classifier(small, at.new, at.seed), at.new, SMALL.tune[at.new.name], at.seed)


def pruned_last(at: Setting, criterion: str) -> nn.Module:
    """Transferred, trained for half of the epochs, pruned on the second set, and trained for the other half."""
    small = pruned(at.begun(), at.new, criterion, at.seed)
    return tuned(small, at.new, SMALL.tune[at.new.name] // 2, at.seed)


def pruned_afresh(at: Setting) -> nn.Module:
    """The pruned architecture with weights that have seen neither set."""
    plan = plan_of(at.dense(), at.old, "l1", at.seed)
    small = sc.apply(fresh(MODEL, at.seed + 1000), plan, check=False)
    return tuned(small, at.new, SMALL.tune[at.new.name], at.seed)


def pruned(dense: nn.Module, data: Data, criterion: str, seed: int) -> nn.Module:
    """``dense`` at half of its MACs, its readers rescaled and its batch norms recalibrated, on the same images."""
    plan = plan_of(dense, data, criterion, seed)
    small = sc.apply(dense, plan, check=False)
    compensate_(small, dense, plan, calibration(data), readers="scale")
    return small


def plan_of(dense: nn.Module, data: Data, criterion: str, seed: int) -> sc.Plan:
    return sc.plan(
        dense,
        torch.zeros(1, *data.shape),
        criterion=criterion,
        budget=sc.Budget(keep=KEEP),
        allocation="uniform",
        residual="inner",
        data=calibration(data) if criterion.startswith("thinet") else None,
        seed=seed,
    )


def calibration(data: Data) -> Loader:
    """The images to prune and calibrate with."""
    return data.calibration.first(SMALL.calibration // data.calibration.batch)


def with_classifier(network: nn.Module, data: Data, seed: int) -> nn.Module:
    """A copy with an untrained classifier for the classes of ``data``."""
    torch.manual_seed(seed)
    network = copy.deepcopy(network)
    old = network.fc
    network.fc = nn.Linear(old.in_features, len(data.classes)).to(old.weight.device)
    return network


def tuned(network: nn.Module, data: Data, epochs: int, seed: int) -> nn.Module:
    """``network`` trained on ``data`` in place."""
    return trained(network, data, replace(TUNING, epochs=epochs, seed=seed), None)


FIRST_THINET, LAST_THINET = "thinet: pruned, then transferred", "thinet: transferred, then pruned"
FIRST_L1, LAST_L1 = "l1: pruned, then transferred", "l1: transferred, then pruned"
RETUNED = "thinet: pruned, trained there for another epoch, then transferred"
DENSE_ROW, SCRATCH = "dense, transferred", "pruned, from scratch on the second set"
ROWS: Mapping[str, Callable[[Setting], nn.Module]] = {
    DENSE_ROW: transferred,
    FIRST_THINET: lambda at: pruned_first(at, "thinet"),
    LAST_THINET: lambda at: pruned_last(at, "thinet"),
    RETUNED: lambda at: pruned_first(at, "thinet", retuned=True),
    FIRST_L1: lambda at: pruned_first(at, "l1"),
    LAST_L1: lambda at: pruned_last(at, "l1"),
    SCRATCH: pruned_afresh,
}
PARTS: Mapping[str, Sequence[str]] = {
    "transfer": (DENSE_ROW, FIRST_THINET, LAST_THINET),
    "more": (RETUNED, FIRST_L1, LAST_L1, SCRATCH),
}
ASKED = (
    (FIRST_THINET, LAST_THINET),
    (FIRST_THINET, DENSE_ROW),
    (RETUNED, DENSE_ROW),
    (LAST_THINET, DENSE_ROW),
    (FIRST_THINET, FIRST_L1),
    (LAST_THINET, LAST_L1),
    (FIRST_THINET, SCRATCH),
)
"""Which rows are compared seed by seed."""


# ---------------------------------------------------------------------------------------------- times


@dataclass(frozen=True)
class Timed:
    """A network to be timed: ``ratios`` of its groups go, or the budget is met with inner layers only."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ratios: Mapping[str, float] | None
    repeats: int


THINET_CONV = {f"features.{i}": 0.5 for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)}
"""conv1_1 to conv4_3 of torchvision's VGG-16: the widths of ThiNet-Conv."""
NETWORKS = {
    "resnet20": Timed("ResNet-20, 64 images of 28x28", lambda: fresh(MODEL, 0), (64, 1, 28, 28), None, 10),
    "vgg16": Timed(
        "VGG-16 as ThiNet-Conv, 2 images of 224x224",
        lambda: build("torchvision:vgg16"),
        (2, 3, 224, 224),
        THINET_CONV,
        3,
    ),
    "resnet50": Timed(
        "ResNet-50, 2 images of 224x224", lambda: build("torchvision:resnet50"), (2, 3, 224, 224), None, 3
    ),
}


def run_times(found: Cells, seed: int, name: str) -> None:
    """Medians of one round, as many rounds as seeds. The weights are random: only widths matter."""
    found.cell(seed, "times", name, lambda: times(NETWORKS[name]))


def times(at: Timed) -> dict[str, float]:
    torch.manual_seed(0)
    dense = at.make().eval()
    inputs, targets = torch.randn(at.shape), torch.randint(10, at.shape[:1])
    budget = None if at.ratios else sc.Budget(keep=KEEP)
    example = inputs[:1]
    plan = sc.plan(dense, example, budget=budget, ratios=at.ratios, allocation="uniform", residual="inner")
    small = sc.apply(dense, plan, check=False)
    networks = {"dense": dense, "pruned": small}
    runs: dict[str, Callable[[], object]] = {}
    for name, network in networks.items():
        runs[f"{name} inference, ms"] = functools.partial(infer, network, inputs)
        runs[f"{name} step, ms"] = functools.partial(step, network, inputs, targets)
    found = {name: timing.ms for name, timing in take_turns(runs, repeats=at.repeats, warmup=1).items()}
    macs = {name: sc.count(network, example).macs for name, network in networks.items()}
    return {**found, "macs": macs["pruned"] / macs["dense"]}


def infer(network: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        network.eval()(inputs)


def step(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    network.train()
    network.zero_grad(set_to_none=True)
    functional.cross_entropy(network(inputs), targets).backward()


# ---------------------------------------------------------------------------------------------- the table


def table(found: Cells) -> str:
    """A row for each way and a column for each direction; the differences that are asked about, seed by seed; times."""
    columns = [f"{first} to {second}" for first, second in (SETS, SETS[::-1])]
    there = found.names(columns)
    rows = [[what, *[spread(_of(found, c, what)) for c in columns]] for what in ROWS if what in there]
    dense = ", ".join(f"{name} {spread(_of(found, name, 'dense'))}" for name in SETS)
    text = (
        "Test accuracy in %, mean ± standard deviation over the seeds. The dense networks on the set that they were\n"
        f"trained on: {dense}.\n\n"
    )
    text += common.markdown(["", *columns], rows)
    asked = [(one, other) for one, other in ASKED if one in there and other in there]
    rows = [[f"{one} − {other}", *[_difference(found, c, one, other) for c in columns]] for one, other in asked]
    text += "\nDifferences in points, seed by seed:\n\n" + common.markdown(["", *columns], rows)
    return text + _times_table(found)


def _times_table(found: Cells) -> str:
    rows = []
    for name, timed in NETWORKS.items():
        row = [timed.title, spread([*found.values("times", name, "macs").values()][:1])]
        for what in ("inference", "step"):
            slow, fast = (_of_times(found, name, f"{which} {what}, ms") for which in ("dense", "pruned"))
            if not slow:
                break
            faster = [a / b for a, b in zip(slow, fast, strict=True)]
            row += [f"{statistics.median(slow):.0f}", f"{statistics.median(fast):.0f}"]
            row += [f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})"]
        else:
            rows.append(row)
    if not rows:
        return ""
    heads = ["", "MACs left, %"]
    heads += [
        f"{what}: {which}" for what in ("inference", "step") for which in ("dense, ms", "pruned, ms", "times faster")
    ]
    return (
        "\n## Times\n\nMilliseconds of one batch, medians over the rounds (one a seed) of a round's median; times\n"
        "faster as median, least and most of the rounds. A step is forward, loss and backward.\n\n"
        + common.markdown(heads, rows)
    )


def _of(found: Cells, column: str, what: str) -> list[float]:
    return [*found.values(column, what, "accuracy").values()]


def _of_times(found: Cells, name: str, key: str) -> list[float]:
    return [value for value in found.values("times", name, key).values() if math.isfinite(value)]


def _difference(found: Cells, column: str, one: str, other: str) -> str:
    a, b = (found.values(column, what, "accuracy") for what in (one, other))
    return spread([a[seed] - b[seed] for seed in a if seed in b], sign=True)


if __name__ == "__main__":
    main()
