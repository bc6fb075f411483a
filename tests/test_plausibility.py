"""The warnings on pictures that SciPy and Pillow have blurred and spoilt."""

import functools
import io
import itertools
import math
from unittest.mock import ANY

import numpy as np
import pytest
import scenes
import scipy.ndimage
import scipy.optimize
import scipy.signal
import skimage.data
import skimage.restoration
import torch
from PIL import Image

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.fixed_point import anderson
from jfbnb.core.models import Restorer
from jfbnb.photo import light, model_check
from jfbnb.photo.model_check import contradictions, estimate_noise
from jfbnb.photo.restore import restore

GAUSSIAN = kernels.gaussian(math.sqrt(5), 5)
ROUNDING = 1 / 255 / math.sqrt(12)
KERNELS = {"gaussian": GAUSSIAN, "motion": kernels.motion(9, 30), "disk": kernels.disk(3),
           "wide": kernels.gaussian(3, 15), "none": torch.ones(1, 1, dtype=torch.float64)}


@functools.cache
def blurred(photo: str, kernel: torch.Tensor) -> np.ndarray:
    """The middle of a photograph, blurred whole, (C, 192, 192) in [0, 1]."""
    scene = np.atleast_3d(getattr(skimage.data, photo)()) / 255
    top, left = ((n - 192) // 2 for n in scene.shape[:2])
    scene = scene[top - 16:top + 208, left - 16:left + 208]
    whole = scipy.signal.fftconvolve(scene, kernel.numpy()[..., None], mode="same", axes=(0, 1))
    return whole[16:-16, 16:-16].transpose(2, 0, 1)


def camera(photo: str, kernel: torch.Tensor, noise_std: float = 0.01, gain: float = 1.0,
           frame: int = 0, quality: int = 0, soft: float = 0, mosaic: bool = False
           ) -> torch.Tensor:
    """A camera's picture of 8 bits: noisy, cut off at black and white; framed, as JPEG."""
    d = gain * blurred(photo, kernel)
    d = d + noise_std * np.random.default_rng(0).standard_normal(d.shape)
    if soft:
        d = scipy.ndimage.gaussian_filter(d, (0, soft, soft))
    if mosaic:
        d = scenes.demosaiced(np.repeat(d, 3 // len(d), 0).transpose(1, 2, 0)).transpose(2, 0, 1)
    if frame:
        inside = d[:, frame:-frame, frame:-frame]
        d = np.pad(inside, ((0, 0), (frame, frame), (frame, frame)))
    pixels = np.round(255 * d.clip(0, 1)).astype(np.uint8)
    if quality:
        file = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(file, "JPEG", quality=quality)
        pixels = np.atleast_3d(Image.open(file)).transpose(2, 0, 1)
    return torch.from_numpy(pixels.astype(np.float32) / 255)


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_std", [0.003, 0.01, 0.05])
@pytest.mark.parametrize("blur", ["gaussian", "motion", "disk", "wide"])
@pytest.mark.parametrize("photo", ["coffee", "astronaut", "camera"])
def test_noise_of_blurred_photographs(photo, blur, noise_std):
    d = camera(photo, KERNELS[blur], noise_std)
    true = math.hypot(noise_std, ROUNDING)
    assert estimate_noise(d, KERNELS[blur]) == pytest.approx(true, rel=0.1)
    if len(d) == 1:
        assert estimate_noise(d.expand(3, -1, -1), KERNELS[blur]) == pytest.approx(
            estimate_noise(d, KERNELS[blur]))
        assert model_check.level(d, 0.01) == pytest.approx(0.01 * math.sqrt(3))


SPOILT = {f"JPEG {quality}": {"quality": quality} for quality in (80, 90, 98)} | {
    "soft": {"soft": 0.7}, "demosaiced": {"mosaic": True}}


@pytest.mark.parametrize(("spoilt", "noise_std"), [
    *((f"JPEG {quality}", noise_std) for quality in (80, 90, 98) for noise_std in (0.003, 0.01)),
    ("soft", 0.01), ("demosaiced", 0.01), ("soft", 0.03), ("demosaiced", 0.03)])
@pytest.mark.parametrize(("photo", "blur"), [
    ("coffee", "disk"), ("astronaut", "motion"), ("rocket", "wide"), ("moon", "disk")])
def test_noise_that_is_not_white(photo, blur, spoilt, noise_std):
    """Against the error's power at the frequencies that matter, along (1, 1, 1) or the mean."""
    d = camera(photo, KERNELS[blur], noise_std, **SPOILT[spoilt])
    error = (d - camera(photo, KERNELS[blur], 0.0, **SPOILT[spoilt] | {"quality": 0})).numpy()
    frequency = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(192)]))
    window = np.outer(*2 * [scipy.signal.get_window("hann", 192)])
    power = np.abs(np.fft.fft2(error * window)) ** 2 / (window**2).sum()
    shared = np.abs(np.fft.fft2(error.sum(axis=0) * window)) ** 2 / (window**2).sum() / len(d)
    band = (frequency > 0.12) & (frequency < 0.3)
    level = math.sqrt(max(power.mean(axis=0)[band].mean(), shared[band].mean()))
    assert 0.5 < estimate_noise(d, KERNELS[blur]) / level < 2


