"""`import jfbnb`: what it offers, and images as arrays of every kind."""

import doctest
import importlib
import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import torch

import jfbnb
from jfbnb import UserError
from jfbnb.core import kernels
from jfbnb.core.models import Restorer
from jfbnb.photo import arrays

KERNEL = np.outer((1, 4, 6, 4, 1), (1, 4, 6, 4, 1)) / 256


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Coffee, blurred by SciPy, with noise of 0.01; uint8 (72, 80, 3)."""
    scene = skimage.data.coffee()[100:190, 200:300] / 255
    d = scipy.ndimage.convolve(scene, KERNEL[..., None])[9:81, 10:90]
    d = d + 0.01 * np.random.default_rng(0).standard_normal(d.shape)
    return np.rint(255 * d.clip(0, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def tikhonov():
    return jfbnb.load("tikhonov")


@pytest.fixture(scope="module")
def expected(photo, tikhonov) -> np.ndarray:
    """Restored as floats (72, 80, 3)."""
    return jfbnb.deblur(photo / 255, KERNEL, 0.01, tikhonov).image


def test_import_is_light_and_changes_nothing():
    """In a process of its own: torch and NumPy first, then the package."""
    program = """
import os, random, sys
import numpy as np, torch
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist(),
            torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32, random.getstate(),
            np.random.get_state()[1].tolist(), np.geterr(), dict(os.environ))
before, loaded = state(), set(sys.modules)
import jfbnb
assert {"deblur", "solve", "jfb"} < set(dir(jfbnb))
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
heavy = new & {"matplotlib", "ipywidgets", "skimage", "pandas", "scipy", "PIL", "IPython"}
assert not heavy, heavy
for name in jfbnb.__all__:
    getattr(jfbnb, name)
