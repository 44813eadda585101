"""What the four papers print about the size of their networks, beside what we count.

``ROWS`` is the literal table: each row a network of the zoo, how its paper counts, and the figures as printed.
``figures`` counts them anew, and ``python -m secateur.zoo.papers`` prints the outcome as Markdown. Where a printed
and a counted figure differ in the printed digits, ``NOTES`` says why.

Sources: Li et al., ICLR 2017, Table 1; Luo et al. (ThiNet), ICCV 2017, and its authors' README; He et al. (FPGM), CVPR
2019, Tables 1, 2 and 4; Meng et al. (SWP), NeurIPS 2020, and its authors' answers. Networks whose size depends on their
training (SWP's pruned ones) have no row.

FPGM multiplies every width by 1 - ratio and does not round: 0.7 * 16 = 11.2 filters. Those real-valued widths give the
printed figures; a network that exists has whole widths and costs more. Both are counted, the whole ones are the truth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache, partial
from typing import Any

import torch

from secateur.counting import count, fpgm_macs
from secateur.errors import BadRequest, nearest
from secateur.graph import Graph, trace
from secateur.zoo import MODELS
from secateur.zoo.resnet import imagenet_resnet


@dataclass(frozen=True)
class Row:
    """One network in one paper; figures as printed, ``""`` where there is none.

    ``network``: its name in the zoo (or in ``EXTRA``). ``of``: the dense network that the drops, in per cent, refer to.
    ``ratio``: FPGM's fraction of filters removed from every convolution of ``network``.
    """

    id: str
    network: str
    convention: str
    flops: str = ""
    params: str = ""
    of: str = ""
    flops_drop: str = ""
    params_drop: str = ""
    ratio: float = 0.0


@dataclass(frozen=True)
class Figure:
    """A row counted: of one example, drops in per cent of the dense network's count.

    ``flops``, ``params``: integers, of the network that exists. ``paper_flops``, ``paper_flops_drop``: by the paper's
    own rule; the same except where FPGM counts real-valued widths. Parameters are ``None`` where the paper has none.
    ``differs``: which printed figures of the row are not the counted ones rounded to the printed digits.
    """

    row: Row
    flops: int
    flops_drop: float | None
    paper_flops: float
    paper_flops_drop: float | None
    params: int | None
    params_drop: float | None
    differs: tuple[str, ...]


EXTRA = {"resnet34_c": partial(imagenet_resnet, 34, widths=(64, 128, 204, 512), inner=(64, 128, 256, 512))}
"""Li's ResNet-34-C: the outputs of stage 3 pruned by 20 %, identities and projection included; its inside is whole."""

