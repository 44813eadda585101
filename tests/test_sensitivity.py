"""The sweep: every score is that of the masked network, whatever was held, and whatever ``evaluate`` does."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import BadArtifact, BadRequest, CannotPrune
from secateur.measurement import accuracy
from secateur.sensitivities import suffix

RATIOS = (0.25, 0.7)


class Residual(nn.Module):
    """A stem, two blocks with in-place activations and sums, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1, bias=False) for _ in range(2))
        self.n = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.b = nn.ModuleList(nn.Conv2d(12, 8, 1) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        for a, n, b in zip(self.a, self.n, self.b, strict=True):
            y = self.relu(n(a(x)))
            x += b(y)
            x = self.relu(x)
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, a max-pool, and a view that lives on behind an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.last = nn.Conv2d(16, 8, 3, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.one(x), self.two(x)], 1)
        flat = y.view(y.shape[0], 16, -1)
        z = F.max_pool2d(F.relu_(y), 2)
        out = self.fc(F.hardswish(self.last(z)).amax((2, 3)))
        return out + flat.sum((1, 2))[:, None] * out.new_tensor([0.1, 0.0, -0.1, 0.0, 0.05])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.fc((x + self.down(F.gelu(self.up(x)))).mean(1))


def chain() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 12, 3), nn.GroupNorm(3, 12), nn.SiLU(), nn.Dropout(0.5), nn.ConvTranspose2d(12, 6, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 9, 10), nn.Sigmoid(), nn.Linear(10, 5))


