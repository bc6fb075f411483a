"""Operators, conjugate gradients, baselines, measurements: against NumPy, SciPy, scikit-image."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import scipy.signal
import skimage.data
import skimage.restoration
import torch
from conftest import Contractive
from torch.nn.functional import avg_pool2d

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.baselines import (
    direct_inverse,
    discrepancy_lambda,
    gradient_descent_iterate,
    image_gradient,
    image_gradient_adjoint,
    tikhonov,
    tikhonov_gradient_descent,
    total_variation,
)
from jfbnb.core.conjugate_gradients import conjugate_gradients
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import solve
from jfbnb.core.kernels import gaussian_kernel
from jfbnb.core.maps import SplittingMap
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import (
    MRI,
    Blur,
    Convolution,
    Downsampling,
    Inpainting,
    LinearOperator,
    Separable,
    scene_size,
    toeplitz,
)
from jfbnb.core.protocols import get_protocol, measure


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def kernel_of(*shape: int) -> torch.Tensor:
    """Positive, of sum 1; no outer product unless it is one pixel high or wide."""
    kernel = 0.1 + random(*shape).abs()
    return kernel / kernel.sum()


def mask_of(*shape: int) -> torch.Tensor:
    return (random(*shape, seed=2) > 0).double()


def dense(A: LinearOperator, *domain: int) -> torch.Tensor:
    """The matrix of A, from its values on the unit images."""
    return A(torch.eye(math.prod(domain), dtype=torch.float64).view(-1, *domain)).flatten(1).mT


def ramp(height: int, width: int) -> torch.Tensor:
    return (3.0 * torch.arange(height, dtype=torch.float64)[:, None]
            + torch.arange(width, dtype=torch.float64))[None, None]


class Halves(LinearOperator):
    """From images (B, C, H, W) to half as many rows, weighted sums of two each: M x."""

    def __init__(self, rows: int, wrong: float = 0.0):
        super().__init__()
        M = torch.kron(torch.eye(rows // 2, dtype=torch.float64),
                       torch.tensor([[0.7, 0.2]], dtype=torch.float64))
        self.wrong = wrong  # added to the adjoint
        self.register_buffer("M", M)

    def forward(self, x):
        return self.M.to(x.dtype) @ x

    def adjoint(self, d):
        return (self.M.to(d.dtype) + self.wrong).mT @ d


# --- every operator, on small images --------------------------------------------------------------

SIZE = (10, 8)
ODD_AND_EVEN = [(3, 3), (5, 3), (4, 4), (3, 2), (2, 5), (1, 4), (1, 1)]
SYMMETRIC = [(M + M.mT) / 9 for M in (random(10, 10), random(8, 8))]
OPERATORS = {
    "separable": partial(Separable, random(5, 10) / 4, random(11, 8) / 4),
    "separable, symmetric": partial(Separable, *SYMMETRIC),
    **{f"blur, {border}": partial(Blur, SIZE, 5, 2.0, border) for border in ("black", "unknown")},
    **{f"convolution, {shape}, {border}, stride {stride}":
       partial(Convolution, SIZE, kernel_of(*shape), border, stride)
       for shape, stride in [*((shape, 1) for shape in ODD_AND_EVEN[::2]), ((3, 2), 2), ((4, 5), 3)]
       for border in ("black", "unknown", "periodic")},
    "kernel of sum 0": partial(Convolution, SIZE, kernel_of(3, 3) - 1 / 9),
    **{f"downsampling by {factor}": partial(Downsampling, SIZE, factor) for factor in (1, 2, 3)},
    "downsampling after a kernel": partial(Downsampling, SIZE, 2, kernel_of(3, 4)),
    "inpainting": partial(Inpainting, mask_of(*SIZE)),
    "inpainting by channel": partial(Inpainting, mask_of(2, *SIZE)),
    "MRI": partial(MRI, mask_of(*SIZE)),
    "MRI with a phase": partial(MRI, mask_of(*SIZE), random(*SIZE)),
    "forward and adjoint alone": partial(Halves, SIZE[0]),
}


@pytest.fixture(params=OPERATORS)
def A(request) -> LinearOperator:
    return OPERATORS[request.param]()


def test_adjoint_is_the_transpose(A):
    assert A.check_adjoint(2, *SIZE) < 1e-12
    M, d = dense(A, 2, *SIZE), torch.rand_like(A(random(3, 2, *SIZE)))
    assert A.adjoint(d).shape == (3, 2, *SIZE)
    torch.testing.assert_close(A.adjoint(d).flatten(1), d.flatten(1) @ M, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tau", "apart"), [
    (torch.float64, 0.5, 1e-9), (torch.float64, 1e-3, 1e-8), (torch.float32, 0.05, 1e-4)])
def test_solve_normal_is_a_dense_solve(A, dtype, tau, apart):
    """Image by image: also of one that is much darker, and of none."""
    M = dense(A, 2, *SIZE)
    r = random(3, 2, *SIZE) * torch.tensor([1, 1e-6, 0]).view(3, 1, 1, 1)
    normal = M.mT @ M + tau * torch.eye(M.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(normal, r.flatten(1).mT).mT
    for solver in (A.solve_normal, lambda *args: LinearOperator.solve_normal(A, *args)):
        x = solver(r.to(dtype), tau)
        assert x.dtype == dtype and not x[2].any()
        wrong = (x.flatten(1) - expected).norm(dim=1)
        assert (wrong[:2] <= apart * expected[:2].norm(dim=1)).all()


def test_everything_is_differentiable(A):
    x, d = random(2, 2, *SIZE), A(random(2, 2, *SIZE, seed=1))
    for apply, transposed, u, v in ((A, A.adjoint, x, d), (A.adjoint, A, d, x)):
        gradient, = torch.autograd.grad((apply(u.requires_grad_()) * v.detach()).sum(), u)
        torch.testing.assert_close(gradient, transposed(v), rtol=0, atol=1e-12)
    r, tau = random(2, 2, *SIZE), torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(A.solve_normal, (r.requires_grad_(), tau.requires_grad_()),
                                    fast_mode=True)


def test_conjugate_gradients_have_second_derivatives():
    A, r = Halves(4), random(2, 1, 4, 2).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(A.solve_normal, (r, tau))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_keeps_shape_and_type(A, dtype):
    x = random(2, 2, *SIZE).to(dtype)
    d = A(x)
    assert A.adjoint(d).shape == A.guess(d).shape == A.solve_normal(x, 0.1).shape == x.shape
    for found in (d, A.adjoint(d), A.guess(d), A.solve_normal(x, 0.1), A.visible(x)):
        assert found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(d.double(), A(x.double()), rtol=0, atol=1e-5)


def test_an_operator_moves_with_its_digits(A):
    """The meta device computes shapes alone, and refuses what was left behind on the CPU."""
    assert A.state_dict() == {} and not list(A.parameters())
    assert repr(A).startswith(f"{type(A).__name__}(") and "\n" not in repr(A)
    x = random(2, 2, *SIZE)
    d, buffers = A(x), [b.dtype for b in A.buffers()]
    assert set(buffers) == {torch.float64}
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(other(x), d)
    moved = copy.deepcopy(A).to("meta")
    assert [b.dtype for b in moved.buffers()] == buffers
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    on_meta = moved(x.to("meta"))
    assert on_meta.shape == d.shape and moved.adjoint(on_meta).shape == x.shape
    less = copy.deepcopy(A).to(torch.float32)  # as a whole model may be
    torch.testing.assert_close(less(x), d, rtol=0, atol=1e-5)
    assert less.check_adjoint(2, *SIZE) < 1e-5


# --- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("border", ["black", "unknown", "periodic"])
@pytest.mark.parametrize("shape", [*ODD_AND_EVEN, (7, 9)])
@pytest.mark.parametrize("separable", [False, True])
def test_convolution_is_scipys(shape, border, stride, separable):
    kernel = kernel_of(*shape)
    if separable:
        kernel = torch.outer(kernel.sum(1), kernel.sum(0))
    x = random(1, 2, 17, 22)
    A = Convolution((17, 22), kernel, border, stride)
    assert bool(A.factors) is (border != "periodic" and (separable or 1 in shape))
    expected = [scipy.signal.convolve2d(channel, kernel.numpy(), mode="valid")
                if border == "unknown" else
                scipy.ndimage.convolve(channel, kernel.numpy(),
                                       mode={"black": "constant", "periodic": "wrap"}[border])
                for channel in x[0].numpy()]
    np.testing.assert_allclose(A(x)[0], np.stack(expected)[:, ::stride, ::stride], atol=1e-12)
    if stride == 1:
        assert scene_size(A(x).shape[2:], shape, border) == (17, 22)
    elif border == "unknown":
        assert torch.equal(Downsampling((17, 22), stride, kernel)(x), A(x))


@pytest.mark.parametrize("border", ["black", "unknown"])
def test_blur_is_the_convolution_with_scipys_gaussian(border):
    A, x = Blur((20, 33), 5, 2.0, border), random(1, 1, 20, 33)
    expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), 2.0, mode="constant", radius=2)
    inner = expected if border == "black" else expected[2:-2, 2:-2]
    np.testing.assert_allclose(A(x)[0, 0], inner, atol=1e-12)


@pytest.mark.parametrize("border", ["black", "unknown"])
@pytest.mark.parametrize("kernel", [kernels.motion(5, 30), kernels.disk(2.2),
                                    kernels.gaussian(1.0, 5)[:, 1:-1]])
def test_what_is_visible_lies_where_it_was_seen(kernel, border):
    """A kernel that is symmetric leaves a ramp as it is: but for what the border hides."""
    x = ramp(14, 17)
    A = Convolution((14, 17), kernel / kernel.sum(), border)
    kept = (slice(3, -3),) * 2 if border == "black" else (slice(None),) * 2
    torch.testing.assert_close(A(x)[..., *kept], A.visible(x)[..., *kept], rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", ODD_AND_EVEN)
@pytest.mark.parametrize("border", ["black", "unknown"])
def test_the_guess_shows_what_was_measured(shape, border):
    A = Convolution((11, 13), kernel_of(*shape), border)
    d = A(random(2, 3, 11, 13))
    assert torch.equal(A.visible(A.guess(d)), d)
    x = A.guess(torch.ones_like(d))
    assert torch.equal(x, torch.ones_like(x))  # beyond the border it goes on


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(13, 16), (12, 12)])
def test_a_pixel_of_less_resolution_is_the_mean_of_those_that_are_visible(factor, size):
    A, x = Downsampling(size, factor), random(1, 2, *size)
    d = A(x)
    assert d.shape[2:] == (size[0] // factor, size[1] // factor)
    torch.testing.assert_close(d, avg_pool2d(A.visible(x), factor), rtol=0, atol=1e-12)
    torch.testing.assert_close(avg_pool2d(A.visible(A.guess(d)), factor), d, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [
    lambda: Separable(random(5, 9), random(11, 8)), lambda: Blur((9, 8), 5, 2.0, "unknown"),
    lambda: Blur((9, 8), 5, 5**0.5), lambda: Downsampling((9, 8), 2),
    lambda: Convolution((9, 8), kernel_of(1, 4))])
def test_the_inverse_is_numpys(make):
    A = make()
    d = A(random(2, 1, 9, 8))
    expected = d.flatten(1).numpy() @ np.linalg.pinv(dense(A, 1, 9, 8).numpy(), rcond=1e-12).T
    np.testing.assert_allclose(direct_inverse(A, d).flatten(1), expected, rtol=1e-7, atol=1e-7)


def test_kernel_is_a_sampled_gaussian_and_toeplitz_is_scipys():
    g, expected = gaussian_kernel(5, 2.0).numpy(), np.exp(-np.array([4, 1, 0, 1, 4]) / 8.0)
    np.testing.assert_allclose(g, expected / expected.sum(), rtol=1e-14)
    np.testing.assert_array_equal(toeplitz(gaussian_kernel(5, 2.0), 7).numpy(),
                                  scipy.linalg.toeplitz(np.r_[g[2:], np.zeros(4)]))


@pytest.mark.parametrize("kernel", [kernels.gaussian(5**0.5, 5), kernels.motion(9, 30)])
def test_an_unknown_border_restores_a_cut_picture_that_a_black_one_spoils(kernel):
    scene = skimage.data.camera() / 255.0
    blurred = scipy.ndimage.convolve(scene, kernel.numpy())
    blurred += 0.01 * np.random.default_rng(0).standard_normal(blurred.shape)
    d, x = (torch.from_numpy(image[None, None, 208:304, 208:304].copy())
            for image in (blurred, scene))
    reached = {}
    for border in ("black", "unknown"):
        A = Convolution(scene_size((96, 96), kernel.shape, border), kernel, border)
        reached[border] = psnr(A.visible(tikhonov(A, d, 0.01)), x).item()
    assert reached["black"] < psnr(d, x).item() - 2 < psnr(d, x).item() + 1.5 < reached["unknown"]


# --- conjugate gradients --------------------------------------------------------------------------


class Counting(Convolution):
    """A motion blur that counts how often it is applied."""

    def __init__(self, *size: int):
        super().__init__(size, kernels.motion(9, 30))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_a_start_and_a_preconditioner_save_iterations_and_change_nothing():
    A, tau, b = Counting(40, 44), 1e-3, random(2, 3, 40, 44)
    M, tolerance = (lambda x: A.adjoint(A(x)) + tau * x), 1e-10
    exact = conjugate_gradients(M, b, 1e-14)

    def calls(**options) -> int:
        A.calls = 0
        found = conjugate_gradients(M, b, tolerance, **options)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * exact.abs().max().item())
        return A.calls

    plain = calls()
    assert calls(precondition=lambda r: A.precondition(r, tau)) < 0.5 * plain
    assert calls(start=exact + 1e-5 * random(2, 3, 40, 44)) < 0.7 * plain
    # A start that is farther off than zero costs the look at it.
    assert calls(start=-exact) == plain + 1


@pytest.mark.parametrize("border", ["black", "unknown"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_preconditioner_is_symmetric_positive_definite_and_about_the_inverse(border, stride):
    A, tau = Convolution((12, 11), kernels.disk(1.6), border, stride), 0.01
    P = A.precondition(torch.eye(132, dtype=torch.float64).view(132, 1, 12, 11), tau).flatten(1)
    torch.testing.assert_close(P, P.mT, rtol=0, atol=1e-10)
    K = dense(A, 1, 12, 11)
    M = K.mT @ K + tau * torch.eye(132, dtype=torch.float64)
    assert torch.linalg.eigvalsh(P).min() > 0
    spread = torch.linalg.eigvals(P @ M).real.sort().values
    plain = torch.linalg.eigvalsh(M)
    assert 0.3 < spread.median() < 3
    if stride == 1:
        assert spread[-1] / spread[0] < 0.5 * plain[-1] / plain[0]
    else:  # where a power that is too large by stride^2 has a mean of 0.51 or 0.64
        assert spread.mean() > 0.75


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_stays_so_and_keeps_no_other_image_waiting(bad):
    """1e30 is finite in float32, and its square is not."""
    A, r = Counting(40, 44), torch.randn(2, 3, 40, 44, generator=torch.manual_seed(0))
    alone = A.solve_normal(r[1:], 0.05)
    calls, A.calls = A.calls, 0
    r[0, 0, 3, 4] = bad
    x = A.solve_normal(r, 0.05)
    assert A.calls <= calls + 1
    assert not x[0].isfinite().all() and not A.solve_normal(r[:1], 0.05).isfinite().all()
    torch.testing.assert_close(x[1:], alone, rtol=0, atol=1e-4)


def test_conjugate_gradients_that_do_not_arrive_say_how_far_they_are():
    A, b = Counting(40, 44), torch.cat([random(1, 3, 40, 44), torch.zeros(1, 3, 40, 44)])
    with pytest.warns(UserWarning, match=r"after 3 iterations at \de\+\d\d times their tolerance"):
        x = conjugate_gradients(lambda v: A.adjoint(A(v)) + 1e-4 * v, b, 1e-6, 3)
    assert x[0].any() and not x[1].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "tau", "apart"), [
    (lambda: Convolution((40, 40), kernels.disk(3)), 1e-5, 0.02),
    (lambda: Blur((40, 40), 5, 5**0.5, "unknown"), 5e-4, 1e-3)], ids=["iterative", "closed form"])
def test_float32_is_enough_at_low_noise(make, tau, apart):
    """At a small tau the residual soon is small, where the image is still far off."""
    A, x = make(), torch.from_numpy(skimage.data.camera()[200:240, 200:240] / 255.0)[None, None]
    r = A.adjoint(A(x)) + tau * x
    found, exact = A.solve_normal(r.float(), tau).double(), A.solve_normal(r, tau)
    assert (A.visible(found) - A.visible(exact)).abs().max() < apart


# --- MRI and inpainting ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
def test_mri_is_numpys_transform_of_lines_with_the_origin_in_the_middle(size):
    mask, phase, x = mask_of(*size), random(*size), random(1, 1, *size)
    z = x[0, 0].numpy() * np.exp(1j * phase.numpy())
    k = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(z), norm="ortho")) * mask.numpy()
    found = torch.view_as_complex(MRI(mask, phase)(x))[0, 0].numpy()
    np.testing.assert_allclose(found, k, atol=1e-12)
    one = torch.zeros(1, 1, *size)
    one[..., size[0] // 2, size[1] // 2] = 1  # a point in the middle has a flat, real k-space
    flat = MRI(torch.ones(size))(one)
    torch.testing.assert_close(flat, torch.tensor([1.0, 0.0]).expand_as(flat)
                               / math.prod(size) ** 0.5)


def test_inpainting_starts_from_known_pixels_and_their_neighbours():
    mask = torch.zeros(5, 9)
    mask[2, 1] = mask[2, 7] = 1
    d = Inpainting(mask)(torch.arange(9.0).expand(1, 1, 5, 9))
    x = Inpainting(mask).guess(d)
    assert torch.equal(mask * x, d)
    expected = torch.tensor([1.0, 1, 1, 1, 4, 7, 7, 7, 7]).expand_as(x)
    torch.testing.assert_close(x, expected)
    known = Inpainting(torch.ones(5, 9))
    assert torch.equal(known.guess(d), d)


def test_the_start_of_an_operator_without_one_is_smooth():
    """By the dense normal equations of |A x - d|^2 + w |Laplacian x|^2, w a tenth of |A|^2 = 1."""
    mask, size = mask_of(6, 9), 54
    d = Inpainting(mask)(random(1, 1, 6, 9))
    laplacian = np.zeros((size, size))
    for row, column in np.ndindex(6, 9):
        for near in ((row + 1, column), (row, column + 1)):
            if near[0] < 6 and near[1] < 9:
                i, j = 9 * row + column, 9 * near[0] + near[1]
                laplacian[[i, j, i, j], [i, j, j, i]] += [1, 1, -1, -1]
    normal = np.diag(mask.flatten().numpy()) + 0.1 * laplacian @ laplacian
    expected = np.linalg.solve(normal, d.flatten().numpy()).reshape(1, 1, 6, 9)
    found = LinearOperator.guess(Inpainting(mask), d).numpy()
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)


def test_inpainting_fills_a_channel_without_known_pixels_with_the_mean_of_the_others():
    mask = mask_of(3, *SIZE)
    mask[1] = 0
    A, others = Inpainting(mask), Inpainting(mask[[0, 2]])
    d = A(random(2, 3, *SIZE))
    expected = others.guess(d[:, [0, 2]])
    torch.testing.assert_close(A.guess(d)[:, [0, 2]], expected, rtol=0, atol=0)
    torch.testing.assert_close(A.guess(d)[:, 1], expected.mean(1), rtol=0, atol=1e-12)


# --- baselines ------------------------------------------------------------------------------------


def test_spectrum_and_condition_are_numpys():
    A = Blur((10, 12), 5, math.sqrt(5))
    M = np.kron(A.K_h.numpy(), A.K_w.numpy())
    assert A.cond == pytest.approx(np.linalg.cond(M), rel=1e-8)
    np.testing.assert_allclose(np.sort(A.spectrum.numpy().ravel()), np.linalg.eigvalsh(M),
                               atol=1e-13)


def test_gradient_descent_reaches_the_closed_form_and_calls_back_with_every_iterate():
    A, d, seen = Blur(16, 5, 2.0), random(2, 3, 16, 16), []
    last = tikhonov_gradient_descent(A, d, 0.05, 1.0, 1000, lambda k, x: seen.append((k, x)))
    torch.testing.assert_close(last, tikhonov(A, d, 0.05), rtol=0, atol=1e-10)
    assert [k for k, _ in seen] == list(range(1001))
    assert torch.equal(seen[0][1], d) and torch.equal(seen[-1][1], last)
    for k in (0, 1, 7):
        torch.testing.assert_close(gradient_descent_iterate(A, d, 0.05, 1.0, k), seen[k][1])


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


def objective(A: LinearOperator, x: torch.Tensor, d: torch.Tensor, weight: float,
              rounded: float = 0.0) -> torch.Tensor:
    """What total variation minimises, its norm rounded off near 0."""
    lengths = (image_gradient(x).square().sum((0, 2)) + rounded).sqrt()
    return 0.5 * (A(x) - d).square().sum() + weight * lengths.sum()


def test_total_variation_denoises_like_scikit_image():
    identity = Blur(24, 1, 1.0)  # a kernel of one pixel: denoising
    d = random(1, 1, 24, 24) * 0.2 + 0.5
    ours, info = total_variation(identity, d, 0.1, 1e-5, 5000, step=1.0)
    assert info.converged.all()
    theirs = torch.from_numpy(skimage.restoration.denoise_tv_chambolle(
        d[0, 0].numpy(), weight=0.1, eps=1e-10, max_num_iter=5000))[None, None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert objective(identity, ours, d, 0.1) <= objective(identity, theirs, d, 0.1) * (1 + 1e-5)


def test_total_variation_deblurs_to_the_minimum():
    """Against L-BFGS on the objective with |.| rounded off near 0, in colour."""
    A, weight = Blur(8, 5, 1.0), 0.02
    d = random(1, 3, 8, 8) * 0.3
    ours, info = total_variation(A, d, weight, 1e-7, 20_000)
    assert info.converged.all() and info.residual.max() <= 1e-7

    def smoothed(values):
        x = torch.from_numpy(values).view_as(d).requires_grad_()
        value = objective(A, x, d, weight, 1e-9)
        value.backward()
        return value.item(), x.grad.numpy().ravel()

    found = scipy.optimize.minimize(smoothed, ours.numpy().ravel() + 0.01, jac=True,
                                    method="L-BFGS-B", options={"maxiter": 4000, "ftol": 1e-14,
                                                                "maxfun": 50_000})
    assert 0.999 * found.fun <= objective(A, ours, d, weight).item() <= found.fun


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
    _, info = total_variation(A, d, 0.01, 1e-12, 5)
    assert info.iterations.tolist() == [5] * 3 and not info.converged.any()
    assert info.residuals.shape == (5, 3)


def test_noise_depends_on_seed_and_index_alone():
    A = Blur(16, 5, 2.0)
    x = random(4, 3, 16, 16).float()
    together = measure(A, x, 0.01, 7, [3, 1, 2, 9])
    alone = measure(A, x[2:3], 0.01, 7, [2])
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(measure(A, x[2:3], 0.01, 8, [2]), alone, atol=1e-3)
    noise = measure(Halves(16), x.double(), 0.01, 0, range(4)) - Halves(16)(x.double())
    assert noise.shape == (4, 3, 8, 16) and noise.std().item() == pytest.approx(0.01, rel=0.05)
    with pytest.raises(ValueError, match="4 images but 1 indices"):
        measure(A, x, 0.01, 7, [0])


def test_protocols():
    # The design's measurements: cond(A) is 7e4 and 4e4.
    assert get_protocol("paper").operator().cond == pytest.approx(7.5e4, rel=0.05)
    assert get_protocol("code").operator().cond == pytest.approx(4e4, rel=0.2)


# --- refusals -------------------------------------------------------------------------------------


def test_a_wrong_adjoint_is_found_and_said_how_wrong():
    with pytest.raises(UserError, match="Halves.adjoint is not the adjoint of its forward: <A u, v>"
                                        r" = \S+ and <u, A' v> = \S+, apart by \d\.\de-0\d"):
        Halves(6, wrong=0.1).check_adjoint(3, 6, 5)
    with pytest.raises(UserError, match="apart by nan"):
        Halves(6, wrong=float("nan")).check_adjoint(3, 6, 5)


def test_an_operator_without_adjoint_or_inverse_says_so():
    class Forward(LinearOperator):
        def forward(self, x):
            return x

    with pytest.raises(NotImplementedError, match="Forward has no adjoint: write one"):
        Forward().guess(torch.zeros(1))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Blur(4, 5, 2.0), "4 x 4 pixels is smaller than the 5 x 5 blur kernel"),
    (lambda: Convolution((9, 4), kernel_of(3, 5)), "4 x 9 pixels is smaller than the 5 x 3"),
    (lambda: Blur(9, 4, 2.0), "kernel size 4: choose an odd"),
    (lambda: gaussian_kernel(-1, 2.0), "odd"),
    (lambda: gaussian_kernel(5, 0.0), "kernel std 0.0: choose a positive"),
    (lambda: gaussian_kernel(5, math.inf), "positive"),
    (lambda: Blur(9, 5, 2.0, border="x"), "border 'x': choose unknown, black, periodic"),
    (lambda: Convolution(9, np.zeros((3, 3))), "a kernel of zeros"),
    (lambda: Convolution(9, torch.tensor([[1.0, math.nan]])), "not finite"),
    (lambda: Convolution(16, 255 * kernels.disk(1)), "a kernel of sum 255: give kernel"),
    (lambda: Convolution(9, torch.ones(3)), r"a kernel of shape \(3,\)"),
    (lambda: Convolution(9, torch.ones(0, 3)), r"a kernel of shape \(0, 3\)"),
    (lambda: direct_inverse(Convolution(9, kernel_of(3, 3)), torch.ones(1, 1, 7, 7)),
     "Convolution has no known inverse"),
    (lambda: Convolution((20, 22), kernel_of(3, 4))(random(1, 1, 20, 23)),
     r"an image of \(20, 23\) for an operator on \(20, 22\): they need the same height and width"),
    (lambda: Blur(9, 5, 2.0)(random(1, 1, 9, 8)), r"an image of \(9, 8\) for an operator on"),
    (lambda: Blur(9, 5, 2.0, "unknown").adjoint(random(1, 1, 9, 9)), "a measurement of"),
    (lambda: Blur(9, 5, 2.0).solve_normal(random(1, 1, 9, 8), 0.1), "an image of"),
    (lambda: Inpainting(mask_of(2, 9, 9))(random(1, 1, 9, 9)), r"an image of \(1, 9, 9\)"),
    (lambda: Blur(9, 5, 2.0)(np.ones((1, 1, 9, 9))),
     "a ndarray of float64: give a tensor of floats, such as torch.from_numpy"),
    (lambda: Blur(9, 5, 2.0).adjoint(np.ones((1, 1, 9, 9))), "a ndarray of float64: give"),
    (lambda: Inpainting(torch.ones(4, 4))(torch.ones(1, 1, 4, 4, dtype=torch.uint8)),
     "a Tensor of torch.uint8: give"),
    (lambda: Restorer(lambda A, d, noise_std: (d, None))(None, np.ones((1, 1, 9, 9)), 0.01),
     "a ndarray of float64: give"),
    (lambda: Downsampling(9, 0), "factor 0: give a positive"),
    (lambda: Downsampling(9, 10), "smaller than the 10 x 10"),
    (lambda: Inpainting(torch.zeros(4, 4)), "a mask needs values 0 and 1, and at least one 1"),
    (lambda: Inpainting(np.full((4, 4), 255)), "a mask needs values 0 and 1"),
    (lambda: MRI(torch.full((4, 4), math.nan)), "a mask needs values 0 and 1"),
    (lambda: MRI(torch.ones(4, 4), torch.zeros(4, 5)), r"a phase of shape \(4, 5\)"),
    (lambda: MRI(torch.ones(4, 4), torch.full((4, 4), math.nan)), "give finite values"),
    (lambda: MRI(torch.ones(4, 4))(torch.ones(1, 1, 4, 5)), "the same height and width"),
    (lambda: MRI(torch.ones(4, 4)).adjoint(torch.ones(1, 1, 4, 4)), "a k-space of"),
    (lambda: get_protocol("papr"), "unknown protocol 'papr': choose one of paper, code, camera"),
])
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_was_solved_before_changes_no_bit():
    torch.manual_seed(0)
    T = SplittingMap(Convolution((40, 44), kernels.motion(9, 30)),
                     Denoiser(Contractive(3, 8), 0.05), 0.01)
    d = T.A(torch.rand(2, 3, 40, 44, generator=torch.manual_seed(1)))

    def restored() -> torch.Tensor:
        return T.data_step(solve(T, d, 1e-4)[0], d)

    first = restored()
    solve(T, -d.flip(2), 1e-2)
    T.A.solve_normal(torch.full((1, 3, 40, 44), math.nan), 0.05)
    assert torch.equal(restored(), first)
    with ThreadPoolExecutor(2) as threads:
        assert all(torch.equal(found.result(), first)
                   for found in [threads.submit(restored) for _ in range(4)])
