"""The maps T_Theta(x; d), made of A and D. Their fixed point is the reconstruction (Eq. 3).

`GradientMap` and `PreconditionedMap` have the same fixed points x*, with
A'(A x - d) + tau (x - D(x)) = 0. `SplittingMap` is the latter with its two halves swapped: its
fixed point is z* = D(x*). `ProximalMap` and `ADMMMap` share theirs, x = D(x - eta A'(A x - d)).
That is the same condition if D is the proximal map of a regulariser; for a denoiser it is not.

Shapes, unless a map says otherwise: x (B, C, H, W), d (B, *range) -> (B, C, H, W).
"""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from jfbnb.core.denoisers import Denoiser
from jfbnb.core.descent import descent
from jfbnb.core.fixed_point import Solver, anderson
from jfbnb.core.linear_operator import LinearOperator


class ImplicitMap(nn.Module):
    """The base of the maps. A map acts on a state, which is the image for all but ADMM.

    A subclass has a `name` and a `colour`, the same in every figure, and `forward(state, d)`.

    Args:
        A: the operator; None if `on` will set it.
    """

    name: str
    colour: str
    solver: Solver = staticmethod(anderson)
    scale: float | Tensor = 1.0  # unit of the solver's tolerance, see `fixed_point.scale_of`

    def __init__(self, A: LinearOperator | None, D: Denoiser):
        super().__init__()
        self.register_module("A", A)
        self.D = D
        self.prior_scale = 1.0

    def on(self, A: LinearOperator, prior_scale: float = 1.0) -> Self:
        """The same map, with the same weights, for another operator.

        It shares everything but the operator: deepcopy it before you change its dtype or device.

        Args:
            prior_scale: factor of the prior's weight tau, in a map that has one.
        """
        other = copy.copy(self)
        other._modules = {**self._modules, "A": A}
        other.prior_scale = prior_scale
        return other

    def start(self, d: Tensor) -> Tensor:
        """The state to start the iteration from."""
        return self.A.guess(d)

    def image(self, state: Tensor) -> Tensor:
        """The image in a state."""
        return state


class WeightedMap(ImplicitMap):
    """A map with a weight tau > 0 of the denoiser against the data.

    Two scalars are learned: log tau, and an exponent: tau is proportional to this power of the
    `prior_scale` of `on`. The denoiser's noise level changes as in `denoisers.matched_sigma`; with
    an exponent of 1 it does not depend on `prior_scale`.
    """

    def __init__(self, A: LinearOperator, D: Denoiser, tau: float):
        super().__init__(A, D)
        self.log_tau = nn.Parameter(torch.tensor(float(tau)).log())
        self.noise_exponent = nn.Parameter(torch.tensor(1.0))

    @property
    def tau(self) -> Tensor:
        return self.log_tau.exp() * self.prior_scale**self.noise_exponent

    @property
    def sigma(self) -> Tensor:
        """The denoiser's noise level."""
        return self.D.sigma * self.prior_scale ** ((1 - self.noise_exponent) / 2)

    def data_step(self, z: Tensor, d: Tensor) -> Tensor:
        """(A'A + tau I)^-1 (A'd + tau z): the minimiser of |A x - d|^2 + tau |x - z|^2."""
        return self.A.solve_normal(self.A.adjoint(d) + self.tau * z, self.tau, z)


class GradientMap(WeightedMap):
    """Eq. 4 (DE-GRAD): T(x; d) = x - eta (A'(A x - d) + S(x)), with S(x) = tau (x - D(x)).

    The paper writes the gradient of |A x - d|^2; its factor 2 is in eta and S here.
    If |A| <= 1 and D has a Lipschitz constant L < 1, T is a contraction for
    0 < eta < 2 / (1 + tau (1 + L)). For |A| = 1 the bound is sharp: D may act as -L on an image
    that A preserves. On the null space of A the error may decrease by a factor of only
    1 - eta tau (1 - L), close to 1.
    """

    name, colour = "Eq. 4", "#C51B7D"

    def __init__(self, A: LinearOperator, D: Denoiser, tau: float, eta: float = 1.0):
        super().__init__(A, D, tau)
        self.eta = eta

    @property
    def scale(self) -> Tensor:
        """eta tau: the size of its steps on A's null space, relative to `PreconditionedMap`'s."""
        return self.eta * self.tau.detach()

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.tau * self.D.residual(x, self.sigma)
        return x - self.eta * (A.adjoint(A(x) - d) + S)


class PreconditionedMap(WeightedMap):
    """T(x; d) = (A'A + tau I)^-1 (A'd + tau D(x)): Eq. 4 with a Newton step on the data term.

    It has the fixed points of Eq. 4. If D has a Lipschitz constant L < 1, T contracts by L or
    better, however badly A is conditioned, as |tau (A'A + tau I)^-1| <= 1. Most trained networks
    have no such L, and then nothing is guaranteed.
    """

    name, colour = "preconditioned", "#661100"

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        return self.data_step(self.D(x, self.sigma), d)


