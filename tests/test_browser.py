"""Widgets and stored outputs in JupyterLab, in Chromium, as a reader uses them.

The notebooks are opened as they are committed, trusted, and not run. Each explorer runs in a
notebook of its own, all in one kernel. Screenshots: build/screenshots.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import numpy as np
import pytest
import scenes
from PIL import Image

from jfbnb.run.checkout import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

SHOTS = ROOT / "build" / "screenshots"
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# Each explorer of the notebooks, by what makes it.
EXPLORERS = {
    "blur": "BlurExplorer(x)", "tikhonov": "TikhonovExplorer(A, x, 0.01)",
    "denoiser": "DenoiserExplorer(T.D.network, x)", "solver": "SolverExplorer(T, x, 0.01)",
    "gradient": "GradientExplorer()", "methods": "MethodsExplorer()",
    "photograph": "PhotographExplorer()"}
SETUP = """
from jfbnb.core.operators import Blur
from jfbnb.data import bundled_photos
from jfbnb.teaching.explorers import *
from jfbnb.teaching.your_photograph import PhotographExplorer
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED, load_model

A = Blur(64, 5, 2.0)
x = bundled_photos("validation", 64)[:1].as_float()
T = load_model(METHODS["jfb"], RELEASED).T.on(A)
"""
LOCAL = ("localhost", "127.0.0.1", "")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks, and one for each explorer; its address."""
    suite = tmp_path_factory.mktemp("suite")
    for folder in ("notebooks", "docs"):
        shutil.copytree(ROOT / folder, suite / folder)
    for name, code in EXPLORERS.items():
        nbformat.write(nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(f"{SETUP}\n{code}")],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}),
            suite / "notebooks" / f"{name}.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    settings = home / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(home), "JUPYTERLAB_SETTINGS_DIR":
                   str(home / "lab" / "user-settings"), "JUPYTER_DATA_DIR": str(home / "data"),
                   "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}",
               "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
               "--ServerApp.disable_check_xsrf=True", "--allow-root",
               f"--ServerApp.root_dir={suite}"]
    subprocess.run([sys.executable, "-m", "jupyter", "trust", *(suite / "notebooks").glob(
        "*.ipynb")], env=environment, check=True)
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start: {(home / 'lab.log').read_text()[-2000:]}")
        kernel = ask(address, "kernels", name="python3")
        for name in EXPLORERS:
            ask(address, "sessions", path=f"notebooks/{name}.ipynb", name=name, type="notebook",
                kernel={"id": kernel["id"]})
        yield address
    finally:
        server.terminate()
        server.wait(20)


def ask(address: str, what: str, **values) -> dict:
    """Make a kernel or a session of the Jupyter server."""
    with urllib.request.urlopen(f"{address}/api/{what}", json.dumps(values).encode()) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def context(browser):
    """What the pages share: JupyterLab's scripts are read once."""
    shared = browser.new_context()
    yield shared
    shared.close()


@pytest.fixture
def page(context):
    """A page that notes what it asks of the outside."""
    opened = context.new_page()
    opened.set_viewport_size({"width": 1280, "height": 900})
    outside: list[str] = []

    def note(request) -> None:
        address = urlparse(request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in LOCAL:
            outside.append(request.url)

    opened.on("request", note)
    yield opened
    opened.close()
    assert outside == []


def open_notebook(page, lab: str, name: str) -> None:
    page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)


def run(page, lab: str, name: str) -> None:
    """Open an explorer's notebook, and run its only cell."""
    open_notebook(page, lab, name)
    page.get_by_text(re.compile("Python 3 .*Idle")).first.wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]")).wait_for(timeout=120_000)
    errors = page.locator(".jp-OutputArea-output", has_text="Traceback")
    assert errors.count() == 0, errors.first.inner_text()[:1000]


def bring(page, selector: str):
    """Scroll until the element is there: JupyterLab renders what is in view."""
    element = page.locator(selector).first
    for _ in range(60):
        if element.count() and element.is_visible():
            element.scroll_into_view_if_needed()
            return element
        page.locator(".jp-WindowedPanel-outer").first.evaluate("e => e.scrollBy(0, 500)")
        page.wait_for_timeout(200)
    pytest.fail(f"{selector} did not appear")


