"""What others add from outside the package, in at most 15 lines each, runs through all of it."""

import importlib.util
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import solve
from jfbnb.core.maps import SplittingMap, WeightedMap
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Blur, Inpainting, LinearOperator
from jfbnb.core.protocols import Protocol, measure
from jfbnb.data import Splits, bundled_photos
from jfbnb.teaching.conditions import Condition, evaluate_conditions
from jfbnb.teaching.figures import learning_curves
from jfbnb.teaching.tables import table2
from jfbnb.training.equilibria import check_equilibrium
from jfbnb.training.evaluation import evaluate, summarise
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import EquilibriumLoss, LossSettings
from jfbnb.training.methods import METHODS
from jfbnb.training.recipes import (
    Run,
    prepare,
    train_denoiser,
    train_method,
    trainings,
    validation_problem,
)
from jfbnb.training.restorers import RELEASED, expected_methods, make_methods
from jfbnb.training.tuning import Tuning, tune
from jfbnb.training.weights import load_denoiser

CPU = torch.device("cpu")
BRIEF = TrainingConfig(epochs=20, batch_size=4, crop=16, learning_rate=5e-5, seed=0,
                       unconverged_limit=1.0)
LOSSES = LossSettings(0.01, tolerance=1e-3, max_iterations=12)
MOST = 15  # lines


class Means(LinearOperator):
    """The mean of every 2 x 2 pixels: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def forward(self, x):
        return F.avg_pool2d(x, 2)

    def adjoint(self, d):
        return d.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2) / 4


class Relaxed(WeightedMap):
    """The splitting, of which each step goes half of the way."""

    name, colour = "relaxed", "#123456"

    def forward(self, z, d):
        return 0.5 * z + 0.5 * self.D(self.data_step(z, d))


def two_terms(T, x_star):
    """Two terms of the Neumann series, by backpropagation through two applications."""
    return T(T(x_star.detach()))


NETWORK = '''
import torch
from torch import nn

class Shrinking(nn.Module):
    """A denoiser of one convolution in each direction."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.there, self.back = nn.Conv2d(3, width, 5, padding=2), nn.Conv2d(width, 3, 5, padding=2)

    def forward(self, x, sigma):
        return 0.1 * self.back(torch.tanh(self.there(x)))
'''
METHOD = '''
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Unrolled
from jfbnb.training.losses import ExplicitLoss
from jfbnb.training.methods import Method, prior, register

register(Method(
    name="mine", label="My own", colour="#ABCDEF", candidates=prior,
    model=lambda A, D, s: Unrolled(SplittingMap(A, D, s["tau"]), 2), loss=ExplicitLoss))
