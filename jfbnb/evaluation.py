"""Methods x images -> one long table of metrics; its summary; the choice of their parameters."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from jfbnb.baselines import (
    direct_inverse,
    tikhonov,
    tikhonov_gradient_descent,
    total_variation,
)
from jfbnb.common import ROOT, UserError, atomic_write
from jfbnb.fixed_point import SolveInfo, anderson
from jfbnb.maps import PreconditionedMap
from jfbnb.networks import Regulariser, load_regulariser
from jfbnb.operators import Blur

RELEASED = ROOT / "data" / "weights"

# --- metrics ------------------------------------------------------------------------------------


def psnr(x: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, one per image: 10 log10(range^2 / MSE). Not clipped.

    Shapes: (B, C, H, W) twice -> (B,).
    """
    mse = (x - truth).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mse)


def ssim(x: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), scikit-image's with Gaussian weights, (B,)."""
    values = [structural_similarity(a, b, channel_axis=0, data_range=1.0, gaussian_weights=True,
                                    sigma=1.5, use_sample_covariance=False)
              for a, b in zip(x.cpu().numpy(), truth.cpu().numpy(), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


# --- methods ------------------------------------------------------------------------------------

# A method turns (A, d, noise_std) into (reconstruction, what its solver says or None).
Method = Callable[[Blur, Tensor, float], tuple[Tensor, SolveInfo | None]]

LABELS = {
    "measurement": "Noisy blurred",
    "direct-inverse": "Direct inverse",
    "gradient-descent": "Gradient descent",
    "tikhonov": "Tikhonov",
    "total-variation": "Total variation",
    "plug-and-play": "Plug-and-play",
    "jfb": "JFB",
}


@dataclass
class Tuning:
    """The methods' parameters, chosen on validation images measured with noise `noise_std`.

    At another noise level the weights of the prior go with the noise's variance, and early
    stopping with its inverse: the direction with squared singular value s^2 is recovered after
    about 1 / s^2 steps, and lam plays the part of the smallest s^2 that is.
    """

    noise_std: float
    lam: float
    gradient_descent_steps: int
    gradient_descent_step_size: float
    total_variation_weight: float
    plug_and_play_tau: float

    def save(self, path: Path) -> None:
        atomic_write(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> "Tuning":
        """Raises UserError if the file is missing or not a tuning."""
        try:
            return Tuning(**load_tuned(path))
        except TypeError as error:
            raise UserError(f"{path} holds no tuned parameters ({error})") from error


def load_tuned(path: Path) -> dict:
    """What an earlier notebook tuned and stored. Raises UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"no tuned parameters at {path}: run notebooks 02 to 04 first, in order, "
                        "or `jfbnb reproduce`")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} holds no tuned parameters ({error})") from error


def solve(S: Regulariser, A: Blur, d: Tensor, tolerance: float = 1e-4,
          max_iterations: int = 100) -> tuple[Tensor, SolveInfo]:
    """The implicit network N(d) = x* (Eq. 3): the fixed point of the preconditioned map."""
    T = PreconditionedMap(A, S)
    return anderson(lambda x: T(x, d), d, tolerance, max_iterations)


def _with_tau(S: Regulariser, tau: float) -> Regulariser:
    return Regulariser(S.network, tau).to(S.log_tau.device)


def make_methods(names: list[str], weights: Path, device: torch.device) -> dict[str, Method]:
    """The named methods, with what a run stored in the folder `weights`.

    That folder holds tuning.json, denoiser.safetensors (plug-and-play) and jfb.safetensors.

    Raises:
        UserError: for an unknown name, or where a file that a method needs is missing.
    """
    for name in names:
        if name not in LABELS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(LABELS)}")
    tuning = Tuning.load(weights / "tuning.json")

    def variance_ratio(noise_std: float) -> float:
        return (noise_std / tuning.noise_std) ** 2

    def learned(file: str, tau: float | None) -> Method:
        S = load_regulariser(weights / file).to(device)
        base = S.tau.item() if tau is None else tau
        return lambda A, d, noise_std: solve(_with_tau(S, base * variance_ratio(noise_std)), A, d)

    def gradient_descent(A: Blur, d: Tensor, noise_std: float) -> tuple[Tensor, None]:
        steps = round(tuning.gradient_descent_steps / variance_ratio(noise_std))
        return tikhonov_gradient_descent(A, d, lam=0.0, step=tuning.gradient_descent_step_size,
                                         iterations=min(steps, 100_000)), None

    makers: dict[str, Callable[[], Method]] = {
        "measurement": lambda: lambda A, d, noise_std: (d, None),
        "direct-inverse": lambda: lambda A, d, noise_std: (direct_inverse(A, d), None),
        "gradient-descent": lambda: gradient_descent,
        "tikhonov": lambda: lambda A, d, noise_std: (
            tikhonov(A, d, tuning.lam * variance_ratio(noise_std)), None),
        "total-variation": lambda: lambda A, d, noise_std: total_variation(
            A, d, tuning.total_variation_weight * variance_ratio(noise_std)),
        "plug-and-play": lambda: learned("denoiser.safetensors", tuning.plug_and_play_tau),
        "jfb": lambda: learned("jfb.safetensors", None),
    }
    return {name: makers[name]() for name in names}


# --- tables -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    methods: dict[str, Method],
    A: Blur,
    x: Tensor,
    d: Tensor,
    noise_std: float,
    names: list[str],
    batch_size: int = 5,
) -> pd.DataFrame:
    """One row per method and image: PSNR, SSIM, and what the solver said.

    Args:
        x, d: truths and measurements (N, C, H, W), on the device of A.
        names: N image names.
        batch_size: images solved together; a batch takes as long as its slowest image.

    Returns:
        Columns method, image, psnr (dB), ssim, iterations, residual, converged, seconds. The
        solver's are empty for methods without one.
    """
    parts = []
    for method, restore in methods.items():
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            clock = time.perf_counter()
            y, info = restore(A, d[part], noise_std)
            if y.is_cuda:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - clock) / len(y)
            parts.append(pd.DataFrame({
                "method": method,
                "image": names[part],
                "psnr": psnr(y, x[part]).cpu(),
                "ssim": ssim(y, x[part]),
                "iterations": info.iterations.cpu() if info else np.nan,
                "residual": info.residual.cpu() if info else np.nan,
                "converged": info.converged.cpu().double() if info else np.nan,
                "seconds": seconds,
            }))
    return pd.concat(parts, ignore_index=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, in the table's order: means with standard errors, and convergence."""
    groups = table.groupby("method", sort=False)
    return pd.DataFrame({
        "images": groups.size(),
        "psnr": groups.psnr.mean(),
        "psnr_se": groups.psnr.sem(),
        "ssim": groups.ssim.mean(),
        "ssim_se": groups.ssim.sem(),
        "converged": groups.converged.mean(),
        "median_iterations": groups.iterations.median(),
        "seconds_per_image": groups.seconds.mean(),
    }).reset_index()


def reference_table2() -> pd.DataFrame:
    """The paper's Table 2, as data with its source: method, psnr, ssim."""
    return pd.read_csv(ROOT / "data" / "published_table2.csv", comment="#")


def table2(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 2: our means beside the published values, one row per method of either.

    The published JFB value is on the scale of its code (see `on_published_scale`); the column
    `published PSNR, range 1` puts it on the usual one.
    """
    published = reference_table2().set_index("method")
    ours = summary.set_index("method")
    order = list(ours.index) + [m for m in published.index if m not in ours.index]
    rows = pd.DataFrame(index=order)
    rows["Method"] = [LABELS.get(m, published.label.get(m, m)) for m in order]
    rows["PSNR (dB)"] = ours.psnr.reindex(order)
    rows["± PSNR"] = ours.psnr_se.reindex(order)
    rows["SSIM"] = ours.ssim.reindex(order)
    rows["± SSIM"] = ours.ssim_se.reindex(order)
    rows["Published PSNR"] = published.psnr.reindex(order)
    shift = published.data_range.map(lambda r: 20 * np.log10(r))
    rows["Published PSNR, range 1"] = (published.psnr + shift).reindex(order)
    rows["Published SSIM"] = published.ssim.reindex(order)
    return rows.reset_index(drop=True)


def on_published_scale(x: Tensor, truth: Tensor) -> Tensor:
    """PSNR as the paper's code computes it: images mapped to [-1, 1], but a data range of 1."""
    return psnr(2 * x - 1, 2 * truth - 1, data_range=1.0)