def test_a_stored_comparison_lives_and_links_lead_on(lab, page):
    """Nothing has been run: the notebook is trusted. Its glossary is a folder further up."""
    open_notebook(page, lab, "05_evaluation_and_figures")
    bring(page, ".jfbnb-swipe canvas")
    page.wait_for_timeout(1000)  # JupyterLab lays the cells out anew
    swipe(page)
    bring(page, '.jp-MarkdownOutput a:text-is("glossary")').click()
    page.locator(".lm-TabBar-tabLabel", has_text="glossary.md").wait_for(timeout=20_000)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_text_pictures_and_no_code_of_setup(lab, page, name):
    """The two first code cells are collapsed, and the first stored picture fills the page."""
    open_notebook(page, lab, name)
    cells = page.locator(".jp-CodeCell")
    for i in range(2):
        cells.nth(i).locator(".jp-Placeholder").first.wait_for(timeout=30_000)
        assert not cells.nth(i).locator(".cm-editor").is_visible()
    box = bring(page, ".jp-RenderedImage img").bounding_box()
    assert 300 < box["width"] <= 1280


@pytest.mark.parametrize("name", list(EXPLORERS)[:5])
def test_an_explorer_fits_the_page_and_answers(lab, page, name):
    run(page, lab, name)
    image = bring(page, ".jfbnb-panels img")
    page.wait_for_timeout(1000)  # JupyterLab lays the cells out anew
    for slider in page.locator(".jp-OutputArea .widget-slider").all():
        box = slider.bounding_box()
        assert box["height"] < 60 and box["width"] > 250
    explorer = page.locator(".jp-OutputArea .widget-vbox").first.bounding_box()
    assert explorer["height"] < 700
    drawn = image.evaluate("e => [e.naturalWidth, e.clientWidth]")
    assert drawn[0] == drawn[1] > 250  # neither stretched nor shrunk
    words = page.locator(".widget-html-content", has_text=re.compile(r"\d")).first.inner_text()

    def sources() -> list[str]:
        return page.locator(".jfbnb-panels img").evaluate_all("all => all.map(e => e.src)")

    before = sources()
    page.locator(".jp-OutputArea .noUi-handle").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    deadline = time.monotonic() + 30
    while sources() == before:
        assert time.monotonic() < deadline, "no picture changed"
        page.wait_for_timeout(100)
    while before != (now := sources()):  # a change still on its way would follow the reset
        before = now
        page.wait_for_timeout(2000)
    page.get_by_role("button", name="Reset").click()
    page.locator(".widget-html-content", has_text=words).wait_for(timeout=30_000)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SHOTS / f"{name}.png"))
    page.set_viewport_size({"width": 800, "height": 900})
    bring(page, ".jfbnb-panels img")
    page.wait_for_timeout(1000)
    assert image.evaluate("e => e.naturalWidth") * 0.7 < image.bounding_box()["width"]
    page.screenshot(path=str(SHOTS / f"{name}-800.png"))


def swipe(page) -> None:
    canvas = bring(page, ".jfbnb-swipe canvas")
    pixels = "c => c.toDataURL()"
    before = canvas.evaluate(pixels)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 5, box["y"] + 60, steps=5)
    page.mouse.up()
    assert canvas.get_attribute("aria-valuenow") == "20"
    assert canvas.evaluate(pixels) != before
    canvas.focus()
    page.keyboard.press("ArrowRight")
    assert canvas.get_attribute("aria-valuenow") == "22"


def test_methods_are_compared_on_another_image(lab, page):
    """Other numbers come; handle and menus stay where they were put."""
    run(page, lab, "methods")
    canvas = bring(page, ".jfbnb-swipe canvas")
    page.wait_for_timeout(1000)
    swipe(page)
    canvas.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.locator(".jfbnb-bar select").last.select_option(label="Tikhonov")
    numbers = page.locator(".jfbnb-captions")
    before = numbers.inner_text()
    assert re.search(r"Tikhonov: [\d.]+ dB, SSIM 0\.\d+", before)
    bring(page, ".widget-dropdown select").select_option(index=1)
    deadline = time.monotonic() + 30
    # The captions are empty until the new pictures are decoded.
    while (now := numbers.inner_text()) == before or "Tikhonov" not in now:
        assert time.monotonic() < deadline, "the comparison did not change"
        page.wait_for_timeout(100)
    assert canvas.get_attribute("aria-valuenow") == "2"
    assert numbers.inner_text().count("Tikhonov") == 1


