"""What a training spends, beside PyTorch's own count of operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.core.gradients import implicit, jfb, neumann, unrolled
from jfbnb.core.maps import SplittingMap
from jfbnb.core.protocols import get_protocol
from jfbnb.training.computation import metered
from jfbnb.training.losses import LossSettings
from jfbnb.training.methods import METHODS
from jfbnb.training.recipes import prepare


class Convolutions(TorchDispatchMode):
    """Their floating-point operations, forward and backward, as PyTorch counts them."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "convolution" in str(func):
            count = flop_registry[func.overloadpacket]
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        return out


def network() -> DnCNN:
    torch.manual_seed(0)
    made = DnCNN(5, 16)
    torch.nn.init.normal_(made.layers[-1].weight, std=1e-3)
    return made


def one_application(network, x) -> int:
    with torch.no_grad(), Convolutions() as whole:
        network(x[:1], 0.1)
    return whole.operations


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.loss and not m.smooth])
def test_a_step_is_counted_as_pytorch_counts_its_operations(name):
    x = torch.rand(8, 3, 24, 24)
    model, loss = prepare(METHODS[name], network(), {
        "tau": 0.06, "sigma": 0.04, "iterations": 4, "eta": 1.0, "lam": 0.004},
        get_protocol("paper").operator(24), LossSettings(0.01, 1e-3, 20))
    with metered(model) as meter, Convolutions() as whole:
        losses, _ = loss(x, (0, 1, 0, 1))
        losses.sum().backward()
    expected = whole.operations / one_application(model.T.D.network, x)
    # The first layer's gradient in the image may not be needed: a few percent of a pass.
    assert expected <= meter.applications <= 1.04 * expected


@pytest.mark.parametrize(("gradient", "spent"), [
    (jfb, 2 * 3),  # of two images: one forward pass, and a backward pass that counts twice
    (lambda T, x: unrolled(T, x, 4), 2 * 4 * 3),
    (lambda T, x: neumann(T, x, 4), 2 * (1 + 3 + 3)),  # three products with J, which count once
    (lambda T, x: implicit(T, x, 0.0, 7), 2 * (1 + 7 + 3)),
])
def test_gradients_cost_what_their_formulas_say(gradient, spent):
    x = torch.rand(2, 3, 12, 12)
    T = SplittingMap(get_protocol("paper").operator(12), Denoiser(network(), 0.04), 0.06)
    with metered(T) as meter:
        gradient(lambda z: T(z, x), x).square().sum().backward()
        torch.rand(1)
    assert meter.applications == spent
    T(x, x)
    assert meter.applications == spent  # it ends with its block


def test_nothing_but_the_forward_pass_where_nothing_is_tracked():
    D = Denoiser(network(), 0.04).requires_grad_(False)
    x = torch.rand(2, 3, 12, 12, requires_grad=True)
    with metered(D) as meter:
        with torch.no_grad():
            D(x)
        assert meter.applications == 2
        D(x).sum().backward()  # frozen weights need no gradient
        assert meter.applications == 2 + 2 + 2