'''


@pytest.mark.parametrize("text", [*map(inspect.getsource, (Means, Relaxed, two_terms)), NETWORK,
                                  METHOD])
def test_none_of_it_is_long(text):
    assert len(text.strip().splitlines()) <= MOST


@pytest.fixture(scope="module")
def splits() -> Splits:
    photos = bundled_photos("validation", 32)
    return Splits(photos[:8], photos[8:10], photos[10:12], "photographs")


def trained(method, network, settings, problem):
    """Train it for a moment: the loss on the same crops and the same noise must fall."""
    x = problem.splits.train.as_float()[..., 8:24, 8:24]
    before = prepare(method, network, settings, problem.setup.operator(16), LOSSES)[1]
    model, card = train_method(method, network, settings, problem, BRIEF, LOSSES,
                               Run(CPU, log=str.encode))
    first, last = (loss(x, (9,))[0].mean().item()
                   for loss in (before, method.loss(model, LOSSES)))
    assert last < first, method.name
    return model, pd.DataFrame(card["history"])


@pytest.mark.parametrize("make, shape, gain, to_train", [
    # A start of an operator that has no other is a least-squares fit, close to what can be had.
    (lambda size: Means(), (16, 16), 0.3, ("jfb", "unrolled", "feedforward-tikhonov")),
    (partial(Blur, kernel_size=5, kernel_std=5**0.5, border="unknown"), (28, 28), 3, ("jfb",)),
])
def test_an_operator(splits, make, shape, gain, to_train):
    """Restored by every method but the direct inverse, trained with, its equilibrium checked."""
    assert make(32).check_adjoint(3, 32, 32) < 1e-12
    setup = Protocol("another", 32, make, 0.01)
    problem = validation_problem(setup, splits, 2, 0, CPU)
    assert problem.d.shape == (2, 3, *shape)
    names = [name for name in expected_methods(RELEASED) if name != "direct-inverse"]
    table = evaluate(make_methods(names, RELEASED, CPU), problem.A, problem.x, problem.d, 0.01,
                     ["a", "b"])
    psnr = table.groupby("method").psnr.mean()
    assert set(psnr.index) == set(names) and psnr["jfb"] > psnr["measurement"] + gain
    assert psnr["jfb"] > psnr["tikhonov"] + 4
    tuning = Tuning.load(RELEASED / "tuning.json")
    network = load_denoiser(RELEASED / "denoiser.safetensors").network
    for name in to_train:
        trained(METHODS[name], network, tuning.settings(METHODS[name]), problem)
    T = METHODS["jfb"].build(problem.A, network, tuning.settings(METHODS["jfb"])).T
    found = check_equilibrium(T, problem.x, problem.d, ["a", "b"], further=20)
    assert found.radius.between(0, 1.5).all()


class Known(LinearOperator):
    """The values where a mask is 1, written as the documentation asks for."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.mask * x

    def adjoint(self, d):
        return self.mask * d


def bayer(row: int, column: int) -> torch.Tensor:
    """The mask of a mosaic of colours with red at that row and column of each 2 x 2 pixels."""
    mask = torch.zeros(3, 64, 64)
    mask[0, row::2, column::2] = mask[2, 1 - row::2, 1 - column::2] = 1
    mask[1] = 1 - mask[0] - mask[2]
    return mask


@pytest.mark.parametrize("mask", [
    *(bayer(row, column) for row in (0, 1) for column in (0, 1)),
    (torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.2).float()],
    ids=["RGGB", "GRBG", "GBRG", "BGGR", "one pixel in five"])
def test_what_is_known_at_some_pixels_is_restored_as_by_the_class_for_it(mask):
    x = bundled_photos("test").as_float()[2:3, :, :64, :64]
    d = measure(Known(mask), x, 0.01, 0, [0]) * mask
    jfb = make_methods(["jfb"], None, CPU)["jfb"]
    (own, info), (other, _) = (jfb(A, d, 0.01) for A in (Known(mask), Inpainting(mask)))
    assert info.converged.all() and info.iterations.max() <= 60
    assert (psnr(own, x) - psnr(other, x)).abs() < 0.3
    assert psnr(own, x) > psnr(Known(mask).guess(d), x)


def test_a_network(splits, tmp_path):
    (tmp_path / "shrinking.py").write_text(NETWORK)
    spec = importlib.util.spec_from_file_location("shrinking", tmp_path / "shrinking.py")
    sys.modules["shrinking"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    network = module.Shrinking(4)
    config = replace(BRIEF, epochs=6, learning_rate=1e-2)
    _, history = train_denoiser(network, splits, config, 0.1,
                                Run(CPU, tmp_path, log=str.encode))
    assert history.loss.tail(3).mean() < history.loss.head(3).mean()
    again = Run(CPU, tmp_path / "again", weights=tmp_path, log=str.encode)
    train_denoiser(module.Shrinking(4), splits, config, 0.1, again)
    for name in ("denoiser.safetensors", "denoiser.json"):  # taken as they are, card and all
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    x = splits.test.as_float()
    script = ("import sys, torch; from shrinking import Shrinking; "
              "from jfbnb.training.weights import load_denoiser; "
              f"D = load_denoiser({str(tmp_path / 'denoiser.safetensors')!r}, [Shrinking]); "
              "print(D.network(torch.ones(1, 3, 4, 4), 0.1).sum().item())")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(network(torch.ones(1, 3, 4, 4), 0.1).sum().item(),
                                               abs=1e-5)
    A = Means()
    T = Relaxed(A, Denoiser(network, 0.05), 0.1)
    assert check_equilibrium(T, x, A(x), ["a", "b"], further=20).norm.notna().all()


def test_a_map_and_a_gradient(splits):
    method = replace(METHODS["jfb"], name="relaxed", colour="#123456",
                     model=lambda A, D, s: Equilibrium(Relaxed(A, D, s["tau"])),
                     loss=lambda model, s: EquilibriumLoss(model, s, gradient=two_terms))
    setup = Protocol("means", 32, lambda size: Means(), 0.01)
    problem = validation_problem(setup, splits, 2, 0, CPU)
    network = load_denoiser(RELEASED / "denoiser.safetensors").network
    model, history = trained(method, network, {"tau": 0.05, "sigma": 0.05}, problem)
    assert {"iterations", "residual", "growth"} <= set(history)
    T = model.on(problem.A).T
    assert check_equilibrium(T, problem.x, problem.d, ["a", "b"], further=20).radius.notna().all()
    state, info = solve(T.double(), problem.d.double(), 1e-8, 2000)
    splitting = SplittingMap(T.A, T.D, T.tau.item()).double()
    same, _ = solve(splitting, problem.d.double(), 1e-8, 2000)
    assert info.converged.all()
    torch.testing.assert_close(state, same, rtol=0, atol=1e-4)  # relaxing moves no fixed point


@pytest.fixture
def mine():
    exec(METHOD, {})
    yield METHODS["mine"]
    del METHODS["mine"]


def test_a_method(splits, mine, tmp_path):
    protocol = Protocol("blur", 32, partial(Blur, kernel_size=5, kernel_std=2.0), 0.01)
    problem = validation_problem(protocol, splits, 2, 0, CPU)
    network, tuning = load_denoiser(RELEASED / "denoiser.safetensors").network, Tuning(0.01, 2)
    settings = tune(mine, tuning, problem.A, problem.d, problem.x, 2, network)
    assert max(tried["psnr"] for tried in tuning.searches["mine"]) > 10
    _, card = train_method(mine, network, settings, problem, BRIEF, LOSSES,
                           Run(CPU, tmp_path, log=str.encode))
    tuning.save(tmp_path / "tuning.json")
    methods = make_methods(["measurement", "mine"], tmp_path, CPU)
    metrics = evaluate(methods, problem.A, problem.x, problem.d, 0.01, ["a", "b"])
    table = table2(summarise(metrics), {"mine": 1.0}).set_index("Method")
    assert table["PSNR (dB)"]["My own"] > table["PSNR (dB)"][METHODS["measurement"].label]
    rows, curves = trainings({"mine": card})
    assert list(rows.Method) == ["My own"] and (rows["Loss after"] < rows["Loss before"]).all()
    (ax,) = learning_curves(curves).axes
    assert ax.lines[0].get_color() == "#ABCDEF" and ax.lines[0].get_label() == "My own"
    condition = Condition(splits.test, Blur(32, 5, 1.0), Blur(32, 5, 1.0), 0.02)
    found = evaluate_conditions({"protocol": methods}, {("kernel", "1"): condition}, [],
                                splits.validation, 0, CPU)
    assert "mine" in set(found.method)


def test_a_method_of_an_installed_package(tmp_path):
    """Its entry point is found, whichever is imported first."""
    (tmp_path / "my_package.py").write_text(METHOD)
    metadata = tmp_path / "my_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text('[jfbnb.methods]\nmine = my_package\n')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}
    first = "import my_package; from jfbnb.training.methods import METHODS; print(list(METHODS))"
    for words in (["-m", "jfbnb", "deblur", "--help"], ["-c", first]):
        listed = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                                check=True, env=environment)
        assert "mine" in listed.stdout and "cannot be loaded" not in listed.stderr
