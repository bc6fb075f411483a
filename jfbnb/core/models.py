"""Trainable models, from a measurement to an image: `model(d)` is (image, SolveInfo or None).

`Equilibrium` is the implicit network of Eq. 3. `Unrolled` and `Feedforward` are explicit, with a
fixed number of layers. `Restorer` is any method, trained or not, for any operator.
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
    """A model made of a map T, and optionally a head H, another denoiser after it.

    The head makes the paper's prediction equation a network too. It acts on the solution alone, so
    it does not affect the iteration.
    """

    tolerance, max_iterations = 1e-4, 100  # of the solver, if the model has one

    def __init__(self, T: ImplicitMap):
        super().__init__()
        self.T = T
        self.register_module("H", None)

    def on(self, A: LinearOperator, prior_scale: float = 1.0) -> Self:
        """The same model, with the same weights, for another operator; see `ImplicitMap.on`."""
        other = copy.copy(self)
        other._modules = {**self._modules, "T": self.T.on(A, prior_scale)}
        return other

    @property
    def head_sigma(self) -> float | Tensor:
        """The noise level that the head receives."""
        return self.T.D.sigma

    def add_head(self, network: nn.Module | None = None) -> Self:
        """Add a head made of a network, by default a copy of the model's own; return the model."""
        self.H = Denoiser(network or copy.deepcopy(self.T.D.network), self.head_sigma)
        self.H.to(self.T.D.sigma.device)
        return self

    def apply_head(self, image: Tensor, d: Tensor) -> Tensor:
        """The head's image, computed from the model's."""
        return self.H(self.T.head_input(image, d))


class Equilibrium(Model):
    """The implicit network N(d) = x* with x* = T(x*; d), Eq. 3, solved to its tolerance."""

    def forward(self, d: Tensor) -> Result:
        state, info = solve(self.T, d, self.tolerance, self.max_iterations)
        return self.T.image(state), info


class Unrolled(Model):
    """Section 3.1: the image after `iterations` applications of T, all with the same Theta.

    Trained end to end it need not be near a fixed point of T.
    """

    def __init__(self, T: ImplicitMap, iterations: int):
        super().__init__(T)
        self.iterations = iterations

    def forward(self, d: Tensor) -> Result:
        state = unrolled(lambda z: self.T(z, d), self.T.start(d), self.iterations)
        return self.T.image(state), None


class Feedforward(Model):
    """Section 1's "standard deep neural network": D(d), or D of the Tikhonov solution.

    The second is the learned post-processing of Jin et al. (2017): an inverse first, in closed
    form, then a network that removes its artefacts. A head receives noise level 0.

    Args:
        lam: weight of Tikhonov's regulariser; None applies D to `A.guess(d)`, which is d for a
            blur.
    """

    head_sigma = 0.0

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

    It raises UserError where d is no tensor of floats.

    Args:
        restore: the method, without its head if it has one.
        base: for a method with a head, the name of the method without it.
        head: (A, image, d, noise_std) -> image. Apply it alone where `base`'s image is known.
        model: (A, noise_std) -> `Model`, for a method with a network and without a head, to solve
            it in another way.
    """

    restore: Callable[[LinearOperator, Tensor, float], Result]
    base: str = ""
    head: Callable[[LinearOperator, Tensor, Tensor, float], Tensor] | None = None
    model: Callable[[LinearOperator, float], Model] | None = None

    @torch.no_grad()
    def __call__(self, A: LinearOperator, d: Tensor, noise_std: float) -> Result:
        require_floats(d)
        y, info = self.restore(A, d, noise_std)
        return (y if self.head is None else self.head(A, y, d, noise_std)), info
