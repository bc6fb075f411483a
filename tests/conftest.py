"""Small things to test with: an image folder, a weights folder, a map that contracts."""

import os
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

from jfbnb import data as datasets
from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.core.maps import (
    ADMMMap,
    GradientMap,
    ImplicitMap,
    PreconditionedMap,
    ProximalMap,
    SplittingMap,
)
from jfbnb.core.operators import Blur, LinearOperator
from jfbnb.training.methods import METHODS
from jfbnb.training.tuning import Tuning
from jfbnb.training.weights import save_weights

MAPS = (GradientMap, PreconditionedMap, SplittingMap, ProximalMap, ADMMMap)

# The tensors here are too small to share out, and those of the processes that tests start: where
# two tests run at a time, twice as many threads as cores would take several times as long.
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    """Tests keep their decoded images to themselves."""
    monkeypatch.setattr(datasets, "CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Six JPEGs of 178 x 218 pixels, CelebA's size, cut from a photograph."""
    folder = tmp_path / "images"
    folder.mkdir()
    photo = Image.fromarray(skimage.data.astronaut())
    for i in range(6):
        crop = photo.crop((40 * i, 30 * i, 40 * i + 178, 30 * i + 218))
        crop.save(folder / f"{i + 1:06d}.jpg", quality=95)
    return folder


@pytest.fixture
def weights(tmp_path) -> Path:
    """A folder like runs/quick, with untrained networks of two layers."""
    torch.manual_seed(0)
    folder, tuning = tmp_path / "weights", make_tuning()
    save_weights(folder / "denoiser.safetensors", Denoiser(DnCNN(2, 4), 0.04), {})
    for method in METHODS.values():
        if method.trainable:
            model = method.build(None, DnCNN(2, 4), tuning.settings(method))
            save_weights(folder / f"{method.name}.safetensors", model, {
                "settings": tuning.settings(method), "noise_std": tuning.noise_std})
    tuning.save(folder / "tuning.json")
    return folder


def make_tuning() -> Tuning:
    prior = {"tau": 0.05, "sigma": 0.04}
    chosen = {"tikhonov": {"lam": 0.016}, "gradient-descent": {"steps": 20, "step_size": 1.0},
              "total-variation": {"weight": 1e-3}, "plug-and-play": prior,
              "feedforward": {"sigma": 0.04}, "feedforward-tikhonov": {"lam": 0.005, "sigma": 0.04},
              "unrolled": {**prior, "iterations": 3}, "de-grad": {**prior, "eta": 1.0},
              "de-prox": {"sigma": 0.04, "eta": 1.0}, "plug-and-play-admm": prior,
              "annealed": {"weight": 0.5, "first": 0.1, "last": 0.01, "iterations": 8}}
    return Tuning(noise_std=0.01, images=1, chosen=chosen, searches={})


class Contractive(DnCNN):
    """R(x) = x / 2 + a small DnCNN: nonlinear, and D = I - R contracts."""

    taken = 0.5

    def forward(self, x, sigma):
        return self.taken * x + super().forward(x, sigma)


class Scale(torch.nn.Module):
    """R(x) = (1 - factor) x, so that D(x) = factor x and everything has a closed form."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x, sigma):
        return (1 - self.factor) * x


@pytest.fixture
def problem() -> tuple[Blur, Denoiser, torch.Tensor]:
    """A blur, a small denoiser in float64 that contracts, and a measurement."""
    torch.manual_seed(0)
    network = Contractive(3, 8)
    torch.nn.init.normal_(network.layers[-1].weight, std=0.01)
    D = Denoiser(network, 0.05).double()
    A = Blur(16, 5, 1.0)
    d = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    return A, D, d


def make_map(kind: type[ImplicitMap], A: LinearOperator, D: Denoiser,
             tau: float = 0.3) -> ImplicitMap:
    """Any of the maps, as exact as its denoiser; the proximal one has no tau."""
    return (kind(A, D) if kind is ProximalMap else kind(A, D, tau)).to(D.sigma)
