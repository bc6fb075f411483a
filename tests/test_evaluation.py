
import numpy as np
import pandas as pd
import pytest
import skimage.metrics
import torch
from conftest import Scale

from jfbnb.common import UserError
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.maps import ImplicitMap, SplittingMap
from jfbnb.core.metrics import psnr, ssim
from jfbnb.core.models import Equilibrium, Restorer
from jfbnb.core.operators import Blur
from jfbnb.core.protocols import measure
from jfbnb.data import bundled_photos, load_images
from jfbnb.teaching import conditions as under
from jfbnb.teaching.conditions import Condition
from jfbnb.teaching.figures import other_conditions, save_table
from jfbnb.teaching.tables import on_published_scale, table2
from jfbnb.training import equilibria, evaluation
from jfbnb.training.evaluation import summarise
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import make_methods
from jfbnb.training.tuning import Tuning, tune

CPU = torch.device("cpu")


@pytest.fixture
def pair():
    generator = torch.manual_seed(0)
    truth = torch.rand(3, 3, 40, 40, generator=generator)
    return truth + 0.1 * torch.randn(truth.shape, generator=generator), truth


def test_psnr_is_scikit_images(pair):
    x, truth = pair
    expected = [skimage.metrics.peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1)
                for a, b in zip(x, truth, strict=True)]
    np.testing.assert_allclose(psnr(x, truth), expected, rtol=1e-5)


def test_ssim_is_wang_et_als(pair):
    """Against scikit-image called channel by channel, on an image at a time."""
    x, truth = pair
    for i, value in enumerate(ssim(x, truth)):
        channels = [skimage.metrics.structural_similarity(
            x[i, c].numpy(), truth[i, c].numpy(), gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=1) for c in range(3)]
        assert value.item() == pytest.approx(np.mean(channels), abs=1e-5)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("measure_of", [psnr, ssim])
@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x.numpy(), "a tensor of floats"), (lambda x: (255 * x).byte(), "a tensor of floats"),
    (lambda x: x[0], "the same shape"), (lambda x: x[:, :1], "the same shape")])
def test_what_cannot_be_compared_is_refused(pair, measure_of, change, message):
    x, truth = pair
    with pytest.raises(UserError, match=message):
        measure_of(x, change(truth))
    with pytest.raises(UserError, match=message):
        measure_of(change(x), truth)


@pytest.mark.parametrize(("factor", "contracts"), [(0.9, True), (1.1, False)])
def test_an_equilibrium_is_told_from_an_iteration_stopped_early(pair, factor, contracts):
    """D scales, so J = factor tau (A'A + tau)^-1: its radius and norm are known."""
    _, x = pair
    A, tau = Blur(40, 5, 2.0), 0.05
    d = measure(A, x, 0.01, 0, [0, 1, 2])
    T = SplittingMap(A, Denoiser(Scale(factor), 0.0), tau)
    found = equilibria.check_equilibrium(T, x, d, ["a", "b", "c"], further=300)
    assert found.image.tolist() == ["a", "b", "c"]
    assert found.evaluations.between(2, 50).all() == contracts
    largest = factor * tau / (A.spectrum.square().min().item() + tau)
    np.testing.assert_allclose(found.radius, largest, rtol=2e-2)
    np.testing.assert_allclose(found.norm, largest, rtol=2e-2)
    assert (found.drift.abs() < 0.02).all() == contracts
    assert (found.residual_later <= equilibria.ROUNDING).all() == contracts
    assert (found.radius < 1).all() == contracts


def test_published_scale_is_6_db_lower(pair):
    x, truth = pair
    np.testing.assert_allclose(psnr(x, truth) - on_published_scale(x, truth),
                               20 * np.log10(2), atol=1e-4)


class Towards(ImplicitMap):
    """T(x) = x* + rate (x - x*), from a known distance away: a linear map."""

    def __init__(self, A, fixed, rate):
        super().__init__(A, Denoiser(Scale(1.0), 0.0))
        self.fixed, self.rate = fixed, rate

    def start(self, d):
        return 1.5 * self.fixed

    def forward(self, x, d):
        return self.fixed + self.rate * (x - self.fixed)


