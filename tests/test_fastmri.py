"""Files made in fastMRI's format, checked with NumPy's Fourier transforms."""

import sys

import numpy as np
import pytest
import skimage.data
import skimage.transform
import torch

from jfbnb.common import UserError
from jfbnb.core.metrics import psnr
from jfbnb.core.operators import MRI
from jfbnb.fastmri import cartesian_mask, centre_crop, load_slice, low_resolution_phase, measurement

h5py = pytest.importorskip("h5py", reason="pip install h5py")

H, W, SIDE, UNIT = 128, 93, 64, 3e-4  # the values in fastMRI's files are as small
NOISE = 0.01
y, x = np.mgrid[-1:1:H * 1j, -1:1:W * 1j]
PHASE = 1.5 * x - 0.8 * y**2 + x * y


def fft(image: np.ndarray) -> np.ndarray:
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image), norm="ortho"))


def inverse_fft(kspace: np.ndarray) -> np.ndarray:
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace), norm="ortho"))


def middle(image: np.ndarray) -> np.ndarray:
    return image[(H - SIDE) // 2:(H + SIDE) // 2, (W - SIDE) // 2:(W - SIDE) // 2 + SIDE]


def scene() -> np.ndarray:
    """A phantom of H x W pixels in [0, 1] that stands in the middle."""
    image = np.zeros((H, W))
    image[24:104, 6:86] = skimage.transform.resize(skimage.data.shepp_logan_phantom(), (80, 80))
    return image


@pytest.fixture
def volume(tmp_path):
    """Three slices, of which the middle one is the brightest; the last lines are padding."""
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=NOISE, size=(2, 3, H, W))
    bright = np.array([0.5, 1.0, 0.7])[:, None, None]
    kspace = np.stack([fft(z) for z in bright * scene() * np.exp(1j * PHASE)])
    kspace = UNIT * (kspace + noise[0] + 1j * noise[1])
    kspace[..., -4:] = 0
    target = np.abs(np.stack([middle(inverse_fft(k)) for k in kspace]))
    path = tmp_path / "file1000001.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace.astype(np.complex64)
        file["reconstruction_esc"] = target.astype(np.float32)
        file["reconstruction_rss"] = target.astype(np.float32)
        file["ismrmrd_header"] = "<ismrmrdHeader/>"
        file.attrs.update(max=target.max(), norm=np.linalg.norm(target), acquisition="CORPD_FBK",
                          patient_id="0")
    return path


def test_a_slice_is_what_the_file_has(volume):
    with h5py.File(volume) as file:
        kspace, target = file["kspace"][2], file["reconstruction_esc"][2]
        largest = file.attrs["max"]
    s = load_slice(volume, 2)
    assert s.kspace.dtype == torch.complex64 and s.target.dtype == s.mask.dtype == torch.float32
    np.testing.assert_allclose(s.scale, largest, rtol=1e-6)
    np.testing.assert_allclose(s.kspace.numpy() * s.scale, kspace, atol=1e-9)
    np.testing.assert_allclose(s.target[0].numpy() * s.scale, target, atol=1e-9)
    assert s.target.min() >= 0 and 0.6 < s.target.max() < 0.8  # one scale for all slices
    assert load_slice(str(volume), 1).target.max() == 1
    assert s.mask.shape == (H, W) and s.mask[:, :-4].all() and not s.mask[:, -4:].any()
    assert s.name == "file1000001.h5, slice 2"


def test_the_target_is_the_middle_of_the_image_that_our_operator_sees(volume):
    s = load_slice(volume, 1)
    image = np.abs(inverse_fft(s.kspace.numpy()))
    np.testing.assert_allclose(centre_crop(torch.from_numpy(image), (SIDE, SIDE)), s.target[0],
                               atol=1e-5)
    phase = torch.from_numpy(np.angle(inverse_fft(s.kspace.numpy())))
    A = MRI(s.mask, phase)
    x = A.adjoint(measurement(s.kspace, s.mask))
    assert x.shape == (1, 3, H, W)
    torch.testing.assert_close(centre_crop(x, (SIDE, SIDE)), s.target.expand(1, 3, -1, -1),
                               rtol=0, atol=1e-5)


