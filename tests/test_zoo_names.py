"""A name becomes a model and its inputs, or says why not; a torchvision that does not fit torch still imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur.zoo
from secateur.errors import BadRequest, MissingExtra
from secateur.zoo import torchvision_shim
from secateur.zoo.names import build, example_inputs
from secateur.zoo.torchvision_shim import import_torchvision

# the machine that runs this may have a torchvision that does not match its torch
pytestmark = pytest.mark.filterwarnings("ignore::secateur.zoo.torchvision_shim.TorchvisionMismatch")


def test_torchvision_and_timm_by_name() -> None:
    model = build("torchvision:squeezenet1_1", num_classes=7)
    (x,) = example_inputs("torchvision:squeezenet1_1", model)
    assert x.shape == (1, 3, 224, 224)
    assert model.eval()(x).shape == (1, 7)
    model = build("timm:resnet10t", in_chans=1, num_classes=5)
    (x,) = example_inputs("timm:resnet10t", model, batch=2)
    assert x.shape == (2, 1, 176, 176)
    assert model.eval()(x).shape == (2, 5)


def test_torchvision_fetches_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("tried to download"))
    with torch.device("meta"):
        model = build("torchvision:deeplabv3_mobilenet_v3_large")
    assert example_inputs("torchvision:deeplabv3_mobilenet_v3_large", model)[0].shape == (1, 3, 224, 224)


def test_example_inputs_follow_the_model() -> None:
    model = build("zoo:resnet20", in_channels=1).double()
    (x,) = example_inputs("zoo:resnet20", model)
    assert (x.shape, x.dtype) == ((1, 1, 32, 32), torch.float64)
    assert torch.equal(x, example_inputs("zoo:resnet20", model)[0])
    (x,) = example_inputs("zoo:resnet20", model, shape=(1, 8, 8), batch=3)
    assert x.shape == (3, 1, 8, 8)
    assert [tuple(t.shape) for t in example_inputs("torchvision:inception_v3", nn.Linear(1, 1))] == [(1, 3, 299, 299)]
    assert len(example_inputs("torchvision:raft_small", nn.Linear(1, 1))) == 2
    with pytest.raises(BadRequest, match="give shape="):
        example_inputs("my.nets:net", nn.Linear(1, 1))
    with pytest.raises(BadRequest, match="must be positive"):
        example_inputs("zoo:resnet20", model, shape=(1, 0, 8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zoo:resnet65", {}, "the zoo has no 'resnet65'; did you mean 'resnet"),
        ("zoo:resnet20", {"clases": 3}, "no option 'clases'; did you mean 'classes'"),
        ("torchvision:resnet51", {}, "torchvision has no model 'resnet51'; did you mean 'resnet"),
        ("torchvision:resnet18", {"nope": 1}, r"building torchvision:resnet18\(nope=1\) raised TypeError"),
        ("timm:efficientnet_light0", {}, "timm has no model 'efficientnet_light0'; did you mean 'efficientnet_lite0'"),
        ("timm:hf-hub:someone/some", {}, "timm has no model"),
        ("resnet56", {}, "'zoo:NAME'.*; did you mean 'zoo:resnet56'"),
        ("../nets.py:net", {}, "is no model's name: write 'zoo:NAME'"),
        ("no_such_package.nets:net", {}, "there is no module 'no_such_package'.*\n.*PYTHONPATH"),
        ("torch.nn:Conv3", {}, "has no function 'Conv3'; did you mean 'Conv3d'"),
        ("torch:float32", {}, "cannot be called by the name 'float32'"),
        ("torch.nn:Linear", {}, r"building torch.nn:Linear\(\) raised TypeError"),
        ("collections:OrderedDict", {}, "returned OrderedDict, not a torch.nn.Module"),
    ],
)
def test_names_that_mean_nothing(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        build(name, **options)


def test_own_function_is_imported_only_if_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(3, 4, 1)\n")
    (tmp_path / "broken_nets.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadRequest, match="would import code from 'own_nets'"):
        build("own_nets:net", allow_import=False)
    assert "own_nets" not in sys.modules
    assert build("zoo:resnet20", allow_import=False)
    assert isinstance(build("own_nets:net"), nn.Conv2d)
    with pytest.raises(BadRequest, match="importing 'broken_nets' raised ZeroDivisionError"):
        build("broken_nets:net")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"{library} .*\n.*pip install 'secateur\[zoo\]'"):
        build(f"{library}:resnet18")


def python(code: str, *flags: str) -> str:
    source = str(Path(secateur.zoo.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run([sys.executable, *flags, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_fresh_import_works_and_warns_at_most_once() -> None:
    """And the zoo itself needs neither torchvision nor timm."""
    code = """
import sys, warnings
import secateur.zoo.names, secateur.zoo.weights
assert not {"torchvision", "timm"} & set(sys.modules)
try:
    import torchvision; fits = True
except RuntimeError: fits = False
sys.modules.pop("torchvision", None)
from secateur.zoo.torchvision_shim import import_torchvision
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = import_torchvision(), import_torchvision()
assert first is second and first.models.resnet18
own = [str(w.message) for w in caught if w.category.__name__ == "TorchvisionMismatch"]
assert len(own) == (0 if fits else 1), own
assert fits or "install a matching pair" in own[0]
try: first.ops.nms(__import__("torch").rand(2, 4), __import__("torch").rand(2), .5); works = True
except (RuntimeError, NotImplementedError): works = False
assert works == fits
print("fine")
"""
    assert python(code) == "fine\n"


def test_shim_acts_on_that_failure_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::roi_align does not exist")

    before = list(torchvision_shim._declared)
    monkeypatch.setattr(torchvision_shim.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="roi_align"):
        import_torchvision()
    assert torchvision_shim._declared == before
