"""Spectral normalisation, tried: python benchmarks/spectral.py

The paper assumes that S - I is Lipschitz with a small constant, and its code divides each layer's
weight matrix by its spectral norm, besides batch normalisation. Here the denoiser and *JFB,
splitting* of profile `quick` are trained with the former alone. The stored networks, beside them,
had the same computation, penalty and learning rate without it, and a last layer that starts at 0.
"""

from pathlib import Path

import pandas as pd
import torch
from command import ROOT, Bench, options, run
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from jfbnb.core.denoisers import NETWORKS, DnCNN
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import load_splits
from jfbnb.run.train import network_parameters, train_network
from jfbnb.teaching.figures import save_table
from jfbnb.training.equilibria import check_equilibrium
from jfbnb.training.evaluation import quality
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import load_model

CHECKED = 4  # images whose equilibrium is checked


class SpectralDnCNN(DnCNN):
    """A DnCNN whose weight matrices, (c_out, 9 c_in), have norm 1 (Miyato et al. 2018)."""

    def __init__(self, depth: int, width: int, channels: int = 3):
        super().__init__(depth, width, channels)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # that of the last is 0, which has no norm 1
                spectral_norm(layer)


def train_and_measure(bench: Bench) -> None:
    NETWORKS.append(SpectralDnCNN)
    p = network_parameters("quick", {"network": "SpectralDnCNN", "device": "cpu",
                                     "unconverged_limit": 1.0})
    for name in ("denoiser", "jfb"):
        train_network(name, p, bench.work, bench.work, "python benchmarks/spectral.py")
    setup, test = get_protocol(p["protocol"]), load_splits("bundled").test
    A, x = setup.operator(), test.as_float()
    d = measure(A, x, setup.noise_std, p["seed"], test.indices)
    rows = []
    for name, folder in (("none", ROOT / "data/weights/quick"), ("spectral", bench.work)):
        model = load_model(METHODS["jfb"], folder).on(A).eval()
        with torch.no_grad():
            found = quality(A, x, model(d))
        checked = check_equilibrium(model.T, x[:CHECKED], d[:CHECKED], test.names[:CHECKED])
        rows.append({"normalisation": name, "images": len(x), "PSNR (dB)": found["psnr"],
                     "converged": found["converged"], "checked": CHECKED,
                     "spectral radius": checked.radius.max(), "norm": checked.norm.max()})
    save_table(pd.DataFrame(rows), bench.out / "spectral",
               "JFB, splitting, of profile quick on its test images, without and with spectral "
               "normalisation of the network's layers. The spectral radius and the norm of the "
               "Jacobian are the largest of the checked images.")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build/spectral", help="of the weights")
    return run(parser.parse_args(arguments), {"spectral": train_and_measure}, lambda out: None)


if __name__ == "__main__":
    raise SystemExit(main())
