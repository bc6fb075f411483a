"""Estimate the kernel of a shaken camera, of any shape, from the edges of the blurred picture.

The kernel tells the image, and the image tells the kernel. Both are estimated in turn, first in a
small copy of the picture and then in larger ones. The first images have few non-zero gradients (Xu,
Zheng and Jia 2013): edges that are sharper than the kernel explains, so that the kernel grows. The
last one in each copy is restored with the kernel by a method of this package. The kernel is the
non-negative one that blurs the image's gradients into the picture's.
"""

import torch
from scipy import ndimage
from torch import Tensor
from torch.fft import irfft2, rfft2
from torch.nn.functional import avg_pool2d, interpolate, pad

from jfbnb.core.models import Restorer
from jfbnb.core.operators import Convolution

SIDE = 31  # of the kernel, in pixels
CROP = 320  # pixels a side of the part of the picture that is used
RATIO = 0.8  # of a copy's size to that of the next
EDGES, RESTORED, LAST = 4, 1, 3  # rounds with both kinds of image in each copy; LAST in the picture
WEIGHT, LOWEST, FALL = 2e-3, 1e-3, 1.1  # of the number of gradients, divided by FALL a round
STIFFEST = 1e5  # the last weight of the gradients' copies
NOISE = 0.02  # told to the method: an error of the kernel is noise to it
STRONGEST = 4  # gradients per weight of the kernel that estimate it
RIDGE = 2.0  # the weight of |k|^2
STEPS = 150  # of the kernel's projected gradient
FAINT, SMALL = 0.05, 0.1  # of the largest weight, and of the sum: what is below them is noise


