"""Kernels against SciPy's, against the geometry they claim, and against files that are none."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.ndimage
import tifffile
import torch
from PIL import Image

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.operators import Convolution
from jfbnb.photo import kernel_option

ANGLES = [0, 30, 45, 90, 135, -20, 400]
MADE = [*(("gaussian", (std,)) for std in (0.3, 1, 2.5)), ("gaussian", (2.0, 3)),
        *(("motion", (length, angle)) for length in (1, 2, 9, 9.2, 20.5) for angle in ANGLES),
        *(("disk", (radius,)) for radius in (0.2, 1, 2.2, 3.2, 4, 10.5))]


def moments(kernel: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Its mean (x, y) and covariance, in pixels from the middle, y upwards as displayed."""
    k = kernel.numpy()
    y, x = (np.arange(n) - n // 2 for n in k.shape)
    points = np.stack([np.broadcast_to(x, k.shape), np.broadcast_to(-y[:, None], k.shape)])
    mean = (k * points).sum((1, 2))
    return mean, np.einsum("ij,aij,bij->ab", k, points, points)


@pytest.mark.parametrize(("kind", "values"), MADE)
def test_a_kernel_has_a_middle_and_is_the_same_for_the_command(kind, values):
    kernel = getattr(kernels, kind)(*values)
    assert kernel.dtype == torch.float64 and kernel.sum().item() == pytest.approx(1, abs=1e-12)
    assert (kernel >= 0).all() and all(n % 2 for n in kernel.shape)
    assert torch.equal(kernel, kernel.flip(0, 1))
    np.testing.assert_allclose(moments(kernel)[0], 0, atol=1e-12)
    assert kernel.sum(0).all() and kernel.sum(1).all()  # no more rows and columns than it needs
    assert torch.equal(kernel_option.parse(f"{kind}:{','.join(map(str, values))}"), kernel)


@pytest.mark.parametrize(("std", "size", "radius"), [(0.3, None, 1), (1, None, 3), (2.5, None, 8),
                                                     (5**0.5, 5, 2), (1.0, 1, 0)])
def test_gaussian_is_scipys_response_to_a_point(std, size, radius):
    point = np.zeros((2 * radius + 1,) * 2)
    point[radius, radius] = 1
    expected = scipy.ndimage.gaussian_filter(point, std, radius=radius, mode="constant")
    np.testing.assert_allclose(kernels.gaussian(std, size), expected, atol=1e-15)


@pytest.mark.parametrize("radius", [2, 3, 4.5, 10.3])
def test_a_disk_has_its_area_and_is_round(radius):
    kernel = kernels.disk(radius)
    assert 1 / kernel.max().item() == pytest.approx(math.pi * radius**2, rel=0.01)
    assert kernel.shape == (2 * math.ceil(radius - 0.5) + 1,) * 2
    assert torch.equal(kernel, kernel.mT)
    _, spread = moments(kernel)
    # The pixels that it is gathered in spread it by 1/12.
    np.testing.assert_allclose(spread - np.eye(2) / 12, np.eye(2) * radius**2 / 4, rtol=0.04,
                               atol=1e-12)


@pytest.mark.parametrize("angle", [30, 45, 135, -20, 400])
@pytest.mark.parametrize("length", [5, 9, 20.5])
def test_motion_has_its_length_and_angle(length, angle):
    """Anticlockwise from the right, as displayed, by the kernel's second moments."""
    _, spread = moments(kernels.motion(length, angle))
    values, vectors = np.linalg.eigh(spread - np.eye(2) / 12)
    assert values[1] == pytest.approx(length**2 / 12, rel=0.04)
    assert values[0] == pytest.approx(1 / 12, abs=0.03)
    found = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))
    assert abs((found - angle + 90) % 180 - 90) < 1


