"""Checks of the notebooks' exercises: each runs the given code, or measures the answer itself."""

import copy
import csv
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from jfbnb.common import seeded_generator
from jfbnb.core.baselines import direct_inverse, tikhonov
from jfbnb.core.fixed_point import anderson, picard, solve
from jfbnb.core.gradients import neumann
from jfbnb.core.maps import GradientMap, ImplicitMap
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Blur, LinearOperator
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import bundled_photos
from jfbnb.teaching.explorers import ToyMap
from jfbnb.training.methods import METHODS

RECORD = Path("answers.csv")  # all attempts, beside the notebook, to be handed in
PROTOCOLS = ("paper", "code")  # exercise 1.1 changes the protocol; later ones accept either


def answer(exercise: str, given: object = None, *context: object) -> None:
    """Print whether an answer is right, or a hint, and record the attempt in `RECORD`.

    Args:
        given: the answer; None if there is none yet.
        context: objects of the notebook that the check needs to measure the answer itself.
    """
    if given is None:
        print(f"{exercise}: no answer yet")
        return
    try:
        with torch.no_grad():
            hint = CHECKS[exercise](*(copy.deepcopy(value).cpu() if isinstance(value, nn.Module)
                                      else value for value in (given, *context)))
        verdict = f"not right: {hint}" if hint else "right"
    except Exception as error:  # a student's function may raise anything
        verdict = f"it cannot be checked: {type(error).__name__}: {error}".splitlines()[0]
    with RECORD.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([datetime.now().isoformat(" ", "seconds"), exercise, verdict])
    print(f"{exercise}: {verdict}")


def number(given: object) -> float:
    """Parse a number, perhaps a text with a unit. Raises ValueError."""
    text = str(given.item() if isinstance(given, Tensor) else given)
    return float(re.sub(r"\s*(dB|steps?)$", "", text.strip().replace("\N{MINUS SIGN}", "-")))


def near(given: object, measured: list[float], within: float, hint: str) -> str:
    """The hint, or "" if the number is near one of those measured."""
    return "" if min(abs(number(given) - value) for value in measured) < within else hint


def best(given: object, values: Mapping[object, float], within: float = 1e-6) -> str:
    """A hint, or "" for the choice with the largest value in dB; a method's label is accepted."""
    labels = {METHODS[name].label: value for name, value in values.items() if name in METHODS}
    known = {str(name).lower(): value for name, value in (values | labels).items()}
    if (name := str(given).strip().lower()) not in known:
        return f"{given!r} is not one of {', '.join(map(str, values))}"
    missed = max(values.values()) - known[name]
    return "" if missed <= within else f"another choice is {missed:.2f} dB better than {given}"


def mean_psnr(y: Tensor, x: Tensor) -> float:
    return psnr(y, x).mean().item()


def measured(protocol: str = "paper", noise_std: float = 0.01) -> tuple[Blur, Tensor, Tensor]:
    """A protocol's blur, three validation images and their measurements, as in notebook 2."""
    A, images = get_protocol(protocol).operator(), bundled_photos("validation", 128)[:3]
    return A, images.as_float(), measure(A, images.as_float(), noise_std, 0, images.indices)


def inverted(noise_std: float, *protocols: str) -> list[float]:
    """The PSNR in dB of the direct inverse for each protocol."""
    cases = [measured(name, noise_std) for name in protocols]
    return [mean_psnr(direct_inverse(A, d), x) for A, x, d in cases]


def best_step(given: object) -> str:
    (A, x, d), curve = measured(), {}
    z = torch.zeros_like(d)
    for step in range(1, round(number(given)) + 60):
        z = z - A.adjoint(A(z) - d)
        curve[step] = mean_psnr(z, x)
    return best(round(number(given)), curve, 0.05)


@torch.enable_grad()
def smoothness(gradient: Callable[[Tensor], Tensor]) -> str:
    x = torch.rand(1, 3, 9, 8, dtype=torch.float64, generator=seeded_generator(0)).requires_grad_()
    energy = 0.5 * (x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum())
    wrong = (gradient(x.detach()) - torch.autograd.grad(energy, x)[0])[..., 1:-1, 1:-1]
    return "" if wrong.abs().max() < 1e-6 else "torch.autograd.grad of R differs"


def two_weights(given: tuple[float, float]) -> str:
    for noise_std, lam in zip((0.01, 0.02), map(number, given), strict=True):
        A, x, d = measured("paper", noise_std)
        weights = (lam, *torch.logspace(-3, -0.5, 26).tolist())
        if hint := best(lam, {w: mean_psnr(tikhonov(A, d, w), x) for w in weights}, 0.05):
            return f"for noise {noise_std}, {hint}"
    return ""


@torch.enable_grad()
def shallow(R: nn.Module) -> str:
    _, x, _ = measured()
    R(x.requires_grad_(), 0.1)[0, :, 64, 64].sum().backward()
    seen = x.grad[0].abs().sum(dim=(0, 2)).count_nonzero().item()
    y = x.detach() + 0.1 * torch.randn(x.shape, generator=seeded_generator(1))
    gain = mean_psnr(y - R(y, 0.1), x) - mean_psnr(y, x)
    return (f"at 0.1 it gains {gain:.1f} dB: train it" if gain < 3 else
            "" if seen == 7 else f"it sees {seen} pixels in a column; three convolutions see 7")


def applied_twice(twice: Callable, denoise: Callable, y: Tensor) -> str:
    z = y
    for _ in range(2):
        z = denoise(z, 0.05)
    return "" if torch.allclose(twice(y, 0.05), z, atol=1e-6) else "denoise the result again"


def share_of_blur(given: object, R: nn.Module) -> str:
    A, x, _ = measured()
    share = (R(A(x[:1]), 0.05).norm() / (x[:1] - A(x[:1])).norm()).item()
    return near(given, [share], 0.1 * share, "divide two norms, for the first validation image")