ROWS = (
    # id, network, convention, FLOPs, params, dense network, FLOPs drop, params drop, ratio
    # Li et al. 2017, Table 1
    Row("li/vgg16-cifar", "vgg16_cifar", "li", "3.13e8", "1.5e7"),
    Row("li/vgg16-A", "vgg16_cifar_a", "li", "2.06e8", "5.4e6", "vgg16_cifar", "34.2", "64.0"),
    Row("li/resnet56", "resnet56", "li", "1.25e8", "8.5e5"),
    Row("li/resnet56-A", "resnet56_a", "li", "1.12e8", "7.7e5", "resnet56", "10.4", "9.4"),
    Row("li/resnet56-B", "resnet56_b", "li", "9.09e7", "7.3e5", "resnet56", "27.6", "13.7"),
    Row("li/resnet110", "resnet110", "li", "2.53e8", "1.72e6"),
    Row("li/resnet110-A", "resnet110_a", "li", "2.13e8", "1.68e6", "resnet110", "15.9", "2.3"),
    Row("li/resnet110-B", "resnet110_b", "li", "1.55e8", "1.16e6", "resnet110", "38.6", "32.4"),
    Row("li/resnet34", "resnet34", "li", "3.64e9", "2.16e7"),
    Row("li/resnet34-A", "resnet34_a", "li", "3.08e9", "1.99e7", "resnet34", "15.5", "7.6"),
    Row("li/resnet34-B", "resnet34_b", "li", "2.76e9", "1.93e7", "resnet34", "24.2", "10.8"),
    Row("li/resnet34-C", "resnet34_c", "li", "3.37e9", "2.01e7", "resnet34", "7.5", "7.2"),
    # ThiNet: the README of the ICCV 2017 networks, in Caffe; 50 and 30 from later papers' tables
    Row("thinet/vgg16", "vgg16", "thinet", "30.94B", "138.34M"),
    Row("thinet/conv", "thinet_conv", "thinet", "9.58B", "131.44M", "vgg16"),
    Row("thinet/gap", "thinet_gap", "thinet", "9.34B", "8.32M", "vgg16"),
    Row("thinet/tiny", "thinet_tiny", "thinet", "2.01B", "1.32M", "vgg16"),
    Row("thinet/r50-resnet50", "resnet50_caffe", "thinet", "7.72B", "25.56M"),
    Row("thinet/r50-70", "thinet_resnet50_70", "thinet", "4.88B", "16.94M", "resnet50_caffe"),
    Row("thinet/r50-50", "thinet_resnet50_50", "thinet", "3.41B", "12.38M", "resnet50_caffe"),
    Row("thinet/r50-30", "thinet_resnet50_30", "thinet", "2.20B", "8.66M", "resnet50_caffe"),
    # FPGM, CVPR 2019, Tables 1, 2 and 4; r110-30 is the row of SFP
    Row("fpgm/r20-30", "resnet20", "fpgm", "2.43E7", "", "resnet20", "42.2", "", 0.3),
    Row("fpgm/r20-40", "resnet20", "fpgm", "1.87E7", "", "resnet20", "54.0", "", 0.4),
    Row("fpgm/r32-30", "resnet32", "fpgm", "4.03E7", "", "resnet32", "41.5", "", 0.3),
    Row("fpgm/r32-40", "resnet32", "fpgm", "3.23E7", "", "resnet32", "53.2", "", 0.4),
    Row("fpgm/r56-40", "resnet56", "fpgm", "5.94E7", "", "resnet56", "52.6", "", 0.4),
    Row("fpgm/r110-30", "resnet110", "fpgm", "1.50E8", "", "resnet110", "40.8", "", 0.3),
    Row("fpgm/r110-40", "resnet110", "fpgm", "1.21E8", "", "resnet110", "52.3", "", 0.4),
    Row("fpgm/r18-30", "resnet18", "fpgm", "", "", "resnet18", "41.8", "", 0.3),
    Row("fpgm/r34-30", "resnet34", "fpgm", "", "", "resnet34", "41.1", "", 0.3),
    Row("fpgm/r50-0.7", "resnet50_caffe", "fpgm", "", "", "resnet50_caffe", "42.2", "", 0.3),
    Row("fpgm/r50-0.6", "resnet50_caffe", "fpgm", "", "", "resnet50_caffe", "53.5", "", 0.4),
    Row("fpgm/r101-30", "resnet101_caffe", "fpgm", "", "", "resnet101_caffe", "42.2", "", 0.3),
    Row("fpgm/vgg-uniform20", "vgg16_cifar", "fpgm", "", "", "vgg16_cifar", "35.9", "", 0.2),
    Row("fpgm/vgg-precfg", "vgg16_cifar_a", "fpgm", "", "", "vgg16_cifar", "34.2"),
    # SWP, NeurIPS 2020: the dense networks
    Row("swp/resnet56-base", "resnet56_projection", "swp", "252.56M", "0.86M"),
    Row("swp/vgg16-base", "vgg16_swp", "swp"),
)

CUT = "cut off after the last digit, not rounded"
NOTES = {
    "li/resnet56-B": CUT,
    "li/resnet110-B": CUT,
    "li/resnet34": "the three projections are not counted, nor in -A, -B and -C",
    "li/resnet34-A": CUT,
    "li/resnet34-C": "the paper's own 3.37e9 is 7.4 % less than its 3.64e9 as well",
    "thinet/vgg16": "the README prints 138.24M params, a misprint",
    "thinet/tiny": "at 4 bytes each the params are 5.05 MB, of 2^20 bytes",
    "thinet/r50-resnet50": "stride on the first 1x1, as in Caffe; torchvision's, on the 3x3, gives 8.18B",
    "thinet/r50-30": "2.20B is twice the rounded 1.10 GMAC",
    "fpgm/r20-30": "digits swapped: 42.2 % off 4.055E7 leaves 2.34E7",
    "fpgm/r110-30": "printed for SFP, in the same table",
    "fpgm/r18-30": "the authors' script leaves the projections out and loses an offset, which gives 41.80",
    "fpgm/r34-30": "the authors' script, as for ResNet-18, gives 41.15",
    "fpgm/r101-30": "the printed one looks like ResNet-50's; the authors' script gives 44.10 as well",
    "fpgm/vgg-precfg": "the widths of Li's VGG-16-A, whole numbers",
    "swp/resnet56-base": "FLOPs as the author gave them later (issue 11 of the paper's repository); "
    "the drops of 77.7 and 75.6 % leave 56.3M FLOPs and 0.209M params",
    "swp/vgg16-base": "not printed; the drops of 71.16 and 92.66 % leave 180.9M FLOPs and 1.081M params",
}
"""By row: why a printed figure differs from the counted one, and what else must be known to compare them."""


