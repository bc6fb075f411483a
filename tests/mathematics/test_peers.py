"""Against other implementations: torchdeq's, deepinv's and scikit-image's."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import skimage.data
import skimage.restoration
import torch
from conftest import MAPS, make_map

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.baselines import tikhonov
from jfbnb.core.fixed_point import solve
from jfbnb.core.gradients import implicit, jfb
from jfbnb.core.interop import DeepinvOperator, to_deepinv
from jfbnb.core.maps import ProximalMap
from jfbnb.core.operators import MRI, Blur, Convolution, Downsampling, Inpainting

deepinv = pytest.importorskip("deepinv")
torchdeq = pytest.importorskip("torchdeq")


def gradient(T, output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """All of Theta's gradients in one vector."""
    found = torch.autograd.grad((output - truth).square().sum(), list(T.parameters()),
                                allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# --- operators ------------------------------------------------------------------------------------

SIZE = (16, 18)
MASK = (torch.rand(SIZE, generator=torch.manual_seed(1)) > 0.4).double()
KERNELS = {"gaussian": kernels.gaussian(5**0.5, 5), "motion": kernels.motion(5, 30),
           "even": torch.rand(4, 2, dtype=torch.float64, generator=torch.manual_seed(2)) / 4}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def pairs() -> Iterator:
    """Ours and theirs, float64."""
    for name, kernel in KERNELS.items():
        theirs = {"filter": kernel[None, None]}
        for border, padding in (("black", "constant"), ("unknown", "valid")):
            yield pytest.param(
                lambda k=kernel, border=border: Convolution(SIZE, k, border),
                lambda t=theirs, padding=padding: deepinv.physics.Blur(**t, padding=padding),
                id=f"{name}, {border}")
        for factor in (2, 3):
            yield pytest.param(
                lambda k=kernel, factor=factor: Downsampling(SIZE, factor, k),
                lambda t=theirs, factor=factor: deepinv.physics.Downsampling(
                    (3, *SIZE), factor=factor, padding="valid", **t),
                id=f"{name}, one of {factor}")
    yield pytest.param(lambda: Blur(SIZE, 5, 5**0.5), lambda: deepinv.physics.Blur(
        filter=KERNELS["gaussian"][None, None], padding="constant"), id="blur")
    yield pytest.param(lambda: Inpainting(MASK), lambda: deepinv.physics.Inpainting(
        (3, *SIZE), mask=MASK), id="inpainting")


@pytest.mark.parametrize(("ours", "theirs"), list(pairs()))
def test_an_operator_is_deepinvs(ours, theirs):
    """Forward, adjoint, and their proximal map, which is our solve_normal with tau = 1 / gamma."""
    ours, theirs, gamma = ours(), theirs(), 20.0
    x, z = images(2, 3, *SIZE), images(2, 3, *SIZE, seed=1)
    d = ours(x)
    torch.testing.assert_close(d, theirs.A(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.adjoint(d), theirs.A_adjoint(d), rtol=0, atol=1e-10)
    found = ours.solve_normal(ours.adjoint(d) + z / gamma, 1 / gamma)
    # Their conjugate gradients stop at 1e-6.
    prox = theirs.prox_l2(z, d, gamma, solver="lsqr", max_iter=1000, tol=1e-13)
    torch.testing.assert_close(found, prox, rtol=0, atol=1e-8)


@pytest.mark.parametrize("phase", [None, 3 * images(*SIZE)], ids=["real", "phase"])
def test_mri_is_deepinvs_on_complex_images(phase):
    """Theirs has the real and the imaginary part as two channels, of the image and of k-space."""
    symmetric = MASK * MASK.flip(0, 1).roll((1, 1), (0, 1))  # theirs solves for complex images
    ours, theirs = MRI(symmetric, phase), deepinv.physics.MRI(mask=symmetric)
    turn = torch.zeros(SIZE) if phase is None else phase
    rotation = torch.stack([turn.cos(), turn.sin()])
    x, d = images(2, 1, *SIZE), images(2, 1, *SIZE, 2)
    torch.testing.assert_close(ours(x)[:, 0].movedim(-1, 1), theirs.A(x * rotation),
                               rtol=0, atol=1e-10)
    adjoint = theirs.A_adjoint(d[:, 0].movedim(-1, 1))
    torch.testing.assert_close(ours.adjoint(d), (adjoint * rotation).sum(1, keepdim=True),
                               rtol=0, atol=1e-10)
    if phase is None:
        prox = theirs.prox_l2(torch.cat([x, 0 * x], 1), d[:, 0].movedim(-1, 1), 20.0)
        torch.testing.assert_close(ours.solve_normal(ours.adjoint(d) + x / 20, 1 / 20),
                                   prox[:, :1], rtol=0, atol=1e-10)


def theirs_alone() -> Iterator:
    """Operators of deepinv that we do not have, and the shapes of their images."""
    p, kernel = deepinv.physics, KERNELS["even"][None, None]
    for name, make, domain in (
            ("circular blur", lambda: p.BlurFFT((3, *SIZE), filter=kernel.float()), (3, *SIZE)),
            ("reflected blur", lambda: p.Blur(kernel.float(), padding="reflect"), (3, *SIZE)),
            ("bicubic", lambda: p.Downsampling((3, *SIZE), filter="bicubic"), (3, *SIZE)),
            ("grey", p.Decolorize, (3, *SIZE)),
            ("MRI", lambda: p.MRI(mask=MASK.float()), (2, *SIZE)),
            ("a seeded mask and noise", lambda: p.Inpainting(
                (3, *SIZE), mask=0.5, rng=torch.Generator().manual_seed(0),
                noise_model=p.GaussianNoise(0.5, torch.Generator().manual_seed(0))), (3, *SIZE)),
            ("one pixel", lambda: p.SinglePixelCamera(m=50, img_size=(1, 16, 16)), (1, 16, 16)),
            ("tomography", lambda: p.Tomography(12, 16, circle=False, normalize=True),
             (1, 16, 16))):
        yield pytest.param(make, domain, id=name)


@pytest.mark.parametrize(("make", "domain"), list(theirs_alone()))
def test_any_of_deepinvs_operators_can_be_ours(make, domain):
    theirs, dtype = make(), torch.float32
    A, x = DeepinvOperator(theirs), images(2, *domain).to(dtype)
    assert A.check_adjoint(*domain) < 1e-6
    d = A(x)
    assert d.dtype == dtype and A.guess(d).shape == x.shape
    assert torch.equal(A(x), d) and torch.equal(copy.deepcopy(A)(x), d)  # without noise
    torch.testing.assert_close(d, theirs.A(x))
    torch.testing.assert_close(A(x.double()), theirs.A(x).double())
    prox = theirs.prox_l2(0.0, d, 10.0, max_iter=1000, tol=1e-7)
    torch.testing.assert_close(tikhonov(A, d, 0.1), prox, rtol=0, atol=1e-4)
    assert A.state_dict() == {} and not list(A.parameters()) and repr(A).count("\n") == 0
    assert set(theirs.state_dict()) == set(make().state_dict())  # theirs is as it was


def test_a_float64_operator_of_deepinvs_keeps_its_digits():
    theirs = deepinv.physics.Blur(KERNELS["motion"][None, None], padding="circular")
    A, x = DeepinvOperator(theirs), images(2, 3, *SIZE)
    assert A.check_adjoint(3, *SIZE) < 1e-12
    torch.testing.assert_close(A(x), theirs.A(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(A(x.float()).double(), theirs.A(x), rtol=0, atol=1e-6)


def test_tikhonov_with_a_blur_that_goes_around_is_scikit_images_wiener():
    kernel, lam = KERNELS["motion"], 0.02
    scene = skimage.data.camera()[200:264, 200:264] / 255.0
    A = DeepinvOperator(deepinv.physics.BlurFFT((1, 64, 64), filter=kernel[None, None]))
    d = A(torch.from_numpy(scene)[None, None])
    point = np.zeros((3, 3))
    point[1, 1] = 1  # they weigh what a filter makes of the image: here the image itself
    theirs = skimage.restoration.wiener(d[0, 0].numpy(), kernel.numpy(), lam, reg=point,
                                        clip=False)
    np.testing.assert_allclose(tikhonov(A, d, lam)[0, 0], theirs, atol=1e-6)


def test_what_is_not_linear_cannot_be_ours():
    with pytest.raises(UserError, match="Haze has no A_adjoint"):
        DeepinvOperator(deepinv.physics.Haze())


@pytest.mark.parametrize("A", [
    Convolution((8, 9), KERNELS["even"]), Downsampling((8, 9), 2), Blur((8, 9), 5, 2.0),
    Inpainting(MASK[:8, :9]), MRI(MASK[:8, :9], images(8, 9))], ids=lambda A: type(A).__name__)
def test_any_of_our_operators_can_be_deepinvs_and_come_back(A):
    """Against the dense matrix of A."""
    M = A(torch.eye(72, dtype=torch.float64).view(72, 1, 8, 9)).flatten(1).mT
    x, d = images(2, 1, 8, 9), torch.rand_like(A(images(2, 1, 8, 9)))
    theirs = to_deepinv(A)
    for physics in (theirs, copy.deepcopy(theirs), to_deepinv(DeepinvOperator(theirs))):
        assert physics.adjointness_test(x, num_samples=4) < 1e-10
        torch.testing.assert_close(physics(x).flatten(1), x.flatten(1) @ M.mT)
        torch.testing.assert_close(physics.A_adjoint(d).flatten(1), d.flatten(1) @ M)
    prox = theirs.prox_l2(x, d, 20.0, solver="lsqr", max_iter=1000, tol=1e-13)
    normal = M.mT @ M + torch.eye(72, dtype=torch.float64) / 20
    expected = torch.linalg.solve(normal, (d.flatten(1) @ M + x.flatten(1) / 20).mT).mT
    torch.testing.assert_close(prox.flatten(1), expected, rtol=0, atol=1e-8)
    dagger = theirs.A_dagger(A(x), solver="lsqr", max_iter=1000, tol=1e-13)
    torch.testing.assert_close(A(dagger), A(x), rtol=0, atol=1e-4)


def test_one_of_our_operators_moves_with_its_physics():
    physics = to_deepinv(Blur((8, 9), 5, 2.0)).to("meta")
    assert physics.A(torch.ones(1, 1, 8, 9, device="meta")).shape == (1, 1, 8, 9)


# --- maps and gradients ---------------------------------------------------------------------------


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
def test_proximal_map_and_gradients_are_deepinvs(problem, jacobian_free):
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
    theirs = model(d, to_deepinv(A))
    T = ProximalMap(A, D, eta)
    x_star, info = solve(T, d, 1e-12, 5000)
    assert info.converged.all()
    torch.testing.assert_close(theirs, x_star, rtol=0, atol=1e-8)
    method = jfb if jacobian_free else (lambda T, x: implicit(T, x, 1e-12, 5000))
    ours = gradient(T, method(lambda z: T(z, d), x_star), d)
    assert difference(ours, gradient(T, theirs, d)) < 1e-6
