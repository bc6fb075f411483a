"""Checks of the notebooks' exercises: each runs what it is given, or measures the answer anew."""

import csv
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from jfbnb.common import seeded_generator
from jfbnb.core.baselines import tikhonov
from jfbnb.core.fixed_point import picard, solve
from jfbnb.core.gradients import neumann
from jfbnb.core.maps import GradientMap, ImplicitMap
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Blur, LinearOperator
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import bundled_photos
from jfbnb.teaching.explorers import ToyMap
from jfbnb.training.methods import METHODS

RIGHT = "right"
RECORD = Path("answers.csv")  # of all that was answered, beside the notebook: to be handed in
CHECKS: dict[str, Callable[..., str]] = {}
Denoise = Callable[[Tensor, float], Tensor]


def answer(exercise: str, given: object = None, *context: object) -> None:
    """Print whether an answer is right, or what to look at, and note it in `RECORD`.

    Args:
        given: None is no answer yet.
        context: of the notebook, what the check needs to measure the answer itself.
    """
    if given is None:
        print(f"{exercise}: no answer yet")
        return
    try:
        verdict = CHECKS[exercise](given, *context)
    except Exception as error:  # a student's function may raise anything
        verdict = f"it cannot be checked: {type(error).__name__}: {error}".splitlines()[0]
    with RECORD.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([datetime.now().isoformat(" ", "seconds"), exercise, verdict])
    print(f"{exercise}: {verdict}")