def test_the_distance_to_the_equilibrium_is_reported_beside_the_residual(pair):
    """In closed form: at x = (1 + e) x* the residual is (1 - rate) e / (1 + e), the distance e."""
    _, x = pair
    fixed, rate = x[:1] + 0.01, 0.95
    T = Towards(Blur(40, 5, 2.0), fixed, rate)
    row = equilibria.check_equilibrium(T, x[:1], x[:1], ["a"], tolerance=1e-4,
                                       max_iterations=1).iloc[0]
    assert row.evaluations == float("inf")  # one evaluation is not enough, and Anderson is not used
    assert row.residual == pytest.approx((1 - rate) * 0.5 / 1.5, rel=1e-4)
    assert row.distance == pytest.approx(0.5, rel=1e-3)
    assert [row.radius, row.norm] == pytest.approx([rate, rate], rel=1e-4)
    before, after = psnr(1.5 * fixed, x[:1]).item(), psnr(fixed, x[:1]).item()
    assert row.drift == pytest.approx(after - before, rel=1e-3) and row.drift > 0
    T.scale = 1e4  # of a map's steps: its tolerance is 1 now, which the start meets
    assert equilibria.check_equilibrium(T, x[:1], x[:1], ["a"]).evaluations.item() == 1
    away = Towards(T.A, x[:1], rate)
    found = equilibria.check_equilibrium(away, x[:1] + 0.3, x[:1], ["a"], max_iterations=1)
    assert found.drift.item() < 0


def test_an_equilibrium_is_checked_where_the_tables_solve_ends(weights, pair):
    _, x = pair
    A = Blur(40, 5, 2.0)
    d = measure(A, x, 0.01, 0, [0, 1, 2])
    restorer = make_methods(["jfb"], weights, CPU)["jfb"]
    table = evaluation.evaluate({"jfb": restorer}, A, x, d, 0.01, ["a", "b", "c"])
    T = restorer.model(A, 0.01).T
    found = equilibria.check_equilibrium(T, x, d, ["a", "b", "c"], further=5)
    solved = table.converged == 1
    np.testing.assert_array_equal(found.evaluations < np.inf, solved)
    assert found.evaluations[solved].tolist() == table.iterations[solved].tolist()
    np.testing.assert_allclose(found.psnr, table.psnr, rtol=1e-6)
    np.testing.assert_allclose(found.residual, table.residual, rtol=1e-6)


def conditions_of(image_folder, **others):
    """(truths, conditions): the same images, by name what measures, what is told, the noise."""
    images = load_images(image_folder, 40, 3, print)
    return images, {("study", name): Condition(images, *condition)
                    for name, condition in others.items()}


def test_conditions_tell_the_methods_the_assumed_blur_and_the_noise(weights, image_folder):
    sharp, wide = Blur(40, 5, 1.0), Blur(40, 5, 3.0)
    images, conditions = conditions_of(image_folder, told=(wide, wide, 0.01),
                                       wrong=(wide, sharp, 0.01), noisy=(wide, wide, 0.02))
    methods = make_methods(["measurement", "tikhonov"], weights, CPU)
    table = under.evaluate_conditions({"protocol": methods}, conditions, [], images, 0, CPU)
    psnrs = table.pivot(index="condition", columns="method", values="psnr")
    assert psnrs.measurement["told"] == pytest.approx(psnrs.measurement["wrong"])
    assert psnrs.tikhonov["told"] > psnrs.tikhonov["wrong"]
    x = images.as_float()
    d = measure(wide, x, 0.02, 0, images.indices)
    lam = 2 * Tuning.load(weights / "tuning.json").chosen["tikhonov"]["lam"]  # 0.02 / 0.01
    expected = psnr(wide.solve_normal(wide.adjoint(d), lam), x).mean().item()
    assert psnrs.tikhonov["noisy"] == pytest.approx(expected, abs=1e-4)


