"""Several processes give what one gives: real ones, started by torchrun, on gloo. One launch runs many cases."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from secateur import processes
from secateur.errors import BadRequest
from secateur.measurement import accuracy
from secateur.recover import Hooks, Run, Training, fit_, join_processes
from training_cases import Numbered, Shuffled, blobs, images, net

HERE = Path(__file__).parent
# ragged: 50 examples by 8 leave 2, by 7 leave 1 (one process then has none)
HOW: dict[str, Any] = {"epochs": 2, "lr": 0.05}
CASES: dict[str, tuple[str, Any, Training]] = {
    "group norm, ragged": ("group", Numbered, Training(**HOW, ema=0.9)),
    "an empty part": ("group", lambda: Numbered(batch=7), Training(**HOW)),
    "an empty part left out": ("group", lambda: Numbered(batch=7, skips=True), Training(**HOW)),
    "frozen batch norm": ("batch", lambda: blobs(50, batch=8), Training(**HOW, freeze_norms=True)),
    "accumulation, clipping": ("group", Numbered, Training(**HOW, accumulate=3, clip=0.05)),
    "shuffled by torch": ("group", Shuffled, Training(**HOW, optimizer="adamw")),
    "a loader": (
        "group",
        lambda: DataLoader(TensorDataset(*images(50)), 8, shuffle=True),
        Training(**HOW, label_smoothing=0.1, schedule="one-cycle"),
    ),
}


def penalty(model: torch.nn.Module) -> torch.Tensor:
    return 1e-2 * model[0].weight.square().sum()  # type: ignore[index, operator, union-attr]


def train(name: str) -> tuple[list[torch.Tensor], Any]:
    norm, data, training = CASES[name]
    model, gradients = net(norm), []
    hooks = Hooks(penalty=penalty, after_backward=lambda m: gradients.append(m[0].weight.grad.clone()))  # type: ignore[index, union-attr]
    history = fit_(model, data(), training, hooks=hooks, evaluate=lambda m: accuracy(m, blobs(24)))
    return [*(t.clone() for t in model.state_dict().values()), torch.stack(gradients)], history


def launch(work: str, folder: Path) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *run, str(HERE / "test_distributed.py"), work, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: everything that does not die, in one launch."""
    path = tmp_path_factory.mktemp("two")
    launch("everything", path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(name: str, folder: Path) -> None:
    tensors, history = train(name)
    for process in (0, 1):
        theirs = load_file(folder / f"{name}-{process}.safetensors")
        for index, tensor in enumerate(tensors):
            torch.testing.assert_close(theirs[str(index)], tensor, rtol=1e-6, atol=1e-6)
        told = json.loads((folder / f"{name}-{process}.json").read_text())
        for (loss, right, score), epoch in zip(told, history, strict=True):
            assert (loss, right, score) == pytest.approx((epoch.loss, epoch.train_accuracy, epoch.score), rel=1e-6)


def test_batch_norm_ends_alike_everywhere(folder: Path) -> None:
    first, second = (load_file(folder / f"batch-{process}.safetensors") for process in (0, 1))
    assert len(first) > 5
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    alone = net("batch")
    fit_(alone, Numbered(), Training(**HOW, mixup=0.3))
    assert not torch.equal(alone[1].running_mean, first["1.running_mean"])  # statistics are those of each part


def test_only_the_main_process_writes_and_speaks(folder: Path) -> None:
    told = [json.loads((folder / f"told-{process}.json").read_text()) for process in (0, 1)]
    assert told[0] == {"progress": 14, "log": 2, "accuracy": told[1]["accuracy"]}
    assert told[1]["progress"] == told[1]["log"] == 0
    left = list((folder / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step-000014-epoch"]


def test_interrupted_and_resumed(folder: Path) -> None:
    whole, cut = (load_file(folder / f"{name}-0.safetensors") for name in ("batch", "resumed"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_what_cannot_be_shared_is_refused_everywhere(folder: Path) -> None:
    for process in (0, 1):
        text = (folder / f"refused-{process}.txt").read_text()
        assert "a batch of 1 cannot be shared by 2 processes\n  do: use larger batches" in text
        assert "the loss does not depend on 'idle', and several processes cannot train" in text
        assert "the loss is nan at step 4 of 14 (epoch 1" in text


# ------------------------------------------------------------------------------- what the processes do


def everything(folder: Path) -> None:
    join_processes()
    me = processes.rank()
    for name in CASES:
        tensors, history = train(name)
        save({str(i): t for i, t in enumerate(tensors)}, folder / f"{name}-{me}.safetensors")
        told = [(epoch.loss, epoch.train_accuracy, epoch.score) for epoch in history]
        (folder / f"{name}-{me}.json").write_text(json.dumps(told))
    told = {"progress": 0, "log": 0}

    def count(kind: str) -> Any:
        def add(*arguments: object) -> None:
            told[kind] += 1

        return add

    how = Training(**HOW, mixup=0.3)
    model = net("batch", dropout=0.2)
    # a checkpoint makes the buffers alike: both runs must have the same ones
    run = Run(folder / "checkpoints", every=3, progress=count("progress"), log=count("log"))
    fit_(model, Numbered(), how, run=run)
    save(model.state_dict(), folder / f"batch-{me}.safetensors")
    mine = images(24)[0][processes.part(24)], images(24)[1][processes.part(24)]
    right = accuracy(model, [mine], reduce=True)
    assert right == accuracy(model, blobs(24, batch=24))
    (folder / f"told-{me}.json").write_text(json.dumps({**told, "accuracy": right}))
    resumed(folder, how)
    refused(folder)


def resumed(folder: Path, how: Training) -> None:
    """One process alone is asked to end (in step 5): both do, after the same step, and both go on."""
    import signal

    def press(model: torch.nn.Module) -> None:
        steps.append(1)
        if len(steps) == 5 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)

    steps: list[int] = []
    model = net("batch", dropout=0.2)
    run = Run(folder / "cut", every=3)
    with pytest.raises(KeyboardInterrupt, match="after step 6 of 14"):
        fit_(model, Numbered(), how, hooks=Hooks(after_backward=press), run=run)
    model = net("batch", dropout=0.2)
    fit_(model, Numbered(), how, hooks=Hooks(after_backward=press), run=run)
    save(model.state_dict(), folder / f"resumed-{processes.rank()}.safetensors")


def refused(folder: Path) -> None:
    said = []
    idle = net("group")
    idle.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
    poisoned = [(x if i != 3 or not processes.is_main() else x * torch.nan, y) for i, (x, y) in enumerate(blobs(56, 8))]
    for model, data in ((net("group"), blobs(49, batch=8)), (idle, blobs()), (net("group"), poisoned)):
        try:
            fit_(model, data, Training(**HOW))
        except BadRequest as error:
            said.append(str(error))
    (folder / f"refused-{processes.rank()}.txt").write_text("\n".join(said))


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