def test_the_true_scene_explains_the_measurement_up_to_the_noise(volume):
    s = load_slice(volume, 1)
    mask = s.mask * cartesian_mask((H, W), 3, 0.1)
    truth = torch.from_numpy(scene() * UNIT / s.scale).float().expand(1, 3, H, W)
    d = measurement(s.kspace, mask)
    assert d.shape == (1, 3, H, W, 2) and not d[..., mask == 0, :].any()
    rest = (MRI(mask, PHASE)(truth) - d)[..., mask.bool(), :]
    noise = NOISE * UNIT / s.scale
    assert 0.95 < rest.std().item() / noise < 1.05
    wrong = (MRI(mask, -PHASE)(truth) - d)[..., mask.bool(), :]
    assert wrong.std() > 5 * noise


def test_a_test_file_has_a_mask_and_no_target(volume):
    lines = cartesian_mask((H, W), 4, 0.08, seed=3)[0].numpy().astype(bool)
    with h5py.File(volume, "a") as file:
        del file["reconstruction_esc"]
        file["kspace"][...] = file["kspace"][()] * lines
        file["mask"] = lines
        expected = np.abs(inverse_fft(file["kspace"][1])).max()
    s = load_slice(volume, 1)
    assert s.target is None
    np.testing.assert_allclose(s.scale, expected, rtol=1e-5)
    lines[-4:] = False  # of the padding
    assert (s.mask.numpy() == lines).all()
    with h5py.File(volume, "a") as file:
        del file["mask"]
        file["mask"] = np.zeros(W, bool)
        file["mask"][[40, 46, 50]] = True
    assert load_slice(volume, 0).mask[0].nonzero().flatten().tolist() == [
        n for n in (40, 46, 50) if lines[n]]


@pytest.mark.parametrize("width", [93, 368])
@pytest.mark.parametrize(("acceleration", "centre"), [(4, 0.08), (8, 0.04), (1.5, 0.3)])
def test_masks(width, acceleration, centre):
    masks = torch.stack([cartesian_mask((7, width), acceleration, centre, seed)
                         for seed in range(200)])
    assert masks.shape == (200, 7, width) and masks.unique().tolist() == [0, 1]
    assert (masks == masks[:, :1]).all()  # whole lines
    assert abs(masks.mean() * acceleration - 1) < 0.03
    share = masks[:, 0].mean(0)
    n = round(width * centre)
    full = (share == 1).nonzero().flatten()
    assert len(full) == n and full[-1] - full[0] == n - 1
    dc = np.abs(np.fft.fftshift(np.fft.fft(np.ones(width)))).argmax()
    assert abs((full[0] + full[-1]) / 2 - dc) <= 0.5
    outside = share[share < 1]
    assert outside.min() > 0 and outside.std() < 0.05  # no line is preferred
    assert torch.equal(masks[5], cartesian_mask((7, width), acceleration, centre, 5))
    assert not torch.equal(masks[5], masks[6])


def test_masks_that_cannot_be():
    assert cartesian_mask((4, 9), 1, 1).all()
    for wrong in ((0.5, 0.08), (float("nan"), 0.08), (4, 0), (4, 1.1)):
        with pytest.raises(UserError, match="choose one of at least 1"):
            cartesian_mask((4, 100), *wrong)
    with pytest.raises(UserError, match="fewer of 100 lines than the 30 in the middle"):
        cartesian_mask((4, 100), 4, 0.3)


def test_the_phase_makes_the_image_real(volume):
    s = load_slice(volume, 1)
    mask = s.mask * cartesian_mask((H, W), 3, 0.15)
    phase = low_resolution_phase(s.kspace, mask)
    inside = scene() > 0.1
    error = np.angle(np.exp(1j * (phase.numpy() - PHASE)))
    assert np.abs(error[inside]).mean() < 0.05
    image = inverse_fft(s.kspace.numpy()) * np.exp(-1j * phase.numpy())
    assert image.real[inside].min() > 0
    truth = scene() * UNIT / s.scale
    gain = [np.square(z - truth).mean() for z in (np.abs(image), image.real)]
    assert gain[1] < gain[0]  # the magnitude adds up the noise of both parts
    with pytest.raises(UserError, match="leaves out the middle"):
        low_resolution_phase(s.kspace, 1 - cartesian_mask((H, W)))


