"""The widgets without a browser: their state, their callbacks, and what they say of bad input."""

import base64
import io
import re
import threading

import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import tifffile
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.maps import SplittingMap
from jfbnb.core.metrics import psnr
from jfbnb.core.operators import Blur
from jfbnb.data import bundled_photos
from jfbnb.photo import blind, kernel_option
from jfbnb.photo.model_check import Warning
from jfbnb.photo.restore import Restored
from jfbnb.teaching import explorers, swipe, your_photograph
from jfbnb.teaching.explorers import (
    BlurExplorer,
    DenoiserExplorer,
    GradientExplorer,
    MethodsExplorer,
    SolverExplorer,
    TikhonovExplorer,
)
from jfbnb.teaching.figures import GRADIENT_COLOURS, image_row
from jfbnb.teaching.swipe import compare, to_png
from jfbnb.teaching.your_photograph import KernelControls, PhotographExplorer
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED, load_model


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return bundled_photos("validation", 64)[:1].as_float()


def released_map() -> SplittingMap:
    return load_model(METHODS["jfb"], RELEASED).T.on(Blur(64, 5, 2.0))


@pytest.fixture(scope="module")
def make(x):
    """Every explorer but the last, on a small image."""
    T = released_map()
    return {"blur": lambda: BlurExplorer(x), "tikhonov": lambda: TikhonovExplorer(T.A, x, 0.01),
            "denoiser": lambda: DenoiserExplorer(T.D.network, x),
            "solver": lambda: SolverExplorer(T, x, 0.01), "gradient": GradientExplorer}


# --- the swipe comparison -----------------------------------------------------------------------


def test_comparison_carries_pictures_and_metrics(x):
    noisy = x + 0.1
    shown = compare({"Original": x, "<b>": noisy[0]}, truth="Original")
    page = shown.to_html()
    assert page.count("<figure ") == 2 and page.count("<img ") == 2
    assert 'data-label="&lt;b&gt;"' in page and "<b>" not in page
    assert f"{psnr(noisy, x).item():.2f} dB" in page
    assert shown._repr_mimebundle_()[0]["text/html"].count("<script>") == 1


def test_pictures_are_exact_to_8_bits(x):
    pixels = torch.tensor(list(Image.open(io.BytesIO(to_png(x[0]))).convert("RGB").tobytes()))
    assert torch.equal(pixels.view(64, 64, 3).permute(2, 0, 1), (x[0] * 255).round().long())


@pytest.mark.parametrize(("images", "truth", "message"), [
    ({"a": torch.zeros(3, 8, 8)}, None, "at least two"),
    ({"a": torch.zeros(3, 8, 8), "b": torch.zeros(3, 8, 9)}, None, "the same size"),
    ({"a": torch.zeros(3, 8, 8), "b": torch.zeros(2, 3, 8, 8)}, None, "not one image"),
    ({"a": torch.zeros(3, 8, 8), "b": [1, 2]}, None, "not one image"),
    ({"a": torch.zeros(3, 8, 8), "b": torch.zeros(3, 8, 8)}, "c", "truth is 'c'"),
])
def test_what_cannot_be_compared_is_said(images, truth, message):
    with pytest.raises(UserError, match=message):
        compare(images, truth)


# --- the explorers ------------------------------------------------------------------------------


def pictures(explorer) -> list[bytes]:
    return [base64.b64decode(found) for found in
            re.findall('src="data:image/png;base64,([^"]*)"', explorer.picture.value)]


NAMES = ("blur", "tikhonov", "denoiser", "solver", "gradient")


def ends(control) -> list:
    """The values at both ends of a slider, or all of a menu."""
    if hasattr(control, "options"):
        return list(control.options)
    return [control.base**end if hasattr(control, "base") else end
            for end in (control.min, control.max)]