assert state() == before
assert not {"matplotlib", "ipywidgets", "IPython"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_are_those_of_the_modules():
    for name in jfbnb.__all__:
        value = getattr(jfbnb, name)
        assert value.__name__ == name and inspect.getdoc(value)
        assert getattr(importlib.import_module(value.__module__), name) is value
    with pytest.raises(AttributeError, match="no attribute 'deblurr'"):
        jfbnb.deblurr  # noqa: B018


@pytest.mark.parametrize("name", ["jfbnb", *jfbnb.__all__])
def test_examples_of_the_docstrings(name):
    value = jfbnb if name == "jfbnb" else getattr(jfbnb, name)
    for example in doctest.DocTestFinder(recurse=False).find(value, name, module=False):
        runner = doctest.DocTestRunner()
        runner.run(example)
        assert not runner.failures


# --- arrays -------------------------------------------------------------------------------------

LAYOUTS = {
    "(H, W, C)": lambda x: x, "(C, H, W)": lambda x: x.transpose(2, 0, 1),
    "(B, H, W, C)": lambda x: x[None], "(B, C, H, W)": lambda x: x.transpose(2, 0, 1)[None],
}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
def test_an_image_keeps_type_and_layout(photo, expected, tikhonov, dtype, layout, kind):
    white = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    d = LAYOUTS[layout](photo / 255 * white)
    d = (np.rint(d) if white > 1 else d).astype(dtype)
    given = d.copy()
    result = jfbnb.deblur(torch.from_numpy(d) if kind == "torch" else d, KERNEL, 0.01, tikhonov)
    assert isinstance(result.image, torch.Tensor if kind == "torch" else np.ndarray)
    image = np.asarray(result.image)
    assert image.dtype == dtype and image.shape == d.shape and np.array_equal(d, given)
    clipped = expected.clip(0, 1) if white > 1 else expected
    np.testing.assert_allclose(image / white, LAYOUTS[layout](clipped), atol=0.51 / white + 2e-5)
    assert result.noise_std == ([0.01] if layout.startswith("(B") else 0.01)


def test_grey_is_the_mean_of_three_equal_channels(photo, tikhonov):
    grey = photo.mean(axis=2) / 255
    colour = jfbnb.deblur(np.repeat(grey[..., None], 3, axis=2), KERNEL, 0.01, tikhonov).image
    for d in (grey, grey[None], grey[..., None]):
        image = jfbnb.deblur(d, KERNEL, 0.01, tikhonov).image
        assert image.shape == d.shape
        np.testing.assert_allclose(image.reshape(grey.shape), colour[..., 0], atol=1e-6)


def test_which_end_has_the_channels(tikhonov):
    """Where both may: the last axis of an array, the first of a tensor."""
    d = np.random.default_rng(0).random((3, 20, 3))
    box, alone = np.ones((1, 5)), 0.01 / 3**0.5  # the method is told sqrt 3 times the noise of grey
    rows = np.stack([jfbnb.deblur(d[..., c], box, alone, tikhonov).image for c in range(3)], -1)
    planes = np.stack([jfbnb.deblur(plane, box[:, :3], alone, tikhonov).image for plane in d])
    np.testing.assert_allclose(jfbnb.deblur(d, box, 0.01, tikhonov).image, rows, atol=1e-6)
    tensor = jfbnb.deblur(torch.from_numpy(d), box[:, :3], 0.01, tikhonov).image
    np.testing.assert_allclose(tensor, planes, atol=1e-6)


@pytest.mark.parametrize("change", [
    lambda x: x.astype(">f4"), lambda x: x[::-1].copy()[::-1], np.asfortranarray],
    ids=["big-endian", "negative strides", "Fortran"])
def test_the_memory_layout_has_no_effect(photo, expected, tikhonov, change):
    d = change(photo / 255)
    d.flags.writeable = False
    image = jfbnb.deblur(d, KERNEL, 0.01, tikhonov).image
    assert image.dtype == d.dtype
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_restored_is_nearer_to_the_truth():
    scene = skimage.data.coffee()[100:210, 200:320] / 255
    d = scipy.ndimage.convolve(scene, KERNEL[..., None])[10:-10, 10:-10]
    d = d + 0.01 * np.random.default_rng(0).standard_normal(d.shape)
    image, truth = jfbnb.deblur(d, KERNEL).image, scene[10:-10, 10:-10]
    assert ((image - truth) ** 2).mean() < 0.5 * ((d - truth) ** 2).mean()


def test_a_kernel_in_every_form(photo, tikhonov):
    disk = kernels.disk(2)
    expected = jfbnb.deblur(photo, disk, 0.01, tikhonov).image
    for kernel in ("disk:2", disk.numpy(), (100 * disk).float().requires_grad_(), disk.tolist()):
        image = jfbnb.deblur(photo, kernel, 0.01, tikhonov).image
        assert abs(image.astype(int) - expected).max() <= 1


def test_result_has_what_the_solver_reports(photo):
    before = torch.get_rng_state()
    d = torch.from_numpy(np.stack([photo, photo[::-1]])).requires_grad_(False)
    result = jfbnb.deblur(d, KERNEL, method="total-variation")
    assert result.image.shape == d.shape and torch.equal(torch.get_rng_state(), before)
    assert result.noise_std == pytest.approx([0.01, 0.01], rel=0.2)
    assert result.converged == [True, True] and result.warnings == [[], []]
    assert all(residual <= 1e-4 for residual in result.residual) and min(result.iterations) > 5
    assert jfbnb.deblur(photo, KERNEL, method="measurement").converged is None


def test_a_doubtful_result_is_the_safer_methods_unless_one_is_named(photo, monkeypatch):
    methods = {"jfb": Restorer(lambda A, d, noise_std: (A.guess(d) * 3 - 1, None)),
               "total-variation": Restorer(lambda A, d, noise_std: (A.guess(d), None))}
    monkeypatch.setattr(arrays, "load", lambda name, device: methods[name])
    safe, insisted = (jfbnb.deblur(photo, KERNEL, 0.01, method) for method in (None, "jfb"))
    assert safe.doubtful and insisted.doubtful and safe.warnings == insisted.warnings
    assert np.array_equal(safe.image, photo) and not np.array_equal(insisted.image, photo)


def test_warnings_are_values(photo, tikhonov):
    warning, = jfbnb.deblur(photo, KERNEL, 0.1, tikhonov).warnings
    assert warning.kind == "noise" and str(warning).endswith(f": try noise_std="
                                                             f"{warning.suggestion['noise_std']}")
    dark = photo.astype(np.uint16) * 16  # 12 bits
    kinds = [w.kind for w in jfbnb.deblur(dark, KERNEL, method=tikhonov).warnings]
    assert "range" in kinds


# --- refusals -----------------------------------------------------------------------------------

GREY = np.full((20, 20), 0.5)


@pytest.mark.parametrize(("arguments", "message"), [
    (("photo.png", KERNEL), "an image of type str: give a NumPy array or a tensor"),
    ((GREY.tolist(), KERNEL), "an image of type list"),
    ((GREY.astype(int), KERNEL), "an image of int64: give uint8, uint16, or floats"),
    ((GREY > 0, KERNEL), "an image of bool"),
    ((GREY.astype(complex), KERNEL), "an image of complex128"),
    ((255 * GREY, KERNEL), "floats from 127.5 to 127.5: give finite ones in about"),
    ((GREY * np.nan, KERNEL), "floats from nan to nan"),
    ((torch.full((20, 20), torch.inf), KERNEL), "floats from inf to inf"),
    ((np.zeros((20, 20, 4), np.uint8), KERNEL), r"an image of shape \(20, 20, 4\).*alpha"),
    ((GREY[0], KERNEL), r"an image of shape \(20,\)"),
    ((GREY[:0], KERNEL), r"an image of shape \(0, 20\)"),
    ((GREY[:4], KERNEL), "20 x 4 pixels is smaller than the 5 x 5 blur kernel"),
    ((GREY, KERNEL[0]), r"a kernel of shape \(5,\)"),
    ((GREY, KERNEL - KERNEL.mean()), r"a kernel of shape \(5, 5\) and sum"),
    ((GREY, np.inf * KERNEL), "and sum inf"),
    ((GREY, jfbnb.Inpainting(np.ones((20, 20)))), "a kernel of type Inpainting"),
    ((GREY, KERNEL, "much"), "noise std much: give one from 1e-5"),
    ((GREY, KERNEL, 0.01, "tikhonov", "mirror"), "border 'mirror'"),
    ((GREY, KERNEL, 0.01, "tikhonov", "unknown", "loud"), "gamma loud: give auto, srgb"),
])
def test_nonsense_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        arrays.deblur(*arguments)
    assert "\n" not in str(error.value)


def test_a_method_that_cannot_be_loaded(tmp_path):
    for options, message in ((("magic",), "magic"), (("jfb", tmp_path), str(tmp_path)),
                             (("jfb", None, "abacus"), "unknown device 'abacus'")):
        with pytest.raises(UserError, match=message):
            jfbnb.load(*options)


# --- in other people's scripts ------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda d: d[0], lambda d: d[:, :2], lambda d: d[:, [0, 1, 2, 0]], lambda d: d.double(),
    lambda d: (255 * d).byte(), lambda d: d.numpy()],
    ids=["unbatched", "2 channels", "4 channels", "float64", "uint8", "NumPy"])
