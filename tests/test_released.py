"""The released weights do what their model card says."""

import json

import pytest
import torch

from jfbnb.core import kernels
from jfbnb.core.metrics import psnr
from jfbnb.core.operators import Blur, Convolution
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import bundled_photos
from jfbnb.training.evaluation import evaluate, summarise
from jfbnb.training.restorers import BEST, RELEASED, expected_methods, make_methods


@pytest.mark.parametrize("weights", [RELEASED, BEST])
def test_released_weights_do_what_their_card_says(weights):
    setup = get_protocol("paper")
    card = json.loads((weights / "jfb.json").read_text())["measured"]["photographs"]
    images = bundled_photos("validation")[:card["images"]]
    A = setup.operator()
    x = images.as_float()
    d = measure(A, x, setup.noise_std, 0, images.indices)
    methods = {**make_methods(["tikhonov"], RELEASED, x.device),
               **make_methods(["jfb"], weights, x.device)}
    summary = summarise(evaluate(methods, A, x, d, setup.noise_std, images.names)
                        ).set_index("method")
    assert summary.converged["jfb"] == 1
    assert summary.psnr["jfb"] > summary.psnr["tikhonov"] + 1
    assert summary.psnr["jfb"] == pytest.approx(card["psnr"], abs=0.01)


def test_the_network_to_restore_with_is_the_better_one():
    """On photographs that neither was trained on, whose scenes go on, by three blurs."""
    x = bundled_photos("test").as_float()[:3]
    for A in (Blur(128, 5, 5**0.5, "unknown"), Blur(128, 9, 5**0.5, "unknown"),
              Convolution(128, kernels.motion(9, 30))):
        d = measure(A, x, 0.01, 0, range(len(x)))
        found = {}
        for weights in (RELEASED, None):
            y, info = make_methods(["jfb"], weights, x.device)["jfb"](A, d, 0.01)
            found[weights] = psnr(A.visible(y), A.visible(x)).mean()
            assert weights or info.converged.all()
        assert found[None] > found[RELEASED]


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
