"""Measurements at a map's fixed point: Jacobians, and gradients with respect to the weights."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs, eigsh, svds
from torch import Tensor

from jfbnb.core.fixed_point import SolveInfo
from jfbnb.core.gradients import implicit, neumann
from jfbnb.core.maps import ImplicitMap

Gradient = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def parameter_gradient(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor,
                       gradient: Gradient) -> Tensor:
    """The gradient of the mean squared error with respect to all of Theta, as one vector.

    The parameters' `.grad` is left alone.

    Args:
        state: the solved fixed point.
        d, truth: the measurement (B, *range), and the true image (B, C, H, W).
        gradient: (T, x*) -> tracked output, as in `jfbnb.core.gradients`.
    """
    output = T.image(gradient(lambda z: T(z, d), state))
    parts = torch.autograd.grad((output - truth).square().mean(), list(T.parameters()))
    return torch.cat([part.flatten() for part in parts])


def neumann_cosines(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor, terms: list[int],
                    exact: Tensor) -> list[float]:
    """Cosine of the angle between the Neumann-k gradient (Eq. 7) and the exact one, for each k.

    k = 1 is JFB. With a positive cosine the method descends.
    """
    return [torch.cosine_similarity(
        parameter_gradient(T, state, d, truth, partial(neumann, terms=k)), exact, dim=0
    ).item() for k in terms]


def exact_gradient(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor,
                   tolerance: float = 1e-6, max_iterations: int = 200) -> tuple[Tensor, SolveInfo]:
    """The implicit gradient (Eq. 5), and the report of the adjoint equation's solver."""
    reports: list[SolveInfo] = []
    gradient = parameter_gradient(T, state, d, truth, partial(
        implicit, tolerance=tolerance, max_iterations=max_iterations, report=reports.append))
    return gradient, reports[0]


class Jacobian:
    """The derivative J of a tracked output with respect to some inputs, as products with vectors.

    Args:
        inputs: tensors of the output's graph, e.g. (x*,) or all of Theta.
    """

    def __init__(self, output: Tensor, inputs: Sequence[Tensor]):
        self.output, self.inputs = output, inputs
        with torch.enable_grad():
            # u J is linear in u, and its derivative along v is J v.
            self.u = torch.zeros_like(output, requires_grad=True)
            self.uJ = torch.autograd.grad(output, inputs, self.u, create_graph=True)

    def times(self, *v: Tensor) -> Tensor:
        """J v, with one part of v for each input."""
        return torch.autograd.grad(self.uJ, self.u, v, retain_graph=True)[0]

    def transposed_times(self, u: Tensor) -> tuple[Tensor, ...]:
        """J' u, one part for each input."""
        return torch.autograd.grad(self.output, self.inputs, u, retain_graph=True)


def spectral_radius(T: ImplicitMap, x_star: Tensor, d: Tensor, tolerance: float = 1e-2,
                    seed: int = 0) -> tuple[Tensor, Tensor]:
    """The spectral radius of J = dT/dx at x*, by Arnoldi's method, and its eigenvector's residual.

    If the spectral radius is below 1, x* is locally stable: small deviations decay eventually. The
    estimate may err either way: a random start may contain too little of an eigenvector, and J is
    not symmetric, so a small residual does not bound the error. An estimate below 1 is no proof.

    Args:
        tolerance: of ARPACK's stopping rule, relative to the radius.
        seed: of the random start.

    Returns:
        The radius, and the residual |J v - lambda v| of its unit eigenvector v, each (B,); NaN if
        Arnoldi's method does not converge.
    """
    found = []
    for J in _operators(T, x_star, d):
        try:
            (value,), vector = eigs(J, 1, v0=_start(J, seed), tol=tolerance, maxiter=100)
        except ArpackNoConvergence:
            found.append((np.nan, np.nan))
            continue
        v = vector[:, 0]
        found.append((abs(value), np.linalg.norm(J @ v.real + 1j * (J @ v.imag) - value * v)))
    radius, residual = torch.tensor(found, dtype=torch.float64).T
    return radius, residual