def test_classical_methods_are_tuned_under_each_condition_as_by_brute_force(image_folder):
    """On the images that choose: the best of all candidates, and so never below the rule's."""
    sharp, wide = Blur(40, 5, 1.0), Blur(40, 5, 3.0)
    images, conditions = conditions_of(image_folder, quiet=(wide, wide, 0.002),
                                       loud=(wide, wide, 0.05), wrong=(wide, sharp, 0.01))
    table = under.evaluate_conditions({}, conditions, ["tikhonov", "total-variation"], images,
                                           0, CPU, candidates=5)
    assert (table.version == "tuned here").all() and len(table) == 6
    x = images.as_float()
    for (_, name), c in conditions.items():
        d = measure(c.true_A, x, c.noise_std, 0, images.indices)
        for method in ("tikhonov", "total-variation"):
            tuning = Tuning(c.noise_std, len(x))
            settings = tune(METHODS[method], tuning, c.A, d, x, 5)
            best = max(tried["psnr"] for tried in tuning.searches[method])
            (row,) = table[(table.condition == name) & (table.method == method)].itertuples()
            assert row.psnr == pytest.approx(best, abs=1e-4)
            ((key, value),) = settings.items()
            assert row.settings == f"{key} {value:.3g}"


@pytest.mark.parametrize("noise_std", [0.002, 0.005, 0.01, 0.02, 0.05])
def test_candidates_of_the_classical_methods_enclose_the_best(noise_std):
    """On photographs, at each noise level; at the protocols' blur and at a wider one."""
    photographs = bundled_photos("validation", 64)[:2]
    for A in (Blur(64, 5, 5**0.5), Blur(64, 9, 5**0.5)):
        condition = Condition(photographs, A, A, noise_std)
        x, d = condition.measure(photographs, 0, CPU)
        for name in ("tikhonov", "total-variation"):
            candidates = METHODS[name].candidates(noise_std, 9)
            best = under.tuned_under(condition, name, x, d, 9)
            assert 0 < candidates.index(best) < len(candidates) - 1, (name, best)


def test_points_that_did_not_converge_are_solved_further(image_folder):
    """Solved on, a slow map arrives at x*, and one without a fixed point in reach does not."""
    images, conditions = conditions_of(image_folder, one=(A := Blur(40, 5, 2.0), A, 0.01))

    def restorer(factor, tau, most):
        def model(A, noise_std):
            found = Equilibrium(SplittingMap(A, Denoiser(Scale(factor), 0.0), tau))
            found.max_iterations = most
            return found
        return Restorer(lambda A, d, noise_std: model(A, noise_std)(d), model=model)

    methods = {"jfb": restorer(0.9, 0.05, 3), "deq": restorer(0.9, 0.05, 100),
               "plug-and-play": restorer(3.0, 0.05, 3)}
    table = under.evaluate_conditions({"protocol": methods}, conditions, [], images, 0, CPU)
    table = table.set_index("method")
    assert table.converged.to_dict() == {"jfb": 0.0, "deq": 1.0, "plug-and-play": 0.0}
    assert table.run_on.to_dict() == {"jfb": 3, "deq": 0, "plug-and-play": 3}
    assert table.converged_later["jfb"] == 1 and np.isnan(table.converged_later["deq"])
    assert table.drift["jfb"] == pytest.approx(table.psnr["deq"] - table.psnr["jfb"], abs=0.01)
    assert np.isnan(table.drift["deq"])


def test_a_condition_that_studies_share_is_evaluated_once(weights, image_folder, monkeypatch):
    images, conditions = conditions_of(image_folder, one=(A := Blur(40, 5, 2.0), A, 0.01))
    conditions["another study", 0.01] = conditions["study", "one"]
    calls = []
    monkeypatch.setattr(under, "evaluate",
                        lambda *args, real=evaluation.evaluate: calls.append(1) or real(*args))
    table = under.evaluate_conditions(
        {"protocol": make_methods(["measurement"], weights, CPU)}, conditions, [], images, 0, CPU)
    assert len(calls) == 1 and table.study.tolist() == ["study", "another study"]
    assert table.psnr.nunique() == 1


