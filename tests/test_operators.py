import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import skimage.restoration
import torch
import torch.nn.functional as F
from conftest import make_map

from jfbnb.baselines import (
    direct_inverse,
    discrepancy_lambda,
    image_gradient,
    image_gradient_adjoint,
    tikhonov,
    tikhonov_gradient_descent,
    total_variation,
    total_variation_objective,
)
from jfbnb.common import UserError
from jfbnb.maps import PreconditionedMap
from jfbnb.networks import Denoiser, DnCNN
from jfbnb.operators import (
    Blur,
    LinearOperator,
    conjugate_gradients,
    gaussian_kernel,
    get_protocol,
    measure,
    toeplitz,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
@pytest.mark.parametrize("kernel", [(5, math.sqrt(5)), (9, 1.0)])
def test_adjoint(size, kernel):
    A = Blur(size, *kernel)
    u, v = random(2, 3, *size), random(2, 3, *size, seed=1)
    torch.testing.assert_close((A(u) * v).sum(), (u * A.adjoint(v)).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_blur_is_conv2d_and_scipy(size):
    A, g = Blur(size, 5, 2.0), gaussian_kernel(5, 2.0)
    x = random(2, 3, *size)
    kernel = torch.outer(g, g)
    by_torch = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None], padding=2).view_as(x)
    torch.testing.assert_close(A(x), by_torch, rtol=0, atol=1e-12)
    by_scipy = scipy.ndimage.convolve(x[0, 0].numpy(), kernel.numpy(), mode="constant")
    np.testing.assert_allclose(A(x)[0, 0].numpy(), by_scipy, atol=1e-12)


def test_kernel_is_a_sampled_gaussian():
    g = gaussian_kernel(5, 2.0).numpy()
    expected = np.exp(-np.array([4, 1, 0, 1, 4]) / 8.0)
    np.testing.assert_allclose(g, expected / expected.sum(), rtol=1e-14)


def test_toeplitz_is_scipys():
    g = gaussian_kernel(5, 1.5)
    column = np.r_[g[2:].numpy(), np.zeros(4)]
    np.testing.assert_array_equal(toeplitz(g, 7).numpy(), scipy.linalg.toeplitz(column))


def dense(A: Blur) -> np.ndarray:
    return np.kron(A.K_h.numpy(), A.K_w.numpy())


def test_inverse_tikhonov_and_spectrum_against_dense():
    A = Blur((10, 12), 5, math.sqrt(5))
    M, d = dense(A), random(1, 1, 10, 12)
    rhs = d.numpy().ravel()
    np.testing.assert_allclose(direct_inverse(A, d).numpy().ravel(), np.linalg.solve(M, rhs),
                               rtol=1e-8)
    lam = 0.02
    expected = np.linalg.solve(M.T @ M + lam * np.eye(len(M)), M.T @ rhs)
    np.testing.assert_allclose(tikhonov(A, d, lam).numpy().ravel(), expected, rtol=1e-10)
    assert A.cond == pytest.approx(np.linalg.cond(M), rel=1e-8)
    np.testing.assert_allclose(np.sort(A.spectrum.numpy().ravel()), np.linalg.eigvalsh(M),
                               atol=1e-13)


def test_gradient_descent_and_conjugate_gradients_reach_the_closed_form():
    A, d, lam = Blur(16, 5, 2.0), random(2, 3, 16, 16), 0.05
    exact = tikhonov(A, d, lam)
    torch.testing.assert_close(tikhonov_gradient_descent(A, d, lam, 1.0, 1000), exact,
                               rtol=0, atol=1e-10)
    solved = conjugate_gradients(lambda x: A.adjoint(A(x)) + lam * x, A.adjoint(d), 1e-12)
    torch.testing.assert_close(solved, exact, rtol=0, atol=1e-10)


def test_gradient_descent_calls_back_with_every_iterate():
    A, d = Blur(16, 5, 2.0), random(1, 3, 16, 16)
    seen = []
    last = tikhonov_gradient_descent(A, d, 0.1, 1.0, 3, lambda k, x: seen.append((k, x)))
    assert [k for k, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][1], d) and torch.equal(seen[-1][1], last)


def test_discrepancy_principle_fits_to_the_noise():
    A = Blur(64, 5, 2.0)
    x = random(1, 3, 64, 64).cumsum(2).cumsum(3) / 64
    d = measure(A, x, 0.05, 0, [0])
    lams = torch.logspace(-5, 1, 121)
    lam = discrepancy_lambda(A, d, 0.05, lams)

    def misfit(weight: float) -> float:
        return (A(tikhonov(A, d, weight)) - d).square().mean().item()

    assert misfit(lam) <= 0.05**2 < misfit(lam * 1.2)


