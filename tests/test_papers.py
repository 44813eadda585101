"""The document that sets the papers' printed figures beside ours says what the code does, differences included."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur as sc
from secateur.zoo import MODELS
from secateur.zoo.papers import EXTRA, NOTES, PAPERS, ROWS, agrees, figures, line, markdown, note

DOCUMENT = (Path(__file__).parents[1] / "docs" / "papers.md").read_text()
AGAIN = "make it anew: python -m secateur.zoo.papers > docs/papers.md"
DIFFER = {
    "li/resnet56-B": ("params_drop",),
    "li/resnet110-B": ("flops_drop", "params_drop"),
    "li/resnet34-A": ("params",),
    "li/resnet34-C": ("flops_drop",),
    "thinet/r50-30": ("flops",),
    "fpgm/r20-30": ("flops",),
    "fpgm/r18-30": ("flops_drop",),
    "fpgm/r101-30": ("flops_drop",),
}
"""Every printed figure that the counted one does not round to: cut off digits, misprints, another way of counting."""


@pytest.mark.parametrize("name", ["li/vgg16-A", "thinet/tiny", "fpgm/r20-30", "fpgm/vgg-precfg", "swp/vgg16-base"])
def test_row_counted_anew(name: str) -> None:
    (figure,) = figures([name])
    assert figure.differs == DIFFER.get(name, ())
    assert line(figure) in DOCUMENT.splitlines(), AGAIN
    if name in NOTES:
        assert note(figure) in DOCUMENT.splitlines(), AGAIN


@pytest.mark.slow
def test_the_whole_document_and_every_difference() -> None:
    found = figures()
    assert {f.row.id: f.differs for f in found if f.differs} == DIFFER
    assert markdown(found) == DOCUMENT, AGAIN


def test_the_document_has_every_row_and_marks_what_differs() -> None:
    lines = DOCUMENT.splitlines()
    for row in ROWS:
        (found,) = [text for text in lines if text.startswith(f"| {row.id.partition('/')[2]} | {row.network} |")]
        cells = [cell.strip() for cell in found.strip("|").split("|")]
        printed = [text for text in (row.flops, row.params, row.flops_drop, row.params_drop) if text]
        assert sorted(cell.rstrip("*") for cell in cells if cell.rstrip("*") in printed) == sorted(printed), AGAIN
        assert found.count("*") == len(DIFFER.get(row.id, ())), AGAIN


def test_every_difference_has_its_reason() -> None:
    assert set(DIFFER) <= set(NOTES) <= {row.id for row in ROWS}


def test_rows_are_of_networks_that_the_zoo_has() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.id.startswith(f"{row.convention}/")
        assert row.convention in PAPERS
        assert {row.network, row.of or row.network} <= {*MODELS, *EXTRA}


@pytest.mark.parametrize(
    ("printed", "value", "expected"),
    [
        ("2.06e8", 206_279_680, True),
        ("2.06e8", 205_499_999, False),
        ("1.99e7", 19_962_560, False),
        ("2.43E7", 23_430_758.4, False),
        ("30.94B", 30_940_528_640, True),
        ("0.86M", 855_770, True),
        ("42.2", 42.218, True),
        ("13.7", 13.77, False),
        ("3", 2.5, True),
    ],
)
def test_agreement_is_rounding_half_up_to_the_printed_digits(printed: str, value: float, expected: bool) -> None:
    assert agrees(printed, value) == expected


def test_unknown_row() -> None:
    with pytest.raises(sc.BadRequest, match=r"no paper has a row 'li/vgg-A'; did you mean 'li/vgg16-A'\?"):
        figures(["li/vgg-A"])
