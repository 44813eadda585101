"""The tables of ``fpgm.py``, of the cells that are on file; the plots are in ``fpgm_plots.py``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import common
from fpgm_layers import CENTRED
from secateur.schedules import Options
from trials import Cells, spread

RATIOS = (0.4, 0.6)
ROWS = ("random", "l1", "l2", "whc", "fpgm", "geometric_median")
PAIRS = (*[("fpgm", other) for other in ("l1", "l2", "whc", "geometric_median", CENTRED)], ("l1", "l2"))
"""Whose choices are laid beside each other."""
LAYERS: Mapping[str, str] = {
    "resnet20, trained": "ResNet-20, Fashion-MNIST",
    "resnet20, untrained": "ResNet-20, untrained",
    "vgg16, trained": "VGG-16 at a quarter of its widths, Fashion-MNIST",
    "vgg16, untrained": "VGG-16 at a quarter of its widths, untrained",
    "lite0, trained": "EfficientNet-Lite0, ImageNet",
}
LOCKED = ("fpgm", "geometric_median")
"""Criteria of which it is no matter of course that they choose again what was set to zero."""
REGROWN = ("resnet20, trained", "vgg16, trained")
KINDS = (", others", ", depthwise", ", 1 × 1 that narrow")
"""As ``fpgm_layers.kind`` counts them; networks that have the first only are not divided."""
NARROW, FAR = 0.1, 0.5
"""A spread of norms below the first is a small one, a smallest norm above the second (times the largest) is not near 0:
round numbers of ours, the paper names none."""
NETWORKS: Mapping[str, tuple[str, Options]] = {
    "vgg16": ("vgg16", {}),
    "resnet20": ("resnet20", {"residual": "scatter", "constants": "fold"}),
}
"""What is trained, and the options of ``plan`` that go with it: the paper's, where layers are added up."""
TITLES = {
    "vgg16": "VGG-16 at a quarter of its widths",
    "resnet20": 'ResNet-20, `residual="scatter"`, `constants="fold"`',
}
WAYS: Mapping[str, str] = {
    "one-shot": "cut at once, nothing trained",
    "fine-tuned": "cut at once, then fine-tuned",
    "hard": "zeroed after every epoch, hard",
    "soft, then tuned": "zeroed after all epochs but the last, soft, cut, and fine-tuned for that one",
    "soft": "zeroed after every epoch, soft",
    "hard at once": "zeroed before the first step, hard",
}
FEW = ("random", "l2", "fpgm")
MEASURED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "vgg16": {
        "one-shot": ROWS,
        "fine-tuned": ROWS,
        "hard": ROWS[:-1],
        "soft, then tuned": FEW,
        "soft": ("fpgm",),
        "hard at once": ("fpgm",),
    },
    "resnet20": {"one-shot": ROWS, "hard": FEW, "soft, then tuned": ("fpgm",)},
}
"""By network, the ways that it is trained in, and with which criteria: as many as an hour has room for."""
ENDS = {"accuracy": "as training ends", "recalibrated": "batch norms recalibrated"}


def column(network: str, ratio: float, way: str) -> str:
    return f"{network} {ratio} {way}"


def table(found: Cells) -> str:
    return _agreement_table(found) + _conditions_table(found) + _training_tables(found)


# ------------------------------------------------------------------------------------------------------- the layers


def panels(found: Cells) -> Iterator[tuple[str, str, list[str]]]:
    """``(network, title, layers in order)`` for every kind of layer of all networks that are on file."""
    for name, told in LAYERS.items():
        kinds = figures(found, name, "kind")
        for number, what in enumerate(KINDS):
            layers = [layer for layer, kind in kinds.items() if kind == number]
            if layers:
                yield name, told + what * (len({*kinds.values()}) > 1), layers


def figures(found: Cells, name: str, figure: str) -> dict[str, float]:
    """``{layer: figure}`` of the norms, the mean over the seeds."""
    return _layer_means(found, name, "norms", f":{figure}")


def agreement(found: Cells, name: str, one: str, other: str) -> dict[str, float]:
    """``{layer: share of the choice that both make}``, the mean over the seeds."""
    return _layer_means(found, name, f"{one}, {other}", "")


