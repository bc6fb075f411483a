"""Against the peers' own implementations: torchdeq's and deepinv's, on the same maps."""

import pytest
import torch
from conftest import MAPS, make_map

from jfbnb.baselines import total_variation
from jfbnb.fixed_point import solve
from jfbnb.gradients import implicit, jfb
from jfbnb.maps import ProximalMap
from jfbnb.operators import Blur, gaussian_kernel

deepinv = pytest.importorskip("deepinv")
torchdeq = pytest.importorskip("torchdeq")


def gradient(T, output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """All of Theta's gradients in one vector."""
    found = torch.autograd.grad((output - truth).square().sum(), list(T.parameters()),
                                allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture
def physics():
    """deepinv's view of our blur: A, its adjoint, and nothing else."""
    def make(A):
        return deepinv.physics.LinearPhysics(A=lambda x, **_: A(x),
                                             A_adjoint=lambda y, **_: A.adjoint(y))
    return make


@pytest.mark.parametrize(("size", "std", "image"), [(5, 5**0.5, (16, 20)), (9, 1.0, (24, 16))])
def test_blur_is_deepinvs_with_zero_padding(size, std, image):
    kernel = gaussian_kernel(size, std).float()
    theirs = deepinv.physics.Blur(filter=torch.outer(kernel, kernel)[None, None],
                                  padding="constant")
    x = torch.rand(2, 3, *image, generator=torch.manual_seed(0))
    ours = Blur(image, size, std)
    torch.testing.assert_close(ours(x), theirs.A(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.adjoint(x), theirs.A_adjoint(x), rtol=0, atol=1e-6)


def test_total_variation_is_deepinvs_on_denoising():
    """With A = I, the kernel of one pixel, deblurring is denoising."""
    y = torch.rand(1, 1, 24, 24, dtype=torch.float64, generator=torch.manual_seed(0))
    ours, info = total_variation(Blur(24, 1, 1.0), y, 0.2, 1e-6, 20000, step=0.2)
    assert info.converged.all()
    theirs = deepinv.models.TVDenoiser(n_it_max=20000, crit=1e-9)(y, ths=0.2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("ift", [False, True], ids=["jfb", "implicit"])
def test_gradients_are_torchdeqs(problem, kind, ift):
    """JFB is torchdeq's one-step gradient; its implicit differentiation solves Eq. 5."""
    A, D, d = problem
    T = make_map(kind, A, D)
    settings = {"f_solver": "anderson", "f_max_iter": 2000, "f_tol": 1e-12, "f_stop_mode": "rel"}
    if ift:
        settings |= {"ift": True, "b_solver": "fixed_point_iter", "b_max_iter": 5000,
                     "b_tol": 1e-12, "b_stop_mode": "rel"}
    deq = torchdeq.get_deq(**settings, grad=1)
    state, _ = solve(T, d, 1e-12, 5000)
    theirs, _ = deq(lambda z: T(z, d), state)
    method = (lambda T, x: implicit(T, x, 1e-12, 5000)) if ift else jfb
    ours = gradient(T, T.image(method(lambda z: T(z, d), state)), d)
    assert difference(ours, gradient(T, T.image(theirs[-1]), d)) < 1e-6


@pytest.mark.parametrize("jacobian_free", [True, False], ids=["jfb", "implicit"])
def test_proximal_map_and_gradients_are_deepinvs(problem, physics, jacobian_free):
    """DE-PROX is deepinv's plug-and-play proximal gradient, made a deep equilibrium model."""
    A, D, d = problem
    eta = 0.7

    class Theirs(torch.nn.Module):
        def forward(self, x, sigma):
            return D(x)

    from deepinv.optim.optimizers import DEQConfig

    model = deepinv.optim.PGD(
        data_fidelity=deepinv.optim.L2(), prior=deepinv.optim.PnP(Theirs()), stepsize=eta,
        sigma_denoiser=0.05, max_iter=3000, early_stop=True, thres_conv=1e-13, crit_conv="residual",
        unfold=True, DEQ=DEQConfig(jacobian_free=jacobian_free, max_iter_backward=3000))
    theirs = model(d, physics(A))
    T = ProximalMap(A, D, eta)
    x_star, info = solve(T, d, 1e-12, 5000)
    assert info.converged.all()
    torch.testing.assert_close(theirs, x_star, rtol=0, atol=1e-8)
    method = jfb if jacobian_free else (lambda T, x: implicit(T, x, 1e-12, 5000))
    ours = gradient(T, method(lambda z: T(z, d), x_star), d)
    assert difference(ours, gradient(T, theirs, d)) < 1e-6
