"""Use linear operators of deepinv (Tachella et al. 2025) here, and ours in deepinv."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from jfbnb.common import UserError
from jfbnb.core.linear_operator import LinearOperator


class DeepinvOperator(LinearOperator):
    """A linear operator of deepinv: its A and A_adjoint, without its noise.

    Args:
        physics: a `deepinv.physics.LinearPhysics`. It is copied, and computes in its own dtype.

    Raises:
        UserError: if it has no A_adjoint, so is not linear.
    """

    def __init__(self, physics: nn.Module):
        super().__init__()
        if not hasattr(physics, "A_adjoint"):
            raise UserError(f"{type(physics).__name__} has no A_adjoint: give a linear operator")
        self.physics = copy.deepcopy(physics)
        for module in self.physics.modules():  # constants, not weights: as our own buffers
            for name, tensor in [*module.named_parameters(recurse=False),
                                 *module.named_buffers(recurse=False)]:
                delattr(module, name)
                module.register_buffer(name, tensor.detach(), persistent=False)

    def extra_repr(self) -> str:
        return type(self.physics).__name__

    def _in_its_type(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        own = max((b.dtype for b in self.physics.buffers() if b.is_floating_point()),
                  key=lambda dtype: dtype.itemsize, default=x.dtype)
        return apply(x.to(own)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._in_its_type(self.physics.A, x)

    def adjoint(self, d: Tensor) -> Tensor:
        return self._in_its_type(self.physics.A_adjoint, d)


def to_deepinv(A: LinearOperator) -> nn.Module:
    """Wrap A as a `deepinv.physics.LinearPhysics` without noise, for deepinv's algorithms.

    `A_dagger` and `prox_l2` are deepinv's iterative solvers. The physics shares A: moving the
    physics to a device moves A. It cannot be pickled.
    """
    from deepinv.physics import LinearPhysics

    class Physics(LinearPhysics):
        def __init__(self) -> None:
            super().__init__()
            self.operator = A

        def A(self, x: Tensor, **_: object) -> Tensor:
            return self.operator(x)

        def A_adjoint(self, y: Tensor, **_: object) -> Tensor:
            return self.operator.adjoint(y)

    return Physics()
