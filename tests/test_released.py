"""The released weights do what their model card says."""

import json

import pytest
import torch

from jfbnb.datasets import bundled_photos
from jfbnb.evaluation import evaluate, summarise
from jfbnb.methods import RELEASED, expected_methods, make_methods
from jfbnb.metrics import psnr
from jfbnb.operators import get_protocol, measure


def test_released_weights_do_what_their_card_says():
    setup = get_protocol("paper")
    card = json.loads((RELEASED / "jfb.json").read_text())["measured"]["photographs"]
    images = bundled_photos("validation")[:card["images"]]
    A = setup.operator()
    x = images.as_float()
    d = measure(A, x, setup.noise_std, 0, images.indices)
    methods = make_methods(["tikhonov", "jfb", "jfb-head"], RELEASED, torch.device("cpu"))
    summary = summarise(evaluate(methods, A, x, d, setup.noise_std, images.names)
                        ).set_index("method")
    assert summary.converged["jfb"] == 1
    assert summary.psnr["jfb"] > summary.psnr["tikhonov"] + 1
    assert summary.psnr["jfb"] == pytest.approx(card["psnr"], abs=0.01)
    assert summary.psnr["jfb-head"] == pytest.approx(card["psnr_head"], abs=0.01)


@pytest.mark.parametrize("name", expected_methods(RELEASED))
def test_every_method_is_released(name):
    """At 32 x 32 pixels of a photograph each gives an image; what it learned is not lost."""
    setup = get_protocol("paper")
    A = setup.operator(32)
    x = bundled_photos("validation").as_float()[:1, :, 48:80, 48:80]
    d = measure(A, x, setup.noise_std, 0, [0])
    restored, _ = make_methods([name], RELEASED, torch.device("cpu"))[name](A, d, setup.noise_std)
    if name not in ("measurement", "direct-inverse"):
        assert psnr(restored, x) > psnr(d, x) + 1