class SplittingMap(WeightedMap):
    """T(z; d) = D(x), x = (A'A + tau I)^-1 (A'd + tau z): half-quadratic splitting.

    Geman and Yang (1995), with a network for the denoising half as in Zhang et al. (2017). The two
    halves are `PreconditionedMap`'s in the other order. So x* solves Eq. 4, z* = D(x*), and the
    Jacobian's spectral radius is the same. But the image is the denoiser's output, so the loss is
    differentiated through D alone.

    >>> import jfbnb, torch
    >>> A = jfbnb.Blur(16, kernel_size=5, kernel_std=1.0)
    >>> D = jfbnb.Denoiser(jfbnb.DnCNN(depth=3, width=8), sigma=0.05)
    >>> T, d = jfbnb.SplittingMap(A, D, tau=0.1), torch.rand(1, 3, 16, 16)
    >>> T(T.start(d), d).shape
    torch.Size([1, 3, 16, 16])
    """

    name, colour = "splitting", "#0072B2"

    def forward(self, z: Tensor, d: Tensor) -> Tensor:
        return self.D(self.data_step(z, d), self.sigma)


class EnergyMap(SplittingMap):
    """The splitting map of a gradient-step denoiser (Hurault et al. 2022), D(x) = x - grad g(x).

    g(x) = |R(x)|^2 / 2 for the network R, so D(x) = x - J_R(x)' R(x). Then x* is a stationary point
    of E(x) = |A x - d|^2 / 2 + tau g(x), and T moves x by -(A'A + tau I)^-1 grad E(x). So `descent`
    converges for every image, operator and weights, if R's derivative is continuous. `UNet`'s is;
    `DnCNN`'s jumps where a ReLU switches, and E may have a minimum at such a kink, where no
    gradient is small. An evaluation costs a forward and a backward pass of the network.
    """

    name, colour = "energy", "#882255"
    solver = staticmethod(descent)

    def data_step(self, z: Tensor, d: Tensor) -> Tensor:
        """`SplittingMap.data_step`, computed as a step from z or from 0, whichever is shorter.

        This keeps its rounding errors small, which |A|^2 / tau amplifies.
        """
        from_z, from_0 = self.A.adjoint(d - self.A(z)), self.A.adjoint(d) + self.tau * z
        near = (_square(from_z) < _square(from_0)).view(-1, 1, 1, 1)
        x = self.A.solve_normal(torch.where(near, from_z, from_0), self.tau)
        return torch.where(near, z, 0) + x

    def forward(self, z: Tensor, d: Tensor) -> Tensor:
        x = self.data_step(z, d)
        return x - self.prior(x)[1]

    def energy(self, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T(z), E at the data step's x, and a lower bound on the slope of E towards T(z).

        With r = T(z) - z and M = A'A + tau I the slope is tau^2 r'M^-1 r, by Cauchy and Schwarz at
        least tau^2 |r|^4 / r'M r.
        """
        x = self.data_step(z, d)
        g, gradient = self.prior(x)
        f, tau = x - gradient, self.tau.double()
        r = f - z
        rr = _square(r)
        rMr = (_square(self.A(r)) + tau * rr).clamp_min(torch.finfo(tau.dtype).tiny)
        return f, _square(self.A(x) - d) / 2 + tau * g, (tau * rr) ** 2 / rMr

    def metric(self, v: Tensor) -> Tensor:
        """tau^2 (A'A + tau I)^-1 v, which for v = z - T(z) is the gradient of E in z."""
        return self.tau**2 * self.A.solve_normal(v, self.tau)

    def prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x), (B,) in float64, and its gradient, which autograd tracks if it is enabled."""
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if tracked and x.requires_grad else x.detach().requires_grad_()
            g = _square(self.D.residual(x, self.sigma)) / 2
            (gradient,) = torch.autograd.grad(g.sum(), x, create_graph=tracked)
        return g, gradient


def _square(v: Tensor) -> Tensor:
    """|v|^2 of each image, (B,), in float64."""
    return v.double().square().flatten(1).sum(dim=1)


class ProximalMap(ImplicitMap):
    """Section 3.3 ii (DE-PROX): T(x; d) = D(x - eta A'(A x - d)), for 0 < eta <= 2 / |A'A|.

    D is the paper's S_Theta, the network that replaces the proximal map. The gradient step is
    nonexpansive for such an eta, so T contracts if D does.
    """

    name, colour = "proximal", "#4D9221"

    def __init__(self, A: LinearOperator, D: Denoiser, eta: float = 1.0):
        super().__init__(A, D)
        self.eta = eta

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        return self.D(x - self.eta * self.A.adjoint(self.A(x) - d))


class ADMMMap(WeightedMap):
    """Section 3.3 iii (DE-ADMM), on the stacked pair of the image z and the scaled dual u.

        x = (A'A + tau I)^-1 (A'd + tau (z - u))
        z <- D(x + u)
        u <- u + x - z

    At a fixed point x = z and tau u = A'(d - A z), so z is a fixed point of `ProximalMap` with
    eta = 1 / tau. Shapes: state (B, 2 C, H, W), d (B, *range) -> (B, 2 C, H, W).
    """

    name, colour = "ADMM", "#35978F"

    def start(self, d: Tensor) -> Tensor:
        z = self.A.guess(d)
        return torch.cat([z, torch.zeros_like(z)], dim=1)

    def image(self, state: Tensor) -> Tensor:
        return state.chunk(2, dim=1)[0]

    def forward(self, state: Tensor, d: Tensor) -> Tensor:
        z, u = state.chunk(2, dim=1)
        x = self.data_step(z - u, d)
        z = self.D(x + u, self.sigma)
        return torch.cat([z, u + x - z], dim=1)
