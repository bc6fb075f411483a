"""The maps T_Theta(x; d) whose fixed point is the reconstruction (Eq. 3). They join A and S.

`GradientMap` and `PreconditionedMap` have the same fixed points x*, where A'(A x - d) + S(x) = 0.
`SplittingMap` is the latter read elsewhere: its fixed point is z* = D(x*).
`ProximalMap` and `ADMMMap` share theirs, where x = D(x - eta A'(A x - d)): the same condition if
D were the proximal map of a regulariser, a different one for a denoiser in general.
"""

import torch
from torch import Tensor, nn

from jfbnb.networks import Regulariser


class ImplicitMap(nn.Module):
    """What the maps share. A map acts on a state, which is the image for all but ADMM."""

    def __init__(self, A: nn.Module, S: Regulariser):
        super().__init__()
        self.A, self.S = A, S

    def start(self, d: Tensor) -> Tensor:
        """The state to start the iteration from."""
        return d

    def image(self, state: Tensor) -> Tensor:
        """The image in a state."""
        return state


class SteppedMap(ImplicitMap):
    """A map with a gradient step of size eta on the data term; eta < 2, as |A'A| is almost 1."""

    def __init__(self, A: nn.Module, S: Regulariser, eta: float = 1.0):
        super().__init__(A, S)
        self.eta = eta

    def extra_repr(self) -> str:
        return f"eta={self.eta}"


class GradientMap(SteppedMap):
    """Eq. 4 (DE-GRAD): T(x; d) = x - eta (A'(A x - d) + S(x)).

    The paper writes the gradient of |A x - d|^2, whose factor 2 is taken up by eta and S here.
    With D of Lipschitz constant L < 1 it contracts, but on the directions that A hardly sees
    only at the rate 1 - eta tau (1 - L), which is next to 1.

    Shapes: x and d (B, C, H, W) -> (B, C, H, W).
    """

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.S
        return x - self.eta * (A.adjoint(A(x) - d) + S(x))


class PreconditionedMap(ImplicitMap):
    """T(x; d) = (A'A + tau I)^-1 (A'd + tau D(x)): one Newton step on the data, D elsewhere.

    It has the fixed points of Eq. 4 and contracts at the rate Lip(D) at most, however badly A is
    conditioned: the preconditioner's norm times tau is at most 1.

    Shapes: x and d (B, C, H, W) -> (B, C, H, W).
    """

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.S
        return A.solve_normal(A.adjoint(d) + S.tau * S.denoise(x), S.tau)


class SplittingMap(ImplicitMap):
    """T(z; d) = D(x), x = (A'A + tau I)^-1 (A'd + tau z): half-quadratic splitting.

    Geman and Yang (1995), with a network for the denoising half as in Zhang et al. (2017). The two
    halves are `PreconditionedMap`'s in the other order. So the equilibrium is the same, x* solves
    Eq. 4 and z* = D(x*), and so is the contraction; but the image comes out of the denoiser, and
    nothing stands between D and the loss when it is differentiated.

    Shapes: z and d (B, C, H, W) -> (B, C, H, W).
    """

    def data_step(self, z: Tensor, d: Tensor) -> Tensor:
        """x, the minimiser of |A x - d|^2 + tau |x - z|^2."""
        return self.A.solve_normal(self.A.adjoint(d) + self.S.tau * z, self.S.tau)

    def forward(self, z: Tensor, d: Tensor) -> Tensor:
        return self.S.denoise(self.data_step(z, d))

    def predict(self, z_star: Tensor, d: Tensor) -> Tensor:
        """H(x*): the head where the map has D, free to do what would not contract."""
        return self.S.predict(self.data_step(z_star, d), self.S.sigma)


class ProximalMap(SteppedMap):
    """Section 3.3 ii (DE-PROX): T(x; d) = D(x - eta A'(A x - d)).

    The paper writes S_Theta for the network that stands in for the proximal map; here that is D.
    Shapes: x and d (B, C, H, W) -> (B, C, H, W).
    """

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.S
        return S.denoise(x - self.eta * A.adjoint(A(x) - d))


class ADMMMap(ImplicitMap):
    """Section 3.3 iii (DE-ADMM), on the stacked pair of the image z and the scaled dual u.

        x = (A'A + tau I)^-1 (A'd + tau (z - u))
        z <- D(x + u)
        u <- u + x - z

    At a fixed point x = z and tau u = A'(d - A z), so z is a fixed point of `ProximalMap` with
    eta = 1 / tau. Shapes: state (B, 2 C, H, W) and d (B, C, H, W) -> (B, 2 C, H, W).
    """

    def start(self, d: Tensor) -> Tensor:
        return torch.cat([d, torch.zeros_like(d)], dim=1)

    def image(self, state: Tensor) -> Tensor:
        return state.chunk(2, dim=1)[0]

    def forward(self, state: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.S
        z, u = state.chunk(2, dim=1)
        x = A.solve_normal(A.adjoint(d) + S.tau * (z - u), S.tau)
        z = S.denoise(x + u)
        return torch.cat([z, u + x - z], dim=1)


MAPS = {"gradient": GradientMap, "proximal": ProximalMap, "admm": ADMMMap,
        "preconditioned": PreconditionedMap, "splitting": SplittingMap}