@pytest.mark.parametrize("name", NAMES)
def test_every_control_changes_the_picture_and_reset_restores_it(make, name):
    explorer = make[name]()
    first, numbers = explorer.picture.value, explorer.status.value
    if name == "gradient":  # paths have a length, so that the learning rate shows
        explorer.controls["steps"].value = 5
    for control in explorer.controls.values():
        before, value = explorer.picture.value, control.value
        far = [end for end in ends(control) if end != value]
        control.value = far[-1]
        assert explorer.picture.value != before, control.description
        control.value = value
    for end in (0, -1):  # which must not break it
        explorer.resetting = True  # all at once, then one drawing
        for control in explorer.controls.values():
            control.value = ends(control)[end]
        explorer.resetting = False
        explorer.refresh()
        assert "color:#b00020" not in explorer.status.value
        assert not re.search(r"\bnan\b|-inf", explorer.status.value)
    explorer.reset()
    assert explorer.picture.value == first and explorer.status.value == numbers


def test_an_explorer_says_what_is_wrong_and_lives_on(make, monkeypatch):
    explorer = make["blur"]()
    picture = explorer.picture.value

    def refuse(*_):
        raise UserError("no <such> blur: choose another")

    monkeypatch.setattr(explorers, "Blur", refuse)
    explorer.controls["std"].value = 1.0
    assert "no &lt;such&gt; blur" in explorer.status.value
    assert explorer.picture.value == picture
    monkeypatch.undo()
    explorer.controls["std"].value = 1.5
    assert "measurement" in explorer.status.value


@pytest.mark.parametrize(("std", "size", "said"), [
    (5**0.5, 5, "condition number"), (1.9, 5, "next to zero"), (6.0, 15, "there is no inverse")])
def test_blur_explorer_says_when_an_eigenvalue_vanishes(std, size, said):
    explorer = BlurExplorer(bundled_photos("validation", 128)[:1].as_float())
    explorer.controls["size"].value = size
    explorer.controls["std"].value = std
    assert said in explorer.status.value
    smallest = Blur(128, size, std).spectrum.abs().min().item()
    assert ("eigenvalue" in explorer.status.value) == (smallest < 1e-6)


def test_solver_explorer_shows_what_the_solver_did(make, x):
    states, residuals = make["solver"]().iterates("splitting", "Anderson")
    assert len(states) == len(residuals) and residuals[-1] < 1e-3 < residuals[0]
    T = released_map()
    with torch.no_grad():
        T.D.network.layers[-1].weight.mul_(-20)  # adds noise in the place of taking it away
    explorer = SolverExplorer(T, x, 0.01)
    explorer.controls["solver"].value = "Picard"
    assert "it diverges" in explorer.status.value
    explorer.controls["k"].value = explorer.MOST - 1
    assert [Image.open(io.BytesIO(panel)).size for panel in pictures(explorer)] in (
        [(w, 272) for w in (267, 266, 267)], [(w, 272) for w in (267, 267, 266)])


def test_explorers_have_a_picture_for_those_without_a_kernel():
    """With the line of numbers, and the colours of the legend."""
    explorer = GradientExplorer()
    bundle, metadata = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert metadata["image/png"]["alt"].startswith("plot: ")
    assert "cosine" in bundle["text/plain"] and "run the notebook" in bundle["text/plain"]
    kept = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).convert("RGB")
    assert kept.height > Image.open(io.BytesIO(pictures(explorer)[0])).height - 30
    pixels = np.unique(np.asarray(kept).reshape(-1, 3), axis=0).astype(int)
    for gradient in ("exact", "Neumann", "JFB"):
        wanted = [round(255 * part) for part in to_rgb(GRADIENT_COLOURS[gradient])]
        assert np.abs(pixels - wanted).max(axis=1).min() <= 8, gradient
    before = explorer.picture.value
    explorer.refresh()
    assert explorer.picture.value == before  # the note is on the stored picture alone


def test_an_explorer_says_that_it_works_and_draws_once_for_a_reset(make, monkeypatch):
    explorer = make["tikhonov"]()
    said, drawn = [], []
    explorer.status.observe(lambda change: said.append(change["new"]), "value")
    explorer.picture.observe(drawn.append, "value")
    explorer.controls["k"].value = 100
    assert said[0] == explorers.BUSY and "iterate 100" in said[-1]
    explorer.controls["lam"].value = 0.1
    drawn.clear()
    explorer.reset()
    assert len(drawn) == 1


def test_tikhonov_explorer_explains_the_largest_step(make):
    explorer = make["tikhonov"]()
    explorer.controls["lam"].value = 1e-5
    for step, words in ((1.9, None), (2.0, "oscillate"), (2.1, "it diverges")):
        explorer.controls["step"].value = step
        assert (words in explorer.status.value if words else "<b>" not in explorer.status.value)


