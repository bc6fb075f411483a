"""The widgets without a browser: their state, their callbacks, and what they say of bad input."""

import io
import re
import shutil
import struct
import subprocess
import time
from datetime import UTC, datetime

import pytest
import torch
from PIL import Image

from jfbnb import datasets, explorers, widgets
from jfbnb.baselines import gradient_descent_iterate, tikhonov_gradient_descent
from jfbnb.common import UserError
from jfbnb.datasets import bundled_photos
from jfbnb.explorers import (
    BlurExplorer,
    DenoiserExplorer,
    GradientExplorer,
    MethodsExplorer,
    SolverExplorer,
    TikhonovExplorer,
    read_upload,
)
from jfbnb.maps import SplittingMap
from jfbnb.methods import METHODS, RELEASED, Tuning, load_model
from jfbnb.metrics import psnr
from jfbnb.operators import Blur
from jfbnb.widgets import compare, to_png


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return bundled_photos("validation", 64)[:1].as_float()


def released_map() -> SplittingMap:
    """JFB's, on a blur of 64 x 64 pixels."""
    settings = Tuning.load(RELEASED / "tuning.json").settings(METHODS["jfb"])
    return load_model(METHODS["jfb"], settings, RELEASED).T.on(Blur(64, 5, 2.0))


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


def test_comparison_asks_nothing_of_the_outside(x):
    page = compare({"a": x, "b": x}).to_html()
    assert not re.search(r"https?:|//\w+\.|import |fetch\(|XMLHttp", page.replace("// ", ""))


def test_two_comparisons_on_a_page_have_names_of_their_own(x):
    shown = compare({"a": x, "b": x})
    names = [re.search(r'id="(jfbnb-\w+)"', shown.to_html())[1] for _ in range(2)]
    assert names[0] != names[1]


def test_pictures_are_exact_to_8_bits(x):
    pixels = torch.tensor(list(Image.open(io.BytesIO(to_png(x[0]))).convert("RGB").tobytes()))
    assert torch.equal(pixels.view(64, 64, 3).permute(2, 0, 1), (x[0] * 255).round().long())


@pytest.mark.parametrize(("images", "truth", "message"), [
    ({"a": torch.zeros(3, 8, 8)}, None, "at least two"),
    ({"a": torch.zeros(3, 8, 8), "b": torch.zeros(3, 8, 9)}, None, "one size"),
    ({"a": torch.zeros(3, 8, 8), "b": torch.zeros(2, 3, 8, 8)}, None, "one image"),
    ({"a": torch.zeros(3, 8, 8), "b": [1, 2]}, None, "not an image"),
    ({"a": torch.zeros(3, 8, 8), "b": torch.zeros(3, 8, 8)}, "c", "truth is 'c'"),
])
def test_what_cannot_be_compared_is_said(images, truth, message):
    with pytest.raises(UserError, match=message):
        compare(images, truth)


def test_script_is_valid_javascript():
    if shutil.which("node") is None:
        pytest.skip("node is not installed; the browser tests run the script")
    subprocess.run(["node", "--check", widgets.__file__.replace("widgets.py", "compare.js")],
                   check=True)


# --- the explorers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blur", "tikhonov", "denoiser", "solver", "gradient"])
def test_every_control_changes_the_picture_and_reset_restores_it(make, name):
    explorer = make[name]()
    first, numbers = explorer.picture.value, explorer.status.value
    assert first[:4] == b"\x89PNG"
    if name == "gradient":  # paths have a length, so that the learning rate shows
        explorer.controls["steps"].value = 5
    for control in explorer.controls.values():
        before, value = explorer.picture.value, control.value
        if hasattr(control, "options"):
            control.value = next(o for o in control.options if o != control.value)
        else:
            low = control.base ** control.min if hasattr(control, "base") else control.min
            high = control.base ** control.max if hasattr(control, "base") else control.max
            control.value = high if control.value < (low + high) / 2 else low
        assert explorer.picture.value != before, control.description
        control.value = value
    explorer.reset()
    assert explorer.picture.value == first and explorer.status.value == numbers


@pytest.mark.parametrize("name", ["blur", "tikhonov", "denoiser", "solver", "gradient"])
@pytest.mark.parametrize("end", ["min", "max"])
def test_sliders_at_their_ends_do_not_break_an_explorer(make, name, end):
    explorer = make[name]()
    for control in explorer.controls.values():
        if hasattr(control, "min"):
            value = getattr(control, end)
            control.value = control.base**value if hasattr(control, "base") else value
    assert "color:#b00020" not in explorer.status.value
    assert not re.search(r"\bnan\b|-inf", explorer.status.value)


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


def test_solver_explorer_says_that_it_diverges(x):
    T = released_map()
    with torch.no_grad():
        T.D.network.layers[-1].weight.mul_(-20)  # adds noise in the place of taking it away
    explorer = SolverExplorer(T, x, 0.01)
    explorer.controls["solver"].value = "Picard"
    assert "it diverges" in explorer.status.value
    explorer.controls["k"].value = explorer.MOST - 1
    assert explorer.picture.value[:4] == b"\x89PNG"


def test_explorers_have_a_picture_for_those_without_a_kernel(make):
    bundle = make["denoiser"]()._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)


