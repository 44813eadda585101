"""The demo's stages on real digits, and the whole of it cut short."""

from pathlib import Path

import pytest
import torch

from secateur import demo
from secateur.artifact import load
from secateur.recover import Training


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    return demo.load_digits(seed=0)


def test_split_is_stratified_and_disjoint(digits: demo.Digits) -> None:
    parts = [digits.train, digits.validation, digits.test]
    assert [len(part.digits) for part in parts] == [1257, 180, 360]
    for part in parts:
        share = torch.bincount(part.digits, minlength=10) / len(part.digits)
        assert share.min() > 0.08
        assert share.max() < 0.12
    rows = torch.cat([part.images.flatten(1) for part in parts])
    assert len(torch.unique(rows, dim=0)) >= 1790  # the data themselves hold hardly any twins
    assert torch.equal(digits.test.images, demo.load_digits(seed=0).test.images)
    assert not torch.equal(digits.test.images, demo.load_digits(seed=1).test.images)


def test_batches_cover_everything_once_and_shift_only_for_training(digits: demo.Digits) -> None:
    seen = torch.cat([targets for _, targets in digits.train])
    assert torch.equal(torch.bincount(seen), torch.bincount(digits.train.digits))
    assert len(list(digits.train)) == len(digits.train)
    assert torch.equal(torch.cat([images for images, _ in digits.test]), digits.test.images)
    torch.manual_seed(0)
    moved = digits.train._moved(digits.train.images[:32])
    assert moved.shape == (32, 3, 16, 16)
    inner = moved[:, :, 4:12, 4:12]
    shifts = [digits.train.images[:32, :, 4 + y : 12 + y, 4 + x : 12 + x] for y in range(-2, 3) for x in range(-2, 3)]
    assert all(any(torch.equal(inner[i], shift[i]) for shift in shifts) for i in range(32))
    assert not torch.equal(moved, digits.train.images[:32])


def test_whole_demo_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SIZE", 8)
    monkeypatch.setenv("COLUMNS", "80")
    rows = demo.run(tmp_path / "out", training=Training(epochs=2, lr=0.1), tuning=Training(epochs=1, lr=0.05))
    assert [row.name for row in rows] == ["dense", "pruned", "pruned + fine-tuned"]
    dense, pruned, tuned = rows
    assert 0.495 * dense.macs <= pruned.macs <= 0.5 * dense.macs
    assert (pruned.macs, pruned.params) == (tuned.macs, tuned.params)
    assert pruned.params < dense.params
    assert all(row.size and row.latency_ms and row.accuracy is not None for row in rows)
    assert tuned.size < dense.size  # type: ignore[operator]
    assert tuned.accuracy > 0.3  # type: ignore[operator]

    out = capsys.readouterr().out
    assert "pruned + fine-tuned" in out
    assert "…" not in out
    assert "test images" in out
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        "dense.safetensors",
        "pruned",
        "report.html",
        "dense.onnx",
        "pruned.onnx",
        "pruned-fine-tuned.onnx",
    }
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("<svg") == 3
    assert "layer3.2.conv2" in report
    again = load(tmp_path / "out" / "pruned", demo.build(demo.MODEL))
    assert sum(p.numel() for p in again.parameters()) == tuned.params