def figures(ids: Iterable[str] | None = None) -> list[Figure]:
    """The rows (those of ``ids``, in the table's order; ``None``: all) with what we count.

    Every network is built and captured once in a process: 1 to 10 s each, all of them about a minute and a half.
    Raises ``BadRequest`` for an id that no row has.
    """
    known = {row.id: row for row in ROWS}
    wanted = set(known) if ids is None else set(ids)
    unknown = sorted(wanted - set(known))
    if unknown:
        raise BadRequest(f"no paper has a row {unknown[0]!r}{nearest(unknown[0], known)}")
    return [_figure(row) for row in ROWS if row.id in wanted]


def agrees(printed: str, value: float) -> bool:
    """Whether ``value`` rounds to ``printed``: ``"2.06e8"``, ``"30.94B"``, ``"0.86M"``, or ``"42.2"`` (half up)."""
    number = printed.upper().replace("B", "E9").replace("M", "E6")
    mantissa, _, exponent = number.partition("E")
    scaled = Decimal(value).scaleb(-int(exponent or 0))
    return scaled.quantize(Decimal(mantissa), ROUND_HALF_UP) == Decimal(mantissa)


def fpgm_width(channels: int, ratio: float) -> int:
    """What is left of ``channels`` filters where FPGM removes ``floor(channels * ratio)``. A small epsilon makes up for
    products that come out below the whole number that they are: 0.1 of 10, computed as (1 - 0.9) of 10, is 1.

    >>> fpgm_width(16, 0.3), fpgm_width(10, 1 - 0.9)
    (12, 9)
    """
    return channels - math.floor(channels * ratio + 1e-9)


def _figure(row: Row) -> Figure:
    exact = _counted(row.network)[row.convention, row.ratio]
    dense = _counted(row.of)[row.convention, 0.0] if row.of else None
    params = None if row.convention == "fpgm" else round(exact["params"])
    flops_drop = paper_drop = params_drop = None
    if dense is not None:
        flops_drop = 100 * (1 - exact["flops"] / dense["flops"])
        paper_drop = 100 * (1 - exact["paper_flops"] / dense["flops"])
        params_drop = None if params is None else 100 * (1 - params / dense["params"])
    pairs = {
        "flops": (row.flops, exact["paper_flops"]),
        "flops_drop": (row.flops_drop, paper_drop),
        "params": (row.params, params),
        "params_drop": (row.params_drop, params_drop),
    }
    return Figure(
        row=row,
        flops=round(exact["flops"]),
        flops_drop=flops_drop,
        paper_flops=exact["paper_flops"],
        paper_flops_drop=paper_drop,
        params=params,
        params_drop=params_drop,
        differs=tuple(n for n, (printed, v) in pairs.items() if printed and not (v is not None and agrees(printed, v))),
    )


@cache
def _counted(network: str) -> Mapping[tuple[str, float], Mapping[str, float]]:
    """All that the rows ask of one network, by convention and ratio; captured once and dropped."""
    build: Callable[..., Any] = EXTRA.get(network) or MODELS[network]
    with torch.random.fork_rng(devices=[]):  # the weights do not matter, the caller's random numbers do
        model = build().eval()
    graph = trace(model, torch.zeros(1, *model.input_size))
    asked = {(r.convention, r.ratio) for r in ROWS if r.network == network}
    asked |= {(r.convention, 0.0) for r in ROWS if r.of == network}
    found: dict[tuple[str, float], Mapping[str, float]] = {}
    for convention, ratio in asked:
        if ratio:
            found[convention, ratio] = _fpgm(graph, ratio)
        else:
            dense = count(graph, convention=convention)
            found[convention, 0.0] = {"flops": dense.flops, "paper_flops": dense.flops, "params": dense.params}
    return found