def checks(exercise: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Makes a function (given, ...) -> verdict the check of an exercise."""
    return lambda function: CHECKS.setdefault(exercise, function)


def look(at: str) -> str:
    """A verdict: not right, and where to look."""
    return f"not so: {at}"


def number(given: object) -> float:
    """A number, as Python has it or as text, perhaps with a unit. Raises ValueError."""
    if not isinstance(given, str):
        return float(given)
    text = given.strip().replace("\N{MINUS SIGN}", "-")
    return float(re.sub(r"\s*(dB|steps?)$", "", text))


@cache
def validation() -> tuple[Blur, Tensor, Tensor]:
    """The paper's blur, three validation images and their measurements, as in notebook 2."""
    protocol, images = get_protocol("paper"), bundled_photos("validation", 128)[:3]
    A, x = protocol.operator(), images.as_float()
    return A, x, measure(A, x, protocol.noise_std, 0, images.indices)


# --- notebook 1 ---------------------------------------------------------------------------------


def inverse_psnr(protocol: str, noise_std: float) -> float:
    """The PSNR of the direct inverse that 1.4 predicts."""
    spectrum = get_protocol(protocol).operator().spectrum
    return -10 * math.log10(noise_std**2 * (1 / spectrum**2).mean().item())


@checks("1.1")
def _predicted(given: object) -> str:
    ours = {name: inverse_psnr(name, get_protocol(name).noise_std) for name in ("paper", "code")}
    if abs(number(given) - ours["code"]) < 1.5:
        return RIGHT
    return look("that is protocol paper" if abs(number(given) - ours["paper"]) < 1.5 else
                "put the noise and the spectrum of protocol code into the formula of 1.4")


@checks("1.2")
def _rounded(given: object) -> str:
    value, wanted = number(given), [inverse_psnr(name, 1 / (255 * math.sqrt(12)))
                                    for name in ("paper", "code")]
    if min(abs(value - right) for right in wanted) < 1.5:
        return RIGHT
    return look("the error is larger than the image: look at the sign" if value > 0 else
                "add no noise, round only; the formula of 1.4 takes the hint's standard deviation")


@checks("1.3")
def _small_enough(given: object) -> str:
    value, wanted = number(given), [10 ** ((inverse_psnr(name, 1.0) - 30) / 20)
                                    for name in ("paper", "code")]
    if any(abs(value - right) < 0.2 * right for right in wanted):
        return RIGHT
    return look("that is the variance: take its root" if value < 1e-7 else
                "30 dB is a mean squared error of 1e-3, and that is sigma^2 times the mean of "
                "1/mu^2")


# --- notebook 2 ---------------------------------------------------------------------------------


@checks("2.1")
def _best_step(given: object) -> str:
    A, x, d = validation()
    z, curve = torch.zeros_like(d), []
    for _ in range(round(number(given)) + 60):
        z = z - A.adjoint(A(z) - d)
        curve.append(psnr(z, x).mean().item())
    if curve[round(number(given)) - 1] > max(curve) - 0.05:
        return RIGHT
    return look(f"after {given} steps from 0 it is {max(curve):.2f} dB at best on the way, and "
                f"{curve[round(number(given)) - 1]:.2f} dB there")


@checks("2.2")
def _smoothness(given: Callable[[Tensor], Tensor]) -> str:
    x = torch.rand(1, 3, 9, 8, dtype=torch.float64, generator=seeded_generator(0))
    for border in (x, torch.nn.functional.pad(x, (1, 1, 1, 1))):  # free, or black beyond
        x = border.clone().requires_grad_()
        energy = 0.5 * (x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum())
        (right,) = torch.autograd.grad(energy, x)
        inside = slice(None) if border.shape[3] == 8 else slice(1, -1)
        if torch.allclose(given(border[..., inside, inside]), right[..., inside, inside]):
            return RIGHT
    return look("compare it with torch.autograd.grad of half the sum of the squared differences")


@checks("2.3")
def _two_weights(given: tuple[float, float]) -> str:
    A, x, _ = validation()
    for factor, lam in zip((1, 2), given, strict=True):
        d = measure(A, x, factor * get_protocol("paper").noise_std, 0, range(len(x)))
        scores = {w: psnr(tikhonov(A, d, w), x).mean().item()
                  for w in (number(lam), *torch.logspace(-3, -0.5, 26).tolist())}
        if scores[number(lam)] < max(scores.values()) - 0.05:
            return look(f"with {factor} times the noise another weight is better by "
                        f"{max(scores.values()) - scores[number(lam)]:.2f} dB")
    return RIGHT


# --- notebook 3 ---------------------------------------------------------------------------------


@checks("3.1")
@torch.enable_grad()
def _shallow(R: Denoise) -> str:
    x = bundled_photos("validation", 64)[:4].as_float().requires_grad_()
    R = R.cpu() if isinstance(R, torch.nn.Module) else R
    R(x, 0.1)[0, :, 32, 32].sum().backward()
    seen = x.grad[0].abs().sum(dim=(0, 2)).count_nonzero().item()
    y = x.detach() + 0.1 * torch.randn(x.shape, generator=seeded_generator(1))
    gain = (psnr(y - R(y, 0.1), x) - psnr(y, x)).mean().item()
    if gain < 3:
        return look(f"at 0.1 it gains {gain:.1f} dB: train it")
    return RIGHT if seen == 7 else look(f"it sees {seen} pixels in a column; three convolutions "
                                        "see 7")


@checks("3.2")
@torch.no_grad()
def _twice(twice: Denoise, R: Denoise) -> str:
    y = torch.rand(1, 3, 16, 16, generator=seeded_generator(0)).to(next(R.parameters()).device)
    once = y - R(y, 0.05)
    if torch.allclose(twice(y, 0.05), once - R(once, 0.05), atol=1e-6):
        return RIGHT
    return look("D(y) = y - R(y, sigma); its result goes in again")


@checks("3.3")
@torch.no_grad()
def _share_of_blur(given: object, R: Denoise) -> str:
    A, x, _ = validation()
    device = next(R.parameters()).device
    blurred, x = A(x[:1]).to(device), x[:1].to(device)
    right = (R(blurred, 0.05).norm() / (x - blurred).norm()).item()
    return RIGHT if abs(number(given) - right) < 0.1 * right else look(
        "the norm of R(A x, 0.05) over that of x - A x, for the first validation image")


# --- notebook 4 ---------------------------------------------------------------------------------


@checks("4.1")
@torch.no_grad()
def _drifts(T: ImplicitMap) -> str:
    A, x, d = validation()
    T = T.cpu().on(A)
    soon, later = (psnr(solve(T, d[:1], 0.0, k, picard)[0], x[:1]).item() for k in (5, 300))
    said = f"{soon:.1f} dB after 5 iterations, {later:.1f} dB after 300"
    return f"{RIGHT}: {said}" if later < soon - 3 else look(f"{said}: it stays")


@checks("4.2")
@torch.enable_grad()
def _terms(apply: Callable[[Callable, Tensor], Tensor]) -> str:
    T = ToyMap(0.7, 40, torch.tensor([0.3, -0.5], dtype=torch.float64))
    x_star = T.solution(T.theta.detach())[None]

    def gradient(method: Callable) -> Tensor:
        return torch.autograd.grad(method(T, x_star)[0, 0], T.theta)[0]

    for terms in range(1, 9):
        if torch.allclose(gradient(apply), gradient(partial(neumann, terms=terms))):
            return RIGHT if terms == 2 else look(f"its gradient keeps {terms} of Eq. 7's terms")
    return look("its gradient is no partial sum of Eq. 7: apply T and nothing else")


@checks("4.3")
@torch.no_grad()
def _other_half(step: Callable[[ImplicitMap, Tensor, Tensor], Tensor], T: ImplicitMap) -> str:
    A, _, d = validation()
    T, d = T.cpu().on(A).double(), d[:1].double()
    z, _ = solve(T, d, 1e-9, 300)
    x = step(T, z, d)
    moved = (GradientMap(A, T.D, T.tau.item()).double()(x, d) - x).norm() / (T.tau * x.norm())
    return RIGHT if moved < 1e-5 else look(
        f"Eq. 4 moves that by {moved.item():.0e} of its norm, in units of tau: which half-step "
        "lies between z* and x*?")


# --- notebook 5 ---------------------------------------------------------------------------------


def named(given: object, values: Mapping[str, float], best: Callable) -> str:
    """Is it the method, by its name or its label, whose value is best?"""
    right = best(values, key=values.get)
    names = {str(given).strip().lower()}
    if names & {right, METHODS[right].label.lower()}:
        return RIGHT
    known = {word: name for name in values for word in (name, METHODS[name].label.lower())}
    if not names & known.keys():
        return f"{given!r} is none of {', '.join(METHODS[name].label for name in values)}"
    return look(f"there it is {values[known[names.pop()]]:+.2f} dB; another one has more")


@checks("5.1")
@torch.no_grad()
def _loses_most(given: object, methods: Mapping[str, Restorer]) -> str:
    _, x, _ = validation()
    change = dict.fromkeys(methods, 0.0)
    for sign, protocol in ((-1, get_protocol("paper")), (1, get_protocol("code"))):
        A = protocol.operator()
        d = measure(A, x[:1], protocol.noise_std, 0, [0])
        for name, method in methods.items():
            change[name] += sign * psnr(method(A, d, protocol.noise_std)[0], x[:1]).item()
    return named(given, change, min)


@checks("5.2")
@torch.no_grad()
def _gains_most(given: object, methods: Mapping[str, Restorer]) -> str:
    A, x, d = validation()
    restored = {name: method(A, d[:1], get_protocol("paper").noise_std)[0]
                for name, method in methods.items()}
    return named(given, {name: (psnr(y.clamp(0, 1), x[:1]) - psnr(y, x[:1])).item()
                         for name, y in restored.items()}, max)


@checks("5.3")
def _least(given: object, wide: pd.DataFrame) -> str:
    gain = wide["jfb"] - wide["tikhonov"]
    if given not in gain.index:
        return f"{given!r} is no image of the table, such as {gain.index[0]!r}"
    return RIGHT if gain[given] == gain.min() else look(f"there it gains {gain[given]:.2f} dB")


# --- notebook 6 ---------------------------------------------------------------------------------


@checks("6.1")
@torch.no_grad()
def _camera(A: LinearOperator) -> str:
    A.check_adjoint(3, 128, 128)  # raises, and says why
    x = bundled_photos("validation", 128)[:1].as_float()
    d = A.cpu()(x)
    if d.shape[1] != 1:
        return look(f"a sensor measures one channel, and this has {d.shape[1]}")
    margin = [(n - m) // 2 for n, m in zip(x.shape[2:], d.shape[2:], strict=True)]
    blurred = Blur(128, 5, 5**0.5)(x)[..., margin[0]:128 - margin[0], margin[1]:128 - margin[1]]
    at = (blurred - d)[..., 4:-4, 4:-4].abs().amin(dim=1)  # one of three colours is measured
    return RIGHT if at.max() < 1e-3 else look("blur first, then the mosaic")


def _more(given: tuple[float, float], words: str) -> str:
    tv, equilibrium = map(number, given)
    return RIGHT if equilibrium > tv > 0 else look(words)


CHECKS["6.2"] = partial(_more, words="PSNR with half of the pixels less that with a fifth; how far "
                        "is the next known pixel?")
CHECKS["6.3"] = partial(_more, words="largest less smallest PSNR over the five powers; how far "
                        "does each method look?")
