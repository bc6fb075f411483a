"""Differentiate a loss at the fixed point x* = T_Theta(x*), for any module T and any tensor x.

A gradient method takes T and a solved x*, and returns a tensor with the value of T(x*). Its
`.backward()` computes the method's gradient in Theta. With J = dT/dx at x* and the loss's gradient
g, the exact one is `g (I - J)^-1 dT/dTheta` (Eq. 5). The methods differ in what replaces the
inverse.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from jfbnb.core.fixed_point import SolveInfo, anderson

Map = Callable[[Tensor], Tensor]


def jfb(T: Map, x_star: Tensor) -> Tensor:
    """Jacobian-free backpropagation, Eq. 6: I replaces the inverse.

    It tracks one application of T at the solution. Memory and time do not depend on how x* was
    found.

    >>> import jfbnb, torch
    >>> a = torch.tensor(0.5, requires_grad=True)
    >>> jfbnb.jfb(lambda x: a * x + 1, torch.tensor(2.0)).backward()
    >>> a.grad  # dT/da = x*; the exact derivative of x* = 1 / (1 - a) is 4
    tensor(2.)
    """
    return T(x_star.detach())


def neumann(T: Map, x_star: Tensor, terms: int) -> Tensor:
    """The first `terms` terms of the Neumann series, Eq. 7: I + J + ... + J^(terms - 1).

    One term is JFB; each further term costs a vector-Jacobian product.

    Raises:
        ValueError: if terms is below 1.
    """
    if terms < 1:
        raise ValueError(f"terms is {terms}: at least the first is needed")

    def backward(g: Tensor, vjp: Map) -> Tensor:
        total = term = g
        for _ in range(terms - 1):
            term = vjp(term)
            total = total + term
        return total

    return _attach(T, x_star, backward)


def implicit(T: Map, x_star: Tensor, tolerance: float = 1e-6, max_iterations: int = 100,
             report: Callable[[SolveInfo], None] | None = None) -> Tensor:
    """Implicit differentiation, Eq. 5: the adjoint equation y = g + y J, solved iteratively.

    Args:
        tolerance, max_iterations: of the solve, by Anderson acceleration.
        report: called in the backward pass with the solver's report.
    """

    def backward(g: Tensor, vjp: Map) -> Tensor:
        y, info = anderson(lambda y: g + vjp(y), g, tolerance, max_iterations)
        if report is not None:
            report(info)
        return y

    return _attach(T, x_star, backward)


def unrolled(T: Map, x: Tensor, iterations: int) -> Tensor:
    """Deep unrolling, section 3.1: track `iterations` applications of T from x.

    Exact for the truncated iteration; memory grows with every application.
    """
    for _ in range(iterations):
        x = T(x)
    return x


def _attach(T: Map, x_star: Tensor, backward: Callable[[Tensor, Map], Tensor]) -> Tensor:
    """T(x*), tracked in Theta, whose incoming gradient g is replaced by backward(g, y -> y J)."""
    x = x_star.detach().requires_grad_()
    with torch.enable_grad():
        image = T(x)  # a separate graph, for the products with J

    def vjp(y: Tensor) -> Tensor:
        return torch.autograd.grad(image, x, y, retain_graph=True)[0]

    output = T(x_star.detach())
    if output.requires_grad:
        output.register_hook(lambda g: backward(g, vjp))
    return output
