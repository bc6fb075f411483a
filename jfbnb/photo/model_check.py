"""How much noise a blurred picture has, and what in it contradicts its model, d = k * x + noise.

It needs no restoration. All but the borders is told from blocks spread evenly over the picture, so
that a large one takes no longer than a small one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jfbnb.core import kernels
from jfbnb.photo import kernel_option

BLOCK = 64  # side of the blocks in pixels; twice that for a kernel of more than half of it
MOST_BLOCKS = 128
# Blurs that a picture may have instead of the one that it is said to have, as --kernel takes them.
OTHERS = ("gaussian:0.1", *(f"gaussian:{std}" for std in (0.5, 0.7, 1, 1.4, 2, 2.5, 3, 4)),
          *(f"disk:{radius}" for radius in (2, 3, 4, 5, 6)),
          *(f"motion:5,{angle}" for angle in range(0, 180, 30)),
          *(f"motion:{length},{angle}" for length in (9, 13) for angle in range(0, 180, 15)))


def _blocks(d: Tensor, side: int) -> Tensor:
    """Square blocks (n, C, side, side) of d (C, h, w), that overlap by half at most; on CPU.

    They begin at multiples of 8 pixels, as those of JPEG do.
    """
    most = [2 * length // side - 1 for length in d.shape[1:]]
    shrink = min(1.0, math.sqrt(MOST_BLOCKS / math.prod(most)))
    rows, columns = ([int(start) // 8 * 8 for start in
                      torch.linspace(0, length - side, max(1, int(n * shrink)))]
                     for length, n in zip(d.shape[1:], most, strict=True))
    return torch.stack([d[:, i:i + side, j:j + side] for i in rows for j in columns]).cpu()


# --- noise --------------------------------------------------------------------------------------


def estimate_noise(d: Tensor, kernel: Tensor | None = None) -> float:
    """The standard deviation of the white noise in a blurred picture, rounding included.

    As Donoho and Johnstone (1994): the median size of what a filter leaves that drops the picture
    and keeps the noise, over 0.6745. Theirs is the finest diagonal wavelet. Here it is the filter
    of 7 x 7 pixels that passes least of natural pictures once they are blurred: the last principal
    component of their patches (as Pyatykh et al. 2013), where power falls with the square of
    frequency. Where the darkest or brightest value is near, noise may be cut off, and is left out.

    Of a picture that is not blurred it is too high: fine detail looks like noise.

    Args:
        d: the picture, (C, h, w).
        kernel: (kh, kw), where it is known; the lower one of two estimates is then taken.

    Returns:
        The estimate, on the scale of d's values; NaN for a picture of less than 7 pixels a side.
    """
    blocks = _blocks(d, min(BLOCK, *d.shape[1:]))
    blurs = [kernels.gaussian(1.0), *([] if kernel is None else [kernel])]
    return min(_noise_through(_least_filter(blur), blocks) for blur in blurs)


def _least_filter(kernel: Tensor, size: int = 7) -> Tensor:
    """The filter (size, size) of norm 1 that passes least of natural pictures after this blur."""
    n = max(2 * BLOCK, *kernel.shape)
    frequency = torch.fft.fftfreq(n, dtype=torch.float64)
    power = _gain(kernel.cpu(), n) / (frequency[:, None] ** 2 + frequency**2 + 1 / n**2)
    covariance = torch.fft.ifft2(power).real
    apart = (torch.arange(size)[:, None] - torch.arange(size)) % n
    patches = covariance[apart[:, None, :, None], apart[None, :, None, :]].reshape(size**2, -1)
    return torch.linalg.eigh(patches).eigenvectors[:, 0].view(size, size)


def _noise_through(kernel: Tensor, blocks: Tensor) -> float:
    size = len(kernel)
    if min(blocks.shape[2:]) < size:
        return math.nan
    low, high = (end(blocks, dim=(0, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
    cut = ((blocks == low) | (blocks == high)).to(blocks.dtype)
    whole = F.max_pool2d(cut.flatten(0, 1), size, 1) == 0
    left = F.conv2d(blocks.flatten(0, 1)[:, None], kernel.to(blocks)[None, None])[:, 0].abs()
    if whole.double().mean() > 0.02:
        left = left[whole]
    return left.median().item() / 0.6745


def _gain(kernel: Tensor, n: int) -> Tensor:
    """What a blur does to power at each frequency, (n, n)."""
    return torch.fft.fft2(kernel.double(), s=(n, n)).abs().square()


# --- contradictions -----------------------------------------------------------------------------


def contradictions(
    d: Tensor,
    kernel: Tensor,
    noise_std: float,
    restored: Tensor | None = None,
    border: str = "unknown",
) -> list[str]:
    """What in a picture contradicts its model: for each thing one line, which says what to try.

    No line is no proof: a small, a smooth or a noisy picture shows little.

    Args:
        d: the picture, (C, h, w), values in [0, 1].
        kernel: what it is said to be blurred by, (kh, kw), of sum 1.
        noise_std: what its noise is said to be, or what `estimate_noise` says.
        restored: what came of it, (C, H, W), if that is known.
        border: "unknown" or "black", as `operators.Blur` takes it.
    """
    kernel = kernel.cpu()
    frame = _frame(d)
    top, bottom, left, right = frame
    d = d[:, top:d.shape[1] - bottom, left:d.shape[2] - right]
    lines = []
    if any(frame):
        lines.append(f"the picture has a frame ({top} pixels at the top, {bottom} at the bottom, "
                     f"{left} left, {right} right), which no blur leaves so sharp: cut it off")
    lines += [*_border_line(d, kernel, border), *_saturation_line(d)]
    # One at a time: JPEG changes spectrum and noise, and fine detail passes for noise.
    lines += _jpeg_line(d) or _kernel_line(d, kernel) or _noise_line(d, kernel, noise_std)
    if restored is not None:
        far = 1 - ((restored >= -0.1) & (restored <= 1.1)).sum().item() / restored.numel()
        if far > 0.002:
            lines.append(f"{far:.1%} of the restored values are far out of [0, 1], so the model "
                         "is wrong: try another --kernel or --border, or a larger --noise-std")
    return lines


def _noise_line(d: Tensor, kernel: Tensor, noise_std: float) -> list[str]:
    estimate = estimate_noise(d, kernel)
    if estimate > 1.5 * noise_std + 0.001:
        return [f"the picture's noise is near {estimate:.2g}, more than the {noise_std:.2g} told, "
                "and would be amplified: leave --noise-std out, or raise it"]
    if estimate < 0.5 * noise_std - 0.001:
        return [f"the picture's noise is near {estimate:.2g}, less than the {noise_std:.2g} told, "
                "and detail would be lost: leave --noise-std out, or lower it"]
    return []


def _saturation_line(d: Tensor) -> list[str]:
    """Plateaus of the highest value: where a scene is as bright as that, its noise still shows."""
    blocks = _blocks(d, min(BLOCK, *d.shape[1:]))
    if blocks.shape[-1] < 7:
        return []
    below = (blocks < d.amax().cpu()).float().flatten(0, 1)
    share = (F.max_pool2d(below, 7, 1) == 0).double().mean().item()
    if share < 0.02:
        return []
    return [f"{share:.0%} of the picture is cut off at its highest value, as if overexposed, and "
            "gets ripples around that: try a darker copy, or a larger --noise-std"]


def _jpeg_line(d: Tensor) -> list[str]:
    """Steps from one to the next of JPEG's blocks, over those beside them (Wang et al. 2000)."""
    grey = _blocks(d, min(BLOCK, *d.shape[1:])).double().mean(dim=1)
    if grey.shape[-1] < 32:
        return []
    for lines in (grey, grey.mT):
        steps = lines.diff().abs()
        excess = steps[..., 1:-1] - (steps[..., :-2] + steps[..., 2:]) / 2
        n = excess.shape[-1] // 8
        excess = excess[..., :8 * n].unflatten(-1, (n, 8)).flatten(0, 2)
        mean, phase = excess.mean(dim=0).max(dim=0)
        error = excess[:, phase].std() / math.sqrt(len(excess))
        if not mean > max(0.25 * steps.mean(), 10 * error):
            return []
    return ["the picture shows the blocks of strong JPEG compression, which get sharpened too: try "
            "a better copy, or a larger --noise-std"]


