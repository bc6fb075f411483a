"""Maps, fixed-point solvers and gradients."""

import pytest
import torch
from conftest import MAPS, make_map

from jfbnb.common import UserError
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import RIDGE, anderson, picard, solve
from jfbnb.core.gradients import implicit, jfb, neumann, unrolled
from jfbnb.core.maps import ADMMMap, GradientMap, PreconditionedMap, ProximalMap, SplittingMap
from jfbnb.core.operators import Blur, Inpainting


class Shrink(torch.nn.Module):
    """R(x) = x / 2, so that D(x) = x / 2 contracts and everything has a closed form."""

    def forward(self, x, sigma):
        return 0.5 * x


def test_maps_have_the_closed_forms_fixed_point():
    """For D(x) = x / 2: A'(A x - d) + tau x / 2 = 0, and for the proximal map tau = 1 / eta."""
    A, D = Blur(16, 5, 1.0), Denoiser(Shrink(), 0.0).double()
    d = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for T, weight in ((make_map(GradientMap, A, D, tau=0.2), 0.1),
                      (make_map(PreconditionedMap, A, D, tau=0.2), 0.1),
                      (ProximalMap(A, D, 0.7), 1 / 0.7)):
        x, info = solve(T, d, 1e-10, 1000)
        assert info.converged.all()
        torch.testing.assert_close(x, A.solve_normal(A.adjoint(d), weight), rtol=0, atol=1e-6)


class Flip(torch.nn.Module):
    """R(x) = (1 + L) x, so that D(x) = -L x: the worst D of Lipschitz constant L for Eq. 4."""

    def __init__(self, L: float):
        super().__init__()
        self.L = L

    def forward(self, x, sigma):
        return (1 + self.L) * x


@pytest.mark.parametrize(("tau", "L"), [(0.05, 0.3), (1.0, 0.95)])
def test_gradient_map_is_a_contraction_up_to_its_bound_on_eta_and_may_not_be_above(tau, L):
    A = Inpainting((torch.rand(8, 8, generator=torch.manual_seed(0)) < 0.5).double())  # |A| = 1
    d = A(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    bound = 2 / (1 + tau * (1 + L))
    for eta, converges in ((0.99 * bound, True), (1.01 * bound, False)):
        T = GradientMap(A, Denoiser(Flip(L), 0.0), tau, eta).double()
        _, info = solve(T, d, 1e-8, 3000, picard)
        assert info.converged.all() == converges
        u, v = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(1))
        if converges:
            assert (T(u, d) - T(v, d)).norm() < (u - v).norm()


def test_maps_share_their_fixed_points(problem):
    A, D, d = problem
    x, info = solve(make_map(PreconditionedMap, A, D), d, 1e-12, 1000)
    y, info_y = solve(make_map(GradientMap, A, D), d, 1e-10, 5000)
    assert info.converged.all() and info_y.converged.all()
    torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    T = make_map(SplittingMap, A, D)  # the two halves in the other order
    z, info = solve(T, d, 1e-12, 1000)
    assert info.converged.all()
    torch.testing.assert_close(z, D(x), rtol=0, atol=1e-8)
    torch.testing.assert_close(T.data_step(z, d), x, rtol=0, atol=1e-8)
    # The data step is a minimiser: the gradient of |A x - d|^2 + tau |x - z|^2 is 0 there.
    x = T.data_step(d, d)
    torch.testing.assert_close(A.adjoint(A(x) - d), -T.tau * (x - d), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MAPS)
def test_a_map_on_another_operator_has_the_same_weights_and_a_scaled_tau(problem, kind):
    A, D, d = problem
    T, wide = make_map(kind, A, D), Blur(16, 5, 3.0)
    tau = getattr(T, "tau", None)
    before = T(T.start(d), d)
    other = T.on(wide, 0.5)
    assert other.A is wide and T.A is A
    ours, theirs = dict(T.named_parameters()), dict(other.named_parameters())
    assert set(ours) == set(theirs) and all(theirs[name] is p for name, p in ours.items())
    assert torch.equal(T(T.start(d), d), before)
    if tau is not None:
        assert torch.equal(other.tau, 0.5 * tau) and torch.equal(T.tau, tau)
    fresh = make_map(kind, wide, D, tau=0.15)  # whose tau is rounded to float32
    torch.testing.assert_close(other(T.start(d), d), fresh(T.start(d), d), rtol=0, atol=1e-6)
    assert torch.equal(T.on(wide, 0.5).on(A)(T.start(d), d), before)


