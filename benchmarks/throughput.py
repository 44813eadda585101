"""Images a second of our training loop beside a bare PyTorch loop on the same network and data.

    python benchmarks/throughput.py [--steps 20] [--rounds 7] [--batch 128] [--network zoo:resnet20]

ResNet-20 on random images of 1x28x28 that lie in memory, SGD with Nesterov's momentum, cross-entropy, float32. The bare
loop is forward, loss, backward, step, and looks at no loss; ours is ``fit_``, all of a call of it: what it sets up,
checks, counts, schedules and cleans away. The two take turns, and change places every round; each round is one epoch of
so many steps, after one that is not counted. On a CPU there is one thread, and times are processor time, so that other
work on the machine disturbs them little; on a GPU they are wall-clock times, with all its work waited for.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch
from torch import Tensor, nn

import common
from common import RESULTS, Row
from secateur.recover import Run, Training, fit_
from secateur.zoo import names

Batches = list[tuple[Tensor, Tensor]]
LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--network", default="zoo:resnet20")
    options = parser.parse_args(arguments)
    common.prepare()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(common.SEED)
    model = names.build(options.network, in_channels=1).to(device)
    data = [
        (torch.randn(options.batch, 1, 28, 28, device=device), torch.randint(10, (options.batch,), device=device))
        for _ in range(options.steps)
    ]
    loops: dict[str, Callable[[nn.Module, Batches], None]] = {"bare": bare, "fit_": ours}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(options.rounds + 1):
        for name in sorted(loops, reverse=bool(number % 2)):
            taken = timed(loops[name], copy.deepcopy(model), data, device)
            if number:
                times[name].append(taken)
            print(f"round {number}: {name} {options.batch * options.steps / taken:.0f} images/s", flush=True)
    row = summary(times, options.batch * options.steps)
    command = f"python benchmarks/throughput.py --steps {options.steps} --rounds {options.rounds}"
    command += f" --batch {options.batch} --network {options.network}"
    head = common.header(command)
    if device.type == "cuda":
        head |= {"device": torch.cuda.get_device_name(), "times": "wall-clock seconds"}
    common.write_json(RESULTS / "throughput.json", {"header": head, "seconds": times, **row})
    text = report(row, options.steps, options.batch)
    common.write(RESULTS / "throughput.md", f"# Training throughput\n\n{common.head_of(head)}\n{text}")
    print("\n" + text)
    return 0


def bare(model: nn.Module, data: Batches) -> None:
    """The loop that anybody would write."""
    options = {"momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, **options)
    model.train()
    for inputs, targets in data:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ours(model: nn.Module, data: Batches) -> None:
    how = Training(epochs=1, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    fit_(model, data, how, run=Run(progress=lambda done, total, facts: None))


def timed(loop: Callable[[nn.Module, Batches], None], model: nn.Module, data: Batches, device: torch.device) -> float:
    if device.type == "cpu":
        return common.timed(lambda: loop(model, data))[1]
    torch.cuda.synchronize()
    start = time.perf_counter()
    loop(model, data)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(times: dict[str, list[float]], images: int) -> Row:
    """Medians, and the ratio: the median over the rounds of bare to ours, which ran one after the other."""
    ratios = [bare / ours for bare, ours in zip(times["bare"], times["fit_"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "images_per_s": {name: round(images / median(taken), 1) for name, taken in times.items()},
        "ratio": round(median(ratios), 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "rounds": len(ratios),
    }


def report(row: Row, steps: int, batch: int) -> str:
    speeds, (low, high) = row["images_per_s"], row["ratio_quartiles"]
    table = common.markdown(
        ["loop", "images/s"], [["bare PyTorch", f"{speeds['bare']:.0f}"], ["`fit_`", f"{speeds['fit_']:.0f}"]]
    )
    spread = f"(quartiles {100 * low:.1f} to {100 * high:.1f} %)"
    return (
        f"{table}\n`fit_` reaches **{100 * row['ratio']:.1f} %** of the bare loop's throughput: the median of "
        f"{row['rounds']} rounds of {steps} steps of {batch} images {spread}.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
