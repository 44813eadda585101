"""Speed of FPGM's scores: all convolutions of ResNet-50, one thread, float32 weights.

Beside it the function that the paper's authors released, ``get_filter_similar``, done again here with the same calls
(SciPy's ``cdist``, NumPy's ``argsort``), on the same layers in interleaved rounds; and what both choose at 40 %. Then
the memory that one layer of 4,096 filters takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
import torch
from scipy.spatial import distance
from torch import Tensor, nn

from common import RESULTS, SEED, Row, head_of, header, in_process, markdown, prepare, write, write_json
from secateur.core import GroupView
from secateur.criteria import CRITERIA, fpgm_with
from secateur.zoo import names

FILE = RESULTS / "fpgm_speed.json"
RATIO = 0.4
OTHERS = ("fpgm_mix", "fpgm_l1", "fpgm_cosine", "geometric_median", "similarity", "whc", "l2")
NEAR_TIE = 1e-9
"""Sums that differ by less than this fraction are a near-tie: in float64, another order of summing may turn it."""


def layers(network: str) -> list[tuple[str, Tensor]]:
    torch.manual_seed(SEED)
    model = names.build(network)
    return [(n, m.weight.detach()) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def shown(weight: Tensor) -> GroupView:
    filters = weight.flatten(1)
    return GroupView("layer", filters, filters[:, :0], filters[:, :0])


def released(weight: Tensor, compress_rate: float, distance_rate: float) -> np.ndarray:
    """Which filters the authors' function masks by distance: after those of small norms are put aside (none, at a
    ``compress_rate`` of 1), the smallest column sums of the matrix of distances among the others."""
    by_norm = int(weight.shape[0] * (1 - compress_rate))
    by_distance = int(weight.shape[0] * distance_rate)
    vectors = weight.reshape(weight.shape[0], -1)
    norms = torch.norm(vectors, 2, 1).cpu().numpy()
    large = norms.argsort()[by_norm:]
    left = torch.index_select(vectors, 0, torch.from_numpy(large)).cpu().numpy()
    apart = distance.cdist(left, left, "euclidean")
    similar = np.sum(np.abs(apart), axis=0)
    return np.sort(large[similar.argsort()[:by_distance]])


def ours(weight: Tensor) -> np.ndarray:
    """What goes by our scores, as many as the released function masks."""
    scores = CRITERIA["fpgm"](shown(weight)).numpy()
    kept = np.argsort(-scores, kind="stable")[: len(scores) - int(len(scores) * RATIO)]
    return np.setdiff1d(np.arange(len(scores)), kept)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(found: Sequence[tuple[str, Tensor]]) -> list[Row]:
    """Layers whose selections differ: how many filters, and how far apart their exact sums are."""
    rows = []
    for name, weight in found:
        mine, theirs = ours(weight), released(weight, 1.0, RATIO)
        if not np.array_equal(mine, theirs):
            vectors = weight.flatten(1).double().numpy()
            odd = np.setxor1d(mine, theirs)
            sums = distance.cdist(vectors[odd], vectors).sum(1)
            rows.append({"layer": name, "filters": len(odd), "apart": float(np.ptp(sums) / sums.mean())})
    return rows


def timing(network: str, rounds: int) -> Row:
    found = layers(network)
    weights = [weight for _, weight in found]
    mine, theirs, others = [], [], {name: [] for name in OTHERS}
    for _ in range(rounds):
        mine.append(seconds(lambda: [CRITERIA["fpgm"](shown(w)) for w in weights]))
        theirs.append(seconds(lambda: [released(w, 1.0, RATIO) for w in weights]))
        for name in OTHERS:
            others[name].append(seconds(lambda: [CRITERIA[name](shown(w)) for w in weights]))  # noqa: B023
    different = compare(found)
    return {
        "network": network,
        "layers": len(weights),
        "filters": sum(len(w) for w in weights),
        "rounds": rounds,
        "fpgm_s": summary(mine),
        "released_s": summary(theirs),
        "times_faster": round(statistics.median(b / a for a, b in zip(mine, theirs, strict=True)), 1),
        "different": different,
        "near_ties": all(row["apart"] < NEAR_TIE for row in different),
        "others_s": {name: summary(values) for name, values in others.items()},
    }


def summary(values: Sequence[float]) -> Row:
    return {
        "median": round(statistics.median(values), 3),
        "range": [round(min(values), 3), round(max(values), 3)],
    }


# ------------------------------------------------------------------------------------------------------------ memory


def memory(name: str, channels: int = 4096, size: int = 4608) -> Row:
    """What the peak of a process of its own grows by while one layer is scored."""
    criterion = fpgm_with(distance=float("inf")) if name == "fpgm_with(distance=inf)" else CRITERIA[name]
    weight = torch.randn(channels, size, generator=torch.Generator().manual_seed(SEED))
    criterion(shown(weight[:64]))
    before = resident("VmHWM")
    took = seconds(lambda: criterion(shown(weight)))
    return {"criterion": name, "mib": round((resident("VmHWM") - before) / 2**10), "s": round(took, 1)}


def resident(field: str) -> int:
    """KiB of this process that are in memory at most (``VmHWM``)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# -------------------------------------------------------------------------------------------------------------- page


def page(head: Row, found: Row, wide: Sequence[Row]) -> str:
    def cells(row: Row) -> list[object]:
        low, high = row["range"]
        return [f"{row['median']:.2f}", f"{low:.2f} to {high:.2f}"]

    rows = [["FPGM (`fpgm`)", *cells(found["fpgm_s"])], ["released function", *cells(found["released_s"])]]
    rows += [[f"`{name}`", *cells(times)] for name, times in found["others_s"].items()]
    same = f"The selections at {RATIO:.0%} are the same in all {found['layers']} layers."
    if found["different"]:
        far = max(row["apart"] for row in found["different"])
        same = (
            f"The selections at {RATIO:.0%} differ in {len(found['different'])} of {found['layers']} layers, where the "
            f"sums of what one takes and the other leaves are at most {far:.1e} of themselves apart."
        )
    return "\n".join(
        [
            "# FPGM: time and memory\n",
            head_of(head),
            f"## All {found['layers']} convolutions of {found['network']}, {found['filters']:,} filters\n",
            markdown(["criterion", "s", "spread"], rows),
            f"Medians of {found['rounds']} interleaved rounds, one thread, float32 weights. FPGM's scores take "
            f"{found['fpgm_s']['median']:.2f} s, {found['times_faster']} times less than the function that the paper's "
            f"authors released (median of the rounds' ratios). {same}\n",
            "## Memory: 4,096 filters of 4,608 weights (72 MiB)\n",
            markdown(
                ["criterion", "MiB beyond the weights", "s"], [[f"`{r['criterion']}`", r["mib"], r["s"]] for r in wide]
            ),
            "The peak of a process of its own, less what it held before.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    prepare()
    head = header("python benchmarks/fpgm_speed.py") | {"scipy": version("scipy")}
    found = timing(options.network, options.rounds)
    criteria = ("fpgm", *OTHERS[:-1], "fpgm_with(distance=inf)")
    wide = [in_process(lambda: memory(name), cpu_s=900) for name in criteria]  # noqa: B023
    write_json(FILE, {"head": head, "timing": found, "memory": wide})
    write(FILE.with_suffix(".md"), page(head, found, wide))
    print(page(head, found, wide))


if __name__ == "__main__":
    main()