def _layer_means(found: Cells, name: str, what: str, suffix: str) -> dict[str, float]:
    each: dict[str, list[float]] = {}
    for cells in found.found["cells"].values():
        for key, value in cells.get(name, {}).get(what, {}).items():
            if key.endswith(suffix) and key != "seconds":
                each.setdefault(key.removesuffix(suffix), []).append(value)
    return {layer: statistics.fmean(values) for layer, values in each.items()}


def _agreement_table(found: Cells) -> str:
    rows = []
    for name, told, layers in panels(found):
        cells = []
        for pair in PAIRS:
            shares = agreement(found, name, *pair)
            own = [100 * shares[layer] for layer in layers if layer in shares]
            cells.append(f"{statistics.fmean(own):.1f} ({min(own):.0f})" if own else "–")
        rows.append([told, str(len(layers)), *cells])
    if not rows:
        return ""
    return (
        "## Where the choices agree\n\n"
        "Each convolution on its own, 40 % of its filters removed: how many of those that the one removes the other\n"
        "removes too, in %; the mean over layers and seeds, in brackets the layer where it is least. By chance it\n"
        "would be 40. `geometric_median` is the true one; `centred l2`, no criterion but a reference, is the norm of\n"
        "a filter less the mean of all. Per layer: `fpgm_overlap.svg`.\n\n"
        + common.markdown(["", "layers", *map(", ".join, PAIRS)], rows)
    )


def _conditions_table(found: Cells) -> str:
    rows = []
    for name, told, layers in panels(found):
        own = {key: figures(found, name, key) for key in ("spread", "smallest", "held")}
        shares = agreement(found, name, "fpgm", "l2")
        narrow = {layer for layer in layers if own["spread"][layer] < NARROW}
        far = {layer for layer in layers if own["smallest"][layer] > FAR}
        middles = [_middle([values[layer] for layer in layers]) for values in own.values()]
        groups = [narrow & far, {*layers} - narrow - far]
        agreed = [_mean([100 * shares[layer] for layer in group if layer in shares]) for group in groups]
        rows.append([told, *middles, f"{len(narrow)} of {len(layers)}", f"{len(far)} of {len(layers)}", *agreed])
    if not rows:
        return ""
    heads = ["spread", "smallest", "held", "small spread", "smallest far from 0"]
    return (
        "\n## The two conditions of the norm criterion\n\n"
        "*Spread*: standard deviation of a layer's L2 norms over their mean. *Smallest*: the least norm over the\n"
        "largest. *Held*: the share of all squared norms that the 40 % of least norm hold, 40 % where norms say\n"
        "nothing. Medians over the layers, in brackets the range. The conditions are a large spread and a smallest\n"
        f"norm near 0; they fail here where the spread is below {NARROW} and where the smallest norm is above {FAR}\n"
        "of the largest (thresholds of ours). Per layer: `fpgm_norms.svg`.\n\n"
        + common.markdown(["", *heads, "fpgm, l2 agree where both fail, %", "where both hold, %"], rows)
    )


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" if values else "–"


# ----------------------------------------------------------------------------------------------------- the training


def measured(found: Cells, network: str) -> list[str]:
    """The ways that are on file for a network, in order."""
    return [way for way in WAYS if found.names([column(network, ratio, way) for ratio in RATIOS])]


def _training_tables(found: Cells) -> str:
    text = ""
    for network in NETWORKS:
        ways = measured(found, network)
        if not ways:
            continue
        dense = spread([*found.values(f"{network} dense", "dense", "accuracy").values()])
        macs = [spread([*found.values(column(network, ratio, ways[0]), "l1", "macs").values()][:1]) for ratio in RATIOS]
        text += f"\n### {TITLES[network]}\n\nDense: {dense}. MACs left: {', '.join(macs)} %.\n"
        for key, told in ENDS.items():
            own = [way for way in ways if key == "recalibrated" or way != "one-shot"]
            if own:
                text += f"\n{told[0].upper()}{told[1:]}:\n\n" + _accuracies(found, network, own, key)
        text += _changes(found, network)
    if not text:
        return ""
    text += _locked_table(found) + _regrowth_table(found)
    return (
        "\n## What it is worth\n\n"
        "Test accuracy in %, mean ± standard deviation over the seeds, of the network that was cut; every group of\n"
        "filters that the rule lets get narrower loses 40 or 60 % of them (`n - floor(n * ratio)` stay), linear\n"
        "layers lose none.\n\n" + "".join(f"- *{way}*: {told}\n" for way, told in WAYS.items()) + "\n"
        "All but the first train for as many steps, on few images: what is compared is the choice, not what these\n"
        "networks can do.\n" + text
    )