def test_motion_along_a_row_is_a_mean_and_turns_and_mirrors_exactly():
    row = kernels.motion(9, 0)
    torch.testing.assert_close(row, torch.full((1, 9), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(kernels.motion(9, 90), row.mT)
    torch.testing.assert_close(kernels.motion(9, 120), torch.rot90(kernels.motion(9, 30)))
    torch.testing.assert_close(kernels.motion(9, -30), kernels.motion(9, 30).flip(0))


TABLE = np.array([[1, 0, 2, 3], [0, 4, 0, 1], [5, 0, 250, 0]])  # not separable, not symmetric


def text(delimiter, head=""):
    content = head + "\n".join(delimiter.join(map(str, row)) for row in TABLE)
    return lambda path: path.write_text(content, encoding="utf-8")


def picture(pixels):
    return lambda path: Image.fromarray(pixels).save(path)


WRITERS = {
    "k.npy": lambda path: np.save(path, TABLE),
    "float.npy": lambda path: np.save(path, TABLE.astype(np.float32)),
    "tabs.txt": text("\t"),
    "windows.txt": text(" ", "\ufeff"),
    "k.csv": text(", "),
    "numpys.txt": lambda path: np.savetxt(path, TABLE, header="a kernel"),
    "8.BMP": picture(TABLE.astype(np.uint8)),
    "16.png": picture((200 * TABLE).astype(np.uint16)),
    "colour.png": picture(np.repeat(TABLE.astype(np.uint8)[..., None], 3, -1)),
    "float.tif": lambda path: tifffile.imwrite(path, (TABLE / 7).astype(np.float32)),
}
WIDE = np.pad(TABLE, ((6, 6), (5, 6)))  # (15, 15)
SAID = {  # as people store them, what is said of it, and what it means
    "index.csv": (lambda path: pd.DataFrame(WIDE).to_csv(path), "index"),
    "header.csv": (lambda path: pd.DataFrame(WIDE).to_csv(path, index=False), "header"),
    "comma.csv": (lambda path: pd.DataFrame(WIDE / 8).to_csv(
        path, sep=";", decimal=",", index=False, header=False), "decimal points"),
    "pedestal.npy": (lambda path: np.save(path, WIDE + 100), "pedestal"),
    "pedestal.tif": (lambda path: tifffile.imwrite(path, (WIDE + 100).astype(np.uint16)),
                     "pedestal"),
    "corner.npy": (lambda path: np.save(path, np.fft.ifftshift(WIDE)), "corner"),
    "torch.npy": (lambda path: np.save(path, WIDE[None, None]), ""),
    "k.npz": (lambda path: np.savez(path, k=WIDE), ""),
    "k.mat": (lambda path: scipy.io.savemat(path, {"k": WIDE, "n": 3}), ""),
    "signed.tif": (lambda path: tifffile.imwrite(path, WIDE.astype(np.int16)), ""),
}


@pytest.mark.parametrize("name", [*WRITERS, *SAID])
def test_a_kernel_as_people_store_it_is_read_and_what_was_done_is_said(name, tmp_path):
    write, word = SAID.get(name) or (WRITERS[name], "")
    truth = WIDE if name in SAID else TABLE
    write(tmp_path / name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernel = kernel_option.parse(str(tmp_path / name))
    assert kernel.dtype == torch.float64
    np.testing.assert_allclose(kernel, truth / truth.sum(), atol=1e-15,
                               rtol=1e-6 if name == "float.tif" else 1e-12)
    assert word in "".join(str(w.message) for w in said) and len(said) <= 1
    assert said or not word


@pytest.mark.filterwarnings("ignore:kernel")
def test_negative_values_are_kernels_too_and_get_no_pedestal(tmp_path):
    noisy = WIDE.astype(np.int16)
    noisy[0, ::2] = -1
    tifffile.imwrite(tmp_path / "k.tif", noisy)
    np.testing.assert_allclose(kernel_option.read(tmp_path / "k.tif"), noisy / noisy.sum())
    (tmp_path / "row.txt").write_text("-1 3 -1\n")
    assert kernel_option.read(tmp_path / "row.txt").tolist() == [[-1, 3, -1]]


def test_a_gaussian_in_a_file_of_float32_has_the_closed_form(tmp_path):
    """And a kernel that is no outer product has not."""
    kernel = kernels.gaussian(2.0)
    np.save(tmp_path / "k.npy", kernel.numpy().astype(np.float32))
    A = Convolution(40, kernel_option.read(tmp_path / "k.npy"))
    assert A.factors and not Convolution(40, kernel + 1e-6 * kernels.disk(6)).factors
    x = torch.rand(1, 1, 40, 40, dtype=torch.float64, generator=torch.manual_seed(0))
    torch.testing.assert_close(A(x), Convolution(40, kernel)(x), rtol=0, atol=1e-6)


class Trap:
    """What a pickle can do to who opens it."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


DRAWN = np.pad(np.full((3, 3), 9, np.uint8), 3)
BAD_FILES = {  # and what is said of them
    "zeros.npy": (np.zeros((3, 3)), "sum 0"), "negative.npy": (-np.ones((3, 3)), "sum -9"),
    "sum-of-0.npy": (np.array([[1.0, -1.0]]), "sum 0"),
    "nan.npy": (np.array([[1.0, math.nan]]), "finite"),
    "overflow.npy": (np.full((3, 3), 1e305), "finite"), "1-D.npy": (np.ones(5), "shape (5,)"),
    "3-D.npy": (np.ones((3, 3, 3)), "shape"), "no-rows.npy": (np.ones((0, 3)), "shape"),
    "too-large.npy": (np.ones((3, 502)), "at most 501"),
    "complex.npy": (np.ones((3, 3), complex), "cannot read"),
    "pickle.npy": (np.array([[Trap(), 1]], dtype=object), "cannot read"),
    "empty.txt": (b"", "cannot read"), "comment.txt": (b"# nothing\n", "cannot read"),
    "ragged.txt": (b"1 2\n3\n", "cannot read"), "words.txt": (b"a b\nc d\n", "finite"),
    "no-text.txt": (b"\xff\xfe\x00", "cannot read"), "empty.npz": (b"", "cannot read"),
    "black-on-white.npy": (255 - DRAWN, "invert it"), "k.mat": (b"MATLAB", "cannot read"),
    "7.3.mat": (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", "save -v7"),
    "page.png": (b"<html>\n</html>", "format is not"), "kernel": (b"1 2 1", "format is not"),
    "stack.tif": (tifffile.imwrite, "a stack of 2 planes"),
    "two.npz": (lambda path, k: np.savez(path, k, k), "2 arrays"),
    "drawn.png": (lambda path, k: Image.fromarray(np.dstack([0 * k[0], k[0]])).save(path),
                  "transparency")}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_kernel_is_refused_in_a_line(name, tmp_path, recwarn):
    path, (content, words) = tmp_path / name, BAD_FILES[name]
    if callable(content):
        content(path, np.stack([DRAWN] * 2))
    else:
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    refuse(str(path), recwarn, str(path), words)


def refuse(option, recwarn, *words):
    with pytest.raises(UserError) as caught:
        kernel_option.parse(option)
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said and not recwarn


@pytest.mark.parametrize("option", [
    "", "gaussian", "gauss:1", "no-such-file.npy", ".", "a" * 5000, "a\0b", "a\nb", "gaussian:",
    "gaussian:0", "gaussian:nan", "gaussian:inf", "gaussian:1,2", "gaussian:1,2,3", "gaussian:1,-3",
    "gaussian:1,3.5", "gaussian:1,1e9", "gaussian:1,503", "motion:9", "motion:9,", "motion:0.5,0",
    "motion:nan,0", "motion:9,inf", "motion:1e9,0", "disk:0", "disk:nan", "disk:1e9", "disk:3,3"])
def test_what_is_no_kernel_is_refused_in_a_line(option, recwarn):
    refuse(option, recwarn)
