"""The networks R, and the denoiser D(x) = x - R(x; sigma).

R is any module called as `network(x, sigma)` that predicts the noise in x, given the noise level
sigma. To be stored, it must keep each argument of its constructor in an attribute of the same name.
To be loaded, its class must be in `NETWORKS`, or given to the loader.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from jfbnb.common import UserError

LARGEST = 4096  # the largest number among the constructor arguments in a weight file


def _with_level(x: Tensor, sigma: float | Tensor) -> Tensor:
    """x with one more channel, which is sigma everywhere: (B, C, H, W) -> (B, C + 1, H, W)."""
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return torch.cat([x, level.expand(len(x), 1, *x.shape[2:])], dim=1)


class DnCNN(nn.Module):
    """The residual denoiser of Zhang et al. (2017): R(x; sigma) estimates the noise in x.

    `depth` 3 x 3 convolutions of `width` channels with ReLU between; the receptive field is
    2 depth + 1 pixels wide. The noise level is one more input channel, as in FFDNet (Zhang et al.
    2018). There is no batch normalisation: its running statistics would change at every
    application of T, and a map that changes has no fixed point.

    Shapes: (B, channels, H, W) and sigma, a scalar or (B, 1, 1, 1) -> (B, channels, H, W).

    >>> import jfbnb, torch
    >>> R = jfbnb.DnCNN(depth=3, width=8)
    >>> R(torch.rand(1, 3, 16, 16), 0.05).abs().max().item()  # untrained
    0.0
    """

    smooth = False  # a ReLU has a kink

    def __init__(self, depth: int, width: int, channels: int = 3):
        super().__init__()
        self.depth, self.width, self.channels = depth, width, channels
        sizes = [channels + 1] + [width] * (depth - 1) + [channels]
        layers = []
        for c_in, c_out in pairwise(sizes):
            layers += [nn.Conv2d(c_in, c_out, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU at the end: noise has both signs
        for layer in self.layers[:-1]:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(self.layers[-1].weight)  # starts as R = 0, the identity as denoiser
        nn.init.zeros_(self.layers[-1].bias)
        self.to(memory_format=torch.channels_last)  # the faster layout, on CPUs and GPUs

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        z = _with_level(x, sigma).contiguous(memory_format=torch.channels_last)
        return self.layers(z).contiguous()


class UNet(nn.Module):
    """A residual denoiser with a large receptive field, a U-Net (Ronneberger et al. 2015).

    Level l = 0, ..., depth - 1 has 2^l times `width` channels at 2^-l of the resolution. It has one
    residual block of two 3 x 3 convolutions on the way down and one on the way up; the last level
    has two in a row, as in DRUNet (Zhang et al. 2021). Strided 2 x 2 convolutions lead down,
    transposed ones up, and skip connections add. As in `DnCNN`, the noise level is an input, and
    there is no normalisation.

    Shapes: (B, channels, H, W) and sigma, a scalar or (B, 1, 1, 1) -> (B, channels, H, W). H and W
    are padded to multiples of 2^(depth - 1) by the border values, and cropped again.

    Raises:
        ValueError: if its last level would have more than `LARGEST` channels.
    """

    smooth = True

    def __init__(self, depth: int, width: int, channels: int = 3):
        super().__init__()
        self.depth, self.width, self.channels = depth, width, channels
        widths = [width * 2**level for level in range(depth)]
        if widths[-1] > LARGEST:
            raise ValueError(f"its depth is the number of its levels, and the last of {depth} has "
                             f"2^{depth - 1} times the width, {width}: over {LARGEST} channels")
        self.first = nn.Conv2d(channels + 1, width, kernel_size=3, padding=1)
        self.before = nn.ModuleList(ResidualBlock(fine) for fine in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, kernel_size=2, stride=2, bias=False)
                                  for fine, coarse in pairwise(widths))
        self.bottom = nn.Sequential(ResidualBlock(widths[-1]), ResidualBlock(widths[-1]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2,
                                                   bias=False) for fine, coarse in pairwise(widths))
        self.after = nn.ModuleList(ResidualBlock(fine) for fine in widths[:-1])
        self.last = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.last.weight)  # starts as the identity, like DnCNN
        nn.init.zeros_(self.last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        height, width = x.shape[2:]
        step = 2 ** (self.depth - 1)
        z = pad(_with_level(x, sigma), (0, -width % step, 0, -height % step), mode="replicate")
        z, skipped = self.first(z.contiguous(memory_format=torch.channels_last)), []
        for before, down in zip(self.before, self.down, strict=True):
            skipped.append(before(z))
            z = down(skipped[-1])
        z = self.bottom(z)
        for up, after in zip(reversed(self.up), reversed(self.after), strict=True):
            z = after(up(z) + skipped.pop())
        return self.last(z)[..., :height, :width].contiguous()


class ResidualBlock(nn.Module):
    """z + C2 elu(C1 z), of two 3 x 3 convolutions; ELU has a continuous derivative, unlike ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                                    nn.ELU(inplace=True),
                                    nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.layers(z)


