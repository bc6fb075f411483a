"""Models restore an image from a measurement: `model(d)` returns (image, SolveInfo or None).

`Equilibrium` is the implicit network of Eq. 3. `Unrolled` and `Feedforward` are explicit, with a
fixed number of layers; so is `Annealed`, which is not trained. `Restorer` is any method, trained or
not, for any operator.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from jfbnb.core.baselines import tikhonov
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import SolveInfo, solve
from jfbnb.core.gradients import unrolled
from jfbnb.core.linear_operator import LinearOperator, require_floats
from jfbnb.core.maps import ImplicitMap

Result = tuple[Tensor, SolveInfo | None]


class Model(nn.Module):
    """A model made of a map T."""

    tolerance, max_iterations = 1e-4, 100  # of the solver, if the model has one

    def __init__(self, T: ImplicitMap):
        super().__init__()
        self.T = T

    def on(self, A: LinearOperator, prior_scale: float = 1.0) -> Self:
        """The same model, with the same weights, for another operator; see `ImplicitMap.on`."""
        other = copy.copy(self)
        other._modules = {**self._modules, "T": self.T.on(A, prior_scale)}
        return other


class Equilibrium(Model):
    """The implicit network N(d) = x* with x* = T(x*; d), Eq. 3, solved to its tolerance."""

    def forward(self, d: Tensor) -> Result:
        state, info = solve(self.T, d, self.tolerance, self.max_iterations)
        return self.T.image(state), info


class Unrolled(Model):
    """Section 3.1: the image after `iterations` applications of T, all with the same Theta.

    After end-to-end training it need not be near a fixed point of T.
    """

    def __init__(self, T: ImplicitMap, iterations: int):
        super().__init__(T)
        self.iterations = iterations

    def forward(self, d: Tensor) -> Result:
        state = unrolled(lambda z: self.T(z, d), self.T.start(d), self.iterations)
        return self.T.image(state), None


class Annealed(Model):
    """Half-quadratic splitting with a falling noise level (DPIR, Zhang et al. 2021), untrained.

    The two steps of `SplittingMap`, `iterations` times, with D's noise level sigma falling from
    `first` to `last` in equal ratios and tau = weight (last / sigma)^2. It is no fixed-point
    iteration.

    Args:
        first, last: on images in [0, 1]; the last is the noise of the measurements.
    """

    def __init__(self, A: LinearOperator | None, D: Denoiser, weight: float, first: float,
                 last: float, iterations: int):
        super().__init__(ImplicitMap(A, D))
        self.weight, self.first, self.last, self.iterations = weight, first, last, iterations

    def forward(self, d: Tensor) -> Result:
        A, D = self.T.A, self.T.D
        last, z = self.last * self.T.prior_scale**0.5, A.guess(d)
        for k in range(self.iterations):
            sigma = self.first * (last / self.first) ** (k / max(1, self.iterations - 1))
            tau = self.weight * (last / sigma) ** 2
            z = D(A.solve_normal(A.adjoint(d) + tau * z, tau, z), sigma)
        return z, None


class Feedforward(Model):
    """Section 1's "standard deep neural network": D(d), or D of the Tikhonov solution.

    The second is the learned post-processing of Jin et al. (2017): a closed-form inverse, then a
    network that removes its artefacts.

    Args:
        lam: weight of Tikhonov's regulariser; None applies D to `A.guess(d)`, which is d for a
            blur.
    """

    def __init__(self, A: LinearOperator, D: Denoiser, lam: float | None = None):
        super().__init__(ImplicitMap(A, D))
        self.lam = lam

    def forward(self, d: Tensor) -> Result:
        A, lam = self.T.A, self.lam
        x = A.guess(d) if lam is None else tikhonov(A, d, self.T.prior_scale * lam)
        return self.T.D(x), None


@dataclass(frozen=True)
class Restorer:
    """A method, ready to use: (A, d, noise_std) -> (image, SolveInfo or None).

    Raises UserError if d is not a tensor of floats.

    Args:
        restore: the method.
        model: (A, noise_std) -> `Model`, for a method with a network, to change its solver.
    """

    restore: Callable[[LinearOperator, Tensor, float], Result]
    model: Callable[[LinearOperator, float], Model] | None = None

    @torch.no_grad()
    def __call__(self, A: LinearOperator, d: Tensor, noise_std: float) -> Result:
        require_floats(d)
        return self.restore(A, d, noise_std)
