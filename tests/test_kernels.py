"""Kernels against SciPy's, against the geometry they claim, and against files that are none."""

import math
from pathlib import Path

import numpy as np
import pytest
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
def test_a_kernel_has_a_middle_and_is_told_to_the_command_as_to_python(kind, values):
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


def test_motion_along_a_row_is_a_mean_and_a_quarter_turn_a_quarter_turn():
    row = kernels.motion(9, 0)
    torch.testing.assert_close(row, torch.full((1, 9), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(kernels.motion(9, 90), row.mT)
    torch.testing.assert_close(kernels.motion(1, 0), torch.ones(1, 1, dtype=torch.float64))
    for angle in (20, 30):
        torch.testing.assert_close(kernels.motion(9, angle + 90),
                                   torch.rot90(kernels.motion(9, angle)))
        torch.testing.assert_close(kernels.motion(9, -angle), kernels.motion(9, angle).flip(0))


@pytest.mark.parametrize("angle", [0, 45])
def test_a_point_becomes_the_kernel(angle):
    kernel = kernels.motion(7, angle)
    scene = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    scene[0, 0, 10, 10] = 1
    seen = Convolution(21, kernel, "black")(scene)[0, 0]
    h, w = kernel.shape
    torch.testing.assert_close(seen[10 - h // 2:11 + h // 2, 10 - w // 2:11 + w // 2], kernel,
                               rtol=0, atol=1e-12)
    if angle:  # up at the right
        assert seen[12, 8] > 0.05 < seen[8, 12] and seen[12, 12] < 1e-6


# --- files ----------------------------------------------------------------------------------------

TABLE = np.array([[1, 0, 2, 3], [0, 4, 0, 1], [5, 0, 250, 0]])  # not separable, not symmetric


def save_text(path, delimiter=" ", head=""):
    path.write_text(head + "\n".join(delimiter.join(map(str, row)) for row in TABLE),
                    encoding="utf-8")


WRITERS = {
    "k.npy": lambda path: np.save(path, TABLE),
    "float.npy": lambda path: np.save(path, TABLE.astype(np.float32)),
    "k.txt": save_text,
    "tabs.txt": lambda path: save_text(path, "\t"),
    "commas.txt": lambda path: save_text(path, ", "),
    "windows.txt": lambda path: save_text(path, head="\ufeff"),
    "k.csv": lambda path: save_text(path, ","),
    "numpys.txt": lambda path: np.savetxt(path, TABLE, header="a kernel"),
    "8.png": lambda path: Image.fromarray(TABLE.astype(np.uint8)).save(path),
    "16.png": lambda path: Image.fromarray((200 * TABLE).astype(np.uint16)).save(path),
    "colour.png": lambda path: Image.fromarray(
        np.repeat(TABLE.astype(np.uint8)[..., None], 3, -1)).save(path),
    "8.BMP": lambda path: Image.fromarray(TABLE.astype(np.uint8)).save(path),
    "16.tif": lambda path: tifffile.imwrite(path, (200 * TABLE).astype(np.uint16)),
    "float.tif": lambda path: tifffile.imwrite(path, (TABLE / 7).astype(np.float32)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_kernel_is_read_from_a_file(name, tmp_path, recwarn):
    WRITERS[name](tmp_path / name)
    kernel = kernel_option.parse(str(tmp_path / name))
    assert kernel.dtype == torch.float64
    np.testing.assert_allclose(kernel, TABLE / TABLE.sum(), rtol=1e-6)
    assert torch.equal(kernel_option.read(tmp_path / name), kernel)
    assert not recwarn


def test_a_file_of_one_row_and_negative_values_are_kernels_too(tmp_path):
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


BAD_TABLES = {
    "zeros": np.zeros((3, 3)), "negative": -np.ones((3, 3)), "sum of 0": np.array([[1.0, -1.0]]),
    "NaN": np.array([[1.0, math.nan]]), "infinity": np.array([[1.0, math.inf]]),
    "overflow": np.full((3, 3), 1e308), "1-D": np.ones(5), "3-D": np.ones((3, 3, 3)),
    "0-D": np.array(1.0), "empty": np.ones((0, 3)), "too large": np.ones((3, 502)),
    "complex": np.ones((3, 3), complex), "text": np.array([["a", "b"]]),
    "records": np.ones(3, dtype=[("a", float)]), "objects": np.array([[None, 1]], dtype=object)}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_is_no_kernel_is_refused_in_a_line(name, tmp_path, recwarn):
    path = tmp_path / "k.npy"
    np.save(path, BAD_TABLES[name], allow_pickle=True)
    with pytest.raises(UserError) as caught:
        kernel_option.parse(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and not recwarn


class Trap:
    """What a pickle can do to who opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_opened(tmp_path):
    path, sprung = tmp_path / "k.npy", tmp_path / "sprung"
    np.save(path, np.array([[Trap(sprung), 1]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read the kernel"):
        kernel_option.read(path)
    assert not sprung.exists()


@pytest.mark.parametrize(("name", "content"), [
    ("k.txt", b""), ("k.txt", b"# nothing\n"), ("k.txt", b"1 2\n3\n"), ("k.txt", b"a b\nc d\n"),
    ("k.txt", b"\xff\xfe\x00"), ("k.txt", b"0 0\n0 0\n"), ("k.csv", b"1;2\n"), ("k.npy", b""),
    ("k.npy", b"\x93NUMPY\x01\x00"), ("k.png", b""), ("k.png", b"<html>\n</html>"),
    ("k.mat", b"MATLAB"), ("kernel", b"1 2 1")])
def test_a_file_that_is_no_kernel_is_refused_in_a_line(name, content, tmp_path, recwarn):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        kernel_option.parse(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and not recwarn


@pytest.mark.parametrize("text", [
    "", "gaussian", "gauss:1", "Gaussian:1", "no-such-file.npy", ".", "a" * 5000, "a\0b", "a\nb",
    "gaussian:", "gaussian:x", "gaussian:0", "gaussian:-1", "gaussian:nan", "gaussian:inf",
    "gaussian:1e9", "gaussian:1,2", "gaussian:1,2,3", "gaussian:1,-3", "gaussian:1,3.5",
    "gaussian:1,nan", "gaussian:1,inf", "gaussian:1,1e9", "gaussian:1,1000001", "gaussian:0,5",
    "motion:", "motion:9", "motion:9,", "motion:9,x", "motion:9,30,1", "motion:0,0", "motion:0.5,0",
    "motion:-9,0", "motion:nan,0", "motion:9,nan", "motion:9,inf", "motion:1e9,0",
    "disk:", "disk:0", "disk:-1", "disk:nan", "disk:inf", "disk:1e9", "disk:3,3"])
def test_what_is_no_kernel_is_refused_in_a_line(text, recwarn):
    with pytest.raises(UserError) as caught:
        kernel_option.parse(text)
    assert "\n" not in str(caught.value) and not recwarn
