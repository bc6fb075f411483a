"""Jacobians at x*, gradients in the weights, and what a training step costs."""

import pytest
import torch
from conftest import make_map

from jfbnb.core.diagnostics import (
    exact_gradient,
    jacobian_norm,
    neumann_cosines,
    parameter_gradient,
    parameter_jacobian,
    spectral_radius,
)
from jfbnb.core.fixed_point import solve
from jfbnb.core.gradients import jfb
from jfbnb.core.maps import GradientMap, PreconditionedMap, SplittingMap
from jfbnb.teaching.costs import gradient_costs, implicit_step, jfb_step, step_cost, unrolled_step


@pytest.fixture
def solved(problem):
    A, D, x = problem
    d = A(x)
    T = make_map(PreconditionedMap, A, D)
    x_star, info = solve(T, d, 1e-12, 2000)
    assert info.converged.all()
    return A, D, x, d, x_star


def test_exact_gradient_is_that_of_both_maps(solved):
    """x*(Theta) does not depend on the map, so neither does its gradient."""
    A, D, x, d, x_star = solved
    exact, info = exact_gradient(make_map(PreconditionedMap, A, D), x_star, d, x, 1e-12, 2000)
    other, _ = exact_gradient(make_map(GradientMap, A, D), x_star, d, x, 1e-11, 5000)
    assert info.converged.all() and (other - exact).norm() / exact.norm() < 1e-5


def test_jfb_points_better_through_the_preconditioned_map(solved):
    A, D, x, d, x_star = solved
    exact, _ = exact_gradient(make_map(PreconditionedMap, A, D), x_star, d, x, 1e-12, 2000)
    ours, eq4 = (neumann_cosines(make_map(kind, A, D), x_star, d, x, [1, 4, 100], exact)
                 for kind in (PreconditionedMap, GradientMap))
    assert ours[0] > eq4[0]
    assert ours == sorted(ours)
    assert ours[-1] == pytest.approx(1, abs=1e-6)


def linear(J):
    """T(x; d) = J x + d for each row x."""
    return lambda x, d: x @ J.T + d


def test_radius_and_norm_are_those_of_dense_linear_algebra():
    """Of a matrix whose largest eigenvalues are a complex pair."""
    torch.manual_seed(0)
    J = torch.randn(40, 40, dtype=torch.float64)
    x = torch.zeros(2, 40, dtype=torch.float64)
    norm = jacobian_norm(linear(J), x, x)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(J, 2).expand(2), rtol=1e-3, atol=0)
    radius, residual = spectral_radius(linear(J), x, x)
    eigenvalues = torch.linalg.eigvals(J)
    largest = eigenvalues[eigenvalues.abs().argmax()]
    torch.testing.assert_close(radius, largest.abs().expand(2), rtol=1e-3, atol=0)
    assert largest.imag != 0 and (residual < 1e-2 * radius).all()


def test_jacobian_norm_is_at_least_the_spectral_radius_which_two_maps_share(solved):
    """Two factors in either order have the same eigenvalues; their norms may differ."""
    A, D, _, d, x_star = solved
    radii = []
    for kind, state in ((PreconditionedMap, x_star), (SplittingMap, D(x_star))):
        T = make_map(kind, A, D)
        radii.append(spectral_radius(T, state, d, 1e-6)[0])
        assert (radii[-1] <= jacobian_norm(T, state, d) * 1.001).all()
    assert (radii[0] > 0.1).all()
    torch.testing.assert_close(*radii, rtol=1e-3, atol=0)


def test_parameter_jacobian_gives_jfbs_gradient(solved):
    """Eq. 6 is the loss's gradient times M."""
    A, D, x, d, x_star = solved
    T = make_map(PreconditionedMap, A, D)
    M = parameter_jacobian(T, x_star, d)
    assert M.shape == (x_star.numel(), sum(p.numel() for p in T.parameters()))
    g = (2 * (T(x_star, d) - x) / x.numel()).detach().flatten()
    torch.testing.assert_close(g @ M, parameter_gradient(T, x_star, d, x, jfb), rtol=1e-6,
                               atol=1e-12)
    assert all(p.grad is None for p in T.parameters())


def test_step_cost_counts_the_peak():
    def step():
        a = torch.ones(1000, 1000)  # 4 MB
        b = torch.ones(1000, 500)  # 2 MB beside it
        del a
        return b + 1  # 2 MB more, but 4 have gone

    seconds, peak = step_cost(step)
    assert peak == pytest.approx(6e6, rel=0.01)
    assert 0 < seconds < 1


def test_jfbs_memory_does_not_grow_with_the_solve(solved):
    A, D, x, d, _ = solved
    steps = {"jfb": jfb_step, "implicit": implicit_step, "unrolled": unrolled_step}
    records = gradient_costs(make_map(PreconditionedMap, A, D), d, x, [5, 20], steps)
    cost = {(r["gradient"], r["K"]): r["bytes"] for r in records}
    assert len(cost) == 6 and all(r["seconds"] > 0 for r in records)
    for gradient in ("jfb", "implicit"):
        assert cost[gradient, 20] < 1.05 * cost[gradient, 5]
    assert cost["unrolled", 20] > 2 * cost["unrolled", 5]
    assert cost["jfb", 5] < cost["implicit", 5]
