"""Reuse of batches, against solves from the start; and Muon, against an SVD."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import Contractive

from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.core.fixed_point import anderson
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Blur
from jfbnb.data import bundled_photos
from jfbnb.training import loop, losses
from jfbnb.training.loop import TrainingConfig, train
from jfbnb.training.losses import EquilibriumLoss, ImplicitLoss, LossSettings, draw_measurement
from jfbnb.training.muon import LENGTH, Muon, polar_factor

CPU = torch.device("cpu")
REUSED = LossSettings(0.01, 1e-3, 30, 1, penalty=0.0, batch_reuse=4)
STILL = TrainingConfig(1, batch_size=4, crop=16, learning_rate=0.0, seed=0, unconverged_limit=1.0)


@pytest.fixture
def images() -> torch.Tensor:
    return bundled_photos("test", 24).images[:400:50].clone()  # two batches


class Damping(Contractive):
    """Of whatever it is given it takes 30% away, so that a solve is short."""

    taken = 0.3


def model(std: float = 0.008) -> Equilibrium:
    torch.manual_seed(0)
    network = Damping(3, 6)
    torch.nn.init.normal_(network.layers[-1].weight, std=std)
    return Equilibrium(SplittingMap(Blur(16, 5, 2.0), Denoiser(network, 0.03), 0.1))


@pytest.mark.parametrize("batch_reuse", [2, 8])
def test_a_batch_is_used_so_often_and_others_lie_between(batch_reuse):
    used = [loop.batch_number(step, batch_reuse) for step in range(losses.REUSE_BUFFER * 40)]
    assert [loop.batch_number(step, 1) for step in range(500)] == list(range(500))
    when = {}
    for step, batch in enumerate(used):
        when.setdefault(batch, []).append(step)
    gaps = {b - a for steps in when.values() for a, b in pairwise(steps)}
    assert gaps == {losses.REUSE_BUFFER}
    counts = Counter(used)
    n = losses.REUSE_BUFFER
    whole = range(n, n * (40 // batch_reuse))  # none is left out
    assert {counts[batch] for batch in whole} == {batch_reuse}
    assert max(counts.values()) == batch_reuse
    new = [steps[0] for steps in when.values() if steps[0] >= losses.REUSE_BUFFER]
    per_pool = Counter(step // losses.REUSE_BUFFER for step in new)
    assert set(per_pool.values()) == {losses.REUSE_BUFFER // batch_reuse}  # solves are due evenly


@pytest.mark.parametrize("kind", [EquilibriumLoss, ImplicitLoss])
def test_it_solves_once_and_then_starts_from_what_it_tracked(kind, images, monkeypatch):
    solves = []

    def counted(*arguments, **options):
        solves.append(1)
        return real(*arguments, **options)

    real = losses.solve
    monkeypatch.setattr(losses, "solve", counted)
    for module in (loop, losses):
        monkeypatch.setattr(module, "REUSE_BUFFER", 2)
    m = model()
    loss = kind(m, REUSED)
    history = train(m, loss, images, replace(STILL, epochs=8), CPU)
    # Two batches, each used four times; the second starts with its second use.
    assert len(solves) == len({loop.batch_number(step, 4) for step in range(16)}) == 5
    assert len(loss.memory) == 2
    assert {"iterations", "converged", "mse"} <= set(history[0])


def test_reuse_leads_to_the_fixed_point(images):
    """A hundred applications at fixed weights, against a solve to 1e-6, in value and gradient."""
    m = model()
    loss = EquilibriumLoss(m, replace(REUSED, tolerance=0.08, batch_reuse=1000))
    x, keys = images[:4, :, :16, :16].float() / 255, (0, 1)
    d = draw_measurement(m.T.A, x, 0.01, keys)
    exact, _ = anderson(m.T, m.T.start(d), 1e-6, 200, given=d)
    far = None
    for _ in range(100):
        errors, _ = loss(x, keys)
        now = loss.memory[keys][0]
        far = (now - exact).norm() if far is None else far
    assert (now - exact).norm() < 1e-2 * far and (now - exact).norm() < 1e-4 * exact.norm()
    exactly = replace(REUSED, tolerance=1e-6, max_iterations=200, batch_reuse=1)
    wanted, _ = EquilibriumLoss(m, exactly)(x, keys)
    weights = list(m.parameters())
    for a, b in zip(torch.autograd.grad(errors.sum(), weights, allow_unused=True),
                    torch.autograd.grad(wanted.sum(), weights, allow_unused=True), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


def test_the_growth_estimate_improves_with_each_use(images):
    """One power iteration a use, against the eigenvalue that ARPACK finds."""
    from scipy.sparse.linalg import LinearOperator as Operator
    from scipy.sparse.linalg import eigs

    m = model().double()
    loss = EquilibriumLoss(m, replace(REUSED, tolerance=1e-2, penalty=1.0, stability_every=1,
                                      batch_reuse=1000))
    x, keys = images[:1, :, :16, :16].double() / 255, (0, 1)
    found = [loss(x, keys)[1]["growth"].item() for _ in range(60)]
    z = loss.memory[keys][0]
    d = draw_measurement(m.T.A, x, 0.01, keys)

    def J(v):
        with torch.no_grad():
            t = torch.from_numpy(v).view_as(z) * 1e-4
            return ((m.T(z + t, d) - m.T(z - t, d)) / 2e-4).flatten().numpy()

    n = z.numel()
    radius = abs(eigs(Operator((n, n), J, dtype=float), k=1, return_eigenvectors=False)[0])
    assert found[-1] == pytest.approx(radius, rel=0.02)


def test_a_batch_whose_state_is_gone_or_runs_away_is_solved_again(images):
    x = images[:4, :, :16, :16].float() / 255

    def solves(loss: EquilibriumLoss) -> list[bool]:
        """Whether each of three solves."""
        return ["iterations" in loss(x, (0, 1))[1] for _ in range(3)]

    loss = EquilibriumLoss(model(), REUSED)
    assert solves(loss) == [True, False, False] and not solves(loss)[0]
    loss.memory.clear()
    assert solves(loss)[0]
    wild = EquilibriumLoss(model(std=1.0), REUSED)  # no contraction: applied over and over, it
    found = solves(wild)  # would reach 1e30 before the batch is replaced
    assert sum(found) > 1 and not wild.memory.keys() - {(0, 1)}


@pytest.mark.parametrize("shape", [(6, 54), (54, 6), (16, 16), (1, 8)])
def test_the_polar_factor_has_the_singular_vectors_and_values_near_1(shape):
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64)
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    core = U.mT @ polar_factor(G) @ Vt.mT  # diagonal, as the same vectors belong to it
    values = core.diagonal()
    assert (core - values.diag()).abs().max() < 1e-8
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_moves_hidden_layers_by_its_length_and_the_others_as_adam_does():
    networks = []
    for kind in (Muon, torch.optim.Adam):
        torch.manual_seed(0)
        network = DnCNN(4, 8)
        torch.nn.init.normal_(network.layers[-1].weight, std=0.05)
        before = [p.detach().clone() for p in network.parameters()]
        optimizer = kind(network.parameters(), lr=1e-2)
        network(torch.rand(2, 3, 12, 12), 0.1).square().mean().backward()
        gradients = [p.grad.clone() for p in network.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients,
                                                          strict=True))
        networks.append([p - q for p, q in zip(network.parameters(), before, strict=True)])
    for muon, adam, gradient in zip(*networks, gradients, strict=True):
        if muon.dim() == 4 and min(muon.shape[:2]) > 4:
            assert (muon * gradient).sum() < 0
            length = 1e-2 * LENGTH * max(muon.flatten(1).shape) ** 0.5
            values = torch.linalg.svdvals(muon.flatten(1)) / length
            assert values.median() > 0.5 and values.max() < 1.3  # a dead ReLU has a 0
        else:
            assert torch.equal(muon, adam)
