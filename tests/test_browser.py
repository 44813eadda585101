"""The pages in a real browser: nothing goes wrong in them, they fit a phone, and they can be heard and printed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secateur.report import Report, render
from test_report_comparisons import runs
from test_report_records import full

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")

WIDTHS = (360, 860)
"""Of a phone, and the least at which pictures are drawn for a wide screen."""
PROBE = """<script>
addEventListener("load", () => {
  const all = (what, within = document) => [...within.querySelectorAll(what)];
  const right = e => e.getBoundingClientRect().right, size = e => parseFloat(getComputedStyle(e).fontSize);
  const wide = all("body *").filter(e =>
    right(e) > innerWidth + 1 && !e.closest(".panel, nav") && getComputedStyle(e).position !== "absolute");
  const shown = all("svg[role=img]").filter(e => e.checkVisibility());
  const told = e => (e.getAttribute("aria-labelledby") || "").split(" ")
    .map(id => document.getElementById(id)?.textContent || "").join(" ").trim();
  const scale = e => e.getBoundingClientRect().width / e.viewBox.baseVal.width;
  parent.postMessage(JSON.stringify({
    width: document.documentElement.clientWidth,
    scroll: document.documentElement.scrollWidth,
    wide: wide.map(e => e.tagName + "." + e.className),
    svgs: shown.length,
    dumb: shown.filter(e => !told(e)).length,
    cut: shown.filter(e => !e.closest(".only") && right(e) > right(e.closest(".panel"))).length,
    unnamed: all("img").filter(e => !e.alt).length,
    lost: all("a[href^='#']").filter(e => !document.querySelector(e.hash)).length,
    small: Math.min(...all("p, td, dd, li").map(size)),
    letters: Math.min(...shown.flatMap(e => all("text", e).map(t => size(t) * scale(e)))),
    paper: getComputedStyle(document.body).backgroundColor,
  }), "*");
});
</script>"""
FRAME = """<!doctype html><iframe src="{}" style="width:{}px;height:900px;border:0"></iframe><output></output>
<script>addEventListener("message", e => {{ document.querySelector("output").textContent = e.data; }});</script>"""


def pages() -> dict[str, str]:
    return {"one": render(full()), "several": render(runs()), "bare": render(Report("t", full().rows, [], {}))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages")
    for name, text in pages().items():
        (path / f"{name}.html").write_text(text, encoding="utf-8")
        probed = text.replace("</body>", f"{PROBE}</body>").replace('<details class="run"', '<details open class="run"')
        (path / f"{name}-probed.html").write_text(probed, encoding="utf-8")
        for width in WIDTHS:
            (path / f"{name}-{width}.html").write_text(FRAME.format(f"{name}-probed.html", width), encoding="utf-8")
    return path


def browse(page: Path, *options: str) -> tuple[str, str]:
    """What a browser writes to stdout and stderr about a page."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--hide-scrollbars", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, done.stderr


def probe(page: Path) -> dict[str, object]:
    text, errors = browse(page, "--dump-dom", "--enable-logging=stderr", "--virtual-time-budget=4000")
    assert "CONSOLE" not in errors, errors
    found = re.search("<output>(.+?)</output>", text)
    assert found is not None, text[-500:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "several", "bare"])
def test_it_fits_and_every_picture_says_what_it_shows(name: str, width: int, folder: Path) -> None:
    found = probe(folder / f"{name}-{width}.html")
    assert found["width"] == width
    assert found["scroll"] == width
    assert found["wide"] == []
    assert found["svgs"] == {"one": 7, "several": 10, "bare": 2}[name]  # of two that there are, one is shown
    assert found["dumb"] == found["unnamed"] == found["lost"] == found["cut"] == 0
    assert float(str(found["small"])) >= 11
    assert float(str(found["letters"])) >= 8.5  # in pictures
    assert found["paper"] == "rgb(251, 250, 247)"


def test_a_dark_page_is_dark(folder: Path) -> None:
    picture = folder / "dark.png"
    browse(
        folder / "one.html",
        f"--screenshot={picture}",
        "--window-size=700,900",
        "--blink-settings=preferredColorScheme=0",
    )
    painted = np.array(Image.open(picture).convert("RGB"), dtype=int)
    assert painted.mean() < 60
    assert (np.abs(painted - (0x58, 0xB5, 0x85)).max(2) < 12).sum() > 100  # what is kept, in the dark theme's green


def test_it_can_be_printed(folder: Path) -> None:
    target = folder / "page.pdf"
    browse(folder / "several.html", f"--print-to-pdf={target}", "--no-pdf-header-footer")
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert pages >= 6  # what is folded away on the screen is there
