"""fastMRI's single-coil knee data (Zbontar et al. 2018): from its files to A, d and x of Eq. 1.

    s = load_slice("file1000001.h5", 15)
    mask = s.mask * cartesian_mask(s.mask.shape, acceleration=4, centre=0.08)
    A = MRI(mask, low_resolution_phase(s.kspace, mask))
    d = measurement(s.kspace, mask)

and for a restored x (1, 3, H, W) `psnr(centre_crop(x).mean(1, keepdim=True), s.target[None])`. The
data are at fastmri.med.nyu.edu, for those who agree to its terms; h5py reads them. A line of
k-space is one of its columns: a scan measures it in one go, and is shortened by whole lines.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jfbnb.common import UserError, printable, seeded_generator
from jfbnb.data import MAX_PIXELS


@dataclass
class FastMRISlice:
    """One slice of a file.

    Args:
        kspace: complex64 (H, W), divided by `scale`, the origin of image and k-space in the middle.
        mask: float32 (H, W), 1 on the lines that were measured: those of the file's own mask if it
            has one, and never those that the file fills up with zeros.
        target: float32 (1, h, w) in [0, 1], the magnitude of the image of all lines, its middle of
            320 x 320 pixels; None in a test file, which has none.
        scale: the largest value of the target volume in the file, else of this slice's own image.
        name: of the file, and the slice's number.
    """

    kspace: Tensor
    mask: Tensor
    target: Tensor | None
    scale: float
    name: str


def load_slice(path: str | Path, index: int) -> FastMRISlice:
    """Slice `index`, counted from 0, of one of fastMRI's single-coil HDF5 files.

    Raises:
        UserError: if h5py is missing, or the file is none of these, or has no such slice.
    """
    try:
        import h5py
    except ImportError:
        raise UserError("fastMRI's files need h5py: pip install h5py") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}: give one of fastMRI's single-coil .h5 files")
    try:
        with h5py.File(path, "r") as file:
            return _read(path, {key: value for key in ("kspace", "reconstruction_esc", "mask")
                                if isinstance(value := file.get(key), h5py.Dataset)}, index)
    except UserError:
        raise
    except Exception as error:  # h5py raises all sorts
        raise UserError(f"cannot read {path} ({printable(str(error))}): it is no HDF5 file, or an "
                        "incomplete download; fetch it again") from error


def _read(path: Path, file: dict, index: int) -> FastMRISlice:
    """The slice, from h5py's data sets by name."""
    kspace = _read_kspace(path, file, index)
    lines = (kspace != 0).any(dim=0)
    if "mask" in file:
        if file["mask"].size != len(lines):
            raise UserError(f"{path} has a mask of {file['mask'].size} lines for {len(lines)} of "
                            "k-space: fetch it again")
        lines &= torch.from_numpy(np.ravel(file["mask"][()]) != 0)
    if "reconstruction_esc" in file:
        targets, slices = file["reconstruction_esc"], len(file["kspace"])
        if len(targets.shape) != 3 or len(targets) != slices:
            raise UserError(f"{path} has {slices} slices, but a reconstruction_esc of shape "
                            f"{targets.shape}: fetch it again")
        scale = float(max(np.max(image) for image in targets))  # not all in memory at once
        target = torch.from_numpy(targets[index].astype(np.float32))[None] / scale
    else:
        image = _image(kspace).abs()
        scale = centre_crop(image, tuple(min(n, 320) for n in image.shape)).max().item()
        target = None
    if not (scale > 0 and math.isfinite(scale) and kspace.isfinite().all()):
        raise UserError(f"slice {index} of {path} is all zeros, or not finite: choose another")
    mask = lines.float().expand(kspace.shape).contiguous()
    name = f"{printable(path.name)}, slice {index}"
    return FastMRISlice(kspace / scale, mask, target, scale, name)


