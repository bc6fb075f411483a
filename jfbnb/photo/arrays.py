"""The package's function for Python: deblur an image that is an array or a tensor."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jfbnb.common import UserError, pick_device
from jfbnb.core.models import Restorer
from jfbnb.photo import kernel_option, light
from jfbnb.photo.model_check import Warning
from jfbnb.photo.restore import METHOD, SAFER, Restored, restore
from jfbnb.training.restorers import make_methods

Image = np.ndarray | Tensor


def load(name: str = "jfb", weights: str | Path | None = None,
         device: str | torch.device = "cpu") -> Restorer:
    """Load a method, for `deblur`, or for any operator as `method(A, d, noise_std)`.

    The method takes measurements d (B, ...) = A x + noise of images x (B, 3, H, W) in [0, 1]. It
    returns the restored images, and the solver's `SolveInfo`, or None without a solver.

    Args:
        name: e.g. "jfb", "jfb-energy", "total-variation" or "tikhonov"; the error for an unknown
            name lists all.
        weights: a folder of trained networks; by default the released ones.
        device: where to compute. For a GPU this turns TF32 off in all convolutions of the process,
            because it rounds too much for the solvers to converge.

    Raises:
        UserError: for an unknown name or device, or if weights are missing.

    >>> import jfbnb, torch
    >>> A = jfbnb.Inpainting(torch.arange(32) % 4 > 0)  # every fourth column is unknown
    >>> x = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    >>> y, info = jfbnb.load("total-variation")(A, A(x), 0.01)
    >>> y.shape, info.converged.item(), bool(jfbnb.psnr(y, x) > 40)
    (torch.Size([1, 3, 32, 32]), True, True)
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}: choose cpu or cuda") from error
    if device.type != "cpu":
        pick_device(device.type)
    return make_methods([name], None if weights is None else Path(weights), device)[name]


def deblur(
    image: Image,
    kernel: Image | str | Path,
    noise_std: float | None = None,
    method: str | Restorer | None = None,
    border: str = "unknown",
    gamma: str | float = "auto",
    progress: Callable[[int, int], None] = lambda done, tiles: None,
) -> Restored:
    """Restore an image of any size, grey or colour, that was convolved with a kernel.

    Args:
        image: a NumPy array or a tensor of shape (H, W), (H, W, C), (C, H, W), (B, C, H, W) or
            (B, H, W, C) with C 1 or 3. If both ends of (h, w, c) could be the channels, they are
            the last axis of an array and the first of a tensor. White is 255 for uint8 and 65535
            for uint16; floats must be in about [0, 1].
        kernel: (kh, kw), which is divided by its sum; or a text, as for the command:
            "gaussian:STD", "motion:LENGTH,ANGLE", "disk:RADIUS" in pixels and degrees, a file, or
            "auto", which estimates one of these three or a shake: the result's `kernel`.
        noise_std: of the noise in the image, on the scale from 0 for black to 1 for white;
            estimated if not given.
        method: its name, or the result of `load` on the image's device, which saves the loading. An
            array is restored on the CPU, a tensor on its device. By default "jfb", and
            "total-variation" if the result is `doubtful`, as by the command.
        border: "unknown" if the scene continues beyond the image, as for a camera; "black"; or
            "periodic", as in published benchmarks.
        gamma: how the image stores light: "linear", "srgb" or a power, e.g. 2.2. By default linear,
            and srgb if that explains the image better.
        progress: called with the number of finished tiles and of all tiles, for each image.

    Returns:
        `Restored`, with the image in the type and layout of the argument. It is computed in
        float32; integers are rounded and clipped, floats are not. For a batch each of the other
        fields is a list, with one entry for each image.

    Raises:
        UserError: for an invalid image, kernel, method, border or gamma; for a kernel larger than
            the image; if "auto" is not sure of a kernel.

    >>> import jfbnb
    >>> from scipy.ndimage import gaussian_filter
    >>> from skimage.data import camera
    >>> blurred = gaussian_filter(camera()[100:228, 200:328], 1.5)
    >>> result = jfbnb.deblur(blurred, "gaussian:1", method="tikhonov")
    >>> result.warnings[0].kind, result.warnings[0].suggestion
    ('kernel', {'kernel': 'gaussian:1.4'})
    >>> result = jfbnb.deblur(blurred, **result.warnings[0].suggestion, method="tikhonov")
    >>> result.warnings, result.image.shape, result.image.dtype
    ([], (128, 128), dtype('uint8'))
    """
    x, channels, white = _pixels(image)
    kernel, gamma = _kernel(kernel), light.parse(gamma)
    safer = None if method else load(SAFER, device=x.device)
    restorer = method if callable(method) else load(method or METHOD, device=x.device)
    results = [restore(restorer, one, kernel, noise_std, border, progress, safer, gamma)
               for one in x]
    if white == 65535 and x.max() * white < 2**12:
        for result in results:
            result.warnings.append(Warning(
                "range", "white is 65535 in an image of uint16, but this has no value over 4095: "
                "divide it by its value of white"))
    y = torch.stack([result.image for result in results])
    whole = results[0] if image.ndim < 4 else Restored(
        *([getattr(result, field.name) for result in results] for field in fields(Restored)))
    return replace(whole, image=_as_given(y, image, channels, white))