def test_noise_where_half_of_it_is_cut_off():
    """A black sky above, a white wall below: each shows half of its noise."""
    d = np.repeat([0.0, 0.5, 1.0], 64)[:, None] + np.zeros(192)
    d = d + 0.02 * np.random.default_rng(0).standard_normal(d.shape)
    assert estimate_noise(torch.tensor(d.clip(0, 1))[None], KERNELS["disk"]) == pytest.approx(
        0.02, rel=0.1)


def test_noise_alone_is_its_standard_deviation():
    d = 3 * torch.randn(1, 256, 100, generator=torch.manual_seed(0))
    assert estimate_noise(d, KERNELS["disk"]) == pytest.approx(3, rel=0.05)
    assert math.isnan(estimate_noise(d[..., :6], KERNELS["disk"]))


@pytest.mark.parametrize("noise_std", [0.003, 0.01])
def test_noise_that_is_cut_off_at_black_is_made_up_for(noise_std):
    noise = noise_std * torch.randn(3, 300, 300, generator=torch.manual_seed(0))
    d = (255 * noise.clamp(0, 1)).round() / 255
    assert d.mean() > 0.3 * noise_std
    assert model_check.replace_cut_noise(d, noise_std).mean().abs() < 0.05 * noise_std
    assert torch.equal(model_check.replace_cut_noise(d + 0.1, noise_std), d + 0.1)


def test_a_black_area_is_no_noise_that_is_cut_off():
    d = camera("coffee", KERNELS["wide"])
    d[:, :, :80] = 0
    assert (d == 0).float().mean() > 0.4 and torch.equal(model_check.replace_cut_noise(d, 0.1), d)
    assert [warning.kind for warning in contradictions(d, GAUSSIAN, 0.01)] == ["kernel"]


# --- contradictions -----------------------------------------------------------------------------

MISMATCHES = {
    "noise 0.03": ({"kernel": GAUSSIAN, "noise_std": 0.03}, "noise",
                   {"noise_std": pytest.approx(0.03, rel=0.1)}),
    "noise 0.1": ({"kernel": GAUSSIAN, "noise_std": 0.1}, "noise",
                  {"noise_std": pytest.approx(0.1, rel=0.1)}),
    "noise 0.001": ({"kernel": GAUSSIAN, "noise_std": 0.001}, "noise",
                    {"noise_std": pytest.approx(0.0015, rel=0.15)}),
    "sharp": ({"kernel": KERNELS["none"]}, "kernel", {}),
    "sharp without noise": ({"kernel": KERNELS["none"], "noise_std": 0.0}, "kernel", {}),
    "less blurred": ({"kernel": kernels.gaussian(1.0, 5)}, "kernel", {"kernel": ANY}),
    "more blurred": ({"kernel": KERNELS["wide"]}, "kernel", {"kernel": "gaussian:3"}),
    "motion": ({"kernel": kernels.motion(9, 0)}, "kernel", {"kernel": "motion:9,0"}),
    "diagonal motion": ({"kernel": kernels.motion(9, 45)}, "kernel", {"kernel": "motion:9,45"}),
    "disk": ({"kernel": kernels.disk(4)}, "kernel", {"kernel": "disk:4"}),
    "overexposed": ({"kernel": GAUSSIAN, "gain": 2.5}, "saturation", {}),
    "framed": ({"kernel": GAUSSIAN, "frame": 12}, "frame", {}),
    "JPEG": ({"kernel": GAUSSIAN, "quality": 20}, "jpeg", {}),
}


