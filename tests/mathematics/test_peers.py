"""Against other implementations: torchdeq's, deepinv's and scikit-image's."""

import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import MAPS, make_map

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.baselines import tikhonov
from jfbnb.core.fixed_point import solve
from jfbnb.core.gradients import implicit, jfb
from jfbnb.core.interop import DeepinvOperator, to_deepinv
from jfbnb.core.operators import MRI, Blur, Convolution, Downsampling, Inpainting

deepinv = pytest.importorskip("deepinv")
torchdeq = pytest.importorskip("torchdeq")


def gradient(T, output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad((output - truth).square().sum(), list(T.parameters()),
                                allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


SIZE = (16, 18)
MASK = (torch.rand(SIZE, generator=torch.manual_seed(1)) > 0.4).double()
KERNELS = {"gaussian": kernels.gaussian(5**0.5, 5), "motion": kernels.motion(5, 30),
           "even": torch.rand(4, 2, dtype=torch.float64, generator=torch.manual_seed(2)) / 4}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


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
    ours, theirs = (gradient(T, T.image(output), d) for output in (
        method(lambda z: T(z, d), state), theirs[-1]))
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()
