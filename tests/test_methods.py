"""Every method by its name: what it restores, what trains it, how it is tuned."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from jfbnb.baselines import tikhonov
from jfbnb.common import UserError
from jfbnb.diagnostics import parameter_gradient
from jfbnb.explicit import deep_unrolling, feedforward
from jfbnb.fixed_point import anderson
from jfbnb.gradients import implicit, jfb, neumann
from jfbnb.maps import MAPS, PreconditionedMap, SplittingMap
from jfbnb.methods import (
    EQUILIBRIA,
    HEADS,
    LABELS,
    SETTINGS,
    TRAINED,
    Tuning,
    apply_head,
    make_loss,
    make_methods,
    make_regulariser,
    restore,
)
from jfbnb.networks import DnCNN, matched_sigma
from jfbnb.operators import Blur
from jfbnb.training import EquilibriumLoss, TrainingConfig, train

CPU = torch.device("cpu")


def equilibrium_loss(T, **changes) -> EquilibriumLoss:
    return replace(EquilibriumLoss(T, 0.01, 1e-3, 8, 1, 0.9, 0.1), **changes)


def test_the_tables_of_methods_fit_together():
    assert set(SETTINGS) | set(HEADS) == set(LABELS)
    assert set(TRAINED) < set(LABELS) and set(EQUILIBRIA) < set(LABELS)
    assert set(HEADS.values()) < set(TRAINED)
    # The preconditioned map is there for the theory: the splitting has the same equilibrium.
    assert {map_ for map_, _ in EQUILIBRIA.values()} == set(MAPS) - {"preconditioned"}


@pytest.mark.parametrize("name", list(EQUILIBRIA))
def test_equilibria_are_fixed_points_of_their_maps(problem, name):
    A, S, d = problem
    settings = {"tau": 0.3, "sigma": 0.05, "eta": 0.8}
    x, info = restore(name, A, S, d, settings, max_iterations=3000)
    assert info.converged.all()
    kind = MAPS[EQUILIBRIA[name][0]]
    T = kind(A, S, 0.8) if "eta" in SETTINGS[name] else kind(A, S)
    state, _ = anderson(lambda z: T(z, d), T.start(d), 1e-10, 5000)
    torch.testing.assert_close(x, T.image(state), rtol=0, atol=1e-2)


def test_explicit_networks(problem):
    A, S, d = problem
    assert torch.equal(feedforward(A, S, d), S.denoise(d))
    assert torch.equal(feedforward(A, S, d, 0.01), S.denoise(tikhonov(A, d, 0.01)))
    T = SplittingMap(A, S)
    assert torch.equal(deep_unrolling(T, d, 2), T(T(d, d), d))
    assert torch.equal(restore("unrolled", A, S, d, {"iterations": 2})[0], T(T(d, d), d))


def test_matched_sigma_is_half_quadratic_splittings():
    # argmin |z - y|^2 / (2 noise^2) + |z - x|^2 / (2 sigma^2) is (y + tau x) / (1 + tau).
    noise, tau = 0.01, 0.04
    sigma = matched_sigma(noise, tau)
    y, x = 0.7, 0.2
    z = (y / noise**2 + x / sigma**2) / (1 / noise**2 + 1 / sigma**2)
    assert z == pytest.approx((y + tau * x) / (1 + tau))


@pytest.mark.parametrize("name", TRAINED)
def test_every_learned_method_can_be_trained_and_used(weights, name):
    """A few steps lower its loss; the trained weights restore an image."""
    torch.manual_seed(0)
    images = (torch.rand(12, 3, 4, 4).repeat_interleave(5, 2).repeat_interleave(5, 3) * 255).byte()
    tuning = Tuning.load(weights / "tuning.json")
    method = make_methods([name], weights, CPU)[name]
    S = make_regulariser(DnCNN(3, 8), tuning.settings(name), name in HEADS.values())
    A = Blur(16, 5, 2.0)
    loss = make_loss(name, A, S, tuning.settings(name), equilibrium_loss(PreconditionedMap(A, S)))
    history = train(S, loss, images, TrainingConfig(25, 4, 16, 3e-3, 0, 1.0), CPU,
                    log=lambda _: None)
    assert sum(r["loss"] for r in history[-5:]) < sum(r["loss"] for r in history[:5])
    assert loss.evaluations >= 3
    restored, _ = method(A, torch.rand(2, 3, 16, 16), 0.01)
    assert restored.isfinite().all()


def test_a_head_acts_on_the_solution_and_leaves_it_alone(problem):
    A, S, x = problem
    d = A(x)
    plain = EquilibriumLoss(SplittingMap(A, S), 0.0, 1e-10, 500, 1, 0.9, 0.0)
    _, figures = plain(x, (0,))
    S.head = torch.nn.Conv2d(3, 3, 1).double()
    S.head.forward = lambda y, sigma, convolve=S.head.forward: convolve(y)
    star, info = restore("jfb", A, S, d, {}, 500)
    predicted = apply_head("jfb-head", A, S, star, d)
    x_star = A.solve_normal(A.adjoint(d) + S.tau * star, S.tau)
    assert torch.equal(predicted, x_star - S.head(x_star, S.sigma)) and info.converged.all()
    both, parts = plain(x, (0,))
    assert parts["mse"] == pytest.approx(figures["mse"])
    assert both.item() == pytest.approx(parts["mse"] + parts["head_mse"])
    assert plain.evaluations == 503 + 3
    both.backward()
    assert S.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "method"), [
    ("jfb", jfb),
    ("neumann", lambda T, x: neumann(T, x, 3)),
    ("implicit", lambda T, x: implicit(T, x, 1e-10, 500))])
@pytest.mark.parametrize("name", list(MAPS))
def test_a_loss_has_its_gradients_gradient(problem, name, kind, method):
    """Each map by each gradient: what backward leaves is what `gradients` says at x*."""
    A, S, x = problem
    S.zero_grad()
    T = MAPS[name](A, S)
    loss = equilibrium_loss(T, tolerance=1e-10, max_iterations=500, penalty=0.0, gradient=kind,
                            terms=3, noise_std=0.0)
    value, figures = loss(x, (0,))
    value.backward()
    ours = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                      for p in S.parameters()])
    d = A(x)
    state, _ = anderson(lambda z: T(z, d), T.start(d), 1e-10, 500)
    expected = parameter_gradient(T, state, d, x, method)
    assert (ours - expected).norm() / expected.norm() < 1e-6
    assert ("adjoint_residual" in figures) == (kind == "implicit")
    assert "contraction" not in figures  # no penalty, no cost


def test_penalty_does_not_depend_on_the_gradient(problem):
    """It is a function of T at x*, which is held fixed; the adjoint equation has no part in it."""
    A, S, x = problem
    found = []
    for kind in ("jfb", "implicit"):
        T = PreconditionedMap(A, S)
        plain, penalised = (equilibrium_loss(T, tolerance=1e-10, max_iterations=500, gradient=kind,
                                             penalty=p, contraction=0.0) for p in (0.0, 1.0))
        gradients = []
        for loss in (plain, penalised):
            S.zero_grad()
            loss(x, (0,))[0].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in S.parameters()]))
        found.append(gradients[1] - gradients[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-10)


def test_unknown_gradient(problem):
    A, S, _ = problem
    with pytest.raises(ValueError, match="not jfb, neumann or implicit"):
        equilibrium_loss(PreconditionedMap(A, S), gradient="exact")


def test_search_keeps_what_it_tried_and_chooses_the_best(tmp_path):
    tuning = Tuning(0.01, 5, {}, {})
    chosen = tuning.search("tikhonov", [{"lam": w} for w in (0.1, 0.2, 0.3)],
                           lambda s: 30 - abs(s["lam"] - 0.2))
    assert chosen == tuning.settings("tikhonov") == {"lam": 0.2}
    assert [r["lam"] for r in tuning.searches["tikhonov"]] == [0.1, 0.2, 0.3]
    tuning.save(tmp_path / "t.json")
    assert Tuning.load(tmp_path / "t.json") == tuning
    with pytest.raises(UserError, match="no tau and no sigma for jfb: run the earlier"):
        tuning.settings("jfb")


def test_parameters_follow_the_noise(weights):
    """At a tenth of the noise lam and tau go down by 100; DE-PROX stays as trained.

    Of the networks that end, Tikhonov's lam goes down by 10^1.5, as `NOISE_POWER` says.
    """
    A, x = Blur(40, 5, 2.0), torch.rand(1, 3, 40, 40)
    lam = Tuning.load(weights / "tuning.json").settings("tikhonov")["lam"]
    methods = make_methods(["tikhonov", "jfb", "de-prox", "feedforward-tikhonov"], weights, CPU)
    expected = A.solve_normal(A.adjoint(x), lam / 100)
    torch.testing.assert_close(methods["tikhonov"](A, x, 0.001)[0], expected)
    lam = Tuning.load(weights / "tuning.json").settings("feedforward-tikhonov")["lam"]
    torch.testing.assert_close(methods["feedforward-tikhonov"](A, x, 0.001)[0],
                               A.solve_normal(A.adjoint(x), lam / 10**1.5))
    # The untrained denoiser is the identity: x* solves (A'A + tau) x = A'd + tau x, so A'Ax = A'd.
    d = A(x)
    distances = [(methods["jfb"](A, d, noise)[0] - x).norm() for noise in (0.01, 0.001)]
    assert distances[1] < distances[0]
    assert torch.equal(methods["de-prox"](A, d, 0.01)[0], methods["de-prox"](A, d, 0.001)[0])


def test_unknown_method_and_missing_files(weights, tmp_path):
    with pytest.raises(UserError, match="unknown method 'jbf': choose from"):
        make_methods(["jbf"], weights, CPU)
    with pytest.raises(UserError, match=r"no tuned parameters at .*tuning\.json"):
        make_methods(["jfb"], tmp_path, CPU)
    (weights / "jfb.safetensors").unlink()
    with pytest.raises(UserError, match="no weights at"):
        make_methods(["jfb"], weights, CPU)
    make_methods(["tikhonov"], weights, CPU)  # needs none
    (weights / "tuning.json").write_text('{"lam": 1}')
    with pytest.raises(UserError, match="holds no tuned parameters"):
        make_methods(["tikhonov"], weights, CPU)


def test_methods_leave_the_weights_alone(weights, problem):
    A, _, d = problem
    method = make_methods(["jfb"], weights, CPU)["jfb"]
    before = copy.deepcopy(method(A, d.float(), 0.01)[0])
    method(A, d.float(), 0.1)
    assert torch.equal(method(A, d.float(), 0.01)[0], before)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), 1e300, "1", None, True, [1]])
def test_settings_that_are_no_positive_numbers(weights, value):
    file = weights / "tuning.json"
    tuning = json.loads(file.read_text())
    tuning["chosen"]["jfb"]["tau"] = value
    file.write_text(json.dumps(tuning))
    with pytest.raises(UserError, match="is no number between 0 and 1e5"):
        Tuning.load(file)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '{"chosen": 3}',
                                  '{"noise_std": 1, "images": 1, "chosen": [], "searches": {}}'])
def test_a_tuning_that_is_none(tmp_path, text):
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(UserError, match="holds no tuned parameters"):
        Tuning.load(tmp_path / "tuning.json")


def test_a_head_that_the_weights_do_not_have(weights):
    shutil.copy(weights / "unrolled.safetensors", weights / "jfb.safetensors")
    with pytest.raises(UserError, match="have no head: jfb-head needs one"):
        make_methods(["jfb-head"], weights, torch.device("cpu"))