@pytest.mark.parametrize("photo", ["astronaut", "chelsea"])
@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_one_warning(mismatch, photo):
    spoilt, kind, suggestion = MISMATCHES[mismatch]
    warning, = contradictions(camera(photo, **spoilt), GAUSSIAN, 0.01)
    assert warning.kind == kind and warning.suggestion == suggestion
    assert "\n" not in str(warning) and str(warning) == "".join([
        warning.text, *(f": try {name}={value!r}" for name, value in warning.suggestion.items())])
    if kind == "frame":
        assert "frame (12 pixels at the top, 12 at" in warning.text


@pytest.mark.parametrize(("blur", "noise_std"), [
    ("gaussian", 0.003), ("gaussian", 0.02), ("motion", 0.01), ("disk", 0.005), ("wide", 0.03)])
@pytest.mark.parametrize("photo", ["coffee", "rocket", "camera"])
def test_the_right_model_gives_no_warning(photo, blur, noise_std):
    d = camera(photo, KERNELS[blur], noise_std)
    assert contradictions(d, KERNELS[blur], noise_std) == []


def margins() -> np.ndarray:
    """A page of ragged lines on white paper."""
    page, rng = np.ones((240, 230)), np.random.default_rng(0)
    for top in range(30, 210, 12):
        page[top:top + 7, 25:205] = np.where(rng.random((7, 180)) < 0.4, 0.1, 1)
    return page


def night() -> np.ndarray:
    sky, rng = np.zeros((200, 200)), np.random.default_rng(0)
    sky[*rng.integers(0, 200, (2, 100))] = rng.exponential(4, 100)
    return sky


def shake() -> torch.Tensor:
    """The path of a hand, in 15 x 15 pixels."""
    path = np.random.default_rng(3).standard_normal((2, 400)).cumsum(axis=1).cumsum(axis=1)
    path = 14 * (path - path.min(axis=1)[:, None]) / np.ptp(path)
    found = np.histogram2d(*path, bins=15, range=[[-0.5, 14.5]] * 2)[0]
    return torch.from_numpy(found / found.sum())


@pytest.mark.parametrize("noise_std", [0.003, 0.01])
@pytest.mark.parametrize(("scene", "kernel"), [
    *itertools.product((margins(), night()), (GAUSSIAN, KERNELS["disk"], KERNELS["motion"])),
    (skimage.data.coffee()[:240, :240].mean(axis=2) / 255, shake())])
def test_other_scenes_and_kernels_give_no_warning(scene, kernel, noise_std):
    d = scipy.ndimage.convolve(scene, kernel.numpy(), mode="nearest")
    d = d + noise_std * np.random.default_rng(0).standard_normal(d.shape)
    d = torch.from_numpy(np.rint(255 * d.clip(0, 1)) / 255).float()[None]
    assert contradictions(d, kernel, noise_std) == []


