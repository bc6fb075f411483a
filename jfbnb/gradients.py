"""Differentiate a loss at the fixed point x* = T_Theta(x*). Generic in T: any module, any tensor.

A gradient method takes T and a solved x* and returns a tensor with x*'s value whose `.backward()`
leaves that method's gradient in Theta.
"""

from collections.abc import Callable

from torch import Tensor


def jfb(T: Callable[[Tensor], Tensor], x_star: Tensor) -> Tensor:
    """Jacobian-free backpropagation, Eq. 6: p = dl/dx* dT(x*)/dTheta.

    One tracked application of T at the solution: the `(I - dT/dx*)^-1` of Eq. 5 becomes I.
    Memory and time do not depend on how x* was found.
    """
    return T(x_star.detach())