def test_gradient_explorer_shows_where_jfb_goes_uphill():
    """On the way, by the numbers of notebook 4; at the start nowhere."""
    explorer = GradientExplorer()
    for degrees in range(-165, 195, 30):
        gradients = explorer.gradients(0.95, degrees, 1)
        jfb, exact = (gradients[kind](explorer.START) for kind in ("JFB", "exact"))
        assert torch.dot(jfb, exact) > 0
    explorer.controls["gamma"].value, explorer.controls["degrees"].value = 0.9, -45
    assert "uphill" not in explorer.status.value
    found, far = [], []
    for steps in explorer.STEPS:
        explorer.controls["steps"].value = steps
        found.append("uphill" in explorer.status.value)
        far.append(float(re.search(r"is ([\d.e-]+) from", explorer.status.value)[1]))
    assert any(found) and explorer.STEPS[-1] == 200
    assert far[-1] < 0.01 < 0.3 < far[explorer.STEPS.index(40)]  # it ends at the goal all the same


def test_toy_gradients_are_those_of_the_paper():
    """Against finite differences of the loss at the solved fixed point."""
    explorer = GradientExplorer()
    theta = torch.tensor([-0.8, 0.5], dtype=torch.float64)
    T = explorers.ToyMap(0.6, 180 / torch.pi, theta)
    goal = T.solution(explorer.GOAL)
    h = 1e-6 * torch.eye(2, dtype=torch.float64)
    ahead, behind = (0.5 * (T.solution(theta + s * h) - goal).square().sum(1) for s in (1, -1))
    found = {kind: gradient(theta) for kind, gradient in
             explorer.gradients(0.6, 180 / torch.pi, terms=20).items()}
    torch.testing.assert_close(found["exact"], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)
    for kind, cosine in (("Neumann", 0.999), ("JFB", 0.4)):
        assert torch.cosine_similarity(found[kind], found["exact"], dim=0) > cosine


# --- any methods on any image -------------------------------------------------------------------


def png(width: int, height: int, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "png")
    return buffer.getvalue()


def upload(control, name: str, content: bytes) -> None:
    half = len(content) // 2  # as the browser sends it: in pieces
    for piece, first in ((content[:half], True), (content[half:], False)):
        control._take(control, {"name": name, "first": first, "last": not first},
                      [memoryview(piece)])


def sent(comparison: swipe.Comparison) -> dict[str, np.ndarray]:
    """The pictures that a browser gets, (h, w, 3)."""
    found = re.findall('<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', comparison.figures)
    return {label: np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
            for label, content in found}


def test_methods_explorer_restores_what_is_chosen():
    explorer = MethodsExplorer()
    assert explorer.picture.figures.count("<figure ") == 4
    explorer.controls["methods"].value = ("tikhonov",)
    assert explorer.picture.figures.count("<figure ") == 3
    for name in ("image", "noise", "std"):
        before, control = explorer.picture.figures, explorer.controls[name]
        control.value = ends(control)[1]
        assert explorer.picture.figures != before and explorer.status.value == ""
    shown = explorer.picture.figures
    upload(explorer.upload, "<bad>.png", b"not an image")
    assert "&lt;bad&gt;.png: cannot read" in explorer.status.value
    assert explorer.picture.figures == shown
    for colour in ("red", "blue"):  # another file of the same name
        content = png(140, 160, colour)
        upload(explorer.upload, "mine.png", content)
        assert explorer.controls["image"].value == "mine.png"
        assert "already blurred use Your photograph" in explorer.status.value
        assert (sent(explorer.picture)["Original"] == Image.new("RGB", (1, 1), colour)
                .getpixel((0, 0))).all()
    drawn = []
    explorer.picture.observe(drawn.append, "figures")
    explorer.reset()
    assert explorer.controls["methods"].value == ("tikhonov", "jfb")
    assert explorer.status.value == "" and len(drawn) == 1