NETWORKS: list[type[nn.Module]] = [DnCNN, UNet]  # the classes that a weight file may name


def make_network(name: str, depth: int, width: int) -> nn.Module:
    """An untrained network of one of `NETWORKS`, by the name of its class.

    Raises:
        UserError: for an unknown name, or an impossible size.
    """
    known = {kind.__name__: kind for kind in NETWORKS}
    if name not in known:
        raise UserError(f"unknown network {name!r}: choose from {', '.join(known)}")
    if min(depth, width) < 1:
        raise UserError(f"a network of depth {depth} and width {width}: both must be at least 1")
    try:
        return known[name](depth, width)
    except ValueError as error:
        raise UserError(f"{name} of depth {depth} and width {width}: {error}") from error


class Denoiser(nn.Module):
    """D(x) = x - R(x; sigma), with R a residual network and sigma its noise level.

    Shapes: (B, C, H, W) -> (B, C, H, W). sigma is fixed, on images in [0, 1].

    Raises:
        UserError: if the images' dtype is not that of the network's weights, or if its output does
            not have the shape of its input.

    >>> import jfbnb, torch
    >>> D = jfbnb.Denoiser(jfbnb.DnCNN(depth=3, width=8), sigma=0.05)
    >>> x = torch.rand(1, 3, 16, 16)
    >>> torch.equal(D(x), x)  # untrained
    True
    """

    def __init__(self, network: nn.Module, sigma: float | Tensor):
        super().__init__()
        self.network = network
        level = torch.as_tensor(sigma, dtype=torch.get_default_dtype())
        self.register_buffer("sigma", level.clone())

    def residual(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """R(x; sigma), the noise in x, for the denoiser's own sigma or another."""
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        if x.dtype != dtype:
            raise UserError(f"an image of {x.dtype} for a network of {dtype}: convert it, as in "
                            f"x.to({dtype})")
        channels = getattr(self.network, "channels", x.shape[1] if x.dim() == 4 else None)
        if x.dim() != 4 or x.shape[1] != channels:
            raise UserError(f"an image of shape {tuple(x.shape)} for a network of images (B, "
                            f"{channels or 'C'}, H, W): give that shape, grey as equal channels")
        noise = self.network(x, self.sigma if sigma is None else sigma)
        if noise.shape != x.shape:
            raise UserError(f"{type(self.network).__name__} returns {tuple(noise.shape)} for "
                            f"images {tuple(x.shape)}: a denoiser must keep the shape")
        return noise

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        return x - self.residual(x, sigma)


def matched_sigma(noise_std: float, tau: float) -> float:
    """The denoiser's noise level for a weight tau: noise_std / sqrt(tau).

    In half-quadratic splitting (Zhang et al. 2017) the data term has the weight 1 / noise_std^2
    and the denoiser's 1 / sigma^2; tau is the ratio of the two.
    """
    return noise_std / tau**0.5
