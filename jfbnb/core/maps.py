"""The maps T_Theta(x; d) whose fixed point is the reconstruction (Eq. 3). They join A and D.

`GradientMap` and `PreconditionedMap` have the same fixed points x*, where
A'(A x - d) + tau (x - D(x)) = 0. `SplittingMap` is the latter read elsewhere: its fixed point is
z* = D(x*). `ProximalMap` and `ADMMMap` share theirs, where x = D(x - eta A'(A x - d)): the same
condition if D were the proximal map of a regulariser, a different one for a denoiser in general.
"""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from jfbnb.core.denoisers import Denoiser
from jfbnb.core.descent import descent
from jfbnb.core.fixed_point import Solver, anderson
from jfbnb.core.operators import LinearOperator
from jfbnb.core.precision import precision


class ImplicitMap(nn.Module):
    """What the maps share. A map acts on a state, which is the image for all but ADMM.

    A subclass has a `name` and a `colour`, the same in every figure, and `forward(state, d)`.
    """

    name: str
    colour: str
    solver: Solver = staticmethod(anderson)
    scale: float | Tensor = 1.0  # of its steps: a solver's tolerance is multiplied by it

    def __init__(self, A: LinearOperator | None, D: Denoiser):
        super().__init__()
        self.register_module("A", A)  # None where the operator is told later, by `on`
        self.D = D
        self.prior_scale = 1.0

    def on(self, A: LinearOperator, prior_scale: float = 1.0) -> Self:
        """The same map, with the same weights, for another operator.

        It shares all but the operator: copy it deeply before you change its type or device.

        Args:
            ratio: how many times as much the prior weighs; where the map has a tau, it is
                multiplied by this.
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

    def head_input(self, image: Tensor, d: Tensor) -> Tensor:
        """What a head behind the map is given: the image, or what D was given last."""
        return image


class WeightedMap(ImplicitMap):
    """A map whose denoiser weighs tau > 0 against the data.

    tau is learned, as its logarithm; and so is how it follows the noise, with the power `follow` of
    the ratio that `on` is told. The denoiser is told the noise level that goes with it, as
    `networks.matched_sigma` has it: with a power of 1 that is the same for every noise.
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
        """What the denoiser is told."""
        return self.D.sigma * self.prior_scale ** ((1 - self.noise_exponent) / 2)

    def data_step(self, z: Tensor, d: Tensor) -> Tensor:
        """(A'A + tau I)^-1 (A'd + tau z): the minimiser of |A x - d|^2 + tau |x - z|^2."""
        return self.A.solve_normal(self.A.adjoint(d) + self.tau * z, self.tau, z)


class GradientMap(WeightedMap):
    """Eq. 4 (DE-GRAD): T(x; d) = x - eta (A'(A x - d) + S(x)), with S(x) = tau (x - D(x)).

    The paper writes the gradient of |A x - d|^2, whose factor 2 is taken up by eta and S here.
    If |A| <= 1 and D has a Lipschitz constant L < 1, then 0 < eta < 2 / (1 + tau (1 + L)) suffices
    for a contraction. For |A| = 1 no larger bound does: D may be -L where A keeps an image as it
    is. On what A hardly sees the error may shrink by 1 - eta tau (1 - L) alone, next to 1.

    Shapes: x (B, C, H, W), d (B, *range) -> (B, C, H, W).
    """

    name, colour = "Eq. 4", "#C51B7D"

    def __init__(self, A: LinearOperator, D: Denoiser, tau: float, eta: float = 1.0):
        super().__init__(A, D, tau)
        self.eta = eta

    def extra_repr(self) -> str:
        return f"eta={self.eta}"

    @property
    def scale(self) -> Tensor:
        """eta tau: on what A hardly sees its steps are so many times the preconditioned map's."""
        return self.eta * self.tau.detach()

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.tau * self.D.residual(x, self.sigma)
        return x - self.eta * (A.adjoint(A(x) - d) + S)


class PreconditionedMap(WeightedMap):
    """T(x; d) = (A'A + tau I)^-1 (A'd + tau D(x)): one Newton step on the data, D elsewhere.

    It has the fixed points of Eq. 4. If D has a Lipschitz constant L < 1 it is a contraction by L
    or better, however badly A is conditioned: the preconditioner's norm times tau is at most 1. If
    D has none, as networks mostly do not, nothing of the kind is sure.

    Shapes: x (B, C, H, W), d (B, *range) -> (B, C, H, W).
    """

    name, colour = "preconditioned", "#661100"

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        return self.data_step(self.D(x, self.sigma), d)


