"""Estimate the noise of a blurred picture, and check its model, d = k * x + noise.

Only `doubt` needs the restored image. All checks but those of the borders read blocks that are
spread evenly over the picture, so a large picture takes no longer than a small one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from jfbnb.photo import kernel_option

BLOCK = 64  # side of the blocks in pixels; twice that for a kernel larger than half of it
MOST_BLOCKS = 128
ROUNDING = 1 / 255 / 12**0.5  # the noise of rounding to eight bits, the smallest level used
# Blurs to compare with the given one, in the order of their complexity.
OTHERS = ("gaussian:0.1", *(f"gaussian:{std}" for std in (0.5, 0.7, 1, 1.4, 2, 2.5, 3, 4)),
          *(f"disk:{radius}" for radius in (2, 3, 4, 5, 6)),
          *(f"motion:5,{angle}" for angle in range(0, 180, 30)),
          *(f"motion:{length},{angle}" for length in (9, 13) for angle in range(0, 180, 15)))


@dataclass(frozen=True)
class Warning:
    """A doubt about a restored picture.

    Args:
        kind: "noise", "kernel", "border", "frame", "saturation", "jpeg", "outliers", "light",
            "range" or "unconverged".
        text: what is wrong, and what to do, unless `suggestion` says that.
        suggestion: parameters of `jfbnb.deblur` to try, e.g. {"kernel": "disk:4"}.
    """

    kind: str
    text: str
    suggestion: dict[str, str | float] = field(default_factory=dict)

    def line(self, form: Callable[[str, object], str] = "{}={!r}".format) -> str:
        """Text and suggestion; `form` writes a parameter and its value, by default as Python."""
        return ": try ".join([self.text, *(form(*item) for item in self.suggestion.items())])

    __str__ = line


def _blocks(d: Tensor, side: int) -> Tensor:
    """Square blocks (n, C, side, side) of d (C, h, w), which overlap by half at most; on the CPU.

    They begin at multiples of 8 pixels, like JPEG's.
    """
    most = [2 * length // side - 1 for length in d.shape[1:]]
    shrink = min(1.0, math.sqrt(MOST_BLOCKS / math.prod(most)))
    rows, columns = ([int(start) // 8 * 8 for start in
                      torch.linspace(0, length - side, max(1, int(n * shrink)))]
                     for length, n in zip(d.shape[1:], most, strict=True))
    return torch.stack([d[:, i:i + side, j:j + side] for i in rows for j in columns]).cpu()


# --- noise --------------------------------------------------------------------------------------


def level(d: Tensor, noise_std: float) -> float:
    """The noise level to give to a method, whose model is white noise in three channels.

    If all channels of d (C, h, w) are equal, so is their noise: along (1, 1, 1) its variance is
    three times that of white noise.
    """
    equal = len(d) == 1 or (torch.equal(d[0], d[1]) and torch.equal(d[0], d[2]))
    return noise_std * 3**0.5 if equal else noise_std


def estimate_noise(d: Tensor, kernel: Tensor) -> float:
    """The standard deviation of the noise in a blurred picture, rounding included.

    The spectra of the noise and of the scene are fitted together. White noise is read at the finest
    scale, 0.5 cycles per pixel, where the scene is weakest. If the fit near 0.2 differs by a factor
    above 1.5, the noise is not white, and its level there is used: compression, demosaicing and
    smoothing remove higher frequencies of the noise, which no restoration amplifies. The spectra
    are those of the channels' normalised sum and two differences, because noise that the channels
    share is strongest in the sum. If the kernel removes little, noise without high frequencies is
    underestimated.

    Args:
        d: the picture, (C, h, w), not blank.
        kernel: its blur, (kh, kw), of sum 1.

    Returns:
        The estimate, on the scale of d's values: the noise of each value if all channels are equal,
        else the `level`. NaN for a picture of less than 16 pixels a side.
    """
    blocks = usable_blocks(d, kernel)
    if blocks.shape[-1] < 16:
        return math.nan
    if level(d, 1.0) > 1:
        directions = d.new_tensor([[1.0] + [0.0] * (len(d) - 1)])
    else:
        directions = d.new_tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]])
        directions = directions / directions.norm(dim=1, keepdim=True)
    components = torch.einsum("kc,nchw->knhw", directions.to(blocks), blocks)
    power, gains, scene, noise = spectra(components, [kernel])
    beta = fit(power, gains, scene, noise)[1]
    near = (scene[:, 1] - math.log(0.2)).abs() < 0.2
    middle = (beta[:, 6] + beta[:, 7] * math.log(0.2 / 0.5)).exp()
    finest, middle = (max(variance[0], variance.mean()).sqrt().item() for variance in (
        beta[:, 6].exp(), middle.minimum(power[:, near].mean(dim=1))))  # no more than all there is
    return finest if finest / 1.5 < middle < finest * 1.5 else middle


def usable_blocks(d: Tensor, kernel: Tensor) -> Tensor:
    """The blocks with few pixels clipped at black or white, if there are any."""
    side = BLOCK if max(kernel.shape) <= BLOCK // 2 else 2 * BLOCK
    blocks = _blocks(d, min(side, *d.shape[1:])).double()
    low, high = (end(d).item() for end in (torch.amin, torch.amax))
    cut_off = ((blocks <= low) | (blocks >= high)).double().mean(dim=(1, 2, 3))
    return blocks[cut_off <= max(0.02, cut_off.quantile(0.1).item())]


def replace_outliers(d: Tensor, kernel: Tensor) -> tuple[Tensor, list["Warning"]]:
    """Replace the hot pixels of d (C, h, w); return it and a warning, if there are any.

    A hot pixel is brighter than all its neighbours by more than the kernel and the noise allow. It
    is replaced by the median of the 3 x 3 pixels.
    """
    pixels, around = d.cpu().numpy(), np.ones((1, 3, 3), bool)
    around[0, 1, 1] = False

    def neighbours(images: np.ndarray) -> np.ndarray:
        return ndimage.maximum_filter(images, footprint=around, mode="mirror")

    k = np.pad(kernel.cpu().numpy(), 1)[None]
    sharp = 1 - neighbours(k).flat[k.argmax()] / k.max()  # how far a point stands out
    steps = np.abs(np.diff(pixels, axis=2)).reshape(len(pixels), -1)
    noise_std = np.median(steps, axis=1)[:, None, None] / 0.954 if steps.size else 0.0
    found = pixels - neighbours(pixels) > sharp * pixels + np.maximum(10 * noise_std, 0.1)
    if not found.any() or found.mean() > 0.001:  # many are a sign of a sharp picture
        return d, []
    mended = np.where(found, ndimage.median_filter(pixels, (1, 3, 3), mode="mirror"), pixels)
    n = int(found.any(axis=0).sum())
    return torch.from_numpy(mended).to(d), [Warning(
        "outliers", f"{n} pixel{'s are' * (n > 1) or ' is'} far brighter than their neighbours, as "
        "no blur leaves them: taken for hot pixels and replaced by the median of their neighbours")]


def replace_cut_noise(d: Tensor, noise_std: float) -> Tensor:
    """Replace noise that was clipped at black by its mean, if there is much of it.

    That is so in a night sky, which clipping brightens by 0.4 noise_std. The mean is that of a
    normal distribution below half of the smallest positive value.
    """
    cut = _cut_noise(d)
    if cut is None:
        return d
    normal, most = torch.distributions.Normal(0.0, 1.0), d[d > 0].min().cpu() / 2 / noise_std
    mean = -noise_std * (normal.log_prob(most).exp() / normal.cdf(most)).item()
    return d.masked_fill(cut, mean)


def _cut_noise(d: Tensor) -> Tensor | None:
    """The mask (C, h, w) of noise that was clipped at black; None unless it is over 30% of d.

    Noise has brighter values near by, within 5 x 5 pixels; a black area does not.
    """
    cut = (d <= 0) & (F.max_pool2d((d > 0).float(), 5, 1, 2) > 0)
    return cut if cut.double().mean() > 0.3 else None


# --- contradictions -----------------------------------------------------------------------------


def contradictions(
    d: Tensor,
    kernel: Tensor,
    noise_std: float,
    border: str = "unknown",
) -> list[Warning]:
    """Check a picture against its model; return the contradictions.

    An empty list proves nothing: small, smooth and noisy pictures show little.

    Args:
        d: the picture, (C, h, w), values in [0, 1].
        kernel: its assumed blur, (kh, kw), of sum 1.
        noise_std: its assumed noise level, or the result of `estimate_noise`.
        border: "unknown" or "black", as in `operators.Blur`.
    """
    kernel, found = kernel.cpu(), []
    top, bottom, left, right = frame = _frame(d, kernel)
    if any(frame):
        d = d[:, top:d.shape[1] - bottom, left:d.shape[2] - right]
        found.append(Warning("frame", f"the picture has a frame ({top} pixels at the top, {bottom} "
                             f"at the bottom, {left} left, {right} right), which no blur leaves so "
                             "sharp: crop it"))
    found.append(_check_border(d, kernel, border))
    # One at a time: clipping and JPEG change the spectrum.
    found.append(_check_saturation(d) or _check_jpeg(d))
    # The spectrum of a night sky, clipped at black, is not the scene's.
    if not found[-1] and _cut_noise(d) is None:
        found.append(_check_kernel(d, kernel) or _check_noise(d, kernel, noise_std))
    return [warning for warning in found if warning]


def doubt(x: Tensor, most: float = 1.0) -> Warning | None:
    """A warning if a restored picture x (C, h, w) is far out of [0, most], so its model is wrong.

    A wrong kernel or border, or too low a noise level, amplifies errors, which oscillate about the
    true values. Blurred again, they still fit the picture, so the residual does not show them.
    """
    far = 1 - ((x >= -0.05) & (x <= most + 0.05)).sum().item() / x.numel()
    if far <= 0.002:
        return None
    return Warning("range", f"{far:.1%} of the restored values are far out of [0, 1], so the model "
                   "is wrong: try another kernel, border or gamma, or a larger noise level")


def _check_noise(d: Tensor, kernel: Tensor, noise_std: float) -> Warning | None:
    estimate = estimate_noise(d, kernel)
    if estimate > 1.7 * noise_std + 0.001:
        difference, effect = "more", "noise would be amplified"
    elif estimate < 0.2 * noise_std:
        difference, effect = "less", "detail would be lost"
    else:
        return None
    value = float(f"{max(estimate, ROUNDING):.2g}")
    return Warning("noise", f"the picture's noise is near {estimate:.2g}, {difference} than the "
                   f"given {noise_std:.2g}, so {effect}", {"noise_std": value})


def _check_saturation(d: Tensor) -> Warning | None:
    """Find plateaus of the highest value: in an unclipped bright area noise is visible."""
    blocks = _blocks(d, min(BLOCK, *d.shape[1:]))
    if blocks.shape[-1] < 7:
        return None
    below = (blocks < d.amax().cpu()).float().flatten(0, 1)
    share = (F.max_pool2d(below, 7, 1) == 0).double().mean().item()
    if share < 0.02:
        return None
    return Warning("saturation", f"{share:.0%} of the picture is clipped at its highest value, as "
                   "if overexposed, which causes ripples: try a darker copy, or a larger noise "
                   "level")


def _check_jpeg(d: Tensor) -> Warning | None:
    """Compare steps between JPEG's blocks with those beside them (Wang et al. 2000)."""
    grey = _blocks(d, min(BLOCK, *d.shape[1:])).double().mean(dim=1)
    if grey.shape[-1] < 32:
        return None
    for lines in (grey, grey.mT):
        steps = lines.diff().abs()
        excess = steps[..., 1:-1] - (steps[..., :-2] + steps[..., 2:]) / 2
        n = excess.shape[-1] // 8
        excess = excess[..., :8 * n].unflatten(-1, (n, 8)).flatten(0, 2)
        mean, phase = excess.mean(dim=0).max(dim=0)
        error = excess[:, phase].std() / math.sqrt(len(excess))
        if not mean > max(0.25 * steps.mean(), 10 * error):
            return None
    return Warning("jpeg", "the picture shows the blocks of strong JPEG compression, which are "
                   "sharpened too: try a better copy, or a larger noise level")


