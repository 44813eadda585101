"""Pictures of sensitivity and filters: right in what they draw, whole as files, and as a browser shows them."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from secateur.report import Report, Row, first_filters, render, standalone, write_report
from secateur.report.canvas import DISTINCT, stage_colours
from secateur.report.filters import filters_of, png
from secateur.report.page import heat_rows
from secateur.report.sensitivities import importance_figure, sensitivity_figure
from secateur.sensitivities import GroupCurve, Sensitivity

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RATIOS = (0.25, 0.5, 0.75)


def curve(name: str, stage: str, scores: tuple[float, ...], retrained: tuple[float, ...] = ()) -> GroupCurve:
    return GroupCurve(name, 4, stage, (3, 2, 1), scores, retrained, (1.0, 0.5, 0.4, 0.1))


FOUND = Sensitivity(
    {}, "l1", RATIOS, 0.9,
    (
        curve("stem", "32x32", (0.9, 0.8, 0.1)),
        curve("a<1>", "32x32", (0.9, 0.9, 0.6)),
        curve("b&2", "8x8", (0.92, 0.7, 0.5)),
        curve("fc", "1", (0.4, 0.3, 0.1)),
    ),
    {"measure": "accuracy"},
)  # fmt: skip
ROWS = [Row("dense", 10, 20, 0.9), Row("pruned", 5, 10, 0.8)]


def conv(inputs: int, scale: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, 5, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.linspace(-1, 0.5, layer.weight.numel()).reshape(layer.weight.shape))
    return layer


def lines(svg: str, row: str) -> dict[str, tuple[str, list[tuple[float, float]]]]:
    """``{text of the tip: (colour, points)}`` of the curves drawn as ``row``."""
    root = ET.fromstring(re.sub(r' xmlns="[^"]+"', "", svg, count=1))
    found = {}
    for group in root.iter("g"):
        if re.search(rf"-{row}\d+$", group.get("id", "")):
            path = next(group.iter("path"))
            style = path.get("style") or ""
            points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d") or "")]
            match = re.search(r"stroke: (#\w+)", style)
            assert match is not None
            found[group.findtext("title") or ""] = (match[1], points)
    return found


# Curves ----------------------------------------------------------------------------------------------------------


def test_curves_go_through_what_was_measured_in_the_colour_of_their_stage() -> None:
    drawn = lines(sensitivity_figure(FOUND), "scores")
    assert list(drawn) == [
        "stem, 32 × 32, 4 channels", "a<1>, 32 × 32, 4 channels", "b&2, 8 × 8, 4 channels", "fc, no map, 4 channels",
    ]  # fmt: skip
    colours = [colour for colour, _ in drawn.values()]
    assert colours[0] == colours[1]
    assert len(set(colours)) == 3
    every = {points[0] for _, points in drawn.values()}
    assert len(every) == 1  # all begin at the dense network
    x, y = np.array([points for _, points in drawn.values()]).transpose(2, 0, 1)
    np.testing.assert_allclose(np.diff(x, axis=1), np.diff(x, axis=1)[0, 0], rtol=1e-5)
    scores = np.array([[0.9, *each.scores] for each in FOUND.curves])
    slope, base = np.polyfit(scores.ravel(), y.ravel(), 1)
    assert slope < 0  # up is better
    np.testing.assert_allclose(slope * scores + base, y, atol=1e-3)


def test_the_legend_counts_and_names_the_most_sensitive() -> None:
    svg = sensitivity_figure(FOUND)
    text = " ".join(ET.fromstring(svg).itertext())
    for expected in ("32 × 32: 2 groups", "most sensitive: stem", "8 × 8: 1 group", "no map: 1 group", "accuracy, %"):
        assert expected in text
    assert "a<1>" not in svg
    assert "retrained" not in text.replace("not retrained", "")


def test_retrained_networks_stand_beside_the_others() -> None:
    both = replace(FOUND, curves=tuple(replace(c, retrained=(0.9, 0.85, 0.8)) for c in FOUND.curves))
    svg = sensitivity_figure(both)
    assert len(lines(svg, "scores")) == len(lines(svg, "retrained")) == 4
    assert "pruned and retrained" in svg


def test_scores_of_a_function_are_shown_as_they_are() -> None:
    losses = replace(FOUND, dense=-0.25, curves=(curve("a", "1", (-0.5, -1.0, -12.5)),), made_by={"measure": "score"})
    assert "accuracy, %" not in sensitivity_figure(losses)
    assert [text for text, _ in heat_rows(losses)[0][1]] == ["-0.5", "-1", "-12.5"]
    overlaps = replace(FOUND, made_by={"measure": "score"})  # within 0 and 1, and yet no accuracies
    assert "accuracy, %" not in sensitivity_figure(overlaps)


def test_importance_is_drawn_from_the_largest() -> None:
    drawn = lines(importance_figure(FOUND), "line")
    assert len(drawn) == 4
    for _, points in drawn.values():
        assert all(later >= earlier for (_, earlier), (_, later) in pairwise(points))
    assert "L1 norm / largest of the group" in importance_figure(FOUND)
    assert "apoz / largest of the group" in importance_figure(replace(FOUND, criterion="apoz"))


def test_every_stage_has_a_colour_of_its_own() -> None:
    assert list(stage_colours(["8x8", "1", "32x32", "8x8"])) == ["32x32", "8x8", "1"]
    many = [f"{size}x{size}" for size in range(1, 12)]
    for stages in (many[: len(DISTINCT)], many):
        assert len(set(stage_colours(stages).values())) == len(stages)


def test_heat_is_the_share_of_what_can_be_lost() -> None:
    rows = heat_rows(FOUND)
    assert rows[0][1] == [("90.0", 0.0), ("80.0", pytest.approx(12.5)), ("10.0", pytest.approx(100.0))]
    assert rows[2][1][0] == ("92.0", 0.0)
    flat = replace(FOUND, curves=(curve("a", "1", (0.9, 0.9, 0.9)),))
    assert [lost for _, lost in heat_rows(flat)[0][1]] == [0.0, 0.0, 0.0]


def test_a_picture_stands_alone() -> None:
    text = standalone(sensitivity_figure(FOUND))
    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n<svg ')
    assert "var(--" not in text
    assert "currentColor" not in text
    root = ET.fromstring(text)
    assert root.attrib["aria-labelledby"] == "sensitivity-title sensitivity-desc"
    assert [part.tag.rpartition("}")[2] for part in root[:3]] == ["title", "desc", "rect"]
    assert root[1].text == "90.0 % when nothing is pruned; with 75 % removed: stem 10.0; a<1> 60.0; b&2 50.0; fc 10.0."
    box = [float(number) for number in root.attrib["viewBox"].split()]
    assert box[:2] == [-12, -12]
    assert root.attrib["width"] == f"{box[2]:.2f}pt"
    ground = root[2]
    assert ground.tag.endswith("rect")
    assert ground.attrib["fill"] == "#ffffff"
    assert [float(ground.attrib[key]) for key in ("x", "y", "width", "height")] == box


# Filters ---------------------------------------------------------------------------------------------------------


def test_filters_are_ordered_by_their_norms_on_one_scale() -> None:
    layer = conv(3)
    filters = filters_of("conv1", layer.weight)
    weight = layer.weight.detach().double().numpy()
    norms = np.abs(weight).sum((1, 2, 3))
    assert filters.order.tolist() == np.argsort(-norms, kind="stable").tolist()
    np.testing.assert_allclose(filters.norms, norms[filters.order])
    expected = np.round(127.5 + 127.5 * weight / np.abs(weight).max())[filters.order].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(filters.images, expected.astype(np.uint8))
    assert filters_of("", torch.zeros(2, 3, 1, 1)).images.tolist() == [[[[128] * 3]]] * 2


@pytest.mark.parametrize("inputs", [1, 2, 4])
def test_filters_of_other_than_three_inputs_are_grey(inputs: int) -> None:
    layer = conv(inputs)
    images = filters_of("conv1", layer.weight).images
    assert images.shape == (5, 3, 3, 3)
    assert (images[..., :1] == images).all()
    mean = layer.weight.detach().double().mean(1).numpy()
    order = filters_of("conv1", layer.weight).order
    np.testing.assert_array_equal(images[..., 0], np.round(127.5 + 127.5 * (mean / np.abs(mean).max())[order]))


def test_the_first_convolution_is_found() -> None:
    found = first_filters(nn.Sequential(nn.Linear(2, 2), nn.Sequential(conv(3)), nn.Conv2d(5, 7, 1)))
    assert found is not None
    assert found.layer == "1.0"
    assert len(found.images) == 5
    assert first_filters(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 5, 3), (11, 11, 3)])
def test_png_files_are_read_as_they_were_written(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(png(pixels)))), pixels)


# The page --------------------------------------------------------------------------------------------------------


class Images(HTMLParser):
    """Collects ``(alt, pixels)`` of every image, ids, and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[tuple[str, np.ndarray]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        if tag == "img":
            kind, _, data = (values["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.images.append((values["alt"] or "", np.array(Image.open(io.BytesIO(base64.b64decode(data))))))


def page() -> Report:
    norms = {"stem": np.array([1.0, 0.5]), "other": np.array([1.0, 0.9])}
    found = replace(FOUND, criterion="l2")
    return Report("t", ROWS, [], norms, sensitivity=found, filters=first_filters(nn.Sequential(conv(3))))


def test_the_page_shows_them_all() -> None:
    text = render(page())
    parser = Images(text)
    assert len(parser.ids) == len(set(parser.ids))
    assert text.count("<svg") == 8  # trade-off, norms, scores, sensitivity, each for wide and for narrow screens
    filters = page().filters
    assert filters is not None
    assert len(parser.images) == 5
    for (alt, pixels), image, norm, index in zip(
        parser.images, filters.images, filters.norms, filters.order, strict=True
    ):
        np.testing.assert_array_equal(pixels, image)
        assert alt.startswith(f"filter {index}, L1 norm ")
        assert float(alt.rpartition(" ")[2]) == pytest.approx(norm, rel=5e-3)
    assert "<code>a&lt;1&gt;</code>" in text
    assert "a<1>" not in text
    assert '<td class="cell" style="--lost:12">80.0</td>' in text
    assert "Accuracy in % when the group alone is pruned and nothing is retrained; 90.0 when nothing is." in text


def test_norms_are_not_drawn_twice_and_nothing_is_drawn_of_nothing() -> None:
    same = replace(page(), sensitivity=FOUND)
    assert "Scores of the groups" not in render(same)
    assert "Scores of the groups" in render(replace(same, norms={}))
    bare = render(replace(page(), sensitivity=None, filters=None))
    assert "ensitivity" not in bare
    assert "<img" not in bare


# In a browser ----------------------------------------------------------------------------------------------------


def shot(address: Path, picture: Path, *options: str, size: str = "1100,4400") -> np.ndarray:
    """What a browser paints, ``[height, width, 3]``."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
    command += [f"--user-data-dir={picture.parent / 'profile'}", f"--screenshot={picture}", *options, address.as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return np.array(Image.open(picture).convert("RGB"))


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")
def test_a_browser_paints_curves_filters_and_heat(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", page())
    painted = shot(path, tmp_path / "light.png")
    colours = Counter(map(tuple, painted.reshape(-1, 3).tolist()))
    assert {colour for colour, _ in colours.most_common(2)} == {(251, 250, 247), (255, 255, 255)}  # paper and cards
    for stage in stage_colours([each.stage for each in FOUND.curves]).values():
        assert near(colours, stage) > 100, stage
    filters = page().filters
    assert filters is not None
    for image in filters.images:  # an image of 3 x 3 is painted with hard edges, in exactly its own nine colours
        assert all(colours[tuple(pixel)] > 150 for pixel in image.reshape(-1, 3).tolist())
    hottest = [0.6 * ink + 0.4 * card for ink, card in zip((0xB4, 0x55, 0x2D), (255, 255, 255), strict=True)]
    assert near(colours, hottest) > 300
    alone = tmp_path / "accuracy.svg"
    alone.write_text(standalone(sensitivity_figure(FOUND)))
    painted = shot(alone, tmp_path / "alone.png", size="1000,500")
    assert painted[:5].min() == 255  # white, with a margin
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) > 50


def near(colours: Counter[tuple[int, ...]], colour: str | list[float]) -> int:
    """How many pixels have this colour, up to what transparency and smoothing change."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)] if isinstance(colour, str) else colour
    return sum(n for own, n in colours.items() if max(abs(a - b) for a, b in zip(own, wanted, strict=True)) <= 40)