def _fpgm(graph: Graph, ratio: float) -> dict[str, float]:
    return {
        "flops": fpgm_macs(graph, lambda n: fpgm_width(n, ratio)),
        "paper_flops": fpgm_macs(graph, lambda n: n * (1 - ratio)),
    }


HEAD = """# The papers' figures, recomputed

Made by `python -m secateur.zoo.papers > docs/papers.md`. FLOPs and parameters as each paper counts them (see
`secateur.counting`), of one example; drops in per cent of the dense network. `*`: the printed figure is not the counted
one rounded to the printed digits, and the list at the end says why.
"""
FPGM_HEAD = """
FPGM multiplies every width by 1 - ratio without rounding (0.7 * 16 = 11.2 filters), and so do the columns that stand
beside the printed figures. The last two columns count the network that exists, floor(n * ratio) of n filters gone, as
`secateur run fpgm/ROW` makes it: that is the truth, and in the CIFAR ResNets it saves 2 to 3 points less than printed.
"""
PAPERS = {
    "li": "Li et al., Pruning Filters for Efficient ConvNets (ICLR 2017)",
    "thinet": "Luo et al., ThiNet (ICCV 2017)",
    "fpgm": "He et al., Filter Pruning via Geometric Median (CVPR 2019)",
    "swp": "Meng et al., Pruning Filter in Filter (NeurIPS 2020)",
}


def markdown(found: Iterable[Figure]) -> str:
    """The figures as a Markdown document: a table for each paper, then every difference with its reason."""
    found = list(found)
    parts = [HEAD]
    for paper, title in PAPERS.items():
        parts.append(f"\n## {title}\n" + (FPGM_HEAD if paper == "fpgm" else ""))
        rows = [line(f) for f in found if f.row.convention == paper]
        columns = FPGM_COLUMNS if paper == "fpgm" else COLUMNS
        rule = ["---", "---", *["--:"] * (len(columns) - 2)]
        parts.append("\n" + "\n".join([_join(columns), _join(rule), *rows]) + "\n")
    parts.append("\n## Notes, and where the figures differ\n\n")
    parts += [f"{note(f)}\n" for f in found if f.row.id in NOTES]
    return "".join(parts)


COLUMNS = (
    "row",
    "network",
    "FLOPs",
    "printed",
    "params",
    "printed",
    "FLOPs drop %",
    "printed",
    "params drop %",
    "printed",
)
FPGM_COLUMNS = ("row", "network", "FLOPs", "printed", "drop %", "printed", "FLOPs, whole widths", "drop %")


def line(figure: Figure) -> str:
    """A figure as a line of its paper's table."""
    row = figure.row
    if row.convention == "fpgm":
        return _fpgm_line(figure)
    cells = [row.id.partition("/")[2], row.network]
    for name, value in (
        ("flops", f"{figure.flops:,}"),
        ("params", "" if figure.params is None else f"{figure.params:,}"),
        ("flops_drop", _percent(figure.flops_drop)),
        ("params_drop", _percent(figure.params_drop)),
    ):
        cells += [value, _printed(figure, name)]
    return _join(cells)


def _fpgm_line(figure: Figure) -> str:
    return _join(
        (
            figure.row.id.partition("/")[2],
            figure.row.network,
            f"{figure.paper_flops:,.0f}",
            _printed(figure, "flops"),
            _percent(figure.paper_flops_drop),
            _printed(figure, "flops_drop"),
            f"{figure.flops:,}",
            _percent(figure.flops_drop),
        )
    )


def note(figure: Figure) -> str:
    """A row's note as an item of a list, after what is printed and what is counted where these differ."""
    counted = {
        "flops": f"{figure.paper_flops:,.0f}",
        "flops_drop": f"{_percent(figure.paper_flops_drop)} %",
        "params": f"{figure.params:,}" if figure.params is not None else "",
        "params_drop": f"{_percent(figure.params_drop)} %",
    }
    said = [f"{n.replace('_', ' ')} {counted[n]}, printed {getattr(figure.row, n)}" for n in figure.differs]
    return f"- {figure.row.id}: {'; '.join([*said, NOTES[figure.row.id]])}."


def _printed(figure: Figure, name: str) -> str:
    return getattr(figure.row, name) + ("*" if name in figure.differs else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _join(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the document; says on stderr which network is being counted."""
    for network in dict.fromkeys(row.network for row in ROWS):
        print(f"counting {network}", file=sys.stderr, flush=True)
        _counted(network)
    print(markdown(figures()), end="")


if __name__ == "__main__":
    main()
