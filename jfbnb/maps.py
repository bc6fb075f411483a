"""The maps T_Theta(x; d) whose fixed point is the reconstruction (Eq. 3). They join A and S.

Both maps here have the same fixed points: where A'(A x - d) + S(x) = 0.
"""

from torch import Tensor, nn

from jfbnb.networks import Regulariser


class GradientMap(nn.Module):
    """Eq. 4 (DE-GRAD): T(x; d) = x - eta (A'(A x - d) + S(x)).

    The paper writes the gradient of |A x - d|^2, whose factor 2 is taken up by eta and S here.
    With D of Lipschitz constant L < 1 it contracts, but on the directions that A hardly sees
    only at the rate 1 - eta tau (1 - L), which is next to 1.

    Shapes: x and d (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, A: nn.Module, S: Regulariser, eta: float = 1.0):
        super().__init__()
        self.A, self.S, self.eta = A, S, eta

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.S
        return x - self.eta * (A.adjoint(A(x) - d) + S(x))


class PreconditionedMap(nn.Module):
    """T(x; d) = (A'A + tau I)^-1 (A'd + tau D(x)): one Newton step on the data, D elsewhere.

    It has the fixed points of Eq. 4 and contracts at the rate Lip(D) at most, however badly A is
    conditioned: the preconditioner's norm times tau is at most 1.

    Shapes: x and d (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, A: nn.Module, S: Regulariser):
        super().__init__()
        self.A, self.S = A, S

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        A, S = self.A, self.S
        return A.solve_normal(A.adjoint(d) + S.tau * S.denoise(x), S.tau)