def test_a_measurement_that_no_network_takes_is_one_line(change):
    A = jfbnb.Convolution(16, jfbnb.disk(1))
    d = change(A(torch.full((1, 3, 16, 16), 0.5)))
    T = jfbnb.SplittingMap(A, jfbnb.Denoiser(jfbnb.DnCNN(2, 4), sigma=0.05), tau=0.1)
    for use in (lambda: jfbnb.solve(T, d), lambda: jfbnb.load()(A, d, 0.01)):
        with pytest.raises(UserError, match=r"give|convert") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("noise_std", [-0.01, 0, np.nan, 25, "much", None])
@pytest.mark.parametrize("method", ["tikhonov", "jfb"])
def test_a_noise_level_that_is_none_is_refused(method, noise_std):
    A = jfbnb.Convolution(16, jfbnb.disk(1))
    with pytest.raises(UserError, match=f"noise std {noise_std}: give one from 1e-5"):
        jfbnb.load(method)(A, torch.zeros(1, 3, 14, 14), noise_std)


def test_released_weights_load_under_a_default_of_float64_draw_nothing_and_can_be_pickled():
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        methods = [pickle.loads(pickle.dumps(jfbnb.load(name)))
                   for name in ("jfb", "unrolled", "plug-and-play", "tikhonov")]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    A, d = jfbnb.Convolution(16, jfbnb.disk(1)), torch.full((1, 3, 14, 14), 0.5)
    for method in methods:
        first, _ = method(A, d, 0.01)
        method(A, d, 0.1)  # which leaves it as it was
        assert first.dtype == torch.float32 and torch.equal(method(A, d, 0.01)[0], first)
        if method.model:
            assert {p.dtype for p in method.model(A, 0.01).parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)
