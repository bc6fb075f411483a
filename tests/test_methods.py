"""Every method by its name: what it restores, what trains it, how it is tuned."""

import json
import shutil
from functools import partial

import pytest
import scipy.linalg
import torch
from conftest import MAPS, make_map
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jfbnb.common import UserError
from jfbnb.core.baselines import tikhonov
from jfbnb.core.denoisers import Denoiser, DnCNN, matched_sigma
from jfbnb.core.diagnostics import parameter_gradient
from jfbnb.core.fixed_point import solve
from jfbnb.core.gradients import implicit, jfb, neumann
from jfbnb.core.maps import ADMMMap, GradientMap, PreconditionedMap, ProximalMap, SplittingMap
from jfbnb.core.models import Equilibrium, Feedforward, Unrolled
from jfbnb.core.operators import Blur
from jfbnb.core.protocols import measure
from jfbnb.training import methods
from jfbnb.training.loop import TrainingConfig, train
from jfbnb.training.losses import EquilibriumLoss, ImplicitLoss, LossSettings
from jfbnb.training.methods import JFB, METHODS, Method, register
from jfbnb.training.recipes import prepare
from jfbnb.training.restorers import BEST, make_methods
from jfbnb.training.tuning import Tuning, tune
from jfbnb.training.weights import read_card

CPU = torch.device("cpu")
TUNED = [m for m in METHODS.values()
         if m.candidates(0.01, 1) != [{}] and m.shares_tuning_with is None]
TRAINABLE = [m for m in METHODS.values() if m.trainable]
EXACTLY = LossSettings(0.0, tolerance=1e-10, max_iterations=500, penalty=0.0)


def named(method: Method) -> str:
    return method.name


def gradient_of(loss, x) -> torch.Tensor:
    """What the backward pass of a batch's mean loss leaves, as one vector."""
    loss.model.zero_grad()
    loss(x, (0,))[0].mean().backward()
    return torch.cat([p.grad.flatten() for p in loss.model.parameters()])


# --- the table ----------------------------------------------------------------------------------


def test_a_method_that_lacks_what_it_needs_is_refused(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))
    look = {"name": "mine", "label": "Mine", "colour": "#123456"}

    def restores(A, d, settings, prior_scale):
        return d, None

    for parts, message in (
            ({}, "'mine': give either restore or model"),
            ({"restore": restores, "model": JFB.model}, "give either restore or model"),
            ({"restore": restores, "loss": JFB.loss}, "'mine' has a loss, but no model to train")):
        with pytest.raises(UserError, match=message):
            Method(**look, **parts)
    mine = register(Method(**look, restore=restores))
    assert methods.get_method("mine") is mine
    for taken in ({"name": "jfb"}, {"label": "Mine"}, {"colour": JFB.colour.lower()}):
        with pytest.raises(UserError, match="has the same name, label or colour"):
            register(Method(**{"name": "a", "label": "A", "colour": "#000001"} | taken,
                            restore=restores))


@pytest.mark.parametrize("method", TUNED, ids=named)
def test_tuning_scores_every_candidate_and_keeps_the_best(problem, method):
    A, D, x = problem
    d = measure(A, x, 0.01, 0, [0, 1])
    tuning = Tuning(0.01, 2)
    best = tune(method, tuning, A, d, x, 4, D.network)
    tried = tuning.searches[method.name]
    assert 1 < len(tried) <= 4 < len(method.candidates(0.01, 9)) <= 9
    reached = [r for r in tried if r.get("converged", 1) == 1] or tried
    assert best == tuning.settings(method) and max(r["psnr"] for r in reached) == next(
        r["psnr"] for r in tried if best.items() <= r.items())
    assert len({r["psnr"] for r in tried}) > 1  # the settings reach the method
    iterates = isinstance(method.model and method.build(A, D.network, best), Equilibrium)
    assert ("converged" in tried[0]) == (iterates or method.name == "total-variation")


# --- the models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [
    ("plug-and-play", SplittingMap), ("jfb", SplittingMap), ("deq", SplittingMap),
    ("de-grad", GradientMap), ("de-prox", ProximalMap), ("de-admm", ADMMMap)])