def test_photograph_is_restored_and_downloaded(lab, page, tmp_path):
    file, given, sharp = scenes.DISK.take("coffee", 140, tmp_path)
    run(page, lab, "photograph")
    bring(page, ".jfbnb-swipe canvas")
    large = file.with_name("large.jpg")  # of more than a message may have
    noise = np.random.default_rng(0).integers(0, 256, (2600, 2600, 3), np.uint8)
    Image.fromarray(noise).save(large, quality=100)
    assert large.stat().st_size > 10_000_000
    for path, size in ((large, "2600 x 2600"), (file, "140 x 140")):
        with page.expect_file_chooser() as chooser:
            page.get_by_title("a blurred picture").click()
        chooser.value.set_files(path)
        page.get_by_text(f"{path.name}: {size} pixels").wait_for(timeout=60_000)
    page.get_by_label("kernel", exact=True).select_option("disk")
    page.get_by_role("button", name="Restore", exact=True).click()
    link = page.get_by_role("link", name="download coffee-jfb.png")
    link.wait_for(timeout=180_000)
    with page.expect_download() as download:
        link.click()
    restored = scenes.read(download.value.path())
    assert 2 * np.square(restored - sharp).mean() < np.square(given - sharp).mean()  # 3 dB
    swipe(page)
    page.screenshot(path=str(SHOTS / "photograph.png"))


@pytest.fixture
def comparison(tmp_path) -> str:
    """The address of a page on disk with a comparison of three images, and nothing else."""
    import torch

    from jfbnb.teaching.swipe import compare

    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    html = compare({"a": x, "b": 1 - x, "c": x / 2}, truth="a").to_html()
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{html}", encoding="utf-8")
    return Path(file).as_uri()


def test_comparison_works_from_disk_without_kernel(page, comparison):
    page.goto(comparison)
    page.wait_for_selector(".jfbnb-swipe canvas")
    swipe(page)
    page.get_by_label("left").select_option(label="c")
    assert "c" in page.locator(".jfbnb-captions").inner_text()
    page.get_by_label("zoom in").click()
    box = page.locator(".jfbnb-swipe canvas").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    assert "row" in page.locator(".jfbnb-readout").inner_text()


def test_comparison_follows_fingers(browser, comparison):
    """On a screen as narrow as a phone's: a tap, a drag, and two fingers that spread."""
    context = browser.new_context(viewport={"width": 390, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(comparison)
    page.wait_for_selector(".jfbnb-swipe canvas")
    canvas = page.locator(".jfbnb-swipe canvas")
    box = canvas.bounding_box()
    assert box["width"] < 390
    screen = context.new_cdp_session(page)

    def place(across: float, down: float) -> dict[str, float]:
        return {"x": box["x"] + across * box["width"], "y": box["y"] + down * box["height"]}

    def touch(kind: str, *fingers: tuple[float, float]) -> None:
        screen.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [
            {**place(*finger), "id": i} for i, finger in enumerate(fingers)]})

    kinds = page.evaluate_handle("""() => {
        const seen = [];
        document.querySelector(".jfbnb-swipe canvas").addEventListener("pointermove",
            (event) => seen.push(event.pointerType));
        return seen;
    }""")
    page.touchscreen.tap(*place(0.75, 0.5).values())
    assert canvas.get_attribute("aria-valuenow") == "75"
    touch("touchStart", (0.75, 0.5))
    for across in (0.6, 0.4, 0.2):
        touch("touchMove", (across, 0.3))
    touch("touchEnd")
    assert canvas.get_attribute("aria-valuenow") == "20"
    assert "touch" in kinds.json_value()

    def corner() -> str:
        page.mouse.move(*place(0.02, 0.02).values())
        return page.locator(".jfbnb-readout").inner_text()

    assert corner().startswith("row 0, column 0:")
    touch("touchStart", (0.45, 0.5))
    touch("touchStart", (0.45, 0.5), (0.55, 0.5))
    for spread in (0.1, 0.2, 0.3):
        touch("touchMove", (0.5 - spread, 0.5), (0.5 + spread, 0.5))
    touch("touchEnd")
    assert re.match(r"row [1-9]", corner())
    assert page.evaluate("scrollY") == 0  # the page itself stayed
    context.close()
