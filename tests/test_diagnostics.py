import pytest
import torch

from jfbnb.diagnostics import exact_gradient, neumann_cosines, parameter_gradient, spectral_radius
from jfbnb.fixed_point import anderson
from jfbnb.gradients import jfb, unrolled
from jfbnb.maps import GradientMap, PreconditionedMap


@pytest.fixture
def solved(problem):
    A, S, x = problem
    d = A(x)
    T = PreconditionedMap(A, S)
    x_star, info = anderson(lambda z: T(z, d), d, 1e-12, 2000)
    assert info.converged.all()
    return A, S, x, d, x_star


def test_exact_gradient_is_that_of_unrolling_and_of_both_maps(solved):
    A, S, x, d, x_star = solved
    exact, info = exact_gradient(PreconditionedMap(A, S), x_star, d, x, 1e-12, 2000)
    assert info.converged.all()
    deep = parameter_gradient(PreconditionedMap(A, S), x_star, d, x,
                              lambda T, z: unrolled(T, z, 300))
    assert (deep - exact).norm() / exact.norm() < 1e-6
    # x*(Theta) does not depend on the map, so neither does its gradient.
    other, _ = exact_gradient(GradientMap(A, S), x_star, d, x, 1e-11, 5000)
    assert (other - exact).norm() / exact.norm() < 1e-5


def test_jfb_points_better_through_the_preconditioned_map(solved):
    A, S, x, d, x_star = solved
    exact, _ = exact_gradient(PreconditionedMap(A, S), x_star, d, x, 1e-12, 2000)
    cosines = {name: neumann_cosines(T, x_star, d, x, [1, 4, 100], exact) for name, T in
               (("preconditioned", PreconditionedMap(A, S)), ("gradient", GradientMap(A, S)))}
    assert cosines["preconditioned"][0] > cosines["gradient"][0]
    assert cosines["preconditioned"] == sorted(cosines["preconditioned"])
    assert cosines["preconditioned"][-1] == pytest.approx(1, abs=1e-6)


def test_parameter_gradient_leaves_grad_alone(solved):
    A, S, x, d, x_star = solved
    parameter_gradient(PreconditionedMap(A, S), x_star, d, x, jfb)
    assert all(p.grad is None for p in S.parameters())


def test_spectral_radius_of_a_known_matrix():
    torch.manual_seed(0)
    angle = torch.tensor(0.7, dtype=torch.float64)
    rotation = 0.9 * torch.stack([torch.stack([angle.cos(), -angle.sin()]),
                                  torch.stack([angle.sin(), angle.cos()])])
    J = torch.block_diag(rotation, 0.5 * torch.eye(3, dtype=torch.float64))
    radius = spectral_radius(lambda x: x @ J.T, torch.zeros(3, 5, dtype=torch.float64))
    torch.testing.assert_close(radius, torch.full((3,), 0.9, dtype=torch.float64), rtol=1e-3,
                               atol=0)