def test_the_phase_comes_from_the_middle_alone(volume):
    kspace, mask = load_slice(volume, 1).kspace, torch.zeros(H, W)
    mask[:, 39:54] = mask[:, [5, 38, 80]] = 1  # 38 has no counterpart at 54
    phase = low_resolution_phase(kspace, mask)
    other = torch.randn_like(kspace)
    other[:, 39:54] = kspace[:, 39:54]
    assert torch.equal(low_resolution_phase(other, mask), phase)
    for line in (39, 53):
        changed = kspace.clone()
        changed[:, line] *= 3
        assert not torch.equal(low_resolution_phase(changed, mask), phase)


def test_a_reconstruction_beats_the_zero_filled_image(volume):
    s = load_slice(volume, 1)
    mask = s.mask * cartesian_mask((H, W), 2, 0.1)
    A, d = MRI(mask, low_resolution_phase(s.kspace, mask)), measurement(s.kspace, mask, channels=1)
    x = A.adjoint(d)
    zero_filled = psnr(centre_crop(x, (SIDE, SIDE)), s.target[None])
    for _ in range(50):  # nothing outside the phantom, and nothing negative
        x = (x - A.adjoint(A(x) - d)).clamp_min(0) * torch.from_numpy(scene() > 0)
    assert psnr(centre_crop(x, (SIDE, SIDE)), s.target[None]) > zero_filled + 2


def test_centre_crop():
    images = torch.arange(7 * 10).view(1, 1, 7, 10)
    assert centre_crop(images, (4, 5))[0, 0, 0, 0] == 12 and centre_crop(images, (7, 10)).equal(
        images)
    assert centre_crop(torch.zeros(2, 640, 368)).shape == (2, 320, 320)
    with pytest.raises(UserError, match="no middle of"):
        centre_crop(images, (8, 5))


def rewrite(path, **datasets):
    with h5py.File(path, "a") as file:
        for name, values in datasets.items():
            if name in file:
                del file[name]
            if values is not None:
                file[name] = values


K = np.ones((3, 8, 8), np.complex64)


@pytest.mark.parametrize(("change", "index", "line"), [
    (lambda p: None, 3, "no slice 3: choose from 0 to 2"),
    (lambda p: None, -1, "no slice -1"),
    (lambda p: p.unlink(), 0, "no file"),
    (lambda p: p.write_bytes(p.read_bytes()[:9999]), 0, "incomplete download"),
    (lambda p: p.write_text("<html>"), 0, "no HDF5 file"),
    (lambda p: rewrite(p, kspace=None), 0, "has no kspace"),
    (lambda p: rewrite(p, kspace=K[:, None].repeat(15, 1)), 0, "of 15 coils"),
    (lambda p: rewrite(p, kspace=K[0]), 0, r"shape \(8, 8\)"),
    (lambda p: rewrite(p, kspace=K.real), 0, "kspace of float32"),
    (lambda p: rewrite(p, kspace=K[:, :0]), 0, r"shape \(3, 0, 8\)"),
    (lambda p: rewrite(p, kspace=K[:2]), 0, "has 2 slices, but"),
    (lambda p: rewrite(p, reconstruction_esc=K.real[0]), 0, "has 3 slices, but"),
    (lambda p: rewrite(p, reconstruction_esc=0 * K.real), 0, "all zeros, or not finite"),
    (lambda p: rewrite(p, reconstruction_esc=None, kspace=0 * K), 0, "all zeros, or not finite"),
    (lambda p: rewrite(p, kspace=K / np.float32(0)), 0, "all zeros, or not finite"),
    (lambda p: rewrite(p, mask=[1, 0]), 0, "a mask of 2 lines for 93"),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_other_files_are_refused_in_one_line(volume, change, index, line):
    change(volume)
    with pytest.raises(UserError, match=line) as caught:
        load_slice(volume, index)
    assert "\n" not in str(caught.value)


def test_without_h5py(volume, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        load_slice(volume, 0)
