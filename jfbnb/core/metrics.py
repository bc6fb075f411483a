"""The quality of images, compared with the true ones: PSNR and SSIM, one number per image.

Both raise UserError unless they get two tensors of floats of the same shape.
"""

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core.linear_operator import require_floats


def psnr(x: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, one per image: 10 log10(range^2 / MSE). Not clipped.

    Shapes: (B, C, H, W) twice -> (B,).

    >>> import jfbnb, torch
    >>> jfbnb.psnr(torch.full((1, 3, 8, 8), 0.1), torch.zeros(1, 3, 8, 8))
    tensor([20.])
    """
    _require_pair(x, truth)
    mse = (x - truth).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mse)


def ssim(x: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), scikit-image's with Gaussian weights.

    Shapes: (B, C, H, W) twice, float32 or float64 in [0, 1] -> (B,), float64.

    >>> import jfbnb, torch
    >>> x = torch.rand(1, 3, 16, 16)
    >>> jfbnb.ssim(x, x)
    tensor([1.], dtype=torch.float64)
    """
    _require_pair(x, truth)
    values = [structural_similarity(a, b, channel_axis=0, data_range=1.0, gaussian_weights=True,
                                    sigma=1.5, use_sample_covariance=False)
              for a, b in zip(x.cpu().numpy(), truth.cpu().numpy(), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def _require_pair(x: Tensor, truth: Tensor) -> None:
    require_floats(x)
    require_floats(truth)
    if x.dim() != 4 or x.shape != truth.shape:
        raise UserError(f"images of {tuple(x.shape)} and {tuple(truth.shape)}: give two tensors of "
                        "the same shape (B, C, H, W)")