def _accuracies(found: Cells, network: str, ways: Sequence[str], key: str) -> str:
    heads = [f"{way} {100 * ratio:.0f} %" for way in ways for ratio in RATIOS]
    rows = []
    for row in ROWS:
        values = [[*found.values(column(network, r, way), row, key).values()] for way in ways for r in RATIOS]
        if any(values):
            rows.append([row, *map(spread, values)])
    return common.markdown(["", *heads], rows)


def _changes(found: Cells, network: str) -> str:
    """How much of a choice was not in the one before it, epoch by epoch."""
    soft = [(way, row) for way in WAYS if way.startswith("soft") for row in MEASURED[network].get(way, ())]
    columns = [(column(network, ratio, way), row) for ratio in RATIOS for way, row in soft]
    keys = sorted({key for name, row in columns for key in _keys(found, name, row)})
    if not keys:  # hard, what went stays gone by its very rule
        return ""
    rows = []
    for way, row in soft:
        values = [found.values(column(network, r, way), row, key).values() for r in RATIOS for key in keys]
        if any(values):
            rows.append([f"{way}, {row}", *(spread([*own]) for own in values)])
    heads = [f"{100 * ratio:.0f} %, choice {2 + i}" for ratio in RATIOS for i in range(len(keys))]
    return (
        "\nSoft: of the removed filters, those that were not removed by the choice before, in %:\n\n"
        + common.markdown(["", *heads], rows)
    )


def _locked_table(found: Cells) -> str:
    rows = []
    for name, told, layers in panels(found):
        shares = [agreement(found, name, row, "again") for row in LOCKED]
        if all(shares):
            each = [[100 * own[layer] for layer in layers] for own in shares]
            rows.append([told, *[f"{statistics.fmean(own):.1f} ({min(own):.0f})" for own in each]])
    if not rows:
        return ""
    return (
        "\n### What hard zeroing locks in\n\n"
        "Of the 40 % of a layer that a criterion removes, those that it would remove again once they are zero,\n"
        "nothing trained, in %; the mean over layers and seeds, in brackets the layer where it is least. (Hard\n"
        "zeroing keeps what it has chosen in any case; norms and WHC put zeros last by definition.)\n\n"
        + common.markdown(["", *LOCKED], rows)
    )


def _regrowth_table(found: Cells) -> str:
    rows = []
    for name in REGROWN:
        moving, gradient, step = (
            [*found.values(name, "regrowth", key).values()] for key in ("moving", "gradient", "step")
        )
        if moving:
            rows.append(
                [
                    LAYERS[name],
                    spread(moving),
                    *[f"{statistics.fmean(own):{how}}" for own, how in ((gradient, ".0f"), (step, ".2f"))],
                ]
            )
    if not rows:
        return ""
    heads = ["of the zeroed, any gradient reaches, %", "its norm, filters that stay = 1", "one step, their norm = 1"]
    return (
        "\n### What soft zeroing does to the next step\n\n"
        "All convolutions' 40 % of FPGM set to zero at once, one batch in train mode, means over layers and seeds.\n"
        "Behind a batch norm the gradient of a filter of zeros is divided by the root of the norm's eps, not by a\n"
        "deviation: a single step at the rate of this benchmark makes it about as long as the filters that stay. It\n"
        "is a channel like them then, which the network learns to use, and the last choice takes it away. What no\n"
        "gradient reaches lies behind a ReLU whose input is constant and negative.\n\n"
        + common.markdown(["", *heads], rows)
    )


def _keys(found: Cells, column: str, row: str) -> list[str]:
    cells = found.found["cells"].values()
    return [key for own in cells for key in own.get(column, {}).get(row, {}) if key.startswith("changed ")]