def test_uploads_are_blurred_as_scenes_that_go_on():
    """Their border is no darker, and all is what SciPy makes of the larger scene."""
    scene = skimage.data.astronaut()[100:232, 100:232]
    content = io.BytesIO()
    Image.fromarray(scene).save(content, "png")
    explorer = MethodsExplorer()
    explorer.controls["noise"].value = 1e-3
    upload(explorer.upload, "mine.png", content.getvalue())
    pictures = sent(explorer.picture)
    assert np.array_equal(pictures["Original"], scene[2:-2, 2:-2])
    row = np.exp(-0.5 * np.arange(-2, 3) ** 2 / 5)
    kernel = np.outer(row, row)[..., None] / row.sum() ** 2
    blurred = scipy.ndimage.convolve(scene.astype(float), kernel)[2:-2, 2:-2]
    assert np.abs(pictures[METHODS["measurement"].label] - blurred).max() < 255 * 0.006
    assert all(picture.shape == (128, 128, 3) for picture in pictures.values())


def test_one_missing_network_leaves_the_other_methods(weights):
    (weights / "jfb.safetensors").unlink()
    explorer = MethodsExplorer(weights)
    assert "no weights at" in explorer.status.value
    assert 'data-label="Tikhonov"' in explorer.picture.figures
    explorer.controls["methods"].value = ("tikhonov",)
    assert explorer.status.value == ""


# --- your photograph ----------------------------------------------------------------------------


@pytest.fixture
def explorer(tmp_path) -> PhotographExplorer:
    """With a method that takes no time, and its example restored."""
    return PhotographExplorer("tikhonov", folder=tmp_path)


def press(explorer: PhotographExplorer) -> None:
    explorer.button.click()
    explorer.worker.join()


def tiff(pixels: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, pixels, **options)
    return content.getvalue()