def test_a_network_of_another_shape_or_type_is_a_line(problem):
    A, D, d = problem

    class Narrow(torch.nn.Module):
        def forward(self, x, sigma):
            return x[:, :2]

    T = make_map(PreconditionedMap, A, Denoiser(Narrow(), 0.0).double())
    with pytest.raises(UserError, match=r"Narrow returns \(2, 2, 16, 16\) for images "
                                        r"\(2, 3, 16, 16\): a denoiser must keep the shape"):
        solve(T, d)
    with pytest.raises(UserError, match=r"an image of torch.float32 for a network of torch.float64"
                                        r": convert it, as in x.to\(torch.float64\)"):
        D(d.float())


def test_anderson_meets_picard_in_fewer_evaluations(problem):
    A, D, d = problem
    T = make_map(PreconditionedMap, A, D)
    x, info_x = solve(T, d, 1e-10, 2000, picard)
    y, info_y = solve(T, d, 1e-10, 2000)
    assert info_x.converged.all() and info_y.converged.all()
    torch.testing.assert_close(x, y, rtol=0, atol=1e-8)
    assert (info_y.iterations < info_x.iterations).all()


def textbook_anderson(T, x, iterations, window):
    """Walker and Ni's Algorithm AA, one image after the other, in lists."""
    xs, fs = [], []
    for _ in range(iterations - 1):
        xs, fs = [*xs, x][-window:], [*fs, T(x)][-window:]
        images = []
        for i in range(len(x)):
            G = torch.stack([(f[i] - z[i]).flatten() for z, f in zip(xs, fs, strict=True)])
            gram = G @ G.T
            gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            weights = torch.linalg.solve(gram, torch.ones(len(gram), dtype=gram.dtype))
            images.append(sum(w * f[i] for w, f in zip(weights / weights.sum(), fs, strict=True)))
        x = torch.stack(images)
    return x


def test_anderson_is_the_textbooks(problem):
    A, D, d = problem
    T = make_map(PreconditionedMap, A, D)
    with torch.no_grad():
        expected = textbook_anderson(lambda z: T(z, d), d, 9, 3)
    found, _ = anderson(lambda z: T(z, d), d, 0.0, 9, window=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert (found - T(found, d)).norm() > 1e-7  # not yet at the fixed point, where all agree


@pytest.mark.parametrize("solver", [picard, anderson])
def test_reported_residual_is_that_of_the_returned_point_and_nothing_is_tracked(problem, solver):
    A, D, d = problem
    T = make_map(PreconditionedMap, A, D)
    x, info = solver(lambda z: T(z, d), d, 1e-3, 7)
    assert not x.requires_grad
    with torch.no_grad():
        residual = (T(x, d) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    torch.testing.assert_close(info.residual, residual)


@pytest.mark.parametrize("solver", [picard, anderson])
def test_each_image_stops_on_its_own_and_leaves_the_batch(solver):
    rate = torch.tensor([[0.5], [0.9], [0.1]], dtype=torch.float64)
    x0 = torch.rand(3, 4, dtype=torch.float64)
    seen = []

    def T(x, rate):
        seen.append(len(x))
        return rate * x.cos()

    found, info = solver(T, x0, 1e-8, 300, given=rate)
    expected, same = solver(lambda x: rate * x.cos(), x0, 1e-8, 300)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert info.converged.all() and info.iterations.tolist() == same.iterations.tolist()
    assert sum(seen) == info.iterations.sum() < 3 * len(seen)
    for i in range(3):
        alone, info_alone = solver(T, x0[i:i + 1], 1e-8, 300, given=rate[i:i + 1])
        torch.testing.assert_close(alone[0], found[i])
        assert info_alone.iterations.item() == info.iterations[i].item()


def test_complaint_names_the_images_and_how_their_solves_ended():
    rate = torch.tensor([[0.5], [0.95], [1.0], [1e5]])
    x, info = picard(lambda x: rate * x + 1, torch.ones(4, 2), 1e-6, 40)
    assert info.converged.tolist() == [True, False, False, False] and x.isfinite().all()
    text = info.complaint()
    assert text.startswith("3 of 4 did not converge in 40 iterations: image 1 (relative residual ")
    assert info.ends == ["converged", "out of iterations", "out of iterations", "diverged"]
    assert picard(lambda x: -x, torch.ones(1, 2), 1e-6, 9)[1].ends == ["stalled"]
    assert "out of iterations), image 2 (" in text
    assert "image 3 (relative residual inf, diverged)" in text
    assert "check the blur and the noise level" in text
    _, info = picard(lambda x: x + 1, torch.ones(6, 2), 1e-6, 3)
    assert "image 3" in info.complaint() and "image 4" not in info.complaint()
    assert " and 2 more" in info.complaint()
    _, info = picard(lambda x: 0.5 * x + 1, torch.ones(1, 2), 1e-6, 100)
    assert info.complaint() == ""


def test_callback_sees_every_iterate():
    seen = []
    picard(lambda x: 0.5 * x + 1, torch.zeros(1, 1), 1e-9, 4,
           lambda k, x: seen.append((k, x.item())))
    assert seen == [(1, 0.0), (2, 1.0), (3, 1.5), (4, 1.75)]
    with pytest.raises(ValueError, match="at least one"):
        picard(lambda x: x, torch.ones(1, 1), 1e-3, 0)


def test_jfb_in_closed_form():
    # T(x) = a x + b: JFB's gradients are x* and 1, the exact ones 1 / (1 - a) times as large.
    a, b = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    x_star, _ = picard(lambda x: a * x + b, torch.zeros(1, 1), 1e-7, 100)
    jfb(lambda x: a * x + b, x_star).sum().backward()
    assert a.grad.item() == pytest.approx(2.0, abs=1e-5)
    assert b.grad.item() == pytest.approx(1.0)


def test_admm_shares_the_proximal_maps_fixed_point(problem):
    A, D, d = problem
    T = make_map(ADMMMap, A, D)
    state, info = solve(T, d, 1e-11, 2000)
    assert info.converged.all()
    z, u = state.chunk(2, dim=1)
    assert torch.equal(T.image(state), z)
    with torch.no_grad():
        torch.testing.assert_close(T.tau * u, A.adjoint(d - A(z)), rtol=0, atol=1e-8)
        again = ProximalMap(A, D, eta=1 / T.tau.item())(z, d)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-8)


def gradients_of(T, x, truth, method) -> torch.Tensor:
    """All of Theta's gradients in one vector, by a method that takes (T, x)."""
    T.zero_grad()
    (T.image(method(lambda z: T(z, truth), x)) - truth).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in T.parameters() if p.grad is not None]).clone()


