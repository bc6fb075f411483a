"""Operators of other libraries."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from jfbnb.common import UserError
from jfbnb.core.operators import LinearOperator

# --- other people's -----------------------------------------------------------------------------


class DeepinvOperator(LinearOperator):
    """Any linear operator of deepinv (Tachella et al. 2025), by its A and A_adjoint, without noise.

    Args:
        physics: a `deepinv.physics.LinearPhysics`. It is copied, and computes in its own type.

    Raises:
        UserError: if it has no A_adjoint, and so is not linear.
    """

    def __init__(self, physics: nn.Module):
        super().__init__()
        if not hasattr(physics, "A_adjoint"):
            raise UserError(f"{type(physics).__name__} has no A_adjoint: give a linear operator")
        self.physics = copy.deepcopy(physics)
        for module in self.physics.modules():  # given, not learned: as our own buffers
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