@pytest.mark.parametrize("blur", ["gaussian", "wide"])
def test_black_beyond_the_border(blur):
    scene = skimage.data.astronaut()[100:300, 150:350].astype(np.float64).transpose(2, 0, 1) / 255
    black, unknown = (
        torch.tensor(scipy.ndimage.convolve(scene, KERNELS[blur].numpy()[None], mode=mode)).float()
        for mode in ("constant", "reflect"))
    black, unknown = (d + 0.01 * torch.randn(d.shape, generator=torch.manual_seed(0))
                      for d in (black, unknown))
    assert contradictions(black, KERNELS[blur], 0.01, border="black") == []
    assert contradictions(unknown, KERNELS[blur], 0.01) == []
    warning, = contradictions(black, KERNELS[blur], 0.01)
    assert warning.suggestion == {"border": "black"}
    warning, = contradictions(unknown, KERNELS[blur], 0.01, border="black")
    assert warning.suggestion == {"border": "unknown"}


def test_restored_values_far_out_of_range():
    d = camera("coffee", GAUSSIAN)
    assert model_check.doubt(d) is None
    d[:, :20, :20] = 1.2
    warning = model_check.doubt(d)
    assert warning.kind == "range" and warning.text.startswith("1.1% of the restored values")


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (7, 7), (32, 32), (40, 200)])
def test_a_small_picture_gives_no_warning_on_its_kernel(size):
    sharp = camera("coffee", KERNELS["none"])[:, :size[0], 60:60 + size[1]]
    assert not any(w.kind == "kernel" for w in contradictions(sharp, GAUSSIAN, 0.02))


@pytest.mark.parametrize("size", [(2, 6), (41, 41), (301, 301)])
def test_any_kernel_is_taken(size):
    d, kernel = camera("coffee", GAUSSIAN), torch.full(size, 1 / math.prod(size)).double()
    assert estimate_noise(d, kernel) < 0.013
    assert len(contradictions(d, kernel, 0.01)) <= 1


# --- what `restore` does about it ---------------------------------------------------------------


def test_a_doubtful_result_gives_way_to_a_safer_method():
    d = camera("coffee", GAUSSIAN)
    swings = Restorer(lambda A, d, noise_std: (A.guess(d) * 3 - 1, None))
    told = []

    def calm(A, d, noise_std):
        told.append(noise_std)
        return A.guess(d) * (3 if len(told) < 3 else 1), None

    result = restore(swings, d, GAUSSIAN, 0.01)
    assert result.doubtful and result.warnings[0].kind == "range"
    safe = restore(swings, d, GAUSSIAN, 0.01, safer=Restorer(calm))
    assert safe.doubtful and safe.warnings == result.warnings
    assert told == pytest.approx([0.01, 0.02, 0.04]) and safe.noise_std == pytest.approx(0.04)
    assert torch.equal(safe.image, d)
    assert not restore(Restorer(lambda A, d, s: (A.guess(d), None)), d, GAUSSIAN).doubtful


def test_a_solve_that_fails_says_how():
    def hesitates(A, d, noise_std):
        x = A.guess(d)
        return x, anderson(lambda z: -z, x, 1e-6, 1)[1]

    result = restore(Restorer(hesitates), camera("coffee", GAUSSIAN), GAUSSIAN, 0.01)
    assert result.ends == ["stalled"] and result.converged is False
    warning = result.warnings[-1]
    assert warning.kind == "unconverged" and "in 1 iterations (1 stalled; " in warning.text


def test_light_is_restored_where_the_stored_values_contradict_their_model():
    scene = camera("coffee", GAUSSIAN, 0.0).double()
    assert light.decode(scene, "srgb").numpy() == pytest.approx(scenes.to_light(scene.numpy()))
    for gamma in ("srgb", 2.2, 1.0):
        assert light.encode(light.decode(scene, gamma), gamma).numpy() == pytest.approx(
            scene.numpy(), abs=1e-9)
    assert [light.parse(text) for text in ("auto", "linear", "2.2")] == [None, 1.0, 2.2]
    with pytest.raises(UserError, match="give auto, srgb, linear or a number"):
        light.parse("nan")
    calls = []

    def swings_once(A, d, noise_std):
        calls.append(noise_std)
        return A.guess(d) * (3 if len(calls) == 1 else 1), None

    result = restore(Restorer(swings_once), scene.float(), GAUSSIAN, 0.01)
    assert not result.doubtful and result.warnings[0].kind == "light"
    assert (result.image - scene).abs().max() < 1e-5
    slopes = np.gradient(scenes.to_light(np.linspace(0, 1, 1001)), 1e-3)
    true = np.sqrt((np.interp(scene.numpy(), np.linspace(0, 1, 1001), slopes) ** 2).mean())
    assert calls[1] / calls[0] == pytest.approx(true, rel=0.02)


