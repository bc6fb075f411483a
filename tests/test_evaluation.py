import numpy as np
import pandas as pd
import pytest
import skimage.metrics
import torch

from jfbnb import evaluation
from jfbnb.datasets import load_images
from jfbnb.evaluation import on_published_scale, reference_table2, summarise, table2
from jfbnb.figures import save_table
from jfbnb.maps import SplittingMap
from jfbnb.methods import METHODS, Tuning, make_methods
from jfbnb.metrics import psnr, ssim
from jfbnb.networks import Denoiser
from jfbnb.operators import Blur, measure

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


def test_published_scale_is_6_db_lower(pair):
    x, truth = pair
    np.testing.assert_allclose(psnr(x, truth) - on_published_scale(x, truth),
                               20 * np.log10(2), atol=1e-4)


def test_published_values():
    published = reference_table2().set_index("method")
    assert published.psnr.to_dict() == {"total-variation": 26.79, "plug-and-play": 29.77,
                                        "deq": 32.43, "jfb": 26.88}
    assert published.ssim.to_dict() == {"total-variation": 0.86, "plug-and-play": 0.88,
                                        "deq": 0.94, "jfb": 0.91}


def test_published_values_of_unknown_range_have_both_readings():
    """JFB's range is established, that of the other columns is not."""
    assert reference_table2().set_index("method").usual_psnr.to_dict() == {
        "total-variation": "26.79 or 32.81", "plug-and-play": "29.77 or 35.79",
        "deq": "32.43 or 38.45", "jfb": "32.90"}


def test_evaluate_all_methods(weights, pair):
    _, x = pair
    A = Blur(40, 5, 2.0)
    d = measure(A, x, 0.01, 0, [0, 1, 2])
    table = evaluation.evaluate(make_methods(list(METHODS), weights, CPU), A, x, d, 0.01,
                                ["a", "b", "c"], batch_size=2)
    assert len(table) == 3 * len(METHODS)
    blurred = table[table.method == "measurement"]
    np.testing.assert_allclose(blurred.psnr, psnr(d, x), rtol=1e-6)
    assert blurred.iterations.isna().all()
    for method in ("total-variation", "plug-and-play", "de-grad", "de-prox", "de-admm", "deq",
                   "jfb", "jfb-head"):
        solved = table[table.method == method]
        assert (solved.iterations > 0).all() and solved.residual.notna().all()
    behind = {m.name: m.behind.name for m in METHODS.values() if m.behind}
    heads = table[table.method.isin(behind)]
    bodies = table[table.method.isin(behind.values())]
    assert len(heads) == len(bodies) and (heads.psnr.to_numpy() != bodies.psnr.to_numpy()).all()
    summary = summarise(table).set_index("method")
    assert summary.psnr["tikhonov"] == pytest.approx(table[table.method == "tikhonov"].psnr.mean())
    assert summary.images.tolist() == [3] * len(METHODS)


def test_results_do_not_depend_on_the_batch(weights, pair):
    _, x = pair
    A = Blur(40, 5, 2.0)
    d = measure(A, x, 0.01, 0, [0, 1, 2])
    tables = [evaluation.evaluate(make_methods(["jfb"], weights, CPU), A, x, d, 0.01,
                                  ["a", "b", "c"], batch_size=n) for n in (1, 3)]
    np.testing.assert_allclose(tables[0].psnr, tables[1].psnr, rtol=1e-4)
    assert tables[0].iterations.tolist() == tables[1].iterations.tolist()


