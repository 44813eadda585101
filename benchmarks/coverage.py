"""Which networks can be pruned: every one of a literal list, or (``--all``) one of every family of the libraries.

    python benchmarks/coverage.py                    the list; results/coverage.json and coverage.md
    python benchmarks/coverage.py --all              every family; results/coverage_all.json and coverage_all.md
    python benchmarks/coverage.py --only timm:resnet26d,torchvision:vit_b_16 --again

Each network, untrained and with nothing in it that could hide a mistake (``common.randomise_``), is captured once and
pruned by L1 norm at 50 % of every group and at random ratios from 0 to 0.9. Each result must obey the law in float64 on
fresh inputs of batch 1 and 3, run in float32 at both, and train every parameter that the dense network trains. A
convolution has shrunk if at most 55 % of its output or input channels are left at 50 %; none is left out of the count,
heads neither. A network already in the result file is not tried again unless asked, so a run can be interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

import common
import families
import peer
import secateur as sc
from common import RESULTS, Row

NETWORKS: dict[str, bool] = {
    "torchvision:alexnet": True,
    "torchvision:vgg16_bn": True,
    "torchvision:resnet18": True,
    "torchvision:resnet50": True,
    "torchvision:resnext50_32x4d": True,
    "torchvision:densenet121": True,
    "torchvision:googlenet": True,
    "torchvision:inception_v3": True,
    "torchvision:mobilenet_v2": True,
    "torchvision:mobilenet_v3_large": True,
    "torchvision:squeezenet1_1": True,
    "torchvision:shufflenet_v2_x1_0": True,
    "torchvision:efficientnet_b0": True,
    "torchvision:regnet_y_400mf": True,
    "torchvision:convnext_tiny": True,
    "torchvision:deeplabv3_resnet50": True,
    "torchvision:lraspp_mobilenet_v3_large": True,
    "torchvision:vit_b_16": False,
    "torchvision:swin_t": False,
    "timm:resnet26d": True,
    "timm:resnest14d": True,
    "timm:res2net50_14w_8s": True,
    "timm:skresnet18": True,
    "timm:ghostnet_100": True,
    "timm:hrnet_w18_small": True,
    "timm:dla34": True,
    "timm:cspdarknet53": True,
    "timm:cspresnet50": True,
    "timm:ese_vovnet19b_dw": True,
    "timm:repvgg_a0": True,
    "timm:mobileone_s0": True,
    "timm:convnextv2_atto": True,
    "timm:efficientnet_lite0": True,
    "timm:mobilenetv4_conv_small": True,
    "timm:fastvit_t8": True,
    "timm:edgenext_xx_small": False,
    "timm:mobilevit_xxs": False,
    "timm:levit_128s": False,
    "timm:nf_resnet26": True,
    "timm:dpn48b": True,
    "timm:dpn68": True,
    "timm:tresnet_m": True,
    "timm:poolformer_s12": True,
    "timm:rexnet_100": True,
    "timm:ecaresnet26t": True,
    "timm:mixnet_s": True,
    "timm:gcresnext26ts": True,
    "timm:pnasnet5large": True,
}
"""Network -> whether it is a pure CNN: no attention between positions, so nine convolutions in ten must shrink."""

CPU_S = 900
PEER_CPU_S = 120
COLUMNS = (
    "network",
    "library",
    "capture s",
    "groups",
    "locked",
    "tier 50 % / random",
    "convs shrunk",
    "linear layers shrunk",
    "law, worst of four",
    "batch 1, 3",
    "backward",
    "Torch-Pruning",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="one network of every family of timm and torchvision")
    parser.add_argument("--only", default="", help="only these networks, separated by commas")
    parser.add_argument("--again", action="store_true", help="also those that are in the result file already")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    options = parser.parse_args(arguments)
    common.prepare()
    stem = "coverage_all" if options.all else "coverage"
    wanted = families.smallest_of_each() if options.all else dict(NETWORKS)
    only = [name for name in options.only.split(",") if name]
    for name in only:
        wanted.setdefault(name, False)
    path = RESULTS / f"{stem}.json"
    rows: dict[str, Row] = json.loads(path.read_text())["networks"] if path.exists() else {}
    if not only:  # a network that left the list leaves its result too
        rows = {name: row for name, row in rows.items() if name in wanted}
    command = f"python benchmarks/coverage.py{' --all' if options.all else ''}"
    names = [name for name in wanted if not only or name in only]
    for name in names:
        if options.again or rows.get(name, {}).get("version") != sc.__version__:
            rows[name] = try_network(name, pure=wanted[name])
            keep(stem, command, rows, wanted)
            print(" | ".join(cells(name, rows[name])), flush=True)
    if not (options.all or options.no_peer):
        for name in names:
            if options.again or not rows[name].get("peer"):
                rows[name]["peer"] = try_peer(name)
                keep(stem, command, rows, wanted)
                print(f"Torch-Pruning: {name}: {rows[name]['peer']['verdict']}", flush=True)
    print("\n" + table(rows, plain=True))
    print(summary(rows))
    return 0 if all(good(rows[name]) for name in names) else 1


def try_network(name: str, *, pure: bool) -> Row:
    row = common.in_process(lambda: common.check_network(name, families.SIZES.get(name), pure=pure), cpu_s=CPU_S)
    return {"name": name, "version": sc.__version__, "pure": pure, **row}


def try_peer(name: str) -> Row:
    found = common.in_process(lambda: peer.prune(name, families.SIZES.get(name)), cpu_s=PEER_CPU_S)
    return found if "verdict" in found else {"verdict": found["error"][:100]}


def good(row: Row) -> bool:
    return "error" not in row and not row["problems"]


def keep(stem: str, command: str, rows: Mapping[str, Row], order: Mapping[str, bool]) -> None:
    """Both result files, rows in the order of the list."""
    ordered = {name: rows[name] for name in [*order, *rows] if name in rows}
    head = common.header(command)
    common.write_json(RESULTS / f"{stem}.json", {"header": head, "networks": ordered})
    text = f"# Coverage\n\n{common.head_of(head)}\n{summary(ordered)}\n\n{table(ordered)}"
    failed = {name: row for name, row in ordered.items() if not good(row)}
    if failed:
        lines = [f"- {name}: {row.get('error') or '; '.join(row['problems'])}" for name, row in failed.items()]
        text += "\n## Exceptions\n\n" + "\n".join(lines) + "\n"
    common.write(RESULTS / f"{stem}.md", text)


def cells(name: str, row: Row) -> list[str]:
    """One row of the table."""
    library, _, short = name.partition(":")
    peer_says = row.get("peer", {}).get("verdict", "")
    if "error" in row:
        return [short, library, *["-"] * 7, row["error"][:80], "-", peer_says]
    half, random = row["half"], row["random"]
    law = max(*half["law"].values(), *random["law"].values())
    batches = [why for found in (half, random) for why in found["batches"].values() if why]
    backward = [found["backward"] for found in (half, random) if found["backward"]]
    return [
        short + ("" if NETWORKS.get(name, True) else " (attention)"),
        library,
        f"{row['capture_s']:.1f}",
        str(row["groups"]),
        str(row["locked"]),
        f"{half['tier']} / {random['tier']}",
        f"{half['convs_shrunk']}/{half['convs']}",
        f"{half['linears_shrunk']}/{half['linears']}",
        f"{law:.0e}" + (" (casts to float32)" if half["casts"] or random["casts"] else ""),
        "; ".join(dict.fromkeys(batches))[:80] or "ok",
        "; ".join(dict.fromkeys(backward))[:80] or "ok",
        peer_says,
    ]


def table(rows: Mapping[str, Row], *, plain: bool = False) -> str:
    found = [cells(name, row) for name, row in rows.items()]
    if not plain:
        return common.markdown(COLUMNS, found)
    widths = [max(len(line[i]) for line in [COLUMNS, *found]) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [COLUMNS, *found]]
    return "\n".join(line.rstrip() for line in lines)


def summary(rows: Mapping[str, Row]) -> str:
    done = [row for row in rows.values() if "error" not in row]
    convs = sum(row["half"]["convs"] for row in done if row["pure"])
    shrunk = sum(row["half"]["convs_shrunk"] for row in done if row["pure"])
    tiers = [row["half"]["tier"] for row in done]
    text = f"{sum(good(row) for row in rows.values())} of {len(rows)} networks: all that is promised holds."
    if convs:
        text += f" Convolutions shrunk at 50 % in pure CNNs: {shrunk} of {convs} ({100 * shrunk / convs:.1f} %)."
    text += " At 50 %: " + ", ".join(f"{tiers.count(t)} by {t}" for t in ("module", "attributes", "graph")) + "."
    peers = [row["peer"]["verdict"] for row in rows.values() if "peer" in row]
    if peers:
        text += f" Torch-Pruning: {peers.count('ok')} of {len(peers)} ok."
    return text


if __name__ == "__main__":
    raise SystemExit(main())