def test_equilibria_are_fixed_points_of_their_maps(problem, name, kind):
    A, D, d = problem
    model = METHODS[name].build(A, D.network, {"tau": 0.3, "sigma": 0.05, "eta": 0.8})
    model.max_iterations = 3000
    x, info = model(d)
    assert info.converged.all()
    T = make_map(kind, A, D)
    T.eta = 0.8
    state, _ = solve(T, d, 1e-10, 5000)
    torch.testing.assert_close(x, T.image(state), rtol=0, atol=1e-2)


def test_explicit_networks(problem):
    A, D, d = problem
    assert torch.equal(Feedforward(A, D)(d)[0], D(d))
    assert torch.equal(Feedforward(A, D, 0.01)(d)[0], D(tikhonov(A, d, 0.01)))
    T = make_map(SplittingMap, A, D)
    assert torch.equal(Unrolled(T, 2)(d)[0], T(T(d, d), d))
    model = METHODS["unrolled"].build(A, D.network, {"tau": 0.3, "sigma": 0.05, "iterations": 2})
    model.double()
    torch.testing.assert_close(model(d)[0], T(T(d, d), d), rtol=0, atol=1e-12)


def test_matched_sigma_is_half_quadratic_splittings():
    # argmin |z - y|^2 / (2 noise^2) + |z - x|^2 / (2 sigma^2) is (y + tau x) / (1 + tau).
    noise, tau = 0.01, 0.04
    sigma = matched_sigma(noise, tau)
    y, x = 0.7, 0.2
    z = (y / noise**2 + x / sigma**2) / (1 / noise**2 + 1 / sigma**2)
    assert z == pytest.approx((y + tau * x) / (1 + tau))


@pytest.mark.parametrize("method", TRAINABLE, ids=named)
def test_every_learned_method_can_be_trained_and_used(weights, method):
    torch.manual_seed(0)
    images = (torch.rand(12, 3, 4, 4).repeat_interleave(5, 2).repeat_interleave(5, 3) * 255).byte()
    settings = read_card(weights / f"{method.name}.safetensors")["settings"]
    A = Blur(16, 5, 2.0)
    network = DnCNN(3, 8)
    if method.name == "jfb-energy":  # an energy of 0 is a saddle: pretraining leaves it
        torch.nn.init.normal_(network.layers[-1].weight, std=0.05)
    model, loss = prepare(method, network, settings, A, LossSettings(0.01, 1e-3, 8, 1))
    history = train(model, loss, images, TrainingConfig(25, 4, 16, 3e-3, 0, 1.0), CPU,
                    log=lambda _: None)
    assert sum(r["loss"] for r in history[-5:]) < sum(r["loss"] for r in history[:5])
    restorer = make_methods([method.name], weights, CPU)[method.name]
    restored, _ = restorer(A, torch.rand(2, 3, 16, 16), 0.01)
    assert restored.isfinite().all()


@torch.no_grad()
def test_annealed_splitting_is_its_steps_written_out(problem):
    """Two steps of half-quadratic splitting by SciPy's dense solver, with falling levels."""
    A, D, d = problem
    model = METHODS["annealed"].build(A, D.network, {
        "weight": 0.3, "first": 0.1, "last": 0.02, "iterations": 2, "sigma": 0.0}).double()
    dense = A(torch.eye(256, dtype=torch.float64).reshape(256, 1, 16, 16)).reshape(256, 256).T
    z = d
    for sigma, tau in ((0.1, 0.3 * 0.2**2), (0.02, 0.3)):
        b = dense.T @ d.reshape(6, 256).T + tau * z.reshape(6, 256).T
        x = scipy.linalg.solve(dense.T @ dense + tau * torch.eye(256, dtype=d.dtype), b)
        z = D(torch.from_numpy(x.T.reshape(2, 3, 16, 16)), torch.tensor(sigma, dtype=d.dtype))
    torch.testing.assert_close(model(d)[0], z, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("make", "method"), [
    (EquilibriumLoss, jfb),
    (partial(EquilibriumLoss, gradient=partial(neumann, terms=3)), partial(neumann, terms=3)),
    (ImplicitLoss, partial(implicit, tolerance=1e-10, max_iterations=500))],
    ids=["jfb", "neumann", "implicit"])