class Mixed(nn.Module):
    """Examples that have to do with each other: no batch may be taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(F.relu(self.one(x)))
        return self.fc((x - x.mean(0)).amax((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "residual": Residual,
    "concat": Concat,
    "attention": Attention,
    "mixed": Mixed,
}


def net(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = NETS[name]()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    return model.eval()


def images(n: int = 40, batch: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 3, 8, 8, generator=generator)
    targets = torch.randint(5, (n,), generator=generator)
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


def outputs(model: nn.Module, data: Any) -> float:
    """A score that the last bit of an output moves: no two networks have the same."""
    with torch.no_grad():
        return float(sum(model(x).double().mul(torch.arange(1, 6)).sum() for x, _ in data))


def naive(model: nn.Module, found: sc.Sensitivity, score: Callable[[nn.Module], float]) -> list[list[float]]:
    graph = sc.trace(model, images()[0][0][:1])
    plans = [[sc.plan(graph, ratios={c.group: ratio}) for ratio in found.ratios] for c in found.curves]
    with torch.no_grad():
        return [[score(sc.masked(graph, plan)) for plan in row] for row in plans]


def scores(found: sc.Sensitivity) -> list[list[float]]:
    return [list(curve.scores) for curve in found.curves]


@pytest.mark.parametrize("name", NETS)
def test_scores_are_those_of_the_masked_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "PART_BYTES", 1)  # batches are run in eights, where that is right
    model, data = net(name), images()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = sc.sensitivity(model, data[0][0][:1], lambda m: outputs(m, data), ratios=RATIOS)
    assert scores(found) == naive(model, found, lambda m: outputs(m, data))
    assert len({score for row in scores(found) for score in row}) > len(found.curves)
    assert found.dense == pytest.approx(outputs(model, data), rel=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_batches_give_top_1_accuracy() -> None:
    model, data = net("residual"), images()
    found = sc.sensitivity(model, data[0][0][:1], data)
    assert found.dense == accuracy(model, data)
    assert scores(found) == naive(model, found, lambda m: accuracy(m, data))
    assert found.ratios == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    curve = found.curves[0]
    assert (curve.group, curve.channels, curve.stage) == ("stem", 8, "8x8")
    assert curve.keep == (7, 6, 5, 4, 4, 3, 2, 1, 1)  # floor(n (1 - p) + 1e-9), at least 1
    assert curve.scores[3] == curve.scores[4]
    norms = model.a[0].weight.abs().sum((1, 2, 3)).sort(descending=True).values  # type: ignore[index, union-attr]
    assert next(c for c in found.curves if c.group == "a.0").importance == pytest.approx((norms / norms[0]).tolist())


@pytest.mark.parametrize("most", [0, 20_000, 2**30])
def test_the_bound_on_memory_changes_nothing_but_time(most: int) -> None:
    model, data = net("residual"), images()
    found = sc.sensitivity(model, data[0][0][:1], lambda m: outputs(m, data), ratios=(0.5,), max_bytes=most)
    assert scores(found) == naive(model, found, lambda m: outputs(m, data))


def test_evaluate_may_do_as_it_likes_with_the_inputs() -> None:
    """Another order each time, other batches each time, one buffer for all, and outputs that are written into."""
    model = net("residual")
    (inputs, targets), turn = (torch.cat(part) for part in zip(*images(), strict=True)), iter(range(1000))

    def evaluate(network: nn.Module) -> float:
        number, total, buffer = next(turn), 0.0, torch.empty(20, 3, 8, 8)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(number // 2))
        for at in order.split(20 if number % 3 else 9):
            batch = buffer[: len(at)].copy_(inputs[at])
            wrong = network(batch).sigmoid_() - F.one_hot(targets[at], 5)
            total -= float(wrong.double().square().sum())
        return total

    found = sc.sensitivity(model, inputs[:1], evaluate, ratios=RATIOS)
    for mine, theirs in zip(scores(found), naive(model, found, evaluate), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_evaluate_may_do_as_it_likes_with_the_network() -> None:
    """It writes into the weights, casts, copies, computes gradients: the next network is a fresh one all the same."""
    model, data = net("chain"), images()

    def evaluate(network: nn.Module) -> float:
        assert not network.training
        first = outputs(network, data)
        assert outputs(copy.deepcopy(network), data) == first
        x = data[0][0].clone().requires_grad_()
        with torch.enable_grad():
            network(x).sum().backward()
        assert x.grad is not None
        with torch.inference_mode():
            assert outputs(network, data) == first
        with torch.no_grad():
            network.get_parameter("0.weight").mul_(2)
            assert outputs(network, data) != first
        network.double()
        assert network(data[0][0].double()).dtype == torch.float64
        return first

    found = sc.sensitivity(model, data[0][0][:1], evaluate, ratios=RATIOS)
    assert scores(found) == naive(model, found, lambda m: outputs(m, data))


def test_random_networks_and_infinite_activations() -> None:
    class Noisy(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.one, self.two, self.fc, self.noise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5), noise

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(F.relu(self.one(x)), self.noise, training=True) if self.noise else torch.exp(self.one(x))
            return self.fc(F.relu(self.two(x)).amax((2, 3)))

    data = images()
    torch.manual_seed(0)
    noisy = Noisy(0.3).eval()
    found = sc.sensitivity(noisy, data[0][0][:1], lambda m: outputs(m, data), ratios=RATIOS)
    again = sc.sensitivity(noisy, data[0][0][:1], lambda m: outputs(m, data), ratios=RATIOS, max_bytes=0)
    assert scores(found) == scores(again)  # every evaluation starts from the same random state
    infinite = Noisy(0.0).eval()
    with torch.no_grad():
        infinite.one.weight[0] *= 1e-3  # the smallest filter, which goes first
        infinite.one.bias[0] = 200.0  # type: ignore[index]

    def finite(network: nn.Module) -> float:
        return float(torch.isfinite(network(data[0][0])).double().mean())

    swept = sc.sensitivity(infinite, data[0][0][:1], finite, groups="one", ratios=(0.2,))
    assert (swept.dense, swept.curves[0].scores) == (0.0, (1.0,))


def test_a_batch_size_that_the_model_writes_down() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.two(F.relu(self.one(x)))
            return self.fc(x.amax((2, 3)).reshape(2 if x.shape[0] == 2 else x.shape[0], -1))

    torch.manual_seed(0)
    model, data = Fixed().eval(), images()
    found = sc.sensitivity(model, data[0][0][:2], data, ratios=(0.5,))
    plans = [sc.plan(model, data[0][0][:2], ratios={c.group: 0.5}) for c in found.curves]
    assert [c.scores[0] for c in found.curves] == [accuracy(sc.apply(model, plan), data) for plan in plans]


# ------------------------------------------------------------------------------------------- retraining, resuming


def test_retraining_is_that_of_the_small_network() -> None:
    model, data = net("residual"), images()
    sizes = []

    def retrain(small: nn.Module) -> None:
        sizes.append(sum(p.numel() for p in small.parameters()))
        with torch.no_grad():
            small.get_parameter("fc.bias").add_(torch.randn(5))

    def evaluate(network: nn.Module) -> float:
        return outputs(network, data)

    found = sc.sensitivity(model, data[0][0][:1], evaluate, ratios=(0.5,), groups="a.*", retrain=retrain)
    again = sc.sensitivity(model, data[0][0][:1], evaluate, ratios=(0.5,), groups=["a.1"], retrain=retrain)
    assert [c.group for c in found.curves] == ["a.0", "a.1"]
    assert max(sizes) < sum(p.numel() for p in model.parameters())
    assert found.curves[1] == again.curves[0]  # the same randomness, whatever went before
    assert found.curves[0].retrained != found.curves[0].scores
    assert all(len(c.retrained) == 1 for c in found.curves)


def test_a_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    model, data, file = net("residual"), images(), tmp_path / "deep" / "s.json"
    calls: list[int] = []

    def evaluate(network: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return outputs(network, data)

    whole = sc.sensitivity(model, data[0][0][:1], lambda m: outputs(m, data), ratios=RATIOS)
    with pytest.raises(KeyboardInterrupt):
        sc.sensitivity(model, data[0][0][:1], evaluate, ratios=RATIOS, path=file)
    with pytest.raises(BadArtifact, match=r"is not finished: 4 of 7 evaluations are missing\n  do: run the same"):
        sc.Sensitivity.from_json(file.read_text())
    told: list[tuple[int, int, str]] = []
    found = sc.sensitivity(
        model, data[0][0][:1], evaluate, ratios=RATIOS, path=file, progress=lambda *facts: told.append(facts)
    )
    assert len(calls) == 4 + 1 + 4
    assert found == whole == sc.Sensitivity.from_json(file.read_text())
    assert [facts[:2] for facts in told] == [(i, 5) for i in range(6)]
    assert [facts[2] for facts in told] == [
        "the dense network",
        "a.0 without 25%",
        "a.0 without 70%",
        "a.1 without 25%",
        "a.1 without 70%",
        "done",
    ]
    assert sc.sensitivity(model, data[0][0][:1], evaluate, ratios=RATIOS, path=file) == whole
    assert len(calls) == 10  # the dense network, each time
    assert [p.name for p in file.parent.iterdir()] == ["s.json"]


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    model, data, file = net("residual"), images(), tmp_path / "s.json"
    options: dict[str, Any] = {"ratios": (0.5,), "path": file}
    sc.sensitivity(model, data[0][0][:1], data, **options)
    text = file.read_text()

    def refused(match: str, model: nn.Module = model, **changes: Any) -> None:
        with pytest.raises(BadArtifact, match=match):
            sc.sensitivity(model, data[0][0][:1], data, **{**options, **changes})

    refused(
        r"s\.json is the sensitivity of another model: tensor 'stem\.weight' .*\n  do: choose another", net("chain")
    )
    other = net("residual")
    other.fc.bias.data += 1  # type: ignore[union-attr, operator]
    refused(r"is of the same network with other weights\n  do: choose another file, or delete this one", other)
    refused(r"was made with ratios=\[0\.5\], and now it is \[0\.6\]", ratios=(0.6,))
    refused(r"was made with criterion='l1', and now it is 'l2'", criterion="l2")
    refused(r"was made with seed=0, and now it is 1", seed=1)
    refused(r"was made with groups=\['stem', 'a\.0', 'a\.1'\], and now it is \['stem', 'a\.1'\]", exclude="a.0")
    refused(r"was made with other widths|was made with retrained=", retrain=lambda m: None)
    assert file.read_text() == text
    file.write_text(text[:200])
    refused(r"s\.json: sensitivity: not JSON, or cut off.*\n  do: choose another file, or delete this one")
    file.write_bytes(b"\xff\xfe")
    refused(r"it is not text")
    refused(r"cannot be (read|written)", path=tmp_path)


def test_another_sweep_does_not_go_on_with_a_file(tmp_path: Path) -> None:
    model, data, file = net("residual"), images(), tmp_path / "s.json"
    options: dict[str, Any] = {"ratios": (0.5,), "path": file, "criterion": lambda view: view.filters.abs().sum(1)}
    options["note"] = {"data": {"size": 8}, "batches": 2}
    found = sc.sensitivity(model, data[0][0][:1], data, **options)
    assert found.made_by["note"] == {"data": {"size": 8}, "batches": 2}
    text = file.read_text()

    def refused(match: str, evaluate: Any = data, **changes: Any) -> None:
        with pytest.raises(BadArtifact, match=match):
            sc.sensitivity(model, data[0][0][:1], evaluate, **{**options, **changes})
        assert file.read_text() == text

    refused(
        r"was made with other channels kept: the criterion, or what it was shown, has changed\n  do: choose another",
        criterion=lambda view: -view.filters.abs().sum(1),
    )
    refused(
        r"with an evaluate that gives the dense network [\d.]+, and now it gets -?[\d.]+\n.*\n  do: choose another",
        [(inputs, (targets + 1) % 10) for inputs, targets in data],
    )
    refused("was made with measure='accuracy', and now it is 'score'", lambda network: outputs(network, data))
    refused(r"was made with note\.data\.size=8, and now it is 16\n  do: ", note={"data": {"size": 16}, "batches": 2})
    refused(r"was made with note\.batches=2, and now there is none\n", note={"data": {"size": 8}})
    refused(r"was made without note\.lr, and now it is 0\.1\n", note={**options["note"], "lr": 0.1})
    assert sc.sensitivity(model, data[0][0][:1], data, **options) == found


def test_ratios_are_told_as_they_are() -> None:
    told: list[str] = []
    sc.sensitivity(
        net("residual"), images()[0][0][:1], images(), ratios=(0.29, 0.999), groups="a.0",
        progress=lambda done, total, text: told.append(text),
    )  # fmt: skip
    assert told == ["the dense network", "a.0 without 29%", "a.0 without 99.9%", "done"]


# ------------------------------------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**400, "evaluate returned inf for the dense network, not a number\n  do: return a finite number"),
        (math.nan, "evaluate returned nan for the dense network, not a number\n  do: return a finite number"),
        (-math.inf, "evaluate returned -inf for the dense network"),
        (torch.tensor(0.5), "returned a tensor of shape [] for the dense network, not a number\n  do: return a plain"),
        (None, "evaluate returned None for the dense network, not a number\n  do: return a number that is higher"),
        (True, "evaluate returned True for the dense network"),
        ("0.5", "evaluate returned '0.5' for the dense network"),
    ],
)
def test_what_evaluate_may_not_return(value: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        sc.sensitivity(net("residual"), images()[0][0][:1], lambda m: value, path=tmp_path / "s.json")
    assert text in str(caught.value)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ratios": ()}, BadRequest, "ratios is empty\n  do: give the fractions"),
        ({"ratios": (0.5, 1.0)}, BadRequest, "1.0 is not a ratio between 0 and 1\n  a ratio is the fraction removed"),
        ({"ratios": (0, 0.5)}, BadRequest, "0 is not a ratio between 0 and 1"),
        ({"ratios": (math.nan,)}, BadRequest, "nan is not a ratio"),
        ({"ratios": (0.5, 0.2)}, BadRequest, "[0.5, 0.2] do not rise\n  do: sort them, each once"),
        ({"ratios": (0.5, 0.5)}, BadRequest, "do not rise"),
        ({"ratios": 0.5}, BadRequest, "a list of fractions is needed, such as (0.1, 0.5, 0.9), not 0.5"),
        ({"evaluate": None}, BadRequest, "nothing says how well a network does\n  do: give evaluate"),
        ({"evaluate": iter([])}, BadRequest, "data can be read only once"),
        ({"evaluate": 3}, BadRequest, "needs data that can be read batch by batch, not int"),
        ({"groups": "fc"}, CannotPrune, "'fc' asks for group 'fc', which is locked\n  it is an output of the network"),
        ({"groups": "a0"}, BadRequest, "no group is called, or matches, 'a0'; did you mean 'a.0'?"),
        ({"groups": [3]}, BadRequest, "3 is not a group's name or a glob"),
        ({"groups": "stem", "residual": "inner"}, CannotPrune, "asks for group 'stem', which cannot be pruned"),
        ({"exclude": "*"}, CannotPrune, "no group is left to analyse"),
        ({"exclude": "b7"}, BadRequest, "no group is called, or matches, 'b7'"),
        ({"criterion": "fpgm_mix"}, BadRequest, "'fpgm_mix' chooses other channels for every width"),
        ({"residual": "scatter"}, BadRequest, "residual='scatter' is nothing that an analysis tries out"),
        ({"max_bytes": -1}, BadRequest, "max_bytes=-1 is not a number of bytes, 0 or more"),
        ({"groups": None}, BadRequest, "groups=None is neither a group's name or a glob over group names, nor a list"),
        ({"groups": 3}, BadRequest, "do: leave groups out, or write groups=['layer1.*']"),
        ({"exclude": None}, BadRequest, "exclude=None is neither a group's name or a glob"),
        ({"exclude": 3}, BadRequest, "exclude=3 is neither"),
        ({"exclude": [3]}, BadRequest, "exclude: 3 is not a group's name or a glob"),
        ({"path": 3}, BadRequest, "path=3 does not name a file"),
        ({"path": "~nobody-of-that-name/x.json"}, BadRequest, "does not name a file"),
        ({"seed": "x"}, BadRequest, "seed='x' is not a whole number, 0 or more"),
        ({"seed": -1}, BadRequest, "seed=-1 is not a whole number, 0 or more"),
        ({"progress": 3}, BadRequest, "progress=3 cannot be called\n  do: give a function, or leave progress out"),
        ({"retrain": 3}, BadRequest, "retrain=3 cannot be called"),
        ({"loss": 3}, BadRequest, "loss=3 cannot be called"),
        ({"note": 3}, BadRequest, "do: give a mapping of names to numbers, texts, lists and mappings"),
        ({"note": {"images": torch.zeros(1)}}, BadRequest, "note.images: Tensor is nothing that JSON can hold"),
        ({"ratios": (10**400,)}, BadRequest, "is not a ratio between 0 and 1"),
        ({"criterion": "l3"}, BadRequest, "there is no criterion 'l3'"),
        ({"criterion": "apoz"}, BadRequest, "criterion 'apoz' looks at activations\n  do: give data=, batches"),
        ({"criterion": "taylor", "data": images()}, BadRequest, "looks at gradients, and nothing says of what"),
    ],
)
def test_bad_requests(options: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"evaluate": images(), **options}
    evaluate = arguments["evaluate"]

    def measured(network: nn.Module) -> float:
        raise AssertionError("something was measured")

    if isinstance(evaluate, list):
        arguments["evaluate"] = measured
    with pytest.raises(error) as caught:
        sc.sensitivity(net("residual"), images()[0][0][:1], **arguments)
    assert text in str(caught.value)


def test_an_error_of_evaluate_says_where() -> None:
    def fail(network: nn.Module) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        sc.sensitivity(net("residual"), images()[0][0][:1], fail)
    assert caught.value.__notes__ == ["while the dense network was evaluated"]


def test_criteria_that_need_data_and_residual_rules() -> None:
    model, data = net("residual"), images()
    inner = sc.sensitivity(model, data[0][0][:1], data, criterion="apoz", data=data, residual="inner", ratios=(0.5,))
    assert [c.group for c in inner.curves] == ["a.0", "a.1"]
    plan = sc.plan(model, data[0][0][:1], criterion="apoz", data=data, ratios={"a.1": 0.5})
    assert inner.curves[1].scores == (accuracy(sc.masked(model, plan), data),)