@pytest.mark.parametrize("kind", MAPS)
def test_implicit_gradient_is_that_of_unrolling_to_convergence(problem, kind):
    A, D, d = problem
    T = make_map(kind, A, D)
    state, info = solve(T, d, 1e-12, 5000)
    assert info.converged.all()
    reports = []
    ours = gradients_of(T, state, d, lambda T, x: implicit(T, x, 1e-12, 5000, reports.append))
    assert reports[0].converged.all()
    exact = gradients_of(T, state, d, lambda T, x: unrolled(T, x, 200))
    assert (ours - exact).norm() / exact.norm() < 1e-6


def test_implicit_gradient_against_finite_differences(problem):
    A, D, d = problem

    T = make_map(PreconditionedMap, A, D)

    def loss() -> float:
        x, info = solve(T, d, 1e-13, 2000)
        assert info.residual.max() < 1e-12
        return (x - d).square().sum().item()

    x_star, _ = solve(T, d, 1e-13, 2000)
    gradients_of(T, x_star, d, lambda T, x: implicit(T, x, 1e-12, 2000))
    for parameter in (T.log_tau, D.network.layers[0].weight):
        direction = torch.randn_like(parameter, generator=None)
        expected = (parameter.grad * direction).sum().item()
        step = 1e-5
        with torch.no_grad():
            parameter += step * direction
            up = loss()
            parameter -= 2 * step * direction
            down = loss()
            parameter += step * direction
        assert (up - down) / (2 * step) == pytest.approx(expected, rel=1e-6)


def test_neumann_series_goes_from_jfb_to_the_implicit_gradient(problem):
    A, D, d = problem
    T = make_map(PreconditionedMap, A, D)
    x_star, _ = solve(T, d, 1e-12, 2000)
    exact = gradients_of(T, x_star, d, lambda T, x: implicit(T, x, 1e-12, 2000))
    series = [gradients_of(T, x_star, d, lambda T, x, k=k: neumann(T, x, k))
              for k in (1, 2, 4, 8, 200)]
    assert torch.equal(series[0], gradients_of(T, x_star, d, jfb))
    errors = [((g - exact).norm() / exact.norm()).item() for g in series]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    with pytest.raises(ValueError, match="at least the first"):
        neumann(T, x_star, 0)


def test_unrolled_is_plain_backpropagation_and_from_the_solution_the_neumann_series(problem):
    # x_2 = a (a x_0 + 1) + 1, so d x_2 / da = 2 a x_0 + 1.
    a = torch.tensor(0.5, requires_grad=True)
    unrolled(lambda x: a * x + 1, torch.tensor(3.0), 2).backward()
    assert a.grad.item() == pytest.approx(2 * 0.5 * 3 + 1)
    A, D, d = problem
    T = make_map(PreconditionedMap, A, D)
    x_star, _ = solve(T, d, 1e-13, 2000)
    series = gradients_of(T, x_star, d, lambda T, x: neumann(T, x, 4))
    unroll = gradients_of(T, x_star, d, lambda T, x: unrolled(T, x, 4))
    torch.testing.assert_close(series, unroll, rtol=1e-8, atol=1e-10)
