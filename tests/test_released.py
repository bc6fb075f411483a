"""The weights in data/weights do what their model card says."""

import json

import pytest
import torch

from jfbnb.datasets import bundled_photos
from jfbnb.evaluation import evaluate, summarise
from jfbnb.methods import RELEASED, make_methods
from jfbnb.operators import get_protocol, make_blur, measure


def test_released_weights_beat_tikhonov_at_equilibrium():
    setup = get_protocol("paper")
    images = bundled_photos("validation")
    A = make_blur(setup)
    x = images.as_float()
    d = measure(A, x, setup.noise_std, 0, images.indices)
    methods = make_methods(["tikhonov", "jfb"], RELEASED, torch.device("cpu"))
    summary = summarise(evaluate(methods, A, x, d, setup.noise_std, images.names)
                        ).set_index("method")
    assert summary.converged["jfb"] == 1
    assert summary.psnr["jfb"] > summary.psnr["tikhonov"] + 1
    card = json.loads((RELEASED / "jfb.json").read_text())
    if card["training data"].startswith("photographs from scikit-image"):
        assert summary.psnr["jfb"] == pytest.approx(card["validation PSNR (dB)"], abs=0.01)
