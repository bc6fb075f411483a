"""Count the computation of a training, in applications of its network to a training crop.

A forward pass of one crop is one application. A backward pass is two: one for the gradient with
respect to the input and one for the weights. A backward pass without the weights' gradient, as in
the products with J that the exact gradient needs, is one. Unlike a time, the count is the same on
every machine, however busy.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from jfbnb.core.denoisers import Denoiser


class Meter:
    """Counts applications of the networks that it is hooked to."""

    def __init__(self) -> None:
        self.applications = 0

    def after(self, network: nn.Module, _: tuple, output: Tensor) -> None:
        """A forward hook: counts that pass, and the backward passes through its output."""
        crops = len(output)
        self.applications += crops
        if not output.requires_grad:
            return
        weight = next((p for p in network.parameters() if p.requires_grad), None)
        node = None if weight is None else get_gradient_edge(weight).node

        def backward(_: Tensor) -> None:
            # As in `register_multi_grad_hook`: is this gradient computed in this pass?
            weights = node is not None and torch._C._will_engine_execute_node(node)
            self.applications += crops * (1 + weights)

        output.register_hook(backward)


@contextmanager
def metered(module: nn.Module) -> Iterator[Meter]:
    """Count the applications of all denoisers' networks in a module, inside the `with` block.

    The second derivative that an energy needs counts as one more backward pass; it costs about two.
    """
    meter = Meter()
    networks = {D.network for D in module.modules() if isinstance(D, Denoiser)}
    handles = [network.register_forward_hook(meter.after) for network in networks]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()