def test_image_gradient_and_its_adjoint():
    x, p = random(2, 3, 7, 9), random(2, 2, 3, 7, 9, seed=1)
    torch.testing.assert_close((image_gradient(x) * p).sum(),
                               (x * image_gradient_adjoint(p)).sum(), rtol=1e-12, atol=0)
    # The step size relies on a squared norm below 8.
    v = random(1, 1, 16, 16)
    for _ in range(100):
        v = image_gradient_adjoint(image_gradient(v / v.norm()))
    assert 7 < v.norm() < 8


def test_total_variation_denoises_like_scikit_image():
    identity = Blur(24, 1, 1.0)  # a kernel of one pixel: denoising
    d = random(1, 1, 24, 24) * 0.2 + 0.5
    ours, info = total_variation(identity, d, 0.1, 1e-5, 5000, step=1.0)
    assert info.converged.all()
    theirs = torch.from_numpy(skimage.restoration.denoise_tv_chambolle(
        d[0, 0].numpy(), weight=0.1, eps=1e-10, max_num_iter=5000))[None, None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    ours, theirs = (total_variation_objective(identity, x, d, 0.1) for x in (ours, theirs))
    assert ours <= theirs * (1 + 1e-5)


def test_total_variation_deblurs_to_the_minimum():
    """Against L-BFGS on the objective with |.| rounded off near 0, in colour."""
    A, weight = Blur(8, 5, 1.0), 0.02
    d = random(1, 3, 8, 8) * 0.3
    ours, info = total_variation(A, d, weight, 1e-7, 20_000)
    assert info.converged.all() and info.residual.max() <= 1e-7

    def smoothed(values):
        x = torch.from_numpy(values).view_as(d).requires_grad_()
        lengths = (image_gradient(x).square().sum((0, 2)) + 1e-9).sqrt()
        value = 0.5 * (A(x) - d).square().sum() + weight * lengths.sum()
        value.backward()
        return value.item(), x.grad.numpy().ravel()

    found = scipy.optimize.minimize(smoothed, ours.numpy().ravel() + 0.01, jac=True,
                                    method="L-BFGS-B", options={"maxiter": 4000, "ftol": 1e-14,
                                                                "maxfun": 50_000})
    objective = total_variation_objective(A, ours, d, weight).item()
    assert objective <= found.fun
    assert objective == pytest.approx(found.fun, rel=1e-3)


def test_total_variation_of_an_image_does_not_depend_on_its_batch():
    """An image that is done stays as it is, however long the others take."""
    A = Blur(16, 5, 2.0)
    d = 0.5 + A(random(3, 3, 16, 16)).float() * torch.tensor([1.0, 0.1, 0.3]).view(3, 1, 1, 1)
    together, info = total_variation(A, d, 0.01)
    assert info.converged.all() and len(set(info.iterations.tolist())) == 3
    for i in range(3):
        alone, same = total_variation(A, d[i:i + 1], 0.01)
        assert same.iterations.item() == info.iterations[i].item()
        torch.testing.assert_close(together[i:i + 1], alone, rtol=0, atol=1e-5)


def test_total_variation_reports_what_has_not_converged():
    A, d = Blur(16, 5, 2.0), random(2, 3, 16, 16)
    _, info = total_variation(A, d, 0.01, 1e-12, 5)
    assert info.iterations.tolist() == [5, 5] and not info.converged.any()
    assert info.residuals.shape == (5, 2)


def test_noise_depends_on_seed_and_index_alone():
    A = Blur(16, 5, 2.0)
    x = random(4, 3, 16, 16).float()
    together = measure(A, x, 0.01, 7, [3, 1, 2, 9])
    alone = measure(A, x[2:3], 0.01, 7, [2])
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(measure(A, x[2:3], 0.01, 8, [2]), alone, atol=1e-3)
    with pytest.raises(ValueError, match="4 images but 1 indices"):
        measure(A, x, 0.01, 7, [0])


def test_noise_has_the_protocols_strength():
    A = Blur(128, 5, 2.0)
    x = torch.zeros(4, 3, 128, 128)
    assert measure(A, x, 0.01, 0, [0, 1, 2, 3]).std().item() == pytest.approx(0.01, rel=0.01)


def test_protocols():
    # The design's measurements: cond(A) is 7e4 and 4e4.
    assert get_protocol("paper").operator().cond == pytest.approx(7.5e4, rel=0.05)
    assert get_protocol("code").operator().cond == pytest.approx(4e4, rel=0.2)


# --- an operator that has forward and adjoint alone ---------------------------------------------


class Halves(LinearOperator):
    """From images (B, C, H, W) to half as many rows, weighted sums of two each: M x."""

    def __init__(self, rows: int, wrong: float = 0.0):
        super().__init__()
        M = torch.kron(torch.eye(rows // 2, dtype=torch.float64),
                       torch.tensor([[0.7, 0.2]], dtype=torch.float64))
        self.wrong = wrong  # what is added to the adjoint
        self.register_buffer("M", M)

    def forward(self, x):
        return self.M.to(x.dtype) @ x

    def adjoint(self, d):
        return (self.M.to(d.dtype) + self.wrong).mT @ d


def test_conjugate_gradients_solve_what_a_dense_solve_does():
    A, r, tau = Halves(6), random(2, 3, 6, 5), 0.05
    normal = A.M.T @ A.M + tau * torch.eye(6, dtype=torch.float64)
    assert A(r).shape == (2, 3, 3, 5)
    torch.testing.assert_close(A.solve_normal(r, tau), torch.linalg.solve(normal, r),
                               rtol=1e-9, atol=1e-10)
    mixed = r * torch.tensor([1.0, 1e-6]).view(2, 1, 1, 1)  # each image to its own size
    torch.testing.assert_close(A.solve_normal(mixed, tau), torch.linalg.solve(normal, mixed),
                               rtol=1e-7, atol=1e-13)
    assert torch.equal(A.solve_normal(torch.zeros_like(r), tau), torch.zeros_like(r))


def test_derivatives_of_that_solve_are_those_of_finite_differences():
    A, r = Halves(4), random(2, 1, 4, 2).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(A.solve_normal, (r, tau))
    assert torch.autograd.gradgradcheck(A.solve_normal, (r, tau))


def test_a_blur_solves_the_same_by_conjugate_gradients(problem):
    """And a map of the general way has the gradients of one of the fast one."""
    A, D, d = problem
    torch.testing.assert_close(LinearOperator.solve_normal(A, d, 0.02), A.solve_normal(d, 0.02),
                               rtol=0, atol=1e-9)

    class Slow(Blur):
        solve_normal = LinearOperator.solve_normal

    gradients = []
    for operator in (A, Slow(16, 5, 1.0)):
        T = make_map(PreconditionedMap, operator, D)
        T(d, d).square().sum().backward()
        gradients.append(T.log_tau.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=0)


def test_a_wrong_adjoint_is_found_and_said_how_wrong():
    assert Halves(6).check_adjoint(3, 6, 5) < 1e-12
    assert Blur((20, 33), 5, 2.0).check_adjoint(3, 20, 33) < 1e-12
    with pytest.raises(UserError, match="Halves.adjoint is not the adjoint of its forward: "
                                        r"<A u, v> = .* apart by \d\.\de-0\d of") as caught:
        Halves(6, wrong=0.1).check_adjoint(3, 6, 5)
    said = str(caught.value)
    left, right = (float(said.split(f"{name} = ")[1].split()[0].rstrip(","))
                   for name in ("<A u, v>", "<u, A' v>"))
    assert abs(left - right) > 0.01 * max(abs(left), abs(right))
    with pytest.raises(UserError, match="apart by nan"):
        Halves(6, wrong=float("nan")).check_adjoint(3, 6, 5)


def test_an_operator_without_adjoint_or_inverse_says_so():
    class Forward(LinearOperator):
        def forward(self, x):
            return x

    with pytest.raises(NotImplementedError, match="Forward has no adjoint: write one"):
        Forward().guess(torch.zeros(1))
    with pytest.raises(UserError, match="Halves has no known inverse"):
        direct_inverse(Halves(6), random(1, 3, 3, 5))


def test_operators_have_no_entries_among_the_weights():
    assert Blur(16, 5, 2.0).state_dict() == {} == Halves(6).state_dict()
    T = make_map(PreconditionedMap, Halves(6), Denoiser(DnCNN(2, 4), 0.1))
    names = set(T.state_dict())
    assert "log_tau" in names and not any(name.startswith("A.") for name in names)
    assert len(list(T.A.buffers())) == 1 and T.A.double().M.dtype == torch.float64


def test_noise_has_the_shape_of_what_is_measured():
    A, x = Halves(6), random(2, 3, 6, 5)
    d = measure(A, x, 0.1, 0, [4, 7])
    assert d.shape == (2, 3, 3, 5) and d.dtype == x.dtype
    assert torch.equal(measure(A, x[1:], 0.1, 0, [7]), d[1:])
    assert 0.05 < (d - A(x)).std() < 0.15


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Blur(4, 5, 2.0), "smaller than the 5 x 5 blur kernel"),
    (lambda: gaussian_kernel(4, 2.0), "odd"),
    (lambda: gaussian_kernel(-1, 2.0), "odd"),
    (lambda: gaussian_kernel(5, 0.0), "positive"),
    (lambda: gaussian_kernel(5, float("nan")), "positive"),
    (lambda: get_protocol("papr"), "unknown protocol 'papr': choose one of paper, code"),
])
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