def _pixels(image: Image) -> tuple[Tensor, int | None, int]:
    """The image as (B, C, H, W) in [0, 1]; the axis of its channels; its value of white."""
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(f"an image of type {type(image).__name__}: give a NumPy array or a tensor")
    kind, shape = getattr(image.dtype, "name", str(image.dtype)), tuple(image.shape)
    kind = kind.removeprefix("torch.")
    if not ("float" in kind or kind in ("uint8", "uint16")):
        raise UserError(f"an image of {kind}: give uint8, uint16, or floats in about [0, 1]")
    axes = (-1, -3) if isinstance(image, np.ndarray) else (-3, -1)
    channels = next((axis for axis in axes if len(shape) > 2 and shape[axis] in (1, 3)), None)
    if 0 in shape or not 2 <= len(shape) <= 4 or (len(shape) > 2 and channels is None):
        raise UserError(f"an image of shape {shape}: give (H, W), (H, W, C), (C, H, W), "
                        "(B, C, H, W) or (B, H, W, C), with C 1 or 3; leave alpha out")
    x = (image.detach().float() if isinstance(image, Tensor)
         else torch.from_numpy(image.astype(np.float32)))  # a copy: it may be read-only
    white = {"uint8": 255, "uint16": 65535}.get(kind, 1)
    low, high = x.min().item(), x.max().item()
    if white == 1 and not (low >= -0.5 and high <= 1.5):  # nor NaN
        raise UserError(f"an image of floats from {low:.4g} to {high:.4g}: give finite ones in "
                        "about [0, 1], or uint8 or uint16")
    x = x[None] if channels is None else x.movedim(channels, -3)
    return (x if x.dim() == 4 else x[None]) / white, channels, white


def _as_given(y: Tensor, image: Image, channels: int | None, white: int) -> Image:
    """Convert (B, C, H, W) in [0, 1] to the type and layout of `image`."""
    y = y if image.ndim == 4 else y[0]
    y = y[0] if channels is None else y.movedim(-3, channels)
    if white > 1:
        y = (y * white).round().clamp(0, white)
    if isinstance(image, Tensor):
        return y.to(image.dtype).contiguous()
    return np.ascontiguousarray(y.cpu().numpy().astype(image.dtype))


def _kernel(kernel: Image | str | Path) -> Tensor | None:
    """A kernel (kh, kw) of sum 1, in float64 on the CPU; None for "auto"."""
    if isinstance(kernel, str | os.PathLike):
        return None if kernel == "auto" else kernel_option.parse(os.fspath(kernel))
    try:
        values = torch.as_tensor(kernel, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a kernel of type {type(kernel).__name__}: give an array (kh, kw), a "
                        "tensor, or a text such as 'disk:3'") from error
    if not (values.dim() == 2 and values.isfinite().all()
            and values.sum() > 1e-9 * values.abs().sum()):
        raise UserError(f"a kernel of shape {tuple(values.shape)} and sum {values.sum():.3g}: give "
                        "finite values (kh, kw) with a positive sum, or a text such as 'disk:3'")
    return values / values.sum()