def estimate(d: Tensor, restorer: Restorer) -> tuple[Tensor, float]:
    """Estimate a kernel (n, n) with n <= SIDE, of sum 1, its centre of mass in the middle pixel.

    Also returned is the least correlation of kernels that two halves of the last image give.

    Args:
        d: a picture (C, h, w) in [0, 1]. Only its CROP x CROP pixels with the strongest gradients
            are used.
        restorer: the method that restores images.
    """
    device, d = d.device, _richest(d.mean(0).cpu().float())
    sides = [SIDE]
    while sides[-1] > 3:
        sides.append(max(3, (int(RATIO * sides[-1]) - 1) // 2 * 2 + 1))
    k = torch.zeros(3, 3)
    k[1, :2] = 0.5
    for level in reversed(range(len(sides))):
        n = sides[level]
        small = _resized(d, [round(RATIO**level * size) for size in d.shape])
        y, inside = _periodic(small, n), pad(torch.ones_like(small)[2:, 2:], (1, n + 1, 1, n + 1))
        k = _tidied(_resized(k, [n, n]))
        for i in range(EDGES):
            x = _edges(y, k, max(WEIGHT / FALL**i, LOWEST))
            k = _tidied(_kernel(x, y, n, inside))
        for _ in range(RESTORED if level else LAST):
            A = Convolution(tuple(y.shape), k, "periodic").to(device)
            x = restorer(A, y.to(device).expand(1, 3, -1, -1), NOISE)[0].mean((0, 1)).cpu()
            k = _tidied(_kernel(x, y, n, inside))
    halves = [[_tidied(_kernel(x, y, n, part)) for part in _halves(inside, dim)] for dim in (0, 1)]
    reach = (k.nonzero() - n // 2).abs().max().item()
    kept = slice(n // 2 - reach, n // 2 + reach + 1)
    return k[kept, kept], min(_correlation(*pair) for pair in halves)


def _richest(d: Tensor) -> Tensor:
    """The part of d (h, w) with the strongest gradients."""
    sides = [min(CROP, size) for size in d.shape]
    strength = _gradients(d).square().sum(0)[None, None]
    sums = avg_pool2d(strength, sides, stride=CROP // 4)[0, 0]
    top, left = (CROP // 4 * i for i in divmod(sums.argmax().item(), sums.shape[1]))
    return d[top:top + sides[0], left:left + sides[1]]


def _edges(y: Tensor, k: Tensor, weight: float) -> Tensor:
    """The image x that minimises |k * x - y|^2 + weight (number of non-zero gradients).

    As gradients count, copies of them are set to 0 where they are small, and x is drawn to them
    with more and more force (half-quadratic splitting).
    """
    K, stencil = _transfer(k, y), torch.tensor([[1.0, -1.0, 0.0]])
    differences = torch.stack([_transfer(stencil, y), _transfer(stencil.T, y)])
    data, stiff = K.conj() * rfft2(y), differences.abs().square().sum(0)
    x, force = y, 2 * weight
    while force < STIFFEST:
        gradients = _gradients(x)
        gradients = gradients * (gradients.square().sum(0) >= weight / force)
        pull = (differences.conj() * rfft2(gradients)).sum(0)
        x = irfft2((data + force * pull) / (K.abs().square() + force * stiff), s=y.shape)
        force *= 2
    return x


def _kernel(x: Tensor, y: Tensor, n: int, inside: Tensor) -> Tensor:
    """The k >= 0 (n, n) that minimises |k * grad x - grad y|^2 + RIDGE |k|^2.

    Of grad x only the strongest values count, where `inside` is 1. The gradient of this is a
    convolution with the autocorrelation of grad x: FISTA (Beck and Teboulle 2009) needs no more.
    """
    gx, gy = _gradients(x), rfft2(_gradients(y))
    strength = gx.square().sum(0)
    least = strength.flatten().topk(min(STRONGEST * n**2, y.numel())).values[-1]
    gx = rfft2(gx * inside * (strength >= least))
    p = _middle(irfft2(gx.abs().square().sum(0), s=y.shape), 2 * n - 1)
    q = _middle(irfft2((gx.conj() * gy).sum(0), s=y.shape), n)
    size, rows = (3 * n, 3 * n), slice(n - 1, 2 * n - 1)
    P = rfft2(p, s=size)
    rate = 1 / (P.abs().max() + RIDGE)
    k = z = torch.full_like(q, 1 / n**2)
    t = 1.0
    for _ in range(STEPS):
        slope = irfft2(P * rfft2(z, s=size), s=size)[rows, rows] + RIDGE * z - q
        new, later = (z - rate * slope).clamp_min(0), (1 + (1 + 4 * t * t) ** 0.5) / 2
        k, z, t = new, new + (t - 1) / later * (new - k), later
    return k


def _halves(inside: Tensor, dim: int) -> list[Tensor]:
    first = inside.clone()
    first.narrow(dim, 0, inside.shape[dim] // 2).zero_()
    return [first, inside - first]


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of two kernels (n, n), at the shift at which it is largest."""
    size = (2 * len(a), 2 * len(a))
    sums = irfft2(rfft2(a, s=size) * rfft2(b, s=size).conj(), s=size)
    return (sums.max() / (a.norm() * b.norm())).item()


def _tidied(k: Tensor) -> Tensor:
    """k without faint values and small specks, of sum 1, centred to a pixel."""
    k = k * (k >= max(FAINT * k.max(), 1e-12))
    specks, count = ndimage.label(k, structure=[[1] * 3] * 3)
    if not count:
        k = torch.zeros_like(k)
        k[len(k) // 2, len(k) // 2] = 1
        return k
    sums = ndimage.sum(k, specks, range(count + 1))
    k = k * torch.from_numpy(sums >= min(SMALL * sums.sum(), sums.max()))[specks]
    k, at = k / k.sum(), torch.arange(len(k)) - len(k) // 2
    return k.roll([-round((k.sum(1 - dim) @ at.to(k)).item()) for dim in (0, 1)], (0, 1))


def _gradients(x: Tensor) -> Tensor:
    """Differences to the right and lower neighbour, (2, h, w), periodic."""
    return torch.stack([x.roll(-1, 1) - x, x.roll(-1, 0) - x])


def _transfer(k: Tensor, y: Tensor) -> Tensor:
    """The periodic convolution with k as a factor of y's frequencies."""
    (kh, kw), (h, w) = k.shape, y.shape
    return rfft2(pad(k, (0, w - kw, 0, h - kh)).roll((-(kh // 2), -(kw // 2)), (0, 1)))


def _middle(x: Tensor, n: int) -> Tensor:
    """The (n, n) values around the first one of a periodic x."""
    return x.roll((n // 2, n // 2), (0, 1))[:n, :n]


def _resized(x: Tensor, size: list[int]) -> Tensor:
    return interpolate(x[None, None], size=size, mode="bicubic", antialias=True)[0, 0]


def _periodic(y: Tensor, n: int) -> Tensor:
    """Continue y by n pixels down and right, linearly from each border to the opposite one."""
    t = torch.linspace(0, 1, n + 2)[1:-1]
    y = torch.cat([y, torch.outer(1 - t, y[-1]) + torch.outer(t, y[0])])
    return torch.cat([y, torch.outer(y[:, -1], 1 - t) + torch.outer(y[:, 0], t)], dim=1)