def test_closed_form_of_gradient_descent(x):
    A = Blur(64, 5, 2.0)
    d = A(x).double()
    for k in (0, 1, 7):
        expected = tikhonov_gradient_descent(A, d, 0.02, 0.8, k)
        torch.testing.assert_close(gradient_descent_iterate(A, d, 0.02, 0.8, k), expected)


@pytest.mark.parametrize(("kind", "cosine"), [("Neumann", 0.999), ("JFB", 0.4)])
def test_toy_gradients_are_those_of_the_paper(kind, cosine):
    """Against finite differences of the loss at the solved fixed point."""
    explorer = GradientExplorer()
    theta = torch.tensor([-0.8, 0.5], dtype=torch.float64)
    T = explorers.ToyMap(0.6, 1.0, theta)
    goal = T.solution(torch.tensor(explorer.GOAL, dtype=torch.float64))

    def loss(point):
        return 0.5 * (T.solution(point) - goal).square().sum()

    h = 1e-6 * torch.eye(2, dtype=torch.float64)
    numeric = torch.stack([(loss(theta + e) - loss(theta - e)) / 2e-6 for e in h])
    gradients = explorer.gradients(0.6, 180 / torch.pi, terms=20)
    exact = gradients["exact"](theta)
    torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-9)
    assert torch.cosine_similarity(gradients[kind](theta), exact, dim=0) > cosine


def test_solver_explorer_shows_what_the_solver_did(make):
    explorer = make["solver"]()
    states, residuals = explorer.iterates("splitting", "Anderson")
    assert len(states) == len(residuals) == explorer.MOST
    assert residuals[-1] < 1e-3 < residuals[0]


# --- any methods on any image -------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, "png")
    return buffer.getvalue()


def upload(explorer: MethodsExplorer, name: str, content: bytes) -> None:
    explorer.upload.value = ({"name": name, "type": "image/png", "size": len(content),
                              "content": memoryview(content),
                              "last_modified": datetime.now(UTC)},)


def test_methods_explorer_restores_what_is_chosen():
    explorer = MethodsExplorer()
    assert explorer.comparison.figures.count("<figure ") == 4
    explorer.methods.value = ("tikhonov",)
    assert explorer.comparison.figures.count("<figure ") == 3
    before = explorer.comparison.figures
    explorer.image.value = explorer.image.options[1]
    assert explorer.comparison.figures != before and explorer.status.value == ""
    upload(explorer, "mine.png", png(300, 200))
    assert explorer.image.value == "mine.png" and explorer.status.value == ""
    explorer.reset()
    assert explorer.methods.value == MethodsExplorer.START


def test_methods_explorer_at_the_ends_of_its_sliders():
    explorer = MethodsExplorer()
    explorer.methods.value = ("gradient-descent", "tikhonov")
    for end in (explorer.noise.min, explorer.noise.max):
        before = explorer.comparison.figures
        explorer.noise.value = explorer.noise.base**end
        assert explorer.comparison.figures != before and explorer.status.value == ""
    explorer.methods.value = ()
    assert explorer.comparison.figures.count("<figure ") == 2


@pytest.mark.parametrize(("content", "message"), [
    (b"", "no readable image"), (b"not an image", "no readable image"),
    (png(300, 200)[:200], "no readable image"), (png(9000, 8000), "too many")])
def test_bad_uploads_are_a_line(content, message):
    explorer = MethodsExplorer()
    shown = explorer.comparison.figures
    upload(explorer, "bad.png", content)
    assert message in explorer.status.value and "bad.png" in explorer.status.value
    assert explorer.comparison.figures == shown
    explorer.methods.value = ("tikhonov",)
    assert explorer.status.value == ""


def test_whatever_the_decoder_raises_is_a_line(monkeypatch):
    def fail(*_):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(datasets, "_decode", fail)
    with pytest.raises(UserError, match="no readable image"):
        read_upload(png(30, 20), 32)


def test_uploads_keep_their_middle():
    image = read_upload(png(300, 200), 32)
    assert image.shape == (1, 3, 32, 32)
    expected = torch.tensor([200, 100, 50]) / 255
    torch.testing.assert_close(image[0].mean(dim=(1, 2)), expected, rtol=0, atol=1e-3)


def test_missing_weights_are_a_line(tmp_path):
    explorer = MethodsExplorer(tmp_path)
    assert "no tuned parameters" in explorer.status.value
    assert explorer.comparison.figures.count("<figure ") == 2  # original and measurement


def test_one_missing_network_leaves_the_other_methods(weights):
    (weights / "jfb.safetensors").unlink()
    explorer = MethodsExplorer(weights)
    assert "no weights at" in explorer.status.value
    assert 'data-label="Tikhonov"' in explorer.comparison.figures
    explorer.methods.value = ("tikhonov",)
    assert explorer.status.value == ""


@pytest.mark.parametrize("name", ["blur", "tikhonov", "denoiser", "solver", "gradient"])
def test_explorers_answer_fast(make, name):
    """0.3 s is the aim on two cores; the test allows for a busy machine."""
    explorer = make[name]()
    control = list(explorer.controls.values())[-1]
    seconds = []
    for value in (control.min, control.max, control.min):
        clock = time.perf_counter()
        control.value = value if not hasattr(control, "base") else control.base**value
        seconds.append(time.perf_counter() - clock)
    assert min(seconds) < 1.0