def test_hot_pixels_are_replaced_and_two_values_refused():
    d = camera("coffee", KERNELS["disk"])
    assert model_check.replace_outliers(d, KERNELS["disk"]) == (d, [])
    hot = d.clone()
    hot[:, 40, 50] = 4
    mended, (warning,) = model_check.replace_outliers(hot, KERNELS["disk"])
    assert warning.text.startswith("1 pixel is") and (mended - d).abs().max() < 0.05
    # Without a blur a point may be as bright as that.
    assert model_check.replace_outliers(hot, KERNELS["none"])[1] == []
    with pytest.raises(UserError, match="only two values"):
        restore(None, (d > 0.5).float(), KERNELS["disk"])


def test_a_dim_picture_is_brightened_for_the_network():
    d = 0.04 * camera("coffee", GAUSSIAN)
    seen = []
    result = restore(Restorer(lambda A, d, s: (A.guess(seen.append((d, s)) or d), None)), d,
                     GAUSSIAN)
    (bright, noise_std), = seen
    assert bright.quantile(0.999) == pytest.approx(1, abs=0.01)
    assert result.noise_std == pytest.approx(0.04 * 0.01, rel=0.2)
    assert noise_std == pytest.approx(result.noise_std * (bright / d).nanmedian().item(), rel=1e-3)
    assert torch.allclose(result.image, d)


def test_misfit_is_the_least_that_scipy_finds():
    """Whittle's likelihood, written again from its formula, minimised by BFGS."""
    blocks = model_check._blocks(camera("astronaut", GAUSSIAN).mean(dim=0, keepdim=True), 64)[:, 0]
    window = np.outer(*(scipy.signal.get_window("hann", 64),) * 2)
    power = np.mean([np.abs(np.fft.fft2((b - b.mean()) * window))
                     for b in blocks.double().numpy()], axis=0) ** 2 / (window**2).sum()
    # Of n amplitudes with Rayleigh's distribution, sqrt(pi P / 4) is the mean and P the power.
    power /= np.pi / 4 + (1 - np.pi / 4) / len(blocks)
    f = np.fft.fftfreq(64)
    y, x = np.meshgrid(f, f, indexing="ij")
    used = (np.hypot(y, x) > 2.5 / 64) & ((y > 0) | (y == 0) & (x > 0))
    radius, angle = np.hypot(y, x)[used], np.arctan2(y, x)[used]
    for blur in (GAUSSIAN, kernels.disk(2)):
        # The window's leak, exactly: the transform of the autocorrelations' product.
        gain = np.abs(np.fft.fft2(blur.numpy(), (64, 64))) ** 2
        leak = np.abs(np.fft.fft2(window)) ** 2
        gain = np.fft.ifft2(np.fft.fft2(gain) * np.fft.fft2(leak / leak.sum())).real[used]

        def misfit(b, gain=gain):
            S = np.exp(b[0] + b[1] * np.log(radius) + b[2] * np.cos(2 * angle)
                       + b[3] * np.sin(2 * angle) + b[4] * np.cos(4 * angle)
                       + b[5] * np.sin(4 * angle))
            ratio = power[used] / (gain * S + np.exp(b[6] + b[7] * np.log(2 * radius.clip(0.2))))
            prior = ((b[1] + 3) ** 2 + (b[2:6] ** 2).sum()) / 100 + b[7] ** 2 / 400
            return np.mean(ratio - 1 - np.log(ratio)) + prior

        best = scipy.optimize.minimize(misfit, [-8, -3, 0, 0, 0, 0, -9, 0])
        ours = model_check.fit(*model_check.spectra(blocks[None], [blur]))[0].item()
        assert ours == pytest.approx(best.fun, abs=1e-4)