@pytest.mark.parametrize("kind", MAPS)
def test_a_loss_has_its_gradients_gradient(problem, kind, make, method):
    A, D, x = problem
    T = make_map(kind, A, D)
    loss = make(Equilibrium(T), EXACTLY)
    ours = gradient_of(loss, x)
    state, _ = solve(T, A(x), 1e-10, 500)
    expected = parameter_gradient(T, state, A(x), x, method)
    assert (ours - expected).norm() / expected.norm() < 1e-6


def test_the_implicit_loss_reports_its_adjoint_solve(problem):
    A, D, x = problem
    model = Equilibrium(make_map(PreconditionedMap, A, D))
    for loss, reports in ((EquilibriumLoss(model, EXACTLY), False),
                          (ImplicitLoss(model, EXACTLY), True)):
        values, figures = loss(x, (0,))
        values.sum().backward()
        assert ("adjoint_residual" in figures) == reports
        assert "growth" not in figures  # no penalty, no cost
    assert (figures["adjoint_residual"] <= 1e-10).all()


def test_penalty_does_not_depend_on_the_gradient(problem):
    """It is a function of T at x*, which is held fixed; the adjoint equation has no part in it."""
    A, D, x = problem
    model = Equilibrium(make_map(PreconditionedMap, A, D))
    plain, penalised = EXACTLY, LossSettings(0.0, 1e-10, 500, 1, max_growth=0.0, penalty=1.0)
    found = [gradient_of(make(model, penalised), x) - gradient_of(make(model, plain), x)
             for make in (EquilibriumLoss, ImplicitLoss)]
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-10)


# --- what a run has stored ----------------------------------------------------------------------


def test_parameters_follow_the_noise(weights):
    """At a tenth of the noise tau goes down by 100, and DE-PROX stays as trained.

    Tikhonov's lam goes down by 10, and by 10^1.5 in front of a network: their `noise_power`.
    """
    A, x = Blur(40, 5, 2.0), torch.rand(1, 3, 40, 40)
    lam = Tuning.load(weights / "tuning.json").chosen["tikhonov"]["lam"]
    methods = make_methods(["tikhonov", "jfb", "de-prox", "feedforward-tikhonov"], weights, CPU)
    expected = A.solve_normal(A.adjoint(x), lam / 10)
    torch.testing.assert_close(methods["tikhonov"](A, x, 0.001)[0], expected)
    lam = read_card(weights / "feedforward-tikhonov.safetensors")["settings"]["lam"]
    torch.testing.assert_close(methods["feedforward-tikhonov"](A, x, 0.001)[0],
                               A.solve_normal(A.adjoint(x), lam / 10**1.5))
    # The untrained denoiser is the identity: x* solves (A'A + tau) x = A'd + tau x, so A'Ax = A'd.
    d = A(x)
    distances = [(methods["jfb"](A, d, noise)[0] - x).norm() for noise in (0.01, 0.001)]
    assert distances[1] < distances[0]
    assert torch.equal(methods["de-prox"](A, d, 0.01)[0], methods["de-prox"](A, d, 0.001)[0])


