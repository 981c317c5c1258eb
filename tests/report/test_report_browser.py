"""The report in a real browser: it sorts, slides, switches its theme, and asks nobody anything."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim.report import report_server, write_report

Write = Callable[..., Path]
BROWSER = os.environ.get("MIM_TEST_BROWSER") or shutil.which("chromium") or shutil.which("chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; nothing is downloaded."""
    if not BROWSER:
        pytest.skip("no Chromium on this machine (MIM_TEST_BROWSER may name one)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
    arguments += ["--no-first-run", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield started
        started.close()


class Seen:
    """A page and what it did: messages of its console, errors, requests."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: m.type == "error" and self.faults.append(m.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.address = address

    def finish(self) -> None:
        """Nothing went wrong and nothing left the page."""
        assert self.faults == []
        outside = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert outside == [self.address]
        self.context.close()


@pytest.fixture
def comparison(fake_comparison: Write) -> Path:
    """Three regimes, with predictions at two more ratios."""
    folder = fake_comparison(axes={"model.regime.name": ["drop", "zero"], "seed": [0, 1]})
    for run in folder.glob("regime=*"):
        with np.load(run / "reconstructions.npz") as file:
            prediction, is_masked = file["prediction"], file["is_masked"]
        ratios = np.array([0.25, 0.5])
        flat = np.stack([np.full_like(prediction, 90), np.full_like(prediction, 160)])
        masks = np.stack([np.roll(~is_masked, 1, axis=1), np.roll(is_masked, 1, axis=2)])
        np.savez(run / "reconstructions_ratios.npz", ratio=ratios, prediction=flat, is_masked=masks)
    return folder


def test_report_in_a_browser(browser: Any, comparison: Path) -> None:
    report = write_report(comparison)
    seen = Seen(browser, report.as_uri(), color_scheme="light")
    page = seen.page

    # It sorts, by mouse and keyboard, and a third time brings the first order back.
    rows = page.locator("#table-results tbody tr th")
    first = rows.all_inner_texts()
    assert first == ["drop", "zero", "untrained encoder", "raw pixels"]
    button = page.get_by_role("button", name="accuracy (%)", exact=True).first
    button.click()
    assert rows.all_inner_texts() == ["zero", "drop", "raw pixels", "untrained encoder"]
    head = page.locator("#table-results th[aria-sort=descending]")
    assert head.inner_text().startswith("accuracy (%)")
    button.press("Enter")
    assert rows.all_inner_texts() == ["untrained encoder", "raw pixels", "drop", "zero"]
    button.press("Enter")
    assert rows.all_inner_texts() == first
    loss = page.get_by_role("button", name="held-out loss").first
    loss.click()
    assert rows.all_inner_texts()[2:] == ["untrained encoder", "raw pixels"], "dashes stand last"

    # It slides: another ratio is another prediction, and the picker another image.
    def pixels(alt: str) -> np.ndarray:
        script = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        values = page.get_by_label(alt, exact=True).evaluate(script)
        return np.array(values).reshape(28, 28, 4)

    page.locator(".views canvas").first.wait_for()
    slider = page.get_by_role("slider")
    assert page.locator(".ratio output").inner_text() == "0.76"
    page.get_by_role("radio", name="Image 1", exact=True).check()
    original = pixels("Image 1, original")
    slider.press("ArrowLeft")
    assert page.locator(".ratio output").inner_text() == "0.50"
    assert (pixels("Image 1, drop, prediction at ratio 0.5") == [160, 160, 160, 255]).all()
    slider.press("Home")
    assert (pixels("Image 1, zero, prediction at ratio 0.25")[..., :3] == 90).all()
    both = pixels("Image 1, drop, with visible patches at ratio 0.25")
    same = (both == original).all(axis=-1)
    with np.load(comparison / "regime=drop,seed=0" / "reconstructions_ratios.npz") as file:
        hidden = file["is_masked"][0, 0].repeat(4, 0).repeat(4, 1)
    assert same[~hidden].all() and same[hidden].mean() < 0.2, "visible patches are the image's"
    page.get_by_role("radio", name="Image 1", exact=True).press("ArrowRight")
    assert (pixels("Image 2, original") != original).any()

    # Charts are live, and their hover says the numbers.
    assert page.locator(".panel .live .main-svg").count() >= 3
    assert page.locator(".panel .still:visible").count() == 0
    chart = page.locator('[data-chart="held_out_loss"]')
    chart.scroll_into_view_if_needed()
    box = chart.locator(".nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    curve = chart.locator(".scatterlayer .point").first.bounding_box()
    assert curve is not None
    page.mouse.move(curve["x"] + curve["width"] / 2, curve["y"] + curve["height"] / 2, steps=3)
    chart.locator(".hovertext", has_text="at epoch").wait_for()
    before = chart.locator(".xtick").all_text_contents()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_function(
        "before => [...document.querySelectorAll('[data-chart=held_out_loss] .xtick')]"
        ".map(t => t.textContent).join() !== before",
        arg=",".join(before),
    )

    # It switches its theme, and keeps it.
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.get_by_role("button", name="Dark theme").click()
    assert background() != light
    assert page.get_by_role("button", name="Light theme").is_visible()
    assert page.locator(".panel .live .bg").first.evaluate("r => getComputedStyle(r).fill") != light

    # On paper the still pictures stand, in light.
    page.emulate_media(media="print")
    assert page.locator(".panel .still:visible").count() == page.locator(".panel").count()
    assert page.locator(".panel .live:visible").count() == 0
    assert background() == "rgb(255, 255, 255)"
    seen.finish()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_report_fits_and_can_be_read(
    browser: Any, comparison: Path, scheme: Any, width: int
) -> None:
    report = write_report(comparison)
    size = {"width": width, "height": 844}
    seen = Seen(browser, report.as_uri(), color_scheme=scheme, viewport=size)
    page = seen.page
    page.locator(".views canvas").first.wait_for()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, "only tables scroll aside"
    heights = "[...document.querySelectorAll('tbody td')].map((n) => n.offsetHeight)"
    assert max(page.evaluate(heights)) < 400, "no column of words is squeezed"
    # Words stand out from their ground: WCAG asks for 4.5.
    ratio = page.evaluate(
        """() => {
          const light = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
              .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = light(getComputedStyle(document.body).backgroundColor);
          return Math.min(...[...document.querySelectorAll("p, td, th, a, small, summary")]
            .filter((node) => node.checkVisibility())
            .map((node) => {
              const ink = light(getComputedStyle(node).color);
              return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
            }));
        }"""
    )
    assert ratio >= 4.5
    seen.finish()


def test_report_without_scripts(browser: Any, comparison: Path) -> None:
    report = write_report(comparison)
    seen = Seen(browser, report.as_uri(), java_script_enabled=False)
    page = seen.page
    assert page.locator(".panel .still:visible").count() == page.locator(".panel").count() > 0
    assert page.locator("table.tiles img:visible").count() > 0
    assert page.locator(".viewer:visible, button.theme:visible").count() == 0
    seen.finish()


def test_live_report_renews_itself(browser: Any, comparison: Path) -> None:
    result = comparison / "regime=zero,seed=1" / "result.json"
    content = result.read_text()
    result.unlink()
    with report_server(comparison, port=0, every=0.1) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        seen = Seen(browser, address)
        page = seen.page
        runs = page.locator("#table-runs")
        assert "waiting" in runs.inner_text() or "stopped" in runs.inner_text()
        assert page.locator(".summary").inner_text().startswith("regime: drop, zero")
        result.write_text(content)
        page.get_by_text("4 of 4 runs finished").wait_for(timeout=60_000)
        assert seen.faults == []
        assert {url.removeprefix(address) for url in seen.requests if url.startswith("http")} <= {
            "",
            "version",
        }
        seen.context.close()
        server.shutdown()
        thread.join()
