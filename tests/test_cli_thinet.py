"""``secateur plan --criterion thinet``: what it takes, and how it refuses; attention, which it cannot judge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur as sc
from law import assert_law
from networks.attention import SeparateAttention
from secateur.cli import app
from secateur.plans import Plan

DIGITS = ("--data", "digits", "--set", "data.size=8", "--set", "data.batch=8", "--batches", 2)
RESNET = ("zoo:resnet20", "--option", "in_channels=1", "--input", "1,1,8,8")


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("TERM", "dumb")
        yield


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


class Tokens(nn.Module):
    """Attention between the columns of an image; queries and keys are read by nothing but their product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv1d(8, 12, 1), nn.LayerNorm(12)
        self.first, self.second, self.head = SeparateAttention(12), SeparateAttention(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(self.embed(x.flatten(1, 2)).mT)
        t = t + self.first(t)
        return self.head((t + self.second(t)).mean(1))


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


# ----------------------------------------------------------------------------------------------------- command line


def test_without_data_it_says_what_is_missing(tmp_path: Path) -> None:
    told = run("plan", *RESNET, "--criterion", "thinet", "-o", tmp_path / "plan.json", code=2)
    assert re.search(r"criterion 'thinet' looks at outputs\s+do: (give|say) ", told), told
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("criterion", ["thinet", "thinet_sequential"])
def test_with_data_it_writes_a_plan(criterion: str, tmp_path: Path) -> None:
    run(
        "plan", *RESNET[:3], "--criterion", criterion, *DIGITS, "--keep", 0.5, "--residual", "inner", "-o",
        tmp_path / "plan.json",
    )  # fmt: skip
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.made_by["criterion"] == criterion
    cut = [group.name for group in plan.groups if len(plan.keep[group.name]) < group.channels]
    assert len(cut) == 9


def test_the_plan_is_the_one_of_python(tmp_path: Path) -> None:
    run("plan", "tiny_runs:small", "--criterion", "thinet", *DIGITS, "--ratio", 0.5, "-o", tmp_path / "plan.json")
    theirs = Plan.from_json((tmp_path / "plan.json").read_text())
    run("plan", "tiny_runs:small", "--ratio", 0.5, "-o", tmp_path / "l1.json", "--input", "1,1,8,8")
    assert theirs.keep != Plan.from_json((tmp_path / "l1.json").read_text()).keep
    assert all(len(theirs.keep[group.name]) == group.channels // 2 for group in theirs.groups)


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    given = ("--criterion", "thinet", *DIGITS, "-o", tmp_path / "plan.json")
    told = run("plan", "zoo:resnet20", *given, code=2)
    assert "zoo:resnet20 cannot run on the inputs of digits, [1, 8, 8]: " in told
    assert "do: give the model its options (such as in_channels), or the data their size and channels" in told
    told = run("plan", *RESNET, *given, code=2)
    assert "--input says how large inputs are, and so do the images\n  do: say --set data.size=N instead" in told
    assert not (tmp_path / "plan.json").exists()


def test_attention_is_left_out_by_name(tmp_path: Path) -> None:
    given = (f"{__name__}:tokens", "--criterion", "thinet", *DIGITS, "-o", tmp_path / "plan.json")
    told = run("plan", *given, code=2)
    assert "first.q" in told
    assert "second.q" in told
    assert "exclude=['first.q', 'second.q']" in told
    with pytest.warns(sc.SecateurWarning, match="some readers of 2 groups are not affine in what they read"):
        run("plan", *given, "--exclude", "*.q")
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert len(plan.keep["first.q"]) == len(plan.keep["second.q"]) == 8


# ----------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("criterion", ["thinet", "thinet_sampled", "thinet_sequential"])
def test_a_group_that_nothing_affine_reads_stops_the_plan(criterion: str) -> None:
    """By name, all of them at once, and before anything is measured; what is offered works."""
    net = tokens().double()
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    graph = sc.trace(net, x)
    asked = {"criterion": criterion, "ratios": 0.5, "data": [x]}
    with pytest.raises(sc.CannotPrune) as caught:
        sc.plan(graph, **{**asked, "data": Unread()})  # type: ignore[arg-type]
    told = str(caught.value)
    assert told == (
        "no convolution or linear layer whose outputs could be compared reads group 'first.q' (first: bmm is not "
        "affine in what it reads), group 'second.q' (second: bmm is not affine in what it reads)\n"
        "  do: leave them whole, exclude=['first.q', 'second.q'], or use a criterion that looks at weights, such as "
        "'l1'"
    )
    with pytest.warns(sc.SecateurWarning, match=r"some readers of . groups are not affine"):
        plan = sc.plan(graph, **asked, exclude=["first.q", "second.q"])  # type: ignore[arg-type]
    assert {name for name, kept in plan.keep.items() if len(kept) == 8} == {"first.q", "second.q"}
    assert_law(graph, x, plan)


class Unread:
    """Data that are not to be looked at."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("read")
