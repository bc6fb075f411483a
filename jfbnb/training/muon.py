"""Muon (Jordan et al. 2024): steps of equal length in all directions of a layer's weights.

Gradients of weights between hidden layers have nearly low rank, and so do Adam's steps. Muon steps
along the momentum's polar factor, the nearest matrix with orthonormal rows or columns, so that weak
directions are learned as well.
"""

import torch
from torch import Tensor

MOMENTUM = 0.95
LENGTH = 0.2  # root mean square of a step over the rate: about Adam's (Liu et al. 2025)
HIDDEN = 5  # a convolution with at least so many channels in and out is between hidden layers


class Muon(torch.optim.Adam):
    """Adam, except for convolutions between hidden layers, which Muon updates."""

    @torch.no_grad()
    def step(self) -> None:
        held = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() == 4 and min(p.shape[:2]) >= HIDDEN:
                    self._move(p, group["lr"])
                    held.append((p, p.grad))
                    p.grad = None  # so that Adam leaves p alone
        super().step()
        for p, gradient in held:
            p.grad = gradient

    def _move(self, p: Tensor, learning_rate: float) -> None:
        state = self.state[p]
        if not state:  # Muon needs only the first moment, but Adam expects all three
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                      "exp_avg_sq": torch.zeros_like(p)}
        momentum = state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
        ahead = p.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        p.sub_(polar_factor(ahead).view(p.shape),
               alpha=learning_rate * LENGTH * max(ahead.shape) ** 0.5)


def polar_factor(G: Tensor, iterations: int = 5) -> Tensor:
    """Approximately U V' of G = U S V', by repeated application of an odd polynomial.

    Its coefficients quickly raise small singular values to between 0.7 and 1.2, which is accurate
    enough for a step.

    Shapes: (m, n) -> (m, n).
    """
    X = G / G.norm().clamp_min(1e-12)
    X = X.mT if len(G) > G.shape[1] else X
    for _ in range(iterations):
        S = X @ X.mT
        X = 3.4445 * X + (-4.775 * S + 2.0315 * S @ S) @ X
    return X.mT if len(G) > G.shape[1] else X
