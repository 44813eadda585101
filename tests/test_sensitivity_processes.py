"""A sweep that is killed, or spread over processes: real ones, started by torchrun, on gloo."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur import processes
from secateur.measurement import accuracy
from test_sensitivity import images, net, scores

HERE = Path(__file__).parent


def run(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")}
    command = [sys.executable, *launch, str(Path(__file__)), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def test_killed_and_gone_on_with_by_two_processes(tmp_path: Path) -> None:
    """Killed hard in the middle, then two processes go on: the same file, to the byte, as in one go."""
    file = tmp_path / "s.json"
    process = run("slow", file)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not file.exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = file.read_text()
    assert "null" in begun
    said = finished(run("quick", file, processes=2))
    found = sc.sensitivity(net("residual"), images()[0][0][:1], lambda network: accuracy(network, images()))
    assert sc.Sensitivity.from_json(file.read_text()) == found
    assert said.count(json.dumps(scores(found))) == 2  # both have the whole
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_one_of_two_processes_fails(tmp_path: Path) -> None:
    process = run("fails", tmp_path / "s.json", processes=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "the sweep failed in process 1: BadRequest: evaluate returned nan for" in said


def main(work: str, file: Path) -> None:
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    data = images()

    def evaluate(network: nn.Module) -> float:
        time.sleep(0.1 if work == "slow" else 0)
        return math.nan if work == "fails" and processes.rank() == 1 else accuracy(network, data)

    found = sc.sensitivity(net("residual"), data[0][0][:1], evaluate, path=file)
    print(json.dumps(scores(found)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