class Scale(torch.nn.Module):
    """R(x) = (1 - factor) x, so that D(x) = factor x."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x, sigma):
        return (1 - self.factor) * x


@pytest.mark.parametrize(("factor", "contracts"), [(0.9, True), (1.1, False)])
def test_certificate_tells_an_equilibrium_from_an_iteration_stopped_early(pair, factor, contracts):
    """D scales, so J = factor tau (A'A + tau)^-1: its radius and norm are known."""
    _, x = pair
    A, tau = Blur(40, 5, 2.0), 0.05
    d = measure(A, x, 0.01, 0, [0, 1, 2])
    T = SplittingMap(A, Denoiser(Scale(factor), 0.0), tau)
    found = evaluation.certify(T, x, d, ["a", "b", "c"], further=300)
    assert found.image.tolist() == ["a", "b", "c"]
    assert found.evaluations.between(2, 50).all() == contracts
    largest = factor * tau / (A.spectrum.square().min().item() + tau)
    np.testing.assert_allclose(found.radius, largest, rtol=2e-2)
    np.testing.assert_allclose(found.norm, largest, rtol=2e-2)
    assert ((found.psnr_later - found.psnr).abs() < 0.02).all() == contracts
    assert (found.radius < 1).all() == contracts


def test_conditions_tell_the_methods_the_assumed_blur_and_the_noise(weights, image_folder):
    images = load_images(image_folder, 40, 3, print)
    sharp, wide = Blur(40, 5, 1.0), Blur(40, 5, 3.0)
    conditions = {"told": (wide, wide, 0.01), "wrong": (wide, sharp, 0.01),
                  "noisy": (wide, wide, 0.02)}
    methods = make_methods(["measurement", "tikhonov"], weights, CPU)
    table = evaluation.evaluate_conditions(methods, conditions, images, 0, CPU)
    psnrs = table.pivot(index="condition", columns="method", values="psnr")
    assert psnrs.measurement["told"] == pytest.approx(psnrs.measurement["wrong"])
    assert psnrs.tikhonov["told"] > psnrs.tikhonov["wrong"]
    x = images.as_float()
    d = measure(wide, x, 0.02, 0, images.indices)
    lam = 4 * Tuning.load(weights / "tuning.json").chosen["tikhonov"]["lam"]  # (0.02 / 0.01)^2
    expected = psnr(wide.solve_normal(wide.adjoint(d), lam), x).mean().item()
    assert psnrs.tikhonov["noisy"] == pytest.approx(expected, abs=1e-4)


def test_standard_error():
    table = pd.DataFrame({"method": "jfb", "psnr": [30.0, 32.0], "ssim": [0.9, 0.9],
                          "converged": [1.0, 0.0], "iterations": [5, 9], "seconds": [1.0, 3.0]})
    row = summarise(table).iloc[0]
    assert row.psnr_se == pytest.approx(1.0) and row.converged == 0.5
    assert row.median_iterations == 7 and row.seconds_per_image == 2


def test_table2_has_published_and_own_rows(tmp_path):
    summary = pd.DataFrame({"method": ["tikhonov", "jfb"], "psnr": [28.6, 33.0],
                            "psnr_se": [0.1, 0.1], "ssim": [0.8, 0.92], "ssim_se": [0.01, 0.01],
                            # of 2,000 images one: it must not be rounded away
                            "converged": [np.nan, 0.9995], "seconds_per_image": [0.001, 0.2]})
    table = table2(summary, {"jfb": 12.5}).set_index("Method")
    assert table.loc["JFB", "Published PSNR"] == 26.88
    assert table.loc["JFB", "Published PSNR, range 1"] == "32.90"
    assert table.loc["Deep equilibrium", "Published PSNR, range 1"] == "32.43 or 38.45"
    assert table.loc["Tikhonov", "Published PSNR, range 1"] == ""
    assert np.isnan(table.loc["Deep equilibrium", "PSNR (dB)"])
    save_table(table.reset_index(), tmp_path / "t", "A caption.")
    (line,) = [s for s in (tmp_path / "t.md").read_text().splitlines() if s.startswith("| JFB")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["JFB", "33.00", "0.10", "0.920", "0.010", "99.95%", "0.2", "12.50", "26.88",
                     "32.90", "0.910"]
    for suffix in ("md", "tex"):
        text = (tmp_path / f"t.{suffix}").read_text()
        assert "32.43 or 38.45" in text and "nan" not in text.lower()
    assert r"\begin{tabular}" in (tmp_path / "t.tex").read_text()
    stored = pd.read_csv(tmp_path / "t.csv").fillna({"Published PSNR, range 1": ""})
    pd.testing.assert_frame_equal(stored, table.reset_index())