# --- contradictions: the borders ----------------------------------------------------------------


def _sides(d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The picture, or a kernel, seen from the top, the bottom, left and right, as from the top."""
    return d, d.flip(-2), d.mT, d.mT.flip(-2)


def _frame(d: Tensor) -> list[int]:
    """How many rows at the top, at the bottom, columns left and right are bars of one colour.

    A bar ends in a step along its whole length. A single one is taken for part of the scene.
    """
    widths = []
    for side in _sides(d):
        side = side[..., ::max(1, side.shape[2] // 500)]
        away = (side - side[:, :1].mean(dim=2, keepdim=True)).abs().mean(dim=(0, 2))
        width = int((away <= 2.5 / 255).int().cumprod(dim=0).sum())
        step = away[width:width + 3].max().item() if width < len(away) else 0.0
        widths.append(width if step > 0.1 else 0)
    return widths if sum(width > 0 for width in widths) > 1 else [0, 0, 0, 0]


def _border_line(d: Tensor, kernel: Tensor, border: str) -> list[str]:
    """Whether the outermost rows are as dark as a black border makes them, on most of the sides."""
    darkening = []
    for side, seen in zip(_sides(d), _sides(kernel), strict=True):
        rows = seen.sum(dim=1)
        lost = rows[len(rows) // 2 + 1:].sum().item()  # of the light of the outermost row
        whole = len(rows) - 1 - len(rows) // 2  # the first row that loses none
        if lost > 0.1 and side.shape[1] > whole and side[:, whole].mean() > 0.05:
            darkening.append((1 - side[:, 0].mean() / side[:, whole].mean()).item() / lost)
    if len(darkening) < 3:
        return []
    black = sorted(darkening)[len(darkening) - 3] > 0.6
    if black and border != "black":
        return ["the picture darkens towards its border, as if all beyond it were black: try "
                "--border black"]
    if border == "black" and not black:
        return ["the picture does not darken towards its border, as it would if all beyond it were "
                "black: try --border unknown"]
    return []


# --- contradictions: the kernel -----------------------------------------------------------------


def _kernel_line(d: Tensor, kernel: Tensor) -> list[str]:
    better = _better_kernel(d, kernel)
    if better is None:
        return []
    told, other = (_widths(blur) for blur in (kernel, kernel_option.parse(better)))
    if other.max() < 0.6:
        return ["the picture has more detail than --kernel leaves, and is hardly blurred, if at "
                "all: leave it as it is, or try a far narrower --kernel"]
    kind = ("has more detail than --kernel leaves" if (other < told).all() else
            "has less detail than --kernel leaves" if (other > told).all() else
            "is blurred in other directions than --kernel says")
    return [f"the picture {kind}: try --kernel {better}, which explains its spectrum better"]


def _widths(kernel: Tensor) -> Tensor:
    """A kernel's standard deviation along its narrowest and its widest direction, in pixels."""
    rows, columns = (torch.arange(n, dtype=kernel.dtype) for n in kernel.shape)
    at = torch.stack([rows[:, None].expand(kernel.shape), columns.expand(kernel.shape)])
    at = at - (kernel * at).sum(dim=(1, 2), keepdim=True)
    return torch.linalg.eigvalsh(torch.einsum("hw,ihw,jhw->ij", kernel, at, at)).clamp_min(0).sqrt()


def _better_kernel(d: Tensor, kernel: Tensor) -> str | None:
    """The name of another kernel that explains the picture's spectrum far better, if one does."""
    side = BLOCK if max(kernel.shape) <= BLOCK // 2 else 2 * BLOCK
    if max(kernel.shape) > side // 2 or min(d.shape[1:]) < side:
        return None
    blocks = _blocks(d, side)
    cut_off = ((blocks <= 0) | (blocks >= 1)).double().mean(dim=(1, 2, 3))
    grey = blocks.mean(dim=1)[cut_off <= 0.02]
    if not len(grey):
        return None
    noise_std = max(estimate_noise(d.mean(dim=0, keepdim=True), kernel), 1e-4)
    told, *others = _misfits(grey, noise_std, [kernel, *map(kernel_option.parse, OTHERS)]).tolist()
    best = min(others)
    if told - best < 0.006 or told < 1.2 * best:
        return None
    # The first of those that are as good as the best: they are in the order of complexity.
    return next(name for name, misfit in zip(OTHERS, others, strict=True) if misfit < 1.05 * best)


def _misfits(blocks: Tensor, noise_std: float, blurs: list[Tensor]) -> Tensor:
    """How badly each blur explains the mean power spectrum of blocks (n, side, side).

    The likelihood of Whittle (1953): power P is compared with the M = |K|^2 S + N expected of a
    scene and of noise, by the mean over frequencies of P / M - 1 - log(P / M); it is 0 where they
    agree. Of the S and N below the ones that explain P best are taken, with a normal prior on each
    of their coefficients but the scene's brightness. log S is linear in log frequency, as natural
    pictures are, and has terms in direction, twofold and fourfold. Its slope is near -3 (of sharp
    photographs it is -2 to -4), so that a blur cannot pass for a scene's own softness. log N is
    near that of the noise estimated, and flat; it may slope a little, as JPEG correlates noise.

    Found by Fisher's scoring, damped as by Levenberg and Marquardt.

    Returns:
        The misfit of each blur, prior included, (number of blurs,).
    """
    power, gains, scene, noise = _spectra(blocks, blurs)
    centre = scene.new_tensor([0, -3, 0, 0, 0, 0, 2 * math.log(noise_std), 0])
    weight = scene.new_tensor([0, 4, 4, 4, 4, 4, 1, 1]) / 200

    def fit(beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Misfits, their gradients and Fisher information for coefficients (number of blurs, 8)."""
        S, N = (gains + beta[:, :6] @ scene.T).exp(), (beta[:, 6:] @ noise.T).exp()
        ratio = power / (S + N)
        slopes = torch.cat([S[..., None] * scene, N[..., None] * noise], -1) / (S + N)[..., None]
        misfit = (ratio - 1 - ratio.log()).mean(dim=1) + (beta - centre) ** 2 @ weight / 2
        gradient = ((1 - ratio)[..., None] * slopes).mean(dim=1) + weight * (beta - centre)
        information = slopes.mT @ slopes / len(scene) + torch.diag(weight)
        return misfit, gradient, information

    beta = centre.repeat(len(blurs), 1)
    beta[:, 0] = (power.sum() / (gains + beta[:, :6] @ scene.T).exp().sum(dim=1)).log()
    beta[:, 6] = power.quantile(0.1).log()
    damping = beta.new_full((len(blurs), 1), 0.01)
    now = fit(beta)
    for _ in range(20):
        misfit, gradient, H = now
        H = H + torch.diag_embed(damping * H.diagonal(dim1=1, dim2=2) + 1e-9)
        trial = beta - torch.linalg.solve(H, gradient)
        then = fit(trial)
        better = then[0] < misfit
        now = tuple(torch.where(better.view(-1, *(1,) * (new.dim() - 1)), new, old)
                    for new, old in zip(then, now, strict=True))
        beta = torch.where(better[:, None], trial, beta)
        damping = damping * torch.where(better, 0.2, 10.0)[:, None]
    return now[0]


def _spectra(blocks: Tensor, blurs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At f frequencies: power (f,), each blur's log gain, terms of log S (f, 6), log N (f, 2)."""
    n = blocks.shape[-1]
    window = torch.hann_window(n, dtype=torch.float64)
    window = torch.outer(window, window) / window.square().sum()
    blocks = blocks.double() - blocks.double().mean(dim=(1, 2), keepdim=True)
    power = torch.fft.fft2(blocks * window).abs().square().mean(dim=0)
    gains = torch.stack([_gain(blur, n) for blur in blurs])
    for dim in (1, 2):  # the window smears each frequency over the next
        gains = 2 / 3 * gains + (gains.roll(1, dim) + gains.roll(-1, dim)) / 6

    frequency = torch.fft.fftfreq(n, dtype=torch.float64)
    rows, columns = frequency[:, None].expand(n, n), frequency.expand(n, n)
    # Half of the plane says it all. The window mixes the mean into the lowest frequencies.
    used = ((rows > 0) | ((rows == 0) & (columns > 0))) & (torch.hypot(rows, columns) > 2.5 / n)
    rows, columns = rows[used], columns[used]
    radius, angle = torch.hypot(rows, columns).log(), torch.atan2(rows, columns)
    scene = [torch.ones_like(radius), radius, (2 * angle).cos(), (2 * angle).sin(),
             (4 * angle).cos(), (4 * angle).sin()]
    return (power[used].clamp_min(1e-30), gains[:, used].clamp_min(1e-12).log(),
            torch.stack(scene, dim=1), torch.stack([scene[0], radius - math.log(0.5)], dim=1))