def drifts(T: ImplicitMap) -> str:
    A, x, d = measured()
    soon, later = (mean_psnr(solve(T.on(A), d[:1], 0.0, k, picard)[0], x[:1]) for k in (5, 300))
    said = f"{soon:.1f} dB after 5 iterations, {later:.1f} after 300"
    return "" if not later >= soon - 3 else said  # it may be nan


def other_half(step: Callable[[ImplicitMap, Tensor, Tensor], Tensor], T: ImplicitMap) -> str:
    A, _, d = measured()
    T, d = T.on(A).double(), d[:1].double()
    x = step(T, solve(T, d, 1e-9, 300)[0], d)
    moved = (GradientMap(A, T.D, T.tau.item()).double()(x, d) - x).norm() / (T.tau * x.norm())
    return "" if moved < 1e-5 else f"a step of Eq. 4 changes it by {moved.item():.0e} tau |x|"


@torch.enable_grad()
def two_terms(apply: Callable[[Callable, Tensor], Tensor]) -> str:
    toy = ToyMap(0.7, 40, torch.tensor([0.3, -0.5], dtype=torch.float64))

    def T(x: Tensor) -> Tensor:  # not linear in x
        return torch.sin(toy(x))

    x_star, _ = anderson(T, torch.zeros(1, 2, dtype=torch.float64), 1e-13, 1000)
    value = apply(T, x_star)
    if not torch.allclose(value, x_star):
        return "its value is not that of T at the solution"
    if not value.requires_grad:
        return "nothing in it is tracked: apply T"
    own, *sums = (torch.autograd.grad(found[0, 0], toy.theta)[0] for found in
                  (value, *(neumann(T, x_star, terms) for terms in range(1, 9))))
    kept = [k for k, found in enumerate(sums, 1) if torch.allclose(own, found)]
    return "" if kept == [2] else (f"it sums the first {kept[0]} of Eq. 7's terms, not 2" if kept
                                   else "its gradient is no partial sum of Eq. 7")


@torch.enable_grad()
def least_terms(given: object, T: ImplicitMap, *measured_there: Tensor) -> str:
    z, d, v, exact = (value.cpu() for value in measured_there)

    def uphill(terms: int) -> bool:
        loss = (v * neumann(lambda x: T(x, d), z, terms)).sum()
        parts = torch.autograd.grad(loss, list(T.parameters()))
        return bool(torch.cat([part.flatten() for part in parts]) @ exact <= 0)

    terms = round(number(given))
    if terms < 1:
        return "at least the first term is needed"
    return (f"with {terms} it still goes uphill" if uphill(terms) else
            "fewer terms will do" if terms > 1 and not uphill(terms - 1) else "")


def restored(methods: Mapping[str, Restorer], x: Tensor, protocol: str) -> dict[str, Tensor]:
    """Each method's restoration of x, measured by a protocol."""
    noise_std, A = get_protocol(protocol).noise_std, get_protocol(protocol).operator().to(x.device)
    d = measure(A, x, noise_std, 0, range(len(x)))
    return {name: method(A, d, noise_std)[0] for name, method in methods.items()}


def loses_most(given: object, methods: Mapping[str, Restorer], x: Tensor) -> str:
    paper, code = (restored(methods, x[:1], name) for name in PROTOCOLS)
    return best(given, {name: mean_psnr(paper[name], x[:1]) - mean_psnr(code[name], x[:1])
                        for name in methods})


def gains_most(given: object, methods: Mapping[str, Restorer], x: Tensor) -> str:
    found = restored(methods, x[:1], "paper").items()
    return best(given, {name: mean_psnr(y.clamp(0, 1), x[:1]) - mean_psnr(y, x[:1])
                        for name, y in found})


def camera(A: LinearOperator) -> str:
    A.check_adjoint(3, 128, 128)  # raises, and says why
    x = bundled_photos("validation", 128)[:1].as_float()
    blurred, d = Blur(128, 5, 5**0.5, border="unknown")(x), A(x)
    if d.shape != blurred[:, :1].shape:
        return f"it measures {tuple(d.shape[1:])} numbers, the sensor {tuple(blurred[0, :1].shape)}"
    one = (blurred - d).abs().amin(dim=1)  # of the three colours each pixel measures one
    return "" if one.max() < 1e-3 else "blur first, then the mosaic"


CHECKS: dict[str, Callable[..., str]] = {  # (given, ...) -> a hint, "" for what is right
    "1.1": lambda given: near(given, inverted(0.005, "code"), 1.5, "use the formula of 1.4 "
                              "with the noise and the spectrum of protocol code"),
    "1.2": lambda given: near(given, inverted(1 / (255 * 12**0.5), *PROTOCOLS), 1.5, "round, and "
                              "add no noise; an error larger than the range is below 0 dB"),
    "1.3": lambda given: near(30, inverted(number(given), *PROTOCOLS), 1.5, "with that noise the "
                              f"direct inverse has {inverted(number(given), 'paper')[0]:.1f} dB"),
    "2.1": best_step, "2.2": smoothness, "2.3": two_weights,
    "3.1": shallow, "3.2": applied_twice, "3.3": share_of_blur,
    "4.1": drifts, "4.2": other_half, "4.3": two_terms, "4.4": least_terms,
    "5.1": loses_most, "5.2": gains_most,
    "5.3": lambda given, wide: best(given, (wide["tikhonov"] - wide["jfb"]).to_dict()),
    "6.1": camera,
    **dict.fromkeys(("6.2", "6.3"), lambda given: "" if number(given[1]) > number(given[0]) > 0
                    else "compare how far each method looks for pixels to fill a gap")}
