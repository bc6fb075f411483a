"""Explicit networks: a fixed number of layers from d to the image. The rivals of Eq. 3."""

from torch import Tensor

from jfbnb.baselines import tikhonov
from jfbnb.gradients import unrolled
from jfbnb.maps import ImplicitMap
from jfbnb.networks import Regulariser
from jfbnb.operators import Blur


def feedforward(A: Blur, S: Regulariser, d: Tensor, lam: float | None = None) -> Tensor:
    """Section 1's "standard deep neural network": D(d), or D of the Tikhonov solution.

    The second is the learned post-processing of Jin et al. (2017): an inverse first, in closed
    form, then a network that removes its artefacts.

    Args:
        d: measurements (B, C, H, W).
        lam: weight of Tikhonov's regulariser; None applies D to d itself.
    """
    return S.denoise(d if lam is None else tikhonov(A, d, lam))


def feedforward_head(S: Regulariser, y: Tensor) -> Tensor:
    """H(y): the head behind `feedforward`, told that no noise is left in y."""
    return S.predict(y, 0.0)


def deep_unrolling(T: ImplicitMap, d: Tensor, iterations: int) -> Tensor:
    """Section 3.1: the image after `iterations` applications of T, all with the same Theta.

    Trained end to end it need not be near a fixed point of T.
    """
    state: Tensor = unrolled(lambda z: T(z, d), T.start(d), iterations)
    return T.image(state)
