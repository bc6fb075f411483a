"""The energy map of a gradient-step denoiser, and the descent on its energy."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from jfbnb.core import kernels
from jfbnb.core.denoisers import Denoiser, UNet
from jfbnb.core.descent import WINDOW, descent
from jfbnb.core.fixed_point import anderson, solve
from jfbnb.core.gradients import jfb
from jfbnb.core.maps import EnergyMap, SplittingMap
from jfbnb.core.operators import Blur, Convolution, Inpainting, LinearOperator, Separable

SIZE = 16


def network(seed: int, std: float = 0.0) -> UNet:
    """A U-Net as PyTorch initialises it, or with weights drawn with a standard deviation."""
    torch.manual_seed(seed)
    made = UNet(3, 8)
    made.last.reset_parameters()
    for p in made.parameters() if std else ():
        nn.init.normal_(p, std=std)
    return made


def operators() -> dict[str, LinearOperator]:
    known = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(2)) < 0.5
    K = Blur(SIZE, 5, 1.0).K_h
    return {"wide": Blur(SIZE, 15, 5.0), "open": Blur(SIZE, 5, 5.0, "unknown"),
            "motion": Convolution(SIZE, kernels.motion(15.0, 30.0), "black"),
            "times 3": Separable(3 * K, K), "inpainting": Inpainting(known)}


def measurements(A: LinearOperator, noise_std: float = 0.01) -> Tensor:
    """Of a grey, a black and a white image, of noise, and of waves."""
    side = getattr(A, "image_size", (SIZE,))[0]
    generator = torch.Generator().manual_seed(1)
    waves = 0.5 + 0.4 * torch.sin(torch.arange(side) ** 2 / side).outer(torch.ones(side))
    x = torch.stack([torch.full((3, side, side), 0.5), torch.zeros(3, side, side),
                     torch.ones(3, side, side), torch.rand(3, side, side, generator=generator),
                     waves.expand(3, -1, -1)])
    d = A(x)
    return d + noise_std * torch.randn(d.shape, generator=generator)


def make(A: LinearOperator, R: nn.Module, tau: float = 0.05) -> EnergyMap:
    return EnergyMap(A, Denoiser(R, 0.04), tau)


def dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).flatten(1).sum(dim=1)


# --- the map ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wide", "open", "motion", "times 3", "inpainting"])
def test_the_metric_makes_the_residual_the_energys_gradient_and_slope_is_below_its_fall(name):
    A = operators()[name]
    T = make(A, network(0, 0.1)).double()
    d = measurements(A).double()
    noise = torch.randn_like(T.start(d), generator=torch.manual_seed(3))
    for z in (T.start(d) + 0.1 * noise, T.start(d) + 10):  # where A hardly sees, and where it does
        with torch.no_grad():
            f, E, slope = T.energy(z, d)
            torch.testing.assert_close(f, T(z, d))
            for v in (noise, f - z):
                step = 1e-5 / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                rise = (T.energy(z + step * v, d)[1] - T.energy(z - step * v, d)[1]) / 2
                expected = dot(T.metric(z - f), v)
                torch.testing.assert_close(rise / step.flatten(), expected, rtol=1e-4, atol=0)
            assert (slope > 0).all() and (slope <= -expected).all()
            assert (E > 0).all()


def test_the_data_step_is_the_splitting_maps_and_rounding_hurts_it_less():
    A, R = Blur(SIZE, 5, 5.0, "unknown"), network(0)
    d = measurements(A)
    other, T = SplittingMap(A, Denoiser(R, 0.04), 1e-4), make(A, R, 1e-4)
    with torch.no_grad():
        x = other.data_step(T.start(d), d)
        for factor, better in ((1.01, 0.1), (100.0, 1.1)):  # z next to x, and far away
            z = factor * x
            exact = other.double().data_step(z.double(), d.double())
            torch.testing.assert_close(T.double().data_step(z.double(), d.double()), exact)
            ours, theirs = (kind.float().data_step(z, d).double() - exact for kind in (T, other))
            assert ours.norm() < better * theirs.norm()


# --- the descent --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed", "std", "tau", "anderson_fails"), [
    ("wide", 1, 0.0, 0.05, False),
    ("motion", 0, 0.0, 0.05, False),
    ("open", 0, 0.0, 1e-4, False),
    ("times 3", 0, 0.1, 0.05, True),
    ("inpainting", 1, 0.1, 0.05, True),
])
def test_descent_arrives_where_nothing_was_trained(name, seed, std, tau, anderson_fails):
    A = operators()[name]
    T = make(A, network(seed, std), tau)
    d = measurements(A)[::2]
    z, info = solve(T, d, 1e-4, 1500)
    assert info.converged.all(), info.complaint()
    with torch.no_grad():
        left = (T(z, d) - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
    assert (left <= 1.01e-4).all()
    other, beside = solve(T, d, 1e-4, int(info.iterations.max()), anderson)
    with torch.no_grad():
        ours, theirs = T.energy(z, d)[1], T.energy(other, d)[1]
    assert (ours[~beside.converged] < theirs[~beside.converged]).all()
    if anderson_fails:
        assert not beside.converged.any() and (beside.residual > 1e-3).all()


def test_the_energy_never_rises_and_refused_steps_leave_the_point():
    A = operators()["inpainting"]
    T = make(A, network(1, 0.1)).double()
    d = measurements(A).double()[3:]
    points = []
    descent(T, T.start(d), 1e-4, 60, lambda k, z: points.append(z.clone()), given=d)
    with torch.no_grad():
        E = torch.stack([T.energy(z, d)[1] for z in points])
    fell = E[:-1] - E[1:]
    stayed = torch.stack([(a == b).flatten(1).all(dim=1) for a, b in pairwise(points)])
    assert (fell[~stayed] > 0).all() and stayed.any(dim=0).all()
    assert (E[-1] < 0.5 * E[0]).all()


def test_where_anderson_lowers_the_energy_it_is_anderson():
    A = operators()["inpainting"]
    T = make(A, network(0))
    d = measurements(A)
    ours, info = solve(T, d, 1e-3, 30)
    theirs, same = solve(T, d, 1e-3, 30, partial(anderson, window=WINDOW))
    assert torch.equal(info.iterations, same.iterations)
    torch.testing.assert_close(ours, theirs)


class Toy:
    """E(x) = |v(x)|^2 / 2 for each row, with T(x) = x - grad E(x) and C = I."""

    calls = 0

    def energy(self, x, a):
        self.calls += len(x)
        v, derivative = self.v(x, a)
        r = -v * derivative
        return x + r, v.double().square().sum(dim=1) / 2, r.double().square().sum(dim=1)

    def metric(self, v):
        return v


class Wells(Toy):
    """Minima at +-sqrt(a); from afar T jumps much too far."""

    def v(self, x, a):
        return (x**2 - a) / 2, x


class Plain(Toy):
    """A minimum at a in a plain that is ever flatter, and curved downwards."""

    def v(self, x, a):
        return (x - a) / (1 + (x - a).abs()), 1 / (1 + (x - a).abs()) ** 2


def test_images_that_are_done_leave_the_batch_and_no_image_depends_on_another():
    a = torch.tensor([[1.0, 0.05, 0.2, 0.5, 0.8, 1.5], [4.0] * 6, [2.0, 0.1, 0.3, 0.4, 0.6, 1.9]])
    x0 = a.sqrt() * torch.tensor([[1.001] * 6, [15.0, -0.05, 2, 2, 2, 2],
                                  [0.9, 1.2, 0.8, 1.1, 1.3, 0.7]])
    T, seen = Wells(), []
    x, info = descent(T, x0, 1e-5, 200, lambda k, x: seen.append(x.clone()), given=a)
    assert info.converged.all()
    assert T.calls == info.iterations.sum() < 3 * len(seen) and len(seen) == len(info.residuals)
    torch.testing.assert_close(x.abs(), a.sqrt(), rtol=2e-3, atol=0)
    for row, last in enumerate(info.iterations):
        assert all(torch.equal(point[row], x[row]) for point in seen[last - 1:])
        alone, same = descent(T, x0[row:row + 1], 1e-5, 200, given=a[row:row + 1])
        torch.testing.assert_close(alone[0], x[row])
        assert same.iterations.item() == last
    _, beside = anderson(lambda x, a: T.energy(x, a)[0], x0, 1e-5, 200, given=a)
    assert beside.converged.tolist() == [True, False, True]


def test_over_a_plain_the_steps_grow():
    a, x0 = torch.ones(2, 1), torch.tensor([[6.0, -6.0], [9.0, 9.0]])
    x, info = descent(Plain(), x0, 1e-4, 100, given=a)
    assert info.converged.all()
    torch.testing.assert_close(x, torch.ones(2, 2), rtol=0, atol=1e-3)


def test_a_start_that_is_not_finite_is_given_up_and_harms_no_other():
    a, x0 = torch.ones(3, 1), torch.tensor([[3.0], [math.nan], [1e20]])
    T = Wells()
    x, info = descent(T, x0, 1e-5, 50, given=a)
    assert info.converged.tolist() == [True, False, False]
    assert info.iterations.tolist()[1:] == [1, 1]
    assert x[0].item() == pytest.approx(1, abs=1e-4)
    assert "diverged" in info.complaint()


def test_one_evaluation_measures_the_start_and_none_is_refused():
    T, a, x0 = Wells(), torch.ones(1, 1), torch.full((1, 2), 2.0)
    x, info = descent(T, x0, 1e-5, 1, given=a)
    assert torch.equal(x, x0) and info.residual.item() == pytest.approx(1.5)
    assert info.residuals.shape == (1, 1) and not info.converged
    with pytest.raises(ValueError, match="at least one"):
        descent(T, x0, 1e-5, 0, given=a)


def test_jfbs_gradient_is_that_of_the_map_written_out():
    A, R = Blur(8, 5, 1.0), network(0)
    T = make(A, R).double()
    d = measurements(Blur(SIZE, 5, 1.0)).double()[3:, :, :8, :8]
    truth = torch.rand_like(d)
    z, _ = solve(T, d, 1e-6, 500)
    (jfb(lambda z: T(z, d), z) - truth).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in T.named_parameters() if p.grad is not None}
    T.zero_grad()
    K = A(torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)).view(64, 64).mT
    right = (A.adjoint(d) + T.tau * z).flatten(2).mT  # (B, 64, 3)
    M = K.mT @ K + T.tau * torch.eye(64, dtype=torch.float64)
    x = torch.linalg.solve(M, right).mT.reshape(d.shape)
    noise = R(x, T.D.sigma)
    (pulled,) = torch.autograd.grad(noise, x, noise, create_graph=True)  # J_R' R
    (x - pulled - truth).square().sum().backward()
    assert "log_tau" in ours and all(f"D.network.{name}" in ours for name, p in
                                     R.named_parameters() if p.dim() > 1)
    for name, gradient in ours.items():
        expected = dict(T.named_parameters())[name].grad
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None
                                   else expected, rtol=1e-6, atol=1e-12)