def _read_kspace(path: Path, file: dict, index: int) -> Tensor:
    if "kspace" not in file:
        raise UserError(f"{path} has no kspace: give one of fastMRI's single-coil files")
    kspace = file["kspace"]
    if len(kspace.shape) == 4:
        raise UserError(f"{path} has the k-space of {kspace.shape[1]} coils: give one of fastMRI's "
                        "single-coil files")
    if len(kspace.shape) != 3 or kspace.dtype.kind != "c" or not (
            0 < math.prod(kspace.shape[1:]) <= MAX_PIXELS):
        raise UserError(f"{path} has a kspace of {kspace.dtype}, shape {kspace.shape}, in place of "
                        "complex (slices, H, W): give one of fastMRI's single-coil files")
    if not 0 <= index < len(kspace):
        raise UserError(f"{path} has no slice {index}: choose from 0 to {len(kspace) - 1}")
    return torch.from_numpy(kspace[index].astype(np.complex64))


def _image(kspace: Tensor) -> Tensor:
    """The complex image of a k-space (H, W): the centred, orthonormal inverse Fourier transform."""
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(kspace), norm="ortho"))


def centre_crop(images: Tensor, size: tuple[int, int] = (320, 320)) -> Tensor:
    """The middle of images (..., H, W), cut as fastMRI cuts its targets: (..., *size).

    Raises:
        UserError: if they are smaller.
    """
    top, left = ((n - s) // 2 for n, s in zip(images.shape[-2:], size, strict=True))
    if min(top, left) < 0:
        raise UserError(f"images of {tuple(images.shape[-2:])} have no middle of {tuple(size)}: "
                        "give a smaller size")
    return images[..., top:top + size[0], left:left + size[1]]


def cartesian_mask(
    shape: tuple[int, int], acceleration: float = 4.0, centre: float = 0.08, seed: int = 0
) -> Tensor:
    """Random lines beside a full middle, as in fastMRI (Zbontar et al. 2018); float32 (H, W).

    Their rule, not their random numbers: each line outside the middle is in with one probability.

    Args:
        shape: of the k-space, (H, W).
        acceleration: W over the number of lines that are measured, on average.
        centre: the share of the lines that lies in the middle and is measured in any case: in the
            paper 0.08 for an acceleration of 4 and 0.04 for 8.

    Raises:
        UserError: if the middle alone has more lines than the acceleration leaves.
    """
    height, width = shape
    if not (acceleration >= 1 and 0 < centre <= 1):
        raise UserError(f"acceleration {acceleration}, centre {centre}: choose one of at least 1, "
                        "and a share of at most 1")
    middle = max(1, round(width * centre))
    if middle > width / acceleration:
        raise UserError(f"acceleration {acceleration} leaves fewer of {width} lines than the "
                        f"{middle} in the middle: lower it, or centre")
    share = (width / acceleration - middle) / max(1, width - middle)
    lines = torch.rand(width, generator=seeded_generator(seed)) < share
    first = (width - middle + 1) // 2
    lines[first:first + middle] = True
    return lines.float().expand(height, width).contiguous()


def low_resolution_phase(kspace: Tensor, mask: Tensor) -> Tensor:
    """The phase of the image, as far as the full middle of a mask shows it: (H, W) in radians.

    With this phase taken off an image is real and, where its phase is smooth, not negative. The
    lines are weighted by a Hann window, else each edge would ripple through the phase (cf. Noll
    et al. 1991, homodyne detection).

    Args:
        kspace: complex (H, W); only the lines in the middle are looked at.
        mask: (H, W) of 0 and 1.

    Raises:
        UserError: if the mask leaves out the line in the very middle.
    """
    width = mask.shape[1]
    middle = width // 2
    full = (mask != 0).all(dim=0)
    right, left = full[middle:], full[:middle + 1].flip(0)
    n = min(len(right), len(left))
    reach = int((right[:n] & left[:n]).long().cumprod(0).sum())
    if not reach:
        raise UserError("the mask leaves out the middle of k-space, which shows the phase: use one "
                        "with a full middle")
    window = torch.zeros(width)
    window[middle - reach + 1:middle + reach] = torch.hann_window(
        2 * reach + 1, periodic=False)[1:-1]
    return _image(kspace * window).angle()


def measurement(kspace: Tensor, mask: Tensor, channels: int = 3) -> Tensor:
    """d of Eq. 1, as `operators.MRI` makes it: (1, channels, H, W, 2), real and imaginary part.

    The channels are the same, for networks of colour images; the mean of theirs is the image.
    """
    return torch.view_as_real(kspace * mask).expand(1, channels, *kspace.shape, 2).contiguous()