def blurred(text: str, noise_std: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A photograph (120, 150) and its picture, made by SciPy on a larger scene, then cut."""
    x = skimage.data.coffee()[100:300, 200:400].mean(axis=2) / 255
    d = scipy.ndimage.convolve(x, kernel_option.parse(text).numpy())
    d = d + noise_std * np.random.default_rng(seed).standard_normal(d.shape)
    return x[40:160, 25:175], d[40:160, 25:175]


def offered(explorer: PhotographExplorer) -> tuple[str, bytes]:
    """Name and content of the file that the link gives."""
    name, content = re.search(r'<a download="([^"]*)" href="data:image/\w+;base64,([^"]*)">',
                              explorer.status.value).groups()
    return name, base64.b64decode(content)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.square(a - b).mean())


def test_example_is_what_a_camera_sees_and_comes_out_better():
    explorer = PhotographExplorer()
    scene, kernel = skimage.data.astronaut() / 255, kernel_option.parse(your_photograph.EXAMPLE)
    d = scipy.ndimage.convolve(scene, kernel[..., None].numpy())
    below, right = (n - 1 - n // 2 for n in kernel.shape)  # what a camera does not see whole
    d, truth = (image[20 + below:180 + below, 140 + right:300 + right] for image in (d, scene))
    pictures = {label: picture / 255 for label, picture in sent(explorer.comparison).items()}
    assert (pictures["as it was"] - d).std() == pytest.approx(0.01, rel=0.05)
    assert decibels(pictures["restored"], truth) > decibels(pictures["as it was"], truth) + 4
    assert explorer.noise.value == pytest.approx(0.01, rel=0.2)  # estimated, and shown
    name, content = offered(explorer)
    assert name == "example-jfb.png"
    result = np.asarray(Image.open(io.BytesIO(content))) / 255
    np.testing.assert_allclose(result, pictures["restored"], atol=1.01 / 255)  # ties are rounded


@pytest.mark.parametrize(("text", "dtype"), [("gaussian:1.5", "uint16"), ("disk:2.5", "float32")])
def test_upload_is_restored_in_its_own_depth(explorer, text, dtype):
    truth, d = blurred(text, 0.01)
    full = 1 if dtype == "float32" else np.iinfo(dtype).max
    d = (d * full if full == 1 else np.rint(d * full).clip(0, full)).astype(dtype)
    upload(explorer.upload, "mine.tif", tiff(d))
    assert "150 x 120 pixels" in explorer.status.value
    assert explorer.button.button_style == "primary"
    kind, numbers = text.split(":")
    explorer.kernel.kind.value, explorer.method.value = kind, "total-variation"
    for control, number in zip(explorer.kernel.shapes[kind], numbers.split(","), strict=False):
        control.value = float(number)
    assert explorer.kernel.kernel()[0].startswith(text)
    press(explorer)
    assert explorer.button.button_style == "" and explorer.button.description == "Restore"
    name, content = offered(explorer)
    assert name == f"mine-total-variation.{'tif' if full == 1 else 'png'}"
    if full == 1:
        result = tifffile.imread(io.BytesIO(content))
    else:
        result = np.asarray(Image.open(io.BytesIO(content)))
    assert result.dtype == dtype and result.shape == d.shape
    assert decibels(result / full, truth) > decibels(d / full, truth) + 1.5


def test_an_estimated_shake_is_drawn_beside_the_controls(explorer, monkeypatch):
    upload(explorer.upload, "mine.tif", tiff(blurred("disk:2.5", 0.01)[1].astype("float32")))
    explorer.kernel.kind.value, explorer.method.value = "estimated", "total-variation"
    assert explorer.kernel.outline.layout.display == "none"
    monkeypatch.setattr(blind, "estimate", lambda d, restorer: (kernels.disk(2.5), None))
    press(explorer)
    assert "kernel a shake" in explorer.status.value
    assert explorer.kernel.outline.layout.display == ""
    assert "5 x 5 pixels" in explorer.kernel.about.value


def test_every_kind_of_kernel_has_its_own_sliders():
    controls = KernelControls()
    std, size = controls.shapes["gaussian"]
    for kind, own in controls.shapes.items():
        controls.kind.value = kind
        assert all(control.layout.display == ("" if control in own else "none")
                   for control in controls.controls[1:])
    controls.kind.value = "gaussian"
    std.value = 1.2
    assert size.value == 9  # reaches three of them
    before, size.value = controls.outline.value, 5
    assert torch.equal(controls.kernel()[1], kernels.gaussian(1.2, 5))
    assert "5 x 5" in controls.about.value and controls.outline.value != before


def test_kernel_is_read_from_a_file(explorer):
    kernel = np.random.default_rng(0).integers(0, 255, (4, 7)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(kernel).save(content, "png")
    explorer.kernel.kind.value = "a file"
    assert "there is no kernel yet" in explorer.kernel.about.value
    upload(explorer.kernel.file, "psf.png", content.getvalue())
    assert "7 x 4" in explorer.kernel.about.value
    np.testing.assert_allclose(explorer.kernel.kernel()[1], kernel / kernel.sum(dtype=float))
    press(explorer)
    assert "kernel psf.png" in explorer.status.value


def test_bad_input_is_a_line(explorer):
    shown = explorer.comparison.figures
    upload(explorer.upload, "<bad>.png", b"not an image")
    assert "&lt;bad&gt;.png: cannot read" in explorer.status.value
    assert explorer.comparison.figures == shown
    explorer.kernel.kind.value = "a file"
    upload(explorer.kernel.file, "psf.txt", b"0 0 0\n0 0 0")
    press(explorer)
    for line in (explorer.kernel.about.value, explorer.status.value):
        assert "the kernel psf.txt has the sum 0" in line
    explorer.kernel.kind.value = "motion"
    assert "color" not in explorer.kernel.about.value
    upload(explorer.upload, "small.png", png(6, 5))
    press(explorer)
    assert "smaller than the 9 x 7 blur kernel" in explorer.status.value
    explorer.start_anew.click()
    explorer.worker.join()
    assert explorer.comparison.figures == shown and "example-" in offered(explorer)[0]


def test_what_is_chosen_is_told_and_what_is_found_is_said(explorer, monkeypatch):
    told = []

    def doubtful(_, d, kernel, noise_std, border, progress, gamma):
        told.append((noise_std, border, gamma))
        return Restored(d, 0.02, [Warning("kernel", "it is <b>", {"kernel": "disk:2"}),
                                  Warning("noise", "noisy", {"noise_std": 0.1})], 1)

    monkeypatch.setattr(your_photograph, "restore", doubtful)
    press(explorer)
    assert explorer.noise.disabled and explorer.noise.value == 0.02
    lines = re.findall("<div.*?</div>", explorer.status.value)
    assert len(lines) == 3 and "color" in lines[1]
    assert "it is &lt;b&gt;: try kernel disk:2<" in lines[1]
    assert "noisy: try noise std 0.1<" in lines[2]
    explorer.estimated.value, explorer.noise.value, explorer.border.value = False, 0.1, "black"
    assert not explorer.noise.disabled
    press(explorer)
    assert told == [(None, "unknown", None), (0.1, "black", None)]
    upload(explorer.upload, "mine.tif", tiff(np.full((40, 50), 3000, np.uint16)))
    assert "4095 for white" in explorer.status.value


def test_every_page_of_a_stack_is_restored(explorer):
    pages = np.stack([blurred("motion:9,30", 0.01, seed)[1] for seed in range(3)])
    upload(explorer.upload, "stack.tif", tiff(pages.astype(np.float32), photometric="minisblack"))
    assert "3 pages, of which the first is shown" in explorer.status.value
    press(explorer)
    name, content = offered(explorer)
    result = tifffile.imread(io.BytesIO(content))
    assert name == "stack-tikhonov.tif" and result.shape == pages.shape
    np.testing.assert_allclose(result[0], explorer.result[0], atol=1e-6)
    assert not np.allclose(result[0], result[1], atol=1e-3)


def test_progress_is_a_line(explorer, monkeypatch):
    said = []
    monkeypatch.setattr(explorer, "say", lambda line, *_, **__: said.append(line))
    monkeypatch.setattr("jfbnb.photo.restore.TILE", 100)
    press(explorer)
    tiles = int(re.fullmatch(r"restoring, (\d+) tiles: 0%", said[0])[1])
    assert tiles > 1 and len(said) == tiles + 2
    for i, line in enumerate(said[1:-1], 1):
        assert re.fullmatch(rf"restoring, {tiles} tiles: {i / tiles:.0%}, about \d+ s to go", line)


def test_restoring_stops_within_a_tile(explorer, monkeypatch):
    """At the next evaluation, though no tile of it would ever end; and it says so at once."""
    begun, go_on = threading.Event(), threading.Event()

    def endless(_, d, kernel, noise_std, border, progress, gamma):
        progress(0, 2)
        begun.set()
        assert go_on.wait(60)
        for _ in range(1000):
            torch.nn.Identity()(d)
        raise AssertionError("it was not stopped")

    shown = explorer.comparison.figures
    with monkeypatch.context() as patch:
        patch.setattr(your_photograph, "restore", endless)
        explorer.button.click()
        assert begun.wait(60)
        assert explorer.button.description == "Stop" and explorer.upload.disabled
        assert "restoring, 2 tiles: 0%" in explorer.status.value
        explorer.button.click()
        assert "stopping" in explorer.status.value
        go_on.set()
        explorer.worker.join()
    assert "stopped" in explorer.status.value and explorer.comparison.figures == shown
    assert explorer.button.description == "Restore" and not explorer.upload.disabled
    press(explorer)
    assert offered(explorer)


def test_a_large_result_is_written_not_linked(explorer, tmp_path, monkeypatch):
    _, content = offered(explorer)
    monkeypatch.setattr(your_photograph, "LINKED", 1000)
    press(explorer)
    file = tmp_path / "example-tikhonov.png"
    assert str(file) in explorer.status.value and "<a" not in explorer.status.value
    assert file.read_bytes() == content
    file.unlink()
    file.mkdir()
    press(explorer)
    assert "cannot write" in explorer.status.value and explorer.button.description == "Restore"


def test_photographs_without_weights(tmp_path):
    """The picture is there, no larger than a browser can do with, and smaller without a kernel."""
    explorer = PhotographExplorer(weights=tmp_path)
    assert "no model card" in explorer.status.value
    upload(explorer.upload, "mine.png", png(3000, 2000))
    assert {picture.shape for picture in sent(explorer.comparison).values()} == {(800, 1200, 3)}
    bundle, metadata = explorer._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.size == (800, 267) and len(bundle["image/png"]) < 200_000
    assert "restored" in metadata["image/png"]["alt"]


def test_a_figure_shows_itself_as_a_cells_last_line(x):
    picture = image_row({"a": x[0], "b": x[0]}, {"a": 30.0})._repr_png_()
    assert Image.open(io.BytesIO(picture)).width > 400