def _sides(d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A picture or a kernel, turned so that its top, bottom, left and right side is the top."""
    return d, d.flip(-2), d.mT, d.mT.flip(-2)


def _frame(d: Tensor, kernel: Tensor) -> list[int]:
    """The widths of bars of one colour at the top, the bottom, left and right, in pixels.

    A bar must end in a step that is too sharp for the kernel; else it is part of the scene. A
    single bar is taken for part of the scene, too.
    """
    widths = []
    for side, seen in zip(_sides(d), _sides(kernel), strict=True):
        side = side[..., ::max(1, side.shape[2] // 500)]
        away = (side - side[:, :1].mean(dim=2, keepdim=True)).abs().mean(dim=(0, 2))
        width = int((away <= 2.5 / 255).int().cumprod(dim=0).sum())
        beyond = away[width:width + min(len(seen), 7)].tolist()
        sharp = len(beyond) > 2 and max(beyond[:2]) > max(0.1, 0.8 * max(beyond))
        widths.append(width if sharp else 0)
    return widths if sum(width > 0 for width in widths) > 1 else [0, 0, 0, 0]


def _check_border(d: Tensor, kernel: Tensor, border: str) -> Warning | None:
    """Check whether, on most sides, the outermost rows are as dark as a black border makes them."""
    darkening = []
    for side, seen in zip(_sides(d), _sides(kernel), strict=True):
        rows = seen.sum(dim=1)
        lost = rows[len(rows) // 2 + 1:].sum().item()  # of the light of the outermost row
        whole = len(rows) - 1 - len(rows) // 2  # the first row that loses none
        if lost > 0.1 and side.shape[1] > whole and side[:, whole].mean() > 0.05:
            darkening.append((1 - side[:, 0].mean() / side[:, whole].mean()).item() / lost)
    if len(darkening) < 3:
        return None
    black = sorted(darkening)[len(darkening) - 3] > 0.6
    if black == (border == "black"):
        return None
    look = "darkens towards its border, as if" if black else (
        "does not darken towards its border, as it would if")
    return Warning("border", f"the picture {look} everything beyond it were black",
                   {"border": "black" if black else "unknown"})


def _check_kernel(d: Tensor, kernel: Tensor) -> Warning | None:
    """Check whether another kernel explains the picture's spectrum far better."""
    grey = usable_blocks(d.mean(dim=0, keepdim=True), kernel)[:, 0]
    if max(kernel.shape) > grey.shape[-1] // 2 or grey.shape[-1] < BLOCK:
        return None
    blurs = [kernel, *map(kernel_option.parse, OTHERS)]
    given, *others = fit(*spectra(grey[None], blurs))[0].tolist()
    best = min(others)
    if given - best < 0.01 or given < 1.25 * best:
        return None
    # The simplest of those that are as good as the best.
    name = next(name for name, misfit in zip(OTHERS, others, strict=True) if misfit < 1.05 * best)
    width, other = _widths(kernel), _widths(kernel_option.parse(name))
    if other.max() < 0.6:
        return Warning("kernel", "the picture has more detail than the kernel leaves, and is "
                       "hardly blurred: leave it as it is, or try a far narrower kernel")
    difference = ("has more detail than the kernel leaves" if (other < width).all() else
                  "has less detail than the kernel leaves" if (other > width).all() else
                  "is blurred in other directions than the kernel says")
    return Warning("kernel", f"the picture {difference}, and another explains its spectrum better",
                   {"kernel": name})


def _widths(kernel: Tensor) -> Tensor:
    """A kernel's standard deviation along its narrowest and its widest direction, in pixels."""
    rows, columns = (torch.arange(n, dtype=kernel.dtype) for n in kernel.shape)
    at = torch.stack([rows[:, None].expand(kernel.shape), columns.expand(kernel.shape)])
    at = at - (kernel * at).sum(dim=(1, 2), keepdim=True)
    return torch.linalg.eigvalsh(torch.einsum("hw,ihw,jhw->ij", kernel, at, at)).clamp_min(0).sqrt()


def fit(power: Tensor, gains: Tensor, scene: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a scene and noise to the power spectrum of blocks, for each blur; return the misfits.

    The misfit is Whittle's likelihood (1953): power P is compared with the expected
    M = |K|^2 S + N by the mean over frequencies of P / M - 1 - log(P / M), which is 0 where they
    agree. S and N minimise it, with a normal prior on each of their coefficients but the levels.
    log S is linear in log frequency, as for natural pictures, with twofold and fourfold terms in
    direction. Its slope is near -3 (sharp photographs have -2 to -4), so that a blur cannot pass
    for a soft scene. log N may slope, because JPEG and demosaicing remove high frequencies.

    The minimiser is Fisher scoring, damped as by Levenberg and Marquardt.

    Args:
        power, gains, scene, noise: of `spectra`.

    Returns:
        The misfits, prior included, (b,), and the coefficients of log S and log N, (b, 8).
    """
    centre = scene.new_tensor([0, -3, 0, 0, 0, 0, 0, 0])
    weight = scene.new_tensor([0, 4, 4, 4, 4, 4, 0, 1]) / 200

    def at(beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Misfits, their gradients and Fisher information for coefficients (b, 8)."""
        S, N = (gains + beta[:, :6] @ scene.T).exp(), (beta[:, 6:] @ noise.T).exp()
        ratio = power / (S + N)
        slopes = torch.cat([S[..., None] * scene, N[..., None] * noise], -1) / (S + N)[..., None]
        misfit = (ratio - 1 - ratio.log()).mean(dim=1) + (beta - centre) ** 2 @ weight / 2
        gradient = ((1 - ratio)[..., None] * slopes).mean(dim=1) + weight * (beta - centre)
        information = slopes.mT @ slopes / len(scene) + torch.diag(weight)
        return misfit, gradient, information

    beta = centre.repeat(max(len(power), len(gains)), 1)
    beta[:, 0] = (power.sum(dim=1) / (gains + beta[:, :6] @ scene.T).exp().sum(dim=1)).log()
    beta[:, 6] = power.quantile(0.1, dim=1).log()
    damping = beta.new_full((len(beta), 1), 0.01)
    now = at(beta)
    for _ in range(20):
        misfit, gradient, H = now
        H = H + torch.diag_embed(damping * H.diagonal(dim1=1, dim2=2) + 1e-9)
        trial = beta - torch.linalg.solve(H, gradient)
        then = at(trial)
        better = then[0] < misfit
        now = tuple(torch.where(better.view(-1, *(1,) * (new.dim() - 1)), new, old)
                    for new, old in zip(then, now, strict=True))
        beta = torch.where(better[:, None], trial, beta)
        damping = damping * torch.where(better, 0.2, 10.0)[:, None]
    return now[0], beta


def spectra(blocks: Tensor, blurs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of blocks (b, n, side, side), at f frequencies: their power (b, f), each blur's log gain, and
    the terms of log S (f, 6) and of log N (f, 2).

    Amplitudes are averaged, not powers, so that a few outliers matter little.
    """
    n = blocks.shape[-1]
    window = torch.hann_window(n, dtype=torch.float64)
    window = torch.outer(window, window) / window.square().sum()
    blocks = blocks.double() - blocks.double().mean(dim=(2, 3), keepdim=True)
    power = torch.fft.fft2(blocks * window).abs().mean(dim=1).square()
    power = power / (math.pi / 4 + (1 - math.pi / 4) / blocks.shape[1])  # expected of noise alone
    gains = torch.stack([torch.fft.fft2(blur.double().cpu(), s=(n, n)) for blur in blurs])
    gains = gains.abs().square()
    for dim in (1, 2):  # the window mixes neighbouring frequencies
        gains = 2 / 3 * gains + (gains.roll(1, dim) + gains.roll(-1, dim)) / 6

    frequency = torch.fft.fftfreq(n, dtype=torch.float64)
    rows, columns = frequency[:, None].expand(n, n), frequency.expand(n, n)
    # Half of the plane determines the rest. The window mixes the mean into the lowest frequencies.
    used = ((rows > 0) | ((rows == 0) & (columns > 0))) & (torch.hypot(rows, columns) > 2.5 / n)
    rows, columns = rows[used], columns[used]
    radius, angle = torch.hypot(rows, columns).log(), torch.atan2(rows, columns)
    scene = [torch.ones_like(radius), radius, (2 * angle).cos(), (2 * angle).sin(),
             (4 * angle).cos(), (4 * angle).sin()]
    return (power[:, used].clamp_min(1e-12), gains[:, used].clamp_min(1e-12).log(),
            torch.stack(scene, dim=1),
            torch.stack([scene[0], radius.clamp_min(math.log(0.2)) - math.log(0.5)], dim=1))