def test_a_tuning_is_stored_and_read_again(tmp_path):
    tuning = Tuning(0.01, 5, {"plug-and-play": {"tau": 0.1, "sigma": 0.1}})
    assert tuning.settings(JFB) == {"tau": 0.1, "sigma": 0.1}  # it shares plug-and-play's
    chosen = tuning.search("tikhonov", [{"lam": w} for w in (0.1, 0.2, 0.3)],
                           lambda s: {"psnr": 30 - abs(s["lam"] - 0.2)})
    assert chosen == tuning.settings(METHODS["tikhonov"]) == {"lam": 0.2}
    assert tuning.at_edge("tikhonov") == []
    tuning.search("tikhonov", [{"lam": w} for w in (0.1, 0.2, 0.3)], lambda s: {
        "psnr": s["lam"], "converged": float(s["lam"] < 0.25)})
    assert tuning.settings(METHODS["tikhonov"]) == {"lam": 0.2}  # the best that converges
    tuning.search("de-grad", [{"tau": t, "eta": 1.0} for t in (0.1, 0.2)],
                  lambda s: {"psnr": s["tau"]})
    assert tuning.at_edge("de-grad") == ["tau"]
    tuning.save(tmp_path / "t.json")
    assert Tuning.load(tmp_path / "t.json") == tuning
    with pytest.raises(UserError, match="no eta and no sigma for de-prox: tune it first"):
        tuning.settings(METHODS["de-prox"])
    for text in ("[]", "3", "[" * 100_000, '{"chosen": 3}',
                 '{"noise_std": 1, "images": 1, "chosen": [], "searches": {}}'):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(UserError, match="holds no tuned parameters"):
            Tuning.load(tmp_path / "t.json")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), 1e300, "1", None, True, [1]])
def test_settings_that_are_no_positive_numbers(weights, value):
    """In tuning.json for methods without weights of their own, else in the model card."""
    tuning, card = weights / "tuning.json", weights / "unrolled.json"
    found = json.loads(tuning.read_text())
    found["chosen"]["plug-and-play"]["tau"] = value
    tuning.write_text(json.dumps(found))
    card.write_text(json.dumps(json.loads(card.read_text()) | {"noise_std": value}))
    for name in ("plug-and-play", "unrolled"):
        with pytest.raises(UserError, match="is not a number between 0 and 1e5"):
            make_methods([name], weights, CPU)
    make_methods(["jfb"], weights, CPU)


def test_a_folder_that_lacks_what_a_method_needs(weights, tmp_path):
    (weights / "tuning.json").unlink()
    make_methods(["jfb"], weights, CPU)  # its settings are in its card
    shutil.copy(weights / "unrolled.safetensors", weights / "deq.safetensors")
    path = weights / "unrolled.safetensors"
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    save_file(load_file(path) | {"T.log_tau": torch.tensor(300.0)}, path, metadata=metadata)
    (weights / "de-grad.safetensors").unlink()
    for name, message in (
            ("jbf", "unknown method 'jbf': choose from"),
            ("tikhonov", r"no tuned parameters at .*tuning\.json"),
            ("de-grad", "no weights at"),
            ("unrolled", "have a tau that is not finite")):
        with pytest.raises(UserError, match=message):
            make_methods([name], weights, CPU)
    with pytest.raises(UserError, match=r"no model card .*jfb\.json"):
        make_methods(["jfb"], tmp_path, CPU)


def test_released_methods_are_the_best_there_are():
    """Profile best's where it has one, else the paper's."""
    found = make_methods(["jfb", "unrolled", "plug-and-play"], None, CPU)
    A = Blur(32, 5, 2.0)
    kinds = {name: type(method.model(A, 0.01).T.D.network).__name__
             for name, method in found.items()}
    assert kinds == {"jfb": "UNet", "unrolled": "DnCNN", "plug-and-play": "DnCNN"}
    assert (BEST / "jfb.safetensors").is_file()


def test_how_tau_follows_the_noise_is_learned():
    network = DnCNN(2, 4)
    torch.nn.init.normal_(network.layers[-1].weight, std=0.1)
    T = SplittingMap(Blur(16, 3, 1.0), Denoiser(network, 0.04), 0.1)
    with torch.no_grad():
        T.noise_exponent.fill_(0.75)
    other = T.on(T.A, 5.0**2)  # five times the noise
    assert other.tau.item() == pytest.approx(0.1 * 5**1.5)
    assert other.sigma.item() == pytest.approx(0.04 * 5 / 5**0.75)  # noise / sqrt(tau)
    x = torch.rand(2, 3, 16, 16)
    (other(x, x) - x).square().mean().backward()
    assert T.noise_exponent.grad is not None and T.noise_exponent.grad != 0
