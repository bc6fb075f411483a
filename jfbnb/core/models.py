"""What can be trained: models from a measurement to an image. `model(d)` is (image, info or None).

`Equilibrium` is the implicit network of Eq. 3. Its rivals, `Unrolled` and `Feedforward`, are
explicit: a fixed number of layers from d to the image.
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
from jfbnb.core.maps import ImplicitMap
from jfbnb.core.operators import LinearOperator

Result = tuple[Tensor, SolveInfo | None]


class Model(nn.Module):
    """A map T and what is done with it; perhaps a head behind it.

    A head H, another denoiser, makes the paper's prediction equation a network too. It acts on the
    solution alone, so the iteration and its contraction know nothing of it.
    """

    tolerance, max_iterations = 1e-4, 100  # of the solver, where there is one

    def __init__(self, T: ImplicitMap):
        super().__init__()
        self.T = T
        self.register_module("H", None)

    def on(self, A: LinearOperator, prior_scale: float = 1.0) -> Self:
        """The same model, with the same weights, for another operator; `ratio` as in the maps."""
        other = copy.copy(self)
        other._modules = {**self._modules, "T": self.T.on(A, prior_scale)}
        return other

    @property
    def head_sigma(self) -> float | Tensor:
        """The noise level that a head is told."""
        return self.T.D.sigma

    def add_head(self, network: nn.Module | None = None) -> Self:
        """Give it a head made of a network, by default a copy of its own; return the model."""
        self.H = Denoiser(network or copy.deepcopy(self.T.D.network), self.head_sigma)
        self.H.to(self.T.D.sigma.device)
        return self

    def apply_head(self, image: Tensor, d: Tensor) -> Tensor:
        """H's image, made of the model's own."""
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


class Feedforward(Unrolled):
    """Section 1's "standard deep neural network": D(d), or D of the Tikhonov solution.

    The second is the learned post-processing of Jin et al. (2017): an inverse first, in closed
    form, then a network that removes its artefacts. A head is told that no noise is left.

    Args:
        lam: weight of Tikhonov's regulariser; None applies D to A's first guess, for a blur d.
    """

    head_sigma = 0.0

    def __init__(self, A: LinearOperator, D: Denoiser, lam: float | None = None):
        super().__init__(_Once(A, D, lam), 1)


class _Once(ImplicitMap):
    """A map that does not look at its state: what `Feedforward` applies, once."""

    def __init__(self, A: LinearOperator, D: Denoiser, lam: float | None):
        super().__init__(A, D)
        self.lam = lam

    def forward(self, state: Tensor, d: Tensor) -> Tensor:
        if self.lam is None:
            return self.D(state)
        return self.D(tikhonov(self.A, d, self.prior_scale * self.lam))


# --- restoring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restorer:
    """A method, ready to use: (A, d, noise_std) -> (image, what its solver says or None).

    One with a head is the method `base` and what the head makes of its image, (A, y, d, noise_std)
    -> image. Whoever has the first's image already need not solve for it again. One without a head
    that has a network has its `model` too, (A, noise_std) -> `Model`, to be solved in another way.
    """

    restore: Callable[[LinearOperator, Tensor, float], Result]
    base: str = ""
    head: Callable[[LinearOperator, Tensor, Tensor, float], Tensor] | None = None
    model: Callable[[LinearOperator, float], Model] | None = None

    @torch.no_grad()
    def __call__(self, A: LinearOperator, d: Tensor, noise_std: float) -> Result:
        y, info = self.restore(A, d, noise_std)
        return (y if self.head is None else self.head(A, y, d, noise_std)), info
