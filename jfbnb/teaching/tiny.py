"""Notebook 4b: a network so small that its derivative in all parameters fits a dense matrix."""

import torch
from torch import Tensor, nn

from jfbnb.core.denoisers import Denoiser, DnCNN, matched_sigma
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.protocols import Protocol
from jfbnb.training.loop import TrainingConfig, train
from jfbnb.training.losses import DenoiserLoss, EquilibriumLoss, LossSettings


class Damped(SplittingMap):
    """0.8 T + 0.2 d for the splitting's T, so that its Jacobian is 0.8 times T's."""

    def forward(self, z: Tensor, d: Tensor) -> Tensor:
        return 0.8 * super().forward(z, d) + 0.2 * d


def train_tiny(protocol: Protocol, images: Tensor, seed: int, activation: nn.Module) -> Damped:
    """A damped map for 8 x 8 pixels with a DnCNN of two layers, trained with JFB; in float64.

    Args:
        images: (N, 3, H, W) uint8, to train on.
        activation: replaces the DnCNN's ReLU.
    """
    torch.manual_seed(seed)
    network = DnCNN(2, 3)
    network.layers[1] = activation
    D = Denoiser(network, matched_sigma(protocol.noise_std, 0.1))
    T = Damped(protocol.operator(8), D, 0.1)
    config = TrainingConfig(4, 16, 8, 3e-3, seed, unconverged_limit=1.0)
    settings = LossSettings(protocol.noise_std, 1e-3, 20, 4, 0.9, 1.0)
    for loss in (DenoiserLoss(D, 0.1), EquilibriumLoss(Equilibrium(T), settings)):
        train(T, loss, images, config, torch.device("cpu"), log=lambda line: None)
    return T.double()