class SplittingMap(WeightedMap):
    """T(z; d) = D(x), x = (A'A + tau I)^-1 (A'd + tau z): half-quadratic splitting.

    Geman and Yang (1995), with a network for the denoising half as in Zhang et al. (2017). The two
    halves are `PreconditionedMap`'s in the other order. So the equilibrium is the same, x* solves
    Eq. 4 and z* = D(x*), and so is the spectral radius of the Jacobian there; but the image comes
    out of the denoiser, and nothing stands between D and the loss when it is differentiated.

    Shapes: z (B, C, H, W), d (B, *range) -> (B, C, H, W).
    """

    name, colour = "splitting", "#0072B2"

    def forward(self, z: Tensor, d: Tensor) -> Tensor:
        return self.D(self.data_step(z, d), self.sigma)

    def head_input(self, image: Tensor, d: Tensor) -> Tensor:
        """x*, so that a head stands where the map has D, free to do what would not be stable."""
        return self.data_step(image, d)


class EnergyMap(SplittingMap):
    """The splitting map of a denoiser that is a gradient step: D(x) = x - grad g(x).

    The gradient-step denoiser of Hurault et al. (2022), with g(x) = |R(x)|^2 / 2 of the network R,
    so D(x) = x - J_R(x)' R(x). Then x* is a stationary point of the energy
    E(x) = |A x - d|^2 / 2 + tau g(x), and T goes downhill: x moves by -(A'A + tau I)^-1 grad E(x).
    So `descent` arrives in the end, whatever the image, the operator and the weights, with a
    network whose derivative is continuous: `UNet`'s is, `DnCNN`'s jumps where a ReLU switches, and
    E may have a minimum in such a kink, where no gradient is small. An evaluation costs a forward
    and a backward pass of the network.
    """

    name, colour = "energy", "#882255"
    solver = staticmethod(descent)

    def data_step(self, z: Tensor, d: Tensor) -> Tensor:
        """The same, from z or from 0, whichever is nearer: rounding counts |A|^2 / tau times."""
        from_z, from_0 = self.A.adjoint(d - self.A(z)), self.A.adjoint(d) + self.tau * z
        near = (_square(from_z) < _square(from_0)).view(-1, 1, 1, 1)
        x = self.A.solve_normal(torch.where(near, from_z, from_0), self.tau)
        return torch.where(near, z, 0) + x

    def forward(self, z: Tensor, d: Tensor) -> Tensor:
        x = self.data_step(z, d)
        return x - self.prior(x)[1]

    def energy(self, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T(z), E at the x of the data step, and a rate at which E falls towards T(z) at least.

        With r = T(z) - z and M = A'A + tau I the rate is tau^2 r'M^-1 r, and by Cauchy and Schwarz
        that is at least tau^2 |r|^4 / r'M r, for any A. In float32 whatever T is in: E's
        differences would drown in bfloat16's rounding.
        """
        with precision(self, False):
            x = self.data_step(z, d)
            g, slope = self.prior(x)
        f, tau = x - slope, self.tau.double()
        r = f - z
        size = _square(r)
        bent = (_square(self.A(r)) + tau * size).clamp_min(torch.finfo(tau.dtype).tiny)
        return f, _square(self.A(x) - d) / 2 + tau * g, (tau * size) ** 2 / bent

    def metric(self, v: Tensor) -> Tensor:
        """tau^2 (A'A + tau I)^-1 v: of z - T(z) it is E's gradient in z."""
        return self.tau**2 * self.A.solve_normal(v, self.tau)

    def prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x), (B,) in float64, and its gradient; the gradient is tracked where x would be."""
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if tracked and x.requires_grad else x.detach().requires_grad_()
            g = _square(self.D.residual(x, self.sigma)) / 2
            (slope,) = torch.autograd.grad(g.sum(), x, create_graph=tracked)
        return g, slope


def _square(v: Tensor) -> Tensor:
    """|v|^2 of each image, (B,), in float64."""
    return v.double().square().flatten(1).sum(dim=1)


class ProximalMap(ImplicitMap):
    """Section 3.3 ii (DE-PROX): T(x; d) = D(x - eta A'(A x - d)), for 0 < eta <= 2 / |A'A|.

    The paper writes S_Theta for the network that stands in for the proximal map; here that is D.
    With such an eta the gradient step stretches nothing, so T is as stable as D makes it.
    Shapes: x (B, C, H, W), d (B, *range) -> (B, C, H, W).
    """

    name, colour = "proximal", "#4D9221"

    def __init__(self, A: LinearOperator, D: Denoiser, eta: float = 1.0):
        super().__init__(A, D)
        self.eta = eta

    def extra_repr(self) -> str:
        return f"eta={self.eta}"

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