def jacobian_norm(T: ImplicitMap, x_star: Tensor, d: Tensor, tolerance: float = 1e-2,
                  seed: int = 0) -> Tensor:
    """The largest singular value of J at x*, (B,), by Lanczos' method: a lower bound.

    A norm above 1 shows that T is no contraction near x* in the Euclidean norm. A lower bound below
    1 proves nothing. Arguments as in `spectral_radius`.
    """
    return torch.cat([torch.from_numpy(svds(J, 1, v0=_start(J, seed), tol=tolerance,
                                            return_singular_vectors=False).copy())
                      for J in _operators(T, x_star, d)])


def _operators(T: ImplicitMap, x_star: Tensor, d: Tensor) -> Iterator[LinearOperator]:
    """Each image's Jacobian dT/dx, for SciPy."""
    for x, own in zip(x_star.split(1), d.split(1), strict=True):
        x, image = _tracked(T, x, own)
        J = Jacobian(image, (x,))
        yield LinearOperator((x.numel(),) * 2, _flat(J.times, x), dtype=np.float64,
                             rmatvec=_flat(lambda u, J=J: J.transposed_times(u)[0], x))


def _tracked(T: ImplicitMap, x_star: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """x* as the beginning of a graph, and T(x*; d) as its end."""
    x = x_star.detach().requires_grad_()
    with torch.enable_grad():
        return x, T(x, d)


def _flat(apply: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """A function of tensors like x, as one of SciPy's vectors."""
    def product(v: np.ndarray) -> np.ndarray:
        return apply(torch.from_numpy(v).to(x).view_as(x)).double().flatten().cpu().numpy()

    return product


def _start(J: LinearOperator, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(J.shape[0])


def parameter_jacobian(T: ImplicitMap, state: Tensor, d: Tensor) -> Tensor:
    """M = dT/dTheta at a fixed point, as a dense matrix (values in the state, parameters).

    For small networks. JFB descends if T is a contraction with factor gamma and continuously
    differentiable in Theta, and M M' is invertible with a condition number of at most 1 / gamma
    (the paper's section 4, whose M is the transpose; after Wu Fung et al. 2022). A ReLU network has
    kinks, and one with fewer weights than the state has values has a singular M M'.
    """
    parameters = dict(T.named_parameters())

    def apply(theta: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(T, theta, (state, d)).flatten()

    columns = torch.func.jacrev(apply)(parameters)
    return torch.cat([columns[name].reshape(state.numel(), -1) for name in parameters], dim=1)


def worst_loss(T: ImplicitMap, x_star: Tensor, d: Tensor, tolerance: float = 0.1,
               seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A linear loss <v, x*> that rises in JFB's direction if any does, and its two gradients.

    With M = dT/dTheta at x*, JFB's gradient is M'v and the exact one M'w, where v = (I - J')w.
    Their product is w'Bw with B = (I - J)MM'. Lanczos' method finds the unit vector w for which it
    is smallest. Where it is negative, a step against JFB's gradient goes uphill.

    Args:
        x_star: the fixed point for one image (1, ...).
        tolerance, seed: of Lanczos' method, as in `jacobian_norm`.

    Returns:
        v like x_star; JFB's gradient and the exact one, each one vector over all of Theta.
    """
    x, image = _tracked(T, x_star, d)
    J, M = Jacobian(image, (x,)), Jacobian(image, tuple(T.parameters()))

    def symmetric(w: Tensor) -> Tensor:  # (B + B')w
        y, v = M.times(*M.transposed_times(w)), w - J.transposed_times(w)[0]
        return y - J.times(y) + M.times(*M.transposed_times(v))

    B = LinearOperator((x.numel(),) * 2, _flat(symmetric, x), dtype=np.float64)
    _, vectors = eigsh(B, 1, which="SA", v0=_start(B, seed), tol=tolerance)
    w = torch.from_numpy(vectors).to(x).view_as(x)
    v = w - J.transposed_times(w)[0]
    return v, *(torch.cat([part.flatten() for part in M.transposed_times(g)]) for g in (v, w))