def test_the_figure_on_conditions_marks_what_has_not_converged():
    rows = [("noise", noise, "jfb", version, 30.0, converged)
            for noise in (0.01, 0.02)
            for version, converged in (("protocol", 1.0 if noise == 0.01 else 0.9),
                                       ("conditions", 1.0))]
    rows += [("noise", noise, "tikhonov", "tuned here", 25.0, np.nan) for noise in (0.01, 0.02)]
    rows += [(study, "wide", "jfb", "protocol", 30.0, 0.5) for study in ("kernel", "a", "b")]
    table = pd.DataFrame(rows, columns=["study", "condition", "method", "version", "psnr",
                                        "converged"])
    panels = {study: (study, study) for study in ("noise", "kernel", "a", "b")}
    figure = other_conditions(table, panels, {"noise": 0.01})
    noise, kernel, *_ = figure.axes

    def hollow(ax):
        """(height, place) of each marker with a white face."""
        return [tuple(point) for markers in ax.collections for point in markers.get_offsets().data
                if np.allclose(markers.get_facecolor()[:, :3], 1)]

    assert hollow(noise) == [(0.02, 30.0)] and len(hollow(kernel)) == 1
    lines = [(line.get_color(), line.get_linestyle()) for line in noise.lines
             if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 2]
    blue, orange = METHODS["jfb"].colour, METHODS["tikhonov"].colour
    assert sorted(lines) == sorted([(blue, "-"), (blue, "--"), (orange, ":")])
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"JFB, splitting", "Tikhonov", "tuned here", "trained: protocol", "trained: conditions",
            "not all converged"} <= labels


def test_standard_error():
    table = pd.DataFrame({"method": "jfb", "psnr": [30.0, 32.0], "ssim": [0.9, 0.9],
                          "converged": [1.0, 0.0], "iterations": [5, 9], "seconds": [1.0, 3.0]})
    row = summarise(table).iloc[0]
    assert [row.psnr, row.psnr_se, row.converged] == pytest.approx([31, 1, 0.5])
    assert row.median_iterations == 7 and row.seconds_per_image == 2


def test_table2_has_published_and_own_rows(tmp_path):
    summary = pd.DataFrame({"method": ["tikhonov", "de-grad"], "psnr": [28.6, 33.0],
                            "psnr_se": [0.1, 0.1], "ssim": [0.8, 0.92], "ssim_se": [0.01, 0.01],
                            # of 2,000 images one: it must not be rounded away
                            "converged": [np.nan, 0.9995], "seconds_per_image": [0.001, 0.2]})
    table = table2(summary, {"de-grad": 60106}).set_index("Method")
    assert table.loc["JFB, DE-GRAD", "Published PSNR"] == 26.88
    assert table.loc["JFB, DE-GRAD", "Published PSNR, range 1"] == "32.90"
    assert table.loc["Deep equilibrium", "Published PSNR, range 1"] == "32.43 or 38.45"
    assert table.loc["Tikhonov", "Published PSNR, range 1"] == ""
    assert np.isnan(table.loc["Deep equilibrium", "PSNR (dB)"])
    save_table(table.reset_index(), tmp_path / "t", "A caption.")
    (line,) = [s for s in (tmp_path / "t.md").read_text().splitlines() if s.startswith("| JFB")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["JFB, DE-GRAD", "33.00", "0.10", "0.920", "0.010", "99.95%", "0.2", "60,106",
                     "26.88", "32.90", "0.910"]
    for suffix in ("md", "tex"):
        text = (tmp_path / f"t.{suffix}").read_text()
        assert "32.43 or 38.45" in text and "nan" not in text.lower()
    assert r"\begin{tabular}" in (tmp_path / "t.tex").read_text()
    stored = pd.read_csv(tmp_path / "t.csv").fillna({"Published PSNR, range 1": ""})
    pd.testing.assert_frame_equal(stored, table.reset_index())


def test_more_computation_is_counted_in_evaluations_of_the_map(weights):
    """Against iterates by hand; the methods themselves stay what they are."""
    methods = make_methods(["jfb", "unrolled"], weights, torch.device("cpu"))
    A = Blur(16, 5, 2.0)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    d = A(x)
    before = [methods[name](A, d, 0.01)[0] for name in methods]
    table = evaluation.by_computation(methods, [1, 2, 30], A, x, d, 0.01).set_index(
        ["method", "evaluations"])
    T = methods["unrolled"].model(A, 0.01).T
    with torch.no_grad():
        once = T(T.start(d), d)
        twice = T(once, d)
    for k, y in ((1, once), (2, twice)):
        assert table.psnr["unrolled", k] == pytest.approx(psnr(y, x).mean().item(), abs=1e-4)
    # A solver returns the iterate that its last evaluation measured, so the start after one.
    assert table.psnr["jfb", 1] == pytest.approx(psnr(d, x).mean().item(), abs=1e-4)
    assert len(table) == 6
    for name, y in zip(methods, before, strict=True):
        assert torch.equal(methods[name](A, d, 0.01)[0], y)
